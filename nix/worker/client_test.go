package worker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// testClient is a client whose server ends with the test.
type testClient struct {
	*Client
	served func() // waits for the server's end
}

// dial connects a client and a server.
func dial(t *testing.T, server *Server, cfg ClientConfig) (*testClient, error) {
	t.Helper()
	here, there := socketPair(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(ctx, there, Peer{Trust: Trusted})
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	c, err := NewClient(t.Context(), here, cfg)
	return &testClient{Client: c, served: func() { <-done }}, err
}

// TestClientAndServer speak every version with each other.
func TestClientAndServer(t *testing.T) {
	for v := MinVersion; v <= MaxVersion; v++ {
		t.Run(v.String(), func(t *testing.T) { testVersion(t, v) })
	}
}

func testVersion(t *testing.T, v Version) {
	root, ctx := t.TempDir(), t.Context()
	dir := flox.StoreDir(filepath.Join(root, "store"))
	st := newDirStore(t, dir, root)
	var frames []LogFrame
	c, err := dial(t, &Server{Dir: dir, Version: "9.9", Open: st.open}, ClientConfig{Dir: dir, Version: v, Log: func(f LogFrame) { frames = append(frames, f) }})
	if err != nil {
		t.Fatal(err)
	}
	if c.Version() != v || (c.DaemonVersion() != "9.9") != (v < v33) || (c.Trust() == Trusted) != (v >= v35) {
		t.Errorf("version %s, daemon %q, trust %d", c.Version(), c.DaemonVersion(), c.Trust())
	}
	if err := c.SetOptions(ctx, Options{Level: LevelDebug, UseSubstitutes: true, Settings: map[string]string{"cores": "3"}}); err != nil {
		t.Fatal(err)
	}
	if o := st.session.Options(); o.Level != LevelDebug || o.Settings["cores"] != "3" {
		t.Errorf("options %+v", o)
	}

	// Larger than every buffer on the way.
	big := strings.Repeat("0123456789abcdef", 1<<16)
	dep, err := c.AddContent(ctx, Content{Name: "big", Method: nix.CAText, Algo: nix.SHA256}, strings.NewReader(big))
	if err != nil {
		t.Fatal(err)
	}
	infos, nars := []*Info{}, []string{}
	for i := range 3 {
		nar := narOf(fmt.Sprintf("%s %d", dir.Join(dep.Path), i))
		path := flox.StorePath(fmt.Sprintf("%032d-p", i))
		infos = append(infos, &Info{PathInfo: flox.PathInfo{Path: path, NarHash: sha256.Sum256([]byte(nar)), NarSize: uint64(len(nar)), References: []flox.StorePath{path, dep.Path}, Signatures: []string{"k:c2ln"}}})
		nars = append(nars, nar)
	}
	if err := c.AddNar(ctx, infos[0], strings.NewReader(nars[0]), AddOptions{}); err != nil {
		t.Fatal(err)
	}
	next := 0
	err = c.AddNars(ctx, 2, func() (*Info, io.Reader, error) {
		next++
		return infos[next], strings.NewReader(nars[next]), nil
	}, AddOptions{})
	if err != nil {
		t.Fatal(err)
	}
	valid, err := c.ValidPaths(ctx, []flox.StorePath{infos[2].Path, vPath, infos[0].Path}, false)
	if err != nil || !cmp.Equal(valid, []flox.StorePath{infos[0].Path, infos[2].Path}) {
		t.Errorf("valid %v, %v", valid, err)
	}
	var nar bytes.Buffer
	if err := c.Nar(ctx, dep.Path, &nar); err != nil || nar.String() != narOf(big) {
		t.Errorf("NAR of %d bytes, %v", nar.Len(), err)
	}
	got, err := c.Info(ctx, infos[1].Path)
	if err != nil || got.NarHash != infos[1].NarHash || !cmp.Equal(got.References, infos[1].References) {
		t.Errorf("info %+v, %v", got, err)
	}
	testErrors(t, c.Client)
	if v >= v34 {
		results, err := c.BuildResults(ctx, []DerivedPath{{Path: dep.Path}, {Path: dep.Path, All: true}}, BuildNormal)
		if err != nil || len(results) != 2 || !results[0].Status.Succeeded() || results[1].Status != PermanentFailure {
			t.Errorf("results %+v, %v", results, err)
		}
	} else if _, err := c.BuildResults(ctx, nil, BuildNormal); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("results below 1.34: %v", err)
	}
	testSubstitution(t, c.Client, st, &frames)
}

// testErrors checks that a daemon's errors leave the connection usable.
func testErrors(t *testing.T, c *Client) {
	ctx := t.Context()
	if _, err := c.Info(ctx, vPath); !errors.Is(err, flox.ErrNotFound) {
		t.Errorf("info of no path: %v", err)
	}
	err := c.Ensure(ctx, vPath)
	if remote, ok := errors.AsType[*RemoteError](err); !ok || !strings.Contains(remote.Message, "does not exist and cannot be created") {
		t.Errorf("ensure: %v", err)
	}
	// The daemon says no while most of this is still to come.
	wrong := &Info{PathInfo: flox.PathInfo{Path: vPath, NarSize: 1 << 30}}
	err = c.AddNar(ctx, wrong, io.LimitReader(zeroReader{}, 1<<30), AddOptions{})
	if remote, ok := errors.AsType[*RemoteError](err); !ok || !strings.Contains(remote.Message, "lacks a valid signature") {
		t.Errorf("upload: %v", err)
	}
	// What was sent must not pass for a whole, whatever the reason.
	if valid, err := c.IsValid(ctx, vPath); err != nil || valid {
		t.Errorf("valid %v, %v", valid, err)
	}
	if err := c.Build(ctx, []DerivedPath{{Path: vPath}}, BuildNormal); err == nil {
		t.Error("a build of nothing worked")
	}
	missing, err := c.Missing(ctx, []DerivedPath{{Path: vPath}, {Path: vDrv, All: true}})
	if err != nil || len(missing.Unknown) != 1 || len(missing.Build) != 1 {
		t.Errorf("missing %+v, %v", missing, err)
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// testSubstitution fetches a closure and follows the activities.
func testSubstitution(t *testing.T, c *Client, st *dirStore, frames *[]LogFrame) {
	ctx := t.Context()
	up := t.TempDir()
	// Its files lie elsewhere, its paths are the same.
	st.upstream = newDirStore(t, flox.StoreDir(filepath.Join(up, "store")), up)
	nar := narOf("from upstream")
	info := &Info{PathInfo: flox.PathInfo{Path: vPath, NarHash: sha256.Sum256([]byte(nar)), NarSize: uint64(len(nar)), References: []flox.StorePath{vPath}, Signatures: []string{"k:c2ln"}}}
	if err := st.upstream.add(ctx, info, strings.NewReader(nar)); err != nil {
		t.Fatal(err)
	}
	*frames = nil
	if valid, err := c.ValidPaths(ctx, []flox.StorePath{vPath}, true); err != nil || len(valid) != 1 {
		t.Fatalf("valid %v, %v", valid, err)
	}
	var kinds []LogKind
	for _, f := range *frames {
		kinds = append(kinds, f.Kind)
	}
	if !cmp.Equal(kinds, []LogKind{LogStart, LogResult, LogStop}) || (*frames)[0].Type != ActCopyPath || len((*frames)[0].Fields) != 3 {
		t.Errorf("log %+v", *frames)
	}
}

// TestUploadThatBreaksOff is never valid: the client's own error ends the
// connection before the last frame.
func TestUploadThatBreaksOff(t *testing.T) {
	root := t.TempDir()
	dir := flox.StoreDir(filepath.Join(root, "store"))
	st := newDirStore(t, dir, root)
	c, err := dial(t, &Server{Dir: dir, Open: st.open}, ClientConfig{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("disk on fire")
	_, err = c.AddContent(t.Context(), Content{Name: "x", Method: nix.CAText, Algo: nix.SHA256}, io.MultiReader(strings.NewReader("half"), failing{broken}))
	if !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	c.served()
	if all, err := st.All(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("valid %v, %v", all, err)
	}
	if _, err := c.IsValid(t.Context(), vPath); err == nil {
		t.Error("the connection goes on")
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestClientGivesUp when its context ends, though the daemon does not answer.
func TestClientGivesUp(t *testing.T) {
	wo := newWorld(t)
	wo.block = make(chan struct{})
	c, err := dial(t, &Server{Dir: wo.dir, Open: wo.open}, ClientConfig{Dir: wo.dir})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		// It waits in the daemon by now or not: both must end.
		cancel()
	}()
	if err := c.Ensure(ctx, vPath); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}
