package integration

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
)

// invocation is one run of a program of the world.
type invocation struct {
	argv []string // the first is below a store path: see lab.exe
	code int
	want string // stands in the output
}

// starts are 23 programs, each started once and asked next to nothing.
var starts = []invocation{
	{argv: []string{"git/bin/git", "--version"}, want: "git version"},
	{argv: []string{"git/bin/scalar", "version"}},
	{argv: []string{"git/bin/git-shell", "-c", "x"}, code: 128},
	{argv: []string{"python3-env/bin/python3", "-c", "pass"}},
	{argv: []string{"perl/bin/perl", "-e", "1"}},
	{argv: []string{"perl-base/bin/perl", "-e", "1"}},
	{argv: []string{"perl/bin/shasum", "--version"}},
	{argv: []string{"perl/bin/json_pp", "-v"}},
	{argv: []string{"perl/bin/prove", "--version"}},
	{argv: []string{"less/bin/less", "--version"}},
	{argv: []string{"less/bin/lessecho", "a"}},
	{argv: []string{"less/bin/lesskey", "--version"}},
	{argv: []string{"file/bin/file", "--version"}},
	{argv: []string{"dash/bin/dash", "-c", ":"}},
	{argv: []string{"openssh-client/bin/ssh", "-V"}},
	{argv: []string{"openssh-client/bin/ssh-keygen", "-?"}, code: 1},
	{argv: []string{"openssh-client/bin/ssh-add", "-h"}, code: 2},
	{argv: []string{"openssh-client/bin/ssh-agent", "-h"}, code: 1},
	{argv: []string{"openssh-client/bin/ssh-keyscan"}, code: 1},
	{argv: []string{"openssh-client/bin/scp"}, code: 1},
	{argv: []string{"openssh-client/bin/sftp"}, code: 1},
	{argv: []string{"ripgrep/bin/rg", "--version"}},
	{argv: []string{"libc6/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "--version"}},
}

// others are other things the same programs do: other subcommands, modules,
// libraries and data than were touched by starts.
var others = []invocation{
	{argv: []string{"git/bin/git", "init", "-q", "repo"}},
	{argv: []string{"git/bin/git", "-C", "repo", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "--allow-empty", "-m", "first words"}},
	{argv: []string{"git/bin/git", "-C", "repo", "log", "--stat"}, want: "first words"},
	{argv: []string{"git/bin/git", "-C", "repo", "fsck", "--full"}},
	{argv: []string{"git/bin/git", "-C", "repo", "gc", "-q"}},
	{argv: []string{"git/bin/git", "clone", "-q", "file:///run/work/repo", "copy"}},
	{argv: []string{"git/bin/git", "ls-remote", "http://127.0.0.1:1/x"}, code: 128, want: "Failed to connect"},
	{argv: []string{"python3-env/bin/python3", "-c", "import json, decimal, asyncio, ctypes, sqlite3, ssl; print(json.dumps([ssl.OPENSSL_VERSION]))"}, want: "OpenSSL"},
	{argv: []string{"python3-env/bin/python3", "-c", "import numpy; print(numpy.linalg.det(numpy.eye(3)))"}, want: "1.0"},
	{argv: []string{"perl/bin/perl", "-MJSON::PP", "-MPOSIX", "-MTime::HiRes", "-e", "print encode_json([POSIX::floor(1.5)])"}, want: "[1]"},
	{argv: []string{"perl-base/bin/perl", "-MList::Util", "-MPOSIX", "-e", "print List::Util::sum(1, 2)"}, want: "3"},
	{argv: []string{"perl/bin/shasum", "-a", "512", "/etc/hostname"}, want: "/etc/hostname"},
	{argv: []string{"perl/bin/corelist", "JSON::PP"}, want: "first released"},
	{argv: []string{"less/bin/less", "/etc/hosts"}, want: "localhost"},
	{argv: []string{"file/bin/file", "--brief", "/etc/hosts"}, want: "ASCII text"},
	{argv: []string{"dash/bin/dash", "-c", "trap : INT; x=1; while [ $x -lt 3 ]; do x=$((x+1)); done; printf 'x=%s' $x"}, want: "x=3"},
	{argv: []string{"openssh-client/bin/ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "key"}},
	{argv: []string{"openssh-client/bin/ssh-keygen", "-l", "-f", "key"}, want: "ED25519"},
	{argv: []string{"openssh-client/bin/ssh", "-G", "nowhere"}, want: "loglevel INFO"},
	{argv: []string{"openssh-client/bin/ssh", "-o", "ConnectTimeout=1", "127.0.0.1", "-p", "1"}, code: 255, want: "refused"},
	{argv: []string{"ripgrep/bin/rg", "--json", "-P", "(?<=local)host", "/etc/hosts"}, want: `"match"`},
}

// exe is the absolute name of a file given as NAME/FILE, NAME being that of a
// package of the world.
func (l *lab) exe(t *testing.T, name string) string {
	t.Helper()
	pkg, file, _ := strings.Cut(name, "/")
	for _, root := range []flox.StorePath{l.world.Git.Path, l.world.Python.Path, l.world.Ripgrep.Path, l.world.Unused.Path} {
		for _, p := range l.closure(root) {
			rest, ok := strings.CutPrefix(string(p)[flox.HashPartLen+1:], pkg+"-")
			if ok && rest[0] >= '0' && rest[0] <= '9' {
				return l.world.StoreDir.Join(p) + "/" + file
			}
		}
	}
	t.Fatalf("the world has no %s", name)
	return ""
}

// ended is how a program of the world ended.
type ended struct {
	code   int
	signal syscall.Signal
	out    string
}

// execute runs one program of the world with nothing around it, in /run/work of the
// host, for as long as patience.
func (l *lab) execute(t *testing.T, h *netns.Host, patience time.Duration, what invocation) ended {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := h.Command(ctx, "/usr/bin/env", append([]string{"-i", "-C", "/run/work", "PATH=/nonexistent", "HOME=/run/work", "GIT_CONFIG_NOSYSTEM=1", l.exe(t, what.argv[0])}, what.argv[1:]...)...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && ctx.Err() == nil {
		t.Fatal(err)
	}
	e := ended{code: cmd.ProcessState.ExitCode(), out: string(tail(out))}
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		e.signal = status.Signal()
	}
	return e
}

// bus reports whether it, or a program it ran, died of SIGBUS.
func (e ended) bus() bool {
	return e.signal == syscall.SIGBUS || strings.Contains(e.out, "Bus error") || strings.Contains(e.out, "signal 7")
}

func (e ended) as(what invocation) bool {
	return e.signal == 0 && e.code == what.code && strings.Contains(e.out, what.want)
}

// traveller is a host whose agent follows a storehouse with all of the world; all of starts ran there.
func (l *lab) traveller(t *testing.T, house *hosts.Storehouse, flags ...string) *hosts.Agent {
	t.Helper()
	h := l.host(t, "traveller")
	if _, err := h.Run(t.Context(), "mkdir", "-p", "/run/work"); err != nil {
		t.Fatal(err)
	}
	a := l.agentOf(t, h, house, flags...)
	await(t, a, "follows the storehouse", connected)
	for _, what := range starts {
		if e := l.execute(t, h, time.Minute, what); !e.as(what) {
			t.Fatalf("%v: %+v", what.argv, e)
		}
	}
	return a
}

// TestWholeSoon: programs are started once; when status says that they are ready
// the cable is pulled, and other parts of them work. What was never used does
// not: it is an error by the deadline, and no running program dies of it.
func TestWholeSoon(t *testing.T) {
	l := open(t)
	house := l.newHouse(t, l.host(t, "whole-house"), l.world.Git.Path, l.world.Python.Path, l.world.Ripgrep.Path, l.world.Unused.Path)
	t.Run("completed", func(t *testing.T) { l.wholeSoon(t, house) })
	t.Run("switched off", func(t *testing.T) { l.neverWhole(t, house) })
}

func (l *lab) wholeSoon(t *testing.T, house *hosts.Storehouse) {
	a := l.traveller(t, house, "--read-timeout", "3s")
	began := time.Now()
	var s *hosts.Status
	for ready := false; !ready; time.Sleep(500 * time.Millisecond) {
		s = status(t, a)
		ready = s.Offline.Used > 0 && s.Offline.UsedComplete == s.Offline.Used
		if time.Since(began) > 4*time.Minute {
			t.Fatalf("not ready after %s: %+v", time.Since(began), s.Offline)
		}
	}
	t.Logf("%d paths ready %s after the last start, %d bytes completed", s.Offline.Used, time.Since(began).Round(time.Second), s.Prefetch.CompleteBytes)
	do(t, a.Host, l.programs.Floxctl, "status").want(t, 0, "offline", "paths used here are ready", "to complete what was used")
	if err := a.Host.Unplug(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The next process of the agent knows it too, and asks nobody.
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all is ready after a restart without a network", func() bool {
		again := status(t, a)
		return again.Offline.Used == s.Offline.Used && again.Offline.UsedComplete == s.Offline.Used
	})
	for _, what := range others {
		if e := l.execute(t, a.Host, time.Minute, what); !e.as(what) || e.bus() {
			t.Errorf("%v, want code %d and %q: %+v", what.argv, what.code, what.want, e)
		}
	}
}

// neverWhole is the control: without completion the same does not work, and
// still nobody dies of SIGBUS.
func (l *lab) neverWhole(t *testing.T, house *hosts.Storehouse) {
	a := l.traveller(t, house, "--read-timeout", "2s", "--lookup-timeout", "1s", "--offline", "none", "--prefetch=false")
	if s := status(t, a); s.Offline.UsedComplete > s.Offline.Used/4 || s.Prefetch.CompleteBytes != 0 {
		t.Errorf("something is complete although that is switched off: %+v", s.Offline)
	}
	if err := a.Host.Unplug(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, what := range others {
		name := filepath.Base(what.argv[0])
		if !slices.Contains([]string{"python3", "file", "corelist"}, name) && !slices.Contains(what.argv, "ls-remote") {
			continue // may work: enough of it was touched
		}
		e := l.execute(t, a.Host, 6*time.Second, what)
		t.Logf("%v: %+v", what.argv, e)
		if e.as(what) || e.bus() {
			t.Errorf("%v: %+v; want an error, or waiting until it is killed", what.argv, e)
		}
	}
}
