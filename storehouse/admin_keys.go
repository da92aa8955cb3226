package storehouse

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
)

// maxImported is how many keys of other caches sign here: each is a signature on
// every path.
const maxImported = 8

// ListKeys is floxv1connect.AdminHandler. Every member may ask; secrets are never
// in the answer.
func (a *admin) ListKeys(ctx context.Context, req *connect.Request[floxv1.ListKeysRequest]) (*connect.Response[floxv1.ListKeysResponse], error) {
	if _, err := a.may(ctx, req, anyMember, "key.list"); err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.s.listKeys(ctx))
}

func (s *Server) listKeys(ctx context.Context) (*floxv1.ListKeysResponse, error) {
	have, err := s.id.ring.get()
	if err != nil {
		return nil, err
	}
	list, err := s.newestList(ctx)
	if err != nil {
		return nil, err
	}
	print, err := list.Fingerprint()
	if err != nil {
		return nil, err
	}
	out := &floxv1.ListKeysResponse{TrustVersion: list.Version, Epoch: list.Epoch, Fingerprint: print[:]}
	for _, use := range []struct {
		name    string
		signs   []nix.SecretKey
		trusted []string
	}{{useNix, have.nix, list.NixKeys}, {useManifest, have.manifest, list.ManifestKeys}} {
		for _, key := range use.signs {
			mark := have.mark(use.name, key)
			out.Keys = append(out.Keys, &floxv1.KeyState{
				Public: key.Public().String(), Use: use.name, Signs: true, Imported: mark.GetImported(), RetiresUnix: mark.GetRetiresUnixMs() / 1000,
			})
		}
		for _, key := range use.trusted { // a moment longer than it signs
			if !slices.Contains(public(use.signs), key) {
				out.Keys = append(out.Keys, &floxv1.KeyState{Public: key, Use: use.name})
			}
		}
	}
	return out, nil
}

// ImportKey is floxv1connect.AdminHandler: the key of an existing binary cache
// signs here too from now on, also what is valid already.
func (a *admin) ImportKey(ctx context.Context, req *connect.Request[floxv1.ImportKeyRequest]) (*connect.Response[floxv1.ImportKeyResponse], error) {
	who, err := a.may(ctx, req, adminOnly, "key.import")
	if err != nil {
		return nil, api.ToConnect(err)
	}
	key, err := nix.ParseSecretKey(req.Msg.GetSecretKey())
	if err != nil {
		return nil, api.ToConnect(fmt.Errorf("import key: %w", err)) // it does not show the key
	}
	if err := a.s.takesFacts(ctx); err != nil { // it signs every path
		return nil, api.ToConnect(fmt.Errorf("import key: %w", err))
	}
	text := key.Public().String()
	err = a.s.changeKeys(ctx, who, func(k *floxv1.ClusterSecrets) error { return importKey(k, key) })
	if err == nil {
		_, err = a.s.settleTrust(ctx)
	}
	if err == nil {
		err = a.s.note(ctx, who, "key.import", key.Name(), text+" signs paths from now on")
	}
	return answer(&floxv1.ImportKeyResponse{Public: text}, err)
}

// importKey adds a key to the secrets unless it is there.
func importKey(k *floxv1.ClusterSecrets, key nix.SecretKey) error {
	imported := 0
	for _, have := range k.GetNixKeys() {
		if have == key.String() {
			return errUnchanged
		}
		if name, _, _ := strings.Cut(have, ":"); name == key.Name() {
			return fmt.Errorf("import key: another key of the storehouse is called %s, and readers tell keys by name: %w", name, flox.ErrBusy)
		}
	}
	for _, m := range k.GetMarks() {
		if m.GetImported() {
			imported++
		}
	}
	if imported >= maxImported {
		return fmt.Errorf("import key: %d keys are imported already, each a signature on every path; let some go with floxctl key rotate --use imported: %w", imported, flox.ErrFull)
	}
	k.NixKeys = append(k.NixKeys, key.String())
	k.Marks = append(k.Marks, &floxv1.KeyMark{Use: useNix, Public: key.Public().String(), Imported: true})
	k.Unsigned = true
	return nil
}

// RotateKeys is floxv1connect.AdminHandler. When it answers, the new keys sign
// and a trust list names them.
func (a *admin) RotateKeys(ctx context.Context, req *connect.Request[floxv1.RotateKeysRequest]) (*connect.Response[floxv1.RotateKeysResponse], error) {
	who, err := a.may(ctx, req, adminOnly, "key.rotate")
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.rotateKeys(ctx, who, req.Msg))
}

func (a *admin) rotateKeys(ctx context.Context, who *floxv1.Actor, m *floxv1.RotateKeysRequest) (*floxv1.RotateKeysResponse, error) {
	if m.GetOverlapSeconds() > uint64(maxOverlap/time.Second) {
		return nil, fmt.Errorf("rotate keys: an overlap of %d s, want at most %v: %w", m.GetOverlapSeconds(), maxOverlap, flox.ErrBadInput)
	}
	r := &rotation{
		name: a.s.cfg.Name, now: time.Now(),
		overlap: time.Duration(m.GetOverlapSeconds()) * time.Second, //nolint:gosec // bounded above
	}
	uses := []string{m.GetUse()}
	if m.GetUse() == "" {
		uses = []string{useNix, useManifest, useSwarm, useCluster}
	}
	err := a.s.changeKeys(ctx, who, func(k *floxv1.ClusterSecrets) error {
		r.made = nil
		for _, use := range uses {
			if err := r.rotate(k, use); err != nil {
				return fmt.Errorf("rotate keys: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := a.s.note(ctx, who, "key.rotate", strings.Join(uses, " "), strings.Join(r.made, ", ")); err != nil {
		return nil, err
	}
	version, err := a.s.settleTrust(ctx)
	return &floxv1.RotateKeysResponse{Made: r.made, TrustVersion: version}, err
}
