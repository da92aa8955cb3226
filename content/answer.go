package content

import (
	"crypto/sha256"
	"fmt"

	"github.com/floxctl/flox"
	"github.com/floxctl/flox/nix"
)

// AnswerStatement is what a manifest key signs of many facts that are told at once:
// "flox-answer-1;count;hash", with the hexadecimal SHA-256 of, for each in their order,
// its Statement and its manifest signatures, a line each, and an empty line.
func AnswerStatement(dir flox.StoreDir, infos []*flox.PathInfo) string {
	sum := sha256.New()
	for _, info := range infos {
		fmt.Fprintln(sum, Statement(dir, info))
		for _, sig := range info.ManifestSignatures {
			fmt.Fprintln(sum, sig)
		}
		fmt.Fprintln(sum)
	}
	return fmt.Sprintf("flox-answer-1;%d;%x", len(infos), sum.Sum(nil))
}

// VerifyAnswer checks that one of sigs ("keyname:base64") over many facts is by a
// manifest key of the list: each of them is as good as one that VerifyInfo has passed
// then, as long as it names a key of the list. ErrUntrusted.
func (t *TrustList) VerifyAnswer(dir flox.StoreDir, infos []*flox.PathInfo, sigs []string) error {
	ring, err := nix.ParseKeyRing(t.ManifestKeys)
	if err != nil {
		return err
	}
	if _, ok := ring.Verify([]byte(AnswerStatement(dir, infos)), sigs); !ok {
		return fmt.Errorf("answer about %d paths: none of its %d signatures is by a key of trust list version %d: %w", len(infos), len(sigs), t.Version, flox.ErrUntrusted)
	}
	return nil
}
