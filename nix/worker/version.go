package worker

import "fmt"

// Version is a protocol version, major<<8 | minor: 1.34 is 0x122.
type Version uint64

// MinVersion and MaxVersion are what this package speaks: Nix 2.4 to current
// Nix. Both sides use the lower of their versions.
const (
	MinVersion Version = 1<<8 | 32
	MaxVersion Version = 1<<8 | 38
)

// Versions that changed a field (Nix src/libstore/worker-protocol.hh).
const (
	v11 Version = 1<<8 | 11 // handshake: the obsolete reserveSpace word
	v14 Version = 1<<8 | 14 // handshake: the obsolete CPU affinity
	v26 Version = 1<<8 | 26 // errors with level and traces
	v33 Version = 1<<8 | 33 // handshake: the daemon's version string
	v34 Version = 1<<8 | 34 // BuildPathsWithResults
	v35 Version = 1<<8 | 35 // handshake: whether the client is trusted
	v37 Version = 1<<8 | 37 // build results with CPU times
	v38 Version = 1<<8 | 38 // handshake: feature strings
)

func (v Version) String() string { return fmt.Sprintf("%d.%d", v>>8, v&0xff) }

// The first words of both sides.
const (
	clientMagic uint64 = 0x6e697863
	serverMagic uint64 = 0x6478696f
)

// Tags of the log stream between a request and its reply.
const (
	tagNext  uint64 = 0x6f6c6d67
	tagRead  uint64 = 0x64617461
	tagWrite uint64 = 0x64617416
	tagStart uint64 = 0x53545254
	tagStop  uint64 = 0x53544f50
	tagRes   uint64 = 0x52534c54
	tagError uint64 = 0x63787470
	tagLast  uint64 = 0x616c7473
)

// Op is the number of an operation.
type Op uint64

// The operations of Nix src/libstore/worker-protocol.hh. Those left out (27
// ImportPaths and the failed paths' 24 and 25) are sent by no client of
// MinVersion and are unknown to current Nix as well.
const (
	OpIsValidPath                 Op = 1
	OpHasSubstitutes              Op = 3
	OpQueryPathHash               Op = 4
	OpQueryReferences             Op = 5
	OpQueryReferrers              Op = 6
	OpAddToStore                  Op = 7
	OpAddTextToStore              Op = 8
	OpBuildPaths                  Op = 9
	OpEnsurePath                  Op = 10
	OpAddTempRoot                 Op = 11
	OpAddIndirectRoot             Op = 12
	OpSyncWithGC                  Op = 13
	OpFindRoots                   Op = 14
	OpExportPath                  Op = 16
	OpQueryDeriver                Op = 18
	OpSetOptions                  Op = 19
	OpCollectGarbage              Op = 20
	OpQuerySubstitutablePathInfo  Op = 21
	OpQueryDerivationOutputs      Op = 22
	OpQueryAllValidPaths          Op = 23
	OpQueryPathInfo               Op = 26
	OpQueryDerivationOutputNames  Op = 28
	OpQueryPathFromHashPart       Op = 29
	OpQuerySubstitutablePathInfos Op = 30
	OpQueryValidPaths             Op = 31
	OpQuerySubstitutablePaths     Op = 32
	OpQueryValidDerivers          Op = 33
	OpOptimiseStore               Op = 34
	OpVerifyStore                 Op = 35
	OpBuildDerivation             Op = 36
	OpAddSignatures               Op = 37
	OpNarFromPath                 Op = 38
	OpAddToStoreNar               Op = 39
	OpQueryMissing                Op = 40
	OpQueryDerivationOutputMap    Op = 41
	OpRegisterDrvOutput           Op = 42
	OpQueryRealisation            Op = 43
	OpAddMultipleToStore          Op = 44
	OpAddBuildLog                 Op = 45
	OpBuildPathsWithResults       Op = 46
	OpAddPermRoot                 Op = 47
)
