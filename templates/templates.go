// Package templates has the sources of the templates that people expect, each a
// directory with a Dockerfile.
package templates

import (
	"embed"
	"io/fs"
)

//go:embed base code-interpreter-v1 desktop
var files embed.FS

// Stock is a template whose source is here.
type Stock struct {
	Name string
	// VCPUs and MemMiB are what its sandboxes get whose creator names no size.
	VCPUs, MemMiB int
	// Files are its Dockerfile and what that copies.
	Files fs.FS
}

// All are the templates.
func All() []Stock {
	all := []Stock{
		{Name: "base", VCPUs: 2, MemMiB: 512},
		{Name: "code-interpreter-v1", VCPUs: 2, MemMiB: 2048},
		{Name: "desktop", VCPUs: 2, MemMiB: 2048},
	}
	for i, t := range all {
		sub, err := fs.Sub(files, t.Name)
		if err != nil {
			panic(err) // the name is a constant
		}
		all[i].Files = sub
	}
	return all
}
