package storehouse

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/nix"
)

// webCache is a fakeCache over HTTP that can misbehave.
type webCache struct {
	*fakeCache
	url string

	mu    sync.Mutex
	asked map[string]int                                                  // by path
	twist func(w http.ResponseWriter, r *http.Request, n int) (done bool) // n: how often it was asked for
}

func newWebCache(t *testing.T) *webCache {
	t.Helper()
	c := &webCache{fakeCache: newFakeCache(t), asked: map[string]int{}}
	files := http.FileServer(http.Dir(c.dir))
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.asked[r.URL.Path]++
		n, twist := c.asked[r.URL.Path], c.twist
		c.mu.Unlock()
		if twist == nil || !twist(w, r, n) {
			files.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(web.Close)
	c.url = web.URL
	return c
}

func (c *webCache) twisted(f func(w http.ResponseWriter, r *http.Request, n int) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.twist = f
}

// count gives how often files that end so were asked for.
func (c *webCache) count(suffix string) (sum int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for path, n := range c.asked {
		if strings.HasSuffix(path, suffix) {
			sum += n
		}
	}
	return sum
}

// hang answers nothing until the test ends or the client leaves.
func hang(t *testing.T) func(http.ResponseWriter, *http.Request, int) bool {
	t.Helper()
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended) })
	return func(_ http.ResponseWriter, r *http.Request, _ int) bool {
		select {
		case <-r.Context().Done():
		case <-ended:
		}
		return true
	}
}

func addUpstream(t *testing.T, a floxv1connect.AdminClient, q *floxv1.AddUpstreamRequest) *floxv1.Upstream {
	t.Helper()
	resp, err := a.AddUpstream(within(t), connect.NewRequest(q))
	if err != nil {
		t.Fatal(err)
	}
	return resp.Msg.GetUpstream()
}

// upstreamAs is a request to add a cache.
func upstreamAs(url string, key nix.SecretKey, priority uint32) *floxv1.AddUpstreamRequest {
	return &floxv1.AddUpstreamRequest{Upstream: &floxv1.Upstream{Url: url, Keys: []string{key.Public().String()}, Priority: priority}}
}

// substituted is what a Substitute said in the end.
type substituted struct {
	last   *floxv1.SubstituteProgress
	found  map[string]*floxv1.SubstitutablePath
	failed map[string]*floxv1.UnsubstitutablePath
}

func (s *substituted) add(p *floxv1.SubstituteProgress) {
	s.last = p
	for _, f := range p.GetFound() {
		s.found[f.GetInfo().GetPath()] = f
	}
	for _, f := range p.GetFailed() {
		s.failed[f.GetPath()] = f
	}
}

func substitute(t *testing.T, s *Server, opts SubstituteOptions) *substituted {
	t.Helper()
	got := &substituted{found: map[string]*floxv1.SubstitutablePath{}, failed: map[string]*floxv1.UnsubstitutablePath{}}
	if err := s.Substitute(within(t), opts, got.add); err != nil {
		t.Fatal(err)
	}
	if !got.last.GetFinished() {
		t.Errorf("the last progress is %v", got.last)
	}
	return got
}

func wanting(paths ...testPath) SubstituteOptions {
	var opts SubstituteOptions
	for _, p := range paths {
		opts.Paths = append(opts.Paths, string(p.info.Path))
	}
	return opts
}

// Two who want the same at once cause one fetch of each path, references included,
// and each path keeps its upstream's signature.
func TestSubstituteFetchesOnceForEverybody(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	c := newWebCache(t)
	base := makePath(t, "base", 80_000)
	top := makePath(t, "top", 20_000, base.info.Path)
	other := makePath(t, "other", 20_000, base.info.Path)
	for _, p := range []testPath{base, top, other} {
		c.add(p, p.nar, true)
	}
	addUpstream(t, operator, upstreamAs(c.url, c.key, 0))
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open)
	c.twisted(func(_ http.ResponseWriter, r *http.Request, _ int) bool {
		if strings.HasSuffix(r.URL.Path, ".nar") {
			<-gate
		}
		return false
	})
	var both sync.WaitGroup
	for _, opts := range []SubstituteOptions{wanting(top), {Paths: []string{other.info.Path.HashPart(), string(base.info.Path)}}} {
		both.Go(func() {
			if err := s.Substitute(within(t), opts, nil); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "both wait for base", func() bool {
		s.upstreams.mu.Lock()
		defer s.upstreams.mu.Unlock()
		f := s.upstreams.flights[base.info.Path.HashPart()]
		return f != nil && f.waiters == 2
	})
	open()
	both.Wait()
	for _, p := range []testPath{base, top, other} {
		checkWhole(t, s, p)
		info, err := s.Info(within(t), p.info.Path.HashPart())
		if err != nil || !slices.Contains(info.Signatures, c.key.Sign([]byte(nix.Fingerprint(flox.DefaultStoreDir, info)))) {
			t.Errorf("%s has lost its upstream's signature: %v, %v", p.info.Path, info, err)
		}
	}
	if n := c.count(".nar"); n != 3 {
		t.Errorf("%d NARs were fetched, want 3", n)
	}
	if n := c.count(".narinfo"); n != 3 {
		t.Errorf("%d narinfos were fetched, want 3", n)
	}
	listed, err := operator.ListUpstreams(within(t), connect.NewRequest(&floxv1.ListUpstreamsRequest{}))
	if err != nil || len(listed.Msg.GetUpstreams()) != 1 || listed.Msg.GetUpstreams()[0].GetFetchedPaths() != 3 || listed.Msg.GetUpstreams()[0].GetFetchedBytes() == 0 {
		t.Errorf("listed: %v, %v", listed, err)
	}
	if _, err := operator.RemoveUpstream(within(t), connect.NewRequest(&floxv1.RemoveUpstreamRequest{Url: c.url})); err != nil {
		t.Fatal(err)
	}
	checkWhole(t, s, top) // stays
	if _, _, err := s.lookUpstream(within(t), top.info.Path.HashPart()); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("a removed upstream is asked: %v", err)
	}
	if got := strings.Join(auditOf(t, operator, &floxv1.AuditRequest{Action: "upstream."}), " "); got != "upstream.add upstream.remove" {
		t.Errorf("the audit log has %q", got)
	}
}

// A key vouches for its own upstream alone, and nothing that is not as it was signed
// gets in; another upstream that has it as signed gives it.
func TestSubstituteBelievesNobody(t *testing.T) {
	t.Parallel()
	stranger, err := nix.GenerateKey("stranger-1")
	if err != nil {
		t.Fatal(err)
	}
	other := makePath(t, "other", 10)
	twist := func(suffix string, f func(w http.ResponseWriter, r *http.Request, p testPath, n int) bool) func(*webCache, testPath) {
		return func(c *webCache, p testPath) {
			c.twisted(func(w http.ResponseWriter, r *http.Request, n int) bool {
				return strings.HasSuffix(r.URL.Path, p.info.Path.HashPart()+suffix) && f(w, r, p, n)
			})
		}
	}
	fail := func(suffix string, status, times int) func(*webCache, testPath) {
		return twist(suffix, func(w http.ResponseWriter, _ *http.Request, _ testPath, n int) bool {
			if n <= times {
				http.Error(w, "no", status)
			}
			return n <= times
		})
	}
	s, operator := closedHouse(t, nil)
	for name, tt := range map[string]struct {
		lie  func(c *webCache, p testPath)
		give bool // it gives the path all the same
	}{
		"another key":  {func(c *webCache, p testPath) { c.key = stranger; c.add(p, p.nar, true) }, false},
		"no signature": {func(c *webCache, p testPath) { c.add(p, p.nar, false) }, false},
		"bytes": {func(c *webCache, p testPath) {
			wrong := bytes.Clone(p.nar)
			wrong[len(wrong)/2] ^= 1
			c.add(p, wrong, true)
		}, false},
		"cut NAR": {twist(".nar", func(w http.ResponseWriter, _ *http.Request, p testPath, _ int) bool {
			w.Header().Set("Content-Length", strconv.Itoa(len(p.nar)))
			_, _ = w.Write(p.nar[:len(p.nar)/2])
			return true
		}), false},
		"another path's narinfo": {func(c *webCache, p testPath) {
			c.add(other, other.nar, true)
			twist(".narinfo", func(w http.ResponseWriter, r *http.Request, _ testPath, _ int) bool {
				http.ServeFile(w, r, filepath.Join(c.dir, other.info.Path.HashPart()+".narinfo"))
				return true
			})(c, p)
		}, false},
		"no narinfo at all": {twist(".narinfo", func(w http.ResponseWriter, _ *http.Request, _ testPath, _ int) bool {
			_, _ = w.Write([]byte("<html>welcome</html>"))
			return true
		}), false},
		"NAR gone":          {fail(".nar", http.StatusNotFound, 1000), false},
		"NAR fails":         {fail(".nar", http.StatusInternalServerError, 1000), false},
		"NAR fails once":    {fail(".nar", http.StatusBadGateway, 1), true},
		"narinfo fails":     {fail(".narinfo", http.StatusInternalServerError, 1000), false},
		"narinfo forbidden": {fail(".narinfo", http.StatusForbidden, 1000), false},
	} {
		t.Run(name, func(t *testing.T) {
			p := makePath(t, strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), "'", ""), 60_000)
			bad, good := newWebCache(t), newWebCache(t)
			badKey := bad.key
			bad.add(p, p.nar, true)
			tt.lie(bad, p)
			addUpstream(t, operator, upstreamAs(bad.url, badKey, 1))
			if got := substitute(t, s, wanting(p)); stillValid(t, s, p) != tt.give || (got.failed[string(p.info.Path)] == nil) != tt.give {
				t.Fatalf("alone: valid is %v, %v", stillValid(t, s, p), got.failed)
			}
			good.add(p, p.nar, true)
			addUpstream(t, operator, upstreamAs(good.url, good.key, 2))
			if got := substitute(t, s, wanting(p)); len(got.failed) != 0 {
				t.Fatalf("with an honest one: %v", got.failed)
			}
			checkWhole(t, s, p)
			for _, c := range []*webCache{bad, good} {
				if _, err := operator.RemoveUpstream(within(t), connect.NewRequest(&floxv1.RemoveUpstreamRequest{Url: c.url})); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// An upstream that answers nothing costs what is asked at once a wait, and then
// nobody, until it is found to be back.
func TestDeadUpstreamIsLeftAlone(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, func(c *Config) {
		c.upstreams = upstreamLimits{ask: 300 * time.Millisecond, hedge: time.Millisecond, pause: time.Hour}
	})
	dead, good := newWebCache(t), newWebCache(t)
	addUpstream(t, operator, upstreamAs(dead.url, dead.key, 1))
	addUpstream(t, operator, upstreamAs(good.url, good.key, 2))
	dead.twisted(hang(t))
	var all []testPath
	for i := range 2 * maxAsked {
		p := makePath(t, "p"+string(rune('a'+i%26))+string(rune('a'+i/26)), 100)
		good.add(p, p.nar, true)
		all = append(all, p)
	}
	first := all[:len(all)/2]
	if got := substitute(t, s, wanting(first...)); len(got.failed) != 0 {
		t.Errorf("%v", got.failed)
	}
	eventually(t, "it is left alone", func() bool {
		listed, err := s.upstreams.list(within(t))
		return err == nil && listed.GetUpstreams()[0].GetRetryUnixMs() != 0 && listed.GetUpstreams()[0].GetProblem() != ""
	})
	asked := dead.count(".narinfo")
	if asked == 0 || asked > maxAsked {
		t.Errorf("it was asked %d times, want 1 to %d", asked, maxAsked)
	}
	if got := substitute(t, s, wanting(all...)); len(got.failed) != 0 {
		t.Errorf("%v", got.failed)
	}
	if now := dead.count(".narinfo"); now != asked {
		t.Errorf("it was asked %d times more", now-asked)
	}
	// An operator who knows better has it asked at once.
	dead.twisted(nil)
	late := makePath(t, "late", 100)
	dead.add(late, late.nar, true)
	resp, err := operator.TestUpstream(within(t), connect.NewRequest(&floxv1.TestUpstreamRequest{Url: dead.url + "/", Path: string(late.info.Path)}))
	if err != nil || resp.Msg.GetFound().GetInfo().GetPath() != string(late.info.Path) || resp.Msg.GetFound().GetDownloadSize() != uint64(len(late.nar)) {
		t.Fatalf("test: %v, %v", resp, err)
	}
	if got := substitute(t, s, wanting(late)); len(got.failed) != 0 {
		t.Errorf("%v", got.failed)
	}
}

// A NAR of which nothing comes any more is given up, and comes from the next.
func TestStalledNarComesFromTheNext(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, func(c *Config) { c.upstreams = upstreamLimits{stall: 300 * time.Millisecond, pause: time.Hour} })
	slow, good := newWebCache(t), newWebCache(t)
	p := makePath(t, "p", 100_000)
	slow.add(p, p.nar, true)
	good.add(p, p.nar, true)
	addUpstream(t, operator, upstreamAs(slow.url, slow.key, 1))
	addUpstream(t, operator, upstreamAs(good.url, good.key, 2))
	wait := hang(t)
	slow.twisted(func(w http.ResponseWriter, r *http.Request, n int) bool {
		if !strings.HasSuffix(r.URL.Path, ".nar") {
			return false
		}
		_, _ = w.Write(p.nar[:1000])
		_ = http.NewResponseController(w).Flush()
		return wait(w, r, n)
	})
	if got := substitute(t, s, wanting(p)); len(got.failed) != 0 {
		t.Fatalf("%v", got.failed)
	}
	checkWhole(t, s, p)
	if n := slow.count(".nar"); n != 1 {
		t.Errorf("the stalled one was asked %d times", n)
	}
}

// What upstreams do not have is remembered; who waits for an answer shares it.
func TestNegativeAnswersAreRemembered(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	c := newWebCache(t)
	addUpstream(t, operator, upstreamAs(c.url, c.key, 0))
	p := makePath(t, "p", 100)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, _, err := s.lookUpstream(within(t), p.info.Path.HashPart()); !errors.Is(err, flox.ErrNotFound) {
				t.Errorf("%v", err)
			}
		})
	}
	all.Wait()
	got := substitute(t, s, wanting(p))
	if f := got.failed[string(p.info.Path)]; !f.GetUnknown() {
		t.Errorf("%v", got.failed)
	}
	if n := c.count(".narinfo"); n != 1 {
		t.Errorf("it was asked %d times, want once", n)
	}
	// An upstream that is set anew may have other things.
	c.add(p, p.nar, true)
	addUpstream(t, operator, upstreamAs(c.url, c.key, 0))
	if info, size, err := s.lookUpstream(within(t), p.info.Path.HashPart()); err != nil || info.NarHash != p.info.NarHash || size != uint64(len(p.nar)) {
		t.Errorf("%v, %d, %v", info, size, err)
	}
}

// Who leaves does not end the fetch that another waits for; when all have left it ends.
func TestFetchEndsWithTheLastWhoWaits(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	c := newWebCache(t)
	p := makePath(t, "p", 1000)
	c.add(p, p.nar, true)
	addUpstream(t, operator, upstreamAs(c.url, c.key, 0))
	gate, left := make(chan struct{}), make(chan struct{}, 8)
	open := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open)
	c.twisted(func(_ http.ResponseWriter, r *http.Request, _ int) bool {
		if strings.HasSuffix(r.URL.Path, ".nar") {
			select {
			case <-gate:
			case <-r.Context().Done():
				left <- struct{}{}
			}
		}
		return false
	})
	begin := func(n int) (leave func(), done chan error) {
		ctx, cancel := context.WithCancel(within(t))
		done = make(chan error, 1)
		go func() { done <- s.Substitute(ctx, wanting(p), nil) }()
		eventually(t, "it waits", func() bool {
			s.upstreams.mu.Lock()
			defer s.upstreams.mu.Unlock()
			f := s.upstreams.flights[p.info.Path.HashPart()]
			return f != nil && f.waiters == n
		})
		return cancel, done
	}
	leave, alone := begin(1)
	eventually(t, "the NAR is asked for", func() bool { return c.count(".nar") == 1 })
	leave()
	<-left
	if err := <-alone; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	leave, first := begin(1)
	_, second := begin(2)
	leave()
	<-first
	open()
	if err := <-second; err != nil {
		t.Error(err)
	}
	checkWhole(t, s, p)
	if n := c.count(".nar"); n != 2 {
		t.Errorf("%d NARs, want 2", n)
	}
}

// Set at one server, used at all; fetched by the one that leads, once; and a login
// is known to the servers and nobody else.
func TestUpstreamsAreTheWholeStorehouses(t *testing.T) {
	t.Parallel()
	h, ask := operatedHouse(t, 3)
	eventually(t, "all servers know such commands", func() bool { return h.servers[0].node.ClusterLevel() >= upstreamsLevel })
	c := newWebCache(t)
	base := makePath(t, "base", 30_000)
	top := makePath(t, "top", 30_000, base.info.Path)
	for _, p := range []testPath{base, top} {
		c.add(p, p.nar, true)
	}
	c.twisted(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if name, word, _ := r.BasicAuth(); name != "olga" || word != "open-sesame" {
			http.Error(w, "who are you", http.StatusUnauthorized)
			return true
		}
		return false
	})
	q := upstreamAs(c.url, c.key, 0)
	if _, err := ask[1].AddUpstream(within(t), connect.NewRequest(q)); !errors.Is(api.FromConnect(err), flox.ErrDenied) {
		t.Fatalf("without its login: %v", err)
	}
	q.Login, q.Password = "olga", "open-sesame"
	if u := addUpstream(t, ask[1], q); !u.GetLogin() || u.GetPriority() != defaultPriority {
		t.Errorf("%v", u)
	}
	for i, a := range ask {
		eventually(t, "all list it", func() bool {
			m, err := a.ListUpstreams(within(t), connect.NewRequest(&floxv1.ListUpstreamsRequest{}))
			if err == nil && strings.Contains(m.Msg.String(), "sesame") {
				t.Fatalf("the list shows the login: %v", m.Msg)
			}
			return err == nil && len(m.Msg.GetUpstreams()) == 1
		})
		eventually(t, "all find it", func() bool {
			_, _, err := h.servers[i].lookUpstream(within(t), top.info.Path.HashPart())
			return err == nil
		})
	}
	leads := leaderName(t, ask[0])
	for i, s := range h.servers {
		if s.machineName() == leads {
			continue
		}
		var last *floxv1.SubstituteProgress
		err := s.substituteFor(within(t), &floxv1.SubstituteRequest{Paths: []string{string(top.info.Path)}}, func(p *floxv1.SubstituteProgress) { last = p })
		if err != nil || !last.GetFinished() || last.GetDonePaths() == 0 {
			t.Fatalf("asked for at server %d: %v, %v", i, last, err)
		}
	}
	for _, s := range h.servers {
		eventually(t, "it is everywhere", func() bool { return whole(s, base) && whole(s, top) })
	}
	if n := c.count(".nar"); n != 2 {
		t.Errorf("%d NARs were fetched, want 2", n)
	}
	for i, s := range h.servers {
		listed, err := s.upstreams.list(within(t))
		if err != nil {
			t.Fatal(err)
		}
		if n := listed.GetUpstreams()[0].GetFetchedPaths(); (n == 2) != (s.machineName() == leads) {
			t.Errorf("server %d fetched %d paths; %s leads", i, n, leads)
		}
	}
	audit, err := ask[2].Audit(within(t), connect.NewRequest(&floxv1.AuditRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for audit.Receive() {
		if strings.Contains(audit.Msg().String(), "sesame") {
			t.Errorf("the audit log shows the login: %v", audit.Msg())
		}
	}
	for _, s := range h.servers { // nor do the files
		err := filepath.WalkDir(s.cfg.StateDir, func(name string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil //nolint:nilerr // gone meanwhile
			}
			b, err := os.ReadFile(name)
			if err == nil && bytes.Contains(b, []byte("open-sesame")) {
				t.Errorf("%s holds the password", name)
			}
			return nil //nolint:nilerr // gone meanwhile
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// What cannot be an upstream is refused with what to do.
func TestUpstreamsAreCheckedFirst(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, func(c *Config) { c.upstreams = upstreamLimits{ask: 200 * time.Millisecond} })
	key, err := nix.GenerateKey("k-1")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := t.TempDir()
	if err := os.WriteFile(filepath.Join(elsewhere, "nix-cache-info"), []byte("StoreDir: /other/store\nPriority: 7\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	hangs := newWebCache(t)
	hangs.twisted(hang(t))
	for name, tt := range map[string]struct {
		url  string
		want error
		say  string
	}{
		"nothing":       {"", flox.ErrBadInput, "want a URL"},
		"a word":        {"cache", flox.ErrBadInput, "want a URL"},
		"ssh":           {"ssh://host", flox.ErrBadInput, "want ssh-ng://"},
		"ssh option":    {"ssh-ng://-oProxyCommand=x", flox.ErrBadInput, "host"},
		"ssh password":  {"ssh-ng://olga:sesame@host", flox.ErrBadInput, "without a password"},
		"ssh command":   {"ssh-ng://host?remote-program=a%3Bb", flox.ErrBadInput, "not a plain command"},
		"ssh query":     {"ssh-ng://host?remote-program=a;b", flox.ErrBadInput, "semicolon"},
		"ssh key":       {"ssh-ng://host?ssh-key=id", flox.ErrBadInput, "not the absolute path"},
		"ssh path":      {"ssh-ng://host/store", flox.ErrBadInput, "behind the host"},
		"scheme":        {"gopher://host", flox.ErrBadInput, "want https://"},
		"login in URL":  {"https://olga:sesame@host", flox.ErrBadInput, "--netrc"},
		"parameters":    {"https://host?priority=3", flox.ErrBadInput, "without parameters"},
		"S3 parameter":  {"s3://b?color=red", flox.ErrBadInput, `parameter "color"`},
		"relative":      {"file://here", flox.ErrBadInput, "file:///DIRECTORY"},
		"no directory":  {"file:///nowhere/at/all", flox.ErrNotFound, "/nowhere/at/all"},
		"store":         {"file://" + elsewhere, flox.ErrBadInput, "/other/store"},
		"nobody":        {"http://127.0.0.1:1", flox.ErrUnreachable, "is not added"},
		"who never say": {hangs.url, flox.ErrUnreachable, "did not answer within"},
	} {
		_, err := operator.AddUpstream(within(t), connect.NewRequest(upstreamAs(tt.url, key, 0)))
		if err = api.FromConnect(err); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.say) || strings.Contains(err.Error(), "sesame") {
			t.Errorf("%s: %v, want %v saying %q", name, err, tt.want, tt.say)
		}
	}
	q := upstreamAs("http://127.0.0.1:1", key, 0)
	q.Untested = true
	if resp, err := operator.AddUpstream(within(t), connect.NewRequest(q)); err != nil || resp.Msg.GetProblem() == "" {
		t.Errorf("untested: %v, %v", resp, err)
	}
	q.Upstream.Keys = nil
	if _, err := operator.AddUpstream(within(t), connect.NewRequest(q)); !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
		t.Errorf("without a key: %v", err)
	}
	q.Upstream.Keys = []string{"nonsense"}
	if _, err := operator.AddUpstream(within(t), connect.NewRequest(q)); !errors.Is(api.FromConnect(err), flox.ErrBadInput) {
		t.Errorf("with half a key: %v", err)
	}
	if _, err := operator.RemoveUpstream(within(t), connect.NewRequest(&floxv1.RemoveUpstreamRequest{Url: "https://never.added"})); !errors.Is(api.FromConnect(err), flox.ErrNotFound) {
		t.Errorf("remove what is not there: %v", err)
	}
	listed, err := s.upstreams.list(within(t))
	if err != nil || len(listed.GetUpstreams()) != 1 || len(listed.GetSuggested()) != 1 || listed.GetSuggested()[0].GetUrl() != "https://cache.nixos.org" {
		t.Errorf("listed: %v, %v", listed, err)
	}
	if err := s.Substitute(within(t), SubstituteOptions{Paths: []string{"../../etc/passwd"}}, nil); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("substitute no path: %v", err)
	}
	// Plain members substitute, and change nothing.
	alice := plainMember(t, s, operator)
	_, add := alice.AddUpstream(within(t), asAlice(upstreamAs("file:///", key, 0)))
	_, test := alice.TestUpstream(within(t), asAlice(&floxv1.TestUpstreamRequest{Url: "http://127.0.0.1:1"}))
	_, remove := alice.RemoveUpstream(within(t), asAlice(&floxv1.RemoveUpstreamRequest{Url: "http://127.0.0.1:1"}))
	for what, err := range map[string]error{"add": add, "test": test, "remove": remove} {
		if !errors.Is(api.FromConnect(err), flox.ErrDenied) {
			t.Errorf("%s by a plain member: %v", what, err)
		}
	}
	if _, err := alice.ListUpstreams(within(t), asAlice(&floxv1.ListUpstreamsRequest{})); err != nil {
		t.Errorf("a plain member may not look: %v", err)
	}
}

// A login is for the host it was given for, whatever a narinfo names.
func TestLoginIsForItsHostAlone(t *testing.T) {
	t.Parallel()
	s, operator := closedHouse(t, nil)
	c, elsewhere := newWebCache(t), newWebCache(t)
	p := makePath(t, "p", 1000)
	c.add(p, p.nar, true)
	elsewhere.add(p, p.nar, true)
	name := filepath.Join(c.dir, p.info.Path.HashPart()+".narinfo")
	b, err := os.ReadFile(name)
	if err == nil {
		err = os.WriteFile(name, bytes.Replace(b, []byte("URL: "), []byte("URL: "+elsewhere.url+"/"), 1), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.twisted(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if name, word, _ := r.BasicAuth(); name != "olga" || word != "sesame" {
			http.Error(w, "who are you", http.StatusUnauthorized)
			return true
		}
		return false
	})
	elsewhere.twisted(func(_ http.ResponseWriter, r *http.Request, _ int) bool {
		if r.Header.Get("Authorization") != "" {
			t.Errorf("another host is told the login: %s", r.Header.Get("Authorization"))
		}
		return false
	})
	q := upstreamAs(c.url, c.key, 0)
	q.Login, q.Password = "olga", "sesame"
	addUpstream(t, operator, q)
	if got := substitute(t, s, wanting(p)); len(got.failed) != 0 || elsewhere.count(".nar") != 1 {
		t.Fatalf("%v", got.failed)
	}
	checkWhole(t, s, p)
}

// A backup has the upstreams and their logins.
func TestUpstreamsAreInBackups(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	cfg.Socket = filepath.Join(t.TempDir(), "s.sock")
	s, stop := start(t, cfg)
	sealed(t, s)
	c := newWebCache(t)
	p := makePath(t, "p", 1000)
	c.add(p, p.nar, true)
	q := upstreamAs(c.url, c.key, 7)
	q.Login, q.Password = "olga", "sesame"
	addUpstream(t, operatorOf(t, s), q)
	place := t.TempDir()
	backUp(t, s, place)
	stop()
	cfg.StateDir = filepath.Join(t.TempDir(), "again")
	if _, _, err := restore(t, cfg, place, nil); err != nil {
		t.Fatal(err)
	}
	s, _ = start(t, cfg)
	c.twisted(func(w http.ResponseWriter, r *http.Request, _ int) bool {
		_, word, _ := r.BasicAuth()
		if word != "sesame" {
			http.Error(w, "who are you", http.StatusUnauthorized)
		}
		return word != "sesame"
	})
	if got := substitute(t, s, wanting(p)); len(got.failed) != 0 {
		t.Errorf("%v", got.failed)
	}
	listed, err := s.upstreams.list(within(t))
	if err != nil || len(listed.GetUpstreams()) != 1 || listed.GetUpstreams()[0].GetUpstream().GetPriority() != 7 {
		t.Errorf("%v, %v", listed, err)
	}
}
