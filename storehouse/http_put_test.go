package storehouse

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// packed is a path's NAR as a client uploads it.
func packed(t *testing.T, nar []byte) upload {
	t.Helper()
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	return named(z.EncodeAll(nar, nil), ".nar.zst")
}

// named is data under the name of its hash.
func named(data []byte, ext string) upload {
	return upload{"nar/" + nix.EncodeBase32(sumOf(data)) + ext, data}
}

// infoOf is the narinfo of a path uploaded as nar.
func infoOf(dir flox.StoreDir, info *flox.PathInfo, nar upload) upload {
	n := nix.NarInfo{
		Info: *info, URL: nar.name, Compression: "zstd",
		FileHash: nix.SHA256Hash(sha256.Sum256(nar.data)), FileSize: uint64(len(nar.data)),
	}
	return upload{info.Path.HashPart() + ".narinfo", n.Marshal(dir)}
}

// A damaged or foreign NAR is refused with its name, what is wrong, and nothing
// of it stays.
func TestPutBadNar(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	token := uploadToken(t, s)
	p := makePath(t, "p", 600_000)
	good := packed(t, p.nar)
	noise := makePath(t, "noise", 100_000).nar[500:]
	flipped := bytes.Clone(p.nar)
	flipped[3] ^= 1
	for name, c := range map[string]struct {
		nar    upload
		status int
		wants  []string
	}{
		"cut":                  {named(good.data[:len(good.data)-9], ".nar.zst"), 400, []string{"ends early"}},
		"cut, plain":           {named(p.nar[:len(p.nar)-9], ".nar"), 400, []string{"NAR"}},
		"cut to nothing":       {named(nil, ".nar.xz"), 400, []string{"xz"}},
		"empty, plain":         {named(nil, ".nar"), 400, nil},
		"longer":               {packed(t, append(bytes.Clone(p.nar), 0)), 400, []string{"follow the end of the NAR"}},
		"no NAR":               {packed(t, noise), 400, []string{"NAR"}},
		"no NAR, plain":        {named(flipped, ".nar"), 400, []string{"known: none, xz, zstd, bzip2, gzip, br, lz4"}},
		"unknown format":       {named(noise, ".nar.lzip"), 400, []string{"lzip", "known: none, xz, zstd, bzip2, gzip, br, lz4"}},
		"unknown format as xz": {named(noise, ".nar.xz"), 400, []string{"known: none, xz, zstd"}},
		"no brotli":            {named(noise, ".nar.br"), 400, []string{"br"}},
		"another's name":       {upload{packed(t, noise).name, good.data}, 422, []string{"the file hashes to", "its name says", "send it again"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := c.nar.put(t, s, token)
			got.check(t, c.status, append(c.wants, c.nar.name)...)
			// Nothing can be made of it.
			ask(t, "HEAD", cacheURL(s)+"/"+c.nar.name, token, nil, nil).check(t, 404)
			infoOf(s.cfg.StoreDir, p.info, c.nar).put(t, s, token).check(t, 400, "was not uploaded before", "upload it first")
			isValid(t, s, string(p.info.Path), false)
		})
	}
	good.put(t, s, token).check(t, 201)
	infoOf(s.cfg.StoreDir, p.info, good).put(t, s, token).check(t, 200)
	checkWhole(t, s, p)
}

// A narinfo that does not fit its NAR, this store or the format is refused with
// what was expected, and the NAR still waits for a right one.
func TestPutBadNarinfo(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	token := uploadToken(t, s)
	p := makePath(t, "p", 60_000)
	nar := packed(t, p.nar)
	nar.put(t, s, token).check(t, 201)
	good := infoOf(s.cfg.StoreDir, p.info, nar)
	hash := p.info.Path.HashPart()
	otherHash := nix.EncodeBase32(sumOf([]byte("x")))
	for name, c := range map[string]struct {
		info  upload
		wants []string
	}{
		"NarHash":           {good.edit(t, `NarHash: sha256:\w+`, "NarHash: sha256:"+otherHash), []string{"the NAR has hash", otherHash}},
		"NarSize":           {good.edit(t, `NarSize: \d+`, "NarSize: 7"), []string{fmt.Sprintf("the NAR has %d bytes, its path info says 7", len(p.nar))}},
		"NarSize 0":         {good.edit(t, `NarSize: \d+`, "NarSize: 0"), []string{"NarSize 0"}},
		"no NarSize":        {good.edit(t, `NarSize: \d+\n`, ""), []string{"without NarSize"}},
		"missing reference": {good.edit(t, `References: `, "References: "+strings.Repeat("z", 32)+"-gone"), []string{strings.Repeat("z", 32) + "-gone", "upload that first"}},
		"other store":       {good.edit(t, `StorePath: /nix/store`, "StorePath: /gnu/store"), []string{"/gnu/store", "/nix/store"}},
		"other path":        {good.edit(t, `StorePath: .*`, "StorePath: /nix/store/"+strings.Repeat("z", 32)+"-p"), []string{"it describes " + strings.Repeat("z", 32)}},
		"bad name":          {good.edit(t, `-p\n`, "-p/q\n"), []string{"StorePath"}},
		"NAR not uploaded":  {good.edit(t, `URL: .*`, "URL: nar/"+otherHash+".nar.xz"), []string{"nar/" + otherHash + ".nar.xz was not uploaded before", "upload it first"}},
		"NAR elsewhere":     {good.edit(t, `URL: .*`, "URL: http://elsewhere/nar/x.nar"), []string{"http://elsewhere/nar/x.nar was not uploaded before"}},
		"CA":                {good.edit(t, `\z`, "CA: fixed:r:sha256:"+otherHash+"\n"), []string{"content address", "belongs to"}},
		"twice":             {good.edit(t, `\z`, "NarSize: 5\n"), []string{"twice"}},
		"cut":               {upload{good.name, good.data[:len(good.data)-3]}, []string{"line"}},
		"garbage":           {upload{good.name, []byte("\x00\x01")}, []string{"Key: value"}},
		"empty":             {upload{good.name, nil}, []string{"without StorePath"}},
		"endless":           {upload{good.name, bytes.Repeat([]byte("Foo: bar\n"), 1<<18)}, []string{"at most 1048576"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.info.put(t, s, token).check(t, 400, append(c.wants, good.name)...)
			isValid(t, s, string(p.info.Path), false)
		})
	}
	for _, name := range []string{"nix-cache-info", "hello", hash + ".xml", "x.narinfo"} {
		upload{name, good.data}.put(t, s, token).check(t, 400, "want HASH.narinfo")
	}
	upload{hash + ".ls", []byte("{}")}.put(t, s, token).check(t, 200) // taken, made by ourselves
	good.put(t, s, token).check(t, 200)
	good.put(t, s, token).check(t, 200) // again, as by a second machine
	checkWhole(t, s, p)
	// Our own narinfo may come back, but not with more signatures.
	own := upload{good.name, []byte(ask(t, "GET", cacheURL(s)+"/"+good.name, "", nil, nil).body)}
	own.put(t, s, token).check(t, 200)
	own.edit(t, `\z`, "Sig: other-1:c2lnbmF0dXJl\n").put(t, s, token).check(t, 400, "signatures are added before")
}

// Whoever has no token, or a wrong one, changes nothing and learns what to do,
// however much is sent and whether or not the client waits to be told to send.
func TestPutToken(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	p := makePath(t, "p", 20<<20)
	nar := packed(t, p.nar)
	info := infoOf(s.cfg.StoreDir, p.info, nar)
	for name, set := range map[string]func(*http.Request){
		"none":         func(*http.Request) {},
		"wrong":        func(r *http.Request) { r.SetBasicAuth("", "wrong") },
		"wrong bearer": func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+strings.Repeat("0", 64)) },
		"as user":      func(r *http.Request) { r.SetBasicAuth(uploadToken(t, s), "") },
		"waits":        func(r *http.Request) { r.Header.Set("Expect", "100-continue") },
	} {
		t.Run(name, func(t *testing.T) {
			for _, u := range []upload{nar, info, {p.info.Path.HashPart() + ".ls", []byte("{}")}} {
				req, err := http.NewRequestWithContext(within(t), "PUT", cacheURL(s)+"/"+u.name, bytes.NewReader(u.data))
				if err != nil {
					t.Fatal(err)
				}
				set(req)
				res, err := (&http.Transport{DisableKeepAlives: true, ExpectContinueTimeout: 20 * time.Second}).RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				b, _ := io.ReadAll(res.Body)
				res.Body.Close()
				if res.StatusCode != 401 || !strings.Contains(string(b), "upload-token") || res.Header.Get("WWW-Authenticate") == "" {
					t.Errorf("%s: %d %s", u.name, res.StatusCode, b)
				}
			}
			isValid(t, s, string(p.info.Path), false)
		})
	}
	// What one staged, others do not learn of without the token.
	nar.put(t, s, uploadToken(t, s)).check(t, 201)
	ask(t, "HEAD", cacheURL(s)+"/"+nar.name, uploadToken(t, s), nil, nil).check(t, 200)
	ask(t, "HEAD", cacheURL(s)+"/"+nar.name, "", nil, nil).check(t, 404)
	ask(t, "GET", cacheURL(s)+"/"+nar.name, uploadToken(t, s), nil, nil).check(t, 404)
	// A server that has not heard of the storehouse's keys blames no token.
	have := s.id.ring.now.Load()
	s.id.ring.set(guestKeys(have.all.GetSwarmSecrets()[0]))
	nar.put(t, s, uploadToken(t, s)).check(t, 503)
	s.id.ring.set(have)
}

// An upload that breaks off, by a cut or by silence, leaves nothing and ends; the
// client that still listens is told how far it came.
func TestPutBreaksOff(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	c := newHTTP(s, s.cfg, s.packs, s.packs.Stored)
	c.stall = 200 * time.Millisecond
	web := httptest.NewServer(c)
	defer web.Close()
	nar := packed(t, makePath(t, "p", 600_000).nar)
	head := fmt.Sprintf("PUT /%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: ", nar.name, uploadToken(t, s))
	for name, c := range map[string]struct {
		request string
		half    bool // stop sending, go on listening
		wants   string
	}{
		"Content-Length too long": {head + fmt.Sprintf("%d\r\n\r\n%s", len(nar.data)+5, nar.data), true, fmt.Sprintf("%d of %d bytes came", len(nar.data), len(nar.data)+5)},
		"cut":                     {head + fmt.Sprintf("%d\r\n\r\n%s", len(nar.data), nar.data[:1000]), true, fmt.Sprintf("1000 of %d bytes came", len(nar.data))},
		"silence":                 {head + fmt.Sprintf("%d\r\n\r\n%s", len(nar.data), nar.data[:1000]), false, "timeout"},
		"nothing at all":          {head + "5000\r\n\r\n", false, "0 of 5000 bytes came"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", web.Listener.Addr().String()) //nolint:noctx // a test's own server
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, c.request); err != nil {
				t.Fatal(err)
			}
			if c.half {
				if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			got, err := io.ReadAll(conn)
			if err != nil || !strings.HasPrefix(string(got), "HTTP/1.1 400") || !strings.Contains(string(got), c.wants) || !strings.Contains(string(got), "send it again") {
				t.Errorf("answer %q, %v; want 400 saying %q", got, err, c.wants)
			}
			ask(t, "HEAD", web.URL+"/"+nar.name, uploadToken(t, s), nil, nil).check(t, 404)
		})
	}
	nar.put(t, s, uploadToken(t, s)).check(t, 201)
}

// A NAR that unpacks to more than is allowed is refused when it gets there.
func TestPutBomb(t *testing.T) {
	t.Parallel()
	s, _ := start(t, testConfig(t.TempDir()))
	c := newHTTP(s, s.cfg, s.packs, s.packs.Stored)
	c.maxNar = 8 << 20
	web := httptest.NewServer(c)
	defer web.Close()
	var b bytes.Buffer
	w := nix.NewNarWriter(&b)
	size := uint64(64 << 20)
	if err := w.Entry(nix.NarEntry{Kind: flox.Regular, Size: size}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	bomb := packed(t, b.Bytes())
	if len(bomb.data) > 1<<20 {
		t.Fatalf("%d bytes are no bomb", len(bomb.data))
	}
	ask(t, "PUT", web.URL+"/"+bomb.name, uploadToken(t, s), nil, bytes.NewReader(bomb.data)).check(t, 400, "more than the 8388608 bytes")
	bomb.put(t, s, uploadToken(t, s)).check(t, 201) // it is the limit that refuses, not the content
}

// The storehouse may be restarted between a NAR and its narinfo, and knows an
// uploaded name ever after.
func TestPutAcrossRestarts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, stop := start(t, testConfig(dir))
	p := makePath(t, "p", 60_000)
	nar := packed(t, p.nar)
	nar.put(t, s, uploadToken(t, s)).check(t, 201)
	stop()
	s, stop = start(t, testConfig(dir))
	ask(t, "HEAD", cacheURL(s)+"/"+nar.name, uploadToken(t, s), nil, nil).check(t, 200)
	infoOf(s.cfg.StoreDir, p.info, nar).put(t, s, uploadToken(t, s)).check(t, 200)
	// The same NAR in another compression is one more name of it.
	plain := named(p.nar, ".nar")
	plain.put(t, s, uploadToken(t, s)).check(t, 201)
	infoOf(s.cfg.StoreDir, p.info, plain).put(t, s, uploadToken(t, s)).check(t, 200)
	stop()
	s, _ = start(t, testConfig(dir))
	checkWhole(t, s, p)
	if got := ask(t, "GET", cacheURL(s)+"/"+plain.name, "", nil, nil); got.body != string(p.nar) {
		t.Errorf("under the name it was uploaded by it has %d bytes, status %d", len(got.body), got.status)
	}
	z, err := zstd.NewReader(strings.NewReader(ask(t, "GET", cacheURL(s)+"/"+nar.name, "", nil, nil).body))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, p.nar) {
		t.Errorf("under its compressed name: %d bytes, %v", len(got), err)
	}
	// Another path of the same NAR needs no second upload, as HEAD says.
	q := p
	info := *p.info
	info.Path = makePath(t, "q", 1).info.Path
	q.info = &info
	ask(t, "HEAD", cacheURL(s)+"/"+nar.name, uploadToken(t, s), nil, nil).check(t, 200)
	infoOf(s.cfg.StoreDir, q.info, nar).put(t, s, uploadToken(t, s)).check(t, 200)
	checkWhole(t, s, q)
}

// A full disk answers 507 with what to do; what is there stays readable, and
// uploads work again once there is room.
func TestPutDiskFull(t *testing.T) {
	isRoot(t)
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=192m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	cfg := testConfig(filepath.Join(disk, "state"))
	cfg.ReserveBytes = 8 << 20
	s, _ := start(t, cfg)
	token := uploadToken(t, s)
	p, q := makePath(t, "p", 4<<20), makePath(t, "q", 32<<20)
	nar := packed(t, p.nar)
	nar.put(t, s, token).check(t, 201)
	infoOf(s.cfg.StoreDir, p.info, nar).put(t, s, token).check(t, 200)
	waits := makePath(t, "waits", 4<<20)
	waiting := packed(t, waits.nar)
	waiting.put(t, s, token).check(t, 201)

	hog, err := os.Create(filepath.Join(disk, "hog"))
	if err != nil {
		t.Fatal(err)
	}
	defer hog.Close()
	var st syscall.Statfs_t
	if err := syscall.Statfs(disk, &st); err != nil {
		t.Fatal(err)
	}
	if free := int64(st.Bavail) * st.Bsize; free > 24<<20 { // leaves less than q needs
		if err := syscall.Fallocate(int(hog.Fd()), 0, 0, free-24<<20); err != nil {
			t.Fatal(err)
		}
	}
	big := packed(t, q.nar)
	var group sync.WaitGroup
	for range 2 { // also when two run into it
		group.Go(func() {
			big.put(t, s, token).check(t, http.StatusInsufficientStorage, big.name, "bytes are free on its disk", "free space or delete paths")
		})
	}
	group.Wait()
	isValid(t, s, string(q.info.Path), false)
	checkWhole(t, s, p)
	ask(t, "HEAD", cacheURL(s)+"/"+big.name, token, nil, nil).check(t, 404)
	// What was staged before can still become a path.
	infoOf(s.cfg.StoreDir, waits.info, waiting).put(t, s, token).check(t, 200)
	checkWhole(t, s, waits)

	if err := os.Remove(hog.Name()); err != nil {
		t.Fatal(err)
	}
	if err := hog.Close(); err != nil {
		t.Fatal(err)
	}
	big.put(t, s, token).check(t, 201)
	infoOf(s.cfg.StoreDir, q.info, big).put(t, s, token).check(t, 200)
	checkWhole(t, s, q)
}
