package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/ctl/entry"
)

// newStepCmd is the process of an ordinary user that floxd join starts: it talks
// to the network and writes what is that user's.
func newStepCmd() *cobra.Command {
	return &cobra.Command{
		Use: "join-step", Hidden: true, Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return entry.Serve(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

// runStep does a step as who and reads what it gave. Who is not root does it
// itself.
func runStep(ctx context.Context, who account, step *entry.Step, to any, errOut io.Writer) error {
	order, err := json.Marshal(step)
	if err != nil {
		return err
	}
	answer := &bytes.Buffer{}
	if os.Geteuid() != 0 {
		err = entry.Serve(ctx, bytes.NewReader(order), answer)
	} else {
		err = runAs(ctx, who, bytes.NewReader(order), answer, errOut, "join-step")
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(answer.Bytes(), to); err != nil {
		return fmt.Errorf("what a step of joining answered: %w", err)
	}
	return nil
}

// runAs runs this program as who, who gains nothing by it, and waits for it. What
// it says is its explanation.
func runAs(ctx context.Context, who account, in io.Reader, out, errOut io.Writer, args ...string) error {
	program, err := ownProgram(who)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Args[0] = "floxd"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, errOut
	cmd.Env, cmd.Dir = []string{"PATH=" + os.Getenv("PATH")}, "/"
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopPatience
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true, Pdeathsig: syscall.SIGTERM,
		Credential: &syscall.Credential{Uid: who.uid, Gid: who.gid},
	}
	done := make(chan error, 1)
	go func() { // ends with the process; its thread can gain nothing any more and goes with it
		runtime.LockOSThread()
		err := os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		if err == nil {
			err = cmd.Run()
		}
		done <- err
	}()
	err = <-done
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		return cli.Said(cli.Exited(exit.ExitCode(), "it says why above"))
	}
	return err
}
