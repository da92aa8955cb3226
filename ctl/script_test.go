package ctl

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"floxctl": func() { os.Exit(Main()) }, "stands": standStill})
}

// standStill is an agent that listens at a socket, says so by a file, and is then stopped.
func standStill() {
	l, err := net.Listen("unix", os.Args[1])
	if err == nil {
		err = os.WriteFile(os.Args[1]+".ready", nil, 0o600)
	}
	if err == nil {
		err = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	}
	fmt.Fprintln(os.Stderr, l, err)
	os.Exit(1)
}

// TestScripts runs floxctl as users do, against an agent whose answers are
// files of the script: agent/<Method>.json holds one message a line, and
// agent/<Method>.error "code message" what comes after them. What was asked is
// in agent/<Method>.asked.
func TestScripts(t *testing.T) {
	testscript.Run(t, scriptParams("testdata/script", map[string]func(*testscript.TestScript, bool, []string){"exits": runExits}))
}

func scriptParams(dir string, commands map[string]func(*testscript.TestScript, bool, []string)) testscript.Params {
	return testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("UPDATE") != "",
		Setup: func(env *testscript.Env) error {
			socket, err := startScripted(env)
			if err != nil {
				return err
			}
			env.Setenv("FLOXD_SOCKET", socket)
			env.Setenv("TZ", "UTC")
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond != "fuse" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			_, err := os.Stat("/dev/fuse")
			return err == nil || os.Getenv("CI") == "true", nil // under CI its absence must fail
		},
		Cmds: commands,
	}
}

// runExits is the script command `exits CODE program args...`.
func runExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE program args...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != args[0] {
		ts.Fatalf("%s exited %s, want %s", strings.Join(args[1:], " "), got, args[0])
	}
}

// startScripted serves a scripted agent for one script. The socket is in a
// directory of its own, since its name must be short.
func startScripted(env *testscript.Env) (string, error) {
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		return "", err
	}
	socket := filepath.Join(dir, "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return "", err
	}
	mux := http.NewServeMux()
	answers := &scripted{dir: filepath.Join(env.WorkDir, "agent")}
	mux.Handle(floxv1connect.NewAgentHandler(answers))
	mux.Handle(floxv1connect.NewAdminHandler(&scriptedAdmin{scripted: answers}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener) // ends with Close
	}()
	env.Defer(func() {
		_ = server.Close()
		<-done
		_ = os.RemoveAll(dir)
	})
	return socket, nil
}

// scripted answers from files.
type scripted struct {
	floxv1connect.UnimplementedAgentHandler
	dir string
	mu  sync.Mutex
}

var codes = map[string]connect.Code{
	"not_found": connect.CodeNotFound, "unavailable": connect.CodeUnavailable, "permission_denied": connect.CodePermissionDenied,
	"unauthenticated": connect.CodeUnauthenticated, "data_loss": connect.CodeDataLoss, "internal": connect.CodeInternal,
	"resource_exhausted": connect.CodeResourceExhausted, "aborted": connect.CodeAborted,
	"deadline_exceeded": connect.CodeDeadlineExceeded, "invalid_argument": connect.CodeInvalidArgument,
	"unimplemented": connect.CodeUnimplemented,
}

// asked notes a request for the script to look at.
func (s *scripted) asked(method string, m proto.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, err := protojson.Marshal(m)
	if err != nil {
		return
	}
	f, err := os.OpenFile(filepath.Join(s.dir, method+".asked"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	fmt.Fprintln(f, strings.ReplaceAll(string(b), " ", "")) // protojson varies its blanks on purpose
}

// lines gives the messages of a method, and the error that comes after them.
func (s *scripted) lines(method string, m func() proto.Message, send func(proto.Message) error) error {
	b, err := os.ReadFile(filepath.Join(s.dir, method+".json"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		msg := m()
		if err := protojson.Unmarshal([]byte(line), msg); err != nil {
			return connect.NewError(connect.CodeInternal, fmt.Errorf("script %s.json: %w", method, err))
		}
		if err := send(msg); err != nil {
			return err
		}
	}
	e, err := os.ReadFile(filepath.Join(s.dir, method+".error"))
	if err != nil {
		return nil
	}
	code, words, _ := strings.Cut(strings.TrimSpace(string(e)), " ")
	return connect.NewError(codes[code], errors.New(words))
}

// unary answers with the only message of a method.
func unary[Req, Resp any, PReq interface {
	*Req
	proto.Message
}, PResp interface {
	*Resp
	proto.Message
}](s *scripted, method string, req *connect.Request[Req],
) (*connect.Response[Resp], error) {
	s.asked(method, PReq(req.Msg))
	var answer *Resp
	err := s.lines(method, func() proto.Message { return PResp(new(Resp)) }, func(m proto.Message) error {
		answer = (*Resp)(m.(PResp))
		return nil
	})
	if err != nil {
		return nil, err
	}
	if answer == nil {
		return nil, connect.NewError(connect.CodeUnimplemented, fmt.Errorf("the script has no %s.json", method))
	}
	return connect.NewResponse(answer), nil
}

// stream answers with all messages of a method.
func stream[Req, Resp any, PReq interface {
	*Req
	proto.Message
}, PResp interface {
	*Resp
	proto.Message
}](s *scripted, method string, req *connect.Request[Req], out *connect.ServerStream[Resp],
) error {
	s.asked(method, PReq(req.Msg))
	return s.lines(method, func() proto.Message { return PResp(new(Resp)) }, func(m proto.Message) error {
		return out.Send((*Resp)(m.(PResp)))
	})
}

func (s *scripted) Status(_ context.Context, r *connect.Request[floxv1.StatusRequest]) (*connect.Response[floxv1.StatusResponse], error) {
	return unary[floxv1.StatusRequest, floxv1.StatusResponse](s, "Status", r)
}

func (s *scripted) Peers(_ context.Context, r *connect.Request[floxv1.PeersRequest]) (*connect.Response[floxv1.PeersResponse], error) {
	return unary[floxv1.PeersRequest, floxv1.PeersResponse](s, "Peers", r)
}

func (s *scripted) Explain(_ context.Context, r *connect.Request[floxv1.ExplainRequest]) (*connect.Response[floxv1.ExplainResponse], error) {
	return unary[floxv1.ExplainRequest, floxv1.ExplainResponse](s, "Explain", r)
}

func (s *scripted) Path(_ context.Context, r *connect.Request[floxv1.PathRequest]) (*connect.Response[floxv1.PathResponse], error) {
	return unary[floxv1.PathRequest, floxv1.PathResponse](s, "Path", r)
}

func (s *scripted) Keep(_ context.Context, r *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error) {
	return unary[floxv1.KeepRequest, floxv1.KeepResponse](s, "Keep", r)
}

func (s *scripted) Unkeep(_ context.Context, r *connect.Request[floxv1.KeepRequest]) (*connect.Response[floxv1.KeepResponse], error) {
	return unary[floxv1.KeepRequest, floxv1.KeepResponse](s, "Unkeep", r)
}

func (s *scripted) Kept(_ context.Context, r *connect.Request[floxv1.KeptRequest]) (*connect.Response[floxv1.KeptResponse], error) {
	return unary[floxv1.KeptRequest, floxv1.KeptResponse](s, "Kept", r)
}

func (s *scripted) CacheUsage(_ context.Context, r *connect.Request[floxv1.CacheUsageRequest]) (*connect.Response[floxv1.CacheUsageResponse], error) {
	return unary[floxv1.CacheUsageRequest, floxv1.CacheUsageResponse](s, "CacheUsage", r)
}

func (s *scripted) CacheGC(_ context.Context, r *connect.Request[floxv1.CacheGCRequest]) (*connect.Response[floxv1.CacheGCResponse], error) {
	return unary[floxv1.CacheGCRequest, floxv1.CacheGCResponse](s, "CacheGC", r)
}

func (s *scripted) Doctor(_ context.Context, r *connect.Request[floxv1.DoctorRequest]) (*connect.Response[floxv1.DoctorResponse], error) {
	return unary[floxv1.DoctorRequest, floxv1.DoctorResponse](s, "Doctor", r)
}

// Watch goes on until the caller leaves, like the real one, unless it is to fail.
func (s *scripted) Watch(ctx context.Context, r *connect.Request[floxv1.WatchReadsRequest], out *connect.ServerStream[floxv1.WatchReads]) error {
	if err := stream[floxv1.WatchReadsRequest](s, "Watch", r, out); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

func (s *scripted) List(_ context.Context, r *connect.Request[floxv1.ListRequest], out *connect.ServerStream[floxv1.ListEntry]) error {
	return stream[floxv1.ListRequest](s, "List", r, out)
}

func (s *scripted) Paths(_ context.Context, r *connect.Request[floxv1.ListPathsRequest], out *connect.ServerStream[floxv1.ListPathsResponse]) error {
	return stream[floxv1.ListPathsRequest](s, "Paths", r, out)
}

func (s *scripted) Cat(_ context.Context, r *connect.Request[floxv1.CatRequest], out *connect.ServerStream[floxv1.CatResponse]) error {
	return stream[floxv1.CatRequest](s, "Cat", r, out)
}

func (s *scripted) Verify(_ context.Context, r *connect.Request[floxv1.VerifyRequest], out *connect.ServerStream[floxv1.VerifyProgress]) error {
	return stream[floxv1.VerifyRequest](s, "Verify", r, out)
}

// Download goes on for ever with Download.more.
func (s *scripted) Download(ctx context.Context, r *connect.Request[floxv1.DownloadRequest], out *connect.ServerStream[floxv1.DownloadProgress]) error {
	err := stream[floxv1.DownloadRequest](s, "Download", r, out)
	if _, absent := os.Stat(filepath.Join(s.dir, "Download.more")); err == nil && absent == nil {
		<-ctx.Done()
	}
	return err
}

// Add keeps the NAR that was uploaded in Add.nar. With Add.error it refuses
// before it has read anything; with Add.broken it breaks off, once.
func (s *scripted) Add(_ context.Context, in *connect.ClientStream[floxv1.AddRequest]) (*connect.Response[floxv1.AddResponse], error) {
	if err := s.lines("Add", nil, nil); err != nil {
		return nil, err
	}
	var nar []byte
	for first := true; in.Receive(); first = false {
		if first {
			s.asked("Add", &floxv1.AddRequest{Name: in.Msg().GetName(), Token: in.Msg().GetToken()})
		}
		nar = append(nar, in.Msg().GetNar()...)
		if os.Remove(filepath.Join(s.dir, "Add.broken")) == nil {
			return nil, connect.NewError(connect.CodeUnavailable, errors.New("the server went away"))
		}
	}
	if in.Err() != nil {
		return nil, in.Err()
	}
	if err := os.WriteFile(filepath.Join(s.dir, "Add.nar"), nar, 0o600); err != nil {
		return nil, err
	}
	return unary[floxv1.AddRequest, floxv1.AddResponse](s, "AddAnswer", connect.NewRequest(&floxv1.AddRequest{}))
}

func (s *scripted) ShownProfiles(_ context.Context, r *connect.Request[floxv1.ShownProfilesRequest]) (*connect.Response[floxv1.ShownProfilesResponse], error) {
	return unary[floxv1.ShownProfilesRequest, floxv1.ShownProfilesResponse](s, "ShownProfiles", r)
}

func (s *scripted) RollbackHere(_ context.Context, r *connect.Request[floxv1.RollbackHereRequest]) (*connect.Response[floxv1.RollbackHereResponse], error) {
	return unary[floxv1.RollbackHereRequest, floxv1.RollbackHereResponse](s, "RollbackHere", r)
}

func (s *scripted) Share(_ context.Context, r *connect.Request[floxv1.ShareRequest]) (*connect.Response[floxv1.ShareResponse], error) {
	return unary[floxv1.ShareRequest, floxv1.ShareResponse](s, "Share", r)
}

func (s *scripted) Bind(_ context.Context, r *connect.Request[floxv1.BindRequest]) (*connect.Response[floxv1.BindResponse], error) {
	return unary[floxv1.BindRequest, floxv1.BindResponse](s, "Bind", r)
}

func (s *scripted) Unbind(_ context.Context, r *connect.Request[floxv1.UnbindRequest]) (*connect.Response[floxv1.UnbindResponse], error) {
	return unary[floxv1.UnbindRequest, floxv1.UnbindResponse](s, "Unbind", r)
}
