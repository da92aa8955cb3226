package agent

import (
	"fmt"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// trustWalk goes along the trust lists that a storehouse tells of.
type trustWalk struct {
	anchor flox.CID           // fingerprint of the first list, from the invite
	at     *content.TrustList // accepted so far; nil = none
	met    bool               // the list accepted before is among them
	newest *content.TrustList // of the lists that led nowhere
	no     error              // why one of them was not taken
}

// step looks at the next list.
func (w *trustWalk) step(next *content.TrustList) error {
	switch have := w.at; {
	case have == nil:
		// Lists older than the invite come first.
		if err := next.CheckFirst(w.anchor); err != nil {
			w.no = fmt.Errorf("the storehouse's trust list is not the invite's; this is another storehouse, or somebody in between: %w", err)
			return nil
		}
	case next.Epoch > have.Epoch && content.Newer(have, next) != nil:
		// A life begins with the backup's list; whoever was ahead of it skips there.
		if err := content.Restored(have, next); err != nil {
			w.no = fmt.Errorf("the storehouse was restored, and %w", err)
			return nil
		}
	case next.Epoch < have.Epoch || next.Epoch == have.Epoch && next.Version <= have.Version:
		if err := w.older(next); err != nil {
			return err
		}
		return nil
	default:
		if err := content.Newer(have, next); err != nil {
			return err
		}
	}
	w.at, w.met = next, true
	return nil
}

// older takes note of a list that is not newer than the one accepted.
func (w *trustWalk) older(next *content.TrustList) error {
	w.newest = next
	if next.Version != w.at.Version || next.Epoch != w.at.Epoch {
		return nil // nothing is known of it any more
	}
	fingerprint, err := w.at.Fingerprint()
	if err != nil {
		return err
	}
	if next.CheckFirst(fingerprint) != nil {
		return fmt.Errorf("version %d is not the one accepted before; this is another storehouse, or somebody in between: %w", next.Version, flox.ErrUntrusted)
	}
	w.met = true
	return nil
}

// end says why no list led on from the one accepted, unless that is the newest.
func (w *trustWalk) end() error {
	switch {
	case w.met || w.no != nil || w.at == nil:
		return w.no
	case w.newest == nil:
		return fmt.Errorf("the storehouse does not know trust list version %d of epoch %d, which was accepted here: it went back, or this is another one: %w",
			w.at.Version, w.at.Epoch, flox.ErrUntrusted)
	}
	return fmt.Errorf("the storehouse is at trust list version %d of epoch %d and went back behind version %d of epoch %d, which was accepted here: "+
		"restored from a backup it has to begin a new epoch: %w", w.newest.Version, w.newest.Epoch, w.at.Version, w.at.Epoch, flox.ErrUntrusted)
}
