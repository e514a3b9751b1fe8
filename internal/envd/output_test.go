package envd

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// drain takes what there is now.
func drain(s *subscriber) string {
	var text strings.Builder
	for {
		c, ok, _ := s.take()
		if !ok {
			return text.String()
		}
		text.Write(c.data)
	}
}

var block = []byte(strings.Repeat("x", readSize))

// writeBlocks writes n blocks and returns a channel that is closed when all of them
// are in.
func writeBlocks(o *output, n int) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range n {
			o.write(stdout, block)
		}
	}()
	return done
}

func TestOutputWithoutSubscribersIsFree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		<-writeBlocks(o, 1000)
		if o.size > outputBuffer {
			t.Errorf("%d bytes are held", o.size)
		}
		s := o.subscribe()
		if got := drain(s); got != "" {
			t.Errorf("a new subscriber got %d old bytes", len(got))
		}
		o.write(stderr, []byte("new"))
		if got := drain(s); got != "new" {
			t.Errorf("got %q", got)
		}
	})
}

func TestOutputSoleSubscriberLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		s := o.subscribe()
		began := time.Now()
		done := writeBlocks(o, 100)
		var n int
		for n < 100*readSize {
			time.Sleep(stallLimit - time.Second) // slow, but alive
			c, ok, _ := s.take()
			if !ok {
				t.Fatal("nothing to take")
			}
			if len(c.data) != readSize {
				t.Fatalf("got %q", c.data)
			}
			n += len(c.data)
		}
		<-done
		if time.Since(began) < 90*(stallLimit-time.Second) {
			t.Error("the process was not held up")
		}
	})
}

func TestOutputDoesNotWaitForAStalledSubscriber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		s := o.subscribe()
		began := time.Now()
		<-writeBlocks(o, 1000)
		if took := time.Since(began); took != stallLimit {
			t.Errorf("held up for %v, want %v once", took, stallLimit)
		}
		o.write(stderr, []byte("end"))
		o.end()
		got := drain(s)
		held := strings.Count(got, "x")
		if want := missedText(1000*readSize - held); !strings.HasPrefix(got, want) || !strings.HasSuffix(got, "xend") {
			t.Errorf("got %.60q…, want %q first", got, want)
		}
		if _, ok, more := s.take(); ok || more {
			t.Error("not at its end")
		}
	})
}

func missedText(n int) string { return string(missedChunk(stdout, int64(n)).data) }

func TestOutputFastestSetsThePace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		slow, fast := o.subscribe(), o.subscribe()
		read := make(chan string)
		go func() {
			var text strings.Builder
			for {
				c, ok, more := fast.take()
				if !ok && !more {
					break
				}
				text.Write(c.data)
				if !ok {
					fast.await(context.Background(), nil)
				}
			}
			read <- text.String()
		}()
		began := time.Now()
		<-writeBlocks(o, 1000)
		o.end()
		if got := <-read; len(got) != 1000*readSize || strings.Contains(got, "missed") {
			t.Errorf("the fast one got %d bytes", len(got))
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("the slow one held the others up for %v", took)
		}
		if got := drain(slow); !strings.Contains(got, "bytes of output missed") {
			t.Errorf("the slow one was not told: got %d bytes", len(got))
		}
	})
}

func TestOutputDoesNotWaitForAGoneSubscriber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		s := o.subscribe()
		began := time.Now()
		done := writeBlocks(o, 1000)
		synctest.Wait() // the writer waits
		s.close()
		<-done
		if took := time.Since(began); took != 0 {
			t.Errorf("held up for %v", took)
		}
	})
}

func TestOutputMarksWhatIsMissingWhereItIsMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		s := o.subscribe()
		o.write(stderr, []byte("lost at the end of its stream"))
		<-writeBlocks(o, 20)
		o.end()
		marks := map[stream]int{}
		for {
			c, ok, _ := s.take()
			if !ok {
				break
			}
			if strings.Contains(string(c.data), "missed") {
				marks[c.stream]++
			}
		}
		if marks[stdout] != 1 || marks[stderr] != 1 {
			t.Errorf("marks: %v, want one in each stream", marks)
		}
	})
}

func TestOutputResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput()
		o.write(stdout, []byte("abc"))
		o.write(stderr, []byte("ERR"))
		o.write(stdout, []byte("def"))
		for _, tt := range []struct {
			seen [streams]int64
			want string
		}{
			{[streams]int64{}, "abcERRdef"},
			{[streams]int64{stdout: 1}, "bcERRdef"},
			{[streams]int64{stdout: 3, stderr: 3}, "def"},
			{[streams]int64{stdout: 5, stderr: 3}, "f"},
			{[streams]int64{stdout: 100, stderr: 100}, ""},
			{[streams]int64{stdout: -1, stderr: 3}, "abcdef"},
		} {
			s := o.resume(tt.seen)
			if got := drain(s); got != tt.want {
				t.Errorf("%v: %q, want %q", tt.seen, got, tt.want)
			}
			s.close()
		}
		<-writeBlocks(o, 20)
		s := o.resume([streams]int64{stdout: 2, stderr: 3})
		got := drain(s)
		held := strings.Count(got, "x")
		if want := missedText(20*readSize + 4 - held); !strings.HasPrefix(got, want) || held == 0 {
			t.Errorf("got %.60q…, want %q first", got, want)
		}
	})
}
