package ctl

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// agentPatience is how long doctor waits for the agent's own findings: a sick
// agent must not keep doctor from speaking.
const agentPatience = 10 * time.Second

// doctorOptions say where to look on a machine that is not set up yet.
type doctorOptions struct {
	*globals
	storeDir string
	stateDir string
	fix, yes bool
}

func newDoctorCmd(g *globals) *cobra.Command {
	opts := doctorOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "doctor [--fix [--yes]]",
		Short: "Check this machine, line by line, each with its fix",
		Long: `Check what the store needs on this machine: kernel, FUSE, mount, disk, clock,
ports, keys; then ask the agent for its own findings, and the storehouse what is not
well with its servers. Everything but these two works before anything is set up. Each line is ok, warning or error and says what
to do; the exit code is 1 if there is an error. Run it with sudo to let it look
everywhere.

With --fix it mends what it can by itself, and asks before each: that sudo finds the
programs of profiles (a file in /etc/sudoers.d). The rest is said with the command.

` + cli.ExitCodes,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if opts.fix {
				if err := fixSudo(cmd, patient{socket: g.socketPath()}, opts.yes, g.printer(cmd)); err != nil {
					return err
				}
			}
			return runDoctor(cmd.Context(), opts, g.printer(cmd))
		},
	}
	cmd.Flags().BoolVar(&opts.fix, "fix", false, "mend what can be")
	cmd.Flags().BoolVarP(&opts.yes, "yes", "y", false, "do not ask")
	cmd.Flags().StringVar(&opts.storeDir, "store-dir", "", "where the store is or will be mounted (default: ask the agent, else "+string(flox.DefaultStoreDir)+")")
	cmd.Flags().StringVar(&opts.stateDir, "state-dir", cli.DefaultStateDir, "where floxd keeps its state")
	return cmd
}

// level says how bad a finding is.
type level string

const (
	levelOK      level = "ok"
	levelWarning level = "warning"
	levelError   level = "error"
)

// finding is one line of doctor.
type finding struct {
	Check string `json:"check"`
	Level level  `json:"level"`
	What  string `json:"what"`
	Fix   string `json:"fix"`
}

// ok is a line without a fix.
func ok(check, format string, args ...any) finding {
	return finding{Check: check, Level: levelOK, What: fmt.Sprintf(format, args...)}
}

// warning is about what works, but worse than it could.
func warning(check, fix, format string, args ...any) finding {
	return finding{Check: check, Level: levelWarning, What: fmt.Sprintf(format, args...), Fix: fix}
}

// failure is about what does not work.
func failure(check, fix, format string, args ...any) finding {
	return finding{Check: check, Level: levelError, What: fmt.Sprintf(format, args...), Fix: fix}
}

// patient is what the local checks know of the machine.
type patient struct {
	root     string // "" for the machine itself; a test looks elsewhere
	storeDir string
	stateDir string
	socket   string
	agent    *floxv1.StatusResponse // nil when it does not answer
}

// runDoctor looks at the machine first and asks the agent last, so that it has
// something to say in every state a machine can be in.
func runDoctor(ctx context.Context, opts doctorOptions, out *output) error {
	askCtx, cancel := context.WithTimeout(ctx, agentPatience)
	defer cancel()
	agent := opts.agent()
	p := patient{storeDir: opts.storeDir, stateDir: opts.stateDir, socket: opts.socketPath()}
	status, statusErr := askStatus(askCtx, opts.globals)
	if statusErr == nil {
		p.agent = status
	}
	if p.storeDir == "" {
		p.storeDir = string(flox.DefaultStoreDir)
		if p.agent.GetMountDir() != "" {
			p.storeDir = p.agent.GetMountDir()
		}
	}
	findings := localChecks(ctx, p)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if statusErr != nil {
		findings = append(findings, agentMissing(ctx, p, statusErr))
	} else {
		findings = append(findings, ok("agent", "%s answers at %s, pid %d", p.agent.GetVersion(), p.socket, p.agent.GetPid()))
		resp, err := agent.Doctor(askCtx, connect.NewRequest(&floxv1.DoctorRequest{}))
		if err != nil {
			findings = append(findings, failure("agent", "see the agent's log", "it cannot examine itself: %v", explain(err)))
		} else {
			findings = append(findings, agentFindings(resp.Msg)...)
		}
	}
	return printFindings(out, append(findings, houseFindings(askCtx, opts.globals)...))
}

// houseFindings says what the storehouse's servers say of each other, where this
// machine reaches any; what keeps it from that is among the agent's findings.
func houseFindings(ctx context.Context, g *globals) (list []finding) {
	house, err := askServers(ctx, g)
	if err != nil {
		return nil
	}
	for _, s := range house.GetServers() {
		if s.GetProblem() != "" {
			list = append(list, warning("servers", "see floxctl storehouse status", "%s: %s", s.GetName(), s.GetProblem()))
		}
		if s.GetAdvice() != "" {
			list = append(list, warning("servers", "see floxctl storehouse status", "%s: %s", s.GetName(), s.GetAdvice()))
		}
	}
	return list
}

// agentFindings takes over what the agent found; a level nobody knows counts as
// a warning.
func agentFindings(m *floxv1.DoctorResponse) []finding {
	var list []finding
	for _, f := range m.GetFindings() {
		l := level(f.GetLevel())
		if l != levelOK && l != levelError {
			l = levelWarning
		}
		list = append(list, finding{Check: f.GetCheck(), Level: l, What: f.GetWhat(), Fix: f.GetFix()})
	}
	return list
}

// agentMissing judges an agent that does not answer: nothing to worry about on
// a machine that is not set up, an error where its mount is still there.
func agentMissing(ctx context.Context, p patient, err error) finding {
	const start = "start it: sudo floxd up (everything on this machine), or sudo floxd agent --invite FILE"
	var dial *cli.DialError
	if !errors.As(err, &dial) {
		if pid, stopped := stoppedServer(ctx, p.socket); stopped {
			return failure("agent", fmt.Sprintf("kill -CONT %d lets it go on; else its parent kills it after about a minute and starts the next, unless a debugger holds it", pid),
				"it does not answer at %s: its process %d is stopped by a signal or a debugger, and readers wait", p.socket, pid)
		}
		return failure("agent", "see its log: its parent replaces one that stands still after about a minute; else restart floxd", "it does not answer at %s: %v", p.socket, explain(err))
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return warning("agent", "run: sudo floxctl doctor", "you may not open its socket %s", p.socket)
	case storeMount(p) != nil:
		return failure("agent", "start floxd again: it takes the mount over", "none is running at %s, but the store is mounted: readers wait", p.socket)
	}
	return warning("agent", start, "none is running at %s", p.socket)
}

// printFindings prints every line and makes the exit code of the worst.
func printFindings(out *output, findings []finding) error {
	count := map[level]int{}
	for _, f := range findings {
		count[f.Level]++
	}
	var err error
	if count[levelError] > 0 {
		err = cli.Said(errors.New("doctor found errors"))
	}
	if out.json {
		if werr := out.printJSON(struct {
			OK       bool      `json:"ok"`
			Findings []finding `json:"findings"`
		}{err == nil, some(findings)}); werr != nil {
			return werr
		}
		return err
	}
	colors := map[level]style{levelOK: green, levelWarning: yellow, levelError: red}
	for _, f := range findings {
		out.printf("%s %-10s %s\n", out.paint(colors[f.Level], fmt.Sprintf("%-7s", f.Level)), clean(f.Check), clean(f.What))
		if f.Fix != "" && f.Level != levelOK {
			out.printf("%s%s\n", strings.Repeat(" ", 19)+out.paint(bold, "fix: "), clean(f.Fix))
		}
	}
	out.printf("\n%s, %s, %s.\n", plural(uint64(count[levelError]), "error", "errors"),
		plural(uint64(count[levelWarning]), "warning", "warnings"), plural(uint64(count[levelOK]), "check well", "checks well"))
	return err
}
