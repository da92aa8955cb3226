package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	flox "github.com/floxctl/flox"
)

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// The example in --help is what people copy: it must be accepted, change
// nothing, and leave no key out.
func TestExampleIsTheDefault(t *testing.T) {
	cfg := DefaultConfig()
	if err := ReadConfig(cfg, writeConfig(t, ExampleConfig), true); err != nil {
		t.Fatal(err)
	}
	for _, list := range []*[]string{&cfg.Agent.Advertise, &cfg.Agent.Bind, &cfg.Storehouse.Advertise, &cfg.Storehouse.Visible} {
		if len(*list) == 0 {
			*list = nil
		}
	}
	if diff := cmp.Diff(DefaultConfig(), cfg); diff != "" {
		t.Errorf("the example differs from the defaults (-default +example):\n%s", diff)
	}
	if err := cfg.check(); err != nil {
		t.Error(err)
	}
	section := ""
	shown := map[string]bool{}
	for line := range strings.Lines(ExampleConfig) {
		if name, isSection := strings.CutPrefix(strings.TrimSpace(line), "["); isSection {
			section = strings.TrimSuffix(name, "]") + "."
		} else if key, _, isKey := strings.Cut(line, "="); isKey && !strings.HasPrefix(line, "#") {
			shown[section+strings.TrimSpace(key)] = true
		}
	}
	for _, s := range settings(DefaultConfig()) {
		if !shown[s.key] {
			t.Errorf("the example lacks %s", s.key)
		}
		if s.help == "" {
			t.Errorf("%s has no help", s.key)
		}
	}
}

// A mistake in the file is named with its line and what may have been meant.
func TestConfigMistakes(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string
	}{
		{"misspelt", "[agent]\n\ncash-budget = \"1GiB\"\n", []string{":3: ", `unknown key "agent.cash-budget"`, "did you mean agent.cache-budget?"}},
		{"wrong section", "http = \"none\"\n", []string{":1: ", `unknown key "http"`, "did you mean storehouse.http?"}},
		{"underscore", "store_dir = \"/x\"\n", []string{"did you mean store-dir?"}},
		{"far from all", "[storehouse]\nzzzzzzzz = 1\n", []string{`unknown key "storehouse.zzzzzzzz"`, "known here: storehouse.name, storehouse.http"}},
		{"unknown section", "[worker]\nqqqqqqqqq = 1\n", []string{"worker", "the sections [agent] and [storehouse]"}},
		{"two at once", "aaaaaaaaaa = 1\nsite = \"x\"\n", []string{":1: ", ":2: ", "agent.site or storehouse.site"}},
		{"wrong type", "store-dir = 5\n", []string{":1:"}},
		{"bad size", "[agent]\ncache-budget = \"lots\"\n", []string{":2:", "lots"}},
		{"bad time", "[agent]\nread-timeout = \"soon\"\n", []string{":2:", "soon", "500ms, 5s"}},
		{"no TOML", "store-dir\n", []string{":1:"}},
		{"twice", "user = \"a\"\nuser = \"b\"\n", []string{":2:"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := ReadConfig(DefaultConfig(), writeConfig(t, test.text), true)
			if !errors.Is(err, flox.ErrBadInput) {
				t.Fatalf("error %v, want bad input", err)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q lacks %q", err, want)
				}
			}
		})
	}
}

func TestConfigFileMayBeMissingOnlyByDefault(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none.toml")
	if err := ReadConfig(DefaultConfig(), missing, false); err != nil {
		t.Errorf("the default file missing: %v", err)
	}
	if err := ReadConfig(DefaultConfig(), missing, true); !errors.Is(err, flox.ErrBadInput) {
		t.Errorf("a named file missing: %v, want bad input", err)
	}
}

// Flags win over the environment, that over the file, that over defaults.
func TestPrecedence(t *testing.T) {
	file := writeConfig(t, "user = \"file\"\nlog-level = \"info\"\n[agent]\nsite = \"file\"\nmdns = false\ncache-budget = \"1GiB\"\n")
	t.Setenv("FLOXD_USER", "env")
	t.Setenv("FLOXD_AGENT_SITE", "env")
	t.Setenv("FLOXD_AGENT_LISTEN", "127.0.0.1:1, 127.0.0.1:2")
	flags := pflag.NewFlagSet("x", pflag.ContinueOnError)
	o := bindFlags(flags, "agent")
	if err := flags.Parse([]string{"--site", "flag", "--read-timeout=10s", "--advertise", "a:1"}); err != nil {
		t.Fatal(err)
	}
	cfg, err := load(file, o)
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultConfig()
	want.User, want.LogLevel = "env", "info"
	want.Agent.Site, want.Agent.MDNS, want.Agent.CacheBudget = "flag", false, 1<<30
	want.Agent.Listen, want.Agent.Advertise = []string{"127.0.0.1:1", "127.0.0.1:2"}, []string{"a:1"}
	want.Agent.ReadTimeout = Duration(10 * time.Second)
	if diff := cmp.Diff(want, cfg); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	t.Setenv("FLOXD_AGENT_MDNS", "maybe")
	if _, err := load(file, o); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), "FLOXD_AGENT_MDNS") {
		t.Errorf("a bad variable: %v, want bad input that names it", err)
	}
}

// A child gets exactly its parent's configuration, whatever is in it.
func TestChildrenInheritEverySetting(t *testing.T) {
	cfg := DefaultConfig()
	for i, s := range settings(cfg) {
		switch s.Type() {
		case "text":
			s.value.SetString("text with = and, comma " + string(rune('a'+i)))
		case "bool":
			s.value.SetBool(!s.value.Bool())
		case "list":
			s.value.Set(reflect.ValueOf([]string{"10.0.0.1:1", "[::1]:2"}))
		case "size":
			s.value.SetUint(uint64(i)<<30 + 1)
		case "time":
			s.value.SetInt(int64(i)*int64(time.Second) + 90*int64(time.Minute))
		}
	}
	t.Setenv("FLOXD_CONFIG", "/must/not/be/inherited")
	for _, v := range environ(cfg) {
		name, value, _ := strings.Cut(v, "=")
		if name == "FLOXD_CONFIG" {
			t.Error("the configuration file is inherited: it may be readable by root only")
		}
		t.Setenv(name, value)
	}
	got := &Config{}
	if err := readEnv(got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(cfg, got); diff != "" {
		t.Errorf("(-parent +child):\n%s", diff)
	}
}

func TestTextForms(t *testing.T) {
	for _, d := range []time.Duration{0, time.Second, 10 * time.Second, 5 * time.Minute, 90 * time.Minute, time.Hour, 24 * time.Hour, 1500 * time.Millisecond, 10*time.Hour + 10*time.Second} {
		var back Duration
		if err := back.UnmarshalText([]byte(Duration(d).String())); err != nil || time.Duration(back) != d {
			t.Errorf("%s is written %q and read %s, %v", d, Duration(d), back, err)
		}
	}
	for d, want := range map[time.Duration]string{24 * time.Hour: "24h", 5 * time.Minute: "5m", 90 * time.Minute: "1h30m", 10 * time.Second: "10s"} {
		if got := Duration(d).String(); got != want {
			t.Errorf("%s is written %q, want %q", d, got, want)
		}
	}
	for n, want := range map[Size]string{0: "0", 1: "1", 64 << 10: "64KiB", 20 << 30: "20GiB", 1<<30 + 1: "1073741825"} {
		if got := n.String(); got != want {
			t.Errorf("%d is written %q, want %q", uint64(n), got, want)
		}
	}
}

// Values that make no sense are refused by name before anything starts.
func TestCheck(t *testing.T) {
	tests := map[string]func(*Config){
		"store-dir":            func(c *Config) { c.StoreDir = "nix/store" },
		"state-dir":            func(c *Config) { c.StateDir = "/" },
		"run-dir":              func(c *Config) { c.RunDir = "/run/../x" },
		"covered by the mount": func(c *Config) { c.StateDir = c.StoreDir + "/state" },
		"log-level":            func(c *Config) { c.LogLevel = "loud" },
		"log-format":           func(c *Config) { c.LogFormat = "xml" },
		"agent.listen":         func(c *Config) { c.Agent.Listen = []string{"nowhere"} },
		"storehouse.listen":    func(c *Config) { c.Storehouse.Listen = []string{"/ip4/1.2.3.4/udp/1"} },
		"storehouse.http":      func(c *Config) { c.Storehouse.HTTP = "1.2.3.4:99999" },
		"storehouse.consensus": func(c *Config) { c.Storehouse.Consensus = "10.0.0.1" },
		"disk-essential":       func(c *Config) { c.Storehouse.DiskSlow = 93 },
		"agent.read-timeout":   func(c *Config) { c.Agent.ReadTimeout = 0 },
		"agent.read-ahead":     func(c *Config) { c.Agent.ReadAhead = 1 << 30 },
	}
	for want, change := range tests {
		cfg := DefaultConfig()
		change(cfg)
		if err := cfg.check(); !errors.Is(err, flox.ErrBadInput) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want bad input that names it", want, err)
		}
	}
	cfg := DefaultConfig()
	cfg.Storehouse.HTTP, cfg.Storehouse.Listen = noHTTP, []string{"/ip4/0.0.0.0/tcp/7781", "[::]:7781"}
	if err := cfg.check(); err != nil {
		t.Error(err)
	}
}

func TestPercent(t *testing.T) {
	var p Percent
	for _, text := range []string{"85", "85%", "0.5%", "100%"} {
		if err := p.UnmarshalText([]byte(text)); err != nil || strings.TrimSuffix(p.String(), "%") != strings.TrimSuffix(text, "%") {
			t.Errorf("%s is %s, %v", text, p, err)
		}
	}
	for _, text := range []string{"", "%", "0", "101%", "-1", "NaN", "all"} {
		if err := p.UnmarshalText([]byte(text)); !errors.Is(err, flox.ErrBadInput) {
			t.Errorf("%q is taken: %v", text, err)
		}
	}
}

func TestFindMount(t *testing.T) {
	const table = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" +
		"36 22 0:40 / /a\\040b ro - fuse.floxd floxd ro\n" +
		"37 22 0:41 / /twice ro - ext4 x ro\n38 22 0:42 / /twice ro shared:1 master:2 - fuse.floxd floxd ro\ngarbage\n - \n"
	for dir, want := range map[string]string{"/": "ext4", "/a b": "fuse.floxd", "/twice": "fuse.floxd", "/none": "", "/a": ""} {
		if got := findMount(table, dir); got != want {
			t.Errorf("findMount(%q) = %q, want %q", dir, got, want)
		}
	}
}
