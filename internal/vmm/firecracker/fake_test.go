package firecracker

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/testenv"
)

// What a driver is told by the fake is worth as much as the fake is strict. It
// differs from Firecracker 1.12.1 in two of these calls: that takes odd numbers of
// vCPUs as long as it is asked for no hyperthreads, and makes an absent tap if it
// is root.
func TestFakeIsStrict(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"kernel": "\x7fELF", "text": "no kernel", "d0": "disk", "d1": "disk"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const (
		machine  = `PUT /machine-config {"vcpu_count":1,"mem_size_mib":8}`
		kernel   = `PUT /boot-source {"kernel_image_path":"DIR/kernel","boot_args":"quiet"}`
		disk     = `PUT /drives/vda {"drive_id":"vda","path_on_host":"DIR/d0","is_root_device":false,"is_read_only":false}`
		random   = `PUT /entropy {}`
		instance = `PUT /actions {"action_type":"InstanceStart"}`
		pause    = `PATCH /vm {"state":"Paused"}`
		resume   = `PATCH /vm {"state":"Resumed"}`
		write    = `PUT /snapshot/create {"snapshot_type":"Full","snapshot_path":"DIR/state","mem_file_path":"DIR/mem"}`
		read     = `PUT /snapshot/load {"snapshot_path":"DIR/state","mem_backend":{"backend_type":"File","backend_path":"DIR/mem"},"resume_vm":false}`
	)
	up := []string{machine, kernel, disk, random, instance}
	after := func(calls []string, more ...string) []string { return append(calls[:len(calls):len(calls)], more...) }
	cfg := install(t, fakeSettings{}, false)
	for _, c := range []struct {
		name  string
		calls []string // all but the last one are taken
		taken bool
	}{
		// First of all, for the snapshot is what later cases load.
		{"write a snapshot", after(up, pause, write), true},
		{"write it again", after(up, pause, write, write), true},
		{"load it", []string{read}, true},
		{"load and run", []string{read, resume}, true},
		{"pause twice", after(up, pause, pause), true},
		{"resume what runs", after(up, resume), true},
		{"machine twice", []string{machine, machine}, true},

		{"no such path", []string{`PUT /nothing {}`}, false},
		{"no such method", []string{`PATCH /boot-source {}`}, false},
		{"delete", []string{`DELETE /vm {}`}, false},
		{"no body", []string{`PUT /machine-config `}, false},
		{"not json", []string{`PUT /machine-config {`}, false},
		{"unknown field of the machine", []string{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":8,"x":1}`}, false},
		{"unknown field of the boot source", []string{`PUT /boot-source {"kernel_image_path":"DIR/kernel","x":1}`}, false},
		{"unknown field of a drive", []string{`PUT /drives/vda {"drive_id":"vda","path_on_host":"DIR/d0","is_root_device":false,"x":1}`}, false},
		{"unknown field of a network", []string{`PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"lo","x":1}`}, false},
		{"unknown field of entropy", []string{`PUT /entropy {"x":1}`}, false},
		{"unknown field of an action", []string{machine, kernel, `PUT /actions {"action_type":"InstanceStart","x":1}`}, false},
		{"unknown field of a load", []string{`PUT /snapshot/load {"snapshot_path":"DIR/state","mem_backend":{"backend_type":"File","backend_path":"DIR/mem"},"x":1}`}, false},
		{"unknown field of a write", after(up, pause, `PUT /snapshot/create {"snapshot_path":"DIR/s","mem_file_path":"DIR/m","x":1}`), false},
		{"unknown action", []string{machine, kernel, `PUT /actions {"action_type":"Explode"}`}, false},
		{"unknown state", after(up, `PATCH /vm {"state":"Off"}`), false},
		{"no vCPUs", []string{`PUT /machine-config {"vcpu_count":0,"mem_size_mib":8}`}, false},
		{"three vCPUs", []string{`PUT /machine-config {"vcpu_count":3,"mem_size_mib":8}`}, false},
		{"too many vCPUs", []string{`PUT /machine-config {"vcpu_count":33,"mem_size_mib":8}`}, false},
		{"no memory", []string{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":0}`}, false},
		{"memory not named", []string{`PUT /machine-config {"vcpu_count":1}`}, false},
		{"absent kernel", []string{`PUT /boot-source {"kernel_image_path":"DIR/absent"}`}, false},
		{"absent initrd", []string{`PUT /boot-source {"kernel_image_path":"DIR/kernel","initrd_path":"DIR/absent"}`}, false},
		{"absent disk", []string{`PUT /drives/vda {"drive_id":"vda","path_on_host":"DIR/absent","is_root_device":false}`}, false},
		{"another drive's path", []string{`PUT /drives/vdb {"drive_id":"vda","path_on_host":"DIR/d0","is_root_device":false}`}, false},
		{"drive of unknown kind", []string{`PUT /drives/vda {"drive_id":"vda","path_on_host":"DIR/d0"}`}, false},
		{"two root devices", []string{
			`PUT /drives/vda {"drive_id":"vda","path_on_host":"DIR/d0","is_root_device":true}`,
			`PUT /drives/vdb {"drive_id":"vdb","path_on_host":"DIR/d1","is_root_device":true}`,
		}, false},
		{"bad MAC", []string{`PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"zz"}`}, false},
		{"absent tap", []string{`PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"absent0"}`}, false},
		{"no tap", []string{`PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"lo"}`}, false},
		{"start without a kernel", []string{machine, instance}, false},
		{"start with no kernel", []string{machine, `PUT /boot-source {"kernel_image_path":"DIR/text"}`, instance}, false},
		{"start twice", after(up, instance), false},
		{"machine after the start", after(up, machine), false},
		{"kernel after the start", after(up, kernel), false},
		{"disk after the start", after(up, disk), false},
		{"entropy after the start", after(up, random), false},
		{"pause before the start", []string{pause}, false},
		{"resume before the start", []string{resume}, false},
		{"write before the start", []string{write}, false},
		{"write while it runs", after(up, write), false},
		{"write differences", after(up, pause, `PUT /snapshot/create {"snapshot_type":"Diff","snapshot_path":"DIR/s","mem_file_path":"DIR/m"}`), false},
		{"load after configuration", []string{machine, read}, false},
		{"load after the start", after(up, read), false},
		{"load twice", []string{read, read}, false},
		{"configure after a load", []string{read, machine}, false},
		{"load nothing", []string{`PUT /snapshot/load {"snapshot_path":"DIR/absent","mem_backend":{"backend_type":"File","backend_path":"DIR/mem"}}`}, false},
		{"load no memory", []string{`PUT /snapshot/load {"snapshot_path":"DIR/state"}`}, false},
		{"load another's memory", []string{`PUT /snapshot/load {"snapshot_path":"DIR/state","mem_backend":{"backend_type":"File","backend_path":"DIR/d0"}}`}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			call := direct(t, cfg.Binary, filepath.Join(t.TempDir(), "sock"))
			for i, text := range c.calls {
				status, answer := call(strings.ReplaceAll(text, "DIR", dir))
				want := http.StatusNoContent
				if i == len(c.calls)-1 && !c.taken {
					want = http.StatusBadRequest
				}
				if status != want || want == http.StatusBadRequest && !strings.Contains(answer, "fault_message") {
					t.Fatalf("%s: %d %s, want %d", text, status, answer, want)
				}
			}
		})
	}
}

// direct starts a fake without a driver and returns what makes calls to it.
func direct(t *testing.T, binary, socket string) func(text string) (status int, answer string) {
	t.Helper()
	cmd := exec.Command(binary, "--id", "vm-1", "--api-sock", socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	web := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the fake does not come up")
		}
	}
	return func(text string) (int, string) {
		t.Helper()
		part := strings.SplitN(text, " ", 3)
		req, err := http.NewRequestWithContext(t.Context(), part[0], "http://localhost"+part[1], bytes.NewReader([]byte(part[2])))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := web.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(answer)
	}
}

// The two programs refuse to start as the real ones do.
func TestFakesRefuseToStart(t *testing.T) {
	testenv.Root(t)
	cfg := install(t, fakeSettings{}, true)
	dir := t.TempDir()
	taken := filepath.Join(dir, "taken")
	l, err := net.Listen("unix", taken)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	jail := func(change ...string) []string {
		o := map[string]string{"--id": "vm-1", "--exec-file": cfg.Binary, "--uid": strconv.Itoa(uid), "--gid": strconv.Itoa(gid), "--chroot-base-dir": dir}
		for i := 0; i < len(change); i += 2 {
			o[change[i]] = change[i+1]
		}
		args := []string{cfg.Jailer}
		for name, value := range o {
			args = append(args, name, value)
		}
		return append(args, "--", "--no-such-flag", "x") // it comes to nothing in any case
	}
	for name, c := range map[string]struct {
		args []string
		word string
	}{
		"socket is there":    {[]string{cfg.Binary, "--id", "vm-1", "--api-sock", taken}, "Failed to open the API socket"},
		"bad id":             {[]string{cfg.Binary, "--id", "vm_1", "--api-sock", dir + "/s"}, "Invalid instance ID"},
		"no id":              {[]string{cfg.Binary, "--api-sock", dir + "/s"}, "Invalid instance ID"},
		"unknown flag":       {[]string{cfg.Binary, "--id", "vm-1", "--api-sock", dir + "/s", "--what", "x"}, "'--what' which wasn't expected"},
		"no filter":          {[]string{cfg.Binary, "--id", "vm-1", "--api-sock", dir + "/s", "--no-seccomp"}, "'--no-seccomp' which wasn't expected"},
		"flag twice":         {[]string{cfg.Binary, "--id", "vm-1", "--id", "vm-2", "--api-sock", dir + "/s"}, "more than once"},
		"jail: bad id":       {jail("--id", "vm/1"), "Invalid instance ID"},
		"jail: no program":   {jail("--exec-file", "/nonexistent/firecracker"), "canonicalize exec-file"},
		"jail: other name":   {jail("--exec-file", "/bin/sh"), "must contain 'firecracker'"},
		"jail: bad uid":      {jail("--uid", "root"), "parse uid"},
		"jail: no base":      {jail("--chroot-base-dir", "/nonexistent"), "canonicalize chroot-base-dir"},
		"jail: unknown flag": {jail("--what", "x"), "'--what' which wasn't expected"},
	} {
		out, err := exec.Command(c.args[0], c.args[1:]...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.word) {
			t.Errorf("%s: %v, %s, want %q", name, err, out, c.word)
		}
	}
}
