package envd

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// account is a user of the guest, as /etc/passwd and /etc/group know it.
type account struct {
	name   string
	uid    uint32
	gid    uint32
	groups []uint32
	home   string
	shell  string
}

var errNoAccount = errors.New("no such user")

// accounts reads the databases at each call: users are added while a guest
// runs, and the files are small.
type accounts struct{ etc string }

// lookup finds a user; errNoAccount if there is none. The user is given as a name, as
// a uid, which the database need not have, or as either with ":" and a gid, which is
// then the only group.
func (a accounts) lookup(user string) (account, error) {
	name, group, grouped := strings.Cut(user, ":")
	as, err := a.find(name)
	if uid, ok := parseID(name); errors.Is(err, errNoAccount) && ok {
		as, err = account{name: name, uid: uid, groups: []uint32{0}, home: "/", shell: "/bin/sh"}, nil
	}
	if err != nil || !grouped {
		return as, err
	}
	gid, ok := parseID(group)
	if !ok {
		return account{}, errNoAccount
	}
	as.gid, as.groups = gid, []uint32{gid}
	return as, nil
}

// parseID reads a uid or gid. The highest number means "unchanged" to the kernel.
func parseID(text string) (uint32, bool) {
	id, err := strconv.ParseUint(text, 10, 32)
	return uint32(id), err == nil && id != math.MaxUint32
}

// find finds a user of the database by name or uid. A system without a database has
// root.
func (a accounts) find(name string) (account, error) {
	var found account
	number, numeric := parseID(name)
	err := a.each("passwd", 7, func(f []string) bool {
		uid, uidErr := strconv.ParseUint(f[2], 10, 32)
		gid, gidErr := strconv.ParseUint(f[3], 10, 32)
		if uidErr != nil || gidErr != nil {
			return true
		}
		// A name that looks like a number goes before the number.
		byName := f[0] == name
		if byName || numeric && found.name == "" && uint32(uid) == number {
			found = account{name: f[0], uid: uint32(uid), gid: uint32(gid), home: f[5], shell: f[6]}
		}
		return !byName
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return account{}, fmt.Errorf("read users: %w", err)
	}
	if found.name == "" {
		if name != "root" && name != "0" {
			return account{}, errNoAccount
		}
		found = account{name: "root", home: "/root", shell: "/bin/sh"}
	}
	if found.home == "" {
		found.home = "/"
	}
	if found.shell == "" {
		found.shell = "/bin/sh"
	}
	found.groups = []uint32{found.gid}
	err = a.each("group", 4, func(f []string) bool {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err == nil && uint32(gid) != found.gid && slices.Contains(strings.Split(f[3], ","), found.name) {
			found.groups = append(found.groups, uint32(gid))
		}
		return true
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return account{}, fmt.Errorf("read groups: %w", err)
	}
	return found, nil
}

// names returns the names by id of file ("passwd" or "group").
func (a accounts) names(file string) map[uint32]string {
	names := make(map[uint32]string)
	_ = a.each(file, 3, func(f []string) bool {
		if id, err := strconv.ParseUint(f[2], 10, 32); err == nil {
			if _, taken := names[uint32(id)]; !taken {
				names[uint32(id)] = f[0]
			}
		}
		return true
	})
	return names
}

// each calls fn with the fields of each line that has at least n, until fn
// returns false.
func (a accounts) each(file string, n int, fn func(fields []string) bool) error {
	f, err := os.Open(filepath.Join(a.etc, file))
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) >= n && fields[0] != "" && !strings.HasPrefix(fields[0], "#") && !fn(fields) {
			return nil
		}
	}
	return lines.Err()
}
