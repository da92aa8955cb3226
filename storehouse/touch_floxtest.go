//go:build floxtest

package storehouse

import (
	"os"
	"time"
)

// touchTold obeys the environment in a program built for tests: all servers of a
// storehouse must be told the same.
func touchTold() time.Duration {
	d, err := time.ParseDuration(os.Getenv("FLOXD_TEST_TOUCH_EVERY"))
	if err != nil {
		return 0
	}
	return d
}
