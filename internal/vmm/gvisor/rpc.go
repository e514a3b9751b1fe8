package gvisor

import (
	"encoding/json"
	"net"
)

// The calls that the driver makes.
const (
	methodSetNetwork = "containerManager.SetNetworkArgs"
	methodStart      = "containerManager.StartRoot"
	methodPause      = "containerManager.Pause"
	methodResume     = "containerManager.Resume"
	methodCheckpoint = "containerManager.Checkpoint"
	methodRestore    = "containerManager.Restore"
	methodState      = "containerManager.ContainerRuntimeState"
	methodStacks     = "debug.Stacks"
)

// The types below have the JSON form of gVisor's own, as far as the driver sets or
// reads it. A test of the module of cmd sentry, which has gVisor, compares them.
type (
	request struct {
		Method string `json:"method"`
		Arg    any    `json:"arg"`
	}
	answer struct {
		Success bool            `json:"success"`
		Err     string          `json:"err"`
		Result  json.RawMessage `json:"result"`
	}

	// networkArgs are passed with one descriptor for each channel of FDBasedLinks.
	networkArgs struct {
		LoopbackLinks        []loopbackLink
		FDBasedLinks         []packetLink
		Defaultv4Gateway     defaultRoute
		AllowConnectedOnSave bool
	}
	loopbackLink struct {
		Name      string
		Addresses []prefix
		Routes    []route
	}
	packetLink struct {
		Name                 string
		InterfaceIndex       int
		MTU                  int
		Addresses            []prefix
		Routes               []route
		GSOMaxSize           uint32
		GVisorGSOEnabled     bool
		TXChecksumOffload    bool
		RXChecksumOffload    bool
		LinkAddress          net.HardwareAddr
		QDisc                int
		NumChannels          int
		ProcessorsPerChannel int
	}
	prefix struct {
		Address   net.IP
		PrefixLen int
	}
	route struct {
		Destination net.IPNet
		Gateway     net.IP
		MTU         uint32
	}
	defaultRoute struct {
		Route route
		Name  string
	}

	// saveOpts are passed with the files of a snapshot: state, pages' metadata, pages.
	saveOpts struct {
		HavePagesFile                  bool `json:"have_pages_file"`
		AppMFExcludeCommittedZeroPages bool `json:"app_mf_exclude_committed_zero_pages"`
		Resume                         bool
	}
	// restoreOpts are passed with the same files.
	restoreOpts struct {
		HavePagesFile bool
		Background    bool
	}
)

// The answers to methodState that matter.
const (
	stateCreating = 1
	stateRunning  = 2
)
