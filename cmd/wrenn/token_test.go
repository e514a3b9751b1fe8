package main

import (
	"bytes"
	"strings"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/client/clienttest"
)

const secret = "the sandbox's secret"

// The token is printed where it is asked for, and nowhere else.
func TestTokenIsNotPrinted(t *testing.T) {
	url := (&clienttest.Agent{Token: secret}).Serve(t)
	for _, c := range []struct {
		args    []string
		printed bool
	}{
		{[]string{"create"}, false}, {[]string{"create", "--json"}, false}, {[]string{"create", "-v"}, false},
		{[]string{"inspect", clienttest.ID}, false}, {[]string{"inspect", "--token", clienttest.ID}, true},
	} {
		var out bytes.Buffer
		root := newRoot()
		root.SetArgs(append(c.args, "--host", url))
		root.SetOut(&out)
		root.SetErr(&out)
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Errorf("%q: %v", c.args, err)
		}
		if got := strings.Contains(out.String(), secret); got != c.printed {
			t.Errorf("%q printed %s", c.args, &out)
		}
	}
}
