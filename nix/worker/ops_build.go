package worker

import (
	"fmt"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// buildOps make outputs.
var buildOps = map[Op]operation{
	OpBuildPaths:            {name: "BuildPaths", serve: buildPaths},
	OpBuildPathsWithResults: {name: "BuildPathsWithResults", since: v34, serve: buildPathsWithResults},
	OpBuildDerivation:       {name: "BuildDerivation", serve: buildDerivation},
	OpQueryMissing:          {name: "QueryMissing", serve: queryMissing},
}

// buildTargets serves what both kinds of building have in common.
func (c *call) buildTargets() ([]TargetResult, error) {
	targets := c.in.derived()
	mode := BuildMode(c.in.number(uint64(BuildCheck)))
	if err := c.start(); err != nil {
		return nil, err
	}
	if mode == BuildRepair && !c.session.Trusted() {
		return nil, errorf(flox.ErrDenied, "repairing is not allowed because you are not in 'trusted-users'")
	}
	if len(targets) == 0 {
		return nil, nil
	}
	results, err := c.store.Builder.Build(c.ctx, targets, mode)
	if err == nil && len(results) != len(targets) {
		err = fmt.Errorf("%d results for %d targets: %w", len(results), len(targets), flox.ErrClosed)
	}
	return results, err
}

func buildPaths(c *call) error {
	results, err := c.buildTargets()
	if err != nil {
		return err
	}
	if err := c.failure(results); err != nil {
		return err
	}
	return c.done()
}

// failure puts results in the words of Nix's buildPaths: the one failure's
// own, or which failed (Nix 2.8 src/libstore/build/entry-points.cc).
func (c *call) failure(results []TargetResult) error {
	var failed []*TargetResult
	for i := range results {
		if !results[i].Status.Succeeded() {
			failed = append(failed, &results[i])
		}
	}
	switch {
	case len(failed) == 0:
		return nil
	case len(failed) == 1 && failed[0].Error != "":
		return errorf(nil, "%s", failed[0].Error)
	}
	names := make([]string, 0, len(failed))
	for _, r := range failed {
		names = append(names, "'"+c.in.dir.Join(r.Target.Path)+"'")
		if len(failed) > 1 && r.Error != "" {
			c.log.Message(LevelError, "error: "+r.Error)
		}
	}
	return errorf(nil, "build of %s failed", strings.Join(names, ", "))
}

func buildPathsWithResults(c *call) error {
	results, err := c.buildTargets()
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.u64(uint64(len(results)))
	for i := range results {
		c.out.str(results[i].Target.text(c.in.dir))
		c.out.buildResult(&results[i].BuildResult)
	}
	return nil
}

func buildDerivation(c *call) error {
	path := c.in.path()
	drv := c.in.derivation(path)
	mode := BuildMode(c.in.number(uint64(BuildCheck)))
	if err := c.start(); err != nil {
		return err
	}
	if !c.session.Trusted() && !contentAddressed(&drv) {
		return errorf(flox.ErrDenied, "you are not privileged to build input-addressed derivations")
	}
	result, err := c.store.Builder.BuildDerivation(c.ctx, path, &drv, mode)
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.buildResult(result)
	return nil
}

// contentAddressed reports whether the content of every output decides or
// checks its path, so that nobody needs to be believed.
func contentAddressed(drv *nix.Derivation) bool {
	for _, o := range drv.Outputs {
		if o.Algo == "" {
			return false
		}
	}
	return len(drv.Outputs) > 0
}

func queryMissing(c *call) error {
	targets := c.in.derived()
	if err := c.start(); err != nil {
		return err
	}
	missing, err := c.store.Builder.Missing(c.ctx, targets)
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.paths(missing.Build)
	c.out.paths(missing.Substitute)
	c.out.paths(missing.Unknown)
	c.out.u64(missing.DownloadSize)
	c.out.u64(missing.NarSize)
	return nil
}
