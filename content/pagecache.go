package content

import (
	"container/list"
	"context"
	"sync"

	"github.com/floxctl/flox"
)

// DefaultPageCache is how many bytes of pages a PageCache keeps unless told
// otherwise.
const DefaultPageCache = 32 << 20

// PageCache keeps decoded pages of manifests, the least recently used leaving
// first. It is safe for concurrent use.
type PageCache struct {
	mu    sync.Mutex
	max   int64
	bytes int64
	order *list.List // of *cachedPage, the latest used first
	pages map[pageKey]*list.Element
}

// pageKey names a page. Whether a page is well-formed depends on the parameters.
type pageKey struct {
	id     flox.CID
	params Params
}

type cachedPage struct {
	key  pageKey
	page *page
}

// NewPageCache keeps at most maxBytes of pages; 0 means DefaultPageCache. One
// page is kept in any case.
func NewPageCache(maxBytes int64) *PageCache {
	if maxBytes <= 0 {
		maxBytes = DefaultPageCache
	}
	return &PageCache{max: maxBytes, order: list.New(), pages: make(map[pageKey]*list.Element)}
}

// sharedPages is the cache of OpenManifest.
var sharedPages = sync.OnceValue(func() *PageCache { return NewPageCache(0) })

// Open is OpenManifest with pages kept in c.
func (c *PageCache) Open(ctx context.Context, id flox.CID, blocks flox.Blocks) (*Manifest, error) {
	return openManifest(ctx, id, blocks, c)
}

// Bytes is how much memory the pages take.
func (c *PageCache) Bytes() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}

func (c *PageCache) get(key pageKey) *page {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.pages[key]
	if e == nil {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(*cachedPage).page
}

func (c *PageCache) put(key pageKey, g *page) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pages[key] != nil {
		return
	}
	c.pages[key] = c.order.PushFront(&cachedPage{key, g})
	c.bytes += g.bytes()
	for c.bytes > c.max && c.order.Len() > 1 {
		last := c.order.Remove(c.order.Back()).(*cachedPage)
		delete(c.pages, last.key)
		c.bytes -= last.page.bytes()
	}
}
