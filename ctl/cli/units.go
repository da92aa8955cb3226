package cli

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	flox "github.com/floxctl/flox"
)

// sizeUnits are powers of 1024; an uint64 ends in EiB.
var sizeUnits = []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}

// FormatBytes gives a size in binary units with three digits: "1.36 GiB".
func FormatBytes(n uint64) string {
	if n < 1024 {
		return strconv.FormatUint(n, 10) + " B"
	}
	f, unit := float64(n), 0
	for f >= 1023.5 && unit < len(sizeUnits)-1 {
		f /= 1024
		unit++
	}
	digits := 2
	switch {
	case f >= 99.95:
		digits = 0
	case f >= 9.995:
		digits = 1
	}
	return strconv.FormatFloat(f, 'f', digits, 64) + " " + sizeUnits[unit]
}

// FormatRate gives bytes per second: "12.5 MiB/s".
func FormatRate(n uint64) string { return FormatBytes(n) + "/s" }

// ParseBytes parses "20GiB", "20 GiB", "20G" (binary), "20GB" (decimal), "4096".
func ParseBytes(s string) (uint64, error) {
	bad := fmt.Errorf("size %q: want a number and a unit such as 500MiB, 20GiB or 1TB: %w", s, flox.ErrBadInput)
	digits := strings.TrimSpace(s)
	end := len(digits)
	for end > 0 && (digits[end-1] < '0' || digits[end-1] > '9') {
		end--
	}
	unit := strings.ToLower(strings.TrimSpace(digits[end:]))
	number, err := strconv.ParseFloat(digits[:end], 64)
	if err != nil || number < 0 || math.IsInf(number, 0) || math.IsNaN(number) {
		return 0, bad
	}
	factor := 1.0
	if unit != "" && unit != "b" {
		power := strings.IndexByte("kmgtpe", unit[0])
		base, known := map[string]float64{"": 1024, "ib": 1024, "b": 1000}[unit[1:]]
		if power < 0 || !known {
			return 0, bad
		}
		factor = math.Pow(base, float64(power+1))
	}
	if number*factor >= math.MaxInt64 {
		return 0, bad
	}
	return uint64(number * factor), nil
}

// FormatDuration gives a span in at most two units: "850 ms", "12 s", "3 min 5 s", "2 d 4 h".
func FormatDuration(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + FormatDuration(-d)
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Truncate(100*time.Millisecond).Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return twoUnits(d, time.Minute, "min", time.Second, "s")
	case d < 24*time.Hour:
		return twoUnits(d, time.Hour, "h", time.Minute, "min")
	}
	return twoUnits(d, 24*time.Hour, "d", time.Hour, "h")
}

// twoUnits leaves the smaller unit out when there is nothing of it.
func twoUnits(d, big time.Duration, bigName string, small time.Duration, smallName string) string {
	s := fmt.Sprintf("%d %s", d/big, bigName)
	if rest := d % big / small; rest > 0 {
		s += fmt.Sprintf(" %d %s", rest, smallName)
	}
	return s
}

// FormatCount groups digits: 1,234,567.
func FormatCount(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
