package backup

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/zeebo/blake3"

	"github.com/floxctl/flox"
)

const (
	manifestName = "manifest.json"
	keysName     = "keys"
	// maxManifest bounds what is read of a manifest: a million content objects.
	maxManifest = 128 << 20
	maxKeys     = 1 << 20
	// maxLacking bounds the paths a manifest names as not whole.
	maxLacking = 1000
)

// Manifest is what a backup consists of. It is written last: a backup without one
// is none. The file's first line is the BLAKE3 of the rest.
type Manifest struct {
	Format     int           `json:"format"`
	Name       string        `json:"name"`  // of the backup
	Taken      time.Time     `json:"taken"` // when the facts were so
	Index      uint64        `json:"index"` // of the log
	Storehouse string        `json:"storehouse"`
	StoreDir   flox.StoreDir `json:"storeDir"`
	Server     string        `json:"server"` // peer ID of the one that wrote it
	Version    string        `json:"version"`
	Trust      uint64        `json:"trust"` // version of the trust list
	Epoch      uint64        `json:"epoch"`
	Paths      uint64        `json:"paths"`
	NarBytes   uint64        `json:"narBytes"`
	Blocks     uint64        `json:"blocks"` // that were new
	NewBytes   uint64        `json:"newBytes"`
	Records    uint64        `json:"records"`    // of the facts
	FactsBytes uint64        `json:"factsBytes"` // of them, uncompressed
	Lacking    []string      `json:"lacking"`    // base names of paths whose content could not be had, at most 1,000
	LackPaths  uint64        `json:"lackPaths"`  // how many there are
	Facts      []Part        `json:"facts"`      // in order, beside the manifest
	Keys       Part          `json:"keys"`       // encrypted
	Content    []Object      `json:"content"`    // below content/
}

// Part is an object of one backup.
type Part struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`   // bytes
	Digest string `json:"blake3"` // hexadecimal
}

// partOf describes what is put as name.
func partOf(name string, b []byte) Part {
	sum := blake3.Sum256(b)
	return Part{name, int64(len(b)), hex.EncodeToString(sum[:])}
}

func (m *Manifest) prefix() string { return backupsPrefix + m.Name + "/" }

// Object is where a part of the backup lies in the place.
func (m *Manifest) Object(part string) string { return m.prefix() + part }

// encode gives the bytes of the manifest.
func (m *Manifest) encode() ([]byte, error) {
	body, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return nil, err
	}
	sum := blake3.Sum256(body)
	return slices.Concat(hex.AppendEncode(nil, sum[:]), []byte("\n"), body), nil
}

// parseManifest reads what encode gave.
func parseManifest(name string, b []byte) (*Manifest, error) {
	line, body, _ := bytes.Cut(b, []byte("\n"))
	if sum := blake3.Sum256(body); string(line) != hex.EncodeToString(sum[:]) {
		return nil, fmt.Errorf("it does not match its sum: %w", flox.ErrCorrupt)
	}
	m := &Manifest{}
	if err := json.Unmarshal(body, m); err != nil {
		return nil, fmt.Errorf("%w: %w", err, flox.ErrCorrupt)
	}
	if m.Format != format {
		return nil, fmt.Errorf("format %d, this program knows %d: use the program that made it: %w", m.Format, format, flox.ErrBadInput)
	}
	if m.Name != name {
		return nil, fmt.Errorf("it is that of %q: %w", m.Name, flox.ErrCorrupt)
	}
	return m, m.check()
}

// check refuses a manifest that names what cannot be.
func (m *Manifest) check() error {
	for _, p := range append(slices.Clone(m.Facts), m.Keys) {
		if !plainName(p.Name) || p.Size < 0 {
			return fmt.Errorf("it names a part %q of %d bytes: %w", p.Name, p.Size, flox.ErrCorrupt)
		}
	}
	for _, o := range m.Content {
		if raw, err := hex.DecodeString(o.Digest); err != nil || len(raw) != 32 || o.Size < 0 {
			return fmt.Errorf("it names a content object %q of %d bytes: %w", o.Digest, o.Size, flox.ErrCorrupt)
		}
	}
	return nil
}

// put stores a part beside the manifest.
func (p *Place) putPart(ctx context.Context, m *Manifest, name string, b []byte) (Part, error) {
	return partOf(name, b), p.put(ctx, m.prefix()+name, b)
}

// readPart reads a part and checks it.
func (p *Place) readPart(ctx context.Context, m *Manifest, part Part) ([]byte, error) {
	b, err := p.part(ctx, m.prefix()+part.Name, 0, -1, part.Size+1)
	if err == nil && partOf(part.Name, b) != part {
		err = fmt.Errorf("%s: the %d bytes of %s are not those that the manifest says: %w", p, len(b), m.prefix()+part.Name, flox.ErrCorrupt)
	}
	return b, err
}

// PutKeys stores the encrypted keys of a backup.
func (p *Place) PutKeys(ctx context.Context, m *Manifest, sealed []byte) (err error) {
	m.Keys, err = p.putPart(ctx, m, keysName, sealed)
	return err
}

// Keys gives the encrypted keys of a backup, for OpenKeys.
func (p *Place) Keys(ctx context.Context, m *Manifest) ([]byte, error) {
	if m.Keys.Size > maxKeys {
		return nil, fmt.Errorf("%s: keys of %d bytes: %w", m.Name, m.Keys.Size, flox.ErrCorrupt)
	}
	return p.readPart(ctx, m, m.Keys)
}

// Finish stores the manifest: from here on the backup is there.
func (p *Place) Finish(ctx context.Context, m *Manifest) error {
	b, err := m.encode()
	if err == nil && len(b) > maxManifest {
		err = fmt.Errorf("a manifest of %d bytes, want at most %d: %w", len(b), maxManifest, flox.ErrFull)
	}
	if err != nil {
		return err
	}
	return p.put(ctx, m.prefix()+manifestName, b)
}

// NewName gives a backup of an index a name no other has; names sort by time.
func (p *Place) NewName(ctx context.Context, at time.Time, index uint64) (string, error) {
	for i := 1; ; i++ {
		name := fmt.Sprintf("%s-%d", at.UTC().Format("20060102T150405Z"), index)
		if i > 1 {
			name += fmt.Sprint("-", i)
		}
		taken := false
		err := p.list(ctx, backupsPrefix+name+"/", func(object) error {
			taken = true
			return errEnough
		})
		if err != nil && !errors.Is(err, errEnough) {
			return "", err
		}
		if !taken {
			return name, nil
		}
	}
}

// Listed is a backup of a place.
type Listed struct {
	Name     string
	Manifest *Manifest // nil if it cannot be read
	Err      error     // why
}

// List lists the backups of the place that were finished, oldest first. One whose
// manifest is damaged is among them.
func (p *Place) List(ctx context.Context) (all []Listed, err error) {
	names, _, err := p.names(ctx)
	for _, name := range names {
		m, err := p.Manifest(ctx, name)
		if err != nil && !errors.Is(err, flox.ErrCorrupt) && !errors.Is(err, flox.ErrBadInput) {
			return nil, err
		}
		all = append(all, Listed{name, m, err})
	}
	return all, err
}

// names lists the backups with a manifest, and the objects of those without.
func (p *Place) names(ctx context.Context) (names, leftovers []string, err error) {
	objects := map[string][]string{}
	err = p.list(ctx, backupsPrefix, func(o object) error {
		name, file, _ := strings.Cut(strings.TrimPrefix(o.name, backupsPrefix), "/")
		if !plainName(name) {
			return nil // somebody else's
		}
		if file == manifestName {
			names = append(names, name)
		}
		objects[name] = append(objects[name], o.name)
		return nil
	})
	slices.Sort(names)
	for name, list := range objects {
		if !slices.Contains(names, name) {
			leftovers = append(leftovers, list...)
		}
	}
	return names, leftovers, err
}

// Manifest reads the manifest of a backup; name "" = the newest. Errors:
// ErrNotFound, ErrCorrupt.
func (p *Place) Manifest(ctx context.Context, name string) (*Manifest, error) {
	if name == "" {
		names, _, err := p.names(ctx)
		if err != nil {
			return nil, err
		}
		if len(names) == 0 {
			return nil, fmt.Errorf("%s holds no finished backup: %w", p, flox.ErrNotFound)
		}
		name = names[len(names)-1]
	}
	if !plainName(name) {
		return nil, fmt.Errorf("backup %q: want a name as the list of backups shows it: %w", name, flox.ErrBadInput)
	}
	path := backupsPrefix + name + "/" + manifestName
	b, err := p.read(ctx, path, maxManifest)
	if errors.Is(err, flox.ErrNotFound) {
		return nil, fmt.Errorf("%s holds no backup %s: %w", p, name, flox.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(name, b)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", p, path, err)
	}
	return m, nil
}

// Lack notes a path whose content is not whole in the backup.
func (m *Manifest) Lack(path string) {
	if m.LackPaths++; len(m.Lacking) < maxLacking {
		m.Lacking = append(m.Lacking, path)
	}
}
