package storehouse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/profile/channel"
	"github.com/floxctl/flox/profile/tarball"
	cluster "github.com/floxctl/flox/raft"
)

// found is a package that a name means on one system.
type found struct {
	pkg     *floxv1.CataloguePackage
	version *floxv1.ChannelVersion
}

// find gives what [CHANNEL.]NAME[@VERSION] means on a system. Without a version the
// newest version of a channel is asked, with one the newest that has it.
func (c *channels) find(ctx context.Context, word, system string) (*found, error) {
	if err := channel.CheckSystem(system); err != nil {
		return nil, err
	}
	states, err := c.newest(ctx, "")
	if err != nil {
		return nil, err
	}
	if len(states) == 0 {
		return nil, c.noChannel(ctx, word)
	}
	byName := map[string]*floxv1.ChannelState{}
	for _, s := range states {
		byName[strings.ToLower(s.GetChannel().GetName())] = s
	}
	of, name, version, err := channel.ParseWanted(word, func(ch string) bool { return byName[strings.ToLower(ch)] != nil })
	if err != nil {
		return nil, err
	}
	if of != "" {
		states = []*floxv1.ChannelState{byName[strings.ToLower(of)]}
	}
	var all []*found
	var failed error
	for _, s := range states {
		f, err := c.findIn(ctx, s, name, version, system)
		switch {
		case err == nil:
			all = append(all, f)
		case !errors.Is(err, flox.ErrNotFound) && !errors.Is(err, flox.ErrBadInput):
			return nil, err
		case failed == nil || isUnknown(failed) && !isUnknown(err) || isUnknown(failed) && hasNear(err) && !hasNear(failed):
			failed = err // the one that says most
		}
	}
	switch len(all) {
	case 0:
		return nil, failed
	case 1:
		return all[0], nil
	}
	return nil, fmt.Errorf("package %s is in the channels %s and %s: say %s.%s: %w", word, all[0].pkg.GetChannel(), all[1].pkg.GetChannel(), all[0].pkg.GetChannel(), word, flox.ErrBadInput)
}

// noChannel says that no package has a name yet, and what to do.
func (c *channels) noChannel(ctx context.Context, word string) error {
	all, err := c.list(ctx)
	switch {
	case err != nil:
		return err
	case len(all) > 0:
		name := all[0].GetChannel().GetName()
		return fmt.Errorf("package %s: channel %s was not fetched yet, and there is no other; see: floxctl channel show %s: %w", word, name, name, flox.ErrNotFound)
	}
	return fmt.Errorf("package %s: there is no channel, where packages have names: make one with floxctl channel publish NAME DIR, have nixpkgs with floxctl channel track nixpkgs %s, or name a store path or FILE#ATTR: %w",
		word, tarball.Nixpkgs, flox.ErrNotFound)
}

func isUnknown(err error) bool {
	unknown := (*channel.UnknownError)(nil)
	return errors.As(err, &unknown)
}

func hasNear(err error) bool {
	unknown := (*channel.UnknownError)(nil)
	return errors.As(err, &unknown) && len(unknown.Near) > 0
}

// findIn finds a package in a channel.
func (c *channels) findIn(ctx context.Context, s *floxv1.ChannelState, name, version, system string) (*found, error) {
	look := func(v *floxv1.ChannelVersion) (*found, error) {
		cat, err := c.catalogue(ctx, v.GetCatalogue())
		if err != nil {
			return nil, fmt.Errorf("channel %s: %w", s.GetChannel().GetName(), err)
		}
		e, err := cat.Find(name, version, system)
		if err != nil {
			return nil, fmt.Errorf("channel %s: %w", s.GetChannel().GetName(), err)
		}
		return &found{packageOf(s.GetChannel().GetName(), v, e), v}, nil
	}
	f, first := look(s.GetNewest())
	if first == nil || version == "" || !errors.Is(first, flox.ErrNotFound) {
		return f, first
	}
	var older []*floxv1.ChannelVersion
	var kept *found
	err := c.view(ctx, cluster.Local, func(r *cluster.Reader) (err error) {
		if older, err = channel.Versions(r, s.GetChannel().GetName()); err == nil {
			kept, first = c.findKept(r, s.GetChannel(), name, version, system, first)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, v := range older {
		if v.GetNumber() >= s.GetNewest().GetNumber() {
			continue
		}
		if f, err = look(v); err == nil || !errors.Is(err, flox.ErrNotFound) {
			return f, err
		}
	}
	if kept != nil {
		return kept, nil
	}
	return nil, first
}

// build makes a package valid on some systems, and gives it for each with its paths.
func (c *channels) build(ctx context.Context, asked string, q *floxv1.BuildPackageRequest, tell func(*floxv1.BuildPackageProgress)) error {
	if n := len(q.GetSystems()); n == 0 || n > maxWantedSystems {
		return fmt.Errorf("package %s for %d systems, want 1 to %d: %w", q.GetName(), n, maxWantedSystems, flox.ErrBadInput)
	}
	all := make([]*found, len(q.GetSystems()))
	for i, system := range q.GetSystems() { // all of them, before anything is built
		f, err := c.find(ctx, q.GetName(), system)
		if err != nil {
			return err
		}
		all[i] = f
	}
	end := &floxv1.BuildPackageProgress{}
	for _, f := range all {
		if !q.GetFind() {
			if err := c.buildOne(ctx, asked, f, q.GetBatch(), tell); err != nil {
				return err
			}
		}
		end.Packages = append(end.Packages, f.pkg)
	}
	tell(end)
	return nil
}

// buildOne makes the outputs of a package that are to be installed valid.
func (c *channels) buildOne(ctx context.Context, asked string, f *found, batch bool, tell func(*floxv1.BuildPackageProgress)) error {
	here := true
	for _, path := range f.pkg.GetPaths() {
		valid := false
		if path != "" {
			var err error
			if valid, err = c.s.isValid(ctx, flox.StorePath(path)); err != nil {
				return err
			}
		}
		here = here && valid
	}
	if here {
		c.keepDerivation(ctx, f)
		return nil
	}
	doing := func(words string) { tell(&floxv1.BuildPackageProgress{Doing: words}) }
	drv := flox.StorePath(f.pkg.GetDrv())
	if valid, err := c.s.isValid(ctx, drv); err != nil {
		return err
	} else if !valid && f.pkg.GetDropped() {
		return fmt.Errorf("package %s of channel %s: version %d of the channel is not kept any more, and the derivation %s is not in the storehouse: %w",
			wordsOf(f.pkg), f.pkg.GetChannel(), f.pkg.GetVersionNumber(), drv, flox.ErrNotFound)
	} else if !valid {
		doing("evaluates " + f.pkg.GetAttr() + " for " + f.pkg.GetSystem())
		if err := c.instantiate(ctx, f, doing); err != nil {
			return err
		}
	}
	again := ""
	if f.pkg.GetDropped() {
		again = " again, of its derivation"
	}
	doing("makes " + wordsOf(f.pkg) + " for " + f.pkg.GetSystem() + again)
	rpc := &buildsRPC{builds: c.s.builds}
	var out *floxv1.BuildOutcome
	err := rpc.serve(ctx, asked, &floxv1.BuildRequest{Paths: []*floxv1.DerivedPath{{Path: string(drv), Outputs: f.pkg.GetOutputs()}}, Batch: batch}, func(e *floxv1.BuildEvent) error {
		switch e := e.GetEvent().(type) {
		case *floxv1.BuildEvent_Line:
			tell(&floxv1.BuildPackageProgress{Line: e.Line.GetText()})
		case *floxv1.BuildEvent_Result:
			out = e.Result.GetOutcome()
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	if !ok(out) {
		return fmt.Errorf("package %s for %s could not be made: %s: %w", f.pkg.GetName(), f.pkg.GetSystem(), out.GetMessage(), flox.ErrBadInput)
	}
	paths := map[string]string{}
	for _, o := range out.GetOutputs() {
		paths[o.GetName()] = o.GetPath()
	}
	for i, output := range f.pkg.GetOutputs() {
		f.pkg.Paths[i] = paths[output]
	}
	c.keepDerivation(ctx, f)
	return nil
}

// instantiate makes the derivation of a package valid, with all it needs.
func (c *channels) instantiate(ctx context.Context, f *found, doing func(string)) error {
	release, err := c.s.Hold(ctx, flox.StorePath(f.version.GetSource()))
	if err != nil {
		return err
	}
	defer release()
	e, leave, err := c.evaluator(ctx, doing)
	if err != nil {
		return err
	}
	defer leave()
	x := &buildfarm.Expression{Source: flox.StorePath(f.version.GetSource()), File: f.version.GetFile(), System: f.pkg.GetSystem()}
	a, err := e.Instantiate(ctx, x, f.pkg.GetAttr(), buildSource{c.s}, func(ctx context.Context, info *flox.PathInfo, nar func(io.Writer) error) error {
		return piped(nar, func(r io.Reader) error {
			_, _, err := c.s.Publish(ctx, info, r, "channel "+f.pkg.GetChannel())
			return err
		})
	})
	if err == nil && string(a.Drv) != f.pkg.GetDrv() {
		err = fmt.Errorf("%s of channel %s, version %d, is %s now, and was %s in the catalogue: publish the channel anew: %w",
			f.pkg.GetAttr(), f.pkg.GetChannel(), f.version.GetNumber(), a.Drv, f.pkg.GetDrv(), flox.ErrCorrupt)
	}
	return err
}
