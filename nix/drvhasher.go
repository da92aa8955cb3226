package nix

import (
	"context"
	"fmt"
	"sync"

	"github.com/floxctl/flox"
)

const (
	// defaultDrvHashes is how many hashes a DrvHasher keeps, some 200 bytes each.
	defaultDrvHashes = 1 << 16
	// maxDrvGraph bounds the derivations one question may lead to that are not
	// hashed yet.
	maxDrvGraph = 1 << 19
)

// DrvHasher hashes derivations and remembers what it hashed. It is safe for use
// by many goroutines; its fields must not change.
type DrvHasher struct {
	Dir flox.StoreDir
	// Read gives the derivation in a .drv file.
	Read func(ctx context.Context, drv flox.StorePath) (*Derivation, error)
	// Max is how many hashes are kept; 0 = 65,536.
	Max int

	mu sync.Mutex
	// Two halves: when the younger is full the older is dropped.
	young, old map[flox.StorePath]DrvHash
}

func (h *DrvHasher) get(drv flox.StorePath) (DrvHash, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d, ok := h.young[drv]; ok {
		return d, true
	}
	d, ok := h.old[drv]
	if ok {
		h.keep(drv, d)
	}
	return d, ok
}

// keep needs h.mu.
func (h *DrvHasher) keep(drv flox.StorePath, d DrvHash) {
	most := h.Max
	if most <= 0 {
		most = defaultDrvHashes
	}
	if h.young == nil || len(h.young) >= (most+1)/2 {
		h.old, h.young = h.young, make(map[flox.StorePath]DrvHash)
	}
	h.young[drv] = d
}

func (h *DrvHasher) put(drv flox.StorePath, d DrvHash) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keep(drv, d)
}

// pendingDrv is a derivation that waits for the hashes of its inputs.
type pendingDrv struct {
	path flox.StorePath
	drv  *Derivation // nil = not read yet
	next []flox.StorePath
}

// Hash is the hash of the derivation in a .drv file as its users see it. Inputs
// are read and hashed first, without recursion. Errors: what Read returns,
// ErrBadInput.
func (h *DrvHasher) Hash(ctx context.Context, drv flox.StorePath) (DrvHash, error) {
	// What this walk found is kept until its end, so that what others ask
	// meanwhile cannot make it begin anew for ever.
	found := make(map[flox.StorePath]DrvHash)
	resolve := func(p flox.StorePath) (DrvHash, error) {
		if d, ok := found[p]; ok {
			return d, nil
		}
		if d, ok := h.get(p); ok {
			found[p] = d
			return d, nil
		}
		return DrvHash{}, fmt.Errorf("derivation %s: %w", p, flox.ErrNotFound)
	}
	if d, err := resolve(drv); err == nil {
		return d, nil
	}
	open := map[flox.StorePath]bool{drv: true}
	for stack := []*pendingDrv{{path: drv}}; ; {
		top := stack[len(stack)-1]
		if err := h.read(ctx, top); err != nil {
			return DrvHash{}, err
		}
		if n := len(top.next); n > 0 {
			in := top.next[n-1]
			top.next = top.next[:n-1]
			if _, err := resolve(in); err == nil {
				continue
			}
			if open[in] {
				return DrvHash{}, fmt.Errorf("derivation %s needs itself: %w", in, flox.ErrBadInput)
			}
			if len(found)+len(stack) >= maxDrvGraph {
				return DrvHash{}, fmt.Errorf("derivation %s needs more than %d others: %w", drv, maxDrvGraph, flox.ErrBadInput)
			}
			open[in] = true
			stack = append(stack, &pendingDrv{path: in})
			continue
		}
		d, err := top.drv.HashModulo(h.Dir, false, resolve)
		if err != nil {
			return DrvHash{}, err
		}
		found[top.path] = d
		h.put(top.path, d)
		delete(open, top.path)
		if stack = stack[:len(stack)-1]; len(stack) == 0 {
			return d, nil
		}
	}
}

// read reads a derivation and lists which inputs its hash needs.
func (h *DrvHasher) read(ctx context.Context, p *pendingDrv) (err error) {
	if p.drv != nil {
		return nil
	}
	if p.drv, err = h.Read(ctx, p.path); err != nil {
		return fmt.Errorf("derivation %s: %w", p.path, err)
	}
	kind, err := p.drv.Kind()
	if err != nil {
		return err
	}
	if kind == OutputFixed || kind == OutputImpure {
		return nil // hashed by what they give, not by how
	}
	for in := range p.drv.Inputs {
		p.next = append(p.next, in)
	}
	return nil
}

// Resolver gives what HashModulo, CheckOutputs and FillOutputs ask for.
func (h *DrvHasher) Resolver(ctx context.Context) func(flox.StorePath) (DrvHash, error) {
	return func(p flox.StorePath) (DrvHash, error) { return h.Hash(ctx, p) }
}

// Realise gives the id of an output's realisation: the hash of its derivation
// and its name.
func (h *DrvHasher) Realise(ctx context.Context, d *Derivation, output string) (RealisationID, error) {
	sum, err := d.HashModulo(h.Dir, true, h.Resolver(ctx))
	return RealisationID{DrvHash: sum.Hash, Output: output}, err
}
