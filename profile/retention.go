package profile

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

const day = 24 * time.Hour

// missing says of a generation that is not there whether it was.
func missing(g getter, name string, number uint64) error {
	p, err := Find(g, name)
	switch {
	case err != nil:
		return err
	case number == 0 || number > p.GetLast():
		return fmt.Errorf("profile %s has no generation %d, the last is %d; see: floxctl history -p %s: %w", p.GetName(), number, p.GetLast(), p.GetName(), flox.ErrNotFound)
	}
	return fmt.Errorf("generation %d of profile %s was dropped (it keeps %s); see: floxctl history -p %s: %w", number, p.GetName(), Keeps(p), p.GetName(), flox.ErrNotFound)
}

// Keeps says in words which generations of a profile are kept.
func Keeps(p *floxv1.Profile) string {
	keep, days := p.GetKeep(), p.GetDays()
	words := fmt.Sprintf("the newest %d generations and those of the last %d days", keep, days)
	switch {
	case keep == 0 && days == 0:
		return fmt.Sprintf("the newest %d generations, and those with tags", maxGenerations)
	case days == 0:
		words = fmt.Sprintf("the newest %d generations", keep)
	case keep == 0:
		words = fmt.Sprintf("the generations of the last %d days", days)
	}
	return words + ", those with tags, the one that lives, and what that was made on"
}

// generationsOf gives all generations of a profile that are kept, the oldest first,
// without their packages.
func generationsOf(g getter, name string) (all []*floxv1.Generation, err error) {
	var bad error
	err = g.Iterate(append(textKey(generationKey, Folded(name)), 0), nil, func(key, value []byte) bool {
		of := &floxv1.Generation{}
		bad = decode(key, value, of)
		all = append(all, of)
		return bad == nil
	})
	return all, errors.Join(bad, err)
}

func tagged(p *floxv1.Profile, number uint64) bool {
	return slices.ContainsFunc(p.GetTags(), func(t *floxv1.ProfileTag) bool { return t.GetGeneration() == number })
}

// Droppable gives the numbers of the generations of a profile that its retention does not
// keep at a time, the lowest first.
func Droppable(g getter, p *floxv1.Profile, now time.Time) ([]uint64, error) {
	drop, _, _, err := pruned(g, p, now)
	return drop, err
}

// pruned gives what Droppable does, the lowest number that count or age keep, and how many
// below that stay. Without a retention that is what trim passed over.
func pruned(g getter, p *floxv1.Profile, now time.Time) (drop []uint64, first uint64, older uint32, err error) {
	keep, days := uint64(p.GetKeep()), p.GetDays()
	first, older = p.GetFirst(), p.GetOlder()
	all := keep == 0 && days == 0 // of those from first on
	if older == 0 && (all || keep > 0 && p.GetLast()-first < keep) {
		return nil, first, older, nil
	}
	have, err := generationsOf(g, p.GetName())
	if err != nil {
		return nil, 0, 0, err
	}
	young := now.Add(-time.Duration(days) * day).UnixMilli()
	parent := uint64(0)
	kept := len(have) // from here on
	for i, of := range slices.Backward(have) {
		if (!all || of.GetNumber() < first) && uint64(len(have)-i) > keep && (days == 0 || of.GetTimeUnixMs() < young) { //nolint:gosec // not negative
			break
		}
		kept = i
	}
	for _, of := range have {
		if of.GetNumber() == p.GetLive() {
			parent = of.GetParent()
		}
	}
	first, older = p.GetLast()+1, 0
	if kept < len(have) {
		first = have[kept].GetNumber()
	}
	for _, of := range have[:kept] {
		if n := of.GetNumber(); n == p.GetLive() || n == parent || tagged(p, n) {
			older++
		} else {
			drop = append(drop, n)
		}
	}
	return drop, max(first, p.GetFirst()), older, nil
}

// prune forgets what a profile's retention does not keep.
func (a *applying) prune(name string) error {
	p, err := a.profile(name, Owner)
	if err != nil {
		return err
	}
	drop, first, older, err := pruned(a.tx, p, a.at)
	if err != nil {
		return err
	}
	if len(drop) == 0 {
		a.reply.Profile = p
		return nil
	}
	for _, n := range drop {
		if err := a.dropGeneration(p.GetName(), n); err != nil {
			return err
		}
	}
	p.First, p.Older = first, older
	return a.store(p, &floxv1.ProfileEvent{Kind: "dropped", From: p.GetLive(), To: p.GetLive(), Detail: ranges(drop)})
}

// ranges says numbers in words: "generations 1-3, 5".
func ranges(numbers []uint64) string {
	var words []string
	for i := 0; i < len(numbers); {
		end := i
		for end+1 < len(numbers) && numbers[end+1] == numbers[end]+1 {
			end++
		}
		word := fmt.Sprint(numbers[i])
		if end > i {
			word += fmt.Sprint("-", numbers[end])
		}
		words, i = append(words, word), end+1
	}
	if len(words) > maxDescribed {
		words = append(words[:maxDescribed], fmt.Sprintf("and more, %d in all", len(numbers)))
	}
	if len(numbers) == 1 {
		return "generation " + words[0]
	}
	return "generations " + strings.Join(words, ", ")
}

// trim forgets the oldest generations of a profile whose newest one lives, but not those
// with tags, nor, of a profile with a retention, what the newest was made on.
func (a *applying) trim(p *floxv1.Profile, parent uint64) error {
	retained := p.GetKeep() > 0 || p.GetDays() > 0
	for p.GetLast()-p.GetFirst() >= a.maxGenerations {
		if n := p.GetFirst(); tagged(p, n) || retained && n == parent {
			p.Older++
		} else if err := a.dropGeneration(p.GetName(), n); err != nil {
			return err
		}
		p.First++
	}
	return nil
}

// retain says what of a profile is kept.
func (a *applying) retain(c *floxv1.SetRetention) error {
	p, err := a.profile(c.GetProfile(), Owner)
	if err != nil {
		return err
	}
	if c.GetKeep() > maxGenerations || c.GetDays() > maxDays {
		return fmt.Errorf("profile %s: keep %d generations and those of %d days, want at most %d and %d: %w", p.GetName(), c.GetKeep(), c.GetDays(), maxGenerations, maxDays, flox.ErrBadInput)
	}
	p.Keep, p.Days = c.GetKeep(), c.GetDays()
	return a.store(p, &floxv1.ProfileEvent{Kind: "retention", From: p.GetLive(), To: p.GetLive(), Detail: "keeps " + Keeps(p)})
}

// tag gives a generation a name, by which it is kept, or takes a name away.
func (a *applying) tag(c *floxv1.TagGeneration) error {
	p, err := a.profile(c.GetProfile(), Writer)
	if err != nil {
		return err
	}
	if !word(c.GetName()) || strings.Trim(c.GetName(), "0123456789") == "" {
		return fmt.Errorf("profile %s: tag %q: want 1 to 63 letters, digits, '-', '.' and '_', not digits alone: %w", p.GetName(), short(c.GetName()), flox.ErrBadInput)
	}
	at, had := slices.BinarySearchFunc(p.GetTags(), Folded(c.GetName()), func(t *floxv1.ProfileTag, name string) int { return strings.Compare(Folded(t.GetName()), name) })
	was := ""
	switch {
	case c.GetGeneration() == 0 && !had:
		return fmt.Errorf("profile %s has no tag %s: %w", p.GetName(), c.GetName(), flox.ErrNotFound)
	case c.GetGeneration() == 0:
		was = fmt.Sprintf("%s is none of %d any more", c.GetName(), p.GetTags()[at].GetGeneration())
		p.Tags = slices.Delete(p.GetTags(), at, at+1)
		return a.store(p, &floxv1.ProfileEvent{Kind: "tag", From: p.GetLive(), To: p.GetLive(), Detail: was})
	}
	if _, err := ReadEnvironments(a.tx, p.GetName(), c.GetGeneration()); err != nil {
		return err
	}
	if had {
		was = fmt.Sprintf(", before of %d", p.GetTags()[at].GetGeneration())
		p.Tags = slices.Delete(p.GetTags(), at, at+1)
	}
	if len(p.GetTags()) >= maxTags {
		return fmt.Errorf("profile %s has %d tags already: take some away: floxctl profile tag --drop NAME: %w", p.GetName(), len(p.GetTags()), flox.ErrFull)
	}
	p.Tags = slices.Insert(p.GetTags(), at, &floxv1.ProfileTag{Name: c.GetName(), Generation: c.GetGeneration()})
	return a.store(p, &floxv1.ProfileEvent{Kind: "tag", From: p.GetLive(), To: p.GetLive(), Detail: fmt.Sprintf("%s is generation %d%s", c.GetName(), c.GetGeneration(), was)})
}
