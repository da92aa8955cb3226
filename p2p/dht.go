package p2p

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ipfs/go-cid"
	"github.com/ipfs/go-datastore"
	"github.com/ipfs/go-datastore/query"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p-kad-dht/records"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/floxctl/flox"
)

const (
	dhtPrefix = "/flox"
	// recordTTL is how long others remember an announcement: a machine that
	// left is not looked for much longer.
	recordTTL  = 15 * time.Minute
	maxKeys    = 300     // announced by one machine, beside the site key
	maxRecords = 200_000 // kept for others; about 1.2 KB each
)

// dhtDoor is the host as the DHT sees it: whether others may ask it can be
// changed while it runs.
type dhtDoor struct {
	host.Host

	mu     sync.Mutex
	shut   bool
	answer map[protocol.ID]network.StreamHandler
}

// SetStreamHandler is called by the DHT that answers.
func (d *dhtDoor) SetStreamHandler(id protocol.ID, answer network.StreamHandler) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answer[id] = answer
	if !d.shut {
		d.Host.SetStreamHandler(id, answer)
	}
}

// set opens or shuts the door. Others hear of it: they ask only who answers.
func (d *dhtDoor) set(shut bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shut == shut {
		return
	}
	d.shut = shut
	for id, answer := range d.answer {
		if !shut {
			d.Host.SetStreamHandler(id, answer)
			continue
		}
		d.RemoveStreamHandler(id)
		for _, c := range d.Network().Conns() {
			for _, s := range c.GetStreams() {
				if s.Protocol() == id && s.Stat().Direction == network.DirInbound {
					drop(s)
				}
			}
		}
	}
}

// SetDHTClient says whether this machine only asks the DHT, as Config.DHTClient
// does for good: one that leaves soon stores nothing for others.
func (h *Host) SetDHTClient(client bool) { h.door.set(client) }

func (h *Host) openDHT() error {
	ttl := recordTTL
	if h.cfg.recordTTL > 0 {
		ttl = h.cfg.recordTTL
	}
	// Never ModeAuto: it does not serve on private addresses, and an office
	// has no others.
	mode := dht.ModeServer
	if h.cfg.DHTClient {
		mode = dht.ModeClient
	}
	var err error
	h.door = &dhtDoor{Host: h.net, answer: map[protocol.ID]network.StreamHandler{}}
	h.dht, err = dht.New(h.door,
		dht.ProtocolPrefix(dhtPrefix),
		dht.Mode(mode),
		dht.DisableValues(),
		dht.ProviderDatastore(newBoundedStore(maxRecords)),
		dht.ProviderManagerOpts(records.ProvideValidity(ttl), records.ProviderAddrTTL(ttl), records.CleanupInterval(ttl/3)),
		dht.RoutingTableRefreshPeriod(5*time.Minute),
		dht.BootstrapPeersFunc(h.peers.bootstraps),
	)
	if err != nil {
		return fmt.Errorf("open DHT: %w", err)
	}
	return nil
}

// FindProviders asks the DHT who announced key; at most max peers, this
// machine not among them. It returns those found when ctx ends; ErrUnreachable
// only if nobody could be asked.
func (h *Host) FindProviders(ctx context.Context, key flox.CID, max int) ([]PeerAddr, error) {
	var out []PeerAddr
	err := h.eachProvider(ctx, key, max, func(info peer.AddrInfo) { out = append(out, fromAddrInfo(info)) })
	return out, err
}

func (h *Host) eachProvider(ctx context.Context, key flox.CID, max int, yield func(peer.AddrInfo)) error {
	if h.base.Err() != nil {
		return fmt.Errorf("find providers: %w", flox.ErrClosed)
	}
	id, err := cid.Cast(key.Bytes())
	if err != nil {
		return fmt.Errorf("find providers of %s: %w: %w", key, err, flox.ErrBadInput)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(h.base, cancel)
	defer stop()
	n := 0
	// One more than wanted: this machine may be among them.
	for info := range h.dht.FindProvidersAsync(ctx, id, max+1) {
		if info.ID != h.self && n < max {
			n++
			yield(info)
		}
	}
	if n == 0 && h.dht.RoutingTable().Size() == 0 {
		return fmt.Errorf("find providers of %s: no other machine is known yet: %w", key, flox.ErrUnreachable)
	}
	return nil
}

// announcer keeps the keys this machine is found under alive in the DHT.
type announcer struct {
	site    flox.CID
	mu      sync.Mutex
	told    map[flox.CID]time.Time // when each was last provided; zero = never
	changed chan struct{}
}

func newAnnouncer(site string) *announcer {
	k := SiteKey(site)
	return &announcer{site: k, told: map[flox.CID]time.Time{k: {}}, changed: make(chan struct{}, 1)}
}

// Announce replaces the set of keys this machine is found under; the site key
// is always among them. They are provided soon, and again before others forget
// them; what is left out is forgotten by others within 15 minutes. At most 300
// keys, else ErrBadInput.
func (h *Host) Announce(keys []flox.CID) error {
	if len(keys) > maxKeys {
		return fmt.Errorf("announce %d keys: at most %d allowed: %w", len(keys), maxKeys, flox.ErrBadInput)
	}
	a := h.keys
	a.mu.Lock()
	defer a.mu.Unlock()
	next := map[flox.CID]time.Time{a.site: a.told[a.site]}
	for _, k := range keys {
		next[k] = a.told[k]
	}
	a.told = next
	a.poke()
	return nil
}

func (a *announcer) poke() {
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

// due gives what was last provided before then.
func (a *announcer) due(then time.Time) []flox.CID {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []flox.CID
	for k, at := range a.told {
		if at.Before(then) {
			out = append(out, k)
		}
	}
	return out
}

// announceLoop provides what is new at once, and everything again well before
// the records end or when a small swarm has grown: while a net is smaller than
// a Kademlia bucket, every member should hold every record.
func (h *Host) announceLoop(ctx context.Context) error {
	ttl := recordTTL
	if h.cfg.recordTTL > 0 {
		ttl = h.cfg.recordTTL
	}
	toldSize := 0
	pause := time.Second
	for {
		size := h.dht.RoutingTable().Size()
		fresh := time.Now().Add(-ttl * 6 / 10)
		if size > toldSize && toldSize < h.dht.BucketSize() {
			fresh = time.Now()
		}
		if size > 0 {
			if failed := h.provide(ctx, h.keys.due(fresh)); failed == 0 {
				toldSize = size
			}
		} else {
			toldSize = 0
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.keys.changed:
			pause = time.Second
		case <-time.After(pause):
			pause = min(2*pause, 15*time.Second, ttl/10)
		}
	}
}

// provide tells the DHT of keys, a few at a time; it gives the number that failed.
func (h *Host) provide(ctx context.Context, keys []flox.CID) int {
	var failed int
	var mu sync.Mutex
	var wg sync.WaitGroup
	todo := make(chan flox.CID)
	for range min(4, len(keys)) {
		wg.Go(func() {
			for k := range todo {
				err := h.provideOne(ctx, k)
				mu.Lock()
				if err != nil {
					failed++
					h.log.Debug("cannot announce", "key", k, "err", err)
				}
				mu.Unlock()
			}
		})
	}
	for _, k := range keys {
		todo <- k
	}
	close(todo)
	wg.Wait()
	return failed
}

func (h *Host) provideOne(ctx context.Context, key flox.CID) error {
	id, err := cid.Cast(key.Bytes())
	if err != nil {
		return err
	}
	started := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := h.dht.Provide(ctx, id, true); err != nil {
		return err
	}
	h.keys.mu.Lock()
	defer h.keys.mu.Unlock()
	if _, still := h.keys.told[key]; still {
		h.keys.told[key] = started
	}
	return nil
}

// boundedStore is the memory that holds others' announcements. libp2p's own is
// a map without a limit, which a flood of announcements fills.
type boundedStore struct {
	limit int
	mu    sync.RWMutex
	m     *datastore.MapDatastore
	n     int
}

var _ datastore.Batching = (*boundedStore)(nil)

func newBoundedStore(limit int) *boundedStore {
	return &boundedStore{limit: limit, m: datastore.NewMapDatastore()}
}

func (b *boundedStore) Put(ctx context.Context, key datastore.Key, value []byte) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	has, err := b.m.Has(ctx, key)
	if err != nil {
		return err
	}
	if !has && b.n >= b.limit {
		return fmt.Errorf("announcement not kept, %d are: %w", b.n, flox.ErrFull)
	}
	if !has {
		b.n++
	}
	return b.m.Put(ctx, key, value)
}

func (b *boundedStore) Delete(ctx context.Context, key datastore.Key) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if has, err := b.m.Has(ctx, key); err == nil && has {
		b.n--
	}
	return b.m.Delete(ctx, key)
}

func (b *boundedStore) Get(ctx context.Context, key datastore.Key) ([]byte, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.m.Get(ctx, key)
}

func (b *boundedStore) Has(ctx context.Context, key datastore.Key) (bool, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.m.Has(ctx, key)
}

func (b *boundedStore) GetSize(ctx context.Context, key datastore.Key) (int, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.m.GetSize(ctx, key)
}

func (b *boundedStore) Query(ctx context.Context, q query.Query) (query.Results, error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	res, err := b.m.Query(ctx, q)
	if err != nil {
		return nil, err
	}
	entries, err := res.Rest()
	return query.ResultsWithEntries(q, entries), errors.Join(err, res.Close())
}

func (b *boundedStore) Batch(context.Context) (datastore.Batch, error) {
	return datastore.NewBasicBatch(b), nil
}

func (b *boundedStore) Sync(context.Context, datastore.Key) error { return nil }
func (b *boundedStore) Close() error                              { return nil }
