package cli

import "fmt"

// Owner is a process that holds a port.
type Owner struct {
	PID     int    // 0 = not visible to us
	Command string // its short name
}

// String says what is known: of others' processes only root may see the name.
func (o Owner) String() string {
	if o.PID == 0 {
		return "a process of another user (sudo shows which)"
	}
	return fmt.Sprintf("%s (pid %d)", o.Command, o.PID)
}
