package ctl

import (
	"context"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/api/flox/v1/floxv1connect"
)

// scriptedAdmin answers like scripted, for the storehouse behind the agent.
type scriptedAdmin struct {
	floxv1connect.UnimplementedAdminHandler
	*scripted
}

func (s *scriptedAdmin) MakeInvite(_ context.Context, r *connect.Request[floxv1.MakeInviteRequest]) (*connect.Response[floxv1.MakeInviteResponse], error) {
	return unary[floxv1.MakeInviteRequest, floxv1.MakeInviteResponse](s.scripted, "MakeInvite", r)
}

func (s *scriptedAdmin) ListInvites(_ context.Context, r *connect.Request[floxv1.ListInvitesRequest]) (*connect.Response[floxv1.ListInvitesResponse], error) {
	return unary[floxv1.ListInvitesRequest, floxv1.ListInvitesResponse](s.scripted, "ListInvites", r)
}

func (s *scriptedAdmin) CancelInvite(_ context.Context, r *connect.Request[floxv1.CancelInviteRequest]) (*connect.Response[floxv1.CancelInviteResponse], error) {
	return unary[floxv1.CancelInviteRequest, floxv1.CancelInviteResponse](s.scripted, "CancelInvite", r)
}

func (s *scriptedAdmin) ListMachines(_ context.Context, r *connect.Request[floxv1.ListMachinesRequest]) (*connect.Response[floxv1.ListMachinesResponse], error) {
	return unary[floxv1.ListMachinesRequest, floxv1.ListMachinesResponse](s.scripted, "ListMachines", r)
}

func (s *scriptedAdmin) ChangeMachine(_ context.Context, r *connect.Request[floxv1.ChangeMachineRequest]) (*connect.Response[floxv1.ChangeMachineResponse], error) {
	return unary[floxv1.ChangeMachineRequest, floxv1.ChangeMachineResponse](s.scripted, "ChangeMachine", r)
}

func (s *scriptedAdmin) RemoveMachine(_ context.Context, r *connect.Request[floxv1.RemoveMachineRequest]) (*connect.Response[floxv1.RemoveMachineResponse], error) {
	return unary[floxv1.RemoveMachineRequest, floxv1.RemoveMachineResponse](s.scripted, "RemoveMachine", r)
}

func (s *scriptedAdmin) ListKeys(_ context.Context, r *connect.Request[floxv1.ListKeysRequest]) (*connect.Response[floxv1.ListKeysResponse], error) {
	return unary[floxv1.ListKeysRequest, floxv1.ListKeysResponse](s.scripted, "ListKeys", r)
}

func (s *scriptedAdmin) ImportKey(_ context.Context, r *connect.Request[floxv1.ImportKeyRequest]) (*connect.Response[floxv1.ImportKeyResponse], error) {
	return unary[floxv1.ImportKeyRequest, floxv1.ImportKeyResponse](s.scripted, "ImportKey", r)
}

func (s *scriptedAdmin) RotateKeys(_ context.Context, r *connect.Request[floxv1.RotateKeysRequest]) (*connect.Response[floxv1.RotateKeysResponse], error) {
	return unary[floxv1.RotateKeysRequest, floxv1.RotateKeysResponse](s.scripted, "RotateKeys", r)
}

func (s *scriptedAdmin) Audit(_ context.Context, r *connect.Request[floxv1.AuditRequest], out *connect.ServerStream[floxv1.AuditResponse]) error {
	return stream[floxv1.AuditRequest](s.scripted, "Audit", r, out)
}

func (s *scriptedAdmin) Backup(_ context.Context, r *connect.Request[floxv1.BackupRequest], out *connect.ServerStream[floxv1.BackupProgress]) error {
	return stream[floxv1.BackupRequest](s.scripted, "Backup", r, out)
}
