package api

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	flox "github.com/floxctl/flox"
)

const (
	joinPrefix = "flox1"
	// joinHead is what stands before the JSON: its length, big endian, and the
	// first bytes of its SHA-256.
	joinHead     = 2 + joinSum
	joinSum      = 4
	maxJoinBytes = 8 << 10 // of the JSON
	proofBytes   = 32
)

// joinText is how an invite is written; a text that base64 could also write
// otherwise is refused.
var joinText = base64.RawURLEncoding.Strict()

// JoinInvite is what lets a machine join a storehouse: one line of text that is
// pasted. It holds a secret unless it is open to the LAN.
type JoinInvite struct {
	// ID names the invite in the storehouse.
	ID string
	// Secret is what the machine proves to know, at least 16 bytes; none with LAN.
	Secret []byte
	// Role the machine gets: server, agent, worker.
	Role string
	// Name of the storehouse, for people.
	Name string
	// Storehouse lists servers: peer IDs and where to reach them.
	Storehouse []InvitePeer
	// TrustList is the fingerprint of the trust list to begin with.
	TrustList flox.CID
	// StoreDir is the store directory of every path in this storehouse.
	StoreDir flox.StoreDir
	// Expires is when the invite ends, in whole seconds.
	Expires time.Time
	// LAN says that the storehouse takes machines without a secret now.
	LAN bool
}

// joinWire is the JSON of a JoinInvite. There is one text for one invite.
type joinWire struct {
	ID         string        `json:"i"`
	Secret     []byte        `json:"s,omitempty"`
	Role       string        `json:"r"`
	Name       string        `json:"n"`
	Storehouse []InvitePeer  `json:"h"`
	TrustList  flox.CID      `json:"t"`
	StoreDir   flox.StoreDir `json:"d"`
	Expires    int64         `json:"e"` // Unix seconds
	LAN        bool          `json:"l,omitempty"`
}

// Encode writes the invite as one line of text.
func (j *JoinInvite) Encode() (string, error) {
	if err := j.check(); err != nil {
		return "", err
	}
	b, err := j.json()
	if err != nil {
		return "", err
	}
	if len(b) > maxJoinBytes {
		return "", fmt.Errorf("invite of %d bytes, want at most %d: %w", len(b), maxJoinBytes, flox.ErrBadInput)
	}
	sum := sha256.Sum256(b)
	raw := append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), sum[:joinSum]...) //nolint:gosec // bounded above
	return joinPrefix + joinText.EncodeToString(append(raw, b...)), nil
}

func (j *JoinInvite) json() ([]byte, error) {
	b, err := json.Marshal(joinWire{
		ID: j.ID, Secret: j.Secret, Role: j.Role, Name: j.Name, Storehouse: j.Storehouse,
		TrustList: j.TrustList, StoreDir: j.StoreDir, Expires: j.Expires.Unix(), LAN: j.LAN,
	})
	if err != nil {
		return nil, fmt.Errorf("write invite: %w", err)
	}
	return b, nil
}

// FindJoinInvite gives the first word of a text that begins as an invite does, such
// as what floxctl invite prints; "" if there is none.
func FindJoinInvite(text string) string {
	for word := range strings.FieldsSeq(text) {
		if IsJoinInvite(word) {
			return word
		}
	}
	return ""
}

// IsJoinInvite reports whether a text begins as an invite does, rather than being
// the name of a file, or what is in another one.
func IsJoinInvite(text string) bool { return strings.HasPrefix(strings.TrimSpace(text), joinPrefix) }

// ParseJoinInvite reads what Encode wrote, strictly. Spaces and line breaks
// around and within it, as terminals and mail put them there, do not matter. The
// error (ErrBadInput) tells an incomplete text from a damaged one.
func ParseJoinInvite(text string) (*JoinInvite, error) {
	bad := func(format string, args ...any) (*JoinInvite, error) {
		return nil, fmt.Errorf("invite: %s: %w", fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	if len(text) > 4*maxJoinBytes {
		return bad("%d characters are more than any invite has; want the one line that floxctl invite printed", len(text))
	}
	text = strings.Join(strings.Fields(text), "")
	body, ok := strings.CutPrefix(text, joinPrefix)
	if !ok {
		if len(text) < len(joinPrefix) && strings.HasPrefix(joinPrefix, text) {
			return bad("there is nothing of it; paste the whole line that floxctl invite printed")
		}
		return bad("it begins with %q, want %q; paste the whole line that floxctl invite printed", text[:min(len(text), len(joinPrefix))], joinPrefix)
	}
	// What is there of a cut text is told even if the cut left half a byte.
	raw, err := joinText.DecodeString(body)
	whole := 0
	if head, err := joinText.DecodeString(body[:min(len(body), joinHead*4/3)]); err == nil && len(head) == joinHead {
		whole = joinText.EncodedLen(joinHead + int(binary.BigEndian.Uint16(head)))
	}
	switch {
	case whole == 0 && len(body) < joinHead*4/3 || whole > len(body):
		return bad("its end is missing (%d characters are there%s); paste the whole line", len(text), ofWhole(whole))
	case whole > 0 && whole < len(body):
		return bad("something stands behind its end (%d characters, want %d); paste the line alone", len(text), len(joinPrefix)+whole)
	case err != nil || whole == 0:
		return bad("it has a character that no invite has; copy the line again")
	}
	payload := raw[joinHead:]
	if sum := sha256.Sum256(payload); !bytes.Equal(sum[:joinSum], raw[2:joinHead]) {
		return bad("a character of it was changed; copy the line again")
	}
	return parseJoinJSON(payload)
}

// ofWhole says how many characters there should be, if that is known.
func ofWhole(whole int) string {
	if whole == 0 {
		return ""
	}
	return fmt.Sprintf(" of %d", len(joinPrefix)+whole)
}

// parseJoinJSON reads the JSON within an invite's text.
func parseJoinJSON(b []byte) (*JoinInvite, error) {
	w := joinWire{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&w); err != nil {
		return nil, fmt.Errorf("invite: not one that this release of flox understands; bring this machine to the storehouse's release: %w: %w", err, flox.ErrBadInput)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("invite: it has something behind its end: %w", flox.ErrBadInput)
	}
	j := &JoinInvite{
		ID: w.ID, Secret: w.Secret, Role: w.Role, Name: w.Name, Storehouse: w.Storehouse,
		TrustList: w.TrustList, StoreDir: w.StoreDir, Expires: time.Unix(w.Expires, 0).UTC(), LAN: w.LAN,
	}
	if err := j.check(); err != nil {
		return nil, err
	}
	if again, err := j.json(); err != nil || !bytes.Equal(again, b) {
		return nil, errors.Join(fmt.Errorf("invite: it is not written as floxctl invite writes it: %w", flox.ErrBadInput), err)
	}
	return j, nil
}

// check says what is wrong with the fields of j.
func (j *JoinInvite) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("invite: %s; ask for a new one: %w", fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	switch {
	case len(j.ID) < 8 || len(j.ID) > 64:
		return bad("an ID of %d characters, want 8 to 64", len(j.ID))
	case j.LAN && len(j.Secret) > 0:
		return bad("it is open to the LAN and has a secret")
	case !j.LAN && (len(j.Secret) < minSecretBytes || len(j.Secret) > 64):
		return bad("a secret of %d bytes, want %d to 64", len(j.Secret), minSecretBytes)
	case j.Role != "server" && j.Role != "agent" && j.Role != "worker":
		return bad("role %q, want server, agent or worker", j.Role)
	case j.Name == "":
		return bad("no name of the storehouse")
	case len(j.Storehouse) == 0 || len(j.Storehouse) > maxInvitePeers:
		return bad("%d servers, want 1 to %d", len(j.Storehouse), maxInvitePeers)
	case j.TrustList.IsZero():
		return bad("no fingerprint of the trust list")
	case j.Expires.Unix() <= 0:
		return bad("no time at which it ends")
	}
	for i, p := range j.Storehouse {
		if p.ID == "" || len(p.Addrs) == 0 {
			return bad("server %d has no ID or no addresses", i+1)
		}
	}
	if _, err := flox.ParseStoreDir(string(j.StoreDir)); err != nil {
		return bad("%v", err)
	}
	return nil
}

// Proof is what both ends of a join prove to know instead of the secret, see
// InviteProof.
func (j *JoinInvite) Proof() ([]byte, error) { return InviteProof(j.ID, j.Secret) }

// InviteProof derives from an invite's secret what both ends of a join prove to
// know, 32 bytes. The storehouse's log holds it and never the secret, so that
// what a server or a backup holds of an invite is not what was handed out. It is
// HKDF-SHA-256 with the ID for salt.
func InviteProof(id string, secret []byte) ([]byte, error) {
	if len(secret) < minSecretBytes {
		return nil, fmt.Errorf("invite: a secret of %d bytes, want at least %d: %w", len(secret), minSecretBytes, flox.ErrBadInput)
	}
	return hkdf.Key(sha256.New, secret, []byte(id), "flox join invite 1", proofBytes)
}
