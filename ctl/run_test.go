package ctl

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/room"
)

const runPath = "00000000000000000000000000000000-git"

// around makes surroundings of what is there.
func around(change func(*surroundings)) *surroundings {
	s := &surroundings{
		what: target{Path: runPath}, storeDir: "/nix/store", socket: "/run/s", agent: "there is no agent",
		invite: "/i", floxd: "/bin/floxd", looked: "/a, /b",
		has: func(string) string { return "" }, found: func() room.Found { return room.Found{} },
	}
	if change != nil {
		change(s)
	}
	return s
}

// TestChoose: the first mode that can be is taken, and what cannot is explained.
func TestChoose(t *testing.T) {
	noFUSE := func(s *surroundings) { s.found = func() room.Found { return room.Found{FUSE: "no /dev/fuse"} } }
	bare := func(s *surroundings) {
		s.found = func() room.Found { return room.Found{Namespaces: "switched off", FUSE: "switched off"} }
	}
	agent := func(s *surroundings) { s.agent, s.mounts = "", []string{"/nix/store"} }
	root := func(s *surroundings) { s.root = true }
	elsewhere := func(s *surroundings) { s.mounts = []string{"/other", "/host/nix/store"} }
	all := func(changes ...func(*surroundings)) func(*surroundings) {
		return func(s *surroundings) {
			for _, c := range changes {
				c(s)
			}
		}
	}
	tests := []struct {
		name     string
		is       func(*surroundings)
		mode, to string
		want     string // mode, "" = an error
		here     bool
		source   string
		kind     error
		words    []string // in what is said
	}{
		{name: "agent", is: agent, want: modeAgent, here: true, words: []string{"/run/s", "/nix/store"}},
		{name: "agent needs nothing else", is: all(agent, bare, func(s *surroundings) { s.invite, s.floxd = "", "" }), want: modeAgent, here: true},
		{name: "agent for root", is: all(agent, root), want: modeAgent, here: true},
		{name: "mount for root", is: all(elsewhere, root), want: modeBind, source: "/other"},
		{name: "root", is: root, kind: flox.ErrUnreachable, words: []string{"must not be", "sudo floxd agent", "as an ordinary user"}},
		{name: "root with an invite", is: all(root, func(s *surroundings) { s.given = "/i" }), kind: flox.ErrUnreachable, words: []string{"sudo floxd agent --invite /i", "run --to DIR --invite /i "}},
		{name: "root and fuse", is: root, mode: modeFUSE, kind: flox.ErrDenied, words: []string{"must not be", "as an ordinary user"}},
		{name: "root and copy", is: root, mode: modeCopy, kind: flox.ErrDenied, words: []string{"must not be"}},
		{name: "root of a container", is: all(root, bare), to: "/nix/store", want: modeCopy},
		{name: "agent elsewhere", is: func(s *surroundings) { s.agent, s.mounts = "", []string{"/host"} }, want: modeBind, source: "/host"},
		{name: "agent without a mount", is: func(s *surroundings) { s.agent = "" }, want: modeFUSE, words: []string{"not mounted at its place"}},
		{name: "mount of the agent that is left out", is: agent, mode: modeBind, want: modeBind, here: true, source: "/nix/store", words: []string{"is left out"}},
		{name: "own mount beside an agent", is: agent, mode: modeFUSE, want: modeFUSE, words: []string{"is left out"}},
		{name: "mount without agent", is: func(s *surroundings) { s.mounts = []string{"/x", "/nix/store"} }, want: modeBind, here: true, source: "/nix/store", words: []string{"there is no agent"}},
		{name: "mount without anything", is: all(bare, func(s *surroundings) { s.mounts, s.invite = []string{"/nix/store"}, "" }), want: modeBind, here: true, source: "/nix/store"},
		{name: "mount elsewhere", is: elsewhere, want: modeBind, source: "/other"},
		{name: "one mount has it", is: all(elsewhere, func(s *surroundings) {
			s.has = func(m string) string {
				if m == "/other" {
					return "it has no git"
				}
				return ""
			}
		}), want: modeBind, source: "/host/nix/store"},
		{name: "dead mount", is: all(elsewhere, func(s *surroundings) { s.has = func(string) string { return "it is dead" } }), want: modeFUSE},
		{name: "mount elsewhere, no namespaces", is: all(elsewhere, bare), kind: flox.ErrUnreachable, words: []string{"mounted at /other", "switched off"}},
		{name: "mount elsewhere, no floxd", is: all(elsewhere, func(s *surroundings) { s.floxd = "" }), kind: flox.ErrNotFound, words: []string{"floxd"}},
		{name: "own mount", want: modeFUSE, words: []string{"there is no agent"}},
		{name: "own mount, no invite", is: func(s *surroundings) { s.invite = "" }, kind: flox.ErrBadInput, words: []string{"invite", "/a, /b", "--invite"}},
		{name: "a store of Nix's own", is: func(s *surroundings) { s.hides = true }, want: modeFUSE, words: []string{"hides from the command what else is in /nix/store"}},
		{name: "no FUSE", is: noFUSE, want: modeCopy, words: []string{"no /dev/fuse"}},
		{name: "nothing", is: bare, kind: flox.ErrUnreachable, words: []string{"agent", "bind", "fuse", "copy", "switched off", "--to DIR", "sudo floxd agent"}},
		{name: "nothing, to", is: bare, to: "/x", want: modeCopy, words: []string{"/x", "only where that is /nix/store"}},
		{name: "nothing, to the store", is: bare, to: "/nix/store", want: modeCopy, words: []string{"/nix/store"}},
		{name: "to wins", is: agent, to: "/x", want: modeCopy},
		{name: "to, no invite", is: all(bare, func(s *surroundings) { s.invite = "" }), to: "/x", kind: flox.ErrBadInput, words: []string{"--invite FILE", "floxctl invite --role agent --ephemeral >FILE"}},
		{name: "agent forced", mode: modeAgent, kind: flox.ErrUnreachable, words: []string{"agent cannot be", "there is no agent"}},
		{name: "bind forced", mode: modeBind, kind: flox.ErrNotFound, words: []string{"bind cannot be", "no store of ours"}},
		{name: "fuse forced", is: agent, mode: modeFUSE, want: modeFUSE},
		{name: "fuse forced, none", is: noFUSE, mode: modeFUSE, kind: flox.ErrDenied, words: []string{"no /dev/fuse"}},
		{name: "copy forced", is: agent, mode: modeCopy, want: modeCopy},
		{name: "copy forced, no namespaces", is: bare, mode: modeCopy, kind: flox.ErrDenied, words: []string{"switched off", "--to"}},
		{name: "unknown", mode: "magic", kind: flox.ErrBadInput, words: []string{"magic", "agent, bind, fuse or copy"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := choose(around(test.is), test.mode, test.to)
			said := got.Why
			if err != nil {
				said = err.Error()
			}
			if test.want == "" && !errors.Is(err, test.kind) || test.want != "" && (err != nil || got.Mode != test.want || got.here != test.here || got.Source != test.source) {
				t.Fatalf("got %+v, %v", got, err)
			}
			for _, w := range test.words {
				if !strings.Contains(said, w) {
					t.Errorf("want %q in %q", w, said)
				}
			}
		})
	}
}

// Where an agent or a mount is, nothing is tried out.
func TestChooseProbesOnlyWhenItMust(t *testing.T) {
	for _, change := range []func(*surroundings){
		func(s *surroundings) { s.agent, s.mounts = "", []string{"/nix/store"} },
		func(s *surroundings) { s.mounts = []string{"/nix/store"} },
	} {
		s := around(change)
		s.found = func() room.Found { t.Error("it was tried out"); return room.Found{} }
		if _, err := choose(s, "", ""); err != nil {
			t.Error(err)
		}
	}
}

func TestRunArguments(t *testing.T) {
	tests := []struct {
		args    []string
		dash    int
		profile string
		to      string
		mode    string
		path    string
		command string
		bad     string
	}{
		{args: []string{"p"}, dash: -1, path: "p"},
		{args: []string{"p", "rg", "-n"}, dash: 1, path: "p", command: "rg -n"},
		{args: []string{"rg"}, dash: 0, profile: "a/b", command: "rg"},
		{args: nil, dash: -1, profile: "a/b"},
		{args: []string{"p"}, dash: 1, path: "p"},
		{args: nil, dash: -1, bad: "missing"},
		{args: []string{"rg"}, dash: 0, bad: "missing"},
		{args: []string{"p", "rg"}, dash: -1, bad: "behind --, as in: floxctl run p -- rg"},
		{args: []string{"p", "rg"}, dash: 1, profile: "a/b", bad: "one of them"},
		{args: []string{"p"}, dash: -1, to: "/x", mode: "fuse", bad: "--to copies"},
		{args: []string{"p"}, dash: -1, to: "/x", mode: "copy", path: "p"},
	}
	for _, test := range tests {
		o := runOptions{profile: test.profile, to: test.to, mode: test.mode}
		err := o.take(test.args, test.dash)
		if test.bad != "" {
			if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), test.bad) {
				t.Errorf("%q: got %v, want %q", test.args, err, test.bad)
			}
			continue
		}
		if err != nil || o.path != test.path || strings.Join(o.command, " ") != test.command {
			t.Errorf("%q: got %q, %q, %v", test.args, o.path, o.command, err)
		}
	}
}

func TestTargetIsAStorePath(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "result")
	if err := errors.Join(os.Symlink("/nix/store/"+runPath, link), os.Symlink("result", filepath.Join(dir, "profile"))); err != nil {
		t.Fatal(err)
	}
	for arg, want := range map[string]target{
		runPath: {Path: runPath}, "/flox/store/" + runPath: {Path: runPath, dir: "/flox/store"}, link: {Path: runPath, dir: "/nix/store"},
	} {
		if got, err := (&runOptions{path: arg}).target(); err != nil || got != want {
			t.Errorf("%s: got %+v, %v", arg, got, err)
		}
	}
	if got, err := (&runOptions{profile: filepath.Join(dir, "profile")}).target(); err != nil || got.Path != runPath {
		t.Errorf("profile: got %+v, %v", got, err)
	}
	for _, arg := range []string{link + "/bin", "/nix/store/" + runPath + "/bin/git", dir, "nothing"} {
		if got, err := (&runOptions{path: arg}).target(); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%s: got %+v, %v", arg, got, err)
		}
	}
}

func TestProfileNames(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "anna"), 0o755), os.Symlink("/nix/store/"+runPath, filepath.Join(dir, "anna", "tools"))); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"anna/tools": filepath.Join(dir, "anna", "tools"), "/home/anna/.nix-profile": "/home/anna/.nix-profile", "./result": "./result", "../x": "../x",
	} {
		if got, err := profileIn(dir, name); err != nil || got != want {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
	for name, kind := range map[string]error{"anna/none": flox.ErrNotFound, "tools": flox.ErrBadInput, "a/b/c": flox.ErrBadInput, "/": nil, "anna/": flox.ErrBadInput} {
		if _, err := profileIn(dir, name); !errors.Is(err, kind) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := profileIn(filepath.Join(dir, "none"), "anna/tools"); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "this machine has no") {
		t.Errorf("without profiles: %v", err)
	}
}

// TestOnesOwnInvite: one that is there and cannot be used is not passed over in
// silence, and troubles nobody who needs none.
func TestOnesOwnInvite(t *testing.T) {
	config := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", config)
	t.Setenv(envInvite, "")
	noAgent := func(s *surroundings) { s.invite, s.looked, s.stateDir = "", "", t.TempDir() }
	s := around(noAgent)
	if _, err := s.findInvite(""); err != nil || s.unusable != nil {
		t.Errorf("there is none: %v, %v", err, s.unusable)
	}
	file := filepath.Join(config, "floxd", "invite.json")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o700), os.WriteFile(file, []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	s = around(noAgent)
	if _, err := s.findInvite(""); err != nil {
		t.Fatal(err)
	}
	if _, err := choose(s, modeCopy, ""); err == nil || !strings.Contains(err.Error(), file) || !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("copy: %v", err)
	}
	s.agent, s.mounts = "", []string{"/nix/store"}
	if c, err := choose(s, "", ""); err != nil || c.Mode != modeAgent {
		t.Errorf("with an agent: %+v, %v", c, err)
	}
}
