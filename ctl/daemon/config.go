package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/agent"
	"github.com/floxctl/flox/ctl/cli"
)

// Config is everything floxd can be told, in the order of precedence flags,
// environment (FLOXD_ and the key in capitals: FLOXD_AGENT_CACHE_BUDGET),
// configuration file, default. The tags are the keys of the file and of the
// flags; help is what --help says.
type Config struct {
	StoreDir  string `toml:"store-dir" help:"store directory: where the store is mounted, and part of every path's hash"`
	StateDir  string `toml:"state-dir" help:"where state is kept: agent/ and storehouse/ below it"`
	RunDir    string `toml:"run-dir" help:"what lasts until the next boot: control socket, node table"`
	Mount     string `toml:"mount" help:"session: beside a Nix store of this machine, which stays as it is, and seen in floxctl nix and floxctl run; system: at the store directory, refused where this machine has a Nix store of its own there (default: session where this machine has a Nix store of its own)"`
	Profiles  string `toml:"profiles-dir" help:"where the profiles of the storehouse are mounted, as links OWNER/NAME; none = nowhere (default: /flox, if run-dir is the usual one)"`
	User      string `toml:"user" help:"who the unprivileged processes run as (default: floxd if there is such a user, else nobody)"`
	LogLevel  string `toml:"log-level" help:"debug, info, warn or error"`
	LogFormat string `toml:"log-format" help:"text or json"`

	Agent      AgentConfig      `toml:"agent"`
	Storehouse StorehouseConfig `toml:"storehouse"`
}

// AgentConfig is the [agent] part.
type AgentConfig struct {
	Invite        string   `toml:"invite" help:"an invite, or a file with one, or the invite.json of a storehouse that is open (default: what it joined with)"`
	Listen        []string `toml:"listen" help:"addresses for peers, host:port or multiaddr"`
	Advertise     []string `toml:"advertise" help:"addresses told to peers (default: those listened at)"`
	Site          string   `toml:"site" help:"label of the place this machine is at; peers of the same site are asked first"`
	MDNS          bool     `toml:"mdns" help:"find peers on the LAN, by multicast and by broadcast (UDP port 7782)"`
	DHTServer     bool     `toml:"dht-server" help:"keep DHT records for others"`
	CacheBudget   Size     `toml:"cache-budget" help:"most the cache may hold (default: 20GiB or 10 % of the disk, whichever is less)"`
	CacheReserve  Size     `toml:"cache-reserve" help:"what stays free on the disk for others (default: 5GiB or 5 %, whichever is more)"`
	LookupTimeout Duration `toml:"lookup-timeout" help:"longest wait for a name nobody here knows"`
	ReadTimeout   Duration `toml:"read-timeout" help:"longest wait for bytes, except of files a running program has mapped"`
	Prefetch      bool     `toml:"prefetch" help:"fetch ahead of readers: large files read in order, small files of a directory, what a program reads when it starts"`
	PrefetchRate  Size     `toml:"prefetch-rate" help:"most bytes per second fetched for nobody who waits; 0 = no limit"`
	StartTraces   bool     `toml:"start-traces" help:"tell the storehouse what programs read when they start (no user, host, argument or time), and use what others told"`
	Offline       string   `toml:"offline" help:"what is completed in the background of what ran here: closure, used (what it ran and mapped, its path, and what those name) or none"`
	List          string   `toml:"list" help:"what ls of the store directory shows: here, or valid (everything the storehouse has)"`
	NixSocket     string   `toml:"nix-socket" help:"unix socket that stock Nix uses as its daemon's, NIX_REMOTE=unix://PATH; none = no socket (default: nix.socket in run-dir)"`
	NixLogDir     string   `toml:"nix-log-dir" help:"where nix log finds build logs, Nix's log-dir; none = nowhere (default: var/log/nix beside the store directory, if no Nix has its logs there)"`
	System        string   `toml:"system" help:"for which system profiles are shown, in Nix's words (default: this machine's, such as x86_64-linux)"`
	Metrics       string   `toml:"metrics" help:"host:port at which Prometheus gets metrics at /metrics; whoever reaches it may read them (default: nowhere)"`
	Bind          []string `toml:"bind" help:"profiles of stock Nix that are one with profiles of the storehouse, DIR=OWNER/NAME (floxctl profile bind --help)"`
	ReadAhead     Size     `toml:"read-ahead" help:"the kernel's read-ahead on the mount; what is read in order is fetched ahead in any case"`
}

// bindings are the profiles of storehouses that are one with those of stock Nix, by these.
func (c *AgentConfig) bindings() (map[string]string, error) {
	out := make(map[string]string)
	for _, text := range c.Bind {
		dir, name, ok := strings.Cut(text, "=")
		if !ok {
			return nil, cli.Explain(flox.ErrBadInput, "agent.bind %q: want DIR=OWNER/NAME, such as /nix/var/nix/profiles/default=acme/base", text)
		}
		if err := agent.CheckBinding(dir, name); err != nil {
			return nil, fmt.Errorf("agent.bind: %w", err)
		}
		if _, twice := out[dir]; twice {
			return nil, cli.Explain(flox.ErrBadInput, "agent.bind %q: %s is bound twice", text, dir)
		}
		out[dir] = name
	}
	return out, nil
}

// StorehouseConfig is the [storehouse] part.
type StorehouseConfig struct {
	Name      string   `toml:"name" help:"what people and keys call it; fixed at the first start (default: the host's name)"`
	HTTP      string   `toml:"http" help:"address of the binary cache; none = no HTTP"`
	HTTPURL   string   `toml:"http-url" help:"URL others reach it by (default: made from http)"`
	Metrics   string   `toml:"metrics" help:"host:port at which Prometheus gets metrics of this server at /metrics; whoever reaches it may read them (default: nowhere)"`
	Listen    []string `toml:"listen" help:"addresses for machines, host:port or multiaddr"`
	Advertise []string `toml:"advertise" help:"addresses written to the invite (default: those listened at)"`
	Site      string   `toml:"site" help:"label of the place this server is at"`
	Server    string   `toml:"server-name" help:"what this server is called among the machines (default: name)"`
	Consensus string   `toml:"consensus" help:"host:port at which the other servers reach this one to agree; none = one server that no other can join"`
	ConsensAd string   `toml:"consensus-advertise" help:"host:port of it that is told to the other servers (default: the one listened at)"`
	Heartbeat Duration `toml:"heartbeat" help:"how long servers wait for each other, at least, before they choose another leader: they wait longer where round trips between them are long; 0 = 200 ms"`
	CatchUp   Size     `toml:"catch-up-rate" help:"most bytes per second of content fetched from other servers; 0 = as fast as it comes, which keeps servers in touch; for a line that others need"`
	DiskSlow  Percent  `toml:"disk-slow" help:"how full its disk is, in percent, when uploads are slowed down"`
	DiskHigh  Percent  `toml:"disk-essential" help:"how full when only profile changes and running builds are taken in"`
	DiskFull  Percent  `toml:"disk-read-only" help:"how full when nothing is taken in"`
	MDNS      bool     `toml:"mdns" help:"be found on the LAN, by multicast and by broadcast (UDP port 7782)"`
	Open      bool     `toml:"open" help:"let in every machine that has a copy of invite.json, without an invite of its own"`
	TokenFile string   `toml:"token-file" help:"file of the upload token, made at the first start (default: upload-token in its state)"`
	StageTTL  Duration `toml:"stage-ttl" help:"how long an uploaded NAR waits for its path info"`
	Grace     Duration `toml:"collect-grace" help:"how long a condemned path stays before a collection removes it"`
	Every     Duration `toml:"collect-every" help:"how long after a collection the next one begins by itself; 0 = never"`
	Reserve   Size     `toml:"reserve" help:"what stays free on its disk; uploads are refused below"`
	Bucket    string   `toml:"bucket" help:"URL of a bucket in which content lives, s3://NAME?region=R&endpoint=URL or file:///DIRECTORY (default: its own disk)"`
	Builds    bool     `toml:"builds" help:"build derivations on this server, with the Nix that is installed here (floxd up: true)"`
	Jobs      Count    `toml:"build-jobs" help:"how many derivations are built at once"`
	Sandbox   string   `toml:"build-sandbox" help:"auto: builds see nothing but their inputs; where this machine cannot do that they run without, if as users of their own (a server of root's); on: else none is built; off"`
	Visible   []string `toml:"build-sandbox-paths" help:"files and directories of this machine that builds in the sandbox see (default: /bin/sh and its libraries)"`
	BuildDisk Size     `toml:"build-disk" help:"how much of what builds need and make is kept for the next ones; a build under way may take more"`
	BucketMax Size     `toml:"bucket-cache" help:"how much of the bucket is kept on its disk"`
}

// DefaultConfig is what holds where nothing was said.
func DefaultConfig() *Config {
	return &Config{
		StoreDir: string(flox.DefaultStoreDir), StateDir: cli.DefaultStateDir, RunDir: cli.DefaultRunDir, LogFormat: "text",
		Agent: AgentConfig{
			Listen: []string{fmt.Sprintf("0.0.0.0:%d", cli.DefaultAgentPort)}, MDNS: true, DHTServer: true,
			LookupTimeout: Duration(5 * time.Second), ReadTimeout: Duration(30 * time.Second), ReadAhead: 16 << 10,
			Prefetch: true, StartTraces: true, Offline: "used", List: "here",
		},
		Storehouse: StorehouseConfig{
			HTTP:   fmt.Sprintf("127.0.0.1:%d", cli.DefaultHTTPPort),
			Listen: []string{fmt.Sprintf("0.0.0.0:%d", cli.DefaultStorehousePort)}, MDNS: true,
			Consensus: noConsensus, DiskSlow: 85, DiskHigh: 92, DiskFull: 97,
			StageTTL: Duration(24 * time.Hour), Grace: Duration(time.Hour), Every: Duration(24 * time.Hour), Reserve: 256 << 20, BucketMax: 10 << 30,
			Jobs: 1, Sandbox: "auto", BuildDisk: 20 << 30,
		},
	}
}

// ExampleConfig is a configuration file with every key at its default.
const ExampleConfig = `# /etc/floxd/config.toml. Every key may be left out; these are the defaults.
# An unknown key is an error. Sizes: 500MiB, 20GiB; times: 5s, 10m.
store-dir  = "/nix/store"      # part of every path's hash: choose it once
state-dir  = "/var/lib/floxd"
run-dir    = "/run/floxd"
mount      = ""                # session: beside a Nix store of this machine; system: at store-dir or not at all
profiles-dir = ""              # profiles as links OWNER/NAME: /flox if run-dir is the usual one; none: nowhere
user       = ""                # floxd if there is such a user, else nobody
log-level  = ""                # debug, info, warn, error; info, but warn for floxd up
log-format = "text"            # or json

[agent]
invite         = ""            # an invite or a file with it, needed once; floxd join needs none here
listen         = ["0.0.0.0:7782"]
advertise      = []
site           = ""            # "berlin": peers of one site prefer each other
mdns           = true
dht-server     = true
cache-budget   = "0"           # 0: 20GiB or 10 % of the disk, whichever is less
cache-reserve  = "0"           # 0: 5GiB or 5 % of the disk, whichever is more
lookup-timeout = "5s"
read-timeout   = "30s"
read-ahead     = "16KiB"
prefetch       = true          # fetch ahead of readers
prefetch-rate  = "0"           # bytes per second for nobody who waits; 0: no limit
start-traces   = true          # what programs read when they start, without saying who
offline        = "used"        # completed in the background of what ran: closure, used, none
nix-socket     = ""            # stock Nix uses it as its daemon's: nix.socket in run-dir; none: no socket
nix-log-dir    = ""            # build logs for nix log: var/log/nix beside the store directory; none: nowhere
bind           = []            # "DIR=OWNER/NAME": what nix-env does to DIR changes the profile, and the other way round
system         = ""            # for which system profiles are shown: this machine's, such as x86_64-linux
metrics        = ""            # host:port at which Prometheus gets metrics; "": nowhere
list           = "here"        # ls of the store directory: here, or valid (all there is)

[storehouse]
name       = ""                # the host's name
http       = "127.0.0.1:7780"  # reading needs no token: open it to others by choice
http-url   = ""
metrics    = ""                # host:port at which Prometheus gets metrics of this server; "": nowhere
listen     = ["0.0.0.0:7781"]
advertise  = []
site       = ""
mdns       = true
open       = false             # true: whoever has a copy of invite.json is a member
server-name = ""               # what this server is called among the machines; name
consensus  = "none"            # host:port for the other servers of a storehouse of 3 or 5
consensus-advertise = ""       # what they are told, if consensus listens at any address
heartbeat = "0s"               # waited for other servers before another leads, longer over long lines; 0: 200 ms
catch-up-rate = "0"            # bytes per second from the other servers; 0: no limit
disk-slow  = "85%"             # uploads are slowed down from here on,
disk-essential = "92%"         # only profile changes and running builds taken in,
disk-read-only = "97%"         # nothing at all
token-file = ""
stage-ttl  = "24h"
collect-grace = "1h"           # how long what nobody wants stays once a collection condemned it
collect-every = "24h"          # how long after a collection the next one begins by itself; 0: never
reserve    = "256MiB"
bucket     = ""                # content in a bucket: s3://NAME?region=R&endpoint=URL; its keys as the AWS tools find them
bucket-cache = "10GiB"
builds     = false             # build derivations on this server, with the Nix that is installed here; floxd up: true
build-jobs = 1                 # at once
build-sandbox = "auto"         # builds see nothing but their inputs; auto: or run as users of their own, on: or not at all, off: as who runs this
build-sandbox-paths = []       # what they see of this machine all the same; /bin/sh and its libraries
build-disk = "20GiB"           # kept of what builds need and make
`

// ReadConfig reads a configuration file over cfg, strictly. A missing file is
// an error only where required is set: the default one need not be there.
func ReadConfig(cfg *Config, file string, required bool) error {
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !required:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return cli.Explain(flox.ErrBadInput, "configuration file %s does not exist; floxd --help shows an example", file)
	case err != nil:
		return fmt.Errorf("configuration file: %w: %w", err, flox.ErrDenied)
	}
	decoder := toml.NewDecoder(strings.NewReader(string(b)))
	decoder.DisallowUnknownFields()
	return explainTOML(file, decoder.Decode(cfg))
}

// explainTOML says where in file the mistake is, and what may have been meant.
func explainTOML(file string, err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		var lines []string
		for _, e := range unknown.Errors {
			row, _ := e.Position()
			key := strings.Join(e.Key(), ".")
			lines = append(lines, fmt.Sprintf("%s:%d: unknown key %q%s", file, row, key, nearKeys(key)))
		}
		return cli.Explain(flox.ErrBadInput, "%s", strings.Join(lines, "\n"))
	}
	var wrong *toml.DecodeError
	if errors.As(err, &wrong) {
		row, column := wrong.Position()
		key := ""
		if len(wrong.Key()) > 0 {
			key = strings.Join(wrong.Key(), ".") + ": "
		}
		return cli.Explain(flox.ErrBadInput, "%s:%d:%d: %s%s", file, row, column, key, strings.TrimPrefix(wrong.Error(), "toml: "))
	}
	if err != nil {
		return fmt.Errorf("configuration file %s: %w: %w", file, err, flox.ErrBadInput)
	}
	return nil
}

// nearKeys says which keys an unknown one may have been meant to be: those few
// letters away, or of the same name elsewhere.
func nearKeys(key string) string {
	_, name, found := strings.Cut(key, ".")
	if !found {
		name = key
	}
	var near []string
	for _, known := range allKeys() {
		_, knownName, found := strings.Cut(known, ".")
		if !found {
			knownName = known
		}
		if distance(key, known) <= 2 || name == knownName || distance(name, knownName) <= 2 && len(name) > 4 {
			near = append(near, known)
		}
	}
	if len(near) == 0 {
		section, _, found := strings.Cut(key, ".")
		for _, known := range allKeys() {
			if !found && !strings.Contains(known, ".") || found && strings.HasPrefix(known, section+".") {
				near = append(near, known)
			}
		}
		if !found || len(near) == 0 {
			near = append(near, "and in the sections [agent] and [storehouse]")
		}
		return "; known here: " + strings.Join(near, ", ")
	}
	return "; did you mean " + strings.Join(near, " or ") + "?"
}

// distance is how many letters must be changed, added or dropped to get from
// one word to the other (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// check finds what no decoder can: values that make no sense.
func (c *Config) check() error {
	if _, err := flox.ParseStoreDir(c.StoreDir); err != nil {
		return fmt.Errorf("store-dir: %w", err)
	}
	for _, d := range []struct{ key, dir string }{{"state-dir", c.StateDir}, {"run-dir", c.RunDir}} {
		if _, err := flox.ParseStoreDir(d.dir); err != nil { // the same rule: absolute, clean, not "/"
			return cli.Explain(flox.ErrBadInput, "%s %q: want an absolute directory without a trailing slash", d.key, d.dir)
		}
		if d.dir == c.StoreDir || strings.HasPrefix(d.dir, c.StoreDir+"/") {
			return cli.Explain(flox.ErrBadInput, "%s %s lies in the store directory %s: it would be covered by the mount", d.key, d.dir, c.StoreDir)
		}
	}
	if err := c.checkProfilesDir(); err != nil {
		return err
	}
	if _, err := c.Agent.bindings(); err != nil {
		return err
	}
	if !slices.Contains([]string{"", mountSession, mountSystem}, c.Mount) {
		return cli.Explain(flox.ErrBadInput, "mount %q: want session (beside a Nix store of this machine) or system (at the store directory)", c.Mount)
	}
	if !slices.Contains([]string{"", "debug", "info", "warn", "error"}, c.LogLevel) {
		return cli.Explain(flox.ErrBadInput, "log-level %q: want debug, info, warn or error", c.LogLevel)
	}
	if !slices.Contains([]string{"text", "json"}, c.LogFormat) {
		return cli.Explain(flox.ErrBadInput, "log-format %q: want text or json", c.LogFormat)
	}
	for _, d := range []struct {
		key string
		d   Duration
	}{
		{"agent.lookup-timeout", c.Agent.LookupTimeout},
		{"agent.read-timeout", c.Agent.ReadTimeout},
		{"storehouse.stage-ttl", c.Storehouse.StageTTL},
		{"storehouse.collect-grace", c.Storehouse.Grace},
	} {
		if d.d <= 0 {
			return cli.Explain(flox.ErrBadInput, "%s %s: want more than nothing, such as 5s", d.key, d.d)
		}
	}
	if c.Storehouse.Every < 0 {
		return cli.Explain(flox.ErrBadInput, "storehouse.collect-every %s: want a time such as 24h, or 0 for never", c.Storehouse.Every)
	}
	if !slices.Contains([]string{"auto", "on", "off"}, c.Storehouse.Sandbox) {
		return cli.Explain(flox.ErrBadInput, "storehouse.build-sandbox %q: want auto, on or off", c.Storehouse.Sandbox)
	}
	if !slices.Contains([]string{"closure", "used", "none"}, c.Agent.Offline) {
		return cli.Explain(flox.ErrBadInput, "agent.offline %q: want closure, used or none", c.Agent.Offline)
	}
	if !slices.Contains([]string{"here", "valid"}, c.Agent.List) {
		return cli.Explain(flox.ErrBadInput, "agent.list %q: want here or valid", c.Agent.List)
	}
	if c.Agent.ReadAhead > 4<<20 {
		return cli.Explain(flox.ErrBadInput, "agent.read-ahead %s: want at most 4MiB", c.Agent.ReadAhead)
	}
	if d := c.Storehouse; d.DiskSlow > d.DiskHigh || d.DiskHigh > d.DiskFull {
		return cli.Explain(flox.ErrBadInput, "storehouse.disk-slow %s, disk-essential %s, disk-read-only %s: want each at least the one before", d.DiskSlow, d.DiskHigh, d.DiskFull)
	}
	return c.checkListen()
}

// listening is one key that holds addresses to listen at.
type listening struct {
	key   string
	addrs []string
}

// listened lists what will be listened at, in the order it is checked in, so
// that the same mistake is always reported first.
func (c *Config) listened() []listening {
	all := []listening{{"storehouse.listen", c.Storehouse.Listen}, {"agent.listen", c.Agent.Listen}}
	if c.Storehouse.HTTP != noHTTP {
		all = append(all, listening{"storehouse.http", []string{c.Storehouse.HTTP}})
	}
	if at := c.Storehouse.consensus(); at != "" {
		all = append(all, listening{"storehouse.consensus", []string{at}})
	}
	for _, at := range []listening{{"storehouse.metrics", []string{c.Storehouse.Metrics}}, {"agent.metrics", []string{c.Agent.Metrics}}} {
		if at.addrs[0] != "" {
			all = append(all, at)
		}
	}
	return all
}

// consensus is where the other servers are listened for; "" = nowhere.
func (c *StorehouseConfig) consensus() string {
	if c.Consensus == noConsensus {
		return ""
	}
	return c.Consensus
}

// checkListen parses every address, so that a bad one is found before half of
// a machine runs.
func (c *Config) checkListen() error {
	for _, l := range c.listened() {
		for _, addr := range l.addrs {
			if _, err := parseListen(addr); err != nil {
				return fmt.Errorf("%s: %w", l.key, err)
			}
		}
	}
	return nil
}
