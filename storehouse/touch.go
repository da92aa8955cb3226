//go:build !floxtest

package storehouse

import "time"

// touchTold is what the environment says instead of touchEvery; 0 = nothing. Only a
// program built for tests can be told (touch_floxtest.go).
func touchTold() time.Duration { return 0 }
