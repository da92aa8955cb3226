package storehouse

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// What operators do with upstreams is written into the audit log as these.
const (
	actionUpstreamAdd    = "upstream.add"
	actionUpstreamTest   = "upstream.test"
	actionUpstreamRemove = "upstream.remove"
)

// defaultPriority is that of a cache that says none; Nix 2.8 has the same.
const defaultPriority = 50

// maxLogin bounds in bytes what an upstream is told for a login.
const maxLogin = 4096

// suggestedUpstreams are caches that people know. None is asked before it is added.
var suggestedUpstreams = []*floxv1.Upstream{{
	Url: "https://cache.nixos.org", Priority: 40, Keys: []string{"cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="},
}}

// cleanUpstream brings a URL to the form in which it is kept, and refuses what is no
// cache that can be asked.
func cleanUpstream(text string) (string, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme == "" {
		return "", fmt.Errorf("upstream: want a URL: https://…, http://…, s3://…, ssh-ng://… or file:///…: %w", flox.ErrBadInput) // it may hold a password
	}
	bad := func(format string, args ...any) (string, error) {
		return "", fmt.Errorf("upstream %s: %s: %w", u.Redacted(), fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	if u.User != nil && u.Scheme != "ssh-ng" {
		return bad("a login does not belong into the URL, where everybody sees it: give it with --netrc")
	}
	switch u.Scheme {
	case "http", "https":
		if u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
			return bad("want %s://HOST/PATH, without parameters; priority and keys are options", u.Scheme)
		}
		return u.Scheme + "://" + strings.ToLower(u.Host) + strings.TrimRight(u.EscapedPath(), "/"), nil
	case "s3":
		if _, err := bucketURL(u); err != nil {
			return bad("%v", err)
		}
		if strings.Contains(u.Query().Get("endpoint"), "@") {
			return bad("a login does not belong into the endpoint: give it with --netrc")
		}
		return (&url.URL{Scheme: "s3", Host: u.Host, RawQuery: u.Query().Encode()}).String(), nil
	case "file":
		if u.Host != "" || !path.IsAbs(u.Path) || u.RawQuery != "" {
			return bad("want file:///DIRECTORY, without parameters")
		}
		return "file://" + path.Clean(u.Path), nil
	case "ssh-ng":
		if _, err := sshCommandLine(u); err != nil {
			return bad("%v", err)
		}
		return (&url.URL{Scheme: u.Scheme, User: u.User, Host: u.Host, RawQuery: u.Query().Encode()}).String(), nil
	case "ssh":
		return bad("want ssh-ng://…, which speaks with the Nix daemon there")
	}
	return bad("want https://…, http://…, s3://…, ssh-ng://… or file:///…")
}

// AddUpstream is floxv1connect.AdminHandler.
func (a *admin) AddUpstream(ctx context.Context, req *connect.Request[floxv1.AddUpstreamRequest]) (*connect.Response[floxv1.AddUpstreamResponse], error) {
	who, err := a.may(ctx, req, adminOnly, actionUpstreamAdd)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.addUpstream(ctx, who, req.Msg))
}

func (a *admin) addUpstream(ctx context.Context, who *floxv1.Actor, q *floxv1.AddUpstreamRequest) (*floxv1.AddUpstreamResponse, error) {
	where, err := cleanUpstream(q.GetUpstream().GetUrl())
	if err != nil {
		return nil, err
	}
	if len(q.GetLogin())+len(q.GetPassword()) > maxLogin || (q.GetLogin() == "") != (q.GetPassword() == "") {
		return nil, fmt.Errorf("upstream %s: a login is a name and a password, of at most %d bytes: %w", where, maxLogin, flox.ErrBadInput)
	}
	u := &floxv1.Upstream{
		Url: where, Keys: slices.Compact(slices.Sorted(slices.Values(q.GetUpstream().GetKeys()))), Priority: q.GetUpstream().GetPriority(),
		Login: q.GetLogin() != "", AddedBy: nameOr(who.GetUser(), who.GetMachine()),
	}
	if u.GetLogin() && strings.HasPrefix(where, "ssh-ng:") {
		return nil, fmt.Errorf("upstream %s: ssh takes no login: name a key with ?ssh-key=FILE: %w", where, flox.ErrBadInput)
	}
	if _, err := nix.ParseKeyRing(u.GetKeys()); err != nil {
		return nil, fmt.Errorf("upstream %s: %w", where, err)
	}
	if err := checkUpstream(u); err != nil {
		return nil, err
	}
	login := &floxv1.UpstreamLogin{Url: where, Login: q.GetLogin(), Password: q.GetPassword()}
	out := &floxv1.AddUpstreamResponse{}
	switch said, err := a.s.upstreams.test(ctx, a.s.upstreams.newUpstream(u, login)); {
	case err == nil:
		if u.Priority == 0 {
			u.Priority = said.GetPriority()
		}
	case !q.GetUntested() || errors.Is(err, flox.ErrBadInput):
		return nil, fmt.Errorf("upstream %s is not added: %w", where, err)
	default:
		out.Problem = err.Error()
	}
	setDefault(&u.Priority, defaultPriority)
	if err := a.s.knowUpstreams(ctx); err != nil {
		return nil, fmt.Errorf("upstream %s: %w", where, err)
	}
	if err := a.s.takesFacts(ctx); err != nil {
		return nil, fmt.Errorf("upstream %s: %w", where, err)
	}
	if err := a.s.keepLogin(ctx, who, login); err != nil {
		return nil, err
	}
	reply, err := a.s.proposeUpstream(ctx, &floxv1.UpstreamsCommand{Command: &floxv1.UpstreamsCommand_Set{Set: u}})
	if err != nil {
		return nil, err
	}
	out.Upstream, out.Replaced = u, reply.GetReplaced()
	how := fmt.Sprintf("priority %d, keys %s", u.GetPriority(), strings.Join(u.GetKeys(), " "))
	if u.GetLogin() {
		how += ", with a login"
	}
	return out, a.s.note(ctx, who, actionUpstreamAdd, where, how)
}

// keepLogin seals what an upstream is told for a login; an empty one is forgotten.
func (s *Server) keepLogin(ctx context.Context, who *floxv1.Actor, login *floxv1.UpstreamLogin) error {
	return s.changeKeys(ctx, who, func(k *floxv1.ClusterSecrets) error {
		i := slices.IndexFunc(k.GetLogins(), func(l *floxv1.UpstreamLogin) bool { return l.GetUrl() == login.GetUrl() })
		switch {
		case i < 0 && login.GetLogin() == "":
			return errUnchanged
		case i >= 0 && k.GetLogins()[i].GetLogin() == login.GetLogin() && k.GetLogins()[i].GetPassword() == login.GetPassword():
			return errUnchanged
		case i >= 0:
			k.Logins = slices.Delete(k.GetLogins(), i, i+1)
		case len(k.GetLogins()) >= 2*maxUpstreams:
			return fmt.Errorf("upstream %s: logins of %d upstreams are kept already: %w", login.GetUrl(), len(k.GetLogins()), flox.ErrFull)
		}
		if login.GetLogin() != "" {
			k.Logins = append(k.Logins, login)
		}
		return nil
	})
}

// ListUpstreams is floxv1connect.AdminHandler. Every member may ask; the server that
// leads answers, since it fetches.
func (a *admin) ListUpstreams(ctx context.Context, req *connect.Request[floxv1.ListUpstreamsRequest]) (*connect.Response[floxv1.ListUpstreamsResponse], error) {
	who, err := a.may(ctx, req, anyMember, "upstream.list")
	if err != nil {
		return nil, api.ToConnect(err)
	}
	if leader, err := a.leader(ctx, req.Header().Get(actorHeader) != ""); err == nil && leader != nil {
		there, err := passedFor(who, req.Msg)
		if err != nil {
			return nil, api.ToConnect(err)
		}
		if resp, err := leader.ListUpstreams(ctx, there); err == nil {
			return connect.NewResponse(resp.Msg), nil
		}
	}
	return answer(a.s.upstreams.list(ctx))
}

// list gives what is known here of the upstreams.
func (u *upstreams) list(ctx context.Context) (*floxv1.ListUpstreamsResponse, error) {
	all, err := u.current(ctx, cluster.Local)
	if err != nil {
		return nil, err
	}
	out := &floxv1.ListUpstreamsResponse{}
	added := map[string]bool{}
	for _, up := range all {
		added[up.url()] = true
		state := &floxv1.UpstreamState{
			Upstream: up.fact, Asked: up.asked.Load(), Had: up.had.Load(), FetchedPaths: up.fetched.Load(), FetchedBytes: up.bytes.Load(),
		}
		until, last := up.breaker.state()
		if last != nil {
			state.Problem = last.Error()
		}
		if !until.IsZero() {
			state.RetryUnixMs = until.UnixMilli()
		}
		out.Upstreams = append(out.Upstreams, state)
	}
	for _, s := range suggestedUpstreams {
		if !added[s.GetUrl()] {
			out.Suggested = append(out.Suggested, s)
		}
	}
	return out, nil
}

// TestUpstream is floxv1connect.AdminHandler. The server that leads is who tests.
func (a *admin) TestUpstream(ctx context.Context, req *connect.Request[floxv1.TestUpstreamRequest]) (*connect.Response[floxv1.TestUpstreamResponse], error) {
	who, err := a.may(ctx, req, adminOnly, actionUpstreamTest)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	own := func() (*floxv1.TestUpstreamResponse, error) { return a.testUpstream(ctx, req.Msg) }
	return byLeader(ctx, a, who, req, own, floxv1connect.AdminClient.TestUpstream)
}

func (a *admin) testUpstream(ctx context.Context, q *floxv1.TestUpstreamRequest) (*floxv1.TestUpstreamResponse, error) {
	where, err := cleanUpstream(q.GetUrl())
	if err != nil {
		return nil, err
	}
	hashPart := q.GetPath()
	if hashPart != "" && !flox.ValidHashPart(hashPart) {
		p, err := a.pathOf(hashPart)
		if err != nil {
			return nil, err
		}
		hashPart = p.HashPart()
	}
	all, err := a.s.upstreams.current(ctx, cluster.Linearizable)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(up *upstream) bool { return up.url() == where })
	if i < 0 {
		return nil, notAdded(where)
	}
	up := all[i]
	out, err := a.s.upstreams.test(ctx, up)
	if err != nil {
		return nil, fmt.Errorf("upstream %s: %w", where, err)
	}
	// It answers: whatever was thought of it before.
	up.breaker.forget()
	up.answers.forget()
	if hashPart == "" {
		return out, nil
	}
	o, err := a.s.upstreams.ask(ctx, up, hashPart)
	if err != nil {
		return nil, fmt.Errorf("upstream %s answers, but path %s: %w", where, q.GetPath(), err)
	}
	out.Found = substitutableOf(o)
	return out, nil
}

// test asks a cache what it is.
func (u *upstreams) test(ctx context.Context, up *upstream) (*floxv1.TestUpstreamResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, u.limits.ask)
	defer cancel()
	source, err := openSource(up.url(), up.options(u.limits))
	if err != nil {
		return nil, err
	}
	defer source.close() //nolint:errcheck // nothing was written
	began := time.Now()
	info, err := readCacheInfo(ctx, source, u.s.cfg.StoreDir)
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, fmt.Errorf("it did not answer within %s: %w", u.limits.ask, flox.ErrUnreachable)
	}
	if err != nil {
		return nil, err
	}
	out := &floxv1.TestUpstreamResponse{RoundTripUs: uint64(time.Since(began).Microseconds()), StoreDir: info.storeDir} //nolint:gosec // not negative
	if p, err := strconv.ParseUint(info.priority, 10, 32); err == nil && p <= maxUpstreamPriority {
		out.Priority = uint32(p)
	}
	return out, nil
}

// RemoveUpstream is floxv1connect.AdminHandler. What came from it stays valid.
func (a *admin) RemoveUpstream(ctx context.Context, req *connect.Request[floxv1.RemoveUpstreamRequest]) (*connect.Response[floxv1.RemoveUpstreamResponse], error) {
	who, err := a.may(ctx, req, adminOnly, actionUpstreamRemove)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(&floxv1.RemoveUpstreamResponse{}, a.removeUpstream(ctx, who, req.Msg.GetUrl()))
}

func (a *admin) removeUpstream(ctx context.Context, who *floxv1.Actor, text string) error {
	where, err := cleanUpstream(text)
	if err != nil {
		return err
	}
	if err := a.s.knowUpstreams(ctx); err != nil {
		return fmt.Errorf("upstream %s: %w", where, err)
	}
	_, err = a.s.proposeUpstream(freeing(ctx), &floxv1.UpstreamsCommand{Command: &floxv1.UpstreamsCommand_Remove{Remove: &floxv1.RemoveUpstream{Url: where}}})
	if err == nil {
		err = a.s.keepLogin(ctx, who, &floxv1.UpstreamLogin{Url: where})
	}
	if err == nil {
		err = a.s.note(ctx, who, actionUpstreamRemove, where, "what came from it stays")
	}
	return err
}
