package backup

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
)

const (
	// renewEvery is how often whoever writes says that it still does.
	renewEvery = 30 * time.Second
	// staleAfter is how long a writer that says nothing any more keeps others away.
	staleAfter = 5 * time.Minute
	// maxLock bounds a lock object.
	maxLock = 4 << 10
)

// Owner is who writes to a place.
type Owner struct {
	// ID of the server: its own lock of an earlier life keeps it from nothing.
	ID string `json:"id"`
	// Name is for people.
	Name string `json:"name"`
}

// lockText is an object below locks/: everybody who wants to write puts one of its
// own, and looks then whether there are others. So of two that begin at once at
// least one sees the other, whatever the place can do.
type lockText struct {
	Owner
	Since time.Time `json:"since"`
}

// Lock keeps others from writing to a place.
type Lock struct {
	place *Place
	name  string
	text  []byte
}

// Lock makes the caller the only one that writes. ErrBusy names who does.
func (p *Place) Lock(ctx context.Context, who Owner) (*Lock, error) {
	text, err := json.Marshal(lockText{Owner: who, Since: time.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return nil, err
	}
	l := &Lock{place: p, name: locksPrefix + rand.Text(), text: append(text, '\n')}
	if err := p.put(ctx, l.name, l.text); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := l.alone(ctx, who); err != nil {
		return nil, errors.Join(err, l.Unlock(ctx))
	}
	return l, nil
}

// alone looks for the locks of others, and removes those that are stale or the
// owner's own. All times are the place's.
func (l *Lock) alone(ctx context.Context, who Owner) error {
	var others []object
	var now time.Time
	err := l.place.list(ctx, locksPrefix, func(o object) error {
		if o.name == l.name {
			now = o.modified
		} else {
			others = append(others, o)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if now.IsZero() {
		return fmt.Errorf("lock: %s does not list what was just put there: %w", l.place, flox.ErrUnreachable)
	}
	for _, o := range others {
		b, err := l.place.read(ctx, o.name, maxLock)
		if errors.Is(err, flox.ErrNotFound) {
			continue // it is done
		}
		if err != nil {
			return fmt.Errorf("lock: %w", err)
		}
		held := lockText{}
		if err := json.Unmarshal(b, &held); err != nil {
			held.Name = "somebody"
		}
		if age := now.Sub(o.modified); age < staleAfter && (held.ID != who.ID || held.ID == "") {
			return fmt.Errorf("%s writes a backup to %s since %s: wait for it; if it was killed, it counts no more in %v: %w",
				held.Name, l.place, held.Since.Format(time.DateTime), (staleAfter - age).Round(time.Second), flox.ErrBusy)
		}
		if err := l.place.bucket.Delete(ctx, o.name); err != nil {
			return fmt.Errorf("lock: %w", err)
		}
	}
	return nil
}

// Keep says that the lock is still held, until ctx ends. It gives an error when
// it could not for so long that others may not believe it any more, or when the
// lock is gone.
func (l *Lock) Keep(ctx context.Context) error {
	said := time.Now()
	for {
		select {
		case <-time.After(renewEvery):
		case <-ctx.Done():
			return nil
		}
		_, err := l.place.read(ctx, l.name, maxLock)
		if errors.Is(err, flox.ErrNotFound) {
			return fmt.Errorf("the lock on %s was taken away: %w", l.place, flox.ErrBusy)
		}
		if err == nil {
			err = l.place.put(ctx, l.name, l.text)
		}
		switch {
		case err == nil:
			said = time.Now()
		case ctx.Err() != nil:
			return nil
		case time.Since(said) > staleAfter-2*renewEvery:
			return fmt.Errorf("the lock on %s could not be renewed: %w", l.place, err)
		}
	}
}

// Unlock lets others write, also after ctx ended.
func (l *Lock) Unlock(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return l.place.bucket.Delete(ctx, l.name)
}
