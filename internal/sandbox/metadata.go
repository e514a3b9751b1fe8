package sandbox

import (
	"fmt"
	"maps"
	"unicode/utf8"
)

// Bounds of a sandbox's metadata.
const (
	MaxMetadata      = 64
	MaxMetadataKey   = 256
	MaxMetadataValue = 4 << 10
	// MaxMetadataBytes is of all keys and values together.
	MaxMetadataBytes = 16 << 10
)

// CheckMetadata says whether a sandbox can have this metadata. JSON keeps valid UTF-8
// as it is, and nothing else.
func CheckMetadata(metadata map[string]string) error {
	if len(metadata) > MaxMetadata {
		return fmt.Errorf("metadata has %d pairs, at most %d are possible", len(metadata), MaxMetadata)
	}
	size := 0
	for key, value := range metadata {
		size += len(key) + len(value)
		switch {
		case key == "" || len(key) > MaxMetadataKey:
			return fmt.Errorf("a key of the metadata is %d bytes long, must be 1 to %d", len(key), MaxMetadataKey)
		case len(value) > MaxMetadataValue:
			return fmt.Errorf("metadata %.40q is %d bytes long, at most %d are possible", key, len(value), MaxMetadataValue)
		case !utf8.ValidString(key) || !utf8.ValidString(value):
			return fmt.Errorf("metadata %.40q is not UTF-8", key)
		}
	}
	if size > MaxMetadataBytes {
		return fmt.Errorf("metadata is %d bytes long, at most %d are possible", size, MaxMetadataBytes)
	}
	return nil
}

// Filter says which sandboxes a list has.
type Filter struct {
	// Stopped: those that have ended, too.
	Stopped bool
	// Project is whose sandboxes; nil for all, "" for those without a project.
	Project *string
	// Metadata is what a sandbox's own must have, pair for pair.
	Metadata map[string]string
	// Name is what the sandbox is called; empty for any.
	Name string
}

// matches says whether the filter lets a sandbox through.
func (f Filter) matches(rec *Record) bool {
	if rec.State.hidden() || rec.State == Stopped && !f.Stopped {
		return false
	}
	if f.Project != nil && rec.Project != *f.Project || f.Name != "" && rec.Name != f.Name {
		return false
	}
	for key, value := range f.Metadata {
		if has, ok := rec.Metadata[key]; !ok || has != value {
			return false
		}
	}
	return true
}

// Labels are what a sandbox's creator says of it. All events of the sandbox have them.
type Labels struct {
	// Project is who the sandbox belongs to; empty if it was made without one.
	Project string `json:"project,omitempty"`
	// Name is what callers may say in place of the ID; empty for none. Of the sandboxes of a
	// project that have not ended, one has it. A fork has none.
	Name string `json:"name,omitempty"`
	// OwnerKey is the creator's own name for the sandbox; empty if it gave none. No other
	// sandbox of the project has it, nor does a fork.
	OwnerKey string `json:"ownerKey,omitempty"`
	// Metadata is as it was given: nil and empty differ. It is never changed.
	Metadata map[string]string `json:"metadata,omitzero"`
}

func (l Labels) isZero() bool {
	return l.Project == "" && l.Name == "" && l.OwnerKey == "" && l.Metadata == nil
}

// clone returns labels that share nothing with these.
func (l Labels) clone() Labels {
	l.Metadata = maps.Clone(l.Metadata)
	return l
}
