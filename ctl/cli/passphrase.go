package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	flox "github.com/floxctl/flox"
)

// maxPassphrase bounds a passphrase in bytes.
const maxPassphrase = 4 << 10

// Passphrase reads a passphrase from the first line of a file, which nobody else
// may read, or asks for it at the terminal, twice if it is a new one. It is never
// taken from the command line, where everybody on the machine can see it.
func Passphrase(cmd *cobra.Command, file string, isNew bool) ([]byte, error) {
	if file != "" {
		return passphraseFile(file)
	}
	in, isFile := cmd.InOrStdin().(*os.File)
	if !isFile || !term.IsTerminal(int(in.Fd())) {
		return nil, Usage("a passphrase is needed, and standard input is no terminal to ask at: put it into a file and name that with --passphrase-file")
	}
	first, err := askPassphrase(cmd, in, "Passphrase of the backup: ")
	if err != nil || !isNew {
		return first, err
	}
	again, err := askPassphrase(cmd, in, "Once more: ")
	if err == nil && !bytes.Equal(first, again) {
		err = Explain(flox.ErrBadInput, "these are two different passphrases; nothing was done")
	}
	return first, err
}

func passphraseFile(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		kind := flox.ErrDenied
		if errors.Is(err, os.ErrNotExist) {
			kind = flox.ErrNotFound
		}
		return nil, Explain(kind, "--passphrase-file: %v", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, Explain(flox.ErrDenied, "--passphrase-file: %v", err)
	}
	if st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
		return nil, Explain(flox.ErrDenied, "--passphrase-file: %s can be read by others (mode %04o): chmod 600 it, and choose another passphrase if others were about", file, st.Mode().Perm())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPassphrase+1))
	if err != nil {
		return nil, Explain(flox.ErrDenied, "--passphrase-file: %v", err)
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 || len(line) > maxPassphrase {
		return nil, Explain(flox.ErrBadInput, "--passphrase-file: the first line of %s has %d bytes: want a passphrase", file, len(line))
	}
	return line, nil
}

// askPassphrase asks at the terminal, without showing what is typed.
func askPassphrase(cmd *cobra.Command, in *os.File, prompt string) ([]byte, error) {
	fd := int(in.Fd())
	was, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	fmt.Fprint(cmd.ErrOrStderr(), prompt)
	type answer struct {
		b   []byte
		err error
	}
	typed := make(chan answer, 1)
	go func() { // a read of a terminal ends with the program at the latest
		b, err := term.ReadPassword(fd)
		typed <- answer{b, err}
	}()
	select {
	case a := <-typed:
		fmt.Fprintln(cmd.ErrOrStderr())
		if a.err != nil {
			return nil, fmt.Errorf("passphrase: %w", a.err)
		}
		return a.b, nil
	case <-cmd.Context().Done():
		return nil, errors.Join(context.Canceled, term.Restore(fd, was))
	}
}
