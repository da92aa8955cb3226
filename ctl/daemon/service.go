package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// How long a part of floxd is waited for.
const (
	servicePatience = time.Minute      // from its start to its first answer
	leavePatience   = 30 * time.Second // from SIGTERM to its end
	askEvery        = 100 * time.Millisecond
)

// service is a part of floxd that runs as long as the machine does: under
// systemd, or where there is none as a process of its own.
type service struct {
	part    string // storehouse, agent
	cfg     *Config
	config  string // the configuration file, absolute
	program string
	// units is where unit files lie, and control runs systemctl; nil = no systemd.
	units   string
	control func(ctx context.Context, args ...string) error
	// answers reports whether the service does its work.
	answers func(ctx context.Context) bool
}

// newService is the part of this machine that the configuration in file says.
func newService(part string, cfg *Config, file *configFile) (*service, error) {
	program, err := calledAs()
	if err != nil {
		return nil, err
	}
	s := &service{part: part, cfg: cfg, config: file.path, program: program}
	s.answers = s.asked
	if hasSystemd() {
		s.units, s.control = unitDir, systemctl
	}
	return s, nil
}

// runs says how a service runs, for people and scripts.
type runs struct {
	Manager string `json:"manager"` // systemd, none
	Unit    string `json:"unit,omitempty"`
	PID     int    `json:"pid,omitempty"`
	Log     string `json:"log"` // a command or a file
}

// start has the service run and waits until it answers. One that runs already is
// left alone, unless it was configured anew.
func (s *service) start(ctx context.Context, changed bool) (*runs, error) {
	if s.control != nil {
		return s.startUnit(ctx, changed)
	}
	return s.startDetached(ctx, changed)
}

// stop ends the service and undoes what start did, as far as it did it.
func (s *service) stop(ctx context.Context) error {
	if s.control != nil {
		if err := s.removeUnit(ctx); err != nil {
			return err
		}
	}
	return s.stopDetached(ctx)
}

// await waits until the service answers. It gives up early when gone is closed.
func (s *service) await(ctx context.Context, gone <-chan struct{}, log func() string) error {
	ctx, cancel := context.WithTimeout(ctx, servicePatience)
	defer cancel()
	for !s.answers(ctx) {
		select {
		case <-time.After(askEvery):
		case <-gone:
			return cli.Explain(flox.ErrUnreachable, "floxd %s has ended; it said:\n%s", s.part, log())
		case <-ctx.Done():
			if ctx.Err() == context.Canceled { //nolint:errorlint // the context's own
				return ctx.Err()
			}
			return cli.Explain(flox.ErrUnreachable, "floxd %s was started and does not answer after %s; it said:\n%s", s.part, servicePatience, log())
		}
	}
	return nil
}

// asked reports whether the service answers on its socket.
func (s *service) asked(ctx context.Context) bool {
	if s.part == "agent" {
		return agentMounted(ctx, filepath.Join(s.cfg.RunDir, cli.SocketName))
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	admin, done := cli.Admin(filepath.Join(s.cfg.RunDir, cli.StorehouseSocket))
	defer done()
	_, err := admin.ListMachines(ctx, connect.NewRequest(&floxv1.ListMachinesRequest{}))
	return err == nil
}

// agentMounted asks an agent whether the store is served.
func agentMounted(ctx context.Context, socket string) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	client, done := cli.Agent(socket)
	defer done()
	resp, err := client.Status(ctx, connect.NewRequest(&floxv1.StatusRequest{}))
	return err == nil && resp.Msg.GetMounted()
}

// tell says how it runs.
func (r *runs) tell(part string) string {
	if r.Manager == "systemd" {
		return fmt.Sprintf("Runs        %s, also after a reboot; its log: %s\n", r.Unit, r.Log)
	}
	return fmt.Sprintf("Runs        process %d; its log: %s\n            Without systemd nothing starts it at boot: have your service manager run floxd %s.\n", r.PID, r.Log, part)
}

// hasSystemd reports whether systemd manages this machine.
func hasSystemd() bool {
	info, err := os.Stat("/run/systemd/system")
	return err == nil && info.IsDir()
}
