package build

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"strconv"
	"strings"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// maxDatabase bounds a file of accounts that a guest has.
const maxDatabase = 4 << 20

// owner is who owns a file, in numbers.
type owner struct{ uid, gid int }

// account is a line of /etc/passwd.
type account struct {
	name string
	owner
	home string
}

// readFile reads a small file of a guest. One that is not there is empty.
func readFile(ctx context.Context, g Guest, name string) ([]byte, error) {
	limited := &limitedBuffer{limit: maxDatabase + 8192}
	err := g.Pack(ctx, name, limited)
	if errors.Is(err, errdefs.NotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	in := tar.NewReader(&limited.Buffer)
	h, err := in.Next()
	if err != nil || h.Typeflag != tar.TypeReg {
		return nil, errdefs.InvalidArgument.Errorf("%s in the guest is no file", name)
	}
	return io.ReadAll(in)
}

// limitedBuffer is a buffer that refuses more than it may hold.
type limitedBuffer struct {
	bytes.Buffer
	limit int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.limit {
		return 0, errdefs.Exhausted.Errorf("it has more than %d bytes", b.limit)
	}
	return b.Buffer.Write(p)
}

// database is the accounts of a guest.
type database struct{ passwd, group []byte }

func readDatabase(ctx context.Context, g Guest) (d database, err error) {
	if d.passwd, err = readFile(ctx, g, "/etc/passwd"); err == nil {
		d.group, err = readFile(ctx, g, "/etc/group")
	}
	return d, err
}

// user finds an account by name or number.
func (d database) user(name string) (account, bool) {
	for f := range fields(d.passwd, 7) {
		uid, err1 := strconv.Atoi(f[2])
		gid, err2 := strconv.Atoi(f[3])
		if err1 == nil && err2 == nil && (f[0] == name || f[2] == name) {
			return account{name: f[0], owner: owner{uid, gid}, home: f[5]}, true
		}
	}
	if name == "root" || name == "0" {
		return account{name: "root", home: "/root"}, true
	}
	return account{}, false
}

// groupID finds a group by name or number.
func (d database) groupID(name string) (int, bool) {
	for f := range fields(d.group, 3) {
		if gid, err := strconv.Atoi(f[2]); err == nil && f[0] == name {
			return gid, true
		}
	}
	if name == "root" {
		return 0, true
	}
	return number(name)
}

// number reads a uid or gid.
func number(text string) (int, bool) {
	n, err := strconv.ParseUint(text, 10, 31)
	return int(n), err == nil
}

// fields are the fields of each line that has at least n.
func fields(file []byte, n int) func(func([]string) bool) {
	return func(yield func([]string) bool) {
		for line := range strings.Lines(string(file)) {
			if f := strings.Split(strings.TrimSpace(line), ":"); len(f) >= n && f[0] != "" && !yield(f) {
				return
			}
		}
	}
}

// ownerOf finds who "user[:group]" is. A user that is a number need not be in the database.
func (d database) ownerOf(text string) (owner, error) {
	name, group, grouped := strings.Cut(text, ":")
	var who owner
	if a, ok := d.user(name); ok {
		who = a.owner
	} else if uid, ok := number(name); ok {
		who = owner{uid, uid}
	} else {
		return owner{}, errdefs.InvalidArgument.Errorf("the account %q does not exist", name)
	}
	if grouped {
		gid, ok := d.groupID(group)
		if !ok {
			return owner{}, errdefs.InvalidArgument.Errorf("the group %q does not exist", group)
		}
		who.gid = gid
	}
	return who, nil
}

// execUser is an account as the guest's daemon reads it: it knows groups by number only.
func (j *job) execUser(g Guest, user string) (string, error) {
	name, group, grouped := strings.Cut(user, ":")
	if _, numeric := number(group); !grouped || numeric {
		return user, nil
	}
	d, err := readDatabase(j.ctx, g)
	if err != nil {
		return "", err
	}
	gid, ok := d.groupID(group)
	if !ok {
		return "", errdefs.InvalidArgument.Errorf("the group %q does not exist", group)
	}
	return name + ":" + strconv.Itoa(gid), nil
}

// currentOwner is the account that RUN has, for the files that a step makes.
func (j *job) currentOwner(g Guest, st *state) (owner, error) {
	if st.user == "" || st.user == "root" || st.user == "0" {
		return owner{}, nil
	}
	d, err := readDatabase(j.ctx, g)
	if err != nil {
		return owner{}, err
	}
	return d.ownerOf(st.user)
}

// file is a file or directory that the engine writes into a guest.
type file struct {
	name string
	mode int64
	dir  bool
	data []byte
	owner
}

// unpackFiles writes files below a directory of a guest.
func unpackFiles(ctx context.Context, g Guest, dir string, files ...file) error {
	var buf bytes.Buffer
	out := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{
			Name: f.name, Mode: f.mode, Uid: f.uid, Gid: f.gid, Size: int64(len(f.data)), Typeflag: tar.TypeReg, Format: tar.FormatPAX,
		}
		if f.dir {
			h.Typeflag, h.Name = tar.TypeDir, f.name+"/"
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := out.Write(f.data); err != nil {
			return err
		}
	}
	if err := out.Close(); err != nil {
		return err
	}
	return g.Unpack(ctx, dir, &buf)
}

// parents are the directories that lead to a path, and the path itself, for its owner to
// have those that are made.
func parents(dir string, who owner) (files []file) {
	for at := path.Clean(dir); at != "/" && at != "."; at = path.Dir(at) {
		files = append([]file{{name: strings.TrimPrefix(at, "/"), dir: true, mode: 0o755, owner: who}}, files...)
	}
	return files
}

// makeDir makes a WORKDIR.
func (j *job) makeDir(g Guest, dir string, st *state) error {
	who, err := j.currentOwner(g, st)
	if err != nil {
		return err
	}
	files := parents(dir, who)
	if len(files) == 0 {
		return nil
	}
	if err := unpackFiles(j.ctx, g, "/", files...); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	return nil
}

var accountName = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)

// ensureUser makes an account with a group and a home unless it is there.
func (j *job) ensureUser(g Guest, name string) error {
	d, err := readDatabase(j.ctx, g)
	if err != nil {
		return err
	}
	if _, ok := d.user(name); ok {
		return nil
	}
	if !accountName.MatchString(name) {
		return errdefs.InvalidArgument.Errorf("%q cannot be the name of an account", name)
	}
	uid := 1000
	taken := func(n string) bool {
		for _, file := range [][]byte{d.passwd, d.group} {
			for f := range fields(file, 3) {
				if f[2] == n {
					return true
				}
			}
		}
		return false
	}
	for taken(strconv.Itoa(uid)) {
		uid++
	}
	gid, grouped := d.groupID(name)
	if !grouped {
		gid = uid
	}
	shadow, err := readFile(j.ctx, g, "/etc/shadow")
	if err != nil {
		return err
	}
	who := owner{uid, gid}
	files := []file{
		{name: "etc/passwd", mode: 0o644, data: fmt.Appendf(ended(d.passwd), "%s:x:%d:%d::/home/%s:/bin/bash\n", name, uid, gid, name)},
		{name: "home/" + name, mode: 0o755, dir: true, owner: who},
	}
	if len(d.passwd) == 0 {
		files[0].data = append([]byte("root:x:0:0:root:/root:/bin/sh\n"), files[0].data...)
	}
	if !grouped {
		files = append(files, file{name: "etc/group", mode: 0o644, data: fmt.Appendf(ended(d.group), "%s:x:%d:\n", name, gid)})
	}
	if len(shadow) > 0 {
		files = append(files, file{name: "etc/shadow", mode: 0o640, data: fmt.Appendf(ended(shadow), "%s:*:19000:0:99999:7:::\n", name)})
		if gid, ok := d.groupID("shadow"); ok {
			files[len(files)-1].gid = gid
		}
	}
	if err := unpackFiles(j.ctx, g, "/", files...); err != nil {
		return fmt.Errorf("make the account %s: %w", name, err)
	}
	return nil
}

// ended is a text whose last line has an end.
func ended(text []byte) []byte {
	if len(text) > 0 && text[len(text)-1] != '\n' {
		return append(text, '\n')
	}
	return text
}
