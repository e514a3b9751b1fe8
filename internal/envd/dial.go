package envd

import (
	"io"
	"net"
	"net/http"
	"time"

	"git.omukk.dev/wrenn/sandbox/internal/splice"
)

const loopbackTimeout = 3 * time.Second

// tunnels serves CONNECT localhost:PORT, so that the host reaches servers
// that listen on the guest's loopback alone. It passes other requests to next.
func (s *Server) tunnels(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			next.ServeHTTP(w, r)
			return
		}
		host, port, err := net.SplitHostPort(r.Host)
		if err != nil || host != "localhost" || r.ProtoMajor != 1 {
			writeError(w, http.StatusBadRequest, "CONNECT leads to localhost:PORT, over HTTP/1.1")
			return
		}
		server, err := dialLoopback(r, port)
		if err != nil {
			writeError(w, http.StatusBadGateway, cause(err).Error())
			return
		}
		defer server.Close()
		client, rest, err := http.NewResponseController(w).Hijack()
		if err != nil {
			writeError(w, http.StatusInternalServerError, err.Error())
			return
		}
		defer client.Close()
		if _, err := io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
			return
		}
		splice.Run(client, server, rest, server)
	})
}

// dialLoopback connects to the port on 127.0.0.1 or, if that fails, on ::1.
func dialLoopback(r *http.Request, port string) (net.Conn, error) {
	dialer := net.Dialer{Timeout: loopbackTimeout}
	conn, err := dialer.DialContext(r.Context(), "tcp", net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		if six, err := dialer.DialContext(r.Context(), "tcp", net.JoinHostPort("::1", port)); err == nil {
			return six, nil
		}
	}
	return conn, err
}
