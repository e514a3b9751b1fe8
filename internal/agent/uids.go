package agent

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"git.omukk.dev/wrenn/sandbox/internal/atomicfile"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/network"
)

// The users that VMMs run as are far from those of people and services, and from
// the ranges that container tools hand out. Each agent has a block of them, one
// for each slot, so that no VMM can signal or trace one of another agent.
const (
	// probeUID is the user of the guest that shows whether KVM works. It is in no
	// agent's block.
	probeUID  = 1_900_000_000
	blockUIDs = int(network.MaxSlot) + 1
	uidBlocks = 6000
)

// uidClaims has a file for each block that is taken; the file holds the state
// directory of the block's agent. A boot of the host removes the claims and ends
// every VMM.
const uidClaims = "/run/wrenn-uids"

// claimUIDs returns the first user of the agent's block. While the claim is there,
// the next agent on the state directory gets the same block.
func claimUIDs(claims, stateDir string) (base int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("claim users for VMMs: %w", err)
		}
	}()
	if err := os.MkdirAll(claims, 0o700); err != nil {
		return 0, err
	}
	lock, err := os.Open(claims)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return 0, err
	}
	digest := sha256.Sum256([]byte(stateDir))
	first := int(binary.BigEndian.Uint32(digest[:]) % uidBlocks)
	for i := range uidBlocks {
		base := probeUID + (1+(first+i)%uidBlocks)*blockUIDs
		file := claimFile(claims, base)
		owner, err := os.ReadFile(file)
		if err == nil && string(owner) == stateDir {
			return base, nil
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return 0, err
		}
		if err == nil && exists(string(owner)) {
			continue
		}
		// No agent has the block, or its agent's directory is gone. A VMM of that
		// agent, or a program that knows nothing of claims, may still run in it.
		used, err := usersInUse(base)
		if err != nil {
			return 0, err
		}
		if !used {
			return base, atomicfile.Write(file, []byte(stateDir), 0o600)
		}
	}
	return 0, errdefs.Exhausted.Errorf("all %d blocks of users are taken", uidBlocks)
}

// releaseUIDs gives the block back. No VMM of the agent may run any more.
func releaseUIDs(claims string, base int) error {
	if err := os.Remove(claimFile(claims, base)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("release users of VMMs: %w", err)
	}
	if err := os.Remove(claims); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("release users of VMMs: %w", err)
	}
	return nil
}

func claimFile(claims string, base int) string { return filepath.Join(claims, strconv.Itoa(base)) }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return path != "" && !errors.Is(err, os.ErrNotExist)
}

// usersInUse reports whether a process runs as a user of a block.
func usersInUse(base int) (bool, error) {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return false, err
	}
	for _, p := range processes {
		var st syscall.Stat_t
		if syscall.Stat(p, &st) == nil && int(st.Uid) >= base && int(st.Uid) < base+blockUIDs {
			return true, nil
		}
	}
	return false, nil
}
