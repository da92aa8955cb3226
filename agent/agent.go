// Package agent composes one endpoint: the mounted store directory, what is
// cached, the facts known, the peers, and the control socket.
//
// It must not know how blocks move (p2p), how bytes lie on disk (content/cache)
// or what a FUSE message looks like (fuse): it joins them. Nothing in it needs
// root; the warden does what does.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent/fetchlog"
	"github.com/floxctl/flox/agent/warden"
	"github.com/floxctl/flox/api"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/cache"
	"github.com/floxctl/flox/content/staging"
	"github.com/floxctl/flox/fuse"
	"github.com/floxctl/flox/p2p"
)

// Config says how an agent runs. StateDir, Invite and Socket are needed; every
// other zero value is its default.
type Config struct {
	// StateDir holds key, facts and cache; one agent at a time uses it.
	StateDir string
	// StoreDir is the store directory served; default the invite's. Another one
	// than the invite's is refused: it is part of every path hash.
	StoreDir flox.StoreDir
	// Socket is the unix socket floxctl talks to.
	Socket string
	// NixSocket is the unix socket stock Nix clients use as their daemon's; "" =
	// there is none.
	NixSocket string
	// NixConf is a file that stock Nix's configuration here includes, which says what
	// keys sign; "" = there is none.
	NixConf string
	// ShellList is a file that shells of this machine read, which says whose paths get
	// which profiles (ctl/daemon); "" = there is none.
	ShellList string
	// LocalStore is where a Nix store of this machine is found, whose valid paths are
	// shown with ours; "" = there is none. LocalSocket is its daemon's. Neither may lie
	// in the mount.
	LocalStore, LocalSocket string
	// Invite names the storehouse and what to trust.
	Invite *api.Invite
	// Listen are the addresses for peers, multiaddrs or host:port. Default 0.0.0.0:7782.
	Listen []string
	// Advertise are the addresses told to peers. Default: those listened on.
	Advertise []string
	// Site is the label of the place this machine is at. Default "default".
	Site string
	// NoMDNS turns multicast discovery off; DHTClient asks the DHT without
	// storing for others.
	NoMDNS, DHTClient bool
	// CacheBudget and CacheReserve are in bytes; see cache.Config.
	CacheBudget, CacheReserve int64
	// LookupTimeout bounds the wait for a name (default 5 s), ReadTimeout that
	// for bytes (default 30 s).
	LookupTimeout, ReadTimeout time.Duration
	// NoPrefetch fetches nothing that nobody asked for yet; NoTraces neither
	// records nor replays program starts.
	NoPrefetch, NoTraces bool
	// PrefetchRate is how many bytes per second are fetched for nobody who
	// waits; 0 = no limit.
	PrefetchRate int64
	// Offline is the default policy of what is completed in the background:
	// "closure", "used" or "none". Default "used".
	Offline string
	// ListValid makes the store directory list everything valid in the
	// storehouse while it is connected, not only what is known here.
	ListValid bool
	// System is this machine's in Nix's words, such as x86_64-linux; default: what it is.
	System string
	// Bind are profiles of stock Nix, such as /nix/var/nix/profiles/default, and the profiles
	// of the storehouse, OWNER/NAME, that they are one with.
	Bind map[string]string
	// Embedded says that the storehouse is this machine's own (floxd up): Nix clients
	// collect it, too.
	Embedded bool
	// Metrics is the host:port at which Prometheus gets metrics; "" = nowhere.
	Metrics string
	// Warden is the line to the process that made the mount; nil = nothing is
	// mounted, the agent only serves peers and its socket.
	Warden *warden.Conn
	// Version is told to people.
	Version string
	// Log takes what an operator may need; nil = discard.
	Log *slog.Logger
}

// pageCacheBytes bounds the memory for decoded manifest pages.
const pageCacheBytes = 64 << 20

// KeyName is the file of the machine's identity in Config.StateDir.
const KeyName = "key"

// Agent is one endpoint.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	lock      *os.File
	started   time.Time
	facts     *facts
	negatives *negatives
	cache     *cache.Cache
	staged    *staging.Store
	local     *beside // nil = no local Nix store is shown
	pages     *content.PageCache
	host      *p2p.Host
	calls     *calls
	resolver  *resolver
	fetcher   *fetcher
	ahead     *prefetcher
	readers   *readAhead
	starts    *starts
	members   *memberList
	houses    *houses
	follower  *follower
	renewer   *renewer
	nixConf   struct {
		sync.Mutex
		text string // as it was written last
	}
	valid *validNames
	// unshared says that some of what is staged is to be shared and is not yet.
	unshared     atomic.Bool
	upstreamKeys upstreamKeys
	// stagedBytes is what staged takes of the budget.
	stagedBytes  atomic.Int64
	executed     *executed
	ran          *ran
	policies     *policies
	profiles     *profiles
	binder       *binder
	complete     *completer
	roots        *rootKeeper
	nix          *nixDaemon
	known        *knownPeers
	waits        *waits
	traffic      *traffic
	history      *fetchlog.Log
	store        *store
	mount        *fuse.Server // nil without a warden
	serving      *serving     // of the mount
	view         *view
	links        *fuse.Server // nil without a mount of profiles
	servingLinks *serving
	late         *lateHost // host, for those who are there before it
	kernel       *kernel
	end          context.CancelFunc // ends look-ups and fetches, which outlive who asked
}

// New opens the state, begins to serve the mount, if there is one, and binds the
// sockets. An Agent that is not run must be closed. Errors: ErrBadInput (configuration), ErrBusy (another agent uses the
// state directory, an address is taken), ErrCorrupt.
func New(cfg Config) (*Agent, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, started: time.Now(),
		negatives: newNegatives(), waits: newWaits(), traffic: &traffic{}, history: fetchlog.New(),
		pages:  content.NewPageCache(pageCacheBytes),
		kernel: &kernel{warden: cfg.Warden},
	}
	if err := a.openState(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	a.roots = newRootKeeper(a)
	a.nix = newNixDaemon(a)
	a.prepareNetwork()
	a.store = &store{a: a, trees: make(map[flox.CID]*tree)}
	a.view = newView(filepath.Join(cfg.StateDir, viewFile), cfg.System, cfg.StoreDir, cfg.Log)
	a.view.invite, a.view.find, a.view.moved = inviteSum(cfg.Invite), a.findProfile, a.binder.asked
	if err := a.openView(); err != nil { // first: who starts a program of the store comes through it
		return nil, errors.Join(err, a.Close())
	}
	if cfg.Warden != nil {
		if err := a.openMount(); err != nil {
			return nil, errors.Join(err, a.Close())
		}
		a.serving = serveInBackground(a.mount)
	}
	if err := a.openNetwork(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

func (c *Config) fill() error {
	switch {
	case c.StateDir == "" || c.Socket == "":
		return fmt.Errorf("agent: state directory %q and socket %q are both needed: %w", c.StateDir, c.Socket, flox.ErrBadInput)
	case c.Invite == nil || len(c.Invite.Storehouse) == 0:
		return fmt.Errorf("agent: no invite; ask for the storehouse's invite.json: %w", flox.ErrBadInput)
	case c.StoreDir == "":
		c.StoreDir = c.Invite.StoreDir
	case c.StoreDir != c.Invite.StoreDir:
		return fmt.Errorf("store directory %s: this storehouse's paths are made for %s, and the directory is part of every path's hash: %w",
			c.StoreDir, c.Invite.StoreDir, flox.ErrBadInput)
	}
	if len(c.Listen) == 0 {
		c.Listen = []string{"0.0.0.0:7782"}
	}
	if c.Offline == "" {
		c.Offline = policyUsed
	}
	if err := checkPolicy(c.Offline); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	if c.Site == "" {
		c.Site = "default"
	}
	if c.LookupTimeout == 0 {
		c.LookupTimeout = 5 * time.Second
	}
	if c.ReadTimeout == 0 {
		c.ReadTimeout = 30 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return nil
}

func (a *Agent) openState() (err error) {
	dir := a.cfg.StateDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("agent state: %w", err)
	}
	if a.lock, err = lockDir(dir); err != nil {
		return err
	}
	if err := markState(dir, a.cfg.Version); err != nil {
		return err
	}
	a.executed = loadExecuted(filepath.Join(dir, "executed.json"))
	a.ran = loadRan(filepath.Join(dir, "ran.json"))
	if a.policies, err = loadPolicies(filepath.Join(dir, "offline.json")); err != nil {
		return err
	}
	if a.profiles, err = openProfiles(a, filepath.Join(dir, "profiles.json")); err != nil {
		return err
	}
	if a.binder, err = openBinder(a, filepath.Join(dir, "bound.json")); err != nil {
		return err
	}
	if err := a.openLocal(); err != nil {
		return err
	}
	a.known = &knownPeers{file: filepath.Join(dir, "peers.json")}
	a.members = openMembers(dir, a.cfg.Invite, a.log)
	// At once: who reads waits for both, and each waits for the disk.
	var group errgroup.Group
	group.Go(func() (err error) {
		a.facts, err = openFacts(filepath.Join(dir, "facts"), a.cfg.StoreDir, a.cfg.Invite.TrustList, a.log)
		return err
	})
	group.Go(func() (err error) {
		a.cache, err = cache.Open(cache.Config{
			Dir: filepath.Join(dir, "cache"), Budget: a.cfg.CacheBudget, Reserve: a.cfg.CacheReserve,
			Kernel: a.kernel, Others: func() int64 { return a.stagedBytes.Load() }, Log: a.log,
		})
		return err
	})
	group.Go(func() (err error) {
		a.staged, err = staging.Open(staging.Config{
			Dir: filepath.Join(dir, "staged"), StoreDir: a.cfg.StoreDir, Budget: a.cfg.CacheBudget, Reserve: a.cfg.CacheReserve,
			Known: a.validElsewhere, Derivation: a.derivation, Used: a.stagedBytes.Store, Log: a.log,
		})
		return err
	})
	return group.Wait()
}

// lockDir makes sure that one agent uses dir; the lock ends with the process.
func lockDir(dir string) (*os.File, error) {
	name := filepath.Join(dir, "lock")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("agent state: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := os.ReadFile(name)
		return nil, errors.Join(fmt.Errorf("state directory %s is used by another agent (process %s): stop it, or give this one a --state-dir of its own: %w",
			dir, pid, flox.ErrBusy), f.Close())
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	_, _ = fmt.Fprintf(f, "%d", os.Getpid()) // for people only: a full disk must not stop us
	return f, nil
}

// prepareNetwork makes what needs the network, and waits for it where it is used.
func (a *Agent) prepareNetwork() {
	life, end := context.WithCancel(context.Background())
	a.end = end
	a.late = newLateHost()
	a.houses = newHouses(idsOf(a.members.houses()), a.late.reach)
	a.calls = newCalls(a.late.dial)
	a.renewer = newRenewer(a.facts, a.calls, a.houses, a.log)
	a.follower = &follower{
		facts: a.facts, negatives: a.negatives, calls: a.calls, houses: a.houses, condemned: a.roots.collects, renew: func() { a.renewer.look(); a.writeNixConf() }, log: a.log,
	}
	a.valid = &validNames{
		calls: a.calls, houses: a.houses, state: a.follower.state, patience: min(listPatience, a.cfg.LookupTimeout/2), log: a.log,
		asking: make(chan struct{}, 1),
	}
	a.resolver = &resolver{
		facts: a.facts, negatives: a.negatives, calls: a.calls, host: a.late, houses: a.houses, traffic: a.traffic, history: a.history, log: a.log,
		life: life, places: newPlaces(maxLookups, spareLookups), flights: make(map[string]*lookupFlight), staged: a.stagedInfo, shut: a.staged.Shut,
	}
	a.fetcher = newFetcher(life, a.late, a.cache, a.traffic, a.log)
	a.fetcher.near, a.fetcher.history = a.local.chunk, a.history
	a.ahead = &prefetcher{fetcher: a.fetcher, waits: a.waits, off: a.cfg.NoPrefetch, rate: a.cfg.PrefetchRate, life: completeLife}
	a.complete = newCompleter(a, a.ran, a.policies)
	a.readers = newReadAhead(life, a.ahead, a.late.farthest)
	a.starts = a.newStarts()
	a.resolver.book = a.starts.book
	a.resolver.root = a.keepRoot
	a.resolver.far = func() bool { return a.readers.far() } // which tests replace
}

// openNetwork takes its time: keys, certificates, sockets.
func (a *Agent) openNetwork() error {
	key, err := p2p.LoadOrCreateKey(filepath.Join(a.cfg.StateDir, KeyName))
	if err != nil {
		return err
	}
	a.host, err = p2p.New(p2p.Config{
		Key: key, Listen: a.cfg.Listen, Announce: a.cfg.Advertise,
		Secrets: a.members.secrets, Allowed: a.members.allowed, Vouched: a.members.isHouse, Storehouses: a.members.isHouse,
		Site: a.cfg.Site, Bootstrap: a.members.houses(), DHTClient: a.cfg.DHTClient, NoMDNS: a.cfg.NoMDNS,
		Blocks: holder{a.cache}, Tracker: a.whoHas, Log: a.log,
	})
	if err != nil {
		return err
	}
	a.host.SetDHTClient(a.members.member(a.host.ID()).GetEphemeral())
	a.late.open(a.host)
	return nil
}

func (a *Agent) openMount() (err error) {
	w := a.cfg.Warden
	w.StateFormat = StateFormat
	a.mount, err = fuse.NewServer(fuse.ServerConfig{
		Device: w.Device, Init: w.Init, Store: a.store, NodeTable: w.NodeTable(),
		Journal:       w.Journal(),
		LookupTimeout: a.cfg.LookupTimeout, ReadTimeout: a.cfg.ReadTimeout, Mapped: w.Mapped, Log: a.log,
		Serving: func() { a.tellWarden(w.Serving) }, Passing: passing,
	})
	a.kernel.mount = a.mount
	if err == nil && !a.cfg.NoTraces {
		a.starts.recorder = a.newRecorder(w, a.mount.Resolve)
	}
	return err
}

// Run serves until ctx ends or the mount is gone, then closes the agent. The
// mount is served since New: what is here is read before the network is up.
func (a *Agent) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, a.end)()
	a.writeNixConf()
	if a.mount != nil {
		group.Go(func() error { return ended(ctx, "warden", a.cfg.Warden.Run(ctx)) })
		group.Go(func() error { return ended(ctx, "mount", a.serving.run(ctx)) })
		group.Go(func() error { return a.cfg.Warden.Beats(ctx, func() { a.mount.Stats() }) })
	}
	group.Go(func() error { return ended(ctx, "cache", a.cache.Run(ctx)) })
	group.Go(func() error { return ended(ctx, "facts", a.facts.run(ctx)) })
	network, leave := context.WithCancel(context.WithoutCancel(ctx))
	group.Go(func() error { return ended(ctx, "network", a.host.Run(network)) })
	group.Go(func() error {
		defer leave()
		return a.rememberPeers(ctx)
	})
	group.Go(func() error { return a.follower.run(ctx) })
	if a.local != nil {
		group.Go(func() error { return a.local.Run(ctx) })
	}
	group.Go(func() error { return a.runMembers(ctx) })
	group.Go(func() error { return a.runView(ctx) })
	group.Go(func() error { return a.runLinks(ctx) })
	group.Go(func() error { return a.renewer.run(ctx) })
	group.Go(func() error { return a.announce(ctx) })
	group.Go(func() error { return a.complete.run(ctx) })
	group.Go(func() error { return a.profiles.run(ctx) })
	group.Go(func() error { return a.binder.run(ctx) })
	group.Go(func() error { return a.roots.run(ctx) })
	group.Go(func() error { return ended(ctx, "staging", a.runStaged(ctx)) })
	group.Go(func() error { return ended(ctx, "calls", a.serveFacts(ctx)) })
	if a.starts.recorder != nil {
		group.Go(func() error { return a.starts.recorder.run(ctx) })
		group.Go(func() error { return a.report(ctx) })
	}
	group.Go(func() error { return a.serveControl(ctx) })
	group.Go(func() error { return a.serveMetrics(ctx) })
	group.Go(func() error { return a.nix.run(ctx) })
	err := group.Wait()
	if errors.Is(err, errEnded) && ctx.Err() != nil {
		err = nil
	}
	return errors.Join(err, a.Close())
}

// errEnded ends the group when a part ended by itself without an error: the
// file system was unmounted, the warden left.
var errEnded = errors.New("ended")

// ended turns the end of one part into the end of all, and says which it was.
func ended(ctx context.Context, part string, err error) error {
	switch {
	case ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled) || errors.Is(err, flox.ErrClosed)):
		return nil
	case err == nil || errors.Is(err, flox.ErrClosed):
		return fmt.Errorf("%s: %w", part, errEnded)
	}
	return fmt.Errorf("%s: %w", part, err)
}

// Close frees everything of an Agent that is not running. It may be called twice.
func (a *Agent) Close() error {
	var errs []error
	a.serving.close()
	a.servingLinks.close()
	if a.end != nil { // what they write to is closed next
		a.end()
		a.resolver.work.Wait()
		a.readers.work.Wait()
		a.starts.wait()
		a.fetcher.work.Wait()
	}
	if a.calls != nil {
		a.calls.Close()
	}
	if a.host != nil {
		errs = append(errs, a.host.Close())
	}
	if a.local != nil {
		errs = append(errs, a.local.Close())
		a.local = nil
	}
	if a.cache != nil {
		errs = append(errs, a.cache.Close())
		a.cache = nil
	}
	if a.staged != nil {
		errs = append(errs, a.staged.Close())
		a.staged = nil
	}
	if a.facts != nil {
		errs = append(errs, a.facts.close())
		a.facts = nil
	}
	if a.lock != nil {
		// Closing is not enough: a process that is just being started has it, too.
		errs = append(errs, unix.Flock(int(a.lock.Fd()), unix.LOCK_UN), a.lock.Close())
		a.lock = nil
	}
	return errors.Join(errs...)
}

// kernel lets the cache ask the mount which content is warm or in use.
type kernel struct {
	warden *warden.Conn
	mount  *fuse.Server
}

// DropPages implements cache.Kernel.
func (k *kernel) DropPages(ctx context.Context, nodes []uint64) error {
	if k.mount == nil {
		return nil
	}
	return k.mount.DropPages(ctx, nodes)
}

// InUse implements cache.Kernel.
func (k *kernel) InUse(ctx context.Context) (map[uint64]struct{}, error) {
	if k.warden == nil {
		return nil, nil //nolint:nilnil // nothing is mounted, so nothing is in use
	}
	return k.warden.InUse(ctx)
}

// holder serves the cache to peers.
type holder struct{ cache *cache.Cache }

// Get implements p2p.Holder.
func (h holder) Get(ctx context.Context, id flox.CID) ([]byte, error) { return h.cache.Get(ctx, id) }

// Has implements p2p.Holder.
func (h holder) Has(ids []flox.CID) []bool { return h.cache.Has(ids) }

// Each implements p2p.Holder.
func (h holder) Each(yield func(flox.CID) bool) { h.cache.Chunks(yield) }
