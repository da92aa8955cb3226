package storehouse

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/p2p"
)

// swarmSecretBytes is the length of the secret members share.
const swarmSecretBytes = 32

// fixed is what can never change in a state directory (storehouse.json): names
// and hashes all over the place are made of it.
type fixed struct {
	Format   int           `json:"format"`
	Name     string        `json:"name"`
	StoreDir flox.StoreDir `json:"store_dir"`
}

// identity is who this server is and what it signs with.
type identity struct {
	fixed
	machine ed25519.PrivateKey
	peer    p2p.PeerID
	ring    *keyring
	joined  *api.Invite      // what a server that joined others was told; nil = the first one
	others  []api.InvitePeer // the other servers, as they are known without the log
}

// Names in the state directory. joinedName is the file that makes its server one
// of those named in it, instead of the first of a new storehouse.
const (
	joinedName     = "joined.json"
	fixedName      = "storehouse.json"
	keysDir        = "keys"
	machineKeyName = "machine.key"
)

// loadIdentity reads the identity in cfg.StateDir, making what is missing. The
// caller has the directory for itself.
func loadIdentity(cfg Config) (*identity, error) {
	id := &identity{ring: newKeyring()}
	inv, err := api.LoadInvite(filepath.Join(cfg.StateDir, joinedName))
	switch {
	case err == nil:
		id.joined = inv
		if cfg.Name == "" {
			cfg.Name = inv.Name
		}
	case !errors.Is(err, os.ErrNotExist) && !errors.Is(err, flox.ErrNotFound):
		return nil, err
	}
	if err := id.loadFixed(cfg); err != nil {
		return nil, err
	}
	if id.others, err = loadOthers(cfg.StateDir, id.joined); err != nil {
		return nil, err
	}
	dir := filepath.Join(cfg.StateDir, keysDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make key directory: %w", err)
	}
	if id.machine, err = p2p.LoadOrCreateKey(filepath.Join(dir, machineKeyName)); err != nil {
		return nil, err
	}
	if id.peer, err = idOf(id.machine); err != nil {
		return nil, err
	}
	if id.joined != nil {
		// The storehouse's keys come through the log.
		id.ring.set(guestKeys(id.joined.Secret))
		return id, nil
	}
	if _, err := os.Stat(filepath.Join(cfg.StateDir, restoredName)); err == nil {
		return id, nil // they are in the log
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read state directory: %w", err)
	}
	if inLog, err := keysInLog(cfg.StateDir); err != nil || inLog {
		return id, err
	}
	first, err := ownKeys(cfg, dir, id.Name)
	if err != nil {
		return nil, err
	}
	id.ring.set(first)
	return id, nil
}

// idOf is the name of the machine with a key.
func idOf(key ed25519.PrivateKey) (p2p.PeerID, error) {
	public, _ := key.Public().(ed25519.PublicKey)
	return p2p.IDFromKey(public)
}

// ownKeys reads the keys that the first server begins with, making what is missing.
func ownKeys(cfg Config, dir, name string) (*keys, error) {
	nixKey, err := signingKey(filepath.Join(dir, nixKeyName), name+"-1")
	if err != nil {
		return nil, err
	}
	manifestKey, err := signingKey(filepath.Join(dir, manifestName), name+"-1")
	if err != nil {
		return nil, err
	}
	secret, err := secretFile(filepath.Join(dir, swarmName), rand.Text)
	if err != nil {
		return nil, err
	}
	token, err := secretFile(cfg.UploadTokenFile, rand.Text)
	if err != nil {
		return nil, err
	}
	return parseKeys(&floxv1.ClusterSecrets{
		NixKeys: []string{nixKey.String()}, ManifestKeys: []string{manifestKey.String()},
		SwarmSecrets: [][]byte{swarmSecret(secret)}, UploadToken: token,
	})
}

// swarmSecret is the members' secret of the text in its file: the hash gives it its length.
func swarmSecret(text string) []byte {
	sum := content.Hash([]byte("flox-swarm-1;" + text))
	return sum[:swarmSecretBytes]
}

// loadFixed reads storehouse.json or writes the first one, and refuses a
// configuration that says otherwise.
func (id *identity) loadFixed(cfg Config) error {
	path := filepath.Join(cfg.StateDir, fixedName)
	err := readNote(path, &id.fixed)
	if errors.Is(err, os.ErrNotExist) {
		id.fixed = fixed{Format: 1, Name: cfg.Name, StoreDir: cfg.StoreDir}
		if id.Name == "" {
			if id.Name, err = os.Hostname(); err != nil {
				return fmt.Errorf("the storehouse needs a name: %w", err)
			}
		}
		return writeNote(path, id.fixed, 0o644)
	}
	if errors.Is(err, flox.ErrCorrupt) {
		return fmt.Errorf("%w: it is damaged; put back what it was, or, where other servers have everything, let this one join anew with an empty state directory: %w", err, flox.ErrBadInput)
	}
	if err != nil {
		return err
	}
	if id.Format != 1 {
		return fmt.Errorf("%s is not of this program (format %d, want 1); use another state directory: %w", path, id.Format, flox.ErrBadInput)
	}
	if id.StoreDir != cfg.StoreDir {
		return fmt.Errorf("%s was made for the store directory %s, the configuration says %s: every path's name depends on it; change the configuration or begin in another directory: %w",
			cfg.StateDir, id.StoreDir, cfg.StoreDir, flox.ErrBadInput)
	}
	if cfg.Name != "" && id.Name != cfg.Name {
		return fmt.Errorf("%s belongs to the storehouse %q, the configuration says %q: keys carry the name; change the configuration or begin in another directory: %w",
			cfg.StateDir, id.Name, cfg.Name, flox.ErrBadInput)
	}
	return nil
}

// NameIn gives the name of the storehouse whose server a state directory holds.
// os.ErrNotExist where it holds none, ErrCorrupt where the file with the name is damaged.
func NameIn(stateDir string) (string, error) {
	var names fixed
	err := readNote(filepath.Join(stateDir, fixedName), &names)
	return names.Name, err
}

// signingKey reads a key file in Nix's format or makes one.
func signingKey(path, name string) (nix.SecretKey, error) {
	text, err := secretFile(path, func() string {
		key, err := nix.GenerateKey(name)
		if err != nil {
			return ""
		}
		return key.String()
	})
	if err != nil {
		return nix.SecretKey{}, err
	}
	key, err := nix.ParseSecretKey(text)
	if err != nil {
		return nix.SecretKey{}, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// secretFile reads the one line of a secret file, or makes one (mode 0600). A
// file that others may read is refused.
func secretFile(path string, make func() string) (string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		text := make()
		if text == "" {
			return "", fmt.Errorf("make %s: no secret could be made", path)
		}
		return text, writeFile(path, []byte(text+"\n"), 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("read secret: %w", err)
	}
	st, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("read secret: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s can be read by others (mode %04o): chmod 600 it, and replace the secret if others were about: %w", path, st.Mode().Perm(), flox.ErrDenied)
	}
	text := strings.TrimSpace(string(b))
	if len(text) < 16 || strings.ContainsAny(text, " \t\r\n") {
		return "", fmt.Errorf("%s: want one line of at least 16 characters; remove the file to have it made anew: %w", path, flox.ErrBadInput)
	}
	return text, nil
}

// firstTrust is the list a new storehouse begins with.
func (id *identity) firstTrust() (*content.TrustList, error) {
	have, err := id.ring.get()
	if err != nil {
		return nil, err
	}
	list := &content.TrustList{
		Version: 1, Epoch: 1,
		NixKeys: public(have.nix), ManifestKeys: public(have.manifest), Voters: []string{string(id.peer)},
	}
	return list, list.Sign(have.manifest[0])
}

// writeFile writes a file durably, whole or not at all.
func writeFile(path string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name()) //nolint:errcheck // renamed already when all went well
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
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
		return fmt.Errorf("write %s: %w", path, err)
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
