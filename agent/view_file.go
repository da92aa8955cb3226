package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"

	"google.golang.org/protobuf/proto"

	flox "github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/content"
	shared "github.com/floxctl/flox/profile"
)

// What is shown is in two files, each the hash of the rest, then floxv1.ToldProfiles. One
// is written with each change, and survives this process; the other a moment later, so
// that it survives a power cut as well.
const (
	viewFile    = "shared-profiles"
	viewDurable = ".durable"
)

// load reads what an earlier process was told. What is damaged, or of another invite, is as
// good as nothing: it is told again.
func (v *view) load() {
	for _, file := range []string{v.file, v.file + viewDurable} {
		s, err := v.read(file)
		if err == nil {
			v.now.Store(s)
			return
		}
		if !errors.Is(err, fs.ErrNotExist) {
			v.log.Warn("what is kept of profiles is not used; the storehouse tells it again", "file", file, "error", err)
		}
	}
}

func (v *view) read(file string) (*viewState, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if len(b) < flox.CIDSize || flox.CID(b[:flox.CIDSize]) != content.Hash(b[flox.CIDSize:]) {
		return nil, fmt.Errorf("it was written half, or rotted: %w", flox.ErrCorrupt)
	}
	kept := &floxv1.ToldProfiles{}
	if err := proto.Unmarshal(b[flox.CIDSize:], kept); err != nil {
		return nil, fmt.Errorf("%w: %w", err, flox.ErrCorrupt)
	}
	if !bytes.Equal(kept.GetInvite(), v.invite) {
		return nil, fmt.Errorf("it is of another invite: %w", flox.ErrBadInput)
	}
	s := &viewState{index: kept.GetIndex(), epoch: kept.GetEpoch(), users: kept.GetUsers(), labels: kept.GetLabels(), profiles: make(map[string]viewed)}
	for _, k := range kept.GetProfiles() {
		p, err := asViewed(k)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, flox.ErrCorrupt)
		}
		s.profiles[shared.Folded(k.GetNews().GetName())] = p
	}
	return s, nil
}

// write keeps a state.
func (v *view) write(s *viewState, durable bool) error {
	kept := &floxv1.ToldProfiles{Invite: v.invite, Epoch: s.epoch, Index: s.index, Users: s.users, Labels: s.labels}
	for _, key := range slices.Sorted(maps.Keys(s.profiles)) {
		kept.Profiles = append(kept.Profiles, s.profiles[key].ToldProfile)
	}
	b, err := proto.Marshal(kept)
	if err != nil {
		return err
	}
	file := v.file
	if durable {
		file += viewDurable
	}
	sum := content.Hash(b)
	return replaceFile(file, append(sum[:], b...), 0o600, durable)
}
