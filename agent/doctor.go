package agent

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Doctor implements floxv1connect.AgentHandler: what only the agent can see.
func (c *control) Doctor(ctx context.Context, _ *connect.Request[floxv1.DoctorRequest]) (*connect.Response[floxv1.DoctorResponse], error) {
	a := c.a
	findings := []*floxv1.Finding{a.doctorStorehouse(), a.doctorTrust(), a.doctorMount(), a.doctorCache(), a.doctorPeers()}
	findings = append(findings, a.doctorFacts()...)
	if a.local != nil {
		findings = append(findings, a.doctorLocal())
	}
	if a.mount != nil {
		findings = append(findings, a.doctorTakeover(ctx), a.doctorBefore())
	}
	return connect.NewResponse(&floxv1.DoctorResponse{Findings: findings}), nil
}

func finding(check, level, fix, format string, args ...any) *floxv1.Finding {
	return &floxv1.Finding{Check: check, Level: level, What: fmt.Sprintf(format, args...), Fix: fix}
}

func (a *Agent) doctorStorehouse() *floxv1.Finding {
	l := a.follower.state()
	if l.connected {
		return finding("storehouse", "ok", "", "%s connected, index %d", l.name, l.index)
	}
	return finding("storehouse", "error",
		fmt.Sprintf("check that %s is reachable from here (address, port, firewall) and that the storehouse runs", a.whereHouses()),
		"not connected: %s", oneLine(l.err))
}

func (a *Agent) doctorTrust() *floxv1.Finding {
	if v := a.facts.trustVersion(); v > 0 {
		return finding("keys", "ok", "", "trust list version %d accepted", v)
	}
	return finding("keys", "error", "it comes with the first contact to the storehouse", "no trust list yet: no path can be verified")
}

func (a *Agent) doctorMount() *floxv1.Finding {
	if a.mount == nil {
		return finding("mount", "warning", "start it with `floxd agent` or `floxd up` as root", "nothing is mounted by this agent")
	}
	if full := a.mountFull(); full != "" {
		return finding("mount", "error", "`floxctl watch` says who waits for what and why; end that process, or give it the network back", "%s", full)
	}
	stuck := 0
	for _, w := range a.mount.Waiting() {
		if time.Since(w.Since) > a.cfg.ReadTimeout {
			stuck++
		}
	}
	if stuck > 0 {
		return finding("mount", "warning", "`floxctl watch` says who waits and why", "%d requests wait longer than %s", stuck, a.cfg.ReadTimeout)
	}
	return finding("mount", "ok", "", "%s, %d requests answered", a.cfg.Warden.MountDir, a.mount.Stats().Total)
}

// doctorBefore says whether the process before this one stood still.
func (a *Agent) doctorBefore() *floxv1.Finding {
	const check = "standstill"
	if before := a.cfg.Warden.Before(); before != nil {
		return finding(check, "warning", "find out what stopped it (kill -STOP, a freezer, a bug: see the agent's log); a restart of the agent clears this",
			"at %s the agent's process was replaced, %s; who read meanwhile waited", before.At.Format(time.DateTime), before.Why)
	}
	return finding(check, "ok", "", "an agent's process that says nothing any more is replaced, and the one before this was not")
}

// doctorFacts says nothing unless they, or what is added here, cannot be written.
func (a *Agent) doctorFacts() (out []*floxv1.Finding) {
	if err := a.facts.full(); err != nil {
		out = append(out, finding("facts", "error", "free some disk space", "%s", oneLine(err)))
	}
	if err := a.staged.Full(); err != nil {
		out = append(out, finding("staging", "error", "free some disk space", "%s", oneLine(err)))
	}
	return out
}

func (a *Agent) doctorCache() *floxv1.Finding {
	u := a.cache.Usage()
	if u.Limit <= 0 {
		return finding("cache", "error", "free some disk space or lower the reserve", "the disk of %s has less than %d bytes free: reads are streamed and not kept", a.cfg.StateDir, u.Reserve)
	}
	if u.Dropped > 0 {
		return finding("cache", "warning", "look at the disk's health (dmesg, smartctl)", "%d bytes were found wrong and dropped since the start", u.Dropped)
	}
	return finding("cache", "ok", "", "%d of %d bytes used", u.Bytes, u.Limit)
}

func (a *Agent) doctorPeers() *floxv1.Finding {
	peers := a.host.Peers()
	if len(peers) == 0 {
		return finding("peers", "warning", "open the listening port to other machines, or check the invite", "no peer is connected")
	}
	return finding("peers", "ok", "", "%d peers connected", len(peers))
}
