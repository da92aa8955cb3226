package storehouse

import (
	"context"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	flox "github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// realisationExt ends the names of realisations in a binary cache.
const realisationExt = ".doi"

// madeHere is what the binary cache tells of builds.
type madeHere interface {
	// BuildLog is the log of the last build of a derivation; ErrNotFound.
	BuildLog(ctx context.Context, drv string) ([]byte, error)
	// Realisation is what an output became; ErrNotFound.
	Realisation(ctx context.Context, id nix.RealisationID) (*nix.Realisation, error)
}

// BuildLog gives the log of the last build of a derivation, named by the base name
// of its .drv file. ErrNotFound, ErrBadInput.
func (s *Server) BuildLog(ctx context.Context, drv string) ([]byte, error) {
	_, log, err := s.builds.log(ctx, drv)
	return log, err
}

// Realisation gives what an output of a content-addressed derivation became.
// ErrNotFound.
func (s *Server) Realisation(ctx context.Context, id nix.RealisationID) (*nix.Realisation, error) {
	m, err := s.realised(ctx, id)
	if err != nil {
		return nil, err
	}
	if m == nil {
		return nil, fmt.Errorf("nobody built %s: %w", id, flox.ErrNotFound)
	}
	return toRealisation(m), nil
}

// getLog serves log/<base name of a derivation>, which nix log asks substituters for.
func (c *httpCache) getLog(w http.ResponseWriter, r *http.Request) {
	leave, err := c.listings.take(r.Context(), clientOf(r)) // a log is held whole, as a listing is
	if err != nil {
		return
	}
	defer leave()
	log, err := c.built.BuildLog(r.Context(), r.PathValue("drv"))
	if err != nil {
		c.fail(w, r, err)
		return
	}
	c.whole(w, "text/plain; charset=utf-8", log)
}

// getRealisation serves realisations/<id>.doi.
func (c *httpCache) getRealisation(w http.ResponseWriter, r *http.Request) {
	name, isOne := strings.CutSuffix(r.PathValue("id"), realisationExt)
	id, err := nix.ParseRealisationID(name)
	if !isOne || err != nil {
		c.fail(w, r, fmt.Errorf("realisations/%s: want realisations/sha256:HEX!OUTPUT%s: %w", r.PathValue("id"), realisationExt, flox.ErrNotFound))
		return
	}
	realisation, err := c.built.Realisation(r.Context(), id)
	if err != nil {
		c.fail(w, r, err)
		return
	}
	c.whole(w, "application/json", realisation.Marshal())
}

func (c *httpCache) whole(w http.ResponseWriter, kind string, b []byte) {
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	_, _ = w.Write(b)
}
