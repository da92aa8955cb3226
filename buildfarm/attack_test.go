package buildfarm

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// What hostile builds try: of their inputs lib, a directory, and text, a
// file; of the store they run in; of this machine, where HIDDEN is what must be hidden
// and BUILDER the builder's own.
const (
	onInputs = `chmod u+w $lib $lib/data $text; echo evil > $lib/data; echo evil > $text; echo evil > $lib/extra
		unshare -rm sh -c 'mount -o remount,bind,rw $lib; umount $lib; chmod u+w $lib/data; echo evil > $lib/data'
		mv $lib $lib.old; mkdir $lib; echo evil > $lib/data; rm -f $text; echo evil > $text
		for f in HIDDEN HIDDEN/* BUILDER; do echo evil > $f/evil && echo wrote $f; echo evil > $f && echo wrote $f; cat $f; done
		setsid sh -c ': HIDDEN; while :; do chmod u+w $lib $lib/data; echo evil > $lib/data; rm -rf $out; echo lingers > $out; echo > up; done' > /dev/null 2>&1 &
		until [ -e up ]; do sleep .01; done
`
	onState = `for f in /.flox/*/* /.flox/var/nix/db/*; do chmod u+w $f; echo evil > $f; done; kill -9 1 $PPID`
)

// What a build does to its inputs, to the store it runs in, to the state of Nix or to
// this machine changes nothing of what others get.
func TestAttacks(t *testing.T) {
	from := newOrigin(t)
	inputs := "lib = " + script("lib", "mkdir -p $out/bin; echo good > $out/data; echo tool > $out/bin/tool", "") + "; text = " + script("text", "echo good > $out", "") + ";"
	honest, honestPlan := from.instantiate(t, script("honest", "cat $lib/data $text > $out; ls $lib >> $out", inputs))
	common := from.realise(t, honestPlan)
	// As root builds have users of their own; what an ordinary user's have is theirs.
	for world, attacks := range map[Sandbox][]string{SandboxOn: {onInputs + onState}, SandboxOff: {onInputs, onState}} {
		t.Run(string(world), func(t *testing.T) {
			t.Parallel()
			secret, err := os.MkdirTemp("/var/tmp", "state-") // in /tmp builds have their own
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(secret)
			err = os.WriteFile(filepath.Join(secret, "key"), []byte("secret"), 0o600)
			if err = errors.Join(err, os.Chmod(filepath.Join(secret, "key"), 0o666), os.Chmod(secret, 0o777)); err != nil { //nolint:gosec // nothing but the room is in the way
				t.Fatal(err)
			}
			b := newBuilder(t, func(c *Config) { c.Sandbox, c.Hide = world, []string{secret} })
			for _, attack := range attacks {
				text := strings.NewReplacer("HIDDEN", secret, "BUILDER", b.cfg.Dir).Replace(attack)
				drv, plan := from.instantiate(t, script("evil", "( "+text+"\n) 2>&1; echo evil > $out", inputs))
				evil, err := build(t.Context(), b, from, &Job{Drv: drv, Plan: plan, Inputs: common})
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("status %d, %s\n%s", evil.Status, evil.Message, evil.log)
				if strings.Contains(evil.log, "wrote") || strings.Contains(evil.log, "secret") {
					t.Error("it reached what is not its")
				}
				// What lingers may write until Nix has ended: what is signed is what there is then.
				if out := evil.Outputs["out"]; out != nil && !bytes.Equal(out.NarHash[:], sum(evil.nars["out"])) {
					t.Errorf("signed is another output than %q", evil.nars["out"])
				}
				if left := running(t, secret); len(left) > 0 {
					t.Errorf("still running: %q", left)
				}
				got, err := build(t.Context(), b, from, &Job{Drv: honest, Plan: honestPlan, Inputs: common})
				if err != nil || !got.Status.OK() {
					t.Fatalf("afterwards: %+v, %v", got.Result, err)
				}
				if nar := got.nars["out"]; !strings.Contains(nar, "good\ngood\nbin\ndata\n") {
					t.Errorf("an honest build is poisoned: %q", nar)
				}
			}
		})
	}
}

// What Nix says of a build is believed only where it can be: the build may have had it
// say so.
func TestClaims(t *testing.T) {
	dir := flox.DefaultStoreDir
	name := func(hash, name string) flox.StorePath {
		return flox.StorePath(strings.Repeat(hash, flox.HashPartLen) + "-" + name)
	}
	ca := nix.ContentAddress{Method: nix.CAFlat, Hash: nix.Hash{Algo: nix.SHA256, Sum: sum("right")}}
	fixed, err := ca.Path(dir, "x", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	plain := nix.DrvOutput{Kind: nix.OutputInputAddressed, Path: name("a", "x")}
	flat := nix.DrvOutput{Kind: nix.OutputFixed, Path: fixed, Algo: nix.SHA256, Hash: ca.Hash}
	floating := nix.DrvOutput{Kind: nix.OutputFloating, Algo: nix.SHA256, Recursive: true}
	b := &Builder{cfg: Config{Dir: t.TempDir(), StoreDir: dir}, places: map[int]bool{}}
	if err := b.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(remove(b.cfg.Dir), b.Close()); err != nil {
			t.Error(err)
		}
	})
	for what, c := range map[string]struct {
		output nix.DrvOutput
		claim  flox.PathInfo
		text   string
		want   string // "" = it is taken
	}{
		"input-addressed":         {plain, flox.PathInfo{Path: name("a", "x"), References: []flox.StorePath{name("b", "in")}}, "text", ""},
		"another's path":          {plain, flox.PathInfo{Path: name("c", "x")}, "text", "cannot be " + string(name("c", "x"))},
		"a reference to no input": {plain, flox.PathInfo{Path: name("a", "x"), References: []flox.StorePath{name("d", "other")}}, "text", "none of its inputs"},
		"fixed":                   {flat, flox.PathInfo{Path: fixed, CA: ca.String()}, "right", ""},
		"fixed, but other":        {flat, flox.PathInfo{Path: fixed, CA: ca.String()}, "wrong", "has the content address"},
		"floating":                {floating, flox.PathInfo{Path: name("a", "x")}, "text", "has the content address"},
		"another name":            {floating, flox.PathInfo{Path: name("a", "y")}, "text", "cannot be"},
		"nothing there":           {plain, flox.PathInfo{Path: name("a", "x")}, "", "cannot be read"},
	} {
		p, err := b.place()
		if err != nil {
			t.Fatal(err)
		}
		if file := filepath.Join(p.dir, "store", string(c.claim.Path)); c.text != "" {
			if err := os.WriteFile(file, []byte(c.text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		job := &Job{Drv: name("e", "x.drv"), Plan: &nix.Derivation{Name: "x", Outputs: map[string]nix.DrvOutput{"out": c.output}}}
		made, err := p.collect(t.Context(), job, map[string]*flox.PathInfo{"out": &c.claim}, []*flox.PathInfo{{Path: name("b", "in")}})
		switch {
		case c.want == "" && (err != nil || made["out"].info.Path != c.claim.Path || made["out"].info.CA != c.claim.CA):
			t.Errorf("%s: %v", what, err)
		case c.want != "" && (!errors.Is(err, errRejected) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), string(job.Drv))):
			t.Errorf("%s: %v, want %q of %s", what, err, c.want, job.Drv)
		}
		for _, m := range made {
			b.inputs.done(m.input)
		}
		p.close()
	}
}

// Inputs are what the storehouse has: what another process has left is hashed first,
// and what is valid with other content now is fetched.
func TestInputsAreWhatTheyAreSaidToBe(t *testing.T) {
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := remove(dir); err != nil {
			t.Error(err)
		}
	})
	source := filepath.Join(t.TempDir(), "source")
	fetched := 0
	hold := func(s *inputs, info *flox.PathInfo) (text string, err error) {
		in, err := s.hold(t.Context(), info, func(w io.Writer) error {
			fetched++
			return nix.DumpPath(t.Context(), w, source)
		})
		if err != nil {
			return "", err
		}
		defer s.done(in)
		b, err := os.ReadFile(filepath.Join(in.file, "data"))
		return string(b), err
	}
	have := func(text string) *flox.PathInfo {
		t.Helper()
		if err := errors.Join(os.MkdirAll(source, 0o755), os.WriteFile(filepath.Join(source, "data"), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		hash := nix.SHA256.New()
		size := &counter{}
		if err := nix.DumpPath(t.Context(), io.MultiWriter(hash, size), source); err != nil {
			t.Fatal(err)
		}
		return &flox.PathInfo{Path: "path", NarHash: [32]byte(hash.Sum(nil)), NarSize: size.n}
	}
	open := func() *inputs {
		t.Helper()
		s, err := openInputs(dir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	check := func(what string, s *inputs, info *flox.PathInfo, want string, times int) {
		t.Helper()
		if text, err := hold(s, info); err != nil || text != want || fetched != times {
			t.Errorf("%s: %q, %v, fetched %d times; want %q, %d times", what, text, err, fetched, want, times)
		}
	}
	s, info := open(), have("good")
	check("first", s, info, "good", 1)
	check("again", s, info, "good", 1)
	s = open()
	check("of another process", s, info, "good", 1)
	for _, file := range s.kept {
		if err := errors.Join(os.Chmod(file.file+"/data", 0o600), os.WriteFile(file.file+"/data", []byte("evil"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	s = open()
	check("changed on the disk", s, info, "good", 2)
	other := have("new")
	check("of the same name", s, other, "new", 3)
	if _, err := hold(s, info); err != nil {
		t.Errorf("the first is still here: %v", err)
	}
	s = open()
	if err := s.trim(0); err != nil || s.used != 0 {
		t.Errorf("%d bytes are left: %v", s.used, err)
	}
	// What comes instead of what is wanted is not kept.
	if _, err := hold(s, info); !errors.Is(err, flox.ErrCorrupt) {
		t.Errorf("other content was taken: %v", err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 || len(s.kept) != 0 {
		t.Errorf("left: %v, %v, %v", files, s.kept, err)
	}
}

func sum(text string) []byte {
	h := nix.SHA256.New()
	h.Write([]byte(text))
	return h.Sum(nil)
}
