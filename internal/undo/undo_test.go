package undo_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"git.omukk.dev/wrenn/sandbox/internal/undo"
)

func TestUnwindRunsAllLastFirst(t *testing.T) {
	var s undo.Stack
	var got []string
	for _, name := range []string{"a", "b", "c"} {
		s.Push(name, func(ctx context.Context) error {
			if ctx.Err() != nil {
				t.Errorf("%s runs on a cancelled context", name)
			}
			got = append(got, name)
			switch name {
			case "b":
				return errors.New("boom")
			case "c":
				panic("bang")
			}
			return nil
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := s.Unwind(ctx)
	if want := []string{"c", "b", "a"}; !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
	if err == nil || !strings.Contains(err.Error(), "undo b: boom") || !strings.Contains(err.Error(), "undo c: panic: bang") {
		t.Errorf("error %v does not name both failures", err)
	}
	if err := s.Unwind(ctx); err != nil || len(got) != 3 {
		t.Errorf("second unwind ran again: %v, %v", got, err)
	}
}

func TestKeep(t *testing.T) {
	var s undo.Stack
	s.Push("x", func(context.Context) error { t.Error("ran after Keep"); return nil })
	s.Keep()
	s.Push("y", func(context.Context) error { t.Error("ran after Keep"); return nil })
	if err := s.Unwind(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestEveryStepRunsOnceWhilePushedConcurrently(t *testing.T) {
	for range 200 {
		var s undo.Stack
		var ran atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				s.Push("n", func(context.Context) error { ran.Add(1); return nil })
			})
		}
		wg.Go(func() { s.Unwind(t.Context()) })
		wg.Wait()
		if got := ran.Load(); got != 8 {
			t.Fatalf("%d steps ran, want 8", got)
		}
	}
}
