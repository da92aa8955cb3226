package storehouse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// likeReal is the i-th of n path infos as large as those of real stores: three
// references, Nix's signature and ours, which no compression makes smaller. Their
// hash parts are in order of i and evenly spread, those they refer to far away.
func likeReal(i, n int) *floxv1.PathInfo {
	sum := sha256.Sum256(fmt.Appendf(nil, "path %d", i))
	random := rand.NewChaCha8(sum)
	signature := func(key string) string {
		var b [64]byte
		random.Read(b[:]) //nolint:errcheck // never fails
		return key + ":" + base64.StdEncoding.EncodeToString(b[:])
	}
	info := &floxv1.PathInfo{
		Path:    likeRealPath(i, n),
		NarHash: sum[:], NarSize: 1 << 20, Manifest: sum[:flox.CIDSize], RegisteredUnix: 1,
		Signatures:         []string{signature("cache.example.org-1"), signature("house-1")},
		ManifestSignatures: []string{signature("house-1")},
	}
	for k := likeRealRefs; k > 0; k-- {
		if ref := i - k*likeRealStep(n); ref >= 0 {
			info.References = append(info.References, likeRealPath(ref, n))
		}
	}
	slices.Sort(info.References) // those behind the n-th are at the beginning again
	return info
}

// likeRealRefs is how many references a path has, unless it is among the first.
const likeRealRefs = 3

// likeRealStep is how far apart those are.
func likeRealStep(n int) int { return n/20 + 1 }

func likeRealPath(i, n int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "path %d", i))
	// The end of a hash is what its name begins with.
	binary.LittleEndian.PutUint64(sum[12:20], uint64(i)*(math.MaxUint64/uint64(n)))
	return nix.EncodeBase32(sum[:20]) + "-some-package-1.2.3"
}

// fillReal gives a server that never ran n valid paths: the state of its log is
// written as a restored backup's is, since ten million paths take too long through
// the log. The log of what it was before is gone, changes are not in it.
func fillReal(t *testing.T, cfg Config, n int) {
	t.Helper()
	s, stop := start(t, cfg)
	rebuild(t, cfg, s, stop, func(frozen *cluster.State, put func(key, value []byte) error) error {
		left := []func() error{func() error { return putInfos(put, n) }, func() error { return putReferrers(put, n) }}
		places := [][]byte{stateKey(infoKey), stateKey(referrerKey)}
		return frozen.Each(context.Background(), func(key, value []byte) error {
			for len(places) > 0 && bytes.Compare(key, places[0]) > 0 {
				if err := left[0](); err != nil {
					return err
				}
				left, places = left[1:], places[1:]
			}
			if bytes.Equal(key, stateKey(countsKey)) {
				value = bytes.Clone(value)
				binary.BigEndian.PutUint64(value, uint64(n))         // paths
				binary.BigEndian.PutUint64(value[8:], uint64(n)<<20) // bytes of NARs
			}
			return put(key, value)
		})
	})
}

// rebuild stops a server and gives it the state that load makes of its own.
func rebuild(t *testing.T, cfg Config, s *Server, stop func(), load func(frozen *cluster.State, put func(key, value []byte) error) error) {
	t.Helper()
	frozen, err := s.node.Freeze(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	id, built := string(s.id.peer), filepath.Join(t.TempDir(), "built")
	state, err := cluster.BuildState(built, nil, func(put func(key, value []byte) error) error { return load(frozen, put) })
	if err := errors.Join(err, frozen.Close()); err != nil {
		t.Fatal(err)
	}
	stop()
	log := filepath.Join(cfg.StateDir, "raft")
	if err := errors.Join(os.RemoveAll(log), state.Found(log, id), state.Close(), os.RemoveAll(built)); err != nil {
		t.Fatal(err)
	}
}

// stateKey is where a key of the facts is in the state.
func stateKey(kind byte, more ...string) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{1}, pathsKind), append([]byte{kind}, strings.Join(more, "")...)...)
}

func putInfos(put func(key, value []byte) error, n int) error {
	for i := range n {
		info := likeReal(i, n)
		b, err := stable.Marshal(info)
		if err == nil {
			err = put(stateKey(infoKey, flox.StorePath(info.GetPath()).HashPart()), b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func putReferrers(put func(key, value []byte) error, n int) error {
	for i := range n {
		for k := 1; k <= likeRealRefs && i+k*likeRealStep(n) < n; k++ {
			if err := put(stateKey(referrerKey, hashPart(i, n), hashPart(i+k*likeRealStep(n), n)), nil); err != nil {
				return err
			}
		}
	}
	return nil
}

func hashPart(i, n int) string { return likeRealPath(i, n)[:flox.HashPartLen] }
