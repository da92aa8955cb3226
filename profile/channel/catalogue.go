package channel

import (
	"bufio"
	"cmp"
	"container/heap"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// Bounds of a catalogue that is read.
const (
	maxEntries  = 1_000_000
	maxLine     = 64 << 10 // bytes
	maxResults  = 1000
	maxNear     = 5 // names that are suggested
	maxDistance = 2 // letters by which they differ
	maxNearName = 64
)

// Entry is what can be installed on one system.
type Entry struct {
	Attr        string   `json:"attr"` // names in the expression, joined by dots
	Name        string   `json:"name"`
	Version     string   `json:"version,omitempty"`
	Description string   `json:"description,omitempty"`
	System      string   `json:"system"`
	Drv         string   `json:"drv,omitempty"`     // base name
	Outputs     []string `json:"outputs,omitempty"` // to be installed
	Paths       []string `json:"paths,omitempty"`   // of Outputs, base names; "" = known when it is built
	Priority    *uint32  `json:"priority,omitempty"`
	Error       string   `json:"error,omitempty"` // why it cannot be installed; then the rest is missing
}

// Write writes a catalogue: an entry a line, in the order of attributes and systems, so
// that equal catalogues are equal files.
func Write(w io.Writer, entries []Entry) error {
	sorted := slices.SortedFunc(slices.Values(entries), func(x, y Entry) int {
		return cmp.Or(strings.Compare(x.Attr, y.Attr), strings.Compare(x.System, y.System))
	})
	b := bufio.NewWriter(w)
	e := json.NewEncoder(b)
	e.SetEscapeHTML(false)
	for i := range sorted {
		if err := e.Encode(&sorted[i]); err != nil {
			return err
		}
	}
	return b.Flush()
}

// Catalogue is what one version of a channel has.
type Catalogue struct {
	entries []Entry  // in the order of attributes
	folded  []string // name, attribute and description of each, in small letters
	Size    int      // bytes of memory, about
}

// Read reads a catalogue. ErrCorrupt.
func Read(r io.Reader) (*Catalogue, error) {
	c := &Catalogue{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var e Entry
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("catalogue, line %d: want a package: %w: %w", len(c.entries)+1, err, flox.ErrCorrupt)
		}
		if len(c.entries) == maxEntries {
			return nil, fmt.Errorf("catalogue of more than %d packages: %w", maxEntries, flox.ErrCorrupt)
		}
		c.entries = append(c.entries, e)
		c.folded = append(c.folded, strings.ToLower(e.Name+"\n"+e.Attr+"\n"+e.Description))
		c.Size += 3*len(lines.Bytes()) + 300
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("catalogue, line %d: %w: %w", len(c.entries)+1, err, flox.ErrCorrupt)
	}
	return c, nil
}

// Len is how many entries it has.
func (c *Catalogue) Len() int { return len(c.entries) }

// Hit is an entry that a search found, and how good it is: 0 is best.
type Hit struct {
	*Entry
	Score int
}

// Search gives the entries for a system ("" = any) in which every word of a term occurs,
// best first: a name that is the term, one that begins with it, one that has it, an
// attribute, a description. At most limit are given, and whether there are more.
func (c *Catalogue) Search(term, system string, limit int) (hits []Hit, more bool) {
	words := strings.Fields(strings.ToLower(term))
	limit = max(0, min(limit, maxResults))
	best := make(best, 0, limit)
	for i := range c.entries {
		e := &c.entries[i]
		if e.Error != "" || system != "" && e.System != system {
			continue
		}
		score, ok := rate(c.folded[i], words)
		if !ok {
			continue
		}
		if hit := (Hit{e, score}); len(best) < limit {
			heap.Push(&best, hit)
		} else if more = true; limit > 0 && Better(hit, best[0]) < 0 {
			best[0] = hit
			heap.Fix(&best, 0)
		}
	}
	slices.SortFunc(best, Better)
	return best, more
}

// best is a heap of hits with the worst of them at its top.
type best []Hit

// Len is heap.Interface.
func (b *best) Len() int { return len(*b) }

// Less is heap.Interface.
func (b *best) Less(i, j int) bool { return Better((*b)[i], (*b)[j]) > 0 }

// Swap is heap.Interface.
func (b *best) Swap(i, j int) { (*b)[i], (*b)[j] = (*b)[j], (*b)[i] }

// Push is heap.Interface.
func (b *best) Push(x any) { *b = append(*b, x.(Hit)) }

// Pop is heap.Interface.
func (b *best) Pop() any {
	last := (*b)[len(*b)-1]
	*b = (*b)[:len(*b)-1]
	return last
}

// Better orders hits: of one catalogue, no two are equal.
func Better(x, y Hit) int {
	return cmp.Or(x.Score-y.Score, len(x.Name)-len(y.Name), strings.Compare(x.Attr, y.Attr), strings.Compare(x.System, y.System))
}

// rate says how well the words fit an entry.
func rate(folded string, words []string) (score int, ok bool) {
	name, rest, _ := strings.Cut(folded, "\n")
	attr, description, _ := strings.Cut(rest, "\n")
	for _, w := range words {
		switch {
		case name == w || attr == w:
		case strings.HasPrefix(name, w):
			score++
		case strings.Contains(name, w):
			score += 2
		case strings.Contains(attr, w):
			score += 3
		case strings.HasPrefix(description, w) || strings.Contains(description, " "+w):
			score += 4
		case strings.Contains(description, w):
			score += 5
		default:
			return 0, false
		}
	}
	return score, true
}

// Find gives the entry that a name means on a system: its attribute, else its name; of
// several with that name the newest. version "" = any; 3.11 means 3.11.2, too. Errors:
// ErrNotFound, with names that are nearly so, versions or systems that are there;
// ErrBadInput if it cannot be evaluated.
func (c *Catalogue) Find(name, version, system string) (*Entry, error) {
	var best *Entry
	var versions, systems []string
	for i := range c.entries {
		e := &c.entries[i]
		if e.Attr != name && (e.Name != name || e.Error != "") {
			continue
		}
		if e.System != system {
			systems = append(systems, e.System)
			continue
		}
		if !hasVersion(e.Version, version) {
			versions = append(versions, e.Version)
			continue
		}
		if best == nil || e.Attr == name || best.Attr != name && CompareVersions(e.Version, best.Version) > 0 {
			best = e
		}
	}
	switch {
	case best != nil && best.Error != "":
		return nil, fmt.Errorf("%s for %s cannot be evaluated: %s: %w", name, system, best.Error, flox.ErrBadInput)
	case best != nil:
		return best, nil
	case len(versions) > 0:
		return nil, fmt.Errorf("%s is there as %s, not %s: %w", name, strings.Join(distinct(versions), ", "), version, flox.ErrNotFound)
	case len(systems) > 0:
		return nil, fmt.Errorf("%s is there for %s, not %s: %w", name, strings.Join(distinct(systems), ", "), system, flox.ErrNotFound)
	}
	return nil, &UnknownError{Name: name, Near: c.near(name)}
}

// UnknownError says that no package has a name. It is ErrNotFound.
type UnknownError struct {
	Name string
	Near []string // names that are nearly so
}

// Error says it.
func (e *UnknownError) Error() string {
	if len(e.Near) == 0 {
		return fmt.Sprintf("there is no package %.80s; see: floxctl search", e.Name)
	}
	return fmt.Sprintf("there is no package %.80s; there is %s", e.Name, strings.Join(e.Near, ", "))
}

// Unwrap is what errors.Is asks for.
func (e *UnknownError) Unwrap() error { return flox.ErrNotFound }

func distinct(words []string) []string {
	slices.Sort(words)
	return slices.Compact(words)
}

// near gives attributes and names that differ little from a name.
func (c *Catalogue) near(name string) []string {
	type found struct {
		name     string
		distance int
	}
	if name = strings.ToLower(name); len(name) > maxNearName {
		return nil
	}
	var all []found
	seen := map[string]bool{}
	for i := range c.entries {
		e := &c.entries[i]
		for _, is := range []string{e.Attr, e.Name} {
			if seen[is] || is == "" || e.Error != "" {
				continue
			}
			seen[is] = true
			d, most := maxDistance+1, min(maxDistance, len(name)/2)
			if len(is) <= len(name)+maxDistance && len(is) >= len(name)-maxDistance {
				d = distance(name, strings.ToLower(is))
			}
			if d > maxDistance && strings.HasPrefix(strings.ToLower(is), name) {
				d = most // what was typed is its beginning
			}
			if d <= most {
				all = append(all, found{is, d})
			}
		}
	}
	slices.SortFunc(all, func(x, y found) int { return cmp.Or(x.distance-y.distance, strings.Compare(x.name, y.name)) })
	var names []string
	for _, f := range all[:min(len(all), maxNear)] {
		names = append(names, f.name)
	}
	return names
}

// distance is in how many letters two words differ: changed, left out, put in, or two
// swapped (optimal string alignment).
func distance(x, y string) int {
	before, last, row := make([]int, len(y)+1), make([]int, len(y)+1), make([]int, len(y)+1)
	for j := range last {
		last[j] = j
	}
	for i := 1; i <= len(x); i++ {
		row[0] = i
		for j := 1; j <= len(y); j++ {
			cost := 1
			if x[i-1] == y[j-1] {
				cost = 0
			}
			row[j] = min(last[j]+1, row[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && x[i-1] == y[j-2] && x[i-2] == y[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(y)]
}

// CompareVersions orders versions as Nix's builtins.compareVersions does: negative if x
// comes before y.
func CompareVersions(x, y string) int {
	for x != "" || y != "" {
		var p, q string
		p, x = component(x)
		q, y = component(y)
		if p == q {
			continue
		}
		if before(p, q) {
			return -1
		}
		if before(q, p) {
			return 1
		}
	}
	return 0
}

// component cuts the first component off a version: digits, or what is none and no separator.
func component(s string) (first, rest string) {
	s = strings.TrimLeft(s, ".-")
	digit := func(c byte) bool { return c >= '0' && c <= '9' }
	n := 0
	for n < len(s) && s[n] != '.' && s[n] != '-' && digit(s[n]) == digit(s[0]) {
		n++
	}
	return s[:n], s[n:]
}

// before is Nix's componentsLT: numbers by value, "" before numbers, "pre" before all.
func before(p, q string) bool {
	numeric := func(s string) bool { return s != "" && s[0] >= '0' && s[0] <= '9' }
	switch {
	case numeric(p) && numeric(q):
		p, q = strings.TrimLeft(p, "0"), strings.TrimLeft(q, "0")
		return len(p) < len(q) || len(p) == len(q) && p < q
	case p == "" && numeric(q):
		return true
	case p == "pre" && q != "pre":
		return true
	case q == "pre":
		return false
	case numeric(q):
		return true
	case numeric(p):
		return false
	}
	return p < q
}

// ParseWanted tells what a word means that names a package: [CHANNEL.]NAME[@VERSION],
// where known says which channels there are. ErrBadInput.
func ParseWanted(word string, known func(channel string) bool) (channel, name, version string, err error) {
	name, version, at := strings.Cut(word, "@")
	if first, rest, ok := strings.Cut(name, "."); ok && known(first) {
		channel, name = first, rest
	}
	if name == "" || at && version == "" || strings.ContainsAny(word, " /#\n") {
		return "", "", "", fmt.Errorf("package %.80q: want NAME, NAME@VERSION or CHANNEL.NAME: %w", word, flox.ErrBadInput)
	}
	return channel, name, version, nil
}
