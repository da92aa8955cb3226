package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/floxctl/flox/integration/hosts"
)

// part is a group of rows that are measured together in a lab.
type part[L any] struct {
	name string
	run  func(L, context.Context) ([]Row, error)
}

// runParts measures the parts that the environment names, or all of them, in order. It
// gives what was measured until one failed, with the end of the log of an agent, which parts may change.
func runParts[L any](ctx context.Context, lab L, agent func() *hosts.Agent, env string, parts []part[L]) (rows []Row, err error) {
	only := strings.FieldsFunc(os.Getenv(env), func(r rune) bool { return r == ',' })
	for _, p := range parts {
		if len(only) > 0 && !slices.Contains(only, p.name) {
			continue
		}
		began := time.Now()
		more, err := p.run(lab, ctx)
		if err != nil {
			return rows, fmt.Errorf("%s: %w\nthe end of %s:\n%s", p.name, err, agent().Log, agent().Tail())
		}
		rows = append(rows, more...)
		fmt.Printf("   %s: %d rows in %.0f s\n", p.name, len(more), time.Since(began).Seconds())
	}
	return rows, nil
}
