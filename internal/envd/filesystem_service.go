package envd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
)

// maxEntries bounds one listing.
const maxEntries = 100_000

// filesystemService serves filesystem.Filesystem.
type filesystemService struct{ *Server }

// path resolves a client's path for the user that the request acts as.
func (s filesystemService) path(h http.Header, path string) (string, account, error) {
	as, err := s.requestUser(h)
	if err != nil {
		return "", account{}, err
	}
	resolved, err := s.resolvePath(path, as)
	if err != nil {
		return "", account{}, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return resolved, as, nil
}

func (s filesystemService) Stat(
	_ context.Context, req *connect.Request[filesystem.StatRequest],
) (*connect.Response[filesystem.StatResponse], error) {
	path, _, err := s.path(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	entry, err := s.describer().entry(path)
	if err != nil {
		return nil, fileError(err)
	}
	return connect.NewResponse(&filesystem.StatResponse{Entry: entry}), nil
}

func (s filesystemService) MakeDir(
	_ context.Context, req *connect.Request[filesystem.MakeDirRequest],
) (*connect.Response[filesystem.MakeDirResponse], error) {
	path, as, err := s.path(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	switch info, err := os.Stat(path); {
	case err == nil && info.IsDir():
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: %s", path))
	case err == nil:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path already exists but it is not a directory: %s", path))
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fileError(err)
	}
	if err := makeDirs(path, as); err != nil {
		return nil, fileError(err)
	}
	entry, err := s.describer().entry(path)
	if err != nil {
		return nil, fileError(err)
	}
	return connect.NewResponse(&filesystem.MakeDirResponse{Entry: entry}), nil
}

func (s filesystemService) Move(
	_ context.Context, req *connect.Request[filesystem.MoveRequest],
) (*connect.Response[filesystem.MoveResponse], error) {
	source, as, err := s.path(req.Header(), req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	destination, err := s.resolvePath(req.Msg.GetDestination(), as)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if _, err := os.Lstat(source); err != nil {
		return nil, fileError(err)
	}
	if err := makeDirs(filepath.Dir(destination), as); err != nil {
		return nil, fileError(err)
	}
	if err := move(source, destination); err != nil {
		return nil, fileError(err)
	}
	entry, err := s.describer().entry(destination)
	if err != nil {
		return nil, fileError(err)
	}
	return connect.NewResponse(&filesystem.MoveResponse{Entry: entry}), nil
}

func (s filesystemService) ListDir(
	ctx context.Context, req *connect.Request[filesystem.ListDirRequest],
) (*connect.Response[filesystem.ListDirResponse], error) {
	path, _, err := s.path(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if err := checkDir(path); err != nil {
		return nil, err
	}
	l := lister{ctx: ctx, describer: s.describer()}
	if err := l.list(path, max(1, int(req.Msg.GetDepth()))); err != nil {
		return nil, fileError(err)
	}
	return connect.NewResponse(&filesystem.ListDirResponse{Entries: l.entries}), nil
}

// checkDir reports, as a Connect error, why path cannot be listed or watched.
func checkDir(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fileError(err)
	}
	if !info.IsDir() {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path is not a directory: %s", path))
	}
	return nil
}

type lister struct {
	ctx       context.Context
	describer *describer
	entries   []*filesystem.EntryInfo
}

// list adds what is in dir, in the order of names, each directory followed by
// what is in it. Links are not followed.
func (l *lister) list(dir string, depth int) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if l.ctx.Err() != nil {
			return l.ctx.Err()
		}
		path := filepath.Join(dir, name.Name())
		info, err := name.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed
		}
		if err != nil {
			return err
		}
		if len(l.entries) == maxEntries {
			return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("more than %d entries: list less deeply", maxEntries))
		}
		l.entries = append(l.entries, l.describer.describe(path, info))
		if info.IsDir() && depth > 1 {
			if err := l.list(path, depth-1); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

func (s filesystemService) Remove(
	_ context.Context, req *connect.Request[filesystem.RemoveRequest],
) (*connect.Response[filesystem.RemoveResponse], error) {
	path, _, err := s.path(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if path == "/" {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("refusing to remove /"))
	}
	if err := os.RemoveAll(path); err != nil {
		return nil, fileError(err)
	}
	return connect.NewResponse(&filesystem.RemoveResponse{}), nil
}

// move renames a file or, across file systems, copies and removes it.
func move(source, destination string) error {
	err := os.Rename(source, destination)
	if !errors.Is(err, syscall.EXDEV) {
		return err
	}
	if strings.HasPrefix(destination+"/", source+"/") {
		return &fs.PathError{Op: "move", Path: destination, Err: syscall.EINVAL}
	}
	if err := copyTree(source, destination); err != nil {
		return errors.Join(err, os.RemoveAll(destination))
	}
	return os.RemoveAll(source)
}

// copyTree copies files, directories and links with their modes, owners and
// times. Nothing else can be copied.
func copyTree(source, destination string) error {
	info, err := os.Lstat(source)
	if err != nil {
		return err
	}
	switch {
	case info.IsDir():
		if err := os.Mkdir(destination, 0o700); err != nil {
			return err
		}
		entries, err := os.ReadDir(source)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if err := copyTree(filepath.Join(source, entry.Name()), filepath.Join(destination, entry.Name())); err != nil {
				return err
			}
		}
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(source)
		if err != nil {
			return err
		}
		if err := os.Symlink(target, destination); err != nil {
			return err
		}
	case info.Mode().IsRegular():
		if err := copyFile(source, destination); err != nil {
			return err
		}
	default:
		return &fs.PathError{Op: "copy", Path: source, Err: syscall.EINVAL}
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		if err := os.Lchown(destination, int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		return nil
	}
	if err := os.Chmod(destination, info.Mode()); err != nil {
		return err
	}
	return os.Chtimes(destination, time.Time{}, info.ModTime())
}

func copyFile(source, destination string) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(destination, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
