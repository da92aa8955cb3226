package world

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// control is what the world needs of a Debian package's control data.
type control struct {
	Name, Version string
	// File is where the archive has it, "" if it was installed from elsewhere.
	File string
	// Depends are alternatives of package names, versions left out.
	Depends  [][]string
	Provides []string
}

// pkg is an entry of packages.json, which world.nix reads.
type pkg struct {
	Version string   `json:"version"`
	Deb     string   `json:"deb"`
	Deps    []string `json:"deps"`
}

// parseControl reads stanzas as `apt-cache show` prints them.
func parseControl(text []byte) ([]control, error) {
	var all []control
	var c control
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, 1<<20)
	flush := func() {
		if c.Name != "" {
			all = append(all, c)
		}
		c = control{}
	}
	for lines.Scan() {
		line := lines.Text()
		if line == "" {
			flush()
			continue
		}
		field, value, ok := strings.Cut(line, ":")
		if !ok || line[0] == ' ' || line[0] == '\t' {
			continue // a continued field; none that we read is
		}
		value = strings.TrimSpace(value)
		switch field {
		case "Package":
			c.Name = value
		case "Version":
			c.Version = value
		case "Filename":
			c.File = value
		case "Depends", "Pre-Depends":
			c.Depends = append(c.Depends, parseRelations(value)...)
		case "Provides":
			for _, p := range parseRelations(value) {
				c.Provides = append(c.Provides, p[0])
			}
		}
	}
	flush()
	return all, lines.Err()
}

// parseRelations reads "a (>= 1) | b:any, c" as [[a b] [c]].
func parseRelations(value string) [][]string {
	var all [][]string
	for group := range strings.SplitSeq(value, ",") {
		var names []string
		for alternative := range strings.SplitSeq(group, "|") {
			name, _, _ := strings.Cut(strings.TrimSpace(alternative), " ")
			name, _, _ = strings.Cut(name, "(")
			name, _, _ = strings.Cut(name, ":")
			if name != "" {
				names = append(names, name)
			}
		}
		if len(names) > 0 {
			all = append(all, names)
		}
	}
	return all
}

// resolve gives the packages that the set needs, with their dependencies: of
// alternatives the first that exists, nothing excluded, no cycle.
func (s *set) resolve(known []control) (map[string]*pkg, error) {
	r := resolver{
		set: s, byName: map[string]control{}, provider: map[string]string{},
		packages: map[string]*pkg{}, onStack: map[string]bool{},
	}
	for _, c := range known {
		if _, ok := r.byName[c.Name]; !ok {
			r.byName[c.Name] = c
		}
		for _, p := range c.Provides {
			if r.provider[p] == "" {
				r.provider[p] = c.Name
			}
		}
	}
	for _, name := range s.tops {
		if err := r.visit(name); err != nil {
			return nil, err
		}
	}
	return r.packages, nil
}

type resolver struct {
	set      *set
	byName   map[string]control
	provider map[string]string // of a virtual package
	packages map[string]*pkg
	onStack  map[string]bool // being visited: a dependency on one is a cycle
}

// visit resolves name and what it needs, depth first.
func (r *resolver) visit(name string) error {
	if r.packages[name] != nil {
		return nil
	}
	c, ok := r.byName[name]
	if !ok {
		return fmt.Errorf("apt knows no package %s: run `apt-get update`", name)
	}
	p := &pkg{Version: c.Version, Deps: []string{}}
	r.packages[name] = p
	r.onStack[name] = true
	defer delete(r.onStack, name)
	for _, alternatives := range r.relations(c) {
		if slices.ContainsFunc(alternatives, r.excluded) {
			continue
		}
		dep := r.choose(alternatives)
		if dep == "" {
			return fmt.Errorf("package %s: apt knows none of %s", name, strings.Join(alternatives, ", "))
		}
		if r.excluded(dep) || r.onStack[dep] || slices.Contains(p.Deps, dep) {
			continue
		}
		if err := r.visit(dep); err != nil {
			return err
		}
		p.Deps = append(p.Deps, dep)
	}
	slices.Sort(p.Deps)
	return nil
}

// relations are Debian's dependencies of a package as this world has them.
func (r *resolver) relations(c control) [][]string {
	if only, ok := severed[c.Name]; ok {
		return single(only)
	}
	relations := slices.Concat(c.Depends, single(r.set.added[c.Name]))
	// Scripts of any package may want a shell, which Debian takes for granted.
	if c.Name != "dash" && len(relations) > 0 {
		relations = append(relations, []string{"dash"})
	}
	return relations
}

// choose gives the package that is taken for alternatives, "" if there is none.
func (r *resolver) choose(alternatives []string) string {
	for _, name := range alternatives {
		if _, ok := r.byName[name]; ok {
			return name
		}
	}
	for _, name := range alternatives {
		if p := r.provider[name]; p != "" {
			return p
		}
	}
	return ""
}

func (r *resolver) excluded(name string) bool { return slices.Contains(r.set.excluded, name) }

func single(names []string) [][]string {
	var groups [][]string
	for _, name := range names {
		groups = append(groups, []string{name})
	}
	return groups
}

// debian finds out with apt what to unpack and downloads it into dir. The
// result is named by packages; git-previous is another version of git, where
// the archive has one and the set wants it.
func (s *set) debian(ctx context.Context, dir string) (map[string]*pkg, error) {
	known, err := s.aptShow(ctx)
	if err != nil {
		// A fresh machine may have no package lists yet.
		if _, updateErr := run(ctx, dir, "apt-get", "update"); updateErr != nil {
			return nil, errors.Join(err, updateErr)
		}
		if known, err = s.aptShow(ctx); err != nil {
			return nil, err
		}
	}
	packages, err := s.resolve(known)
	if err != nil {
		return nil, err
	}
	if s.previous != "" {
		if old := otherVersion(ctx, s.previous, packages[s.previous].Version); old != "" {
			packages[s.previous+"-previous"] = &pkg{Version: old, Deps: packages[s.previous].Deps}
		}
	}
	if err := download(ctx, dir, packages); err != nil {
		return nil, err
	}
	return packages, nil
}

// aptRounds bounds how often aptShow asks again.
const aptRounds = 4

// aptShow reads the control data of everything the set may need. Where this
// machine has a package from elsewhere, apt follows that one's dependencies: what
// the archive's needs besides is asked for again.
func (s *set) aptShow(ctx context.Context) ([]control, error) {
	roots := slices.Clone(s.tops)
	for _, more := range s.added {
		roots = append(roots, more...)
	}
	var known []control
	for range aptRounds {
		more, err := aptClosure(ctx, roots)
		if err != nil {
			return nil, err
		}
		known = append(known, more...)
		if roots = missing(known); len(roots) == 0 {
			break
		}
	}
	return known, nil
}

// aptClosure reads the control data of packages and of all they may need, as the
// archive has them.
func aptClosure(ctx context.Context, roots []string) ([]control, error) {
	args := []string{
		"depends", "--recurse", "--no-recommends", "--no-suggests", "--no-conflicts",
		"--no-breaks", "--no-replaces", "--no-enhances",
	}
	out, err := run(ctx, "", "apt-cache", append(args, roots...)...)
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range strings.Lines(string(out)) {
		name = strings.TrimSuffix(name, "\n")
		if name != "" && name[0] != ' ' && name[0] != '<' {
			names = append(names, name)
		}
	}
	// All versions: the newest may be one that only this machine has.
	out, err = run(ctx, "", "apt-cache", append([]string{"show"}, names...)...)
	if err != nil {
		return nil, err
	}
	known, err := parseControl(out)
	return slices.DeleteFunc(known, func(c control) bool { return c.File == "" }), err
}

// missing are the dependencies of which no alternative is known.
func missing(known []control) []string {
	have := map[string]bool{}
	for _, c := range known {
		have[c.Name] = true
		for _, p := range c.Provides {
			have[p] = true
		}
	}
	var names []string
	for _, c := range known {
		for _, alternatives := range c.Depends {
			if !slices.ContainsFunc(alternatives, func(name string) bool { return have[name] }) {
				names = append(names, alternatives[0])
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// otherVersion gives a version of a package besides the given one, or "".
func otherVersion(ctx context.Context, name, version string) string {
	out, err := run(ctx, "", "apt-cache", "madison", name)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Split(line, "|"); len(f) == 3 && strings.TrimSpace(f[1]) != version {
			return strings.TrimSpace(f[1])
		}
	}
	return ""
}

// download fetches into dir what is not there yet and fills in Deb.
func download(ctx context.Context, dir string, packages map[string]*pkg) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var wanted []string
	for name, p := range packages {
		name = strings.TrimSuffix(name, "-previous")
		if found := debFile(dir, name, p.Version); found != "" {
			p.Deb = found
			continue
		}
		wanted = append(wanted, name+"="+p.Version)
	}
	if len(wanted) == 0 {
		return nil
	}
	slices.Sort(wanted)
	// Root may write here, apt's own download user may not.
	args := append([]string{"download", "-q", "-o", "APT::Sandbox::User=root"}, wanted...)
	if _, err := run(ctx, dir, "apt-get", args...); err != nil {
		return err
	}
	for name, p := range packages {
		if p.Deb = debFile(dir, strings.TrimSuffix(name, "-previous"), p.Version); p.Deb == "" {
			return fmt.Errorf("apt-get download left no file for %s %s in %s", name, p.Version, dir)
		}
	}
	return nil
}

// debFile gives the file name apt chose for a package in dir, or "".
func debFile(dir, name, version string) string {
	found, err := filepath.Glob(filepath.Join(dir, name+"_"+strings.ReplaceAll(version, ":", "%3a")+"_*.deb"))
	if err != nil || len(found) == 0 {
		return ""
	}
	return filepath.Base(found[0])
}

// run gives the standard output of a command; the end of its standard error is
// part of the error.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	return output(cmd)
}

func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		tail := bytes.TrimSpace(stderr.Bytes())
		tail = tail[max(0, len(tail)-2000):]
		return out, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args[:min(len(cmd.Args), 4)], " "), err, tail)
	}
	return out, nil
}
