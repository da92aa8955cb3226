package storehouse

import (
	"log/slog"
	"time"

	"github.com/floxctl/flox"
)

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
	// HTTPListen is the address of the binary cache. Default 127.0.0.1:7780:
	// reading needs no token, so it is opened to others by choice. "none" = no HTTP.
	HTTPListen string `json:"http_listen"`
	// HTTPURL is the URL others reach HTTPListen by. Default: made from
	// HTTPListen, or from the first of Advertise when that listens on any address.
	HTTPURL string `json:"http_url"`
	// Listen are the addresses for peers, multiaddrs or host:port. Default 0.0.0.0:7781.
	Listen []string `json:"listen"`
	// Advertise are the addresses told to peers and written to the invite.
	// Default: those of the interfaces listened on.
	Advertise []string `json:"advertise"`
	// Site is the label of the place this server stands at; "" = none.
	Site string `json:"site"`
	// UploadTokenFile holds the token a publisher shows. It is made on first
	// start. Default StateDir/upload-token.
	UploadTokenFile string `json:"upload_token_file"`
	// StageTTL is how long an uploaded NAR waits for its path info. Default 24 h.
	StageTTL time.Duration `json:"stage_ttl"`
	// MaxStaged is how many uploaded NARs may wait at once. Default 4096.
	MaxStaged int `json:"max_staged"`
	// ReserveBytes is kept free on the disk of StateDir, so that facts can still
	// be written and reads go on when it fills up. Default 256 MiB.
	ReserveBytes uint64 `json:"reserve_bytes"`
	// NoMDNS turns multicast discovery on the LAN off.
	NoMDNS bool `json:"no_mdns"`
	// Version is the program's version, told to callers. Default "dev".
	Version string `json:"-"`
	// Log takes what an operator may need; nil = discard.
	Log *slog.Logger `json:"-"`
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
