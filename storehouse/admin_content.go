package storehouse

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/p2p"
)

// What operators do with content is written into the audit log as these.
const (
	actionCollect   = "content.collect"
	actionCollected = "content.collected"
	actionKeep      = "content.keep"
	actionUnkeep    = "content.unkeep"
	actionImport    = "content.import"
)

// maxImportPaths bounds what one import names; with their closures they may be many more.
const maxImportPaths = 100_000

// note writes what was done into the audit log.
func (s *Server) note(ctx context.Context, who *floxv1.Actor, action, subject, detail string) error {
	note := &floxv1.AuditRecord{Action: action, Subject: subject, Detail: detail}
	_, err := s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_Note{Note: note}})
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

// pathOf reads a store path as operators name it: its base name, or anything at or
// below it in the store directory.
func (a *admin) pathOf(text string) (flox.StorePath, error) {
	if !strings.HasPrefix(text, "/") {
		return flox.ParseStorePath(text)
	}
	p, _, err := a.s.cfg.StoreDir.Split(text)
	return p, err
}

// ended gives why work ended: if this server ends, the caller did not stop it.
func ended(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), flox.ErrClosed) {
		return fmt.Errorf("this server of the storehouse ends: %w", flox.ErrClosed)
	}
	return err
}

// Usage is floxv1connect.AdminHandler. Every member may ask.
func (a *admin) Usage(ctx context.Context, req *connect.Request[floxv1.UsageRequest]) (*connect.Response[floxv1.UsageResponse], error) {
	if _, err := a.may(ctx, req, anyMember, "content.usage"); err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.s.wholeUsage(ctx))
}

// wholeUsage is Usage with what the other servers know.
func (s *Server) wholeUsage(ctx context.Context) (*floxv1.UsageResponse, error) {
	out, err := s.Usage(ctx)
	if err != nil {
		return nil, err
	}
	last, err := s.lastCollected(ctx)
	if err != nil {
		return nil, err
	}
	if !last.at.IsZero() {
		out.CollectedUnix, out.Collected = last.at.Unix(), last.words
	}
	house := s.lookAtServers(ctx)
	out.UnderPlaced, out.Collecting = house.underPlaced(), house.phase
	return out, ctx.Err()
}

// Collect is floxv1connect.AdminHandler. The leader collects; another server has it
// do so. The collection ends when the caller leaves; what it has condemned stays
// so, for one with resume, or the next.
func (a *admin) Collect(ctx context.Context, req *connect.Request[floxv1.CollectRequest], stream *connect.ServerStream[floxv1.CollectProgress]) error {
	need := adminOnly
	if req.Msg.GetMachine() != nil {
		need = anyMember // whose own storehouse it is
	}
	who, err := a.mayAs(ctx, req.Peer().Addr, req.Header(), need, actionCollect)
	if err != nil {
		return api.ToConnect(err)
	}
	passed := req.Header().Get(actorHeader) != ""
	if q := req.Msg; q.GetKeepRecentSeconds() > math.MaxInt64/uint64(time.Second) {
		return api.ToConnect(fmt.Errorf("collect: keep what is younger than %d s, want at most %d: %w",
			q.GetKeepRecentSeconds(), math.MaxInt64/int64(time.Second), flox.ErrBadInput))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(a.stop, func() { cancel(flox.ErrClosed) })()
	send := func(p *floxv1.CollectProgress) {
		if err := stream.Send(p); err != nil {
			cancel(err) // nobody waits for it
		}
	}
	if req.Msg.GetMachine() != nil {
		return api.ToConnect(ended(ctx, a.collectMachine(ctx, who, req.Msg, send)))
	}
	return api.ToConnect(ended(ctx, a.collect(ctx, who, passed, req.Msg, send)))
}

func (a *admin) collect(ctx context.Context, who *floxv1.Actor, passed bool, q *floxv1.CollectRequest, send func(*floxv1.CollectProgress)) error {
	opts := CollectOptions{DryRun: q.GetDryRun(), Resume: q.GetResume(), KeepRecent: time.Duration(q.GetKeepRecentSeconds()) * time.Second} //nolint:gosec // bounded by the caller
	if opts.DryRun {
		return a.s.Collect(ctx, opts, send)
	}
	by, err := forWhom(who)
	if err != nil {
		return err
	}
	for end := time.Now().Add(readWait); ; {
		leader, err := a.leader(ctx, passed)
		if err != nil {
			return err
		}
		if leader == nil {
			return a.s.collectFor(ctx, who, opts, send)
		}
		begun, err := collectAt(ctx, leader, by, q, send)
		// Leadership may have moved before this server heard of it.
		if begun || !errors.Is(err, flox.ErrUnreachable) || ctx.Err() != nil || time.Now().After(end) {
			return err
		}
		select {
		case <-time.After(leaderPause):
		case <-ctx.Done():
		}
	}
}

// collectAt has the leader collect; begun says that it has begun to.
func collectAt(ctx context.Context, leader floxv1connect.AdminClient, by string, q *floxv1.CollectRequest, send func(*floxv1.CollectProgress)) (begun bool, err error) {
	there := connect.NewRequest(proto.CloneOf(q))
	there.Header().Set(actorHeader, by)
	stream, err := leader.Collect(ctx, there)
	if err != nil {
		return false, api.FromConnect(err)
	}
	for stream.Receive() {
		begun = true
		send(stream.Msg())
	}
	err = stream.Err()
	if closing := stream.Close(); err == nil {
		err = closing
	}
	if err != nil {
		return begun, fmt.Errorf("on the server that leads: %w", api.FromConnect(err))
	}
	return begun, nil
}

// collectFor collects on somebody's behalf, and writes down that it did.
func (s *Server) collectFor(ctx context.Context, who *floxv1.Actor, opts CollectOptions, send func(*floxv1.CollectProgress)) error {
	setDefault(&opts.KeepRecent, DefaultKeepRecent)
	how := fmt.Sprintf("what was published within %s stays", opts.KeepRecent)
	if opts.Machine != nil {
		how = "as Nix does, what nothing on the machine keeps"
	}
	if opts.Resume {
		how = "going on with what was condemned before"
	}
	var last *floxv1.CollectProgress
	begun := time.Now()
	err := s.Collect(ctx, opts, func(p *floxv1.CollectProgress) {
		if last == nil {
			if err := s.note(ctx, who, actionCollect, "begun", how); err != nil {
				s.cfg.Log.Warn("a collection is not in the audit log", "error", err)
			}
		}
		if last = p; send != nil && !p.GetFinished() {
			send(p)
		}
	})
	if err != nil {
		return err
	}
	did := fmt.Sprintf("paths removed: %d, of %d bytes; freed: %d bytes; took %s", last.GetDeadPaths(), last.GetDeadBytes(), last.GetFreedBytes(), time.Since(begun).Round(time.Second))
	if err := s.note(ctx, who, actionCollected, "finished", did); err != nil {
		return err
	}
	if send != nil {
		send(last)
	}
	return nil
}

// Roots is floxv1connect.AdminHandler. Every member may ask.
func (a *admin) Roots(ctx context.Context, req *connect.Request[floxv1.RootsRequest]) (*connect.Response[floxv1.RootsResponse], error) {
	_, err := a.may(ctx, req, anyMember, "content.roots")
	var path flox.StorePath
	if err == nil && req.Msg.GetPath() != "" {
		path, err = a.pathOf(req.Msg.GetPath())
	}
	out := &floxv1.RootsResponse{}
	if err == nil {
		out.Roots, out.More, err = a.s.Roots(ctx, path)
	}
	for _, r := range out.GetRoots() {
		a.nameRoot(r)
	}
	return answer(out, err)
}

// nameRoot calls a machine as people do, where it is known.
func (a *admin) nameRoot(r *floxv1.Root) {
	if r.GetKind() != rootMachine {
		return
	}
	if m, ok := a.s.roster.machine(p2p.PeerID(r.GetName())); ok {
		r.Name = m.GetName()
	}
}

// Why is floxv1connect.AdminHandler. Every member may ask.
func (a *admin) Why(ctx context.Context, req *connect.Request[floxv1.WhyRequest]) (*connect.Response[floxv1.WhyResponse], error) {
	_, err := a.may(ctx, req, anyMember, "content.why")
	var path flox.StorePath
	if err == nil {
		path, err = a.pathOf(req.Msg.GetPath())
	}
	var out *floxv1.WhyResponse
	if err == nil {
		out, err = a.s.Why(ctx, path, req.Msg.GetAll())
	}
	for _, c := range out.GetChains() {
		a.nameRoot(c.GetRoot())
	}
	return answer(out, err)
}

// KeepPath is floxv1connect.AdminHandler.
func (a *admin) KeepPath(ctx context.Context, req *connect.Request[floxv1.KeepPathRequest]) (*connect.Response[floxv1.KeepPathResponse], error) {
	action := actionKeep
	if req.Msg.GetUndo() {
		action = actionUnkeep
	}
	who, err := a.may(ctx, req, adminOnly, action)
	var path flox.StorePath
	if err == nil {
		path, err = a.pathOf(req.Msg.GetPath())
	}
	if err == nil {
		err = a.s.KeepPath(ctx, path, req.Msg.GetUndo(), req.Msg.GetReason(), nameOr(who.GetUser(), who.GetMachine()))
	}
	if err == nil {
		err = a.s.note(ctx, who, action, string(path), req.Msg.GetReason())
	}
	return answer(&floxv1.KeepPathResponse{}, err)
}

// Import is floxv1connect.AdminHandler. The server that is asked imports: a
// directory is one of its own. It ends when the caller leaves; what was imported
// stays, and another import goes on from there.
func (a *admin) Import(ctx context.Context, req *connect.Request[floxv1.ImportRequest], stream *connect.ServerStream[floxv1.ImportProgress]) error {
	who, err := a.mayAs(ctx, req.Peer().Addr, req.Header(), adminOnly, actionImport)
	if err != nil {
		return api.ToConnect(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(a.stop, func() { cancel(flox.ErrClosed) })()
	return api.ToConnect(ended(ctx, a.importFor(ctx, who, req.Msg, func(p *floxv1.ImportProgress) {
		if err := stream.Send(p); err != nil {
			cancel(err) // nobody waits for it
		}
	})))
}

func (a *admin) importFor(ctx context.Context, who *floxv1.Actor, q *floxv1.ImportRequest, send func(*floxv1.ImportProgress)) error {
	if len(q.GetPaths()) > maxImportPaths || q.GetJobs() > maxJobs {
		return fmt.Errorf("import of %d paths with %d jobs, want at most %d paths and %d jobs: %w", len(q.GetPaths()), q.GetJobs(), maxImportPaths, maxJobs, flox.ErrBadInput)
	}
	opts := ImportOptions{From: q.GetFrom(), Jobs: int(q.GetJobs()), Keys: q.GetKeys()}
	for _, text := range q.GetPaths() {
		p, err := a.pathOf(text)
		if err != nil {
			return fmt.Errorf("import: %w", err)
		}
		opts.Paths = append(opts.Paths, p)
	}
	opts.begun = func() error {
		return a.s.note(ctx, who, actionImport, redacted(q.GetFrom()), fmt.Sprintf("%d paths named", len(opts.Paths)))
	}
	return a.s.Import(ctx, opts, send)
}

// redacted is a URL without the password that may be in it.
func redacted(text string) string {
	if u, err := url.Parse(text); err == nil && u.User != nil {
		return u.Redacted()
	}
	return text
}
