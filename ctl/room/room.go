// Package room runs a command where the store lies at its place although
// nobody could put it there: in a user and mount namespace of its own. What is
// mounted in one nobody else sees, and it goes with its last process.
//
// Two processes stand between the caller and the command. The outer one is who
// was called: it passes signals on and ends as the command ended. The inner one
// is root of the namespace and of nothing else: it mounts, and starts the
// command in a namespace below, in which that is the caller again, without any
// capability. A program of several threads, as any of Go's, cannot enter a user
// namespace itself.
//
// The package must not know what is mounted or why.
package room

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// Command is a program to run with a store path's programs in front.
type Command struct {
	File string   // to execute
	Args []string // the program's name first
	Env  []string
}

// Find gives the command of args for the store path at dir: a bare name is
// looked for in dir/bin first, then on the caller's PATH, and no command is the
// caller's shell. The command itself finds dir/bin in front of its PATH. Without
// dir all is as the caller has it.
// ErrNotFound: there is no such program; ErrDenied: it may not be executed.
func Find(dir string, args, env []string) (Command, error) {
	if len(args) == 0 {
		args = []string{"/bin/sh"}
		if shell := get(env, "SHELL"); filepath.IsAbs(shell) {
			args[0] = shell
		}
	}
	c := Command{File: args[0], Args: args, Env: env}
	if dir != "" {
		c.Env = withPath(env, filepath.Join(dir, "bin"))
	}
	if strings.Contains(c.File, "/") {
		return c, nil // the system's own words say best why it cannot be executed
	}
	var denied error
	for _, bin := range filepath.SplitList(get(c.Env, "PATH")) {
		if bin == "" {
			bin = "."
		}
		file := filepath.Join(bin, args[0])
		if !strings.Contains(file, "/") {
			file = "./" + file
		}
		switch _, err := exec.LookPath(file); {
		case err == nil:
			c.File = file
			return c, nil
		case errors.Is(err, os.ErrPermission):
			denied = cli.Explain(flox.ErrDenied, "%s is there and may not be executed", file)
		}
	}
	if denied != nil {
		return c, denied
	}
	if dir == "" {
		return c, cli.Explain(flox.ErrNotFound, "there is no program %s on the PATH", args[0])
	}
	return c, cli.Explain(flox.ErrNotFound, "there is no program %s in %s, and none on the PATH", args[0], filepath.Join(dir, "bin"))
}

// Failed explains that a command could not be started.
func (c Command) Failed(err error) error {
	kind := flox.ErrBadInput
	switch {
	case errors.Is(err, os.ErrNotExist):
		kind = flox.ErrNotFound
	case errors.Is(err, os.ErrPermission):
		kind = flox.ErrDenied
	}
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	return cli.Explain(kind, "cannot run %s: %v", c.File, err)
}

// get is the value of a variable of env, the last one counts.
func get(env []string, name string) (value string) {
	for _, v := range env {
		if rest, ok := strings.CutPrefix(v, name+"="); ok {
			value = rest
		}
	}
	return value
}

// withPath is env with a directory in front of its PATH.
func withPath(env []string, dir string) []string {
	path := dir
	if was := get(env, "PATH"); was != "" {
		path += string(filepath.ListSeparator) + was
	}
	return Set(env, "PATH", path)
}

// NixClient is env with which stock Nix uses the daemon at socket, whatever else
// its configuration says of a daemon; "" changes nothing.
func NixClient(env []string, socket string) []string {
	if socket == "" {
		return env
	}
	env = Set(Set(env, "NIX_REMOTE", "unix://"+socket), "NIX_DAEMON_SOCKET_PATH", socket)
	if logs := filepath.Join(filepath.Dir(socket), cli.NixLogName); get(env, "NIX_LOG_DIR") == "" {
		env = Set(env, "NIX_LOG_DIR", logs)
	}
	return env
}

// Set is env with one variable set.
func Set(env []string, name, value string) []string {
	var out []string
	for _, v := range env {
		if !strings.HasPrefix(v, name+"=") {
			out = append(out, v)
		}
	}
	return append(out, name+"="+value)
}

// Found is what Probe found out; an empty text means that it works.
type Found struct {
	// Namespaces is why no user and mount namespace with mounts of its own can
	// be made.
	Namespaces string `json:"namespaces"`
	// FUSE is why none of our file systems can be mounted in one.
	FUSE string `json:"fuse"`
}
