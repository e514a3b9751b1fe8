package envd

import (
	"bufio"
	"errors"
	"fmt"
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

// lookup finds a user by name; errNoAccount if there is none. A system without
// a user database has root.
func (a accounts) lookup(name string) (account, error) {
	var found account
	err := a.each("passwd", 7, func(f []string) bool {
		uid, uidErr := strconv.ParseUint(f[2], 10, 32)
		gid, gidErr := strconv.ParseUint(f[3], 10, 32)
		if f[0] != name || uidErr != nil || gidErr != nil {
			return true
		}
		found = account{name: name, uid: uint32(uid), gid: uint32(gid), home: f[5], shell: f[6]}
		return false
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return account{}, fmt.Errorf("read users: %w", err)
	}
	if found.name == "" {
		if name != "root" {
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
		if err == nil && uint32(gid) != found.gid && slices.Contains(strings.Split(f[3], ","), name) {
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
