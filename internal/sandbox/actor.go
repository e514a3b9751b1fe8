package sandbox

import (
	"context"
	"strings"
)

// Actor is the caller of a change, for the events. It has no secret.
type Actor struct {
	// KeyID names the caller's API key; it is "socket" for a caller on the agent's own
	// socket, and empty for one without a key.
	KeyID string `json:"keyID,omitempty"`
	// Project is the key's.
	Project string `json:"project,omitempty"`
	// Address is where the call came from; empty for the socket.
	Address string `json:"address,omitempty"`
	// What is the name of the call.
	What string `json:"what,omitempty"`
}

type actorKey struct{}

// WithActor returns a context whose changes to sandboxes are the actor's. Changes under
// a context without an actor are the host's own.
func WithActor(ctx context.Context, a Actor) context.Context {
	return context.WithValue(ctx, actorKey{}, a.bounded())
}

// ActorOf returns the actor of a context; the zero Actor is none.
func ActorOf(ctx context.Context) Actor {
	a, _ := ctx.Value(actorKey{}).(Actor)
	return a
}

// maxActorField bounds each field of an actor in bytes, so that a line of the event log
// keeps its bound.
const maxActorField = 128

func (a Actor) bounded() Actor {
	for _, field := range []*string{&a.KeyID, &a.Project, &a.Address, &a.What} {
		*field = strings.ToValidUTF8((*field)[:min(len(*field), maxActorField)], "")
	}
	return a
}
