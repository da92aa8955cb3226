package storehouse

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm/queue"
	"github.com/floxctl/flox/nix"
)

// Keys of what is known of derivations, beside those of the facts. All of it goes
// with the path it is about:
//
//	'e' realisation id          Realisation
//	'g' hash part id            a realisation whose path that is
//	'v' hash part .drv name     a derivation that has the path as an output
//	'b' hash part of the .drv   BuildRecord
//	'j' hash part drv's         the record whose log that is
const (
	realisedKey = 'e'
	realisesKey = 'g'
	deriverKey  = 'v'
	recordKey   = 'b'
	logKey      = 'j'
)

// Bounds of NoteBuild. They are part of the state machine.
const (
	maxOutputs        = 256  // of a derivation
	maxDerivers       = 64   // kept of a path
	maxRealisations   = 64   // kept of a path
	maxRealisedInputs = 4096 // of a realisation
	maxIDLen          = 300
)

// fenced refuses what comes of a lease that does not count any more; nil = of none.
func (a *applying) fenced(l *floxv1.UnderLease) error {
	if l == nil {
		return nil
	}
	return queue.Holds(a.tx.Of(queue.Kind), l.GetBuild(), l.GetToken())
}

// noteBuild records what became of a derivation.
func (a *applying) noteBuild(c *floxv1.NoteBuild) error {
	if err := a.fenced(c.GetLease()); err != nil {
		return err
	}
	drv := flox.StorePath("") // a realisation alone may be of a derivation that nobody has
	if c.GetDrv() != "" || c.GetRecord() != nil {
		var err error
		if drv, err = parseDrv(c.GetDrv()); err != nil {
			return err
		}
	}
	if n := len(c.GetOutputs()); n > maxOutputs {
		return fmt.Errorf("%s has %d outputs, want at most %d: %w", drv, n, maxOutputs, flox.ErrBadInput)
	}
	for i, o := range c.GetOutputs() {
		path, err := flox.ParseStorePath(o.GetPath())
		if err != nil {
			return err
		}
		valid, err := validAs(a.tx, string(path))
		if err == nil && valid != nil && drv != "" {
			err = a.addDeriver(path, drv)
		}
		if err == nil && valid != nil && o.GetRealisation() != nil {
			err = a.realise(o.GetRealisation())
		}
		if err != nil {
			return err
		}
		if valid != nil {
			a.done(i)
		}
	}
	return a.keepRecord(drv, c.GetRecord())
}

// parseDrv parses the base name of a .drv file.
func parseDrv(name string) (flox.StorePath, error) {
	drv, err := flox.ParseStorePath(name)
	if err == nil && !strings.HasSuffix(name, nix.DrvExtension) {
		err = fmt.Errorf("%.300q is no derivation: want the name of a .drv file: %w", name, flox.ErrBadInput)
	}
	return drv, err
}

// addDeriver notes that a derivation has a valid path as an output.
func (a *applying) addDeriver(path, drv flox.StorePath) error {
	key := append(hashKey(deriverKey, path.HashPart()), drv...)
	have, err := suffixes(a.tx, hashKey(deriverKey, path.HashPart()), maxDerivers)
	if err != nil || len(have) >= maxDerivers {
		return err
	}
	return a.tx.Set(key, nil)
}

// realise keeps a realisation of a valid path. The first one of an id stays, and
// takes on signatures.
func (a *applying) realise(r *floxv1.Realisation) error {
	if len(r.GetId()) > maxIDLen || len(r.GetInputs()) > maxRealisedInputs || len(r.GetSignatures()) > maxSignatures {
		return fmt.Errorf("realisation %.300q: its id has %d bytes, its inputs are %d, its signatures %d: %w",
			r.GetId(), len(r.GetId()), len(r.GetInputs()), len(r.GetSignatures()), flox.ErrBadInput)
	}
	if _, err := nix.ParseRealisationID(r.GetId()); err != nil {
		return err
	}
	have, err := readRealisation(a.tx, r.GetId())
	switch {
	case errors.Is(err, flox.ErrNotFound):
		have = r
	case err != nil || have.GetPath() != r.GetPath():
		return err
	default:
		for _, sig := range r.GetSignatures() {
			if len(have.GetSignatures()) < maxSignatures {
				have.Signatures = appendNew(have.GetSignatures(), sig)
			}
		}
	}
	at := hashKey(realisesKey, flox.StorePath(have.GetPath()).HashPart())
	others, err := suffixes(a.tx, at, maxRealisations)
	if err != nil || len(others) >= maxRealisations {
		return err
	}
	b, err := stable.Marshal(have)
	if err != nil {
		return err
	}
	return errors.Join(a.tx.Set(append([]byte{realisedKey}, have.GetId()...), b), a.tx.Set(append(at, have.GetId()...), nil))
}

// keepRecord replaces the record of a derivation, if its log is valid.
func (a *applying) keepRecord(drv flox.StorePath, r *floxv1.BuildRecord) error {
	if r == nil {
		return nil
	}
	if r.GetDrv() != string(drv) || len(r.GetOutputs()) > maxOutputs || len(r.GetAskedBy()) > maxIDLen || len(r.GetServer()) > maxIDLen {
		return fmt.Errorf("record of a build of %s is not of it, or too large: %w", drv, flox.ErrBadInput)
	}
	for _, p := range append([]string{r.GetLog()}, r.GetOutputs()...) {
		if _, err := flox.ParseStorePath(p); err != nil {
			return err
		}
	}
	log, err := validAs(a.tx, r.GetLog())
	if err != nil || log == nil {
		return err
	}
	if err := a.dropRecord(drv.HashPart()); err != nil {
		return err
	}
	b, err := stable.Marshal(r)
	if err != nil {
		return err
	}
	return errors.Join(a.tx.Set(hashKey(recordKey, drv.HashPart()), b),
		a.tx.Set(append(hashKey(logKey, flox.StorePath(r.GetLog()).HashPart()), drv.HashPart()...), nil))
}

// dropRecord forgets the record of a derivation, if there is one.
func (a *applying) dropRecord(drvHash string) error {
	r, err := readRecord(a.tx, drvHash)
	if errors.Is(err, flox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(a.tx.Delete(hashKey(recordKey, drvHash)),
		a.tx.Delete(append(hashKey(logKey, flox.StorePath(r.GetLog()).HashPart()), drvHash...)))
}

// removeBuilds forgets what is known of a path that is removed.
func (a *applying) removeBuilds(p flox.StorePath) error {
	for _, kind := range []byte{realisesKey, deriverKey, logKey} {
		at := hashKey(kind, p.HashPart())
		names, err := suffixes(a.tx, at, 1<<20)
		if err != nil {
			return err
		}
		for _, name := range names {
			err = errors.Join(err, a.tx.Delete(append(bytes.Clone(at), name...)))
			switch kind {
			case realisesKey:
				err = errors.Join(err, a.tx.Delete(append([]byte{realisedKey}, name...)))
			case logKey:
				err = errors.Join(err, a.tx.Delete(hashKey(recordKey, name)))
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// suffixes gives what follows a prefix in keys, at most so many.
func suffixes(g getter, prefix []byte, most int) (names []string, err error) {
	err = g.Iterate(prefix, nil, func(key, _ []byte) bool {
		names = append(names, string(key[len(prefix):]))
		return len(names) < most
	})
	return names, err
}

// readRealisation reads a realisation; ErrNotFound.
func readRealisation(g getter, id string) (*floxv1.Realisation, error) {
	r := &floxv1.Realisation{}
	return r, readMessage(g, append([]byte{realisedKey}, id...), r)
}

// readRecord reads the record of a derivation; ErrNotFound.
func readRecord(g getter, drvHash string) (*floxv1.BuildRecord, error) {
	r := &floxv1.BuildRecord{}
	return r, readMessage(g, hashKey(recordKey, drvHash), r)
}

func readMessage(g getter, key []byte, m proto.Message) error {
	b, err := g.Get(key)
	if err != nil {
		return err
	}
	if err := proto.Unmarshal(b, m); err != nil {
		return fmt.Errorf("facts: %q: %w: %w", key, err, flox.ErrCorrupt)
	}
	return nil
}
