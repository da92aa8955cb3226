package content

import (
	"context"
	"fmt"
	"sync"

	"github.com/floxctl/flox"
)

// Memory keeps blocks in memory: flox.Blocks and flox.BlockSink for tests and
// small trees. The zero value is ready.
type Memory struct {
	mu     sync.RWMutex
	blocks map[flox.CID][]byte
	bytes  int64
}

// Get gives a block or ErrNotFound.
func (m *Memory) Get(_ context.Context, id flox.CID) ([]byte, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if b, ok := m.blocks[id]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("block %s: %w", id, flox.ErrNotFound)
}

// Put keeps a copy of data. ErrCorrupt if it does not hash to id.
func (m *Memory) Put(_ context.Context, id flox.CID, data []byte) error {
	if Hash(data) != id {
		return fmt.Errorf("put block %s: %d bytes hash to %s: %w", id, len(data), Hash(data), flox.ErrCorrupt)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.blocks == nil {
		m.blocks = make(map[flox.CID][]byte)
	}
	if _, ok := m.blocks[id]; !ok {
		m.blocks[id] = append([]byte(nil), data...)
		m.bytes += int64(len(data))
	}
	return nil
}

// Sync does nothing.
func (m *Memory) Sync(context.Context) error { return nil }

// Len is the number of blocks and the sum of their bytes.
func (m *Memory) Len() (blocks int, bytes int64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return len(m.blocks), m.bytes
}
