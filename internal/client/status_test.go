package client

import (
	"testing"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

func TestStatusText(t *testing.T) {
	for want, info := range map[string]*hostagentv1.SandboxInfo{
		"running":                 {Status: "running"},
		"running (disk_full)":     {Status: "running", Reason: "disk_full"},
		"hibernated":              {Status: "hibernated"},
		"hibernated (files only)": {Status: "hibernated", FilesOnly: true},
	} {
		if got := StatusText(info); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
