package storehouse

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile"
	cluster "github.com/floxctl/flox/raft"
)

// pruneEvery is how often the leader looks for generations that are not kept any more.
const pruneEvery = 10 * time.Minute

// retain says what of a profile is kept, and drops the rest at once.
func (p *profiles) retain(ctx context.Context, who person, q *floxv1.SetProfileRetentionRequest) (*floxv1.SetProfileRetentionResponse, error) {
	reply, err := p.propose(freeing(ctx), who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Retention{Retention: &floxv1.SetRetention{
		Profile: q.GetName(), Keep: q.GetKeep(), Days: q.GetDays(),
	}}})
	if err == nil {
		reply, err = p.prune(ctx, who, reply.GetProfile().GetName())
	}
	return &floxv1.SetProfileRetentionResponse{Profile: reply.GetProfile()}, err
}

func (p *profiles) prune(ctx context.Context, who person, name string) (*floxv1.ProfilesReply, error) {
	return p.propose(freeing(ctx), who, &floxv1.ProfilesCommand{Command: &floxv1.ProfilesCommand_Prune{Prune: name}})
}

// pruneAll drops what retentions do not keep at a time.
func (p *profiles) pruneAll(ctx context.Context, now time.Time) error {
	var due []string
	err := p.view(ctx, cluster.Local, func(r *cluster.Reader) error {
		var bad error
		err := profile.List(r, "", "", func(of *floxv1.Profile) bool {
			var drop []uint64
			if drop, bad = profile.Droppable(r, of, now); len(drop) > 0 {
				due = append(due, of.GetName())
			}
			return bad == nil && ctx.Err() == nil
		})
		return errors.Join(err, bad)
	})
	for _, name := range due {
		if _, failed := p.prune(ctx, p.s.itself(), name); failed != nil && !errors.Is(failed, flox.ErrNotFound) {
			err = errors.Join(err, fmt.Errorf("profile %s: %w", name, failed))
		}
	}
	return err
}

// pruneLoop drops on the leader what retentions do not keep, until ctx ends.
func (p *profiles) pruneLoop(ctx context.Context) error {
	return p.s.asLeader(ctx, pruneEvery, nil, "drop generations that are not kept any more", p.pruneAll)
}
