package content

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Statement is what a manifest key signs: that the NAR of a store path and the
// manifest are the same tree,
// "flox-manifest-1;storePath;narHash;narSize;refs;manifestCID" with absolute
// store paths, refs sorted and joined by commas.
func Statement(dir flox.StoreDir, info *flox.PathInfo) string {
	refs := make([]string, len(info.References))
	for i, r := range info.References {
		refs[i] = dir.Join(r)
	}
	slices.Sort(refs)
	return fmt.Sprintf("flox-manifest-1;%s;%s;%d;%s;%s",
		dir.Join(info.Path), nix.SHA256Hash(info.NarHash), info.NarSize, strings.Join(refs, ","), info.Manifest)
}

// Limits of a trust list.
const (
	maxTrustList  = 256 << 10 // bytes of its JSON form
	maxTrustKeys  = 256       // of each kind, voters and signatures included
	maxTrustEntry = 1024      // bytes of a key, a peer ID or a signature
)

// TrustList says whose signatures hold. Lists form a chain: each is signed by a
// manifest key of the one before, the first is known by its fingerprint. Keys
// and voters are sorted and without duplicates.
type TrustList struct {
	Version uint64 `json:"version"` // 1 for the first, then one more each
	Epoch   uint64 `json:"epoch"`   // never falls; a restored backup starts a higher one
	// NixKeys and ManifestKeys are public keys, "name:base64".
	NixKeys      []string `json:"nixKeys"`
	ManifestKeys []string `json:"manifestKeys"`
	Voters       []string `json:"voters"` // peer IDs of the storehouse's servers
	Prev         flox.CID `json:"prev"`   // fingerprint of the list before, zero for the first
	// Signatures are over Canonical, "keyname:base64".
	Signatures []string `json:"signatures"`
}

// check refuses a list that is not well-formed.
func (t *TrustList) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("trust list version %d: %s: %w", t.Version, fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	if t.Version == 0 || (t.Version == 1) != t.Prev.IsZero() {
		return bad("the first version is 1 and has no list before it, every other names one")
	}
	for _, keys := range [][]string{t.NixKeys, t.ManifestKeys} {
		if len(keys) == 0 {
			return bad("it names no key, want at least one of each kind")
		}
		for _, k := range keys {
			if _, err := nix.ParsePublicKey(k); err != nil {
				return bad("%v", err)
			}
		}
	}
	for _, list := range [][]string{t.NixKeys, t.ManifestKeys, t.Voters, t.Signatures} {
		if len(list) > maxTrustKeys {
			return bad("%d keys, voters or signatures, want at most %d", len(list), maxTrustKeys)
		}
		for _, s := range list {
			if s == "" || len(s) > maxTrustEntry || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
				return bad("%q is no key, peer ID or signature", s)
			}
		}
	}
	for _, list := range [][]string{t.NixKeys, t.ManifestKeys, t.Voters} {
		for i := 1; i < len(list); i++ {
			if list[i-1] >= list[i] {
				return bad("%q stands before %q, want each once and sorted", list[i-1], list[i])
			}
		}
	}
	return nil
}

// Canonical gives the bytes that are signed and fingerprinted: everything but
// the signatures. ErrBadInput if the list is not well-formed.
func (t *TrustList) Canonical() ([]byte, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "flox-trust-list-1\nversion %d\nepoch %d\nprev %s\n", t.Version, t.Epoch, t.Prev)
	for _, k := range t.NixKeys {
		fmt.Fprintf(&b, "nix-key %s\n", k)
	}
	for _, k := range t.ManifestKeys {
		fmt.Fprintf(&b, "manifest-key %s\n", k)
	}
	for _, v := range t.Voters {
		fmt.Fprintf(&b, "voter %s\n", v)
	}
	return b.Bytes(), nil
}

// Fingerprint names the list, signatures left out. ErrBadInput if it is not
// well-formed.
func (t *TrustList) Fingerprint() (flox.CID, error) {
	b, err := t.Canonical()
	if err != nil {
		return flox.CID{}, err
	}
	return Hash(b), nil
}

// Sign adds key's signature.
func (t *TrustList) Sign(key nix.SecretKey) error {
	b, err := t.Canonical()
	if err != nil {
		return err
	}
	t.Signatures = append(t.Signatures, key.Sign(b))
	return nil
}

// CheckFirst checks that t is the list an invite's fingerprint means. It need not
// be version 1: who joins late starts from the list of the day. ErrUntrusted
// otherwise.
func (t *TrustList) CheckFirst(fingerprint flox.CID) error {
	got, err := t.Fingerprint()
	if err != nil {
		return err
	}
	if got != fingerprint {
		return fmt.Errorf("trust list version %d has fingerprint %s, the invite says %s: %w", t.Version, got, fingerprint, flox.ErrUntrusted)
	}
	return nil
}

// signedBy checks that one of by's manifest keys signed t.
func (t *TrustList) signedBy(by *TrustList) error {
	b, err := t.Canonical()
	if err != nil {
		return err
	}
	ring, err := nix.ParseKeyRing(by.ManifestKeys)
	if err != nil {
		return err
	}
	if _, ok := ring.Verify(b, t.Signatures); !ok {
		return fmt.Errorf("trust list version %d: none of its %d signatures is by a manifest key of version %d: %w", t.Version, len(t.Signatures), by.Version, flox.ErrUntrusted)
	}
	return nil
}

// Newer checks that next follows old: one version on, the epoch not lower, Prev
// old's fingerprint, signed by one of old's manifest keys. Who is several versions
// behind calls it for each. ErrUntrusted otherwise.
func Newer(old, next *TrustList) error {
	prev, err := old.Fingerprint()
	if err != nil {
		return err
	}
	if err := next.check(); err != nil {
		return err
	}
	switch {
	case old.Version+1 != next.Version:
		return fmt.Errorf("trust list version %d does not follow version %d; lists only move forward, one at a time: %w", next.Version, old.Version, flox.ErrUntrusted)
	case next.Epoch < old.Epoch:
		return fmt.Errorf("trust list version %d: epoch %d is lower than %d of the list before: %w", next.Version, next.Epoch, old.Epoch, flox.ErrUntrusted)
	case next.Prev != prev:
		return fmt.Errorf("trust list version %d follows a list %s, not version %d, which is %s: %w", next.Version, next.Prev, old.Version, prev, flox.ErrUntrusted)
	}
	return next.signedBy(old)
}

// Restored checks that next is of a later life of the storehouse than old: its
// epoch is higher and one of old's manifest keys signed it. Between them stands no
// chain, because what the storehouse knew behind its backup is lost, so next may
// have any version. ErrUntrusted otherwise.
func Restored(old, next *TrustList) error {
	if next.Epoch <= old.Epoch {
		return fmt.Errorf("trust list version %d: its epoch %d is not higher than %d, that of version %d: %w", next.Version, next.Epoch, old.Epoch, old.Version, flox.ErrUntrusted)
	}
	return next.signedBy(old)
}

// VerifyInfo checks that a manifest key of the list signed info's statement.
// ErrUntrusted otherwise.
func (t *TrustList) VerifyInfo(dir flox.StoreDir, info *flox.PathInfo) error {
	ring, err := nix.ParseKeyRing(t.ManifestKeys)
	if err != nil {
		return err
	}
	if info.Manifest.IsZero() {
		return fmt.Errorf("path %s: it names no manifest: %w", info.Path, flox.ErrUntrusted)
	}
	if _, ok := ring.Verify([]byte(Statement(dir, info)), info.ManifestSignatures); !ok {
		return fmt.Errorf("path %s: none of its %d manifest signatures is by a key of trust list version %d: %w",
			info.Path, len(info.ManifestSignatures), t.Version, flox.ErrUntrusted)
	}
	return nil
}

// ParseTrustList decodes and checks a list's JSON form. ErrBadInput.
func ParseTrustList(b []byte) (*TrustList, error) {
	if len(b) > maxTrustList {
		return nil, fmt.Errorf("trust list of %d bytes, want at most %d: %w", len(b), maxTrustList, flox.ErrBadInput)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	t := new(TrustList)
	if err := d.Decode(t); err != nil {
		return nil, fmt.Errorf("trust list: %w: %w", err, flox.ErrBadInput)
	}
	if d.More() {
		return nil, fmt.Errorf("trust list: something follows it: %w", flox.ErrBadInput)
	}
	return t, t.check()
}

// Marshal gives the list's JSON form. ErrBadInput if it is not well-formed.
func (t *TrustList) Marshal() ([]byte, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(t, "", "  ")
	return append(b, '\n'), err
}

// LoadTrustList reads a list from a file. ErrNotFound if there is none.
func LoadTrustList(path string) (*TrustList, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, iofs.ErrNotExist) {
		return nil, fmt.Errorf("trust list %s: %w", path, flox.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("trust list: %w", err)
	}
	t, err := ParseTrustList(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

// Save writes the list to a file so that after a crash or a power cut either the
// old or the new list is there.
func (t *TrustList) Save(path string) (err error) {
	b, err := t.Marshal()
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, filepath.Base(path)+".*.tmp")
	if err != nil {
		return fmt.Errorf("save trust list: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("save trust list %s: %w", path, err)
		}
	}()
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
