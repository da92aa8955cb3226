package warden

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/floxctl/flox"
)

const (
	// maxRuns bounds an answer about one process.
	maxRuns = 16 << 10
	// maxPages is how many pages of address space are looked at for one.
	maxPages = 1 << 20
	// maxRunsPart is how many runs one part of an answer holds.
	maxRunsPart = 512
)

// PageRun is a part of a file that is in a process's page tables.
type PageRun struct {
	Node     uint64
	Off, Len int64 // bytes in the file
}

// mapping is a line of /proc/PID/maps.
type mapping struct {
	from, to uint64 // addresses
	off      int64  // in the file
	node     uint64
}

// pages lists what of the file system's files a process has in its page tables:
// what it used, or the kernel mapped beside that. It asks the page tables only,
// so that nothing is read.
// ErrUnread: it does not tell now, as it waits for bytes itself.
func (s *scanner) pages(pid uint32) ([]PageRun, error) {
	dir := filepath.Join(s.proc, strconv.FormatUint(uint64(pid), 10))
	type told struct {
		runs []PageRun
		err  error
	}
	t, ok := patiently(&s.memory, dir, processOwner(dir), func() (t told) {
		t.runs, t.err = s.present(dir, pid)
		return t
	})
	if !ok {
		return nil, fmt.Errorf("process %d does not tell what it has mapped: %w", pid, ErrUnread)
	}
	return t.runs, t.err
}

func (s *scanner) present(dir string, pid uint32) ([]PageRun, error) {
	mappings, err := s.mappings(dir)
	if err != nil || len(mappings) == 0 {
		return nil, gone(pid, err)
	}
	pagemap, err := os.Open(dir + "/pagemap")
	if err != nil {
		return nil, gone(pid, err)
	}
	defer pagemap.Close()
	var runs []PageRun
	left := maxPages
	for _, m := range mappings {
		if runs, err = m.present(pagemap, runs, &left); err != nil {
			return nil, gone(pid, err)
		}
		if left == 0 || len(runs) >= maxRuns {
			break
		}
	}
	return runs[:min(len(runs), maxRuns)], nil
}

// gone says what it means that a file of /proc could not be read.
func gone(pid uint32, err error) error {
	if errors.Is(err, iofs.ErrNotExist) {
		return fmt.Errorf("process %d: %w", pid, flox.ErrNotFound)
	}
	return err
}

// mappings reads those lines of dir/maps that are on the file system.
func (s *scanner) mappings(dir string) (list []mapping, err error) {
	file, err := os.Open(dir + "/maps")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	device := fmt.Appendf(nil, "%02x:%02x", s.major, s.minor)
	lines := bufio.NewReader(file)
	whole := true // the last piece ended a line
	for len(list) < maxNodes {
		line, err := lines.ReadSlice('\n')
		if whole {
			if m, ok := parseMapping(line, device); ok {
				list = append(list, m)
			}
		}
		whole = err == nil
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			break
		}
	}
	return list, nil
}

// parseMapping reads a line as mapped does, and where it lies.
func parseMapping(line, device []byte) (m mapping, ok bool) {
	if m.node, ok = mapped(line, device); !ok {
		return m, false
	}
	fields := bytes.Fields(line)
	from, to, ok := bytes.Cut(fields[0], []byte("-"))
	if !ok {
		return m, false
	}
	var errs [3]error
	m.from, errs[0] = strconv.ParseUint(string(from), 16, 64)
	m.to, errs[1] = strconv.ParseUint(string(to), 16, 64)
	m.off, errs[2] = strconv.ParseInt(string(fields[2]), 16, 64)
	return m, errors.Join(errs[:]...) == nil && m.from < m.to && m.to <= math.MaxInt64 && m.off >= 0
}

// Bits of an entry of /proc/PID/pagemap (Linux Documentation/admin-guide/mm/pagemap.rst).
const pagePresent, pageSwapped = 1 << 63, 1 << 62

// present adds the runs of a mapping to runs; left is how many pages may still
// be looked at.
func (m mapping) present(pagemap io.ReaderAt, runs []PageRun, left *int) ([]PageRun, error) {
	size := uint64(os.Getpagesize())
	buf := make([]byte, 8*512)
	count := int(min((m.to-m.from)/size, uint64(*left)))
	*left -= count
	for at := 0; at < count && len(runs) < maxRuns; {
		part := buf[:8*min(count-at, len(buf)/8)]
		n, err := pagemap.ReadAt(part, int64(8*(m.from/size+uint64(at))))
		if n -= n % 8; n == 0 {
			if err == nil || errors.Is(err, io.EOF) {
				return runs, nil // it ended meanwhile
			}
			return runs, err
		}
		for i := range n / 8 {
			if binary.NativeEndian.Uint64(part[8*i:])&(pagePresent|pageSwapped) != 0 {
				runs = extend(runs, PageRun{m.node, m.off + int64(uint64(at+i)*size), int64(size)})
			}
		}
		at += n / 8
	}
	return runs, nil
}

// extend adds a page, to the last run if it follows that.
func extend(runs []PageRun, page PageRun) []PageRun {
	if n := len(runs); n > 0 && runs[n-1].Node == page.Node && runs[n-1].Off+runs[n-1].Len == page.Off {
		runs[n-1].Len += page.Len
		return runs
	}
	return append(runs, page)
}

// flatten writes runs as numbers, three for each.
func flatten(runs []PageRun) []uint64 {
	out := make([]uint64, 0, 3*len(runs))
	for _, r := range runs {
		out = append(out, r.Node, uint64(r.Off), uint64(r.Len))
	}
	return out
}

// unflatten is the inverse of flatten.
func unflatten(numbers []uint64) []PageRun {
	runs := make([]PageRun, 0, len(numbers)/3)
	for three := range slices.Chunk(numbers, 3) {
		if len(three) == 3 && three[1] <= math.MaxInt64/2 && three[2] <= math.MaxInt64/2 {
			runs = append(runs, PageRun{three[0], int64(three[1]), int64(three[2])})
		}
	}
	return runs
}
