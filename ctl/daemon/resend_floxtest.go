//go:build floxtest

package daemon

import "os"

// withoutResend obeys the environment in a program built for tests.
func withoutResend() bool { return os.Getenv("FLOXD_TEST_WITHOUT_RESEND") != "" }
