// Package progress is how a long piece of work tells what it is doing.
package progress

import "fmt"

// Phase is how far a step is.
type Phase int

const (
	// Began is the step's first event.
	Began Phase = iota
	// Going carries progress.
	Going
	// Did is the last event of a step that made something.
	Did
	// Kept is the last event of a step that found everything in place.
	Kept
)

// Event tells what a step is doing.
type Event struct {
	Step  string
	Phase Phase
	// Detail is what is done just now, in a few words; may be empty.
	Detail string
	// Done and Total count bytes; Total is 0 when it is not known.
	Done, Total int64
}

// Func receives the events of one piece of work, one at a time. It is called
// often and must return quickly. A nil Func receives nothing.
type Func func(Event)

// Step is one step of the work.
type Step struct {
	name string
	to   Func
}

// Begin tells that the step of that name begins.
func (f Func) Begin(name string) Step {
	s := Step{name, f}
	s.tell(Event{Phase: Began})
	return s
}

func (s Step) tell(e Event) {
	if s.to != nil {
		e.Step = s.name
		s.to(e)
	}
}

// Detail tells what the step does just now.
func (s Step) Detail(text string) { s.tell(Event{Phase: Going, Detail: text}) }

// Bytes tells how far the step is with what text says.
func (s Step) Bytes(text string, done, total int64) {
	s.tell(Event{Phase: Going, Detail: text, Done: done, Total: total})
}

// Did ends a step that made something.
func (s Step) Did(format string, args ...any) {
	s.tell(Event{Phase: Did, Detail: fmt.Sprintf(format, args...)})
}

// Kept ends a step that found everything in place.
func (s Step) Kept(format string, args ...any) {
	s.tell(Event{Phase: Kept, Detail: fmt.Sprintf(format, args...)})
}
