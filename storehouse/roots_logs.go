package storehouse

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix"
	cluster "github.com/floxctl/flox/raft"
)

// buildLogs are the logs of builds of which an output is valid. That of a build that
// failed stays as long as anything that was published lately.
type buildLogs struct{}

func (buildLogs) roots(_ context.Context, r *cluster.Reader, yield func(root) bool) error {
	record := &floxv1.BuildRecord{}
	var failed error
	err := r.Iterate([]byte{recordKey}, nil, func(_, value []byte) bool {
		if err := proto.Unmarshal(value, record); err != nil {
			failed = fmt.Errorf("facts: record of a build: %w: %w", err, flox.ErrCorrupt)
			return false
		}
		for _, out := range record.GetOutputs() {
			info, err := validAs(r, out)
			if err != nil {
				failed = err
				return false
			}
			if info != nil {
				name := strings.TrimSuffix(flox.StorePath(record.GetDrv()).Name(), nix.DrvExtension)
				return yield(root{kind: rootLog, name: name, hashPart: flox.StorePath(record.GetLog()).HashPart()})
			}
		}
		return true
	})
	return errors.Join(err, failed)
}
