// Package undo takes back the half-done: a stack of steps, unwound last first.
//
// It is for a function's temporaries, which no record names. What a sandbox
// owns is freed through its record instead.
package undo

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// StepTimeout bounds each step of an unwinding.
const StepTimeout = 10 * time.Second

type step struct {
	name string
	fn   func(context.Context) error
}

// Stack holds the steps that take back what a function acquired. The zero
// value is ready. It is safe for concurrent use.
type Stack struct {
	mu      sync.Mutex
	steps   []step
	unwound bool
	kept    bool
}

// Push adds a step, to be called on the line after the acquire. On a stack
// that has been unwound the step runs at once, so that nothing acquired late
// is left behind; its error is then returned.
func (s *Stack) Push(name string, fn func(context.Context) error) error {
	s.mu.Lock()
	late := s.unwound
	if !late && !s.kept {
		s.steps = append(s.steps, step{name, fn})
	}
	s.mu.Unlock()
	if late {
		return run(context.Background(), step{name, fn})
	}
	return nil
}

// Keep forgets every step: what was acquired now belongs to somebody else.
func (s *Stack) Keep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps, s.kept = nil, true
}

// Unwind runs all steps, last first, each under its own time-out on a context
// that outlives ctx's cancellation. A step's failure does not stop the others;
// their errors come back joined. After Keep, and when called again, it does
// nothing.
func (s *Stack) Unwind(ctx context.Context) error {
	s.mu.Lock()
	steps := s.steps
	s.steps = nil
	if !s.kept {
		s.unwound = true
	}
	s.mu.Unlock()

	ctx = context.WithoutCancel(ctx)
	var errs []error
	for i := len(steps) - 1; i >= 0; i-- {
		errs = append(errs, run(ctx, steps[i]))
	}
	return errors.Join(errs...)
}

func run(ctx context.Context, s step) (err error) {
	ctx, cancel := context.WithTimeout(ctx, StepTimeout)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("undo %s: panic: %v", s.name, p)
		}
	}()
	if err := s.fn(ctx); err != nil {
		return fmt.Errorf("undo %s: %w", s.name, err)
	}
	return nil
}
