package agent

import (
	"net"
	"net/http"
	"sync"
)

// Connections to the control socket, beside root's: of everybody together, and
// of one user, so that nobody can keep the others out.
const (
	maxClients     = 1024
	maxUserClients = 256
)

// clients counts the connections to the control socket.
type clients struct {
	user func(net.Conn) int // uid at the other end, -1 when unknown

	mu   sync.Mutex
	uids map[net.Conn]int
	open map[int]int // connections by uid
}

func newClients(user func(net.Conn) int) *clients {
	return &clients{user: user, uids: make(map[net.Conn]int), open: make(map[int]int)}
}

// changed is http.Server's ConnState; it closes connections there is no room for.
func (c *clients) changed(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		if !c.enter(conn) {
			_ = conn.Close()
		}
	case http.StateClosed, http.StateHijacked:
		c.leave(conn)
	case http.StateActive, http.StateIdle:
	}
}

func (c *clients) enter(conn net.Conn) bool {
	uid := c.user(conn)
	c.mu.Lock()
	defer c.mu.Unlock()
	if uid != 0 && (len(c.uids)-c.open[0] >= maxClients || c.open[uid] >= maxUserClients) {
		return false
	}
	c.uids[conn] = uid
	c.open[uid]++
	return true
}

func (c *clients) leave(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	uid, entered := c.uids[conn]
	if !entered {
		return
	}
	delete(c.uids, conn)
	if c.open[uid]--; c.open[uid] == 0 {
		delete(c.open, uid)
	}
}
