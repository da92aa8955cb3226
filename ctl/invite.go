package ctl

import (
	"context"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// inviteOptions are the command line of invite.
type inviteOptions struct {
	*globals
	role      string
	uses      uint32
	ttl       string
	labels    []string
	ephemeral bool
	nonVoter  bool
	user      string
	lan       string
	many      bool // as many as the storehouse lets in through one window
}

func newInviteCmd(g *globals) *cobra.Command {
	opts := inviteOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "invite --role server|agent|worker [--uses N] [--ttl 1h] [--label KEY=VALUE]...",
		Short: "Make, list and cancel the invites that machines join with",
		Long: `Make an invite: one line of text that a machine joins with, once, within an hour,
unless --uses and --ttl say otherwise. It is a secret: whoever has it joins. The
machine gets the role and labels of the invite, and its user, whatever it says itself.

--user says for whom the machine speaks: whose profiles new shells find there and its
commands change (USER/...), and with which rights: member, publisher (uploads) or admin.
Without it, that is who ran the join (sudo: who ran sudo), as a member, if the name is
free: no other machine speaks for it, and no profile is its or gives it a role; never
root. Else the machine joins all the same, and speaks for nobody until an admin says
floxctl machine user; profiles that are assigned to it are there anyway.

--lan lets machines of the storehouse's own network (private addresses of a subnet
that the asked server is on) join without a secret for that long;
each shows the storehouse's fingerprint before it joins.
A --non-voter server keeps everything and answers, but is not asked when the servers
agree: for another office, whose line may be slow or cut. The label voter says so, and
floxctl machine label SERVER voter=true or voter=false changes it later.
--ephemeral agents (CI, containers) are forgotten an hour after they were seen last,
and nobody counts on them: they keep nothing for the DHT and build for nobody.

` + cli.ExitCodes,
		Example: `  floxctl invite --role agent                       one machine, within an hour
  floxctl invite --role agent --uses 50 --ttl 2d --label site=berlin
  floxctl invite --role agent --user alice:admin
  floxctl invite --role agent --uses 20 --user root   servers that root alone uses
  floxctl invite --role server --non-voter --label site=lisbon
  floxctl invite --lan 10m                          agents, whoever is in this network
  floxctl invite list`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts.many = opts.lan != "" && !cmd.Flags().Changed("uses")
			if opts.lan != "" && opts.role == "" {
				opts.role = "agent" // the only one that a network gives
			}
			return runInvite(cmd.Context(), opts, g.printer(cmd))
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.role, "role", "", "what joins: server, agent or worker")
	f.Uint32Var(&opts.uses, "uses", 1, "how many machines may join with it; with --lan 256 unless said")
	f.StringVar(&opts.ttl, "ttl", "1h", "how long it can be used: 10m, 1h, 2d")
	f.StringArrayVar(&opts.labels, "label", nil, "label of whoever joins, `KEY=VALUE`; may be repeated")
	f.BoolVar(&opts.ephemeral, "ephemeral", false, "forget the machine an hour after it was seen last")
	f.BoolVar(&opts.nonVoter, "non-voter", false, "of a server: it follows and answers, and never votes or leads; label voter=false")
	f.StringVar(&opts.user, "user", "", "for whom the machine speaks and with which rights, `NAME[:member|publisher|admin]`")
	f.StringVar(&opts.lan, "lan", "", "no secret: the local network may join for this `TIME`")
	cmd.AddCommand(newInviteListCmd(g), newInviteCancelCmd(g))
	return cmd
}

// request checks the command line before anybody is asked.
func (o inviteOptions) request() (*floxv1.MakeInviteRequest, error) {
	if !slices.Contains([]string{"server", "agent", "worker"}, o.role) {
		return nil, cli.Usage("--role %q: want server, agent or worker", o.role)
	}
	if o.lan != "" && o.role != "agent" {
		return nil, cli.Usage("--lan with --role %s: a network lets in agents; make an invite without --lan", o.role)
	}
	if o.ephemeral && o.role != "agent" {
		return nil, cli.Usage("--ephemeral with --role %s: others count on it; only agents may be ephemeral", o.role)
	}
	if o.nonVoter && o.role != "server" {
		return nil, cli.Usage("--non-voter with --role %s: servers alone vote", o.role)
	}
	if o.uses == 0 {
		return nil, cli.Usage("--uses 0: want at least 1")
	}
	ttl, err := parseSpan("--ttl", o.ttl)
	if err == nil && o.lan != "" {
		ttl, err = parseSpan("--lan", o.lan)
	}
	if err != nil {
		return nil, err
	}
	if o.nonVoter {
		o.labels = append(slices.Clone(o.labels), "voter=false")
	}
	labels, err := parseLabels(o.labels)
	if err != nil {
		return nil, err
	}
	req := &floxv1.MakeInviteRequest{
		Role: o.role, Uses: o.uses, TtlSeconds: uint64(ttl / time.Second), Labels: labels, Ephemeral: o.ephemeral, Lan: o.lan != "",
	}
	if o.many {
		req.Uses = 0
	}
	if o.user != "" {
		req.User, err = parseGrant(o.user)
	}
	return req, err
}

// parseGrant reads NAME[:ROLE].
func parseGrant(text string) (*floxv1.UserGrant, error) {
	name, role, found := strings.Cut(text, ":")
	if !found {
		role = "member"
	}
	if name == "" || !slices.Contains([]string{"member", "publisher", "admin"}, role) {
		return nil, cli.Usage("user %q: want NAME or NAME:member, NAME:publisher, NAME:admin", text)
	}
	return &floxv1.UserGrant{Name: name, Role: role}, nil
}

// inviteFacts is an invite; invite is the line of text, known only when it is made,
// as is the fingerprint that a machine shows before it joins from the LAN.
type inviteFacts struct {
	Invite      string            `json:"invite,omitempty"`
	Fingerprint string            `json:"fingerprint,omitempty"`
	ID          string            `json:"id"`
	Role        string            `json:"role"`
	Uses        uint32            `json:"uses"` // left
	ExpiresAt   *string           `json:"expiresAt"`
	Labels      map[string]string `json:"labels"`
	Ephemeral   bool              `json:"ephemeral"`
	User        string            `json:"user"`
	UserRole    string            `json:"userRole"`
	LAN         bool              `json:"lan"`
	MadeAt      *string           `json:"madeAt"`
	MadeBy      string            `json:"madeBy"`
}

func inviteOf(r *floxv1.InviteRecord) inviteFacts {
	return inviteFacts{
		ID: r.GetId(), Role: r.GetRole(), Uses: r.GetUses(), ExpiresAt: stampMs(r.GetExpiresUnixMs()), Labels: labelMap(r.GetLabels()),
		Ephemeral: r.GetEphemeral(), User: r.GetUser().GetName(), UserRole: r.GetUser().GetRole(), LAN: r.GetLan(),
		MadeAt: stampMs(r.GetMadeUnixMs()), MadeBy: actorOf(r.GetBy()),
	}
}

// runInvite prints the invite alone on its line, so that it can be copied or piped.
func runInvite(ctx context.Context, opts inviteOptions, out *output) error {
	req, err := opts.request()
	if err != nil {
		return err
	}
	resp, err := opts.admin().MakeInvite(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	record := resp.Msg.GetRecord()
	if out.json {
		facts := inviteOf(record)
		facts.Invite, facts.Fingerprint = resp.Msg.GetInvite(), fingerprintOf(resp.Msg.GetInvite())
		return out.printJSON(facts)
	}
	until := cli.FormatDuration(time.Duration(req.GetTtlSeconds()) * time.Second)
	if req.GetLan() {
		out.printf("For %s, %s of this network may join as %s, without a secret:\n\n", until, plural(uint64(record.GetUses()), "machine", "machines"), req.GetRole())
		out.printf("  sudo floxctl join\n\n")
		if f := fingerprintOf(resp.Msg.GetInvite()); f != "" {
			out.printf("It shows the storehouse's fingerprint, which must be\n\n  %s\n\n", f)
		}
		out.printf("End it earlier with: floxctl invite cancel %s\n", clean(record.GetId()))
		return nil
	}
	out.printf("%s may join as %s within %s. On it, run:\n\n", plural(uint64(req.GetUses()), "machine", "machines"), req.GetRole(), until)
	out.printf("sudo floxctl join %s\n\nWhoever has this line can join. Take it back with: floxctl invite cancel %s\n",
		clean(resp.Msg.GetInvite()), clean(record.GetId()))
	return nil
}

// fingerprintOf gives the fingerprint in an invite; "" if a newer storehouse made it.
func fingerprintOf(invite string) string {
	inv, err := api.ParseJoinInvite(invite)
	if err != nil {
		return ""
	}
	return inv.TrustList.String()
}

func newInviteListCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the invites that can still be used",
		Long: `List the invites that can still be used. The secret in them is not known any more.

` + cli.ExitCodes,
		Example: "  floxctl invite list --json",
		Args:    cli.Args(0, 0, ""),
		RunE:    func(cmd *cobra.Command, _ []string) error { return runInviteList(cmd.Context(), g, g.printer(cmd)) },
	}
}

// runInviteList lists those that end first at the top, as the storehouse does not sort.
func runInviteList(ctx context.Context, g *globals, out *output) error {
	resp, err := g.admin().ListInvites(ctx, connect.NewRequest(&floxv1.ListInvitesRequest{}))
	if err != nil {
		return explainAdmin(err)
	}
	invites := resp.Msg.GetInvites()
	slices.SortStableFunc(invites, func(a, b *floxv1.InviteRecord) int { return int(a.GetExpiresUnixMs() - b.GetExpiresUnixMs()) })
	if out.json {
		facts := make([]inviteFacts, 0, len(invites))
		for _, r := range invites {
			facts = append(facts, inviteOf(r))
		}
		return out.printJSON(facts)
	}
	if len(invites) == 0 {
		out.printf("No invite can be used now. Make one: floxctl invite --role agent\n")
		return nil
	}
	now := time.Now()
	rows := [][]string{{"ID", "ROLE", "USES LEFT", "ENDS IN", "USER", "LABELS", "MADE BY"}}
	for _, r := range invites {
		role, ends := r.GetRole(), "over"
		if left := time.UnixMilli(r.GetExpiresUnixMs()).Sub(now); left > 0 {
			ends = cli.FormatDuration(left.Truncate(time.Second))
		}
		if r.GetLan() {
			role += ", LAN"
		}
		if r.GetEphemeral() {
			role += ", ephemeral"
		}
		rows = append(rows, []string{
			clean(r.GetId()), clean(role), cli.FormatCount(uint64(r.GetUses())), ends, orDash(grantOf(r.GetUser())),
			orDash(labelsOf(r.GetLabels())), actorOf(r.GetBy()),
		})
	}
	out.table(rows, map[int]bool{2: true, 3: true})
	return nil
}

// grantOf gives "alice:admin".
func grantOf(u *floxv1.UserGrant) string {
	if u.GetName() == "" {
		return ""
	}
	return clean(u.GetName() + ":" + u.GetRole())
}

func newInviteCancelCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "Take an invite back",
		Long: `Take an invite back: nobody joins with it any more. Machines that joined with it
stay; see floxctl machine revoke for those.

` + cli.ExitCodes,
		Example: "  floxctl invite cancel 7F3K2Q",
		Args:    cli.Args(1, 1, "ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, err := g.admin().CancelInvite(cmd.Context(), connect.NewRequest(&floxv1.CancelInviteRequest{Id: args[0]})); err != nil {
				return explainAdmin(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(struct {
					ID string `json:"id"`
				}{args[0]})
			}
			out.printf("Invite %s is cancelled.\n", clean(args[0]))
			return nil
		},
	}
}
