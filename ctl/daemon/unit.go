package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// unitDir is where an administrator's units lie.
const unitDir = "/etc/systemd/system"

// unitHead marks units that this program may change and remove.
const unitHead = "# Made by floxd; floxctl leave removes it.\n"

// unitName is the unit of a part.
func (s *service) unitName() string { return "floxd-" + s.part + ".service" }

// unit is the text of the unit. Only the main process is asked to end: it ends
// the others in order, and unmounts.
func (s *service) unit() string {
	what := map[string]string{"agent": "flox agent: the package store of this machine", "storehouse": "flox storehouse"}[s.part]
	return unitHead + `[Unit]
Description=` + what + `
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart=` + quoteUnit(s.program) + " --config " + quoteUnit(s.config) + " " + s.part + `
Restart=always
RestartSec=2
KillMode=mixed
TimeoutStopSec=45
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
`
}

// quoteUnit writes a word of a command in a unit (systemd.service(5), "Command lines").
func quoteUnit(word string) string {
	word = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%", "$", "$$").Replace(word)
	if strings.ContainsAny(word, " \t'\";\\") {
		return `"` + word + `"`
	}
	return word
}

func (s *service) startUnit(ctx context.Context, changed bool) (*runs, error) {
	path, text := filepath.Join(s.units, s.unitName()), s.unit()
	was, err := os.ReadFile(path)
	switch {
	case err == nil && !strings.HasPrefix(string(was), unitHead):
		return nil, cli.Explain(flox.ErrBusy, "%s is there already and not floxd's: start it with systemctl, or remove it; --no-start leaves services alone", path)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("unit: %w", err)
	case string(was) != text:
		changed = true
		if err := replaceFile(path, text, 0o644); err != nil {
			return nil, fmt.Errorf("write the unit %s (with --no-start services are left to you): %w", path, err)
		}
		if err := s.control(ctx, "daemon-reload"); err != nil {
			return nil, err
		}
	}
	verb := "start"
	if changed {
		verb = "restart"
	}
	if err := s.control(ctx, "enable", s.unitName()); err != nil {
		return nil, err
	}
	if err := s.control(ctx, verb, s.unitName()); err != nil {
		return nil, err
	}
	log := "journalctl -u " + strings.TrimSuffix(s.unitName(), ".service")
	return &runs{Manager: "systemd", Unit: s.unitName(), Log: log}, s.await(ctx, nil, func() string { return "see " + log })
}

// removeUnit stops the unit for good and removes it, if it is floxd's.
func (s *service) removeUnit(ctx context.Context) error {
	path := filepath.Join(s.units, s.unitName())
	was, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !strings.HasPrefix(string(was), unitHead) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unit: %w", err)
	}
	if err := s.control(ctx, "disable", "--now", s.unitName()); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("unit: %w", err)
	}
	return s.control(ctx, "daemon-reload")
}

// systemctl runs it, and gives its words if it fails.
func systemctl(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "systemctl", args...)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(said.String()))
	}
	return nil
}
