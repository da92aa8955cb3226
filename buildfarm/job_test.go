package buildfarm

import (
	"io"
	"strings"
	"testing"
	"unicode/utf8"
)

// The last lines of a log are text, wherever they are cut.
func TestTailIsText(t *testing.T) {
	t.Parallel()
	h := &happening{Result: &Result{}, log: io.Discard, emit: func(Event) {}}
	h.take(Event{Kind: EventLine, Text: "x" + strings.Repeat("ä", maxTailLine)})
	h.take(Event{Kind: EventMessage, Text: "x" + strings.Repeat("ä", maxTailLine)})
	for _, line := range append(h.Tail, h.last) {
		if !utf8.ValidString(line) || len(line) != maxTailLine-1 {
			t.Errorf("%d bytes, which end in %q", len(line), line[len(line)-3:])
		}
	}
	if len(h.Tail) != 1 {
		t.Errorf("%d lines", len(h.Tail))
	}
}
