package worker

import (
	"cmp"
	"path"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// rootOps keep paths and collect the others.
var rootOps = map[Op]operation{
	OpAddTempRoot:     {name: "AddTempRoot", serve: addTempRoot},
	OpAddIndirectRoot: {name: "AddIndirectRoot", serve: addIndirectRoot},
	OpAddPermRoot:     {name: "AddPermRoot", since: 1<<8 | 36, serve: addPermRoot},
	OpSyncWithGC:      {name: "SyncWithGC", serve: syncWithGC},
	OpFindRoots:       {name: "FindRoots", serve: findRoots},
	OpCollectGarbage:  {name: "CollectGarbage", serve: collectGarbage},
}

func addTempRoot(c *call) error {
	p := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	if err := c.store.Roots.AddTemp(c.ctx, p); err != nil {
		return err
	}
	return c.done()
}

// link reads the path of a symlink on the client's machine.
func (c *call) link() string {
	s := c.in.str(maxPath)
	if c.in.err == nil && (!strings.HasPrefix(s, "/") || strings.IndexByte(s, 0) >= 0) {
		c.in.bad("garbage collector root '%s': want an absolute path", shorten(s))
	}
	return path.Clean(s)
}

func addIndirectRoot(c *call) error {
	link := c.link()
	if err := c.start(); err != nil {
		return err
	}
	if err := c.store.Roots.AddIndirect(c.ctx, link); err != nil {
		return err
	}
	return c.done()
}

func addPermRoot(c *call) error {
	p, link := c.in.path(), c.link()
	if err := c.start(); err != nil {
		return err
	}
	if !c.session.Trusted() {
		return errorf(flox.ErrDenied, "you are not privileged to create perm roots\n\n"+
			"hint: you can just do this client-side without special privileges, and probably want to do that instead.")
	}
	if err := c.store.Roots.AddPermanent(c.ctx, p, link); err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.str(link)
	return nil
}

// syncWithGC has done nothing since Nix 2.4.
func syncWithGC(c *call) error {
	if err := c.start(); err != nil {
		return err
	}
	return c.done()
}

func findRoots(c *call) error {
	if err := c.start(); err != nil {
		return err
	}
	roots, err := c.store.Roots.Find(c.ctx, !c.session.Trusted())
	if err != nil {
		return err
	}
	slices.SortFunc(roots, func(a, b Root) int { return cmp.Or(cmp.Compare(a.Target, b.Target), cmp.Compare(a.Link, b.Link)) })
	roots = slices.Compact(roots)
	if err := c.finish(); err != nil {
		return err
	}
	c.out.u64(uint64(len(roots)))
	for _, r := range roots {
		c.out.str(r.Link)
		c.out.path(r.Target)
	}
	return nil
}

func collectGarbage(c *call) error {
	o := GCOptions{Action: GCAction(c.in.number(uint64(GCDeleteSpecific))), Paths: c.in.paths()}
	ignoreLiveness := c.in.bool()
	o.MaxFreed = c.in.u64()
	for range 3 { // obsolete
		c.in.u64()
	}
	if err := c.start(); err != nil {
		return err
	}
	if ignoreLiveness {
		return errorf(flox.ErrDenied, "you are not allowed to ignore liveness")
	}
	result, err := c.store.Collector.Collect(c.ctx, o)
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.strs(result.Paths)
	c.out.u64(result.Freed)
	c.out.u64(0) // obsolete
	return nil
}
