package server

import (
	"context"
	"errors"
	"strings"

	"connectrpc.com/connect"

	pb "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/internal/build"
	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
	"git.omukk.dev/wrenn/sandbox/internal/image"
	"git.omukk.dev/wrenn/sandbox/internal/sandbox"
	"git.omukk.dev/wrenn/sandbox/internal/template"
)

func (s *templates) PruneTemplates(
	ctx context.Context, req *request[pb.PruneTemplatesRequest],
) (*response[pb.PruneTemplatesResponse], error) {
	own, host := project(ctx)
	of := &own
	if host {
		of = nil
	}
	resp := &pb.PruneTemplatesResponse{}
	if req.Msg.All {
		gone, err := s.pruneWhole(ctx, own, req.Msg.DryRun)
		if err != nil {
			return nil, err
		}
		resp.Removed = gone
	}
	builds, err := s.pruneBuilds(ctx, of, req.Msg.DryRun)
	if err != nil {
		return nil, err
	}
	for _, g := range builds {
		// In a dry run a template that would go has its builds still.
		if !contains(resp.Removed, g) {
			resp.Removed = append(resp.Removed, g)
		}
	}
	return connect.NewResponse(resp), nil
}

// contains says whether a build goes with its template.
func contains(removed []*pb.Garbage, b *pb.Garbage) bool {
	for _, g := range removed {
		if g.Kind == "template" && strings.HasPrefix(b.Name, g.Name+":") {
			return true
		}
	}
	return false
}

func (s *templates) pruneBuilds(ctx context.Context, project *string, dryRun bool) ([]*pb.Garbage, error) {
	gone, err := s.manager.PruneTemplates(ctx, project, dryRun)
	var list []*pb.Garbage
	for _, u := range gone {
		list = append(list, &pb.Garbage{Kind: "build", Name: u.Template.Name() + ":" + u.Build.ID, Bytes: u.Bytes})
	}
	return list, err
}

// pruneWhole removes the templates of a project that nothing uses.
func (s *templates) pruneWhole(ctx context.Context, project string, dryRun bool) (list []*pb.Garbage, err error) {
	all, err := s.store.List()
	if err != nil {
		return nil, err
	}
	for _, t := range all {
		if t.Project != project || t.Source != "" || t.ID == template.HostID(template.DefaultName) || !s.idle(t, all) {
			continue
		}
		own, _ := s.store.Sizes(t.ID, "")
		if !dryRun {
			err := s.manager.DeleteTemplate(ctx, t.ID, "")
			if c := errdefs.ClassOf(err); c == errdefs.WrongState || c == errdefs.NotFound {
				continue // it is in use, or gone, since
			}
			if err != nil {
				return nil, err
			}
			s.forget(t.ID)
		}
		list = append(list, &pb.Garbage{Kind: "template", Name: t.Name(), Bytes: own})
	}
	return list, nil
}

// idle says whether no sandbox and no snapshot is over a template, and none of its builds is
// under way.
func (s *templates) idle(t template.Info, all []template.Info) bool {
	for _, b := range t.Builds {
		if b.Status == template.StatusWaiting || b.Status == template.StatusBuilding {
			return false
		}
	}
	for _, other := range all {
		for _, b := range other.Builds {
			if other.ID != t.ID && b.Over == t.ID {
				return false
			}
		}
	}
	return s.unused(t) == nil
}

func (s *templates) CollectGarbage(
	ctx context.Context, req *request[pb.CollectGarbageRequest],
) (*response[pb.CollectGarbageResponse], error) {
	resp := &pb.CollectGarbageResponse{}
	builds, err := s.pruneBuilds(ctx, nil, req.Msg.DryRun)
	resp.Removed = builds
	if err == nil {
		err = s.collectCache(ctx, resp, req.Msg.All, req.Msg.DryRun)
	}
	if err == nil {
		err = s.collectStopped(ctx, resp, req.Msg.DryRun)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}

// collectCache removes what builds and images can make or fetch again.
func (s *templates) collectCache(ctx context.Context, resp *pb.CollectGarbageResponse, all, dryRun bool) error {
	if s.builds == nil {
		return nil
	}
	age := keepUnused
	if all {
		age = 0
	}
	items, err := s.builds.Prune(ctx, build.Pruning{OlderThan: age, DryRun: dryRun})
	if err != nil {
		return err
	}
	for _, i := range items {
		resp.Removed = append(resp.Removed, &pb.Garbage{Kind: i.Kind, Name: validText(i.Name), Bytes: i.Bytes})
	}
	freed, err := s.images.Prune(ctx, image.Keep{Age: age, DryRun: dryRun})
	if err == nil && freed > 0 {
		resp.Removed = append(resp.Removed, &pb.Garbage{Kind: "image", Name: "layers", Bytes: freed})
	}
	return err
}

// collectStopped forgets the sandboxes that have ended by themselves.
func (s *templates) collectStopped(ctx context.Context, resp *pb.CollectGarbageResponse, dryRun bool) error {
	var errs []error
	for _, b := range s.manager.Select(sandbox.Filter{Stopped: true}) {
		if b.State != sandbox.Stopped {
			continue
		}
		if !dryRun {
			err := s.manager.Destroy(ctx, b.ID)
			if errdefs.ClassOf(err) == errdefs.NotFound {
				continue
			}
			if err != nil {
				errs = append(errs, err)
				continue
			}
		}
		resp.Removed = append(resp.Removed, &pb.Garbage{Kind: "sandbox", Name: string(b.ID)})
	}
	return errors.Join(errs...)
}
