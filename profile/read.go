package profile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// Find gives a profile by its name, in any case. ErrNotFound.
func Find(g getter, name string) (*floxv1.Profile, error) {
	if _, _, err := Split(name); err != nil {
		return nil, err
	}
	p, err := load(g, textKey(profileKey, Folded(name)), &floxv1.Profile{})
	if errors.Is(err, flox.ErrNotFound) {
		if now, err := renamed(g, Folded(name)); err != nil {
			return nil, err
		} else if now != "" {
			return nil, &RenamedError{Name: name, Now: now}
		}
		return nil, noProfile(name)
	}
	return p, err
}

// List calls yield with the profiles of an owner ("" = of all), behind a name, in the
// order of their names, until it returns false.
func List(g getter, owner, after string, yield func(*floxv1.Profile) bool) error {
	prefix := []byte{profileKey}
	if owner != "" {
		prefix = textKey(profileKey, Folded(owner)+"/")
	}
	var from []byte
	if after != "" {
		from = append(textKey(profileKey, Folded(after)), 0)
	}
	var bad error
	err := g.Iterate(prefix, from, func(key, value []byte) bool {
		p := &floxv1.Profile{}
		if bad = decode(key, value, p); bad != nil {
			return false
		}
		return yield(p)
	})
	return errors.Join(bad, err)
}

// ReadEnvironments gives a generation of a profile without its packages. ErrNotFound.
func ReadEnvironments(g getter, name string, number uint64) (*floxv1.Generation, error) {
	out, err := load(g, numberKey(generationKey, name, number), &floxv1.Generation{})
	if errors.Is(err, flox.ErrNotFound) {
		return nil, missing(g, name, number)
	}
	return out, err
}

// ReadGeneration gives a generation of a profile with its packages. ErrNotFound.
func ReadGeneration(g getter, name string, number uint64) (*floxv1.Generation, error) {
	out, err := ReadEnvironments(g, name, number)
	if err != nil {
		return nil, err
	}
	for _, id := range out.GetPackageIds() {
		r, err := load(g, append([]byte{packageKey}, id...), &floxv1.PackageRecord{})
		if err != nil {
			return nil, fmt.Errorf("profile %s, generation %d: package %x: %w", name, number, id, err)
		}
		out.Packages = append(out.Packages, r.GetPackage())
	}
	out.PackageIds = nil
	return out, nil
}

// Packages calls yield with every package that some generation has, until it returns false.
func Packages(g getter, yield func(*floxv1.Package) bool) error {
	var bad error
	err := g.Iterate([]byte{packageKey}, nil, func(key, value []byte) bool {
		r := &floxv1.PackageRecord{}
		if bad = decode(key, value, r); bad != nil {
			return false
		}
		return yield(r.GetPackage())
	})
	return errors.Join(bad, err)
}

// Generations calls yield with every generation of every profile, without its packages,
// and its profile's folded name, until it returns false.
func Generations(g getter, yield func(name string, of *floxv1.Generation) bool) error {
	var bad error
	err := g.Iterate([]byte{generationKey}, nil, func(key, value []byte) bool {
		of := &floxv1.Generation{}
		if len(key) < 10 {
			bad = fmt.Errorf("profiles: key %q: %w", key, flox.ErrCorrupt)
			return false
		}
		if bad = decode(key, value, of); bad != nil {
			return false
		}
		return yield(string(key[1:len(key)-9]), of)
	})
	return errors.Join(bad, err)
}

// Events gives what happened to a profile before a log index (0 = until now), newest
// first, at most limit, and whether there is more.
func Events(g getter, name string, before uint64, limit int) (events []*floxv1.ProfileEvent, more bool, err error) {
	prefix := append(textKey(eventKey, Folded(name)), 0)
	var bad error
	err = g.Iterate(prefix, nil, func(key, value []byte) bool {
		if before > 0 && binary.BigEndian.Uint64(key[len(key)-8:]) >= before {
			return false
		}
		e := &floxv1.ProfileEvent{}
		if bad = decode(key, value, e); bad != nil {
			return false
		}
		events = append(events, e)
		return true
	})
	if err = errors.Join(bad, err); err != nil {
		return nil, false, err
	}
	slices.Reverse(events)
	if len(events) > limit {
		events, more = events[:limit], true
	}
	return events, more, nil
}

// Changes gives the folded names of the profiles that changed or went behind a log index,
// each once. ok is false when that is no longer all known: read all.
func Changes(r *raft.Reader, after uint64) (names []string, ok bool, err error) {
	c, err := loadCounts(r)
	if err != nil || after < c.dropped || after > r.Index() {
		return nil, false, err
	}
	seen := map[string]bool{}
	err = r.Iterate([]byte{changeKey}, indexKey(after+1), func(_, value []byte) bool {
		for name := range strings.SplitSeq(string(value), "\x00") {
			if !seen[name] {
				seen[name] = true
				names = append(names, name)
			}
		}
		return true
	})
	return names, true, err
}
