package fuse

import (
	"testing"
)

func TestSecondPassAsksNothing(t *testing.T) {
	m := newMount(t, serveOptions{})
	pass := []op{
		{Do: "stat", Path: ""}, {Do: "stat", Path: toolsPath}, {Do: "stat", Path: toolsPath + "/share/crowd/f0007"},
		{Do: "readlink", Path: toolsPath + "/bin/link"}, {Do: "readlink", Path: linkPath},
		{Do: "readdir", Path: toolsPath}, {Do: "readdir", Path: toolsPath + "/share/crowd"},
		{Do: "read", Path: filePath}, {Do: "read", Path: toolsPath + "/share/big"}, {Do: "read", Path: toolsPath + "/etc/empty"},
		{Do: "mmap", Path: toolsPath + "/share/big"}, {Do: "exec", Path: toolsPath + "/bin/prog"},
		{Do: "stat", Path: toolsPath + "/missing"}, {Do: "stat", Path: toolsPath + "/share/missing"},
		{Do: "stat", Path: "lib"}, {Do: "stat", Path: ".go-fuse-epoll-hack"}, {Do: "access", Path: toolsPath + "/bin/prog"},
		{Do: "xattr", Path: toolsPath + "/bin/prog"},
	}
	first := m.touch(t, pass...)
	before := m.ask(t, command{Cmd: "stats"}).Stats
	t.Log(before)
	for _, o := range first {
		t.Log(o.Do, o.Path, o.Errno, o.Count, o.Text, o.Took)
	}
	m.touch(t, pass...)
	after := m.ask(t, command{Cmd: "stats"}).Stats
	t.Log(after)
	if before.Total != after.Total {
		t.Errorf("second pass: %v -> %v", before.Requests, after.Requests)
	}
	m.touch(t, op{Do: "ioctl", Path: toolsPath + "/etc/conf"})
	t.Log(m.ask(t, command{Cmd: "stats"}).Stats)
}
