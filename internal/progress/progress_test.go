package progress_test

import (
	"slices"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/progress"
)

func TestStep(t *testing.T) {
	var got []progress.Event
	f := progress.Func(func(e progress.Event) { got = append(got, e) })
	for _, to := range []progress.Func{f, nil} { // nil receives nothing, and nothing breaks
		s := to.Begin("kernel")
		s.Detail("asking")
		s.Bytes("downloading", 1, 2)
		s.Did("%d MiB", 3)
		to.Begin("image").Kept("there")
	}
	want := []progress.Event{
		{Step: "kernel", Phase: progress.Began},
		{Step: "kernel", Phase: progress.Going, Detail: "asking"},
		{Step: "kernel", Phase: progress.Going, Detail: "downloading", Done: 1, Total: 2},
		{Step: "kernel", Phase: progress.Did, Detail: "3 MiB"},
		{Step: "image", Phase: progress.Began},
		{Step: "image", Phase: progress.Kept, Detail: "there"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}
