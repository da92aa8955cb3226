package channel

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/floxctl/flox"
)

const linux, arm = "x86_64-linux", "aarch64-linux"

func entry(attr, name, version, system string) Entry {
	return Entry{Attr: attr, Name: name, Version: version, System: system, Description: "The tool " + name, Drv: "drv", Outputs: []string{"out"}, Paths: []string{attr + version + system}}
}

func catalogue(t *testing.T, entries ...Entry) *Catalogue {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, entries); err != nil {
		t.Fatal(err)
	}
	c, err := Read(&b)
	if err != nil || c.Len() != len(entries) {
		t.Fatalf("%d entries, %v, want %d", c.Len(), err, len(entries))
	}
	return c
}

func tools(t *testing.T) *Catalogue {
	t.Helper()
	all := []Entry{
		entry("python3", "python3", "3.11.9", linux), entry("python3", "python3", "3.11.9", arm), entry("python310", "python3", "3.10.14", linux),
		entry("python39", "python3", "3.9.2", linux), entry("git", "git", "2.50", linux), entry("gitMinimal", "git", "2.50", linux),
		entry("tools.jq", "jq", "1.7", linux), entry("legit", "legit", "1", linux),
		{Attr: "broken", System: linux, Error: "it is broken"},
		{Attr: "other", Name: "other", Version: "1", System: linux, Description: "speaks to GIT servers", Paths: []string{"x"}},
	}
	return catalogue(t, all...)
}

// What a search finds first is what is called so.
func TestSearch(t *testing.T) {
	t.Parallel()
	c := tools(t)
	for term, want := range map[string]string{
		"git": "git gitMinimal legit other", "GIT mini": "gitMinimal", "tool jq": "tools.jq", "python": "python3 python310 python39", "nothing": "", "broken": "",
	} {
		hits, more := c.Search(term, linux, 10)
		var attrs []string
		for _, h := range hits {
			attrs = append(attrs, h.Attr)
		}
		if got := strings.Join(attrs, " "); got != want || more {
			t.Errorf("%s finds %q, %t, want %q", term, got, more, want)
		}
	}
	if hits, more := c.Search("", "", 2); len(hits) != 2 || !more {
		t.Errorf("%d of all, %t, want two of more", len(hits), more)
	}
	if hits, _ := c.Search("python3", arm, 10); len(hits) != 1 {
		t.Errorf("%d for another system, want one", len(hits))
	}
}

// A name means an attribute, else the newest of what is called so; who means something
// else is told what there is.
func TestFind(t *testing.T) {
	t.Parallel()
	c := tools(t)
	for word, want := range map[string]string{"python3": "python3", "python3@3.10": "python310", "python3@3.9.2": "python39", "jq": "tools.jq", "tools.jq": "tools.jq", "git": "git"} {
		_, name, version, err := ParseWanted(word, func(string) bool { return false })
		if err != nil {
			t.Fatal(err)
		}
		if e, err := c.Find(name, version, linux); err != nil || e.Attr != want {
			t.Errorf("%s is %v, %v, want %s", word, e, err, want)
		}
	}
	for _, c2 := range []struct {
		name, version, system string
		want                  error
		words                 string
	}{
		{"python3", "2.7", linux, flox.ErrNotFound, "3.10.14, 3.11.9, 3.9.2, not 2.7"},
		{"python3", "3.1", linux, flox.ErrNotFound, "not 3.1"}, // 3.10 is no 3.1
		{"git", "", arm, flox.ErrNotFound, "is there for x86_64-linux, not aarch64-linux"},
		{"broken", "", linux, flox.ErrBadInput, "it is broken"},
		{"gti", "", linux, flox.ErrNotFound, "there is git"},
		{"pyt", "", linux, flox.ErrNotFound, "python3"},
		{"zzzzzz", "", linux, flox.ErrNotFound, "floxctl search"},
		{strings.Repeat("g", 5000), "", linux, flox.ErrNotFound, "floxctl search"},
	} {
		if _, err := c.Find(c2.name, c2.version, c2.system); !errors.Is(err, c2.want) || !strings.Contains(err.Error(), c2.words) {
			t.Errorf("%.20s@%s for %s: %v, want %q", c2.name, c2.version, c2.system, err, c2.words)
		}
	}
}

func TestParseWanted(t *testing.T) {
	t.Parallel()
	known := func(name string) bool { return name == "nixexprs" }
	for word, want := range map[string]string{"git": "|git|", "nixexprs.git@2": "nixexprs|git|2", "tools.jq": "|tools.jq|", "nixexprs.tools.jq": "nixexprs|tools.jq|"} {
		channel, name, version, err := ParseWanted(word, known)
		if got := channel + "|" + name + "|" + version; err != nil || got != want {
			t.Errorf("%s is %s, %v, want %s", word, got, err, want)
		}
	}
	for _, word := range []string{"", "git@", "@2", "a b", "./x", "x#y", "nixexprs."} {
		if _, _, _, err := ParseWanted(word, known); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q: %v", word, err)
		}
	}
}

// Equal catalogues are equal files, however they came about; what is none is refused.
func TestCatalogueFile(t *testing.T) {
	t.Parallel()
	all := []Entry{entry("b", "b", "1", linux), entry("a", "a", "1", linux), entry("a", "a", "1", arm)}
	var x, y bytes.Buffer
	if err := errors.Join(Write(&x, all), Write(&y, []Entry{all[2], all[0], all[1]})); err != nil || !bytes.Equal(x.Bytes(), y.Bytes()) {
		t.Errorf("%v\n%s\n%s", err, &x, &y)
	}
	for _, text := range []string{"{", "nothing\n", `{"attr":3}`, `{"attr":"` + strings.Repeat("a", maxLine) + `"}`} {
		if _, err := Read(strings.NewReader(text)); !errors.Is(err, flox.ErrCorrupt) {
			t.Errorf("%.20s: %v", text, err)
		}
	}
}

// Versions are compared as Nix compares them.
func TestVersionsAreComparedAsNixDoes(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("nix-env"); err != nil {
		t.Skipf("needs stock Nix: %v", err)
	}
	versions := rapid.SliceOfN(rapid.StringMatching(`([0-9]{1,3}|[a-z]{1,3}|pre|[.-]){0,6}`), 200, 200).Example(1)
	versions = append(versions, "1.0", "2.3", "2.3pre1", "2.3pre3", "2.3pre12", "2.3a", "2.3c", "2.3.1", "", "007", "7")
	var pairs []string
	for i, v := range versions {
		pairs = append(pairs, fmt.Sprintf("(builtins.compareVersions %q %q)", v, versions[(i*7+3)%len(versions)]))
	}
	out, err := exec.CommandContext(t.Context(), "nix-instantiate", "--eval", "--strict", "--store", "dummy://", "-E", "["+strings.Join(pairs, " ")+"]").Output()
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Fields(strings.Trim(strings.TrimSpace(string(out)), "[]"))
	if len(want) != len(versions) {
		t.Fatalf("Nix answers %s", out)
	}
	for i, v := range versions {
		other := versions[(i*7+3)%len(versions)]
		if got := fmt.Sprint(CompareVersions(v, other)); got != want[i] {
			t.Errorf("%q and %q: %s, Nix says %s", v, other, got, want[i])
		}
	}
}

// Distance counts what people mistype.
func TestDistance(t *testing.T) {
	t.Parallel()
	for words, want := range map[string]int{"git git": 0, "git gti": 1, "git gitt": 1, "git gt": 1, "git gxt": 1, "ripgrep rpigerp": 2, "abc xyz": 3} {
		x, y, _ := strings.Cut(words, " ")
		if got := distance(x, y); got != want {
			t.Errorf("%s: %d, want %d", words, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		x, y := rapid.StringMatching(`[a-c]{0,6}`).Draw(t, "x"), rapid.StringMatching(`[a-c]{0,6}`).Draw(t, "y")
		if d := distance(x, y); d != distance(y, x) || (d == 0) != (x == y) || d > max(len(x), len(y)) {
			t.Errorf("distance %d of %q and %q", d, x, y)
		}
	})
	if !slices.Equal(distinct([]string{"b", "a", "b"}), []string{"a", "b"}) {
		t.Error("distinct")
	}
}

// A search gives the best of all hits, whatever the limit.
func TestSearchGivesTheBest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 60).Draw(t, "entries")
		var b strings.Builder
		for i := range n {
			name := rapid.StringMatching("[ab]{1,3}").Draw(t, "name")
			fmt.Fprintf(&b, `{"attr":"%s.%d","name":%q,"system":"x"}`+"\n", name, i, name)
		}
		c, err := Read(strings.NewReader(b.String()))
		if err != nil {
			t.Fatal(err)
		}
		term := rapid.StringMatching("[ab]{1,2}").Draw(t, "term")
		all, more := c.Search(term, "", n)
		if more || !slices.IsSortedFunc(all, Better) {
			t.Fatalf("%v, more %v", all, more)
		}
		limit := rapid.IntRange(0, n).Draw(t, "limit")
		got, more := c.Search(term, "", limit)
		if want := all[:min(limit, len(all))]; !slices.Equal(got, want) || more != (len(all) > limit) {
			t.Fatalf("%d of %d: %v, more %v, want %v", limit, len(all), got, more, want)
		}
	})
}
