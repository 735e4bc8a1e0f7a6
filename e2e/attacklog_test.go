package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// The messages of Caddy that show the headers of an upstream's answer, and the field
// with them. What the upstream writes there is its own to tell.
var answerFields = map[string]string{
	"upstream roundtrip": "headers",
	"handled request":    "resp_headers",
	"backend tried to switch to unexpected protocol via Upgrade header": "backend_upgrade",
}

// unasked begins what net/http itself logs of an answer that nobody has asked for. It
// quotes the first bytes: SECURITY.md says so.
const unasked = "Unsolicited response received on idle HTTP channel"

// judgeLog looks for canaries, panics and races in what the gateway has written. It
// returns how many lines there are.
func judgeLog(t *testing.T, found *findings, file, stderr string) (lines int) {
	t.Helper()
	log, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	scanner := bufio.NewScanner(log)
	scanner.Buffer(nil, 64<<20)
	requests := 0
	for ; scanner.Scan(); lines++ {
		judgeLine(found, scanner.Bytes())
		if bytes.Contains(scanner.Bytes(), []byte(`"msg":"upstream roundtrip"`)) {
			requests++
		}
	}
	if err := scanner.Err(); err != nil {
		t.Fatal(err)
	}
	if requests == 0 {
		t.Error("got a log without requests, want one to look for secrets in")
	}
	for line := range strings.Lines(stderr) {
		judgeLine(found, []byte(line))
	}
	judgeRaces(found, stderr)
	return lines
}

// judgeRaces looks for races in what the gateway wrote to standard error. There are two
// of Caddy's own, with any transport. It logs how much of a request's body was read
// while net/http still reads it, since the upstream has answered early. And it counts what
// was read of a body without a lock, while somebody else closes that body.
func judgeRaces(found *findings, stderr string) {
	for report := range strings.SplitSeq(stderr, "==================\n") {
		caddys := strings.Contains(report, "caddyhttp.(*Server).logRequest()") && strings.Contains(report, "caddyhttp.(*lengthReader).Read()")
		const counted = "reverseproxy.(*bodyNopCloserIfNotRead)."
		caddys = caddys || raceIn(report) == counted+"Read() and "+counted+"Close()" || raceIn(report) == counted+"Close() and "+counted+"Read()"
		if strings.Contains(report, "DATA RACE") && !caddys {
			found.add("data race in "+raceIn(report), "%.6000s", report)
		}
	}
}

// raceIn returns which functions race: the first of each stack that is none of Go's
// runtime.
func raceIn(report string) string {
	var functions []string
	wanted := false
	for line := range strings.Lines(report) {
		line = strings.TrimSpace(line)
		switch name := line[strings.LastIndex(line, "/")+1:]; {
		case strings.Contains(line, " by goroutine "):
			wanted = true
		case wanted && strings.HasSuffix(line, "()") && !strings.HasPrefix(name, "runtime."):
			functions = append(functions, name)
			wanted = false
		}
	}
	return strings.Join(functions, " and ")
}

// judgeLine notes what is wrong with a line of the log.
func judgeLine(found *findings, line []byte) {
	if panicked.Match(line) {
		found.add("panic", "%.3000s", line)
	}
	if shown := shownIn(line); shown != "" && shownIn(ownWords(line)) != "" {
		found.add("line of the log with a secret", "what belongs to %s in %.3000s", shown, line)
	}
}

// ownWords returns a line without what an upstream may write there: the headers of its
// answer, and what it has answered unasked. A client's secret is no upstream's to tell.
func ownWords(line []byte) []byte {
	var entry map[string]any
	if json.Unmarshal(line, &entry) != nil || strings.Contains(shownIn(line), string(secretOwner)) {
		return line
	}
	message, _ := entry["msg"].(string)
	if strings.HasPrefix(message, unasked) {
		return nil
	}
	delete(entry, answerFields[message])
	rest, err := json.Marshal(entry)
	if err != nil {
		return line
	}
	return rest
}
