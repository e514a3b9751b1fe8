package envd

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
	"git.omukk.dev/wrenn/sandbox/api/filesystem/filesystemconnect"
)

func filesystemClient(url string) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(http.DefaultClient, url)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestResolvePath(t *testing.T) {
	as := account{home: "/home/u"}
	s := New(Config{Log: quiet()})
	defer s.Close()
	for _, tt := range []struct{ workdir, path, want string }{
		{"", "", "/home/u"},
		{"/work", "", "/work"},
		{"/work", "a/b", "/home/u/a/b"},
		{"", "~", "/home/u"},
		{"", "~/x", "/home/u/x"},
		{"", "/a/../b/", "/b"},
		{"", "../../../etc", "/etc"},
		{"", "~other/x", ""},
		{"", "a\x00b", ""},
	} {
		s.state.workdir = tt.workdir
		got, err := s.resolvePath(tt.path, as)
		if (err != nil) != (tt.want == "") || got != tt.want {
			t.Errorf("%q in %q: %q, %v; want %q", tt.path, tt.workdir, got, err, tt.want)
		}
	}
}

func FuzzResolvePath(f *testing.F) {
	for _, path := range []string{"", "~", "~/x", "../..", "/a//b/.", "a\x00", "~~", "\xff"} {
		f.Add(path)
	}
	s := New(Config{Log: quiet()})
	defer s.Close()
	f.Fuzz(func(t *testing.T, path string) {
		got, err := s.resolvePath(path, account{home: "/home/u"})
		if err != nil {
			return
		}
		if !filepath.IsAbs(got) || filepath.Clean(got) != got || strings.Contains(got, "\x00") {
			t.Errorf("%q leads to %q", path, got)
		}
	})
}

func TestStat(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	write(t, dir+"/file", "hello")
	if err := os.Chmod(dir+"/file", 0o640); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"link": "file", "dirlink": ".", "dangling": "nowhere", "loop": "loop"} {
		if err := os.Symlink(target, dir+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	_ = writeMetadata(dir+"/file", map[string]string{"kind": "greeting"})

	stat := func(name string) (*filesystem.EntryInfo, error) {
		resp, err := c.Stat(t.Context(), connect.NewRequest(&filesystem.StatRequest{Path: filepath.Join(dir, name)}))
		if err != nil {
			return nil, err
		}
		return resp.Msg.GetEntry(), nil
	}
	e, err := stat("file")
	if err != nil {
		t.Fatal(err)
	}
	if e.Name != "file" || e.Path != dir+"/file" || e.Size != 5 || e.Mode != 0o640 || e.Permissions != "-rw-r-----" ||
		e.Type != filesystem.FileType_FILE_TYPE_FILE || e.Owner != "root" && os.Getuid() == 0 || e.Group == "" ||
		time.Since(e.ModifiedTime.AsTime()) > time.Minute || e.SymlinkTarget != nil {
		t.Errorf("file: %v", e)
	}
	if len(attributes(dir+"/file")) > 0 && e.Metadata["kind"] != "greeting" {
		t.Errorf("metadata: %v", e.Metadata)
	}
	if e, err = stat("link"); err != nil || e.Type != filesystem.FileType_FILE_TYPE_FILE || e.GetSymlinkTarget() != dir+"/file" ||
		e.Mode != 0o640 || !strings.HasPrefix(e.Permissions, "L") {
		t.Errorf("link: %v, %v", e, err)
	}
	if e, err = stat("dirlink"); err != nil || e.Type != filesystem.FileType_FILE_TYPE_DIRECTORY {
		t.Errorf("link to a directory: %v, %v", e, err)
	}
	if e, err = stat("dangling"); err != nil || e.Type != filesystem.FileType_FILE_TYPE_SYMLINK || e.GetSymlinkTarget() != "nowhere" {
		t.Errorf("dangling link: %v, %v", e, err)
	}
	for name, code := range map[string]connect.Code{
		"missing": connect.CodeNotFound, "file/below": connect.CodeInvalidArgument, "loop/x": connect.CodeFailedPrecondition,
	} {
		if _, err := stat(name); connect.CodeOf(err) != code {
			t.Errorf("%s: %v, want %v", name, err, code)
		}
	}
}

func TestMakeDir(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	write(t, dir+"/file", "")
	makeDir := func(path, user string) (*filesystem.EntryInfo, error) {
		req := connect.NewRequest(&filesystem.MakeDirRequest{Path: path})
		if user != "" {
			req.Header().Set("Authorization", basic(user))
		}
		resp, err := c.MakeDir(t.Context(), req)
		if err != nil {
			return nil, err
		}
		return resp.Msg.GetEntry(), nil
	}
	user := ""
	if os.Getuid() == 0 {
		user = "nobody"
	}
	e, err := makeDir(dir+"/a/b/c", user)
	if err != nil || e.Name != "c" || e.Type != filesystem.FileType_FILE_TYPE_DIRECTORY || user != "" && e.Owner != user {
		t.Errorf("%v, %v", e, err)
	}
	if e, err := (&describer{accounts: accounts{"/etc"}}).entry(dir + "/a"); err != nil || user != "" && e.Owner != user {
		t.Errorf("the parent: %v, %v", e, err)
	}
	for path, code := range map[string]connect.Code{
		dir + "/a":    connect.CodeAlreadyExists,
		dir + "/file": connect.CodeInvalidArgument, dir + "/file/x": connect.CodeInvalidArgument,
	} {
		if _, err := makeDir(path, ""); connect.CodeOf(err) != code {
			t.Errorf("%s: %v, want %v", path, err, code)
		}
	}
	if _, err := makeDir(dir+"/x", "no-such-user"); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("unknown user: %v", err)
	}
}

func TestMoveAndRemove(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	write(t, dir+"/one", "1")
	move := func(from, to string) error {
		resp, err := c.Move(t.Context(), connect.NewRequest(&filesystem.MoveRequest{Source: from, Destination: to}))
		if err == nil && resp.Msg.GetEntry().GetPath() != to {
			t.Errorf("entry: %v", resp.Msg.GetEntry())
		}
		return err
	}
	if err := move(dir+"/one", dir+"/new/two"); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(dir + "/new/two"); err != nil || string(text) != "1" {
		t.Error(string(text), err)
	}
	if err := move(dir+"/one", dir+"/three"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("missing: %v", err)
	}
	for range 2 { // what is gone is removed
		if _, err := c.Remove(t.Context(), connect.NewRequest(&filesystem.RemoveRequest{Path: dir + "/new"})); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(dir + "/new"); !os.IsNotExist(err) {
		t.Error(err)
	}
	if _, err := c.Remove(t.Context(), connect.NewRequest(&filesystem.RemoveRequest{Path: "/x/.."})); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("remove /: %v", err)
	}
}

func TestMoveAcrossFileSystems(t *testing.T) {
	other, err := os.MkdirTemp("/dev/shm", "envd-test")
	if err != nil {
		t.Skip(err)
	}
	defer os.RemoveAll(other)
	dir := t.TempDir()
	write(t, dir+"/tree/sub/file", "text")
	if err := os.Chmod(dir+"/tree/sub", 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("sub/file", dir+"/tree/link"); err != nil {
		t.Fatal(err)
	}
	if err := move(dir+"/tree", other+"/tree"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(other + "/tree/link")
	info, _ := os.Stat(other + "/tree/sub")
	if err != nil || string(text) != "text" || info.Mode().Perm() != 0o750 {
		t.Errorf("%q, %v, %v", text, err, info.Mode())
	}
	if _, err := os.Lstat(dir + "/tree"); !os.IsNotExist(err) {
		t.Errorf("the source: %v", err)
	}
}

func TestListDir(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	write(t, dir+"/b/c/d/e", "")
	write(t, dir+"/b.txt", "")
	write(t, dir+"/a", "")
	for name, target := range map[string]string{"z": "b", "root": ".", "loop": "loop"} {
		if err := os.Symlink(target, dir+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	list := func(path string, depth uint32) (paths []string, err error) {
		resp, err := c.ListDir(t.Context(), connect.NewRequest(&filesystem.ListDirRequest{Path: path, Depth: depth}))
		if err != nil {
			return nil, err
		}
		for _, e := range resp.Msg.GetEntries() {
			paths = append(paths, strings.TrimPrefix(e.Path, dir+"/"))
		}
		return paths, nil
	}
	for _, tt := range []struct {
		path  string
		depth uint32
		want  []string
	}{
		{"", 0, []string{"a", "b", "b.txt", "loop", "root", "z"}},
		{"", 1, []string{"a", "b", "b.txt", "loop", "root", "z"}},
		{"", 2, []string{"a", "b", "b/c", "b.txt", "loop", "root", "z"}},
		{"", 1 << 31, []string{"a", "b", "b/c", "b/c/d", "b/c/d/e", "b.txt", "loop", "root", "z"}},
		{"/z", 2, []string{"z/c", "z/c/d"}},
	} {
		if got, err := list(dir+tt.path, tt.depth); err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%s, %d: %v, %v; want %v", tt.path, tt.depth, got, err, tt.want)
		}
	}
	for path, code := range map[string]connect.Code{
		"/missing": connect.CodeNotFound, "/a": connect.CodeInvalidArgument, "/loop": connect.CodeFailedPrecondition,
	} {
		if _, err := list(dir+path, 1); connect.CodeOf(err) != code {
			t.Errorf("%s: %v, want %v", path, err, code)
		}
	}
}

// watched collects a stream's events until it has seen want.
func watched(t *testing.T, stream *connect.ServerStreamForClient[filesystem.WatchDirResponse], want string) []string {
	t.Helper()
	var got []string
	for !slices.Contains(got, want) {
		if !stream.Receive() {
			t.Fatalf("the stream ended (%v) after %q without %q", stream.Err(), got, want)
		}
		if e := stream.Msg().GetFilesystem(); e != nil {
			got = append(got, strings.ToLower(strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_"))+" "+e.GetName())
		}
	}
	return got
}

func watchDir(t *testing.T, c filesystemconnect.FilesystemClient, req *filesystem.WatchDirRequest) *connect.ServerStreamForClient[filesystem.WatchDirResponse] {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.WatchDir(ctx, connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); stream.Close() })
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatalf("the first event is %v, %v; want start", stream.Msg(), stream.Err())
	}
	return stream
}

// compact drops repetitions.
func compact(events []string) string { return strings.Join(slices.Compact(events), ", ") }

func TestWatchDir(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	write(t, dir+"/sub/unseen", "")
	stream := watchDir(t, c, &filesystem.WatchDirRequest{Path: dir})
	write(t, dir+"/sub/unseen", "x")
	write(t, dir+"/file", "x")
	if got := compact(watched(t, stream, "write file")); got != "create file, write file" {
		t.Error(got)
	}
	write(t, dir+"/file", "y")
	watched(t, stream, "write file")
	if err := os.Chmod(dir+"/file", 0o600); err != nil {
		t.Fatal(err)
	}
	watched(t, stream, "chmod file")
	if err := os.Rename(dir+"/file", dir+"/other"); err != nil {
		t.Fatal(err)
	}
	if got := compact(watched(t, stream, "create other")); !strings.HasSuffix(got, "rename file, create other") {
		t.Error(got)
	}
	if err := os.Remove(dir + "/other"); err != nil {
		t.Fatal(err)
	}
	watched(t, stream, "remove other")
}

func TestWatchDirRecursive(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	write(t, dir+"/old/deep/x", "")
	stream := watchDir(t, c, &filesystem.WatchDirRequest{Path: dir, Recursive: true})
	write(t, dir+"/old/deep/y", "text")
	watched(t, stream, "write old/deep/y")
	write(t, dir+"/new/deep/z", "text")
	got := watched(t, stream, "write new/deep/z")
	if i, j := slices.Index(got, "create new/deep/z"), slices.Index(got, "write new/deep/z"); i < 0 || j < i {
		t.Errorf("in a new directory: %v", got)
	}
	// A directory keeps being watched under its new name, and not after it
	// has left.
	if err := os.Rename(dir+"/new", dir+"/renamed"); err != nil {
		t.Fatal(err)
	}
	watched(t, stream, "create renamed")
	write(t, dir+"/renamed/deep/later", "")
	watched(t, stream, "create renamed/deep/later")
	away := t.TempDir() + "/away"
	if err := os.Rename(dir+"/renamed", away); err != nil {
		t.Fatal(err)
	}
	watched(t, stream, "rename renamed")
	write(t, away+"/deep/unseen", "")
	write(t, dir+"/end", "")
	if got := watched(t, stream, "create end"); slices.Contains(got, "create renamed/deep/unseen") {
		t.Errorf("after it has left: %v", got)
	}
}

// Files that are made in a directory as soon as it exists are reported once
// each, whether before or after it is watched.
func TestWatchDirLosesNothingInNewDirectories(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	stream := watchDir(t, c, &filesystem.WatchDirRequest{Path: dir, Recursive: true})
	const dirs, files = 40, 10
	go func() {
		for i := range dirs {
			for j := range files {
				path := fmt.Sprintf("%s/%d/sub/%d", dir, i, j)
				_ = os.MkdirAll(filepath.Dir(path), 0o755)
				_ = os.WriteFile(path, nil, 0o644)
			}
		}
		_ = os.WriteFile(dir+"/end", nil, 0o644)
	}()
	seen := map[string]int{}
	for _, event := range watched(t, stream, "create end") {
		seen[event]++
	}
	for i := range dirs {
		for j := range files {
			if n := seen[fmt.Sprintf("create %d/sub/%d", i, j)]; n != 1 {
				t.Errorf("%d/sub/%d was reported %d times", i, j, n)
			}
		}
	}
}

func TestWatchDirEntries(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	stream := watchDir(t, c, &filesystem.WatchDirRequest{Path: dir, IncludeEntry: true})
	write(t, dir+"/file", "text")
	watched(t, stream, "write file")
	if e := stream.Msg().GetFilesystem().GetEntry(); e.GetPath() != dir+"/file" || e.GetSize() != 4 {
		t.Errorf("entry: %v", e)
	}
	if err := os.Remove(dir + "/file"); err != nil {
		t.Fatal(err)
	}
	watched(t, stream, "remove file")
	if e := stream.Msg().GetFilesystem().GetEntry(); e != nil {
		t.Errorf("entry of a removed file: %v", e)
	}
}

func TestWatchRefused(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	file := t.TempDir() + "/file"
	write(t, file, "")
	for path, code := range map[string]connect.Code{file: connect.CodeInvalidArgument, file + "x": connect.CodeNotFound} {
		stream, err := c.WatchDir(t.Context(), connect.NewRequest(&filesystem.WatchDirRequest{Path: path}))
		if err == nil {
			stream.Receive()
			err = stream.Err()
			stream.Close()
		}
		if connect.CodeOf(err) != code {
			t.Errorf("watch %s: %v, want %v", path, err, code)
		}
		if _, err := c.CreateWatcher(t.Context(), connect.NewRequest(&filesystem.CreateWatcherRequest{Path: path})); connect.CodeOf(err) != code {
			t.Errorf("watcher of %s: %v, want %v", path, err, code)
		}
	}
}

func TestWatcher(t *testing.T) {
	_, url := serve(t, Config{})
	c := filesystemClient(url)
	dir := t.TempDir()
	resp, err := c.CreateWatcher(t.Context(), connect.NewRequest(&filesystem.CreateWatcherRequest{Path: dir}))
	if err != nil {
		t.Fatal(err)
	}
	id := resp.Msg.GetWatcherId()
	poll := func() ([]*filesystem.FilesystemEvent, error) {
		resp, err := c.GetWatcherEvents(t.Context(), connect.NewRequest(&filesystem.GetWatcherEventsRequest{WatcherId: id}))
		if err != nil {
			return nil, err
		}
		return resp.Msg.GetEvents(), nil
	}
	if events, err := poll(); err != nil || len(events) != 0 {
		t.Errorf("before anything happened: %v, %v", events, err)
	}
	write(t, dir+"/file", "text")
	var events []*filesystem.FilesystemEvent
	eventually(t, "events", func() bool {
		more, err := poll()
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, more...)
		return len(events) >= 2
	})
	if events[0].GetName() != "file" || events[0].GetType() != filesystem.EventType_EVENT_TYPE_CREATE || events[1].GetType() != filesystem.EventType_EVENT_TYPE_WRITE {
		t.Errorf("events: %v", events)
	}
	if _, err := c.RemoveWatcher(t.Context(), connect.NewRequest(&filesystem.RemoveWatcherRequest{WatcherId: id})); err != nil {
		t.Error(err)
	}
	if _, err := poll(); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("a removed watcher: %v", err)
	}
}

func TestWatcherSaysWhatItLost(t *testing.T) {
	p := &watcher{}
	p.events = make([]*filesystem.FilesystemEvent, 3)
	p.lost = true
	if events, err := p.take(); err != nil || len(events) != 3 {
		t.Errorf("first: %v, %v", events, err)
	}
	if _, err := p.take(); connect.CodeOf(err) != connect.CodeDataLoss {
		t.Errorf("then: %v", err)
	}
	if events, err := p.take(); err != nil || len(events) != 0 {
		t.Errorf("then: %v, %v", events, err)
	}
}
