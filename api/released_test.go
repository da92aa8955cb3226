package api

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/floxctl/flox/api/flox/v1" // what is listed
)

const (
	// released lists every field, enum value and method of a release, one a line.
	released = "testdata/released.txt"
	// releaseEnv, set to anything, adds what is new to released. This is done and
	// committed at each release:
	//
	//	FLOX_RELEASE=1 go test -run TestWhatWasReleasedStays ./api
	//
	// A line goes only when the last two minor versions do without what it says; its
	// number is then reserved in the .proto file.
	releaseEnv = "FLOX_RELEASE"
)

// Agents and workers of the last two minor versions talk to servers of this one:
// nothing of what was released is gone, or has another number, type, cardinality or
// place in a oneof.
func TestWhatWasReleasedStays(t *testing.T) {
	t.Parallel()
	now := definitions()
	if os.Getenv(releaseEnv) != "" {
		all := slices.Concat(readLines(t), now)
		slices.Sort(all)
		if err := os.WriteFile(released, []byte(strings.Join(slices.Compact(all), "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	before := readLines(t)
	if len(before) < 500 {
		t.Fatalf("%s has %d lines, want what was released", released, len(before))
	}
	for _, line := range before {
		if _, there := slices.BinarySearch(now, line); there {
			continue
		}
		name := strings.Join(strings.Fields(line)[:2], " ") + " "
		instead := "nothing"
		if i := slices.IndexFunc(now, func(l string) bool { return strings.HasPrefix(l, name) }); i >= 0 {
			instead = now[i]
		}
		t.Errorf("older programs know\n\t%s\nnow it is\n\t%s", line, instead)
	}
}

func readLines(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile(released)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// definitions lists what is defined now, sorted.
func definitions() (lines []string) {
	protoregistry.GlobalFiles.RangeFilesByPackage("flox.v1", func(f protoreflect.FileDescriptor) bool {
		lines = append(lines, messages(f.Messages())...)
		lines = append(lines, enums(f.Enums())...)
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for k := range s.Methods().Len() {
				m := s.Methods().Get(k)
				lines = append(lines, fmt.Sprintf("rpc %s %s%s returns %s%s", m.FullName(), streamed(m.IsStreamingClient()), m.Input().FullName(), streamed(m.IsStreamingServer()), m.Output().FullName()))
			}
		}
		return true
	})
	slices.Sort(lines)
	return lines
}

func streamed(is bool) string {
	if is {
		return "stream "
	}
	return ""
}

func messages(all protoreflect.MessageDescriptors) (lines []string) {
	for i := range all.Len() {
		m := all.Get(i)
		lines = append(lines, fmt.Sprint("message ", m.FullName()))
		for k := range m.Fields().Len() {
			lines = append(lines, field(m.Fields().Get(k)))
		}
		lines = append(lines, messages(m.Messages())...)
		lines = append(lines, enums(m.Enums())...)
	}
	return lines
}

func field(f protoreflect.FieldDescriptor) string {
	of := f.Kind().String()
	if f.Message() != nil {
		of += " " + string(f.Message().FullName())
	}
	if f.Enum() != nil {
		of += " " + string(f.Enum().FullName())
	}
	line := fmt.Sprintf("field %s = %d %s %s", f.FullName(), f.Number(), f.Cardinality(), of)
	if one := f.ContainingOneof(); one != nil {
		line += " oneof " + string(one.Name())
	}
	return line
}

func enums(all protoreflect.EnumDescriptors) (lines []string) {
	for i := range all.Len() {
		e := all.Get(i)
		for k := range e.Values().Len() {
			v := e.Values().Get(k)
			lines = append(lines, fmt.Sprintf("value %s.%s = %d", e.FullName(), v.Name(), v.Number()))
		}
	}
	return lines
}
