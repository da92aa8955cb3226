package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
)

// maxSlots bounds the runs of one state directory at a time.
const maxSlots = 32

// maxSocketName is the longest name of a unix socket (unix(7), sun_path).
const maxSocketName = 107

// slot is the part of a private state directory that one run has to itself:
// state of an agent, mount point, socket. A run takes the first that is free, so
// that the usual one run at a time always finds the same cache; the next ones at
// the same time have a cache of their own each.
type slot struct {
	dir    string
	runDir string
	lock   *os.File
	own    bool // runDir is this run's only
}

// takeSlot takes the first free slot. ErrFull: all are in use.
func takeSlot(stateDir string) (*slot, error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, cli.Explain(flox.ErrDenied, "state directory: %v; choose another with --state-dir", err)
	}
	for n := range maxSlots {
		s := &slot{dir: filepath.Join(stateDir, strconv.Itoa(n))}
		taken, err := s.take()
		if err != nil {
			return nil, fmt.Errorf("state directory: %w", err)
		}
		if taken {
			return s, s.makeDirs()
		}
	}
	return nil, cli.Explain(flox.ErrFull, "%d programs run from %s at once already: end some, or choose another --state-dir", maxSlots, stateDir)
}

// take locks the slot; false when another run has it.
func (s *slot) take() (bool, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return false, err
	}
	f, err := os.OpenFile(filepath.Join(s.dir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return false, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return false, os.NewSyscallError("flock", err)
	}
	s.lock = f
	return true, nil
}

// makeDirs makes what is in a slot.
func (s *slot) makeDirs() error {
	for _, dir := range []string{s.scratch(), s.mountDir(), filepath.Join(s.dir, agentDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("state directory: %w", err)
		}
	}
	return s.makeRunDir()
}

// makeRunDir finds a place for the socket, whose name must be short: the user's
// directory for such things, else the slot, else a new directory.
func (s *slot) makeRunDir() error {
	s.removeStale()
	parent := os.TempDir()
	fits := func(dir string) bool { return len(filepath.Join(dir, cli.SocketName)) <= maxSocketName }
	if user := os.Getenv("XDG_RUNTIME_DIR"); ownDir(user) && fits(filepath.Join(user, runDirName+"0123456789")) {
		parent = user
	} else if s.runDir = filepath.Join(s.dir, "run"); fits(s.runDir) {
		if err := os.MkdirAll(s.runDir, 0o700); err != nil {
			return fmt.Errorf("run directory: %w", err)
		}
		return nil
	}
	dir, err := os.MkdirTemp(parent, runDirName)
	if err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	s.runDir, s.own = dir, true
	if err := os.WriteFile(s.runDirNote(), []byte(dir), 0o600); err != nil {
		s.release()
		return fmt.Errorf("run directory: %w", err)
	}
	return nil
}

// runDirName is how the name of a run directory outside of a slot begins.
const runDirName = "floxd-run-"

// runDirNote says which run directory goes with the slot.
func (s *slot) runDirNote() string { return filepath.Join(s.dir, "run-directory") }

// removeStale removes the run directory of a run that was killed.
func (s *slot) removeStale() {
	b, err := os.ReadFile(s.runDirNote())
	if err != nil {
		return
	}
	dir := string(b)
	info, err := os.Lstat(dir)
	if err == nil && info.IsDir() && strings.HasPrefix(filepath.Base(dir), runDirName) && ownDir(dir) {
		_ = os.RemoveAll(dir)
	}
	_ = os.Remove(s.runDirNote())
}

// ownDir reports whether dir is a directory of this user's and nobody else's.
func ownDir(dir string) bool {
	if !filepath.IsAbs(dir) {
		return false
	}
	info, err := os.Stat(dir)
	if err != nil || !info.IsDir() || info.Mode().Perm()&0o022 != 0 {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

func (s *slot) scratch() string  { return filepath.Join(s.dir, "root") }
func (s *slot) mountDir() string { return filepath.Join(s.dir, "mnt") }
func (s *slot) log() string      { return filepath.Join(s.dir, "agent.log") }

// release gives the slot back. What another run may use stays.
func (s *slot) release() {
	if s.own {
		_ = os.RemoveAll(s.runDir)
		_ = os.Remove(s.runDirNote())
		s.own = false
	}
	s.lock.Close()
}

// config is the configuration of a private agent in this slot, its invite
// installed.
func (s *slot) config(ctx context.Context, file string, opts *runOptions) (*Config, error) {
	cfg := DefaultConfig()
	cfg.Agent.Listen, cfg.Agent.MDNS, cfg.Agent.DHTServer = []string{"0.0.0.0:0"}, false, false
	if file == "" {
		file = os.Getenv(cli.EnvConfig) // the default file is that of the machine's own agent
	}
	if file != "" {
		if err := ReadConfig(cfg, file, true); err != nil {
			return nil, err
		}
	}
	if err := readEnv(cfg); err != nil {
		return nil, err
	}
	cfg.StoreDir, cfg.StateDir, cfg.RunDir = opts.storeDir, s.dir, s.runDir
	cfg.Agent.Invite, cfg.Mount = "", ""
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return cfg, s.install(ctx, cfg, opts)
}

// install gives the agent of this slot the invite, and remembers it for later
// runs that are given none.
func (s *slot) install(ctx context.Context, cfg *Config, opts *runOptions) error {
	remembered := filepath.Join(opts.stateDir, inviteName)
	from := opts.invite
	if from == "" {
		from = remembered
	}
	if line := inviteIn(from); line != "" {
		return s.join(ctx, cfg, opts, line, remembered)
	}
	invite, err := checkInvite(cfg, from)
	if err != nil {
		return err
	}
	for _, to := range []string{remembered, filepath.Join(s.dir, agentDir, inviteName)} {
		if had, err := api.LoadInvite(to); err == nil && reflect.DeepEqual(had, invite) {
			continue
		}
		if err := invite.Save(to); err != nil {
			return err
		}
	}
	return nil
}

// usedName is the file of a slot that holds the invite it joined with.
const usedName = "joined-with"

// join makes the agent of this slot a member with an invite's line, once: each slot
// has a key of its own, and is a machine to the storehouse.
func (s *slot) join(ctx context.Context, cfg *Config, opts *runOptions, line, remembered string) error {
	invite, err := agentInvite(cfg, line)
	if err != nil {
		return err
	}
	used := filepath.Join(s.dir, usedName)
	if !holdsLine(used, line) {
		name, err := machineName("", "", false)
		if err != nil {
			return err
		}
		step := &entry.Step{
			Do: entry.Join, StateDir: s.dir, Invite: invite, Name: name + "-run-" + strings.ToLower(rand.Text()[:8]),
			User: person(), Version: cli.ReadVersion().Version,
		}
		if _, err := step.Join(ctx); err != nil { // as who this is: so is the agent
			return s.notJoined(err, opts.stateDir, line)
		}
	}
	for _, file := range []string{used, remembered} {
		if holdsLine(file, line) {
			continue
		}
		if err := os.WriteFile(file, []byte(line+"\n"), 0o600); err != nil {
			return fmt.Errorf("remember the invite: %w", err)
		}
	}
	return nil
}

// notJoined says what to do when the storehouse did not take the agent of this slot.
func (s *slot) notJoined(err error, stateDir, line string) error {
	if !errors.Is(err, flox.ErrDenied) {
		return err
	}
	others := 0
	for n := range maxSlots {
		if dir := filepath.Join(stateDir, strconv.Itoa(n)); dir != s.dir && holdsLine(filepath.Join(dir, usedName), line) {
			others++
		}
	}
	if others > 0 {
		return cli.Explain(flox.ErrDenied, `programs that run at the same time have an agent each, and the invite lets in no more than the %d that joined with it from %s (%v).
Wait until one of those has ended, or run with an invite for more machines: --invite FILE, made on a server of the storehouse or by its admin with
  floxctl invite --role agent --ephemeral --uses %d >FILE`, others, stateDir, err, others+1)
	}
	return cli.Explain(flox.ErrDenied, "%v: %s", err, cli.HowToBeInvited)
}

// holdsLine reports whether a file holds a line and nothing else.
func holdsLine(file, line string) bool {
	had, err := os.ReadFile(file)
	return err == nil && strings.TrimSpace(string(had)) == line
}
