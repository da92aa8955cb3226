package cache

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// insert, cut, state and gaps agree with an array of bytes; lists stay sorted and apart.
func TestExtents(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 64
		var list []extent
		var model [size]uint64 // generation of each byte; 0 = not here
		lost := func(gen uint64) bool { return gen == 3 }
		same := func(a, b uint64) bool { return !lost(a) && !lost(b) }
		for range rapid.IntRange(1, 300).Draw(t, "steps") {
			off := rapid.Uint32Range(0, size-1).Draw(t, "off")
			end := rapid.Uint32Range(off+1, size).Draw(t, "end")
			gen := rapid.Uint64Range(1, 4).Draw(t, "gen")
			switch rapid.IntRange(0, 2).Draw(t, "step") {
			case 0:
				list = insert(list, extent{off, end, gen}, same)
				for i := off; i < end; i++ {
					model[i] = gen
				}
			case 1:
				list = cut(list, off, end, lost)
				for i := off; i < end; i++ {
					if lost(model[i]) {
						model[i] = 0
					}
				}
			}
			want := Hit
			var missing []uint32
			for i := off; i < end; i++ {
				if model[i] == 0 {
					want = Miss
					missing = append(missing, i)
				} else if lost(model[i]) && want == Hit {
					want = Unverified
				}
			}
			if got := state(list, off, end, lost); got != want {
				t.Fatalf("state of [%d, %d) in %v: %d, want %d", off, end, list, got, want)
			}
			var got []uint32
			gaps(list, off, end, func(lo, hi uint32) {
				for i := lo; i < hi; i++ {
					got = append(got, i)
				}
			})
			if d := cmp.Diff(missing, got); d != "" {
				t.Fatalf("gaps of [%d, %d) in %v: %s", off, end, list, d)
			}
			for i, e := range list {
				if e.end <= e.off || i > 0 && list[i-1].end > e.off {
					t.Fatalf("not sorted and apart: %v", list)
				}
				for at := e.off; at < e.end; at++ {
					if lost(e.gen) != lost(model[at]) || e.gen < model[at] {
						t.Fatalf("byte %d is of generation %d, kept as %d", at, model[at], e.gen)
					}
				}
			}
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add(encode(&content{size: 10, object: 1, length: 10, packed: true, ext: []extent{{0, 10, 7}}}, 1, []uint64{5}))
	f.Add(encode(&content{size: 1 << 40, object: 9, length: 64 << 20, kept: true, ext: []extent{{0, 10, 7}, {20, 30, 1 << 60}}}, 0, nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		ct, ref, readers, err := decode(b)
		if err != nil {
			return
		}
		again, ref2, readers2, err := decode(encode(ct, ref, readers))
		if err != nil || ref != ref2 {
			t.Fatalf("decode of its own encoding: %v", err)
		}
		if d := cmp.Diff(readers, readers2); d != "" {
			t.Fatal(d)
		}
		if d := cmp.Diff(ct, again, cmp.AllowUnexported(content{}, extent{})); d != "" {
			t.Fatal(d)
		}
	})
}

// More lost spans than are kept make more generations lost, never fewer.
func TestLostSpans(t *testing.T) {
	var m marks
	want := map[uint64]bool{}
	for i := range uint64(3 * maxSpans) {
		m.lose(i*i+1, i*i+1)
		want[i*i+1] = true
	}
	s := &session{}
	s.marks.Store(&m)
	for gen := range want {
		if !s.lost(gen) {
			t.Errorf("generation %d is trusted again", gen)
		}
	}
	if len(m.Lost) > maxSpans {
		t.Errorf("%d spans, want at most %d", len(m.Lost), maxSpans)
	}
	if s.lost(0) {
		t.Error("generation 0 is lost")
	}
}
