package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	flox "github.com/floxctl/flox"
)

// InviteVersion is the only format of an invite there is so far.
const InviteVersion = 1

// Bounds of an invite file; what is larger is refused unread.
const (
	maxInviteBytes = 64 << 10
	minSecretBytes = 16
	maxInvitePeers = 32
)

// Invite is what a machine needs to take part: the secret all members share,
// where the storehouse is, and what to trust before anything was fetched. The
// file holds a secret: mode 0600, handed over like a password.
type Invite struct {
	// Version is InviteVersion.
	Version int `json:"version"`
	// Name of the storehouse, for people.
	Name string `json:"name"`
	// Secret is what members prove to each other that they know, at least 16 bytes.
	Secret []byte `json:"secret"`
	// Storehouse lists the servers: peer IDs and where to reach them.
	Storehouse []InvitePeer `json:"storehouse"`
	// TrustList is the fingerprint of the first trust list to accept.
	TrustList flox.CID `json:"trust_list"`
	// HTTPURL is the binary cache for stock tools, "http://host:port"; "" = none.
	HTTPURL string `json:"http_url,omitempty"`
	// StoreDir is the store directory of every path in this storehouse.
	StoreDir flox.StoreDir `json:"store_dir"`
	// NixKey is the public key of Nix signatures, "name:base64", for
	// trusted-public-keys of stock Nix.
	NixKey string `json:"nix_key"`
}

// InvitePeer is one server of the storehouse.
type InvitePeer struct {
	ID    string   `json:"id"`
	Addrs []string `json:"addrs"` // multiaddrs without the peer ID, or host:port
}

// ParseInvite reads an invite strictly: an unknown key, a missing field or
// anything behind the end is ErrBadInput.
func ParseInvite(b []byte) (*Invite, error) {
	if len(b) > maxInviteBytes {
		return nil, fmt.Errorf("invite of %d bytes, want at most %d: %w", len(b), maxInviteBytes, flox.ErrBadInput)
	}
	inv := &Invite{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(inv); err != nil {
		return nil, fmt.Errorf("invite is not the JSON a storehouse writes: %w: %w", err, flox.ErrBadInput)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("invite has something behind its end: %w", flox.ErrBadInput)
	}
	if err := inv.check(); err != nil {
		return nil, err
	}
	return inv, nil
}

// check says what is wrong with the fields of inv.
func (inv *Invite) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("invite: %s; ask for a new invite.json of the storehouse: %w", fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	switch {
	case inv.Version != InviteVersion:
		return bad("version %d, this program knows %d", inv.Version, InviteVersion)
	case len(inv.Secret) < minSecretBytes:
		return bad("secret of %d bytes, want at least %d", len(inv.Secret), minSecretBytes)
	case len(inv.Storehouse) == 0:
		return bad("no server under storehouse")
	case len(inv.Storehouse) > maxInvitePeers:
		return bad("%d servers under storehouse, want at most %d", len(inv.Storehouse), maxInvitePeers)
	case inv.TrustList.IsZero():
		return bad("no fingerprint under trust_list")
	}
	for i, p := range inv.Storehouse {
		if p.ID == "" || len(p.Addrs) == 0 {
			return bad("server %d under storehouse has no id or no addrs", i)
		}
	}
	if _, err := flox.ParseStoreDir(string(inv.StoreDir)); err != nil {
		return bad("%v", err)
	}
	if name, key, ok := strings.Cut(inv.NixKey, ":"); !ok || name == "" || key == "" {
		return bad("nix_key %q, want name:base64", inv.NixKey)
	}
	if inv.HTTPURL == "" {
		return nil
	}
	if u, err := url.Parse(inv.HTTPURL); err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return bad("http_url %q, want http://host:port", inv.HTTPURL)
	}
	return nil
}

// LoadInvite reads an invite file.
func LoadInvite(path string) (*Invite, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would wait for a writer
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("invite %s does not exist: copy invite.json of the storehouse's state directory to it: %w", path, flox.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read invite: %w", err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("read invite %s: want a regular file: %w", path, flox.ErrBadInput), err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxInviteBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read invite %s: %w", path, err)
	}
	inv, err := ParseInvite(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return inv, nil
}

// Save writes the invite to path with mode 0600, durably, whole or not at all.
func (inv *Invite) Save(path string) error {
	if err := inv.check(); err != nil {
		return err
	}
	b, err := json.MarshalIndent(inv, "", "  ")
	if err != nil {
		return fmt.Errorf("write invite: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".invite-*") // made with mode 0600
	if err != nil {
		return fmt.Errorf("write invite: %w", err)
	}
	defer os.Remove(f.Name()) // gone already when it was renamed
	if _, err = f.Write(append(b, '\n')); err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("write invite %s: %w", path, err)
	}
	return nil
}

// syncDir makes the names in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
