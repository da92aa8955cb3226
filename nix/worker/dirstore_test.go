package worker

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// dirStore is a store on disk: the files where a client opens them, a narinfo
// beside for each valid path. It fetches from another one, and builds nothing.
type dirStore struct {
	t        *testing.T
	dir      flox.StoreDir // the store directory, where the files are
	facts    string        // directory of narinfos
	upstream *dirStore     // nil = none
	session  *Session      // of the last connection

	mu    sync.Mutex
	temp  []flox.StorePath
	links []string
	block chan struct{} // Ensure waits for it, if not nil
	waits chan struct{} // closed when it does, if not nil
	ended chan error    // why Ensure stopped waiting
}

func newDirStore(t *testing.T, dir flox.StoreDir, real string) *dirStore {
	t.Helper()
	s := &dirStore{t: t, dir: dir, facts: filepath.Join(real, "facts"), ended: make(chan error, 1)}
	for _, d := range []string{string(dir), s.facts} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { unseal(t, string(dir)) })
	return s
}

// unseal makes directories removable for those who are not root.
func unseal(t *testing.T, root string) {
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			err = os.Chmod(p, 0o755)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func (s *dirStore) open(_ context.Context, session *Session) (*Store, error) {
	s.mu.Lock()
	s.session = session
	s.mu.Unlock()
	return &Store{
		Paths: s, Files: s, Substitutes: s, Derivations: s, Realisations: s, Adder: s, Builder: s, Roots: s, Collector: s,
		Release: func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.temp = nil
		},
	}, nil
}

func (s *dirStore) fact(hash string) string { return filepath.Join(s.facts, hash+".narinfo") }

func (s *dirStore) Valid(ctx context.Context, paths []flox.StorePath, substitute bool) ([]flox.StorePath, error) {
	var valid []flox.StorePath
	for _, p := range paths {
		if substitute {
			if err := s.Ensure(ctx, p); err != nil && !errors.Is(err, flox.ErrNotFound) {
				return nil, err
			}
		}
		if _, err := s.Info(ctx, p); err == nil {
			valid = append(valid, p)
		}
	}
	return valid, nil
}

func (s *dirStore) Info(_ context.Context, p flox.StorePath) (*Info, error) {
	text, err := os.ReadFile(s.fact(p.HashPart()))
	if err != nil {
		return nil, NotValid(s.dir, p)
	}
	n, err := nix.ParseNarInfo(s.dir, text)
	if err != nil {
		return nil, err
	}
	if n.Info.Path != p {
		return nil, NotValid(s.dir, p)
	}
	n.Info.Registered = time.Unix(1_700_000_000, 0)
	return &Info{PathInfo: n.Info}, nil
}

func (s *dirStore) All(context.Context) ([]flox.StorePath, error) {
	names, err := filepath.Glob(s.facts + "/*.narinfo")
	if err != nil {
		return nil, err
	}
	var all []flox.StorePath
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		n, err := nix.ParseNarInfo(s.dir, text)
		if err != nil {
			return nil, err
		}
		all = append(all, n.Info.Path)
	}
	return all, nil
}

func (s *dirStore) ByHashPart(_ context.Context, hash string) (flox.StorePath, error) {
	text, err := os.ReadFile(s.fact(hash))
	if err != nil {
		return "", nil
	}
	n, err := nix.ParseNarInfo(s.dir, text)
	return n.Info.Path, err
}

func (s *dirStore) Referrers(ctx context.Context, p flox.StorePath) ([]flox.StorePath, error) {
	all, err := s.All(ctx)
	var referrers []flox.StorePath
	for _, q := range all {
		if info, err := s.Info(ctx, q); err == nil && slices.Contains(info.References, p) {
			referrers = append(referrers, q)
		}
	}
	return referrers, err
}

func (s *dirStore) Nar(ctx context.Context, p flox.StorePath, w io.Writer) error {
	if _, err := s.Info(ctx, p); err != nil {
		return err
	}
	return nix.DumpPath(ctx, w, s.dir.Join(p))
}

func (s *dirStore) AddLog(_ context.Context, drv flox.StorePath, log io.Reader) error {
	b, err := io.ReadAll(log)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.facts, string(drv)+".log"), b, 0o644)
}

func (s *dirStore) Substitutable(ctx context.Context, paths map[flox.StorePath]string) ([]Substitutable, error) {
	var found []Substitutable
	for p := range paths {
		if s.upstream == nil {
			break
		}
		if info, err := s.upstream.Info(ctx, p); err == nil {
			found = append(found, Substitutable{Path: p, Deriver: info.Deriver, References: info.References, DownloadSize: 7, NarSize: info.NarSize})
		}
	}
	return found, nil
}

// Ensure copies from the upstream, references first.
func (s *dirStore) Ensure(ctx context.Context, p flox.StorePath) error {
	s.mu.Lock()
	block := s.block
	s.mu.Unlock()
	if block != nil {
		if s.waits != nil {
			close(s.waits)
		}
		select {
		case <-block:
		case <-ctx.Done():
			s.ended <- context.Cause(ctx)
			return ctx.Err()
		}
	}
	if _, err := s.Info(ctx, p); err == nil {
		return nil
	}
	if s.upstream == nil {
		return CannotMake(s.dir, p)
	}
	info, err := s.upstream.Info(ctx, p)
	if err != nil {
		return CannotMake(s.dir, p)
	}
	for _, ref := range info.References {
		if ref != p {
			if err := s.Ensure(ctx, ref); err != nil {
				return err
			}
		}
	}
	act := s.session.Log().Start(LevelInfo, ActCopyPath, fmt.Sprintf("copying path '%s' from '%s'", s.dir.Join(p), "test"), nil, Text(s.dir.Join(p)), Text("test"), Text("daemon"))
	defer act.Stop()
	var nar bytes.Buffer
	if err := s.upstream.Nar(ctx, p, &nar); err != nil {
		return err
	}
	act.Result(ResProgress, Number(info.NarSize), Number(info.NarSize), Number(0), Number(0))
	return s.add(ctx, info, &nar)
}

func (s *dirStore) Outputs(ctx context.Context, drv flox.StorePath) (map[string]flox.StorePath, error) {
	if _, err := s.Info(ctx, drv); err != nil {
		return nil, err
	}
	return map[string]flox.StorePath{"out": drv, "later": ""}, nil
}

func (s *dirStore) Derivers(ctx context.Context, p flox.StorePath) ([]flox.StorePath, error) {
	info, err := s.Info(ctx, p)
	if err != nil || info.Deriver == "" {
		return nil, err
	}
	return []flox.StorePath{info.Deriver}, nil
}

func (s *dirStore) Realisation(_ context.Context, id nix.RealisationID) (*nix.Realisation, error) {
	b, err := os.ReadFile(s.realisation(id))
	if err != nil {
		return nil, errorf(flox.ErrNotFound, "no realisation of %s", id)
	}
	return nix.ParseRealisation(b)
}

func (s *dirStore) AddRealisation(_ context.Context, r nix.Realisation) error {
	return os.WriteFile(s.realisation(r.ID), r.Marshal(), 0o644)
}

func (s *dirStore) realisation(id nix.RealisationID) string {
	sum := sha256.Sum256([]byte(id.String()))
	return filepath.Join(s.facts, hex.EncodeToString(sum[:]))
}

func (s *dirStore) AddPaths(ctx context.Context, paths Incoming, o AddOptions) error {
	for {
		info, nar, err := paths.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !o.NoCheckSigs && len(info.Signatures) == 0 && info.CA == "" {
			return errorf(flox.ErrUntrusted, "cannot add path '%s' because it lacks a valid signature", s.dir.Join(info.Path))
		}
		if err := s.add(ctx, info, nar); err != nil {
			return err
		}
	}
}

func (s *dirStore) add(ctx context.Context, info *Info, nar io.Reader) error {
	if _, err := s.Info(ctx, info.Path); err == nil {
		return nil
	}
	for _, ref := range info.References {
		if _, err := s.Info(ctx, ref); err != nil && ref != info.Path {
			return err
		}
	}
	sum, size := sha256.New(), &counter{}
	if err := nix.RestorePath(ctx, io.TeeReader(nar, io.MultiWriter(sum, size)), s.dir.Join(info.Path)); err != nil {
		return err
	}
	if [32]byte(sum.Sum(nil)) != info.NarHash || size.n != info.NarSize {
		return errors.Join(os.RemoveAll(s.dir.Join(info.Path)),
			errorf(flox.ErrCorrupt, "hash mismatch importing path '%s'", s.dir.Join(info.Path)))
	}
	n := nix.NarInfo{Info: info.PathInfo, URL: "nar/x.nar", Compression: "none"}
	return os.WriteFile(s.fact(info.Path.HashPart()), n.Marshal(s.dir), 0o644)
}

type counter struct{ n uint64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += uint64(len(p))
	return len(p), nil
}

func (s *dirStore) AddContent(ctx context.Context, c Content, data io.Reader) (*Info, error) {
	b, err := io.ReadAll(data)
	if err != nil {
		return nil, err
	}
	h := c.Algo.New()
	h.Write(b)
	nar := b
	if c.Method != nix.CANar {
		var buf bytes.Buffer
		w := nix.NewNarWriter(&buf)
		if err := w.Entry(nix.NarEntry{Kind: flox.Regular, Size: uint64(len(b))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(b); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		nar = buf.Bytes()
	}
	ca := nix.ContentAddress{Method: c.Method, Hash: nix.Hash{Algo: c.Algo, Sum: h.Sum(nil)}}
	path, err := ca.Path(s.dir, c.Name, c.References, false)
	if err != nil {
		return nil, err
	}
	info := &Info{PathInfo: flox.PathInfo{Path: path, NarHash: sha256.Sum256(nar), NarSize: uint64(len(nar)), References: c.References, CA: ca.String()}}
	if err := s.add(ctx, info, bytes.NewReader(nar)); err != nil {
		return nil, err
	}
	return s.Info(ctx, path)
}

func (s *dirStore) AddSignatures(ctx context.Context, p flox.StorePath, sigs []string) error {
	info, err := s.Info(ctx, p)
	if err != nil {
		return err
	}
	info.Signatures = append(info.Signatures, sigs...)
	n := nix.NarInfo{Info: info.PathInfo, URL: "nar/x.nar", Compression: "none"}
	return os.WriteFile(s.fact(p.HashPart()), n.Marshal(s.dir), 0o644)
}

// Build fetches paths; derivations fail.
func (s *dirStore) Build(ctx context.Context, targets []DerivedPath, _ BuildMode) ([]TargetResult, error) {
	var results []TargetResult
	for _, t := range targets {
		r := TargetResult{Target: t, BuildResult: BuildResult{Status: Substituted}}
		if err := s.Ensure(ctx, t.Path); err != nil {
			r.Status, r.Error = NoSubstituters, text(err)
		} else if !t.IsOpaque() {
			r.Status, r.Error = PermanentFailure, fmt.Sprintf("builder for '%s' failed with exit code 1", s.dir.Join(t.Path))
		}
		results = append(results, r)
	}
	return results, nil
}

func (s *dirStore) BuildDerivation(_ context.Context, p flox.StorePath, drv *nix.Derivation, _ BuildMode) (*BuildResult, error) {
	r := &BuildResult{Status: Built, TimesBuilt: 1, Start: time.Unix(5, 0), Stop: time.Unix(6, 0)}
	for name, o := range drv.Outputs {
		r.Outputs = append(r.Outputs, nix.Realisation{ID: nix.RealisationID{DrvHash: sha256.Sum256([]byte(p)), Output: name}, Path: o.Path})
	}
	return r, nil
}

func (s *dirStore) Missing(ctx context.Context, targets []DerivedPath) (*Missing, error) {
	m := &Missing{}
	for _, t := range targets {
		if _, err := s.Info(ctx, t.Path); err == nil {
			continue
		}
		found, err := s.Substitutable(ctx, map[flox.StorePath]string{t.Path: ""})
		if err != nil {
			return nil, err
		}
		switch {
		case len(found) > 0:
			m.Substitute = append(m.Substitute, t.Path)
			m.DownloadSize += found[0].DownloadSize
			m.NarSize += found[0].NarSize
		case t.IsOpaque():
			m.Unknown = append(m.Unknown, t.Path)
		default:
			m.Build = append(m.Build, t.Path)
		}
	}
	return m, nil
}

func (s *dirStore) AddTemp(_ context.Context, p flox.StorePath) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.temp = append(s.temp, p)
	return nil
}

func (s *dirStore) AddIndirect(_ context.Context, link string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.links = append(s.links, link)
	return nil
}

func (s *dirStore) AddPermanent(ctx context.Context, p flox.StorePath, link string) error {
	if err := os.Symlink(s.dir.Join(p), link); err != nil {
		return err
	}
	return s.AddIndirect(ctx, link)
}

func (s *dirStore) Find(_ context.Context, censored bool) ([]Root, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var roots []Root
	for _, link := range s.links {
		target, err := os.Readlink(link)
		if err != nil {
			continue
		}
		if p, err := s.dir.Parse(target); err == nil {
			roots = append(roots, Root{Link: link, Target: p})
		}
	}
	for _, p := range s.temp {
		link := "{temp:1}"
		if censored {
			link = "{censored}"
		}
		roots = append(roots, Root{Link: link, Target: p})
	}
	return roots, nil
}

func (s *dirStore) Collect(ctx context.Context, o GCOptions) (*GCResult, error) {
	roots, err := s.Find(ctx, false)
	if err != nil {
		return nil, err
	}
	live := make(map[flox.StorePath]bool)
	var keep func(p flox.StorePath)
	keep = func(p flox.StorePath) {
		info, err := s.Info(ctx, p)
		if err != nil || live[p] {
			return
		}
		live[p] = true
		for _, ref := range info.References {
			keep(ref)
		}
	}
	for _, r := range roots {
		keep(r.Target)
	}
	all, err := s.All(ctx)
	result := &GCResult{}
	for _, p := range all {
		if o.Action == GCDeleteSpecific && !slices.Contains(o.Paths, p) {
			continue
		}
		if live[p] != (o.Action == GCReturnLive) {
			if live[p] && o.Action == GCDeleteSpecific {
				return nil, errorf(flox.ErrDenied, "Cannot delete path '%s' since it is still alive. To find out why, use: nix-store --query --roots", s.dir.Join(p))
			}
			continue
		}
		result.Paths = append(result.Paths, s.dir.Join(p))
		if o.Action == GCDeleteDead || o.Action == GCDeleteSpecific {
			info, ierr := s.Info(ctx, p)
			if ierr != nil {
				return nil, ierr
			}
			s.session.Log().Message(LevelInfo, "deleting '"+s.dir.Join(p)+"'")
			result.Freed += info.NarSize
			unseal(s.t, s.dir.Join(p))
			err = errors.Join(err, os.RemoveAll(s.dir.Join(p)), os.Remove(s.fact(p.HashPart())))
		}
	}
	return result, err
}

// Verify compares every path with its hash.
func (s *dirStore) Verify(ctx context.Context, contents, _ bool) (wrong bool, err error) {
	all, err := s.All(ctx)
	for _, p := range all {
		info, ierr := s.Info(ctx, p)
		if ierr != nil {
			return true, ierr
		}
		sum := sha256.New()
		if contents && (s.Nar(ctx, p, sum) != nil || [32]byte(sum.Sum(nil)) != info.NarHash) {
			s.session.Log().Message(LevelError, "path '"+s.dir.Join(p)+"' was modified!")
			wrong = true
		}
	}
	return wrong, err
}

func (s *dirStore) Optimise(context.Context) error { return nil }

// tree writes files below a new directory and gives it.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "tree")
	for name, text := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// lines splits what a command prints.
func lines(s string) []string { return strings.Fields(s) }
