package ctl

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// The modes of run.
const (
	modeAgent = "agent"
	modeBind  = "bind"
	modeFUSE  = "fuse"
	modeCopy  = "copy"
)

// choice is one way to run a program, or why it is none.
type choice struct {
	Mode     string `json:"mode"`
	Possible bool   `json:"possible"`
	Why      string `json:"why"`
	Source   string `json:"source,omitempty"` // bind: where the store is mounted
	here     bool   // the store is at its place: no namespace is needed
	missing  error  // what else it needs, said only when it is chosen
	kind     error  // of the error when it is impossible and was asked for
}

// modes are tried in this order.
var modes = []struct {
	name string
	try  func(s *surroundings, to string) choice
}{
	{modeAgent, (*surroundings).tryAgent},
	{modeBind, (*surroundings).tryBind},
	{modeFUSE, (*surroundings).tryFUSE},
	{modeCopy, (*surroundings).tryCopy},
}

// choose gives the first mode that can be, or the one that was asked for.
func choose(s *surroundings, mode, to string) (choice, error) {
	if to != "" {
		mode = modeCopy
	}
	var tried []choice
	for _, m := range modes {
		if mode != "" && mode != m.name {
			continue
		}
		c := m.try(s, to)
		c.Mode = m.name
		if c.Possible {
			if s.hides && !c.here && to == "" && (c.Source == "" || c.Source != s.served || s.merged != string(s.storeDir)) {
				c.Why += fmt.Sprintf(", which hides from the command what else is in %s", s.storeDir)
			}
			return c, c.missing
		}
		tried = append(tried, c)
	}
	switch len(tried) {
	case 0:
		return choice{}, cli.Usage("run: --mode %q: want agent, bind, fuse or copy", mode)
	case 1:
		return choice{}, cli.Explain(tried[0].kind, "%s cannot be: %s%s", mode, tried[0].Why, s.advice(mode))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "nothing here can show %s at its place:\n", s.storeDir.Join(s.what.Path))
	for _, c := range tried {
		fmt.Fprintf(&b, "  %-5s  %s\n", c.Mode, c.Why)
	}
	b.WriteString("Any of these helps:" + s.advice(modeAgent) + s.advice(modeFUSE) + s.advice(modeCopy))
	return choice{}, cli.Explain(flox.ErrUnreachable, "%s", b.String())
}

// advice says what to do about a mode that cannot be.
func (s *surroundings) advice(mode string) string {
	switch mode {
	case modeAgent:
		return "\n  start an agent: sudo floxd agent --invite " + cmp.Or(s.given, "FILE")
	case modeBind:
		return fmt.Sprintf("\n  give the container the host's mount: --mount type=bind,src=%s,dst=%[1]s", s.storeDir)
	case modeFUSE:
		if s.root {
			return "\n  run it as an ordinary user"
		}
		return "\n  allow user namespaces, and /dev/fuse: chmod 666 /dev/fuse, in a container --device /dev/fuse"
	}
	with := ""
	if s.given != "" {
		with = " --invite " + s.given
	}
	return fmt.Sprintf("\n  write the files somewhere: floxctl run --to DIR%s %s; programs run from them if DIR is %s", with, s.what.Path, s.storeDir)
}

func (s *surroundings) tryAgent(string) choice {
	switch {
	case s.agent != "":
		return choice{Why: s.agent, kind: flox.ErrUnreachable}
	case !slices.Contains(s.mounts, string(s.storeDir)):
		return choice{Why: fmt.Sprintf("the agent at %s answers, but its store is not mounted at %s here", s.socket, s.storeDir), kind: flox.ErrNotFound}
	}
	return choice{Possible: true, here: true, Why: fmt.Sprintf("the agent at %s has %s mounted", s.socket, s.storeDir)}
}

// tryBind looks at the store's own place first.
func (s *surroundings) tryBind(string) choice {
	dirs := slices.Clone(s.mounts)
	if i := slices.Index(dirs, string(s.storeDir)); i > 0 {
		dirs[0], dirs[i] = dirs[i], dirs[0]
	}
	dirs = dirs[:min(len(dirs), maxAsked)]
	refused := choice{Why: "no store of ours is mounted here", kind: flox.ErrNotFound}
	for i, why := range s.ask(dirs) {
		switch {
		case why != "" && i == 0:
			refused.Why = fmt.Sprintf("a store is mounted at %s, but %s", dirs[i], why)
		case why == "":
			return s.bind(dirs[i])
		}
	}
	return refused
}

// maxAsked is how many mounts are asked for a path.
const maxAsked = 16

// ask asks mounts for the path, all at once: each may keep one waiting.
func (s *surroundings) ask(dirs []string) []string {
	answers := make([]string, len(dirs))
	var work sync.WaitGroup
	for i, dir := range dirs {
		work.Go(func() { answers[i] = s.has(dir) })
	}
	work.Wait()
	return answers
}

// bind is the choice of a mount that has the path.
func (s *surroundings) bind(dir string) choice {
	if dir == string(s.storeDir) {
		return choice{Possible: true, here: true, Source: dir, Why: fmt.Sprintf("%s, but %s is mounted", s.lack(), dir)}
	}
	if no := s.found().Namespaces; no != "" {
		return choice{Why: fmt.Sprintf("the store is mounted at %s and cannot be shown at %s: %s", dir, s.storeDir, no), kind: flox.ErrDenied}
	}
	return choice{
		Possible: true, Source: dir, missing: s.needs(modeBind),
		Why: fmt.Sprintf("the store is mounted at %s, shown at %s in a namespace", dir, s.storeDir),
	}
}

// lack says in few words what is not here.
func (s *surroundings) lack() string {
	switch {
	case s.agent != "":
		return s.agent
	case slices.Contains(s.mounts, string(s.storeDir)):
		return "the agent of this machine is left out"
	}
	return "the agent's store is not mounted at its place"
}

func (s *surroundings) tryFUSE(string) choice {
	if s.root {
		return choice{Why: "an agent of one's own would be root, and what talks to the network must not be", kind: flox.ErrDenied}
	}
	found := s.found()
	switch {
	case found.Namespaces != "":
		return choice{Why: found.Namespaces, kind: flox.ErrDenied}
	case found.FUSE != "":
		return choice{Why: found.FUSE, kind: flox.ErrDenied}
	}
	return choice{
		Possible: true, missing: s.needs(modeFUSE),
		Why: fmt.Sprintf("%s; an agent of one's own mounts %s in a namespace", s.lack(), s.storeDir),
	}
}

func (s *surroundings) tryCopy(to string) choice {
	c := choice{Possible: true, missing: s.needs(modeCopy)}
	switch no := s.found(); {
	case to == string(s.storeDir):
		c.Why = fmt.Sprintf("the files are written to %s", to)
	case s.root && to == "":
		return choice{Why: "what fetches the files would be root, and what talks to the network must not be; with --to, where one needs to be root to write there, it is all the same", kind: flox.ErrDenied}
	case to != "":
		c.Why = fmt.Sprintf("the files are written to %s; programs in them run only where that is %s", to, s.storeDir)
	case no.Namespaces != "":
		return choice{Why: fmt.Sprintf("files can be shown at %s only in a namespace, or be written with --to: %s", s.storeDir, no.Namespaces), kind: flox.ErrDenied}
	case no.FUSE != "":
		c.Why = fmt.Sprintf("%s, and %s; the files are fetched and shown at %s in a namespace", s.lack(), no.FUSE, s.storeDir)
	default:
		c.Why = fmt.Sprintf("the files are fetched and shown at %s in a namespace", s.storeDir)
	}
	return c
}

// needs says what a mode lacks that can be given to it.
func (s *surroundings) needs(mode string) error {
	switch {
	case s.floxd == "":
		return cli.Explain(flox.ErrNotFound, "%s needs the program floxd, which is neither beside floxctl nor on the PATH", mode)
	case mode != modeBind && s.invite == "" && s.unusable != nil:
		return fmt.Errorf("%s; %s needs the storehouse's invite: %w", s.lack(), mode, s.unusable)
	case mode != modeBind && s.invite == "":
		return cli.Explain(flox.ErrBadInput, "%s; %s needs the storehouse's invite the first time, and there is none at %s: %s", s.lack(), mode, s.looked, cli.HowToBeInvited)
	}
	return nil
}

// printChoice says how it would be done, and why not otherwise.
func printChoice(out *output, s *surroundings, opts *runOptions) error {
	facts := struct {
		Path     string   `json:"path"`
		StoreDir string   `json:"storeDir"`
		Mode     *string  `json:"mode"` // null: none can be
		Error    string   `json:"error,omitempty"`
		Modes    []choice `json:"modes"`
	}{Path: s.storeDir.Join(s.what.Path), StoreDir: string(s.storeDir)}
	chosen, err := choose(s, opts.mode, opts.to)
	if err == nil {
		facts.Mode = &chosen.Mode
	} else {
		facts.Error = err.Error()
	}
	for _, m := range modes {
		c := m.try(s, opts.to)
		c.Mode = m.name
		if c.Possible && c.missing != nil {
			c.Possible, c.Why = false, c.missing.Error()
		}
		facts.Modes = append(facts.Modes, c)
	}
	if out.json {
		if err := out.printJSON(facts); err != nil {
			return err
		}
		if err != nil {
			return cli.Said(err)
		}
		return nil
	}
	for _, c := range facts.Modes {
		mark := " "
		if err == nil && c.Mode == chosen.Mode {
			mark = "*"
		}
		state := "no "
		if c.Possible {
			state = "yes"
		}
		out.printf("%s %-5s  %s  %s\n", mark, c.Mode, state, c.Why)
	}
	return err
}
