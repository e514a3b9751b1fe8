package server

import (
	"context"
	"path"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
)

// actors says in the context of a call who the caller is and what the call is named.
// What an outer handler knows of the caller stays.
type actors struct{}

func (actors) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		return next(withActor(ctx, req.Spec(), req.Peer()), req)
	}
}

func (actors) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		return next(withActor(ctx, conn.Spec(), conn.Peer()), conn)
	}
}

func (actors) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func withActor(ctx context.Context, spec connect.Spec, peer connect.Peer) context.Context {
	a := sandbox.ActorOf(ctx)
	a.What = path.Base(spec.Procedure)
	if a == (sandbox.Actor{What: a.What}) {
		a.Address = peer.Addr
	}
	return sandbox.WithActor(ctx, a)
}

func actor(a sandbox.Actor) *pb.Actor {
	if a == (sandbox.Actor{}) {
		return nil
	}
	return &pb.Actor{KeyId: a.KeyID, Project: a.Project, Address: a.Address, What: a.What}
}
