package wire

import (
	"encoding/hex"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What machines of other versions send and understand, frame by frame. The file is never
// changed, only added to: a change of these bytes cuts off every machine that is not upgraded
// at the same moment. What is new takes a new type, status or flag.
func TestGoldenFrames(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("testdata/frames.hex")
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Fields(string(b))
	var got []string
	for b := sample(); len(b) > 0; {
		n := frameLength(b)
		got = append(got, hex.EncodeToString(b[:n]))
		b = b[n:]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("frames are not as machines of other versions know them (-theirs +here):\n%s", diff)
	}
}
