package build

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// tree lists a directory: names with contents or targets.
func tree(t *testing.T, dir string) (got []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(dir, path)
		switch {
		case err != nil || name == "." || name == "etc" || strings.HasPrefix(name, "etc/"):
			return err
		case d.IsDir():
			got = append(got, name+"/")
		case d.Type() == fs.ModeSymlink:
			to, _ := os.Readlink(path)
			got = append(got, name+"->"+to)
		default:
			data, err := os.ReadFile(path)
			got = append(got, name+"="+string(data))
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	return got
}

// TestCopy: where the files of a COPY go, by Docker's rules and by E2B's.
func TestCopy(t *testing.T) {
	files := []string{"f=1", "d/", "d/x=X", "d/s/", "d/s/y=Y", "d/l->x", "e/z=Z"}
	for name, c := range map[string]struct {
		step  Step
		e2b   bool
		files []string
		have  []string // directories that are there
		want  []string
		err   string
	}{
		"a file":                   {step: Step{Src: []string{"f"}, Dst: "/a/b"}, want: []string{"a/", "a/b=1"}},
		"into a new directory":     {step: Step{Src: []string{"f"}, Dst: "/a/"}, want: []string{"a/", "a/f=1"}},
		"into a directory":         {step: Step{Src: []string{"f"}, Dst: "/a"}, have: []string{"a"}, want: []string{"a/", "a/f=1"}},
		"relative":                 {step: Step{Src: []string{"f"}, Dst: "g"}, want: []string{"w/", "w/g=1"}},
		"to the working directory": {step: Step{Src: []string{"f"}, Dst: "."}, want: []string{"w/", "w/f=1"}},
		"a directory's content":    {step: Step{Src: []string{"d"}, Dst: "/a"}, want: []string{"a/", "a/l->x", "a/s/", "a/s/y=Y", "a/x=X"}},
		"all": {step: Step{Src: []string{"."}, Dst: "/"},
			want: []string{"d/", "d/l->x", "d/s/", "d/s/y=Y", "d/x=X", "e/", "e/z=Z", "f=1"}},
		"a directory without a name": {step: Step{Src: []string{"e"}, Dst: "/a/"}, want: []string{"a/", "a/z=Z"}},
		"several":                    {step: Step{Src: []string{"f", "d/x"}, Dst: "/a/"}, want: []string{"a/", "a/f=1", "a/x=X"}},
		"a pattern":                  {step: Step{Src: []string{"d/*"}, Dst: "/a/"}, want: []string{"a/", "a/l->x", "a/x=X", "a/y=Y"}},
		"a pattern of E2B": {step: Step{Src: []string{"d/*"}, Dst: "/a/"}, e2b: true,
			want: []string{"a/", "a/l->x", "a/s/", "a/s/y=Y", "a/x=X"}},
		"a pattern of a name": {step: Step{Src: []string{"e/z*"}, Dst: "/a"}, e2b: true, want: []string{"a/", "a/z=Z"}},
		"dots in front":       {step: Step{Src: []string{"./d/s"}, Dst: "/a"}, want: []string{"a/", "a/y=Y"}},
		"a link":              {step: Step{Src: []string{"d/l"}, Dst: "/a"}, e2b: true, want: []string{"a->x"}},
		"nothing":             {step: Step{Src: []string{"none"}, Dst: "/a"}, err: "nothing matches none"},
		"below a link that the archive has, as E2B's JavaScript writes": {step: Step{Src: []string{"app"}, Dst: "/a"}, e2b: true,
			files: []string{"app/", "app/sub/", "app/sub/b=B", "app/dlink->sub", "app/dlink/b=B"},
			want:  []string{"a/", "a/dlink->sub", "a/sub/", "a/sub/b=B"}},
		"below a link out of the archive": {step: Step{Src: []string{"app"}, Dst: "/a"}, e2b: true,
			files: []string{"app/", "app/out->/etc", "app/out/b=B"}, want: []string{"a/", "a/out->/etc"}},
		"a name that leads out": {step: Step{Src: []string{"."}, Dst: "/a"}, files: []string{"x/../../y=1"}, err: "leads out of it"},
		"an absolute name":      {step: Step{Src: []string{"."}, Dst: "/a"}, files: []string{"/y=1"}, err: "leads out of it"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			if c.files == nil {
				c.files = files
			}
			c.step.Kind, c.step.Files = Copy, r.upload(c.files...)
			x := &box{boxes: r.boxes, root: t.TempDir()}
			for _, dir := range c.have {
				if err := os.MkdirAll(filepath.Join(x.root, dir), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			j := &job{e: r.Engine, ctx: t.Context(), spec: Spec{Project: "p", E2B: c.e2b}}
			err := j.copy(x, &planned{Step: c.step, before: &state{workdir: "/w"}})
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				return
			}
			if d := cmp.Diff(c.want, tree(t, x.root)); err != nil || d != "" {
				t.Errorf("%v %s", err, d)
			}
		})
	}
}

// TestCopyOwners: who owns what a COPY makes, and with which mode.
func TestCopyOwners(t *testing.T) {
	for name, c := range map[string]struct {
		step Step
		e2b  bool
		user string
		uid  int
		gid  int
		mode int64
	}{
		"Docker's is root's":   {Step{}, false, "app", 0, 0, 0o640},
		"by name":              {Step{Owner: "app"}, false, "", 7, 8, 0o640},
		"by names":             {Step{Owner: "app:staff"}, false, "", 7, 50, 0o640},
		"by number":            {Step{Owner: "12"}, false, "", 12, 12, 0o640},
		"by numbers":           {Step{Owner: "12:13", Mode: "4755"}, false, "", 12, 13, 0o4755},
		"of an archive of ADD": {Step{Extract: true}, false, "", 501, 502, 0o640},
		"E2B's is the user's":  {Step{}, true, "app", 7, 8, 0o640},
		"E2B's by name":        {Step{Owner: "root", Mode: "0700"}, true, "app", 0, 0, 0o700},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			id, err := r.boxes.Create(t.Context(), Request{})
			if err != nil {
				t.Fatal(err)
			}
			defer r.boxes.Destroy(t.Context(), id)
			x := r.boxes.box(id)
			c.step.Kind, c.step.Files, c.step.Src, c.step.Dst = Copy, r.upload("f=1"), []string{"f"}, "/a/f"
			j := &job{e: r.Engine, ctx: t.Context(), spec: Spec{Project: "p", E2B: c.e2b}}
			if err := j.copy(x, &planned{Step: c.step, before: &state{user: c.user}}); err != nil {
				t.Fatal(err)
			}
			h := x.sent[len(x.sent)-1]
			if h.Name != "a/f" || h.Uid != c.uid || h.Gid != c.gid || h.Mode != c.mode {
				t.Errorf("%s of %d:%d with %o, want %d:%d with %o", h.Name, h.Uid, h.Gid, h.Mode, c.uid, c.gid, c.mode)
			}
		})
	}
}
