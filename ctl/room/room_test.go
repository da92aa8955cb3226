package room

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	flox "github.com/floxctl/flox"
)

func TestFind(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"store/bin/rg": 0o755, "store/bin/locked": 0o644, "usr/rg": 0o755, "usr/sh": 0o755} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, nil, mode)); err != nil {
			t.Fatal(err)
		}
	}
	store, path := filepath.Join(dir, "store"), filepath.Join(dir, "usr")
	env := []string{"A=1", "PATH=/old", "PATH=" + path, "SHELL=/bin/fish"}
	tests := []struct {
		args []string
		file string
		kind error
	}{
		{[]string{"rg", "-n"}, store + "/bin/rg", nil},
		{[]string{"sh"}, path + "/sh", nil},
		{[]string{"./rg"}, "./rg", nil},
		{nil, "/bin/fish", nil},
		{[]string{"none"}, "", flox.ErrNotFound},
		{[]string{"locked"}, "", flox.ErrDenied},
	}
	for _, test := range tests {
		c, err := Find(store, test.args, env)
		if test.kind != nil {
			if !errors.Is(err, test.kind) {
				t.Errorf("%q: got %v", test.args, err)
			}
			continue
		}
		if err != nil || c.File != test.file {
			t.Errorf("%q: got %q, %v, want %q", test.args, c.File, err, test.file)
		}
		if d := cmp.Diff([]string{"A=1", "SHELL=/bin/fish", "PATH=" + store + "/bin:" + path}, c.Env); d != "" {
			t.Errorf("environment (-want +got):\n%s", d)
		}
	}
	if c, err := Find(store, nil, nil); err != nil || c.File != "/bin/sh" || strings.Join(c.Env, " ") != "PATH="+store+"/bin" {
		t.Errorf("without an environment: %+v, %v", c, err)
	}
}

func TestMounts(t *testing.T) {
	const (
		root  = "22 1 254:0 / / rw - ext4 /dev/vda rw\n"
		ours  = "36 22 0:52 / /nix/store ro,nosuid,nodev - fuse.floxd floxd ro,user_id=0,group_id=0\n"
		other = "37 22 0:53 / /host/a\\040b shared:1 - fuse.floxd floxd ro,user_id=0\n"
		evil  = "41 22 0:56 / /tmp/x rw,nosuid - fuse.floxd floxd rw,user_id=1000,group_id=0,allow_other\n"
		cover = "38 22 0:54 / /nix rw - tmpfs tmpfs rw\n"
		same  = "39 36 0:55 / /nix/store rw - overlay overlay rw\n"
		part  = "40 22 0:52 /x-rg /mnt/rg ro - fuse.floxd floxd ro,user_id=0\n"
	)
	for name, test := range map[string]struct {
		table string
		want  []string
	}{
		"none":     {root, nil},
		"two":      {root + ours + other, []string{"/nix/store", "/host/a b"}},
		"covered":  {root + ours + same, nil},
		"above":    {root + ours + other + cover, []string{"/host/a b"}},
		"again":    {root + ours + cover + ours, []string{"/nix/store"}},
		"part":     {root + part, nil},
		"others'":  {root + evil + ours, []string{"/nix/store"}},
		"rubbish":  {"x\n - \n- - -\n" + ours, []string{"/nix/store"}},
		"profiles": {root + ours + "41 22 0:53 / /flox ro - fuse.floxd floxd-links ro,user_id=0\n", []string{"/nix/store"}},
		"siblings": {root + strings.ReplaceAll(ours, "/nix/store", "/nix/store2") + same, []string{"/nix/store2"}},
	} {
		if d := cmp.Diff(test.want, mounts(test.table), cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
}

func TestIsWhole(t *testing.T) {
	for ids, want := range map[string]bool{
		"         0          0 4294967295\n": true,
		"0 0 65536\n":                        false,
		"0 1000 1\n":                         false,
		"":                                   false,
	} {
		if got := isWhole(ids); got != want {
			t.Errorf("%q: got %v", ids, got)
		}
	}
}
