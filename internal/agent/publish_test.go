package agent

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// A published port is listened for until its sandbox has ended, by the next agent, too. A
// create whose port is taken makes nothing.
func TestPublish(t *testing.T) {
	r := newRig(t)
	r.start()
	status, answer := r.call("CreateSandbox", `{"name":"web","publish":[{"port":8000},{"port":8001}]}`)
	ports, _ := answer["publish"].([]any)
	if status != http.StatusOK || len(ports) != 2 {
		t.Fatalf("create: HTTP %d, %v", status, answer)
	}
	addr := fmt.Sprintf("127.0.0.1:%v", ports[0].(map[string]any)["hostPort"])
	listens := func() bool {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	if !listens() {
		t.Error("no one listens")
	}
	status, answer = r.call("CreateSandbox", `{"publish":[{"port":80},{"port":9000,"host_port":`+strings.TrimPrefix(addr, "127.0.0.1:")+`}]}`)
	if message, _ := answer["message"].(string); status != http.StatusConflict || !strings.Contains(message, "is in use") {
		t.Errorf("a port that is taken: HTTP %d, %v", status, answer)
	}
	if status, answer := r.call("CreateSandbox", `{"publish":[{"port":80}],"owner_key":"x"}`); status != http.StatusBadRequest {
		t.Errorf("with an owner key: HTTP %d, %v", status, answer)
	}
	if got := r.list(); len(got) != 1 {
		t.Errorf("%d sandboxes", len(got))
	}
	if err := r.ended(); err != nil {
		t.Fatal(err)
	}
	if listens() {
		t.Error("it is listened for without an agent")
	}
	r.start()
	for deadline := time.Now().Add(10 * time.Second); !listens(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the next agent does not listen")
		}
	}
	if status, answer := r.call("DestroySandbox", `{"sandbox_id":"web"}`); status != http.StatusOK {
		t.Errorf("destroy: HTTP %d, %v", status, answer)
	}
	for deadline := time.Now().Add(10 * time.Second); listens(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is listened for without a sandbox")
		}
	}
	if err := r.ended(); err != nil {
		t.Error(err)
	}
	r.wantNothing()
}
