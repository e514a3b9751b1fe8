package sandbox

import (
	"errors"
	"fmt"

	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

// MaxPublish bounds the ports of a sandbox that the host listens for.
const MaxPublish = 64

// Publish is a port of a sandbox and the port of the host's loopback that leads there.
type Publish struct {
	Port     uint16 `json:"port"`
	HostPort uint16 `json:"hostPort"`
}

func (r *CreateRequest) checkPublish() error {
	if len(r.Publish) > MaxPublish {
		return fmt.Errorf("publish has %d ports, at most %d are possible", len(r.Publish), MaxPublish)
	}
	if len(r.Publish) > 0 && r.Labels.OwnerKey != "" {
		return errors.New("publish and owner_key exclude each other")
	}
	for _, p := range r.Publish {
		if p.Port == 0 || p.Port == guestapi.Port {
			return fmt.Errorf("publish: port %d cannot be published", p.Port)
		}
	}
	return nil
}
