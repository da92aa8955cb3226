package agent

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	shared "github.com/floxctl/flox/profile"
)

// fixedName is the name of a generation's link.
func (p viewed) fixedName(number uint64) string { return fmt.Sprintf("%s@%d", p.name, number) }

// tagName is the name of a tag's link.
func (p viewed) tagName(tag string) string { return p.name + "@" + tag }

// tag finds a tag by its name in any case; nil = there is none.
func (p viewed) tag(name string) *floxv1.ProfileTag {
	for _, t := range p.GetNews().GetTags() {
		if shared.Folded(t.GetName()) == shared.Folded(name) {
			return t
		}
	}
	return nil
}

// linkTo is where a link leads: the generation that lives, one with a number, or one with
// a tag.
type linkTo struct {
	profile string // without its owner
	number  uint64
	tag     string
}

// splitLink takes NAME@NUMBER and NAME@TAG apart; false: it is no name of a link.
func splitLink(link string) (to linkTo, ok bool) {
	name, text, fixed := strings.Cut(link, "@")
	to.profile = name
	if _, _, err := shared.Split("x/" + name); err != nil {
		return to, false
	}
	switch {
	case !fixed:
		return to, true
	case strings.Trim(text, "0123456789") != "":
		to.tag = text
		_, _, err := shared.Split("x/" + text)
		return to, err == nil
	}
	n, err := strconv.ParseUint(text, 10, 63)
	to.number = n
	return to, err == nil && n > 0 && strconv.FormatUint(n, 10) == text
}

// resolve finds a profile and the generation that a link leads to, 0 = whatever lives.
func (v *view) resolve(ctx context.Context, owner string, to linkTo) (p viewed, number uint64, err error) {
	full := owner + "/" + to.profile
	if number = to.number; to.tag != "" {
		if p, err = v.lookUp(ctx, full, 0); err != nil {
			return viewed{}, 0, err
		}
		if number = p.tag(to.tag).GetGeneration(); number == 0 {
			return viewed{}, 0, fmt.Errorf("profile %s has no tag %s; see: floxctl profile tag -p %s: %w", full, to.tag, full, flox.ErrNotFound)
		}
	}
	p, err = v.lookUp(ctx, full, number)
	return p, number, err
}
