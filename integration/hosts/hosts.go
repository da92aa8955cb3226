// Package hosts runs the real floxd on hosts of a netns network: a storehouse,
// agents, and questions to them through the real floxctl. It must not look
// inside them: what it knows it has from their command lines and sockets.
package hosts

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/floxctl/flox/integration/netns"
)

// Ports every host uses; each has an address of its own.
const (
	HTTPPort  = 7780
	HousePort = 7781
	AgentPort = 7782
	// ConsensusPort is where servers of one storehouse reach each other.
	ConsensusPort = 7783
)

// startTimeout bounds the wait for a daemon to answer.
const startTimeout = time.Minute

// Programs are the binaries under test.
type Programs struct{ Floxd, Floxctl string }

// Build builds both programs into dir.
func Build(ctx context.Context, dir string) (Programs, error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+"/", "github.com/floxctl/flox/cmd/floxd", "github.com/floxctl/flox/cmd/floxctl")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return Programs{}, fmt.Errorf("build floxd and floxctl: %w\n%s", err, out)
	}
	return Programs{Floxd: filepath.Join(dir, "floxd"), Floxctl: filepath.Join(dir, "floxctl")}, nil
}

// Daemon is a running floxd.
type Daemon struct {
	Name string
	Log  string // file of its standard error

	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Start runs argv on a host with its output, of both kinds, in dir/name.log.
// Stop or Kill must be called.
func Start(host *netns.Host, dir, name string, argv ...string) (*Daemon, error) {
	d := &Daemon{Name: name, Log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(d.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	d.cmd = host.Command(context.Background(), argv[0], argv[1:]...) // ended by Stop, not by a context
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() { d.err = d.cmd.Wait(); close(d.done) }()
	return d, nil
}

// PID is the daemon's process.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Running reports whether the process has not ended.
func (d *Daemon) Running() bool {
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// Stop asks the daemon to end (SIGTERM), and makes it after a while. One that
// has ended is left alone.
func (d *Daemon) Stop() error {
	d.Signal(syscall.SIGTERM)
	select {
	case <-d.done:
		return nil
	case <-time.After(15 * time.Second):
	}
	d.Signal(syscall.SIGQUIT) // Go then writes where each goroutine stands
	select {
	case <-d.done:
	case <-time.After(2 * time.Second):
		d.Kill()
	}
	log, err := os.ReadFile(d.Log)
	return errors.Join(fmt.Errorf("%s did not stop within 15 s of SIGTERM:\n%s", d.Name, log), err)
}

// Signal sends a signal, if the process has not ended.
func (d *Daemon) Signal(sig os.Signal) { _ = d.cmd.Process.Signal(sig) }

// Wait waits for the process to end and gives its exit code, -1 after a signal.
func (d *Daemon) Wait(ctx context.Context) (int, error) {
	select {
	case <-d.done:
		return d.cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("%s runs on: %w", d.Name, ctx.Err())
	}
}

// Kill ends the daemon with SIGKILL and waits for it.
func (d *Daemon) Kill() {
	_ = d.cmd.Process.Kill()
	<-d.done
}

// Tail is the end of the daemon's log, for error messages.
func (d *Daemon) Tail() string {
	b, err := os.ReadFile(d.Log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// await calls ready until it succeeds, the daemon ends, or startTimeout is over.
func (d *Daemon) await(ctx context.Context, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-d.done:
			return fmt.Errorf("%s ended: %w\n%s", d.Name, d.err, d.Tail())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w\n%s", d.Name, err, d.Tail())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Storehouse is a running storehouse on a host, with its state where the
// defaults put it.
type Storehouse struct {
	*Daemon
	Host *netns.Host
	argv []string
	logs string
	url  string
	dir  string // --state-dir, as the host sees it

	began int64 // where the log of the last start begins
}

// StartStorehouse starts one; its log goes to logs/HOST.log.
func StartStorehouse(ctx context.Context, p Programs, host *netns.Host, logs string, flags ...string) (*Storehouse, error) {
	s := newStorehouse(p, host, logs, stateDir, append([]string{"--name", host.Name}, flags...)...)
	return s, s.Start(ctx)
}

// stateDir is where the defaults put a daemon's state.
const stateDir = "/var/lib/floxd"

// newStorehouse is one that does not run.
func newStorehouse(p Programs, host *netns.Host, logs, state string, flags ...string) *Storehouse {
	s := &Storehouse{Host: host, logs: logs, dir: state, url: fmt.Sprintf("http://%s:%d", host.Addr(), HTTPPort)}
	s.argv = append([]string{
		p.Floxd, "storehouse", "--http", fmt.Sprintf("0.0.0.0:%d", HTTPPort), "--http-url", s.URL(),
		"--advertise", fmt.Sprintf("%s:%d", host.Addr(), HousePort), "--open",
	}, flags...)
	return s
}

// Inside is the storehouse that runs as a part of up, which started it and stops
// it. It is reached from that host only.
func Inside(up *Agent) *Storehouse {
	return &Storehouse{Host: up.Host, logs: up.logs, dir: stateDir, url: fmt.Sprintf("http://127.0.0.1:%d", HTTPPort)}
}

// Joined is the storehouse whose server floxd storehouse init or floxd join
// started, on that host's port for stock Nix; logs is where a netrc may lie.
func Joined(host *netns.Host, logs string) *Storehouse {
	return &Storehouse{Host: host, logs: logs, dir: stateDir, url: fmt.Sprintf("http://%s:%d", host.Addr(), HTTPPort)}
}

// Start starts the storehouse (again) and waits until it answers.
func (s *Storehouse) Start(ctx context.Context) error {
	if err := s.Launch(); err != nil {
		return err
	}
	if err := s.Await(ctx); err != nil {
		return errors.Join(err, s.Stop())
	}
	return nil
}

// Launch is Start without waiting: one of several servers does not answer before
// there is a majority of them.
func (s *Storehouse) Launch() error { return s.LaunchBy() }

// LaunchBy is Launch by way of another program, which becomes the storehouse.
func (s *Storehouse) LaunchBy(before ...string) (err error) {
	s.began = 0
	if st, err := os.Stat(filepath.Join(s.logs, s.Host.Name+".log")); err == nil {
		s.began = st.Size()
	}
	s.Daemon, err = Start(s.Host, s.logs, s.Host.Name, append(before, s.argv...)...)
	return err
}

// Await waits until the storehouse answers.
func (s *Storehouse) Await(ctx context.Context) error {
	return s.await(ctx, func(ctx context.Context) error {
		if _, err := os.Stat(s.Invite()); err != nil {
			return err
		}
		return s.Answers(ctx)
	})
}

// Answers asks for a path that is not there: a storehouse that has only begun
// does not know that yet.
func (s *Storehouse) Answers(ctx context.Context) error {
	client := &http.Client{Transport: &http.Transport{DialContext: s.Host.Dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/00000000000000000000000000000000.narinfo", http.NoBody)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusNotFound {
		err = fmt.Errorf("it answers %s", resp.Status)
	}
	return errors.Join(err, resp.Body.Close())
}

// URL is the binary cache's.
func (s *Storehouse) URL() string { return s.url }

// State is the storehouse's state directory, seen from outside of the host.
func (s *Storehouse) State() string { return filepath.Join(s.Host.Root(), s.dir, "storehouse") }

// Invite is the invite file agents join with.
func (s *Storehouse) Invite() string { return filepath.Join(s.State(), "invite.json") }

// Netrc writes a netrc file with the upload token, for stock Nix, and gives its name.
func (s *Storehouse) Netrc() (string, error) {
	token, err := os.ReadFile(filepath.Join(s.State(), "upload-token"))
	if err != nil {
		return "", err
	}
	at, err := url.Parse(s.url)
	if err != nil {
		return "", err
	}
	name := filepath.Join(s.logs, "netrc-"+s.Host.Name)
	line := fmt.Sprintf("machine %s password %s\n", at.Hostname(), strings.TrimSpace(string(token)))
	return name, os.WriteFile(name, []byte(line), 0o600)
}

// CopyArgs is the command line by which stock Nix copies store paths, which more
// options may come before, into the storehouse. It remembers nothing of another
// storehouse at the same address.
func (s *Storehouse) CopyArgs(optionsAndPaths ...string) ([]string, error) {
	netrc, err := s.Netrc()
	if err != nil {
		return nil, err
	}
	return append([]string{
		"nix", "copy", "--to", s.URL() + "?compression=zstd", "--option", "netrc-file", netrc,
		"--option", "narinfo-cache-positive-ttl", "0", "--option", "narinfo-cache-negative-ttl", "0",
	}, optionsAndPaths...), nil
}

// Agent is a running agent on a host, with its mount in that host's mount
// namespace and its state where the defaults put it.
type Agent struct {
	*Daemon
	Host     *netns.Host
	programs Programs
	base     []string // argv without the flags of one start
	argv     []string
	logs     string
}

// StartAgent starts one, joined by an invite; its log goes to logs/HOST.log.
func StartAgent(ctx context.Context, p Programs, host *netns.Host, logs, invite string, flags ...string) (*Agent, error) {
	a := &Agent{Host: host, programs: p, logs: logs}
	a.base = []string{p.Floxd, "agent", "--invite", invite, "--advertise", fmt.Sprintf("%s:%d", host.Addr(), AgentPort)}
	a.argv = append(slices.Clone(a.base), flags...)
	return a, a.Start(ctx)
}

// StartUp starts `floxd up`, which is an agent with a storehouse of its own.
func StartUp(ctx context.Context, p Programs, host *netns.Host, logs string, flags ...string) (*Agent, error) {
	a := &Agent{Host: host, programs: p, logs: logs, base: []string{p.Floxd, "up"}}
	a.argv = append(slices.Clone(a.base), flags...)
	return a, a.Start(ctx)
}

// Start starts the agent (again) and waits until its mount answers.
func (a *Agent) Start(ctx context.Context) error {
	d, err := Start(a.Host, a.logs, a.Host.Name, a.argv...)
	if err != nil {
		return err
	}
	a.Daemon = d
	err = d.await(ctx, func(ctx context.Context) error {
		s, err := a.Status(ctx)
		if err == nil && !s.Mounted {
			err = errors.New("not mounted yet")
		}
		return err
	})
	if err != nil {
		return errors.Join(err, d.Stop())
	}
	return nil
}

// State is the agent's state directory, seen from outside of the host.
func (a *Agent) State() string { return filepath.Join(a.Host.Root(), "var/lib/floxd/agent") }

// Ctl runs floxctl on the agent's host and gives what it prints.
func (a *Agent) Ctl(ctx context.Context, args ...string) ([]byte, error) {
	cmd := a.Host.Command(ctx, a.programs.Floxctl, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("floxctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// Status is what `floxctl status --json` says, as far as tests look at it.
type Status struct {
	PID        int  `json:"pid"` // of the unprivileged process
	Mounted    bool `json:"mounted"`
	Storehouse struct {
		Connected bool   `json:"connected"`
		Error     string `json:"error"`
	} `json:"storehouse"`
	Peers        int               `json:"peers"`
	FuseRequests map[string]uint64 `json:"fuseRequests"`
	FuseRead     uint64            `json:"fuseReadBytes"` // what READs were answered with
	Heap         uint64            `json:"heapBytes"`     // after the last garbage collection
	Traffic      Traffic           `json:"traffic"`
	Prefetch     Prefetch          `json:"prefetch"`
	Waiting      int               `json:"waiting"`
	Staged       struct {
		Paths uint64 `json:"paths"`
		Bytes uint64 `json:"bytes"` // on the disk
	} `json:"staged"`
	Cache struct {
		Dir       string `json:"dir"`
		Bytes     uint64 `json:"bytes"`
		Kept      uint64 `json:"keptBytes"`
		Evicted   uint64 `json:"evictedBytes"`
		Streaming bool   `json:"streaming"` // nothing more can be kept
	} `json:"cache"`
	Offline struct {
		Used         int    `json:"used"`
		UsedComplete int    `json:"usedComplete"`
		Kept         int    `json:"kept"`
		KeptComplete int    `json:"keptComplete"`
		MissingBytes uint64 `json:"missingBytes"`
		Missing      []struct {
			Path   string `json:"path"`
			Reason string `json:"reason"`
		} `json:"missing"`
	} `json:"offline"`
	Problems []string `json:"problems"`
}

// Traffic counts plain bytes by where they came from, and what crossed the wire.
type Traffic struct {
	LAN        uint64 `json:"lanBytes"`
	Site       uint64 `json:"siteBytes"`
	Far        uint64 `json:"farBytes"`
	Storehouse uint64 `json:"storehouseBytes"`
	Wire       uint64 `json:"wireBytes"`
	Served     uint64 `json:"servedBytes"`
	Facts      uint64 `json:"factBytes"`
	Manifests  uint64 `json:"manifestBytes"`
	RoundTrips uint64 `json:"roundTrips"` // that readers waited for, one after the other
}

// Prefetch counts what was fetched before somebody asked for it.
type Prefetch struct {
	On              bool   `json:"on"`
	Traces          bool   `json:"traces"`
	RateBytes       uint64 `json:"rateBytes"` // the cap per second, 0 = none
	SequentialBytes uint64 `json:"sequentialBytes"`
	DirectoryBytes  uint64 `json:"directoryBytes"`
	TraceBytes      uint64 `json:"traceBytes"`
	LoaderBytes     uint64 `json:"loaderBytes"`
	CompleteBytes   uint64 `json:"completeBytes"`
	StartsRecorded  uint64 `json:"startsRecorded"`
	StartsReplayed  uint64 `json:"startsReplayed"`
}

// Bytes is all of it.
func (p Prefetch) Bytes() uint64 {
	return p.SequentialBytes + p.DirectoryBytes + p.TraceBytes + p.LoaderBytes + p.CompleteBytes
}

// Plain is all that was fetched, uncompressed, facts included.
func (t Traffic) Plain() uint64 { return t.LAN + t.Site + t.Far + t.Storehouse + t.Facts }

// Peers is what came from other agents.
func (t Traffic) Peers() uint64 { return t.LAN + t.Site + t.Far }

// Sub is what was added since before.
func (t Traffic) Sub(before Traffic) Traffic {
	return Traffic{
		LAN: t.LAN - before.LAN, Site: t.Site - before.Site, Far: t.Far - before.Far, Storehouse: t.Storehouse - before.Storehouse,
		Wire: t.Wire - before.Wire, Served: t.Served - before.Served, Facts: t.Facts - before.Facts, Manifests: t.Manifests - before.Manifests,
		RoundTrips: t.RoundTrips - before.RoundTrips,
	}
}

// Requests sums the FUSE requests that want an answer. IOCTL is left out and
// given by itself: the kernel sends every ioctl on and keeps no answer, so a
// program that asks isatty of each file it opens, as Python does, always costs
// one request per file.
func (s *Status) Requests() (n, ioctl uint64) {
	for op, count := range s.FuseRequests {
		switch op {
		case "FORGET", "BATCH_FORGET", "INTERRUPT":
		case "IOCTL":
			ioctl += count
		default:
			n += count
		}
	}
	return n, ioctl
}

// Status asks the agent.
func (a *Agent) Status(ctx context.Context) (*Status, error) {
	out, err := a.Ctl(ctx, "status", "--json")
	if err != nil {
		return nil, err
	}
	s := &Status{}
	if err := json.Unmarshal(out, s); err != nil {
		return nil, fmt.Errorf("status of %s: %w: %s", a.Name, err, out)
	}
	return s, nil
}

// Await waits until the agent's status satisfies ok.
func (a *Agent) Await(ctx context.Context, what string, ok func(*Status) bool) error {
	return a.await(ctx, func(ctx context.Context) error {
		s, err := a.Status(ctx)
		if err == nil && !ok(s) {
			err = fmt.Errorf("not yet: %s", what)
		}
		return err
	})
}
