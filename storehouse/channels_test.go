package storehouse

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
)

// expressionOf makes files a store path of the storehouse.
func expressionOf(t *testing.T, s *Server, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "exprs")
	for name, text := range files {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil { //nolint:gosec // no secret
			t.Fatal(err)
		}
	}
	r, w := io.Pipe()
	go func() { _ = w.CloseWithError(nix.DumpPath(t.Context(), w, dir)) }()
	info, _, err := s.PublishSource(within(t), "exprs", r, "tester")
	if err != nil {
		t.Fatal(err)
	}
	return string(info.Path)
}

// tools is an expression with hello in a version.
func tools(version string) map[string]string {
	return map[string]string{"text": "greetings", "default.nix": `{ system ? builtins.currentSystem }:
		let tool = name: script: derivation { inherit name system; builder = "/bin/sh"; args = [ "-c" script ]; PATH = "/usr/bin:/bin"; text = ./text; };
		in {
			hello = tool "hello-` + version + `" "cat $text >$out" // { meta = { description = "Says hello to the world"; priority = 7; }; };
			tools = { recurseForDerivations = true; jq = tool "jq-1.7" "echo jq >$out"; };
			fails = tool "fails-1" "echo it breaks; exit 3";
			broken = tool "broken-1" (throw "no");
			here = builtins.readFile /etc/passwd;
		}`}
}

func adminPerson() person {
	return person{Actor: &floxv1.Actor{Machine: "desk", User: "olga"}, admin: true}
}

// publishChannel publishes an expression, and gives the last thing that is told.
func publishChannel(t *testing.T, s *Server, who person, name, source string) (end *floxv1.PublishChannelProgress, err error) {
	t.Helper()
	err = s.channels.publish(within(t), who, &floxv1.PublishChannelRequest{Channel: name, Source: source, Systems: []string{linux}}, func(p *floxv1.PublishChannelProgress) { end = p })
	return end, err
}

// A channel has packages by name, of every version that is kept: they are found, and
// built when somebody wants them.
func TestChannelsNamePackages(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1)
	s := f.Server
	_, err := s.channels.find(within(t), "hello", linux)
	if !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "floxctl channel publish") || !strings.Contains(err.Error(), "floxctl channel track nixpkgs https://") {
		t.Errorf("without a channel: %v", err)
	}
	one := expressionOf(t, s, tools("2.1"))
	if _, err := publishChannel(t, s, alice(), "Tools", one); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("who is no admin: %v", err)
	}
	first, err := publishChannel(t, s, adminPerson(), "Tools", one)
	if err != nil {
		t.Fatal(err)
	}
	if v := first.GetVersion(); v.GetNumber() != 1 || v.GetPackages() != 5 || v.GetFailed() != 2 || len(first.GetFailures()) != 2 || !strings.HasPrefix(first.GetFailures()[0], "broken for "+linux) {
		t.Errorf("published %v", first)
	}
	if again, err := publishChannel(t, s, adminPerson(), "tools", one); err != nil || again.GetChannel() != nil || again.GetVersion().GetNumber() != 1 {
		t.Errorf("published again: %v, %v", again, err)
	}
	hits, err := s.channels.search(within(t), &floxv1.SearchPackagesRequest{Term: "HEL"})
	if err != nil || len(hits.GetPackages()) != 1 || hits.GetPackages()[0].GetVersion() != "2.1" || hits.GetPackages()[0].GetChannel() != "Tools" || hits.GetPackages()[0].GetPriority() != 7 {
		t.Errorf("found %v, %v", hits, err)
	}
	build := func(name string) (doing []string, pkg *floxv1.CataloguePackage, err error) {
		err = s.channels.build(within(t), "tester", &floxv1.BuildPackageRequest{Name: name, Systems: []string{linux}}, func(p *floxv1.BuildPackageProgress) {
			if p.GetDoing() != "" {
				doing = append(doing, p.GetDoing())
			}
			if len(p.GetPackages()) == 1 {
				pkg = p.GetPackages()[0]
			}
		})
		return doing, pkg, err
	}
	doing, pkg, err := build("hello")
	if err != nil || len(doing) != 2 || pkg.GetName() != "hello" {
		t.Fatalf("build: %v, %v, %v", doing, pkg, err)
	}
	if valid, err := s.isValid(within(t), flox.StorePath(pkg.GetPaths()[0])); err != nil || !valid {
		t.Errorf("%s: %v, %v", pkg.GetPaths(), valid, err)
	}
	if doing, _, err := build("tools.hello"); err != nil || len(doing) != 0 {
		t.Errorf("what is there already: %v, %v", doing, err)
	}
	two := expressionOf(t, s, tools("2.2"))
	if second, err := publishChannel(t, s, adminPerson(), "tools", two); err != nil || second.GetVersion().GetNumber() != 2 {
		t.Fatalf("second: %v, %v", second, err)
	}
	for name, want := range map[string]string{"hello": "2.2 2", "hello@2.1": "2.1 1", "hello@2": "2.2 2", "Tools.tools.jq": "1.7 2", "jq": "1.7 2"} {
		got, err := s.channels.find(within(t), name, linux)
		if err != nil || fmt.Sprint(got.pkg.GetVersion(), " ", got.pkg.GetVersionNumber()) != want {
			t.Errorf("%s is %v, %v, want %s", name, got, err, want)
		}
	}
	for name, words := range map[string]string{"helo": "there is hello", "hello@3": "is there as 2.2, not 3", "nothing-like-it": "floxctl search", "a b": "want NAME"} {
		if _, err := s.channels.find(within(t), name, linux); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v, want %q", name, err, words)
		}
	}
	if _, err := s.channels.find(within(t), "hello", "aarch64-linux"); !errors.Is(err, flox.ErrNotFound) || !strings.Contains(err.Error(), "is there for "+linux) {
		t.Errorf("another system: %v", err)
	}
	if _, _, err := build("broken"); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "cannot be evaluated") {
		t.Errorf("broken: %v", err)
	}
	if _, _, err := build("fails"); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "could not be made") {
		t.Errorf("fails: %v", err)
	}
	rooted := func() (names []string) {
		err := s.channels.roots(within(t), nil, func(r root) bool { names = append(names, r.name); return true })
		if err != nil {
			t.Error(err)
		}
		return names
	}
	if names := rooted(); !slices.Equal(names, []string{"Tools 2", "Tools 2", "Tools 1", "Tools 1", "Tools hello 2.1"}) {
		t.Errorf("roots %v", names)
	}
	before := s.node.Applied()
	if err := s.channels.expireAll(within(t), time.Now().Add(364*24*time.Hour)); err != nil || s.node.Applied() != before {
		t.Errorf("within a year: %v, %d entries", err, s.node.Applied()-before)
	}
	if err := s.channels.expireAll(within(t), time.Now().Add(366*24*time.Hour)); err != nil || s.node.Applied() == before || len(rooted()) != 5 {
		t.Errorf("by a clock that is a year ahead: %v, %d entries, roots %v", err, s.node.Applied()-before, rooted())
	}
	admin := operatorOf(t, s)
	if _, err := admin.DeleteChannel(within(t), connect.NewRequest(&floxv1.DeleteChannelRequest{Channel: "TOOLS"})); err != nil {
		t.Error(err)
	}
	if names := rooted(); len(names) != 0 {
		t.Errorf("roots of a deleted channel: %v", names)
	}
}

// Publishers are named by admins, and publish what is there already.
func TestPublishers(t *testing.T) {
	t.Parallel()
	f := newFarm(t, evaluator(t), "", 1)
	s, admin := f.Server, operatorOf(t, f.Server)
	if _, err := publishChannel(t, s, adminPerson(), "tools", expressionOf(t, s, tools("1"))); err != nil {
		t.Fatal(err)
	}
	two := expressionOf(t, s, tools("2"))
	if _, err := publishChannel(t, s, alice(), "tools", two); !errors.Is(err, flox.ErrDenied) || !strings.Contains(err.Error(), "channel publishers tools --add alice") {
		t.Errorf("who is none: %v", err)
	}
	set := func(add, drop []string) {
		t.Helper()
		if _, err := admin.SetPublishers(within(t), connect.NewRequest(&floxv1.SetPublishersRequest{Channel: "tools", Add: add, Drop: drop})); err != nil {
			t.Fatal(err)
		}
	}
	set([]string{"Alice", "bob", "alice"}, nil)
	if end, err := publishChannel(t, s, alice(), "tools", two); err != nil || end.GetVersion().GetNumber() != 2 || len(end.GetChannel().GetPublishers()) != 2 {
		t.Errorf("who is one: %v, %v", end, err)
	}
	set(nil, []string{"ALICE"})
	if _, err := publishChannel(t, s, alice(), "tools", expressionOf(t, s, tools("3"))); !errors.Is(err, flox.ErrDenied) {
		t.Errorf("who was one: %v", err)
	}
	empty := expressionOf(t, s, map[string]string{"default.nix": "{ a = 1; }"})
	if _, err := publishChannel(t, s, adminPerson(), "tools", empty); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "it has no derivation") {
		t.Errorf("nothing to install: %v", err)
	}
	wrong := expressionOf(t, s, map[string]string{"default.nix": "{ a = "})
	if _, err := publishChannel(t, s, adminPerson(), "tools", wrong); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "syntax error") {
		t.Errorf("no expression: %v", err)
	}
	log := auditOf(t, admin, &floxv1.AuditRequest{})
	if n := len(slices.DeleteFunc(slices.Clone(log), func(a string) bool { return a != actionPublishers })); n != 2 {
		t.Errorf("audit log %v, want publishers twice", log)
	}
}
