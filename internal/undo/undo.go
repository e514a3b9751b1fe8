// Package undo takes back what a function did before it failed: a stack of steps,
// the last of which runs first.
//
// It is for what a function acquires and no record names. What a sandbox owns is
// freed through its record instead.
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

// Stack holds the steps that take back what a function acquired. The zero value is
// an empty stack. Stack is safe for concurrent use.
type Stack struct {
	mu      sync.Mutex
	steps   []step
	unwound bool
	kept    bool
}

// Push adds a step; call it on the line after the acquire. On a stack that has been
// unwound the step runs at once, so that nothing acquired late is left behind. Its
// error is dropped then, because Unwind has returned.
func (s *Stack) Push(name string, fn func(context.Context) error) {
	s.mu.Lock()
	late := s.unwound
	if !late && !s.kept {
		s.steps = append(s.steps, step{name, fn})
	}
	s.mu.Unlock()
	if late {
		_ = run(context.Background(), step{name, fn})
	}
}

// Keep forgets every step: what was acquired belongs to the caller now.
func (s *Stack) Keep() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.steps, s.kept = nil, true
}

// Unwind runs all steps, the last one first, each with a time limit of its own and
// also after ctx was cancelled. After a step that fails it runs the others, and
// returns their errors joined. After Keep, and when called again, it does nothing.
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
