package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
)

// Verify implements worker.Collector. Without contents there is nothing that
// could be wrong; with them, what is here is read and compared with its hashes.
// Damaged bytes of the storehouse's paths are dropped and come again when they are
// read, which is all there is to repair. What was added here and nowhere else can
// only be added again.
func (c nixCollector) Verify(ctx context.Context, contents, repair bool) (wrong bool, err error) {
	log := c.n.s.Log()
	log.Message(worker.LevelInfo, "reading the Nix store...")
	log.Message(worker.LevelInfo, "checking path existence...")
	if !contents {
		return false, nil
	}
	log.Message(worker.LevelInfo, "checking store hashes...")
	infos, err := (&control{a: c.n.a}).verified(ctx, nil)
	if err != nil {
		return false, err
	}
	dropped, err := c.n.verify(ctx, infos)
	if err != nil {
		return false, err
	}
	lost, err := c.n.verifyStaged(ctx)
	return lost || dropped && !repair, err
}

// verify reads what is here of paths, drops what is damaged and tells the client.
func (n *nixSession) verify(ctx context.Context, infos []*flox.PathInfo) (dropped bool, err error) {
	control, found := &control{a: n.a}, &verification{}
	for _, info := range infos {
		t, err := n.a.open(ctx, info)
		if errors.Is(err, flox.ErrUnreachable) {
			continue // only its facts are here
		}
		if err == nil {
			err = t.files(ctx, func(i uint32, name string, e flox.Entry) error { return control.verifyFile(ctx, t, i, name, e, found) })
		}
		if err != nil {
			return false, err
		}
	}
	for _, bad := range found.said.Bad {
		n.s.Log().Message(worker.LevelError, bad)
	}
	return len(found.said.Bad) > 0, nil
}

// verifyStaged reads what was added on this machine, and says in Nix's words what is
// not what it was.
func (n *nixSession) verifyStaged(ctx context.Context) (wrong bool, err error) {
	staged := n.a.staged
	err = staged.List(ctx, "", func(p *staging.Path) bool {
		sum := sha256.New()
		m, err := staged.Open(ctx, p)
		if err == nil {
			err = m.WriteNar(ctx, sum, staged, 0, -1)
		}
		if _, gone := staged.Path(p.Info.Path); gone != nil || ctx.Err() != nil {
			return ctx.Err() == nil
		}
		said := ""
		if got := [32]byte(sum.Sum(nil)); err != nil {
			said = err.Error()
		} else if got != p.Info.NarHash {
			said = fmt.Sprintf("expected hash '%s', got '%s'", nix.SHA256Hash(p.Info.NarHash), nix.SHA256Hash(got))
		}
		if said != "" {
			wrong = true
			n.s.Log().Message(worker.LevelError, fmt.Sprintf("path '%s' was modified! %s", n.a.cfg.StoreDir.Join(p.Info.Path), said))
		}
		return true
	})
	return wrong, err
}

// repair is what building in the mode of that name does behind the build: what is here
// of the results is read, and what is damaged dropped.
func (n *nixSession) repair(ctx context.Context, results []worker.TargetResult) error {
	var paths []flox.StorePath
	for _, r := range results {
		paths = append(paths, r.Target.Path)
		for _, o := range r.Outputs {
			paths = append(paths, o.Path)
		}
	}
	return n.repairPaths(ctx, paths)
}

// repairPaths is also what adding a path with Repair does, if it is valid already.
func (n *nixSession) repairPaths(ctx context.Context, paths []flox.StorePath) error {
	var infos []*flox.PathInfo
	for _, p := range paths {
		if info, ok := n.a.facts.get(p.HashPart()); ok && info.Path == p && n.a.cache.Has([]flox.CID{info.Manifest})[0] {
			infos = append(infos, info)
		}
	}
	_, err := n.verify(ctx, infos)
	return err
}
