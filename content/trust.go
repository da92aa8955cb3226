package content

import (
	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Statement is what a manifest key signs: that the NAR of a store path and the
// manifest are the same tree,
// "flox-manifest-1;storePath;narHash;narSize;refs;manifestCID".
func Statement(dir flox.StoreDir, info *flox.PathInfo) string { return "" }

// TrustList says whose signatures hold. Lists form a chain: each is signed by a
// manifest key of the one before, the first is known by its fingerprint.
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

// Canonical gives the bytes that are signed and fingerprinted: everything but
// the signatures.
func (t *TrustList) Canonical() ([]byte, error) { return nil, flox.ErrClosed }

// Fingerprint names the list, signatures left out.
func (t *TrustList) Fingerprint() (flox.CID, error) { return flox.CID{}, flox.ErrClosed }

// Sign adds key's signature.
func (t *TrustList) Sign(key nix.SecretKey) error { return flox.ErrClosed }

// CheckFirst checks that t is the list an invite's fingerprint means.
// ErrUntrusted otherwise.
func (t *TrustList) CheckFirst(fingerprint flox.CID) error { return flox.ErrClosed }

// Newer checks that next follows old: one version on, the epoch not lower, Prev
// old's fingerprint, signed by one of old's manifest keys. ErrUntrusted otherwise.
func Newer(old, next *TrustList) error { return flox.ErrClosed }

// VerifyInfo checks that a manifest key of the list signed info's statement.
// ErrUntrusted otherwise.
func (t *TrustList) VerifyInfo(dir flox.StoreDir, info *flox.PathInfo) error { return flox.ErrClosed }

// ParseTrustList decodes and checks a list's JSON form.
func ParseTrustList(b []byte) (*TrustList, error) { return nil, flox.ErrClosed }

// LoadTrustList reads a list from a file. ErrNotFound if there is none.
func LoadTrustList(path string) (*TrustList, error) { return nil, flox.ErrClosed }

// Save writes the list to a file so that after a crash or a power cut either the
// old or the new list is there.
func (t *TrustList) Save(path string) error { return flox.ErrClosed }
