package integration

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/p2p"
)

// entry: who is let in, and as what. Who is not finds no open door, and is in the
// audit log.
func (o *operator) entry() {
	leader, follower, third := o.roles()
	guest, climber := o.host(o.t, "guest"), o.host(o.t, "climber")
	join := func(invite, name string) result {
		o.t.Helper()
		return do(o.t, guest, o.programs.Floxctl, "join", invite, "--no-start", "--name", name)
	}
	refused := func(from *netns.Host, why string) {
		o.t.Helper()
		o.eventually("it is audited that "+from.Name+" was refused", func() bool {
			return slices.ContainsFunc(o.log(leader), func(r auditTold) bool {
				return r.Refused && strings.Contains(r.Detail, "from "+from.Addr().String()) && strings.Contains(r.Detail, why)
			})
		})
	}
	list := func() (names []string) {
		for _, m := range asks[[]machineTold](o, follower, "machine", "list") {
			names = append(names, m.Name+" "+m.Role)
		}
		return names
	}
	before := list()

	// Its time is over.
	late := asks[made](o, follower, "invite", "--role", "agent", "--ttl", "1s").Invite
	o.eventually("the invite is over", func() bool {
		return strings.Contains(o.ctl(third, "invite", "list").out, "No invite can be used now")
	})
	join(late, "late").want(o.t, 5, "invite", "ask for a new one")
	refused(guest, "invite")

	// An invite for an agent, and one that was made over to say "server".
	invite := asks[made](o, follower, "invite", "--role", "agent").Invite
	forged, err := api.ParseJoinInvite(invite)
	must(o.t, err)
	forged.Role = "server"
	line, err := forged.Encode()
	must(o.t, err)
	do(o.t, climber, o.programs.Floxctl, "join", line, "--no-start", "--name", "climber").want(o.t, 5, "is for the role agent", "ask for an invite")
	refused(climber, "is for the role agent")
	if got := list(); !slices.Equal(got, before) {
		o.t.Errorf("who may not come in has: %v, before %v", got, before)
	}
	join(invite, "honest").want(o.t, 0, "honest (agent) joined") // it is not used up
	cancelled := asks[made](o, third, "invite", "--role", "agent")
	o.ctl(leader, "invite", "cancel", cancelled.ID).want(o.t, 0, "is cancelled")
	do(o.t, climber, o.programs.Floxctl, "join", cancelled.Invite, "--no-start").want(o.t, 5, "invite", "ask for a new one")

	o.doors(guest, leader)
}

// doors: whoever is no member opens no stream of a server, and whoever is no server
// gets no connection for consensus, with the swarm's secret too.
func (o *operator) doors(member *netns.Host, s *hosts.Storehouse) {
	o.t.Helper()
	dir := filepath.Join(member.Root(), filepath.Dir(keptInvite))
	told, err := api.LoadInvite(filepath.Join(member.Root(), keptInvite))
	must(o.t, err)
	machine := asks[struct {
		Peer, Consensus string
		Addrs           []string
	}](o, s, "machine", "show", s.Host.Name)
	_, unknown, err := ed25519.GenerateKey(nil)
	must(o.t, err)
	known, err := p2p.LoadOrCreateKey(filepath.Join(dir, "key"))
	must(o.t, err)
	for _, x := range []struct {
		who          string
		key          ed25519.PrivateKey
		secret       []byte
		stream, line string
	}{
		{"nobody", unknown, []byte("not the secret of this swarm"), "denied", "denied"},
		{"somebody with a stolen secret", unknown, told.Secret, "denied", "denied"},
		{"an agent", known, told.Secret, "", "denied"},
	} {
		got := o.knock(member, knocking{Key: x.key, Secret: x.secret, Peer: machine.Peer, Addrs: machine.Addrs, Consensus: machine.Consensus})
		if got.Stream != x.stream || got.Line != x.line {
			o.t.Errorf("%s is answered %+v, want %q for a stream and %q for consensus", x.who, got, x.stream, x.line)
		}
	}
}

// knockEnv makes this binary somebody who tries a server's doors from a host.
const knockEnv = "FLOX_INTEGRATION_KNOCK"

// knocking is what they have; knocked, how they are answered: "" = let in, "denied", or
// what else went wrong.
type (
	knocking struct {
		Key, Secret     []byte
		Peer, Consensus string
		Addrs           []string
	}
	knocked struct{ Stream, Line string }
)

func (o *operator) knock(from *netns.Host, k knocking) (got knocked) {
	o.t.Helper()
	self, err := os.Executable()
	must(o.t, err)
	b, err := json.Marshal(k)
	must(o.t, err)
	r := do(o.t, from, "env", knockEnv+"="+string(b), self)
	r.want(o.t, 0)
	must(o.t, json.Unmarshal([]byte(r.out), &got))
	return got
}

// knockMain is that process.
func knockMain(text string) {
	var k knocking
	err := json.Unmarshal([]byte(text), &k)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	answer := func(err error) string {
		switch {
		case err == nil:
			return ""
		case errors.Is(err, flox.ErrDenied):
			return "denied"
		}
		return err.Error()
	}
	got := knocked{}
	if err == nil {
		got.Stream, got.Line = answer(k.stream(ctx)), answer(k.line())
		err = json.NewEncoder(os.Stdout).Encode(got)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// stream opens a stream for calls.
func (k *knocking) stream(ctx context.Context) error {
	h, err := p2p.New(p2p.Config{Key: k.Key, Listen: []string{"127.0.0.1:0"}, Secret: k.Secret, NoMDNS: true, DHTClient: true})
	if err != nil {
		return err
	}
	err = h.AddPeer(p2p.PeerAddr{ID: p2p.PeerID(k.Peer), Addrs: k.Addrs})
	if err == nil {
		conn, dialed := h.Dial(ctx, p2p.PeerID(k.Peer), "/flox/rpc/1")
		if err = dialed; err == nil {
			err = conn.Close()
		}
	}
	return errors.Join(err, h.Close())
}

// line connects as a server would that takes part in the log.
func (k *knocking) line() error {
	line, err := p2p.NewLine(p2p.LineConfig{
		Key: k.Key, Listen: "127.0.0.1:0", Secrets: func() [][]byte { return [][]byte{k.Secret} },
		Allowed: func(p2p.PeerID) bool { return true },
	})
	if err != nil {
		return err
	}
	conn, err := line.Dial(k.Consensus, 10*time.Second)
	if err == nil {
		err = conn.Close()
	}
	return errors.Join(err, line.Close())
}
