package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/user"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// houseAdmin is the operators' part of the tests' storehouse. Who is asked for
// as an invite's ID was the caller; a log that is followed ends with its caller.
type houseAdmin struct {
	floxv1connect.UnimplementedAdminHandler
	ended        chan struct{} // closed when a followed log has ended
	upstreamKeys []string
}

func (h *houseAdmin) ListInvites(_ context.Context, req *connect.Request[floxv1.ListInvitesRequest]) (*connect.Response[floxv1.ListInvitesResponse], error) {
	r := &floxv1.ListInvitesResponse{}
	for _, name := range req.Header().Values("Flox-User") {
		r.Invites = append(r.Invites, &floxv1.InviteRecord{Id: name})
	}
	return connect.NewResponse(r), nil
}

func (h *houseAdmin) CancelInvite(context.Context, *connect.Request[floxv1.CancelInviteRequest]) (*connect.Response[floxv1.CancelInviteResponse], error) {
	return nil, api.ToConnect(fmt.Errorf("not you: %w", flox.ErrDenied))
}

func (h *houseAdmin) Audit(ctx context.Context, _ *connect.Request[floxv1.AuditRequest], out *connect.ServerStream[floxv1.AuditResponse]) error {
	defer close(h.ended)
	if err := out.Send(&floxv1.AuditResponse{Records: []*floxv1.AuditRecord{{Index: 7}}}); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// adminClient talks to the storehouse through the agent's real socket.
func adminClient(t *testing.T, a *Agent) floxv1connect.AdminClient {
	t.Helper()
	client(t, a) // waits until the socket is served
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", a.cfg.Socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return floxv1connect.NewAdminClient(&http.Client{Transport: transport}, "http://agent")
}

// The storehouse hears who the kernel says is calling, whatever the caller says.
func TestControlPassesAdminCallsOn(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, nil, nil)
	c, ctx := adminClient(t, a), within(t, 40*time.Second)
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	req := connect.NewRequest(&floxv1.ListInvitesRequest{})
	req.Header().Add("Flox-User", "somebody-else")
	req.Header().Add("flox-user", "another")
	resp, err := c.ListInvites(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.Msg.GetInvites(); len(got) != 1 || got[0].GetId() != me.Username {
		t.Errorf("the storehouse was called by %v, want %s alone", got, me.Username)
	}
	_, err = c.CancelInvite(ctx, connect.NewRequest(&floxv1.CancelInviteRequest{}))
	if err = api.FromConnect(err); !errors.Is(err, flox.ErrDenied) || err.Error() != "not you: denied" {
		t.Errorf("a refusal became %v", err)
	}
	_, err = c.ListMachines(ctx, connect.NewRequest(&floxv1.ListMachinesRequest{}))
	if connect.CodeOf(err) != connect.CodeUnimplemented {
		t.Errorf("what the storehouse does not know: %v", err)
	}
}

// Messages of a stream come through as they are sent, and its end goes back.
func TestControlPassesStreamsOn(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, nil, nil)
	c := adminClient(t, a)
	ctx, cancel := context.WithCancel(within(t, 40*time.Second))
	defer cancel()
	stream, err := c.Audit(ctx, connect.NewRequest(&floxv1.AuditRequest{Follow: true}))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || stream.Msg().GetRecords()[0].GetIndex() != 7 {
		t.Fatalf("no record: %v", stream.Err())
	}
	cancel()
	select {
	case <-h.admin.ended:
	case <-within(t, 40*time.Second).Done():
		t.Error("the storehouse still serves a caller that has left")
	}
	_ = stream.Close() // cancelled
}

// A caller the kernel does not name gets nothing, and so does one too many.
func TestControlRefusesToPass(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	a, _ := runAgent(t, h, nil, nil)
	p := newPassAdmin(a)
	call := func(uid int) string {
		ctx := context.WithValue(t.Context(), callerKey{}, uid)
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, floxv1connect.AdminListInvitesProcedure, strings.NewReader("{}"))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		p.ServeHTTP(w, r)
		return w.Body.String()
	}
	if got := call(-1); !strings.Contains(got, `"code":"permission_denied"`) {
		t.Errorf("a caller without a name: %s", got)
	}
	for range maxPassed {
		p.slots <- struct{}{}
	}
	if got := call(os.Getuid()); !strings.Contains(got, "calls to the storehouse are under way") {
		t.Errorf("one call too many: %s", got)
	}
}
