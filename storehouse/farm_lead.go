package storehouse

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/dispatch"
	"github.com/floxctl/flox/buildfarm/queue"
	"github.com/floxctl/flox/buildfarm/schedule"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// farmTick is how often the leader looks after the queue when nothing changes.
	farmTick = time.Second
	// beatEvery is how often a server tells the leader that it is there, and workerLost
	// how long it may be silent: then others get what it builds.
	beatEvery  = 2 * time.Second
	workerLost = 10 * time.Second
	// holderLost is how long a server may be silent that wants something built.
	holderLost = 60 * time.Second

	leaseRound = 64 // leases given before the log is looked at again
	leaveRound = 64 // commands to end wants of servers that are gone, at one time
)

// lead gives builds to workers as the log stands now. It is for the leader.
func (f *farming) lead(ctx context.Context, now time.Time) error {
	if !f.on() {
		return nil
	}
	select {
	case f.deciding <- struct{}{}:
		defer func() { <-f.deciding }()
	case <-ctx.Done():
		return nil
	}
	f.begins(f.s.node.Status().Term, now)
	if f.decides == nil {
		f.decides = dispatch.New(schedule.Config{})
	}
	tends := now.Sub(f.lastTend) >= farmTick
	if tends {
		f.lastTend = now
	}
	for more := true; more && ctx.Err() == nil; {
		err := f.view(ctx, func(r *cluster.Reader) error { return f.decides.Update(r, now) })
		if err == nil {
			more, err = f.decide(ctx, time.Now(), tends)
		}
		if err == nil && tends {
			err = f.clean(ctx, now)
		}
		if err != nil {
			f.decides = nil // what was taken as given may not be
			return err
		}
		tends = false
	}
	return nil
}

// begins notes in which term this server leads.
func (f *farming) begins(term uint64, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if term != f.term || f.since.IsZero() {
		f.term, f.since = term, now // whoever is there has some time to say so
	}
}

// awake gives the others time, as at a new term, if this server heard not even itself for
// long: it stood still, and what the others said meanwhile was lost. It needs f.mu.
func (f *farming) awake(now time.Time) {
	if now.Sub(f.here[f.id()]) > max(3*beatEvery, f.patience()/2) {
		f.since = now
	}
}

// patience is how long a worker may be silent.
func (f *farming) patience() time.Duration { return cmp.Or(f.s.cfg.workerLost, workerLost) }

// there reports whether a server was heard of lately, in one of the two books.
func (f *farming) there(book map[string]time.Time, id string, now time.Time, patience time.Duration) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	last := book[id]
	if last.Before(f.since) {
		last = f.since
	}
	return now.Sub(last) < patience
}

// decide proposes what is to be done now. More says that the log has changed with it.
func (f *farming) decide(ctx context.Context, now time.Time, tends bool) (more bool, err error) {
	do := func(c *floxv1.QueueCommand) (*floxv1.QueueReply, error) {
		more = true
		return f.propose(ctx, f.session, c)
	}
	there := func(worker string) bool { return f.there(f.beats, worker, now, f.patience()) }
	if tends {
		f.mu.Lock()
		f.awake(now)
		f.mu.Unlock()
		if err := f.decides.Present(there); err != nil {
			return more, err
		}
		lost, given := f.decides.Lost(there)
		commands := lostCommands(f.decides, lost, f.patience())
		if len(given) > 0 {
			commands = append(commands, releasing(given, ""))
		}
		for _, c := range commands {
			if _, err := do(c); err != nil {
				return more, err
			}
		}
	}
	if keys := f.decides.Settle(queue.MaxKeys); len(keys) > 0 {
		if _, err := do(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Settle{Settle: &floxv1.SettleBuilds{Keys: keys}}}); err != nil {
			return more, err
		}
	}
	for range leaseRound {
		l, ok := f.decides.Next(now)
		if !ok {
			break
		}
		reply, err := do(&floxv1.QueueCommand{Command: &floxv1.QueueCommand_Lease{Lease: &floxv1.LeaseBuild{Key: l.Build, Worker: l.Worker}}})
		if err != nil {
			return more, err
		}
		if reply.GetRefused() {
			f.decides.Refused(l.Build, now.Add(farmTick))
		}
	}
	return more, nil
}

// lostCommands take leases back of those who are not there, worker by worker.
func lostCommands(d *dispatch.Dispatcher, lost []*floxv1.BuildLease, patience time.Duration) (all []*floxv1.QueueCommand) {
	of := map[string][]*floxv1.BuildLease{}
	for _, l := range lost {
		of[l.GetWorker()] = append(of[l.GetWorker()], l)
	}
	for _, worker := range slices.Sorted(maps.Keys(of)) {
		fault := fmt.Sprintf("worker %s was not heard for %s", d.Name(worker), patience)
		if !d.Knows(worker) {
			fault = fmt.Sprintf("worker %s does not build for the storehouse any more", worker)
		}
		all = append(all, releasing(of[worker], fault))
	}
	return all
}

// releasing takes leases back.
func releasing(leases []*floxv1.BuildLease, fault string) *floxv1.QueueCommand {
	return &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Release{Release: &floxv1.ReleaseBuilds{Leases: leases, Fault: fault}}}
}

// clean ends what servers wanted that are gone, and forgets those that are no servers
// any more as workers.
func (f *farming) clean(ctx context.Context, now time.Time) error {
	var gone, workers []string
	err := f.view(ctx, func(r *cluster.Reader) error {
		err := queue.Wants(r, func(w *floxv1.BuildWant) bool {
			if w.GetLeft() || !f.there(f.here, w.GetHolder(), now, holderLost) {
				gone = append(gone, w.GetId())
			}
			return len(gone) < leaveRound
		})
		all, failed := queue.Workers(r)
		for _, w := range all {
			if !f.s.servers.allowed(p2p.PeerID(w.GetId())) && !f.there(f.beats, w.GetId(), now, f.patience()) {
				workers = append(workers, w.GetId())
			}
		}
		return errors.Join(err, failed)
	})
	for _, id := range gone {
		if err == nil {
			_, err = f.propose(ctx, f.session, leaving(id))
		}
	}
	for _, id := range workers {
		if err == nil {
			_, err = f.propose(ctx, f.session, &floxv1.QueueCommand{Command: &floxv1.QueueCommand_RemoveWorker{RemoveWorker: id}})
		}
		if errors.Is(err, flox.ErrNotFound) {
			err = nil
		}
	}
	return err
}

func leaving(want string) *floxv1.QueueCommand {
	return &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Leave{Leave: &floxv1.LeaveQueue{Want: want}}}
}

// tend tells the leader again and again that this server is there, and keeps in the log
// what it is as a worker, until ctx ends.
func (f *farming) tend(ctx context.Context) error {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for led := time.Now(); ; {
		rung := f.tended.wait()
		if f.on() {
			limited, cancel := context.WithTimeout(ctx, beatEvery)
			leads, err := f.beat(limited)
			err = errors.Join(err, f.enlist(limited))
			cancel()
			if leads {
				led = time.Now()
			} else if time.Since(led) > f.patience() {
				f.cutOff()
			}
			if err != nil && ctx.Err() == nil {
				f.s.cfg.Log.Warn("this server's part in the queue of builds is not what it should be, trying again", "error", err)
			}
		}
		select {
		case <-tick.C:
		case <-rung:
		case <-ctx.Done():
			return nil
		}
	}
}

// beat tells the leader that this server is there, and asks why builds wait that are
// wanted here. It gives whether there is a leader that hears it.
func (f *farming) beat(ctx context.Context) (leads bool, err error) {
	self, asks := f.s.builds.self(), f.asks()
	st := f.s.node.Status()
	switch {
	case st.State == "leader":
		f.heard(f.id(), self != nil)
		f.told(f.standings(ctx, asks))
		return true, nil
	case st.Leader == "":
		return false, nil // there is an election
	}
	resp, err := f.s.servers.client(p2p.PeerID(st.Leader)).Beat(ctx, connect.NewRequest(&floxv1.BeatRequest{Builds: self != nil, Asks: asks}))
	if err != nil {
		return false, api.FromConnect(err)
	}
	f.told(resp.Msg.GetStandings())
	return true, nil
}

// heard notes that a server is there.
func (f *farming) heard(id string, builds bool) {
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if id == f.id() {
		f.awake(now)
	}
	for _, book := range []map[string]time.Time{f.beats, f.here} {
		for id, at := range book {
			if now.Sub(at) > holderLost {
				delete(book, id)
			}
		}
	}
	if f.here[id] = now; builds {
		f.beats[id] = now
	}
}

// Beat is floxv1connect.ServersHandler.
func (h *houses) Beat(ctx context.Context, req *connect.Request[floxv1.BeatRequest]) (*connect.Response[floxv1.BeatResponse], error) {
	if err := h.caller(req.Peer().Addr); err != nil {
		return nil, api.ToConnect(err)
	}
	h.farm.heard(req.Peer().Addr, req.Msg.GetBuilds())
	asks := req.Msg.GetAsks()
	return connect.NewResponse(&floxv1.BeatResponse{Standings: h.farm.standings(ctx, asks[:min(len(asks), maxAsks)])}), nil
}

// enlist has the log know what this server is as a worker, once its builder is ready.
func (f *farming) enlist(ctx context.Context) error {
	self, builds := f.s.builds.self(), f.s.builds.will()
	if self == nil && builds {
		return nil
	}
	var is *floxv1.FarmWorker
	err := f.view(ctx, func(r *cluster.Reader) (err error) {
		is, err = queue.Worker(r, f.id())
		return err
	})
	if self == nil {
		if err == nil { // it built, and does not any more
			_, err = f.propose(ctx, f.s.node.NewSession(), &floxv1.QueueCommand{Command: &floxv1.QueueCommand_RemoveWorker{RemoveWorker: f.id()}})
		}
		if errors.Is(err, flox.ErrNotFound) {
			err = nil
		}
		return err
	}
	if err == nil && is.GetName() == self.GetName() && is.GetSlots() == self.GetSlots() &&
		slices.Equal(is.GetSystems(), self.GetSystems()) && slices.Equal(is.GetFeatures(), self.GetFeatures()) {
		return nil
	}
	if err == nil || errors.Is(err, flox.ErrNotFound) {
		_, err = f.propose(ctx, f.s.node.NewSession(), &floxv1.QueueCommand{Command: &floxv1.QueueCommand_Register{Register: self}})
	}
	return err
}
