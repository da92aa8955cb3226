package daemon

import (
	"encoding"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/ctl/cli"
)

// Size is a number of bytes, written as "20GiB".
type Size uint64

// UnmarshalText parses what cli.ParseBytes does.
func (s *Size) UnmarshalText(b []byte) error {
	n, err := cli.ParseBytes(string(b))
	*s = Size(n)
	return err
}

// String gives the shortest exact form that UnmarshalText reads.
func (s Size) String() string {
	for _, u := range []struct {
		shift uint
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if s >= 1<<u.shift && s%(1<<u.shift) == 0 {
			return fmt.Sprintf("%d%s", s>>u.shift, u.name)
		}
	}
	return fmt.Sprint(uint64(s))
}

// MarshalText gives String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Duration is a time span, written as "5s".
type Duration time.Duration

// UnmarshalText parses what time.ParseDuration does.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("time %q: want a number and a unit such as 500ms, 5s or 10m: %w", b, flox.ErrBadInput)
	}
	*d = Duration(v)
	return nil
}

// String drops what time.Duration adds in zeros: "24h", not "24h0m0s".
func (d Duration) String() string {
	s := time.Duration(d).String() // "24h0m0s"
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText gives String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Percent is a share of a whole, written as "85%".
type Percent float64

// UnmarshalText parses a number with or without the sign, above 0 and at most 100.
func (p *Percent) UnmarshalText(b []byte) error {
	v, err := strconv.ParseFloat(strings.TrimSuffix(string(b), "%"), 64)
	if err != nil || !(0 < v && v <= 100) {
		return fmt.Errorf("share %q: want a number above 0 and at most 100 such as 85%%: %w", b, flox.ErrBadInput)
	}
	*p = Percent(v)
	return nil
}

// String gives the text UnmarshalText reads.
func (p Percent) String() string { return strconv.FormatFloat(float64(p), 'f', -1, 64) + "%" }

// MarshalText gives String.
func (p Percent) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// Count is how many of something, at least one.
type Count uint16

// UnmarshalText parses a number from 1 to 1024.
func (c *Count) UnmarshalText(b []byte) error {
	v, err := strconv.ParseUint(string(b), 10, 16)
	if err != nil || v < 1 || v > 1024 {
		return fmt.Errorf("number %q: want one from 1 to 1024: %w", b, flox.ErrBadInput)
	}
	*c = Count(v)
	return nil
}

// MarshalText gives the text UnmarshalText reads.
func (c Count) MarshalText() ([]byte, error) { return strconv.AppendUint(nil, uint64(c), 10), nil }

// setting is one key of a Config that can be read and set as text.
type setting struct {
	key   string // "agent.cache-budget"
	help  string
	value reflect.Value
}

// settings lists every key of cfg in the order of the struct.
func settings(cfg *Config) []setting {
	var list []setting
	var walk func(v reflect.Value, prefix string)
	walk = func(v reflect.Value, prefix string) {
		for i := range v.NumField() {
			field := v.Type().Field(i)
			key := prefix + field.Tag.Get("toml")
			if field.Type.Kind() == reflect.Struct {
				walk(v.Field(i), key+".")
				continue
			}
			list = append(list, setting{key: key, help: field.Tag.Get("help"), value: v.Field(i)})
		}
	}
	walk(reflect.ValueOf(cfg).Elem(), "")
	return list
}

// allKeys lists every key in the order of the file, for messages.
func allKeys() []string {
	var keys []string
	for _, s := range settings(&Config{}) {
		keys = append(keys, s.key)
	}
	return keys
}

// env is the environment variable of a key.
func (s setting) env() string {
	return "FLOXD_" + strings.ToUpper(strings.NewReplacer(".", "_", "-", "_").Replace(s.key))
}

// Set parses text into the setting; a list is separated by commas.
func (s setting) Set(text string) error {
	if u, isText := s.value.Addr().Interface().(encoding.TextUnmarshaler); isText {
		return u.UnmarshalText([]byte(text))
	}
	switch target := s.value.Addr().Interface().(type) {
	case *string:
		*target = text
	case *bool:
		switch text {
		case "true":
			*target = true
		case "false":
			*target = false
		default:
			return fmt.Errorf("%q: want true or false: %w", text, flox.ErrBadInput)
		}
	case *[]string:
		*target = nil
		for item := range strings.SplitSeq(text, ",") {
			if item = strings.TrimSpace(item); item != "" {
				*target = append(*target, item)
			}
		}
	default:
		panic("daemon: setting " + s.key + " has a type that cannot be set")
	}
	return nil
}

// String gives the text Set reads.
func (s setting) String() string {
	if !s.value.IsValid() { // pflag asks a zero value for its text
		return ""
	}
	if list, isList := s.value.Interface().([]string); isList {
		return strings.Join(list, ",")
	}
	return fmt.Sprint(s.value.Interface())
}

// Type is what --help calls the value.
func (s setting) Type() string {
	switch s.value.Interface().(type) {
	case bool:
		return "bool"
	case []string:
		return "list"
	case Size:
		return "size"
	case Duration:
		return "time"
	case Percent:
		return "percent"
	case Count:
		return "number"
	}
	return "text"
}

// readEnv takes every setting from the environment that is there.
func readEnv(cfg *Config) error {
	for _, s := range settings(cfg) {
		text, set := os.LookupEnv(s.env())
		if !set {
			continue
		}
		if err := s.Set(text); err != nil {
			return fmt.Errorf("%s in the environment: %w", s.env(), err)
		}
	}
	return nil
}

// environ gives cfg to a child process: its own environment without our
// variables, and every setting.
func environ(cfg *Config) []string {
	var env []string
	mine := map[string]bool{cli.EnvConfig: true}
	for _, s := range settings(cfg) {
		mine[s.env()] = true
		env = append(env, s.env()+"="+s.String())
	}
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !mine[name] {
			env = append(env, v)
		}
	}
	return env
}

// overrides are the flags of one command: each writes to a Config of its own,
// from which apply copies those that were given.
type overrides struct {
	flags  *pflag.FlagSet
	keys   map[string]string // flag name to key
	values map[string]setting
}

// bindFlags makes flags of the settings outside sections and of those in the
// given ones. With one section its keys stand alone (--listen), with more they
// carry its name (--agent-listen).
func bindFlags(flags *pflag.FlagSet, sections ...string) *overrides {
	o := &overrides{flags: flags, keys: map[string]string{}, values: map[string]setting{}}
	for _, s := range settings(DefaultConfig()) {
		section, key, inSection := strings.Cut(s.key, ".")
		name := s.key
		if inSection {
			if !slices.Contains(sections, section) {
				continue
			}
			if name = key; len(sections) > 1 {
				name = section + "-" + key
			}
		}
		o.keys[name], o.values[s.key] = s.key, s
		flag := flags.VarPF(s, name, "", s.help)
		if s.Type() == "bool" {
			flag.NoOptDefVal = "true"
		}
	}
	return o
}

// apply sets in cfg what was given on the command line.
func (o *overrides) apply(cfg *Config) {
	given := map[string]setting{}
	o.flags.Visit(func(f *pflag.Flag) {
		if key, known := o.keys[f.Name]; known {
			given[key] = o.values[key]
		}
	})
	for _, s := range settings(cfg) {
		if g, set := given[s.key]; set {
			s.value.Set(g.value)
		}
	}
}
