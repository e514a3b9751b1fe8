package e2e_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/api/process/processconnect"
	"git.omukk.dev/wrenn/sandbox/internal/guest"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const (
	manyExecs = 100
	bigFile   = 64 << 20
	manyFiles = 10_000
	smallFile = 1 << 10
	// maxBig bounds how often the operations that take seconds are repeated.
	maxBig = 5
)

// way is one of the two to a sandbox's envd: through the agent, or directly.
type way struct {
	base   string
	header http.Header
	http   *http.Client
}

func (b *sandbox) ways() (agent, direct *way) {
	b.t.Helper()
	newWay := func(base string) *way {
		t := &http.Transport{MaxIdleConnsPerHost: manyExecs, DisableCompression: true}
		b.t.Cleanup(t.CloseIdleConnections)
		w := &way{base, http.Header{}, &http.Client{Transport: t, CheckRedirect: guest.NoRedirect}}
		b.address(w.header)
		return w
	}
	return newWay(b.a.url), newWay(fmt.Sprintf("http://%s:%d", b.record().HostIP, guestapi.Port))
}

// run runs true to its end.
func (w *way) run(ctx context.Context) error {
	req := connect.NewRequest(&process.StartRequest{Process: &process.ProcessConfig{Cmd: "true"}, Stdin: new(bool)})
	for k, v := range w.header {
		req.Header()[k] = v
	}
	stream, err := processconnect.NewProcessClient(w.http, w.base).Start(ctx, req)
	if err != nil {
		return err
	}
	defer stream.Close()
	ended := false
	for stream.Receive() {
		if end := stream.Msg().GetEvent().GetEnd(); end != nil {
			if ended = true; end.ExitCode != 0 {
				return fmt.Errorf("true: %v", end)
			}
		}
	}
	if err := stream.Err(); err != nil || !ended {
		return fmt.Errorf("the command's end: %v, %v", ended, err)
	}
	return nil
}

// runMany runs true so many times at once.
func (w *way) runMany(ctx context.Context, n int) error {
	failed := make(chan error, n)
	for range n {
		go func() { failed <- w.run(ctx) }()
	}
	var err error
	for range n {
		if e := <-failed; e != nil {
			err = e
		}
	}
	return err
}

// file writes (POST) or reads (GET) a file of the guest; content is what is
// written, and the number of bytes that are to be read.
func (w *way) file(ctx context.Context, method, path string, content []byte) error {
	var body io.Reader
	if method == http.MethodPost {
		body = bytes.NewReader(content)
	}
	req, err := http.NewRequestWithContext(ctx, method, w.base+"/files?path="+path, body)
	if err != nil {
		return err
	}
	for k, v := range w.header {
		req.Header[k] = v
	}
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/octet-stream")
	}
	resp, err := w.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || method == http.MethodGet && n != int64(len(content)) {
		return fmt.Errorf("%s %s: HTTP %d, %d bytes, %v", method, path, resp.StatusCode, n, err)
	}
	return nil
}

// floorPort is where floorServer listens in the guest.
const floorPort = 8127

// floorServer is the least that can be at the other end of a connection: it
// takes bytes, sends bytes, or unpacks what it gets.
const floorServer = `
import os, socket, subprocess
l = socket.socket(); l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
l.bind(("0.0.0.0", 8127)); l.listen()
data = bytearray(1 << 18)
while True:
    c, _ = l.accept()
    what = c.recv(1)
    if what == b"u":
        while c.recv_into(data): pass
        c.sendall(b"k")
    elif what == b"f":
        with open("/root/floor.bin", "wb", 0) as f:
            while n := c.recv_into(data): f.write(memoryview(data)[:n])
        c.sendall(b"k")
    elif what == b"d":
        for _ in range((64 << 20) // len(data)): c.sendall(data)
    elif what == b"x":
        subprocess.run(["tar", "-x", "-o", "-f", "-", "-C", "/root/floor"], stdin=c)
        c.sendall(b"k")
    c.close()
`

// raw sends content over a connection of its own to the floor's server, and
// returns when that has sent want bytes back.
func (b *sandbox) raw(ip, what string, content io.WriterTo, want int64) error {
	conn, err := net.Dial("tcp", net.JoinHostPort(ip, fmt.Sprint(floorPort)))
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, what); err != nil {
		return err
	}
	if content != nil {
		if _, err := content.WriteTo(conn); err != nil {
			return err
		}
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			return err
		}
	}
	if n, err := io.Copy(io.Discard, conn); err != nil || n != want {
		return fmt.Errorf("%d bytes came back, want %d: %v", n, want, err)
	}
	return nil
}

// tarOf is a directory as an archive.
type tarOf string

func (dir tarOf) WriteTo(w io.Writer) (int64, error) {
	buffered := bufio.NewWriterSize(w, 256<<10)
	archive := tar.NewWriter(buffered)
	if err := archive.AddFS(os.DirFS(string(dir))); err != nil {
		return 0, err
	}
	if err := archive.Close(); err != nil {
		return 0, err
	}
	return 0, buffered.Flush()
}

// BenchmarkDataPlane times what passes through the agent to a guest beside the
// same without the agent, and beside a connection with nothing on it.
func BenchmarkDataPlane(b *testing.B) {
	a := benchAgent(b)
	box := a.create(b, nil)
	agent, direct := box.ways()
	ip := box.record().HostIP
	ctx := b.Context()
	content := make([]byte, bigFile)
	r := rand.NewChaCha8([32]byte{})
	_, _ = r.Read(content)

	b.Run("Exec", func(b *testing.B) {
		s := row("exec true, data plane", "the same, directly to envd")
		s.goal = 1.15
		repeat(b, 200, time.Minute, func() {
			timed(b, &s.agent, func() error { return agent.run(ctx) })
			timed(b, &s.floor, func() error { return direct.run(ctx) })
		})
		s.report(b)
	})
	b.Run("ParallelExecs", func(b *testing.B) {
		s := row(fmt.Sprintf("%d execs at once", manyExecs), "the same, directly to envd")
		repeat(b, maxBig, time.Minute, func() {
			timed(b, &s.agent, func() error { return agent.runMany(ctx, manyExecs) })
			timed(b, &s.floor, func() error { return direct.runMany(ctx, manyExecs) })
		})
		s.report(b)
		b.ReportMetric(millis(percentile(s.agent, 50))/manyExecs, "agent-ms/exec")
	})

	if err := direct.file(ctx, http.MethodPost, "/root/floor.py", []byte(floorServer)); err != nil {
		b.Fatal(err)
	}
	box.sh("nohup python3 /root/floor.py >/root/floor.log 2>&1 &")
	waitFor(b, "the floor's server", func() bool { return box.raw(ip, "-", nil, 0) == nil })
	b.Run("Upload", func(b *testing.B) {
		wire, disk, envd := row("upload 64 MiB", "raw TCP, dropped"), row("upload 64 MiB", "raw TCP, to a file"),
			row("upload 64 MiB", "POST /files to envd")
		wire.goal = 1 / 0.9
		for _, s := range []*samples{wire, disk, envd} {
			s.bytes = bigFile
		}
		repeat(b, maxBig, time.Minute, func() {
			timed(b, &wire.agent, func() error { return agent.file(ctx, http.MethodPost, "/root/big", content) })
			timed(b, &wire.floor, func() error { return box.raw(ip, "u", bytes.NewReader(content), 1) })
			timed(b, &disk.floor, func() error { return box.raw(ip, "f", bytes.NewReader(content), 1) })
			timed(b, &envd.floor, func() error { return direct.file(ctx, http.MethodPost, "/root/big", content) })
		})
		disk.goal = wire.goal
		disk.agent, envd.agent = wire.agent, wire.agent
		wire.report(b)
	})
	b.Run("Download", func(b *testing.B) {
		wire, envd := row("download 64 MiB", "raw TCP"), row("download 64 MiB", "GET /files of envd")
		wire.goal = 1 / 0.9
		wire.bytes, envd.bytes = bigFile, bigFile
		repeat(b, maxBig, time.Minute, func() {
			timed(b, &wire.agent, func() error { return agent.file(ctx, http.MethodGet, "/root/big", content) })
			timed(b, &wire.floor, func() error { return box.raw(ip, "d", nil, bigFile) })
			timed(b, &envd.floor, func() error { return direct.file(ctx, http.MethodGet, "/root/big", content) })
		})
		envd.agent = wire.agent
		wire.report(b)
	})
	box.sh("rm -f /root/big /root/floor.bin")
	b.Run("SmallFiles", func(b *testing.B) {
		dir := b.TempDir()
		for i := range manyFiles {
			name := filepath.Join(dir, fmt.Sprintf("%02d", i%100), fmt.Sprintf("%04d", i))
			if i < 100 {
				if err := os.Mkdir(filepath.Dir(name), 0o755); err != nil {
					b.Fatal(err)
				}
			}
			if err := os.WriteFile(name, content[i*smallFile:][:smallFile], 0o644); err != nil {
				b.Fatal(err)
			}
		}
		s := row(fmt.Sprintf("wrenn cp of %d files of 1 KiB", manyFiles), "tar over raw TCP to tar -x")
		repeat(b, 1, time.Minute, func() {
			timed(b, &s.agent, func() error {
				cmd := exec.Command(filepath.Join(a.bin, "wrenn"), "cp", dir, box.id+":/root/many")
				cmd.Env = append(os.Environ(), "WRENN_HOST="+a.url)
				if out, err := cmd.CombinedOutput(); err != nil {
					return fmt.Errorf("wrenn cp: %w: %s", err, out)
				}
				return nil
			})
			box.sh("mkdir -p /root/floor")
			timed(b, &s.floor, func() error { return box.raw(ip, "x", tarOf(dir), 1) })
			for _, there := range []string{"many", "floor"} {
				if n := box.sh("find /root/" + there + " -type f -size -2k | wc -l"); n != fmt.Sprint(manyFiles) {
					b.Fatalf("%s of %d files are in %s: %s", n, manyFiles, there, box.sh("cat /root/floor.log"))
				}
			}
			box.sh("rm -r /root/many /root/floor")
		})
		s.report(b)
	})
	if log := box.sh("cat /root/floor.log"); strings.TrimSpace(log) != "" {
		b.Errorf("the floor's server: %s", log)
	}
}
