package storehouse

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// shares are places that many want, of which nobody has more than each at once:
// whoever asks for more waits for its own.
type shares struct {
	places chan struct{}
	each   int

	mu   sync.Mutex
	held map[string]*share // of those who have or want a place
}

type share struct {
	places chan struct{}
	users  int
}

func newShares(all, each int) *shares {
	return &shares{places: make(chan struct{}, all), each: each, held: map[string]*share{}}
}

// take waits for a place; leave gives it back.
func (s *shares) take(ctx context.Context, who string) (leave func(), err error) {
	s.mu.Lock()
	own := s.held[who]
	if own == nil {
		own = &share{places: make(chan struct{}, s.each)}
		s.held[who] = own
	}
	own.users++
	s.mu.Unlock()
	forget := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if own.users--; own.users == 0 {
			delete(s.held, who)
		}
	}
	select {
	case own.places <- struct{}{}:
	case <-ctx.Done():
		forget()
		return nil, ctx.Err()
	}
	select {
	case s.places <- struct{}{}:
		return func() { <-s.places; <-own.places; forget() }, nil
	case <-ctx.Done():
		<-own.places
		forget()
		return nil, ctx.Err()
	}
}

// clientOf names who makes a request: its address, without the port.
func clientOf(r *http.Request) string { return hostOf(r.RemoteAddr) }

func hostOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	return host
}

// atMost closes connections beyond so many, and beyond so many of one address.
func atMost(most, each int) func(net.Conn, http.ConnState) {
	var mu sync.Mutex
	open, of := 0, map[string]int{}
	return func(conn net.Conn, state http.ConnState) {
		who := ""
		if a := conn.RemoteAddr(); a != nil {
			who = hostOf(a.String())
		}
		mu.Lock()
		defer mu.Unlock()
		switch state {
		case http.StateNew:
			open++
			if of[who]++; open > most || of[who] > each {
				_ = conn.Close() // counted until the server notices
			}
		case http.StateClosed, http.StateHijacked:
			open--
			if of[who]--; of[who] == 0 {
				delete(of, who)
			}
		case http.StateActive, http.StateIdle:
		}
	}
}
