package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"connectrpc.com/connect"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
	"git.omukk.dev/wrenn/sandbox/api/hostagent/v1/hostagentv1connect"
)

// uploadPart is how much of an archive a message has, in bytes.
const uploadPart = 256 << 10

// Templates are the templates of a host. It is safe for concurrent use.
type Templates struct {
	rpc hostagentv1connect.TemplateServiceClient
}

// Templates returns the templates of the host.
func (h *Host) Templates() *Templates { return &h.templates }

// List returns the templates that the caller may use.
func (t *Templates) List(ctx context.Context) (*hostagentv1.ListTemplatesResponse, error) {
	return call(ctx, t.rpc.ListTemplates, &hostagentv1.ListTemplatesRequest{})
}

// Get returns a template and what the build that ref leads to is made of.
func (t *Templates) Get(ctx context.Context, ref string) (*hostagentv1.GetTemplateResponse, error) {
	return call(ctx, t.rpc.GetTemplate, &hostagentv1.GetTemplateRequest{Template: ref})
}

// Build begins a build, which goes on without its caller.
func (t *Templates) Build(ctx context.Context, req *hostagentv1.BuildTemplateRequest) (*hostagentv1.BuildTemplateResponse, error) {
	return call(ctx, t.rpc.BuildTemplate, req)
}

// Watch returns what a build logs, from an entry of its log on, and how it ends.
func (t *Templates) Watch(ctx context.Context, template, build string, from int32) iter.Seq2[*hostagentv1.WatchBuildResponse, error] {
	req := &hostagentv1.WatchBuildRequest{Template: template, Build: build, From: from}
	return messages(t.rpc.WatchBuild(ctx, connect.NewRequest(req)))
}

// Cancel ends a build that is under way.
func (t *Templates) Cancel(ctx context.Context, template, build string) error {
	_, err := call(ctx, t.rpc.CancelBuild, &hostagentv1.CancelBuildRequest{Template: template, Build: build})
	return err
}

// Has says whether the host has an archive of the caller's project.
func (t *Templates) Has(ctx context.Context, hash string) (bool, error) {
	resp, err := call(ctx, t.rpc.GetUpload, &hostagentv1.GetUploadRequest{Hash: hash})
	return resp.GetPresent(), err
}

// Upload brings an archive to the host; moved, if not nil, is told of each part that went.
// An error of the archive ends the upload, and the host keeps nothing of it.
func (t *Templates) Upload(ctx context.Context, hash string, archive io.Reader, moved func(n int)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream := t.rpc.PutUpload(ctx)
	err := stream.Send(&hostagentv1.PutUploadRequest{Hash: hash})
	part := make([]byte, uploadPart)
	for err == nil {
		n, end := io.ReadFull(archive, part)
		if n > 0 {
			if err = stream.Send(&hostagentv1.PutUploadRequest{Data: part[:n]}); err == nil && moved != nil {
				moved(n)
			}
		}
		if err != nil || errors.Is(end, io.EOF) || errors.Is(end, io.ErrUnexpectedEOF) {
			break
		}
		if end != nil {
			cancel(end) // an end of the stream would be taken for that of the archive
			_, _ = stream.CloseAndReceive()
			return fmt.Errorf("read archive: %w", end)
		}
	}
	// The host's error, if it was it that ended the stream.
	if _, answer := stream.CloseAndReceive(); answer != nil {
		return answer
	}
	if errors.Is(err, io.EOF) {
		return nil // it was there before all had come
	}
	return err
}

// Delete removes a template with its builds, and returns what is free now in bytes.
func (t *Templates) Delete(ctx context.Context, ref string) (freed int64, err error) {
	resp, err := call(ctx, t.rpc.DeleteTemplate, &hostagentv1.DeleteTemplateRequest{Template: ref})
	return resp.GetFreedBytes(), err
}

// Tag makes tags lead to the build that ref leads to, whose id it returns.
func (t *Templates) Tag(ctx context.Context, ref string, tags ...string) (build string, err error) {
	resp, err := call(ctx, t.rpc.TagTemplate, &hostagentv1.TagTemplateRequest{Template: ref, Tags: tags})
	return resp.GetBuild(), err
}

// Untag removes tags of a template.
func (t *Templates) Untag(ctx context.Context, ref string, tags ...string) error {
	_, err := call(ctx, t.rpc.UntagTemplate, &hostagentv1.UntagTemplateRequest{Template: ref, Tags: tags})
	return err
}

// Prune removes builds that nothing uses, and with everything also templates; with dryRun
// it only says which.
func (t *Templates) Prune(ctx context.Context, everything, dryRun bool) ([]*hostagentv1.Garbage, error) {
	resp, err := call(ctx, t.rpc.PruneTemplates, &hostagentv1.PruneTemplatesRequest{All: everything, DryRun: dryRun})
	return resp.GetRemoved(), err
}

// CollectGarbage removes what the host can make or fetch again and was not used for a week,
// or everything of that; with dryRun it only says what.
func (t *Templates) CollectGarbage(ctx context.Context, everything, dryRun bool) ([]*hostagentv1.Garbage, error) {
	resp, err := call(ctx, t.rpc.CollectGarbage, &hostagentv1.CollectGarbageRequest{All: everything, DryRun: dryRun})
	return resp.GetRemoved(), err
}

// Export writes the root file system of a build to w as a tar, and returns what the build
// is.
func (t *Templates) Export(ctx context.Context, ref string, w io.Writer) (about *hostagentv1.GetTemplateResponse, err error) {
	stream, err := t.rpc.ExportTemplate(ctx, connect.NewRequest(&hostagentv1.ExportTemplateRequest{Template: ref}))
	for resp, err := range messages(stream, err) {
		if err != nil {
			return nil, err
		}
		if resp.About != nil {
			about = resp.About
		}
		if len(resp.Data) == 0 {
			continue
		}
		if _, err := w.Write(resp.Data); err != nil {
			return nil, err
		}
	}
	if about == nil {
		return nil, errors.New("the host did not say what it exports")
	}
	return about, nil
}
