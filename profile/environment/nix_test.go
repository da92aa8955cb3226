package environment

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
)

// nixHost is a stock Nix with a store directory of its own.
type nixHost struct {
	t   *testing.T
	tmp string
	dir flox.StoreDir
}

// newNixHost skips where there is no Nix, except where that must not go unseen.
func newNixHost(t *testing.T) nixHost {
	t.Helper()
	if _, err := exec.LookPath("nix-build"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("Nix is not installed: install nix-bin")
		}
		t.Skip("Nix is not installed")
	}
	tmp := t.TempDir()
	t.Cleanup(func() { // Nix seals its store
		err := filepath.WalkDir(tmp, func(p string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				err = os.Chmod(p, 0o755)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	return nixHost{t: t, tmp: tmp, dir: flox.StoreDir(tmp + "/store")}
}

func (h nixHost) command(name string, args ...string) (string, error) {
	cmd := exec.CommandContext(h.t.Context(), name, args...)
	cmd.Env = []string{
		"HOME=" + h.tmp, "PATH=" + os.Getenv("PATH"), "NIX_STORE_DIR=" + string(h.dir), "NIX_STATE_DIR=" + h.tmp + "/var", "NIX_LOG_DIR=" + h.tmp + "/log",
		"NIX_CONF_DIR=" + h.tmp + "/conf", "NIX_USER_CONF_FILES=", "NIX_REMOTE=local",
		"NIX_CONFIG=sandbox = false\nbuild-users-group =\nsubstituters =\nexperimental-features = nix-command\n",
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %q: %w\n%s", name, args, err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// write makes a package that is to be added.
func (h nixHost) write(n string, files map[string]string) string {
	h.t.Helper()
	src := filepath.Join(h.tmp, "src", n)
	check := func(err error) {
		h.t.Helper()
		if err != nil {
			h.t.Fatal(err)
		}
	}
	check(os.MkdirAll(src, 0o755))
	for p, text := range files {
		to := filepath.Join(src, p)
		check(os.MkdirAll(filepath.Dir(to), 0o755))
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			check(os.Symlink(target, to))
		} else if strings.HasPrefix(p, "bin/") {
			check(os.WriteFile(to, []byte(text), 0o755))
		} else {
			check(os.WriteFile(to, []byte(text), 0o644))
		}
	}
	return src
}

// buildenvs builds an environment of each case with builtin:buildenv, and gives
// what Nix says of all.
func (h nixHost) buildenvs(cases []*nixCase) string {
	var expr strings.Builder
	expr.WriteString("[\n")
	for i, c := range cases {
		var of []string
		for _, p := range c.packages {
			of = append(of, fmt.Sprintf("%q %q %q", fmt.Sprint(p.Active), fmt.Sprint(p.Priority), fmt.Sprint(len(p.Paths))))
			for _, out := range p.Paths {
				of = append(of, "(builtins.storePath "+h.dir.Join(out)+")")
			}
		}
		fmt.Fprintf(&expr, `(derivation { name = "env-%d"; system = "builtin"; builder = "builtin:buildenv"; manifest = builtins.toFile "manifest" ""; derivations = [ %s ]; })`+"\n", i, strings.Join(of, " "))
	}
	expr.WriteString("]")
	if _, err := h.command("nix-build", "-k", "--no-out-link", "-E", expr.String()); err != nil {
		return err.Error()
	}
	return ""
}

// forest reads what Nix made of case i.
func (h nixHost) forest(i int) map[string]string {
	found, err := filepath.Glob(fmt.Sprintf("%s/*-env-%d", h.dir, i))
	if err != nil || len(found) != 1 {
		h.t.Fatalf("environments of case %d: %v, %v", i, found, err)
	}
	links, out := map[string]string{}, found[0]
	err = filepath.WalkDir(out, func(p string, e fs.DirEntry, err error) error {
		rel := strings.TrimPrefix(strings.TrimPrefix(p, out), "/")
		if err != nil || rel == "" || rel == "manifest.nix" {
			return err
		}
		if e.IsDir() {
			links[rel+"/"] = ""
			return nil
		}
		links[rel], err = os.Readlink(p)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return links
}

// nixCase is a set of packages that name those before them as @name@.
type nixCase struct {
	names    []string
	files    map[string]map[string]string
	paths    map[string]flox.StorePath
	packages []Package
}

// add gives package i of each case to Nix in one call.
func (h nixHost) add(cases []*nixCase, s store, i int) {
	var sources []string
	var of []*nixCase
	for k, c := range cases {
		if i >= len(c.names) {
			continue
		}
		files := c.files[c.names[i]]
		for p, text := range files {
			for m, known := range c.paths {
				text = strings.ReplaceAll(text, "@"+m+"@", h.dir.Join(known))
			}
			files[p] = text
		}
		sources, of = append(sources, h.write(fmt.Sprintf("%s-%d", c.names[i], k), files)), append(of, c)
	}
	if len(sources) == 0 {
		return
	}
	out, err := h.command("nix-store", append([]string{"--add"}, sources...)...)
	if err != nil {
		h.t.Fatal(err)
	}
	for k, line := range strings.Fields(out) {
		p, err := h.dir.Parse(line)
		if err != nil {
			h.t.Fatal(err)
		}
		c := of[k]
		c.paths[c.names[i]], s[p] = p, c.files[c.names[i]]
		c.packages[i].Paths = []flox.StorePath{p}
	}
}

// TestForestIsTheOneOfNix lets stock Nix and this package make environments of
// the same random packages; where Nix refuses them, so must this.
func TestForestIsTheOneOfNix(t *testing.T) {
	h, s := newNixHost(t), store{}
	var cases []*nixCase
	const most = 7 // packages of a case
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 7))
		c := &nixCase{paths: map[string]flox.StorePath{}}
		c.names, c.files = randomStore(r, 2+r.IntN(most-1), func(n string) string { return "@" + n + "@" })
		for i, n := range c.names {
			priority := i // two packages of one priority collide most of the time
			if seed%3 == 0 {
				priority = r.IntN(6)
			}
			if seed%8 == 1 {
				priority += 999
			}
			c.packages = append(c.packages, Package{Name: n, Priority: priority, Active: r.IntN(5) > 0})
		}
		cases = append(cases, c)
	}
	for i := range most {
		h.add(cases, s, i)
	}
	said := h.buildenvs(cases)
	equal, refused := 0, 0
	for i, c := range cases {
		nixFailed := strings.Contains(said, fmt.Sprintf("-env-%d.drv' failed", i))
		e, err := Build(t.Context(), h.dir, s, c.packages)
		switch {
		case err == nil && !nixFailed:
			equal++
			if diff := cmp.Diff(h.forest(i), forest(e)); diff != "" {
				t.Errorf("case %d: -Nix +this\n%s", i, diff)
			}
		case errors.Is(err, flox.ErrBadInput) && nixFailed:
			refused++
		default:
			t.Errorf("case %d: this says %v, Nix fails: %v\n%s", i, err, nixFailed, said)
		}
	}
	t.Logf("%d equal, %d refused by both", equal, refused)
	if equal < 15 || refused < 3 {
		t.Errorf("%d environments equal and %d refused by both: the cases say too little\n%s", equal, refused, said)
	}
}
