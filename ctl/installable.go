package ctl

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/room"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/profile/upgrade"
)

// describeNix says of a derivation of a Nix expression what a profile wants to know.
//
//go:embed describe.nix
var describeNix string

// maxDescribed bounds what is read of Nix's answer, in bytes.
const maxDescribed = 1 << 20

// An installable is what somebody wants to have installed.
type installable struct {
	arg    string
	system string // that it is for; "" = this machine's, or all that an expression has
	store  string // a store path or a name in one; else
	file   string // a Nix expression, absolute, with attr; else
	attr   string
	flake  string // a flake reference; else
	name   string // of a package in a channel
}

var systemPrefix = regexp.MustCompile(`^([a-z0-9_]+-(?:linux|darwin|freebsd|netbsd|openbsd))=(.+)$`)

// parseInstallable tells what a word means: [SYSTEM=] and a store path or link, FILE[#ATTR],
// FLAKE#ATTR, or a package's name.
func parseInstallable(arg string) (i installable, err error) {
	i.arg = arg
	word := arg
	if m := systemPrefix.FindStringSubmatch(arg); m != nil {
		i.system, word = m[1], m[2]
	}
	file, attr, hash := strings.Cut(word, "#")
	if hash || strings.HasSuffix(word, ".nix") {
		at, kind := expressionAt(file)
		switch {
		case kind == "expression":
			i.file, i.attr = at, attr
			return i, nil
		case !hash || kind == "" && strings.HasSuffix(file, ".nix"):
			return i, fmt.Errorf("%s: there is no file %s: want a Nix expression, FILE or FILE#ATTR: %w", arg, at, flox.ErrBadInput)
		}
		i.flake = word
		return i, nil
	}
	if i.store, err = storeArg(word); err == nil {
		return i, nil
	}
	if upgrade.IsName(word) {
		i.store, i.name = "", word
		return i, nil
	}
	return i, fmt.Errorf("%w; a Nix expression is named as FILE#ATTR, such as ./default.nix#hello, a package of a channel as NAME, NAME@VERSION or CHANNEL.NAME", err)
}

// expressionAt is the absolute name of a file or directory with a Nix expression, and
// what is there: expression, flake, or nothing.
func expressionAt(name string) (at, kind string) {
	at, err := filepath.Abs(name)
	if err != nil {
		return name, ""
	}
	if inStore(at) {
		return at, "expression" // looking there could wait for the network; Nix may
	}
	st, err := os.Stat(at)
	switch {
	case err != nil:
		return at, ""
	case st.Mode().IsRegular():
		return at, "expression"
	}
	if _, err := os.Stat(filepath.Join(at, "flake.nix")); err == nil {
		return at, "flake"
	}
	if _, err := os.Stat(filepath.Join(at, "default.nix")); err == nil {
		return at, "expression"
	}
	return at, ""
}

// local reports whether nothing has to be evaluated for it.
func (i *installable) local() bool { return i.store != "" }

// stockNix runs programs of stock Nix against the agent's daemon.
type stockNix struct {
	env   []string
	error io.Writer // what Nix says of its progress
}

// newStockNix finds out how the agent's daemon is reached.
func newStockNix(ctx context.Context, g *globals, says io.Writer) (*stockNix, error) {
	ctx, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	resp, err := g.agent().Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	if err != nil {
		return nil, explain(err)
	}
	if resp.Msg.GetNixSocket() == "" {
		return nil, cli.Explain(flox.ErrNotFound, "the agent at %s has no socket for stock Nix, which evaluates this: take nix-socket = none out of its configuration", g.socketPath())
	}
	return &stockNix{room.NixClient(os.Environ(), resp.Msg.GetNixSocket()), says}, nil
}

// run gives what a program prints. What it says on the way is seen; Ctrl-C ends it.
func (n *stockNix) run(ctx context.Context, what, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var out bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = n.env, &bounded{w: &out, left: maxDescribed}, n.error
	switch err := cmd.Run(); {
	case errors.Is(err, exec.ErrNotFound):
		return nil, cli.Explain(flox.ErrNotFound, "%s needs the program %s of stock Nix, which is not on the PATH (Debian: apt install nix-bin)", what, program)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, cli.Explain(flox.ErrBadInput, "%s: %s failed (%v), see above; nothing was installed", what, program, err)
	}
	return out.Bytes(), nil
}

// bounded refuses what is longer than it may be.
type bounded struct {
	w    io.Writer
	left int
}

// Write implements io.Writer.
func (b *bounded) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		return 0, fmt.Errorf("more than %d bytes: %w", maxDescribed, flox.ErrBadInput)
	}
	return b.w.Write(p)
}

// described is what describe.nix says.
type described struct {
	Name     string   `json:"name"`
	Version  string   `json:"version"`
	System   string   `json:"system"`
	Drv      string   `json:"drv"`
	Outputs  []string `json:"outputs"` // to be installed
	Paths    []string `json:"paths"`   // where they will be
	Priority *int     `json:"priority"`
}

// packageOf makes a package of an installable, for all of systems where that can be.
// Nothing is built if it is only tried.
func (n *stockNix) packageOf(ctx context.Context, i *installable, systems []string, try bool) (*floxv1.Package, error) {
	if i.flake != "" {
		return n.fromFlake(ctx, i, try)
	}
	p := &floxv1.Package{Source: i.arg}
	for _, system := range systems {
		if i.system != "" && system != i.system {
			continue
		}
		d, err := n.describe(ctx, i, system)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(p.GetPaths(), func(have *floxv1.PackagePaths) bool { return have.GetSystem() == d.System }) {
			continue // the expression is for one system, whichever it is asked for
		}
		paths, err := n.outputs(ctx, i, d, try)
		if err != nil {
			return nil, err
		}
		p.Name, p.Version, p.Priority = d.Name, d.Version, defaultPriority
		if d.Priority != nil && *d.Priority >= 0 {
			p.Priority = uint32(*d.Priority) //nolint:gosec // not negative, and the storehouse bounds it
		}
		p.Paths = append(p.Paths, &floxv1.PackagePaths{System: d.System, Paths: paths})
	}
	return p, nil
}

func (n *stockNix) describe(ctx context.Context, i *installable, system string) (*described, error) {
	out, err := n.run(ctx, i.arg, "nix-instantiate", "--eval", "--strict", "--json", "--read-write-mode",
		"--argstr", "file", i.file, "--argstr", "attr", i.attr, "--argstr", "system", system, "-E", describeNix)
	if err != nil {
		return nil, err
	}
	d := &described{}
	if err := json.Unmarshal(out, d); err != nil || d.Drv == "" || len(d.Outputs) == 0 {
		return nil, fmt.Errorf("%s: Nix describes it as %.200q: %w", i.arg, out, flox.ErrBadInput)
	}
	return d, nil
}

// outputs has the outputs of a derivation that are to be installed built.
func (n *stockNix) outputs(ctx context.Context, i *installable, d *described, try bool) ([]string, error) {
	if try {
		return baseNames(i.arg, d.Paths)
	}
	args := []string{"--realise"}
	for _, o := range d.Outputs {
		args = append(args, d.Drv+"!"+o)
	}
	out, err := n.run(ctx, i.arg, "nix-store", args...)
	if err != nil {
		return nil, err
	}
	return baseNames(i.arg, strings.Fields(string(out)))
}

func (n *stockNix) fromFlake(ctx context.Context, i *installable, try bool) (*floxv1.Package, error) {
	args := []string{"--extra-experimental-features", "nix-command flakes", "build", "--no-link", "--json", i.flake}
	if try {
		args = append(args, "--dry-run")
	}
	out, err := n.run(ctx, i.arg, "nix", args...)
	if err != nil {
		return nil, err
	}
	var built []struct {
		Outputs map[string]string `json:"outputs"`
	}
	if err := json.Unmarshal(out, &built); err != nil || len(built) != 1 || len(built[0].Outputs) == 0 {
		return nil, fmt.Errorf("%s: Nix answers %.200q, want one derivation: %w", i.arg, out, flox.ErrBadInput)
	}
	var paths []string
	for _, path := range built[0].Outputs {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	if paths, err = baseNames(i.arg, paths); err != nil {
		return nil, err
	}
	p := &floxv1.Package{Source: i.arg, Priority: defaultPriority, Paths: []*floxv1.PackagePaths{{System: systemOr(i.system), Paths: paths}}}
	p.Name, p.Version = nix.NameAndVersion(flox.StorePath(paths[0]).Name())
	return p, nil
}

// baseNames checks store paths that Nix named.
func baseNames(what string, paths []string) ([]string, error) {
	names := make([]string, len(paths))
	for i, path := range paths {
		p, err := storePathIn(path)
		if err != nil {
			return nil, fmt.Errorf("%s: Nix names the output %.200q: %w", what, path, err)
		}
		names[i] = string(p)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("%s: it has no output: %w", what, flox.ErrBadInput)
	}
	return names, nil
}

func systemOr(system string) string {
	if system == "" {
		return thisSystem()
	}
	return system
}
