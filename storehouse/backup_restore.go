package storehouse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/pack"
	"github.com/floxctl/flox/members"
	"github.com/floxctl/flox/p2p"
	cluster "github.com/floxctl/flox/raft"
	"github.com/floxctl/flox/storehouse/backup"
)

const (
	// restoringName is a file in a state directory that is not restored to its end.
	restoringName = "restoring.json"
	// restoringDir holds facts and indexes while a backup is restored.
	restoringDir = "restoring"
	// restoredName is a file in a state directory that came from a backup: its
	// server's keys are in the log, sealed to its machine key.
	restoredName = "restored.json"
	// restorers is how many content objects are read at once, each in memory as a whole.
	restorers = 2
)

// Phases of a restore, beside those of a backup.
const phaseCheck = "check"

// RestoreOptions say what Restore restores.
type RestoreOptions struct {
	// From is the directory or bucket of the backups, Backup the name of one; "" = the newest.
	From, Backup string
	// Passphrase opens the keys.
	Passphrase []byte
	// NewKey makes the server a new machine, under a peer ID that no agent knows yet.
	// Default: it is the one that wrote the backup.
	NewKey bool
	// Progress, if set, is told how far it is, in bytes.
	Progress func(phase string, done, total uint64)
}

// Restored is what Restore did, also as restored.json.
type Restored struct {
	Backup     string        `json:"backup"`
	From       string        `json:"from"`
	At         time.Time     `json:"at"`
	Index      uint64        `json:"index"` // of the log
	Storehouse string        `json:"storehouse"`
	StoreDir   flox.StoreDir `json:"storeDir"`
	Peer       string        `json:"peer"`
	Paths      uint64        `json:"paths"`
	Bytes      uint64        `json:"bytes"` // of content objects read
}

// restoreMark is restoring.json.
type restoreMark struct {
	Backup string `json:"backup"`
	From   string `json:"from"`
}

// Restore makes a storehouse of one server out of a backup, in cfg.StateDir, which
// must be empty or hold what an earlier Restore did not finish: that goes on where
// it was. Before it is finished no server starts there. The first start begins a new
// epoch: agents of the storehouse that was lost go on with it, and the other servers
// of that are members no more. A backup that is not whole is refused, each damage
// is reported. Errors: ErrBadInput, ErrBusy, ErrCorrupt, ErrDenied for a wrong
// passphrase, ErrFull, ErrNotFound, ErrUnreachable.
func Restore(ctx context.Context, cfg Config, opts RestoreOptions, report func(BackupDamage)) (done *Restored, err error) {
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	unlock, err := lockState(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	place, closePlace, err := openPlace(ctx, opts.From, cfg.Log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, closePlace()) }()
	m, err := place.Manifest(ctx, opts.Backup)
	if err != nil {
		return nil, err
	}
	r := &restoring{cfg: cfg, opts: opts, place: place, m: m, tell: report}
	if err := r.check(); err != nil {
		return nil, err
	}
	if err := r.run(ctx); err != nil {
		return nil, fmt.Errorf("restore %s from %s: %w", m.Name, opts.From, err)
	}
	return &r.done, nil
}

// restoring is one Restore.
type restoring struct {
	cfg   Config
	opts  RestoreOptions
	place *backup.Place
	m     *backup.Manifest
	tell  func(BackupDamage)
	v     *verifying
	id    *identity // of the new server
	live  *liveBlocks
	done  Restored
}

func (r *restoring) file(name string) string { return filepath.Join(r.cfg.StateDir, name) }

func (r *restoring) progress(phase string, done, total uint64) {
	if r.opts.Progress != nil {
		r.opts.Progress(phase, done, total)
	}
}

// check refuses a state directory that is in use, and a backup of another storehouse.
func (r *restoring) check() error {
	if r.m.StoreDir != r.cfg.StoreDir {
		return fmt.Errorf("backup %s is of a storehouse for the store directory %s, the configuration says %s: every path's name depends on it; change the configuration: %w",
			r.m.Name, r.m.StoreDir, r.cfg.StoreDir, flox.ErrBadInput)
	}
	if r.cfg.Name != "" && r.cfg.Name != r.m.Storehouse {
		return fmt.Errorf("backup %s is of the storehouse %q, the configuration says %q: keys carry the name; change the configuration: %w",
			r.m.Name, r.m.Storehouse, r.cfg.Name, flox.ErrBadInput)
	}
	if len(r.opts.Passphrase) == 0 {
		return fmt.Errorf("the passphrase of the backup's keys is missing: %w", flox.ErrBadInput)
	}
	entries, err := os.ReadDir(r.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if e.Name() != "lock" {
			names = append(names, e.Name())
		}
	}
	if len(names) > 0 && !slices.Contains(names, restoringName) {
		return fmt.Errorf("%s holds something (%s): a storehouse is restored into an empty directory only; move that away: %w", r.cfg.StateDir, names[0], flox.ErrBusy)
	}
	return nil
}

func (r *restoring) run(ctx context.Context) error {
	mark, err := json.Marshal(restoreMark{r.m.Name, r.opts.From})
	if err == nil {
		err = writeFile(r.file(restoringName), append(mark, '\n'), 0o600)
	}
	// Of an earlier one only content is of use.
	for _, name := range []string{restoringDir, "raft", keysDir, restoredName, newEpochName} {
		if err == nil {
			err = os.RemoveAll(r.file(name))
		}
	}
	if err == nil {
		err = os.Mkdir(r.file(restoringDir), 0o700)
	}
	if err != nil {
		return err
	}
	r.v = &verifying{
		opts:  VerifyOptions{Passphrase: r.opts.Passphrase, Quick: true, Dir: r.file(restoringDir), Log: r.cfg.Log},
		place: r.place, m: r.m, done: &VerifiedBackup{Manifest: r.m}, tell: r.tell,
	}
	if err := r.v.open(ctx); err != nil {
		return err
	}
	err = r.all(ctx)
	if err = errors.Join(err, r.v.close()); err != nil {
		return err
	}
	return r.finish()
}

// all restores everything into the directory that no server starts in yet.
func (r *restoring) all(ctx context.Context) error {
	r.progress(phaseCheck, 0, 0)
	r.live = newLiveBlocks(r.v.contents.Blocks())
	r.v.need = r.live.add
	if r.v.state != nil {
		if err := r.v.paths(ctx); err != nil {
			return err
		}
	}
	if n := r.v.done.Damaged; n > 0 || r.v.state == nil || !r.v.done.KeysOpen {
		return fmt.Errorf("nothing is restored: %d parts and paths of the backup are damaged; restore another backup: %w", n, flox.ErrCorrupt)
	}
	if err := r.content(ctx); err != nil {
		return err
	}
	return r.found()
}

// content brings every block that a valid path needs into the packs.
func (r *restoring) content(ctx context.Context) (err error) {
	total := uint64(0)
	for _, o := range r.m.Content {
		total += uint64(max(o.Size, 0)) //nolint:gosec // not negative
	}
	packs, err := pack.Open(pack.Config{Dir: r.file("packs"), Reserve: int64(r.cfg.ReserveBytes), Log: r.cfg.Log}) //nolint:gosec // bounded by withDefaults
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, packs.Close()) }()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(restorers)
	var read atomic.Uint64
	for _, o := range r.m.Content {
		group.Go(func() error {
			err := r.v.contents.Read(ctx, o, func(id flox.CID, stored []byte, zstd bool) error {
				if !r.live.has(id) {
					return nil
				}
				return packs.PutStored(ctx, id, stored, zstd)
			})
			if errors.Is(err, flox.ErrCorrupt) || errors.Is(err, flox.ErrNotFound) {
				r.tell(BackupDamage{Object: o.Name(), Err: err})
				return fmt.Errorf("content is damaged; run it again with another backup: what is restored of the content stays: %w", err)
			}
			if err == nil {
				r.progress(phaseContent, read.Add(uint64(o.Size)), total) //nolint:gosec // not negative
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	r.done.Bytes = read.Load()
	return packs.Sync(context.WithoutCancel(ctx))
}

// found makes the log and the keys of the new server.
func (r *restoring) found() (err error) {
	r.progress(phaseFacts, 0, 0)
	file := filepath.Join(r.file(keysDir), machineKeyName)
	if err := os.Mkdir(r.file(keysDir), 0o700); err != nil {
		return err
	}
	state := r.v.state
	if r.opts.NewKey {
		if r.id, err = peerOf(file); err == nil {
			state, err = r.resealed()
		}
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, state.Close()) }()
	} else {
		if err := writeFile(file, r.v.keys.Machine, 0o600); err != nil {
			return err
		}
		if r.id, err = peerOf(file); err != nil {
			return err
		}
	}
	return state.Found(r.file("raft"), string(r.id.peer))
}

// resealed are the facts with the cluster's secrets sealed to the new machine.
func (r *restoring) resealed() (*cluster.State, error) {
	_, public, err := sealKey(r.id.machine)
	if err != nil {
		return nil, err
	}
	was, err := members.Secrets(r.v.state.View(members.Kind))
	if err != nil {
		return nil, err
	}
	next, err := sealSecrets(was.GetVersion()+1, r.v.secrets, map[p2p.PeerID][]byte{r.id.peer: public[:]})
	if err != nil {
		return nil, err
	}
	sealed, err := stable.Marshal(next)
	if err != nil {
		return nil, err
	}
	return cluster.BuildState(filepath.Join(r.file(restoringDir), "resealed"), r.cfg.Log, func(put func(key, value []byte) error) error {
		return r.v.state.Each(context.Background(), func(key, value []byte) error {
			if kind, own, ok := cluster.RecordKind(key); ok && kind == members.Kind && members.IsSecrets(own) {
				value = sealed
			}
			return put(key, value)
		})
	})
}

// finish writes what a server reads first, and lets it start.
func (r *restoring) finish() error {
	r.done = Restored{
		Backup: r.m.Name, From: r.opts.From, At: time.Now().UTC().Truncate(time.Second), Index: r.m.Index, Storehouse: r.m.Storehouse,
		StoreDir: r.m.StoreDir, Peer: string(r.id.peer), Paths: r.m.Paths, Bytes: r.done.Bytes,
	}
	said, err := json.MarshalIndent(r.done, "", "  ")
	if err != nil {
		return err
	}
	if err := r.token(r.v.secrets); err != nil {
		return err
	}
	err = writeNote(r.file(fixedName), fixed{Format: 1, Name: r.m.Storehouse, StoreDir: r.m.StoreDir}, 0o644)
	if err == nil {
		err = writeFile(r.file(restoredName), append(said, '\n'), 0o600)
	}
	if err == nil {
		err = AskNewEpoch(r.cfg.StateDir)
	}
	if err == nil {
		err = os.RemoveAll(r.file(restoringDir))
	}
	if err == nil {
		err = os.Remove(r.file(restoringName))
	}
	if err == nil {
		err = syncDir(r.cfg.StateDir)
	}
	return err
}

// token writes the upload token where publishers look for it.
func (r *restoring) token(secrets *floxv1.ClusterSecrets) error {
	if secrets.GetUploadToken() == "" {
		return nil
	}
	return writeFile(r.cfg.UploadTokenFile, []byte(secrets.GetUploadToken()+"\n"), 0o600)
}

// halfRestored refuses a state directory that Restore has not finished.
func halfRestored(stateDir string) error {
	b, err := os.ReadFile(filepath.Join(stateDir, restoringName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	mark := restoreMark{}
	if err == nil {
		err = json.Unmarshal(b, &mark)
	}
	return errors.Join(fmt.Errorf("%s is only in part restored from %s: restore it again, which goes on where it was: %w", stateDir, mark.From, flox.ErrBusy), err)
}
