package storehouse

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/ballast"
	"github.com/floxctl/flox/members"
	cluster "github.com/floxctl/flox/raft"
	"github.com/floxctl/flox/storehouse/backup"
)

// VerifyOptions say what VerifyBackup looks at.
type VerifyOptions struct {
	// From is the directory or bucket of the backups.
	From string
	// Backup is the name of one; "" = the newest.
	Backup string
	// Passphrase opens the keys; nil = whether they open stays unknown.
	Passphrase []byte
	// Quick leaves out reading the content itself: that every block is in an object
	// is looked up in the objects' indexes.
	Quick bool
	// Dir is an empty directory for facts and indexes while it runs.
	Dir string
	// Progress, if set, is told how many bytes of content of how many were read.
	Progress func(done, total uint64)
	Log      *slog.Logger
}

// BackupDamage is something that is wrong with a backup.
type BackupDamage struct {
	// Object is what is damaged or missing, below the directory or bucket; "" = see Path.
	Object string
	// Path is a store path that is not whole in the backup.
	Path flox.StorePath
	Err  error
}

// VerifiedBackup is what VerifyBackup proved.
type VerifiedBackup struct {
	*backup.Manifest
	Objects  int    // content objects looked at
	Read     uint64 // bytes of them that were read and checked
	Damaged  int    // objects and paths that were reported
	KeysOpen bool   // the keys open with the passphrase, and belong to the facts
}

// VerifyBackup proves that a backup can be restored, without the storehouse: the
// facts open as a state, every valid path's manifest and chunks are there and read
// back to what their CIDs say, the keys open and are those of the facts. Each damage
// is reported. The error is only of the verification itself: ErrNotFound,
// ErrUnreachable, ErrDenied for a wrong passphrase; ErrCorrupt when the manifest
// cannot be read, so that nothing can be said.
func VerifyBackup(ctx context.Context, opts VerifyOptions, report func(BackupDamage)) (done *VerifiedBackup, err error) {
	place, closePlace, err := openPlace(ctx, opts.From, opts.Log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closePlace()) }()
	m, err := place.Manifest(ctx, opts.Backup)
	if err != nil {
		return nil, err
	}
	v := &verifying{opts: opts, place: place, m: m, done: &VerifiedBackup{Manifest: m}, tell: report}
	return v.done, v.run(ctx)
}

// verifying is one VerifyBackup, and the first part of a restore.
type verifying struct {
	opts     VerifyOptions
	place    *backup.Place
	m        *backup.Manifest
	done     *VerifiedBackup
	tell     func(BackupDamage)
	state    *cluster.State // nil when the facts are damaged
	contents *backup.Contents
	keys     *backupKeys // nil without a passphrase
	secrets  *floxv1.ClusterSecrets

	need func(flox.CID) // told of every block a valid path needs; nil = nobody
	edit func(key, value []byte) ([]byte, error)
}

func (v *verifying) damage(d BackupDamage) {
	v.done.Damaged++
	v.tell(d)
}

// run looks at everything.
func (v *verifying) run(ctx context.Context) (err error) {
	if err := v.open(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.close()) }()
	if !v.opts.Quick {
		if err := v.readAll(ctx); err != nil {
			return err
		}
	}
	if v.state == nil {
		return nil // that is reported, and nothing else is known
	}
	return v.paths(ctx)
}

// open opens keys, facts and the index of the content.
func (v *verifying) open(ctx context.Context) error {
	if err := v.openKeys(ctx); err != nil {
		return err
	}
	if err := v.openFacts(ctx); err != nil {
		return err
	}
	if v.state != nil && v.keys != nil {
		if err := v.keysFit(); err != nil {
			v.damage(BackupDamage{Object: v.object(v.m.Keys.Name), Err: err})
		} else {
			v.done.KeysOpen = true
		}
	}
	var err error
	v.contents, err = v.place.OpenContents(ctx, filepath.Join(v.opts.Dir, "index"), append([]backup.Object{}, v.m.Content...), func(o backup.Object, err error) error {
		v.damage(BackupDamage{Object: o.Name(), Err: err})
		return nil
	})
	v.done.Objects = len(v.m.Content)
	if err != nil {
		return errors.Join(err, v.close())
	}
	return nil
}

// object is the name of a part of the backup.
func (v *verifying) object(part string) string { return v.m.Object(part) }

// openKeys reads the keys, and decrypts them if there is a passphrase.
func (v *verifying) openKeys(ctx context.Context) error {
	sealed, err := v.place.Keys(ctx, v.m)
	if err == nil && v.opts.Passphrase != nil {
		v.keys, v.secrets, err = openBackupKeys(sealed, v.opts.Passphrase)
	}
	if errors.Is(err, flox.ErrCorrupt) || errors.Is(err, flox.ErrNotFound) {
		v.damage(BackupDamage{Object: v.object(v.m.Keys.Name), Err: err})
		return nil
	}
	return err
}

// openFacts makes a state of the facts, in a directory of its own.
func (v *verifying) openFacts(ctx context.Context) error {
	_, free, err := ballast.Disk(v.opts.Dir)
	if err == nil && uint64(free) < 2*v.m.FactsBytes { //nolint:gosec // not negative
		err = fmt.Errorf("%s has %d bytes free, the facts of the backup take up to %d: free some space: %w", v.opts.Dir, free, 2*v.m.FactsBytes, flox.ErrFull)
	}
	if err != nil {
		return err
	}
	state, err := cluster.BuildState(filepath.Join(v.opts.Dir, "facts"), v.opts.Log, func(put func(key, value []byte) error) error {
		return v.place.ReadFacts(ctx, v.m, func(key, value []byte) error {
			if v.edit != nil {
				var err error
				if value, err = v.edit(key, value); err != nil {
					return err
				}
			}
			return put(key, value)
		})
	})
	if err == nil {
		if err = v.factsFit(state); err != nil {
			err = errors.Join(err, state.Close())
		}
	}
	if errors.Is(err, flox.ErrCorrupt) || errors.Is(err, flox.ErrNotFound) {
		v.damage(BackupDamage{Object: v.object("facts"), Err: err})
		return nil
	}
	if err == nil {
		v.state = state
	}
	return err
}

// factsFit checks that the facts are those the manifest speaks of.
func (v *verifying) factsFit(state *cluster.State) error {
	counts, err := readCounts(state.View(pathsKind))
	if err != nil {
		return err
	}
	if state.Index() != v.m.Index || counts.paths != v.m.Paths {
		return fmt.Errorf("facts of %d paths at index %d, the manifest says %d at %d: %w", counts.paths, state.Index(), v.m.Paths, v.m.Index, flox.ErrCorrupt)
	}
	return nil
}

// keysFit checks that a server with the machine key of the backup would have the
// keys that the facts' trust list is about.
func (v *verifying) keysFit() error {
	id, err := v.identity()
	if err != nil {
		return err
	}
	sealed, err := members.Secrets(v.state.View(members.Kind))
	if err != nil {
		return fmt.Errorf("the facts hold no keys: %w", err)
	}
	secrets, err := openSecrets(sealed, id.peer, id.machine)
	if err != nil {
		return err
	}
	have, err := parseKeys(secrets)
	if err != nil {
		return err
	}
	lists, err := readTrust(v.state.View(pathsKind), 0)
	if err != nil || len(lists) == 0 {
		return fmt.Errorf("the facts hold no trust list: %w", errors.Join(err, flox.ErrCorrupt))
	}
	list, err := content.ParseTrustList(lists[len(lists)-1])
	if err != nil {
		return err
	}
	if !slices.Contains(list.ManifestKeys, have.manifest[0].Public().String()) {
		return fmt.Errorf("the key that signs, %s, is not in trust list version %d: %w", have.manifest[0].Public(), list.Version, flox.ErrCorrupt)
	}
	return nil
}

// identity is the server that wrote the backup.
func (v *verifying) identity() (*identity, error) {
	file := filepath.Join(v.opts.Dir, machineKeyName)
	if err := writeFile(file, v.keys.Machine, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(file) //nolint:errcheck // the directory goes too
	id, err := peerOf(file)
	if err == nil && string(id.peer) != v.keys.Peer {
		err = fmt.Errorf("the machine key is that of %s, not of %s: %w", id.peer, v.keys.Peer, flox.ErrCorrupt)
	}
	return id, err
}

// readAll reads every content object of the backup.
func (v *verifying) readAll(ctx context.Context) error {
	total := uint64(0)
	for _, o := range v.m.Content {
		total += uint64(max(o.Size, 0)) //nolint:gosec // not negative
	}
	for _, o := range v.m.Content {
		err := v.contents.Read(ctx, o, func(flox.CID, []byte, bool) error { return ctx.Err() })
		switch {
		case errors.Is(err, flox.ErrCorrupt):
			// One whose index could not be read was reported.
			if v.contents.Drop(o) {
				v.damage(BackupDamage{Object: o.Name(), Err: err})
			}
		case errors.Is(err, flox.ErrNotFound):
		case err != nil:
			return err
		default:
			v.done.Read += uint64(o.Size) //nolint:gosec // not negative
		}
		if v.opts.Progress != nil {
			v.opts.Progress(v.done.Read, total)
		}
	}
	return nil
}

// paths looks at every valid path.
func (v *verifying) paths(ctx context.Context) error {
	r := v.state.View(pathsKind)
	return eachInfo(ctx, r, func(name string, _ flox.CID, value []byte) error {
		m := &floxv1.PathInfo{}
		if err := proto.Unmarshal(value, m); err != nil {
			return fmt.Errorf("facts of %q: %w: %w", name, err, flox.ErrCorrupt)
		}
		info, err := api.ToPathInfo(m)
		if err == nil {
			err = v.path(ctx, r, info)
		}
		if errors.Is(err, flox.ErrNotFound) || errors.Is(err, flox.ErrCorrupt) || errors.Is(err, flox.ErrBadInput) {
			v.damage(BackupDamage{Path: flox.StorePath(name), Err: err})
			return nil
		}
		return err
	})
}

// path says what of a path is not there. Whether blocks are what their CIDs say was
// looked at before, or is not asked.
func (v *verifying) path(ctx context.Context, r *cluster.Reader, info *flox.PathInfo) error {
	for _, ref := range info.References {
		if other, err := readInfo(r, ref.HashPart()); err != nil || other.GetPath() != string(ref) {
			return fmt.Errorf("it refers to %s, which is not valid: %w", ref, errors.Join(err, flox.ErrCorrupt))
		}
	}
	m, err := content.OpenManifest(ctx, info.Manifest, v.contents)
	if err != nil {
		return err
	}
	if m.NarSize() != info.NarSize {
		return fmt.Errorf("a manifest of %d bytes of NAR, the facts say %d: %w", m.NarSize(), info.NarSize, flox.ErrCorrupt)
	}
	var failed error
	err = m.Blocks(ctx, func(id flox.CID, _ uint32) bool {
		if v.need != nil {
			v.need(id)
		}
		var there bool
		if there, failed = v.contents.Has(id); failed == nil && !there {
			failed = fmt.Errorf("block %s is not in the backup: %w", id, flox.ErrNotFound)
		}
		return failed == nil
	})
	return errors.Join(failed, err)
}

// close lets go of everything, and removes what it wrote.
func (v *verifying) close() (err error) {
	if v.contents != nil {
		err = v.contents.Close()
		v.contents = nil
	}
	if v.state != nil {
		err = errors.Join(err, v.state.Close())
		v.state = nil
	}
	return errors.Join(err, os.RemoveAll(filepath.Join(v.opts.Dir, "facts")), os.RemoveAll(filepath.Join(v.opts.Dir, "index")))
}
