package layers

import (
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/go/packages"
	"golang.org/x/tools/txtar"
)

// TestMap checks the package on the map. With -v, or when it fails, it also
// shows the circles, and the names that tie each.
func TestMap(t *testing.T) {
	contributing, err := os.ReadFile("../CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	pkg, err := load("..")
	if err != nil {
		t.Fatal(err)
	}
	found := uses(pkg)
	for _, circle := range circles(found) {
		t.Logf("a circle of %d files: %s%s", len(circle), strings.Join(circle, ", "), ties(circle, found))
	}
	for _, problem := range check(readMap(string(contributing)), pkg) {
		t.Error(problem)
	}
}

// ties returns what the files of a circle use of each other, a line for each two.
func ties(circle []string, found []use) string {
	names := map[string]string{}
	for _, u := range found {
		if slices.Contains(circle, u.from) && slices.Contains(circle, u.to) {
			names["\n"+u.from+" uses of "+u.to+":"] += " " + u.name
		}
	}
	var text strings.Builder
	for _, files := range slices.Sorted(maps.Keys(names)) {
		text.WriteString(files + names[files])
	}
	return text.String()
}

// TestCheck checks small packages: in each archive, a map comes first, then the
// files, and last the problems that there should be.
func TestCheck(t *testing.T) {
	archives, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("got no archives (%v), want some", err)
	}
	for _, path := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			files, problems := archive.Files[:len(archive.Files)-1], archive.Files[len(archive.Files)-1]
			want := slices.Collect(strings.Lines(string(problems.Data)))
			var got []string
			for _, problem := range check(readMap(string(archive.Comment)), typeCheck(t, files)) {
				got = append(got, problem+"\n")
			}
			if !slices.Equal(got, want) {
				t.Errorf("got the problems\n%s\nwant\n%s", strings.Join(got, ""), problems.Data)
			}
		})
	}
}

// typeCheck makes a package of files.
func typeCheck(t *testing.T, files []txtar.File) *packages.Package {
	t.Helper()
	pkg := &packages.Package{
		Fset:      token.NewFileSet(),
		TypesInfo: &types.Info{Uses: map[*ast.Ident]types.Object{}},
	}
	for _, file := range files {
		parsed, err := parser.ParseFile(pkg.Fset, file.Name, file.Data, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		pkg.Syntax = append(pkg.Syntax, parsed)
	}
	config := types.Config{Importer: importer.ForCompiler(pkg.Fset, "source", nil)}
	var err error
	pkg.Types, err = config.Check("p", pkg.Fset, pkg.Syntax, pkg.TypesInfo)
	if err != nil {
		t.Fatal(err)
	}
	return pkg
}
