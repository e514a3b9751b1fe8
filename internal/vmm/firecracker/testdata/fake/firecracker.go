package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

type machineConfig struct {
	VCPUs           *int    `json:"vcpu_count"`
	MemMiB          *int    `json:"mem_size_mib"`
	SMT             *bool   `json:"smt"`
	TrackDirtyPages *bool   `json:"track_dirty_pages"`
	HugePages       *string `json:"huge_pages"`
}

type bootSource struct {
	Kernel string `json:"kernel_image_path"`
	Initrd string `json:"initrd_path"`
	Args   string `json:"boot_args"`
}

type drive struct {
	ID          string          `json:"drive_id"`
	Path        string          `json:"path_on_host"`
	Root        *bool           `json:"is_root_device"`
	ReadOnly    bool            `json:"is_read_only"`
	PartUUID    string          `json:"partuuid"`
	CacheType   string          `json:"cache_type"`
	IOEngine    string          `json:"io_engine"`
	RateLimiter json.RawMessage `json:"rate_limiter"`
}

type network struct {
	ID  string          `json:"iface_id"`
	Tap string          `json:"host_dev_name"`
	MAC string          `json:"guest_mac"`
	Rx  json.RawMessage `json:"rx_rate_limiter"`
	Tx  json.RawMessage `json:"tx_rate_limiter"`
}

// config is the machine, as a snapshot's state has it in it.
type config struct {
	Version  string
	Machine  machineConfig
	Boot     bootSource
	Drives   []drive
	Networks []network
	Entropy  bool
}

// fake is the process.
type fake struct {
	set settings
	id  string

	mu         sync.Mutex // the real one serves one request at a time
	calls      int
	configured bool // what forbids to load a snapshot
	state      string
	config     config
	taps       map[string]*os.File
	doomed     bool // ends after the next answer
	exiting    bool // the guest is about to power off
}

func firecracker(set settings, args []string) {
	o, rest := options(args, "id api-sock level log-path start-time-us start-time-cpu-us parent-cpu-time-us")
	if rest != nil {
		die(153, "Arguments parsing error: extra arguments")
	}
	f := &fake{set: set, id: o["id"], state: "Not started", taps: map[string]*os.File{}}
	if !validID(f.id) {
		die(1, "Invalid instance ID: %q", f.id)
	}
	f.config.Version = set.Version
	if set.Fault == "die at once" {
		die(1, "Firecracker exits at once")
	}
	listener, err := net.Listen("unix", o["api-sock"])
	if err != nil {
		die(1, "RunWithApiError error: Failed to open the API socket at: %s. Check that it is not already used.", o["api-sock"])
	}
	die(1, "serve: %v", http.Serve(listener, f))
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w.Header().Set("Server", "Firecracker API")
	w.Header().Set("Content-Type", "application/json")
	if r.Method == http.MethodGet {
		f.get(w, r)
		return
	}
	f.calls++
	lost := false
	if f.calls == f.set.Call {
		switch f.set.Fault {
		case "die":
			die(1, "Firecracker panicked")
		case "hang":
			select {}
		case "400":
			refuse(w, errors.New("the fault that was asked for"))
			return
		case "500":
			w.WriteHeader(http.StatusInternalServerError)
			return
		case "close": // before it takes effect
			hangUp(w)
			return
		case "lost": // after it
			lost = true
		}
	}
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = f.do(r.Method, r.URL.Path, body)
	}
	switch {
	case lost:
		hangUp(w)
	case err != nil:
		refuse(w, err)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
	if f.doomed {
		exitSoon(w, 1)
	}
	if f.exiting {
		// As long as a guest needs to boot, at least.
		time.AfterFunc(200*time.Millisecond, func() { os.Exit(0) })
	}
}

func hangUp(w http.ResponseWriter) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		die(1, "hijack: %v", err)
	}
	conn.Close()
}

func exitSoon(w http.ResponseWriter, status int) {
	if f, ok := w.(http.Flusher); ok {
		f.Flush()
	}
	time.AfterFunc(20*time.Millisecond, func() { os.Exit(status) })
}

func refuse(w http.ResponseWriter, err error) {
	w.WriteHeader(http.StatusBadRequest)
	json.NewEncoder(w).Encode(map[string]string{"fault_message": err.Error()})
}

func (f *fake) get(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/":
		json.NewEncoder(w).Encode(map[string]string{"id": f.id, "state": f.state, "vmm_version": f.set.Version, "app_name": "Firecracker"})
	default:
		refuse(w, fmt.Errorf("Invalid request method and/or path: GET %s.", r.URL.Path))
	}
}

// decode is strict: a field that the API does not have is an error.
func decode(body []byte, into any) error {
	if len(body) == 0 {
		return errors.New("Empty PUT request.")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("An error occurred when deserializing the json body of a request: %v.", err)
	}
	if dec.More() {
		return errors.New("An error occurred when deserializing the json body of a request: trailing characters.")
	}
	return nil
}

func (f *fake) do(method, path string, body []byte) error {
	kind, id, nested := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	what := method + " " + kind
	if kind == "snapshot" {
		what, nested = what+"/"+id, false
	}
	if nested != (kind == "drives" || kind == "network-interfaces") || nested && (id == "" || strings.Contains(id, "/")) {
		return fmt.Errorf("Invalid request method and/or path: %s %s.", method, path)
	}
	before := func(g func() error) error {
		if f.state != "Not started" {
			return errors.New("The requested operation is not supported after starting the microVM.")
		}
		f.configured = true
		return g()
	}
	after := func(g func() error) error {
		if f.state == "Not started" {
			return errors.New("The requested operation is not supported before starting the microVM.")
		}
		return g()
	}
	switch what {
	case "PUT machine-config":
		return before(func() error { return f.putMachine(body) })
	case "PUT boot-source":
		return before(func() error { return f.putBoot(body) })
	case "PUT drives":
		return before(func() error { return f.putDrive(id, body) })
	case "PUT network-interfaces":
		return before(func() error { return f.putNetwork(id, body) })
	case "PUT entropy":
		return before(func() error { return f.putEntropy(body) })
	case "PUT actions":
		return f.act(body)
	case "PATCH vm":
		return after(func() error { return f.patchVM(body) })
	case "PUT snapshot/create":
		return after(func() error { return f.create(body) })
	case "PUT snapshot/load":
		return f.load(body)
	}
	return fmt.Errorf("Invalid request method and/or path: %s %s.", method, path)
}

func (f *fake) putMachine(body []byte) error {
	var m machineConfig
	if err := decode(body, &m); err != nil {
		return err
	}
	switch {
	case m.VCPUs == nil || m.MemMiB == nil:
		return errors.New("missing field `vcpu_count` or `mem_size_mib`")
	// The real one takes odd numbers as long as smt is false, and says otherwise.
	case *m.VCPUs < 1 || *m.VCPUs > 32 || *m.VCPUs > 1 && *m.VCPUs%2 != 0:
		return errors.New("The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled.")
	case *m.MemMiB < 1:
		return errors.New("The memory size (MiB) is invalid.")
	}
	f.config.Machine = m
	return nil
}

func (f *fake) putBoot(body []byte) error {
	var b bootSource
	if err := decode(body, &b); err != nil {
		return err
	}
	if err := readable(b.Kernel); err != nil {
		return fmt.Errorf("The kernel file cannot be opened: %v", err)
	}
	if b.Initrd != "" {
		if err := readable(b.Initrd); err != nil {
			return fmt.Errorf("The initrd file cannot be opened due to invalid path or invalid permissions. %v", err)
		}
	}
	if len(b.Args) > 2048 {
		return errors.New("The kernel command line is invalid: too large")
	}
	f.config.Boot = b
	return nil
}

func readable(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.Read(make([]byte, 1))
	return err
}

func (f *fake) putDrive(id string, body []byte) error {
	var d drive
	if err := decode(body, &d); err != nil {
		return err
	}
	switch {
	case d.ID != id:
		return errors.New("The id from the path does not match the id from the body!")
	case d.Root == nil:
		return errors.New("missing field `is_root_device`")
	case d.CacheType != "" && d.CacheType != "Unsafe" && d.CacheType != "Writeback":
		return errors.New("unknown variant of cache_type")
	case d.IOEngine != "" && d.IOEngine != "Sync" && d.IOEngine != "Async":
		return errors.New("unknown variant of io_engine")
	}
	if err := openDrive(d); err != nil {
		return err
	}
	drives := f.config.Drives[:0:0]
	for _, old := range f.config.Drives {
		if old.ID == id {
			continue
		}
		if *old.Root && *d.Root {
			return errors.New("A root block device already exists!")
		}
		drives = append(drives, old)
	}
	f.config.Drives = append(drives, d)
	return nil
}

func openDrive(d drive) error {
	flags := os.O_RDWR
	if d.ReadOnly {
		flags = os.O_RDONLY
	}
	file, err := os.OpenFile(d.Path, flags, 0)
	if err != nil {
		return fmt.Errorf("Unable to create the virtio block device: Error manipulating the backing file: %v", err)
	}
	return file.Close()
}

func (f *fake) putNetwork(id string, body []byte) error {
	var n network
	if err := decode(body, &n); err != nil {
		return err
	}
	if n.ID != id {
		return errors.New("The id from the path does not match the id from the body!")
	}
	if n.MAC != "" {
		if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 {
			return errors.New("An error occurred when deserializing the json body of a request: invalid MAC address")
		}
	}
	if err := f.openTap(n.Tap); err != nil {
		return err
	}
	f.config.Networks = append(f.config.Networks, n)
	return nil
}

// openTap attaches to the tap, as its owner or as root. The real one would make
// a tap that is not there, if it had the right to.
func (f *fake) openTap(name string) error {
	if f.taps[name] != nil {
		return fmt.Errorf("Could not create the network device: the tap %s is in use", name)
	}
	if _, err := net.InterfaceByName(name); err != nil {
		return fmt.Errorf("Could not create the network device: Open tap device failed: %v", err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("Could not create the network device: Couldn't open /dev/net/tun: %v", err)
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		unix.Close(fd)
		return fmt.Errorf("Could not create the network device: Open tap device failed: Error while creating ifreq structure: %v. Invalid TUN/TAP Backend provided by %s.", err, name)
	}
	f.taps[name] = os.NewFile(uintptr(fd), name)
	return nil
}

func (f *fake) putEntropy(body []byte) error {
	var e struct {
		RateLimiter json.RawMessage `json:"rate_limiter"`
	}
	if err := decode(body, &e); err != nil {
		return err
	}
	f.config.Entropy = true
	return nil
}

func (f *fake) act(body []byte) error {
	var a struct {
		Type string `json:"action_type"`
	}
	if err := decode(body, &a); err != nil {
		return err
	}
	if a.Type != "InstanceStart" {
		return fmt.Errorf("unknown variant `%s`", a.Type)
	}
	if f.state != "Not started" {
		return errors.New("The requested operation is not supported after starting the microVM.")
	}
	if f.config.Boot.Kernel == "" {
		return errors.New("Cannot start microvm without kernel configuration.")
	}
	magic := make([]byte, 4)
	kernel, err := os.Open(f.config.Boot.Kernel)
	if err == nil {
		_, err = io.ReadFull(kernel, magic)
		kernel.Close()
	}
	if err != nil || string(magic) != "\x7fELF" {
		return errors.New("Kernel Loader: failed to load ELF kernel image: Invalid Elf magic number")
	}
	if f.config.Machine.VCPUs == nil { // the defaults
		one, mem := 1, 128
		f.config.Machine.VCPUs, f.config.Machine.MemMiB = &one, &mem
	}
	f.state = "Running"
	fmt.Printf("[    0.000000] Command line: %s\n", f.config.Boot.Args)
	if strings.Contains(f.config.Boot.Args, "wrenn.probe=1") {
		fmt.Println("wrenn-probe-ok")
	}
	f.exiting = strings.Contains(f.config.Boot.Args, "fake.exit")
	return nil
}

func (f *fake) patchVM(body []byte) error {
	var v struct {
		State string `json:"state"`
	}
	if err := decode(body, &v); err != nil {
		return err
	}
	switch v.State {
	case "Paused":
		f.state = "Paused"
	case "Resumed":
		f.state = "Running"
		fmt.Println("[    1.000000] resumed")
	default:
		return fmt.Errorf("unknown variant `%s`, expected `Paused` or `Resumed`", v.State)
	}
	return nil
}

// saved is what a snapshot's state file holds.
type saved struct {
	Config config
	Memory string // what the memory file begins with
}

func (f *fake) create(body []byte) error {
	var s struct {
		Type   string `json:"snapshot_type"`
		State  string `json:"snapshot_path"`
		Memory string `json:"mem_file_path"`
	}
	if err := decode(body, &s); err != nil {
		return err
	}
	if s.Type != "" && s.Type != "Full" {
		return errors.New("Diff snapshots are not allowed on uVMs with dirty page tracking disabled.")
	}
	if f.state != "Paused" {
		return errors.New("Create snapshot error: Cannot save the microVM state: it is running")
	}
	config, err := json.Marshal(f.config)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(config)
	content := saved{f.config, hex.EncodeToString(digest[:])}
	state, err := json.Marshal(content)
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.State, state, 0o644); err != nil {
		return fmt.Errorf("Create snapshot error: Cannot perform open on the snapshot backing file: %s", told(err))
	}
	if err := os.WriteFile(s.Memory, []byte(content.Memory), 0o644); err != nil {
		return fmt.Errorf("Create snapshot error: Cannot perform open on the memory backing file: %s", told(err))
	}
	return os.Truncate(s.Memory, int64(*f.config.Machine.MemMiB)<<20)
}

func (f *fake) load(body []byte) (err error) {
	var s struct {
		State  string `json:"snapshot_path"`
		Memory *struct {
			Type string `json:"backend_type"`
			Path string `json:"backend_path"`
		} `json:"mem_backend"`
		Track     bool            `json:"track_dirty_pages"`
		Resume    bool            `json:"resume_vm"`
		Overrides json.RawMessage `json:"network_overrides"`
	}
	if err := decode(body, &s); err != nil {
		return err
	}
	var overrides []struct {
		ID  string `json:"iface_id"`
		Tap string `json:"host_dev_name"`
	}
	if s.Overrides != nil {
		if !f.since(1, 12) {
			return errors.New("unknown field `network_overrides`")
		}
		if err := decode(s.Overrides, &overrides); err != nil {
			return err
		}
	}
	if s.Memory == nil || s.Memory.Type != "File" {
		return errors.New("missing field `mem_backend`")
	}
	if f.state != "Not started" {
		return errors.New("The requested operation is not supported after starting the microVM.")
	}
	if f.configured {
		return errors.New("Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.")
	}
	defer func() { f.doomed = err != nil }() // too dirty to go on
	data, err := os.ReadFile(s.State)
	if err != nil {
		return fmt.Errorf("Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: %v", err)
	}
	var content saved
	if err := json.Unmarshal(data, &content); err != nil {
		return fmt.Errorf("Load snapshot error: Failed to get snapshot state from file: %v", err)
	}
	if content.Config.Version != f.set.Version {
		return fmt.Errorf("Load snapshot error: version %s", content.Config.Version)
	}
	memory, err := os.Open(s.Memory.Path)
	if err != nil {
		return fmt.Errorf("Load snapshot error: Failed to load guest memory: %v", err)
	}
	defer memory.Close()
	begins := make([]byte, len(content.Memory))
	info, err := memory.Stat()
	if err == nil {
		_, err = io.ReadFull(memory, begins)
	}
	if err != nil || string(begins) != content.Memory || info.Size() != int64(*content.Config.Machine.MemMiB)<<20 {
		return errors.New("Load snapshot error: Failed to load guest memory: it is another's")
	}
	for _, d := range content.Config.Drives {
		if err := openDrive(d); err != nil {
			return fmt.Errorf("Load snapshot error: %v", err)
		}
	}
	for i := range content.Config.Networks {
		n := &content.Config.Networks[i]
		for _, o := range overrides {
			if o.ID == n.ID {
				n.Tap = o.Tap
			}
		}
		if err := f.openTap(n.Tap); err != nil {
			return fmt.Errorf("Load snapshot error: %v", err)
		}
	}
	f.config, f.state = content.Config, "Paused"
	fmt.Println("[    1.000000] restored")
	if s.Resume {
		f.state = "Running"
	}
	return nil
}

func (f *fake) since(major, minor int) bool {
	var x, y int
	fmt.Sscanf(f.set.Version, "%d.%d", &x, &y)
	return x > major || x == major && y >= minor
}

// told is an error of the system as Rust prints it.
func told(err error) string {
	if errors.Is(err, unix.ENOSPC) {
		return "No space left on device (os error 28)"
	}
	return err.Error()
}
