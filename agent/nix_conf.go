package agent

import "strings"

// writeNixConf tells stock Nix of this machine which keys sign now. It is called
// when the trust list may be another; the same content is not written again.
func (a *Agent) writeNixConf() {
	a.facts.mu.RLock()
	trust := a.facts.trust
	a.facts.mu.RUnlock()
	if trust == nil || a.cfg.NixConf == "" {
		return
	}
	text := "# floxd writes this: the keys of the storehouse.\nextra-trusted-public-keys = " + strings.Join(trust.NixKeys, " ") + "\n"
	a.nixConf.Lock()
	defer a.nixConf.Unlock()
	if a.nixConf.text == text {
		return
	}
	if err := replaceFile(a.cfg.NixConf, []byte(text), 0o644, false); err != nil { // everybody's Nix reads it
		a.log.Warn("stock Nix is not told which keys sign", "file", a.cfg.NixConf, "error", err)
		return
	}
	a.nixConf.text = text
}
