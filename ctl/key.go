package ctl

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
)

// maxKeyFile bounds a file with a secret key in bytes: Nix's has about 100.
const maxKeyFile = 4096

func newKeyCmd(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "key",
		Short: "List, import and rotate the storehouse's keys",
		Long: `List, import and rotate the keys of the storehouse: those that sign paths for stock
Nix (nix) and for agents (manifest), the secret that members share (swarm), the
upload token (token), and the key that all of them are sealed under (cluster).

` + cli.ExitCodes,
		Example: `  floxctl key list
  floxctl key rotate                       after a server was lost or stolen
  floxctl key import /etc/nix/cache.sec    go on for the users of another cache`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newKeyListCmd(g), newKeyImportCmd(g), newKeyRotateCmd(g))
	return cmd
}

// keyFacts is a key that signs paths.
type keyFacts struct {
	Public    string  `json:"public"`
	Use       string  `json:"use"`
	Signs     bool    `json:"signs"`
	Imported  bool    `json:"imported"`
	RetiresAt *string `json:"retiresAt"`
}

// keyListFacts are the keys and the trust list that names them.
type keyListFacts struct {
	Keys         []keyFacts `json:"keys"`
	TrustVersion uint64     `json:"trustVersion"`
	Epoch        uint64     `json:"epoch"`
	Fingerprint  string     `json:"fingerprint"`
}

func newKeyListCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the public keys that sign paths",
		Long: `List the public keys that sign paths, and until when. Those for nix go into
trusted-public-keys of nix.conf where stock Nix reads from the storehouse; those
for manifest are what agents trust, and reach them by themselves.

` + cli.ExitCodes,
		Example: "  floxctl key list --json",
		Args:    cli.Args(0, 0, ""),
		RunE:    func(cmd *cobra.Command, _ []string) error { return runKeyList(cmd.Context(), g, g.printer(cmd)) },
	}
}

func runKeyList(ctx context.Context, g *globals, out *output) error {
	resp, err := g.admin().ListKeys(ctx, connect.NewRequest(&floxv1.ListKeysRequest{}))
	if err != nil {
		return explainAdmin(err)
	}
	m := resp.Msg
	if out.json {
		facts := keyListFacts{
			Keys: make([]keyFacts, 0, len(m.GetKeys())), TrustVersion: m.GetTrustVersion(), Epoch: m.GetEpoch(), Fingerprint: hex.EncodeToString(m.GetFingerprint()),
		}
		for _, k := range m.GetKeys() {
			facts.Keys = append(facts.Keys, keyFacts{
				Public: k.GetPublic(), Use: k.GetUse(), Signs: k.GetSigns(), Imported: k.GetImported(), RetiresAt: stamp(k.GetRetiresUnix()),
			})
		}
		return out.printJSON(facts)
	}
	rows := [][]string{{"USE", "STATE", "KEY"}}
	for _, k := range m.GetKeys() {
		rows = append(rows, []string{clean(k.GetUse()), keyState(k, time.Now()), clean(k.GetPublic())})
	}
	out.table(rows, nil)
	out.printf("\ntrust list version %d, epoch %d\n", m.GetTrustVersion(), m.GetEpoch())
	return nil
}

// keyState says in words what a key does.
func keyState(k *floxv1.KeyState, now time.Time) string {
	state := "signs"
	if !k.GetSigns() {
		state = "signs no more"
	}
	if k.GetImported() {
		state += ", imported"
	}
	switch left := time.Unix(k.GetRetiresUnix(), 0).Sub(now); {
	case k.GetRetiresUnix() == 0:
	case left > 0:
		state += ", retires in " + cli.FormatDuration(left.Truncate(time.Second))
	default:
		state += ", retires once every path is signed anew"
	}
	return state
}

func newKeyImportCmd(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "import FILE|-",
		Short: "Have the key of an existing binary cache sign here too",
		Long: `Have the secret key of an existing binary cache (nix key generate-secret) sign here
too, what is valid already as well: who trusts its public key can read from this
storehouse at once. It is read from FILE, or with - from standard input, and kept
encrypted by the servers. floxctl key rotate --use imported lets imported keys go.

` + cli.ExitCodes,
		Example: `  floxctl key import /etc/nix/cache.sec
  pass show cache.sec | floxctl key import -`,
		Args: cli.Args(1, 1, "FILE or -"),
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := readKeyFile(args[0], cmd.InOrStdin())
			if err != nil {
				return err
			}
			resp, err := g.admin().ImportKey(cmd.Context(), connect.NewRequest(&floxv1.ImportKeyRequest{SecretKey: text}))
			if err != nil {
				return explainAdmin(err)
			}
			out := g.printer(cmd)
			if out.json {
				return out.printJSON(struct {
					Public string `json:"public"`
				}{resp.Msg.GetPublic()})
			}
			out.printf("Paths are signed with this key too from now on:\n%s\n", clean(resp.Msg.GetPublic()))
			return nil
		},
	}
}

// readKeyFile reads a secret. What is wrong with it is said without showing it:
// somebody may have given the key itself for a name.
func readKeyFile(name string, stdin io.Reader) (string, error) {
	in, what := stdin, "standard input"
	if name != "-" {
		f, err := os.Open(name)
		var bad *fs.PathError
		switch {
		case errors.As(err, &bad):
			if strings.Contains(name, ":") && !strings.Contains(name, "/") {
				return "", cli.Usage("FILE is no file; a key itself is not given on the command line, where others can see it: put it into a file, or give - and pipe it in")
			}
			return "", cli.Usage("key file %s: %v", clean(name), bad.Err)
		case err != nil:
			return "", err
		}
		defer f.Close()
		in, what = f, "key file "+clean(name)
	}
	b, err := io.ReadAll(io.LimitReader(in, maxKeyFile+1))
	if err != nil {
		return "", fmt.Errorf("%s: %w", what, err)
	}
	text := strings.TrimSpace(string(b))
	if len(b) > maxKeyFile || !strings.Contains(text, ":") || strings.ContainsAny(text, " \t\r\n") {
		return "", cli.Usage("%s: want one line name:base64, as nix key generate-secret prints it", what)
	}
	return text, nil
}

// keyUses are what can be rotated.
var keyUses = []string{"nix", "manifest", "swarm", "token", "cluster", "imported"}

func newKeyRotateCmd(g *globals) *cobra.Command {
	use, overlap := []string{}, ""
	cmd := &cobra.Command{
		Use:   "rotate [--use nix,manifest,swarm,token,cluster,imported] [--overlap 30d]",
		Short: "Replace keys by new ones, with an overlap",
		Long: `Replace keys by new ones: nix, manifest, swarm and cluster, unless --use says which.
Old and new hold together for the overlap, so nobody is cut off; what is valid is
signed with the new key meanwhile. The overlap is 30 days for keys that sign and 7
days for swarm and token, unless --overlap says otherwise; given a second time it
shortens overlaps under way. Members hear of a new swarm secret while they are
connected; one that was away all the time comes back by its key and hears of it then.
Only a machine that is in no list (open = true) needs a new invite.json. The new
upload token is in the file upload-token of each server. imported makes nothing
and lets imported keys go.

` + cli.ExitCodes,
		Example: `  floxctl key rotate                           e.g. after a server was stolen
  floxctl key rotate --use nix --overlap 60d   time to change trusted-public-keys
  floxctl key rotate --use token --overlap 1h`,
		Args: cli.Args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runKeyRotate(cmd.Context(), g, g.printer(cmd), use, overlap)
		},
	}
	cmd.Flags().StringSliceVar(&use, "use", nil, "what to replace, of `nix,manifest,swarm,token,cluster,imported` (default nix,manifest,swarm,cluster)")
	cmd.Flags().StringVar(&overlap, "overlap", "", "how long old ones hold beside the new: `TIME` such as 1h, 30d (default 30d, 7d for swarm and token)")
	return cmd
}

func runKeyRotate(ctx context.Context, g *globals, out *output, uses []string, overlap string) error {
	for _, u := range uses {
		if !slices.Contains(keyUses, u) {
			return cli.Usage("--use %q: want some of %s", clean(u), strings.Join(keyUses, ","))
		}
	}
	var span time.Duration
	if overlap != "" {
		var err error
		if span, err = parseSpan("--overlap", overlap); err != nil {
			return err
		}
	}
	if len(uses) == 0 {
		uses = []string{""}
	}
	facts := struct {
		Made         []string `json:"made"`
		TrustVersion uint64   `json:"trustVersion"`
	}{Made: []string{}}
	for _, u := range uses {
		resp, err := g.admin().RotateKeys(ctx, connect.NewRequest(&floxv1.RotateKeysRequest{Use: u, OverlapSeconds: uint64(span / time.Second)}))
		if err != nil {
			return explainAdmin(err)
		}
		facts.Made, facts.TrustVersion = append(facts.Made, resp.Msg.GetMade()...), resp.Msg.GetTrustVersion()
		if !out.json {
			for _, made := range resp.Msg.GetMade() {
				out.printf("new: %s\n", clean(made))
			}
		}
	}
	if out.json {
		return out.printJSON(facts)
	}
	out.printf("In force, by trust list version %d. What goes, and when: floxctl key list\n", facts.TrustVersion)
	return nil
}
