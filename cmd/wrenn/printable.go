package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// printable makes text safe for a terminal. A guest chooses the text of its console,
// its errors and the names of its processes and files, and a terminal obeys control
// characters in them. printable keeps letters, marks, digits, punctuation, symbols,
// spaces, tabs and ends of lines. It writes all other characters as \uXXXX: control
// characters, invisible ones, and those that turn the direction of writing. JSON
// reads that form as the character. A byte that is not UTF-8 becomes \xXX.
func printable(text string) string { return escape(text, false) }

// printableLine is printable for one line or one cell of a table: it also writes
// tabs and ends of lines as \uXXXX, so that text cannot forge another line.
func printableLine(text string) string { return escape(text, true) }

func escape(text string, line bool) string {
	var b strings.Builder
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRuneInString(text[i:])
		rest := text[i+n:]
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case (r == '\n' || r == '\t') && !line, unicode.IsGraphic(r):
			b.WriteRune(r)
		case r == '\r' && !line && strings.HasPrefix(strings.TrimLeft(rest, "\r"), "\n"):
			// A serial console ends its lines with \r\n.
		default:
			for _, unit := range utf16.Encode([]rune{r}) {
				fmt.Fprintf(&b, `\u%04x`, unit)
			}
		}
		i += n
	}
	return b.String()
}

// printer makes all that is written to it printable. Commands print to it, so that
// each is safe without code of its own. Only the streams of a command in a sandbox
// go past it, since they must reach the terminal as they are.
type printer struct{ w io.Writer }

func (p printer) Write(text []byte) (int, error) {
	if _, err := io.WriteString(p.w, printable(string(text))); err != nil {
		return 0, err
	}
	return len(text), nil
}

// maxMessage bounds a message, in bytes: a name in it may be a guest's.
const maxMessage = 4096

// complain prints a message on stderr. Lines after the first are indented, so that
// none looks like a message of its own.
func complain(format string, args ...any) {
	text := printable(strings.TrimRight(fmt.Sprintf(format, args...), "\n"))
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage], "") + "…"
	}
	fmt.Fprintln(os.Stderr, "wrenn: "+strings.ReplaceAll(text, "\n", "\n  "))
}

// row prints the cells of a line of a table.
func row(w io.Writer, cells ...any) {
	for i, cell := range cells {
		if i > 0 {
			fmt.Fprint(w, "\t")
		}
		fmt.Fprint(w, printableLine(fmt.Sprint(cell)))
	}
	fmt.Fprintln(w)
}
