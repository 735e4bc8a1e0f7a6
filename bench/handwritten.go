// A reverse proxy that a team writes itself.

package main

import "context"

var handWrittenProgram = &program{module: ".", pkg: "./handwritten"}

// handWritten is the program in handwritten/. Its comments say what tuned means.
func handWritten(tuned bool) candidate {
	name := "hand-written"
	if tuned {
		name = "hand-written, tuned"
	}
	return candidate{
		name: name,
		version: func(ctx context.Context) (string, error) {
			return handWrittenProgram.version(ctx, "golang.org/x/oauth2", "golang.org/x/oauth2")
		},
		command: func(s *site) ([]string, error) {
			binary, err := handWrittenProgram.build(context.Background())
			if err != nil {
				return nil, err
			}
			file, err := s.writeJSON()
			if err != nil {
				return nil, err
			}
			command := twoCores(binary, "-site", file)
			if tuned {
				command = append(command, "-tuned")
			}
			return command, nil
		},
	}
}
