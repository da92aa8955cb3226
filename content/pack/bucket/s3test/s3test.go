// Package s3test runs a real S3 server on loopback for tests.
package s3test

import (
	"context"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// Keys of every Server.
const (
	accessKey = "test-access"
	secretKey = "test-secret"
)

// Server is one S3 server whose objects are files.
type Server struct {
	t    testing.TB
	dir  string
	addr string
	cmd  *exec.Cmd
}

// Start starts a server with an empty bucket "store", until the test ends. It sets
// the environment variables that hold its keys.
func Start(t testing.TB) *Server {
	t.Helper()
	// What this kernel gives out now is free for the short while until it is bound.
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // binds and returns
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{t: t, dir: t.TempDir(), addr: l.Addr().String()}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"objects/store", "meta"} {
		if err := os.MkdirAll(filepath.Join(s.dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for k, v := range map[string]string{"AWS_ACCESS_KEY_ID": accessKey, "AWS_SECRET_ACCESS_KEY": secretKey, "AWS_EC2_METADATA_DISABLED": "true"} {
		if err := os.Setenv(k, v); err != nil {
			t.Fatal(err)
		}
	}
	s.Restart()
	t.Cleanup(s.Kill)
	return s
}

// URL is that of the bucket, for bucket.Open.
func (s *Server) URL() string {
	return "s3://store?region=us-east-1&use_path_style=true&endpoint=" + url.QueryEscape("http://"+s.addr)
}

// Objects is the directory in which the bucket's objects are files.
func (s *Server) Objects() string { return filepath.Join(s.dir, "objects", "store") }

// Restart starts the server again, with what it had, and waits until it answers.
func (s *Server) Restart() {
	s.t.Helper()
	_, self, _, _ := runtime.Caller(0)
	build := exec.CommandContext(context.Background(), filepath.Join(filepath.Dir(self), "../../../../scripts/versitygw"))
	build.Stderr = os.Stderr
	tool, err := build.Output()
	if err != nil {
		s.t.Fatalf("build the S3 server: %v", err)
	}
	s.cmd = exec.CommandContext(context.Background(), strings.TrimSpace(string(tool)), "--port", s.addr, "--access", accessKey, "--secret", secretKey, "--quiet",
		"posix", "--sidecar", filepath.Join(s.dir, "meta"), filepath.Join(s.dir, "objects"))
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for range 600 {
		c, err := net.DialTimeout("tcp", s.addr, time.Second) //nolint:noctx // bounded
		if err == nil {
			c.Close()
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	s.t.Fatalf("the S3 server does not listen on %s", s.addr)
}

// Kill ends the server as a crash does.
func (s *Server) Kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}
