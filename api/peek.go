package api

import (
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/floxctl/flox"
)

// Numbers of PathInfo's fields (log.proto).
const (
	pathField     protowire.Number = 1
	manifestField protowire.Number = 9
)

// PeekPathInfo reads the base name and the manifest CID of an encoded PathInfo,
// and nothing else of it: who lists a million paths has no use for the rest.
// False if b holds no such things.
func PeekPathInfo(b []byte) (name string, manifest flox.CID, ok bool) {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return "", flox.CID{}, false
		}
		b = b[n:]
		if kind != protowire.BytesType || (number != pathField && number != manifestField) {
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return "", flox.CID{}, false
			}
			b = b[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(b)
		if n < 0 || number == manifestField && len(value) != flox.CIDSize {
			return "", flox.CID{}, false
		}
		b = b[n:]
		if number == pathField {
			name = string(value)
		} else {
			manifest = flox.CID(value)
		}
	}
	return name, manifest, name != ""
}
