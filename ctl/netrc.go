package ctl

import (
	"errors"
	"io"
	"io/fs"
	"net/url"
	"os"
	"strings"

	"github.com/floxctl/flox/ctl/cli"
)

// maxNetrc bounds a netrc file in bytes.
const maxNetrc = 1 << 20

// login is a name and a password of a netrc file.
type login struct{ machine, name, password string }

// netrcLogin gives the login that a netrc file has for the host of a URL, or else for
// default. What is wrong is said without showing anything of the file.
func netrcLogin(file, where string) (login, error) {
	u, err := url.Parse(where)
	if err != nil || u.Hostname() == "" {
		return login{}, cli.Usage("--netrc is for a URL with a host, such as https://cache.example.org or s3://bucket")
	}
	f, err := os.Open(file)
	var bad *fs.PathError
	if errors.As(err, &bad) {
		return login{}, cli.Usage("--netrc %s: %v", clean(file), bad.Err)
	}
	if err != nil {
		return login{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxNetrc+1))
	if err != nil {
		return login{}, err
	}
	if len(b) > maxNetrc {
		return login{}, cli.Usage("--netrc %s: want at most %s", clean(file), cli.FormatBytes(maxNetrc))
	}
	for _, l := range parseNetrc(string(b)) {
		if l.machine != "" && !strings.EqualFold(l.machine, u.Hostname()) {
			continue
		}
		if l.name == "" || l.password == "" {
			return login{}, cli.Usage("--netrc %s: the entry for %s wants a login and a password", clean(file), clean(u.Hostname()))
		}
		return l, nil
	}
	return login{}, cli.Usage("--netrc %s: it has no entry for %s: want a line machine %s login NAME password WORD", clean(file), clean(u.Hostname()), clean(u.Hostname()))
}

// parseNetrc reads the entries of a netrc file in order; that for default has no machine.
func parseNetrc(text string) (all []login) {
	key, macro := "", false
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if macro = macro && len(words) > 0; macro { // until an empty line
			continue
		}
		for _, word := range words {
			if key == "" && strings.HasPrefix(word, "#") {
				break
			}
			if macro = key == "" && word == "macdef"; macro {
				break
			}
			all, key = netrcWord(all, key, word)
		}
	}
	return all
}

// netrcWord takes one more word in; key is the one before, if that wants a value.
func netrcWord(all []login, key, word string) ([]login, string) {
	if key == "" {
		switch word {
		case "default":
			return append(all, login{}), ""
		case "machine", "login", "password", "account":
			return all, word
		}
		return all, ""
	}
	if key == "machine" {
		return append(all, login{machine: word}), ""
	}
	if len(all) > 0 {
		switch last := &all[len(all)-1]; key {
		case "login":
			last.name = word
		case "password":
			last.password = word
		}
	}
	return all, ""
}
