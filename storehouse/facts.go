package storehouse

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	cluster "github.com/floxctl/flox/raft"
)

// Bounds of one Paths call.
const (
	maxHashParts = 1024
	maxAnswers   = 8192
	maxRootBytes = 1 << 20 // of root blocks
	fewFacts     = 64      // more in one answer are signed together
)

// read calls f with the facts as of now.
func (s *Server) read(ctx context.Context, c cluster.Consistency, f func(*cluster.Reader) error) error {
	return s.viewing(ctx, pathsKind, c, f)
}

// readAged calls f with facts that are at most maxAge old (milliseconds), if this
// server does not vote, and else with those as of now. What f is not sure of it is asked
// again with those as of now, while there is a leader to ask: an answer that came in
// between would be missed, and that is not waited for where the line to the others is cut.
func (s *Server) readAged(ctx context.Context, maxAge uint32, f func(*cluster.Reader) (sure bool, err error)) error {
	now := func(r *cluster.Reader) error {
		_, err := f(r)
		return err
	}
	if maxAge == 0 {
		return s.read(ctx, cluster.Linearizable, now)
	}
	if _, _, votes := s.servers.others(); votes {
		return s.read(ctx, cluster.Linearizable, now)
	}
	sure := false
	r, err := s.node.ViewWithin(ctx, pathsKind, time.Duration(maxAge)*time.Millisecond)
	if err == nil {
		sure, err = f(r)
		err = errors.Join(err, r.Close())
	}
	if err != nil || sure || s.node.Status().Leader == "" {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, leaderWait)
	defer cancel()
	if r, err = s.node.View(limited, pathsKind, cluster.Linearizable); err != nil {
		return ctx.Err() // what f said counts
	}
	return errors.Join(now(r), r.Close())
}

// leaderWait is how long a server that does not vote waits for the leader about what
// is not valid here.
const leaderWait = time.Second

// Info gives the facts of the valid path with a hash part (32 characters);
// ErrNotFound when there is none.
func (s *Server) Info(ctx context.Context, hashPart string) (*flox.PathInfo, error) {
	if !flox.ValidHashPart(hashPart) {
		return nil, fmt.Errorf("hash part %q: want %d characters of nix-base32: %w", hashPart[:min(len(hashPart), 64)], flox.HashPartLen, flox.ErrBadInput)
	}
	// Facts do not change once there; only their absence has to be certain.
	info, err := s.infoAsOf(ctx, cluster.Local, hashPart)
	if errors.Is(err, flox.ErrNotFound) {
		info, err = s.infoAsOf(ctx, cluster.Linearizable, hashPart)
	}
	if errors.Is(err, flox.ErrNotFound) {
		return nil, fmt.Errorf("no path with hash %s is valid here: %w", hashPart, flox.ErrNotFound)
	}
	return info, err
}

// infoAsOf is Info with the facts of a moment.
func (s *Server) infoAsOf(ctx context.Context, c cluster.Consistency, hashPart string) (info *flox.PathInfo, err error) {
	err = s.read(ctx, c, func(r *cluster.Reader) error {
		m, err := readInfo(r, hashPart)
		if err == nil {
			info, err = api.ToPathInfo(m)
		}
		return err
	})
	return info, err
}

// answerPaths answers one Paths call from one moment of the facts.
func (s *Server) answerPaths(ctx context.Context, req *floxv1.PathsRequest) (*floxv1.PathsResponse, error) {
	asked := req.GetHashParts()
	if err := checkHashParts(asked); err != nil {
		return nil, err
	}
	var out *floxv1.PathsResponse
	valid := 0 // of what was asked for, first in out.Found
	err := s.readAged(ctx, req.GetMaxAgeMs(), func(r *cluster.Reader) (sure bool, err error) {
		out, valid, err = readPaths(r, req)
		return len(out.GetInvalid()) == 0, err // what is valid stays so, for as long as a reader needs
	})
	if err == nil {
		err = s.foundUsed(ctx, out.GetFound())
	}
	if err == nil && len(out.GetFound()) > fewFacts {
		out.FoundSignatures, err = s.signFound(out.GetFound())
	}
	if err == nil && req.GetTraces() {
		out.Traces = s.answerTraces(ctx, out.GetFound()[:valid])
	}
	if err == nil && req.GetRoots() {
		out.Roots = s.answerRoots(ctx, out.GetFound()[:valid], out.GetTraces())
	}
	return out, err
}

// readPaths answers from one moment of the facts; valid says how many of those found
// first were asked for.
func readPaths(r *cluster.Reader, req *floxv1.PathsRequest) (out *floxv1.PathsResponse, valid int, err error) {
	asked := req.GetHashParts()
	out = &floxv1.PathsResponse{Index: r.Index()}
	seen := make(map[string]bool, len(asked))
	queue := make([]string, 0, len(asked))
	add := func(hashPart string) {
		if !seen[hashPart] {
			seen[hashPart] = true
			queue = append(queue, hashPart)
		}
	}
	for _, h := range asked {
		add(h)
	}
	first := len(queue)
	for i := 0; i < len(queue); i++ {
		if len(out.Found)+len(out.Invalid) >= maxAnswers {
			out.Truncated = true
			return out, valid, nil
		}
		m, err := readInfo(r, queue[i])
		if errors.Is(err, flox.ErrNotFound) {
			out.Invalid = append(out.Invalid, queue[i])
			continue
		}
		if err != nil {
			return out, valid, err
		}
		out.Found = append(out.Found, m)
		if i < first {
			valid = len(out.GetFound())
		}
		if req.GetClosure() {
			for _, ref := range m.GetReferences() {
				add(flox.StorePath(ref).HashPart())
			}
		}
	}
	return out, valid, nil
}

func checkHashParts(asked []string) error {
	if len(asked) > maxHashParts {
		return fmt.Errorf("%d hash parts, want at most %d: %w", len(asked), maxHashParts, flox.ErrBadInput)
	}
	for _, h := range asked {
		if !flox.ValidHashPart(h) {
			return fmt.Errorf("hash part %q: want %d characters of nix-base32: %w", h[:min(len(h), 64)], flox.HashPartLen, flox.ErrBadInput)
		}
	}
	return nil
}

// signFound signs much of an answer as one.
func (s *Server) signFound(found []*floxv1.PathInfo) ([]string, error) {
	have, err := s.id.ring.get()
	if err != nil {
		return nil, err
	}
	return have.signAnswer(s.cfg.StoreDir, found)
}

// foundUsed takes the marks off paths that are told of: who asks will read them.
func (s *Server) foundUsed(ctx context.Context, found []*floxv1.PathInfo) error {
	hashParts := make([]string, len(found))
	for i, p := range found {
		hashParts[i] = flox.StorePath(p.GetPath()).HashPart()
	}
	return s.Used(ctx, hashParts...)
}

// answerRoots gives the root blocks of the manifests of valid paths, and of each
// the pages that a start needs. It saves who asks a round trip; what cannot be read
// is left out, and asked for as any block.
func (s *Server) answerRoots(ctx context.Context, paths []*floxv1.PathInfo, traces []*floxv1.StartTrace) (roots [][]byte) {
	size := 0
	for _, p := range paths {
		ids := [][]byte{p.GetManifest()}
		for _, t := range traces {
			for _, tree := range t.GetTrees() {
				if t.GetPath() == p.GetPath() && tree.GetPath() == p.GetPath() {
					ids = append(ids, tree.GetPages()...)
				}
			}
		}
		sent := make(map[flox.CID]bool)
		for _, id := range ids {
			if len(id) != flox.CIDSize || sent[flox.CID(id)] {
				continue
			}
			sent[flox.CID(id)] = true
			b, err := s.packs.Get(ctx, flox.CID(id))
			if err != nil {
				s.cfg.Log.Debug("manifest not sent with the facts", "path", p.GetPath(), "error", err)
				break
			}
			if size += len(b); size > maxRootBytes {
				return roots
			}
			roots = append(roots, b)
		}
	}
	return roots
}

// trustLists gives the trust lists above version have, oldest first.
func (s *Server) trustLists(ctx context.Context, have uint64) (lists [][]byte, err error) {
	err = s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) (err error) {
		lists, err = readTrust(r, have)
		return err
	})
	return lists, err
}

// ensureTrust puts the first trust list in force if there is none, and checks
// that the newest one trusts this server's keys. It gives its fingerprint.
func (s *Server) ensureTrust(ctx context.Context) (flox.CID, error) {
	lists, err := s.trustLists(ctx, 0)
	if err != nil {
		return flox.CID{}, err
	}
	if len(lists) == 0 {
		first, err := s.id.firstTrust()
		if err != nil {
			return flox.CID{}, err
		}
		b, err := first.Marshal()
		if err != nil {
			return flox.CID{}, err
		}
		_, err = propose(ctx, s.node.NewSession(), &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Trust{Trust: &floxv1.SetTrustList{List: b}}})
		if err != nil {
			return flox.CID{}, fmt.Errorf("make the first trust list: %w", err)
		}
		lists = [][]byte{b}
	}
	newest, err := content.ParseTrustList(lists[len(lists)-1])
	if err != nil {
		return flox.CID{}, err
	}
	// A server that was away over a rotation has old keys until it has looked.
	if err := s.roster.refresh(ctx, s); err != nil {
		return flox.CID{}, err
	}
	have, err := s.id.ring.get()
	if err != nil {
		return flox.CID{}, err
	}
	for _, key := range public(have.manifest) { // one that is new may not be in it yet
		if slices.Contains(newest.ManifestKeys, key) {
			return newest.Fingerprint()
		}
	}
	return flox.CID{}, fmt.Errorf("%s/keys/manifest.key is not among the keys of trust list version %d: agents would refuse all it signs; put the right key back: %w",
		s.cfg.StateDir, newest.Version, flox.ErrUntrusted)
}

// propose puts a command into the log and gives its reply.
func propose(ctx context.Context, session *cluster.Session, c *floxv1.PathsCommand) (*floxv1.PathsReply, error) {
	return proposeAt(ctx, session, 0, c)
}

// proposeAt is propose of a command of a level.
func proposeAt(ctx context.Context, session *cluster.Session, level uint32, c *floxv1.PathsCommand) (*floxv1.PathsReply, error) {
	b, err := proto.Marshal(c)
	if err != nil {
		return nil, err
	}
	answer, err := enterAt(ctx, session, level, pathsKind, b)
	if err != nil {
		return nil, err
	}
	reply := &floxv1.PathsReply{}
	return reply, proto.Unmarshal(answer, reply)
}

// counts reads the counters and the index they were read at.
func (s *Server) counts(ctx context.Context) (c factCounts, index uint64, err error) {
	err = s.read(ctx, cluster.Local, func(r *cluster.Reader) (err error) {
		index = r.Index()
		c, err = readCounts(r)
		return err
	})
	return c, index, err
}
