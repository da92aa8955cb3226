package ctl

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// bindingFacts is a profile of stock Nix that is bound, as JSON.
type bindingFacts struct {
	Dir        string `json:"dir"`
	Profile    string `json:"profile"`
	User       string `json:"user"`       // on whose behalf what nix-env does there is a change
	Generation uint64 `json:"generation"` // of the profile, as which it was last; 0 = none yet
	Number     uint64 `json:"number"`     // of Nix's generation; 0 = there is none
	Path       string `json:"path"`
	Problem    string `json:"problem"`    // why it is not as the profile is
	Configured bool   `json:"configured"` // by agent.bind
}

func bindingsOf(list []*floxv1.Binding) []bindingFacts {
	facts := make([]bindingFacts, len(list))
	for i, b := range list {
		facts[i] = bindingFacts{b.GetDir(), b.GetProfile(), b.GetUser(), b.GetGeneration(), b.GetNumber(), b.GetPath(), b.GetProblem(), b.GetConfigured()}
	}
	return facts
}

// words says it in a line.
func (b bindingFacts) words() string {
	if b.Problem != "" {
		return fmt.Sprintf("%s and %s differ: %s", clean(b.Dir), clean(b.Profile), clean(b.Problem))
	}
	return fmt.Sprintf("%s (generation %d of Nix's) is %s, generation %d", clean(b.Dir), b.Number, clean(b.Profile), b.Generation)
}

func newProfileBindCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "bind [DIR OWNER/NAME]",
		Short: "Make a profile of stock Nix one with a profile here, or list those that are",
		Long: `Make a profile of stock Nix, such as ~/.nix-profile or /nix/var/nix/profiles/default, one
with a profile of the storehouse. What nix-env --set, nix profile install and remove, or
a rollback of theirs does to DIR is then a change of the profile on every machine, on
behalf of whose the directory is, with the usual merges and refusals; and where the
profile goes otherwise, DIR goes, as a new generation of its own. What is refused, or
done without a network, stays in DIR, is said by floxctl status and floxctl profile show,
and is tried again. What nix-env -i made can be bound, but is then for nix profile: Nix
has nix-env -i, -e and -q refuse what that can read.

When it is bound, what DIR has beside the profile is added to that. Only whose the
directory is and root can bind it. Without arguments it lists what is bound; what
agent.bind = ["DIR=OWNER/NAME"] in the configuration says is bound, too.

` + cli.ExitCodes,
		Example: "  floxctl profile bind ~/.nix-profile alice/default\n  sudo floxctl profile bind /nix/var/nix/profiles/default acme/base",
		Args:    bindArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			q := &floxv1.BindRequest{}
			if len(args) == 2 {
				q.Profile = args[1]
				var err error
				if q.Dir, err = nixProfileAt(args[0]); err != nil {
					return err
				}
			}
			resp, err := g.agent().Bind(cmd.Context(), connect.NewRequest(q))
			if err != nil {
				return explain(err)
			}
			out, facts := g.printer(cmd), bindingsOf(resp.Msg.GetBindings())
			if out.json {
				return out.printJSON(struct {
					Bindings []bindingFacts `json:"bindings"`
				}{facts})
			}
			for _, b := range facts {
				out.printf("%s\n", b.words())
			}
			if len(facts) == 0 {
				out.printf("No profile of Nix's is bound on this machine. To bind one: floxctl profile bind DIR OWNER/NAME\n")
			}
			return nil
		},
	}
}

func bindArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return cli.Args(2, 2, "DIR and OWNER/NAME")(cmd, args)
}

func newProfileUnbindCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:     "unbind DIR",
		Short:   "Have a profile of stock Nix be on its own again",
		Long:    "Have a profile of stock Nix be on its own again. It leads where it did.\n\n" + cli.ExitCodes,
		Example: "  floxctl profile unbind ~/.nix-profile",
		Args:    cli.Args(1, 1, "DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, err := nixProfileAt(args[0])
			if err != nil {
				return err
			}
			resp, err := g.agent().Unbind(cmd.Context(), connect.NewRequest(&floxv1.UnbindRequest{Dir: dir}))
			if err != nil {
				return explain(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(struct {
					Dir     string `json:"dir"`
					Profile string `json:"profile"`
				}{dir, resp.Msg.GetProfile()})
			}
			out.printf("%s is not bound to %s any more, and leads where it did.\n", clean(dir), clean(resp.Msg.GetProfile()))
			return nil
		},
	}
}

// bindingsOn gives those of a profile on this machine, "" = of all; none if no agent says.
func bindingsOn(ctx context.Context, g *globals, name string) []bindingFacts {
	facts := []bindingFacts{}
	resp, err := g.agent().Bind(ctx, connect.NewRequest(&floxv1.BindRequest{}))
	if err != nil {
		return facts // a server of the storehouse has none
	}
	for _, b := range bindingsOf(resp.Msg.GetBindings()) {
		if strings.EqualFold(b.Profile, name) {
			facts = append(facts, b)
		}
	}
	return facts
}

// nixLinkName is what a profile of stock Nix leads to.
var nixLinkName = regexp.MustCompile(`-[0-9]+-link$`)

// nixProfileAt gives the absolute name of the profile that a name stands for, over links such
// as ~/.nix-profile, without links on the way.
func nixProfileAt(name string) (string, error) {
	dir, err := filepath.Abs(name)
	if err != nil {
		return "", err
	}
	for range 8 {
		parent, err := filepath.EvalSymlinks(filepath.Dir(dir))
		if err != nil {
			return "", fmt.Errorf("profile %s: %w: %w", name, err, flox.ErrNotFound)
		}
		dir = filepath.Join(parent, filepath.Base(dir))
		to, err := os.Readlink(dir)
		if err != nil || nixLinkName.MatchString(to) {
			return dir, nil //nolint:nilerr // whether there is one, the agent says
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(parent, to)
		}
		if _, err := flox.ParseStorePath(filepath.Base(to)); err == nil {
			return dir, nil
		}
		dir = to
	}
	return "", fmt.Errorf("profile %s: links that lead to each other: %w", name, flox.ErrBadInput)
}
