package flox_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/floxctl/flox"

// layers are the folders of this module, lowest first. A package may import
// packages of lower lines and of its own folder; folders of one line are
// neighbours and never import each other. "" is the root package.
var layers = [][]string{
	{""},
	{"api"},
	{"nix"},
	{"content"},
	{"p2p"},
	{"raft"},
	{"fuse"},
	{"members", "profile", "buildfarm", "gitops"},
	{"storehouse", "agent"},
	{"ctl"},
	{"integration"},
	{"bench"},
	{"cmd"},
}

// doors say which folder alone, with what is in it, may import a library.
var doors = map[string]string{
	"github.com/libp2p/":         "p2p",
	"github.com/hashicorp/raft":  "raft",
	"github.com/hanwen/go-fuse/": "fuse",
	"github.com/spf13/cobra":     "ctl",
	"gocloud.dev":                "content/pack/bucket",
}

// rootMayImport are the root package's imports besides the standard library.
var rootMayImport = []string{"github.com/ipfs/go-cid"}

// heavy must not be linked into floxctl, so that it starts in milliseconds.
var heavy = []string{
	"github.com/libp2p/", "github.com/hashicorp/raft",
	"github.com/cockroachdb/pebble", "github.com/hanwen/go-fuse/", "gocloud.dev",
}

// listed is what this test needs of a line of `go list -json`.
type listed struct {
	ImportPath                         string
	Standard                           bool
	Imports, TestImports, XTestImports []string
	Error                              *struct{ Err string }
}

func TestImportsFollowTheLayers(t *testing.T) {
	for _, p := range goList(t, "-e", "./...") {
		if p.Error != nil {
			continue // the compiler says it better
		}
		for _, problem := range checkPackage(p) {
			t.Error(problem)
		}
	}
}

func TestFloxctlStaysSmall(t *testing.T) {
	if _, err := os.Stat("cmd/floxctl"); errors.Is(err, os.ErrNotExist) {
		t.Skip("cmd/floxctl does not exist yet")
	}
	for _, p := range goList(t, "-deps", "./cmd/floxctl") {
		for _, h := range heavy {
			if strings.HasPrefix(p.ImportPath, h) {
				t.Errorf("floxctl links %s: it must stay without %s", p.ImportPath, h)
			}
		}
	}
}

// onlyTests are what no program may link.
var onlyTests = []string{module + "/raft/raftsim", "github.com/anishathalye/porcupine"}

func TestProgramsLinkNoTests(t *testing.T) {
	for _, p := range goList(t, "-deps", "./cmd/...") {
		if slices.Contains(onlyTests, p.ImportPath) {
			t.Errorf("a program links %s: that is for tests", p.ImportPath)
		}
	}
}

// TestLayerRulesCatchMistakes feeds the checker imports that break each rule.
func TestLayerRulesCatchMistakes(t *testing.T) {
	tests := []struct {
		name, from, imports string
		want                string // part of the complaint, "" = allowed
	}{
		{"down", "content", module + "/nix", ""},
		{"own folder", "content/cache", module + "/content", ""},
		{"up", "nix", module + "/content", "higher layer"},
		{"root up", "", module + "/api", "higher layer"},
		{"neighbour", "agent", module + "/storehouse", "neighbour"},
		{"neighbour below", "profile/rules", module + "/gitops", "neighbour"},
		{"unknown folder", "misc", "fmt", "not in the table"},
		{"door", "agent", "github.com/libp2p/go-libp2p/core/host", "only p2p/"},
		{"door itself", "p2p/wire", "github.com/libp2p/go-libp2p/core/host", ""},
		{"door with a similar name", "storehouse", "github.com/hashicorp/raft-wal", "only raft/"},
		{"root library", "", "github.com/zeebo/blake3", "standard library"},
		{"root go-cid", "", "github.com/ipfs/go-cid", ""},
		{"root standard library", "", "encoding/hex", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := listed{ImportPath: strings.TrimSuffix(module+"/"+tt.from, "/"), Imports: []string{tt.imports}}
			got := strings.Join(checkPackage(p), "\n")
			if (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
				t.Errorf("%s importing %s: got %q, want %q", p.ImportPath, tt.imports, got, tt.want)
			}
		})
	}
}

// checkPackage names every import of p that breaks a rule. Tests may use what
// they like of higher folders' libraries, but not break layers or doors.
func checkPackage(p listed) []string {
	var problems []string
	bad := func(format string, args ...any) {
		problems = append(problems, p.ImportPath+" "+fmt.Sprintf(format, args...))
	}
	from := folder(p.ImportPath)
	rank := layer(from)
	if rank < 0 {
		bad("lies in folder %q, which is not in the table of layers_test.go", from)
		return problems
	}
	own := slices.Concat(p.Imports, p.TestImports, p.XTestImports)
	slices.Sort(own)
	for _, imp := range slices.Compact(own) {
		if imp == module || strings.HasPrefix(imp, module+"/") {
			to := folder(imp)
			switch r := layer(to); {
			case to == from:
			case r < 0:
				bad("imports %s, whose folder is not in the table of layers_test.go", imp)
			case r == rank:
				bad("imports its neighbour %s: declare an interface and let agent/ or storehouse/ join them", imp)
			case r > rank:
				bad("imports %s of a higher layer", imp)
			}
		}
		for library, door := range doors {
			if strings.HasPrefix(imp, library) && !strings.HasPrefix(p.ImportPath+"/", module+"/"+door+"/") {
				bad("imports %s: only %s/ may", imp, door)
			}
		}
	}
	if from == "" {
		for _, imp := range p.Imports {
			if strings.Contains(strings.Split(imp, "/")[0], ".") && !strings.HasPrefix(imp, module) && !slices.Contains(rootMayImport, imp) {
				bad("imports %s: the root package takes the standard library and go-cid only", imp)
			}
		}
	}
	return problems
}

// folder is the first component of a package's path inside the module.
func folder(importPath string) string {
	rest := strings.TrimPrefix(strings.TrimPrefix(importPath, module), "/")
	top, _, _ := strings.Cut(rest, "/")
	return top
}

// layer is the index of a folder's line in layers, -1 if it has none.
func layer(folder string) int {
	return slices.IndexFunc(layers, func(line []string) bool { return slices.Contains(line, folder) })
}

func goList(t *testing.T, args ...string) []listed {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Standard,Imports,TestImports,XTestImports,Error"}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %v: %v\n%s", args, err, stderr.Bytes())
	}
	var packages []listed
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return packages
		} else if err != nil {
			t.Fatalf("go list %v: %v", args, err)
		}
		packages = append(packages, p)
	}
}
