package staging

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Keys of the index:
//
//	'p' hash part        a path: see appendPath
//	'm' CID hash part    a path with this manifest
//	'b' CID hash part    a block of a small path; larger ones lie in packs
//	'r' owner id         a realisation: see realisedPrefix
//
// A small path is thus one write, and one sync.
const (
	pathPrefix     = 'p'
	manifestPrefix = 'm'
	blockPrefix    = 'b'
)

// Path is a staged path.
type Path struct {
	// Info is as Add returned it; it has no signatures but those it came with.
	Info *flox.PathInfo
	// Added is when it was added.
	Added time.Time
	// Uploaded says that the storehouse has it.
	Uploaded bool
	// Shared says that it was added for other machines, too.
	Shared bool

	inline int64 // bytes of its blocks that lie in the index
}

// Addressed reports whether the path is content-addressed. Any other is nobody's
// business but this machine's, unless it comes with a signature others trust.
func (p *Path) Addressed() bool { return p.Info.CA != "" }

const (
	recordVersion  = 1
	recordHead     = 18 // version, flags, added (Unix milliseconds), bytes in the index
	recordUploaded = 1  // flag
	recordShared   = 2  // flag
)

// appendPath encodes a path: its head, then its floxv1.PathInfo.
func appendPath(p *Path) ([]byte, error) {
	b := []byte{recordVersion, 0}
	if p.Uploaded {
		b[1] |= recordUploaded
	}
	if p.Shared {
		b[1] |= recordShared
	}
	b = binary.BigEndian.AppendUint64(b, uint64(p.Added.UnixMilli()))
	b = binary.BigEndian.AppendUint64(b, uint64(p.inline))
	b, err := proto.MarshalOptions{}.MarshalAppend(b, api.FromPathInfo(p.Info))
	if err != nil {
		return nil, fmt.Errorf("staging: %s: %w", p.Info.Path, err)
	}
	return b, nil
}

func parsePath(b []byte) (*Path, error) {
	if len(b) < recordHead || b[0] != recordVersion {
		return nil, fmt.Errorf("staging: a record of %d bytes that this version cannot read: %w", len(b), flox.ErrCorrupt)
	}
	p := &Path{
		Uploaded: b[1]&recordUploaded != 0, Shared: b[1]&recordShared != 0, Added: time.UnixMilli(int64(binary.BigEndian.Uint64(b[2:]))).UTC(),
		inline: int64(binary.BigEndian.Uint64(b[10:])),
	}
	m := &floxv1.PathInfo{}
	err := proto.Unmarshal(b[recordHead:], m)
	if err == nil {
		p.Info, err = api.ToPathInfo(m)
	}
	if err != nil {
		return nil, fmt.Errorf("staging: record: %w: %w", err, flox.ErrCorrupt)
	}
	return p, nil
}

func pathKey(hashPart string) []byte { return append([]byte{pathPrefix}, hashPart...) }

// cidKey is the key of something of a path that is found by a CID.
func cidKey(prefix byte, id flox.CID, hashPart string) []byte {
	return append(append([]byte{prefix}, id[:]...), hashPart...)
}

// get reads a path; ErrNotFound.
func (s *Store) get(hashPart string) (*Path, error) {
	if err := s.ready(false); err != nil {
		return nil, err
	}
	b, closer, err := s.db.Get(pathKey(hashPart))
	if errors.Is(err, pebble.ErrNotFound) {
		return nil, fmt.Errorf("%s is not staged: %w", hashPart, flox.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("staging: read %s: %w", hashPart, err)
	}
	p, err := parsePath(b)
	return p, errors.Join(err, closer.Close())
}

// each calls yield with every path whose hash part sorts behind after.
func (s *Store) each(after string, yield func(*Path) bool) error {
	if err := s.ready(false); errors.Is(err, flox.ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	return s.eachOpened(after, yield)
}

// eachOpened is each once the indexes are open.
func (s *Store) eachOpened(after string, yield func(*Path) bool) error {
	it, err := s.db.NewIter(context.Background(), &pebble.IterOptions{LowerBound: append(pathKey(after), 0), UpperBound: []byte{pathPrefix + 1}})
	if err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	for it.First(); it.Valid(); it.Next() {
		p, err := parsePath(it.Value())
		if err != nil {
			return errors.Join(err, it.Close())
		}
		if !yield(p) {
			break
		}
	}
	if err := it.Close(); err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	return nil
}

// byCID calls yield with the first thing of a prefix that a CID finds. ErrNotFound.
func (s *Store) byCID(prefix byte, id flox.CID, yield func(hashPart string, value []byte) error) error {
	if err := s.ready(false); err != nil {
		return err
	}
	lower := cidKey(prefix, id, "")
	it, err := s.db.NewIter(context.Background(), &pebble.IterOptions{LowerBound: lower, UpperBound: cidKey(prefix, id, "~")})
	if err != nil {
		return fmt.Errorf("staging: %w", err)
	}
	if it.First() {
		err = yield(string(it.Key()[len(lower):]), it.Value())
	} else {
		err = fmt.Errorf("%s is not staged: %w", id, flox.ErrNotFound)
	}
	return errors.Join(err, it.Close())
}
