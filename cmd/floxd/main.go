// Command floxd is every program of the system that stays running: agent,
// storehouse, or both at once.
package main

import (
	"os"

	"github.com/floxctl/flox/ctl/daemon"
)

func main() { os.Exit(daemon.Main()) }
