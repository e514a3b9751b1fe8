package sandbox

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
)

// TestBoxLocks: the fields of a box under mu are touched only by functions that lock
// it or say that it is locked, and those under the op lock only by functions that take
// it or say that it is held.
func TestBoxLocks(t *testing.T) {
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	touched := map[string]int{}
	set := token.NewFileSet()
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		file, err := parser.ParseFile(set, f.Name(), nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil && fn.Name.Name != "newBox" {
				for _, wrong := range wrongTouches(fn, touched) {
					t.Errorf("%s: %s touches %s", set.Position(fn.Pos()), fn.Name.Name, wrong)
				}
			}
		}
	}
	if touched["mu"] < 20 || touched["op"] < 20 {
		t.Errorf("the test sees too little: %v", touched)
	}
}

// wrongTouches returns the fields that a function touches without their lock, and
// counts all that it touches.
func wrongTouches(fn *ast.FuncDecl, touched map[string]int) (wrong []string) {
	doc := strings.Join(strings.Fields(fn.Doc.Text()), " ")
	says := map[string]bool{"mu": strings.Contains(doc, "Called with mu held"), "op": strings.Contains(doc, "Called with the op lock held")}
	takes := map[string]bool{}
	ast.Inspect(fn.Body, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok {
			if s, ok := call.Fun.(*ast.SelectorExpr); ok {
				switch name := s.Sel.Name; {
				case name == "Lock" && group(s.X) == "mu":
					takes["mu"] = true
				case name == "hold" || name == "tryHold" || name == "begin":
					takes["op"] = true
				}
			}
		}
		s, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		g := group(s.X)
		if g == "" || s.Sel.Name == "Lock" || s.Sel.Name == "Unlock" {
			return true
		}
		touched[g]++
		if !says[g] && !takes[g] {
			wrong = append(wrong, "b."+g+"."+s.Sel.Name)
		}
		return true
	})
	return wrong
}

// group is mu or op for b.mu and b.op.
func group(x ast.Expr) string {
	s, ok := x.(*ast.SelectorExpr)
	if !ok || s.Sel.Name != "mu" && s.Sel.Name != "op" {
		return ""
	}
	if id, ok := s.X.(*ast.Ident); !ok || id.Name != "b" && id.Name != "old" {
		return ""
	}
	return s.Sel.Name
}
