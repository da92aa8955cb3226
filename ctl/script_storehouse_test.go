package ctl

import (
	"context"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

func (s *scriptedAdmin) Servers(_ context.Context, r *connect.Request[floxv1.ServersRequest]) (*connect.Response[floxv1.ServersResponse], error) {
	return unary[floxv1.ServersRequest, floxv1.ServersResponse](s.scripted, "Servers", r)
}

func (s *scriptedAdmin) Transfer(_ context.Context, r *connect.Request[floxv1.TransferRequest]) (*connect.Response[floxv1.TransferResponse], error) {
	return unary[floxv1.TransferRequest, floxv1.TransferResponse](s.scripted, "Transfer", r)
}

func (s *scriptedAdmin) RemoveServer(_ context.Context, r *connect.Request[floxv1.RemoveServerRequest]) (*connect.Response[floxv1.RemoveServerResponse], error) {
	return unary[floxv1.RemoveServerRequest, floxv1.RemoveServerResponse](s.scripted, "RemoveServer", r)
}

func (s *scriptedAdmin) Drain(_ context.Context, r *connect.Request[floxv1.DrainRequest]) (*connect.Response[floxv1.DrainResponse], error) {
	return unary[floxv1.DrainRequest, floxv1.DrainResponse](s.scripted, "Drain", r)
}

func (s *scriptedAdmin) Usage(_ context.Context, r *connect.Request[floxv1.UsageRequest]) (*connect.Response[floxv1.UsageResponse], error) {
	return unary[floxv1.UsageRequest, floxv1.UsageResponse](s.scripted, "Usage", r)
}

func (s *scriptedAdmin) Collect(_ context.Context, r *connect.Request[floxv1.CollectRequest], out *connect.ServerStream[floxv1.CollectProgress]) error {
	return stream[floxv1.CollectRequest](s.scripted, "Collect", r, out)
}

func (s *scriptedAdmin) Roots(_ context.Context, r *connect.Request[floxv1.RootsRequest]) (*connect.Response[floxv1.RootsResponse], error) {
	return unary[floxv1.RootsRequest, floxv1.RootsResponse](s.scripted, "Roots", r)
}

func (s *scriptedAdmin) Why(_ context.Context, r *connect.Request[floxv1.WhyRequest]) (*connect.Response[floxv1.WhyResponse], error) {
	return unary[floxv1.WhyRequest, floxv1.WhyResponse](s.scripted, "Why", r)
}

func (s *scriptedAdmin) KeepPath(_ context.Context, r *connect.Request[floxv1.KeepPathRequest]) (*connect.Response[floxv1.KeepPathResponse], error) {
	return unary[floxv1.KeepPathRequest, floxv1.KeepPathResponse](s.scripted, "KeepPath", r)
}

func (s *scriptedAdmin) Import(_ context.Context, r *connect.Request[floxv1.ImportRequest], out *connect.ServerStream[floxv1.ImportProgress]) error {
	return stream[floxv1.ImportRequest](s.scripted, "Import", r, out)
}

func (s *scriptedAdmin) AddUpstream(_ context.Context, r *connect.Request[floxv1.AddUpstreamRequest]) (*connect.Response[floxv1.AddUpstreamResponse], error) {
	return unary[floxv1.AddUpstreamRequest, floxv1.AddUpstreamResponse](s.scripted, "AddUpstream", r)
}

func (s *scriptedAdmin) ListUpstreams(_ context.Context, r *connect.Request[floxv1.ListUpstreamsRequest]) (*connect.Response[floxv1.ListUpstreamsResponse], error) {
	return unary[floxv1.ListUpstreamsRequest, floxv1.ListUpstreamsResponse](s.scripted, "ListUpstreams", r)
}

func (s *scriptedAdmin) TestUpstream(_ context.Context, r *connect.Request[floxv1.TestUpstreamRequest]) (*connect.Response[floxv1.TestUpstreamResponse], error) {
	return unary[floxv1.TestUpstreamRequest, floxv1.TestUpstreamResponse](s.scripted, "TestUpstream", r)
}

func (s *scriptedAdmin) RemoveUpstream(_ context.Context, r *connect.Request[floxv1.RemoveUpstreamRequest]) (*connect.Response[floxv1.RemoveUpstreamResponse], error) {
	return unary[floxv1.RemoveUpstreamRequest, floxv1.RemoveUpstreamResponse](s.scripted, "RemoveUpstream", r)
}

func (s *scriptedAdmin) CreateProfile(_ context.Context, r *connect.Request[floxv1.CreateProfileRequest]) (*connect.Response[floxv1.CreateProfileResponse], error) {
	return unary[floxv1.CreateProfileRequest, floxv1.CreateProfileResponse](s.scripted, "CreateProfile", r)
}

func (s *scriptedAdmin) DeleteProfile(_ context.Context, r *connect.Request[floxv1.DeleteProfileRequest]) (*connect.Response[floxv1.DeleteProfileResponse], error) {
	return unary[floxv1.DeleteProfileRequest, floxv1.DeleteProfileResponse](s.scripted, "DeleteProfile", r)
}

func (s *scriptedAdmin) ListProfiles(_ context.Context, r *connect.Request[floxv1.ListProfilesRequest]) (*connect.Response[floxv1.ListProfilesResponse], error) {
	return unary[floxv1.ListProfilesRequest, floxv1.ListProfilesResponse](s.scripted, "ListProfiles", r)
}

func (s *scriptedAdmin) ShowProfile(_ context.Context, r *connect.Request[floxv1.ShowProfileRequest]) (*connect.Response[floxv1.ShowProfileResponse], error) {
	return unary[floxv1.ShowProfileRequest, floxv1.ShowProfileResponse](s.scripted, "ShowProfile", r)
}

func (s *scriptedAdmin) ProfileHistory(_ context.Context, r *connect.Request[floxv1.ProfileHistoryRequest]) (*connect.Response[floxv1.ProfileHistoryResponse], error) {
	return unary[floxv1.ProfileHistoryRequest, floxv1.ProfileHistoryResponse](s.scripted, "ProfileHistory", r)
}

func (s *scriptedAdmin) ChangeProfile(_ context.Context, r *connect.Request[floxv1.ChangeProfileRequest]) (*connect.Response[floxv1.ChangeProfileResponse], error) {
	return unary[floxv1.ChangeProfileRequest, floxv1.ChangeProfileResponse](s.scripted, "ChangeProfile", r)
}

func (s *scriptedAdmin) RollbackProfile(_ context.Context, r *connect.Request[floxv1.RollbackProfileRequest]) (*connect.Response[floxv1.RollbackProfileResponse], error) {
	return unary[floxv1.RollbackProfileRequest, floxv1.RollbackProfileResponse](s.scripted, "RollbackProfile", r)
}

func (s *scriptedAdmin) GrantProfile(_ context.Context, r *connect.Request[floxv1.GrantProfileRequest]) (*connect.Response[floxv1.GrantProfileResponse], error) {
	return unary[floxv1.GrantProfileRequest, floxv1.GrantProfileResponse](s.scripted, "GrantProfile", r)
}

func (s *scriptedAdmin) RenameProfile(_ context.Context, r *connect.Request[floxv1.RenameProfileRequest]) (*connect.Response[floxv1.RenameProfileResponse], error) {
	return unary[floxv1.RenameProfileRequest, floxv1.RenameProfileResponse](s.scripted, "RenameProfile", r)
}

func (s *scriptedAdmin) SetProfileRetention(_ context.Context, r *connect.Request[floxv1.SetProfileRetentionRequest]) (*connect.Response[floxv1.SetProfileRetentionResponse], error) {
	return unary[floxv1.SetProfileRetentionRequest, floxv1.SetProfileRetentionResponse](s.scripted, "SetProfileRetention", r)
}

func (s *scriptedAdmin) SetProfileSchedule(_ context.Context, r *connect.Request[floxv1.SetProfileScheduleRequest]) (*connect.Response[floxv1.SetProfileScheduleResponse], error) {
	return unary[floxv1.SetProfileScheduleRequest, floxv1.SetProfileScheduleResponse](s.scripted, "SetProfileSchedule", r)
}

func (s *scriptedAdmin) TagProfile(_ context.Context, r *connect.Request[floxv1.TagProfileRequest]) (*connect.Response[floxv1.TagProfileResponse], error) {
	return unary[floxv1.TagProfileRequest, floxv1.TagProfileResponse](s.scripted, "TagProfile", r)
}

func (s *scriptedAdmin) AssignProfile(_ context.Context, r *connect.Request[floxv1.AssignProfileRequest]) (*connect.Response[floxv1.AssignProfileResponse], error) {
	return unary[floxv1.AssignProfileRequest, floxv1.AssignProfileResponse](s.scripted, "AssignProfile", r)
}

func (s *scriptedAdmin) ListChannels(_ context.Context, r *connect.Request[floxv1.ListChannelsRequest]) (*connect.Response[floxv1.ListChannelsResponse], error) {
	return unary[floxv1.ListChannelsRequest, floxv1.ListChannelsResponse](s.scripted, "ListChannels", r)
}

func (s *scriptedAdmin) ShowChannel(_ context.Context, r *connect.Request[floxv1.ShowChannelRequest]) (*connect.Response[floxv1.ShowChannelResponse], error) {
	return unary[floxv1.ShowChannelRequest, floxv1.ShowChannelResponse](s.scripted, "ShowChannel", r)
}

func (s *scriptedAdmin) DeleteChannel(_ context.Context, r *connect.Request[floxv1.DeleteChannelRequest]) (*connect.Response[floxv1.DeleteChannelResponse], error) {
	return unary[floxv1.DeleteChannelRequest, floxv1.DeleteChannelResponse](s.scripted, "DeleteChannel", r)
}

func (s *scriptedAdmin) SetPublishers(_ context.Context, r *connect.Request[floxv1.SetPublishersRequest]) (*connect.Response[floxv1.SetPublishersResponse], error) {
	return unary[floxv1.SetPublishersRequest, floxv1.SetPublishersResponse](s.scripted, "SetPublishers", r)
}

func (s *scriptedAdmin) SearchPackages(_ context.Context, r *connect.Request[floxv1.SearchPackagesRequest]) (*connect.Response[floxv1.SearchPackagesResponse], error) {
	return unary[floxv1.SearchPackagesRequest, floxv1.SearchPackagesResponse](s.scripted, "SearchPackages", r)
}

func (s *scriptedAdmin) PublishChannel(_ context.Context, r *connect.Request[floxv1.PublishChannelRequest], out *connect.ServerStream[floxv1.PublishChannelProgress]) error {
	return stream[floxv1.PublishChannelRequest](s.scripted, "PublishChannel", r, out)
}

func (s *scriptedAdmin) TrackChannel(_ context.Context, r *connect.Request[floxv1.TrackChannelRequest], out *connect.ServerStream[floxv1.TrackChannelProgress]) error {
	return stream[floxv1.TrackChannelRequest](s.scripted, "TrackChannel", r, out)
}

func (s *scriptedAdmin) UntrackChannel(_ context.Context, r *connect.Request[floxv1.UntrackChannelRequest]) (*connect.Response[floxv1.UntrackChannelResponse], error) {
	return unary[floxv1.UntrackChannelRequest, floxv1.UntrackChannelResponse](s.scripted, "UntrackChannel", r)
}

func (s *scriptedAdmin) BuildPackage(_ context.Context, r *connect.Request[floxv1.BuildPackageRequest], out *connect.ServerStream[floxv1.BuildPackageProgress]) error {
	return stream[floxv1.BuildPackageRequest](s.scripted, "BuildPackage", r, out)
}

func (s *scriptedAdmin) ListBuilds(_ context.Context, r *connect.Request[floxv1.ListBuildsRequest]) (*connect.Response[floxv1.ListBuildsResponse], error) {
	return unary[floxv1.ListBuildsRequest, floxv1.ListBuildsResponse](s.scripted, "ListBuilds", r)
}

func (s *scriptedAdmin) ShowBuild(_ context.Context, r *connect.Request[floxv1.ShowBuildRequest]) (*connect.Response[floxv1.ShowBuildResponse], error) {
	return unary[floxv1.ShowBuildRequest, floxv1.ShowBuildResponse](s.scripted, "ShowBuild", r)
}

func (s *scriptedAdmin) WhyBuild(_ context.Context, r *connect.Request[floxv1.WhyBuildRequest]) (*connect.Response[floxv1.WhyBuildResponse], error) {
	return unary[floxv1.WhyBuildRequest, floxv1.WhyBuildResponse](s.scripted, "WhyBuild", r)
}

func (s *scriptedAdmin) ChangeBuilds(_ context.Context, r *connect.Request[floxv1.ChangeBuildsRequest]) (*connect.Response[floxv1.ChangeBuildsResponse], error) {
	return unary[floxv1.ChangeBuildsRequest, floxv1.ChangeBuildsResponse](s.scripted, "ChangeBuilds", r)
}

func (s *scriptedAdmin) BuildOutput(_ context.Context, r *connect.Request[floxv1.BuildOutputRequest], out *connect.ServerStream[floxv1.BuildOutputPiece]) error {
	return stream[floxv1.BuildOutputRequest](s.scripted, "BuildOutput", r, out)
}

func (s *scriptedAdmin) ListWorkers(_ context.Context, r *connect.Request[floxv1.ListWorkersRequest]) (*connect.Response[floxv1.ListWorkersResponse], error) {
	return unary[floxv1.ListWorkersRequest, floxv1.ListWorkersResponse](s.scripted, "ListWorkers", r)
}

func (s *scriptedAdmin) SetWorker(_ context.Context, r *connect.Request[floxv1.SetWorkerRequest]) (*connect.Response[floxv1.SetWorkerResponse], error) {
	return unary[floxv1.SetWorkerRequest, floxv1.SetWorkerResponse](s.scripted, "SetWorker", r)
}
