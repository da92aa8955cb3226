package storehouse

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
)

// The first start makes keys, token, trust list and invite, all readable by
// the owner only; a second start changes none of them.
func TestFirstStart(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "state")
	s, stop := start(t, testConfig(dir))
	first := *s.Invite()
	for _, f := range []string{"invite.json", "upload-token", "keys/machine.key", "keys/nix.key", "keys/manifest.key", "keys/swarm.secret"} {
		st, err := os.Stat(stateFile(s, f))
		if err != nil {
			t.Error(err)
		} else if st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %04o, want 0600", f, st.Mode().Perm())
		}
	}
	read, err := api.LoadInvite(stateFile(s, "invite.json"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&first, read); diff != "" {
		t.Error(diff)
	}
	if !strings.HasPrefix(first.NixKey, "test-1:") || first.HTTPURL != "http://"+s.web.Addr().String() {
		t.Errorf("invite %+v", first)
	}
	token, err := os.ReadFile(stateFile(s, "upload-token"))
	if err != nil {
		t.Fatal(err)
	}
	stop()

	s, _ = start(t, testConfig(dir))
	again := *s.Invite()
	first.HTTPURL, again.HTTPURL = "", "" // the ports of this test change
	first.Storehouse[0].Addrs, again.Storehouse[0].Addrs = nil, nil
	if diff := cmp.Diff(first, again); diff != "" {
		t.Errorf("after a restart: %s", diff)
	}
	if _, err := s.CheckToken(strings.TrimSpace(string(token))); err != nil {
		t.Error(err)
	}
	for _, wrong := range []string{"", "x", string(token)} {
		if _, err := s.CheckToken(wrong); !errors.Is(err, flox.ErrDenied) {
			t.Errorf("token %q: %v, want ErrDenied", wrong, err)
		}
	}
}

// What a storehouse cannot start with is said with what to do.
func TestStartErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, stop := start(t, testConfig(dir))
	port := s.web.Addr().String()
	for _, c := range []struct {
		name string
		edit func(*Config)
		is   error
		want string
	}{
		{"same directory", func(*Config) {}, flox.ErrBusy, fmt.Sprintf("in use by process %d", os.Getpid())},
		{"HTTP port", func(c *Config) { c.StateDir, c.HTTPListen = t.TempDir(), port }, flox.ErrBusy, "configure another http_listen"},
		{"peer port", func(c *Config) { c.StateDir, c.Listen = t.TempDir(), []string{port} }, flox.ErrBusy, "port is in use"},
		{"store directory", func(c *Config) { c.StoreDir = "nix" }, flox.ErrBadInput, "absolute path"},
		{"port of metrics", func(c *Config) { c.StateDir, c.Metrics = t.TempDir(), port }, flox.ErrBusy, "configure another metrics"},
		{"address of metrics", func(c *Config) { c.Metrics = "7780" }, flox.ErrBadInput, "host:port"},
		{"HTTP address", func(c *Config) { c.HTTPListen = "7780" }, flox.ErrBadInput, "host:port"},
		{"name", func(c *Config) { c.Name = "a b" }, flox.ErrBadInput, `name "a b"`},
	} {
		t.Run(c.name, func(t *testing.T) { refused(t, dir, c.edit, c.is, c.want) })
	}
	stop()
	for _, c := range []struct {
		name string
		edit func(*Config)
		is   error
		want string
	}{
		{"another store directory", func(c *Config) { c.StoreDir = "/other/store" }, flox.ErrBadInput, "made for the store directory /nix/store"},
		{"another name", func(c *Config) { c.Name = "other" }, flox.ErrBadInput, `belongs to the storehouse "test"`},
		{"open key", func(*Config) { os.Chmod(filepath.Join(dir, "keys", "nix.key"), 0o644) }, flox.ErrDenied, "chmod 600"},
	} {
		t.Run(c.name, func(t *testing.T) { refused(t, dir, c.edit, c.is, c.want) })
	}
}

func refused(t *testing.T, dir string, edit func(*Config), is error, want string) {
	t.Helper()
	cfg := testConfig(dir)
	edit(&cfg)
	s, err := New(cfg)
	if err == nil {
		s.Close()
	}
	if !errors.Is(err, is) || !strings.Contains(fmt.Sprint(err), want) {
		t.Errorf("got %v, want %v saying %q", err, is, want)
	}
}

// A key that the trust list does not know signs nothing.
func TestForeignKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, stop := start(t, testConfig(dir))
	stop()
	key, err := nix.GenerateKey("test-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "keys", "manifest.key"), []byte(key.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := New(testConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(within(t)); !errors.Is(err, flox.ErrUntrusted) || !strings.Contains(err.Error(), "manifest.key") {
		t.Errorf("got %v, want ErrUntrusted naming the key", err)
	}
}

// A published path is valid, signed and whole, also after a restart; publishing
// it again changes nothing and reads nothing.
func TestPublish(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, stop := start(t, testConfig(dir))
	lib := makePath(t, "lib", 300_000)
	app := makePath(t, "app", 1000, lib.info.Path)
	app.info.References = append(app.info.References, app.info.Path) // itself
	if app.info.References[0] > app.info.References[1] {
		app.info.References[0], app.info.References[1] = app.info.References[1], app.info.References[0]
	}
	app.info.Signatures = []string{"upstream-1:c2lnbmF0dXJl"}
	publish(t, s, lib)
	got := publish(t, s, app)
	if got.Registered.IsZero() || len(got.Signatures) != 2 || got.Signatures[0] != app.info.Signatures[0] {
		t.Errorf("info %+v: want a time, and our signature behind the one it came with", got)
	}
	info, was, err := s.Publish(within(t), app.info, nil, "tester") // would panic if it read
	if err != nil || !was || info.Manifest != got.Manifest {
		t.Errorf("again: %+v %v %v", info, was, err)
	}
	stop()
	s, _ = start(t, testConfig(dir))
	checkWhole(t, s, lib)
	checkWhole(t, s, app)
}

// Ingest refuses what does not fit together, says why, and leaves nothing valid.
func TestPublishRefuses(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	base := makePath(t, "base", 5000)
	publish(t, s, base)
	for name, c := range map[string]struct {
		edit func(*testPath)
		want string
	}{
		"NAR hash":          {func(p *testPath) { p.info.NarHash[3] ^= 1 }, "its path info says"},
		"NAR size":          {func(p *testPath) { p.info.NarSize++ }, "bytes, its path info says"},
		"truncated":         {func(p *testPath) { p.nar = p.nar[:len(p.nar)-40] }, "NAR"},
		"longer":            {func(p *testPath) { p.nar = append(p.nar, 0) }, "follow"},
		"flipped":           {func(p *testPath) { p.nar[len(p.nar)/2] ^= 1 }, "hash"},
		"missing reference": {func(p *testPath) { p.info.References = []flox.StorePath{makePath(t, "none", 1).info.Path} }, "upload that first"},
		"same hash, other name": {func(p *testPath) {
			p.info.References = []flox.StorePath{flox.StorePath(base.info.Path.HashPart() + "-other")}
		}, "upload that first"},
		"unsorted": {func(p *testPath) { p.info.References = []flox.StorePath{base.info.Path, base.info.Path} }, "sorted"},
		"CA": {func(p *testPath) {
			p.info.CA = nix.ContentAddress{Method: nix.CANar, Hash: nix.SHA256Hash(p.info.NarHash)}.String()
		}, "belongs to"},
		"CA garbage": {func(p *testPath) { p.info.CA = "hello" }, "hello"},
		"hash part":  {func(p *testPath) { p.info.Path = flox.StorePath(base.info.Path.HashPart() + "-another") }, "belongs to"},
	} {
		t.Run(name, func(t *testing.T) {
			p := makePath(t, "refused", 20_000)
			c.edit(&p)
			_, _, err := s.Publish(within(t), p.info, p.reader(), "tester")
			if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want ErrBadInput saying %q", err, c.want)
			}
			if info, err := s.Info(within(t), p.info.Path.HashPart()); err == nil && info.Path == p.info.Path {
				t.Error("it is valid all the same")
			}
		})
	}
	// A content address that fits is taken; one that names another NAR is not.
	p, was, err := s.PublishSource(within(t), "source", makePath(t, "s", 100).reader(), "tester")
	if err != nil || was || !strings.HasPrefix(p.CA, "fixed:r:sha256:") {
		t.Fatalf("%+v %v %v", p, was, err)
	}
	if _, was, err := s.PublishSource(within(t), "source", makePath(t, "s", 100).reader(), "tester"); err != nil || !was {
		t.Errorf("again: %v %v", was, err)
	}
	if _, _, err := s.PublishSource(within(t), "so/urce", nil, "tester"); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("bad name: %v", err)
	}
}

// A second NAR for a valid path is refused, recorded, and changes nothing.
func TestFirstWins(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "p", 1000)
	publish(t, s, p)
	other := makePath(t, "q", 1000)
	other.info.Path = p.info.Path
	_, _, err := s.Publish(within(t), other.info, other.reader(), "mallory")
	if !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), nix.SHA256Hash(p.info.NarHash).String()) {
		t.Errorf("got %v, want ErrBadInput naming the valid hash", err)
	}
	checkWhole(t, s, p)
	counts, _, err := s.counts(within(t))
	if err != nil || counts.differences != 1 || counts.paths != 1 {
		t.Errorf("counts %+v %v, want one path, one difference", counts, err)
	}
}

// Publishes that wait together share one entry of the log; one that is refused
// does not hurt the others.
func TestBatch(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	b := newBatcher(s.node)
	const n = 20
	var group sync.WaitGroup
	replies := make([]*floxv1.PathsReply, n)
	errs := make([]error, n)
	for i := range n {
		p := makePath(t, fmt.Sprint("p", i), 10)
		p.info.Manifest = flox.CID{1}
		if i == 7 {
			p.info.References = []flox.StorePath{makePath(t, "none", 1).info.Path}
		}
		publisher := "a"
		if i >= 15 {
			publisher = "b"
		}
		group.Go(func() { replies[i], errs[i] = b.add(within(t), p.info, "", publisher, nil) })
	}
	for len(b.queue) < n { // all of them wait
		if within(t).Err() != nil {
			t.Fatal("not queued")
		}
	}
	batch, next := b.collect([]*addition{<-b.queue})
	for _, a := range batch {
		if a.publisher != batch[0].publisher {
			t.Error("one entry, two publishers")
		}
	}
	b.propose(within(t), batch)
	if next != nil {
		b.propose(within(t), []*addition{next})
	}
	for len(b.queue) > 0 {
		b.propose(within(t), []*addition{<-b.queue})
	}
	group.Wait()
	for i := range n {
		if (errs[i] != nil) != (i == 7) {
			t.Errorf("%d: %v", i, errs[i])
		}
	}
	before := s.node.Status().Last
	c := make([]*addition, 0, n)
	for i := range n {
		p := makePath(t, fmt.Sprint("q", i), 10)
		p.info.Manifest = flox.CID{1}
		c = append(c, &addition{infos: []*floxv1.PathInfo{api.FromPathInfo(p.info)}, publisher: "a", done: make(chan added, 1)})
	}
	b.propose(within(t), c)
	if got := s.node.Status().Last - before; got != 1 {
		t.Errorf("%d entries for one batch", got)
	}
	for i, a := range c {
		if got := <-a.done; got.err != nil || len(got.reply.GetAdded()) != n {
			t.Errorf("%d: %v %v", i, got.reply, got.err)
		}
	}
}

// A staged NAR survives a restart and becomes a path by its info; what does
// not fit leaves it staged.
func TestStageCommit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, stop := start(t, testConfig(dir))
	p := makePath(t, "p", 200_000)
	st, err := s.Stage(within(t), "tester", "nar/p.nar.xz", p.reader())
	if err != nil || st.NarHash != p.info.NarHash || st.NarSize != p.info.NarSize {
		t.Fatalf("%+v %v", st, err)
	}
	stop()
	s, _ = start(t, testConfig(dir))
	again, err := s.Staged("tester", "nar/p.nar.xz")
	if err != nil || again.Manifest != st.Manifest {
		t.Fatalf("after a restart: %+v %v", again, err)
	}
	for name, c := range map[string]struct{ publisher, key string }{"publisher": {"other", "nar/p.nar.xz"}, "key": {"tester", "nar/q.nar.xz"}} {
		if _, _, err := s.Commit(within(t), c.key, p.info, c.publisher); !errors.Is(err, flox.ErrNotFound) {
			t.Errorf("wrong %s: %v, want ErrNotFound", name, err)
		}
	}
	wrong := *p.info
	wrong.NarHash[0] ^= 1
	if _, _, err := s.Commit(within(t), st.Key, &wrong, "tester"); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("wrong hash: %v", err)
	}
	if _, was, err := s.Commit(within(t), st.Key, p.info, "tester"); err != nil || was {
		t.Fatalf("commit: %v %v", was, err)
	}
	checkWhole(t, s, p)
	if _, was, err := s.Commit(within(t), st.Key, p.info, "tester"); err != nil || !was {
		t.Errorf("commit again: %v %v", was, err)
	}
	// Another path of the same NAR needs no second upload.
	q := p
	info := *p.info
	info.Path = makePath(t, "q", 1).info.Path
	q.info = &info
	if _, was, err := s.Commit(within(t), st.Key, q.info, "tester"); err != nil || was {
		t.Errorf("second path of a NAR: %v %v", was, err)
	}
	checkWhole(t, s, q)
}

// What is staged is bounded in number and time, and damaged records are dropped.
func TestStageBounds(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	cfg.MaxStaged = 2
	s, stop := start(t, cfg)
	p := [4]testPath{}
	for i := range p {
		p[i] = makePath(t, fmt.Sprint("p", i), 1000)
	}
	stage := func(i int) error {
		_, err := s.Stage(within(t), "tester", fmt.Sprint(i), p[i].reader())
		return err
	}
	if err := errors.Join(stage(0), stage(1), stage(1)); err != nil {
		t.Fatal(err)
	}
	if err := stage(2); !errors.Is(err, flox.ErrFull) {
		t.Errorf("third of two: %v, want ErrFull", err)
	}
	if _, _, err := s.Commit(within(t), "0", p[0].info, "tester"); err != nil {
		t.Fatal(err)
	}
	if err := stage(2); err != nil {
		t.Errorf("a used one gives way: %v", err)
	}
	if _, err := s.Staged("tester", "0"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("it did not: %v", err)
	}
	stop()
	record := filepath.Join(cfg.StateDir, "staged", fileName("tester", "1"))
	if err := os.WriteFile(record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = start(t, cfg)
	if _, err := s.Staged("tester", "1"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("damaged record: %v, want ErrNotFound", err)
	}
	if err := s.staging.expire(time.Now().Add(cfg.StageTTL + 25*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Staged("tester", "2"); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("expired record: %v, want ErrNotFound", err)
	}
	if left, err := os.ReadDir(filepath.Join(cfg.StateDir, "staged")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// The HTTP port may be turned off.
func TestNoHTTP(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	cfg.HTTPListen = noHTTP
	s, _ := start(t, cfg)
	if s.web != nil || s.Invite().HTTPURL != "" {
		t.Errorf("HTTP at %v, %q", s.web, s.Invite().HTTPURL)
	}
}

// The URL in the invite is one that others can use.
func TestReachable(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		addrs []string
		want  string
	}{
		{nil, "127.0.0.1"},
		{[]string{"/ip4/127.0.0.1/tcp/1", "/ip4/10.1.2.3/tcp/1"}, "10.1.2.3"},
		{[]string{"/ip6/::1/tcp/1", "/ip6/fd00::1/tcp/1"}, "fd00::1"},
		{[]string{"/dns4/store.example/tcp/1"}, "store.example"},
		{[]string{"10.0.0.9:7781"}, "10.0.0.9"},
		{[]string{"x"}, "127.0.0.1"},
	} {
		if got := reachable(c.addrs); got != c.want {
			t.Errorf("%v: %q, want %q", c.addrs, got, c.want)
		}
	}
}
