package storehouse

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/user"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
)

// UserHeader names the person on whose behalf a machine calls. What that person
// may do is what the machine's record says.
const UserHeader = "Flox-User"

const (
	// refusalPause is how long refusals of one machine and action stand for each
	// other in the audit log, so that nobody fills it.
	refusalPause = time.Minute
	maxRefusals  = 1 << 10
	// maxFollowers is how many follow the audit log at once.
	maxFollowers = 64
	maxUserName  = 256
)

// admin answers what operators ask. Who may do what is decided by its may alone.
type admin struct {
	floxv1connect.UnimplementedAdminHandler
	s         *Server
	refusals  *refusals
	followers chan struct{}
	stop      context.Context //nolint:containedctx // ends streams that would not end by themselves
}

func newAdmin(s *Server, stop context.Context) *admin { //nolint:revive // stop is kept, not used
	return &admin{s: s, refusals: &refusals{last: map[string]time.Time{}}, followers: make(chan struct{}, maxFollowers), stop: stop}
}

// Rights that a call needs.
const (
	anyMember = 0 // machines that are members, whoever uses them
	adminOnly = 3 // members.Rights of an admin
)

// may says on whose behalf a call is made, and refuses those who may not do what
// is named so ("invite.make"). Refused changes are audited.
func (a *admin) may(ctx context.Context, call connect.AnyRequest, need int, action string) (*floxv1.Actor, error) {
	return a.mayAs(ctx, call.Peer().Addr, call.Header(), need, action)
}

func (a *admin) mayAs(ctx context.Context, peer string, header http.Header, need int, action string) (*floxv1.Actor, error) {
	person := header.Get(UserHeader)
	if len(person) > maxUserName {
		return nil, fmt.Errorf("%s of %d bytes, want at most %d: %w", UserHeader, len(person), maxUserName, flox.ErrBadInput)
	}
	if need == adminOnly && action != actionRemove && a.s.takesNoPart() {
		return nil, errOutcast
	}
	if uid, local := ctx.Value(socketKey{}).(int); local {
		return a.operator(uid, person)
	}
	if by := header.Get(actorHeader); by != "" {
		return a.passedOn(p2p.PeerID(peer), by)
	}
	who := &floxv1.Actor{Peer: peer, User: person}
	m, ok := a.s.roster.machine(p2p.PeerID(peer))
	who.Machine = m.GetName()
	if have := members.Rights(members.UserRole(m, person)); have >= need && (ok || need == anyMember && a.s.allowed(p2p.PeerID(peer))) {
		return who, nil
	}
	role := members.Admin
	if need < adminOnly {
		role = members.Member
	}
	err := fmt.Errorf("%s needs the role %s in the storehouse, which %q does not have on %s: an admin can give it with floxctl machine user %s %s:%s: %w",
		action, role, person, nameOr(m.GetName(), peer), nameOr(m.GetName(), peer), nameOr(person, "USER"), role, flox.ErrDenied)
	if !ok {
		err = fmt.Errorf("%s: this machine (%s) is not in the member list: join it with an invite: %w", action, peer, flox.ErrDenied)
	}
	if need > anyMember && a.refusals.first(peer+" "+action) {
		note := &floxv1.AuditRecord{Action: action, Subject: nameOr(who.Machine, peer), Detail: err.Error(), Refused: true}
		_, failed := a.s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_Note{Note: note}})
		err = errors.Join(err, failed)
	}
	return nil, err
}

func nameOr(name, other string) string {
	if name != "" {
		return name
	}
	return other
}

// operator is who calls through the server's own socket: root, or the account
// the server runs as.
func (a *admin) operator(uid int, person string) (*floxv1.Actor, error) {
	if uid != 0 && uid != os.Geteuid() {
		return nil, fmt.Errorf("the storehouse's socket is for root and the account it runs as; try sudo: %w", flox.ErrDenied)
	}
	if person == "" {
		person = "uid " + strconv.Itoa(uid)
		if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
			person = u.Username
		}
	}
	return &floxv1.Actor{Machine: a.s.machineName(), User: person}, nil
}

// refusals remembers what was audited a moment ago.
type refusals struct {
	mu   sync.Mutex
	last map[string]time.Time
}

// first reports whether what is the first such refusal for a while.
func (r *refusals) first(what string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if at, ok := r.last[what]; ok && now.Sub(at) < refusalPause {
		return false
	}
	for k, at := range r.last {
		if now.Sub(at) >= refusalPause {
			delete(r.last, k)
		}
	}
	if len(r.last) >= maxRefusals {
		return false
	}
	r.last[what] = now
	return true
}

// socketKey is the context key of the user ID at the other end of the control socket.
type socketKey struct{}

// serveSocket answers operators on the server itself until ctx ends.
func (s *Server) serveSocket(ctx context.Context, calls *admin) error {
	if s.cfg.Socket == "" {
		return nil
	}
	if err := clearSocket(ctx, s.cfg.Socket); err != nil {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", s.cfg.Socket)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	// Whoever connects before this is asked who it is all the same.
	if err := os.Chmod(s.cfg.Socket, 0o600); err != nil {
		return errors.Join(fmt.Errorf("control socket: %w", err), l.Close())
	}
	mux := http.NewServeMux()
	mux.Handle(floxv1connect.NewAdminHandler(calls, connect.WithReadMaxBytes(maxMessage)))
	return serve(ctx, l, &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: maxWebHeader,
		ConnState: atMost(maxSocketClients, maxSocketClients),
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, socketKey{}, socketUID(conn))
		},
	})
}

// maxSocketClients is how many connections to the control socket are open at once.
const maxSocketClients = 128

// socketUID is the user at the other end of a unix socket; -1 when unknown.
func socketUID(conn net.Conn) int {
	uid := -1
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return uid
	}
	raw, err := u.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				uid = int(cred.Uid)
			}
		})
	}
	if err != nil {
		return -1
	}
	return uid
}

// clearSocket removes a socket that a killed server left. One that is served, or
// something that is no socket, is ErrBusy.
func clearSocket(ctx context.Context, name string) error {
	st, err := os.Lstat(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil && st.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("control socket %s: there is a file of that name: move it away: %w", name, flox.ErrBusy)
	}
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", name)
	if err == nil {
		_ = conn.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("control socket %s is served by another storehouse: stop it, or choose another run directory: %w", name, flox.ErrBusy)
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}
