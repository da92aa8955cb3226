package api

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

func TestPeekPathInfoReadsWhatWasWritten(t *testing.T) {
	id := flox.CID{1, 2, 3}
	full := &floxv1.PathInfo{
		Path: "0c2y7sqz9mdkmv3xhbqf1r8gwn6jipa4-x", NarHash: make([]byte, 32), NarSize: 1 << 40,
		References: []string{"a", "b"}, Ca: "ca", RegisteredUnix: 7, Signatures: []string{"s"}, Manifest: id[:], ManifestSignatures: []string{"m"},
	}
	b, err := proto.Marshal(full)
	if err != nil {
		t.Fatal(err)
	}
	if name, manifest, ok := PeekPathInfo(b); !ok || name != full.Path || manifest != id {
		t.Errorf("%q %v %v", name, manifest, ok)
	}
	for i := range len(b) - 1 { // cut off anywhere it never panics, nor makes a name up
		if name, _, ok := PeekPathInfo(b[:i]); ok && name != full.Path {
			t.Errorf("of %d bytes: %q", i, name)
		}
	}
	if _, _, ok := PeekPathInfo(nil); ok {
		t.Error("nothing has a name")
	}
}

func FuzzPeekPathInfo(f *testing.F) {
	b, _ := proto.Marshal(&floxv1.PathInfo{Path: "p", Manifest: make([]byte, flox.CIDSize)})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m floxv1.PathInfo
		name, manifest, ok := PeekPathInfo(b)
		if !ok || proto.Unmarshal(b, &m) != nil {
			return
		}
		if name != m.GetPath() || (len(m.GetManifest()) > 0 && manifest != flox.CID(m.GetManifest())) {
			t.Errorf("%q, want %q", name, m.GetPath())
		}
	})
}
