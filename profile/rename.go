package profile

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// RenamedError says that a profile has another name now. It is flox.ErrNotFound.
type RenamedError struct {
	Name, Now string
}

// Error names both.
func (e *RenamedError) Error() string {
	return fmt.Sprintf("there is no profile %s any more: it was renamed to %s: %v", e.Name, e.Now, flox.ErrNotFound)
}

// Unwrap is what errors.Is asks for.
func (e *RenamedError) Unwrap() error { return flox.ErrNotFound }

// FindFor is Find for somebody who sees some profiles only: of those alone it is told that
// they have another name now.
func FindFor(g getter, name string, sees func(*floxv1.Profile) bool) (*floxv1.Profile, error) {
	p, err := Find(g, name)
	if renamed := (*RenamedError)(nil); errors.As(err, &renamed) {
		if now, gone := Find(g, renamed.Now); gone != nil || !sees(now) {
			err = noProfile(name)
		}
	}
	return p, err
}

// noProfile says that there is none.
func noProfile(name string) error {
	return fmt.Errorf("there is no profile %s; see: floxctl profile list: %w", name, flox.ErrNotFound)
}

// renamed gives the name of the profile that had a folded name; "" = none had.
func renamed(g getter, name string) (string, error) {
	b, err := g.Get(textKey(renamedKey, name))
	if errors.Is(err, flox.ErrNotFound) {
		return "", nil
	}
	return string(b), err
}

// free lets a folded name lead nowhere.
func (a *applying) free(name string) error {
	now, err := renamed(a.tx, name)
	if err != nil || now == "" {
		return err
	}
	if p, err := Find(a.tx, now); err == nil {
		p.Formerly = slices.DeleteFunc(p.GetFormerly(), func(n string) bool { return Folded(n) == name })
		if err := a.put(textKey(profileKey, Folded(now)), p); err != nil {
			return err
		}
	} else if !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	return a.tx.Delete(textKey(renamedKey, name))
}

// rename gives a profile another name. What was made of it stays: generations, their
// parents, its history. The old name leads to the new one until another profile has it.
func (a *applying) rename(c *floxv1.RenameProfile) error {
	p, err := a.profile(c.GetProfile(), Owner)
	if err != nil {
		return err
	}
	owner, _, err := Split(c.GetTo())
	if err != nil {
		return err
	}
	old, now := Folded(p.GetName()), Folded(c.GetTo())
	if was, _, _ := strings.Cut(p.GetName(), "/"); Folded(was) != Folded(owner) {
		return fmt.Errorf("profile %s cannot become %s, which is of another owner: want %s/NAME; floxctl profile export and import make one there that has the same: %w",
			p.GetName(), c.GetTo(), was, flox.ErrBadInput)
	}
	e := &floxv1.ProfileEvent{Kind: "rename", From: p.GetLive(), To: p.GetLive(), Detail: p.GetName() + " -> " + c.GetTo()}
	if old == now { // spelled otherwise
		p.Name = c.GetTo()
		return a.store(p, e)
	}
	if have, err := Find(a.tx, c.GetTo()); err == nil {
		return fmt.Errorf("profile %s is there already: %w", have.GetName(), flox.ErrBusy)
	} else if !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if err := a.free(now); err != nil {
		return err
	}
	if p, err = Find(a.tx, p.GetName()); err != nil { // it may have had the new name before
		return err
	}
	for _, kind := range []byte{generationKey, eventKey} {
		if err := a.move(append(textKey(kind, old), 0), append(textKey(kind, now), 0)); err != nil {
			return err
		}
	}
	if err := a.moveRun(old, now); err != nil {
		return err
	}
	if err := a.tx.Delete(textKey(profileKey, old)); err != nil {
		return err
	}
	if err := a.lead(p, old, c.GetTo()); err != nil {
		return err
	}
	p.Name, a.was = c.GetTo(), old
	return a.store(p, e)
}

// lead lets the names that a profile had lead to its new one.
func (a *applying) lead(p *floxv1.Profile, old, now string) error {
	p.Formerly = append(p.GetFormerly(), old)
	if over := len(p.GetFormerly()) - maxFormerly; over > 0 {
		for _, name := range p.GetFormerly()[:over] {
			if err := a.tx.Delete(textKey(renamedKey, name)); err != nil {
				return err
			}
		}
		p.Formerly = p.GetFormerly()[over:]
	}
	for _, name := range p.GetFormerly() {
		if err := a.tx.Set(textKey(renamedKey, name), []byte(now)); err != nil {
			return err
		}
	}
	return nil
}

// move gives all records below a prefix another one. Both end with a 0, which is in no
// name, so neither is in the other.
func (a *applying) move(from, to []byte) error {
	type record struct{ key, value []byte }
	var all []record
	err := a.tx.Iterate(from, nil, func(key, value []byte) bool {
		all = append(all, record{bytes.Clone(key), bytes.Clone(value)})
		return true
	})
	for _, r := range all {
		if err == nil {
			err = a.tx.Set(append(bytes.Clone(to), r.key[len(from):]...), r.value)
		}
		if err == nil {
			err = a.tx.Delete(r.key)
		}
	}
	return err
}
