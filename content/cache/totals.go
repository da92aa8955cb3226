package cache

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/cockroachdb/pebble/v2"

	"github.com/floxctl/flox"
)

// totals are sums over the records.
type totals struct {
	own    int64 // bytes in own files
	files  int64 // segments that are not blocks
	blocks int64
	kept   int64 // bytes
}

func (t *totals) add(o totals) {
	t.own += o.own
	t.files += o.files
	t.blocks += o.blocks
	t.kept += o.kept
}

// replace adds the difference between a segment's old and new content.
func (t *totals) replace(old, next *content) {
	for i, ct := range []*content{old, next} {
		if ct == nil || ct.object == 0 {
			continue
		}
		sign := int64(2*i - 1)
		if !ct.packed {
			t.own += sign * ct.charge()
		}
		if ct.kept {
			t.kept += sign * ct.charge()
		}
		if ct.block {
			t.blocks += sign
		} else {
			t.files += sign
		}
	}
}

func (t totals) append(b []byte) []byte {
	for _, v := range []int64{t.own, t.files, t.blocks, t.kept} {
		b = binary.AppendVarint(b, v)
	}
	return b
}

func readTotals(b []byte) (t totals, err error) {
	for _, v := range []*int64{&t.own, &t.files, &t.blocks, &t.kept} {
		n := 0
		if *v, n = binary.Varint(b); n <= 0 {
			return totals{}, fmt.Errorf("totals in the cache's index: %w", flox.ErrCorrupt)
		}
		b = b[n:]
	}
	return t, nil
}

// totalsMerger adds totals; addition does not mind the order.
type totalsMerger struct{ sum totals }

func mergeTotals(_, value []byte) (pebble.ValueMerger, error) {
	m := &totalsMerger{}
	return m, m.MergeNewer(value)
}

func (m *totalsMerger) MergeNewer(value []byte) error {
	t, err := readTotals(value)
	m.sum.add(t)
	return err
}

func (m *totalsMerger) MergeOlder(value []byte) error { return m.MergeNewer(value) }

func (m *totalsMerger) Finish(bool) ([]byte, io.Closer, error) {
	return m.sum.append(nil), nil, nil
}
