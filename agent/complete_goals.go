package agent

import (
	"context"
	"maps"
	"slices"

	flox "github.com/floxctl/flox"
)

// phase is the order in which things are completed.
type phase int

const (
	phaseFiles   phase = iota // what ran or is mapped
	phaseNames                // facts and manifests of closures: looking up a library needs them
	phaseTrees                // the rest of the paths of programs, then of libraries
	phaseLinks                // what the files of programs' paths lead to
	phaseClosure              // closures, where somebody wants them
	phases
)

// Bounds of what is completed of what somebody only used.
//
// maxTree is the largest store path that is completed because a part of it was
// used, in bytes; and at most an eighth of the cache.
const maxTree = 512 << 20

// scope is what of a store path is wanted.
type scope uint8

const (
	scopeFiles scope = iota // some files
	scopeNames              // facts and manifests of its closure
	scopeTree               // all of it
)

// goal is something that is to be here whole.
type goal struct {
	path  flox.StorePath
	scope scope
	files []uint32       // of scopeFiles
	owner flox.StorePath // the path, used or kept, for whose sake; or that profile's name in the cache
	kept  bool           // the owner is kept
	links bool           // files are what the owner's files lead to
	not   string         // why it is not fetched all the same; "" = it is
}

// goalKey names what of a goal is looked for.
type goalKey struct {
	path   flox.StorePath
	scope  scope
	files  int            // files are only ever added
	linked flox.StorePath // where from, if it is links
}

func (g goal) key() goalKey {
	k := goalKey{path: g.path, scope: g.scope, files: len(g.files)}
	if g.links {
		k.linked = g.owner
	}
	return k
}

// wanted reports whether a goal is to be fetched.
func (g goal) wanted() bool { return g.not == "" }

// wishes are who wants what, as of one moment.
type wishes struct {
	ran      []ranPath
	changes  uint64   // of what ran, as of then
	kept     []string // store paths that are kept
	profiles map[string]profile
	policies map[string]string // of kept paths, and of those that profiles lead to
	standard string            // policy of what is not kept
	off      string            // why nothing is fetched
}

// policy is that of a path which was used here.
func (w *wishes) policy(p flox.StorePath) string {
	if policy, ok := w.policies[string(p)]; ok {
		return policy
	}
	return w.standard
}

func (c *completer) wishes(ctx context.Context) (*wishes, error) {
	w := &wishes{standard: c.a.cfg.Offline, off: c.off()}
	w.ran, w.changes = c.ran.list()
	kept, err := c.a.keptOwners(ctx)
	if err != nil {
		return nil, err
	}
	w.kept = slices.Sorted(maps.Keys(kept))
	w.policies = make(map[string]string, len(w.kept))
	for _, o := range w.kept {
		w.policies[o] = c.policies.of(o).Policy
	}
	w.profiles = c.a.profiles.list()
	c.lead(w)
	return w, nil
}

// generosity orders the policies: of several profiles that lead to a path the one
// counts that brings most of it.
var generosity = map[string]int{policyNone: 1, policyUsed: 2, policyClosure: 3}

// lead adds the policies of what profiles lead to. What somebody said of a path
// itself stands.
func (c *completer) lead(w *wishes) {
	led := make(map[string]string)
	for _, p := range w.profiles {
		for _, member := range c.closure(p.Path) {
			if m := string(member); generosity[p.Policy] > generosity[led[m]] {
				led[m] = p.Policy
			}
		}
	}
	for m, policy := range led {
		if _, said := w.policies[m]; !said {
			w.policies[m] = policy
		}
	}
}

// allowance is how many bytes may be completed without anybody having asked: half
// of what the cache may hold, so that what is completed never pushes itself out.
type allowance struct{ each, left uint64 }

func (c *completer) allowance() *allowance {
	limit := uint64(max(c.a.cache.Usage().Limit, 0))
	return &allowance{each: min(maxTree, limit/8), left: limit / 2}
}

// take counts n bytes in; it says why not if they are too many. Of who wants the
// closure any single path may be large.
func (a *allowance) take(n uint64, policy string) string {
	switch {
	case n > a.each && policy != policyClosure:
		return "it is large; floxctl keep --offline closure brings it here whole"
	case n > a.left:
		return "the cache is too small for all that is used here"
	}
	a.left -= n
	return ""
}

// goals lists what of a phase is to be fetched, in its order.
func (c *completer) goals(ctx context.Context, ph phase) ([]goal, error) {
	w, err := c.wishes(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(c.goalsOf(ctx, w, ph, c.links), func(g goal) bool { return !g.wanted() }), nil
}

// goalsOf lists all goals of a phase, with those that are not to be fetched.
func (c *completer) goalsOf(ctx context.Context, w *wishes, ph phase, links linksFunc) []goal {
	var out []goal
	switch ph {
	case phaseFiles:
		for _, r := range w.ran {
			out = append(out, goal{path: r.Path, scope: scopeFiles, files: r.Files, owner: r.Path})
		}
	case phaseNames:
		for _, r := range c.tops(w, func(r ranPath) bool { return r.Program || w.policy(r.Path) == policyClosure }) {
			out = append(out, goal{path: r.Path, scope: scopeNames, owner: r.Path})
		}
		c.eachWhole(w, func(owner, p flox.StorePath) {
			out = append(out, goal{path: p, scope: scopeNames, owner: owner, kept: true})
		})
	case phaseTrees:
		out, _ = c.treeGoals(w)
	case phaseLinks:
		_, allowed := c.treeGoals(w)
		out = c.linkGoals(ctx, w, allowed, links)
	case phaseClosure:
		c.eachWhole(w, func(owner, p flox.StorePath) {
			for _, member := range c.closure(p) {
				out = append(out, goal{path: member, scope: scopeTree, owner: owner, kept: true})
			}
		})
		out = append(out, c.closureGoals(w)...)
	}
	w.forbid(out)
	return out
}

// forbid says of goals that must not be fetched why not.
func (w *wishes) forbid(goals []goal) {
	for i, g := range goals {
		switch {
		case w.off != "":
			goals[i].not = w.off
		case !g.kept && (w.policy(g.owner) == policyNone || w.policy(g.path) == policyNone):
			goals[i].not = "switched off: its offline policy is none"
		}
	}
}

// eachWhole calls yield with every path that an owner wants with its closure.
func (c *completer) eachWhole(w *wishes, yield func(owner, p flox.StorePath)) {
	for _, o := range w.kept {
		if w.policies[o] != policyClosure {
			continue
		}
		for _, p := range c.policies.of(o).Paths {
			yield(flox.StorePath(o), p)
		}
	}
	for _, link := range slices.Sorted(maps.Keys(w.profiles)) {
		if p := w.profiles[link]; p.Policy == policyClosure {
			yield(flox.StorePath(profileOwner(link)), p.Path)
		}
	}
}

// treeGoals are whole paths that were used: those of programs first, newest
// first; and what is left of the allowance.
func (c *completer) treeGoals(w *wishes) (out []goal, allowed *allowance) {
	allowed = c.allowance()
	for _, program := range []bool{true, false} {
		for _, r := range w.ran {
			info, ok := c.a.facts.get(r.Path.HashPart())
			if !ok || r.Program != program {
				continue
			}
			g := goal{path: r.Path, scope: scopeTree, owner: r.Path}
			if w.policies[string(r.Path)] != policyClosure { // else it was asked for
				g.not = allowed.take(info.NarSize, w.policy(r.Path))
			}
			out = append(out, g)
		}
	}
	return out, allowed
}

// linksFunc gives where the files of a path lead.
type linksFunc func(context.Context, flox.StorePath) *linked

// linkGoals are the files of other paths that those of programs lead to. What
// would be too much is left out without a word: nobody asked for it.
func (c *completer) linkGoals(ctx context.Context, w *wishes, allowed *allowance, links linksFunc) []goal {
	var out []goal
	taken := make(map[flox.StorePath]bool)
	for _, r := range w.ran {
		if !r.Program || w.policy(r.Path) != policyUsed {
			continue
		}
		l := links(ctx, r.Path)
		for _, p := range slices.Sorted(maps.Keys(l.files)) {
			if !taken[p] && allowed.take(l.bytes[p], policyUsed) != "" {
				continue
			}
			taken[p] = true
			out = append(out, goal{path: p, scope: scopeFiles, files: l.files[p], owner: r.Path, links: true})
		}
	}
	return out
}

// closureGoals are the closures of what was used, where that is the policy.
func (c *completer) closureGoals(w *wishes) []goal {
	var out []goal
	allowed := c.allowance()
	verdicts := make(map[flox.StorePath]string) // closures share most of what they have
	for _, r := range c.tops(w, func(r ranPath) bool { return w.policy(r.Path) == policyClosure }) {
		for _, member := range c.closure(r.Path) {
			not, seen := verdicts[member]
			if info, ok := c.a.facts.get(member.HashPart()); ok && !seen {
				not = allowed.take(info.NarSize, policyClosure)
				verdicts[member] = not
			}
			out = append(out, goal{path: member, scope: scopeTree, owner: r.Path, not: not})
		}
	}
	return out
}

// tops are the used paths that are wanted with their closures. A library is in the
// closure of the program that maps it, as a rule: then its own adds nothing, and
// thousands of libraries would be thousands of closures.
func (c *completer) tops(w *wishes, wanted func(ranPath) bool) (out []ranPath) {
	var covered map[flox.StorePath]bool
	for _, r := range w.ran { // programs first
		if !wanted(r) {
			continue
		}
		if !r.Program && covered == nil {
			covered = make(map[flox.StorePath]bool)
			for _, program := range out {
				if w.policy(program.Path) == policyNone {
					continue
				}
				for _, member := range c.closure(program.Path) {
					covered[member] = true
				}
			}
		}
		if r.Program || !covered[r.Path] {
			out = append(out, r)
		}
	}
	return out
}

// closure is p and what it refers to, as far as it is known here. Facts never
// change, so what is complete is remembered.
func (c *completer) closure(p flox.StorePath) []flox.StorePath {
	c.mu.Lock()
	members, ok := c.closures[p]
	c.mu.Unlock()
	if ok {
		return members
	}
	members = c.a.knownClosure([]flox.StorePath{p})
	for _, m := range members {
		if _, known := c.a.facts.get(m.HashPart()); !known && !c.a.onlyStaged(m) {
			return members
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.closures) >= maxRan*4 {
		clear(c.closures)
	}
	c.closures[p] = members
	return members
}
