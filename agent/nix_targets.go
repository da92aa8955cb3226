package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/warden"
)

// maxKnownRoots bounds the roots of the machine that are remembered over restarts.
const maxKnownRoots = 20_000

// knownTargets are where roots pointed to when they could last be read, also by an
// agent before this one: what lies in a file system that does not answer keeps what
// it kept.
type knownTargets struct {
	file string

	mu    sync.Mutex
	saved []byte

	Links map[string]flox.StorePath // of symlinks that Nix clients made roots
	Units map[string][]warden.Root  // of the machine's, by what they are read from
}

// openKnownTargets reads the file; a missing or damaged one is empty.
func openKnownTargets(file string, log *slog.Logger) *knownTargets {
	k := &knownTargets{file: file}
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, k)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("it is lost where roots pointed to: those that do not answer keep nothing until they do", "file", file, "error", err)
		k.Links, k.Units = nil, nil
	}
	k.saved = b
	return k
}

// machine adds to what was found what units had that could not be read, and
// remembers all of it.
func (k *knownTargets) machine(found []warden.Root, unread []string) []warden.Root {
	k.mu.Lock()
	defer k.mu.Unlock()
	units, n := make(map[string][]warden.Root), 0
	for _, r := range found {
		if r.Unit != "" && !ofProcess(r.Unit) && n < maxKnownRoots {
			units[r.Unit] = append(units[r.Unit], warden.Root{Link: r.Link, Name: r.Name})
			n++
		}
	}
	slices.Sort(unread)
	for _, unit := range slices.Sorted(maps.Keys(k.Units)) {
		if len(units[unit]) > 0 || n >= maxKnownRoots || !below(unit, unread) {
			continue
		}
		for _, r := range k.Units[unit] {
			if _, err := flox.ParseStorePath(r.Name); err == nil {
				found = append(found, r)
				units[unit] = append(units[unit], r)
				n++
			}
		}
	}
	for _, roots := range units { // the same file for the same roots
		slices.SortFunc(roots, func(a, b warden.Root) int { return strings.Compare(a.Link+"\x00"+a.Name, b.Link+"\x00"+b.Name) })
	}
	k.Units = units
	return found
}

// below reports whether a name, or a directory above it, is one of a sorted list.
func below(name string, sorted []string) bool {
	for {
		if _, ok := slices.BinarySearch(sorted, name); ok {
			return true
		}
		at := strings.LastIndexByte(name, '/')
		if at <= 0 {
			return false
		}
		name = name[:at]
	}
}

// link gives where a symlink points, or pointed to if it cannot be read now.
func (k *knownTargets) link(link string, target flox.StorePath, err error) (flox.StorePath, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if errors.Is(err, warden.ErrUnread) {
		if before, ok := k.Links[link]; ok {
			return before, nil
		}
		return "", err
	}
	if err != nil {
		delete(k.Links, link)
		return "", err
	}
	if k.Links == nil {
		k.Links = make(map[string]flox.StorePath)
	}
	k.Links[link] = target
	return target, nil
}

// save replaces the file if anything is different; of links only those there are.
func (k *knownTargets) save(links []string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	maps.DeleteFunc(k.Links, func(link string, _ flox.StorePath) bool {
		_, ok := slices.BinarySearch(links, link)
		return !ok
	})
	b, err := json.Marshal(k)
	if err != nil || string(b) == string(k.saved) {
		return err
	}
	if err := replaceFile(k.file, b, 0o600, true); err != nil {
		return fmt.Errorf("targets of roots: %w", err)
	}
	k.saved = b
	return nil
}
