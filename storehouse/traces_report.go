package storehouse

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of reports.
const (
	maxReports = 64 // of one call
	// reportWindow is for how long a machine's reports are counted: at most
	// reportsOfPath of one path, reportsOfPeer in all.
	reportWindow  = 10 * time.Minute
	reportsOfPath = 8
	reportsOfPeer = 512
	maxReporters  = 1 << 14
	// maxClosure bounds the closure of a path whose start is reported.
	maxClosure = 8192
	// maxCommand is how many bytes of reports one entry of the log holds.
	maxCommand = 1 << 20
	// maxChecks is how many reports are checked at once; the others wait.
	maxChecks      = 2
	checkTimeout   = 10 * time.Second // of one report, the wait for its turn included
	proposeTimeout = 30 * time.Second // of one entry of the log
)

// ReportStarts is floxv1connect.StorehouseHandler. What a machine says of a start
// is checked against the manifests, so that only blocks of the path's own closure
// ever get into a trace; whether programs really read them, a second machine has to
// say. A machine is a key: who has the keys of two is two machines here. So this
// keeps out mistakes, not an attacker; what one can do ends at the closure and the
// bounds: machines fetch blocks of the path that its start does not need.
func (s *rpc) ReportStarts(ctx context.Context, req *connect.Request[floxv1.ReportStartsRequest]) (*connect.Response[floxv1.ReportStartsResponse], error) {
	if err := s.ready(ctx); err != nil {
		return nil, api.ToConnect(err)
	}
	taken, err := s.takeReports(ctx, req.Peer().Addr, req.Msg.GetStarts())
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return connect.NewResponse(&floxv1.ReportStartsResponse{Taken: taken}), nil
}

// takeReports puts what is believable of a machine's reports into the log.
func (s *Server) takeReports(ctx context.Context, peer string, starts []*floxv1.StartTrace) (taken uint32, err error) {
	if len(starts) > maxReports {
		return 0, fmt.Errorf("%d starts reported, want at most %d: %w", len(starts), maxReports, flox.ErrBadInput)
	}
	salt, err := s.traceSalt(ctx)
	if err != nil {
		return 0, err
	}
	var batch floxv1.MergeStarts
	for _, t := range starts {
		report, err := s.believe(ctx, peer, t)
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		if err != nil {
			s.cfg.Log.Debug("report of a start refused", "path", t.GetPath(), "error", err)
			continue
		}
		report.Tag = traceTag(salt, peer, t.GetPath())
		batch.Reports = append(batch.Reports, report)
		taken++
		if proto.Size(&batch) > maxCommand {
			if err := s.putReports(ctx, &batch); err != nil {
				return 0, err
			}
			batch.Reports = nil
		}
	}
	if len(batch.GetReports()) == 0 {
		return taken, nil
	}
	return taken, s.putReports(ctx, &batch)
}

// believe counts a machine's report and checks it, in this order: what is not
// listened to costs nothing, and lies count too.
func (s *Server) believe(ctx context.Context, peer string, t *floxv1.StartTrace) (*floxv1.StartReport, error) {
	if _, err := flox.ParseStorePath(t.GetPath()); err != nil { // bounds what the counters keep
		return nil, err
	}
	if !s.reports.allow(peer, t.GetPath(), time.Now()) {
		return nil, fmt.Errorf("reported often enough: %w", flox.ErrBusy)
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	select {
	case s.checks <- struct{}{}:
		defer func() { <-s.checks }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%d reports are being checked: %w: %w", cap(s.checks), ctx.Err(), flox.ErrBusy)
	}
	return s.checkStart(ctx, t)
}

// putReports merges reports and has the traces made that follow from them, for
// who asks next.
func (s *Server) putReports(ctx context.Context, m *floxv1.MergeStarts) error {
	if err := s.mergeStarts(ctx, m); err != nil {
		return err
	}
	for _, r := range m.GetReports() {
		s.made.want(r.GetPath())
	}
	return nil
}

func (s *Server) mergeStarts(ctx context.Context, m *floxv1.MergeStarts) error {
	if _, err := s.disk.admit(ctx); err != nil {
		return fmt.Errorf("report starts: %w", err)
	}
	_, err := s.proposeTraces(ctx, &floxv1.TracesCommand{Command: &floxv1.TracesCommand_Merge{Merge: m}})
	return err
}

// proposeTraces uses one session for all: the log remembers each for an hour, and
// only so many of them.
func (s *Server) proposeTraces(ctx context.Context, c *floxv1.TracesCommand) (*floxv1.TracesReply, error) {
	b, err := proto.Marshal(c)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, proposeTimeout)
	defer cancel()
	answer, err := enter(ctx, s.starts, tracesKind, b)
	if err != nil {
		return nil, err
	}
	reply := &floxv1.TracesReply{}
	return reply, proto.Unmarshal(answer, reply)
}

// traceSalt gives the salt of the tags, which is made with the first report.
func (s *Server) traceSalt(ctx context.Context) (salt []byte, err error) {
	r, err := s.node.View(ctx, tracesKind, cluster.Local)
	if err != nil {
		return nil, err
	}
	salt, err = r.Get([]byte{saltKey})
	if err = errors.Join(err, r.Close()); err == nil || !errors.Is(err, flox.ErrNotFound) {
		return salt, err
	}
	salt = make([]byte, saltLen)
	if _, err := rand.Read(salt); err != nil {
		return nil, err
	}
	reply, err := s.proposeTraces(ctx, &floxv1.TracesCommand{Command: &floxv1.TracesCommand_Salt{Salt: salt}})
	return reply.GetSalt(), err
}

// traceTag tells a machine's reports of one path from others'. It hides the machine
// from who sees tags alone, and links none over paths. It does not hide it from who
// has the state, where the salt lies beside it: they can try the machines they know.
// So a chunk that one machine alone reported says which one until a second one
// reports it, or it decays. Tags are never served.
func traceTag(salt []byte, peer, path string) []byte {
	h := hmac.New(sha256.New, salt)
	fmt.Fprintf(h, "%d %s %s", len(peer), peer, path)
	return h.Sum(nil)[:tagLen]
}

// checkStart checks a trace against the facts and the manifests, and gives what
// of it is stored: no CIDs, which follow from the manifests.
func (s *Server) checkStart(ctx context.Context, t *floxv1.StartTrace) (*floxv1.StartReport, error) {
	path, err := flox.ParseStorePath(t.GetPath())
	if err != nil {
		return nil, err
	}
	if len(t.GetTrees()) == 0 || len(t.GetTrees()) > maxStartTrees {
		return nil, fmt.Errorf("%d trees, want 1 to %d: %w", len(t.GetTrees()), maxStartTrees, flox.ErrBadInput)
	}
	closure, err := s.closure(ctx, path)
	if err != nil {
		return nil, err
	}
	out := &floxv1.StartReport{Path: t.GetPath()}
	chunks, bytes := 0, uint64(0)
	for i, tree := range t.GetTrees() {
		manifest, ok := closure[flox.StorePath(tree.GetPath())]
		if !ok || slices.ContainsFunc(t.GetTrees()[:i], func(o *floxv1.TraceTree) bool { return o.GetPath() == tree.GetPath() }) {
			return nil, fmt.Errorf("%s is not in the closure, or there twice: %w", tree.GetPath(), flox.ErrBadInput)
		}
		if string(tree.GetManifest()) != string(manifest[:]) {
			return nil, fmt.Errorf("%s has another manifest: %w", tree.GetPath(), flox.ErrBadInput)
		}
		chunks += len(tree.GetChunks()) + len(tree.GetPages()) + 1
		for _, c := range tree.GetChunks() {
			bytes += uint64(c.GetSize())
		}
		if chunks > maxStartChunks+maxStartTrees || bytes > maxStartBytes {
			return nil, fmt.Errorf("%d chunks of %d bytes: %w", chunks, bytes, flox.ErrBadInput)
		}
		seen, err := s.checkTree(ctx, manifest, tree)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", tree.GetPath(), err)
		}
		out.Trees = append(out.Trees, seen)
	}
	return out, nil
}

// checkTree checks that pages and chunks are the manifest's. A page is stored as
// its number; page 0 says that the tree was opened.
func (s *Server) checkTree(ctx context.Context, manifest flox.CID, tree *floxv1.TraceTree) (*floxv1.SeenTree, error) {
	m, err := content.OpenManifest(ctx, manifest, s.packs)
	if err != nil {
		return nil, err
	}
	out := &floxv1.SeenTree{Path: tree.GetPath(), Chunks: []*floxv1.SeenChunk{{}}}
	pages := m.Pages()
	for _, p := range tree.GetPages() {
		n := slices.IndexFunc(pages, func(id flox.CID) bool { return string(id[:]) == string(p) })
		if n < 0 {
			return nil, fmt.Errorf("no page of the manifest: %w", flox.ErrBadInput)
		}
		if n > 0 {
			out.Chunks = append(out.Chunks, &floxv1.SeenChunk{Entry: uint32(n)}) //nolint:gosec // a page's number
		}
	}
	for _, c := range tree.GetChunks() {
		id, ok := chunkAt(ctx, m, c.GetEntry(), c.GetOffset(), c.GetSize())
		if !ok || string(id[:]) != string(c.GetId()) {
			return nil, fmt.Errorf("entry %d has no such chunk at %d: %w", c.GetEntry(), c.GetOffset(), flox.ErrBadInput)
		}
		out.Chunks = append(out.Chunks, &floxv1.SeenChunk{Entry: c.GetEntry(), Offset: c.GetOffset(), Size: c.GetSize(), Rank: min(c.GetRank(), 1<<20)})
	}
	return out, nil
}

// chunkAt finds the chunk of an entry that begins at off and has size bytes.
func chunkAt(ctx context.Context, m *content.Manifest, entry uint32, off uint64, size uint32) (id flox.CID, ok bool) {
	if off > 1<<62 || size == 0 {
		return id, false
	}
	err := m.Chunks(ctx, entry, int64(off), 1, func(at int64, c flox.Chunk) bool { //nolint:gosec // checked
		id, ok = c.ID, uint64(at) == off && c.Size == size //nolint:gosec // not negative
		return false
	})
	return id, ok && err == nil
}

// closure gives the manifests of everything a valid path refers to.
func (s *Server) closure(ctx context.Context, p flox.StorePath) (map[flox.StorePath]flox.CID, error) {
	found := make(map[flox.StorePath]flox.CID)
	err := s.read(ctx, cluster.Local, func(r *cluster.Reader) error {
		queue := []flox.StorePath{p}
		for i := 0; i < len(queue); i++ {
			if _, ok := found[queue[i]]; ok {
				continue
			}
			if len(found) >= maxClosure {
				return fmt.Errorf("closure of more than %d paths: %w", maxClosure, flox.ErrBadInput)
			}
			m, err := readInfo(r, queue[i].HashPart())
			if err != nil {
				return err
			}
			if m.GetPath() != string(queue[i]) || len(m.GetManifest()) != flox.CIDSize {
				return fmt.Errorf("%s is not valid: %w", queue[i], flox.ErrNotFound)
			}
			found[queue[i]] = flox.CID(m.GetManifest())
			for _, ref := range m.GetReferences() {
				queue = append(queue, flox.StorePath(ref))
			}
		}
		return nil
	})
	return found, err
}

// reportCounts bounds how much one machine can say, in memory only.
type reportCounts struct {
	mu    sync.Mutex
	since time.Time
	peers map[string]map[string]int // by machine and path
	total map[string]int
}

// allow counts a report.
func (c *reportCounts) allow(peer, path string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.peers == nil || now.Sub(c.since) > reportWindow {
		c.since, c.peers, c.total = now, map[string]map[string]int{}, map[string]int{}
	}
	paths := c.peers[peer]
	if paths == nil {
		if len(c.peers) >= maxReporters {
			return false
		}
		paths = map[string]int{}
		c.peers[peer] = paths
	}
	if paths[path] >= reportsOfPath || c.total[peer] >= reportsOfPeer {
		return false
	}
	paths[path]++
	c.total[peer]++
	return true
}
