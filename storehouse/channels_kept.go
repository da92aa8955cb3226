package storehouse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile/channel"
	cluster "github.com/floxctl/flox/raft"
)

// keepDerivation notes what a package was made of, so that it can be made again when its version of
// the channel is gone. What is not noted is installed all the same.
func (c *channels) keepDerivation(ctx context.Context, f *found) {
	if f.pkg.GetDropped() {
		return
	}
	drv := flox.StorePath(f.pkg.GetDrv())
	valid, err := c.s.isValid(ctx, drv)
	noted := false
	if err == nil && valid {
		err = c.view(ctx, cluster.Local, func(r *cluster.Reader) error {
			all, err := channel.Kept(r, f.pkg.GetChannel())
			for _, k := range all {
				is := k.GetPackage()
				noted = noted || is.GetDrv() == f.pkg.GetDrv() && is.GetAttr() == f.pkg.GetAttr() && is.GetVersion() == f.pkg.GetVersion() && is.GetSystem() == f.pkg.GetSystem()
			}
			return err
		})
	}
	if err == nil && valid && !noted {
		_, err = c.propose(ctx, c.s.itself(), &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Keep{Keep: &floxv1.KeepDerivation{
			Channel: f.pkg.GetChannel(), Kept: &floxv1.KeptDerivation{Package: f.pkg},
		}}})
	}
	if err != nil {
		c.s.cfg.Log.Warn("the derivation of a package is not kept for when its version of the channel is gone", "package", f.pkg.GetAttr(), "channel", f.pkg.GetChannel(), "error", err)
	}
}

// findKept gives a package that no version of a channel has any more, if what it was made
// of is kept; else missing, which says what the newest version has.
func (c *channels) findKept(r *cluster.Reader, of *floxv1.Channel, name, version, system string, missing error) (*found, error) {
	kept, err := channel.Kept(r, of.GetName())
	if err != nil {
		return nil, err
	}
	p := channel.FindKept(kept, name, version, system)
	switch {
	case p != nil:
		p = proto.CloneOf(p)
		p.Dropped = true
		return &found{pkg: p}, nil
	case of.GetFirst() > 1 && !isUnknown(missing):
		missing = fmt.Errorf("%w; of the channel's versions %d to %d are kept, and of earlier ones what somebody had made", missing, of.GetFirst(), of.GetLast())
	}
	return nil, missing
}

// derivationRoots calls yield with what packages of a channel were made of, until it gives false.
func derivationRoots(r *cluster.Reader, name string, yield func(root) bool) (more bool, err error) {
	kept, err := channel.Kept(r, name)
	for _, k := range kept {
		p := k.GetPackage()
		if err != nil || !yield(root{kind: rootChannel, name: name + " " + wordsOf(p), hashPart: flox.StorePath(p.GetDrv()).HashPart()}) {
			return false, err
		}
	}
	return true, err
}

// expireLoop forgets on the leader versions of channels that are too old, until ctx ends.
func (c *channels) expireLoop(ctx context.Context) error {
	return c.s.asLeader(ctx, pruneEvery, nil, "forget versions of channels that are too old", c.expireAll)
}

// expireAll forgets what is too old at a time. What was made of it is made again of its
// derivations.
func (c *channels) expireAll(ctx context.Context, now time.Time) error {
	var due []string
	err := c.view(ctx, cluster.Local, func(r *cluster.Reader) error {
		all, err := channel.List(r)
		for _, of := range all {
			first := of.GetFirst()
			if err == nil {
				first, err = channel.FirstYoung(r, of, now)
			}
			if err == nil && first > of.GetFirst() {
				due = append(due, of.GetName())
			}
		}
		return err
	})
	for _, name := range due {
		_, failed := c.propose(freeing(ctx), c.s.itself(), &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Expire{Expire: name}})
		if failed != nil && !errors.Is(failed, flox.ErrNotFound) {
			err = errors.Join(err, fmt.Errorf("channel %s: %w", name, failed))
		}
	}
	return err
}

// wordsOf is how people call a package.
func wordsOf(p *floxv1.CataloguePackage) string {
	return strings.TrimSpace(p.GetName() + " " + p.GetVersion())
}
