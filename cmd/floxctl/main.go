// Command floxctl is the command line of the store on this machine.
package main

import (
	"os"

	"github.com/floxctl/flox/ctl"
)

func main() { os.Exit(ctl.Main()) }
