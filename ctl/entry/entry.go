// Package entry is how a machine comes into a storehouse and goes: what is said at the
// door, and what is kept of it in the state directory. A step runs as the user
// that will own that state. The package must not know configuration files,
// services or command lines.
package entry

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/storehouse"
)

// Names below the state directory of floxd.
const (
	AgentDir      = "agent"
	StorehouseDir = "storehouse"
	InviteName    = "invite.json" // what an agent keeps
)

// Roles of a machine.
const (
	RoleServer = "server"
	RoleAgent  = "agent"
	RoleWorker = "worker"
)

// Action is what a step does.
type Action string

// The steps.
const (
	Join  Action = "join"  // redeem an invite, or join within a window; gives a Joined
	Find  Action = "find"  // look for storehouses on the LAN; gives a list of Found
	Leave Action = "leave" // be no agent any more; gives a Left
	Who   Action = "who"   // gives a Self
)

// Step is one step of a machine's coming and going, as it is handed to the process that
// does it.
type Step struct {
	Do       Action `json:"do"`
	StateDir string `json:"stateDir"` // of floxd
	// Role, of Who: as what.
	Role string `json:"role"`
	// Invite, of Join, is the line of text; of a LAN's storehouse it is made of what
	// was found.
	Invite *api.JoinInvite `json:"invite"`
	// Name is what the machine wants to be called, and User who runs this.
	Name    string `json:"name"`
	User    string `json:"user"`
	Version string `json:"version"`
	// Consensus is the host:port at which other servers will reach this one.
	Consensus string `json:"consensus"`
}

// Joined is what a machine became.
type Joined struct {
	Storehouse  string   `json:"storehouse"`
	Fingerprint flox.CID `json:"fingerprint"` // of the trust list
	StoreDir    string   `json:"storeDir"`
	Role        string   `json:"role"`
	Name        string   `json:"name"`
	Peer        string   `json:"peer"`
	Machines    int      `json:"machines"` // there are now, as far as it was told
	// Already says that it was a member before.
	Already bool `json:"already"`
	// Unconfirmed says that no server could be asked whether it still is.
	Unconfirmed bool `json:"unconfirmed"`
	// Unclaimed says why the machine does not speak for who runs this; "" = it does, or
	// was not asked anew.
	Unclaimed string `json:"unclaimed,omitempty"`
}

// Serve reads a step from in, does it, and writes what it gave to out, for a
// process of its own.
func Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	s := &Step{}
	d := json.NewDecoder(io.LimitReader(in, 1<<20))
	d.DisallowUnknownFields()
	if err := d.Decode(s); err != nil {
		return fmt.Errorf("a step of joining: %w: %w", err, flox.ErrBadInput)
	}
	answer, err := s.Run(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(answer)
}

// Run does the step.
func (s *Step) Run(ctx context.Context) (any, error) {
	switch s.Do {
	case Join:
		return s.Join(ctx)
	case Find:
		return s.Find(ctx)
	case Leave:
		return s.Leave(ctx)
	case Who:
		return s.Who()
	}
	return nil, fmt.Errorf("step %q of joining is not known: %w", s.Do, flox.ErrBadInput)
}

// Self is who this machine is.
type Self struct {
	Peer   string      `json:"peer"`
	Joined *api.Invite `json:"joined"` // what it was told when it joined; nil = it has not
}

// Who gives this machine's identity in a role, made if there is none yet; for a
// server also if it joined nobody.
func (s *Step) Who() (*Self, error) {
	if s.Role == RoleServer {
		key, err := storehouse.MachineKey(filepath.Join(s.StateDir, StorehouseDir))
		if err != nil {
			return nil, err
		}
		peer, err := peerOf(key)
		return &Self{Peer: string(peer)}, err
	}
	p, err := openPlace(s.StateDir, s.Role)
	if err != nil {
		return nil, err
	}
	return &Self{Peer: string(p.peer), Joined: p.before}, nil
}

// place is where the machine's identity is, and what it was told before.
type place struct {
	key      ed25519.PrivateKey
	sealKey  []byte
	before   *api.Invite // nil = it has not joined yet
	keep     func(*api.Invite) error
	peer     p2p.PeerID
	isServer bool
}

func openPlace(stateDir, role string) (p *place, err error) {
	p = &place{isServer: role == RoleServer}
	if p.isServer {
		n, err := storehouse.OpenNewcomer(filepath.Join(stateDir, StorehouseDir))
		if err != nil {
			return nil, err
		}
		p.key, p.sealKey, p.before, p.keep = n.Key, n.SealKey, n.Joined, n.Keep
	} else {
		dir := filepath.Join(stateDir, AgentDir)
		if p.key, err = p2p.LoadOrCreateKey(filepath.Join(dir, agent.KeyName)); err != nil {
			return nil, err
		}
		name := filepath.Join(dir, InviteName)
		if p.before, err = api.LoadInvite(name); err != nil && !errors.Is(err, flox.ErrNotFound) {
			return nil, err
		}
		p.keep = func(inv *api.Invite) error { return inv.Save(name) }
	}
	p.peer, err = peerOf(p.key)
	return p, err
}

func peerOf(key ed25519.PrivateKey) (p2p.PeerID, error) {
	public, _ := key.Public().(ed25519.PublicKey)
	return p2p.IDFromKey(public)
}

// SameStorehouse reports whether what a machine was told when it joined and an
// invite are of one storehouse.
func SameStorehouse(told *api.Invite, inv *api.JoinInvite) bool {
	return told.TrustList == inv.TrustList || slices.ContainsFunc(told.Storehouse, func(known api.InvitePeer) bool {
		return slices.ContainsFunc(inv.Storehouse, func(s api.InvitePeer) bool { return s.ID == known.ID })
	})
}

// Join makes this machine a member and keeps what it was told. It may be done
// again, also after the answer of a first try was lost: a machine that is a
// member stays it, and one that has joined and reaches nobody now is not held up. Errors: ErrBusy if the state belongs to another storehouse,
// or the name to another machine; ErrDenied with the reason of a refusal;
// ErrUnreachable.
func (s *Step) Join(ctx context.Context) (*Joined, error) {
	p, err := openPlace(s.StateDir, s.Invite.Role)
	if err != nil {
		return nil, err
	}
	if p.before != nil && !SameStorehouse(p.before, s.Invite) {
		return nil, fmt.Errorf("this machine is in the storehouse %s already (%s), and the invite is of %s: leave that one first with floxctl leave, or use another state directory: %w",
			p.before.Name, s.StateDir, s.Invite.Name, flox.ErrBusy)
	}
	asked := &floxv1.JoinRequest{Machine: &floxv1.Machine{Name: s.Name}, User: s.User, Version: s.Version}
	if p.isServer {
		asked.Machine.RaftAddress, asked.Machine.SealKey = string(p.peer)+"@"+s.Consensus, p.sealKey
	}
	d := &door{key: p.key, invite: s.Invite}
	resp, already, err := d.join(ctx, asked)
	if p.before != nil && errors.Is(err, flox.ErrUnreachable) && ctx.Err() == nil {
		return s.joined(p, p.before, &floxv1.Machine{Name: s.Name, Role: s.Invite.Role}).unconfirmed(), nil
	}
	if errors.Is(err, flox.ErrDenied) && p.before != nil {
		return nil, fmt.Errorf("%w; what this machine has of an earlier time in the storehouse is put away, with its key, by floxctl leave --purge", err)
	}
	if err != nil {
		return nil, err
	}
	m := resp.GetMachine()
	if (m.GetRole() == RoleServer) != p.isServer {
		return nil, fmt.Errorf("this machine (%s) is a member as %s and the invite makes a %s: leave first with floxctl leave: %w", m.GetName(), m.GetRole(), s.Invite.Role, flox.ErrDenied)
	}
	told, err := api.ParseInvite(resp.GetInvite())
	if err != nil {
		return nil, fmt.Errorf("what the storehouse answered: %w", err)
	}
	if told.StoreDir != s.Invite.StoreDir {
		return nil, fmt.Errorf("the storehouse's store directory is %s, the invite's %s: %w", told.StoreDir, s.Invite.StoreDir, flox.ErrUntrusted)
	}
	if s.Invite.LAN && told.TrustList != s.Invite.TrustList {
		return nil, fmt.Errorf("the storehouse's fingerprint is %s, and what was agreed to %s: look again: %w", told.TrustList, s.Invite.TrustList, flox.ErrUntrusted)
	}
	if err := p.keep(told); err != nil {
		return nil, err
	}
	if !p.isServer {
		if err := agent.SaveMembers(filepath.Join(s.StateDir, AgentDir), told, resp.GetMembers()); err != nil {
			return nil, err
		}
	}
	out := s.joined(p, told, m)
	out.Machines, out.Already, out.Unclaimed = len(resp.GetMembers()), already || p.before != nil, resp.GetUnclaimed()
	return out, nil
}

// joined says what a machine is that keeps inv.
func (s *Step) joined(p *place, inv *api.Invite, m *floxv1.Machine) *Joined {
	return &Joined{
		Storehouse: inv.Name, Fingerprint: inv.TrustList, StoreDir: string(inv.StoreDir), Role: m.GetRole(), Name: m.GetName(), Peer: string(p.peer),
	}
}

// unconfirmed marks what was kept of an earlier join.
func (j *Joined) unconfirmed() *Joined {
	j.Already, j.Unconfirmed = true, true
	return j
}
