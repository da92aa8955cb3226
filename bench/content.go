package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/content"
	"github.com/floxctl/flox/content/pack"
	"github.com/floxctl/flox/integration/world"
	"github.com/floxctl/flox/nix"
	"github.com/floxctl/flox/storehouse"
)

// rounds is how often each comparison is made; medians are published.
const rounds = 5

// contentBench measures taking content in, giving it out, and how much room it needs.
func contentBench(ctx context.Context) ([]Row, error) {
	w, err := world.Ensure(ctx)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "flox-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	ingest, err := ingestBench(ctx, w, dir)
	if err != nil {
		return nil, err
	}
	nar, err := narBench(ctx, w, dir)
	if err != nil {
		return nil, err
	}
	size, err := sizeBench(ctx, w, dir)
	if err != nil {
		return nil, err
	}
	return append(append(ingest, nar...), size...), nil
}

// physical is where a path of the world lies on this machine.
func physical(w *world.World, p flox.StorePath) string {
	return filepath.Join(w.Dir, "nix", "store", string(p))
}

// ingestBench: the demo world through nix-store --dump into us, against the same
// dump through zstd -T1 and sha256sum. Ours hashes twice, chunks, compresses and
// is durable at the end of each path.
func ingestBench(ctx context.Context, w *world.World, dir string) ([]Row, error) {
	var total uint64
	for _, p := range w.Paths {
		total += p.NarSize
	}
	var ours, peer []float64
	for round := range rounds {
		store, err := pack.Open(pack.Config{Dir: filepath.Join(dir, fmt.Sprintf("ingest%d", round))})
		if err != nil {
			return nil, err
		}
		mine, theirs := time.Duration(0), time.Duration(0)
		for _, p := range w.Paths {
			took, err := timeIngest(ctx, store, physical(w, p.Path), p.NarSize)
			if err != nil {
				return nil, errors.Join(fmt.Errorf("ingest %s: %w", p.Path, err), store.Close())
			}
			mine += took
			if took, err = timeShell(ctx, "nix-store --dump "+physical(w, p.Path)+" | zstd -q -T1 -c | sha256sum"); err != nil {
				return nil, errors.Join(err, store.Close())
			}
			theirs += took
		}
		if err := errors.Join(store.Close(), os.RemoveAll(filepath.Join(dir, fmt.Sprintf("ingest%d", round)))); err != nil {
			return nil, err
		}
		ours = append(ours, mibPerSecond(total, mine))
		peer = append(peer, mibPerSecond(total, theirs))
	}
	return []Row{compare("ingest of the demo world", "MiB/s", ours, peer, "nix-store --dump | zstd -T1 | sha256sum", 0.5)}, nil
}

func timeIngest(ctx context.Context, store *pack.Store, path string, size uint64) (time.Duration, error) {
	began := time.Now()
	dump := exec.CommandContext(ctx, "nix-store", "--dump", path)
	out, err := dump.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := dump.Start(); err != nil {
		return 0, err
	}
	got, err := content.Ingest(ctx, out, store, content.IngestOptions{})
	if err = errors.Join(err, dump.Wait()); err != nil {
		return 0, err
	}
	if got.NarSize != size {
		return 0, fmt.Errorf("NAR of %d bytes, want %d", got.NarSize, size)
	}
	return time.Since(began), nil
}

func timeShell(ctx context.Context, line string) (time.Duration, error) {
	began := time.Now()
	if out, err := exec.CommandContext(ctx, "bash", "-o", "pipefail", "-c", line).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%s: %w: %s", line, err, out)
	}
	return time.Since(began), nil
}

// narBench: the largest NAR over HTTP, uncompressed, one connection, against a
// static file server (sendfile) with the same bytes in the same run.
func narBench(ctx context.Context, w *world.World, dir string) ([]Row, error) {
	largest := slices.MaxFunc(w.Paths, func(a, b world.Path) int { return int(int64(a.NarSize) - int64(b.NarSize)) }) //nolint:gosec // sizes fit
	server, stop, err := startStorehouse(ctx, filepath.Join(dir, "house"))
	if err != nil {
		return nil, err
	}
	defer stop()
	info := &flox.PathInfo{Path: largest.Path, NarSize: largest.NarSize}
	file := filepath.Join(dir, "static.nar")
	if _, err := timeShell(ctx, "nix-store --dump "+physical(w, largest.Path)+" > "+file); err != nil {
		return nil, err
	}
	if info.NarHash, err = hashFile(file); err != nil {
		return nil, err
	}
	if err := publish(ctx, server, info, file); err != nil {
		return nil, err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	static := &http.Server{Handler: http.FileServer(http.Dir(dir)), ReadHeaderTimeout: time.Second}
	go func() { _ = static.Serve(listener) }()
	defer func() { _ = static.Close() }()
	mine := server.Invite().HTTPURL + "/nar/" + info.Path.HashPart() + "-" + nix.EncodeBase32(info.NarHash[:]) + ".nar"
	theirs := "http://" + listener.Addr().String() + "/static.nar"
	var ours, peer []float64
	for range rounds * 2 {
		for url, into := range map[string]*[]float64{mine: &ours, theirs: &peer} {
			took, err := timeGet(ctx, url, info)
			if err != nil {
				return nil, err
			}
			*into = append(*into, mibPerSecond(info.NarSize, took))
		}
	}
	row := compare("NAR rebuilt from chunks over HTTP, one connection", "MiB/s", ours, peer, "static file server (sendfile)", 0.5)
	row.Target = ">= 600 MiB/s or >= 0.5x"
	row.Met = row.Ours >= 600 || row.Ratio >= 0.5
	return []Row{row}, nil
}

// timeGet reads a URL whole; what arrives must hash to the path's NAR hash. The
// hashing is done after the clock stopped.
func timeGet(ctx context.Context, url string, info *flox.PathInfo) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	body := make([]byte, info.NarSize)
	began := time.Now()
	response, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer func() { _ = response.Body.Close() }()
	if _, err := io.ReadFull(response.Body, body); err != nil {
		return 0, fmt.Errorf("%s: %s: %w", url, response.Status, err)
	}
	took := time.Since(began)
	if sha256.Sum256(body) != info.NarHash {
		return 0, fmt.Errorf("%s: bytes are not the NAR", url)
	}
	return took, nil
}

// startStorehouse runs a real one in this process, on loopback.
func startStorehouse(ctx context.Context, dir string) (*storehouse.Server, func(), error) {
	server, err := storehouse.New(storehouse.Config{StateDir: dir, Name: "bench", HTTPListen: "127.0.0.1:0", Listen: []string{"127.0.0.1:0"}, NoMDNS: true, OpenMembership: true})
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	stop := func() {
		cancel()
		if err := <-done; err != nil {
			fmt.Fprintln(os.Stderr, "bench: storehouse:", err)
		}
	}
	if err := server.Ready(ctx); err != nil {
		stop()
		return nil, nil, err
	}
	return server, stop, nil
}

func publish(ctx context.Context, server *storehouse.Server, info *flox.PathInfo, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	_, _, err = server.Publish(ctx, info, f, "bench")
	return err
}

func hashFile(file string) (sum [32]byte, err error) {
	f, err := os.Open(file)
	if err != nil {
		return sum, err
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	return [32]byte(h.Sum(nil)), nil
}

// sizeBench: what the world takes on our disk against the sum of its xz NARs,
// and how much of a second version is new.
func sizeBench(ctx context.Context, w *world.World, dir string) ([]Row, error) {
	store, err := pack.Open(pack.Config{Dir: filepath.Join(dir, "size")})
	if err != nil {
		return nil, err
	}
	defer func() { _ = store.Close() }()
	var xz, plain uint64
	for _, p := range w.Paths {
		if slices.ContainsFunc(w.Versions, func(v world.Version) bool { return v.New == p.Path }) {
			continue
		}
		if _, err := content.IngestPath(ctx, physical(w, p.Path), store, content.IngestOptions{}); err != nil {
			return nil, err
		}
		plain += p.NarSize
		out, err := exec.CommandContext(ctx, "bash", "-o", "pipefail", "-c", "nix-store --dump "+physical(w, p.Path)+" | xz -T2 -c | wc -c").Output()
		if err != nil {
			return nil, err
		}
		var n uint64
		if _, err := fmt.Sscan(strings.TrimSpace(string(out)), &n); err != nil {
			return nil, err
		}
		xz += n
	}
	disk := store.Stat().DiskBytes
	rows := []Row{{
		Name: "size on disk, against the sum of xz NARs", Unit: "MiB", Ours: mib(disk), Peer: mib(xz), PeerName: "sum of xz NARs",
		Ratio: float64(disk) / float64(xz), Target: "publish", Met: true,
	}, {
		Name: "size on disk, against the sum of plain NARs", Unit: "MiB", Ours: mib(disk), Peer: mib(plain), PeerName: "sum of NARs",
		Ratio: float64(disk) / float64(plain), Target: "publish", Met: true,
	}}
	for _, v := range w.Versions {
		before := store.Stat()
		got, err := content.IngestPath(ctx, physical(w, v.New), store, content.IngestOptions{})
		if err != nil {
			return nil, err
		}
		fresh := store.Stat().PlainBytes - before.PlainBytes
		rows = append(rows, Row{
			Name: "new bytes of a second version of " + v.Name + " (" + v.Kind + ")", Unit: "MiB", Ours: mib(fresh), Peer: mib(got.NarSize),
			PeerName: "its NAR", Ratio: float64(fresh) / float64(got.NarSize), Target: "publish", Met: true,
		})
	}
	return rows, nil
}

func mib(n uint64) float64 { return float64(n) / (1 << 20) }

func mibPerSecond(n uint64, took time.Duration) float64 { return mib(n) / took.Seconds() }

// compare makes a row of medians; the ratio is the median of the pairs' ratios.
func compare(name, unit string, ours, peer []float64, peerName string, target float64) Row {
	ratios := make([]float64, len(ours))
	for i := range ours {
		ratios[i] = ours[i] / peer[i]
	}
	r := Row{Name: name, Unit: unit, Ours: median(ours), Peer: median(peer), PeerName: peerName, Ratio: median(ratios)}
	r.Target, r.Met = fmt.Sprintf(">= %.2fx", target), r.Ratio >= target
	return r
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
