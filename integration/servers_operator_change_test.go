package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/floxctl/flox/integration/hosts"
)

// labels: what is said of machines, and by which name they are found.
func (o *operator) labels() {
	leader, follower, third := o.roles()
	guest := o.host(o.t, "guest")
	invite := asks[made](o, third, "invite", "--role", "agent", "--label", "site=Bonn").Invite
	must(o.t, hosts.Join(o.t.Context(), o.programs, guest, invite, "--name", "Laptop"))
	if m := asks[machineTold](o, follower, "machine", "show", "LAPTOP"); m.Name != "Laptop" || m.Labels["site"] != "Bonn" || m.Role != "agent" {
		o.t.Errorf("it is a member as %+v", m)
	}
	o.audited(func() {
		o.ctl(follower, "machine", "label", "lapTop", "site=Berlin", "Team=build").want(o.t, 0, "Laptop: labels Team=build,site=Berlin")
		o.ctl(leader, "machine", "label", "laptop", "Team-").want(o.t, 0, "Laptop: labels site=Berlin")
		o.ctl(leader, "machine", "user", "laptop", "alice:admin").want(o.t, 0, "alice:admin")
		o.ctl(third, "machine", "rename", "laptop", "LAPTOP").want(o.t, 0, "LAPTOP:")
		o.ctl(third, "machine", "rename", "laptop", "Lapwing").want(o.t, 0, "Lapwing:")
	},
		by(follower, "machine.change Laptop"), by(leader, "machine.change Laptop"), by(leader, "machine.change Laptop"),
		by(third, "machine.change LAPTOP"), by(third, "machine.change Lapwing"))
	for _, s := range o.servers {
		if m := asks[machineTold](o, s, "machine", "show", "LAPWING"); m.Name != "Lapwing" || len(m.Users) != 1 || m.Labels["site"] != "Berlin" {
			o.t.Errorf("%s knows %+v", s.Host.Name, m)
		}
		o.ctl(s, "machine", "show", "laptop").want(o.t, 3, `"laptop"`)
	}
	before := o.standing(leader)
	for _, verb := range []string{"transfer", "drain"} {
		o.ctl(follower, "storehouse", verb, "lapwing").want(o.t, 2, "Lapwing is no server but an agent", "floxctl storehouse servers")
	}
	o.ctl(follower, "storehouse", "remove", "lapwing", "--yes").want(o.t, 2, "Lapwing is no server but an agent", "floxctl storehouse servers")
	if d := cmp.Diff(before, o.standing(leader)); d != "" {
		o.t.Errorf("an agent that was taken for a server changed something:\n%s", d)
	}
	o.audited(func() {
		o.ctl(follower, "machine", "revoke", "lapwing", "--yes", "--reason", "stolen").want(o.t, 0, "Lapwing is revoked")
	}, by(follower, "machine.revoke Lapwing"))
	o.ctl(third, "machine", "show", "Lapwing").want(o.t, 3)
}

// rotates: new keys, on every server at once.
func (o *operator) rotates() {
	_, follower, _ := o.roles()
	before := asks[keysTold](o, follower, "key", "list")
	did := o.records(func() {
		o.ctl(follower, "key", "rotate").want(o.t, 0, "new: nix ", "new: manifest ", "new: swarm", "new: cluster")
	})
	if len(did) != 2 || !strings.HasPrefix(did[0], "keys.seal version ") || did[1] != by(follower, "key.rotate nix manifest swarm cluster") {
		o.t.Errorf("the audit log has %q", did)
	}
	after := asks[keysTold](o, follower, "key", "list")
	if len(after.Keys) != len(before.Keys)+2 || after.TrustVersion <= before.TrustVersion {
		o.t.Errorf("the keys are %+v, and were %+v", after, before)
	}
	for _, s := range o.servers {
		if d := cmp.Diff(after, asks[keysTold](o, s, "key", "list")); d != "" {
			o.t.Errorf("%s lists other keys:\n%s", s.Host.Name, d)
		}
	}
}

// imports: a binary cache in a directory of the server that is asked.
func (o *operator) imports() {
	_, follower, _ := o.roles()
	cache, key := filepath.Join(o.dir, "old-cache"), filepath.Join(o.dir, "old.sec")
	secret, err := o.world.Command(o.t.Context(), "nix", "key", "generate-secret", "--key-name", "old-1").Output()
	must(o.t, err)
	must(o.t, os.WriteFile(key, secret, 0o600))
	convert := o.world.Command(o.t.Context(), "nix", "key", "convert-secret-to-public")
	convert.Stdin = strings.NewReader(string(secret))
	public, err := convert.Output()
	must(o.t, err)
	path := o.world.StoreDir.Join(o.world.Ripgrep.Path)
	copied := o.world.Command(o.t.Context(), "nix", "copy", "--to", "file://"+cache+"?compression=zstd&secret-key="+key, path)
	if out, err := copied.CombinedOutput(); err != nil {
		o.t.Fatalf("nix copy: %v: %s", err, out)
	}

	o.audited(func() {
		o.ctl(follower, "import", "--from", cache).want(o.t, 1, "not imported: ", "by an accepted key", "0 paths", "the same command tries again")
		o.ctl(follower, "import", "--from", cache, "--key", string(public)).want(o.t, 0, "in the storehouse")
	}, by(follower, "content.import "+cache), by(follower, "content.import "+cache))
	type progress struct {
		DonePaths, FailedPaths uint64
		Finished               bool
	}
	if again := asks[progress](o, follower, "import", "--from", cache, "--key", string(public), path); !again.Finished || again.FailedPaths > 0 {
		o.t.Errorf("imported again it ends with %+v", again)
	}
	paths := uint64(len(o.closure(o.world.Ripgrep.Path)))
	for _, s := range o.servers {
		o.ctl(s, "store", "why", path).want(o.t, 0, "published lately")
		if u := asks[usageTold](o, s, "storehouse", "usage"); u.Paths < paths {
			o.t.Errorf("%s says that %d paths are valid, and %d were imported", s.Host.Name, u.Paths, paths)
		}
	}
}

// backsUp: a backup by way of a server that follows, proven where another one is.
func (o *operator) backsUp() {
	leader, follower, third := o.roles()
	place, passphrase, wrong := backupPlace(o.t, o.lab, follower), filepath.Join(o.dir, "passphrase"), filepath.Join(o.dir, "wrong")
	must(o.t, os.WriteFile(passphrase, []byte("correct horse battery\n"), 0o600))
	must(o.t, os.WriteFile(wrong, []byte("incorrect horse battery\n"), 0o600))
	before := o.standing(leader)
	o.ctl(follower, "storehouse", "backup", "--to", "/nowhere/backups", "--passphrase-file", passphrase).want(o.t, 5, "/nowhere/backups", "make it for that user")
	o.ctl(follower, "storehouse", "backup", "--to", place, "--passphrase-file", "/nowhere").want(o.t, 3, "--passphrase-file", "/nowhere")
	o.ctl(third, "storehouse", "verify", "--from", place, "--passphrase-file", passphrase).want(o.t, 3, place, "holds no backups")
	if d := cmp.Diff(before, o.standing(leader)); d != "" {
		o.t.Errorf("backups that were none changed something:\n%s", d)
	}
	type progress struct {
		Name     string
		Paths    uint64
		Finished bool
	}
	var backup progress
	records := o.records(func() {
		backup = asks[progress](o, follower, "storehouse", "backup", "--to", place, "--passphrase-file", passphrase)
	})
	if want := by(follower, "storehouse.backup "+backup.Name); !slices.Equal(records, []string{want}) {
		o.t.Errorf("the audit log has %q, want %s", records, want)
	}
	valid := asks[usageTold](o, leader, "storehouse", "usage").Paths
	if !backup.Finished || backup.Name == "" || backup.Paths != valid {
		o.t.Errorf("the backup is %+v, and %d paths are valid", backup, valid)
	}
	o.ctl(third, "storehouse", "verify", "--from", place, "--passphrase-file", passphrase, "--json").want(o.t, 0, backup.Name)
	o.ctl(third, "storehouse", "verify", "--from", place, "--passphrase-file", wrong).want(o.t, 5, "passphrase")
	o.ctl(third, "storehouse", "backups", "--in", place, "--json").want(o.t, 0, backup.Name)
}

// collects: a collection is asked for at a server that follows, and runs where one leads.
func (o *operator) collects() {
	leader, follower, third := o.roles()
	kept := o.world.StoreDir.Join(o.world.Ripgrep.Path)
	o.audited(func() {
		o.ctl(third, "storehouse", "keep", kept, "--reason", "a release").want(o.t, 0, "1 path is kept")
	}, by(third, "content.keep "+string(o.world.Ripgrep.Path)))
	for _, s := range o.servers {
		o.ctl(s, "store", "roots", kept).want(o.t, 0, "kept: a release")
	}
	// All of it was published within the last hour, in which no use is written down anew.
	type progress struct {
		LivePaths, DeadPaths uint64
		Finished             bool
	}
	valid := asks[usageTold](o, leader, "storehouse", "usage").Paths
	all := progress{LivePaths: valid, Finished: true}
	o.audited(func() {
		for _, s := range o.servers {
			if p := asks[progress](o, s, "storehouse", "gc", "--dry-run", "--keep-recent", "1s"); p != all {
				o.t.Errorf("%s would collect %+v, and %d paths are valid", s.Host.Name, p, valid)
			}
		}
	})
	o.audited(func() {
		if p := asks[progress](o, follower, "storehouse", "gc", "--keep-recent", "1s"); p != all {
			o.t.Errorf("the collection ends with %+v, and %d paths were valid", p, valid)
		}
	}, by(follower, "content.collect begun"), by(follower, "content.collected finished"))
	for _, s := range o.servers {
		o.ctl(s, "storehouse", "usage").want(o.t, 0, "last ", "paths removed: 0")
	}
	o.audited(func() {
		o.ctl(follower, "storehouse", "keep", kept, "--undo").want(o.t, 0, "no longer kept")
	}, by(follower, "content.unkeep "+string(o.world.Ripgrep.Path)))
}

// replaces: a server is taken out while writers go on, says what it is, and comes
// again as a new one.
func (o *operator) replaces() {
	leader, follower, third := o.roles()
	stopWriting := o.writing(4)
	o.needed(leader, follower, third)

	o.audited(func() {
		o.ctl(follower, "storehouse", "remove", strings.ToUpper(third.Host.Name), "--yes").want(o.t, 0, third.Host.Name+" is no server any more", "floxctl key rotate")
	}, by(follower, "key.known "+third.Host.Name), by(follower, "machine.revoke "+third.Host.Name))
	o.flows(time.Now())
	o.ctl(leader, "storehouse", "remove", third.Host.Name, "--yes").want(o.t, 3, third.Host.Name)
	o.ctl(leader, "machine", "show", third.Host.Name).want(o.t, 3, third.Host.Name)
	o.eventually("the keys are sealed anew", func() bool {
		log := o.log(leader)
		gone := slices.IndexFunc(log, func(r auditTold) bool { return r.Action == "machine.revoke" && r.Subject == third.Host.Name })
		return slices.ContainsFunc(log[gone:], func(r auditTold) bool { return r.Action == "keys.seal" })
	})

	// On the server itself: what it is, and what to do.
	o.eventually("it knows that it is none", func() bool {
		return strings.Contains(o.ctl(third, "storehouse", "status").out, "floxctl leave")
	})
	o.ctl(third, "storehouse", "status").want(o.t, 1, third.Host.Name, "it was taken out", "floxctl leave", "floxctl join")
	o.ctl(third, "storehouse", "servers").want(o.t, 0, third.Host.Name, "it was taken out", "floxctl leave")
	o.ctl(third, "doctor").want(o.t, 0, third.Host.Name, "it was taken out", "floxctl leave")
	for _, args := range []string{"machine list", "storehouse transfer", "key list", "invite --role agent"} {
		o.ctl(third, strings.Fields(args)...).want(o.t, 4, "it was taken out", "floxctl leave")
	}
	state := filepath.Dir(o.inside(third))
	invite := asks[made](o, follower, "invite", "--role", "server").Invite
	join := func() result {
		return do(o.t, third.Host, o.programs.Floxctl, "join", invite, "--no-start", "--name", third.Host.Name, "--state-dir", state, "--consensus", third.Host.Addr().String()+":7783")
	}
	if r := join(); r.code != 5 && r.code != 8 || !strings.Contains(r.out, "floxctl leave") { // 8: it began the storehouse
		o.t.Errorf("it joins with what it has: %d\n%s", r.code, r.out)
	}
	o.ctl(third, "leave", "--yes", "--state-dir", state).want(o.t, 8, "still runs", "stop it where it was started")
	must(o.t, third.Stop())
	o.ctl(third, "leave", "--yes", "--state-dir", state).want(o.t, 0, "has left proof as server")
	join().want(o.t, 0, third.Host.Name+" (server) joined")
	must(o.t, third.Start(o.t.Context()))
	o.eventually("all three are well and have everything", func() bool { // it votes some seconds later
		whole := 0
		for _, s := range asks[houseTold](o, leader, "storehouse", "servers").Servers {
			if s.WantsVote && s.Healthy && s.LackingBlocks+s.LackingBytes == 0 {
				whole++
			}
		}
		return whole == 3
	})
	o.flows(time.Now())
	stopWriting()
	o.whole()
	o.ctl(third, "storehouse", "status").want(o.t, 0, "3 of 3 well")
}

// inside is a server's state directory as its host sees it.
func (o *operator) inside(s *hosts.Storehouse) string {
	return filepath.Join(o.disks[slices.Index(o.servers, s)].Dir, "storehouse")
}

// needed: while one server is away, the others are needed, and it is not taken out
// without force.
func (o *operator) needed(leader, follower, third *hosts.Storehouse) {
	o.t.Helper()
	must(o.t, third.Stop())
	o.flows(time.Now())
	o.eventually("it is seen that one is away", func() bool {
		r := o.ctl(follower, "storehouse", "status")
		return r.code == 1 && strings.Contains(r.out, "2 of 3 well")
	})
	before := o.standing(leader)
	for _, args := range [][]string{{}, {"--force"}} {
		o.ctl(follower, append([]string{"storehouse", "remove", leader.Host.Name, "--yes"}, args...)...).want(o.t, 8, leader.Host.Name, "no majority", "start or add another server first")
	}
	o.ctl(follower, "machine", "label", leader.Host.Name, "voter=false").want(o.t, 8, leader.Host.Name, "no majority")
	o.ctl(follower, "storehouse", "remove", third.Host.Name, "--yes").want(o.t, 8, third.Host.Name, "is not well", "by force")
	if d := cmp.Diff(before, o.standing(leader)); d != "" {
		o.t.Errorf("what was refused changed something:\n%s", d)
	}
	must(o.t, third.Start(o.t.Context()))
	o.eventually("all are well again", func() bool { return o.ctl(follower, "storehouse", "status").code == 0 })
}
