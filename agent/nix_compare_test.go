package agent

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// momentary is what differs between two stores that hold the same: when a path was
// added, and what a store is called.
var momentary = regexp.MustCompile(`"registrationTime":\d+|"ultimate":true,?|(?m)^Store URL: .*$|(?m)^Version: .*$`)

// sameAnswers runs a command against the agent and against a store of stock Nix.
func sameAnswers(t *testing.T, ours, stock *nixClient, args ...string) {
	t.Helper()
	type answer struct{ out, bad string }
	ask := func(n *nixClient) answer {
		out, bad, err := n.try(args...)
		if err == nil {
			bad = "" // what is told beside an answer names directories
		}
		a := answer{momentary.ReplaceAllString(out, ""), strings.ReplaceAll(bad, n.tmp, "TMP")}
		lines := strings.Split(a.out, "\n")
		slices.Sort(lines)
		a.out = strings.Join(lines, "\n")
		return a
	}
	if got, want := ask(ours), ask(stock); got != want {
		t.Errorf("%s\n  here:  %+v\n  stock: %+v", strings.Join(args, " "), got, want)
	}
}

// Of the same paths the agent tells a stock client what a store of stock Nix does.
func TestStockNixHearsTheSame(t *testing.T) {
	a := runNixAgent(t, newHouse(t))
	ours := newNixClient(t, a)
	stock := &nixClient{t: t, tmp: t.TempDir()}
	for _, e := range ours.env {
		e = strings.ReplaceAll(e, ours.tmp, stock.tmp)
		if strings.HasPrefix(e, "NIX_REMOTE=") {
			e = "NIX_REMOTE=" + filepath.Join(stock.tmp, "root")
		}
		if !strings.HasPrefix(e, "NIX_STATE_DIR=") && !strings.HasPrefix(e, "NIX_LOG_DIR=") {
			stock.env = append(stock.env, e)
		}
	}
	var first, drv string
	for _, n := range []*nixClient{ours, stock} {
		if err := os.MkdirAll(filepath.Join(n.tmp, "conf"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"conf/nix.conf": "experimental-features = nix-command\nsubstituters =\nbuild-users-group =\n", "src": "source", "flat": "flat"} {
			if err := os.WriteFile(filepath.Join(n.tmp, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		source := n.run("nix-store", "--add", filepath.Join(n.tmp, "src"))
		n.run("nix-store", "--add-fixed", "sha1", filepath.Join(n.tmp, "flat"))
		made := n.run("nix-instantiate", "-E", `derivation { name = "made"; system = "x86_64-linux"; builder = "/bin/sh"; src = builtins.toFile "s" "text"; outputs = [ "out" "dev" ]; }`)
		if first == "" {
			first, drv = source, made
		}
		if source != first || made != drv {
			t.Fatalf("added %s and %s, want %s and %s", source, made, first, drv)
		}
	}
	absent := testStore.Join("0123456789abcdfghijklmnpqrsvwxyz-none")
	for _, p := range []string{first, drv, absent} {
		for _, q := range []string{"--hash", "--size", "--references", "--referrers", "--referrers-closure", "--requisites", "--deriver", "--tree", "--graph", "--roots"} {
			sameAnswers(t, ours, stock, "nix-store", "-q", q, p)
		}
		for _, flags := range [][]string{{"-rsSh"}, {"--sigs"}, {"--json"}, {"--json", "-r"}} {
			if p != drv { // nix would open it, and nothing is mounted here
				sameAnswers(t, ours, stock, append(append([]string{"nix", "path-info"}, flags...), p)...)
			}
		}
		sameAnswers(t, ours, stock, "nix-store", "--check-validity", p)
	}
	for _, command := range []string{
		"nix path-info --all", "nix path-info --all --json", "nix store ping", "nix-store --dump-db", "nix-store --verify", "nix-store --verify --check-contents",
		"nix-store --gc --print-roots", "nix-store --gc --print-live", "nix-store --gc --print-dead", "nix-store --optimise",
		"nix-store --check-validity --print-invalid " + first + " " + absent, "nix-store --delete " + absent, "nix-store -r " + first,
		"nix-store --delete " + drv, "nix path-info --all",
	} {
		sameAnswers(t, ours, stock, strings.Fields(command)...)
	}
}
