package worker

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/floxctl/flox"
)

// ClientConfig is how a client speaks to a daemon.
type ClientConfig struct {
	// Dir is the daemon's store directory.
	Dir flox.StoreDir
	// Version is the highest version to speak; 0 = MaxVersion.
	Version Version
	// Log is called for every frame of the log stream; nil = they are ignored.
	Log func(LogFrame)
}

// LogFrame is one frame of a daemon's log stream.
type LogFrame struct {
	Kind     LogKind
	Text     string       // of a message; of an activity that started
	Activity uint64       // its number
	Parent   uint64       // of an activity that started, 0 = none
	Level    Level        // of an activity that started
	Type     ActivityType // of an activity that started
	Result   ResultType
	Fields   []Field
}

// LogKind says what a LogFrame is.
type LogKind uint8

// The kinds of log frames.
const (
	LogMessage LogKind = iota
	LogStart
	LogStop
	LogResult
)

// RemoteError is what a daemon answered instead of a reply.
type RemoteError struct {
	Message string
	Traces  []string
}

func (e *RemoteError) Error() string { return e.Message }

// Client speaks the client's side of the protocol over one connection, one
// operation at a time. Safe for many goroutines.
type Client struct {
	conn io.ReadWriteCloser
	log  func(LogFrame)

	version Version
	daemon  string
	trust   Trust

	mu     sync.Mutex
	in     *decoder
	out    *encoder
	broken error // the connection is of no use any more
}

// NewClient greets the daemon at the other end of conn, which the client owns
// from now on. A daemon older than MinVersion is ErrBadInput.
func NewClient(ctx context.Context, conn io.ReadWriteCloser, cfg ClientConfig) (*Client, error) {
	c := &Client{
		conn: conn, log: cfg.Log,
		in: newDecoder(bufio.NewReaderSize(conn, largeRead), cfg.Dir), out: newEncoder(conn, cfg.Dir),
	}
	if cfg.Version == 0 {
		cfg.Version = MaxVersion
	}
	if c.log == nil {
		c.log = func(LogFrame) {}
	}
	err := c.guard(ctx, func() error { return c.greet(cfg.Version) })
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("greet the Nix daemon: %w", err)
	}
	return c, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Version is what both sides speak.
func (c *Client) Version() Version { return c.version }

// DaemonVersion is the daemon's Nix version; "" below 1.33.
func (c *Client) DaemonVersion() string { return c.daemon }

// Trust is whether the daemon believes this client; TrustUnknown below 1.35.
func (c *Client) Trust() Trust { return c.trust }

func (c *Client) greet(most Version) error {
	c.out.u64(clientMagic)
	if err := c.out.flush(); err != nil {
		return err
	}
	if magic := c.in.u64(); c.in.err == nil && magic != serverMagic {
		return fmt.Errorf("first word %#x is not a Nix daemon's: %w", magic, flox.ErrBadInput)
	}
	daemon := Version(c.in.u64())
	if c.in.err != nil {
		return c.in.err
	}
	if daemon>>8 != MinVersion>>8 || daemon < MinVersion {
		return fmt.Errorf("it speaks protocol %s, want %s or later: %w", daemon, MinVersion, flox.ErrBadInput)
	}
	c.version = min(daemon, most)
	c.in.version, c.out.version = c.version, c.version
	c.out.u64(uint64(most))
	if c.version >= v38 {
		c.out.strs(nil)
		if err := c.out.flush(); err != nil {
			return err
		}
		c.in.strs()
	}
	c.out.u64(0) // no CPU affinity
	c.out.u64(0) // no reserved space
	if err := c.out.flush(); err != nil {
		return err
	}
	if c.version >= v33 {
		c.daemon = c.in.str(maxWord)
	}
	if c.version >= v35 {
		c.trust = Trust(c.in.number(uint64(NotTrusted)))
	}
	return c.follow()
}

// guard runs f, ending the connection if ctx ends meanwhile. Only a daemon's
// own error leaves it usable.
func (c *Client) guard(ctx context.Context, f func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return fmt.Errorf("connection to the Nix daemon is over: %w", c.broken)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.conn.Close() })
	err := f()
	if !stop() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if _, ok := errors.AsType[*RemoteError](err); err != nil && (!ok || ctx.Err() != nil) {
		c.broken = err
		c.conn.Close()
	}
	return err
}

// follow reads the log stream to LAST, or to ERROR, which it returns.
func (c *Client) follow() error {
	c.in.begin()
	for {
		f := LogFrame{}
		switch tag := c.in.u64(); {
		case c.in.err != nil:
			return c.in.err
		case tag == tagLast:
			c.in.begin()
			return nil
		case tag == tagError:
			return c.remoteError()
		case tag == tagNext:
			f.Text = c.in.str(maxText)
		case tag == tagStart:
			f.Kind, f.Activity, f.Level, f.Type = LogStart, c.in.u64(), Level(c.in.u64()), ActivityType(c.in.u64())
			f.Text, f.Fields, f.Parent = c.in.str(maxText), c.in.fields(), c.in.u64()
		case tag == tagStop:
			f.Kind, f.Activity = LogStop, c.in.u64()
		case tag == tagRes:
			f.Kind, f.Activity, f.Result, f.Fields = LogResult, c.in.u64(), ResultType(c.in.u64()), c.in.fields()
		default:
			return fmt.Errorf("log frame of unknown kind %#x: %w", tag, flox.ErrBadInput)
		}
		if c.in.err != nil {
			return c.in.err
		}
		c.log(f)
		c.in.begin()
	}
}

func (c *Client) remoteError() error {
	c.in.str(maxWord) // what it is
	c.in.u64()        // level
	c.in.str(maxWord) // its name
	e := &RemoteError{Message: c.in.str(maxText)}
	c.in.u64() // position, never there
	for range c.in.count() {
		c.in.u64()
		trace := c.in.str(maxText)
		if c.in.err != nil {
			break
		}
		e.Traces = append(e.Traces, trace)
	}
	if c.in.err != nil {
		return c.in.err
	}
	return e
}

// do sends one request and reads its reply; both may be nil.
func (c *Client) do(ctx context.Context, code Op, request func(e *encoder), reply func(d *decoder)) error {
	return c.guard(ctx, func() error {
		c.out.u64(uint64(code))
		if request != nil {
			request(c.out)
		}
		if err := c.out.flush(); err != nil {
			return err
		}
		if err := c.follow(); err != nil {
			return err
		}
		if reply != nil {
			reply(c.in)
		}
		return c.in.err
	})
}

// upload is do for a request that ends in a framed stream. The daemon's log
// is read meanwhile; its error stops the stream early.
func (c *Client) upload(ctx context.Context, code Op, request func(e *encoder), send func(w io.Writer) error, reply func(d *decoder)) error {
	return c.guard(ctx, func() error {
		c.out.u64(uint64(code))
		request(c.out)
		if err := c.out.flush(); err != nil {
			return err
		}
		answered := make(chan error, 1)
		go func() { answered <- c.follow() }()
		w := &uploadWriter{to: bufio.NewWriterSize(frameWriter{c.out}, largeRead), answered: answered}
		sendErr := send(w)
		if sendErr == nil {
			sendErr = w.to.Flush()
		}
		if sendErr != nil && !w.stopped {
			// What was sent must not pass for a whole.
			c.conn.Close()
			return errors.Join(sendErr, <-answered)
		}
		frameWriter{c.out}.end()
		if err := c.out.flush(); err != nil {
			c.conn.Close()
		}
		err := w.answer
		if !w.stopped {
			err = <-answered
		}
		if err == nil && reply != nil {
			reply(c.in)
		}
		return errors.Join(err, c.out.err, c.in.err)
	})
}

// uploadWriter writes frames until the daemon answers.
type uploadWriter struct {
	to       *bufio.Writer
	answered chan error
	answer   error
	stopped  bool
}

// errStopped ends a stream nobody wants any more.
var errStopped = errors.New("the daemon answered before the upload's end")

func (w *uploadWriter) Write(p []byte) (int, error) {
	if !w.stopped {
		select {
		case w.answer = <-w.answered:
			w.stopped = true
		default:
		}
	}
	if w.stopped {
		return 0, errStopped
	}
	return w.to.Write(p)
}
