package agent

import (
	"testing"

	"github.com/floxctl/flox"
	floxv1 "github.com/floxctl/flox/api/flox/v1"
	"github.com/floxctl/flox/nix/worker"
)

// That a call's build waits is told once, and again what nobody takes; the rest is for
// those who want to hear more.
func TestBuildsThatWaitAreTold(t *testing.T) {
	t.Parallel()
	s := &buildShow{n: &nixSession{a: &Agent{cfg: Config{StoreDir: flox.StoreDir("/nix/store")}}}}
	for _, c := range []struct {
		wait  *floxv1.BuildWait
		level worker.Level
		text  string
	}{
		{&floxv1.BuildWait{Drv: "x.drv", Place: 3, Why: "it waits behind 3 others"}, worker.LevelInfo, "'/nix/store/x.drv' waits for a builder: it waits behind 3 others"},
		{&floxv1.BuildWait{Drv: "y.drv", Place: 2}, worker.LevelTalkative, "'/nix/store/y.drv' waits for a builder, behind 2 others"},
		{&floxv1.BuildWait{Drv: "y.drv", Why: "no worker fits", Stuck: true}, worker.LevelInfo, "'/nix/store/y.drv' waits for a builder: no worker fits"},
	} {
		if level, text := s.waits(c.wait); level != c.level || text != c.text {
			t.Errorf("%v: %d %q, want %d %q", c.wait, level, text, c.level, c.text)
		}
	}
}
