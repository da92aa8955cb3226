package ctl

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"time"

	"connectrpc.com/connect"

	floxv1 "github.com/floxctl/flox/api/flox/v1"
)

const (
	// maxPrograms is how many programs that came with a change are told of.
	maxPrograms = 8
	// programsPatience is how long looking for them may take: the change itself is made.
	programsPatience = 2 * time.Second
)

// programFacts is a program that came with a change.
type programFacts struct {
	Name   string `json:"name"`
	Path   string `json:"path"`             // by which it is found on every machine
	OnPath bool   `json:"onPath"`           // PATH has its directory
	Before string `json:"before,omitempty"` // another program of the name that PATH finds first
}

// programsOf are the programs that came with a change, as far as the agent shows the
// profile and knows soon what is in a package. There are none for another reader of them
// than people: what goes wrong is not told.
func programsOf(ctx context.Context, g *globals, m *floxv1.ChangeProfileResponse) (list []programFacts) {
	var paths []string
	for _, c := range changesOf(m.GetBefore(), m.GetGeneration()) {
		if c.After != nil {
			paths = append(paths, c.After.Paths[thisSystem()]...)
		}
	}
	if len(paths) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, programsPatience)
	defer cancel()
	agent := g.agent()
	shown, err := agent.ShownProfiles(ctx, connect.NewRequest(&floxv1.ShownProfilesRequest{Name: m.GetProfile().GetName()}))
	if err != nil || shown.Msg.GetDir() == "" {
		return nil
	}
	bin := filepath.Join(shown.Msg.GetDir(), m.GetProfile().GetName(), "bin")
	for _, path := range paths {
		stream, err := agent.List(ctx, connect.NewRequest(&floxv1.ListRequest{Path: path + "/bin"}))
		if err != nil {
			continue
		}
		for len(list) < maxPrograms && stream.Receive() {
			if e := stream.Msg(); e.GetExecutable() || e.GetKind() == "symlink" {
				list = append(list, findProgram(bin, e.GetPath(), os.Getenv("PATH")))
			}
		}
		_ = stream.Close() // there may be more, or no bin
	}
	return list
}

// findProgram says what of a name PATH finds before the one in a directory. What comes
// after that is not looked at.
func findProgram(bin, name, path string) programFacts {
	f := programFacts{Name: name, Path: filepath.Join(bin, name)}
	dirs := filepath.SplitList(path)
	at := slices.IndexFunc(dirs, func(dir string) bool { return filepath.Clean(dir) == bin })
	if f.OnPath = at >= 0; f.OnPath {
		dirs = dirs[:at]
	}
	for _, dir := range dirs {
		file := filepath.Join(dir, name)
		info, err := os.Stat(file)
		if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 && dir != "" {
			f.Before = file
			return f
		}
	}
	return f
}

// tellPrograms says where the programs are that came, and what keeps a shell from
// finding them.
func tellPrograms(out *output, profile string, came []programFacts) {
	missing := false
	for _, p := range came {
		out.printf("  %s\n", clean(p.Path))
		if p.Before != "" {
			out.printf("    %s\n", out.paint(yellow, "your PATH finds "+clean(p.Before)+" before it"))
		}
		missing = missing || !p.OnPath
	}
	if missing {
		out.printf("Your PATH does not have it: floxctl activate -p %s --live, or a new shell if it is your own profile.\n", clean(profile))
	}
}
