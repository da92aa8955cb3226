package worker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// Bounds of what a peer may make this side hold. A framed stream is not held
// and has no bound here.
const (
	maxRequest = 128 << 20 // bytes of one message outside framed streams, what holds it counted
	maxPath    = 4096      // bytes of any path, as in PATH_MAX
	maxWord    = 1 << 20   // bytes of a name, signature or setting
	maxText    = 64 << 20  // bytes of a text: an environment variable, an error
	perString  = 16        // what a string costs besides its bytes
)

// decoder reads the primitives of the protocol. Its first error stays, and
// everything after it reads as zero: a caller looks at err once, at the end of
// a message.
type decoder struct {
	r       io.Reader
	dir     flox.StoreDir
	version Version
	left    int // of maxRequest
	err     error
	word    [8]byte
}

func newDecoder(r io.Reader, dir flox.StoreDir) *decoder {
	return &decoder{r: r, dir: dir, left: maxRequest}
}

// begin gives the next message its bounds.
func (d *decoder) begin() { d.left = maxRequest }

// fail keeps the first error. The end of the stream inside a message is never
// a clean one.
func (d *decoder) fail(err error) {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if d.err == nil {
		d.err = err
	}
}

// bad is what the peer sent against the rules.
func (d *decoder) bad(format string, args ...any) {
	d.fail(fmt.Errorf("%w: %w", fmt.Errorf(format, args...), flox.ErrBadInput))
}

func (d *decoder) full(b []byte) bool {
	if d.err != nil {
		return false
	}
	if _, err := io.ReadFull(d.r, b); err != nil {
		d.fail(err)
		return false
	}
	return true
}

func (d *decoder) u64() uint64 {
	if !d.full(d.word[:]) {
		return 0
	}
	return binary.LittleEndian.Uint64(d.word[:])
}

// bool reads any number but 0 as true, as Nix does.
func (d *decoder) bool() bool { return d.u64() != 0 }

// number reads an integer up to most.
func (d *decoder) number(most uint64) uint64 {
	n := d.u64()
	if n > most {
		d.bad("serialised integer %d is too large, at most %d is allowed here", n, most)
		return 0
	}
	return n
}

// size reads a count of bytes that has to fit an int64.
func (d *decoder) size() uint64 { return d.number(math.MaxInt64) }

func (d *decoder) seconds() time.Time {
	n := d.number(math.MaxInt64 / 2)
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(int64(n), 0)
}

// spend takes n of what the message may cost.
func (d *decoder) spend(n int) bool {
	if d.err == nil && n > d.left {
		d.bad("message of more than %d bytes", maxRequest)
	}
	d.left -= n
	return d.err == nil
}

// count reads the number of elements that follow. No memory may be taken by it
// alone: elements cost when they come.
func (d *decoder) count() int {
	n := d.u64()
	if d.err == nil && n > uint64(d.left)/8 {
		d.bad("a list of %d elements, which is more than a message holds", n)
		return 0
	}
	return int(n)
}

// str reads a string of at most most bytes; what follows it is padding.
func (d *decoder) str(most int) string {
	n := d.u64()
	if d.err != nil {
		return ""
	}
	if n > uint64(most) {
		d.bad("string of %d bytes is too long, at most %d are allowed here", n, most)
		return ""
	}
	if !d.spend(int(n) + perString) {
		return ""
	}
	s := d.bytes(int(n))
	var pad [8]byte
	if p := pad[:padding(n)]; d.full(p) && string(p) != string(zeros[:len(p)]) {
		d.bad("non-zero padding behind a string of %d bytes", n)
	}
	if d.err != nil {
		return ""
	}
	return s
}

// bytes reads n bytes, taking memory as they come.
func (d *decoder) bytes(n int) string {
	const step = 64 << 10
	if n <= step {
		b := make([]byte, n)
		d.full(b)
		return string(b)
	}
	var b strings.Builder
	part := make([]byte, step)
	for n > 0 && d.err == nil {
		p := part[:min(n, step)]
		if d.full(p) {
			b.Write(p)
		}
		n -= len(p)
	}
	return b.String()
}

func (d *decoder) strs() []string {
	var list []string
	for range d.count() {
		s := d.str(maxWord)
		if d.err != nil {
			return nil
		}
		list = append(list, s)
	}
	return list
}

// parsePath is a store path in Nix's words if it is none.
func (d *decoder) parsePath(s string) flox.StorePath {
	if d.err != nil {
		return ""
	}
	if !strings.HasPrefix(s, string(d.dir)+"/") {
		d.fail(errorf(flox.ErrBadInput, "path '%s' is not in the Nix store", shorten(s)))
		return ""
	}
	p, err := d.dir.Parse(s)
	if err != nil {
		d.fail(err)
	}
	return p
}

func (d *decoder) path() flox.StorePath { return d.parsePath(d.str(maxPath)) }

func (d *decoder) opath() flox.StorePath {
	s := d.str(maxPath)
	if s == "" {
		return ""
	}
	return d.parsePath(s)
}

// paths reads a set: sorted, without duplicates, whatever was sent.
func (d *decoder) paths() []flox.StorePath {
	var set []flox.StorePath
	for range d.count() {
		p := d.path()
		if d.err != nil {
			return nil
		}
		set = append(set, p)
	}
	slices.Sort(set)
	return slices.Compact(set)
}

// settings reads a map of strings; as in Nix the first of two equal keys holds.
func (d *decoder) settings(valueMost int) map[string]string {
	m := make(map[string]string)
	for range d.count() {
		k, v := d.str(maxWord), d.str(valueMost)
		if d.err != nil {
			return nil
		}
		if _, twice := m[k]; !twice {
			m[k] = v
		}
	}
	return m
}

func (d *decoder) narHash() (sum [32]byte) {
	s := d.str(maxWord)
	if d.err != nil {
		return sum
	}
	h, err := nix.ParseHash(s, nix.SHA256)
	if err != nil {
		d.fail(err)
		return sum
	}
	return [32]byte(h.Sum)
}

// ca reads a content address, "" for none, in its usual form.
func (d *decoder) ca() string {
	s := d.str(maxWord)
	if d.err != nil || s == "" {
		return ""
	}
	ca, err := nix.ParseContentAddress(s)
	if err != nil {
		d.fail(err)
		return ""
	}
	return ca.String()
}

func (d *decoder) signatures() []string {
	sigs := d.strs()
	if len(sigs) > nix.MaxSignatures {
		d.bad("%d signatures, at most %d are kept of a path", len(sigs), nix.MaxSignatures)
		return nil
	}
	slices.Sort(sigs)
	return slices.Compact(sigs)
}

// info reads what is known of path.
func (d *decoder) info(path flox.StorePath) Info {
	var i Info
	i.Path = path
	i.Deriver = d.opath()
	i.NarHash = d.narHash()
	i.References = d.paths()
	i.Registered = d.seconds()
	i.NarSize = d.size()
	i.Ultimate = d.bool()
	i.Signatures = d.signatures()
	i.CA = d.ca()
	return i
}

func (d *decoder) keyed() Info { return d.info(d.path()) }

func (d *decoder) derived() []DerivedPath {
	var list []DerivedPath
	for range d.count() {
		p := d.derivedPath()
		if d.err != nil {
			return nil
		}
		list = append(list, p)
	}
	return list
}

// derivedPath reads a path, "<drv>!*" or "<drv>!a,b".
func (d *decoder) derivedPath() DerivedPath {
	s := d.str(maxWord)
	path, outputs, ok := strings.Cut(s, "!")
	p := DerivedPath{Path: d.parsePath(path)}
	switch {
	case !ok:
	case outputs == "*":
		p.All = true
	case strings.Contains(outputs, "!"):
		d.bad("derived path %q: outputs of a derivation that is itself an output are not supported", shorten(s))
	default:
		p.Outputs = strings.Split(outputs, ",")
		slices.Sort(p.Outputs)
		p.Outputs = slices.Compact(p.Outputs)
		if p.Outputs[0] == "" {
			d.bad("derived path %q: the name of an output is empty", shorten(s))
		}
	}
	return p
}

func (d *decoder) substitutable(path flox.StorePath) Substitutable {
	return Substitutable{Path: path, Deriver: d.opath(), References: d.paths(), DownloadSize: d.size(), NarSize: d.size()}
}

func (d *decoder) realisation() nix.Realisation {
	s := d.str(maxWord)
	if d.err != nil {
		return nix.Realisation{}
	}
	r, err := nix.ParseRealisation([]byte(s))
	if err != nil {
		d.fail(err)
		return nix.Realisation{}
	}
	return *r
}

func (d *decoder) drvOutput() nix.RealisationID {
	s := d.str(maxWord)
	if d.err != nil {
		return nix.RealisationID{}
	}
	id, err := nix.ParseRealisationID(s)
	if err != nil {
		d.fail(err)
	}
	return id
}

func (d *decoder) duration() *time.Duration {
	switch d.number(1) {
	case 1:
		t := time.Duration(d.number(math.MaxInt64/1000)) * time.Microsecond
		return &t
	default:
		return nil
	}
}

func (d *decoder) buildResult() BuildResult {
	r := BuildResult{
		Status: BuildStatus(d.number(math.MaxUint8)), Error: d.str(maxText), TimesBuilt: d.u64(),
		NonDeterministic: d.bool(), Start: d.seconds(), Stop: d.seconds(),
	}
	if d.version >= v37 {
		r.CPUUser, r.CPUSystem = d.duration(), d.duration()
	}
	for range d.count() {
		key, out := d.drvOutput(), d.realisation()
		if d.err != nil {
			return BuildResult{}
		}
		if key != out.ID {
			d.bad("a realisation of %s under the key of %s", out.ID, key)
		}
		r.Outputs = append(r.Outputs, out)
	}
	return r
}

// derivation reads what BuildDerivation is sent; the name is path's.
func (d *decoder) derivation(path flox.StorePath) nix.Derivation {
	drv := nix.Derivation{Name: strings.TrimSuffix(path.Name(), nix.DrvExtension), Outputs: make(map[string]nix.DrvOutput)}
	for range d.count() {
		name, out, algo, hash := d.str(maxWord), d.str(maxPath), d.str(maxWord), d.str(maxWord)
		if d.err != nil {
			return nix.Derivation{}
		}
		o, err := nix.ParseDrvOutput(d.dir, drv.Name, name, out, algo, hash)
		if err != nil {
			d.fail(err)
		}
		drv.Outputs[name] = o
	}
	drv.Sources = d.paths()
	drv.Platform, drv.Builder = d.str(maxWord), d.str(maxWord)
	for range d.count() {
		a := d.str(maxText)
		if d.err != nil {
			return nix.Derivation{}
		}
		drv.Args = append(drv.Args, a)
	}
	drv.Env = d.settings(maxText)
	return drv
}

func (d *decoder) fields() []Field {
	var list []Field
	for range d.count() {
		var f Field
		switch d.number(1) {
		case 0:
			f = Number(d.u64())
		case 1:
			f = Text(d.str(maxText))
		}
		if d.err != nil {
			return nil
		}
		list = append(list, f)
	}
	return list
}

// outputs reads paths, some of them not known yet, by the name of their output.
func (d *decoder) outputs() map[string]flox.StorePath {
	m := make(map[string]flox.StorePath)
	for range d.count() {
		name, path := d.str(maxWord), d.opath()
		if d.err != nil {
			return nil
		}
		m[name] = path
	}
	return m
}
