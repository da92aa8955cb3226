package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/floxctl/flox/integration/netns"
	"github.com/floxctl/flox/integration/world"
)

// commits is how many git log has to show.
const commits = 2000

// programRows: real programs, warm, from the mount and from a plain copy that
// lies at the same path.
func (l *fuseLab) programRows(ctx context.Context) ([]Row, error) {
	tools, err := l.realPrograms(ctx)
	if err != nil {
		return nil, err
	}
	var rows []Row
	for _, t := range tools {
		p, err := l.programPairs(ctx, t)
		if err != nil {
			return nil, err
		}
		row := p.row("warm, real program: "+t.Name, "ms", "ext4")
		if t.Name != noIsatty {
			row.Target, row.Met = "95 % interval includes <= 1.05x", row.Low <= 1.05
		}
		rows = append(rows, row)
	}
	return rows, nil
}

// noIsatty is Python again, that does not ask of each file it opens whether it is a
// terminal: the one thing the kernel asks the agent for each time.
const noIsatty = "the same python without isatty"

// realPrograms are python with numpy, git in a repository, and a compiler that
// also links.
func (l *fuseLab) realPrograms(ctx context.Context) ([]world.Tool, error) {
	repository := filepath.Join(l.dir, "repository")
	if err := makeRepository(ctx, repository); err != nil {
		return nil, err
	}
	var tools []world.Tool
	for _, spec := range []struct {
		program, name string
		args          []string
		want          string
	}{
		{"python3", "python importing numpy", []string{"-c", "import numpy; print('sum', numpy.arange(9).sum())"}, "sum 36"},
		{"python3", noIsatty, []string{"-c", "import _io; _io.open_code = _io.FileIO; import numpy; print('sum', numpy.arange(9).sum())"}, "sum 36"},
		{"git", "git log", []string{"-c", "safe.directory=*", "-C", repository, "log", "--stat", "--format=%h %s"}, "commit 1 "},
		{"gcc", "gcc, one file to a program", []string{"-O1", "-o", filepath.Join(l.dir, "compiled"), "main.c", "-v"}, "collect2"},
	} {
		t, err := l.world.Tool(spec.program)
		if err != nil {
			return nil, err
		}
		t.Name, t.Args, t.Want = spec.name, spec.args, spec.want
		tools = append(tools, t)
	}
	return tools, nil
}

// makeRepository makes a repository of one branch, each commit of which adds a
// line to one of some files.
func makeRepository(ctx context.Context, dir string) error {
	var b bytes.Buffer
	for i := 1; i <= commits; i++ {
		message, content := fmt.Sprintf("commit %d of the benchmark", i), strings.Repeat(fmt.Sprintf("line %d\n", i), i%50+1)
		fmt.Fprintf(&b, "commit refs/heads/main\ncommitter A <a@example.org> %d +0000\ndata %d\n%s\n", 1e9+i, len(message), message)
		fmt.Fprintf(&b, "M 644 inline file%d\ndata %d\n%s\n", i%20, len(content), content)
	}
	if out, err := exec.CommandContext(ctx, "git", "init", "-q", "-b", "main", dir).CombinedOutput(); err != nil {
		return fmt.Errorf("git init: %w: %s", err, out)
	}
	cmd := exec.CommandContext(ctx, "git", "-C", dir, "fast-import", "--quiet")
	cmd.Stdin = &b
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("git fast-import: %w: %s", err, out)
	}
	return nil
}

// programPairs takes fusePairs pairs of milliseconds, each right after the same
// run without a clock. A run of ours that asked the agent for something was not
// warm: the pair is made again.
func (l *fuseLab) programPairs(ctx context.Context, t world.Tool) (*pairs, error) {
	p := &pairs{}
	for tries := 0; len(p.ours) < fusePairs; tries++ {
		if tries == undisturbed {
			return nil, fmt.Errorf("%s: only %d of %d rounds were warm", t.Name, len(p.ours), tries)
		}
		var took [2]time.Duration
		warm := true
		for i := range 2 {
			which := (i + tries) % 2
			on := [2]*netns.Host{l.warm.Host, l.plain}[which]
			if _, err := l.run(ctx, on, t); err != nil {
				return nil, err
			}
			warmed := time.Now()
			var s started
			n, err := during(ctx, l.warm, func() (err error) {
				s, err = l.run(ctx, on, t)
				return err
			})
			if err != nil {
				return nil, err
			}
			took[which], warm = s.took, warm && n == 0 && time.Since(warmed) < warmFor
		}
		if warm {
			p.add(took[0].Seconds()*1e3, took[1].Seconds()*1e3)
		}
	}
	return p, nil
}
