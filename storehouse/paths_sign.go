package storehouse

import (
	"bytes"
	"fmt"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Bounds of SignPaths. They are part of the state machine.
const (
	maxSigned       = 1024
	maxKeptSigs     = 128 // of one kind on a path
	maxSignatureLen = 1024
)

// sign replaces the signatures of valid paths. Watchers are not told: what a path
// is stays.
func (a *applying) sign(c *floxv1.SignPaths) error {
	if n := len(c.GetPaths()); n == 0 || n > maxSigned {
		return fmt.Errorf("sign %d paths, want 1 to %d: %w", n, maxSigned, flox.ErrBadInput)
	}
	for _, p := range c.GetPaths() {
		if err := checkSignatures(p); err != nil {
			return err
		}
	}
	for i, p := range c.GetPaths() {
		info, err := validAs(a.tx, p.GetPath())
		if err != nil {
			return err
		}
		if info == nil || !bytes.Equal(info.GetNarHash(), p.GetNarHash()) || !bytes.Equal(info.GetManifest(), p.GetManifest()) {
			continue // gone, or another one by now
		}
		info.Signatures, info.ManifestSignatures = p.GetSignatures(), p.GetManifestSignatures()
		b, err := stable.Marshal(info)
		if err != nil {
			return err
		}
		if err := a.tx.Set(hashKey(infoKey, flox.StorePath(p.GetPath()).HashPart()), b); err != nil {
			return err
		}
		a.done(i)
	}
	return nil
}

// checkSignatures refuses what no path may have.
func checkSignatures(p *floxv1.PathSignatures) error {
	if _, err := flox.ParseStorePath(p.GetPath()); err != nil {
		return err
	}
	if len(p.GetManifestSignatures()) == 0 {
		return fmt.Errorf("sign %s: no manifest signature: nobody would believe it: %w", p.GetPath(), flox.ErrBadInput)
	}
	for _, sigs := range [][]string{p.GetSignatures(), p.GetManifestSignatures()} {
		if len(sigs) > maxKeptSigs {
			return fmt.Errorf("sign %s: %d signatures, want at most %d: %w", p.GetPath(), len(sigs), maxKeptSigs, flox.ErrBadInput)
		}
		for _, sig := range sigs {
			if sig == "" || len(sig) > maxSignatureLen {
				return fmt.Errorf("sign %s: a signature of %d bytes, want 1 to %d: %w", p.GetPath(), len(sig), maxSignatureLen, flox.ErrBadInput)
			}
		}
	}
	return nil
}
