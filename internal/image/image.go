// Package image makes OCI and Docker images the lowest layer of templates: it pulls or
// imports them, unpacks their layers into one tree, and packs that as an ext4 file.
//
// Nothing in an image is trusted. Every size is bounded, every digest is verified while
// the data comes in, and no name of an archive leaves the directory it is unpacked in.
package image

import (
	"log/slog"
	"time"
)

// Credentials are what a private registry asks for. They are kept for the time of one
// call and are in no file, log or error. The zero value is an anonymous caller.
type Credentials struct{ Username, Password string }

// String hides the password from everything that prints.
func (c Credentials) String() string {
	if c == (Credentials{}) {
		return "anonymous"
	}
	return "credentials"
}

// GoString is String, for %#v.
func (c Credentials) GoString() string { return c.String() }

// LogValue is String, for slog.
func (c Credentials) LogValue() slog.Value { return slog.StringValue(c.String()) }

// Image is an image whose blobs are in the store. It holds values only and may be
// kept, but Root finds its blobs only within the Hold in which it was pulled.
type Image struct {
	// Reference is what it was asked for by, as the caller wrote it.
	Reference string
	// Digest is that of the image's own manifest, not of an index: "sha256:…".
	Digest string
	// Layers are from the lowest to the highest.
	Layers []Layer
	Config Config
}

// Layer is one layer of an image.
type Layer struct {
	// Digest is that of the blob, DiffID that of the archive which it holds, which is
	// the image's word until Root has unpacked it.
	Digest, DiffID string
	// Size is the blob's, in bytes.
	Size int64
}

// Config is what an image says about programs that run in it. Lists are as the image
// has them.
type Config struct {
	// Env are NAME=value.
	Env             []string
	User, Workdir   string
	Entrypoint, Cmd []string
	Shell           []string
	// Exposed are PORT/PROTOCOL, sorted.
	Exposed     []string
	Labels      map[string]string
	Healthcheck *Healthcheck
	StopSignal  string
	// Volumes are directories, sorted.
	Volumes []string
	// OnBuild are instructions for a build that stands on the image.
	OnBuild []string
}

// Healthcheck is a command that tells whether an image's program works. A time that is
// zero is the default.
type Healthcheck struct {
	// Test begins with CMD, CMD-SHELL or NONE; it is empty where the base's holds.
	Test                           []string
	Interval, Timeout, StartPeriod time.Duration
	Retries                        int
}

// Stages of a pull, in their order; an import has no Resolving.
const (
	Resolving   = "resolving"
	Downloading = "downloading"
	Importing   = "importing"
	Unpacking   = "unpacking"
	Packing     = "packing"
)

// Progress tells how far an operation is. Done and Total count bytes; Total is 0 where
// it is not known. Stages follow each other and none begins twice.
type Progress struct {
	Stage       string
	Done, Total int64
	// Detail is what is done just now, in a few words; it may be empty.
	Detail string
}

// Limits bound what an image may be. A field that is 0 has the value of DefaultLimits.
type Limits struct {
	// Layers and Entries count those of a whole image.
	Layers, Entries int
	// NameBytes bounds the path of an entry, LinkBytes what a link leads to.
	NameBytes, LinkBytes int
	// FileBytes bounds one file, TotalBytes all archives of an image and the files
	// that they hold, BlobBytes all of its blobs.
	FileBytes, TotalBytes, BlobBytes int64
	// Ratio bounds how many times larger than its blob a layer may be, from
	// RatioFrom bytes on.
	Ratio, RatioFrom int64
}

// DefaultLimits hold for images that people make.
var DefaultLimits = Limits{
	Layers: 512, Entries: 2_000_000,
	NameBytes: 3072, LinkBytes: 4095,
	FileBytes: 64 << 30, TotalBytes: 128 << 30, BlobBytes: 64 << 30,
	Ratio: 200, RatioFrom: 1 << 30,
}

func (l Limits) orDefault() Limits {
	d := DefaultLimits
	for _, f := range []struct{ to, from *int }{
		{&l.Layers, &d.Layers}, {&l.Entries, &d.Entries}, {&l.NameBytes, &d.NameBytes}, {&l.LinkBytes, &d.LinkBytes},
	} {
		if *f.to == 0 {
			*f.to = *f.from
		}
	}
	for _, f := range []struct{ to, from *int64 }{
		{&l.FileBytes, &d.FileBytes}, {&l.TotalBytes, &d.TotalBytes}, {&l.BlobBytes, &d.BlobBytes},
		{&l.Ratio, &d.Ratio}, {&l.RatioFrom, &d.RatioFrom},
	} {
		if *f.to == 0 {
			*f.to = *f.from
		}
	}
	return l
}
