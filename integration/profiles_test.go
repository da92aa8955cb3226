package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/hosts"
)

// ownProfile is the profile of the machines' user, live is where it is shown.
const (
	ownProfile = "root/default"
	live       = "/flox/" + ownProfile
)

// installed is what `floxctl install --json` says.
type installed struct {
	Generation  uint64            `json:"generation"`
	Environment map[string]string `json:"environment"`
}

// upgrades changes a profile on the first machine and looks at it on the second.
type upgrades struct {
	t       *testing.T
	r       *readers
	tools   []string          // store paths with bin/tool, which says its number
	numbers map[string]uint64 // generations by the name of their environment
	last    installed
}

// TestProfiles changes a profile on one machine while another one looks at it by its path,
// and what is between them is killed and cut.
func TestProfiles(t *testing.T) {
	h := open(t).newServers(t)
	u := &upgrades{t: t, r: h.newReaders(t), numbers: map[string]uint64{}}
	for n := range 2 {
		u.tools = append(u.tools, u.tool(n))
	}
	u.upgrade(1)
	u.seen()
	for _, part := range []struct {
		name string
		do   func()
	}{
		{"OneVersion", u.oneVersion},
		{"Tag", u.tag},
		{"Cut", u.cut},
		{"Bound", u.bound},
		{"Systems", u.systems},
	} {
		if !t.Run(part.name, func(t *testing.T) { u.t, h.t = t, t; part.do() }) {
			return
		}
	}
	u.t, h.t = t, t
	u.r.close()
}

// tool adds a package.
func (u *upgrades) tool(n int) string {
	u.t.Helper()
	dir := filepath.Join(u.r.agents[0].Host.Dir, "home", fmt.Sprintf("tool-%d", n))
	must(u.t, os.MkdirAll(filepath.Join(dir, "bin"), 0o755))
	must(u.t, os.WriteFile(filepath.Join(dir, "bin/tool"), fmt.Appendf(nil, "#!/bin/sh\necho tool %d\n", n), 0o755))
	out, err := u.r.run(u.t.Context(), 0, u.r.h.programs.Floxctl, "store", "add", dir, "--token-file", u.r.h.token)
	must(u.t, err)
	return strings.TrimSpace(string(out))
}

// upgrade makes a generation unlike all others. One that was cut off is said again, and is
// there once all the same.
func (u *upgrades) upgrade(n int) {
	u.t.Helper()
	var err error
	for range 20 {
		var out []byte
		out, err = u.r.agents[0].Ctl(u.t.Context(), "install", u.tools[n%2], "--as", "tool", "--priority", fmt.Sprint(n), "--json")
		if err == nil {
			must(u.t, json.Unmarshal(out, &u.last))
			for _, env := range u.last.Environment {
				if was, had := u.numbers[env]; had && was != u.last.Generation {
					u.t.Fatalf("generations %d and %d have one environment", was, u.last.Generation)
				}
				u.numbers[env] = u.last.Generation
			}
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	u.t.Fatal(err)
}

// environment is the name of the environment that is live now.
func (u *upgrades) environment() string {
	for _, env := range u.last.Environment {
		return env
	}
	return ""
}

// seen waits until the second machine shows what the first one made live.
func (u *upgrades) seen() {
	u.t.Helper()
	eventually(u.t, "the change is seen on the other machine", func() bool {
		out, err := u.r.run(u.t.Context(), 1, "readlink", live)
		return err == nil && filepath.Base(strings.TrimSpace(string(out))) == u.environment()
	})
}

// says runs the tool of a profile on the second machine.
func (u *upgrades) says(path, want string) {
	u.t.Helper()
	out, err := u.r.run(u.t.Context(), 1, path+"/bin/tool")
	must(u.t, err)
	if string(out) != want+"\n" {
		u.t.Errorf("%s says %q, want %q", path, out, want)
	}
}

// oneVersion has a session over many upgrades, while the second machine's child and the
// server that leads are killed.
func (u *upgrades) oneVersion() {
	t, b := u.t, u.r.agents[1]
	session := b.Host.Command(t.Context(), u.r.h.programs.Floxctl, "activate", "-p", ownProfile, "--", "sh", "-c", "while read -r line; do tool; done")
	in, err := session.StdinPipe()
	must(t, err)
	var said strings.Builder
	session.Stdout, session.Stderr = &said, os.Stderr
	must(t, session.Start())
	watcher := b.Host.Command(t.Context(), "sh", "-c", "while sleep 0.01; do readlink "+live+" || exit; done")
	var shown strings.Builder
	watcher.Stdout, watcher.Stderr = &shown, os.Stderr
	must(t, watcher.Start())

	const upgrades = 50
	first := u.last.Generation
	var killed *hosts.Storehouse
	for n := range upgrades {
		switch n {
		case 10, 30:
			must(t, syscall.Kill(status(t, b).PID, syscall.SIGKILL))
		case 20:
			_, killed = u.r.h.leader()
			killed.Kill()
		case 35:
			must(t, killed.Launch())
		}
		u.upgrade(n + 2)
		if want := first + uint64(n) + 1; u.last.Generation != want {
			t.Fatalf("upgrade %d made generation %d, want %d: one was lost, or is there twice", n, u.last.Generation, want)
		}
		_, err := io.WriteString(in, "again\n")
		must(t, err)
	}
	u.seen()
	must(t, in.Close())
	must(t, session.Wait())
	if want := strings.Repeat("tool 1\n", upgrades); said.String() != want {
		t.Errorf("the session saw another version:\n%s", said.String())
	}
	_ = watcher.Process.Kill()
	_ = watcher.Wait()
	at, changes := uint64(0), 0
	for line := range strings.Lines(shown.String()) {
		number := u.numbers[filepath.Base(strings.TrimSpace(line))]
		if number < at {
			t.Fatalf("the path led to generation %d after %d (%q)", number, at, line)
		}
		if number > at {
			at, changes = number, changes+1
		}
	}
	if at != u.last.Generation || changes < 5 {
		t.Errorf("the path led to %d generations, at last to %d, want %d", changes, at, u.last.Generation)
	}
	u.history(first + upgrades)
}

// history checks that every generation is there once.
func (u *upgrades) history(generations uint64) {
	out, err := u.r.agents[0].Ctl(u.t.Context(), "history", "--limit", "1000", "--json")
	must(u.t, err)
	var h struct {
		Events []struct {
			Kind string
			To   uint64
		}
	}
	must(u.t, json.Unmarshal(out, &h))
	next := generations
	for _, e := range h.Events {
		if e.Kind == "create" {
			continue
		}
		if e.Kind != "install" || e.To != next {
			u.t.Errorf("%+v in the history, want the install of %d", e, next)
		}
		next--
	}
	if next != 0 {
		u.t.Errorf("the history ends at generation %d", next)
	}
}

// tag runs what a tag is at on the second machine, by its path and by a command, and again
// once it moved.
func (u *upgrades) tag() {
	a, b := u.r.agents[0], u.r.agents[1]
	for _, back := range []uint64{1, 2} {
		number := u.last.Generation - back
		_, err := a.Ctl(u.t.Context(), "profile", "tag", fmt.Sprint(number), "stable")
		must(u.t, err)
		want := fmt.Sprintf("tool %d\n", (back+1)%2)
		eventually(u.t, "the tag is there on the other machine", func() bool {
			out, err := u.r.run(u.t.Context(), 1, live+"@stable/bin/tool")
			return err == nil && string(out) == want
		})
		for _, command := range []string{"run", "activate"} {
			out, err := b.Ctl(u.t.Context(), command, "-p", ownProfile+"@stable", "--", "tool")
			if err != nil || string(out) != want {
				u.t.Errorf("%s of generation %d says %q, %v", command, number, out, err)
			}
		}
	}
	_, err := a.Ctl(u.t.Context(), "profile", "tag", "--drop", "stable")
	must(u.t, err)
}

// cut unplugs the second machine, restarts what serves there, and runs what lives and what
// lived before.
func (u *upgrades) cut() {
	b := u.r.agents[1]
	before := fmt.Sprintf("%s@%d", live, u.last.Generation-1)
	eventually(u.t, "both generations are here whole", func() bool {
		out, err := b.Ctl(u.t.Context(), "keep", "--list", "--json")
		must(u.t, err)
		var kept struct {
			Profiles []struct {
				Complete bool
				Path     string
			}
		}
		must(u.t, json.Unmarshal(out, &kept))
		whole, current := 0, false
		for _, p := range kept.Profiles {
			if p.Complete {
				whole++
				current = current || filepath.Base(p.Path) == u.environment()
			}
		}
		return whole == 2 && current
	})
	must(u.t, b.Host.Unplug(u.t.Context()))
	must(u.t, syscall.Kill(status(u.t, b).PID, syscall.SIGKILL))
	for range 2 { // as the killed one left it, and as the whole agent begins again
		u.says(live, "tool 1")
		u.says(before, "tool 0")
		if out, err := u.r.run(u.t.Context(), 1, "ls", "/flox/root"); err != nil || string(out) != "default\n" {
			u.t.Errorf("listed %q, %v", out, err)
		}
		if _, err := u.r.run(u.t.Context(), 1, "readlink", "-v", "/flox/somebody/tools"); err == nil || !strings.Contains(err.Error(), "Input/output error") {
			u.t.Errorf("a profile that is not known without a network: %v", err)
		}
		must(u.t, b.Stop())
		must(u.t, b.Start(u.t.Context()))
	}
	u.rollbackCut()
	u.upgrade(100)
	u.seen()
	u.says(live, "tool 0")
}

// rollbackCut rolls back on the second machine, which is unplugged, restarts what serves
// there, and plugs it in: then it is so on the first as well.
func (u *upgrades) rollbackCut() {
	a, b := u.r.agents[0], u.r.agents[1]
	out, err := b.Ctl(u.t.Context(), "rollback", "-p", ownProfile, "--json")
	must(u.t, err)
	var done struct {
		Before, Generation uint64
		Here               bool
	}
	must(u.t, json.Unmarshal(out, &done))
	if want := u.last.Generation; done.Before != want || done.Generation != want-1 || !done.Here {
		u.t.Errorf("a rollback of generation %d without a network: %+v", want, done)
	}
	u.says(live, "tool 0")
	must(u.t, b.Stop())
	must(u.t, b.Start(u.t.Context()))
	u.says(live, "tool 0")
	must(u.t, b.Host.Plug(u.t.Context()))
	eventually(u.t, "the rollback reaches the other machine", func() bool {
		out, err := u.r.run(u.t.Context(), 0, live+"/bin/tool")
		return err == nil && string(out) == "tool 0\n"
	})
	u.says(live, "tool 0")
	out, err = a.Ctl(u.t.Context(), "history", "-p", ownProfile, "--limit", "1", "--json")
	if err != nil || !strings.Contains(string(out), `"rollback"`) {
		u.t.Errorf("the last change is %s, %v; want the rollback", out, err)
	}
}

// bound has stock Nix on the second machine change a profile, which the first one shows, and
// the first one change it, which Nix's profile follows; also what was done without a network.
func (u *upgrades) bound() {
	const profile, shown = "root/bound", "/flox/root/bound/bin/tool"
	a, b := u.r.agents[0], u.r.agents[1]
	dir := filepath.Join(b.Host.Dir, "home/nix/p")
	ctl := func(args ...string) {
		u.t.Helper()
		_, err := a.Ctl(u.t.Context(), append(args, "-p", profile)...)
		must(u.t, err)
	}
	env := func(args ...string) result {
		u.t.Helper()
		return stockNix(u.t, b.Host, append([]string{"nix-env", "-p", dir}, args...)...)
	}
	says := func(where int, path, want string) {
		u.t.Helper()
		eventually(u.t, fmt.Sprintf("%s on machine %d says %s", path, where, want), func() bool {
			out, err := u.r.run(u.t.Context(), where, path)
			return err == nil && string(out) == want+"\n"
		})
	}
	generation := func(want string) {
		u.t.Helper()
		eventually(u.t, "Nix has "+want, func() bool { return strings.TrimSpace(do(u.t, b.Host, "readlink", dir).out) == "p-"+want+"-link" })
	}
	_, err := a.Ctl(u.t.Context(), "profile", "create", profile)
	must(u.t, err)
	ctl("install", u.tools[0], "--as", "tool")
	do(u.t, b.Host, "mkdir", "-p", filepath.Dir(dir)).want(u.t, 0)
	env("--set", u.tools[0]).want(u.t, 0)
	do(u.t, b.Host, u.r.h.programs.Floxctl, "profile", "bind", dir, profile).want(u.t, 0, dir)
	generation("2")

	env("--set", u.tools[1]).want(u.t, 0)
	says(0, shown, "tool 1")
	out, err := a.Ctl(u.t.Context(), "history", "-p", profile)
	must(u.t, err)
	if !strings.Contains(string(out), "nix-env") || !strings.Contains(string(out), dir) {
		u.t.Errorf("the history says\n%s", out)
	}
	generation("3")
	ctl("install", u.tools[0], "--as", "other", "--priority", "3")
	generation("4")
	says(1, dir+"/bin/tool", "tool 0")
	env("--list-generations").want(u.t, 0, "  1 ", "  2 ", "  3 ", "  4 ", "(current)")
	env("--rollback").want(u.t, 0)
	says(0, shown, "tool 1")
	generation("3")

	must(u.t, b.Host.Unplug(u.t.Context()))
	env("--set", u.tools[0]).want(u.t, 0)
	eventually(u.t, "status says what is not in the profile yet", func() bool {
		said := do(u.t, b.Host, u.r.h.programs.Floxctl, "status").out
		return strings.Contains(said, dir+" and "+profile+" differ: what "+dir+" has is not in "+profile+" yet, and is tried again")
	})
	ctl("install", u.tools[1], "--as", "another", "--priority", "9")
	must(u.t, b.Host.Plug(u.t.Context()))
	says(0, shown, "tool 0")
	generation("5")
	out, err = a.Ctl(u.t.Context(), "list", "-p", profile)
	must(u.t, err)
	if !strings.Contains(string(out), "another") {
		u.t.Errorf("what was installed meanwhile is gone:\n%s", out)
	}
	do(u.t, b.Host, u.r.h.programs.Floxctl, "profile", "unbind", dir).want(u.t, 0, profile)
}

// systems has the second machine be one of another system: at one path each has what is
// for its own, of one generation.
func (u *upgrades) systems() {
	const profile, link, other = "root/both", "/flox/root/both/bin/tool", "aarch64-linux"
	a, b := u.r.agents[0], u.r.agents[1]
	_, err := a.Ctl(u.t.Context(), "profile", "create", profile, "--system", "x86_64-linux", "--system", other)
	must(u.t, err)
	_, err = a.Ctl(u.t.Context(), "install", "-p", profile, "x86_64-linux="+u.tools[0], other+"="+u.tools[1])
	must(u.t, err)
	must(u.t, b.Stop())
	c, err := hosts.StartAgent(u.t.Context(), u.r.h.programs, b.Host, u.r.h.dir, keptInvite, append([]string{"--system", other}, patient...)...)
	must(u.t, err)
	u.t.Cleanup(func() { stop(u.t, c.Daemon) })
	for i, want := range []string{"tool 0\n", "tool 1\n"} {
		eventually(u.t, fmt.Sprintf("machine %d has what is for its system", i), func() bool {
			out, err := u.r.run(u.t.Context(), i, link)
			return err == nil && string(out) == want
		})
	}
	must(u.t, c.Stop())
	must(u.t, b.Start(u.t.Context()))
	eventually(u.t, "the second machine has what is for its own system again", func() bool {
		out, err := u.r.run(u.t.Context(), 1, link)
		return err == nil && string(out) == "tool 0\n"
	})
}
