// Command ratchet fails when the source is harder to read than it was: a
// function of more than 80 lines, one whose cognitive complexity is over 30, a
// line of more than 140 columns, or a word that words lists.
//
// What exceeds these limits today is in list.txt, with its number. A new or
// larger number fails, and so does a smaller one that the list does not have
// yet: `make ratchet` writes it there. Nothing but an editor makes a number
// larger. Generated code is exempt.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/uudashr/gocognit"
)

const (
	maxLines      = 80
	maxComplexity = 30
	maxColumns    = 140 // a tab is one
)

// words are those that make a reader look for what is meant: pronouns without a
// noun, conjunctions that hide a condition, and metaphors for mechanisms.
var words = regexp.MustCompile(`(?i)\b(nobody|somebody|whoever|whom|whomever|meanwhile|but for|by then|` +
	`photos?|photograph\w*|picture\w*|develop(s|ed)?|awaken\w*|letgo|houses?|rooms)\b`)

// newline is the end of a line with what begins the next line of a comment, so
// that words are found across lines.
var newline = regexp.MustCompile(`\s*\n\s*(//|#)?\s*`)

// counts maps a fault, such as "function internal/sandbox Manager.Create", to
// its number.
type counts map[string]int

func main() {
	root := flag.String("root", "..", "the root of the source tree")
	list := flag.String("list", "ratchet/list.txt", "the file of the present excesses; without one, all are new")
	write := flag.Bool("write", false, "write smaller numbers into the list")
	flag.Parse()
	if err := run(*root, *list, *write); err != nil {
		fmt.Fprintln(os.Stderr, "ratchet:", err)
		os.Exit(1)
	}
}

func run(root, list string, write bool) error {
	found, err := measure(root)
	if err != nil {
		return err
	}
	listed, err := read(list)
	if errors.Is(err, fs.ErrNotExist) && write {
		listed, err = found, nil
	}
	if err != nil {
		return err
	}
	worse, better := compare(listed, found)
	if write {
		for name, n := range listed {
			if n = min(n, found[name]); n > 0 {
				listed[name] = n
			} else {
				delete(listed, name)
			}
		}
		if err := os.WriteFile(list, listed.text(), 0o644); err != nil {
			return fmt.Errorf("write list: %w", err)
		}
		better = nil
	}
	for _, line := range append(worse, better...) {
		fmt.Println(line)
	}
	if len(worse) > 0 {
		return fmt.Errorf("%d excesses are new or have grown: make them smaller", len(worse))
	}
	if len(better) > 0 {
		return fmt.Errorf("%d excesses are smaller than the list says: run `make ratchet`", len(better))
	}
	return nil
}

// compare says what is above the listed number, and what is below it.
func compare(listed, found counts) (worse, better []string) {
	all := maps.Clone(listed)
	maps.Copy(all, found)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		line := fmt.Sprintf("%s: %d, listed with %d", name, found[name], listed[name])
		switch {
		case found[name] > listed[name]:
			worse = append(worse, line)
		case found[name] < listed[name]:
			better = append(better, line)
		}
	}
	return worse, better
}

// measure finds all excesses of the files that git knows below root.
func measure(root string) (counts, error) {
	cmd := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list files: %w", err)
	}
	found := counts{}
	for name := range strings.Lines(string(out)) {
		if name = strings.TrimSpace(name); !counted(name) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(root, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted, not yet committed
		}
		if err != nil {
			return nil, err
		}
		if err := found.add(name, text); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// counted says whether a file is source or a document. The list of words is in
// this directory, which is left out.
func counted(name string) bool {
	if strings.HasPrefix(name, "tools/ratchet/") || strings.Contains(name, "/testdata/") && !strings.HasSuffix(name, ".go") {
		return false
	}
	return path.Base(name) == "Makefile" || slices.Contains([]string{".go", ".md", ".proto", ".sh"}, path.Ext(name))
}

// add measures one file.
func (c counts) add(name string, text []byte) error {
	dir := path.Dir(name)
	if strings.HasSuffix(name, ".go") {
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, name, text, parser.ParseComments)
		if err != nil {
			return err
		}
		if ast.IsGenerated(file) {
			return nil
		}
		for _, f := range gocognit.ComplexityStats(file, fset, nil) {
			c.over(maxComplexity, f.Complexity, "complexity", dir, f.FuncName)
		}
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok {
				lines := fset.Position(f.End()).Line - fset.Position(f.Pos()).Line + 1
				c.over(maxLines, lines, "function", dir, funcName(f))
			}
		}
		for line := range strings.Lines(string(text)) {
			if utf8.RuneCountInString(strings.TrimRight(line, "\n")) > maxColumns {
				c["line "+name]++
			}
		}
	}
	for _, word := range words.FindAllString(newline.ReplaceAllString(string(text), " "), -1) {
		c["word "+dir+" "+strings.ToLower(word)]++
	}
	return nil
}

func (c counts) over(limit, n int, kind, dir, name string) {
	if key := kind + " " + dir + " " + name; n > limit {
		c[key] = max(c[key], n)
	}
}

// funcName writes a function as gocognit does: "Open", "(*Network).Open".
func funcName(f *ast.FuncDecl) string {
	if f.Recv == nil || len(f.Recv.List) == 0 {
		return f.Name.Name
	}
	var star string
	t := f.Recv.List[0].Type
	if p, ok := t.(*ast.StarExpr); ok {
		star, t = "*", p.X
	}
	if g, ok := t.(*ast.IndexExpr); ok {
		t = g.X
	}
	if id, ok := t.(*ast.Ident); ok {
		return fmt.Sprintf("(%s%s).%s", star, id.Name, f.Name.Name)
	}
	return f.Name.Name
}

// read reads a list: a line each, its last field the number.
func read(list string) (counts, error) {
	text, err := os.ReadFile(list)
	if err != nil {
		return nil, err
	}
	c := counts{}
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		end := strings.LastIndexByte(line, ' ')
		n, err := strconv.Atoi(line[end+1:])
		if err != nil || end < 0 {
			return nil, fmt.Errorf("read %s: no number at the end of %q", list, line)
		}
		c[line[:end]] = n
	}
	return c, nil
}

func (c counts) text() []byte {
	var b bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(c)) {
		fmt.Fprintln(&b, name, c[name])
	}
	return b.Bytes()
}
