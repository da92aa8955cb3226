package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	flox "github.com/floxctl/flox"
)

// What of a store path is completed in the background, so that it works with
// the network cut.
const (
	policyClosure = "closure" // all of it and of what it refers to
	policyUsed    = "used"    // what of it ran here
	policyNone    = "none"    // nothing
)

const (
	// maxPolicies bounds the owners with a policy of their own: each is looked at again
	// and again.
	maxPolicies = 16384
	// maxPoliciesOf bounds those that one user chose, maxPoliciesOfUsers those of all
	// users: the rest is root's.
	maxPoliciesOf, maxPoliciesOfUsers = 4096, 12288
)

// checkPolicy refuses what is no policy.
func checkPolicy(policy string) error {
	switch policy {
	case policyClosure, policyUsed, policyNone:
		return nil
	}
	return fmt.Errorf("offline policy %q: want closure (all it refers to too), used (what of it ran here) or none: %w", policy, flox.ErrBadInput)
}

// policies are the offline policies that somebody chose, by owner. An owner has
// the name under which it keeps content in the cache: a kept path's own.
type policies struct {
	file string

	mu     sync.Mutex
	owners map[string]ownedPolicy
}

// ownedPolicy is what one owner wants of its paths.
type ownedPolicy struct {
	Policy string           `json:"policy"`
	Paths  []flox.StorePath `json:"paths"`
	// User is who chose it; 0 is root, and whoever the agent runs as.
	User int `json:"user,omitempty"`
}

// loadPolicies reads the policies. A damaged file is an error: what somebody
// wanted to have on a train must not be forgotten without a word.
func loadPolicies(file string) (*policies, error) {
	owners, err := loadKept(file, "offline policies", func(o ownedPolicy) error { return checkPolicy(o.Policy) })
	return &policies{file: file, owners: owners}, err
}

// loadKept reads a file that storeKept wrote; a missing one is empty, and one of
// whose values any is refused an error.
func loadKept[V any](file, what string, check func(V) error) (map[string]V, error) {
	kept := make(map[string]V)
	b, err := os.ReadFile(file)
	if errors.Is(err, iofs.ErrNotExist) {
		return kept, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &kept)
	}
	if err == nil && kept == nil {
		err = errors.New("it holds null")
	}
	for name, v := range kept {
		if err == nil {
			if err = check(v); err != nil {
				err = fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s in %s: %w; delete the file to begin anew, and say again what was in it (floxctl keep --offline, floxctl profile bind)", what, file, err)
	}
	return kept, nil
}

// storeKept writes a map, durably.
func storeKept[V any](file, what string, kept map[string]V) error {
	b, err := json.Marshal(kept)
	if err == nil {
		err = replaceFile(file, b, 0o600, true)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// set gives owners the policies that a user chose, durably; all or none of them.
// ErrFull: those that are new do not fit.
func (p *policies) set(owners map[string]ownedPolicy, user int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	next, err := p.with(owners, user)
	if err != nil {
		return err
	}
	return p.store(next)
}

// fits is set without setting anything.
func (p *policies) fits(owners map[string]ownedPolicy, user int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, err := p.with(owners, user)
	return err
}

// with gives all policies as they are after a set, p.mu being held. One that is there
// already stays in the share of who chose it first, unless root takes it over.
func (p *policies) with(owners map[string]ownedPolicy, user int) (map[string]ownedPolicy, error) {
	next := maps.Clone(p.owners)
	for name, o := range owners {
		o.User = user
		if had, known := p.owners[name]; known && user != 0 {
			o.User = had.User
		}
		next[name] = o
	}
	if len(next) == len(p.owners) {
		return next, nil
	}
	own, users := chosenBy(next, user)
	const (
		instead = "let go of what is not needed any more (floxctl keep --list, sudo floxctl unkeep), or keep a link to it as a profile, which has one policy for all it refers to"
		orRoot  = ", or let root keep it (sudo)"
	)
	switch {
	case len(next) > maxPolicies:
		return nil, fmt.Errorf("%d paths with an offline policy, and no more than %d may have one; %s: %w", len(next), maxPolicies, instead, flox.ErrFull)
	case user != 0 && own > maxPoliciesOf:
		return nil, fmt.Errorf("%d paths with an offline policy of user %d, and no user but root may give one to more than %d; %s%s: %w", own, user, maxPoliciesOf, instead, orRoot, flox.ErrFull)
	case user != 0 && users > maxPoliciesOfUsers:
		return nil, fmt.Errorf("%d paths with an offline policy of users, who may give one to %d, the others are root's; %s%s: %w", users, maxPoliciesOfUsers, instead, orRoot, flox.ErrFull)
	}
	return next, nil
}

func (o ownedPolicy) chooser() int { return o.User }

// chosenBy counts what a user chose, and what all users but root did.
func chosenBy[V interface{ chooser() int }](all map[string]V, user int) (own, users int) {
	for _, v := range all {
		if v.chooser() != 0 {
			users++
		}
		if v.chooser() == user {
			own++
		}
	}
	return own, users
}

// drop takes the policies of owners away.
func (p *policies) drop(owners ...string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := maps.Clone(p.owners)
	for _, o := range owners {
		delete(next, o)
	}
	if len(next) == len(p.owners) {
		return nil
	}
	return p.store(next)
}

// retain drops the policies of owners that do not exist any more: a crash came
// between the two halves of an unkeep.
func (p *policies) retain(exists func(owner string) bool) error {
	p.mu.Lock()
	var gone []string
	for o := range p.owners {
		if !exists(o) {
			gone = append(gone, o)
		}
	}
	p.mu.Unlock()
	return p.drop(gone...)
}

// store writes the policies, p.mu being held.
func (p *policies) store(next map[string]ownedPolicy) error {
	if err := storeKept(p.file, "offline policies", next); err != nil {
		return err
	}
	p.owners = next
	return nil
}

// of gives an owner's policy; one that has not said anything wants what it uses.
func (p *policies) of(owner string) ownedPolicy {
	p.mu.Lock()
	defer p.mu.Unlock()
	if o, ok := p.owners[owner]; ok {
		return ownedPolicy{Policy: o.Policy, Paths: slices.Clone(o.Paths), User: o.User}
	}
	return ownedPolicy{Policy: policyUsed, Paths: []flox.StorePath{flox.StorePath(owner)}}
}

// syncDirOf makes the name of a file durable.
func syncDirOf(name string) error {
	d, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
