package sandbox

import (
	"errors"
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

// modelledEnd is a deadline and the state that it brings about.
type modelledEnd struct {
	at   time.Time
	then State
}

// settle follows the deadlines that have passed. The agent may have come up since, or
// the sandbox have been unknown: it has a moment to act.
func (m modelled) settle(rt *rapid.T) {
	synctest.Wait()
	for id, end := range m.ends {
		if s := m.states[id]; s != Running && s != Paused || time.Now().Before(end.at) {
			continue
		}
		if info, _ := m.r.Get(id); info.State != end.then {
			time.Sleep(sweepEvery + 100*time.Millisecond)
			synctest.Wait()
		}
		if info, err := m.r.Get(id); info.State != end.then {
			rt.Fatalf("sandbox %s is %s, %v, after its deadline", id, info.State, err)
		}
		m.states[id] = end.then
	}
}

func (m modelled) deadline(rt *rapid.T) {
	id, in := m.pick(rt), rapid.SampledFrom([]time.Duration{-1, 0, 10, 700, 3000, 8000}).Draw(rt, "ms")
	then := rapid.SampledFrom([]OnTimeout{DestroyOnTimeout, HibernateOnTimeout}).Draw(rt, "then")
	end := modelledEnd{time.Now().Add(in * time.Millisecond), Stopped}
	if then == HibernateOnTimeout {
		end.then = Hibernated
	}
	_, err := m.r.SetDeadline(m.r.t.Context(), id, end.at, then)
	if m.want(rt, "deadline", id, err, Running, Paused, Hibernated) {
		m.ends[id] = end
	}
}

func (m modelled) noDeadline(rt *rapid.T) {
	id := m.pick(rt)
	_, err := m.r.SetDeadline(m.r.t.Context(), id, time.Time{}, "")
	if m.want(rt, "no deadline", id, err, Running, Paused, Hibernated) {
		delete(m.ends, id)
	}
}

// resume drops a deadline that has passed while the sandbox was hibernated.
func (m modelled) resume(rt *rapid.T) {
	id := m.pick(rt)
	if !m.want(rt, "resume", id, m.r.Resume(m.r.t.Context(), id), Paused, Hibernated) {
		return
	}
	if m.states[id] == Hibernated && !time.Now().Before(m.ends[id].at) {
		delete(m.ends, id)
	}
	m.states[id] = Running
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
	if !time.Now().Before(m.ends[id].at) {
		delete(m.ends, id)
	}
	m.states[id] = Running
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
