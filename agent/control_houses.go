package agent

import (
	"fmt"
	"slices"
	"strings"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/p2p"
)

// houseServers lists the servers of the storehouse as people are told of them.
func (a *Agent) houseServers(l link) (list []*floxv1.HouseServer) {
	where := a.members.houses()
	for _, id := range a.houses.order() {
		at := slices.IndexFunc(where, func(p p2p.PeerAddr) bool { return p.ID == id })
		if at < 0 {
			continue // it came or went this moment
		}
		_, connected := a.late.reach(id)
		list = append(list, &floxv1.HouseServer{
			PeerId: string(id), Name: a.members.member(id).GetName(), Connected: connected,
			Followed: l.connected && id == l.house, Addrs: where[at].Addrs,
		})
	}
	return list
}

// whereHouses says in words where the servers of the storehouse are.
func (a *Agent) whereHouses() string {
	var words []string
	for _, p := range a.members.houses() {
		name := a.members.member(p.ID).GetName()
		if name != "" {
			name += " "
		}
		words = append(words, fmt.Sprintf("%sat %s", name, strings.Join(p.Addrs, " ")))
	}
	return strings.Join(words, ", ")
}

// count is how many machines the list holds, 0 before there is one.
func (l *memberList) count() uint64 { return uint64(len(l.now.Load().machines)) }
