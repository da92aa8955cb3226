package integration

import (
	"context"
	_ "embed"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/floxctl/flox/integration/hosts"
	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/nix/nextnix"
)

//go:embed testdata/generations.nix
var generationsNix string

//go:embed testdata/generations.sh
var generationsScript string

// sshTo is a program ssh whose hosts are "daemon", the daemon of this machine, and
// "other", a store in $DIR.
const sshTo = `#!/bin/sh
case "$*" in
*"-O check"*) exit 255 ;;
*LocalCommand=*) echo started ;;
esac
for a; do case $a in daemon|other) host=$a ;; esac; done
case $host in
daemon) exec $DAEMON --stdio ;;
other) NIX_REMOTE=$DIR/other exec nix-daemon --stdio ;;
esac
exit 255
`

// generation is a stock Nix, and where it runs.
type generation struct {
	name string
	path string // PATH
}

// generationWeb is where every host has a binary cache.
const generationWeb = "127.0.0.1:8098"

// webDir is a directory as a binary cache that takes uploads.
func webDir(dir string) http.Handler {
	files := http.FileServer(http.Dir(dir))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPut {
			files.ServeHTTP(w, r)
			return
		}
		name := filepath.Join(dir, filepath.FromSlash(filepath.Clean("/"+r.URL.Path)))
		b, err := io.ReadAll(r.Body)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(name), 0o755)
		}
		if err == nil {
			err = os.WriteFile(name, b, 0o644)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
}

// serveWeb serves a directory on a host until the test ends.
func serveWeb(t *testing.T, h *netns.Host, dir, addr string) {
	t.Helper()
	l, err := h.Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: webDir(dir), ReadHeaderTimeout: time.Minute}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() { _ = server.Close(); serving.Wait() })
}

// generationEnv is what the script and stock daemons see.
func generationEnv(g generation) []string {
	return []string{
		"PATH=" + g.path, "NIX_CONF_DIR=/nowhere", "NIX_USER_CONF_FILES=", "NIX_DAEMON_SOCKET_PATH=/run/floxd/nix.socket",
		"NIX_CONFIG=experimental-features = nix-command ca-derivations\nsubstituters =\nsandbox = false\nbuild-users-group =\nfsync-metadata = false",
	}
}

// answers runs the script on a host and gives what each of its steps printed.
func (l *lab) answers(t *testing.T, h *netns.Host, g generation, dir, daemon string) (names []string, said map[string]string) {
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	mine := filepath.Join("/run/generation", g.name) // a host's own
	cmd := h.Command(ctx, "sh", "-c", "mkdir -p "+mine+"\n"+generationsScript)
	cmd.Env = append(generationEnv(g), "NIX_REMOTE=daemon", "HOME="+mine, "DIR="+mine, "GEN="+g.name, "EXPR="+filepath.Join(dir, "all.nix"),
		"WEB=http://"+generationWeb, "DAEMON="+daemon, "SOAK="+os.Getenv("FLOX_SOAK"))
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Errorf("%v\n%s", err, tail(out))
	}
	said = map[string]string{}
	for part := range strings.SplitSeq("\n"+string(out), "\n=== ") {
		name, text, _ := strings.Cut(part, "\n")
		if name != "" {
			names = append(names, name)
			said[name] = differing.ReplaceAllString(text, "$2")
		}
	}
	return names, said
}

// differing is what two daemons that do the same may say otherwise: what they are
// called, when something happened, and how much they freed.
var differing = regexp.MustCompile(`(?m)^Version: .*\n|"registrationTime":\d+,?|"ultimate":(true|false),?|"signatures":\[[^]]*\],?|,(\})|` +
	// what here waits for a builder of the farm, which a daemon of one machine has not,
	`^'/nix/store/.*\.drv' waits for a builder: .*\n|` +
	// and in which words later ones than 2.8 say where to look.
	` and nix-store --query --referrers$|^ *For full logs, run.*\n|^ *nix log /nix/store/.*\n|^resolved derivation: .*\n`)

// generations: clients of two generations hear of the agents what they hear of the
// stock daemon of their own. All of it takes minutes, and has its turn in a soak;
// otherwise it is the newer generation, which no other test has, and the steps that the
// script says. It goes on beside the test until done is called.
func (l *lab) generations(t *testing.T, a, b *hosts.Agent) (done func()) {
	t.Helper()
	dir := openDir(t)
	path := dir + ":" + os.Getenv("PATH")
	for name, text := range map[string]string{"all.nix": generationsNix, "ssh": sshTo} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil { //nolint:gosec // for everybody
			t.Fatal(err)
		}
	}
	on := map[generation]*hosts.Agent{{"next", nextnix.Bin(t) + ":" + path}: b}
	if os.Getenv("FLOX_SOAK") != "" {
		on[generation{"old", path}] = a
	}
	var all sync.WaitGroup
	for g, agent := range on {
		stock := l.host(t, "stock-"+g.name)
		daemon, err := hosts.Start(stock, l.dir, stock.Name, append(append([]string{"env", "NIX_REMOTE=local"}, generationEnv(g)...), "nix-daemon")...) // else it asks itself
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stop(t, daemon) })
		eventually(t, "the stock daemon listens", func() bool {
			_, err := os.Stat(filepath.Join(stock.Dir, "run/floxd/nix.socket"))
			return err == nil
		})
		for _, h := range []*netns.Host{agent.Host, stock} {
			web := filepath.Join(dir, "web-"+h.Name+"-"+g.name)
			if err := os.Mkdir(web, 0o755); err != nil {
				t.Fatal(err)
			}
			serveWeb(t, h, web, generationWeb)
		}
		all.Go(func() {
			var ours, theirs map[string]string
			var names []string
			var both sync.WaitGroup
			both.Go(func() { _, ours = l.answers(t, agent.Host, g, dir, l.programs.Floxd+" nix-daemon") })
			both.Go(func() { names, theirs = l.answers(t, stock, g, dir, "nix-daemon") })
			both.Wait()
			l.compare(t, g, names, ours, theirs)
		})
	}
	t.Cleanup(all.Wait) // if the test ends before it should
	return all.Wait
}

func (l *lab) compare(t *testing.T, g generation, names []string, ours, theirs map[string]string) {
	t.Helper()
	least := 20
	if os.Getenv("FLOX_SOAK") != "" {
		least = 50
	}
	if len(names) < least || slices.Contains(names, "") {
		t.Errorf("%s: %d steps were done: %q", g.name, len(names), names)
	}
	for _, name := range names {
		if ours[name] != theirs[name] {
			t.Errorf("%s, %s: it says\n%s\nand with a stock daemon\n%s", g.name, name, ours[name], theirs[name])
		}
	}
}
