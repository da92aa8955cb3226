package ctl

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/floxctl/flox/ctl/cli"
)

// output is where a command prints its facts, and how.
type output struct {
	w        io.Writer
	json     bool
	color    bool
	terminal *os.File // w, when it is a terminal
}

// printer looks at what standard output is.
func (g *globals) printer(cmd *cobra.Command) *output {
	return newOutput(g, cmd.OutOrStdout())
}

// progressPrinter is the same for standard error, where progress goes.
func (g *globals) progressPrinter(cmd *cobra.Command) *output {
	return newOutput(g, cmd.ErrOrStderr())
}

// newOutput decides on colours once: only for a terminal that shows them, and
// not against the user's wish (no-color.org).
func newOutput(g *globals, w io.Writer) *output {
	o := &output{w: w, json: g.json}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		o.terminal = f
		o.color = !g.noColor && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
	}
	return o
}

// width of the terminal in columns; 80 where there is none.
func (o *output) width() int {
	if o.terminal != nil {
		if w, _, err := term.GetSize(int(o.terminal.Fd())); err == nil && w > 0 {
			return w
		}
	}
	return 80
}

// printJSON prints one document, indented.
func (o *output) printJSON(v any) error {
	e := json.NewEncoder(o.w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printJSONLine prints one line of a stream.
func (o *output) printJSONLine(v any) error {
	e := json.NewEncoder(o.w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// printf ignores errors: a reader that left (a pager, head) ends the program by
// SIGPIPE anyway.
func (o *output) printf(format string, args ...any) {
	fmt.Fprintf(o.w, format, args...)
}

// style is the number of a terminal's attribute (ECMA-48, SGR).
type style string

const (
	bold   style = "1"
	dim    style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
)

// paint styles s if the terminal shows styles.
func (o *output) paint(st style, s string) string {
	if !o.color || s == "" {
		return s
	}
	return "\x1b[" + string(st) + "m" + s + "\x1b[0m"
}

// clean makes text of others (names of files and processes, messages) harmless
// on a terminal: control and invisible characters are shown, not obeyed.
func clean(s string) string {
	if strings.IndexFunc(s, hidden) < 0 && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(s[i:], "\uFFFD"):
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case hidden(r) && r < utf8.RuneSelf:
			fmt.Fprintf(&b, `\x%02x`, r)
		case hidden(r):
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// hidden characters do something to a terminal, or cannot be seen.
func hidden(r rune) bool { return !unicode.IsPrint(r) && r != ' ' }

// table prints rows in columns that fit their widest cell; the first row is
// the head.
func (o *output) table(rows [][]string, right map[int]bool) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for n, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			switch {
			case right[i]:
				line.WriteString(pad + cell)
			case i == len(row)-1:
				line.WriteString(cell)
			default:
				line.WriteString(cell + pad)
			}
			if i < len(row)-1 {
				line.WriteString("  ")
			}
		}
		text := strings.TrimRight(line.String(), " ")
		if n == 0 {
			text = o.paint(dim, text)
		}
		o.printf("%s\n", text)
	}
}

// fit cuts s to width columns, keeping its end: the end of a path says most.
func fit(s string, width int) string {
	r := []rune(s)
	if len(r) <= width {
		return s
	}
	if width < 2 {
		return string(r[:max(width, 0)])
	}
	return "…" + string(r[len(r)-width+1:])
}

// stamp gives a time for JSON, nil for none.
func stamp(unix int64) *string {
	if unix <= 0 {
		return nil
	}
	s := time.Unix(unix, 0).UTC().Format(time.RFC3339)
	return &s
}

// plural gives "1 path", "2 paths".
func plural(n uint64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%s %s", cli.FormatCount(n), many)
}
