// Package dockerfile reads Dockerfiles and their contexts.
package dockerfile

import (
	"io"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// Options say how a Dockerfile is read.
type Options struct {
	// Name is the file's, for errors.
	Name string
	// Args are the values of --build-arg.
	Args map[string]string
	// Target is the stage that is the result; empty is the last.
	Target string
}

// File is a Dockerfile that was read. Its stages are those that the result needs.
type File struct {
	Stages []build.Stage
	// ReadyInterval is that of HEALTHCHECK, zero if it names none.
	ReadyInterval time.Duration
	// Warnings are sentences about what was read and has no effect.
	Warnings []string
}

// Archive is what one COPY or ADD takes from the context.
type Archive struct {
	// Hash is of names, modes and contents, and not of times and owners.
	Hash string
	// Bytes is the size of what is in it, for a progress bar.
	Bytes int64
	// Write writes a gzipped tar.
	Write func(w io.Writer) error
}

// Parse reads a Dockerfile. What is not supported is errdefs.InvalidArgument with the
// file's name and the line.
func Parse(r io.Reader, o Options) (*File, error) {
	return nil, errdefs.Unsupported.Errorf("this client cannot read Dockerfiles yet")
}

// Context is a directory that COPY takes from.
type Context struct {
	dir    string
	ignore []string
}

// OpenContext returns the context in dir. ignore is the text of a .dockerignore file,
// nil for none; see IgnoreFile.
func OpenContext(dir string, ignore []string) *Context { return &Context{dir: dir, ignore: ignore} }

// Archives sets Files of each step of the file that takes from the context, and returns
// the archives that the steps need, each once.
func (f *File) Archives(c *Context) ([]Archive, error) {
	return nil, errdefs.Unsupported.Errorf("this client cannot read Dockerfiles yet")
}
