package api

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	flox "github.com/floxctl/flox"
)

func testInvite() *Invite {
	return &Invite{
		Version:    InviteVersion,
		Name:       "s1",
		Secret:     []byte("0123456789abcdef0123456789abcdef"),
		Storehouse: []InvitePeer{{ID: "12D3KooWtest", Addrs: []string{"/ip4/10.0.0.1/tcp/7781"}}},
		TrustList:  flox.CID{1, 2, 3},
		HTTPURL:    "http://10.0.0.1:7780",
		StoreDir:   flox.DefaultStoreDir,
		NixKey:     "s1-1:AAAA",
	}
}

// What is saved is what is loaded, and nobody else on the machine can read it.
func TestInviteSaveLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "invite.json")
	want := testInvite()
	if err := want.Save(path); err != nil {
		t.Fatal(err)
	}
	got, err := LoadInvite(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o600 {
		t.Errorf("mode %o, want 600: the file holds the swarm's secret", st.Mode().Perm())
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".invite-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A newcomer is told what is wrong with the file, not just that it is.
func TestInviteErrors(t *testing.T) {
	edit := func(f func(*Invite)) func() error {
		return func() error {
			inv := testInvite()
			f(inv)
			return inv.Save(filepath.Join(t.TempDir(), "i"))
		}
	}
	parse := func(s string) func() error {
		return func() error { _, err := ParseInvite([]byte(s)); return err }
	}
	for name, c := range map[string]struct {
		do   func() error
		want string
		is   error
	}{
		"version":      {edit(func(i *Invite) { i.Version = 2 }), "version 2", flox.ErrBadInput},
		"short secret": {edit(func(i *Invite) { i.Secret = []byte("x") }), "secret of 1 bytes", flox.ErrBadInput},
		"no server":    {edit(func(i *Invite) { i.Storehouse = nil }), "no server", flox.ErrBadInput},
		"no address":   {edit(func(i *Invite) { i.Storehouse[0].Addrs = nil }), "server 0", flox.ErrBadInput},
		"trust list":   {edit(func(i *Invite) { i.TrustList = flox.CID{} }), "trust_list", flox.ErrBadInput},
		"store dir":    {edit(func(i *Invite) { i.StoreDir = "nix" }), "absolute path", flox.ErrBadInput},
		"nix key":      {edit(func(i *Invite) { i.NixKey = "abc" }), "name:base64", flox.ErrBadInput},
		"url":          {edit(func(i *Invite) { i.HTTPURL = "10.0.0.1:80" }), "http_url", flox.ErrBadInput},
		"unknown key":  {parse(`{"version":1,"colour":"red"}`), "colour", flox.ErrBadInput},
		"not JSON":     {parse("hello"), "JSON", flox.ErrBadInput},
		"empty":        {parse(""), "JSON", flox.ErrBadInput},
		"huge":         {parse(strings.Repeat(" ", maxInviteBytes+1)), "at most", flox.ErrBadInput},
		"missing file": {func() error { _, err := LoadInvite(filepath.Join(t.TempDir(), "none")); return err }, "does not exist", flox.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.do()
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %v saying %q", err, c.is, c.want)
			}
		})
	}
}

// Whatever is accepted can be written and read again unchanged.
func FuzzParseInvite(f *testing.F) {
	f.Add([]byte(`{"version":1,"name":"s","secret":"MDEyMzQ1Njc4OWFiY2RlZg==","storehouse":[{"id":"a","addrs":["b"]}],` +
		`"trust_list":"bafkr4if6bgvcnthxmqdqjjnbzvh5tlwbdmhzoxbu2w5ou7mzlgyzmgd5ji","store_dir":"/nix/store","nix_key":"a:b"}`))
	f.Add([]byte(`{}`))
	path := filepath.Join(f.TempDir(), "i")
	f.Fuzz(func(t *testing.T, b []byte) {
		inv, err := ParseInvite(b)
		if err != nil {
			return
		}
		if err := inv.Save(path); err != nil {
			t.Fatal(err)
		}
		again, err := LoadInvite(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(inv, again); diff != "" {
			t.Error(diff)
		}
	})
}

// A pipe in the place of an invite keeps nobody waiting for a writer.
func TestInviteIsNoPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "invite.json")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadInvite(path); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a pipe: %v, want ErrBadInput", err)
	}
}
