// Package backup keeps backups of a storehouse in a place: a directory or a
// bucket. It knows how content, facts and keys lie there, that nobody else
// writes meanwhile, and how to read back every byte of it checked. DESIGN.md says
// what is written where.
//
// It must not know what a block, a record of the facts or a secret means.
package backup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content/pack"
)

// Objects of a place.
const (
	formatName    = "flox-backup.json"
	locksPrefix   = "locks/"
	contentPrefix = "content/"
	backupsPrefix = "backups/"
)

// format is the newest format of a place this program knows.
const format = 1

// quiet is how long the place may take for a call, or without taking or giving a
// byte.
const quiet = time.Minute

// Place holds backups. It is safe for concurrent use.
type Place struct {
	bucket pack.Bucket
	log    *slog.Logger
}

// placeFormat is flox-backup.json.
type placeFormat struct {
	Format int       `json:"format"`
	Made   time.Time `json:"made"`
}

// Open opens a place that holds backups. Errors: ErrNotFound when it is none,
// ErrBadInput when a newer program wrote it, ErrUnreachable, ErrDenied.
func Open(ctx context.Context, b pack.Bucket, log *slog.Logger) (*Place, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p := &Place{bucket: b, log: log}
	text, err := p.read(ctx, formatName, 4<<10)
	if errors.Is(err, flox.ErrNotFound) {
		return nil, fmt.Errorf("%s holds no backups (there is no %s): %w", b, formatName, flox.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	f := placeFormat{}
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, fmt.Errorf("%s: %s: %w: %w", b, formatName, err, flox.ErrCorrupt)
	}
	if f.Format != format {
		return nil, fmt.Errorf("%s holds backups in format %d, this program knows %d: use the program that made them: %w", b, f.Format, format, flox.ErrBadInput)
	}
	return p, nil
}

// Make is Open, and makes a place of an empty directory or bucket. ErrBadInput if
// that holds something else.
func Make(ctx context.Context, b pack.Bucket, log *slog.Logger) (*Place, error) {
	p, err := Open(ctx, b, log)
	if !errors.Is(err, flox.ErrNotFound) {
		return p, err
	}
	p = &Place{bucket: b, log: log}
	if log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	found := ""
	err = p.list(ctx, "", func(o object) error {
		if found = o.name; found != "" {
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return nil, err
	}
	if found != "" {
		return nil, fmt.Errorf("%s holds something that is no backup (%s): name an empty directory, or a bucket of its own: %w", b, found, flox.ErrBadInput)
	}
	text, err := json.Marshal(placeFormat{Format: format, Made: time.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return nil, err
	}
	return p, p.put(ctx, formatName, append(text, '\n'))
}

// errEnough ends a listing early.
var errEnough = errors.New("enough")

// String is where the place is, for messages.
func (p *Place) String() string { return p.bucket.String() }

// object is one of a listing.
type object struct {
	name     string
	size     int64
	modified time.Time
}

// list calls f with every object whose name begins with prefix.
func (p *Place) list(ctx context.Context, prefix string, f func(object) error) error {
	ctx, reset, stop := untilQuiet(ctx)
	defer stop()
	return p.bucket.List(ctx, prefix, func(name string, size int64, modified time.Time) error {
		reset()
		return f(object{name, size, modified})
	})
}

// put stores an object durably, whole or not at all.
func (p *Place) put(ctx context.Context, name string, b []byte) error {
	ctx, reset, stop := untilQuiet(ctx)
	defer stop()
	in := bytes.NewReader(b)
	return p.bucket.Put(ctx, name, readFunc(func(b []byte) (int, error) {
		reset()
		return in.Read(b)
	}))
}

// read reads an object of at most most bytes.
func (p *Place) read(ctx context.Context, name string, most int64) ([]byte, error) {
	b, err := p.part(ctx, name, 0, -1, most+1)
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s: %s has more than %d bytes: %w", p, name, most, flox.ErrCorrupt)
	}
	return b, err
}

// part reads n bytes of an object from off on, at most most; n < 0 = to the end.
func (p *Place) part(ctx context.Context, name string, off, n, most int64) ([]byte, error) {
	ctx, reset, stop := untilQuiet(ctx)
	defer stop()
	in, err := p.bucket.Get(ctx, name, off, n)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	return io.ReadAll(io.LimitReader(readFunc(func(b []byte) (int, error) {
		reset()
		return in.Read(b)
	}), most))
}

type readFunc func([]byte) (int, error)

// Read implements io.Reader.
func (f readFunc) Read(b []byte) (int, error) { return f(b) }

// untilQuiet gives a context that ends when reset was not called for a while.
func untilQuiet(ctx context.Context) (_ context.Context, reset, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(quiet, func() {
		cancel(fmt.Errorf("nothing moved for %v: %w", quiet, flox.ErrUnreachable))
	})
	return ctx, func() { timer.Reset(quiet) }, func() {
		timer.Stop()
		cancel(nil)
	}
}

// plainName reports whether a name of a backup can only be one.
func plainName(name string) bool {
	return len(name) > 0 && len(name) <= 64 && !strings.ContainsFunc(name, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && r != '-'
	})
}
