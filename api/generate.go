// Package api holds the definitions machines and programs talk by: the commands
// of the replicated log, the calls between machines, and the agent's control
// socket. The Go code in flox/v1 is generated from the .proto files beside it.
//
// It must not know who serves or calls what. Conversions to and from the root
// package's words and the one translation of errors to Connect and HTTP codes
// live here as well.
//
// Agents and workers of the last two minor versions keep working, so what was
// released stays as it was: released.txt lists it, and a test compares.
package api

//go:generate protoc -I . --go_out=. --go_opt=paths=source_relative --connect-go_out=. --connect-go_opt=paths=source_relative flox/v1/log.proto flox/v1/cluster.proto flox/v1/facts.proto flox/v1/agent.proto flox/v1/members.proto flox/v1/upstreams.proto flox/v1/profiles.proto flox/v1/channels.proto flox/v1/admin.proto flox/v1/builds.proto flox/v1/queue.proto flox/v1/farm.proto
