package world

import (
	"context"
	"encoding/json"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// build makes the world of a set in dir. Packages are kept in base for the next one.
// Every command inherits held, the lock: should this process be killed, the
// next builder still waits for the commands it left behind.
func (s *set) build(ctx context.Context, base, dir string, held *os.File) error {
	start := time.Now()
	// What an interrupted build left. Nothing is mounted there: the mounts of a
	// build end with its processes.
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	debs := filepath.Join(base, "debs")
	packages, err := s.debian(ctx, debs)
	if err != nil {
		return err
	}
	w := &World{Dir: dir, held: held}
	expression := filepath.Join(w.Nix().Dir, "build")
	if err := s.lay(expression, debs, packages); err != nil {
		return err
	}
	built, err := w.realise(ctx, s.expression)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(expression); err != nil {
		return err
	}
	if err := w.describe(ctx); err != nil {
		return err
	}
	if err := s.finish(ctx, w, built); err != nil {
		return err
	}
	w.BuildSeconds = time.Since(start).Round(time.Second / 10).Seconds()
	return w.save()
}

// lay puts the expressions, their builders, packages.json, tops.json and the
// packages where the build sees them, at /nix/build.
func (s *set) lay(dir, debs string, packages map[string]*pkg) error {
	nix, err := iofs.Sub(sources, "nix")
	if err != nil {
		return err
	}
	if err := os.CopyFS(dir, nix); err != nil {
		return err
	}
	for name, content := range map[string]any{"packages.json": packages, "tops.json": s.tops} {
		list, err := json.MarshalIndent(content, "", "  ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), list, 0o644); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "debs"), 0o755); err != nil {
		return err
	}
	for _, p := range packages {
		if err := os.Link(filepath.Join(debs, p.Deb), filepath.Join(dir, "debs", p.Deb)); err != nil {
			return err
		}
	}
	return nil
}

// realise builds every attribute of an expression and then drops what only
// the build needed. It gives each attribute's store path.
func (w *World) realise(ctx context.Context, expression string) (map[string]flox.StorePath, error) {
	const roots = "/nix/var/nix/gcroots/world"
	if err := os.MkdirAll(filepath.Join(w.Dir, roots), 0o755); err != nil {
		return nil, err
	}
	instantiated, err := w.query(ctx, "nix-instantiate", "--eval", "--strict", "--json", "-E",
		"builtins.mapAttrs (n: d: d.outPath) (import /nix/build/"+expression+")")
	if err != nil {
		return nil, err
	}
	var outputs map[string]string
	if err := json.Unmarshal(instantiated, &outputs); err != nil {
		return nil, fmt.Errorf("nix-instantiate printed %.200q: %w", instantiated, err)
	}
	if _, err := w.query(ctx, "nix-build", "/nix/build/"+expression, "-o", roots+"/result"); err != nil {
		return nil, err
	}
	built := map[string]flox.StorePath{}
	for name, out := range outputs {
		if built[name], err = flox.DefaultStoreDir.Parse(out); err != nil {
			return nil, err
		}
	}
	_, err = w.query(ctx, "nix-store", "--gc", "--quiet")
	return built, err
}

// query gives the standard output of a stock command that sees the world.
func (w *World) query(ctx context.Context, args ...string) ([]byte, error) {
	cmd := w.Command(ctx, args...)
	if w.held != nil {
		cmd.ExtraFiles = []*os.File{w.held}
	}
	return output(cmd)
}

// pathInfo is what `nix path-info --json` prints of a path.
type pathInfo struct {
	Path       string   `json:"path"`
	NarSize    uint64   `json:"narSize"`
	References []string `json:"references"`
}

// describe fills in w from the store.
func (w *World) describe(ctx context.Context) error {
	w.StoreDir = flox.DefaultStoreDir
	system, err := w.query(ctx, "nix-instantiate", "--eval", "-E", "builtins.currentSystem")
	if err != nil {
		return err
	}
	w.System = strings.Trim(string(system), "\"\n")
	out, err := w.query(ctx, "nix", "path-info", "--all", "--json")
	if err != nil {
		return err
	}
	var infos []pathInfo
	if err := json.Unmarshal(out, &infos); err != nil {
		return fmt.Errorf("nix path-info printed %.200q: %w", out, err)
	}
	for _, info := range infos {
		p := Path{NarSize: info.NarSize}
		if p.Path, err = w.StoreDir.Parse(info.Path); err != nil {
			return err
		}
		for _, ref := range info.References {
			parsed, err := w.StoreDir.Parse(ref)
			if err != nil {
				return err
			}
			p.References = append(p.References, parsed)
		}
		w.Paths = append(w.Paths, p)
	}
	slices.SortFunc(w.Paths, func(a, b Path) int { return strings.Compare(string(a.Path), string(b.Path)) })
	return nil
}

func (w *World) program(p flox.StorePath, name string) Program {
	program := Program{Path: p, Exe: w.StoreDir.Join(p) + "/bin/" + name}
	for _, c := range w.Closure(p) {
		program.ClosurePaths++
		program.ClosureBytes += c.NarSize
	}
	return program
}

// lock takes an exclusive lock on file, waiting for it. Closing the result
// gives it back, as does the end of the last process that has it open.
func lock(ctx context.Context, file string) (*os.File, error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		wait := time.NewTimer(200 * time.Millisecond)
		select {
		case <-ctx.Done():
			wait.Stop()
			_ = f.Close()
			return nil, ctx.Err()
		case <-wait.C:
		}
	}
}
