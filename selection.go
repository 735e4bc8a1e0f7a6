// Which OAuth clients a list shows, and in which order: those first that need an operator.

package outboundauth

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
)

// The parameters of a list, by their names in a query. The flags of `caddy oauth2-status`
// have the same names.
const (
	paramName  = "name"
	paramKey   = "key"
	paramState = "state"
	paramLimit = "limit"
)

var selectionParams = []string{paramName, paramKey, paramState, paramLimit}

// A list can also be asked for what the state of a token does not say.
const (
	stateFailing = "failing" // the last attempt to get a token failed
	stateRefused = "refused" // an upstream refuses the token now
)

var selectableStates = append(slices.Clone(tokenStates), stateFailing, stateRefused)

// selection says which clients a list shows. The zero value says all.
type selection struct {
	name   string   // a pattern; "" selects all names
	key    string   // a client key; "" selects all clients
	states []string // some of selectableStates, of which a client has one; none selects all
	limit  int      // how many clients are shown at most; 0 if there is no limit
}

// parseSelection reads a selection from the parameters of a query. An error begins with
// the name of the parameter, and controls no terminal, whatever a parameter holds.
func parseSelection(params url.Values) (s selection, err error) {
	for _, param := range slices.Sorted(maps.Keys(params)) {
		if !slices.Contains(selectionParams, param) {
			return selection{}, fmt.Errorf("%q: is not a parameter of this list; it has %s", param, strings.Join(selectionParams, ", "))
		}
		if n := len(params[param]); n > 1 {
			return selection{}, fmt.Errorf("%s: is given %d times; give it once", param, n)
		}
		switch value := params.Get(param); param {
		case paramName:
			err = s.setName(value)
		case paramKey:
			if s.key = value; value == "" {
				err = errors.New("key: is empty; name a client key, or leave it out to get all clients")
			}
		case paramState:
			err = s.setStates(value)
		case paramLimit:
			err = s.setLimit(value)
		}
		if err != nil {
			return selection{}, err
		}
	}
	return s, nil
}

func (s *selection) setName(pattern string) error {
	if pattern == "" {
		return errors.New("name: is empty; name a client or a pattern, or leave it out to get all clients")
	}
	if _, err := path.Match(pattern, ""); err != nil {
		return fmt.Errorf(`name: %q is not a pattern; write a \ before each [ and \ that is a part of the name`, pattern)
	}
	s.name = pattern
	return nil
}

func (s *selection) setStates(states string) error {
	s.states = strings.Split(states, ",")
	for _, state := range s.states {
		if !slices.Contains(selectableStates, state) {
			return fmt.Errorf("state: %q is not known; name one or more of %s, with commas between them", state, strings.Join(selectableStates, ", "))
		}
	}
	return nil
}

func (s *selection) setLimit(limit string) error {
	n, err := strconv.Atoi(limit)
	if err != nil || n <= 0 {
		return fmt.Errorf("limit: %q is not a positive integer; name one, or leave it out to get all clients", limit)
	}
	s.limit = n
	return nil
}

// query returns what parseSelection reads, as a part of a URL: empty for all clients.
func (s selection) query() string {
	params := make(url.Values)
	if s.name != "" {
		params.Set(paramName, s.name)
	}
	if s.key != "" {
		params.Set(paramKey, s.key)
	}
	if len(s.states) > 0 {
		params.Set(paramState, strings.Join(s.states, ","))
	}
	if s.limit > 0 {
		params.Set(paramLimit, strconv.Itoa(s.limit))
	}
	if len(params) == 0 {
		return ""
	}
	return "?" + params.Encode()
}

// selectsName reports whether clients of this name are selected: the pattern is the name,
// or matches it. The first is for names like [::1]:9400/orders, which do not match
// themselves.
func (s selection) selectsName(name string) bool {
	if s.name == "" || s.name == name {
		return true
	}
	matches, _ := path.Match(withoutSlashes(s.name), withoutSlashes(name)) // setName has checked the pattern
	return matches
}

// withoutSlashes returns a name or a pattern for path.Match, in which a * ends at a slash.
// A name is no path: the default one is <host>/<client_id>, and the client_id may be a URL.
func withoutSlashes(s string) string { return strings.ReplaceAll(s, "/", "\x00") }

// selects reports whether a client is selected.
func (s selection) selects(client *sourceStatus) bool {
	return s.selectsName(client.name) && (s.key == "" || slices.Contains(client.Keys, s.key)) && (len(s.states) == 0 || slices.ContainsFunc(s.states, client.is))
}

// is reports whether one of the selectableStates holds.
func (s *sourceStatus) is(state string) bool {
	switch state {
	case stateFailing:
		return s.failing() > 0
	case stateRefused:
		upstreams, _ := s.refusing()
		return upstreams > 0
	}
	return s.state == state
}

// listed is a client on its way into a list.
type listed struct {
	*sourceStatus
	urgency int
	id      string // "" until somebody asks for it: it takes longer than all the rest
}

func (l *listed) getID() string {
	if l.id == "" {
		l.id = l.key.id()
	}
	return l.id
}

// of returns the clients that are selected, the most urgent first, then by name, then by
// ID. It also returns how many there are without the limit.
func (s selection) of(statuses []*sourceStatus) (shown []*sourceStatus, total int) {
	var selected []*listed
	for _, client := range statuses {
		if s.selects(client) {
			selected = append(selected, &listed{sourceStatus: client, urgency: client.urgency()})
		}
	}
	slices.SortFunc(selected, func(a, b *listed) int {
		if first := cmp.Or(b.urgency-a.urgency, strings.Compare(a.name, b.name)); first != 0 {
			return first
		}
		return strings.Compare(a.getID(), b.getID())
	})
	total = len(selected)
	if s.limit > 0 {
		selected = selected[:min(s.limit, total)]
	}
	for _, l := range selected {
		shown = append(shown, l.sourceStatus)
	}
	return shown, total
}
