package raft

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// DecodeCommand reads a command of the log for a Processor. What this program
// does not understand in full must stop the node, because another server may:
// the error wraps ErrUnknownCommand.
func DecodeCommand(processor string, command []byte, into proto.Message) error {
	if err := proto.Unmarshal(command, into); err != nil {
		return fmt.Errorf("%s: %w: %w", processor, err, ErrUnknownCommand)
	}
	if hasUnknown(into.ProtoReflect()) {
		return fmt.Errorf("%s: a field this program does not know: %w", processor, ErrUnknownCommand)
	}
	return nil
}

// hasUnknown reports whether a message holds fields of a newer program, at any depth.
func hasUnknown(m protoreflect.Message) bool {
	if len(m.GetUnknown()) > 0 {
		return true
	}
	found := false
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Message() == nil || f.IsMap():
		case f.IsList():
			for i := range v.List().Len() {
				found = found || hasUnknown(v.List().Get(i).Message())
			}
		default:
			found = hasUnknown(v.Message())
		}
		return !found
	})
	return found
}
