package storehouse

import (
	"bytes"
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

const (
	// signPage is how many paths are looked at in one go, signBatch how many one
	// entry of the log signs: about 100 KB.
	signPage  = 1024
	signBatch = 256
	// signPause is the least pause behind each page; it is twice what the page took
	// if that is longer, so that signing takes a third of one core at most.
	signPause = 20 * time.Millisecond
	// signSettle is how long a server may go on signing with keys that were replaced:
	// longer than a publish waits for the log.
	signSettle = time.Minute
)

// runSigning has the leader sign with the keys in force what is valid, after they
// changed, until ctx ends. It goes over the paths at once, and once more when
// nobody signs with older keys any more. A new leader begins again: what is signed
// is only looked at.
func (s *Server) runSigning(ctx context.Context) error {
	if s.Ready(ctx) != nil {
		return nil // ctx ended
	}
	tick := time.NewTicker(tendEvery)
	defer tick.Stop()
	var at uint64 // version of the keys
	var since time.Time
	var went bool
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		have, version, err := s.keysInForce()
		if err != nil || !have.all.GetUnsigned() || s.node.Status().State != "leader" {
			at = 0
			continue
		}
		if at != version {
			at, since, went = version, time.Now(), false
		}
		settled := time.Since(since) >= s.cfg.signSettle
		if went && !settled {
			continue
		}
		n, err := s.signAll(ctx, have)
		if err == nil && n > 0 {
			s.cfg.Log.Info("paths are signed with the keys in force", "paths", n)
		}
		if went = err == nil; went && settled {
			err = s.changeKeys(ctx, s.actor(), func(k *floxv1.ClusterSecrets) error {
				if !proto.Equal(k, have.all) {
					return errUnchanged // others by now
				}
				k.Unsigned = false
				return nil
			})
		}
		if err != nil && ctx.Err() == nil {
			s.cfg.Log.Warn("not every path is signed with the keys in force yet", "error", err)
		}
	}
}

// signAll signs every valid path that lacks a signature of one of the keys. It
// gives how many did.
func (s *Server) signAll(ctx context.Context, have *keys) (signed int, err error) {
	session := s.node.NewSession()
	for from := []byte{infoKey}; from != nil; {
		began := time.Now()
		var batch []*floxv1.PathSignatures
		if batch, from, err = s.unsigned(ctx, have, from); err != nil {
			return signed, err
		}
		if len(batch) > 0 {
			if err := s.takesFacts(ctx); err != nil {
				return signed, err
			}
			command := &floxv1.PathsCommand{Command: &floxv1.PathsCommand_Sign{Sign: &floxv1.SignPaths{Paths: batch}}}
			if _, err := proposeAt(ctx, session, retireLevel, command); err != nil {
				return signed, err
			}
			signed += len(batch)
		}
		select {
		case <-time.After(max(signPause, 2*time.Since(began))):
		case <-ctx.Done():
			return signed, ctx.Err()
		}
	}
	return signed, nil
}

// unsigned gives the signatures of the next paths that lack some, and where to go
// on; nil = there are no more.
func (s *Server) unsigned(ctx context.Context, have *keys, from []byte) (batch []*floxv1.PathSignatures, next []byte, err error) {
	looked := 0
	var bad error
	err = s.read(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		return r.Iterate([]byte{infoKey}, from, func(key, value []byte) bool {
			if looked == signPage || len(batch) == signBatch {
				next = bytes.Clone(key)
				return false
			}
			looked++
			m := &floxv1.PathInfo{}
			var info *flox.PathInfo
			if bad = proto.Unmarshal(value, m); bad == nil {
				info, bad = api.ToPathInfo(m)
			}
			if bad != nil {
				return false
			}
			if sigs := have.lacking(s.cfg.StoreDir, info); sigs != nil {
				batch = append(batch, sigs)
			}
			return true
		})
	})
	if err == nil {
		err = bad
	}
	return batch, next, err
}

// lacking gives all signatures a path should have; nil if it has them.
func (k *keys) lacking(dir flox.StoreDir, info *flox.PathInfo) *floxv1.PathSignatures {
	signed := k.sign(dir, info, info.Manifest)
	has := func(sig string) bool { return slices.Contains(info.ManifestSignatures, sig) }
	if len(signed.Signatures) == len(info.Signatures) && !slices.ContainsFunc(signed.ManifestSignatures, func(sig string) bool { return !has(sig) }) {
		return nil
	}
	return &floxv1.PathSignatures{
		Path: string(info.Path), NarHash: info.NarHash[:], Manifest: info.Manifest[:],
		Signatures: k.fewer(signed.Signatures), ManifestSignatures: signed.ManifestSignatures,
	}
}

// fewer drops the oldest signatures that are not by keys in force, when there are
// too many: each rotation adds one.
func (k *keys) fewer(sigs []string) []string {
	ours := func(sig string) bool {
		return slices.ContainsFunc(k.nix, func(key nix.SecretKey) bool {
			return len(sig) > len(key.Name()) && sig[:len(key.Name())+1] == key.Name()+":"
		})
	}
	for i := 0; len(sigs) > maxSignatures && i < len(sigs); {
		if ours(sigs[i]) {
			i++
			continue
		}
		sigs = slices.Delete(sigs, i, i+1)
	}
	return sigs
}
