// Package layers keeps the map of CONTRIBUTING.md. Each file of the module's
// package is on a line of the map. A file uses only the files to its left and the
// files of the lines below. The compiler asks for no such order within a
// package. But without an order, soon no file can be read first.
package layers

import (
	"cmp"
	"errors"
	"fmt"
	"go/ast"
	"go/token"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

const (
	// packageComment is the file that opens with the package's documentation.
	packageComment = "module.go"

	// Two files that use each other may be one thing seen from two sides. Three
	// files that all use each other are one file in pieces.
	maxCircles     = 3
	maxCircleFiles = 2
)

// A use is the first place where a file names a thing of another file.
type use struct {
	from, to, name string
	line           int
}

// load type-checks the package in a directory, without its tests.
func load(dir string) (*packages.Package, error) {
	pkgs, err := packages.Load(&packages.Config{
		Dir: dir,
		Mode: packages.NeedName | packages.NeedFiles | packages.NeedCompiledGoFiles | packages.NeedImports |
			packages.NeedTypes | packages.NeedTypesSizes | packages.NeedTypesInfo | packages.NeedSyntax,
	}, ".")
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, e := range pkgs[0].Errors {
		errs = append(errs, e)
	}
	return pkgs[0], errors.Join(errs...)
}

var goFile = regexp.MustCompile("`([^`]+\\.go)`")

// readMap returns the files on each line of the map, from the top. The lines
// are the rows of the table in the section "The map".
func readMap(markdown string) [][]string {
	_, section, _ := strings.Cut(markdown, "## The map\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var lines [][]string
	for row := range strings.Lines(section) {
		if !strings.HasPrefix(row, "|") {
			continue
		}
		var files []string
		for _, match := range goFile.FindAllStringSubmatch(row, -1) {
			files = append(files, match[1])
		}
		lines = append(lines, files) // the head of the table names no files
	}
	return lines
}

// check returns what is wrong with a map, or with the package on it. It sorts
// the problems by file.
func check(lines [][]string, pkg *packages.Package) []string {
	var problems []string
	report := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }

	files := map[string]*ast.File{}
	for _, file := range pkg.Syntax {
		files[position(pkg, file.Package).Filename] = file
	}
	line := map[string]int{}   // counted from the top
	column := map[string]int{} // counted from the left
	for i, names := range lines {
		for j, name := range names {
			if _, twice := line[name]; twice {
				report("%s: is on the map twice: take one out", name)
			} else if files[name] == nil {
				report("%s: is on the map but not in the package: take it out", name)
			}
			line[name], column[name] = i, j
		}
	}

	for name, file := range files {
		if _, mapped := line[name]; !mapped {
			report("%s: is not on the map: add it to a line of the table in CONTRIBUTING.md", name)
		}
		if !opensWithComment(pkg, file) {
			report("%s:1: says nothing of itself: begin it with a comment (//) on what it is", name)
		} else if file.Doc != nil && name != packageComment {
			report("%s:1: documents the package, as %s does: put a blank line before the package clause", name, packageComment)
		}
	}

	found := uses(pkg)
	all := circles(found)
	for _, u := range found {
		from, mapped := line[u.from]
		to, known := line[u.to]
		switch {
		case !mapped || !known:
		case to < from:
			report("%s:%d: uses %s of %s, a line above: move one of them", u.from, u.line, u.name, u.to)
		case to == from && column[u.to] > column[u.from] && !inOne(all, u.from, u.to):
			report("%s:%d: uses %s of %s, to the right of it: put that file first", u.from, u.line, u.name, u.to)
		}
	}

	for _, c := range all {
		if len(c) > maxCircleFiles {
			report("%s: is in a circle of %d files, at most %d may be: untie %s", c[0], len(c), maxCircleFiles, strings.Join(c, ", "))
		}
	}
	if len(all) > maxCircles {
		report("there are %d circles, at most %d may be: untie one of them", len(all), maxCircles)
	}

	// The sort is stable: the uses in a file are already in their order.
	slices.SortStableFunc(problems, func(a, b string) int { return cmp.Compare(subject(a), subject(b)) })
	return problems
}

// subject returns the file that a problem is about.
func subject(problem string) string {
	file, _, _ := strings.Cut(problem, ":")
	return file
}

// opensWithComment reports whether a file's first line is a comment for
// readers, and not a comment for the compiler.
func opensWithComment(pkg *packages.Package, file *ast.File) bool {
	if len(file.Comments) == 0 {
		return false
	}
	first := file.Comments[0].List[0]
	return position(pkg, first.Pos()).Offset == 0 && strings.HasPrefix(first.Text, "// ")
}

// uses returns what the files of a package use of each other, in the order of
// the source.
func uses(pkg *packages.Package) []use {
	var found []use
	for _, file := range pkg.Syntax {
		known := map[token.Pos]bool{}
		ast.Inspect(file, func(n ast.Node) bool {
			id, ok := n.(*ast.Ident)
			if !ok {
				return true
			}
			obj := pkg.TypesInfo.Uses[id]
			if obj == nil || obj.Pkg() != pkg.Types || known[obj.Pos()] {
				return true
			}
			known[obj.Pos()] = true
			at, declared := position(pkg, id.Pos()), position(pkg, obj.Pos())
			if at.Filename != declared.Filename {
				found = append(found, use{at.Filename, declared.Filename, id.Name, at.Line})
			}
			return true
		})
	}
	return found
}

// inOne reports whether two files are in one circle.
func inOne(circles [][]string, a, b string) bool {
	return slices.ContainsFunc(circles, func(c []string) bool { return slices.Contains(c, a) && slices.Contains(c, b) })
}

// circles returns the sets of files that all use each other, directly or
// through other files.
func circles(found []use) [][]string {
	direct := map[string][]string{}
	for _, u := range found {
		direct[u.from] = append(direct[u.from], u.to)
	}
	reach := map[string]map[string]bool{} // for each file, all files that it needs
	for from := range direct {
		reach[from] = map[string]bool{}
		for next := slices.Clone(direct[from]); len(next) > 0; next = next[1:] {
			if to := next[0]; !reach[from][to] {
				reach[from][to] = true
				next = append(next, direct[to]...)
			}
		}
	}
	var sets [][]string
	done := map[string]bool{}
	for _, file := range slices.Sorted(maps.Keys(reach)) {
		if done[file] || !reach[file][file] {
			continue
		}
		var set []string
		for other := range reach[file] {
			if reach[other][file] {
				set = append(set, other)
				done[other] = true
			}
		}
		slices.Sort(set)
		sets = append(sets, set)
	}
	return sets
}

// position returns the place of something in the source, without the directory.
func position(pkg *packages.Package, pos token.Pos) token.Position {
	at := pkg.Fset.Position(pos)
	at.Filename = filepath.Base(at.Filename)
	return at
}
