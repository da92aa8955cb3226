package raft

import (
	"sync"

	"github.com/hashicorp/raft"
)

// pipeline is raft's pipeline to a follower, which ends when raft stops listening to
// it. Raft reads no further answer behind the first that is not a success (a follower
// that died, say), and raft's own pipeline then holds who sends for ever: the leader never
// sends that follower anything again, and never ends.
type pipeline struct {
	raft.AppendPipeline
	answers chan raft.AppendFuture
	ended   chan struct{}
	end     sync.Once
	pumping sync.WaitGroup
	success func(raft.AppendFuture)
}

// newPipeline has success called with each answer that is one.
func newPipeline(of raft.AppendPipeline, success func(raft.AppendFuture)) *pipeline {
	p := &pipeline{AppendPipeline: of, answers: make(chan raft.AppendFuture), ended: make(chan struct{}), success: success}
	p.pumping.Go(p.pump)
	return p
}

// pump hands answers over, the first that is not a success as the last.
func (p *pipeline) pump() {
	for {
		var f raft.AppendFuture
		select {
		case f = <-p.AppendPipeline.Consumer():
		case <-p.ended:
			return
		}
		last := f.Error() != nil || !f.Response().Success
		if !last {
			p.success(f)
		}
		select {
		case p.answers <- f:
		case <-p.ended:
			return
		}
		if last {
			_ = p.AppendPipeline.Close() // who sends is told
			return
		}
	}
}

// Consumer is raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.answers }

// Close is raft.AppendPipeline.
func (p *pipeline) Close() error {
	p.end.Do(func() { close(p.ended) })
	err := p.AppendPipeline.Close()
	p.pumping.Wait()
	return err
}

// AppendEntriesPipeline implements raft.Transport.
func (s standing) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := s.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	return newPipeline(p, func(f raft.AppendFuture) {
		if f.Response().Term == f.Request().Term {
			s.node.acks.note(id, f.Start())
		}
	}), nil
}
