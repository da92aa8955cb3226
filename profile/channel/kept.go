package channel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/raft"
)

// maxKeptBytes bounds what is kept of one package.
const maxKeptBytes = 8 << 10

func keptOf(name string) []byte { return append(append([]byte{keptKey}, folded(name)...), 0) }

func keptKeyOf(name string, index uint64) []byte {
	return binary.BigEndian.AppendUint64(keptOf(name), index)
}

// Kept gives what packages of a channel were made of, what was made last first.
func Kept(g raft.Getter, name string) (all []*floxv1.KeptDerivation, err error) {
	var bad error
	err = g.Iterate(keptOf(name), nil, func(key, value []byte) bool {
		k := &floxv1.KeptDerivation{}
		bad = raft.DecodeRecord(processorName, key, value, k)
		all = append(all, k)
		return bad == nil
	})
	slices.Reverse(all)
	return all, errors.Join(bad, err)
}

// FindKept gives what a name in a version means on a system among what is kept, as
// Catalogue.Find does; nil if nothing.
func FindKept(kept []*floxv1.KeptDerivation, name, version, system string) *floxv1.CataloguePackage {
	var best *floxv1.CataloguePackage
	for _, k := range kept {
		p := k.GetPackage()
		if p.GetAttr() != name && p.GetName() != name || p.GetSystem() != system || !hasVersion(p.GetVersion(), version) {
			continue
		}
		if best == nil || best.GetAttr() != name && (p.GetAttr() == name || CompareVersions(p.GetVersion(), best.GetVersion()) > 0) {
			best = p
		}
	}
	return best
}

// hasVersion reports whether a version is the one that is wanted: 3.11.2 is 3.11, too.
func hasVersion(is, want string) bool {
	return want == "" || is == want || strings.HasPrefix(is, want+".")
}

// keep notes what a package was made of. Of one attribute in one version for one system
// the last stays.
func (a *applying) keep(c *floxv1.KeepDerivation) error {
	p := c.GetKept().GetPackage()
	if !a.admin {
		return fmt.Errorf("channel %s: only the storehouse says what its packages are made of: %w", c.GetChannel(), flox.ErrDenied)
	}
	of, err := Find(a.tx, c.GetChannel())
	if err != nil {
		return err
	}
	if _, err := flox.ParseStorePath(p.GetDrv()); err != nil {
		return fmt.Errorf("channel %s: package %.80s: %w", of.GetName(), p.GetAttr(), err)
	}
	if n := proto.Size(p); n > maxKeptBytes {
		return fmt.Errorf("channel %s: package %.80s is described in %d bytes, want at most %d: %w", of.GetName(), p.GetAttr(), n, maxKeptBytes, flox.ErrBadInput)
	}
	all, err := Kept(a.tx, of.GetName())
	if err != nil {
		return err
	}
	left := 0
	for _, was := range all { // what was made last first
		w := was.GetPackage()
		same := w.GetAttr() == p.GetAttr() && w.GetVersion() == p.GetVersion() && w.GetSystem() == p.GetSystem()
		if left++; !same && left < a.maxKept {
			continue
		}
		if left--; err == nil {
			err = a.tx.Delete(keptKeyOf(of.GetName(), was.GetIndex()))
		}
	}
	if err != nil {
		return err
	}
	p.Channel, p.Dropped = of.GetName(), false
	a.reply.Channel = of
	return put(a.tx, keptKeyOf(of.GetName(), a.index), &floxv1.KeptDerivation{Package: p, Index: a.index})
}
