package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox/integration/probe"
)

const (
	// wholePairs: each takes many seconds.
	wholePairs = 9
	// largeFile is what is read in one go.
	largeFile = 512 << 20
	// ext4ReadAhead is the kernel's default for a disk. Ours is smaller, since what
	// it reads too much has to be fetched.
	ext4ReadAhead = "128KiB"
)

// wholeRows: every byte of a closure, read through a mount that has none of it,
// against stock Nix copying it.
func (l *fuseLab) wholeRows(ctx context.Context) (rows []Row, err error) {
	t, err := l.world.Tool("git")
	if err != nil {
		return nil, err
	}
	if err := l.cold.Host.Rate(ctx, gigabit); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.cold.Host.Rate(ctx, 0)) }()
	var p pairs
	for range wholePairs {
		mine, err := l.readWhole(ctx, l.closure(t))
		if err != nil {
			return nil, err
		}
		n, theirs, err := l.copyAll(ctx, t)
		if err != nil {
			return nil, err
		}
		if err := os.RemoveAll(n.Dir); err != nil {
			return nil, err
		}
		p.add(mine.Seconds()*1e3, theirs.Seconds()*1e3)
	}
	row := p.row("reading 100 % of git's closure lazily, 1 Gb/s", "ms", "nix copy")
	row.Target, row.Met = "<= 1.10x", row.Ratio <= 1.1
	return []Row{row}, nil
}

// readWhole reads store paths with tar on an agent that has nothing.
func (l *fuseLab) readWhole(ctx context.Context, names []string) (time.Duration, error) {
	if err := l.cold.RestartCold(ctx, quiet...); err != nil {
		return 0, err
	}
	if err := connected(ctx, l.cold); err != nil {
		return 0, err
	}
	cmd := l.cold.Host.Command(ctx, "tar", append([]string{"-C", string(l.world.StoreDir), "-cf", "-"}, names...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	n, err := io.Copy(io.Discard, out)
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return 0, fmt.Errorf("tar: %w: %s", err, stderr.String())
	}
	took := time.Since(began)
	plain, err := probe.Walk(l.plainStore(), names...)
	if err == nil && n < plain.Bytes {
		err = fmt.Errorf("tar read %d of %d bytes", n, plain.Bytes)
	}
	return took, err
}

// streamRows: one large file that the agent has, read from front to back.
func (l *fuseLab) streamRows(ctx context.Context) ([]Row, error) {
	name, err := l.addLarge(ctx)
	if err != nil {
		return nil, err
	}
	plain, err := probe.Walk(l.plainStore(), name)
	if err != nil {
		return nil, err
	}
	ours := plain.At(l.plainStore(), string(l.world.StoreDir))
	var rows []Row
	for _, readAhead := range []string{"", ext4ReadAhead} {
		as := ""
		if readAhead != "" {
			as = ", read-ahead as ext4's"
			if err := l.warm.Restart(ctx, append([]string{"--read-ahead", readAhead}, quiet...)...); err != nil {
				return nil, err
			}
			if err := connected(ctx, l.warm); err != nil {
				return nil, err
			}
		}
		var warm, cold pairs
		if err := l.streamPairs(ctx, &warm, &cold, ours, plain); err != nil {
			return nil, err
		}
		rows = append(
			rows, warm.speed("sequential read of a cached 512 MiB file, in the kernel's cache"+as),
			cold.speed("sequential read of a cached 512 MiB file, not in the kernel's cache"+as),
		)
	}
	return rows, nil
}

// streamPairs reads both copies in pairs, with all of them in the kernel's cache and
// with nothing. It gives ns per MiB, so that the ratio is that of the times.
func (l *fuseLab) streamPairs(ctx context.Context, warm, cold *pairs, ours, plain *probe.Tree) error {
	mib := float64(plain.Bytes) / (1 << 20)
	return l.warm.Host.DoMounted(func() error {
		if err := ours.Read(ours.Files); err != nil {
			return err
		}
		if err := l.warmPairs(ctx, warm, mib, func() error { return ours.Read(ours.Files) }, func() error { return plain.Read(plain.Files) }); err != nil {
			return err
		}
		for range fusePairs {
			mine, err := afterDrop(ours)
			if err != nil {
				return err
			}
			theirs, err := afterDrop(plain)
			if err != nil {
				return err
			}
			cold.add(float64(mine.Nanoseconds())/mib, float64(theirs.Nanoseconds())/mib)
		}
		return nil
	})
}

// speed turns nanoseconds per MiB into MiB/s.
func (p *pairs) speed(name string) Row {
	turned := &pairs{}
	for i := range p.ours {
		turned.add(1e9/p.ours[i], 1e9/p.peer[i])
	}
	return turned.row(name, "MiB/s", "ext4")
}

// afterDrop times a read of a file whose pages were dropped. The agent's own copy
// may be in the kernel's cache or not, as that of the peer after the drop is not.
func afterDrop(t *probe.Tree) (time.Duration, error) {
	for _, name := range t.Files {
		f, err := os.Open(string(name[:len(name)-1]))
		if err != nil {
			return 0, err
		}
		err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		if err = errors.Join(err, f.Close()); err != nil {
			return 0, err
		}
	}
	began := time.Now()
	err := t.Read(t.Files)
	return time.Since(began), err
}

// addLarge puts a store path that is one large file into the storehouse and into
// the plain copy.
func (l *fuseLab) addLarge(ctx context.Context) (string, error) {
	file := filepath.Join(l.dir, "large-file")
	f, err := os.Create(file)
	if err != nil {
		return "", err
	}
	_, err = io.CopyN(f, rand.Reader, largeFile)
	if err = errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	layer := l.world.Layered(filepath.Join(l.dir, "layer"))
	out, err := layer.Command(ctx, "nix-store", "--add", file).Output()
	if err != nil {
		return "", fmt.Errorf("nix-store --add: %w", err)
	}
	path := strings.TrimSpace(string(out))
	if err := l.nixCopy(ctx, layer, path); err != nil {
		return "", err
	}
	name := filepath.Base(path)
	return name, os.Rename(file, filepath.Join(l.plainStore(), name))
}
