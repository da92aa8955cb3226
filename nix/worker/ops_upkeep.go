package worker

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/floxctl/flox"
)

// upkeepOps are about the connection and the store as a whole.
var upkeepOps = map[Op]operation{
	OpSetOptions:    {name: "SetOptions", serve: setOptions},
	OpOptimiseStore: {name: "OptimiseStore", serve: optimiseStore},
	OpVerifyStore:   {name: "VerifyStore", serve: verifyStore},
}

func setOptions(c *call) error {
	o := Options{
		KeepFailed: c.in.bool(), KeepGoing: c.in.bool(), TryFallback: c.in.bool(),
		Level: Level(min(c.in.u64(), uint64(LevelVomit))), MaxBuildJobs: c.in.u64(),
		MaxSilent: time.Duration(c.in.number(math.MaxInt64/uint64(time.Second))) * time.Second,
	}
	c.in.u64() // use of the build hook, obsolete
	o.VerboseBuild = Level(c.in.u64()) == LevelError
	c.in.u64() // kind of log, obsolete
	c.in.u64() // print a build trace, obsolete
	o.Cores, o.UseSubstitutes = c.in.u64(), c.in.bool()
	o.Settings = c.in.settings(maxWord)
	if err := c.start(); err != nil {
		return err
	}
	ignored := restrict(o.Settings, c.session.Trusted())
	o.fromSettings()
	c.session.setOptions(o)
	slices.Sort(ignored)
	for _, name := range ignored {
		c.log.Message(LevelWarn, fmt.Sprintf("warning: ignoring the client-specified setting '%s', because it is a restricted setting and you are not a trusted user", shorten(name)))
	}
	return c.finish()
}

// fromSettings takes over what clients say by a setting's name only. They send the
// names of today; those of old are for the same.
func (o *Options) fromSettings() {
	for _, name := range []string{"timeout", "build-timeout"} {
		if n, err := strconv.ParseUint(strings.TrimSpace(o.Settings[name]), 10, 32); err == nil && n > 0 {
			o.Timeout = time.Duration(n) * time.Second
		}
	}
	set := false
	for _, name := range []string{"substituters", "binary-caches", "extra-substituters", "extra-binary-caches"} {
		value, named := o.Settings[name]
		if strings.TrimSpace(value) != "" {
			return
		}
		set = set || named && !strings.HasPrefix(name, "extra-")
	}
	if set {
		o.UseSubstitutes = false
	}
}

func optimiseStore(c *call) error {
	if err := c.start(); err != nil {
		return err
	}
	if err := c.store.Collector.Optimise(c.ctx); err != nil {
		return err
	}
	return c.done()
}

func verifyStore(c *call) error {
	contents, repair := c.in.bool(), c.in.bool()
	if err := c.start(); err != nil {
		return err
	}
	if repair && !c.session.Trusted() {
		return errorf(flox.ErrDenied, "you are not privileged to repair paths")
	}
	wrong, err := c.store.Collector.Verify(c.ctx, contents, repair)
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.bool(wrong)
	return nil
}
