// Command echo is a server for a guest: HTTP/1.1 and h2c, at the address it is
// given. What a client sends comes back in capitals, line by line, while it
// still sends; the number of lines follows as a trailer.
package main

import (
	"bufio"
	"fmt"
	"log"
	"net/http"
	"os"
	"strings"
)

func main() {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Addr: os.Args[1], Protocols: protocols, Handler: http.HandlerFunc(echo)}
	log.Fatal(server.ListenAndServe())
}

func echo(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	_ = c.EnableFullDuplex()
	h := w.Header()
	h.Set("Trailer", "X-Lines")
	h.Set("X-Protocol", r.Proto)
	h.Set("X-Client", r.RemoteAddr)
	h.Set("X-Headers", fmt.Sprint(r.Header))
	w.WriteHeader(http.StatusOK)
	_ = c.Flush()
	n := 0
	for lines := bufio.NewScanner(r.Body); lines.Scan(); n++ {
		fmt.Fprintln(w, strings.ToUpper(lines.Text()))
		_ = c.Flush()
	}
	h.Set("X-Lines", fmt.Sprint(n))
}
