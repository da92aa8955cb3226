// Command loader makes the load of package load on the host it is started on.
package main

import (
	"os"

	"github.com/floxctl/flox/integration/load"
)

func main() { os.Exit(load.Main(os.Stdin, os.Stdout)) }
