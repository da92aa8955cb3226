package storehouse

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
	"github.com/floxctl/flox/profile/channel"
	"github.com/floxctl/flox/profile/upgrade"
)

// mirror serves a tarball as a channel's server does: behind a redirect, with an ETag.
type mirror struct {
	*httptest.Server
	mu      sync.Mutex
	tarball []byte
	etag    string
	wrong   int    // status that is answered instead; 0 = none
	asked   int    // for the tarball
	sent    int    // times that it was sent
	lead    string // where /loop leads
}

func newMirror(t *testing.T) *mirror {
	t.Helper()
	m := &mirror{lead: "/loop"}
	m.Server = httptest.NewServer(m)
	t.Cleanup(m.Close)
	return m
}

// ServeHTTP is http.Handler.
func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch r.URL.Path {
	case "/nixos":
		http.Redirect(w, r, "/releases/nixexprs.tar.gz", http.StatusFound)
		return
	case "/loop":
		http.Redirect(w, r, m.lead, http.StatusFound)
		return
	}
	m.asked++
	switch w.Header().Set("ETag", m.etag); {
	case m.wrong != 0:
		w.WriteHeader(m.wrong)
	case m.etag != "" && r.Header.Get("If-None-Match") == m.etag:
		w.WriteHeader(http.StatusNotModified)
	default:
		m.sent++
		_, _ = w.Write(m.tarball) // a client may go away
	}
}

// serve has it serve files from now on, by a tag.
func (m *mirror) serve(t *testing.T, etag string, files map[string]string) {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for name, text := range files {
		err := w.WriteHeader(&tar.Header{Name: "nixos-1/" + name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text))})
		if err == nil {
			_, err = w.Write([]byte(text))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tarball, m.etag = b.Bytes(), etag
}

func (m *mirror) fails(status int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wrong = status
}

// counts gives how often it was asked, and how often it sent all of it.
func (m *mirror) counts() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Sprint(m.asked, " ", m.sent)
}

// trackChannel tracks, and gives what was told on the way and at the end.
func trackChannel(t *testing.T, a floxv1connect.AdminClient, q *floxv1.TrackChannelRequest) (doing []string, end *floxv1.ChannelState, err error) {
	t.Helper()
	stream, err := a.TrackChannel(within(t), connect.NewRequest(q))
	if err != nil {
		t.Fatal(err)
	}
	for stream.Receive() {
		if end = stream.Msg().GetState(); end == nil {
			doing = append(doing, stream.Msg().GetDoing())
		}
	}
	return doing, end, errors.Join(stream.Err(), stream.Close())
}

// A tracked channel has a version of each new tarball, and of no other; what fails changes
// nothing, is shown, and is tried again later and later.
func TestTrackedChannels(t *testing.T) {
	t.Parallel()
	s := newFarm(t, evaluator(t), "", 1).Server
	admin, m := operatorOf(t, s), newMirror(t)
	m.serve(t, `"one"`, tools("2.1"))
	doing, end, err := trackChannel(t, admin, &floxv1.TrackChannelRequest{Channel: "Tools", Url: m.URL + "/nixos", Systems: []string{linux}})
	if err != nil || end.GetTracking().GetLast().GetResult() != channel.FetchPublished || end.GetNewest().GetNumber() != 1 || end.GetTracking().GetEveryMinutes() != upgrade.Daily {
		t.Fatalf("first: %v, %v, %v", doing, end, err)
	}
	if !slices.ContainsFunc(doing, func(d string) bool { return strings.HasPrefix(d, "evaluates for") }) {
		t.Errorf("told of the first fetch: %q", doing)
	}
	if v := end.GetNewest(); !strings.HasSuffix(v.GetReason(), "fetched from "+m.URL+"/releases/nixexprs.tar.gz") || v.GetActor().GetUser() != "" {
		t.Errorf("the version says %v", v)
	}
	now := time.Now()
	// has looks at what there is after the channel was due again.
	has := func(what, version, result, detail, counts string) *floxv1.ShowChannelResponse {
		t.Helper()
		now = now.Add(25 * time.Hour)
		if err := s.channels.fetchDue(within(t), now); err != nil {
			t.Fatal(err)
		}
		out, err := admin.ShowChannel(within(t), connect.NewRequest(&floxv1.ShowChannelRequest{Channel: "tools"}))
		if err != nil {
			t.Fatal(err)
		}
		f, err := s.channels.find(within(t), "hello", linux)
		last := out.Msg.GetTracking().GetLast()
		if got := fmt.Sprint(f.pkg.GetVersion(), " ", f.pkg.GetVersionNumber()); err != nil || got != version || last.GetResult() != result || !strings.Contains(last.GetDetail(), detail) || m.counts() != counts {
			t.Errorf("%s: %s, %v, %v, asked and sent %s; want %s, %s: %s, %s", what, got, err, last, m.counts(), version, result, detail, counts)
		}
		return out.Msg
	}
	has("as it was", "2.1 1", channel.FetchUnchanged, "releases", "2 1")
	m.serve(t, `"two"`, tools("2.1"))
	has("the same by another tag", "2.1 1", channel.FetchUnchanged, "releases", "3 2")
	has("that tag is known", "2.1 1", channel.FetchUnchanged, "releases", "4 2")
	m.serve(t, `"three"`, map[string]string{"default.nix": "{ a = "})
	if at := has("it cannot be evaluated", "2.1 1", channel.FetchFailed, "syntax error", "5 3"); at.GetTracking().GetLast().GetFailures() != 1 {
		t.Errorf("failed: %v", at)
	}
	m.fails(http.StatusGone)
	at := has("it is gone", "2.1 1", channel.FetchFailed, "its server answers 410 Gone", "6 3")
	if last := at.GetTracking().GetLast(); last.GetFailures() != 2 || at.GetNextFetchUnixMs() != last.GetTimeUnixMs()+(10*time.Minute).Milliseconds() || last.GetEtag() != `"two"` {
		t.Errorf("failed: %v", at)
	}
	m.fails(0)
	m.serve(t, `"four"`, tools("2.2"))
	at = has("new", "2.2 2", channel.FetchPublished, "releases", "7 4")
	if v := at.GetTracking().GetLast().GetVersion(); v != 2 || len(at.GetVersions()) != 2 {
		t.Errorf("published: %v", at)
	}
	if _, err := admin.UntrackChannel(within(t), connect.NewRequest(&floxv1.UntrackChannelRequest{Channel: "TOOLS"})); err != nil {
		t.Fatal(err)
	}
	m.serve(t, `"five"`, tools("2.3"))
	has("tracked no more", "2.2 2", "", "", "7 4")
	if left, err := filepath.Glob(filepath.Join(s.cfg.StateDir, "tarball*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	log := auditOf(t, admin, &floxv1.AuditRequest{Action: "channel."})
	if want := []string{actionTrack, actionPublish, actionPublish, actionUntrack}; !slices.Equal(log, want) {
		t.Errorf("audit log %q, want %q", log, want)
	}
}

// What cannot be fetched is tracked all the same, and shown; a channel without a version
// is found by nobody else.
func TestTrackedChannelsThatFail(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	cfg.Socket = filepath.Join(t.TempDir(), "s.sock")
	s, _ := start(t, cfg)
	admin, m := operatorOf(t, s), newMirror(t)
	m.serve(t, "", map[string]string{"default.nix": "{ }", "../../out": "x"})
	for path, words := range map[string]string{
		"/loop": "more than 5 redirects", "/x.tar.gz": "would be outside",
	} {
		_, end, err := trackChannel(t, admin, &floxv1.TrackChannelRequest{Channel: "tools", Url: m.URL + path, EveryMinutes: 60, Systems: []string{linux}})
		if last := end.GetTracking().GetLast(); err != nil || last.GetResult() != channel.FetchFailed || !strings.Contains(last.GetDetail(), words) || end.GetNewest() != nil {
			t.Errorf("%s: %v, %v, want %q", path, end, err, words)
		}
	}
	m.serve(t, "", tools("2.1"))
	if _, end, err := trackChannel(t, admin, &floxv1.TrackChannelRequest{Channel: "tools", Url: m.URL + "/x", EveryMinutes: 60, Systems: []string{linux}}); err != nil || !strings.Contains(end.GetTracking().GetLast().GetDetail(), "builds nothing") {
		t.Errorf("nobody evaluates: %v, %v", end, err)
	}
	list, err := admin.ListChannels(within(t), connect.NewRequest(&floxv1.ListChannelsRequest{}))
	if err != nil || len(list.Msg.GetChannels()) != 1 || list.Msg.GetChannels()[0].GetChannel().GetName() != "tools" || list.Msg.GetChannels()[0].GetTracking() == nil {
		t.Errorf("listed %v, %v", list, err)
	}
	if _, err := s.channels.find(within(t), "hello", linux); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "tools was not fetched yet") {
		t.Errorf("found in no version: %v", err)
	}
	for _, bad := range []*floxv1.TrackChannelRequest{{Channel: "tools", Url: "file:///etc", Systems: []string{linux}}, {Channel: "tools", Url: m.URL}, {Channel: "", Url: m.URL, Systems: []string{linux}}} {
		if _, _, err := trackChannel(t, admin, bad); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(s.cfg.StateDir), "out")); !os.IsNotExist(err) {
		t.Errorf("outside: %v", err)
	}
}

// Where a server may lead a fetch.
func TestRedirectsOfTarballs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, to string
		ok       bool
	}{
		{"http://x/", "https://y/", true},
		{"http://x/", "http://y/", true},
		{"https://x/", "https://y/", true},
		{"https://x/", "http://y/", false},
		{"http://x/", "file:///etc/passwd", false},
		{"https://x/", "ftp://y/", false},
	} {
		ask := func(url string) *http.Request {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
			if err != nil {
				t.Fatal(err)
			}
			return req
		}
		if err := checkRedirect(ask(c.to), []*http.Request{ask(c.from)}); (err == nil) != c.ok {
			t.Errorf("from %s to %s: %v", c.from, c.to, err)
		}
	}
	outside, inside := "93.184.216.34:443", []string{"127.0.0.1:80", "[::1]:80", "10.1.2.3:80", "169.254.169.254:80", "[fe80::1]:80", "[::ffff:192.168.1.1]:80", "0.0.0.0:80", "[fd00::1]:80"}
	for _, address := range inside {
		g := &insideGuard{}
		if err := g.control("tcp", outside, nil); err != nil {
			t.Error(err)
		}
		if err := g.control("tcp", address, nil); !errors.Is(err, flox.ErrDenied) {
			t.Errorf("from outside to %s: %v", address, err)
		}
		g = &insideGuard{}
		for _, each := range []string{address, outside, address} {
			if err := g.control("tcp", each, nil); err != nil {
				t.Errorf("begun at %s, to %s: %v", address, each, err)
			}
		}
	}
}

// What is due while something else is done is not missed.
func TestLeaderIsWoken(t *testing.T) {
	t.Parallel()
	s, _ := closedHouse(t, nil)
	ctx, stop := context.WithCancel(within(t))
	var wake bell
	begun, rings := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(rings)
		for { // until somebody listens
			select {
			case <-begun:
				return
			case <-ctx.Done():
				return
			case <-time.After(time.Millisecond):
				wake.ring()
			}
		}
	}()
	calls := 0
	err := s.asLeader(ctx, time.Hour, &wake, "count", func(context.Context, time.Time) error {
		if calls++; calls == 1 {
			close(begun)
			<-rings
		}
		if calls == 3 {
			stop()
			return nil
		}
		wake.ring()
		return nil
	})
	if err != nil || calls != 3 {
		t.Errorf("called %d times, %v; want each time that it rang", calls, err)
	}
}

// What was made of a channel is made again when no version has it any more, of its
// derivation, which stays; what nobody had made is gone.
func TestDroppedVersionsAreMadeAgain(t *testing.T) {
	t.Parallel()
	f := newFarmOf(t, evaluator(t), "", 1, func(c *Config) { c.CollectGrace, c.touchEvery = time.Millisecond, time.Millisecond })
	s := f.Server
	first, err := publishChannel(t, s, adminPerson(), "Tools", expressionOf(t, s, tools("2.1")))
	if err != nil {
		t.Fatal(err)
	}
	build := func(name string) (doing []string, pkg *floxv1.CataloguePackage, err error) {
		err = s.channels.build(within(t), "tester", &floxv1.BuildPackageRequest{Name: name, Systems: []string{linux}}, func(p *floxv1.BuildPackageProgress) {
			if p.GetDoing() != "" {
				doing = append(doing, p.GetDoing())
			}
			if len(p.GetPackages()) == 1 {
				pkg = p.GetPackages()[0]
			}
		})
		return doing, pkg, err
	}
	_, was, err := build("hello")
	if err != nil {
		t.Fatal(err)
	}
	second, err := publishChannel(t, s, adminPerson(), "tools", expressionOf(t, s, tools("2.2")))
	if err != nil {
		t.Fatal(err)
	}
	for range 99 { // until the first is not kept any more
		again := &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Publish{Publish: &floxv1.NewChannelVersion{Channel: "tools", Version: second.GetVersion()}}}
		if _, err := s.channels.propose(within(t), adminPerson(), again); err != nil {
			t.Fatal(err)
		}
	}
	aged()
	collect(t, s, soon)
	for path, want := range map[string]bool{first.GetVersion().GetSource(): false, was.GetPaths()[0]: false, was.GetDrv(): true} {
		if valid, err := s.isValid(within(t), flox.StorePath(path)); err != nil || valid != want {
			t.Errorf("%s is valid after a collection: %v, %v, want %v", path, valid, err, want)
		}
	}
	for range 2 {
		doing, pkg, err := build("hello@2.1")
		if err != nil || !pkg.GetDropped() || pkg.GetVersionNumber() != 1 || pkg.GetPaths()[0] != was.GetPaths()[0] || pkg.GetPriority() != 7 {
			t.Fatalf("made again: %q, %v, %v", doing, pkg, err)
		}
		if valid, err := s.isValid(within(t), flox.StorePath(pkg.GetPaths()[0])); err != nil || !valid {
			t.Errorf("%s: %v, %v", pkg.GetPaths(), valid, err)
		}
	}
	if _, pkg, err := build("hello"); err != nil || pkg.GetDropped() || pkg.GetVersion() != "2.2" {
		t.Errorf("the newest: %v, %v", pkg, err)
	}
	if _, _, err := build("hello@2.0"); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "versions 2 to 101 are kept, and of earlier ones what somebody had made") {
		t.Errorf("what nobody made: %v", err)
	}
}
