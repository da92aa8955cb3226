package storehouse

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
)

// What a key is for.
const (
	useNix      = "nix"
	useManifest = "manifest"
	useSwarm    = "swarm"
	useToken    = "token"
	useCluster  = "cluster"
	useImported = "imported" // Nix keys of other caches
)

const (
	// signOverlap is how long replaced signing keys stay: who is away longer than
	// that misses nothing but the readers that only know the old Nix key.
	signOverlap = 30 * 24 * time.Hour
	// shareOverlap is the same for secrets that machines hold.
	shareOverlap = 7 * 24 * time.Hour
	maxOverlap   = 10 * 365 * 24 * time.Hour
	// maxAtOnce is how many keys of one use may be in force: each is a signature on
	// every path, or a proof in every handshake (p2p takes 8).
	maxAtOnce = 4
)

// rotation replaces secrets. What is replaced stays until its overlap is over:
// when that is stands in the secrets, so that every leader knows it.
type rotation struct {
	name    string // of the storehouse, which keys carry
	now     time.Time
	overlap time.Duration // 0 = the use's own
	made    []string      // what was made, as RotateKeysResponse has it
}

// until is when what is replaced now goes, in Unix milliseconds.
func (r *rotation) until(usual time.Duration) int64 {
	if r.overlap > 0 {
		usual = r.overlap
	}
	return r.now.Add(usual).UnixMilli()
}

// rotate replaces the secrets of one use in k.
func (r *rotation) rotate(k *floxv1.ClusterSecrets, use string) (err error) {
	switch use {
	case useNix:
		k.NixKeys, err = r.signing(k, use, k.GetNixKeys())
	case useManifest:
		k.ManifestKeys, err = r.signing(k, use, k.GetManifestKeys())
	case useImported:
		return r.dropImported(k)
	case useSwarm:
		return r.swarm(k)
	case useToken:
		return r.token(k)
	case useCluster:
		r.made = append(r.made, use) // whatever is sealed is sealed under a new one
	default:
		err = fmt.Errorf("use %q: want nix, manifest, swarm, token, cluster or imported: %w", use, flox.ErrBadInput)
	}
	return err
}

// signing puts a new key before the others, which go; those that were imported stay.
func (r *rotation) signing(k *floxv1.ClusterSecrets, use string, list []string) ([]string, error) {
	own := 0
	for _, text := range list {
		old, err := nix.ParseSecretKey(text)
		if err != nil {
			return nil, fmt.Errorf("%s key: %w", use, flox.ErrCorrupt)
		}
		mark := markOf(k, use, old.Public().String())
		if mark.GetImported() {
			continue
		}
		if mark == nil {
			mark = &floxv1.KeyMark{Use: use, Public: old.Public().String()}
			k.Marks = append(k.Marks, mark)
		}
		mark.RetiresUnixMs = sooner(mark.GetRetiresUnixMs(), r.until(signOverlap))
		own++
	}
	if own >= maxAtOnce {
		return nil, tooMany(own, use+" keys")
	}
	key, err := nix.GenerateKey(nextName(r.name, k.GetNixKeys(), k.GetManifestKeys()))
	if err != nil {
		return nil, err
	}
	k.Unsigned = true
	r.made = append(r.made, use+" "+key.Public().String())
	return slices.Insert(slices.Clone(list), 0, key.String()), nil
}

// tooMany refuses a rotation before those before it are over.
func tooMany(n int, what string) error {
	return fmt.Errorf("%d %s are in force, most of them replaced already: wait until they retire (see floxctl key list): %w", n, what, flox.ErrBusy)
}

// sooner gives the earlier of two times, of which the first may be none.
func sooner(have, at int64) int64 {
	if have == 0 {
		return at
	}
	return min(have, at)
}

// nextName is a name that none of the keys has: "NAME-N".
func nextName(name string, lists ...[]string) string {
	highest := 0
	for _, key := range slices.Concat(lists...) {
		text, _, _ := strings.Cut(key, ":")
		if digits, ok := strings.CutPrefix(text, name+"-"); ok {
			if n, err := strconv.Atoi(digits); err == nil {
				highest = max(highest, n)
			}
		}
	}
	return name + "-" + strconv.Itoa(highest+1)
}

// dropImported has imported keys sign no more; nothing is made.
func (r *rotation) dropImported(k *floxv1.ClusterSecrets) error {
	found := false
	for _, mark := range k.GetMarks() {
		if mark.GetImported() {
			found = true
			mark.RetiresUnixMs = sooner(mark.GetRetiresUnixMs(), r.until(signOverlap))
		}
	}
	if !found {
		return fmt.Errorf("no key is imported: %w", flox.ErrNotFound)
	}
	return nil
}

// swarm replaces what members prove to know. Members hear of the new one while
// they are connected.
func (r *rotation) swarm(k *floxv1.ClusterSecrets) error {
	if n := len(k.GetSwarmSecrets()); n >= maxAtOnce {
		return tooMany(n, "swarm secrets")
	}
	for _, old := range k.GetSwarmSecrets() {
		i := slices.IndexFunc(k.GetRetire(), func(o *floxv1.SwarmRetire) bool { return string(o.GetSecret()) == string(old) })
		if i < 0 {
			i = len(k.GetRetire())
			k.Retire = append(k.Retire, &floxv1.SwarmRetire{Secret: old})
		}
		k.Retire[i].AtUnixMs = sooner(k.GetRetire()[i].GetAtUnixMs(), r.until(shareOverlap))
	}
	secret := make([]byte, swarmSecretBytes)
	_, _ = rand.Read(secret) // never fails
	k.SwarmSecrets = slices.Insert(slices.Clone(k.GetSwarmSecrets()), 0, secret)
	r.made = append(r.made, useSwarm)
	return nil
}

// token replaces what publishers show. Those that have the old one go on until it is over.
func (r *rotation) token(k *floxv1.ClusterSecrets) error {
	if n := len(k.GetOldTokens()) + 1; n >= maxAtOnce {
		return tooMany(n, "upload tokens")
	}
	for _, old := range k.GetOldTokens() {
		old.AtUnixMs = sooner(old.GetAtUnixMs(), r.until(shareOverlap))
	}
	if k.GetUploadToken() != "" {
		k.OldTokens = append(k.OldTokens, &floxv1.TokenRetire{Token: k.GetUploadToken(), AtUnixMs: r.until(shareOverlap)})
	}
	k.UploadToken = rand.Text()
	r.made = append(r.made, useToken)
	return nil
}

// retire takes out of k what is over, and reports whether it did. A signing key
// goes only once those that stay have signed everything and the trust list
// names them: nothing that is valid is left without a signature.
func retire(k *floxv1.ClusterSecrets, now time.Time, signed bool) (did []string) {
	over := func(at int64) bool { return at != 0 && at <= now.UnixMilli() }
	k.Marks = slices.DeleteFunc(k.GetMarks(), func(m *floxv1.KeyMark) bool {
		if !over(m.GetRetiresUnixMs()) || !signed {
			return false
		}
		list := &k.NixKeys
		if m.GetUse() == useManifest {
			list = &k.ManifestKeys
		}
		left := slices.DeleteFunc(slices.Clone(*list), func(text string) bool {
			key, err := nix.ParseSecretKey(text)
			return err == nil && key.Public().String() == m.GetPublic()
		})
		if len(left) == 0 {
			return false
		}
		*list = left
		k.Unsigned = true // whoever signed while it went is found once more
		did = append(did, m.GetUse()+" "+m.GetPublic())
		return true
	})
	k.Retire = slices.DeleteFunc(k.GetRetire(), func(r *floxv1.SwarmRetire) bool {
		if !over(r.GetAtUnixMs()) {
			return false
		}
		k.SwarmSecrets = slices.DeleteFunc(slices.Clone(k.GetSwarmSecrets()), func(s []byte) bool { return string(s) == string(r.GetSecret()) })
		did = append(did, useSwarm)
		return true
	})
	k.OldTokens = slices.DeleteFunc(k.GetOldTokens(), func(t *floxv1.TokenRetire) bool {
		if over(t.GetAtUnixMs()) {
			did = append(did, useToken)
			return true
		}
		return false
	})
	return did
}
