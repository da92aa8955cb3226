package worker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Frames of the log stream, made by hand.
var last = w(0x616c7473)

func errorFrame(message string) string {
	return w(0x63787470) + s("Error") + w(0) + s("Error") + s(message) + w(0) + w(0)
}

// frame is a framed stream of one frame.
func frame(data string) string {
	if data == "" {
		return w(0)
	}
	return w(uint64(len(data))) + data + w(0)
}

// narOf is the NAR of a file, by the grammar.
func narOf(data string) string {
	return s("nix-archive-1") + s("(") + s("type") + s("regular") + s("contents") + s(data) + s(")")
}

// world is a store with a text and a tree that refers to it.
type world struct {
	*dirStore
	text, absent flox.StorePath
	info         string // of text, as on the wire
	nar          string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	root := t.TempDir()
	st := newDirStore(t, flox.StoreDir(filepath.Join(root, "store")), root)
	info, err := st.AddContent(t.Context(), Content{Name: "text", Method: nix.CAText, Algo: nix.SHA256}, strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	nar := narOf("hello")
	sum, text := sha256.Sum256([]byte(nar)), sha256.Sum256([]byte("hello"))
	path, err := nix.TextPath(st.dir, "text", text, nil)
	if err != nil || path != info.Path {
		t.Fatalf("%s, %v, want %s", info.Path, err, path)
	}
	return &world{
		dirStore: st, text: path, absent: vDep, nar: nar,
		info: w(0) + s(hex.EncodeToString(sum[:])) + w(0) + w(1_700_000_000) + w(uint64(len(nar))) + w(0) + w(0) +
			s("text:sha256:"+nix.EncodeBase32(text[:])),
	}
}

func (wo *world) s(p flox.StorePath) string { return s(wo.dir.Join(p)) }

// TestConversations plays operations byte by byte.
func TestConversations(t *testing.T) {
	wo := newWorld(t)
	text, absent := wo.s(wo.text), wo.s(wo.absent)
	added, err := nix.FixedOutputPath(wo.dir, "flat", false, nix.Hash{Algo: nix.MD5, Sum: md5sum("flat data")}, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	flatNar := narOf("flat data")
	flatSum := sha256.Sum256([]byte(flatNar))
	flatInfo := wo.s(added) + w(0) + s(hex.EncodeToString(flatSum[:])) + w(0) + w(1_700_000_000) + w(uint64(len(flatNar))) + w(0) + w(0) +
		s("fixed:md5:"+nix.EncodeBase32(md5sum("flat data")))
	link := filepath.Join(t.TempDir(), "link")
	realisation := `{"dependentRealisations":{},"id":"sha256:` + vHash + `!out","outPath":"` + string(wo.text) + `","signatures":[]}`
	tests := []struct {
		name          string
		request, want string
	}{
		{"valid", w(1) + text, last + w(1)},
		{"not valid", w(1) + absent, last + w(0)},
		{"obsolete hash", w(4) + text, last + wo.info[8:8+72]},
		{"obsolete hash of none", w(4) + absent, errorFrame("path '" + wo.dir.Join(wo.absent) + "' is not valid")},
		{"obsolete references", w(5) + text, last + w(0)},
		{"referrers", w(6) + text, last + w(0)},
		{"add a flat file", w(7) + s("flat") + s("fixed:md5") + w(0) + w(0) + frame("flat data"), last + flatInfo},
		{
			"add by an unknown method", w(7) + s("flat") + s("fixed:blake3") + w(0) + w(0) + frame("flat data"),
			errorFrame("content address method 'fixed:blake3' is not known: want text:sha256, fixed:<algorithm> or fixed:r:<algorithm> with md5, sha1, sha256 or sha512"),
		},
		{"add a text the old way", w(8) + s("text") + s("hello") + w(0), last + text},
		{"build what is there", w(9) + w(1) + text + w(0), last + w(1)},
		{"build what nobody has", w(9) + w(1) + absent + w(0), errorFrame("path '" + wo.dir.Join(wo.absent) + "' does not exist and cannot be created")},
		{
			"build two that nobody has", w(9) + w(2) + absent + wo.s(vPath) + w(0),
			w(0x6f6c6d67) + s("error: path '"+wo.dir.Join(wo.absent)+"' does not exist and cannot be created\n") +
				w(0x6f6c6d67) + s("error: path '"+wo.dir.Join(vPath)+"' does not exist and cannot be created\n") +
				errorFrame("build of '"+wo.dir.Join(wo.absent)+"', '"+wo.dir.Join(vPath)+"' failed"),
		},
		{"ensure", w(10) + text, last + w(1)},
		{"ensure what nobody has", w(10) + absent, errorFrame("path '" + wo.dir.Join(wo.absent) + "' does not exist and cannot be created")},
		{"temporary root", w(11) + absent, last + w(1)},
		{"indirect root", w(12) + s(link), last + w(1)},
		{"sync", w(13), last + w(1)},
		{"roots", w(14), last + w(1) + s("{temp:1}") + absent},
		{"export", w(16) + text + w(0), w(0x64617416) + s(wo.nar) + w(0x64617416) + s(w(0x4558494e)+text+w(0)+w(0)+w(0)) + last + w(1)},
		{"deriver", w(18) + text, last + w(0)},
		{"options", w(19) + w(0) + w(0) + w(0) + w(3) + w(1) + w(0) + w(1) + w(7) + w(0) + w(0) + w(0) + w(1) + w(1) + s("max-silent-time") + s("5"), last},
		{"live paths", w(20) + w(0) + w(0) + w(0) + w(^uint64(0)) + w(0) + w(0) + w(0), last + w(0) + w(0) + w(0)},
		{"collect in spite of liveness", w(20) + w(2) + w(0) + w(1) + w(0) + w(0) + w(0) + w(0), errorFrame("you are not allowed to ignore liveness")},
		{"substitutable", w(21) + text, last + w(0)},
		{"outputs", w(28) + text, last + w(2) + s("later") + s("out")},
		{"outputs that are not known", w(22) + text, errorFrame("output 'later' of the derivation has no known path: not found")},
		{"output map", w(41) + text, last + w(2) + s("later") + w(0) + s("out") + text},
		{"path info", w(26) + text, last + w(1) + wo.info},
		{"no path info", w(26) + absent, last + w(0)},
		{"by hash part", w(29) + s(wo.text.HashPart()), last + text},
		{"by another hash part", w(29) + s(wo.absent.HashPart()), last + w(0)},
		{"by a wrong hash part", w(29) + s("short"), errorFrame("invalid hash part")},
		{"substitutable infos", w(30) + w(1) + absent + s(""), last + w(0)},
		{"all paths", w(23), last + w(2) + allOf(wo.s(wo.text), wo.s(added))},
		{"valid paths", w(31) + w(2) + absent + text + w(1), last + w(1) + text},
		{"substitutable paths", w(32) + w(1) + absent, last + w(0)},
		{"derivers", w(33) + text, last + w(0)},
		{"optimise", w(34), last + w(1)},
		{"verify", w(35) + w(1) + w(0), last + w(0)},
		{
			"build a derivation", w(36) + text + w(1) + s("out") + text + s("") + s("") + w(0) + s("x") + s("/b") + w(0) + w(0) + w(0),
			last + w(0) + s("") + w(1) + w(0) + w(5) + w(6) + w(0) + w(0) + w(1) + s(builtID(wo.text)) +
				s(`{"dependentRealisations":{},"id":"`+builtID(wo.text)+`","outPath":"`+string(wo.text)+`","signatures":[]}`),
		},
		{"sign what is not valid", w(37) + absent + w(1) + s("k:c2ln"), errorFrame("path '" + wo.dir.Join(wo.absent) + "' is not valid")},
		{"NAR", w(38) + text, last + wo.nar},
		{"missing", w(40) + w(2) + text + absent, last + w(0) + w(0) + w(1) + absent + w(0) + w(0)},
		{"no realisation", w(43) + s("sha256:"+vHash+"!out"), last + w(0)},
		{"register", w(42) + s(realisation), last},
		{"realisation", w(43) + s("sha256:"+vHash+"!out"), last + w(1) + s(realisation)},
		{"add a log", w(45) + s(string(vDrv)) + frame("line\n"), last + w(1)},
		{"build with results", w(46) + w(1) + text + w(0), last + w(1) + text + w(1) + s("") + w(0) + w(0) + w(0) + w(0) + w(0) + w(0) + w(0)},
	}
	sc := newScript(t, wo.dirStore, MaxVersion, Trusted)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sc.t = t
			sc.send(tt.request)
			sc.expect(tt.want)
		})
	}
	if got := wo.session.Options().Settings["max-silent-time"]; got != "5" {
		t.Errorf("setting max-silent-time is %q", got)
	}
	for code, op := range operations {
		if !slices.ContainsFunc(tests, func(tt struct{ name, request, want string }) bool {
			return strings.HasPrefix(tt.request, w(uint64(code)))
		}) &&
			!slices.Contains([]Op{OpAddToStoreNar, OpAddMultipleToStore, OpAddPermRoot, OpHasSubstitutes}, code) {
			t.Errorf("operation %d %s has no conversation", code, op.name)
		}
	}
}

// allOf gives encoded paths in their order: what they have before is the same.
func allOf(paths ...string) string {
	slices.SortFunc(paths, func(a, b string) int { return strings.Compare(a[8:], b[8:]) })
	return strings.Join(paths, "")
}

func builtID(p flox.StorePath) string {
	sum := sha256.Sum256([]byte(p))
	return "sha256:" + hex.EncodeToString(sum[:]) + "!out"
}

func md5sum(text string) []byte {
	h := nix.MD5.New()
	h.Write([]byte(text))
	return h.Sum(nil)
}

// TestErrorsEndTheConnection: after a request that was not understood there is
// one ERROR and nothing more.
func TestErrorsEndTheConnection(t *testing.T) {
	wo := newWorld(t)
	for _, tt := range []struct{ name, request, want string }{
		{"unknown operation", w(24), errorFrame("invalid operation 24")},
		{"operation of a later version", w(47), errorFrame("invalid operation 47")},
		{"path outside", w(1) + s("/else/"+vPath), errorFrame("path '/else/" + vPath + "' is not in the Nix store")},
		{"NAR of none", w(38) + wo.s(wo.absent), errorFrame("path '" + wo.dir.Join(wo.absent) + "' is not valid")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sc := newScript(t, wo.dirStore, v34, Trusted)
			sc.send(tt.request)
			sc.expect(tt.want)
			sc.end()
		})
	}
}

// TestUploadErrorsKeepTheConnection: ERROR comes before the stream's end, which
// is read to the last frame, and the next operation is served.
func TestUploadErrorsKeepTheConnection(t *testing.T) {
	wo := newWorld(t)
	sum := strings.Repeat("0", 64)
	nar := narOf("x")
	upload := w(39) + wo.s(vPath) + w(0) + s(sum) + w(0) + w(0) + w(uint64(len(nar))) + w(0) + w(0) + w(0) + w(0)
	for _, tt := range []struct {
		name, start, rest string
		trust             Trust
		want              string
	}{
		{"hash mismatch", upload + w(1) + w(uint64(len(nar))) + nar, w(3) + "abc" + w(0), Trusted, "hash mismatch importing path '" + wo.dir.Join(vPath) + "'"},
		{"no signature", upload + w(0) + w(4) + nar[:4], w(3) + "abc" + w(0), Trusted, "cannot add path '" + wo.dir.Join(vPath) + "' because it lacks a valid signature"},
		{"no signature of a client that is not trusted and says not to check", upload + w(1) + w(4) + nar[:4], w(3) + "abc" + w(0), NotTrusted, "cannot add path '" + wo.dir.Join(vPath) + "' because it lacks a valid signature"},
		{"log of a client that is not trusted", w(45) + s(vDrv) + w(2) + "ab", w(0), NotTrusted, "you are not privileged to add logs"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sc := newScript(t, wo.dirStore, v34, tt.trust)
			sc.send(tt.start)
			sc.expect(errorFrame(tt.want))
			sc.send(tt.rest + w(1) + wo.s(wo.text))
			sc.expect(last + w(1))
		})
	}
}

// TestUntrustedClients get what Nix gives them.
func TestUntrustedClients(t *testing.T) {
	wo := newWorld(t)
	sc := newScript(t, wo.dirStore, MaxVersion, NotTrusted)
	for _, tt := range []struct{ name, request, want string }{
		{
			"options", w(19) + w(0) + w(0) + w(0) + w(3) + w(1) + w(0) + w(1) + w(7) + w(0) + w(0) + w(0) + w(1) +
				w(4) + s("experimental-features") + s("flakes") + s("require-sigs") + s("false") + s("substituters") + s("https://c") + s("timeout") + s("9"),
			w(0x6f6c6d67) + s("warning: ignoring the client-specified setting 'require-sigs', because it is a restricted setting and you are not a trusted user\n") + last,
		},
		{"repair", w(46) + w(1) + wo.s(wo.text) + w(1), errorFrame("repairing is not allowed because you are not in 'trusted-users'")},
		{"repair a source", w(7) + s("x") + s("fixed:sha1") + w(0) + w(1) + frame("a"), errorFrame("repairing is not allowed because you are not in 'trusted-users'")},
		{"verify and repair", w(35) + w(0) + w(1), errorFrame("you are not privileged to repair paths")},
		{
			"input-addressed derivation", w(36) + wo.s(vDrv) + w(1) + s("out") + wo.s(vPath) + s("") + s("") + w(0) + s("x") + s("/b") + w(0) + w(0) + w(0),
			errorFrame("you are not privileged to build input-addressed derivations"),
		},
		{"permanent root", w(47) + wo.s(wo.text) + s("/tmp/r"), errorFrame("you are not privileged to create perm roots\n\nhint: you can just do this client-side without special privileges, and probably want to do that instead.")},
		{"temporary root", w(11) + wo.s(wo.text), last + w(1)},
		{"roots", w(14), last + w(1) + s("{censored}") + wo.s(wo.text)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sc.t = t
			sc.send(tt.request)
			sc.expect(tt.want)
		})
	}
	settings := wo.session.Options().Settings
	if len(settings) != 2 || settings["timeout"] != "9" || settings["substituters"] != "https://c" {
		t.Errorf("settings %v", settings)
	}
}

// TestOldClientsAreRefused in their own form of an error.
func TestOldClientsAreRefused(t *testing.T) {
	wo := newWorld(t)
	for _, tt := range []struct {
		version uint64
		more    string
		want    string
	}{
		{0x10a, "", w(0x63787470) + s("the Nix client version is too old") + w(1)},
		{0x115, w(1) + w(5) + w(0), w(0x63787470) + s("the Nix client version is too old") + w(1)},
		{0x11f, w(0) + w(0), errorFrame("the Nix client version is too old")},
	} {
		sc := &script{t: t, conn: connect(t, wo.dirStore, Trusted)}
		sc.send(w(0x6e697863) + w(tt.version) + tt.more)
		sc.expect(w(0x6478696f) + w(0x126) + tt.want)
		sc.end()
	}
}

// TestRefusalIsRead: the store may refuse a client, who reads why.
func TestRefusalIsRead(t *testing.T) {
	_, err := dial(t, &Server{Dir: vDir, Version: "x", Open: func(context.Context, *Session) (*Store, error) {
		return nil, errorf(flox.ErrBusy, "too many connections")
	}}, ClientConfig{Dir: vDir})
	remote, ok := errors.AsType[*RemoteError](err)
	if !ok || remote.Message != "too many connections" {
		t.Errorf("error %v", err)
	}
}

// TestHangUpCancels: what a client waited for ends when it goes.
func TestHangUpCancels(t *testing.T) {
	wo := newWorld(t)
	wo.block = make(chan struct{})
	sc := newScript(t, wo.dirStore, v34, Trusted)
	sc.send(w(10) + wo.s(wo.absent))
	sc.conn.Close()
	if err := <-wo.ended; !errors.Is(err, errHungUp) {
		t.Errorf("it ended because of %v", err)
	}
}

// TestTemporaryRootsGoWithTheConnection, not before.
func TestTemporaryRootsGoWithTheConnection(t *testing.T) {
	wo := newWorld(t)
	server := &Server{Dir: wo.dir, Version: "x", Open: wo.open}
	c, err := dial(t, server, ClientConfig{Dir: wo.dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.AddTempRoot(t.Context(), wo.text); err != nil {
		t.Fatal(err)
	}
	if roots, _ := wo.Find(t.Context(), false); len(roots) != 1 {
		t.Fatalf("roots %v", roots)
	}
	c.Close()
	c.served()
	if roots, _ := wo.Find(t.Context(), false); len(roots) != 0 {
		t.Errorf("roots %v after the connection", roots)
	}
}

// TestMessagesKeepToTheWindow: what is said between two operations comes with
// the next, activities that were left running are stopped, and what nobody
// may read any more is dropped.
func TestMessagesKeepToTheWindow(t *testing.T) {
	var b bytes.Buffer
	e := newEncoder(&b, vDir)
	l := newLog(e)
	l.Message(LevelInfo, "before")
	l.Message(LevelDebug, "not shown")
	if a := l.Start(LevelInfo, ActBuild, "outside", nil); a != nil {
		t.Error("an activity began outside the window")
	}
	l.begin()
	a := l.Start(LevelError, ActBuild, "building", nil, Text("drv"), Number(1))
	child := l.Start(LevelInfo, ActUnknown, "", a)
	child.Stop()
	a.Result(ResBuildLogLine, Text("line"))
	l.end(MaxVersion, nil)
	a.Result(ResBuildLogLine, Text("late"))
	a.Stop()
	l.Message(LevelInfo, "late")
	if err := e.flush(); err != nil {
		t.Fatal(err)
	}
	want := w(0x6f6c6d67) + s("before\n") +
		w(0x53545254) + w(1) + w(0) + w(105) + s("building") + w(2) + w(1) + s("drv") + w(0) + w(1) + w(0) +
		w(0x53545254) + w(2) + w(3) + w(0) + s("") + w(0) + w(1) +
		w(0x53544f50) + w(2) +
		w(0x52534c54) + w(1) + w(101) + w(1) + w(1) + s("line") +
		w(0x53544f50) + w(1) + w(0x616c7473)
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", hex.Dump(b.Bytes()), hex.Dump([]byte(want)))
	}
}
