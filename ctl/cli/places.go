package cli

// Where things are unless configuration says otherwise. floxd lays them out,
// floxctl only looks for the socket and, in doctor, at what may stand in the way.
const (
	DefaultConfigFile = "/etc/floxd/config.toml"
	DefaultStateDir   = "/var/lib/floxd"
	DefaultRunDir     = "/run/floxd"
	SocketName        = "agent.sock" // in the run directory
	DefaultSocket     = DefaultRunDir + "/" + SocketName
	StorehouseSocket  = "storehouse.sock" // in the run directory: for operators on the server itself
	FilesystemType    = "fuse.floxd"      // of the store's mount, as in /proc/self/mountinfo

	DefaultHTTPPort       = 7780 // binary cache of the storehouse
	DefaultStorehousePort = 7781 // storehouse to machines
	DefaultAgentPort      = 7782 // agent to machines
)

// Environment variables both programs know.
const (
	EnvSocket = "FLOXD_SOCKET" // the agent's control socket
	EnvToken  = "FLOXD_TOKEN"  // an upload token
	EnvConfig = "FLOXD_CONFIG" // floxd's configuration file
)
