package p2p

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/libp2p/zeroconf/v2"
	"github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"

	"github.com/floxctl/flox"
)

const (
	houseService = "_floxhouse._tcp"
	houseTTL     = 60 // seconds that others may remember an advertisement
	maxName      = 64 // bytes
	maxFound     = 64
	// findTime has room for a second question; findMore is for those that answer later.
	findTime = 5 * time.Second
	findMore = time.Second
)

// Found is a storehouse that says it is on this LAN. Nothing of it is proven:
// DialGuest proves that a machine has this ID, and a person that it is theirs.
type Found struct {
	ID   PeerID
	Name string // printable, at most 64 bytes; may be ""
	// Addrs are multiaddrs, those on one of this machine's subnets first.
	Addrs []string
}

// FindStorehouses looks by multicast for storehouses whose window is open
// (Config.Window), for a machine that has no invite. It returns a second after
// the first one answered, and after 5 s if none does: none is no error. Errors:
// ErrUnreachable if this machine has no network to look in.
func FindStorehouses(ctx context.Context) ([]Found, error) {
	if !hasMulticast() {
		return nil, fmt.Errorf("look for storehouses: no network interface is up that can multicast: %w", flox.ErrUnreachable)
	}
	look, cancel := context.WithTimeout(ctx, findTime)
	defer cancel()
	entries, ended := make(chan *zeroconf.ServiceEntry, maxFound), make(chan error, 1)
	go func() { ended <- zeroconf.Browse(look, houseService, "local", entries) }() // ends with look
	byID := map[PeerID]Found{}
	for {
		select {
		case e := <-entries:
			if e == nil {
				entries = nil // closed: Browse is about to return
				continue
			}
			f, err := parseAdvert(e.Text)
			if err != nil || len(byID) >= maxFound {
				continue // somebody else's, or nonsense
			}
			f.Addrs = append(byID[f.ID].Addrs, f.Addrs...)
			f.Addrs = f.Addrs[:min(len(f.Addrs), maxAddrs)]
			if byID[f.ID] = f; len(byID) == 1 {
				soon := time.AfterFunc(findMore, cancel)
				defer soon.Stop()
			}
		case err := <-ended:
			if err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
				return nil, fmt.Errorf("look for storehouses: %w: %w", flox.ErrUnreachable, err)
			}
			if len(byID) == 0 && ctx.Err() != nil {
				return nil, fmt.Errorf("look for storehouses: %w", ctx.Err())
			}
			return sortFound(byID), nil
		}
	}
}

func sortFound(byID map[PeerID]Found) []Found {
	out := make([]Found, 0, len(byID))
	for _, f := range byID {
		slices.SortFunc(f.Addrs, func(a, b string) int { return cmp.Or(cmp.Compare(away(a), away(b)), cmp.Compare(a, b)) })
		f.Addrs = slices.Compact(f.Addrs)
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b Found) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// away is 0 for an address on one of our subnets, 1 for others.
func away(addr string) int {
	if a, err := parseAddr(addr); err == nil && sameSubnet(a) {
		return 0
	}
	return 1
}

// advert makes the texts of an advertisement. The name is percent-encoded: the
// DNS library escapes what is not ASCII in its own way.
func advert(id PeerID, name string, addrs []string) []string {
	texts := []string{"id=" + string(id), "name=" + url.PathEscape(name)}
	for _, a := range addrs {
		texts = append(texts, "addr="+a)
	}
	return texts
}

// parseAdvert takes what anybody on the LAN may have sent.
func parseAdvert(texts []string) (Found, error) {
	var f Found
	for _, text := range texts {
		key, value, _ := strings.Cut(text, "=")
		switch key {
		case "id":
			f.ID = PeerID(value)
		case "name":
			if name, err := url.PathUnescape(value); err == nil && plain(name) {
				f.Name = name
			}
		case "addr":
			if a, ok := lanAddr(value); ok && len(f.Addrs) < maxAddrs {
				f.Addrs = append(f.Addrs, a.String())
			}
		}
	}
	id, err := f.ID.decode()
	if err != nil {
		return Found{}, err
	}
	if f.ID = PeerID(id.String()); len(f.Addrs) == 0 {
		return Found{}, fmt.Errorf("storehouse %s advertises no address: %w", f.ID, flox.ErrBadInput)
	}
	return f, nil
}

// lanAddr takes IP and TCP port only: whoever advertises a name could make
// this machine ask the DNS for it.
func lanAddr(text string) (multiaddr.Multiaddr, bool) {
	if !strings.HasPrefix(text, "/ip") {
		return nil, false
	}
	a, err := parseAddr(text)
	if err != nil || len(a) != 2 || a[1].Protocol().Code != multiaddr.P_TCP {
		return nil, false
	}
	ip, err := manet.ToIP(a)
	return a, err == nil && !ip.IsLoopback() && !ip.IsUnspecified() && !ip.IsMulticast() && !ip.IsLinkLocalUnicast()
}

// plain reports whether a text can be shown on a terminal as it is.
func plain(text string) bool {
	return len(text) <= maxName && utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) })
}

// advertise tells the LAN of this storehouse while its window is open.
func (h *Host) advertise(ctx context.Context) error {
	var server *zeroconf.Server
	var told []string
	stop := func() {
		if server != nil {
			server.Shutdown()
			server = nil
		}
		told = nil
	}
	defer stop()
	if h.cfg.NoMDNS || h.cfg.Role != Storehouse || h.cfg.Window == nil {
		<-ctx.Done()
		return ctx.Err()
	}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		var texts []string
		if h.cfg.Window() {
			texts = h.advert()
		}
		if !slices.Equal(texts, told) {
			stop()
			told = texts // also when it fails: once is enough to say so
			var err error
			if server, err = register(h.ID(), texts); err != nil {
				h.log.Warn("the LAN does not hear of this storehouse", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// advert gives nothing to tell where no address is for a LAN.
func (h *Host) advert() []string {
	listening, err := h.net.Network().InterfaceListenAddresses()
	if err != nil {
		return nil
	}
	var addrs []string
	for _, a := range listening {
		if a, ok := lanAddr(a.String()); ok && len(addrs) < maxAddrs {
			addrs = append(addrs, a.String())
		}
	}
	if len(addrs) == 0 {
		return nil
	}
	slices.Sort(addrs)
	return advert(h.ID(), h.cfg.Name, addrs)
}

// register puts an advertisement up; nil if there is nothing to tell.
func register(id PeerID, texts []string) (*zeroconf.Server, error) {
	if len(texts) == 0 {
		return nil, nil
	}
	f, err := parseAdvert(texts)
	if err != nil {
		return nil, err
	}
	// The records that DNS-SD asks for; those who look take the texts.
	first, err := multiaddr.NewMultiaddr(f.Addrs[0])
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(first[1].Value())
	if err != nil {
		return nil, err
	}
	name := string(id)
	return zeroconf.RegisterProxy(name, houseService, "local", port, "flox-"+name[len(name)-12:], []string{first[0].Value()}, texts, nil, zeroconf.TTL(houseTTL))
}
