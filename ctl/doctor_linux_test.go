package ctl

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

// machine makes a file tree that looks like a machine to doctor.
func machine(t *testing.T, files map[string]string) patient {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return patient{root: root, storeDir: "/nix/store", stateDir: "/var/lib/floxd"}
}

// Kernels that cannot work, or survive less, are told apart.
func TestCheckKernel(t *testing.T) {
	tests := map[string]level{
		"4.19.0-27-amd64": levelError, "5.0.21": levelError, "5.1.0": levelWarning, "5.10.0-8-amd64": levelWarning, "6.8.12": levelWarning,
		"6.9.0": levelOK, "6.12+deb13": levelOK, "6.18.44-fc": levelOK, "7.0-rc1": levelOK, "": levelWarning, "garbage": levelWarning,
	}
	for release, want := range tests {
		p := machine(t, map[string]string{"proc/sys/kernel/osrelease": release + "\n"})
		if got := checkKernel(t.Context(), p); len(got) != 1 || got[0].Level != want {
			t.Errorf("kernel %q: %+v, want %s", release, got, want)
		}
	}
}

// A /proc that hides processes is said, whatever the option is called.
func TestCheckProc(t *testing.T) {
	for options, want := range map[string]int{
		"rw": 0, "rw,hidepid=0": 0, "rw,hidepid=off": 0, "rw,hidepid=2": 1, "rw,hidepid=invisible,gid=4": 1, "rw,hidepid=ptraceable": 1,
	} {
		p := machine(t, map[string]string{"proc/self/mountinfo": "22 25 0:20 / /proc rw,nosuid shared:12 - proc proc " + options + "\n"})
		if got := checkProc(t.Context(), p); len(got) != want || want == 1 && (got[0].Level != levelWarning || got[0].Fix == "") {
			t.Errorf("%s: %+v", options, got)
		}
	}
	if got := checkProc(t.Context(), machine(t, nil)); len(got) != 0 {
		t.Errorf("without a table: %+v", got)
	}
}

func TestCheckFuse(t *testing.T) {
	if got := checkFuse(t.Context(), machine(t, nil)); got[0].Level != levelError || got[0].Fix == "" {
		t.Errorf("without /dev/fuse: %+v", got)
	}
	if got := checkFuse(t.Context(), machine(t, map[string]string{"dev/fuse": ""})); got[0].Level != levelError {
		t.Errorf("with a file in its place: %+v", got)
	}
}

// The store directory is judged from the kernel's table of mounts, without
// touching what is mounted there.
func TestCheckMount(t *testing.T) {
	const (
		ours    = "36 25 0:40 / /nix/store ro,nosuid,nodev,relatime shared:1 - fuse.floxd floxd ro,user_id=0\n"
		foreign = "36 25 0:40 / /nix/store rw - ext4 /dev/sda1 rw\n"
		other   = "36 25 0:40 / /nix/store2 rw - fuse.floxd floxd rw\n"
	)
	agent := &floxv1.StatusResponse{MountDir: "/nix/store"}
	tests := []struct {
		name  string
		files map[string]string
		agent *floxv1.StatusResponse
		want  level
	}{
		{"mounted", map[string]string{"proc/self/mountinfo": ours}, agent, levelOK},
		{"ours over another", map[string]string{"proc/self/mountinfo": foreign + ours}, nil, levelOK},
		{"another over ours", map[string]string{"proc/self/mountinfo": ours + foreign}, nil, levelWarning},
		{"nothing there", map[string]string{"proc/self/mountinfo": other}, nil, levelOK},
		{"a Nix store there", map[string]string{"nix/store/0-x": ""}, nil, levelWarning},
		{"agent without its mount", map[string]string{"proc/self/mountinfo": other}, agent, levelError},
		{"garbage in the table", map[string]string{"proc/self/mountinfo": "x - \n\n - y\n"}, nil, levelOK},
	}
	for _, test := range tests {
		p := machine(t, test.files)
		p.agent = test.agent
		if got := checkMount(t.Context(), p); len(got) != 1 || got[0].Level != test.want {
			t.Errorf("%s: %+v, want %s", test.name, got, test.want)
		}
	}
}

func TestUnescapeMount(t *testing.T) {
	if diff := cmp.Diff("/a b\\c", unescapeMount(`/a\040b\134c`)); diff != "" {
		t.Error(diff)
	}
}
