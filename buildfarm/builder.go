// Package buildfarm builds derivations with real Nix. A Builder is one host's: it
// has a store of its own that lies at the store directory only for the processes of
// a build, so that it works beside whatever is mounted there, and gives what was
// built to its caller.
//
// It must not know who asks, which paths are valid elsewhere, or where content is
// kept: a Source gives it what a build needs.
package buildfarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Sandbox says whether builds see nothing but their inputs.
type Sandbox string

// What Config.Sandbox may be.
const (
	// SandboxAuto: where this machine can; where not, builds run only if they can have
	// user ids of their own.
	SandboxAuto Sandbox = "auto"
	SandboxOn   Sandbox = "on"
	SandboxOff  Sandbox = "off"
)

// Source gives what a build needs: valid store paths.
type Source interface {
	// Closure gives paths and all they refer to, references before what refers to them.
	Closure(ctx context.Context, paths []flox.StorePath) ([]*flox.PathInfo, error)
	// Nar writes the NAR of one of them.
	Nar(ctx context.Context, w io.Writer, info *flox.PathInfo) error
}

// Config says where a Builder works and how. A zero field is its default.
type Config struct {
	// Dir holds its store and state; one process at a time uses it. What is in it
	// can always be deleted while nobody does.
	Dir string
	// StoreDir is the store directory of what is built. Default /nix/store.
	StoreDir flox.StoreDir
	// Nix is the directory of the programs nix-store and nix-instantiate. Default:
	// where they are found in PATH. They must not lie below StoreDir.
	Nix string
	// Sandbox. Default SandboxAuto.
	Sandbox Sandbox
	// SandboxPaths are what builds in a sandbox see beside their inputs, as Nix's
	// setting sandbox-paths has it. Default: /bin/sh, with the libraries it needs.
	SandboxPaths []string
	// Hide are directories that are empty for builds, sandbox or not.
	Hide []string
	// Settings are further lines of nix.conf; they win.
	Settings string
	// MaxDisk is how many bytes of store paths are kept for the next build. Default 20 GiB.
	MaxDisk uint64
	// MaxLog is how many bytes a build may print before it is ended. Default 64 MiB.
	MaxLog uint64
	// Timeout and MaxSilent are how long a build may take, and print nothing, unless
	// who asks wants less. Default 10 h and 1 h.
	Timeout, MaxSilent time.Duration
	// Log takes what an operator may need; nil = discard.
	Log *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	if c.StoreDir == "" {
		c.StoreDir = flox.DefaultStoreDir
	}
	if c.Sandbox == "" {
		c.Sandbox = SandboxAuto
	}
	if c.MaxDisk == 0 {
		c.MaxDisk = 20 << 30
	}
	if c.MaxLog == 0 {
		c.MaxLog = 64 << 20
	}
	if c.Timeout == 0 {
		c.Timeout = 10 * time.Hour
	}
	if c.MaxSilent == 0 {
		c.MaxSilent = time.Hour
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if !filepath.IsAbs(c.Dir) {
		return c, fmt.Errorf("builder: directory %q: want an absolute path: %w", c.Dir, flox.ErrBadInput)
	}
	switch c.Sandbox {
	case SandboxAuto, SandboxOn, SandboxOff:
	default:
		return c, fmt.Errorf("builder: sandbox %q: want %s, %s or %s: %w", c.Sandbox, SandboxAuto, SandboxOn, SandboxOff, flox.ErrBadInput)
	}
	return c, nil
}

// Builder runs Nix. It is safe for use by many goroutines.
type Builder struct {
	cfg       Config
	version   string
	sandboxed bool
	unboxed   string // why not
	lock      *os.File
	own       bool // jobs have user ids of their own, which only root can give
	inputs    *inputs

	mu     sync.Mutex
	places map[int]bool // taken
}

// New makes a Builder in cfg.Dir: it finds Nix and whether builds can be run here.
// Errors: ErrNotFound when there is no Nix, ErrDenied when this machine does not let
// it keep builds apart, ErrBusy when the directory is in use, ErrBadInput.
func New(ctx context.Context, cfg Config) (*Builder, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	b := &Builder{cfg: cfg, places: map[int]bool{}}
	if err := b.findNix(); err != nil {
		return nil, err
	}
	if err := b.open(); err != nil {
		return nil, err
	}
	err = b.configure(cfg.Sandbox != SandboxOff)
	if err == nil {
		err = b.askVersion(ctx)
	}
	if err == nil {
		err = b.trySandbox(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// Close lets others use the directory. No build may be under way.
func (b *Builder) Close() error { return b.lock.Close() }

// Version is that of the Nix that builds.
func (b *Builder) Version() string { return b.version }

// Sandboxed reports whether builds see nothing but their inputs.
func (b *Builder) Sandboxed() bool { return b.sandboxed }

// Unboxed says why they see more, "" if they do not.
func (b *Builder) Unboxed() string { return b.unboxed }

// program is what a Builder runs.
const program = "nix-store"

func (b *Builder) findNix() error {
	file := filepath.Join(b.cfg.Nix, program)
	if b.cfg.Nix == "" {
		found, err := exec.LookPath(program)
		if err != nil {
			return fmt.Errorf("builds need Nix, and there is no %s in PATH: install it (Debian: apt install nix-bin): %w", program, flox.ErrNotFound)
		}
		file = found
		b.cfg.Nix = filepath.Dir(found)
	}
	inside := strings.HasPrefix(file, string(b.cfg.StoreDir)+"/")
	if !inside { // resolved only then: the store may wait for us
		real, err := filepath.EvalSymlinks(file)
		if err != nil {
			return fmt.Errorf("builds need Nix: %w: %w", err, flox.ErrNotFound)
		}
		inside = strings.HasPrefix(real, string(b.cfg.StoreDir)+"/")
	}
	if inside {
		return fmt.Errorf("builds need a Nix outside of %s, where the store of a build lies, and %s is inside: install one (Debian: apt install nix-bin): %w",
			b.cfg.StoreDir, file, flox.ErrNotFound)
	}
	return nil
}

// open makes the directories.
func (b *Builder) open() (err error) {
	dir := b.cfg.Dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("builder: %w", err)
	}
	if b.lock, err = lockFile(filepath.Join(dir, "lock")); err != nil {
		return err
	}
	if os.Geteuid() == 0 {
		err = os.Chown(dir, 0, 0)
	}
	// What builds left that a crash ended, and what was here before jobs had stores of
	// their own.
	for _, old := range []string{"jobs", "store", "var", "home", "tmp", "boot"} {
		err = errors.Join(err, remove(filepath.Join(dir, old)))
	}
	for _, sub := range []string{"inputs", "jobs", "etc", "root"} {
		if err == nil {
			err = os.MkdirAll(filepath.Join(dir, sub), 0o755)
		}
	}
	if err == nil {
		b.own = b.canGive()
		b.inputs, err = openInputs(filepath.Join(dir, "inputs"))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("builder: %w", err), b.lock.Close())
	}
	return nil
}

// firstID is the first of the user and group ids that Nix runs as where root has it
// run, one for every job at a time: those that Nix takes for builds on its own (its
// setting start-id).
const firstID = 872415232

// canGive reports whether this process can give jobs user ids of their own.
func (b *Builder) canGive() bool {
	if os.Geteuid() != 0 {
		return false
	}
	jobs := filepath.Join(b.cfg.Dir, "jobs")
	err := os.Chown(jobs, firstID+maxPlaces-1, firstID+maxPlaces-1)
	if err = errors.Join(err, os.Chown(jobs, 0, 0)); err != nil {
		b.cfg.Log.Warn("builds run as this process's user: unused user ids cannot be had", "error", err)
	}
	return err == nil
}

// configure writes nix.conf.
func (b *Builder) configure(sandbox bool) error {
	b.sandboxed = sandbox
	paths := b.cfg.SandboxPaths
	if len(paths) == 0 && sandbox {
		var err error
		if paths, err = shellPaths(); err != nil {
			b.cfg.Log.Warn("builds in the sandbox have no /bin/sh", "error", err)
		}
	}
	conf := fmt.Sprintf(`build-users-group =
sandbox = %t
sandbox-fallback = false
sandbox-paths = %s
substituters =
substitute = false
require-sigs = false
builders =
experimental-features = nix-command ca-derivations
keep-build-log = false
keep-derivations = false
keep-outputs = false
fsync-metadata = false
max-build-log-size = %d
%s
`, sandbox, strings.Join(paths, " "), b.cfg.MaxLog, b.cfg.Settings)
	if err := os.WriteFile(filepath.Join(b.cfg.Dir, "etc", "nix.conf"), []byte(conf), 0o644); err != nil { // #nosec: no secret
		return fmt.Errorf("builder: %w", err)
	}
	return nil
}

// maxHeap bounds the memory of an evaluation, in bytes.
const maxHeap = 8 << 30

// room prepares a room for nix-store, or another program of Nix, in a place.
func (p *place) room(ctx context.Context, name string, args ...string) (*room, error) {
	b := p.b
	env := []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + ownDir + "/home", "USER=builder", "TMPDIR=/tmp", "LANG=C.UTF-8",
		"NIX_REMOTE=local", "NIX_STORE_DIR=" + string(b.cfg.StoreDir), "NIX_STATE_DIR=" + ownDir + "/var/nix",
		"NIX_LOG_DIR=" + ownDir + "/var/log", "NIX_CONF_DIR=" + ownDir + "/etc", "NIX_USER_CONF_FILES=/dev/null",
		fmt.Sprint("GC_MAXIMUM_HEAP_SIZE=", maxHeap),
	}
	at := &plan{
		Root: filepath.Join(b.cfg.Dir, "root"), Own: p.dir, Conf: filepath.Join(b.cfg.Dir, "etc"), Inputs: b.inputs.dir, Trees: p.trees,
		StoreDir: string(b.cfg.StoreDir), Hide: append([]string{b.cfg.Dir}, b.cfg.Hide...), Sealed: !b.sandboxed, As: p.as,
		File: filepath.Join(b.cfg.Nix, name), Args: append([]string{name}, args...), Env: env,
	}
	if _, err := os.Lstat(p.registration()); err == nil {
		at.Load, at.LoadArgs = p.registration(), []string{program, "--load-db"} // all programs of Nix are one, which goes by its name
	}
	return newRoom(ctx, at)
}

// run runs a Nix program to its end and gives what it printed. The error has what
// it said on stderr.
func (p *place) run(ctx context.Context, program string, args ...string) (string, error) {
	r, err := p.room(ctx, program, args...)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	said := &capture{}
	r.Stdout, r.Stderr = &out, said
	if err = r.start(); err == nil {
		err = r.wait()
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", program, err, strings.TrimSpace(said.buf.String()))
	}
	return out.String(), nil
}

var versionWords = regexp.MustCompile(`\(.*\) (\S+)`)

// askVersion learns the version, and whether rooms can be made.
func (b *Builder) askVersion(ctx context.Context) error {
	p, err := b.place()
	if err != nil {
		return err
	}
	defer p.close()
	out, err := p.run(ctx, program, "--version")
	if err != nil {
		return fmt.Errorf("no build can be run on this machine; it needs user namespaces (sysctl user.max_user_namespaces above 0; "+
			"as an ordinary user also kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0): %w: %w", err, flox.ErrDenied)
	}
	m := versionWords.FindStringSubmatch(out)
	if m == nil {
		return fmt.Errorf("builder: nix-store --version says %q: %w", out, flox.ErrBadInput)
	}
	b.version = m[1]
	return nil
}

// trySandbox finds out whether this machine can make Nix's sandbox: something is built
// by Nix itself, in one.
func (b *Builder) trySandbox(ctx context.Context) error {
	if b.cfg.Sandbox == SandboxOff {
		return b.unbox("it is switched off (build-sandbox)")
	}
	name := "sandbox-probe"
	out := flox.StorePath(strings.Repeat("0", flox.HashPartLen) + "-" + name)
	probe := &Job{Drv: out + nix.DrvExtension, Plan: &nix.Derivation{
		Name: name, Platform: "builtin", Builder: "builtin:buildenv", Outputs: map[string]nix.DrvOutput{"out": {Kind: nix.OutputInputAddressed, Path: out}},
		Env: map[string]string{"out": b.cfg.StoreDir.Join(out), "name": name, "derivations": "", "manifest": "none"},
	}}
	p, err := b.place()
	if err != nil {
		return err
	}
	defer p.close()
	result, _, err := p.realise(ctx, probe, io.Discard, func(Event) {})
	switch {
	case err != nil:
		return err
	case result.Status.OK():
		return nil
	}
	why := "Nix's sandbox does not work on this machine: " + strings.Join(strings.Fields(result.Message), " ")
	switch {
	case b.cfg.Sandbox == SandboxOn:
		return fmt.Errorf("none but sandboxed builds are wanted, and %s: %w", why, flox.ErrDenied)
	case !b.own:
		return fmt.Errorf("%s; without it builds would run as this server's own user, and could change whatever that may: "+
			"run the server as root, which gives every build a user id of its own, or set build-sandbox = off if whoever may have something built is trusted that far: %w", why, flox.ErrDenied)
	}
	return b.unbox(why)
}

// unbox has builds run without a sandbox.
func (b *Builder) unbox(why string) error {
	as := "as this server's own user, and may read and talk to what that may: whoever may have something built must be trusted that far"
	if b.own {
		as = "as users of their own"
	}
	b.unboxed = fmt.Sprintf("%s; they see this machine's files, read-only, %s", why, as)
	b.cfg.Log.Warn("builds run without a sandbox", "why", b.unboxed)
	return b.configure(false)
}
