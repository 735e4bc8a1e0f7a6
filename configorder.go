// Where the transports stand in a config. Caddy loads the servers in a random order.

package outboundauth

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"

	"github.com/caddyserver/caddy/v2"
)

// configPlaces says which transport comes first in a config. Those with the same settings
// have the same place: that of the first of them.
type configPlaces map[string]int

// placesIn returns the places of the transports in a config that is not loaded yet.
func placesIn(config *caddy.Config) configPlaces {
	p := make(configPlaces)
	for _, app := range slices.Sorted(maps.Keys(config.AppsRaw)) {
		p.read(config.AppsRaw[app])
	}
	return p
}

// sort sorts transports by their places, and those of one place by their upstreams.
func (p configPlaces) sort(transports []*Transport) {
	places, upstreams := make(map[*Transport]int), make(map[*Transport]string)
	for _, t := range transports { // once for each, as there may be thousands
		places[t], upstreams[t] = p[t.settings()], fmt.Sprint(t.named)
	}
	slices.SortFunc(transports, func(a, b *Transport) int {
		return cmp.Or(places[a]-places[b], cmp.Compare(upstreams[a], upstreams[b]))
	})
}

// settings returns the transport's own settings, by which it is found in a config.
func (t *Transport) settings() string {
	text, _ := json.Marshal([]any{t.Credentials, t.Upstreams, t.Clients, t.InsecurePlaintext}) // can't fail: it comes from JSON
	return string(text)
}

// read notes the transports in a JSON text, in the order of the text.
func (p configPlaces) read(text json.RawMessage) {
	for _, member := range membersOf(text) {
		p.read(member)
	}
	var module struct{ Protocol string }
	t := new(Transport)
	if json.Unmarshal(text, &module) != nil || module.Protocol != "oauth2" || json.Unmarshal(text, t) != nil {
		return
	}
	if settings := t.settings(); p[settings] == 0 {
		p[settings] = len(p) + 1
	}
}

// caddyfileServer is what the servers of a Caddyfile are called.
var caddyfileServer = regexp.MustCompile(`^srv(\d+)$`)

// membersOf returns what an array or an object consists of, in the order of the text. But
// the servers of a Caddyfile come in the order of their numbers: srv2 before srv10.
func membersOf(text json.RawMessage) (members []json.RawMessage) {
	type numbered struct {
		number int
		text   json.RawMessage
	}
	var all []numbered
	decoder := json.NewDecoder(bytes.NewReader(text))
	open, err := decoder.Token()
	if err != nil || (open != json.Delim('{') && open != json.Delim('[')) {
		return nil
	}
	for decoder.More() {
		var member numbered
		if open == json.Delim('{') {
			name, _ := decoder.Token()
			if match := caddyfileServer.FindStringSubmatch(fmt.Sprint(name)); match != nil {
				member.number, _ = strconv.Atoi(match[1])
			}
		}
		if decoder.Decode(&member.text) != nil {
			break // Caddy will say what is wrong
		}
		all = append(all, member)
	}
	slices.SortStableFunc(all, func(a, b numbered) int { return a.number - b.number })
	for _, member := range all {
		members = append(members, member.text)
	}
	return members
}
