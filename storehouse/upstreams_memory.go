package storehouse

import (
	"sync"
	"time"
)

// cacheAnswer is what a cache said of a path.
type cacheAnswer struct {
	offer *offer // nil = it does not have it, or nothing that may enter
	err   error
	until time.Time
	cost  int // bytes
}

// answers remembers what a cache said, the newest, for a while.
type answers struct {
	most int // bytes

	mu     sync.Mutex
	known  map[string]cacheAnswer // by hash part, or the id of an output
	order  []string               // of known, the oldest first
	weight int
}

// answerCost is about what an answer takes beside its narinfo.
const answerCost = 256

func newAnswers(most int) *answers { return &answers{most: most, known: map[string]cacheAnswer{}} }

// get gives what is remembered of a path.
func (m *answers) get(hashPart string) (cacheAnswer, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, ok := m.known[hashPart]
	return a, ok && time.Now().Before(a.until)
}

// put remembers an answer for a time.
func (m *answers) put(hashPart string, a cacheAnswer, ttl time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a.until, a.cost = time.Now().Add(ttl), answerCost
	switch {
	case a.offer == nil:
	case a.offer.realised != nil:
		a.cost += 2 * len(a.offer.realised.Marshal())
	default:
		info := a.offer.Info
		a.cost += len(a.offer.URL) + 64*len(info.References) + 128*len(info.Signatures) + len(info.CA)
		for _, sig := range info.Signatures {
			a.cost += len(sig)
		}
	}
	if a.err != nil {
		a.cost += len(a.err.Error())
	}
	if old, ok := m.known[hashPart]; ok {
		m.weight -= old.cost
	} else {
		m.order = append(m.order, hashPart)
	}
	m.known[hashPart] = a
	m.weight += a.cost
	for m.weight > m.most && len(m.order) > 0 {
		oldest := m.order[0]
		m.order = m.order[1:]
		m.weight -= m.known[oldest].cost
		delete(m.known, oldest)
	}
}

// forget forgets everything.
func (m *answers) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.known, m.order, m.weight = map[string]cacheAnswer{}, nil, 0
}
