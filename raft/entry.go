package raft

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// castagnoli has hardware support everywhere we run.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// An entry of the log is a CRC-32C (4 bytes, big endian) of the rest and an
// api Envelope. The log store does not check entries when it reads them back,
// so the sum is what keeps a flipped bit on disk out of the state.
const entryHeader = 4

// encodeEntry gives the bytes of an entry.
func encodeEntry(e *floxv1.Envelope) ([]byte, error) {
	b, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, entryHeader, entryHeader+proto.Size(e)), e)
	if err != nil {
		return nil, fmt.Errorf("encode log entry: %w", err)
	}
	binary.BigEndian.PutUint32(b, crc32.Checksum(b[entryHeader:], castagnoli))
	return b, nil
}

// decodeEntry undoes encodeEntry. Errors: ErrCorrupt, and ErrUnknownCommand
// for an envelope of a newer program.
func decodeEntry(b []byte) (*floxv1.Envelope, error) {
	if len(b) < entryHeader {
		return nil, fmt.Errorf("entry of %d bytes: %w", len(b), flox.ErrCorrupt)
	}
	want, got := binary.BigEndian.Uint32(b), crc32.Checksum(b[entryHeader:], castagnoli)
	if want != got {
		return nil, fmt.Errorf("entry has checksum %08x, its bytes give %08x: %w", want, got, flox.ErrCorrupt)
	}
	e := &floxv1.Envelope{}
	if err := proto.Unmarshal(b[entryHeader:], e); err != nil {
		return nil, fmt.Errorf("entry is no envelope: %w: %w", err, ErrUnknownCommand)
	}
	if e.Version != EnvelopeVersion {
		return nil, fmt.Errorf("envelope version %d, this program knows %d: %w", e.Version, EnvelopeVersion, ErrUnknownCommand)
	}
	if len(e.ProtoReflect().GetUnknown()) > 0 {
		return nil, fmt.Errorf("envelope has fields this program does not know: %w", ErrUnknownCommand)
	}
	return e, nil
}
