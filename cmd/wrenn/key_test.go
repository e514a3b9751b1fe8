package main

import (
	"encoding/json"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/auth"
)

func TestKey(t *testing.T) {
	dir := t.TempDir()
	key := func(args ...string) (string, error) {
		return inProcess(t, append([]string{"key", "--state-dir", dir}, args...)...)
	}
	printed, err := key("create", "ci", "--project", "blue", "--quota-sandboxes", "50", "--quota-memory", "1024")
	secret, note, _ := strings.Cut(printed, "\n")
	if err != nil || !strings.HasPrefix(secret, "e2b_") || !strings.Contains(note, "of project blue. It is not shown again.") {
		t.Fatalf("create: %q, %v", printed, err)
	}
	store, err := auth.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	check := func(want auth.Quota) {
		t.Helper()
		if c, err := store.Lookup(secret); err != nil || c.Project.Name != "blue" || c.Project.Quota != want {
			t.Errorf("the key is of %+v, %v", c.Project, err)
		}
	}
	check(auth.Quota{Sandboxes: 50, MemMiB: 1024})
	if _, err := key("quota", "blue", "--quota-sandboxes", "7", "--quota-memory", "0"); err != nil {
		t.Error(err)
	}
	check(auth.Quota{Sandboxes: 7})
	if printed, err := key("quota", "blue"); err != nil || !strings.Contains(printed, "7           no bound") {
		t.Errorf("quota: %q, %v", printed, err)
	}
	if printed, err := key("ls"); err != nil || !strings.Contains(printed, "ci     blue") || strings.Contains(printed, secret[4:]) {
		t.Errorf("ls: %q, %v", printed, err)
	}
	printed, err = key("ls", "--json")
	var list []map[string]any
	if json.Unmarshal([]byte(printed), &list) != nil || err != nil || len(list) != 1 || list[0]["name"] != "ci" || list[0]["digest"] != nil {
		t.Errorf("ls --json: %q, %v", printed, err)
	}
	if printed, err := key("rm", "ci"); err != nil || printed != "ci\n" {
		t.Errorf("rm: %q, %v", printed, err)
	}
	if _, err := store.Lookup(secret); err == nil {
		t.Error("a revoked key is valid")
	}
	for args, want := range map[string]string{
		"rm ci":                            "does not exist",
		"create --project Blue":            "project \"Blue\"",
		"create --quota-vcpus -1":          "quota of vcpus",
		"quota green":                      "project \"green\" does not exist",
		"create a b":                       "accepts at most 1 arg(s)",
		"ls --state-dir " + dir + "/other": "wrenn setup",
	} {
		if _, err := key(strings.Fields(args)...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("key %s: %v, want %q", args, err, want)
		}
	}
}
