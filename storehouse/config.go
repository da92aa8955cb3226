package storehouse

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

// noHTTP as HTTPListen turns the binary cache off.
const noHTTP = "none"

// Config says where a storehouse keeps its state and how it is reached. A zero
// field is its default.
type Config struct {
	// StateDir holds everything: facts, content, keys, invite.json. Default
	// /var/lib/floxd/storehouse. One process at a time may use it.
	StateDir string `json:"state_dir"`
	// StoreDir is the store directory of every path here. It is fixed when the
	// state directory is made. Default /nix/store.
	StoreDir flox.StoreDir `json:"store_dir"`
	// Name is what people and keys call this storehouse ("<name>-1" is its first
	// key). It is fixed when the state directory is made. Default: the host's name.
	Name string `json:"name"`
	// ServerName is what this server is called among the machines. Default: Name.
	ServerName string `json:"server_name"`
	// HTTPListen is the address of the binary cache. Default 127.0.0.1:7780:
	// reading needs no token, so it is opened to others by choice. "none" = no HTTP.
	HTTPListen string `json:"http_listen"`
	// HTTPURL is the URL others reach HTTPListen by. Default: made from
	// HTTPListen, or from the first of Advertise when that listens on any address.
	HTTPURL string `json:"http_url"`
	// Metrics is the host:port at which Prometheus gets metrics; "" = nowhere.
	Metrics string `json:"metrics"`
	// Listen are the addresses for peers, multiaddrs or host:port. Default 0.0.0.0:7781.
	Listen []string `json:"listen"`
	// Advertise are the addresses told to peers and written to the invite.
	// Default: those of the interfaces listened on.
	Advertise []string `json:"advertise"`
	// Consensus is the host:port at which the other servers reach this one for
	// agreeing, and nobody else. "" = a single server that no other can join.
	Consensus string `json:"consensus"`
	// ConsensusAdvertise is the host:port told to the other servers. Default: the
	// one listened at; needed when that is any address.
	ConsensusAdvertise string `json:"consensus_advertise"`
	// Heartbeat is how long this server waits for the leader of the storehouse before
	// it stands for it, and as leader for a majority, at least: both follow longer round
	// trips between the servers that vote by themselves. Default 0 = 200 ms.
	Heartbeat time.Duration `json:"heartbeat"`
	// CatchUpRate bounds in bytes per second what is fetched of content that the
	// other servers have and this one lacks. Default 0 = as fast as it comes, two paths
	// at a time, beside which what the servers confirm to each other stays in time.
	CatchUpRate uint64 `json:"catch_up_rate"`
	// Site is the label of the place this server stands at; "" = none.
	Site string `json:"site"`
	// UploadTokenFile holds the token a publisher shows. It is made on first
	// start. Default StateDir/upload-token.
	UploadTokenFile string `json:"upload_token_file"`
	// StageTTL is how long an uploaded NAR waits for its path info. Default 24 h.
	StageTTL time.Duration `json:"stage_ttl"`
	// MaxStaged is how many uploaded NARs may wait at once; each holds about 1 MiB
	// of memory. Default 256.
	MaxStaged int `json:"max_staged"`
	// ReserveBytes is kept free on the disk of StateDir, so that facts can still
	// be written and reads go on when it fills up. Default 256 MiB.
	ReserveBytes uint64 `json:"reserve_bytes"`
	// Bucket is the URL of a bucket in which content lives, shared by all servers:
	// s3://NAME?region=R&endpoint=URL&use_path_style=true or file:///DIRECTORY. Its keys
	// come from where the AWS tools look for them. "" = content lives in StateDir. What
	// is there already is uploaded.
	Bucket string `json:"bucket"`
	// BucketCache bounds in bytes what of the bucket is kept in StateDir. Default 10 GiB.
	BucketCache uint64 `json:"bucket_cache"`
	// Watermarks say from how full a disk on less is taken in.
	Watermarks Watermarks `json:"watermarks"`
	// CollectGrace is how long a condemned path stays before a collection removes it.
	// It must be longer than anybody works on with an old answer. Default 1 h.
	CollectGrace time.Duration `json:"collect_grace"`
	// CollectEvery is how long after a collection the leader begins the next by itself.
	// Default 0 = never.
	CollectEvery time.Duration `json:"collect_every"`
	// Embedded says that this is the storehouse of one machine, its agent's (floxd up):
	// as long as no other machine is a member, that one may collect as Nix does.
	Embedded bool `json:"-"`
	// NoMDNS turns multicast discovery on the LAN off.
	NoMDNS bool `json:"no_mdns"`
	// OpenMembership makes every machine that has invite.json, and so the swarm's
	// secret, a member without being in the member list, unless its key was revoked.
	// Default false: who connects is in the member list, by way of an invite.
	OpenMembership bool `json:"open_membership"`
	// Socket is the unix socket for operators on this machine: root and the account
	// the server runs as. "" = none.
	Socket string `json:"socket"`
	// EphemeralTTL is how long an ephemeral machine stays a member that nobody sees
	// any more. Default 1 h.
	EphemeralTTL time.Duration `json:"ephemeral_ttl"`
	// Builds says whether derivations are built here.
	Builds BuildsConfig `json:"builds"`
	// NewEpoch is AskNewEpoch(StateDir) before the start.
	NewEpoch bool `json:"-"`
	// Version is the program's version, told to callers. Default "dev".
	Version string `json:"-"`
	// Log takes what an operator may need; nil = discard.
	Log *slog.Logger `json:"-"`

	// Hooks of the tests.
	promoteAfter time.Duration
	deadAfter    time.Duration
	level        uint32
	// workerLost overrides its constant; 0 = that.
	workerLost time.Duration
	// keepsLeases has a server that stops leave its leases to be taken, as one does that is killed.
	keepsLeases bool
	// noFarm has the queue of builds stay as it is.
	noFarm       bool
	noCatchUp    bool
	scrubEvery   time.Duration
	touchEvery   time.Duration // overrides the constant
	backupObject int           // size of the content objects of a backup
	signSettle   time.Duration
	upstreams    upstreamLimits
}

// withDefaults checks c and fills in what is zero. Name stays "" until the
// state directory is looked at.
func (c Config) withDefaults() (Config, error) {
	bad := func(format string, args ...any) (Config, error) {
		return c, fmt.Errorf("storehouse: %s: %w", fmt.Sprintf(format, args...), flox.ErrBadInput)
	}
	setDefault(&c.StateDir, "/var/lib/floxd/storehouse")
	setDefault(&c.StoreDir, flox.DefaultStoreDir)
	setDefault(&c.HTTPListen, "127.0.0.1:7780")
	setDefault(&c.UploadTokenFile, filepath.Join(c.StateDir, "upload-token"))
	setDefault(&c.StageTTL, 24*time.Hour)
	setDefault(&c.EphemeralTTL, ephemeralTTL)
	setDefault(&c.MaxStaged, 256)
	setDefault(&c.ReserveBytes, 256<<20)
	setDefault(&c.BucketCache, 10<<30)
	setDefault(&c.CollectGrace, time.Hour)
	setDefault(&c.Version, "dev")
	setDefault(&c.scrubEvery, scrubEvery)
	setDefault(&c.signSettle, signSettle)
	setDefault(&c.touchEvery, touchTold())
	if len(c.Listen) == 0 {
		c.Listen = []string{"0.0.0.0:7781"}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var err error
	if c.Watermarks, err = c.Watermarks.withDefaults(); err != nil {
		return c, err
	}
	dir, err := flox.ParseStoreDir(string(c.StoreDir))
	if err != nil {
		return c, err
	}
	c.StoreDir = dir
	if c.HTTPListen != noHTTP {
		if _, _, err := net.SplitHostPort(c.HTTPListen); err != nil {
			return bad("http_listen %q: want host:port or %q", c.HTTPListen, noHTTP)
		}
	}
	if c.Metrics != "" {
		if _, _, err := net.SplitHostPort(c.Metrics); err != nil {
			return bad("metrics %q: want host:port", c.Metrics)
		}
	}
	if err := c.checkConsensus(); err != nil {
		return c, err
	}
	if c.StageTTL < 0 || c.EphemeralTTL < 0 || c.MaxStaged < 0 || c.CollectGrace < 0 || c.CollectEvery < 0 || c.ReserveBytes > 1<<60 || c.BucketCache > 1<<60 {
		return bad("stage_ttl, ephemeral_ttl, max_staged, collect_grace, collect_every, reserve_bytes and bucket_cache must not be negative")
	}
	if strings.ContainsAny(c.Name, ": \t\n/") || len(c.Name) > 64 {
		return bad("name %q: want at most 64 characters without spaces, colons and slashes", c.Name)
	}
	return c, nil
}

// checkConsensus checks the addresses for other servers: an address that means
// any of this machine's tells nobody where to go.
func (c Config) checkConsensus() error {
	for _, a := range []struct{ key, value string }{{"consensus", c.Consensus}, {"consensus_advertise", c.ConsensusAdvertise}} {
		if a.value == "" {
			continue
		}
		host, _, err := net.SplitHostPort(a.value)
		if err != nil {
			return fmt.Errorf("storehouse: %s %q: want host:port: %w", a.key, a.value, flox.ErrBadInput)
		}
		ip := net.ParseIP(host)
		anyHost := host == "" || ip != nil && ip.IsUnspecified()
		if anyHost && (a.key == "consensus_advertise" || c.ConsensusAdvertise == "") {
			return fmt.Errorf("storehouse: %s %q says not at which address the other servers reach this one: set consensus_advertise to host:port: %w", a.key, a.value, flox.ErrBadInput)
		}
	}
	return nil
}

// setDefault gives *v the value d if it has none.
func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// httpURL is how others reach the binary cache; "" without one.
func (s *Server) httpURL(addrs []string) string {
	if s.cfg.HTTPURL != "" || s.web == nil {
		return s.cfg.HTTPURL
	}
	host, port, err := net.SplitHostPort(s.web.Addr().String())
	if err != nil {
		return ""
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = reachable(addrs)
	}
	return "http://" + net.JoinHostPort(host, port)
}

// reachable picks the host of the first address that is not this machine's own.
func reachable(addrs []string) string {
	host := "127.0.0.1"
	for _, a := range addrs {
		candidate, _, err := net.SplitHostPort(a)
		if err != nil { // a multiaddr: /ip4/10.0.0.1/tcp/7781, /dns4/name/tcp/7781
			parts := strings.Split(a, "/")
			if len(parts) < 3 {
				continue
			}
			candidate = parts[2]
		}
		if ip := net.ParseIP(candidate); ip == nil || !ip.IsLoopback() && !ip.IsUnspecified() {
			return candidate
		}
	}
	return host
}

// listenError says what to do about a port that cannot be listened on.
func listenError(key, address string, err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("listen on %s: the port is in use by another program; stop it or configure another %s: %w: %w", address, key, err, flox.ErrBusy)
	}
	return fmt.Errorf("listen on %s: %w", address, err)
}

// ignoreClosed drops the error of closing what is closed.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// lockState makes this process the only user of the state directory until
// unlock. The lock goes with the process, so a crash leaves nothing behind.
func lockState(dir string) (unlock func() error, err error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := os.ReadFile(path)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("state directory %s is in use by process %s: stop it or use another directory: %w",
				dir, strings.TrimSpace(string(holder[:min(len(holder), 20)])), flox.ErrBusy)
		}
		return nil, fmt.Errorf("lock state directory %s: %w", dir, err)
	}
	if err = f.Truncate(0); err == nil {
		_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock state directory: %w", err), f.Close())
	}
	// Closing is not enough: a process that is just being started has it, too.
	return func() error { return errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_UN), f.Close()) }, nil
}

// Staged is a NAR that waits for its path info.
type Staged struct {
	Key       string    `json:"key"`
	Publisher string    `json:"publisher"`
	NarHash   [32]byte  `json:"nar_hash"` // SHA-256
	NarSize   uint64    `json:"nar_size"` // bytes
	Manifest  flox.CID  `json:"manifest"`
	At        time.Time `json:"at"` // when it was staged
}
