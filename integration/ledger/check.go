package ledger

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Missing is what one server does not have, or not as it was acknowledged.
type Missing struct {
	Server string
	Path   flox.StorePath
	Err    error
}

func (m Missing) String() string { return fmt.Sprintf("%s on %s: %v", m.Path, m.Server, m.Err) }

// ErrWrong marks an answer that is worse than none: other facts or other bytes
// than were acknowledged.
var ErrWrong = errors.New("wrong answer")

// Check asks every server for paths, each by itself: the facts must be those that
// were acknowledged and the same everywhere, and the content must have the NAR
// hash. It gives all that is not so.
func (l *Ledger) Check(ctx context.Context, paths []Path) ([]Missing, error) {
	var mu sync.Mutex
	var missing []Missing
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(checkers)
	for _, p := range paths {
		group.Go(func() error {
			facts := make([][]byte, len(l.clients))
			for i, server := range l.cfg.Servers {
				var err error
				if facts[i], err = l.check(ctx, i, &p); err == nil && !bytes.Equal(facts[i], facts[0]) && facts[0] != nil {
					err = fmt.Errorf("its facts differ from those of %s:\n%s\n%s: %w", l.cfg.Servers[0].Host.Name, facts[i], facts[0], ErrWrong)
				}
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if err != nil {
					mu.Lock()
					missing = append(missing, Missing{server.Host.Name, p.Info.Path, err})
					mu.Unlock()
				}
			}
			return nil
		})
	}
	err := group.Wait()
	return missing, err
}

// check asks one server for the facts and the content of a path.
func (l *Ledger) check(ctx context.Context, server int, p *Path) (facts []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	facts, err = l.do(ctx, server, http.MethodGet, p.Info.Path.HashPart()+".narinfo", http.NoBody)
	if err != nil {
		return nil, err
	}
	n, err := nix.ParseNarInfo(l.cfg.StoreDir, facts)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrWrong)
	}
	if n.Info.Path != p.Info.Path || n.Info.NarHash != p.Info.NarHash || n.Info.NarSize != p.Info.NarSize || len(n.Info.References) != len(p.Info.References) {
		return nil, fmt.Errorf("facts that nobody put there:\n%s: %w", facts, ErrWrong)
	}
	packed, err := l.do(ctx, server, http.MethodGet, n.URL, http.NoBody)
	if err != nil {
		return nil, err
	}
	r, err := nix.Decompressor(strings.TrimPrefix(n.Compression, "."), bytes.NewReader(packed), 2*maxBytes)
	if err != nil {
		return nil, err
	}
	nar, err := io.ReadAll(r)
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, fmt.Errorf("NAR: %w", err)
	}
	if sha256.Sum256(nar) != p.Info.NarHash {
		return nil, fmt.Errorf("%d bytes with another hash than the facts say: %w", len(nar), ErrWrong)
	}
	return facts, nil
}
