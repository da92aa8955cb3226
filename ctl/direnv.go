package ctl

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// direnvFunction is a function of direnv's (direnv-stdlib(1)). It watches no profile: a
// directory's programs change when .envrc does, in a new shell, or with direnv reload.
const direnvFunction = direnvHead + `
# In an .envrc: use floxctl [OWNER/NAME] [--live]
use_floxctl() {
	local commands
	local -a profile=()
	case ${1-} in
	'' | -*) ;;
	*)
		profile=(-p "$1")
		shift
		;;
	esac
	commands=$(floxctl activate --shell sh ${profile[@]+"${profile[@]}"} "$@") || return
	eval "$commands"
}
`

const direnvHead = "# floxctl direnv --install wrote this."

func newDirenvCmd(g *globals) *cobra.Command {
	install := false
	cmd := &cobra.Command{
		Use:   "direnv [--install]",
		Short: "Have direnv put a profile's programs on PATH in a directory",
		Long: `Print the function by which direnv knows this line of an .envrc:

  use floxctl acme/ci

It is floxctl activate -p acme/ci there: the generation that lives when you come in
stays, until direnv reload, or a new shell. With --live behind it it is followed.
With --install the function goes where direnv finds it by itself.

` + cli.ExitCodes,
		Example: "  floxctl direnv --install\n  echo 'use floxctl acme/ci' >>.envrc && direnv allow",
		Args:    cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runDirenv(g.printer(cmd), install)
		},
	}
	cmd.Flags().BoolVar(&install, "install", false, "write it to ~/.config/direnv/lib/floxctl.sh")
	return cmd
}

func runDirenv(out *output, install bool) error {
	facts := struct {
		Function string `json:"function"`
		File     string `json:"file,omitempty"`
	}{Function: direnvFunction}
	if install {
		config, err := os.UserConfigDir()
		if err != nil {
			return err
		}
		facts.File = filepath.Join(config, "direnv", "lib", "floxctl.sh")
		if has, err := os.ReadFile(facts.File); err == nil && !strings.HasPrefix(string(has), direnvHead) {
			return cli.Explain(flox.ErrBusy, "%s is there and was not written by floxctl: remove it first", facts.File)
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(facts.File), 0o755); err != nil { //nolint:gosec // as direnv makes it
			return err
		}
		if err := os.WriteFile(facts.File, []byte(direnvFunction), 0o644); err != nil { //nolint:gosec // it is no secret
			return err
		}
	}
	switch {
	case out.json:
		return out.printJSON(facts)
	case install:
		out.printf("direnv knows it now (%s). In an .envrc: use floxctl OWNER/NAME\n", clean(facts.File))
	default:
		out.printf("%s", direnvFunction)
	}
	return nil
}
