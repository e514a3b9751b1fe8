// Package errdefs holds the classes of errors that callers act on.
//
// A class is attached where the error is made. The text of a classed error is for
// the client: it has no host paths and no secrets. An error without a class is a
// fault of the agent; only the log shows its text.
package errdefs

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
)

// Class is a kind of error that a caller acts on. The classes below are all that
// exist. Compare with errors.Is.
type Class struct{ name string }

func (c *Class) Error() string { return c.name }

// The classes. The table in errhttp says what each is to a caller.
var (
	// InvalidArgument: the request is wrong whatever the state.
	InvalidArgument = &Class{"invalid argument"}
	// Unauthenticated: the caller did not prove who it is.
	Unauthenticated = &Class{"unauthenticated"}
	// Denied: the caller is known and may not do this.
	Denied = &Class{"permission denied"}
	// NotFound: what the request names does not exist.
	NotFound = &Class{"not found"}
	// AlreadyExists: what the request would make exists.
	AlreadyExists = &Class{"already exists"}
	// WrongState: the state forbids it; the message names the state.
	WrongState = &Class{"wrong state"}
	// Busy: another operation got in the way; trying again is reasonable.
	Busy = &Class{"busy"}
	// Exhausted: a limit is reached; the message says which.
	Exhausted = &Class{"resource exhausted"}
	// Unsupported: this host, driver or guest does not implement it.
	Unsupported = &Class{"unsupported"}
	// Unavailable: something needed is not there or does not answer.
	Unavailable = &Class{"unavailable"}
	// TimedOut: a time limit that the caller set has passed.
	TimedOut = &Class{"timed out"}
	// Corrupt: stored data is not what was written.
	Corrupt = &Class{"corrupt"}
)

// Classes returns every class, so that tests can range over them.
func Classes() []*Class {
	return []*Class{
		InvalidArgument, Unauthenticated, Denied, NotFound, AlreadyExists, WrongState,
		Busy, Exhausted, Unsupported, Unavailable, TimedOut, Corrupt,
	}
}

type classed struct {
	class *Class
	err   error
}

func (e *classed) Error() string   { return e.err.Error() }
func (e *classed) Unwrap() []error { return []error{e.class, e.err} }

// Errorf formats like fmt.Errorf, %w included, and attaches the class.
func (c *Class) Errorf(format string, args ...any) error {
	return &classed{class: c, err: fmt.Errorf(format, args...)}
}

// ClassOf returns the outermost class attached to err, or nil.
func ClassOf(err error) *Class {
	var e *classed
	if errors.As(err, &e) {
		return e.class
	}
	return nil
}

// aboutTheFile are the errors of the file system that say what is at a path. Every
// other error says only that the path could not be read.
var aboutTheFile = []syscall.Errno{
	syscall.ENOENT, syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP, syscall.EEXIST, syscall.ENAMETOOLONG, syscall.EINVAL,
}

// CannotRead reports whether err kept a file from being read: an I/O error, too
// many open files, no memory, no permission. The file itself may be all right.
func CannotRead(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && !slices.Contains(aboutTheFile, errno)
}

// full shows its cause, which names files of the host, to errors.Is and errors.As
// only.
type full struct{ cause error }

func (e *full) Error() string { return "the host's disk is full" }
func (e *full) Unwrap() error { return e.cause }

// IsDiskFull reports whether an error says that a disk, or a quota on it, has no
// room.
func IsDiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// DiskFull gives an error without a class that IsDiskFull the class Exhausted, and
// returns any other error as it is. Call it where errors about the host's disk are
// made; in other places something else may have no room.
func DiskFull(err error) error {
	if err == nil || ClassOf(err) != nil || !IsDiskFull(err) {
		return err
	}
	return &classed{class: Exhausted, err: &full{err}}
}
