package envd

import (
	"encoding/base64"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLookup(t *testing.T) {
	etc := t.TempDir()
	for name, text := range map[string]string{
		"passwd": "root:x:0:0::/root:/bin/bash\nu:x:1000:1001::/home/u:/bin/zsh\n7:x:5:5::/seven:\nv:x:7:7::/v:\nbare:x:8:8:::\n",
		"group":  "g:x:50:u,v\nh:x:51:u\n",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	u := account{"u", 1000, 1001, []uint32{1001, 50, 51}, "/home/u", "/bin/zsh"}
	for user, want := range map[string]account{
		"u": u, "1000": u,
		"u:33":         {"u", 1000, 33, []uint32{33}, "/home/u", "/bin/zsh"},
		"1000:33":      {"u", 1000, 33, []uint32{33}, "/home/u", "/bin/zsh"},
		"0:0":          {"root", 0, 0, []uint32{0}, "/root", "/bin/bash"},
		"4242":         {"4242", 4242, 0, []uint32{0}, "/", "/bin/sh"},
		"4242:4343":    {"4242", 4242, 4343, []uint32{4343}, "/", "/bin/sh"},
		"7":            {"7", 5, 5, []uint32{5}, "/seven", "/bin/sh"},
		"bare":         {"bare", 8, 8, []uint32{8}, "/", "/bin/sh"},
		"none":         {},
		"none:1":       {},
		"u:":           {},
		"u:g":          {},
		"u:1:2":        {},
		"-1":           {},
		"4294967295":   {},
		"u:4294967295": {},
		"":             {},
	} {
		got, err := accounts{etc}.lookup(user)
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(account{})); diff != "" || errors.Is(err, errNoAccount) != (want.home == "") {
			t.Errorf("%q: %v\n%s", user, err, diff)
		}
	}
	if got, err := (accounts{t.TempDir()}).lookup("0"); err != nil || got.name != "0" && got.name != "root" || got.home != "/root" {
		t.Errorf("root without a database: %+v, %v", got, err)
	}
}

// What stands between two colons of a Basic authorization is a gid, and a password of
// clients that send one is none.
func TestUserOfABasicAuthorization(t *testing.T) {
	for sent, want := range map[string]string{
		"user:": "user", "user": "", "user:password": "user", "1000:33:": "1000:33", "a:b:c": "a", "a:b:": "a", "a::": "a", ":": "",
	} {
		h := http.Header{"Authorization": {"Basic " + base64.StdEncoding.EncodeToString([]byte(sent))}}
		if got := basicUser(h); got != want {
			t.Errorf("%q is %q, want %q", sent, got, want)
		}
	}
}
