package sandbox

import (
	"strings"
	"testing"
	"testing/synctest"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

func TestNamePattern(t *testing.T) {
	for name, want := range map[string]bool{
		"web": true, "Web-2.old_x": true, "7": true, "d49": true, strings.Repeat("a", 63): true, "sbom": true, "sb": true,
		"": false, "-web": false, ".web": false, "a b": false, "a:b": false, "a/b": false, "ü": false, strings.Repeat("a", 64): false,
		"sb-web": false, "SB-0123456789abcdef": false, "sb0123456789abcdef": false, "sb0123456789abcdef-x": false,
	} {
		if got := IsName(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}

// A name is one sandbox's of each project until that has ended, across restarts, and no
// fork has it.
func TestName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		named := func(project string) CreateRequest {
			return CreateRequest{Labels: Labels{Project: project, Name: "web"}}
		}
		first := r.request(named(""))
		is := func(what, project string, want ID) {
			t.Helper()
			if id, err := r.Named(&project, "web"); err != nil || id != want {
				t.Errorf("%s: %s, %v; want %s", what, id, err, want)
			}
		}
		taken := func(what string) {
			t.Helper()
			before := len(r.List(true))
			_, err := r.Create(t.Context(), named(""))
			wantClass(t, err, errdefs.AlreadyExists)
			if err != nil && !strings.Contains(err.Error(), string(first)) {
				t.Errorf("%s: the error does not name the sandbox: %v", what, err)
			}
			if after := len(r.List(true)); after != before {
				t.Errorf("%s: %d sandboxes, %d before", what, after, before)
			}
		}
		is("running", "", first)
		taken("running")
		if err := r.Hibernate(t.Context(), first, Hibernation{}); err != nil {
			t.Fatal(err)
		}
		taken("hibernated")
		r.die()
		r.start()
		is("after a restart", "", first)
		taken("after a restart")
		if err := r.Resume(t.Context(), first); err != nil {
			t.Fatal(err)
		}
		forked, err := r.Fork(t.Context(), first, ForkRequest{Count: 1})
		if err != nil || forked.Sandboxes[0].Labels.Name != "" {
			t.Errorf("a fork: %+v, %v", forked, err)
		}
		other := r.request(named("blue"))
		is("of another project", "blue", other)
		is("beside another project", "", first)
		_, err = r.Named(nil, "web")
		wantClass(t, err, errdefs.InvalidArgument)
		_, err = r.Named(nil, "no-one")
		wantClass(t, err, errdefs.NotFound)

		if err := r.Destroy(t.Context(), first); err != nil {
			t.Fatal(err)
		}
		second := r.request(named(""))
		is("made again", "", second)
		if _, err := r.Create(t.Context(), CreateRequest{Labels: Labels{Name: "sb-x"}}); err == nil {
			t.Error("a name like an id was taken")
		}
	})
}

// Of creates with one name that come at the same time, one succeeds.
func TestNameAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		made := make(chan error, 5)
		for range cap(made) {
			go func() {
				_, err := r.Create(t.Context(), CreateRequest{Labels: Labels{Name: "web"}})
				made <- err
			}()
		}
		succeeded := 0
		for range cap(made) {
			if err := <-made; err == nil {
				succeeded++
			} else {
				wantClass(t, err, errdefs.AlreadyExists)
			}
		}
		if succeeded != 1 {
			t.Errorf("%d of %d creates succeeded", succeeded, cap(made))
		}
	})
}

// A sandbox has the disk that its create asks for.
func TestDiskSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		id := r.request(CreateRequest{DiskMiB: 1234})
		if info, err := r.Get(id); err != nil || info.DiskMiB != 1234 {
			t.Errorf("%+v, %v", info, err)
		}
		if used := r.Stats().Reserved.DiskMiB; used != 1234 {
			t.Errorf("it counts as %d MiB", used)
		}
		for _, mib := range []int{-1, 63, 1<<20 + 1} {
			_, err := r.Create(t.Context(), CreateRequest{DiskMiB: mib})
			wantClass(t, err, errdefs.InvalidArgument)
		}
	})
}

func TestPublishBounds(t *testing.T) {
	for _, c := range []struct {
		req  CreateRequest
		want bool
	}{
		{CreateRequest{Publish: make([]Publish, MaxPublish+1)}, false},
		{CreateRequest{Publish: []Publish{{Port: 80, HostPort: 8080}}}, true},
		{CreateRequest{Publish: []Publish{{HostPort: 8080}}}, false},
		{CreateRequest{Publish: []Publish{{Port: 49983, HostPort: 8080}}}, false},
		{CreateRequest{Publish: []Publish{{Port: 80, HostPort: 8080}}, Labels: Labels{OwnerKey: "x"}}, false},
	} {
		if err := c.req.check(); (err == nil) != c.want {
			t.Errorf("%+v: %v", c.req.Publish, err)
		}
	}
}
