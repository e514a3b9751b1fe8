package envd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	processv1 "git.omukk.dev/wrenn/sandbox/api/process"
	"git.omukk.dev/wrenn/sandbox/internal/guestapi"
)

const keepaliveDefault = 90 * time.Second

// processService serves process.Process.
type processService struct{ *Server }

func (s processService) List(context.Context, *connect.Request[processv1.ListRequest]) (*connect.Response[processv1.ListResponse], error) {
	var infos []*processv1.ProcessInfo
	for _, p := range s.processes.list() {
		infos = append(infos, &processv1.ProcessInfo{Config: p.config, Pid: uint32(p.child.pid), Tag: p.tag})
	}
	return connect.NewResponse(&processv1.ListResponse{Processes: infos}), nil
}

func (s processService) Start(
	ctx context.Context, req *connect.Request[processv1.StartRequest], stream *connect.ServerStream[processv1.StartResponse],
) error {
	as, err := s.requestUser(req.Header())
	if err != nil {
		return err
	}
	config := req.Msg.GetProcess()
	if config == nil {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("the process is missing"))
	}
	lifetime := req.Header().Get(guestapi.HeaderLifetime)
	c := command{
		config: config, tag: req.Msg.Tag, as: as,
		stdin:    req.Msg.Stdin == nil || *req.Msg.Stdin,
		gentle:   lifetime == guestapi.LifetimeStream || lifetime == guestapi.LifetimeCommand,
		detached: lifetime == guestapi.LifetimeDetached,
	}
	if pty := req.Msg.GetPty(); pty != nil {
		c.size = pty.GetSize()
		if c.size == nil {
			c.size = &processv1.PTY_Size{Cols: 80, Rows: 24}
		}
	}
	if c.cwd, err = s.resolveCwd(config.GetCwd(), as); err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	c.env = s.environment(as)
	if c.size != nil {
		c.env["TERM"] = "xterm-256color"
	}
	maps.Copy(c.env, s.userEnv())
	maps.Copy(c.env, config.GetEnvs())
	if deadline, ok := ctx.Deadline(); ok {
		if c.limit = time.Until(deadline); c.limit <= 0 {
			return connect.NewError(connect.CodeDeadlineExceeded, context.DeadlineExceeded)
		}
	}

	p, sub, err := s.processes.start(c)
	if err != nil {
		return err
	}
	defer sub.close()
	send := func(e *processv1.ProcessEvent) error {
		if e.GetEnd() != nil && lifetime == guestapi.LifetimeCommand {
			p.signalAll(unix.SIGKILL)
			p.awaitGone(killWait)
		}
		if e.GetEnd() != nil && p.overran.Load() {
			// It did not end by itself.
			return connect.NewError(connect.CodeDeadlineExceeded, context.DeadlineExceeded)
		}
		return stream.Send(&processv1.StartResponse{Event: e})
	}
	err = s.follow(ctx, p, sub, keepalive(req.Header()), send)
	if err != nil && c.gentle {
		// The client is told of the end when no process is left, and gets the
		// output up to then.
		p.terminate(true)
		p.awaitFinished(killWait)
		for c, ok, _ := sub.take(); ok && errors.Is(err, context.DeadlineExceeded); c, ok, _ = sub.take() {
			if sendErr := send(dataEvent(c)); sendErr != nil {
				break
			}
		}
	}
	return err
}

func (s processService) Connect(
	ctx context.Context, req *connect.Request[processv1.ConnectRequest], stream *connect.ServerStream[processv1.ConnectResponse],
) error {
	p, err := s.processes.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	var sub *subscriber
	if text := req.Header().Get(guestapi.HeaderOffset); text == "" {
		sub = p.out.subscribe()
	} else if seen, err := parseOffsets(text); err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	} else {
		sub = p.out.resume(seen)
	}
	defer sub.close()
	send := func(e *processv1.ProcessEvent) error { return stream.Send(&processv1.ConnectResponse{Event: e}) }
	if req.Header().Get(guestapi.HeaderFollow) != guestapi.FollowNot {
		return s.follow(ctx, p, sub, keepalive(req.Header()), send)
	}
	now, cancel := context.WithCancel(ctx)
	cancel() // what is held is told all the same
	if err = s.follow(now, p, sub, keepaliveDefault, send); errors.Is(err, context.Canceled) && ctx.Err() == nil {
		return nil
	}
	return err
}

// follow sends a process's events: its start, its output, keepalives when
// nothing else was sent for a while, its end.
func (s processService) follow(
	ctx context.Context, p *process, sub *subscriber, interval time.Duration, send func(*processv1.ProcessEvent) error,
) error {
	start := &processv1.ProcessEvent_StartEvent{Pid: uint32(p.child.pid)}
	if err := send(&processv1.ProcessEvent{Event: &processv1.ProcessEvent_Start{Start: start}}); err != nil {
		return err
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		c, ok, more := sub.take()
		switch {
		case ok:
			if err := send(dataEvent(c)); err != nil {
				return err
			}
			ticker.Reset(interval)
		case !more:
			return send(&processv1.ProcessEvent{Event: &processv1.ProcessEvent_End{End: p.ending}})
		case ctx.Err() != nil:
			return ctx.Err()
		case sub.await(ctx, ticker.C):
			alive := &processv1.ProcessEvent_Keepalive{Keepalive: &processv1.ProcessEvent_KeepAlive{}}
			if err := send(&processv1.ProcessEvent{Event: alive}); err != nil {
				return err
			}
		}
	}
}

func dataEvent(c chunk) *processv1.ProcessEvent {
	data := &processv1.ProcessEvent_DataEvent{}
	switch c.stream {
	case stdout:
		data.Output = &processv1.ProcessEvent_DataEvent_Stdout{Stdout: c.data}
	case stderr:
		data.Output = &processv1.ProcessEvent_DataEvent_Stderr{Stderr: c.data}
	case terminal:
		data.Output = &processv1.ProcessEvent_DataEvent_Pty{Pty: c.data}
	}
	return &processv1.ProcessEvent{Event: &processv1.ProcessEvent_Data{Data: data}}
}

func (s processService) SendSignal(
	ctx context.Context, req *connect.Request[processv1.SendSignalRequest],
) (*connect.Response[processv1.SendSignalResponse], error) {
	p, err := s.running(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	var sig unix.Signal
	wait := killWait
	switch req.Msg.GetSignal() {
	case processv1.Signal_SIGNAL_SIGKILL:
		sig = unix.SIGKILL
	case processv1.Signal_SIGNAL_SIGTERM:
		sig, wait = unix.SIGTERM, drainGrace // it may be ignored
	default:
		return nil, connect.NewError(connect.CodeUnimplemented, fmt.Errorf("invalid signal: %s", req.Msg.GetSignal()))
	}
	if err := p.child.signal(sig); err != nil && !p.gone() {
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("send signal: %w", err))
	}
	p.awaitReaped(ctx, wait)
	return connect.NewResponse(&processv1.SendSignalResponse{}), nil
}

// keepalive returns the interval that a client asks for, in seconds.
func keepalive(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get(guestapi.HeaderKeepalive))
	if err != nil || n <= 0 || n > 24*60*60 {
		return keepaliveDefault
	}
	return time.Duration(n) * time.Second
}

// resolveCwd is the directory that a process starts in.
func (s *Server) resolveCwd(cwd string, as account) (string, error) {
	if cwd == "" && s.defaults().workdir == "" {
		if dirExists(as.home) {
			return as.home, nil
		}
		return "/", nil
	}
	return s.resolvePath(cwd, as)
}

// resolvePath makes a client's path absolute. An empty path is the default
// directory; "~" is the user's home, and other paths are relative to it.
func (s *Server) resolvePath(path string, as account) (string, error) {
	if hasNUL(path) {
		return "", errors.New("the path contains a NUL byte")
	}
	if path == "" {
		if path = s.defaults().workdir; path == "" {
			return as.home, nil
		}
	}
	switch {
	case path == "~":
		return as.home, nil
	case len(path) > 1 && path[:2] == "~/":
		return filepath.Join(as.home, path[2:]), nil
	case path[0] == '~':
		return "", fmt.Errorf("cannot resolve '%s': only one's own home has a short name", path)
	case filepath.IsAbs(path):
		return filepath.Clean(path), nil
	default:
		return filepath.Join(as.home, path), nil
	}
}

func (s processService) SendInput(
	_ context.Context, req *connect.Request[processv1.SendInputRequest],
) (*connect.Response[processv1.SendInputResponse], error) {
	p, err := s.running(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.feed(req.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processv1.SendInputResponse{}), nil
}

// StreamInput feeds one process, piece after piece in the order sent.
func (s processService) StreamInput(
	_ context.Context, stream *connect.ClientStream[processv1.StreamInputRequest],
) (*connect.Response[processv1.StreamInputResponse], error) {
	var p *process
	for stream.Receive() {
		switch event := stream.Msg().GetEvent().(type) {
		case *processv1.StreamInputRequest_Start:
			var err error
			if p, err = s.running(event.Start.GetProcess()); err != nil {
				return nil, err
			}
		case *processv1.StreamInputRequest_Data:
			if p == nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("input before the start event that names its process"))
			}
			if err := p.feed(event.Data.GetInput()); err != nil {
				return nil, err
			}
		case *processv1.StreamInputRequest_Keepalive:
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&processv1.StreamInputResponse{}), nil
}

func (p *process) feed(input *processv1.ProcessInput) error {
	var err error
	switch in := input.GetInput().(type) {
	case *processv1.ProcessInput_Stdin:
		err = p.write(in.Stdin, false)
	case *processv1.ProcessInput_Pty:
		err = p.write(in.Pty, true)
	default:
		return connect.NewError(connect.CodeInvalidArgument, errors.New("the input is neither for stdin nor for a terminal"))
	}
	if err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	return nil
}

func (s processService) CloseStdin(
	_ context.Context, req *connect.Request[processv1.CloseStdinRequest],
) (*connect.Response[processv1.CloseStdinResponse], error) {
	p, err := s.processes.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.closeStdin(); err != nil {
		return nil, connect.NewError(connect.CodeUnknown, err)
	}
	return connect.NewResponse(&processv1.CloseStdinResponse{}), nil
}

func (s processService) Update(
	_ context.Context, req *connect.Request[processv1.UpdateRequest],
) (*connect.Response[processv1.UpdateResponse], error) {
	p, err := s.running(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if size := req.Msg.GetPty().GetSize(); size != nil {
		if err := p.resize(size); err != nil {
			return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("resize the terminal: %w", err))
		}
	}
	return connect.NewResponse(&processv1.UpdateResponse{}), nil
}

// running is find without the processes that have ended.
func (s processService) running(sel *processv1.ProcessSelector) (*process, error) {
	p, err := s.processes.find(sel)
	if err != nil {
		return nil, err
	}
	if p.gone() {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", p.child.pid))
	}
	return p, nil
}

// parseOffsets reads a guestapi.HeaderOffset. Of a stream that it does not name,
// the client has seen nothing.
func parseOffsets(text string) (seen [streams]int64, err error) {
	names := map[string]stream{"stdout": stdout, "stderr": stderr, "pty": terminal}
	for item := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(item), "=")
		st, ok := names[name]
		n, err := strconv.ParseInt(value, 10, 64)
		if !ok || err != nil || n < 0 {
			return seen, fmt.Errorf("%s: cannot read %q", guestapi.HeaderOffset, item)
		}
		seen[st] = n
	}
	return seen, nil
}
