package storehouse

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/profile/channel"
	cluster "github.com/floxctl/flox/raft"
)

// What people do with channels, as refusals and the audit log name it.
const (
	actionPublish    = "channel.publish"
	actionDelete     = "channel.delete"
	actionPublishers = "channel.publishers"
	actionTrack      = "channel.track"
	actionUntrack    = "channel.untrack"
)

// sending calls f with a function that sends messages, until this server ends or nobody
// listens any more.
func sending[M any](ctx context.Context, a *admin, stream *connect.ServerStream[M], f func(ctx context.Context, send func(*M)) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(a.stop, func() { cancel(errStopping) })()
	return api.ToConnect(ended(ctx, f(ctx, func(m *M) {
		if err := stream.Send(m); err != nil {
			cancel(err)
		}
	})))
}

// PublishChannel is floxv1connect.AdminHandler.
func (a *admin) PublishChannel(ctx context.Context, req *connect.Request[floxv1.PublishChannelRequest], stream *connect.ServerStream[floxv1.PublishChannelProgress]) error {
	who, err := a.person(ctx, req)
	if err != nil {
		return api.ToConnect(err)
	}
	return sending(ctx, a, stream, func(ctx context.Context, send func(*floxv1.PublishChannelProgress)) error {
		return a.s.channels.publishNoted(ctx, who, req.Msg, send)
	})
}

// publishNoted is publish that the audit log has.
func (c *channels) publishNoted(ctx context.Context, who person, q *floxv1.PublishChannelRequest, tell func(*floxv1.PublishChannelProgress)) error {
	var end *floxv1.PublishChannelProgress
	err := c.publish(ctx, who, q, func(p *floxv1.PublishChannelProgress) {
		if end = p; p.GetVersion() == nil {
			tell(p)
		}
	})
	if err != nil {
		return err
	}
	if ch := end.GetChannel(); ch != nil { // else it was so already
		v := end.GetVersion()
		if err := c.s.note(ctx, who.Actor, actionPublish, ch.GetName(), fmt.Sprintf("version %d, %d packages, of %s", v.GetNumber(), v.GetPackages(), v.GetSource())); err != nil {
			return err
		}
	}
	tell(end)
	return nil
}

// TrackChannel is floxv1connect.AdminHandler. The server that leads fetches, and tells of it.
func (a *admin) TrackChannel(ctx context.Context, req *connect.Request[floxv1.TrackChannelRequest], stream *connect.ServerStream[floxv1.TrackChannelProgress]) error {
	who, err := a.may(ctx, req, adminOnly, actionTrack)
	if err != nil {
		return api.ToConnect(err)
	}
	return sending(ctx, a, stream, func(ctx context.Context, send func(*floxv1.TrackChannelProgress)) error {
		leader, err := a.leader(ctx, req.Header().Get(actorHeader) != "")
		if err != nil {
			return err
		}
		if leader == nil {
			return a.s.channels.track(ctx, person{Actor: who, admin: true}, req.Msg, send)
		}
		there, err := passedFor(who, req.Msg)
		if err != nil {
			return err
		}
		told, err := leader.TrackChannel(ctx, there)
		if err != nil {
			return api.FromConnect(err)
		}
		for told.Receive() {
			send(told.Msg())
		}
		return errors.Join(api.FromConnect(told.Err()), told.Close())
	})
}

// UntrackChannel is floxv1connect.AdminHandler.
func (a *admin) UntrackChannel(ctx context.Context, req *connect.Request[floxv1.UntrackChannelRequest]) (*connect.Response[floxv1.UntrackChannelResponse], error) {
	who, err := a.may(ctx, req, adminOnly, actionUntrack)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	was, err := a.s.channels.untrack(ctx, person{Actor: who, admin: true}, req.Msg.GetChannel())
	return answer(&floxv1.UntrackChannelResponse{Tracking: was}, err)
}

// ListChannels is floxv1connect.AdminHandler.
func (a *admin) ListChannels(ctx context.Context, req *connect.Request[floxv1.ListChannelsRequest]) (*connect.Response[floxv1.ListChannelsResponse], error) {
	if _, err := a.person(ctx, req); err != nil {
		return nil, api.ToConnect(err)
	}
	states, err := a.s.channels.list(ctx)
	return answer(&floxv1.ListChannelsResponse{Channels: states}, err)
}

// ShowChannel is floxv1connect.AdminHandler.
func (a *admin) ShowChannel(ctx context.Context, req *connect.Request[floxv1.ShowChannelRequest]) (*connect.Response[floxv1.ShowChannelResponse], error) {
	if _, err := a.person(ctx, req); err != nil {
		return nil, api.ToConnect(err)
	}
	out := &floxv1.ShowChannelResponse{}
	err := a.s.channels.view(ctx, cluster.Linearizable, func(r *cluster.Reader) (err error) {
		s, err := stateOf(r, req.Msg.GetChannel())
		if err == nil {
			out.Channel, out.Tracking, out.NextFetchUnixMs = s.GetChannel(), s.GetTracking(), s.GetNextFetchUnixMs()
			out.Versions, err = channel.Versions(r, out.GetChannel().GetName())
		}
		return err
	})
	return answer(out, err)
}

// DeleteChannel is floxv1connect.AdminHandler.
func (a *admin) DeleteChannel(ctx context.Context, req *connect.Request[floxv1.DeleteChannelRequest]) (*connect.Response[floxv1.DeleteChannelResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	reply, err := a.s.channels.propose(freeing(ctx), who, &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Delete{Delete: req.Msg.GetChannel()}})
	if err == nil {
		err = a.s.note(freeing(ctx), who.Actor, actionDelete, reply.GetChannel().GetName(), "")
	}
	return answer(&floxv1.DeleteChannelResponse{}, err)
}

// SetPublishers is floxv1connect.AdminHandler.
func (a *admin) SetPublishers(ctx context.Context, req *connect.Request[floxv1.SetPublishersRequest]) (*connect.Response[floxv1.SetPublishersResponse], error) {
	who, err := a.person(ctx, req)
	if err != nil {
		return nil, api.ToConnect(err)
	}
	reply, err := a.s.channels.propose(ctx, who, &floxv1.ChannelsCommand{Command: &floxv1.ChannelsCommand_Publishers{Publishers: &floxv1.SetPublishers{
		Channel: req.Msg.GetChannel(), Add: req.Msg.GetAdd(), Drop: req.Msg.GetDrop(),
	}}})
	if err == nil {
		err = a.s.note(ctx, who.Actor, actionPublishers, reply.GetChannel().GetName(), fmt.Sprint(reply.GetChannel().GetPublishers()))
	}
	return answer(&floxv1.SetPublishersResponse{Channel: reply.GetChannel()}, err)
}

// SearchPackages is floxv1connect.AdminHandler.
func (a *admin) SearchPackages(ctx context.Context, req *connect.Request[floxv1.SearchPackagesRequest]) (*connect.Response[floxv1.SearchPackagesResponse], error) {
	if _, err := a.person(ctx, req); err != nil {
		return nil, api.ToConnect(err)
	}
	return answer(a.s.channels.search(ctx, req.Msg))
}

// BuildPackage is floxv1connect.AdminHandler.
func (a *admin) BuildPackage(ctx context.Context, req *connect.Request[floxv1.BuildPackageRequest], stream *connect.ServerStream[floxv1.BuildPackageProgress]) error {
	who, err := a.person(ctx, req)
	if err != nil {
		return api.ToConnect(err)
	}
	return sending(ctx, a, stream, func(ctx context.Context, send func(*floxv1.BuildPackageProgress)) error {
		return a.s.channels.build(ctx, nameOr(who.GetMachine(), who.GetPeer()), req.Msg, send)
	})
}
