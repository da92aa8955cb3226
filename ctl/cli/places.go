package cli

// Where things are unless configuration says otherwise. floxd lays them out,
// floxctl only looks for the socket and, in doctor, at what may stand in the way.
const (
	DefaultConfigFile = "/etc/floxd/config.toml"
	DefaultStateDir   = "/var/lib/floxd"
	DefaultRunDir     = "/run/floxd"
	// DefaultProfilesDir is where profiles are mounted.
	DefaultProfilesDir = "/flox"
	SocketName         = "agent.sock"     // in the run directory
	NixSocketName      = "nix.socket"     // in the run directory
	NixConfName        = "nix.conf"       // in the run directory: the keys, for stock Nix to include
	ShellListName      = "shell-profiles" // in the run directory: whose paths get which profiles, for shells to read
	NixLogName         = "nix-log"        // in the run directory: a log-dir for stock Nix
	SessionLink        = "store"          // in the run directory: leads to the mount where that is for sessions only
	DefaultSocket      = DefaultRunDir + "/" + SocketName
	StorehouseSocket   = "storehouse.sock" // in the run directory: for operators on the server itself
	FilesystemType     = "fuse.floxd"      // of the store's mount, as in /proc/self/mountinfo
	LinksSource        = "floxd-links"     // device of the mount of profiles, which is of the same type, there

	DefaultHTTPPort       = 7780 // binary cache of the storehouse
	DefaultStorehousePort = 7781 // storehouse to machines
	DefaultAgentPort      = 7782 // agent to machines
	DefaultConsensusPort  = 7783 // storehouse to its other servers
)

// SudoersDropIn is what floxctl doctor --fix writes for sudo, and floxd leave removes; its
// first line is SudoersHead. It is read last, and has no dot: sudo would pass over it.
const (
	SudoersDropIn = "/etc/sudoers.d/zz-floxd"
	SudoersHead   = "# floxctl doctor --fix wrote this; floxd leave removes it."
)

// Environment variables both programs know.
const (
	EnvSocket = "FLOXD_SOCKET" // the agent's control socket
	EnvToken  = "FLOXD_TOKEN"  // an upload token
	EnvConfig = "FLOXD_CONFIG" // floxd's configuration file
)

// HowToBeInvited says what a run without an agent needs to get into a storehouse.
const HowToBeInvited = "name a file with an invite, --invite FILE; on a server of the storehouse, or as its admin, one is made with: floxctl invite --role agent --ephemeral >FILE"
