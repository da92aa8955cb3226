package ctl

import (
	"context"
	"encoding/base64"
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// infoOptions are the command line of info.
type infoOptions struct {
	*globals
	paths   []string
	closure bool
}

func newStoreInfoCmd(g *globals) *cobra.Command {
	opts := infoOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "info PATH... [--closure]",
		Short: "Show what is known of store paths, and how much of them is here",
		Long: `Show hash, size, references, signatures and manifest of store paths, and how much
of their content is on this machine; of kept paths also what is completed in the
background (floxctl keep --offline).

` + cli.ExitCodes,
		Args: cli.Args(1, -1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.paths = args
			return runStoreInfo(cmd.Context(), opts, g.printer(cmd))
		},
	}
	cmd.Flags().BoolVar(&opts.closure, "closure", false, "also everything they refer to, at any depth")
	return cmd
}

// infoFacts uses Nix's names (nix path-info --json) where Nix has one.
type infoFacts struct {
	Path               string   `json:"path"`
	NarHash            string   `json:"narHash"`
	NarSize            uint64   `json:"narSize"`
	References         []string `json:"references"`
	Deriver            string   `json:"deriver,omitempty"`
	CA                 string   `json:"ca,omitempty"`
	RegistrationTime   *string  `json:"registrationTime"`
	Signatures         []string `json:"signatures"`
	Manifest           string   `json:"manifest"`
	ManifestSignatures []string `json:"manifestSignatures"`
	LocalBytes         uint64   `json:"localBytes"`
	ContentBytes       uint64   `json:"contentBytes"`
	Files              uint64   `json:"files"`
	Kept               bool     `json:"kept"`
	Offline            string   `json:"offline,omitempty"`
}

// runStoreInfo prints each path once, also where closures overlap.
func runStoreInfo(ctx context.Context, opts infoOptions, out *output) error {
	paths, err := storeArgs(opts.paths)
	if err != nil {
		return err
	}
	agent := opts.agent()
	dir, err := storeDir(ctx, agent)
	if err != nil {
		return err
	}
	facts := []infoFacts{}
	seen := map[string]bool{} // closures overlap
	for _, p := range paths {
		resp, err := agent.Path(ctx, connect.NewRequest(&floxv1.PathRequest{Path: p, Closure: opts.closure}))
		if err != nil {
			return explain(err)
		}
		for _, d := range resp.Msg.GetPaths() {
			info, err := api.ToPathInfo(d.GetInfo())
			if err != nil {
				return err
			}
			if f := infoOf(dir, info, d); !seen[f.Path] {
				seen[f.Path] = true
				facts = append(facts, f)
			}
		}
	}
	if out.json {
		return out.printJSON(facts)
	}
	for i, f := range facts {
		if i > 0 {
			out.printf("\n")
		}
		printInfo(out, f)
	}
	if opts.closure {
		printClosureSum(out, facts)
	}
	return nil
}

// infoOf joins the signed facts with what is here of them.
func infoOf(dir flox.StoreDir, info *flox.PathInfo, d *floxv1.PathDetails) infoFacts {
	f := infoFacts{
		Path: dir.Join(info.Path), NarHash: "sha256-" + base64.StdEncoding.EncodeToString(info.NarHash[:]), NarSize: info.NarSize,
		References: []string{}, CA: info.CA, Signatures: some(info.Signatures), Manifest: info.Manifest.String(),
		ManifestSignatures: some(info.ManifestSignatures), LocalBytes: d.GetLocalBytes(), ContentBytes: d.GetContentBytes(),
		Files: d.GetFiles(), Kept: d.GetKept(), Offline: clean(d.GetOffline()),
	}
	for _, r := range info.References {
		f.References = append(f.References, dir.Join(r))
	}
	if info.Deriver != "" {
		f.Deriver = dir.Join(info.Deriver)
	}
	if !info.Registered.IsZero() {
		f.RegistrationTime = stamp(info.Registered.Unix())
	}
	return f
}

// printInfo begins with what changes (what is here) and ends with what is long
// (references).
func printInfo(out *output, f infoFacts) {
	out.printf("%s\n", out.paint(bold, f.Path))
	line := func(name, format string, args ...any) {
		out.printf("  %-11s %s\n", name, fmt.Sprintf(format, args...))
	}
	here := "all of it"
	if f.LocalBytes < f.ContentBytes {
		here = fmt.Sprintf("%s (%d %%)", cli.FormatBytes(f.LocalBytes), step{done: f.LocalBytes, total: f.ContentBytes}.percent())
	}
	if f.Kept {
		here += ", kept"
		if f.Offline != "" {
			here += " (offline: " + f.Offline + ")"
		}
	}
	line("here", "%s", here)
	line("content", "%s in %s", cli.FormatBytes(f.ContentBytes), plural(f.Files, "file", "files"))
	line("NAR", "%s, %s", cli.FormatBytes(f.NarSize), f.NarHash)
	line("manifest", "%s", f.Manifest)
	line("signed by", "%s", orDash(signers(f.Signatures)))
	line("manifest by", "%s", orDash(signers(f.ManifestSignatures)))
	if f.CA != "" {
		line("address", "%s", clean(f.CA))
	}
	if f.Deriver != "" {
		line("built from", "%s", f.Deriver)
	}
	if f.RegistrationTime != nil {
		line("valid since", "%s", *f.RegistrationTime)
	}
	for i, r := range f.References {
		name := ""
		if i == 0 {
			name = "refers to"
		}
		line(name, "%s", r)
	}
}

// printClosureSum adds up what a closure costs.
func printClosureSum(out *output, facts []infoFacts) {
	var content, local, nar uint64
	for _, f := range facts {
		content += f.ContentBytes
		local += f.LocalBytes
		nar += f.NarSize
	}
	out.printf("\n%s, %s of content (%s as NARs), %s of it here\n", plural(uint64(len(facts)), "path", "paths"),
		cli.FormatBytes(content), cli.FormatBytes(nar), cli.FormatBytes(local))
}

// signers gives the names of the keys that signed, without the signatures.
func signers(signatures []string) string {
	names := make([]string, 0, len(signatures))
	for _, s := range signatures {
		name, _, _ := strings.Cut(s, ":")
		names = append(names, clean(name))
	}
	return strings.Join(names, ", ")
}
