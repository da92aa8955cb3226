package storehouse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/buildfarm"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/profile"
	"github.com/floxctl/flox/profile/channel"
	cluster "github.com/floxctl/flox/raft"
)

const (
	rootChannel = "channel"
	// catalogueName is that of all catalogues: equal ones are one path.
	catalogueName = "catalogue"
	// maxCatalogues bounds the catalogues that are kept in memory, in bytes; the one
	// that is in use may be larger.
	maxCatalogues = 512 << 20
	// maxFailuresTold is how many attributes that cannot be evaluated an answer names.
	maxFailuresTold = 20
	// maxWantedSystems is for how many systems a package is built with one call.
	maxWantedSystems = 16
	defaultFound     = 50
)

// channels publishes channels, and finds and builds what they have.
type channels struct {
	s          *Server
	fetching   fetching
	evaluating chan struct{} // one evaluation at a time: each takes a processor and much memory
	reading    chan struct{} // one catalogue at a time

	mu    sync.Mutex
	here  map[string]*readCatalogue // by base name
	bytes int
	uses  uint64
}

type readCatalogue struct {
	*channel.Catalogue
	last uint64 // use
}

func newChannels(s *Server) *channels {
	return &channels{s: s, fetching: fetching{turn: make(chan struct{}, 1)}, evaluating: make(chan struct{}, 1), reading: make(chan struct{}, 1), here: map[string]*readCatalogue{}}
}

// expressions is a worker that evaluates Nix expressions. It is buildfarm.Builder.
type expressions interface {
	Catalogue(ctx context.Context, x *buildfarm.Expression, from buildfarm.Source, tell func(done, all int)) ([]buildfarm.Attribute, error)
	Instantiate(ctx context.Context, x *buildfarm.Expression, attr string, from buildfarm.Source, take func(context.Context, *flox.PathInfo, func(io.Writer) error) error) (*buildfarm.Attribute, error)
}

// evaluator waits for this server's, and for the turn to use it.
func (c *channels) evaluator(ctx context.Context, tell func(doing string)) (e expressions, leave func(), err error) {
	if err := c.s.builds.ready(ctx); err != nil {
		return nil, nil, err
	}
	b := c.s.builds
	b.mu.Lock()
	e, ok := b.worker.(expressions)
	b.mu.Unlock()
	if !ok {
		return nil, nil, errNoBuilder
	}
	select {
	case c.evaluating <- struct{}{}:
		return e, func() { <-c.evaluating }, nil
	default:
	}
	tell("waits for another evaluation")
	select {
	case c.evaluating <- struct{}{}:
		return e, func() { <-c.evaluating }, nil
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("another expression is being evaluated: %w: %w", context.Cause(ctx), flox.ErrBusy)
	}
}

// view calls f with the channels as of now.
func (c *channels) view(ctx context.Context, how cluster.Consistency, f func(r *cluster.Reader) error) error {
	return c.s.viewing(ctx, channel.Kind, how, f)
}

// propose puts a command about channels into the log.
func (c *channels) propose(ctx context.Context, who person, m *floxv1.ChannelsCommand) (*floxv1.ChannelsReply, error) {
	m.Actor, m.Admin = who.Actor, who.admin
	reply := &floxv1.ChannelsReply{}
	return reply, c.s.proposed(ctx, channel.Level(m), channel.Kind, m, reply)
}

// publish evaluates an expression and makes a version of a channel of it. What is so
// already makes none.
func (c *channels) publish(ctx context.Context, who person, q *floxv1.PublishChannelRequest, tell func(*floxv1.PublishChannelProgress)) error {
	newest, err := c.mayPublish(ctx, who, q)
	if err != nil {
		return err
	}
	source, err := flox.ParseStorePath(q.GetSource())
	if err != nil {
		return err
	}
	release, err := c.s.Hold(ctx, source)
	if err != nil {
		return err
	}
	defer release()
	if valid, err := c.s.isValid(ctx, source); err != nil || !valid {
		return errors.Join(err, fmt.Errorf("channel %s: %s is not in the storehouse: %w", q.GetChannel(), source, flox.ErrNotFound))
	}
	v := &floxv1.ChannelVersion{Source: string(source), File: q.GetFile(), Systems: q.GetSystems(), Reason: q.GetReason()}
	end := &floxv1.PublishChannelProgress{Version: v}
	entries, err := c.evaluate(ctx, v, end, tell)
	if err != nil {
		return err
	}
	if v.GetPackages() == v.GetFailed() {
		return fmt.Errorf("channel %s: nothing of %s can be installed; nothing was published: %s: %w", q.GetChannel(), source, strings.Join(append(end.GetFailures(), "it has no derivation")[:1], ""), flox.ErrBadInput)
	}
	tell(&floxv1.PublishChannelProgress{Doing: "writes the catalogue"})
	catalogue, err := c.store(ctx, entries)
	if err != nil {
		return err
	}
	v.Catalogue = string(catalogue)
	keep, err := c.s.Hold(ctx, catalogue)
	if err != nil {
		return err
	}
	defer keep()
	if newest.GetSource() == v.GetSource() && newest.GetCatalogue() == v.GetCatalogue() && newest.GetFile() == v.GetFile() {
		end.Version = newest
		tell(end)
		return nil
	}
	reply, err := c.propose(ctx, who, &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Publish{Publish: &floxv1.NewChannelVersion{Channel: q.GetChannel(), Version: v}}})
	if err != nil {
		return err
	}
	end.Channel, end.Version = reply.GetChannel(), reply.GetVersion()
	tell(end)
	return nil
}

// mayPublish refuses at once what would be refused after an evaluation, and gives the
// newest version.
func (c *channels) mayPublish(ctx context.Context, who person, q *floxv1.PublishChannelRequest) (newest *floxv1.ChannelVersion, err error) {
	if err := c.s.takesFacts(ctx); err != nil {
		return nil, fmt.Errorf("channel %s: %w", q.GetChannel(), err)
	}
	for _, s := range q.GetSystems() {
		if err := channel.CheckSystem(s); err != nil {
			return nil, fmt.Errorf("channel %s: %w", q.GetChannel(), err)
		}
	}
	err = c.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		have, err := channel.Find(r, q.GetChannel())
		if errors.Is(err, flox.ErrNotFound) {
			return channel.MayPublish(nil, q.GetChannel(), who.GetUser(), who.admin)
		}
		if err == nil {
			err = channel.MayPublish(have, q.GetChannel(), who.GetUser(), who.admin)
		}
		if err == nil {
			newest, err = channel.Version(r, have.GetName(), have.GetLast())
		}
		return err
	})
	return newest, err
}

// evaluate gives the entries of a version for all its systems, and counts them.
func (c *channels) evaluate(ctx context.Context, v *floxv1.ChannelVersion, end *floxv1.PublishChannelProgress, tell func(*floxv1.PublishChannelProgress)) (entries []channel.Entry, err error) {
	e, leave, err := c.evaluator(ctx, func(doing string) { tell(&floxv1.PublishChannelProgress{Doing: doing}) })
	if err != nil {
		return nil, err
	}
	defer leave()
	for _, system := range v.GetSystems() {
		doing := "evaluates for " + system
		tell(&floxv1.PublishChannelProgress{Doing: doing})
		all, err := e.Catalogue(ctx, &buildfarm.Expression{Source: flox.StorePath(v.GetSource()), File: v.GetFile(), System: system}, buildSource{c.s}, func(done, all int) {
			tell(&floxv1.PublishChannelProgress{Doing: doing, Done: uint32(done), All: uint32(all)}) //nolint:gosec // bounded by the builder
		})
		if err != nil {
			return nil, err
		}
		for i := range all {
			entry := entryOf(&all[i], system)
			if v.Packages++; entry.Error != "" {
				v.Failed++
				if len(end.GetFailures()) < maxFailuresTold {
					end.Failures = append(end.Failures, fmt.Sprintf("%s for %s: %s", entry.Attr, system, entry.Error))
				}
			}
			entries = append(entries, entry)
		}
	}
	return entries, nil
}

func entryOf(a *buildfarm.Attribute, system string) channel.Entry {
	if a.Error != "" {
		return channel.Entry{Attr: a.Attr, System: system, Error: a.Error}
	}
	e := channel.Entry{
		Attr: a.Attr, Name: a.Name, Version: a.Version, Description: strings.Join(strings.Fields(a.Description), " "), System: a.System,
		Drv: string(a.Drv), Outputs: a.Install,
	}
	for _, output := range a.Install {
		e.Paths = append(e.Paths, string(a.Paths[output]))
	}
	if a.Priority != nil && *a.Priority >= 0 && *a.Priority < 1<<31 {
		n := uint32(*a.Priority)
		e.Priority = &n
	}
	return e
}

// store makes a catalogue valid.
func (c *channels) store(ctx context.Context, entries []channel.Entry) (flox.StorePath, error) {
	var text bytes.Buffer
	if err := channel.Write(&text, entries); err != nil {
		return "", err
	}
	var info *flox.PathInfo
	err := piped(func(w io.Writer) error {
		n := nix.NewNarWriter(w)
		err := n.Entry(nix.NarEntry{Kind: flox.Regular, Size: uint64(text.Len())}) //nolint:gosec // not negative
		if err == nil {
			_, err = io.Copy(n, &text)
		}
		if err == nil {
			err = n.Close()
		}
		return err
	}, func(nar io.Reader) (err error) {
		info, _, err = c.s.PublishSource(ctx, catalogueName, nar, "channels")
		return err
	})
	if err != nil {
		return "", fmt.Errorf("catalogue: %w", err)
	}
	return info.Path, nil
}

// catalogue reads one, if it is not here.
func (c *channels) catalogue(ctx context.Context, name string) (*channel.Catalogue, error) {
	if is := c.known(name); is != nil {
		return is, nil
	}
	select {
	case c.reading <- struct{}{}:
		defer func() { <-c.reading }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if is := c.known(name); is != nil {
		return is, nil // somebody else read it meanwhile
	}
	info, err := c.s.Info(ctx, flox.StorePath(name).HashPart())
	if err != nil {
		return nil, fmt.Errorf("catalogue %s: %w", name, err)
	}
	var is *channel.Catalogue
	err = piped(func(w io.Writer) error { return c.s.writeNar(ctx, w, info) }, func(r io.Reader) error {
		nar := nix.NewNarReader(r)
		e, err := nar.Next()
		if err == nil && e.Kind != flox.Regular {
			err = fmt.Errorf("it is no file: %w", flox.ErrCorrupt)
		}
		if err == nil {
			is, err = channel.Read(nar)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("catalogue %s: %w", name, err)
	}
	c.keep(name, is)
	return is, nil
}

func (c *channels) known(name string) *channel.Catalogue {
	c.mu.Lock()
	defer c.mu.Unlock()
	is := c.here[name]
	if is == nil {
		return nil
	}
	c.uses++
	is.last = c.uses
	return is.Catalogue
}

// keep keeps a catalogue, and drops those that were not used for longest.
func (c *channels) keep(name string, is *channel.Catalogue) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uses++
	c.here[name] = &readCatalogue{is, c.uses}
	for c.bytes += is.Size; c.bytes > maxCatalogues && len(c.here) > 1; {
		oldest := ""
		for n, r := range c.here {
			if oldest == "" || r.last < c.here[oldest].last {
				oldest = n
			}
		}
		c.bytes -= c.here[oldest].Size
		delete(c.here, oldest)
	}
}

// newest gives the newest version of each channel, or of one.
func (c *channels) newest(ctx context.Context, name string) (states []*floxv1.ChannelState, err error) {
	err = c.view(ctx, cluster.Linearizable, func(r *cluster.Reader) error {
		all, err := channel.List(r)
		if name != "" {
			var one *floxv1.Channel
			one, err = channel.Find(r, name)
			all = []*floxv1.Channel{one}
		}
		for _, ch := range all {
			if err != nil {
				return err
			}
			var v *floxv1.ChannelVersion
			v, err = channel.Version(r, ch.GetName(), ch.GetLast())
			states = append(states, &floxv1.ChannelState{Channel: ch, Newest: v})
		}
		return err
	})
	return states, err
}

// search finds packages in the newest versions of channels.
func (c *channels) search(ctx context.Context, q *floxv1.SearchPackagesRequest) (*floxv1.SearchPackagesResponse, error) {
	limit := int(q.GetLimit())
	setDefault(&limit, defaultFound)
	states, err := c.newest(ctx, q.GetChannel())
	if err != nil {
		return nil, err
	}
	type hit struct {
		channel.Hit
		of *floxv1.ChannelState
	}
	var hits []hit
	out := &floxv1.SearchPackagesResponse{Channels: uint32(len(states))} //nolint:gosec // few
	for _, s := range states {
		cat, err := c.catalogue(ctx, s.GetNewest().GetCatalogue())
		if err != nil {
			return nil, fmt.Errorf("channel %s: %w", s.GetChannel().GetName(), err)
		}
		found, more := cat.Search(q.GetTerm(), q.GetSystem(), limit)
		out.More = out.More || more
		for _, h := range found {
			hits = append(hits, hit{h, s})
		}
	}
	slices.SortStableFunc(hits, func(x, y hit) int { return channel.Better(x.Hit, y.Hit) })
	out.More = out.More || len(hits) > limit
	for _, h := range hits[:min(len(hits), limit)] {
		out.Packages = append(out.Packages, packageOf(h.of.GetChannel().GetName(), h.of.GetNewest(), h.Entry))
	}
	return out, nil
}

func packageOf(name string, v *floxv1.ChannelVersion, e *channel.Entry) *floxv1.CataloguePackage {
	p := &floxv1.CataloguePackage{
		Channel: name, VersionNumber: v.GetNumber(), Attr: e.Attr, Name: e.Name, Version: e.Version, Description: e.Description,
		System: e.System, Drv: e.Drv, Outputs: e.Outputs, Paths: e.Paths, Priority: profile.DefaultPriority,
	}
	if e.Priority != nil {
		p.Priority = *e.Priority
	}
	return p
}

// roots implements rootSource: what is evaluated and catalogues of kept versions stay, and
// what packages were made of.
func (c *channels) roots(ctx context.Context, _ *cluster.Reader, yield func(root) bool) error {
	return c.view(ctx, cluster.Local, func(r *cluster.Reader) error {
		all, err := channel.List(r)
		for _, ch := range all {
			if err != nil {
				return err
			}
			var versions []*floxv1.ChannelVersion
			if versions, err = channel.Versions(r, ch.GetName()); err != nil {
				return err
			}
			for _, v := range versions {
				for _, path := range []string{v.GetSource(), v.GetCatalogue()} {
					if !yield(root{kind: rootChannel, name: fmt.Sprintf("%s %d", ch.GetName(), v.GetNumber()), hashPart: flox.StorePath(path).HashPart()}) {
						return nil
					}
				}
			}
			var more bool
			if more, err = derivationRoots(r, ch.GetName(), yield); !more {
				return err
			}
		}
		return err
	})
}
