package room

import "syscall"

// Exec replaces this process by the command. It returns only with an error.
func (c Command) Exec() error { return syscall.Exec(c.File, c.Args, c.Env) }
