package worker

import (
	"cmp"
	"slices"

	"github.com/floxctl/flox"
)

// substituteOps ask for and fetch what is elsewhere.
var substituteOps = map[Op]operation{
	OpEnsurePath:                  {name: "EnsurePath", serve: ensurePath},
	OpQuerySubstitutablePathInfos: {name: "QuerySubstitutablePathInfos", serve: querySubstitutablePathInfos},
	OpQuerySubstitutablePaths:     {name: "QuerySubstitutablePaths", serve: querySubstitutablePaths},
}

func ensurePath(c *call) error {
	path := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	if err := c.store.Substitutes.Ensure(c.ctx, path); err != nil {
		return err
	}
	return c.done()
}

func querySubstitutablePathInfos(c *call) error {
	wanted := make(map[flox.StorePath]string)
	for range c.in.count() {
		path, ca := c.in.path(), c.in.ca()
		if c.in.err != nil {
			break
		}
		wanted[path] = ca
	}
	if err := c.start(); err != nil {
		return err
	}
	found, err := c.substitutable(wanted)
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.u64(uint64(len(found)))
	for i := range found {
		c.out.path(found[i].Path)
		c.out.substitutable(&found[i])
	}
	return nil
}

// substitutable asks for paths; what comes back is sorted and was asked for.
func (c *call) substitutable(wanted map[flox.StorePath]string) ([]Substitutable, error) {
	if len(wanted) == 0 || !c.session.Options().UseSubstitutes {
		return nil, nil
	}
	found, err := c.store.Substitutes.Substitutable(c.ctx, wanted)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(found, func(a, b Substitutable) int { return cmp.Compare(a.Path, b.Path) })
	return slices.CompactFunc(found, func(a, b Substitutable) bool { return a.Path == b.Path }), nil
}

func querySubstitutablePaths(c *call) error {
	wanted := make(map[flox.StorePath]string)
	for _, p := range c.in.paths() {
		wanted[p] = ""
	}
	if err := c.start(); err != nil {
		return err
	}
	found, err := c.substitutable(wanted)
	paths := make([]flox.StorePath, 0, len(found))
	for i := range found {
		paths = append(paths, found[i].Path)
	}
	return c.replyPaths(paths, err)
}
