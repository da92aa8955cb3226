package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/floxctl/flox/content"
)

// Stock Nix is told the keys that sign now, in a file that everybody may read.
func TestNixIsToldTheKeys(t *testing.T) {
	h := newHouse(t)
	a, _ := runAgent(t, h, func(c *Config) { c.NixConf = filepath.Join(filepath.Dir(c.Socket), "nix.conf") }, nil)
	following(t, a)
	says := func(keys ...string) func() bool {
		want := "\nextra-trusted-public-keys = " + strings.Join(keys, " ") + "\n"
		return func() bool {
			b, err := os.ReadFile(a.cfg.NixConf)
			return err == nil && strings.HasSuffix(string(b), want)
		}
	}
	a.facts.mu.RLock()
	now := a.facts.trust
	a.facts.mu.RUnlock()
	until(t, "the first keys are told", says(now.NixKeys...))
	if info, err := os.Stat(a.cfg.NixConf); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", info, err)
	}

	// Keys are replaced.
	next := &content.TrustList{NixKeys: append([]string{"new-1:AAAA"}, now.NixKeys...)}
	a.facts.mu.Lock()
	a.facts.trust = next
	a.facts.mu.Unlock()
	defer func() {
		a.facts.mu.Lock()
		defer a.facts.mu.Unlock()
		a.facts.trust = now
	}()
	a.follower.renew()
	until(t, "the new ones are told", says(next.NixKeys...))
}
