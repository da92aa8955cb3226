package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// configHead begins a configuration file that a command made.
const configHead = "# Made by floxd; floxd --help shows every key.\n"

// configFile is a configuration file that a command adds keys to. What people
// wrote in it stays as it is, comments included.
type configFile struct {
	path string
	text string
	mode fs.FileMode
	// exists is false of one that will be made.
	exists bool
	// has is what it says, over the defaults, and says which keys it names.
	has  *Config
	says map[string]bool
}

// openConfig reads the configuration file that a command was given, or the
// default one. One that does not exist is empty.
func openConfig(file string) (*configFile, error) {
	f := &configFile{path: file, mode: 0o644, has: DefaultConfig(), says: map[string]bool{}}
	if f.path == "" {
		f.path = os.Getenv(cli.EnvConfig)
	}
	if f.path == "" {
		f.path = cli.DefaultConfigFile
	}
	var err error
	if f.path, err = filepath.Abs(f.path); err != nil {
		return nil, fmt.Errorf("configuration file: %w", err)
	}
	b, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return nil, fmt.Errorf("configuration file: %w: %w", err, flox.ErrDenied)
	}
	if info, err := os.Stat(f.path); err == nil {
		f.mode = info.Mode().Perm()
	}
	f.text, f.exists = string(b), true
	f.has, f.says, err = parseConfig(f.path, f.text)
	return f, err
}

// parseConfig gives what a file says over the defaults, and the keys in it.
func parseConfig(path, text string) (*Config, map[string]bool, error) {
	cfg, says := DefaultConfig(), map[string]bool{}
	d := toml.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := explainTOML(path, d.Decode(cfg)); err != nil {
		return nil, nil, err
	}
	tree := map[string]any{}
	if err := toml.Unmarshal([]byte(text), &tree); err != nil {
		return nil, nil, explainTOML(path, err)
	}
	for key, value := range tree {
		section, isSection := value.(map[string]any)
		if !isSection {
			says[key] = true
			continue
		}
		for name := range section {
			says[key+"."+name] = true
		}
	}
	return cfg, says, nil
}

// with gives the text of the file with the keys that want has otherwise, of
// those outside sections and in the given ones. It is an error if the file says
// something else itself: what is in it was somebody's decision.
func (f *configFile) with(want *Config, sections ...string) (string, error) {
	sections = append([]string{""}, sections...)
	wanted, lines := settings(want), configLines(f.text)
	text, differ := f.text, []string(nil)
	add := map[string][]string{} // section to its new lines
	for i, has := range settings(f.has) {
		section, key := sectionOf(has.key)
		if !slices.Contains(sections, section) || has.String() == wanted[i].String() {
			continue
		}
		if f.says[has.key] {
			at := ""
			if n := lines[has.key]; n > 0 {
				at = fmt.Sprintf(":%d", n)
			}
			differ = append(differ, fmt.Sprintf("%s%s: %s is %q, wanted is: %s = %s", f.path, at, has.key, has.String(), key, wanted[i].toml()))
			continue
		}
		add[section] = append(add[section], key+" = "+wanted[i].toml())
	}
	if len(differ) > 0 {
		return "", cli.Explain(flox.ErrBusy, "the configuration says otherwise, and is not changed; edit it or choose what it says:\n%s", strings.Join(differ, "\n"))
	}
	if len(add) == 0 {
		if !f.exists {
			text = configHead // what is started is told its name
		}
		return text, nil
	}
	for _, section := range sections {
		text = addLines(text, section, add[section])
	}
	got, _, err := parseConfig(f.path, text)
	if err == nil {
		err = f.sameAs(got, wanted, sections)
	}
	if err != nil {
		return "", cli.Explain(flox.ErrBadInput, "%s is written in a way that floxd does not edit; add to it by hand:\n%s", f.path, byHand(add))
	}
	return text, nil
}

// sameAs reports whether got has what is wanted, and otherwise what the file had.
func (f *configFile) sameAs(got *Config, wanted []setting, sections []string) error {
	has := settings(f.has)
	for i, s := range settings(got) {
		want := has[i]
		if section, _ := sectionOf(s.key); slices.Contains(sections, section) {
			want = wanted[i]
		}
		if s.String() != want.String() {
			return fmt.Errorf("%s would be %s, not %s: %w", s.key, s, want, flox.ErrBadInput)
		}
	}
	return nil
}

// sectionOf splits "agent.listen"; what stands outside sections is in "".
func sectionOf(key string) (section, name string) {
	section, name, found := strings.Cut(key, ".")
	if !found {
		return "", key
	}
	return section, name
}

// byHand shows the lines that a file lacks.
func byHand(add map[string][]string) string {
	var b strings.Builder
	for _, section := range []string{"", "agent", "storehouse"} {
		if len(add[section]) > 0 && section != "" {
			fmt.Fprintf(&b, "[%s]\n", section)
		}
		for _, line := range add[section] {
			b.WriteString(line + "\n")
		}
	}
	return strings.TrimSuffix(b.String(), "\n")
}

var (
	headerLine = regexp.MustCompile(`^\s*\[([A-Za-z0-9_-]+)\]\s*(#.*)?$`)
	keyLine    = regexp.MustCompile(`^\s*([A-Za-z0-9_-]+)\s*=`)
)

// configLines maps keys to the number of their line, for messages.
func configLines(text string) map[string]int {
	at, prefix := map[string]int{}, ""
	for i, line := range strings.Split(text, "\n") {
		if m := headerLine.FindStringSubmatch(line); m != nil {
			prefix = m[1] + "."
		} else if m := keyLine.FindStringSubmatch(line); m != nil {
			at[prefix+m[1]] = i + 1
		}
	}
	return at
}

// addLines puts lines at the beginning of a section, "" = before the first one,
// or makes the section at the end.
func addLines(text, section string, lines []string) string {
	if len(lines) == 0 {
		return text
	}
	block := strings.Join(lines, "\n") + "\n"
	if text == "" {
		text = configHead
	}
	if !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	var out strings.Builder
	done := false
	for line := range strings.Lines(text) {
		m := headerLine.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		switch {
		case done || m == nil:
			out.WriteString(line)
		case section == "":
			out.WriteString(block + "\n" + line)
			done = true
		case m[1] == section:
			out.WriteString(line + block)
			done = true
		default:
			out.WriteString(line)
		}
	}
	switch {
	case done:
	case section == "":
		out.WriteString(block)
	default:
		out.WriteString("\n[" + section + "]\n" + block)
	}
	return out.String()
}

// toml is the value as a configuration file has it.
func (s setting) toml() string {
	switch v := s.value.Interface().(type) {
	case bool:
		return fmt.Sprint(v)
	case []string:
		quoted := make([]string, 0, len(v))
		for _, item := range v {
			quoted = append(quoted, quoteTOML(item))
		}
		return "[" + strings.Join(quoted, ", ") + "]"
	}
	return quoteTOML(s.String())
}

// quoteTOML writes a basic string: the escapes of JSON are TOML's.
func quoteTOML(text string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(text); err != nil {
		return fmt.Sprintf("%q", text)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// save writes the file durably, whole or not at all. A link stays one.
func (f *configFile) save(text string) error {
	if text == f.text && f.exists {
		return nil
	}
	path := f.path
	if to, err := filepath.EvalSymlinks(path); err == nil {
		path = to
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("configuration file: %w: %w", err, flox.ErrDenied)
	}
	if err := replaceFile(path, text, f.mode); err != nil {
		return fmt.Errorf("configuration file %s: %w", f.path, err)
	}
	f.text, f.exists = text, true
	return nil
}

// replaceFile writes a file of root's in a directory of root's.
func replaceFile(path, text string, mode fs.FileMode) error {
	t, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(t.Name()) }() // gone already when it was renamed
	_, err = t.WriteString(text)
	if err == nil {
		err = t.Chmod(mode)
	}
	if err == nil {
		err = t.Sync()
	}
	if err = errors.Join(err, t.Close()); err != nil {
		return err
	}
	if err := os.Rename(t.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
