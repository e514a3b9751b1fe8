package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	hostagentv1 "git.omukk.dev/wrenn/sandbox/api/hostagent/v1"
)

func newTemplateExport(c *cli) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "export NAME[:TAG]",
		Short: "Write a template as an archive of an image",
		Long: `Write a template as an archive of an image with one layer: an OCI layout in a tar, which
'wrenn template import', 'docker load' and other tools read. Its configuration has the
template's user, directory, variables and start command. A guest reads the template's
root for that; nothing of it is mounted on the host.

What is in the template is in the archive, secrets too.`,
		Example: `  wrenn template export app:v1 -o app.tar
  wrenn template export app:v1 | docker load`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" && term.IsTerminal(int(os.Stdout.Fd())) {
				return errors.New("stdout is a terminal: name a file with -o")
			}
			if output == "" {
				return exportTo(cmd, c, args[0], os.TempDir(), os.Stdout)
			}
			return exportFile(cmd, c, args[0], output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write; stdout when empty")
	return cmd
}

// exportFile writes an archive beside its name and gives it the name when it is complete.
func exportFile(cmd *cobra.Command, c *cli, ref, path string) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".wrenn-export-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // not there any more when all went well
	if err := errors.Join(exportTo(cmd, c, ref, dir, f), f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// exportTo writes an archive to w. The layer, whose size and digest come before it, is kept
// in dir until it is complete.
func exportTo(cmd *cobra.Command, c *cli, ref, dir string, w io.Writer) error {
	layer, err := os.CreateTemp(dir, ".wrenn-layer-*")
	if err != nil {
		return err
	}
	defer layer.Close()
	if err := os.Remove(layer.Name()); err != nil {
		return err
	}
	view, err := newBuildView(cmd.ErrOrStderr(), "auto", false)
	if err != nil {
		return err
	}
	sum := sha256.New()
	p := &hostagentv1.BuildProgress{Stage: "reading the template"}
	about, err := c.host.Templates().Export(cmd.Context(), ref, io.MultiWriter(layer, sum, told(func(n int) { view.moved(p, n) })))
	view.close()
	if err != nil {
		return noSuchTemplate(err)
	}
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return writeImage(w, about, tagFor(about, ref), layer, p.Done, hex.EncodeToString(sum.Sum(nil)))
}

// told is a writer that tells how much is written.
type told func(n int)

func (t told) Write(p []byte) (int, error) { t(len(p)); return len(p), nil }

// tagFor is what tools call the image: the template's name and the tag that was asked for.
func tagFor(about *hostagentv1.GetTemplateResponse, ref string) string {
	name := about.Template.TemplateId
	if len(about.Template.Names) > 0 {
		name = about.Template.Names[0]
	}
	_, tag, _ := strings.Cut(ref, ":")
	if tag == "" {
		tag = "latest"
	}
	return strings.Trim(name, "-_.") + ":" + tag
}

// The parts of an image that an archive has.
type (
	descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int64             `json:"size"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	imageConfig struct {
		Created      time.Time      `json:"created"`
		Architecture string         `json:"architecture"`
		OS           string         `json:"os"`
		Config       execConfig     `json:"config"`
		RootFS       rootFS         `json:"rootfs"`
		History      []imageHistory `json:"history"`
	}
	execConfig struct {
		User        string       `json:"User,omitempty"`
		WorkingDir  string       `json:"WorkingDir,omitempty"`
		Env         []string     `json:"Env,omitempty"`
		Cmd         []string     `json:"Cmd,omitempty"`
		Healthcheck *healthcheck `json:"Healthcheck,omitempty"`
	}
	healthcheck struct {
		Test []string `json:"Test"`
	}
	rootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	imageHistory struct {
		Created   time.Time `json:"created"`
		CreatedBy string    `json:"created_by"`
		Empty     bool      `json:"empty_layer,omitempty"`
	}
)

// configOf is the configuration of a template as images have it.
func configOf(about *hostagentv1.GetTemplateResponse, layer string) imageConfig {
	c := imageConfig{
		Architecture: "amd64", OS: "linux", Created: time.Unix(0, 0).UTC(),
		Config: execConfig{User: about.User, WorkingDir: about.Workdir},
		RootFS: rootFS{Type: "layers", DiffIDs: []string{"sha256:" + layer}},
	}
	for _, b := range about.Template.Builds {
		if b.Build == about.Build {
			c.Created = b.CreatedAt.AsTime()
		}
	}
	for name, value := range about.Envs {
		c.Config.Env = append(c.Config.Env, name+"="+value)
	}
	slices.Sort(c.Config.Env)
	if about.StartCommand != "" {
		c.Config.Cmd = []string{"/bin/sh", "-c", about.StartCommand}
	}
	if about.ReadyCommand != "" {
		c.Config.Healthcheck = &healthcheck{Test: []string{"CMD-SHELL", about.ReadyCommand}}
	}
	// The steps are kept for people; all files are in one layer, that of the last entry.
	for _, h := range about.History {
		at := c.Created
		if h.CreatedAt != nil {
			at = h.CreatedAt.AsTime()
		}
		c.History = append(c.History, imageHistory{Created: at, CreatedBy: h.CreatedBy, Empty: true})
	}
	c.History = append(c.History, imageHistory{Created: c.Created, CreatedBy: "wrenn template export"})
	return c
}

// writeImage writes an OCI layout as a tar, with the file that docker load reads.
func writeImage(w io.Writer, about *hostagentv1.GetTemplateResponse, tag string, layer io.Reader, size int64, digest string) error {
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	a := &imageWriter{tar: tar.NewWriter(w)}
	a.file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	config := a.blob("application/vnd.oci.image.config.v1+json", configOf(about, digest))
	a.stream("blobs/sha256/"+digest, size, layer)
	manifest := a.blob(manifestType, map[string]any{
		"schemaVersion": 2, "mediaType": manifestType, "config": config,
		"layers": []descriptor{{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: "sha256:" + digest, Size: size}},
	})
	_, name, _ := strings.Cut(tag, ":")
	manifest.Annotations = map[string]string{
		"org.opencontainers.image.ref.name": name, "io.containerd.image.name": "docker.io/library/" + tag,
	}
	a.json("index.json", map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}})
	a.json("manifest.json", []map[string]any{{
		"Config":   "blobs/sha256/" + strings.TrimPrefix(config.Digest, "sha256:"),
		"RepoTags": []string{tag}, "Layers": []string{"blobs/sha256/" + digest},
	}})
	if a.err == nil {
		a.err = a.tar.Close()
	}
	if a.err != nil {
		return fmt.Errorf("write image: %w", a.err)
	}
	return nil
}

// imageWriter writes the files of an archive; after an error nothing.
type imageWriter struct {
	tar *tar.Writer
	err error
}

func (a *imageWriter) stream(name string, size int64, from io.Reader) {
	if a.err == nil {
		a.err = a.tar.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: size, Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)})
	}
	if a.err == nil {
		_, a.err = io.Copy(a.tar, from)
	}
}

func (a *imageWriter) file(name string, data []byte) {
	a.stream(name, int64(len(data)), bytes.NewReader(data))
}

func (a *imageWriter) json(name string, v any) {
	data, err := json.Marshal(v)
	if a.err == nil {
		a.err = err
	}
	a.file(name, data)
}

// blob writes a value under its digest.
func (a *imageWriter) blob(mediaType string, v any) descriptor {
	data, err := json.Marshal(v)
	if a.err == nil {
		a.err = err
	}
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	a.file("blobs/sha256/"+digest, data)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: int64(len(data))}
}
