package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/cockroachdb/pebble/v2"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/fuse"
)

// ListPaths implements floxv1connect.StorehouseHandler.
func (h *house) ListPaths(ctx context.Context, req *connect.Request[floxv1.ListValidRequest]) (*connect.Response[floxv1.ListValidResponse], error) {
	h.mu.Lock()
	h.asks++
	answers := h.list
	h.mu.Unlock()
	if answers != nil {
		return answers(ctx, req.Msg)
	}
	return connect.NewResponse(h.listed(req.Msg.GetAfter(), int(req.Msg.GetLimit()))), nil
}

// listed is one page of what is valid, at most 3 names of it.
func (h *house) listed(after string, limit int) *floxv1.ListValidResponse {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := &floxv1.ListValidResponse{Index: h.index}
	for _, m := range h.infos {
		if m.GetPath() > after {
			out.Paths = append(out.Paths, m.GetPath())
		}
	}
	slices.Sort(out.Paths)
	n := min(len(out.Paths), limit, 3)
	out.Paths, out.More = out.Paths[:n], n < len(out.Paths)
	return out
}

// namesOf lists the store directory in pages of a size.
func namesOf(t *testing.T, a *Agent, size int) (all []string) {
	t.Helper()
	for after := ""; ; {
		page, err := a.store.Names(within(t, time.Minute), after, size)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range page {
			all = append(all, n.Name)
		}
		if len(page) < size {
			return all
		}
		after = page[size-1].Name
	}
}

// pathNames sorts the names of paths.
func pathNames(infos ...*flox.PathInfo) (names []string) {
	for _, info := range infos {
		names = append(names, string(info.Path))
	}
	slices.Sort(names)
	return names
}

func TestTheStoreDirectoryListsWhatIsValidOnRequest(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var infos []*flox.PathInfo
	for i := range 11 {
		infos = append(infos, h.make(t, fmt.Sprintf("p%d", i), nil, testFile{name: "f", data: []byte{byte(i)}}))
	}
	h.publish(infos[:10]...)
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.ListValid = true }, nil)
	if got := namesOf(t, a, 4); len(got) != 0 && len(got) != 10 {
		t.Errorf("before the storehouse is there: %v", got)
	}
	following(t, a)
	treeOf(within(t, time.Minute), t, a, infos[3].Path)
	here := h.make(t, "here", nil, testFile{name: "f", data: []byte("only here")})
	if err := a.facts.put(here); err != nil {
		t.Fatal(err)
	}
	want := pathNames(append(slices.Clone(infos[:10]), here)...)
	for _, size := range []int{1, 2, 3, 4, 7, 11, 12, 100} {
		if diff := cmp.Diff(want, namesOf(t, a, size)); diff != "" {
			t.Errorf("in pages of %d (-want +got):\n%s", size, diff)
		}
	}
	// What is known here keeps its inode, so its manifest; of the others there is none.
	page, err := a.store.Names(within(t, time.Minute), "", 100)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range page {
		opened := n.Name == string(infos[3].Path)
		if opened != (n.Kind != 0) || (opened || n.Name == string(here.Path)) == n.Manifest.IsZero() {
			t.Errorf("%+v", n)
		}
	}
	// What becomes valid is in the next listing, soon.
	h.publish(infos[10])
	until(t, "the new path is listed", func() bool { return slices.Contains(namesOf(t, a, 5), string(infos[10].Path)) })
	// A reader takes few names at a time: not each time is the storehouse asked.
	h.set(func() { h.asks = 0 })
	namesOf(t, a, 1)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.asks > 8 {
		t.Errorf("asked %d times for 11 names in pages of 3", h.asks)
	}
}

// A storehouse that does not answer costs a listing a moment, once, and what is
// known here is shown; one that answers nonsense is not believed.
func TestAListingNeverWaitsForTheStorehouse(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var infos []*flox.PathInfo
	for i := range 6 {
		infos = append(infos, h.make(t, fmt.Sprintf("p%d", i), nil, testFile{name: "f", data: []byte{byte(i)}}))
	}
	h.publish(infos...)
	known := pathNames(infos[0], infos[1])
	for what, answers := range map[string]func(context.Context, *floxv1.ListValidRequest) (*connect.Response[floxv1.ListValidResponse], error){
		"never answers": func(ctx context.Context, _ *floxv1.ListValidRequest) (*connect.Response[floxv1.ListValidResponse], error) {
			<-ctx.Done()
			return nil, ctx.Err()
		},
		"fails": func(context.Context, *floxv1.ListValidRequest) (*connect.Response[floxv1.ListValidResponse], error) {
			return nil, connect.NewError(connect.CodeInternal, errors.New("out of order"))
		},
		"lists no store paths": func(context.Context, *floxv1.ListValidRequest) (*connect.Response[floxv1.ListValidResponse], error) {
			return connect.NewResponse(&floxv1.ListValidResponse{Paths: []string{"../../etc"}}), nil
		},
		"goes in circles": func(context.Context, *floxv1.ListValidRequest) (*connect.Response[floxv1.ListValidResponse], error) {
			return connect.NewResponse(&floxv1.ListValidResponse{More: true}), nil
		},
	} {
		t.Run(what, func(t *testing.T) {
			const lookup = 3 * time.Second
			a, _ := runAgent(t, h, func(cfg *Config) { cfg.ListValid, cfg.LookupTimeout = true, lookup }, nil)
			following(t, a)
			if err := a.facts.put(infos[0], infos[1]); err != nil {
				t.Fatal(err)
			}
			h.set(func() { h.list = answers })
			defer h.set(func() { h.list = nil })
			began := time.Now()
			if diff := cmp.Diff(known, namesOf(t, a, 1)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if took := time.Since(began); took > lookup {
				t.Errorf("the listing took %s, a look-up may take %s", took, lookup)
			}
		})
	}
}

// listed asks the control socket.
func listedBy(t *testing.T, a *Agent, valid bool) (paths []string, known int, err error) {
	t.Helper()
	stream, err := client(t, a).Paths(within(t, time.Minute), connect.NewRequest(&floxv1.ListPathsRequest{Valid: valid}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for stream.Receive() {
		for _, p := range stream.Msg().GetPaths() {
			paths = append(paths, p.GetPath())
			if p.GetKnown() {
				known++
			}
		}
	}
	return paths, known, api.FromConnect(stream.Err())
}

func TestPathsAreListedAtTheControlSocket(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	var infos []*flox.PathInfo
	for i := range 8 {
		infos = append(infos, h.make(t, fmt.Sprintf("p%d", i), nil, testFile{name: "f", data: []byte{byte(i)}}))
	}
	h.publish(infos...)
	a, _ := runAgent(t, h, nil, nil)
	following(t, a)
	if err := a.facts.put(infos[2], infos[5]); err != nil {
		t.Fatal(err)
	}
	if paths, known, err := listedBy(t, a, false); err != nil || known != 2 || !slices.Equal(paths, pathNames(infos[2], infos[5])) {
		t.Errorf("known: %v, %d known, %v", paths, known, err)
	}
	if paths, known, err := listedBy(t, a, true); err != nil || known != 2 || !slices.Equal(paths, pathNames(infos...)) {
		t.Errorf("valid: %v, %d known, %v", paths, known, err)
	}
	h.set(func() {
		h.list = func(_ context.Context, r *floxv1.ListValidRequest) (*connect.Response[floxv1.ListValidResponse], error) {
			if r.GetAfter() == "" {
				return connect.NewResponse(h.listed("", 3)), nil
			}
			return nil, connect.NewError(connect.CodeUnavailable, errors.New("gone"))
		}
	})
	paths, _, err := listedBy(t, a, true)
	if !errors.Is(err, flox.ErrUnreachable) || len(paths) != 3 || !strings.Contains(err.Error(), "without --valid") {
		t.Errorf("a list that breaks off: %v, %v", paths, err)
	}
	lone, _ := runAgent(t, h, func(cfg *Config) { cfg.Invite = deadInvite(h) }, nil)
	if _, _, err := listedBy(t, lone, true); !errors.Is(err, flox.ErrUnreachable) || !strings.Contains(err.Error(), "not connected") {
		t.Errorf("without a storehouse: %v", err)
	}
	if _, _, err := listedBy(t, lone, false); err != nil {
		t.Errorf("what is known, without a storehouse: %v", err)
	}
}

// deadInvite is the invite of a storehouse that is not there.
func deadInvite(h *house) *api.Invite {
	invite := *h.invite
	invite.Storehouse = []api.InvitePeer{{ID: invite.Storehouse[0].ID, Addrs: []string{"/ip4/127.0.0.1/tcp/1"}}}
	return &invite
}

// Very many known paths are listed, by a reader of the mounted directory too, in
// time and memory that do not grow with the square of them: each page costs what
// is in it.
func TestVeryManyKnownPathsAreListed(t *testing.T) {
	n := 200_000
	switch {
	case testing.Short():
		n = 20_000
	case os.Getenv("FLOX_SOAK") != "":
		n = 1_000_000
	}
	h := newHouse(t)
	info := h.make(t, "one", nil, testFile{name: "f", data: []byte("x")})
	a, _ := runAgent(t, h, nil, nil)
	began := time.Now()
	putMany(t, a.facts, info, n)
	t.Logf("%d paths made known in %s", n, time.Since(began))
	for _, size := range []int{65, 513} { // a READDIR of 4 KiB, of 32 KiB
		before, began, count, most, last := heapNow(), time.Now(), 0, int64(0), ""
		for {
			page, err := a.store.Names(t.Context(), last, size)
			if err != nil {
				t.Fatal(err)
			}
			for _, one := range page {
				if one.Name <= last {
					t.Fatalf("%s behind %s", one.Name, last)
				}
				last = one.Name
			}
			if count += len(page); len(page) < size {
				break
			}
			if count%(size*500) == 0 {
				most = max(most, heapNow())
			}
		}
		checkListed(t, fmt.Sprintf("in pages of %d", size), count, n, time.Since(began), max(most, heapNow())-before)
	}
	t.Run("through a mount", func(t *testing.T) { listMounted(t, a, n) })
}

// Everything valid is listed through a mount, also what nobody knows here: in time
// and memory that do not grow with it, and with a question for each page of names.
func TestVeryManyValidPathsAreListed(t *testing.T) {
	n := 100_000
	switch {
	case testing.Short():
		n = 20_000
	case os.Getenv("FLOX_SOAK") != "":
		n = 1_000_000
	}
	h := newHouse(t)
	name := func(i int) string { return fmt.Sprintf("%08d%024d-package-%d", i, 0, i) } // differ early, as hashes do
	h.set(func() {
		h.list = func(_ context.Context, req *floxv1.ListValidRequest) (*connect.Response[floxv1.ListValidResponse], error) {
			first := 0
			if after := req.GetAfter(); after != "" {
				at, err := strconv.Atoi(after[:8])
				if err != nil {
					return nil, err
				}
				first = at + 1
			}
			out := &floxv1.ListValidResponse{Index: h.index}
			for i := first; i < n && len(out.Paths) < int(req.GetLimit()); i++ {
				out.Paths = append(out.Paths, name(i))
			}
			out.More = first+len(out.Paths) < n
			return connect.NewResponse(out), nil
		}
	})
	a, _ := runAgent(t, h, func(cfg *Config) { cfg.ListValid = true }, nil)
	following(t, a)
	listMounted(t, a, n)
	h.set(func() {
		if most := 2 * (n/validPage + 1); h.asks > most {
			t.Errorf("the storehouse was asked %d times for %d names, want at most %d", h.asks, n, most)
		}
	})
}

func checkListed(t *testing.T, how string, count, n int, took time.Duration, grew int64) {
	t.Helper()
	t.Logf("%d names %s: %s, heap grew by %d KiB", count, how, took.Round(time.Millisecond), grew>>10)
	if count != n {
		t.Errorf("%d names, want %d", count, n)
	}
	if grew > 32<<20 {
		t.Errorf("the heap grew by %d KiB", grew>>10)
	}
}

// listMounted mounts what the agent knows and lets ls read all of it.
func listMounted(t *testing.T, a *Agent, n int) {
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root and /dev/fuse")
		}
		t.Skip("needs root and /dev/fuse")
	}
	top := t.TempDir()
	dir := filepath.Join(top, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	dev, err := fuse.Mount(fuse.MountConfig{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.File.Close()
	s, err := fuse.NewServer(fuse.ServerConfig{Device: dev.File, Init: dev.Init, Store: a.store, NodeTable: filepath.Join(top, "nodes")})
	if err != nil {
		t.Fatal(errors.Join(err, fuse.Unmount(dir)))
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Run(context.Background()) }()
	defer func() {
		if err := errors.Join(fuse.Unmount(dir), <-ended); err != nil {
			t.Error(err)
		}
	}()
	before, began, most := heapNow(), time.Now(), int64(0)
	// Another process reads: this one serves.
	cmd := exec.CommandContext(within(t, 10*time.Minute), "sh", "-c", `ls -U "$1" | sort -u | wc -l`, "ls", dir)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	printed := make(chan []byte, 1)
	go func() { b, _ := io.ReadAll(out); printed <- b }()
	for {
		select {
		case b := <-printed:
			count, _ := strconv.Atoi(strings.TrimSpace(string(b)))
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			checkListed(t, "by ls", count, n, time.Since(began), max(most, heapNow())-before)
			requests := s.Stats().Requests
			t.Logf("%d READDIRs and %d READDIRPLUSes", requests["READDIR"], requests["READDIRPLUS"])
			return
		case <-time.After(100 * time.Millisecond):
			most = max(most, heapNow())
		}
	}
}

// putMany makes n paths known, past all checks and without waiting for the disk.
func putMany(t *testing.T, f *facts, like *flox.PathInfo, n int) {
	t.Helper()
	const letters = "0123456789abcdfghijklmnpqrsvwxyz"
	batch := new(pebble.Batch)
	for i := range n {
		one, hash := api.FromPathInfo(like), content.Hash(fmt.Appendf(nil, "path %d", i))
		text := make([]byte, flox.HashPartLen)
		for k := range text {
			text[k] = letters[hash[k]&31]
		}
		one.Path, one.Manifest = fmt.Sprintf("%s-package-%d", text, i), hash[:]
		b, err := proto.Marshal(one)
		if err == nil {
			err = batch.Set(append([]byte{prefixInfo}, text...), b, nil)
		}
		if err == nil && (batch.Len() > 4<<20 || i == n-1) {
			err = f.db.Apply(batch, false)
			batch = new(pebble.Batch)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
