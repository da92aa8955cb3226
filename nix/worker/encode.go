package worker

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// encoder writes the primitives of the protocol. Its first error stays and is
// told by flush.
type encoder struct {
	w       *bufio.Writer
	dir     flox.StoreDir
	version Version
	err     error
	word    [8]byte
}

// writeBuffer is what an idle connection holds; larger writes go past it.
const writeBuffer = 4 << 10

func newEncoder(w io.Writer, dir flox.StoreDir) *encoder {
	return &encoder{w: bufio.NewWriterSize(w, writeBuffer), dir: dir}
}

func (e *encoder) flush() error {
	if e.err == nil {
		e.err = e.w.Flush()
	}
	return e.err
}

func (e *encoder) raw(b []byte) {
	if e.err == nil {
		_, e.err = e.w.Write(b)
	}
}

func (e *encoder) u64(n uint64) {
	binary.LittleEndian.PutUint64(e.word[:], n)
	e.raw(e.word[:])
}

func (e *encoder) bool(b bool) {
	if b {
		e.u64(1)
	} else {
		e.u64(0)
	}
}

var zeros [8]byte

// str writes a length, the bytes and zeros up to a multiple of 8.
func (e *encoder) str(s string) {
	e.u64(uint64(len(s)))
	if e.err == nil {
		_, e.err = e.w.WriteString(s)
	}
	e.raw(zeros[:padding(uint64(len(s)))])
}

// padding is how many zeros follow n bytes.
func padding(n uint64) uint64 { return -n & 7 }

func (e *encoder) strs(list []string) {
	e.u64(uint64(len(list)))
	for _, s := range list {
		e.str(s)
	}
}

func (e *encoder) path(p flox.StorePath) { e.str(e.dir.Join(p)) }

// opath writes a path that may be none.
func (e *encoder) opath(p flox.StorePath) {
	if p == "" {
		e.str("")
		return
	}
	e.path(p)
}

// paths writes a set, whatever its order.
func (e *encoder) paths(set []flox.StorePath) {
	set = slices.Compact(slices.Sorted(slices.Values(set)))
	e.u64(uint64(len(set)))
	for _, p := range set {
		e.path(p)
	}
}

func (e *encoder) settings(m map[string]string) {
	e.u64(uint64(len(m)))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		e.str(k)
		e.str(m[k])
	}
}

// seconds writes a time, 0 for the zero Time.
func (e *encoder) seconds(t time.Time) {
	if t.IsZero() {
		e.u64(0)
		return
	}
	e.u64(uint64(max(t.Unix(), 0)))
}

// info writes what is known of a path, without the path.
func (e *encoder) info(i *Info) {
	e.opath(i.Deriver)
	e.str(hex.EncodeToString(i.NarHash[:]))
	e.paths(i.References)
	e.seconds(i.Registered)
	e.u64(i.NarSize)
	e.bool(i.Ultimate)
	e.strs(i.Signatures)
	e.str(i.CA)
}

// keyed writes the path and what is known of it.
func (e *encoder) keyed(i *Info) {
	e.path(i.Path)
	e.info(i)
}

func (e *encoder) derived(list []DerivedPath) {
	e.u64(uint64(len(list)))
	for _, d := range list {
		e.str(d.text(e.dir))
	}
}

func (e *encoder) substitutable(s *Substitutable) {
	e.opath(s.Deriver)
	e.paths(s.References)
	e.u64(s.DownloadSize)
	e.u64(s.NarSize)
}

func (e *encoder) realisation(r *nix.Realisation) { e.str(string(r.Marshal())) }

func (e *encoder) duration(d *time.Duration) {
	if d == nil {
		e.u64(0)
		return
	}
	e.u64(1)
	e.u64(uint64(max(d.Microseconds(), 0)))
}

func (e *encoder) buildResult(r *BuildResult) {
	e.u64(uint64(r.Status))
	e.str(r.Error)
	e.u64(r.TimesBuilt)
	e.bool(r.NonDeterministic)
	e.seconds(r.Start)
	e.seconds(r.Stop)
	if e.version >= v37 {
		e.duration(r.CPUUser)
		e.duration(r.CPUSystem)
	}
	outputs := slices.SortedFunc(slices.Values(r.Outputs), func(a, b nix.Realisation) int { return compareIDs(a.ID, b.ID) })
	e.u64(uint64(len(outputs)))
	for i := range outputs {
		e.str(outputs[i].ID.String())
		e.realisation(&outputs[i])
	}
}

// compareIDs is Nix's order: by the hash's bytes, then by name.
func compareIDs(a, b nix.RealisationID) int {
	return cmp.Or(bytes.Compare(a.DrvHash[:], b.DrvHash[:]), cmp.Compare(a.Output, b.Output))
}

// derivation writes what BuildDerivation is sent: no name and no inputs that
// are derivations.
func (e *encoder) derivation(d *nix.Derivation) {
	e.u64(uint64(len(d.Outputs)))
	for _, name := range slices.Sorted(maps.Keys(d.Outputs)) {
		path, algo, hash := d.Outputs[name].Fields(e.dir)
		e.str(name)
		e.str(path)
		e.str(algo)
		e.str(hash)
	}
	e.paths(d.Sources)
	e.str(d.Platform)
	e.str(d.Builder)
	e.strs(d.Args)
	e.settings(d.Env)
}

// fields writes the values of an activity or result: uint64 and string only.
func (e *encoder) fields(list []Field) {
	e.u64(uint64(len(list)))
	for _, f := range list {
		if f.IsText {
			e.u64(1)
			e.str(f.Text)
		} else {
			e.u64(0)
			e.u64(f.Number)
		}
	}
}

// outputs writes paths by the name of their output.
func (e *encoder) outputs(m map[string]flox.StorePath) {
	e.u64(uint64(len(m)))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		e.str(name)
		e.opath(m[name])
	}
}
