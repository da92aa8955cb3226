// Package storehouse composes one server of the storehouse: the replicated
// facts about store paths, the content they are made of, and the doors to both
// (calls between machines, the HTTP binary cache).
//
// It must not know about mounts, profiles' rules or how peers are chosen.
package storehouse
