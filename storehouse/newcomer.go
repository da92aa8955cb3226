package storehouse

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/p2p"
)

// Newcomer is a state directory whose server joins the servers of a storehouse,
// or joined them before.
type Newcomer struct {
	// Key is the machine's identity.
	Key ed25519.PrivateKey
	// SealKey is what the storehouse's secrets are sealed to for this server.
	SealKey []byte
	// Joined is what it was told when it joined before; nil = it has not.
	Joined *api.Invite

	dir string
}

// MachineKey reads the identity of the server in a state directory (Config.StateDir),
// which the caller knows to be there.
func MachineKey(stateDir string) (ed25519.PrivateKey, error) {
	return p2p.LoadOrCreateKey(filepath.Join(stateDir, keysDir, machineKeyName))
}

// OpenNewcomer makes a state directory (Config.StateDir) and the key in it, or
// reads what is there. ErrBusy if it holds a storehouse of its own already.
func OpenNewcomer(stateDir string) (*Newcomer, error) {
	n := &Newcomer{dir: stateDir}
	var err error
	if n.Joined, err = api.LoadInvite(filepath.Join(stateDir, joinedName)); err != nil && !errors.Is(err, flox.ErrNotFound) {
		return nil, err
	}
	if _, err := os.Lstat(filepath.Join(stateDir, fixedName)); err == nil && n.Joined == nil {
		return nil, fmt.Errorf("%s holds a storehouse of its own, which cannot become a part of another one: choose another state directory, or put it away with floxctl leave: %w", stateDir, flox.ErrBusy)
	}
	keys := filepath.Join(stateDir, keysDir)
	if err := os.MkdirAll(keys, 0o700); err != nil {
		return nil, fmt.Errorf("make key directory: %w", err)
	}
	if n.Key, err = MachineKey(stateDir); err != nil {
		return nil, err
	}
	_, public, err := sealKey(n.Key)
	if err != nil {
		return nil, err
	}
	n.SealKey = public[:]
	return n, nil
}

// Keep makes the next start of the server here one of those that inv names. It
// is durable when Keep returns.
func (n *Newcomer) Keep(inv *api.Invite) error {
	if err := inv.Save(filepath.Join(n.dir, joinedName)); err != nil {
		return err
	}
	n.Joined = inv
	return nil
}
