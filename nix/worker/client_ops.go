package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// SetOptions tells the daemon the client's settings. The stock client does so
// first of all.
func (c *Client) SetOptions(ctx context.Context, o Options) error {
	return c.do(ctx, OpSetOptions, func(e *encoder) {
		e.bool(o.KeepFailed)
		e.bool(o.KeepGoing)
		e.bool(o.TryFallback)
		e.u64(uint64(o.Level))
		e.u64(o.MaxBuildJobs)
		e.u64(uint64(o.MaxSilent / time.Second))
		e.u64(1) // use of the build hook
		if o.VerboseBuild {
			e.u64(uint64(LevelError))
		} else {
			e.u64(uint64(LevelVomit))
		}
		e.u64(0) // kind of log
		e.u64(0) // print a build trace
		e.u64(o.Cores)
		e.bool(o.UseSubstitutes)
		e.settings(o.Settings)
	}, nil)
}

// IsValid reports whether path is valid.
func (c *Client) IsValid(ctx context.Context, path flox.StorePath) (valid bool, err error) {
	err = c.do(ctx, OpIsValidPath, func(e *encoder) { e.path(path) }, func(d *decoder) { valid = d.bool() })
	return valid, err
}

// ValidPaths gives those of paths that are valid, with substitute after the
// daemon fetched what it could.
func (c *Client) ValidPaths(ctx context.Context, paths []flox.StorePath, substitute bool) (valid []flox.StorePath, err error) {
	err = c.do(ctx, OpQueryValidPaths, func(e *encoder) {
		e.paths(paths)
		e.bool(substitute)
	}, func(d *decoder) { valid = d.paths() })
	return valid, err
}

// Info is what the daemon knows of a valid path; else ErrNotFound.
func (c *Client) Info(ctx context.Context, path flox.StorePath) (*Info, error) {
	var info Info
	valid := false
	err := c.do(ctx, OpQueryPathInfo, func(e *encoder) { e.path(path) }, func(d *decoder) {
		if valid = d.bool(); valid {
			info = d.info(path)
		}
	})
	if err == nil && !valid {
		err = NotValid(c.in.dir, path)
	}
	if err != nil {
		return nil, err
	}
	return &info, nil
}

// ByHashPart is the valid path with that hash part, "" if there is none.
func (c *Client) ByHashPart(ctx context.Context, hash string) (path flox.StorePath, err error) {
	err = c.do(ctx, OpQueryPathFromHashPart, func(e *encoder) { e.str(hash) }, func(d *decoder) { path = d.opath() })
	return path, err
}

// Nar writes the NAR of a valid path to w. After an error, a daemon's or w's,
// the connection is over.
func (c *Client) Nar(ctx context.Context, path flox.StorePath, w io.Writer) error {
	err := c.do(ctx, OpNarFromPath, func(e *encoder) { e.path(path) }, func(d *decoder) {
		if d.err != nil {
			return
		}
		r := nix.NewNarReader(io.TeeReader(d.r, w))
		for {
			if _, err := r.Next(); errors.Is(err, io.EOF) {
				return
			} else if err != nil {
				d.fail(err)
				return
			}
		}
	})
	if err != nil {
		c.conn.Close()
		return fmt.Errorf("NAR of %s: %w", path, err)
	}
	return nil
}

// AddNar makes the path of info valid; nar is its NAR.
func (c *Client) AddNar(ctx context.Context, info *Info, nar io.Reader, o AddOptions) error {
	return c.upload(ctx, OpAddToStoreNar, func(e *encoder) {
		e.keyed(info)
		e.bool(o.Repair)
		e.bool(o.NoCheckSigs)
	}, func(w io.Writer) error {
		_, err := io.Copy(w, nar)
		return err
	}, nil)
}

// AddNars makes n paths valid in one request. each gives the next path and its
// NAR; references come before what refers to them.
func (c *Client) AddNars(ctx context.Context, n int, each func() (*Info, io.Reader, error), o AddOptions) error {
	return c.upload(ctx, OpAddMultipleToStore, func(e *encoder) {
		e.bool(o.Repair)
		e.bool(o.NoCheckSigs)
	}, func(w io.Writer) error {
		e := newEncoder(w, c.in.dir)
		e.u64(uint64(n))
		for range n {
			info, nar, err := each()
			if err != nil {
				return err
			}
			e.keyed(info)
			if err := e.flush(); err != nil {
				return err
			}
			if _, err := io.Copy(w, nar); err != nil {
				return err
			}
		}
		return e.flush()
	}, nil)
}

// AddContent adds data, a NAR for nix.CANar and else the bytes of a file, and
// gives what the daemon knows of the path it became.
func (c *Client) AddContent(ctx context.Context, content Content, data io.Reader) (*Info, error) {
	var info Info
	err := c.upload(ctx, OpAddToStore, func(e *encoder) {
		e.str(content.Name)
		e.str(string(content.Method) + string(content.Algo))
		e.paths(content.References)
		e.bool(content.Repair)
	}, func(w io.Writer) error {
		_, err := io.Copy(w, data)
		return err
	}, func(d *decoder) { info = d.keyed() })
	if err != nil {
		return nil, err
	}
	return &info, nil
}

// one reads the reply of an operation that has nothing to tell.
func one(d *decoder) {
	if n := d.u64(); d.err == nil && n != 1 {
		d.bad("reply %d, want 1", n)
	}
}

// Ensure makes a path valid if the daemon can fetch it.
func (c *Client) Ensure(ctx context.Context, path flox.StorePath) error {
	return c.do(ctx, OpEnsurePath, func(e *encoder) { e.path(path) }, one)
}

// AddTempRoot keeps a path while the connection lasts.
func (c *Client) AddTempRoot(ctx context.Context, path flox.StorePath) error {
	return c.do(ctx, OpAddTempRoot, func(e *encoder) { e.path(path) }, one)
}

// AddSignatures adds signatures to a valid path.
func (c *Client) AddSignatures(ctx context.Context, path flox.StorePath, sigs []string) error {
	return c.do(ctx, OpAddSignatures, func(e *encoder) {
		e.path(path)
		e.strs(sigs)
	}, one)
}

// Build makes every target valid; the error is the daemon's about the first
// that failed.
func (c *Client) Build(ctx context.Context, targets []DerivedPath, mode BuildMode) error {
	return c.do(ctx, OpBuildPaths, func(e *encoder) {
		e.derived(targets)
		e.u64(uint64(mode))
	}, one)
}

// BuildResults is Build with a result for each target. Below 1.34 it is
// ErrBadInput.
func (c *Client) BuildResults(ctx context.Context, targets []DerivedPath, mode BuildMode) (results []TargetResult, err error) {
	if c.version < v34 {
		return nil, fmt.Errorf("the daemon speaks protocol %s, build results need %s: %w", c.version, v34, flox.ErrBadInput)
	}
	err = c.do(ctx, OpBuildPathsWithResults, func(e *encoder) {
		e.derived(targets)
		e.u64(uint64(mode))
	}, func(d *decoder) {
		for range d.count() {
			r := TargetResult{Target: d.derivedPath(), BuildResult: d.buildResult()}
			if d.err != nil {
				return
			}
			results = append(results, r)
		}
	})
	return results, err
}

// BuildDerivation builds drv, whose sources are valid, under the name of path.
func (c *Client) BuildDerivation(ctx context.Context, path flox.StorePath, drv *nix.Derivation, mode BuildMode) (*BuildResult, error) {
	var result BuildResult
	err := c.do(ctx, OpBuildDerivation, func(e *encoder) {
		e.path(path)
		e.derivation(drv)
		e.u64(uint64(mode))
	}, func(d *decoder) { result = d.buildResult() })
	if err != nil {
		return nil, err
	}
	return &result, nil
}

// Realisation is what an output of a content-addressed derivation became there; else
// ErrNotFound.
func (c *Client) Realisation(ctx context.Context, id nix.RealisationID) (*nix.Realisation, error) {
	var found []nix.Realisation
	err := c.do(ctx, OpQueryRealisation, func(e *encoder) { e.str(id.String()) }, func(d *decoder) {
		for range d.count() {
			found = append(found, d.realisation())
			if d.err != nil {
				return
			}
		}
	})
	switch {
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, fmt.Errorf("realisation %s: %w", id, flox.ErrNotFound)
	case found[0].ID != id:
		return nil, fmt.Errorf("asked for realisation %s, the daemon answers %s: %w", id, found[0].ID, flox.ErrBadInput)
	}
	return &found[0], nil
}

// AddRealisation tells what an output of a content-addressed derivation became.
func (c *Client) AddRealisation(ctx context.Context, r *nix.Realisation) error {
	return c.do(ctx, OpRegisterDrvOutput, func(e *encoder) { e.realisation(r) }, func(*decoder) {})
}

// Missing tells what Build would have to do.
func (c *Client) Missing(ctx context.Context, targets []DerivedPath) (*Missing, error) {
	var m Missing
	err := c.do(ctx, OpQueryMissing, func(e *encoder) { e.derived(targets) }, func(d *decoder) {
		m = Missing{Build: d.paths(), Substitute: d.paths(), Unknown: d.paths(), DownloadSize: d.u64(), NarSize: d.u64()}
	})
	if err != nil {
		return nil, err
	}
	return &m, nil
}
