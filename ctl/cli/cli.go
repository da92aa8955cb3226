// Package cli is what floxctl and floxd share as programs of a command line:
// exit codes, usage errors, the version, human units, signals, and the way to
// the agent's socket.
//
// It must not know what any command does, and it links nothing of the system
// but words and messages, so that a program built on it starts at once.
package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
)

// Run executes root with args (without the program's name) and returns the
// process's exit code. An error is printed once, on root's error stream. The
// first SIGINT or SIGTERM cancels the command's context, the second one kills
// the process as if nobody had caught it. One that whoever started this process
// has had ignored stays so.
func Run(root *cobra.Command, args []string) int {
	ctx, stop := untilSignal()
	defer stop()
	context.AfterFunc(ctx, stop)
	prepare(root)
	if args == nil {
		args = []string{} // nil would make cobra read os.Args
	}
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return CodeOK
	}
	if ctx.Err() != nil && !errors.Is(err, errSaid) && ExitCode(err) != CodeInterrupted {
		err = fmt.Errorf("%w: %w", ErrInterrupted, err)
	}
	report(cmd, err)
	return ExitCode(err)
}

// untilSignal gives a context that SIGINT or SIGTERM cancels.
func untilSignal() (context.Context, context.CancelFunc) {
	sigs := slices.DeleteFunc([]os.Signal{os.Interrupt, syscall.SIGTERM}, signal.Ignored)
	if len(sigs) == 0 { // which would mean all there are
		return context.WithCancel(context.Background())
	}
	return signal.NotifyContext(context.Background(), sigs...)
}

// report prints an error once, unless its explanation is on the screen already.
func report(cmd *cobra.Command, err error) {
	out := cmd.ErrOrStderr()
	var explained *explainedError
	switch {
	case errors.Is(err, errSaid):
	case errors.As(err, &explained) && errors.Is(explained.kind, ErrInterrupted): // a person said no
		fmt.Fprintf(out, "%s: %v\n", cmd.Root().Name(), err)
	case errors.Is(err, ErrInterrupted), errors.Is(err, context.Canceled):
		fmt.Fprintf(out, "%s: interrupted\n", cmd.Root().Name())
	default:
		fmt.Fprintf(out, "%s: %v\n", cmd.Root().Name(), err)
	}
	var usage *usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(out, "Try '%s --help'.\n", cmd.CommandPath())
	}
}

// prepare gives every command of the tree the same manners: errors are printed
// by Run alone, and wrong flags, arguments and command names are usage errors.
func prepare(cmd *cobra.Command) {
	cmd.SilenceUsage = true
	cmd.SilenceErrors = true
	cmd.DisableFlagsInUseLine = true
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return Usage("%v", err) })
	if cmd.HasSubCommands() && cmd.RunE == nil && cmd.Run == nil {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = runGroup
	} else if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return Usage("%s: %v", cmd.Name(), err)
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		prepare(sub)
	}
}

// runGroup is what a command that only holds others does: without a word it
// shows its help, with an unknown one it says which were near.
func runGroup(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	if cmd.SuggestionsMinimumDistance <= 0 {
		cmd.SuggestionsMinimumDistance = 2
	}
	near := ""
	if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
		near = "; did you mean " + strings.Join(s, " or ") + "?"
	}
	return Usage("unknown command %q for %q%s", args[0], cmd.CommandPath(), near)
}

// Args wraps a check of a command's arguments so that what is missing is said
// in the command's own words: want is for example "PATH...".
func Args(minimum, maximum int, want string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < minimum:
			return fmt.Errorf("%s is missing", want)
		case maximum >= 0 && len(args) > maximum:
			return fmt.Errorf("unexpected argument %q", args[maximum])
		}
		return nil
	}
}

// usageError is a command line that makes no sense as it stands.
type usageError struct{ message string }

func (e *usageError) Error() string { return e.message }
func (e *usageError) Unwrap() error { return flox.ErrBadInput }

// Usage makes an error that exits with CodeUsage and points to --help.
func Usage(format string, args ...any) error {
	return &usageError{message: fmt.Sprintf(format, args...)}
}

// Explain makes an error that a person reads as it stands and that exits like
// kind, one of flox's sentinels.
func Explain(kind error, format string, args ...any) error {
	return &explainedError{message: fmt.Sprintf(format, args...), kind: kind}
}

// explainedError keeps its kind out of its words, where a sentinel's "not found"
// behind a whole sentence would only stutter.
type explainedError struct {
	message string
	kind    error
}

func (e *explainedError) Error() string { return e.message }
func (e *explainedError) Unwrap() error { return e.kind }
