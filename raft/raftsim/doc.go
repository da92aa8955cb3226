// Package raftsim runs a cluster of raft.Nodes in a bubble of testing/synctest and
// does to it what goes wrong in real life. It is for tests of raft and of the
// packages whose Processors a cluster applies: no program links it.
//
// It must not know what the commands mean, nor judge a history: that is the part
// of the test that brings them.
package raftsim
