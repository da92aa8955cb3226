package worker

import (
	"context"
	"encoding/binary"
	"errors"
	"io"

	"github.com/floxctl/flox"
)

func le(word [8]byte) uint64 { return binary.LittleEndian.Uint64(word[:]) }

// call is one operation going on: first its request is read, then the window
// of the log is open, then its reply is written.
type call struct {
	*connection
	ctx    context.Context
	open   bool         // the window
	frames *frameReader // of a request that ends in a framed stream
	last   bool         // the connection cannot go on behind this operation
}

// operation serves one kind of request.
type operation struct {
	name  string
	since Version // 0 = MinVersion
	serve func(c *call) error
}

// operations is the table of all operations.
var operations = buildTable(queryOps, substituteOps, addOps, buildOps, rootOps, upkeepOps, obsoleteOps)

func buildTable(groups ...map[Op]operation) map[Op]operation {
	table := make(map[Op]operation)
	for _, g := range groups {
		for code, op := range g {
			table[code] = op
		}
	}
	return table
}

// perform serves one operation. An error ends the connection.
func (c *connection) perform(ctx context.Context, code Op) error {
	call := &call{connection: c, ctx: ctx}
	op, known := operations[code]
	var err error
	if known && op.since <= c.version {
		err = op.serve(call)
	} else {
		err = errorf(flox.ErrBadInput, "invalid operation %d", uint64(code))
	}
	if err != nil {
		return call.fail(err)
	}
	return c.out.flush()
}

// start ends the request and opens the window. An error in the request ends
// the connection: nobody knows where the next one begins.
func (c *call) start() error {
	if c.in.err != nil {
		return c.in.err
	}
	c.open = true
	c.log.begin()
	return nil
}

// stream starts an operation whose request ends in a framed stream.
func (c *call) stream() (io.Reader, error) {
	if err := c.start(); err != nil {
		return nil, err
	}
	c.frames = &frameReader{r: c.in.r}
	return c.frames, nil
}

// finish closes the window; the reply follows. Who sent a stream sends it to
// its end.
func (c *call) finish() error {
	if c.frames != nil {
		if err := c.frames.drain(); err != nil {
			return err
		}
	}
	c.log.end(c.version, nil)
	c.open = false
	return nil
}

// done is finish for an operation whose reply is the number 1.
func (c *call) done() error {
	if err := c.finish(); err != nil {
		return err
	}
	c.out.u64(1)
	return nil
}

// fail tells the client what went wrong. The connection goes on if the request
// was understood and read to its end.
func (c *call) fail(err error) error {
	if !c.open && c.last {
		return errors.Join(err, c.out.flush())
	}
	inside := c.log.end(c.version, err)
	if ferr := c.out.flush(); ferr != nil {
		return errors.Join(err, ferr)
	}
	if !inside || c.last || c.ctx.Err() != nil {
		return err
	}
	if c.frames != nil {
		// The client stops early, but not in the middle of a frame.
		if derr := c.frames.drain(); derr != nil {
			return errors.Join(err, derr)
		}
	}
	return nil
}
