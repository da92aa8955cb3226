package world

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/floxctl/flox"
)

// Tool is a program with a command line that prints something useful.
type Tool struct {
	Name string `json:"name"`
	Program
	// Args are its arguments; it runs in a directory that holds ToolFiles, with
	// nothing on its standard input but Stdin.
	Args  []string `json:"args"`
	Stdin string   `json:"stdin,omitempty"`
	// Want stands in what it prints.
	Want string `json:"want"`
}

// ToolFiles are what the command lines of Tools read.
var ToolFiles = map[string]string{
	"input.txt": strings.Repeat("the quick brown fox jumps over the lazy dog\n", 20),
	"main.c":    "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\nint main(void) { printf(\"%zu\\n\", strlen(\"hello\")); return 0; }\n",
	"graph.dot": "digraph g { a -> b; b -> c; a -> c; }\n",
}

// toolSpec is a line of the table below: package, program in its bin, command
// line, what is found in its output.
type toolSpec struct {
	attr, exe string
	args      []string
	stdin     string
	want      string
}

// toolSpecs were chosen by what people use, before anything was measured.
var toolSpecs = []toolSpec{
	{"git", "git", []string{"hash-object", "input.txt"}, "", "\n"},
	{"ripgrep", "rg", []string{"--count", "fox", "input.txt"}, "", "20"},
	{"python", "python3", []string{"-c", "import numpy as np; a = np.arange(12.0).reshape(3, 4); print('sum', (a @ a.T).sum())"}, "", "sum 1"},
	{"compiler", "gcc", []string{"-O1", "-S", "-o", "-", "main.c"}, "", "main:"},
	{"vim", "vim", []string{"-N", "-u", "DEFAULTS", "-es", "-c", "put =6*7", "-c", "%print", "-c", "qa!"}, "", "42"},
	{"jq", "jq", []string{"-n", "[1, 2, 3] | add"}, "", "6"},
	{"sqlite3", "sqlite3", []string{":memory:", "create table t(x); insert into t values (1), (2), (39); select sum(x) from t"}, "", "42"},
	{"curl", "curl", []string{"-s", "file:///proc/self/status"}, "", "curl"},
	{"gawk", "gawk", []string{"{ n += NF } END { print n }", "input.txt"}, "", "180"},
	{"tar", "tar", []string{"-cf", "-", "input.txt"}, "", "quick brown"},
	{"xz-utils", "xz", []string{"-c", "input.txt"}, "", "7zXZ"},
	{"make", "make", []string{"-f", "-"}, "$(info made $(words a b c))\nall: ;\n", "made 3"},
	{"tree", "tree", []string{"."}, "", "input.txt"},
	{"perl", "perl", []string{"-MJSON::PP", "-MList::Util=sum", "-e", "print encode_json({ sum => sum(1 .. 4) })"}, "", `{"sum":10}`},
	{"nano", "nano", []string{"--version"}, "", "GNU nano"},
	{"graphviz", "dot", []string{"-Tsvg", "graph.dot"}, "", "</svg>"},
	{"imagemagick-6.q16", "convert-im6.q16", []string{"-size", "8x8", "gradient:", "-resize", "4x4", "txt:-"}, "", "ImageMagick pixel"},
	{"ffmpeg", "ffmpeg", []string{"-v", "error", "-f", "lavfi", "-i", "testsrc=duration=1:size=64x64:rate=2", "-f", "framemd5", "-"}, "", "#dimensions 0: 64x64"},
	{"php8.2-cli", "php8.2", []string{"-n", "-r", "echo json_encode(['sum' => array_sum([1, 2, 3])]);"}, "", `{"sum":6}`},
	{"ruby3.1", "ruby3.1", []string{"-rjson", "-e", "puts JSON.generate({ sum: [1, 2, 3].sum })"}, "", `{"sum":6}`},
	{"lua5.4", "lua5.4", []string{"-e", "print(('ab'):rep(3))"}, "", "ababab"},
	{"gpg", "gpg", []string{"--no-options", "--no-keyring", "--print-md", "sha256", "input.txt"}, "", "input.txt:"},
	{"openssl", "openssl", []string{"dgst", "-sha256", "input.txt"}, "", "SHA2-256(input.txt)"},
	{"tmux", "tmux", []string{"-V"}, "", "tmux 3"},
	{"htop", "htop", []string{"--version"}, "", "htop 3"},
	{"bc", "bc", nil, "2^64\n", "18446744073709551616"},
}

// tools is the second world, for benchmarks.
var tools = &set{
	name: "world of tools", expression: "tools.nix", finish: findTools,
	tops: []string{
		"git", "ripgrep", "python3", "python3-numpy", "dash", "gcc", "libc6-dev", "vim", "jq", "sqlite3", "curl", "gawk", "tar", "xz-utils",
		"make", "tree", "perl", "nano", "graphviz", "imagemagick-6.q16", "ffmpeg", "php8.2-cli", "ruby3.1", "lua5.4", "gpg", "openssl",
		"tmux", "htop", "bc",
	},
	added: map[string][]string{"git": {"less", "openssh-client"}, "tmux": {"libc-bin"}}, // the latter has the one locale there is
	// Graphics drivers are found by name when a window is opened.
	excluded: append([]string{"libglx-mesa0", "libgl1-mesa-dri", "libegl-mesa0"}, installing...),
}

// Tools gives a second world, which only benchmarks ask for: two dozen programs
// that people use, in Tools. Building it takes a few minutes, 300 MB of downloads
// and 1.2 GB of disk, and ends with each program run where there is nothing but
// the store.
func Tools(ctx context.Context) (*World, error) { return tools.ensure(ctx) }

// findTools fills in w.Tools and runs each.
func findTools(ctx context.Context, w *World, built map[string]flox.StorePath) error {
	for _, spec := range toolSpecs {
		t := Tool{Name: spec.exe, Program: w.program(built[undotted(spec.attr)], spec.exe), Args: spec.args, Stdin: spec.stdin, Want: spec.want}
		if err := w.tryTool(ctx, t); err != nil {
			return err
		}
		w.Tools = append(w.Tools, t)
	}
	slices.SortFunc(w.Tools, func(a, b Tool) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

// undotted is how tools.nix names a package.
func undotted(name string) string { return strings.ReplaceAll(name, ".", "_") }

// Tool gives a tool by the name of its program.
func (w *World) Tool(name string) (Tool, error) {
	for _, t := range w.Tools {
		if t.Name == name {
			return t, nil
		}
	}
	return Tool{}, fmt.Errorf("tool %s: %w", name, flox.ErrNotFound)
}

// WriteToolFiles puts ToolFiles into dir.
func WriteToolFiles(dir string) error {
	for name, content := range ToolFiles {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// alone runs a program where there is nothing but the world's /nix, /proc,
// /dev and a /tmp with the files of $3: what is not in the store does not exist.
const alone = `set -e
top=$1 root=$2 files=$3
shift 3
mount -t tmpfs tmpfs "$root"
mkdir "$root/nix" "$root/proc" "$root/dev" "$root/tmp"
mount --bind "$top" "$root/nix"
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
[ -z "$files" ] || cp "$files"/* "$root/tmp/"
exec env -i HOME=/tmp "$(command -v chroot)" "$root" "$@"`

// tryTool runs a tool where there is nothing but the store.
func (w *World) tryTool(ctx context.Context, t Tool) error {
	dir, err := os.MkdirTemp("", "flox-tools-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	files, root := filepath.Join(dir, "files"), filepath.Join(dir, "root")
	for _, d := range []string{files, root} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := WriteToolFiles(files); err != nil {
		return err
	}
	shell := w.StoreDir.Join(w.shell()) + "/bin/dash"
	argv := []string{
		"--mount", "--propagation", "private", "--", "sh", "-c", alone, "alone", w.Nix().Dir, root, files,
		shell, "-c", `cd /tmp && exec "$@"`, "sh", t.Exe,
	}
	cmd := exec.CommandContext(ctx, "unshare", append(argv, t.Args...)...)
	cmd.Stdin = strings.NewReader(t.Stdin)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), t.Want) {
		return fmt.Errorf("%s, with nothing but the store: %v, printed %.2000q, want %q in it", t.Name, err, out, t.Want) //nolint:errorlint // may be nil
	}
	return nil
}

// shell is the store path of dash, which is in every world.
func (w *World) shell() flox.StorePath {
	for _, p := range w.Paths {
		if strings.HasPrefix(p.Path.Name(), "dash-") {
			return p.Path
		}
	}
	return ""
}
