package envd

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
)

// metadataPrefix begins the names of the extended attributes that hold a file's
// metadata.
const metadataPrefix = "user.e2b."

// describer describes files; it reads the user database once, so make one per
// request.
type describer struct {
	accounts      accounts
	users, groups map[uint32]string
}

func (s *Server) describer() *describer { return &describer{accounts: s.accounts} }

// entry describes the file at path without following it if it is a link; a
// link's type and mode are those of its target.
func (d *describer) entry(path string) (*filesystem.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return d.describe(path, info), nil
}

func (d *describer) describe(path string, info fs.FileInfo) *filesystem.EntryInfo {
	e := &filesystem.EntryInfo{
		Name: filepath.Base(path), Path: path, Size: info.Size(),
		Type: fileType(info.Mode()), Mode: uint32(info.Mode().Perm()), Permissions: info.Mode().String(),
		ModifiedTime: timestamppb.New(info.ModTime()),
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			target, _ = os.Readlink(path) // the target does not exist: give its name
		} else if to, err := os.Stat(target); err == nil {
			e.Type, e.Mode = fileType(to.Mode()), uint32(to.Mode().Perm())
		}
		e.SymlinkTarget = &target
	} else if info.Mode().IsRegular() || info.IsDir() {
		e.Metadata = readMetadata(path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		if d.users == nil {
			d.users, d.groups = d.accounts.names("passwd"), d.accounts.names("group")
		}
		e.Owner, e.Group = nameOr(d.users, st.Uid), nameOr(d.groups, st.Gid)
	}
	return e
}

func nameOr(names map[uint32]string, id uint32) string {
	if name, ok := names[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

func fileType(mode fs.FileMode) filesystem.FileType {
	switch {
	case mode.IsRegular():
		return filesystem.FileType_FILE_TYPE_FILE
	case mode.IsDir():
		return filesystem.FileType_FILE_TYPE_DIRECTORY
	case mode&fs.ModeSymlink != 0:
		return filesystem.FileType_FILE_TYPE_SYMLINK
	default:
		return filesystem.FileType_FILE_TYPE_UNSPECIFIED
	}
}

// readMetadata returns what writeMetadata wrote; nil if there is none.
func readMetadata(path string) map[string]string {
	var metadata map[string]string
	for _, name := range attributes(path) {
		key, ours := strings.CutPrefix(name, metadataPrefix)
		if !ours {
			continue
		}
		value := make([]byte, maxMetadata)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			continue
		}
		if metadata == nil {
			metadata = make(map[string]string)
		}
		metadata[key] = string(value[:n])
	}
	return metadata
}

// attributes lists the names of a file's extended attributes.
func attributes(path string) []string {
	n, err := unix.Llistxattr(path, nil)
	if err != nil || n == 0 {
		return nil
	}
	buf := make([]byte, n+256) // some may be added after the first call
	// An overlay counts its own attributes in the first call and leaves them out here.
	if n, err = unix.Llistxattr(path, buf); err != nil || n == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
}

// writeMetadata makes metadata the file's only. A file system without
// attributes is no error.
func writeMetadata(path string, metadata map[string]string) error {
	for _, name := range attributes(path) {
		if key, ours := strings.CutPrefix(name, metadataPrefix); ours {
			if _, stays := metadata[key]; !stays {
				_ = unix.Removexattr(path, name)
			}
		}
	}
	for key, value := range metadata {
		err := unix.Setxattr(path, metadataPrefix+key, []byte(value), 0)
		if errors.Is(err, unix.ENOTSUP) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// makeDirs makes path and its missing parents, which then belong to the user.
func makeDirs(path string, as account) error {
	var missing []string
	for dir := path; ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err == nil {
			if !info.IsDir() {
				return &fs.PathError{Op: "mkdir", Path: dir, Err: syscall.ENOTDIR}
			}
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir) {
			return err
		}
		missing = append(missing, dir)
	}
	for i := len(missing) - 1; i >= 0; i-- {
		err := os.Mkdir(missing[i], 0o755)
		if errors.Is(err, fs.ErrExist) && dirExists(missing[i]) {
			continue // another process made it
		}
		if err != nil {
			return err
		}
		if err := giveTo(missing[i], as); err != nil {
			return err
		}
	}
	return nil
}

// giveTo makes the user the owner of a file that was made for it.
func giveTo(path string, as account) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return os.Lchown(path, int(as.uid), int(as.gid))
}

// fileError gives an error of a file operation its code and a sentence.
func fileError(err error) error {
	var coded *connect.Error
	if errors.As(err, &coded) {
		return err
	}
	code := connect.CodeInternal
	switch {
	case errors.Is(err, fs.ErrNotExist):
		code = connect.CodeNotFound
	case errors.Is(err, fs.ErrExist):
		code = connect.CodeAlreadyExists
	case errors.Is(err, fs.ErrPermission):
		code = connect.CodePermissionDenied
	case errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENOTEMPTY), errors.Is(err, syscall.EBUSY), errors.Is(err, syscall.EROFS):
		code = connect.CodeFailedPrecondition
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENAMETOOLONG):
		code = connect.CodeInvalidArgument
	case noSpace(err), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENOMEM):
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, err)
}

func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// maxMetadata bounds a file's metadata, maxMetadataKey one key of it, in
// bytes: what the attributes of common file systems hold.
const (
	maxMetadata    = 4096
	maxMetadataKey = 255 - len(metadataPrefix)
)
