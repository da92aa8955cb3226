package cli

import (
	"runtime"
	"runtime/debug"
)

// version is set when a release is built:
// -ldflags "-X github.com/floxctl/flox/ctl/cli.version=v1.2.3".
var version string

// Version is what a program knows of its own build.
type Version struct {
	Version  string `json:"version"`  // release, module version, or "devel"
	Commit   string `json:"commit"`   // "" when it was not built from a checkout
	Time     string `json:"time"`     // of the commit, RFC 3339, or ""
	Modified bool   `json:"modified"` // built from a checkout with changes
	Go       string `json:"go"`
	Platform string `json:"platform"` // "linux/amd64"
}

// ReadVersion reads what the linker and the Go tool left in the program.
func ReadVersion() Version {
	v := Version{Version: version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if ok {
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Commit = s.Value
			case "vcs.time":
				v.Time = s.Value
			case "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
		if v.Version == "" && info.Main.Version != "(devel)" {
			v.Version = info.Main.Version
		}
	}
	if v.Version == "" {
		v.Version = "devel"
	}
	return v
}

// String gives "v1.2.3 (1a2b3c4d, linux/amd64, go1.26)".
func (v Version) String() string {
	s := v.Version + " ("
	if v.Commit != "" {
		s += v.Commit[:min(8, len(v.Commit))]
		if v.Modified {
			s += " with changes"
		}
		s += ", "
	}
	return s + v.Platform + ", " + v.Go + ")"
}
