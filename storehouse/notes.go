package storehouse

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// A note is a small file of the state directory: one value in JSON, and below it, in the
// last line, the sum of all above. One without that line is of a version that wrote none.

// sumMark begins the line with the sum.
const sumMark = "\nblake3:"

// writeNote writes a note, durably, whole or not at all.
func writeNote(path string, value any, mode os.FileMode) error {
	b, err := sealNote(value)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return writeFile(path, b, mode)
}

func sealNote(value any) ([]byte, error) {
	b, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return nil, err
	}
	return slices.Concat(b, []byte(sumMark+content.Hash(b).String()+"\n")), nil
}

// readNote reads a note into value. ErrCorrupt when it is damaged, and os.ErrNotExist
// when there is none.
func readNote(path string, value any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read state directory: %w", err)
	}
	if at := bytes.LastIndex(b, []byte(sumMark)); at >= 0 {
		line := string(b[at:])
		if b = b[:at]; line != sumMark+content.Hash(b).String()+"\n" {
			return fmt.Errorf("%s does not match its sum: %w", path, flox.ErrCorrupt)
		}
	}
	if err := json.Unmarshal(b, value); err != nil {
		return fmt.Errorf("%s: %w: %w", path, err, flox.ErrCorrupt)
	}
	return nil
}
