package pack

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/floxctl/flox"
)

// Bucket holds objects; bucket.Open gives one. Errors: ErrNotFound, ErrUnreachable,
// ErrDenied, ErrFull.
type Bucket interface {
	// Put stores an object, all or nothing, and returns when it is durable.
	Put(ctx context.Context, name string, r io.Reader) error
	// Get reads n bytes from off on; n < 0 = to the end.
	Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error)
	// List calls f with every object whose name begins with prefix.
	List(ctx context.Context, prefix string, f func(name string, size int64, modified time.Time) error) error
	// Delete removes an object; that it is not there is no error.
	Delete(ctx context.Context, name string) error
	// String is for messages.
	String() string
}

// BucketConfig says where packs live if not on the local disk.
type BucketConfig struct {
	Bucket Bucket
	// Server is this server's name in the bucket, which no other has: 1 to 64 letters,
	// digits and "-".
	Server string
	// CacheBytes bounds what is kept on the local disk of what the bucket has;
	// default 10 GiB.
	CacheBytes int64
	// Grace is how long a pack stays in the bucket after its blocks were moved or
	// forgotten: longer than any Session and than any server is away while it serves;
	// default 24 h.
	Grace time.Duration
	// Refresh is how often Run looks what the other servers put there; default 1 min.
	Refresh time.Duration
}

var serverName = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)

func (c *BucketConfig) check() error {
	if c.Bucket == nil || !serverName.MatchString(c.Server) {
		return fmt.Errorf("block store: a bucket wants a Bucket and a Server name of 1 to 64 letters, digits and \"-\", not %q: %w", c.Server, flox.ErrBadInput)
	}
	setDefault(&c.CacheBytes, 10<<30)
	setDefault(&c.Grace, 24*time.Hour)
	setDefault(&c.Refresh, time.Minute)
	if c.CacheBytes < 0 || c.Grace < 0 || c.Refresh < 0 {
		return fmt.Errorf("block store: CacheBytes, Grace and Refresh of a bucket must not be negative: %w", flox.ErrBadInput)
	}
	return nil
}

func setDefault[T int64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Objects of a pack named SERVER/EPOCH-NUMBER. The pack is there when its index is.
const (
	packPrefix      = "packs/"
	indexPrefix     = "index/"
	condemnedPrefix = "condemned/"
)

// remote is a Store's side of its bucket.
type remote struct {
	BucketConfig
	// epoch makes the names of packs unique: a new one for every local directory.
	epoch string
	cache *rangeCache

	mu        sync.Mutex // guards what follows
	refreshed time.Time  // when the bucket was last looked through
	inVain    time.Time  // when it last was for a block that it does not have
	down      error      // why the bucket did not take a pack, nil = it does
	since     time.Time  // of down
	retry     time.Time  // before that nobody asks it again
	wait      time.Duration
}

// A bucket that fails is asked again after minWait, then after longer and longer.
const (
	minWait = 500 * time.Millisecond
	maxWait = 30 * time.Second
)

// epochName is the file that holds the epoch: a store that has one had a bucket.
const epochName = "epoch"

func (s *Store) openBucket() error {
	cfg, path := s.cfg.Bucket, filepath.Join(s.cfg.Dir, epochName)
	if cfg == nil {
		if _, err := os.Stat(path); err == nil {
			return fmt.Errorf("block store %s keeps its packs in a bucket, and none is configured: configure the same one: %w", s.cfg.Dir, flox.ErrBadInput)
		}
		return nil
	}
	epoch, err := loadEpoch(path)
	if err != nil {
		return fmt.Errorf("block store: %w", err)
	}
	r := &remote{BucketConfig: *cfg, epoch: epoch}
	r.cache, err = openCache(filepath.Join(s.cfg.Dir, "cache"), cfg.CacheBytes, r.get, s.dropLocal)
	if err != nil {
		return fmt.Errorf("block store: %w", err)
	}
	s.remote = r
	return nil
}

// loadEpoch reads the epoch, or makes one.
func loadEpoch(path string) (string, error) {
	b, err := os.ReadFile(path)
	if epoch := strings.TrimSpace(string(b)); err == nil && len(epoch) == 16 {
		return epoch, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	random := make([]byte, 8)
	_, _ = rand.Read(random) // never fails
	epoch := hex.EncodeToString(random)
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(epoch + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	return epoch, errors.Join(err, syncDir(filepath.Dir(path)))
}

// nameOf gives the name of a pack written here.
func (r *remote) nameOf(id uint32) string { return fmt.Sprintf("%s/%s-%08d", r.Server, r.epoch, id) }

// numberOf is the other way round.
func (r *remote) numberOf(name string) (uint32, bool) {
	digits, ok := strings.CutPrefix(name, r.Server+"/"+r.epoch+"-")
	n, err := strconv.ParseUint(digits, 10, 32)
	return uint32(n), ok && err == nil
}

// owns says whether a pack is this server's to remove.
func (r *remote) owns(name string) bool { return strings.HasPrefix(name, r.Server+"/") }

// bucketTime is how long the bucket may take for a call, or without taking or
// giving a byte.
const bucketTime = time.Minute

// get reads a range of a pack.
func (r *remote) get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, bucketTime)
	defer cancel()
	in, err := r.Bucket.Get(ctx, packPrefix+name, off, n)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	b := make([]byte, n)
	got, err := io.ReadFull(in, b)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return b[:got], nil
	}
	return b, err
}

// put stores an object, and gives up when the bucket takes nothing of it any more.
func (r *remote) put(ctx context.Context, name string, in io.Reader) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stalled := time.AfterFunc(bucketTime, cancel)
	defer stalled.Stop()
	return r.Bucket.Put(ctx, name, readerFunc(func(b []byte) (int, error) {
		stalled.Reset(bucketTime)
		return in.Read(b)
	}))
}

// list is Bucket.List, and gives up when nothing comes any more.
func (r *remote) list(ctx context.Context, prefix string, f func(name string, at time.Time) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stalled := time.AfterFunc(bucketTime, cancel)
	defer stalled.Stop()
	return r.Bucket.List(ctx, prefix, func(name string, _ int64, at time.Time) error {
		stalled.Reset(bucketTime)
		return f(strings.TrimPrefix(name, prefix), at)
	})
}

type readerFunc func([]byte) (int, error)

// Read implements io.Reader.
func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// ready refuses what needs the bucket while it is away and was asked just now.
func (r *remote) ready() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down == nil || !time.Now().Before(r.retry) {
		return nil
	}
	return fmt.Errorf("bucket %s takes nothing since %s, uploads are refused until it does, asked again in %s: %w",
		r.Bucket, r.since.Format(time.DateTime), time.Until(r.retry).Round(time.Millisecond), r.down)
}

// note notes whether the bucket works; it gives err back.
func (r *remote) note(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return err // says nothing about the bucket
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		r.down, r.wait = nil, 0
		return nil
	}
	if r.down == nil {
		r.since = time.Now()
	}
	r.wait = min(max(2*r.wait, minWait), maxWait)
	r.down, r.retry = err, time.Now().Add(r.wait)
	return fmt.Errorf("bucket %s takes nothing, uploads are refused until it does: %w", r.Bucket, err)
}
