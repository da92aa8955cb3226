package agent

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	flox "github.com/floxctl/flox"
)

func numbered(kind string, i int) flox.StorePath {
	return flox.StorePath(fmt.Sprintf("%032d-%s", i, kind))
}

// remembered are the paths of a list, sorted: of programs, or of the others.
func remembered(r *ran, program bool) (out []flox.StorePath) {
	list, _ := r.list()
	for _, p := range list {
		if p.Program == program {
			out = append(out, p.Path)
		}
	}
	slices.Sort(out)
	return out
}

// TestRanProgramsOutliveLibraries: however many libraries and mapped files there
// are, no program is forgotten for them, and the next process knows them all.
func TestRanProgramsOutliveLibraries(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "ran.json")
	r := loadRan(file)
	for i := range maxRan {
		r.saw(numbered("program", i), 1, true)
	}
	programs := remembered(r, true)
	for i := range maxRanOthers + 100 {
		r.saw(numbered("library", i), 1, false)
	}
	for i := range 100 {
		r.mapped(numbered("data", i), 1, false)
	}
	if got := remembered(r, true); len(got) != maxRan || !slices.Equal(got, programs) {
		t.Errorf("%d programs are left of %d", len(got), maxRan)
	}
	others := remembered(r, false)
	if len(others) != maxRanOthers {
		t.Errorf("%d others are remembered, want %d", len(others), maxRanOthers)
	}
	if slices.Contains(others, numbered("library", 0)) || !slices.Contains(others, numbered("library", maxRanOthers+99)) {
		t.Error("the newest library was left out for the oldest")
	}
	// A program of a path known for its library comes to the programs.
	was := r.changed()
	r.saw(numbered("library", maxRanOthers), 1, true)
	list, changes := r.list()
	if list[0].Path != numbered("library", maxRanOthers) || !list[0].Program || changes != was+1 {
		t.Errorf("the newest program is %+v, %d changes", list[0], changes-was)
	}
	if n := len(remembered(r, false)); n != maxRanOthers-1 {
		t.Errorf("%d others, although one is a program now", n)
	}
	if err := r.save(); err != nil {
		t.Fatal(err)
	}
	again, _ := loadRan(file).list()
	if !slices.EqualFunc(list, again, func(a, b ranPath) bool {
		return a.Path == b.Path && a.Program == b.Program && slices.Equal(a.Files, b.Files)
	}) {
		t.Errorf("the next process knows %d paths, or in another order; want %d", len(again), len(list))
	}
	r.forget(numbered("library", maxRanOthers+1))
	r.forget(list[0].Path)
	if list, _ := r.list(); len(list) != len(again)-2 {
		t.Errorf("%d paths after two of %d were forgotten", len(list), len(again))
	}
}

// TestRanMappedIsNoNewsTwice: what is mapped is seen with every scan. Once it is
// known that is no news, even if more is mapped than can be remembered.
func TestRanMappedIsNoNewsTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := loadRan(filepath.Join(t.TempDir(), "ran.json"))
		scan := func() {
			for i := range maxRan + 50 {
				r.mapped(numbered("program", i), 1, true)
			}
			for i := range maxRanOthers + 500 {
				r.mapped(numbered("library", i), 1, false)
			}
		}
		scan()
		list, known := r.list()
		if len(list) != maxRan+maxRanOthers {
			t.Fatalf("%d paths", len(list))
		}
		for range 40 {
			time.Sleep(mappedEvery * (mappedSkips + 1))
			scan()
		}
		if n := r.changed() - known; n != 0 {
			t.Errorf("%d changes although nothing changed", n)
		}
		// What runs takes its place all the same, and is not pushed out by what is
		// mapped; and once something is gone for long, others come in.
		r.saw(numbered("new", 0), 1, true)
		scan()
		if n := r.changed() - known; n != 1 || !slices.Contains(remembered(r, true), numbered("new", 0)) {
			t.Errorf("%d changes by a new program, want one that is remembered", n)
		}
		time.Sleep(mappedStay)
		r.mapped(numbered("later", 0), 1, false)
		if !slices.Contains(remembered(r, false), numbered("later", 0)) {
			t.Error("what was not seen for long leaves no room")
		}
	})
}

// TestRanOrder: what runs again comes to the front before it is forgotten, and
// for the order alone the list is not written all the time.
func TestRanOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "ran.json")
		r := loadRan(file)
		for i := range 2 * maxRan {
			r.saw(numbered("once", i), 1, true)
			r.saw(numbered("always", 0), 1, true)
		}
		if !slices.Contains(remembered(r, true), numbered("always", 0)) {
			t.Error("what runs all the time is forgotten")
		}
		save := func() string {
			if err := r.save(); err != nil {
				t.Fatal(err)
			}
			list, _ := loadRan(file).list()
			return string(list[0].Path)
		}
		last := save()
		list, known := r.list()
		r.saw(list[len(list)-1].Path, 1, true)
		if now, changes := r.list(); now[0].Path != list[len(list)-1].Path || changes != known {
			t.Errorf("%s is in front, %d changes", now[0].Path, changes-known)
		}
		if save() != last {
			t.Error("written at once for the order alone")
		}
		time.Sleep(saveOrderEvery)
		if save() != string(list[len(list)-1].Path) {
			t.Error("the order is never saved")
		}
	})
}
