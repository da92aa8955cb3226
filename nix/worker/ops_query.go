package worker

import (
	"errors"
	"slices"

	"github.com/floxctl/flox"
)

// queryOps ask for facts.
var queryOps = map[Op]operation{
	OpIsValidPath:              {name: "IsValidPath", serve: isValidPath},
	OpQueryReferrers:           {name: "QueryReferrers", serve: queryReferrers},
	OpQueryAllValidPaths:       {name: "QueryAllValidPaths", serve: queryAllValidPaths},
	OpQueryPathInfo:            {name: "QueryPathInfo", serve: queryPathInfo},
	OpQueryPathFromHashPart:    {name: "QueryPathFromHashPart", serve: queryPathFromHashPart},
	OpQueryValidPaths:          {name: "QueryValidPaths", serve: queryValidPaths},
	OpQueryValidDerivers:       {name: "QueryValidDerivers", serve: queryValidDerivers},
	OpQueryDerivationOutputMap: {name: "QueryDerivationOutputMap", serve: queryDerivationOutputMap},
	OpQueryRealisation:         {name: "QueryRealisation", serve: queryRealisation},
	OpNarFromPath:              {name: "NarFromPath", serve: narFromPath},
}

func isValidPath(c *call) error {
	path := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	valid, err := c.store.Paths.Valid(c.ctx, []flox.StorePath{path}, false)
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.bool(slices.Contains(valid, path))
	return nil
}

func queryValidPaths(c *call) error {
	paths, substitute := c.in.paths(), c.in.bool()
	if err := c.start(); err != nil {
		return err
	}
	valid, err := c.store.Paths.Valid(c.ctx, paths, substitute)
	return c.replyPaths(valid, err)
}

// replyPaths ends an operation that answers a set of paths.
func (c *call) replyPaths(set []flox.StorePath, err error) error {
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.paths(set)
	return nil
}

func queryReferrers(c *call) error {
	path := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	referrers, err := c.store.Paths.Referrers(c.ctx, path)
	return c.replyPaths(referrers, err)
}

func queryValidDerivers(c *call) error {
	path := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	derivers, err := c.store.Derivations.Derivers(c.ctx, path)
	return c.replyPaths(derivers, err)
}

func queryAllValidPaths(c *call) error {
	if err := c.start(); err != nil {
		return err
	}
	all, err := c.store.Paths.All(c.ctx)
	return c.replyPaths(all, err)
}

// queryPathInfo answers "not valid" by a word, not an error.
func queryPathInfo(c *call) error {
	path := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	info, err := c.store.Paths.Info(c.ctx, path)
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if ferr := c.finish(); ferr != nil {
		return ferr
	}
	c.out.bool(err == nil)
	if err == nil {
		c.out.info(info)
	}
	return nil
}

func queryPathFromHashPart(c *call) error {
	hash := c.in.str(maxWord)
	if err := c.start(); err != nil {
		return err
	}
	if len(hash) != flox.HashPartLen {
		return errorf(flox.ErrBadInput, "invalid hash part")
	}
	path := flox.StorePath("")
	if flox.ValidHashPart(hash) {
		var err error
		if path, err = c.store.Paths.ByHashPart(c.ctx, hash); err != nil {
			return err
		}
	}
	return c.replyPath(path, nil)
}

// replyPath ends an operation that answers a path or none.
func (c *call) replyPath(path flox.StorePath, err error) error {
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.opath(path)
	return nil
}

func queryDerivationOutputMap(c *call) error {
	drv := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	outputs, err := c.store.Derivations.Outputs(c.ctx, drv)
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.outputs(outputs)
	return nil
}

func queryRealisation(c *call) error {
	id := c.in.drvOutput()
	if err := c.start(); err != nil {
		return err
	}
	r, err := c.store.Realisations.Realisation(c.ctx, id)
	if err != nil && !errors.Is(err, flox.ErrNotFound) {
		return err
	}
	if ferr := c.finish(); ferr != nil {
		return ferr
	}
	if err != nil {
		c.out.u64(0)
		return nil
	}
	c.out.u64(1)
	c.out.realisation(r)
	return nil
}

// narFromPath sends the NAR right behind LAST, without a length. A client of
// 2.8 does not look at an ERROR here and waits for a NAR: it has to see the
// connection end.
func narFromPath(c *call) error {
	path := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	c.last = true
	if err := c.store.Files.Nar(c.ctx, path, &narReply{c: c}); err != nil {
		return err
	}
	if c.open {
		return errorf(flox.ErrCorrupt, "path '%s' has no content", c.in.dir.Join(path))
	}
	c.last = false
	return nil
}

// narReply closes the window when the first byte of the reply comes.
type narReply struct{ c *call }

func (n *narReply) Write(p []byte) (int, error) {
	if n.c.open {
		if err := n.c.finish(); err != nil {
			return 0, err
		}
	}
	n.c.out.raw(p)
	if n.c.out.err != nil {
		return 0, n.c.out.err
	}
	return len(p), nil
}
