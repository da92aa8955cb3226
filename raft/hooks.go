package raft

// Hooks are for tests and simulations of crashes (package raftsim); a server has none.
type Hooks struct {
	// Crash ends Run as a kill would: nothing is handed over, waited for or written
	// out. What it brings runs when raft has stopped.
	Crash chan func()
	// SegmentBytes is the size of a file of the log; 0 = the library's default.
	SegmentBytes int
}
