package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/api"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/ctl/cli"
	"github.com/floxctl/flox/nix"
)

// addPiece is how much of the NAR goes into one message.
const addPiece = 256 << 10

// An upload that breaks off, for example because a server of the storehouse died,
// is made again: this often, with longer and longer pauses.
const (
	addTries = 6
	addPause = 500 * time.Millisecond
)

// maxToken bounds a token file: anything longer is no token.
const maxToken = 4 << 10

// addOptions are the command line of add.
type addOptions struct {
	*globals
	path      string
	name      string
	tokenFile string
}

func newStoreAddCmd(g *globals) *cobra.Command {
	opts := addOptions{globals: g}
	cmd := &cobra.Command{
		Use:   "add PATH [--name NAME] [--token-file FILE]",
		Short: "Upload a file or directory as a store path",
		Long: `Upload a file or directory to the storehouse as a store path of its own, named by
its content as nix-store --add does, and print the path. An upload that breaks off, as when
a server of the storehouse goes, is made again through another.

It needs a publisher's token, from --token-file or ` + cli.EnvToken + `. The storehouse keeps
its own at ` + cli.DefaultStateDir + `/storehouse/upload-token.

` + cli.ExitCodes,
		Example: "  floxctl store add ./site --name site-1.4",
		Args:    cli.Args(1, 1, "PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.path = args[0]
			return runStoreAdd(cmd.Context(), opts, g.printer(cmd), g.progressPrinter(cmd))
		},
	}
	cmd.Flags().StringVar(&opts.name, "name", "", "name behind the hash (default: the last component of PATH)")
	cmd.Flags().StringVar(&opts.tokenFile, "token-file", "", "file that holds the upload token (default: $"+cli.EnvToken+")")
	return cmd
}

// runStoreAdd checks everything that can be checked here before it sends a byte.
func runStoreAdd(ctx context.Context, opts addOptions, out, errOut *output) error {
	name, err := addName(opts)
	if err != nil {
		return err
	}
	token, err := readToken(opts.tokenFile)
	if err != nil {
		return err
	}
	agent := opts.agent()
	dir, err := storeDir(ctx, agent) // also tells early that no agent runs
	if err != nil {
		return err
	}
	// Leaving before the answer cuts the upload off, so that the agent throws away what it got.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	resp, err := uploadUntilDone(ctx, func() (*floxv1.AddResponse, uint64, error) {
		return upload(ctx, agent.Add(ctx), &floxv1.AddRequest{Name: name, Token: token}, opts.path, newProgress(errOut))
	}, errOut)
	if err != nil {
		return err
	}
	info, err := api.ToPathInfo(resp.GetInfo())
	if err != nil {
		return err
	}
	if out.json {
		return out.printJSON(struct {
			Path     string `json:"path"`
			NarHash  string `json:"narHash"`
			NarSize  uint64 `json:"narSize"`
			WasValid bool   `json:"wasValid"`
		}{dir.Join(info.Path), infoOf(dir, info, nil).NarHash, info.NarSize, resp.GetWasValid()})
	}
	out.printf("%s\n", dir.Join(info.Path))
	if resp.GetWasValid() {
		errOut.printf("The store had it already.\n")
	}
	return nil
}

// uploadUntilDone tries again while uploads break off on their way: the tree is
// still here. One that does not even begin is not tried again.
func uploadUntilDone(ctx context.Context, try func() (*floxv1.AddResponse, uint64, error), errOut *output) (*floxv1.AddResponse, error) {
	begun := false
	for i, pause := 1, addPause; ; i, pause = i+1, 2*pause {
		resp, sent, err := try()
		begun = begun || sent > 0
		if err == nil || !begun || i == addTries || !errors.Is(err, flox.ErrUnreachable) {
			return resp, err
		}
		errOut.printf("The upload broke off (%v); trying again in %s.\n", err, pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// upload streams first and then the NAR of fsPath, and waits for the answer. It
// tells how much it sent.
func upload(ctx context.Context, stream *connect.ClientStreamForClient[floxv1.AddRequest, floxv1.AddResponse],
	first *floxv1.AddRequest, fsPath string, bar *progress,
) (*floxv1.AddResponse, uint64, error) {
	defer bar.end()
	w := &addWriter{stream: stream, bar: bar}
	err := stream.Send(first)
	if err == nil {
		err = nix.DumpPath(ctx, w, fsPath)
	}
	if err == nil {
		err = w.flush()
	}
	if err != nil && !errors.Is(err, io.EOF) { // EOF: the answer says why the agent hung up
		return nil, w.sent, explain(err)
	}
	resp, err := stream.CloseAndReceive()
	if err != nil {
		return nil, w.sent, explain(err)
	}
	return resp.Msg, w.sent, nil
}

// addWriter cuts a NAR into messages.
type addWriter struct {
	stream *connect.ClientStreamForClient[floxv1.AddRequest, floxv1.AddResponse]
	bar    *progress
	buf    []byte
	sent   uint64
}

// Write gathers small writes: a NAR is made of many.
func (w *addWriter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		take := min(len(p), addPiece-len(w.buf))
		w.buf = append(w.buf, p[:take]...)
		p = p[take:]
		if len(w.buf) == addPiece {
			if err := w.flush(); err != nil {
				return n - len(p), err
			}
		}
	}
	return n, nil
}

// flush sends what was gathered.
func (w *addWriter) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	if err := w.stream.Send(&floxv1.AddRequest{Nar: w.buf}); err != nil {
		return err
	}
	w.sent += uint64(len(w.buf))
	w.buf = w.buf[:0]
	w.bar.show(step{done: w.sent, what: "uploading"})
	return nil
}

// addName gives the name the path will have, checked by Nix's rules before
// anything is sent.
func addName(opts addOptions) (string, error) {
	if _, err := os.Lstat(opts.path); err != nil {
		return "", fmt.Errorf("%w: %w", err, flox.ErrNotFound)
	}
	name := opts.name
	if name == "" {
		abs, err := filepath.Abs(opts.path)
		if err != nil {
			return "", fmt.Errorf("%s: %w", opts.path, err)
		}
		name = filepath.Base(abs)
	}
	if _, err := flox.ParseStorePath(strings.Repeat("0", flox.HashPartLen) + "-" + name); err != nil {
		return "", fmt.Errorf("name %q cannot be the name of a store path: want 1 to %d of letters, digits and + - . _ ? =, not starting with a dot component; give one with --name: %w",
			name, flox.MaxNameLen, flox.ErrBadInput)
	}
	return name, nil
}

// readToken takes the file before the environment: what was typed just now wins.
// The token itself is never in a message.
func readToken(file string) (string, error) {
	if file == "" {
		token := strings.TrimSpace(os.Getenv(cli.EnvToken))
		if token == "" {
			return "", cli.Usage("a publisher's token is needed: --token-file FILE, or %s in the environment", cli.EnvToken)
		}
		return token, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("token file: %w: %w", err, flox.ErrBadInput)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("token file %s: %w", file, err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || len(b) > maxToken || strings.ContainsAny(token, " \n") {
		return "", fmt.Errorf("token file %s: want one token on one line, at most %d bytes: %w", file, maxToken, flox.ErrBadInput)
	}
	return token, nil
}
