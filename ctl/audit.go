package ctl

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

func newAuditCmd(g *globals) *cobra.Command {
	req := &floxv1.AuditRequest{}
	cmd := &cobra.Command{
		Use:   "audit [--follow] [--limit N] [--machine MACHINE] [--action ACTION]",
		Short: "Show who changed what in the storehouse",
		Long: `Show the storehouse's audit log, oldest first: who joined, was invited, changed
and revoked, keys, collections and servers, and what was refused. Reads are never
logged. With --json one line for each record.

` + cli.ExitCodes,
		Example: `  floxctl audit --limit 20
  floxctl audit --follow
  floxctl audit --action machine. --machine laptop --limit 0`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runAudit(cmd.Context(), g, g.printer(cmd), req)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&req.Follow, "follow", "f", false, "go on with what happens from now, until Ctrl-C")
	f.Uint32VarP(&req.Limit, "limit", "n", 100, "the newest so many; 0 = all")
	f.StringVar(&req.Machine, "machine", "", "only what was done to or by this machine: name or peer ID")
	f.StringVar(&req.Action, "action", "", "only actions that begin so: machine, invite.make")
	return cmd
}

// auditFacts is one line of audit --json; index is the record's name.
type auditFacts struct {
	Index   uint64  `json:"index"`
	At      *string `json:"at"`
	Peer    string  `json:"peer"`
	Machine string  `json:"machine"`
	User    string  `json:"user"`
	Action  string  `json:"action"`
	Subject string  `json:"subject"`
	Detail  string  `json:"detail"`
	Refused bool    `json:"refused"`
}

// runAudit prints records as they come, so that all of a long log is no more
// to hold than a page of it.
func runAudit(ctx context.Context, g *globals, out *output, req *floxv1.AuditRequest) error {
	stream, err := g.admin().Audit(ctx, connect.NewRequest(req))
	if err != nil {
		return explainAdmin(err)
	}
	defer stream.Close()
	for stream.Receive() {
		for _, r := range stream.Msg().GetRecords() {
			if err := printAudit(out, r); err != nil {
				return err
			}
		}
	}
	if err := explainAdmin(stream.Err()); err != nil && (!req.GetFollow() || !errors.Is(err, context.Canceled)) {
		return err
	}
	return nil
}

// printAudit prints a record as one line: time, action, subject, who, in words.
func printAudit(out *output, r *floxv1.AuditRecord) error {
	a := r.GetActor()
	if out.json {
		return out.printJSONLine(auditFacts{
			Index: r.GetIndex(), At: stampMs(r.GetTimeUnixMs()), Peer: a.GetPeer(), Machine: a.GetMachine(), User: a.GetUser(),
			Action: r.GetAction(), Subject: r.GetSubject(), Detail: r.GetDetail(), Refused: r.GetRefused(),
		})
	}
	action := clean(r.GetAction())
	if r.GetRefused() {
		action = out.paint(red, action+" REFUSED")
	}
	detail := ""
	if r.GetDetail() != "" {
		detail = ": " + clean(r.GetDetail())
	}
	out.printf("%s  %s %s by %s%s\n", out.paint(dim, time.UnixMilli(r.GetTimeUnixMs()).Format(time.DateTime)), action,
		clean(orDash(r.GetSubject())), actorOf(a), detail)
	return nil
}
