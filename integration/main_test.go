// Package integration runs the real floxd and floxctl, with a real FUSE, a real
// Nix and hosts of their own, through the main job and through bad days.
//
// It must not know how anything is done: what it asserts is what a user, an
// administrator or a program on one of the hosts can see.
package integration

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(touchEnv) != "" {
		touchMain()
		os.Exit(0)
	}
	if text := os.Getenv(knockEnv); text != "" {
		knockMain(text)
		os.Exit(0)
	}
	flag.Parse()
	profiles := lookForMountPoint()
	if code, done := halved(); done {
		if err := profiles.remove(); err != nil {
			fmt.Fprintln(os.Stderr, "integration:", err)
			code = 1
		}
		os.Exit(code)
	}
	code := m.Run()
	err := errors.Join(shared.close(), profiles.remove())
	if code == 0 {
		err = errors.Join(err, goleak.Find())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	os.Exit(code)
}
