package worker

import (
	"fmt"
	"io"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// addOps make paths valid.
var addOps = map[Op]operation{
	OpAddToStore:         {name: "AddToStore", serve: addToStore},
	OpAddToStoreNar:      {name: "AddToStoreNar", serve: addToStoreNar},
	OpAddMultipleToStore: {name: "AddMultipleToStore", serve: addMultipleToStore},
	OpAddSignatures:      {name: "AddSignatures", serve: addSignatures},
	OpAddBuildLog:        {name: "AddBuildLog", serve: addBuildLog},
	OpRegisterDrvOutput:  {name: "RegisterDrvOutput", serve: registerDrvOutput},
}

// parseMethod parses how an object is addressed: "text:sha256", "fixed:<algo>"
// or "fixed:r:<algo>".
func parseMethod(s string) (nix.CAMethod, nix.HashAlgo, error) {
	for _, method := range []nix.CAMethod{nix.CAText, nix.CANar, nix.CAFlat} {
		rest, ok := strings.CutPrefix(s, string(method))
		algo := nix.HashAlgo(rest)
		if !ok || algo.Size() == 0 {
			continue
		}
		if method == nix.CAText && algo != nix.SHA256 {
			return "", "", errorf(flox.ErrBadInput, "text content address hash should use sha256, but instead uses %s", algo)
		}
		return method, algo, nil
	}
	return "", "", errorf(flox.ErrBadInput, "content address method '%s' is not known: want text:sha256, fixed:<algorithm> or fixed:r:<algorithm> with md5, sha1, sha256 or sha512", shorten(s))
}

func addToStore(c *call) error {
	content := Content{Name: c.in.str(maxPath)}
	method := c.in.str(maxWord)
	content.References, content.Repair = c.in.paths(), c.in.bool()
	data, err := c.stream()
	if err != nil {
		return err
	}
	if content.Method, content.Algo, err = parseMethod(method); err != nil {
		return err
	}
	if content.Repair && !c.session.Trusted() {
		return errorf(flox.ErrDenied, "repairing is not allowed because you are not in 'trusted-users'")
	}
	info, err := c.store.Adder.AddContent(c.ctx, content, data)
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.keyed(info)
	return nil
}

func addToStoreNar(c *call) error {
	info := c.in.keyed()
	o := AddOptions{Repair: c.in.bool(), NoCheckSigs: c.in.bool()}
	nar, err := c.stream()
	if err != nil {
		return err
	}
	if !c.session.Trusted() {
		info.Ultimate, o.NoCheckSigs = false, false
	}
	if err := c.store.Adder.AddPaths(c.ctx, &single{info: &info, nar: nar}, o); err != nil {
		return err
	}
	return c.finish()
}

// single is the one path of AddToStoreNar.
type single struct {
	info *Info
	nar  io.Reader
}

func (s *single) Next() (*Info, io.Reader, error) {
	if s.info == nil {
		return nil, nil, io.EOF
	}
	info := s.info
	s.info = nil
	return info, s.nar, nil
}

func addMultipleToStore(c *call) error {
	o := AddOptions{Repair: c.in.bool(), NoCheckSigs: c.in.bool()}
	data, err := c.stream()
	if err != nil {
		return err
	}
	if !c.session.Trusted() {
		o.NoCheckSigs = false
	}
	// What stands in the stream is in the form of 1.16, whatever the version.
	in := newDecoder(data, c.in.dir)
	in.version = c.version
	m := &multiple{in: in, left: in.u64()}
	if in.err != nil {
		return in.err
	}
	if err := c.store.Adder.AddPaths(c.ctx, m, o); err != nil {
		return err
	}
	if m.left > 0 {
		return fmt.Errorf("%d paths of the request were not taken: %w", m.left, flox.ErrClosed)
	}
	return c.finish()
}

// multiple are the paths of AddMultipleToStore: each its info, then its NAR
// without a length besides the info's NarSize.
type multiple struct {
	in   *decoder
	left uint64
	nar  *io.LimitedReader // of the path before
}

func (m *multiple) Next() (*Info, io.Reader, error) {
	if m.nar != nil {
		if _, err := io.Copy(io.Discard, m.nar); err != nil {
			return nil, nil, err
		}
		if m.nar.N > 0 {
			return nil, nil, fmt.Errorf("NAR ends %d bytes early: %w: %w", m.nar.N, io.ErrUnexpectedEOF, flox.ErrBadInput)
		}
		m.nar = nil
	}
	if m.left == 0 {
		return nil, nil, io.EOF
	}
	m.in.begin()
	info := m.in.keyed()
	if m.in.err != nil {
		return nil, nil, m.in.err
	}
	info.Ultimate = false
	m.left--
	m.nar = &io.LimitedReader{R: m.in.r, N: int64(info.NarSize)}
	return &info, m.nar, nil
}

func addSignatures(c *call) error {
	path, sigs := c.in.path(), c.in.signatures()
	if err := c.start(); err != nil {
		return err
	}
	if !c.session.Trusted() {
		return errorf(flox.ErrDenied, "you are not privileged to add signatures")
	}
	if err := c.store.Adder.AddSignatures(c.ctx, path, sigs); err != nil {
		return err
	}
	return c.done()
}

func addBuildLog(c *call) error {
	name := c.in.str(maxPath)
	data, err := c.stream()
	if err != nil {
		return err
	}
	drv, err := flox.ParseStorePath(name)
	if err != nil {
		return err
	}
	if !c.session.Trusted() {
		return errorf(flox.ErrDenied, "you are not privileged to add logs")
	}
	if err := c.store.Files.AddLog(c.ctx, drv, data); err != nil {
		return err
	}
	return c.done()
}

func registerDrvOutput(c *call) error {
	r := c.in.realisation()
	if err := c.start(); err != nil {
		return err
	}
	if err := c.store.Realisations.AddRealisation(c.ctx, r); err != nil {
		return err
	}
	return c.finish()
}
