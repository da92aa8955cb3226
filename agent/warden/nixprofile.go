package warden

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/floxctl/flox"
)

const (
	// maxGenerationTries bounds how often another number is taken because somebody has it.
	maxGenerationTries = 16
	// namesAtOnce is how many names of a directory are read at once.
	namesAtOnce = 1024
)

// NixProfile is a profile of stock Nix as it is now: a link DIR to DIR-N-link beside it,
// which leads to a store path.
type NixProfile struct {
	User   uint32 // whose the directory is in which it lies
	Number uint64 `json:",omitempty"` // N; 0 = DIR is not there
	Path   string `json:",omitempty"` // base name of the store path
}

// NixMove leads a profile of stock Nix to another store path.
type NixMove struct {
	Was NixProfile // as it is; ErrBusy if it is not any more
	To  string     // base name of the store path
	// Again has DIR-N-link lead there instead of a new generation's link, if N is the highest
	// there is.
	Again bool
}

// NixProfile reads a profile of stock Nix. ErrBadInput: it is none, or lies where everybody
// may write. ErrUnread: its file system does not answer, or refuses.
func (p *Profiles) NixProfile(dir string) (NixProfile, error) {
	return p.onNixProfile(dir, func() (NixProfile, error) { return p.readNix(dir) })
}

// MoveNixProfile moves one with the rights of whose directory it is, and gives it as it is
// then. Errors are those of NixProfile, ErrBusy, and ErrDenied.
func (p *Profiles) MoveNixProfile(dir string, m NixMove) (NixProfile, error) {
	return p.onNixProfile(dir, func() (now NixProfile, err error) {
		err = asUser(m.Was.User, func() error { now, err = p.moveNix(dir, m); return err })
		return now, err
	})
}

// onNixProfile does what may wait for a file system.
func (p *Profiles) onNixProfile(dir string, do func() (NixProfile, error)) (NixProfile, error) {
	type outcome struct {
		is  NixProfile
		err error
	}
	if strings.HasPrefix(dir, p.storeDir+"/") || strings.HasPrefix(dir, p.mountDir+"/") {
		return NixProfile{}, fmt.Errorf("profile %s lies in the store: %w", dir, flox.ErrBadInput)
	}
	out, ok := patiently(p.reads, dir, rootOwner(dir, dir), func() (o outcome) { o.is, o.err = do(); return o })
	if !ok {
		return NixProfile{}, fmt.Errorf("profile %s: its file system does not answer: %w", dir, ErrUnread)
	}
	return out.is, out.err
}

func (p *Profiles) readNix(dir string) (NixProfile, error) {
	d, owner, err := openParent(dir)
	if err != nil {
		return NixProfile{}, err
	}
	defer unix.Close(d)
	return p.nixAt(d, dir, owner)
}

// openParent opens the directory in which a profile lies, and says whose it is. Its name must
// lead over no link: whoever may write on the way could have somebody else's profile moved.
func openParent(dir string) (d int, owner uint32, err error) {
	d, err = unix.Openat2(unix.AT_FDCWD, filepath.Dir(dir), &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if errors.Is(err, unix.ELOOP) {
		return -1, 0, fmt.Errorf("profile %s: its name leads over a link; give it without links (realpath %s): %w", dir, filepath.Dir(dir), flox.ErrBadInput)
	}
	var st unix.Stat_t
	if err == nil {
		if err = unix.Fstat(d, &st); err != nil {
			_ = unix.Close(d)
		}
	}
	if err != nil {
		return -1, 0, fmt.Errorf("directory of the profile %s: %w: %w", dir, err, ErrUnread)
	}
	if st.Mode&0o002 != 0 {
		_ = unix.Close(d)
		return -1, 0, fmt.Errorf("profile %s: everybody may write in %s, so that it is nobody's: %w", dir, filepath.Dir(dir), flox.ErrBadInput)
	}
	return d, st.Uid, nil
}

// nixAt reads where a profile in an open directory leads.
func (p *Profiles) nixAt(d int, dir string, user uint32) (NixProfile, error) {
	is, base := NixProfile{User: user}, filepath.Base(dir)
	none := fmt.Errorf("%s is no profile of Nix's, a link to %s-N-link beside it, which leads to a path in %s: nix-env -p %s --set PATH makes one: %w", dir, base, p.storeDir, dir, flox.ErrBadInput)
	link, err := readlinkAt(d, base)
	switch {
	case errors.Is(err, unix.ENOENT):
		return is, nil
	case errors.Is(err, unix.EINVAL):
		return is, none
	case err != nil:
		return is, fmt.Errorf("profile %s: %w: %w", dir, err, ErrUnread)
	}
	link = strings.TrimPrefix(link, filepath.Dir(dir)+"/")
	number, ok := nixGeneration(base, link)
	if !ok {
		return is, none
	}
	target, err := readlinkAt(d, link)
	if err != nil {
		return is, none
	}
	name, inside := strings.CutPrefix(target, p.storeDir+"/")
	if _, err := flox.ParseStorePath(name); !inside || err != nil {
		return is, none
	}
	is.Number, is.Path = number, name
	return is, nil
}

// nixGeneration gives N of BASE-N-link.
func nixGeneration(base, link string) (number uint64, ok bool) {
	text, ok := strings.CutPrefix(link, base+"-")
	if !ok {
		return 0, false
	}
	text, ok = strings.CutSuffix(text, "-link")
	number, err := strconv.ParseUint(text, 10, 63)
	return number, ok && err == nil && number > 0 && strconv.FormatUint(number, 10) == text
}

func readlinkAt(d int, name string) (string, error) {
	b := make([]byte, maxLink)
	n, err := unix.Readlinkat(d, name, b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

func (p *Profiles) moveNix(dir string, m NixMove) (NixProfile, error) {
	d, owner, err := openParent(dir)
	if err != nil {
		return NixProfile{}, err
	}
	defer unix.Close(d)
	now, err := p.nixAt(d, dir, owner)
	if err == nil && now != m.Was {
		err = fmt.Errorf("profile %s leads elsewhere meanwhile: %w", dir, flox.ErrBusy)
	}
	if err != nil {
		return now, err
	}
	failed := func(err error) (NixProfile, error) {
		kind := ErrUnread
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) {
			kind = flox.ErrDenied
		}
		return now, fmt.Errorf("profile %s cannot be moved by user %d: %w: %w", dir, m.Was.User, err, kind)
	}
	base := filepath.Base(dir)
	draft := "." + base + ".floxd"
	if err := unix.Unlinkat(d, draft, 0); err != nil && !errors.Is(err, unix.ENOENT) { // of one that was killed
		return failed(err)
	}
	next := NixProfile{User: now.User, Number: now.Number, Path: m.To}
	last, err := lastGeneration(d, base)
	if err != nil {
		return failed(err)
	}
	if m.Again && now.Number == last {
		if err = unix.Symlinkat(p.storeDir+"/"+m.To, d, draft); err == nil {
			err = unix.Renameat(d, draft, d, nixLink(base, now.Number))
		}
		if err != nil {
			return failed(err)
		}
		return next, nil
	}
	if next.Number, err = p.addGeneration(d, base, last, m.To); err != nil {
		return failed(err)
	}
	if err := swapLink(d, base, draft, nixLink(base, next.Number), nixLink(base, now.Number), filepath.Dir(dir)); err != nil {
		_ = unix.Unlinkat(d, nixLink(base, next.Number), 0) // nothing leads to it
		if errors.Is(err, flox.ErrBusy) {
			return now, fmt.Errorf("profile %s: %w", dir, err)
		}
		return failed(err)
	}
	return next, nil
}

func nixLink(base string, number uint64) string { return fmt.Sprintf("%s-%d-link", base, number) }

// lastGeneration is the highest number that a link of a profile has.
func lastGeneration(d int, base string) (last uint64, err error) {
	dup, err := unix.Openat(d, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	f := os.NewFile(uintptr(dup), base)
	defer f.Close()
	for err == nil {
		var names []string
		names, err = f.Readdirnames(namesAtOnce)
		for _, name := range names {
			if n, ok := nixGeneration(base, name); ok {
				last = max(last, n)
			}
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return last, err
}

// addGeneration makes a link of a number behind the last, and gives it.
func (p *Profiles) addGeneration(d int, base string, last uint64, to string) (number uint64, err error) {
	for number = last + 1; number <= last+maxGenerationTries; number++ {
		if err = unix.Symlinkat(p.storeDir+"/"+to, d, nixLink(base, number)); !errors.Is(err, unix.EEXIST) {
			break
		}
	}
	return number, err
}

// swapLink has a link lead to another name, if it led to was. ErrBusy: somebody was quicker,
// and theirs stays.
func swapLink(d int, base, draft, to, was, parent string) error {
	if err := unix.Symlinkat(to, d, draft); err != nil {
		return err
	}
	defer func() { _ = unix.Unlinkat(d, draft, 0) }()
	err := unix.Renameat2(d, draft, d, base, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // this file system cannot
		return unix.Renameat(d, draft, d, base)
	}
	if err != nil {
		return err
	}
	had, err := readlinkAt(d, draft)
	if err == nil && strings.TrimPrefix(had, parent+"/") == was {
		return nil
	}
	if err := unix.Renameat2(d, draft, d, base, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return fmt.Errorf("it was led elsewhere meanwhile: %w", flox.ErrBusy)
}

// asUser calls f with a user's rights to files and no others, on a thread of its own.
func asUser(user uint32, f func() error) error {
	if int(user) == os.Geteuid() {
		return f()
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with this goroutine
		if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
			done <- fmt.Errorf("act as user %d: %w: %w", user, errno, flox.ErrDenied)
			return
		}
		_ = unix.Setfsgid(nobody)
		_ = unix.Setfsuid(int(user))
		if is, _ := unix.SetfsuidRetUid(-1); is != int(user) {
			done <- fmt.Errorf("act as user %d: the system does not let this process: %w", user, flox.ErrDenied)
			return
		}
		done <- f()
	}()
	return <-done
}

// NixProfile is Profiles.NixProfile with the warden's rights. ErrBadInput is also what an
// older parent says.
func (c *Conn) NixProfile(ctx context.Context, dir string) (NixProfile, error) {
	return c.nixProfile(ctx, question{Ask: askNixProfile, Link: dir})
}

// MoveNixProfile is Profiles.MoveNixProfile through the warden.
func (c *Conn) MoveNixProfile(ctx context.Context, dir string, m NixMove) (NixProfile, error) {
	return c.nixProfile(ctx, question{Ask: askMoveNix, Link: dir, Move: &m})
}

func (c *Conn) nixProfile(ctx context.Context, q question) (NixProfile, error) {
	a, err := c.ask(ctx, q)
	if err == nil && a.Nix == nil {
		err = fmt.Errorf("the warden says nothing of %s: %w", q.Link, flox.ErrBadInput)
	}
	if err != nil {
		return NixProfile{}, err
	}
	return *a.Nix, nil
}
