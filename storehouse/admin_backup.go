package storehouse

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// Backup is floxv1connect.AdminHandler. It ends with its caller, or the server.
func (a *admin) Backup(ctx context.Context, req *connect.Request[floxv1.BackupRequest], stream *connect.ServerStream[floxv1.BackupProgress]) error {
	who, err := a.mayAs(ctx, req.Peer().Addr, req.Header(), adminOnly, "storehouse.backup")
	if err != nil {
		return api.ToConnect(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(a.stop, func() { cancel(errStopping) })()
	var last *floxv1.BackupProgress
	opts := BackupOptions{To: req.Msg.GetTo(), Passphrase: []byte(req.Msg.GetPassphrase()), Keep: int(min(req.Msg.GetKeep(), 1<<20))}
	err = a.s.Backup(ctx, opts, func(p *floxv1.BackupProgress) {
		if p.GetFinished() {
			last = p // told when it is in the audit log
		} else if err := stream.Send(p); err != nil {
			cancel(err) // nobody waits for it
		}
	})
	if last != nil {
		note := &floxv1.AuditRecord{
			Action: "storehouse.backup", Subject: last.GetName(),
			Detail: fmt.Sprintf("%d paths to %s, %d bytes of content new", last.GetPaths(), opts.To, last.GetNewBytes()),
		}
		_, failed := a.s.proposeMembers(ctx, &floxv1.MembersCommand{Actor: who, Command: &floxv1.MembersCommand_Note{Note: note}})
		if failed == nil {
			failed = stream.Send(last)
		}
		if err == nil {
			err = failed
		}
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	return api.ToConnect(err)
}
