package cli

import "strings"

// QuoteSh makes one word of s for sh, as a pattern too.
func QuoteSh(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// QuoteFish makes one word of s for fish.
func QuoteFish(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, "'", `\'`).Replace(s) + "'"
}
