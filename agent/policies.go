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

// maxPolicies bounds the owners with a policy of their own.
const maxPolicies = 16384

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
		return nil, fmt.Errorf("%s in %s: %w; delete the file to begin anew, and say again with floxctl keep --offline what is to be here", what, file, err)
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

// set gives owners their policies, durably; all or none of them.
func (p *policies) set(owners map[string]ownedPolicy) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := maps.Clone(p.owners)
	maps.Copy(next, owners)
	if len(next) > maxPolicies {
		return fmt.Errorf("more than %d offline policies; unkeep what is not needed any more: %w", maxPolicies, flox.ErrFull)
	}
	return p.store(next)
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
		return ownedPolicy{Policy: o.Policy, Paths: slices.Clone(o.Paths)}
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
