package sandbox

import (
	"context"
	"errors"
	"maps"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"git.omukk.dev/wrenn/sandbox/internal/errdefs"
)

// modelled is the part of TestModel's model that follows deadlines and owner keys.
type modelled struct {
	r      *rig
	states map[ID]State
	ends   map[ID]modelledEnd
	keys   map[string]ID // the sandbox may be gone

	pick func(*rapid.T) ID
	want func(rt *rapid.T, what string, id ID, err error, in ...State) bool
}

// with adds what the model does of itself.
func (m modelled) with(actions map[string]func(*rapid.T)) map[string]func(*rapid.T) {
	maps.Copy(actions, map[string]func(*rapid.T){
		"create with a life":       m.createWithLife,
		"connect":                  m.connect,
		"another end":              m.setEnd,
		"wake":                     m.wake,
		"exec":                     m.exec,
		"create with an owner key": m.createOwned,
		"deadline":                 m.deadline,
		"no deadline":              m.noDeadline,
		"pause":                    m.pause,
		"hibernate":                m.hibernate,
		"cold boot":                m.coldBoot,
		"resume":                   m.resume,
	})
	return actions
}

// modelledEnd is a deadline, zero for none, what happens then, and whether traffic
// resumes the sandbox.
type modelledEnd struct {
	at   time.Time
	then OnTimeout
	auto bool
}

// passed says whether the deadline has.
func (e modelledEnd) passed() bool { return passed(asEnd(e.at), time.Now()) }

// brings is the state that the deadline brings about.
func (e modelledEnd) brings() State {
	if e.then.pauses() {
		return Hibernated
	}
	return Stopped
}

// resumed drops a deadline that has passed.
func (e modelledEnd) resumed() modelledEnd {
	if e.passed() {
		e.at = time.Time{}
	}
	return e
}

// settle follows the deadlines that have passed. The agent may have come up since, or
// the sandbox have been unknown: it has a moment to act, in which others may pass.
func (m modelled) settle(rt *rapid.T) {
	synctest.Wait()
	for id, end := range m.ends {
		if s := m.states[id]; s != Running && s != Paused || !end.passed() {
			continue
		}
		if info, _ := m.r.Get(id); info.State != end.brings() {
			time.Sleep(sweepEvery + 100*time.Millisecond)
			defer m.settle(rt)
			synctest.Wait()
		}
		if info, err := m.r.Get(id); info.State != end.brings() {
			rt.Fatalf("sandbox %s is %s, %v, after its deadline", id, info.State, err)
		}
		m.states[id] = end.brings()
	}
}

func (m modelled) deadline(rt *rapid.T) {
	id, end := m.pick(rt), m.drawEnd(rt)
	end.auto = m.ends[id].auto
	_, err := m.r.SetDeadline(m.r.t.Context(), id, end.at, end.then)
	if m.want(rt, "deadline", id, err, Running, Paused, Hibernated) {
		m.ends[id] = end
	}
}

func (m modelled) drawEnd(rt *rapid.T) modelledEnd {
	in := rapid.SampledFrom([]time.Duration{-1, 0, 10, 700, 3000, 8000}).Draw(rt, "ms")
	then := rapid.SampledFrom([]OnTimeout{DestroyOnTimeout, HibernateOnTimeout, HibernateFilesOnTimeout}).Draw(rt, "then")
	return modelledEnd{at: time.Now().Add(in * time.Millisecond), then: then}
}

// createWithLife makes a sandbox whose life begins when it runs.
func (m modelled) createWithLife(rt *rapid.T) {
	if len(m.states) > 8 {
		rt.Skip()
	}
	end := m.drawEnd(rt)
	end.auto = end.then != HibernateFilesOnTimeout && rapid.Bool().Draw(rt, "auto")
	life := max(time.Until(end.at), time.Millisecond)
	made, err := m.r.Create(m.r.t.Context(), CreateRequest{ID: m.r.NewID(), Life: life, OnEnd: end.then, AutoResume: end.auto})
	if err != nil {
		rt.Fatal(err)
	}
	end.at = asEnd(time.Now().Add(life))
	m.states[made.ID], m.ends[made.ID] = Running, end
	m.wantEnd(rt, "create", made.ID)
}

// wantEnd compares a deadline to the millisecond.
func (m modelled) wantEnd(rt *rapid.T, what string, id ID) {
	if info, err := m.r.Get(id); err != nil || !info.EndAt.Equal(asEnd(m.ends[id].at)) {
		rt.Fatalf("after %s the deadline of sandbox %s is %s, the model says %s, %v", what, id, info.EndAt, m.ends[id].at, err)
	}
}

// connect resumes, or moves the deadline to a later time only.
func (m modelled) connect(rt *rapid.T) {
	id, ask := m.pick(rt), m.drawEnd(rt)
	timeout, then := max(time.Until(ask.at), 0), ask.then
	if rapid.Bool().Draw(rt, "as before") {
		then = ""
	}
	_, resumed, err := m.r.Connect(m.r.t.Context(), id, ConnectRequest{Timeout: timeout, OnEnd: then})
	if !m.want(rt, "connect", id, err, Running, Paused, Hibernated) {
		return
	}
	state, end := m.states[id], m.ends[id]
	if resumed != (state != Running) {
		rt.Fatalf("connect to a %s sandbox: resumed is %v", state, resumed)
	}
	at := asEnd(time.Now().Add(timeout))
	switch {
	case resumed && timeout == 0:
		end = end.resumed()
	case resumed, !end.at.IsZero() && at.After(asEnd(end.at)):
		end.at = at
	}
	if then != "" {
		end.then = then
	}
	m.states[id], m.ends[id] = Running, end
	m.wantEnd(rt, "connect", id)
}

func (m modelled) setEnd(rt *rapid.T) {
	id, ask, extend := m.pick(rt), m.drawEnd(rt), rapid.Bool().Draw(rt, "extend")
	err := m.r.SetEnd(m.r.t.Context(), id, ask.at, extend)
	if !m.want(rt, "another end", id, err, Running) {
		return
	}
	end := m.ends[id]
	if !extend || !end.at.IsZero() && asEnd(ask.at).After(asEnd(end.at)) {
		end.at = ask.at
	}
	m.ends[id] = end
	m.wantEnd(rt, "another end", id)
}

// wake is traffic.
func (m modelled) wake(rt *rapid.T) { m.call(rt, "wake", m.r.Wake) }

func (m modelled) exec(rt *rapid.T) {
	m.call(rt, "exec", func(ctx context.Context, id ID) error {
		_, err := m.r.Exec(ctx, id, Command{Cmd: "x"})
		return err
	})
}

// call resumes a sandbox that was made so.
func (m modelled) call(rt *rapid.T, what string, do func(context.Context, ID) error) {
	id := m.pick(rt)
	info, _ := m.r.Get(id)
	end, err := m.ends[id], do(m.r.t.Context(), id)
	asleep := m.states[id] == Hibernated || m.states[id] == Paused
	if asleep && (!end.auto || info.FilesOnly || end.then == HibernateFilesOnTimeout) {
		if !errors.Is(err, errdefs.WrongState) {
			rt.Fatalf("%s woke sandbox %s, %+v: %v", what, id, info, err)
		}
		return
	}
	if m.want(rt, what, id, err, Running, Paused, Hibernated) && asleep {
		end.at = time.Now().Add(minWokenLife)
		m.states[id], m.ends[id] = Running, end
		m.wantEnd(rt, what, id)
	}
}

func (m modelled) noDeadline(rt *rapid.T) {
	id := m.pick(rt)
	_, err := m.r.SetDeadline(m.r.t.Context(), id, time.Time{}, "")
	if m.want(rt, "no deadline", id, err, Running, Paused, Hibernated) {
		end := m.ends[id]
		end.at = time.Time{}
		m.ends[id] = end
	}
}

// resume drops a deadline that has passed while the sandbox was hibernated.
func (m modelled) resume(rt *rapid.T) {
	id := m.pick(rt)
	if !m.want(rt, "resume", id, m.r.Resume(m.r.t.Context(), id), Paused, Hibernated) {
		return
	}
	m.states[id], m.ends[id] = Running, m.ends[id].resumed()
}

func (m modelled) pause(rt *rapid.T) {
	id := m.pick(rt)
	if m.want(rt, "pause", id, m.r.Pause(m.r.t.Context(), id), Running) {
		m.states[id] = Paused
	}
}

// hibernate keeps the memory, or does not.
func (m modelled) hibernate(rt *rapid.T) {
	id, what := m.pick(rt), Hibernation{rapid.Bool().Draw(rt, "files only"), rapid.Bool().Draw(rt, "healthy")}
	if !m.want(rt, "hibernate", id, m.r.Hibernate(m.r.t.Context(), id, what), Running, Paused) {
		return
	}
	m.states[id] = Hibernated
	if info, err := m.r.Get(id); err != nil || info.FilesOnly != what.FilesOnly {
		rt.Fatalf("hibernated as %+v, sandbox %s is %+v, %v", what, id, info, err)
	}
}

// coldBoot is a resume of a sandbox that may have memory, which is lost then.
func (m modelled) coldBoot(rt *rapid.T) {
	id := m.pick(rt)
	if m.states[id] != Hibernated {
		rt.Skip()
	}
	if err := m.r.coldBoot(id); err != nil {
		rt.Fatal(err)
	}
	m.states[id], m.ends[id] = Running, m.ends[id].resumed()
}

func (m modelled) createOwned(rt *rapid.T) {
	key := rapid.SampledFrom([]string{"red", "green"}).Draw(rt, "key")
	id := m.keys[key]
	state, known := m.states[id]
	if len(m.states) > 8 && !known {
		rt.Skip()
	}
	made, err := m.r.Create(m.r.t.Context(), owned(key))
	switch {
	case known && state == Unknown:
		if !errors.Is(err, errdefs.Unavailable) {
			rt.Fatalf("create with the key of an unknown sandbox: %v", err)
		}
	case err != nil:
		rt.Fatal(err)
	case known && made.ID != id:
		rt.Fatalf("create with the key of sandbox %s made %s", id, made.ID)
	case !known:
		m.keys[key], m.states[made.ID] = made.ID, Running
	}
}
