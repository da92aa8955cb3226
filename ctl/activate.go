package ctl

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/room"
)

// envProfile says in an activated session which profile it has, NAME@GENERATION or NAME.
const envProfile = "FLOXCTL_PROFILE"

type activateOptions struct {
	profileFlag
	live    bool
	shell   string
	command []string
}

func newActivateCmd(g *globals) *cobra.Command {
	opts := &activateOptions{profileFlag: profileFlag{globals: g}}
	cmd := &cobra.Command{
		Use:   "activate [-p OWNER/NAME] [--live] [--shell sh|fish] [-- COMMAND...]",
		Short: "Have a profile's programs in a command, a shell or this one",
		Long: `Run COMMAND with a profile's programs in front of its PATH, and its manuals and data in
MANPATH and XDG_DATA_DIRS. Without COMMAND it starts $SHELL so, or, where its output is no
terminal, prints the commands for a shell to evaluate.

The generation that lives now stays in use, whatever becomes of the profile: a session
never changes under who works in it, as long as the profile keeps the generation
(floxctl profile retention). With -p OWNER/NAME@41 or @TAG it is that generation; a tag
that moves moves no session. With --live it follows the profile. Nobody is asked
for a profile that this machine shows (ls /flox), so that it works without a network.
floxctl status says in a session whether a newer generation lives. For direnv see:
floxctl direnv --help.

` + cli.ExitCodes,
		Example: `  floxctl activate -p acme/ci -- make test
  floxctl activate -p acme/ci@stable -- make test
  eval "$(floxctl activate -p acme/ci)"`,
	}
	opts.register(cmd)
	cmd.Flags().BoolVar(&opts.live, "live", false, "follow the profile's changes")
	cmd.Flags().StringVar(&opts.shell, "shell", "", "`SHELL` the commands are for: sh or fish")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if dash := cmd.ArgsLenAtDash(); dash >= 0 {
			opts.command, args = args[dash:], args[:dash]
		}
		if len(args) > 0 {
			return cli.Usage("activate: unexpected argument %q: a command comes behind --, a profile behind -p", args[0])
		}
		if opts.shell == "" && filepath.Base(os.Getenv("SHELL")) == "fish" {
			opts.shell = "fish"
		}
		if !slices.Contains([]string{"", "sh", "bash", "zsh", "ksh", "fish"}, opts.shell) {
			return cli.Usage("--shell %q: want sh or fish; bash, zsh and ksh take what is for sh", opts.shell)
		}
		return runActivate(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd))
	}
	return cmd
}

// activation is what a session gets.
type activation struct {
	Profile    string `json:"profile"`
	Generation uint64 `json:"generation"` // that lives now
	Dir        string `json:"dir"`        // the profile's environment, by the name that the session uses
	Path       string `json:"path"`       // the store path that is now
	named      string // envProfile
}

// shown asks the agent for the generation of the profile that lives, which it has in
// memory, and where profiles are mounted, "" for nowhere.
func (f *profileFlag) shown(ctx context.Context) (p *floxv1.ShownProfile, dir string, err error) {
	name, err := f.name()
	if err != nil {
		return nil, "", err
	}
	resp, err := f.agent().ShownProfiles(ctx, connect.NewRequest(&floxv1.ShownProfilesRequest{Name: name}))
	if err != nil {
		return nil, "", explain(err)
	}
	m := resp.Msg
	if len(m.GetProfiles()) != 1 {
		return nil, "", fmt.Errorf("the agent told of %d profiles, want one: %w", len(m.GetProfiles()), flox.ErrCorrupt)
	}
	p = m.GetProfiles()[0]
	switch {
	case p.GetGeneration() == 0:
		return nil, "", cli.Explain(flox.ErrNotFound, "profile %s is empty; to put something in: floxctl install -p %s PATH", clean(p.GetName()), clean(p.GetName()))
	case p.GetPath() == "":
		return nil, "", cli.Explain(flox.ErrNotFound, "profile %s has nothing for %s, which this machine is", clean(p.GetName()), clean(m.GetSystem()))
	}
	return p, m.GetDir(), nil
}

// activation is what a session gets of the profile as it is now.
func (o *activateOptions) activation(ctx context.Context) (*activation, error) {
	if o.live && strings.Contains(o.profile, "@") {
		return nil, cli.Usage("--live follows what lives, and -p %s is one generation: leave out one of them", o.profile)
	}
	p, dir, err := o.shown(ctx)
	if err != nil {
		return nil, err
	}
	if dir == "" {
		return nil, cli.Explain(flox.ErrNotFound, "this machine's agent mounts no profiles (profiles-dir = none, or its log says what was in the way)")
	}
	a := &activation{Profile: p.GetName(), Generation: p.GetGeneration(), Path: p.GetPath(), named: p.GetName()}
	if !o.live {
		a.named = fmt.Sprintf("%s@%d", p.GetName(), p.GetGeneration())
	}
	a.Dir = filepath.Join(dir, a.named)
	return a, nil
}

// variables are the lists that a profile is put in front of, and what stands for one that
// is not set.
var variables = []struct{ name, sub, unset string }{
	{"PATH", "bin", ""},
	{"MANPATH", "share/man", ":"}, // an empty entry is where man looks by itself
	{"XDG_DATA_DIRS", "share", "/usr/local/share:/usr/share"},
}

// environ is an environment with the profile in it.
func (a *activation) environ(env []string) []string {
	env = slices.Clone(env)
	set := func(name, value string) {
		env = slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, name+"=") })
		env = append(env, name+"="+value)
	}
	for _, v := range variables {
		old := v.unset
		for _, e := range env {
			if value, ok := strings.CutPrefix(e, v.name+"="); ok && value != "" {
				old = value
			}
		}
		value := filepath.Join(a.Dir, v.sub)
		if old != "" {
			value += ":" + strings.TrimPrefix(old, ":")
		}
		set(v.name, value)
	}
	set(envProfile, a.named)
	return env
}

// print writes the commands for a shell.
func (a *activation) print(out *output, shell string) {
	for _, v := range variables {
		dir := filepath.Join(a.Dir, v.sub)
		if shell == "fish" {
			if v.unset != "" {
				out.printf("set -q %s; or set -gx %[1]s %s\n", v.name, cli.QuoteFish(v.unset))
			}
			out.printf("set -gx %s %s:\"$%[1]s\"\n", v.name, cli.QuoteFish(dir))
			continue
		}
		out.printf("export %s=%s:\"${%[1]s:-%s}\"\n", v.name, cli.QuoteSh(dir), strings.TrimPrefix(v.unset, ":"))
	}
	if shell == "fish" {
		out.printf("set -gx %s %s\n", envProfile, cli.QuoteFish(a.named))
		return
	}
	out.printf("export %s=%s\n", envProfile, cli.QuoteSh(a.named))
}

func runActivate(ctx context.Context, opts *activateOptions, out, says *output) error {
	a, err := opts.activation(ctx)
	if err != nil {
		return err
	}
	if s := thisSession(); s != nil && s.Profile == a.Profile && s.Generation > 0 && s.Generation != a.Generation {
		says.printf("This session has %s@%d; %d is there, and is what you get now.\n", clean(s.Profile), s.Generation, a.Generation)
	}
	if len(opts.command) == 0 {
		if out.json {
			return out.printJSON(a)
		}
		if out.terminal == nil {
			a.print(out, opts.shell)
			return nil
		}
	}
	c, err := room.Find("", opts.command, a.environ(os.Environ()))
	if err != nil {
		return err
	}
	return c.Failed(c.Exec())
}
