package daemon

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The configuration of a private agent reaches the process in the namespace, which
// is told as JSON, as it is.
func TestConfigurationPassesIntoTheRoom(t *testing.T) {
	b, err := json.Marshal(roomPlan{Config: DefaultConfig()})
	if err != nil {
		t.Fatal(err)
	}
	var got roomPlan
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(DefaultConfig(), got.Config); d != "" {
		t.Errorf("-sent +got\n%s", d)
	}
}
