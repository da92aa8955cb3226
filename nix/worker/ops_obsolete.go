package worker

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// obsoleteOps are sent by no client of MinVersion, but a daemon of that
// version answers them.
var obsoleteOps = map[Op]operation{
	OpHasSubstitutes:             {name: "HasSubstitutes", serve: hasSubstitutes},
	OpQueryPathHash:              {name: "QueryPathHash", serve: queryPathHash},
	OpQueryReferences:            {name: "QueryReferences", serve: queryReferences},
	OpAddTextToStore:             {name: "AddTextToStore", serve: addTextToStore},
	OpExportPath:                 {name: "ExportPath", serve: exportPath},
	OpQueryDeriver:               {name: "QueryDeriver", serve: queryDeriver},
	OpQuerySubstitutablePathInfo: {name: "QuerySubstitutablePathInfo", serve: querySubstitutablePathInfo},
	OpQueryDerivationOutputs:     {name: "QueryDerivationOutputs", serve: queryDerivationOutputs},
	OpQueryDerivationOutputNames: {name: "QueryDerivationOutputNames", serve: queryDerivationOutputNames},
}

func hasSubstitutes(c *call) error {
	path := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	found, err := c.substitutable(map[flox.StorePath]string{path: ""})
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.bool(len(found) > 0)
	return nil
}

// requestedInfo serves what the operations about one valid path have in common.
func (c *call) requestedInfo() (*Info, error) {
	path := c.in.path()
	if err := c.start(); err != nil {
		return nil, err
	}
	return c.store.Paths.Info(c.ctx, path)
}

func queryPathHash(c *call) error {
	info, err := c.requestedInfo()
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.str(hex.EncodeToString(info.NarHash[:]))
	return nil
}

func queryReferences(c *call) error {
	info, err := c.requestedInfo()
	if err != nil {
		return err
	}
	return c.replyPaths(info.References, nil)
}

func queryDeriver(c *call) error {
	info, err := c.requestedInfo()
	if err != nil {
		return err
	}
	return c.replyPath(info.Deriver, nil)
}

func addTextToStore(c *call) error {
	content := Content{Name: c.in.str(maxPath), Method: nix.CAText, Algo: nix.SHA256}
	data := c.in.str(maxText)
	content.References = c.in.paths()
	if err := c.start(); err != nil {
		return err
	}
	info, err := c.store.Adder.AddContent(c.ctx, content, strings.NewReader(data))
	if err != nil {
		return err
	}
	return c.replyPath(info.Path, nil)
}

func querySubstitutablePathInfo(c *call) error {
	path := c.in.path()
	if err := c.start(); err != nil {
		return err
	}
	found, err := c.substitutable(map[flox.StorePath]string{path: ""})
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.bool(len(found) > 0)
	if len(found) > 0 {
		c.out.substitutable(&found[0])
	}
	return nil
}

func (c *call) requestedOutputs() (map[string]flox.StorePath, error) {
	drv := c.in.path()
	if err := c.start(); err != nil {
		return nil, err
	}
	return c.store.Derivations.Outputs(c.ctx, drv)
}

func queryDerivationOutputs(c *call) error {
	outputs, err := c.requestedOutputs()
	if err != nil {
		return err
	}
	var paths []flox.StorePath
	for name, p := range outputs {
		if p == "" {
			return fmt.Errorf("output '%s' of the derivation has no known path: %w", name, flox.ErrNotFound)
		}
		paths = append(paths, p)
	}
	return c.replyPaths(paths, nil)
}

func queryDerivationOutputNames(c *call) error {
	outputs, err := c.requestedOutputs()
	if err != nil {
		return err
	}
	if err := c.finish(); err != nil {
		return err
	}
	c.out.strs(slices.Sorted(maps.Keys(outputs)))
	return nil
}

// exportMagic stands behind each NAR of the export format.
const exportMagic uint64 = 0x4558494e

// exportPath sends one path in the format of nix-store --export, inside the
// log stream.
func exportPath(c *call) error {
	path := c.in.path()
	c.in.u64() // sign, obsolete
	if err := c.start(); err != nil {
		return err
	}
	info, err := c.store.Paths.Info(c.ctx, path)
	if err != nil {
		return err
	}
	if err := c.store.Files.Nar(c.ctx, path, logWriter{c.log}); err != nil {
		return err
	}
	trailer := newEncoder(logWriter{c.log}, c.in.dir)
	trailer.u64(exportMagic)
	trailer.path(path)
	trailer.paths(info.References)
	trailer.opath(info.Deriver)
	trailer.u64(0) // no signature of the old kind
	if err := trailer.flush(); err != nil {
		return err
	}
	return c.done()
}

// logWriter writes into the log stream.
type logWriter struct{ log *Log }

func (w logWriter) Write(p []byte) (int, error) {
	if err := w.log.data(p); err != nil {
		return 0, err
	}
	return len(p), nil
}
