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

// printable is text as a terminal may be given it. A guest writes its console,
// names its processes and files, and words its errors; a terminal obeys what it
// is given. So all but letters, marks, digits, punctuation, symbols, spaces,
// tabs and ends of lines is shown as \uXXXX: control characters of both kinds,
// what turns the direction of writing, what is invisible. A byte that is no
// UTF-8 is \xXX. In JSON the form means what it stands for.
func printable(text string) string { return escape(text, false) }

// printableLine is printable of what has one line, or one cell of a table, and
// cannot forge another.
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
			// A serial console ends its lines so.
		default:
			for _, unit := range utf16.Encode([]rune{r}) {
				fmt.Fprintf(&b, `\u%04x`, unit)
			}
		}
		i += n
	}
	return b.String()
}

// printer makes all that is written to it printable. It is what commands print
// to, so that a new one need not think of it; only what must reach the terminal
// as it is, a command's own stream, goes past it.
type printer struct{ w io.Writer }

func (p printer) Write(text []byte) (int, error) {
	if _, err := io.WriteString(p.w, printable(string(text))); err != nil {
		return 0, err
	}
	return len(text), nil
}

// maxMessage bounds a message, in bytes: a name in it may be a guest's.
const maxMessage = 4096

// complain prints a message on stderr. Its lines after the first are indented:
// none of them passes for a message of its own.
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
