package main

import "testing"

func TestIntervalHoldsTheMedianAndNarrows(t *testing.T) {
	var few, many []float64
	for i := range 1000 {
		x := 1 + float64(i%100)/1000 // 1.000 to 1.099
		many = append(many, x)
		if i < 100 && i%10 == 0 {
			few = append(few, x)
		}
	}
	low, high := interval(many)
	if low > 1.05 || high < 1.05 || high-low > 0.01 {
		t.Errorf("of many: %.3f to %.3f, want closely around 1.05", low, high)
	}
	fewLow, fewHigh := interval(few)
	if fewHigh-fewLow <= high-low {
		t.Errorf("of few: %.3f to %.3f, want wider than %.3f to %.3f", fewLow, fewHigh, low, high)
	}
	if low, high := interval([]float64{2, 2, 2}); low != 2 || high != 2 {
		t.Errorf("of one value: %v to %v", low, high)
	}
}

func TestPairsRatioIsOfPairs(t *testing.T) {
	var p pairs
	for _, x := range []float64{1, 10, 100} { // a machine that got slower: both did
		p.add(2*x, x)
	}
	if r := p.row("x", "s", "y"); r.Ratio != 2 || r.Ours != 20 || r.Peer != 10 || r.Rounds != 3 {
		t.Errorf("got %+v", r)
	}
}
