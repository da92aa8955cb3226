package warden

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/floxctl/flox"
)

// The line is a socket that keeps messages apart (SOCK_SEQPACKET), so that a
// message is one JSON object. Questions are numbered by the child, and answers
// may come in another order and in several parts.
const (
	// maxMessage is the largest message in bytes; what is larger is cut off by
	// the kernel and is then no JSON.
	maxMessage = 64 << 10
	// maxNodes is how many inodes one part of an answer lists.
	maxNodes = 2048
	// maxLink is the longest path, as in the kernel (PATH_MAX).
	maxLink = 4096
	// maxReadAhead is in KiB.
	maxReadAhead = 4096
)

// What a child may ask. There is nothing else.
const (
	askExe        = "exe"        // PID: what it executes
	askInUse      = "inuse"      // the inodes of the mount that are in use
	askMapped     = "mapped"     // Node: whether it is mapped or executed; PID: the thread that reads it
	askRoot       = "root"       // Link: where it points
	askRoots      = "roots"      // all roots of this machine
	askProfile    = "profile"    // Link: the store path it leads to, over other links
	askNixProfile = "nixprofile" // Link: a profile of stock Nix, as it is
	askMoveNix    = "movenix"    // Link, Move: have it lead to another store path
	askReadAhead  = "readahead"  // KiB: set it
	askPages      = "pages"      // PID: what of the mount's files is in its page tables
	askWaiting    = "waiting"    // how many requests of the mount are not answered

	// What a child tells of itself, with its Version. There is no answer.
	tellServing = "serving" // requests are read
	tellReady   = "ready"   // and everything else runs
	tellBeat    = "beat"    // it lives
)

// question goes from the child to the parent.
type question struct {
	ID   uint64
	Ask  string
	PID  uint32   `json:",omitempty"`
	Node uint64   `json:",omitempty"`
	Link string   `json:",omitempty"`
	KiB  int      `json:",omitempty"`
	Move *NixMove `json:",omitempty"`

	Version     string `json:",omitempty"`
	StateFormat int    `json:",omitempty"` // see Conn
}

// answer goes from the parent to the child.
type answer struct {
	ID     uint64
	Error  string      `json:",omitempty"` // a key of errorKinds
	Why    string      `json:",omitempty"`
	Text   string      `json:",omitempty"`
	Open   []uint64    `json:",omitempty"` // inodes open, or somebody's directory
	Mapped []uint64    `json:",omitempty"` // inodes mapped or executed
	Runs   []uint64    `json:",omitempty"` // inode, offset, length; and so on
	Roots  []Root      `json:",omitempty"`
	Yes    bool        `json:",omitempty"`
	Count  int         `json:",omitempty"`
	Unread []string    `json:",omitempty"` // what does not answer, and is told as it was
	Nix    *NixProfile `json:",omitempty"`
	More   bool        `json:",omitempty"` // another part follows
}

// ErrUnread says that what a root points to cannot be read now, and was not before.
var ErrUnread = errors.New("not read")

// errFailed is what nothing more is known of.
var errFailed = errors.New("failed")

var errorKinds = map[string]error{
	"not found": flox.ErrNotFound,
	"denied":    flox.ErrDenied,
	"bad input": flox.ErrBadInput,
	"busy":      flox.ErrBusy,
	"closed":    flox.ErrClosed,
	"unread":    ErrUnread,
	"failed":    errFailed,
}

// parseQuestion checks everything a child can get wrong, or wants to.
func parseQuestion(b []byte) (question, error) {
	bad := func(q question, why string) (question, error) {
		return q, fmt.Errorf("question of the child: %s: %w", why, flox.ErrBadInput)
	}
	var q question
	if err := json.Unmarshal(b, &q); err != nil {
		return bad(question{}, err.Error())
	}
	switch q.Ask {
	case askInUse, askMapped, askWaiting, askRoots, tellServing, tellReady, tellBeat:
	case askExe, askPages:
		if q.PID == 0 || q.PID > 1<<22 { // PID_MAX_LIMIT
			return bad(q, fmt.Sprintf("process %d", q.PID))
		}
	case askRoot, askProfile, askNixProfile, askMoveNix:
		if len(q.Link) >= maxLink || !filepath.IsAbs(q.Link) || filepath.Clean(q.Link) != q.Link || strings.ContainsRune(q.Link, 0) {
			return bad(q, "a link must be a clean absolute path")
		}
		if q.Ask == askMoveNix {
			if q.Move == nil {
				return bad(q, "it does not say where to")
			}
			if _, err := flox.ParseStorePath(q.Move.To); err != nil || q.Move.Was.Number == 0 { // only what is a profile already
				return bad(q, "want a profile that is there, and a store path to lead it to")
			}
		}
	case askReadAhead:
		if q.KiB < 0 || q.KiB > maxReadAhead {
			return bad(q, fmt.Sprintf("read-ahead of %d KiB, want 0 to %d", q.KiB, maxReadAhead))
		}
	default:
		return bad(q, "it is none of those there are")
	}
	return q, nil
}

// refusal is the answer that carries err.
func refusal(id uint64, err error) answer {
	a := answer{ID: id, Error: "failed", Why: err.Error()}
	for kind, sentinel := range errorKinds {
		if errors.Is(err, sentinel) {
			a.Error = kind
		}
	}
	if len(a.Why) > maxLink {
		a.Why = a.Why[:maxLink]
	}
	return a
}

// err is the error an answer carries.
func (a answer) err() error {
	if a.Error == "" {
		return nil
	}
	kind, ok := errorKinds[a.Error]
	if !ok || a.Error == "failed" {
		return fmt.Errorf("warden: %s", a.Why)
	}
	return fmt.Errorf("warden: %s: %w", strings.TrimSuffix(a.Why, ": "+kind.Error()), kind)
}
