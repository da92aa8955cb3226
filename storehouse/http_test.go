package storehouse

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
)

// Every form of a Range request gets what RFC 9110 says, with the right bytes.
func TestRanges(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "p", 700_000)
	publish(t, s, p)
	u := cacheURL(s) + "/nar/" + narName(p.info) + ".nar"
	size := len(p.nar)
	part := func(from, to int) string { return fmt.Sprintf("bytes %d-%d/%d", from, to-1, size) }
	for _, c := range []struct {
		header   string
		status   int
		from, to int    // of the NAR
		is       string // Content-Range
	}{
		{"", 200, 0, size, ""},
		{"bytes=0-", 206, 0, size, part(0, size)},
		{"bytes=0-0", 206, 0, 1, part(0, 1)},
		{"bytes=5-9", 206, 5, 10, part(5, 10)},
		{"bytes=300000-600000", 206, 300000, 600001, part(300000, 600001)},
		{fmt.Sprintf("bytes=%d-", size-1), 206, size - 1, size, part(size-1, size)},
		{"bytes=100-99999999999", 206, 100, size, part(100, size)},
		{"bytes=-7", 206, size - 7, size, part(size-7, size)},
		{"bytes=-99999999999", 206, 0, size, part(0, size)},
		{"bytes=-0", 416, 0, 0, fmt.Sprintf("bytes */%d", size)},
		{fmt.Sprintf("bytes=%d-", size), 416, 0, 0, fmt.Sprintf("bytes */%d", size)},
		{fmt.Sprintf("bytes=%d-%d", size, size+5), 416, 0, 0, fmt.Sprintf("bytes */%d", size)},
		// Several ranges, and what is none: the whole, as if nothing were asked.
		{"bytes=0-1,5-9", 200, 0, size, ""},
		{"bytes=9-5", 200, 0, size, ""},
		{"bytes=+5-9", 200, 0, size, ""},
		{"bytes=5", 200, 0, size, ""},
		{"bytes=-", 200, 0, size, ""},
		{"bytes=a-b", 200, 0, size, ""},
		{"lines=1-2", 200, 0, size, ""},
	} {
		t.Run(c.header, func(t *testing.T) {
			header := http.Header{}
			if c.header != "" {
				header.Set("Range", c.header)
			}
			got := ask(t, "GET", u, "", header, nil)
			if got.check(t, c.status); got.header.Get("Content-Range") != c.is {
				t.Errorf("Content-Range %q, want %q", got.header.Get("Content-Range"), c.is)
			}
			if c.status != 416 && got.body != string(p.nar[c.from:c.to]) {
				t.Errorf("%d bytes, want those from %d to %d", len(got.body), c.from, c.to)
			}
			if c.status != 416 && got.header.Get("Content-Length") != strconv.Itoa(c.to-c.from) {
				t.Errorf("Content-Length %s, want %d", got.header.Get("Content-Length"), c.to-c.from)
			}
		})
	}
	// We give no validator, so none can match.
	header := http.Header{"Range": {"bytes=5-9"}, "If-Range": {`"x"`}}
	if got := ask(t, "GET", u, "", header, nil); got.status != 200 || got.body != string(p.nar) {
		t.Errorf("with If-Range: status %d, %d bytes; want the whole", got.status, len(got.body))
	}
}

// HEAD tells what GET would, without the bytes; what is not there is a 404.
func TestHead(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "p", 10_000)
	publish(t, s, p)
	hash := p.info.Path.HashPart()
	for _, c := range []struct {
		path, kind, length string
		status             int
	}{
		{"/nix-cache-info", "text/x-nix-cache-info", "", 200},
		{"/" + hash + ".narinfo", "text/x-nix-narinfo", "", 200},
		{"/" + hash + ".ls", "application/json", "", 200},
		{"/nar/" + narName(p.info) + ".nar", "application/x-nix-nar", strconv.Itoa(len(p.nar)), 200},
		{"/nar/" + narName(p.info) + ".nar.zst", "application/x-nix-nar", "", 200},
		{"/" + strings.Repeat("0", 32) + ".narinfo", "", "", 404},
		{"/" + strings.Repeat("0", 32) + ".ls", "", "", 404},
		{"/nar/" + hash + "-" + strings.Repeat("0", 52) + ".nar", "", "", 404},
		{"/nar/" + strings.Repeat("0", 52) + ".nar.xz", "", "", 404},
		{"/nar/x", "", "", 404},
		{"/hello", "", "", 404},
	} {
		t.Run(c.path, func(t *testing.T) {
			head, get := ask(t, "HEAD", cacheURL(s)+c.path, "", http.Header{"Range": {"bytes=0-1"}}, nil), ask(t, "GET", cacheURL(s)+c.path, "", nil, nil)
			head.check(t, c.status)
			get.check(t, c.status)
			if head.body != "" || get.body == "" {
				t.Errorf("HEAD gives %d bytes, GET %d", len(head.body), len(get.body))
			}
			if c.kind != "" && (head.header.Get("Content-Type") != c.kind || get.header.Get("Content-Type") != c.kind) {
				t.Errorf("Content-Type %q and %q, want %q", head.header.Get("Content-Type"), get.header.Get("Content-Type"), c.kind)
			}
			if got := head.header.Get("Content-Length"); c.length != "" && got != c.length {
				t.Errorf("Content-Length %s, want %s", got, c.length)
			}
		})
	}
	for _, c := range []struct{ method, path string }{{"DELETE", "/" + hash + ".narinfo"}, {"POST", "/nar/x"}, {"PATCH", "/"}} {
		ask(t, c.method, cacheURL(s)+c.path, uploadToken(t, s), nil, nil).check(t, 405, "want GET, HEAD or PUT")
	}
	ask(t, "PUT", cacheURL(s)+"/log/x.drv", uploadToken(t, s), nil, strings.NewReader("hello")).check(t, 404, "/log/x.drv", "takes in HASH.narinfo")
	ask(t, "GET", cacheURL(s)+"/log/x.drv", "", nil, nil).check(t, 400, "x.drv")
	ask(t, "GET", cacheURL(s)+"/log/"+hash+"-x.drv", "", nil, nil).check(t, 404, "is not available")
	ask(t, "GET", cacheURL(s)+"/realisations/x.doi", "", nil, nil).check(t, 404, "want realisations/sha256:HEX!OUTPUT.doi")
	ask(t, "GET", cacheURL(s)+"/realisations/sha256:"+strings.Repeat("0", 64)+"!out.doi", "", nil, nil).check(t, 404, "nobody built")
}

// What a person sees in a browser says how to use the cache, with its key.
func TestWelcome(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	ask(t, "GET", cacheURL(s)+"/", "", nil, nil).check(t, 200, s.PublicKey(), "/nix/store", "netrc")
}

// A lost block breaks the connection: nobody takes half a NAR for a whole one. A
// lost manifest is our failure, not a path that is not there.
func TestLostBlock(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "p", 3<<20)
	info := publish(t, s, p)
	m, err := content.OpenManifest(within(t), info.Manifest, s.packs)
	if err != nil {
		t.Fatal(err)
	}
	var last flox.CID
	if err := m.Blocks(within(t), func(id flox.CID, _ uint32) bool { last = id; return true }); err != nil {
		t.Fatal(err)
	}
	if err := s.packs.Delete(within(t), last); err != nil {
		t.Fatal(err)
	}
	for _, ext := range []string{".nar", ".nar.zst"} {
		res, err := http.Get(cacheURL(s) + "/nar/" + narName(p.info) + ext) //nolint:noctx // a test's own server
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		if err == nil {
			t.Errorf("%s: %d bytes of %d arrive, and no error", ext, len(got), len(p.nar))
		}
		if ext == ".nar" && !bytes.HasPrefix(p.nar, got) {
			t.Error("wrong bytes arrive")
		}
		res.Body.Close()
	}
	q := makePath(t, "q", 3<<20)
	if err := s.packs.Delete(within(t), publish(t, s, q).Manifest); err != nil {
		t.Fatal(err)
	}
	ask(t, "GET", cacheURL(s)+"/nar/"+narName(q.info)+".nar", "", nil, nil).check(t, 500, "lost")
}

// A reader that takes nothing is given up, and its place goes to the next one.
func TestStalledReader(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "p", 48<<20) // more than sockets buffer
	publish(t, s, p)
	c := newHTTP(s, s.cfg, s.packs, s.packs.Stored)
	c.stall = 2 * time.Second // the next reader must not seem to stall on a busy machine
	c.downloads = newShares(1, 1)
	web := httptest.NewServer(c)
	defer web.Close()
	conn, err := net.Dial("tcp", web.Listener.Addr().String()) //nolint:noctx // a test's own server
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	path := "/nar/" + narName(p.info) + ".nar"
	if _, err := io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 100)); err != nil { // it has the only place
		t.Fatal(err)
	}
	if got := ask(t, "GET", web.URL+path, "", nil, nil); got.status != 200 || got.body != string(p.nar) {
		t.Errorf("the next reader gets %d and %d bytes", got.status, len(got.body))
	}
	if n, err := io.Copy(io.Discard, conn); err == nil && n >= int64(len(p.nar)) {
		t.Error("the stalled reader gets everything: it was not given up")
	}
}

// Strangers can neither hold more connections than there are places nor send
// headers without end; a place that is left goes to the next one.
func TestStrangersAreBounded(t *testing.T) {
	t.Parallel()
	web := httptest.NewUnstartedServer(http.NotFoundHandler())
	web.Config.ConnState = atMost(2, 1)
	web.Start()
	defer web.Close()
	first, err := net.Dial("tcp", web.Listener.Addr().String()) //nolint:noctx // a test's own server
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	request := func(conn net.Conn) error {
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return err
		}
		_, err := conn.Read(make([]byte, 1))
		return err
	}
	if err := request(first); err != nil {
		t.Fatal(err)
	}
	second, err := net.Dial("tcp", web.Listener.Addr().String()) //nolint:noctx // a test's own server
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := request(second); err == nil {
		t.Error("a second client is served where there is one place")
	}
	first.Close()
	for ctx := within(t); ; time.Sleep(time.Millisecond) { // the server notices in its own time
		next, err := net.Dial("tcp", web.Listener.Addr().String()) //nolint:noctx // a test's own server
		if err != nil {
			t.Fatal(err)
		}
		err = request(next)
		next.Close()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}

	s, _ := start(t, testConfig(t.TempDir()))
	header := http.Header{"X-Long": {strings.Repeat("x", maxWebHeader+8<<10)}}
	if got := ask(t, "GET", cacheURL(s)+"/nix-cache-info", "", header, nil); got.status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a long header: status %d, want %d", got.status, http.StatusRequestHeaderFieldsTooLarge)
	}
}

// Whatever a Range header says, what is served lies within the NAR.
func FuzzRange(f *testing.F) {
	for _, s := range []string{"", "bytes=0-", "bytes=5-9", "bytes=-7", "bytes=-0", "bytes=9-5", "bytes=0-1,5-9", "bytes=", "bytes=--1", "bytes=18446744073709551615-"} {
		f.Add(s, int64(10))
	}
	f.Fuzz(func(t *testing.T, header string, size int64) {
		if size <= 0 {
			t.Skip()
		}
		off, n, err := parseRange(header, size)
		if err == nil && (off < 0 || n <= 0 || off > size-n) {
			t.Errorf("%q of %d: %d bytes from %d", header, size, n, off)
		}
	})
}
