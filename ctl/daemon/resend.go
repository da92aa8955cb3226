//go:build !floxtest

package daemon

// withoutResend makes an agent treat the kernel as one before Linux 6.9. Only a
// program built for tests can be told to (resend_floxtest.go).
func withoutResend() bool { return false }
