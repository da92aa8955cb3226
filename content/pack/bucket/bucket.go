// Package bucket is the only door to gocloud.dev: a bucket of objects on S3 or in a
// directory, as package pack needs it. It must not know what an object means.
package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	gcaws "gocloud.dev/aws"
	"gocloud.dev/blob"
	_ "gocloud.dev/blob/fileblob" // file://
	"gocloud.dev/blob/s3blob"     // s3:// too
	"gocloud.dev/gcerrors"

	"github.com/floxctl/flox"
)

// Bucket holds objects. It is safe for concurrent use.
type Bucket struct {
	bucket *blob.Bucket
	url    string
	dir    string // of a file:// bucket
}

// Open opens the bucket at url:
//
//	s3://NAME?region=R&endpoint=https://HOST:PORT&use_path_style=true
//	file:///DIRECTORY
//
// The keys of S3 come from where the AWS tools look for them (AWS_ACCESS_KEY_ID
// and AWS_SECRET_ACCESS_KEY, ~/.aws); endpoint and use_path_style are for servers
// other than Amazon's. A directory must be there, and is meant for a network file
// system that several servers share. Errors: ErrBadInput. That the bucket answers is
// not checked.
func Open(ctx context.Context, where string) (*Bucket, error) {
	u, err := url.Parse(where)
	if err != nil || u.Scheme != "s3" && u.Scheme != "file" {
		return nil, fmt.Errorf("bucket %q: want s3://NAME or file:///DIRECTORY: %w", where, flox.ErrBadInput)
	}
	b := &Bucket{url: u.Scheme + "://" + u.Host + u.Path}
	if u.Scheme == "file" {
		b.dir = u.Path
		q := u.Query()
		q.Set("no_tmp_dir", "true") // or it would write to /tmp first
		q.Set("metadata", "skip")
		u.RawQuery = q.Encode()
	}
	if b.bucket, err = blob.OpenBucket(ctx, u.String()); err != nil {
		return nil, fmt.Errorf("bucket %s: %w: %w", b.url, err, flox.ErrBadInput)
	}
	return b, nil
}

// Keys are those of an S3 bucket. They are secret.
type Keys struct{ Access, Secret string }

// OpenAs is Open of an S3 bucket with keys of its own; with none it is Open.
func OpenAs(ctx context.Context, where string, keys Keys) (*Bucket, error) {
	u, err := url.Parse(where)
	if err != nil || u.Scheme != "s3" || keys == (Keys{}) {
		return Open(ctx, where)
	}
	b := &Bucket{url: u.Scheme + "://" + u.Host}
	q := u.Query()
	style := q.Get("use_path_style")
	q.Del("use_path_style")
	cfg, err := gcaws.V2ConfigFromURLParams(ctx, q)
	if err == nil {
		cfg.Credentials = credentials.NewStaticCredentialsProvider(keys.Access, keys.Secret, "")
		client := s3.NewFromConfig(cfg, func(o *s3.Options) { o.UsePathStyle = style == "true" })
		b.bucket, err = s3blob.OpenBucket(ctx, client, u.Host, nil)
	}
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w: %w", b.url, err, flox.ErrBadInput)
	}
	return b, nil
}

// String is the bucket's URL without parameters.
func (b *Bucket) String() string { return b.url }

// fail says what did not work, with the sentinel that fits.
func (b *Bucket) fail(what, name string, err error) error {
	kind := flox.ErrUnreachable
	switch gcerrors.Code(err) {
	case gcerrors.Unknown:
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) {
			kind = flox.ErrFull
		}
		if strings.Contains(err.Error(), "checksum did not match") { // S3's own, of a whole object; its error has no type
			kind = flox.ErrCorrupt
		}
	case gcerrors.NotFound:
		kind = flox.ErrNotFound
	case gcerrors.PermissionDenied:
		kind = flox.ErrDenied
	case gcerrors.ResourceExhausted:
		kind = flox.ErrFull
	}
	return fmt.Errorf("bucket %s: %s %s: %w: %w", b.url, what, name, err, kind)
}

// Put stores an object, all or nothing, instead of what was there. It returns when
// the bucket acknowledged it.
func (b *Bucket) Put(ctx context.Context, name string, r io.Reader) error {
	if err := b.bucket.Upload(ctx, name, r, &blob.WriterOptions{ContentType: "application/octet-stream"}); err != nil {
		return b.fail("put", name, err)
	}
	if b.dir != "" {
		if err := b.sync(name); err != nil {
			return b.fail("put", name, err)
		}
	}
	return nil
}

// sync makes an object in a directory durable.
func (b *Bucket) sync(name string) error {
	path := filepath.Join(b.dir, filepath.FromSlash(name))
	for {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
		if path == filepath.Clean(b.dir) || !strings.HasPrefix(path, filepath.Clean(b.dir)) {
			return nil
		}
		path = filepath.Dir(path)
	}
}

// Get reads n bytes of an object from off on, fewer at its end; n < 0 = to the end.
// Errors: ErrNotFound, ErrDenied, ErrUnreachable.
func (b *Bucket) Get(ctx context.Context, name string, off, n int64) (io.ReadCloser, error) {
	r, err := b.bucket.NewRangeReader(ctx, name, off, n, nil)
	if err != nil {
		return nil, b.fail("get", name, err)
	}
	return reader{r, b, name}, nil
}

type reader struct {
	*blob.Reader
	b    *Bucket
	name string
}

func (r reader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = r.b.fail("get", r.name, err)
	}
	return n, err
}

// List calls f with every object whose name begins with prefix, in the order of
// their names.
func (b *Bucket) List(ctx context.Context, prefix string, f func(name string, size int64, modified time.Time) error) error {
	for it := b.bucket.List(&blob.ListOptions{Prefix: prefix}); ; {
		o, err := it.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return b.fail("list", prefix, err)
		}
		if err := f(o.Key, o.Size, o.ModTime); err != nil {
			return err
		}
	}
}

// Delete removes an object; that it is not there is no error.
func (b *Bucket) Delete(ctx context.Context, name string) error {
	if err := b.bucket.Delete(ctx, name); err != nil && gcerrors.Code(err) != gcerrors.NotFound {
		return b.fail("delete", name, err)
	}
	return nil
}

// Close releases the connection.
func (b *Bucket) Close() error { return b.bucket.Close() }
