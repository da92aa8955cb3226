package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
	"github.com/floxctl/flox/p2p"
)

// sharedAtOnce is how many paths a client sends before those are told to others.
const sharedAtOnce = 4096

// AddPaths implements worker.Adder. What others have reason to believe, by its content
// address or by a signature, is in the storehouse when the client hears that it was
// added; the rest stays on this machine.
func (n *nixSession) AddPaths(ctx context.Context, paths worker.Incoming, o worker.AddOptions) error {
	var added []flox.StorePath
	for {
		info, nar, err := paths.Next()
		if err == nil {
			err = n.addPath(ctx, info, nar, o)
		}
		if err == nil {
			added = append(added, info.Path)
		}
		if err != nil || len(added) == sharedAtOnce {
			n.share(ctx, added)
			added = added[:0]
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// addPath adds one path. A path that is valid stays as it is.
func (n *nixSession) addPath(ctx context.Context, info *worker.Info, nar io.Reader, o worker.AddOptions) error {
	dir := n.a.cfg.StoreDir
	shared := info.CA != "" || n.a.facts.signed(&info.PathInfo)
	if !o.NoCheckSigs && !shared {
		known, err := n.vouched(ctx, &info.PathInfo)
		if err != nil {
			return err
		}
		shared = known
	}
	if err := n.keep(ctx, info.Path); err != nil {
		return err
	}
	valid, err := n.a.lookup(ctx, info.Path)
	if have, known := n.a.facts.get(info.Path.HashPart()); known && have.Path != info.Path {
		return fmt.Errorf("importing path '%s': its hash part is that of '%s', which is valid, and two paths cannot have the same: %w",
			dir.Join(info.Path), dir.Join(have.Path), flox.ErrBadInput)
	}
	if err == nil {
		if err = n.passOver(ctx, valid, info, nar); err == nil && o.Repair && n.s.Trusted() {
			err = n.repairPaths(ctx, []flox.StorePath{info.Path})
		}
		return err
	}
	if !errors.Is(err, flox.ErrNotFound) && !errors.Is(err, flox.ErrUnreachable) {
		return err
	}
	own := info.PathInfo
	if _, err := n.a.staged.Add(ctx, &own, nar, staging.AddOptions{Shared: shared}); err != nil {
		return fmt.Errorf("importing path '%s': %w", dir.Join(info.Path), err)
	}
	return nil
}

// passOver reads the NAR of a path that is valid. As with Nix the first one stays; the
// storehouse hears of another one.
func (n *nixSession) passOver(ctx context.Context, valid *flox.PathInfo, offered *worker.Info, nar io.Reader) error {
	if valid.NarHash == offered.NarHash {
		_, err := io.Copy(io.Discard, nar)
		return err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, nar); err != nil || [32]byte(sum.Sum(nil)) != offered.NarHash {
		return err // what is not as it says it is tells nothing
	}
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	err := n.a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) error {
		_, err := n.a.calls.storehouse(house).ReportDifference(ctx, connect.NewRequest(&floxv1.ReportDifferenceRequest{Path: string(valid.Path), NarHash: offered.NarHash[:]}))
		return err
	})
	if err != nil {
		n.a.log.Warn("a different NAR was offered for a valid path, and the storehouse was not told", "path", string(valid.Path), "error", err)
	}
	return nil
}

// signed reports whether a key of the storehouse vouches for what a path is.
func (f *facts) signed(info *flox.PathInfo) bool {
	return f.vouchesFor([]byte(nix.Fingerprint(f.dir, info)), info.Signatures)
}

// vouchesFor reports whether one of some signatures is by a key of the storehouse.
func (f *facts) vouchesFor(said []byte, signatures []string) bool {
	f.mu.RLock()
	trust := f.trust
	f.mu.RUnlock()
	if trust == nil {
		return false
	}
	ring, err := nix.ParseKeyRing(trust.NixKeys)
	if err != nil {
		return false
	}
	_, ok := ring.Verify(said, signatures)
	return ok
}

// AddContent implements worker.Adder: sources, .drv files and texts, which are
// acknowledged without asking anybody.
func (n *nixSession) AddContent(ctx context.Context, c worker.Content, data io.Reader) (*worker.Info, error) {
	p, err := n.a.staged.AddAddressed(ctx, c.Name, c.Method, c.Algo, c.References, data)
	if err == nil {
		err = n.keep(ctx, p.Info.Path)
	}
	if err == nil && c.Repair {
		err = n.repairPaths(ctx, []flox.StorePath{p.Info.Path})
	}
	if err != nil {
		return nil, err
	}
	return &worker.Info{PathInfo: *p.Info}, nil
}

// AddSignatures implements worker.Adder. As with Nix they are not checked: who
// reads them does that. They stay on this machine.
func (n *nixSession) AddSignatures(ctx context.Context, p flox.StorePath, sigs []string) error {
	info, err := n.a.lookup(ctx, p)
	if err == nil && info.Path != p {
		err = fmt.Errorf("%s: %w", p, flox.ErrNotFound)
	}
	if err != nil {
		return n.say(p, err)
	}
	if _, err := n.a.staged.Path(p); err == nil {
		return n.a.staged.Sign(p, sigs)
	}
	signed := *info
	if signed.Signatures, err = staging.AppendSignatures(p, info.Signatures, sigs); err != nil {
		return err
	}
	return n.a.facts.put(&signed)
}

// publish makes the derivations among targets valid in the storehouse, with
// what they need and only this machine has.
func (n *nixSession) publish(ctx context.Context, targets []worker.DerivedPath) error {
	var drvs []flox.StorePath
	for _, t := range targets {
		if !t.IsOpaque() {
			drvs = append(drvs, t.Path)
		}
	}
	if len(drvs) == 0 {
		return nil
	}
	_, err := n.a.PublishStaged(ctx, drvs...)
	return err
}
