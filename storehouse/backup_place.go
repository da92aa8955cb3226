package storehouse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"log/slog"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/pack/bucket"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	"github.com/floxctl/flox/storehouse/backup"
)

// openBackup opens the directory or bucket of backups. With create a directory is
// made, if allowed takes it.
func openBackup(ctx context.Context, where string, create bool, allowed func(dir string) error) (b *bucket.Bucket, err error) {
	at, dir := where, ""
	if strings.Contains(where, "://") {
		u, err := url.Parse(where)
		if err != nil {
			return nil, fmt.Errorf("%q: want a directory, s3://NAME or file:///DIRECTORY: %w", where, flox.ErrBadInput)
		}
		if u.Scheme == "file" {
			dir = u.Path
		}
	} else {
		dir = where
		at = (&url.URL{Scheme: "file", Path: where}).String()
	}
	if strings.HasPrefix(at, "file:") {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("%q: want an absolute directory, s3://NAME or file:///DIRECTORY: %w", where, flox.ErrBadInput)
		}
		if err := allowed(dir); err != nil {
			return nil, err
		}
		if err := backupDirectory(dir, create); err != nil {
			return nil, err
		}
	}
	return bucket.Open(ctx, at)
}

// backupDirectory checks, or makes, a directory for backups.
func backupDirectory(dir string, create bool) error {
	st, err := os.Stat(dir)
	if errors.Is(err, iofs.ErrNotExist) && create {
		if err = os.MkdirAll(dir, 0o700); err == nil {
			return nil
		}
	}
	me := "this program's user"
	if u, userErr := user.LookupId(strconv.Itoa(os.Geteuid())); userErr == nil { // Current remembers who started it
		me = u.Username
	}
	switch {
	case errors.Is(err, iofs.ErrNotExist):
		return fmt.Errorf("%s does not exist: %w", dir, flox.ErrNotFound)
	case errors.Is(err, iofs.ErrPermission):
		return fmt.Errorf("%s: the storehouse runs as the user %s, who may not get there: make it for that user: install -d -o %s -m 700 %s: %w", dir, me, me, dir, flox.ErrDenied)
	case err != nil:
		return fmt.Errorf("%s: %w: %w", dir, err, flox.ErrBadInput)
	case !st.IsDir():
		return fmt.Errorf("%s is no directory: %w", dir, flox.ErrBadInput)
	}
	need, verb := uint32(unix.R_OK|unix.X_OK), "read"
	if create {
		need, verb = need|unix.W_OK, "write to"
	}
	if err := unix.Access(dir, need); err != nil {
		return fmt.Errorf("the user %s may not %s %s: give it to that user: chown -R %s %s: %w", me, verb, dir, me, dir, flox.ErrDenied)
	}
	return nil
}

// backupKeys is what is encrypted in a backup, as JSON: all that a storehouse cannot
// be itself without, so that even without the facts its keys are not lost.
type backupKeys struct {
	Format  int    `json:"format"`
	Peer    string `json:"peer"`    // of the server that wrote it
	Machine []byte `json:"machine"` // its machine.key, to which the cluster's secrets in the facts are sealed
	Secrets []byte `json:"secrets"` // ClusterSecrets
	Name    string `json:"name"`    // of the storehouse
}

// sealedKeys gives the keys that belong to the facts of the backup, encrypted.
func (b *backingUp) sealedKeys() ([]byte, error) {
	sealed, err := members.Secrets(b.state.View(members.Kind))
	if errors.Is(err, flox.ErrNotFound) {
		return nil, fmt.Errorf("the storehouse's keys are not in its log yet; they will be in a moment, try again: %w", flox.ErrUnreachable)
	}
	if err != nil {
		return nil, err
	}
	secrets, err := openSecrets(sealed, b.id.peer, b.id.machine)
	if err != nil {
		return nil, err
	}
	k := backupKeys{Format: 1, Peer: string(b.id.peer), Name: b.cfg.Name}
	if k.Secrets, err = stable.Marshal(secrets); err != nil {
		return nil, err
	}
	if k.Machine, err = os.ReadFile(filepath.Join(b.cfg.StateDir, keysDir, machineKeyName)); err != nil {
		return nil, fmt.Errorf("backup of the machine key: %w", err)
	}
	text, err := json.Marshal(k)
	if err != nil {
		return nil, err
	}
	return backup.SealKeys(text, b.opts.Passphrase)
}

// openBackupKeys decrypts the keys of a backup.
func openBackupKeys(sealed, passphrase []byte) (*backupKeys, *floxv1.ClusterSecrets, error) {
	text, err := backup.OpenKeys(sealed, passphrase)
	if err != nil {
		return nil, nil, err
	}
	k, secrets := &backupKeys{}, &floxv1.ClusterSecrets{}
	if err := json.Unmarshal(text, k); err != nil || k.Format != 1 {
		return nil, nil, fmt.Errorf("keys of the backup, format %d: %w", k.Format, flox.ErrCorrupt) // err may quote them
	}
	if err := proto.Unmarshal(k.Secrets, secrets); err != nil {
		return nil, nil, fmt.Errorf("keys of the backup: %w", flox.ErrCorrupt)
	}
	return k, secrets, nil
}

// openPlace opens a place to read its backups.
func openPlace(ctx context.Context, from string, log *slog.Logger) (*backup.Place, func() error, error) {
	b, err := openBackup(ctx, from, false, func(string) error { return nil })
	if err != nil {
		return nil, nil, fmt.Errorf("backups in %s: %w", from, err)
	}
	place, err := backup.Open(ctx, b, log)
	if err != nil {
		return nil, nil, errors.Join(err, b.Close())
	}
	return place, b.Close, nil
}

// Backups lists the backups in a directory or bucket, oldest first.
func Backups(ctx context.Context, from string, log *slog.Logger) (list []backup.Listed, err error) {
	place, done, err := openPlace(ctx, from, log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	return place.List(ctx)
}

// peerOf is the machine that a machine.key makes.
func peerOf(file string) (*identity, error) {
	id := &identity{}
	var err error
	if id.machine, err = p2p.LoadOrCreateKey(file); err != nil {
		return nil, err
	}
	id.peer, err = idOf(id.machine)
	return id, err
}
