package envd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"

	"git.omukk.dev/wrenn/sandbox/api/filesystem"
)

const (
	// maxWatchers bounds the polled watchers, maxWatcherEvents what each
	// holds until it is asked.
	maxWatchers      = 256
	maxWatcherEvents = 10_000
)

func (s filesystemService) WatchDir(
	ctx context.Context, req *connect.Request[filesystem.WatchDirRequest], stream *connect.ServerStream[filesystem.WatchDirResponse],
) error {
	w, err := s.watch(req.Header(), req.Msg)
	if err != nil {
		return err
	}
	// The reader ends with the watch, whose events it hands over one by one.
	type batch struct {
		events []fileEvent
		err    error
	}
	batches := make(chan batch)
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer wg.Wait()
	defer w.close()
	defer cancel()
	wg.Go(func() {
		for {
			events, err := w.next()
			select {
			case batches <- batch{events, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	})

	start := &filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Start{Start: &filesystem.WatchDirResponse_StartEvent{}}}
	if err := stream.Send(start); err != nil {
		return err
	}
	interval := keepalive(req.Header())
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
			alive := &filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Keepalive{Keepalive: &filesystem.WatchDirResponse_KeepAlive{}}}
			if err := stream.Send(alive); err != nil {
				return err
			}
		case b := <-batches:
			d := s.describerIf(req.Msg.GetIncludeEntry())
			for _, e := range b.events {
				m := e.message(filepath.Join(w.root, e.path), d)
				if err := stream.Send(&filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Filesystem{Filesystem: m}}); err != nil {
					return err
				}
			}
			if b.err != nil {
				return fileError(b.err)
			}
			ticker.Reset(interval)
		}
	}
}

// describerIf is nil where no entries are wanted.
func (s filesystemService) describerIf(wanted bool) *describer {
	if !wanted {
		return nil
	}
	return s.describer()
}

// watchRequest is what the two ways to watch have in common.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetAllowNetworkMounts() bool
}

// watch starts the watch that a request asks for.
func (s filesystemService) watch(h http.Header, msg watchRequest) (*watch, error) {
	path, _, err := s.path(h, msg.GetPath())
	if err != nil {
		return nil, err
	}
	if err := checkDir(path); err != nil {
		return nil, err
	}
	if !msg.GetAllowNetworkMounts() {
		if err := checkLocal(path); err != nil {
			return nil, err
		}
	}
	return newWatch(path, msg.GetRecursive())
}

// watchers are the watches whose events are polled. Safe for concurrent use.
type watchers struct {
	mu     sync.Mutex
	byID   map[string]*watcher
	closed bool
	wg     sync.WaitGroup
}

// watcher collects a watch's events until a client asks for them.
type watcher struct {
	watch *watch
	// idle removes a watcher that no client has polled for watcherIdle.
	idle *time.Timer

	mu     sync.Mutex
	events []*filesystem.FilesystemEvent
	lost   bool
	err    error // the watch has ended
}

// add takes over a watch.
func (ws *watchers) add(w *watch, d func() *describer) (string, error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.closed || len(ws.byID) >= maxWatchers {
		w.close()
		return "", connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("more than %d watchers: remove some", maxWatchers))
	}
	id := rand.Text()
	p := &watcher{watch: w}
	p.idle = time.AfterFunc(watcherIdle, func() { ws.remove(id) })
	if ws.byID == nil {
		ws.byID = make(map[string]*watcher)
	}
	ws.byID[id] = p
	ws.wg.Go(func() { p.collect(d) })
	return id, nil
}

func (p *watcher) collect(d func() *describer) {
	for {
		events, err := p.watch.next()
		describer := d()
		var messages []*filesystem.FilesystemEvent
		for _, e := range events {
			messages = append(messages, e.message(filepath.Join(p.watch.root, e.path), describer))
		}
		p.mu.Lock()
		room := maxWatcherEvents - len(p.events)
		if len(messages) > room || errors.Is(err, errEventsLost) {
			p.lost = true
			messages = messages[:min(room, len(messages))]
		}
		p.events = append(p.events, messages...)
		ended := err != nil && !errors.Is(err, errEventsLost)
		if ended {
			p.err = err
		}
		p.mu.Unlock()
		if ended {
			return
		}
	}
}

// take returns what was collected since the last time; that events were lost
// in between is told once, after them.
func (p *watcher) take() ([]*filesystem.FilesystemEvent, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	events := p.events
	p.events = nil
	switch {
	case len(events) > 0:
		return events, nil
	case p.lost:
		p.lost = false
		return nil, errEventsLost
	case p.err != nil && !errors.Is(p.err, os.ErrClosed):
		return nil, fileError(p.err)
	}
	return nil, nil
}

func (ws *watchers) get(id string) (*watcher, error) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	p := ws.byID[id]
	if p == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id %s not found", id))
	}
	p.idle.Reset(watcherIdle)
	return p, nil
}

// remove ends a watcher. Removing it again is no error.
func (ws *watchers) remove(id string) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if p := ws.byID[id]; p != nil {
		p.idle.Stop()
		p.watch.close()
		delete(ws.byID, id)
	}
}

// close ends all watchers and waits for them.
func (ws *watchers) close() {
	ws.mu.Lock()
	ws.closed = true
	for id, p := range ws.byID {
		p.idle.Stop()
		p.watch.close()
		delete(ws.byID, id)
	}
	ws.mu.Unlock()
	ws.wg.Wait()
}

func (s filesystemService) CreateWatcher(
	_ context.Context, req *connect.Request[filesystem.CreateWatcherRequest],
) (*connect.Response[filesystem.CreateWatcherResponse], error) {
	w, err := s.watch(req.Header(), req.Msg)
	if err != nil {
		return nil, err
	}
	id, err := s.watchers.add(w, func() *describer { return s.describerIf(req.Msg.GetIncludeEntry()) })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.CreateWatcherResponse{WatcherId: id}), nil
}

func (s filesystemService) GetWatcherEvents(
	_ context.Context, req *connect.Request[filesystem.GetWatcherEventsRequest],
) (*connect.Response[filesystem.GetWatcherEventsResponse], error) {
	p, err := s.watchers.get(req.Msg.GetWatcherId())
	if err != nil {
		return nil, err
	}
	events, err := p.take()
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.GetWatcherEventsResponse{Events: events}), nil
}

func (s filesystemService) RemoveWatcher(
	_ context.Context, req *connect.Request[filesystem.RemoveWatcherRequest],
) (*connect.Response[filesystem.RemoveWatcherResponse], error) {
	if _, err := s.watchers.get(req.Msg.GetWatcherId()); err != nil {
		return nil, err
	}
	s.watchers.remove(req.Msg.GetWatcherId())
	return connect.NewResponse(&filesystem.RemoveWatcherResponse{}), nil
}
