package agent

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/nix/worker"
	"github.com/floxctl/flox/p2p"
)

// upstreamKeysLife is how long it is believed whose keys the storehouse's upstreams
// sign with.
const upstreamKeysLife = time.Minute

// upstreamKeys are the keys of the storehouse's upstreams, asked for when somebody
// brings what no key of the storehouse signed.
type upstreamKeys struct {
	mu   sync.Mutex
	at   time.Time // when it was asked last; zero = never
	ring nix.KeyRing
}

// vouchedUpstream reports whether a key of an upstream of the storehouse says what a
// path is. While nobody answers it is as it was last known.
func (a *Agent) vouchedUpstream(ctx context.Context, info *flox.PathInfo) bool {
	if len(info.Signatures) == 0 {
		return false
	}
	u := &a.upstreamKeys
	u.mu.Lock()
	defer u.mu.Unlock()
	if time.Since(u.at) > upstreamKeysLife {
		if ring, err := a.askUpstreamKeys(ctx); err == nil {
			u.ring = ring
		} else {
			a.log.Debug("keys of upstreams not known", "error", err)
		}
		u.at = time.Now()
	}
	_, ok := u.ring.Verify([]byte(nix.Fingerprint(a.cfg.StoreDir, info)), info.Signatures)
	return ok
}

func (a *Agent) askUpstreamKeys(ctx context.Context) (nix.KeyRing, error) {
	ctx, cancel := context.WithTimeout(ctx, factsTimeout)
	defer cancel()
	var response *connect.Response[floxv1.ListUpstreamsResponse]
	err := a.houses.call(ctx, func(ctx context.Context, house p2p.PeerID) (err error) {
		response, err = a.calls.admin(house).ListUpstreams(ctx, connect.NewRequest(&floxv1.ListUpstreamsRequest{}))
		return err
	})
	if err != nil {
		return nix.KeyRing{}, err
	}
	var keys []string
	for _, up := range response.Msg.GetUpstreams() {
		keys = append(keys, up.GetUpstream().GetKeys()...)
	}
	return nix.ParseKeyRing(keys)
}

// keys are those a trusted client goes by, of its own configuration: as with Nix they
// count for what it adds.
func (n *nixSession) keys() nix.KeyRing {
	var keys []nix.PublicKey
	if !n.s.Trusted() {
		return nix.KeyRing{}
	}
	settings := n.s.Options().Settings
	for _, name := range []string{"trusted-public-keys", "extra-trusted-public-keys", "binary-cache-public-keys", "extra-binary-cache-public-keys"} {
		for word := range strings.FieldsSeq(settings[name]) {
			if key, err := nix.ParsePublicKey(word); err == nil {
				keys = append(keys, key)
			}
		}
	}
	return nix.NewKeyRing(keys...)
}

// vouched says whether there is reason to take in an input-addressed path that no key
// of the storehouse signed: a key of one of its upstreams did, which has the storehouse
// fetch it from there and others believe it, too; or one the client goes by, if it may
// say so. If not, the error has Nix's words.
func (n *nixSession) vouched(ctx context.Context, info *flox.PathInfo) (others bool, err error) {
	if n.a.vouchedUpstream(ctx, info) {
		if !n.s.Options().UseSubstitutes {
			return true, nil
		}
		if _, err := n.substitute(ctx, []flox.StorePath{info.Path}); err != nil {
			if ctx.Err() != nil {
				return false, err
			}
			n.a.log.Debug("not substituted, taken from the client", "path", string(info.Path), "error", err)
		}
		return true, nil
	}
	if _, ok := n.keys().Verify([]byte(nix.Fingerprint(n.a.cfg.StoreDir, info)), info.Signatures); ok {
		return false, nil
	}
	return false, &worker.Error{Message: fmt.Sprintf("cannot add path '%s' because it lacks a valid signature", n.a.cfg.StoreDir.Join(info.Path)), Cause: flox.ErrUntrusted}
}

// share makes what was added valid in the storehouse, so that other machines have it
// when the client hears of it. What cannot be brought there now is later.
func (n *nixSession) share(ctx context.Context, paths []flox.StorePath) {
	if len(paths) == 0 {
		return
	}
	err := ctx.Err()
	if err == nil {
		err = n.a.shareStaged(ctx, paths...)
	}
	if err == nil {
		return
	}
	n.a.unshared.Store(true)
	if ctx.Err() == nil {
		n.s.Log().Message(worker.LevelWarn, fmt.Sprintf("warning: what was added is on this machine only, until the storehouse takes it: %v", err))
	}
}
