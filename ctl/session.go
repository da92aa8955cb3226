package ctl

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// sessionFacts is the profile that a session was started with, see envProfile.
type sessionFacts struct {
	Profile    string `json:"profile"`
	Generation uint64 `json:"generation"` // 0: it follows the profile
	Live       uint64 `json:"live"`       // that lives now; 0: not known
}

// thisSession is the session that this process runs in, nil for none.
func thisSession() *sessionFacts {
	name, number, fixed := strings.Cut(os.Getenv(envProfile), "@")
	if name == "" {
		return nil
	}
	s := &sessionFacts{Profile: name}
	if fixed {
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			return nil // somebody else's words
		}
		s.Generation = n
	}
	return s
}

// askSession is thisSession, with what lives as far as the agent knows.
func askSession(ctx context.Context, g *globals) *sessionFacts {
	s := thisSession()
	if s == nil {
		return nil
	}
	resp, err := g.agent().ShownProfiles(ctx, connect.NewRequest(&floxv1.ShownProfilesRequest{Name: s.Profile}))
	if err == nil && len(resp.Msg.GetProfiles()) == 1 {
		s.Live = resp.Msg.GetProfiles()[0].GetGeneration()
	}
	return s
}

// words says what the session has, and what is there.
func (s *sessionFacts) words() string {
	name := clean(s.Profile)
	switch {
	case s.Generation == 0:
		return fmt.Sprintf("%s, whatever lives; now %d", name, s.Live)
	case s.Live == 0 || s.Live == s.Generation:
		return fmt.Sprintf("%s@%d", name, s.Generation)
	}
	return fmt.Sprintf("%s@%d; %d is there: floxctl activate -p %s", name, s.Generation, s.Live, name)
}
