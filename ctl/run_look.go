package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/room"
)

// envInvite names an invite for run.
const envInvite = "FLOXD_INVITE"

const (
	// statusPatience is how long an agent may take to say where it has mounted.
	statusPatience = 5 * time.Second
	// mountPatience is how long a mount may take to say whether it has a path.
	mountPatience = 10 * time.Second
)

// surroundings is what run decides on.
type surroundings struct {
	what     target
	storeDir flox.StoreDir
	socket   string
	agent    string   // why no agent answers; "" = one does
	mounts   []string // where stores are mounted
	nix      string   // the agent's socket for stock Nix; "" = none
	served   string   // where the agent has its store mounted
	merged   string   // the local Nix store that the agent shows, too; "" = none
	stateDir string
	invite   string // file, "" = none
	given    string // the same, if it was named for this run
	looked   string // where it was looked for
	unusable error  // why one's own invite is none
	floxd    string // program, "" = none
	root     bool   // this is the machine's root, and so would be what it starts
	hides    bool   // something else is in the store directory, which a namespace would cover
	// has reports why the mount at a directory does not have the path; "" = it does.
	has func(mount string) string
	// found is what this machine allows; it is only found out when asked for.
	found func() room.Found
}

// look finds out everything that costs little.
func look(ctx context.Context, opts *runOptions, what target) (*surroundings, error) {
	s := &surroundings{
		what: what, socket: opts.socketPath(), mounts: room.Mounts(), floxd: findFloxd(), root: room.Root(),
		found: sync.OnceValue(func() room.Found { return room.Probe(ctx, "run", "--probe") }),
	}
	s.has = func(mount string) string { return hasPath(ctx, filepath.Join(mount, string(what.Path))) }
	var err error
	if s.stateDir, err = privateState(opts.stateDir); err != nil {
		return nil, err
	}
	served := s.askAgent(ctx, opts)
	invite, err := s.findInvite(opts.invite)
	if err != nil {
		return nil, err
	}
	for _, known := range []struct{ dir, from string }{
		{served, "the agent at " + s.socket},
		{string(invite), "the invite " + s.invite},
		{opts.storeDir, "--store-dir"},
		{what.dir, "PATH"},
		{string(flox.DefaultStoreDir), ""},
	} {
		switch {
		case known.dir == "":
		case s.storeDir == "":
			if s.storeDir, err = flox.ParseStoreDir(known.dir); err != nil {
				return nil, err
			}
		case known.dir != string(s.storeDir) && (known.from == "PATH" || known.from == "--store-dir"):
			return nil, cli.Explain(flox.ErrBadInput, "%s says store directory %s, but the one here is %s, and it is part of every path's hash", known.from, known.dir, s.storeDir)
		}
	}
	s.hides = !slices.Contains(s.mounts, string(s.storeDir)) && holds(string(s.storeDir))
	return s, nil
}

// holds reports whether there is anything in a directory.
func holds(dir string) bool {
	f, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer f.Close()
	names, _ := f.Readdirnames(1) // what cannot be read is not there for a program either
	return len(names) > 0
}

// askAgent gives the store directory of the agent, if there is one.
func (s *surroundings) askAgent(ctx context.Context, opts *runOptions) string {
	ctx, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	resp, err := opts.agent().Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	var dial *cli.DialError
	switch {
	case err == nil:
		s.nix, s.served, s.merged = resp.Msg.GetNixSocket(), resp.Msg.GetMountDir(), resp.Msg.GetLocalStore().GetDir()
		return resp.Msg.GetStoreDir()
	case errors.As(err, &dial) && errors.Is(err, fs.ErrNotExist):
		s.agent = "there is no agent (no socket at " + s.socket + ")"
	case errors.As(err, &dial):
		s.agent = "no agent answers at " + s.socket
	default:
		s.agent = "the agent at " + s.socket + " does not answer (" + explain(err).Error() + ")"
	}
	return ""
}

// findInvite looks for an invite and gives its store directory.
func (s *surroundings) findInvite(given string) (flox.StoreDir, error) {
	if given == "" {
		given = os.Getenv(envInvite)
	}
	if given != "" {
		abs, err := filepath.Abs(given)
		if err != nil {
			return "", cli.Explain(flox.ErrBadInput, "invite %s: %v", given, err)
		}
		dir, err := inviteStore(abs)
		if err != nil {
			return "", err
		}
		s.invite, s.given = abs, abs
		return dir, nil
	}
	for _, file := range s.inviteFiles() {
		dir, err := inviteStore(file)
		if err == nil {
			s.invite = file
			return dir, nil
		}
		// One's own is there to be used; the agent's may be for others only.
		if file != agentInvite && !errors.Is(err, flox.ErrNotFound) {
			s.unusable = err // said when it is needed: not every mode does
			return "", nil
		}
		if s.looked != "" {
			s.looked += ", "
		}
		s.looked += file
	}
	return "", nil
}

// inviteStore gives the store directory of the storehouse that a file invites to: it
// holds a line of text as floxctl invite prints it, or is an invite.json.
func inviteStore(file string) (flox.StoreDir, error) {
	if f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0); err == nil { // a pipe would wait for a writer
		text, err := io.ReadAll(io.LimitReader(f, maxInviteFile))
		f.Close()
		if line := api.FindJoinInvite(string(text)); err == nil && line != "" {
			invite, err := api.ParseJoinInvite(line)
			if err != nil {
				return "", fmt.Errorf("%s: %w", file, err)
			}
			return invite.StoreDir, nil
		}
	}
	invite, err := api.LoadInvite(file)
	if err != nil {
		return "", err
	}
	return invite.StoreDir, nil
}

// maxInviteFile is how much of a file is looked at for an invite, in bytes.
const maxInviteFile = 64 << 10

// agentInvite is what the machine's agent installed.
var agentInvite = filepath.Join(cli.DefaultStateDir, "agent", "invite.json")

// inviteFiles are the places where an invite may lie, best first: the user's
// own, what the machine's agent installed, what an earlier run remembered.
func (s *surroundings) inviteFiles() []string {
	var files []string
	if dir, err := os.UserConfigDir(); err == nil {
		files = append(files, filepath.Join(dir, "floxd", "invite.json"))
	}
	return append(files, agentInvite, filepath.Join(s.stateDir, "invite.json"))
}

// privateState is where an agent of one's own keeps what it has.
func privateState(given string) (string, error) {
	if given != "" {
		return filepath.Abs(given)
	}
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "floxd"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil || !filepath.IsAbs(home) {
		return "", cli.Explain(flox.ErrBadInput, "there is no HOME to keep a cache in: name a directory with --state-dir")
	}
	return filepath.Join(home, ".local", "state", "floxd"), nil
}

// findFloxd finds the large program: beside this one, or on the PATH.
func findFloxd() string {
	if self, err := os.Executable(); err == nil {
		if file, err := exec.LookPath(filepath.Join(filepath.Dir(self), "floxd")); err == nil {
			return file
		}
	}
	file, err := exec.LookPath("floxd")
	if err != nil {
		return ""
	}
	abs, err := filepath.Abs(file)
	if err != nil {
		return ""
	}
	return abs
}

// hasPath asks a mount for a path. One that nobody serves may never answer, so
// it is asked by a goroutine that may be left behind.
func hasPath(ctx context.Context, path string) string {
	answer := make(chan error, 1)
	go func() {
		_, err := os.Lstat(path)
		answer <- err
	}()
	select {
	case err := <-answer:
		var reason *os.PathError
		switch {
		case err == nil:
			return ""
		case errors.Is(err, fs.ErrNotExist):
			return "it has no " + filepath.Base(path)
		case errors.As(err, &reason):
			return reason.Err.Error()
		}
		return err.Error()
	case <-time.After(mountPatience):
		return "it does not answer"
	case <-ctx.Done():
		return ctx.Err().Error()
	}
}
