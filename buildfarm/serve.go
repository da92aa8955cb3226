package buildfarm

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// The protocol of `nix-store --serve` (Nix 2.8 src/nix-store/nix-store.cc opServe,
// serve-protocol.hh), as far as it is needed here. 2.6 is that of Nix 2.4.
const (
	serveMagic1  = 0x390c9deb
	serveMagic2  = 0x5452eecb
	serveVersion = 2<<8 | 6

	cmdQueryPathInfos  = 2
	cmdBuildDerivation = 8

	maxServeString = 1 << 20
	maxServeList   = 1 << 20
)

// served is a Nix that builds and says what it knows. A build may have taken it over:
// what it says is a claim.
type served struct {
	room *room
	dir  flox.StoreDir
	to   *bufio.Writer
	from *bufio.Reader
	err  error
}

// serve starts one, with further arguments, that says on stderr what happens. ctx ends
// it, and end does.
func (p *place) serve(ctx context.Context, stderr io.Writer, args ...string) (*served, error) {
	r, err := p.room(ctx, program, append([]string{"--serve", "--write"}, args...)...)
	if err != nil {
		return nil, err
	}
	s := &served{room: r, dir: p.b.cfg.StoreDir}
	r.Stderr = stderr
	in, err := r.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := r.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.start(); err != nil {
		return nil, err
	}
	s.to, s.from = bufio.NewWriterSize(in, 64<<10), bufio.NewReader(out)
	s.num(serveMagic1)
	s.num(serveVersion)
	if magic, version := s.readNum(), s.readNum(); s.err == nil && (magic != serveMagic2 || version>>8 != 2 || version < serveVersion) {
		s.err = fmt.Errorf("nix-store --serve speaks protocol %d.%d, want 2.%d or later, of Nix 2.4: %w", version>>8, version&0xff, serveVersion&0xff, flox.ErrBadInput)
	}
	return s, nil
}

// end ends it, and all it has started.
func (s *served) end() { s.room.end() }

// answer is what Nix says of a build.
type answer struct {
	status  Status
	message string
	paths   map[string]flox.StorePath // of floating outputs, by name
}

// build has a derivation built. sources are its inputs, whatever they come from.
func (s *served) build(drv flox.StorePath, d *nix.Derivation, sources []flox.StorePath, silent, timeout time.Duration, maxLog uint64) answer {
	s.num(cmdBuildDerivation)
	s.str(s.dir.Join(drv))
	s.num(uint64(len(d.Outputs)))
	for _, name := range d.OutputNames() {
		path, algo, hash := d.Outputs[name].Fields(s.dir)
		for _, v := range []string{name, path, algo, hash} {
			s.str(v)
		}
	}
	s.paths(sources)
	s.str(d.Platform)
	s.str(d.Builder)
	s.num(uint64(len(d.Args)))
	for _, arg := range d.Args {
		s.str(arg)
	}
	s.num(uint64(len(d.Env)))
	for _, name := range slices.Sorted(maps.Keys(d.Env)) {
		s.str(name)
		s.str(d.Env[name])
	}
	for _, n := range []uint64{uint64(silent / time.Second), uint64(timeout / time.Second), maxLog, 0, 0} { //nolint:gosec // not negative
		s.num(n) // the last two: once, and nothing to compare with
	}
	a := answer{paths: map[string]flox.StorePath{}}
	a.status = Status(min(s.readNum(), 0xff)) //nolint:gosec // bounded
	a.message = strings.TrimPrefix(plain(s.readStr()), "error: ")
	for range 4 { // times built, whether they differ, start and stop
		s.readNum()
	}
	for n := s.readCount(); n > 0 && s.err == nil; n-- {
		_, output, _ := strings.Cut(s.readStr(), "!")
		made := struct {
			OutPath string `json:"outPath"`
		}{}
		text := s.readStr()
		if s.err != nil {
			break
		}
		if s.err = json.Unmarshal([]byte(text), &made); s.err == nil {
			a.paths[output], s.err = flox.ParseStorePath(made.OutPath)
		}
	}
	return a
}

// infos gives what is known of valid paths.
func (s *served) infos(paths []flox.StorePath) (infos []*flox.PathInfo) {
	s.num(cmdQueryPathInfos)
	s.paths(paths)
	for {
		path := s.readStr()
		if s.err != nil || path == "" {
			return infos
		}
		info := &flox.PathInfo{Path: s.parse(path)}
		if deriver := s.readStr(); deriver != "" {
			info.Deriver = s.parse(deriver)
		}
		info.References = s.readPaths()
		s.readNum() // what a download would be
		info.NarSize = s.readNum()
		hash, err := nix.ParseHash(s.readStr(), nix.SHA256)
		if s.err == nil && err != nil {
			s.err = err
		}
		copy(info.NarHash[:], hash.Sum)
		info.CA = s.readStr()
		for n := s.readCount(); n > 0 && s.err == nil; n-- {
			s.readStr() // signatures
		}
		infos = append(infos, info)
	}
}

func (s *served) write(b []byte) {
	if s.err == nil {
		_, s.err = s.to.Write(b)
	}
}

func (s *served) num(n uint64) { s.write(binary.LittleEndian.AppendUint64(nil, n)) }

func (s *served) str(v string) {
	s.num(uint64(len(v)))
	s.write([]byte(v))
	s.write(make([]byte, -len(v)&7))
}

func (s *served) paths(paths []flox.StorePath) {
	s.num(uint64(len(paths)))
	for _, p := range paths {
		s.str(s.dir.Join(p))
	}
}

func (s *served) read(b []byte) {
	if s.err == nil {
		s.err = s.to.Flush()
	}
	if s.err == nil {
		_, s.err = io.ReadFull(s.from, b)
	}
}

func (s *served) readNum() uint64 {
	var b [8]byte
	s.read(b[:])
	if s.err != nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b[:])
}

// readCount reads the length of a list.
func (s *served) readCount() uint64 {
	n := s.readNum()
	if n > maxServeList && s.err == nil {
		s.err = fmt.Errorf("list of %d: %w", n, flox.ErrBadInput)
	}
	return n
}

func (s *served) readStr() string {
	n := s.readNum()
	if n > maxServeString && s.err == nil {
		s.err = fmt.Errorf("string of %d bytes: %w", n, flox.ErrBadInput)
	}
	if s.err != nil {
		return ""
	}
	b := make([]byte, n+-n&7)
	s.read(b)
	return string(b[:n])
}

func (s *served) readPaths() (paths []flox.StorePath) {
	for n := s.readCount(); n > 0 && s.err == nil; n-- {
		if p := s.parse(s.readStr()); s.err == nil {
			paths = append(paths, p)
		}
	}
	return paths
}

func (s *served) parse(path string) flox.StorePath {
	if s.err != nil {
		return ""
	}
	p, err := s.dir.Parse(path)
	s.err = err
	return p
}
