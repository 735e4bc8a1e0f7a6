// The Caddyfile grammar of client_by and of client blocks.

package outboundauth

import (
	"slices"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// keyedBlocks has client_by and the client blocks while they are read.
type keyedBlocks struct {
	ClientsByKey

	by, first caddyfile.Dispenser // the places of client_by and of the first client block
	blocks    []*credentialsBlock // of those that are not off
	keys      map[string]bool     // that are named so far
}

// unmarshalBy reads client_by.
func (k *keyedBlocks) unmarshalBy(d *caddyfile.Dispenser) error {
	if k.By != "" {
		return d.Err("client_by is set twice: keep one")
	}
	k.by = *d
	if err := oneArg(d, &k.By); err != nil {
		return err
	}
	if d.NextArg() {
		return d.Err("client_by: too many arguments: name one placeholder")
	}
	if err := checkClientBy(k.By); err != nil {
		return d.WrapErr(err)
	}
	return nil
}

// unmarshal reads a client block:
//
//	client (<key...> | default) [{
//		<settings of the credentials>
//	}]
//	client (<key...> | default) off
func (k *keyedBlocks) unmarshal(d *caddyfile.Dispenser) error {
	if k.Named == nil && k.Default == nil {
		k.first = *d
	}
	block := newCredentialsBlock(d)
	block.ofServer = true
	keys := d.RemainingArgs()
	off := len(keys) > 0 && keys[len(keys)-1] == "off"
	if off {
		keys = keys[:len(keys)-1]
	}
	if len(keys) > 1 && credentialsSettings["client_"+keys[0]] != nil {
		return d.Errf("client: write client_%s, if that is meant; otherwise name the key %s behind the others", keys[0], keys[0])
	}
	byDefault := slices.Equal(keys, []string{"default"})
	switch {
	case len(keys) == 0:
		return d.Err("client: name the keys of its requests, or default for those without a key")
	case slices.Contains(keys, "off"):
		return d.Err("client: off comes last")
	case byDefault && k.Default != nil:
		return d.Err("client default is there twice: keep one")
	case !byDefault && slices.Contains(keys, "default"):
		return d.Err("client: default stands alone: it is for requests without a key")
	}
	if !byDefault {
		for _, key := range keys {
			if err := checkClientKey(key); err != nil {
				return d.WrapErr(err)
			}
			if k.keys[key] {
				return d.WrapErr(errKeyTwice)
			}
			if k.keys == nil {
				k.keys = make(map[string]bool)
			}
			k.keys[key] = true
		}
	}
	if err := block.unmarshalAll(d, "client", off); err != nil {
		return err
	}
	var own *Credentials // nil inherits all, too
	if len(block.seen) > 0 {
		own = &block.Credentials
	}
	if !off {
		k.blocks = append(k.blocks, block)
	}
	if byDefault {
		k.Default = &DefaultClient{Off: off, Credentials: own}
	} else {
		k.Named = append(k.Named, &NamedClient{Keys: keys, Off: off, Credentials: own})
	}
	return nil
}

// config returns what was read; nil if there was nothing.
func (k *keyedBlocks) config() (*ClientsByKey, error) {
	blocks := len(k.Named) > 0 || k.Default != nil
	switch {
	case k.By == "" && !blocks:
		return nil, nil //nolint:nilnil // see above
	case k.By == "":
		return nil, k.first.WrapErr(errNoClientBy)
	case len(k.Named) == 0:
		return nil, k.by.WrapErr(errNoNamedClient)
	}
	return &k.ClientsByKey, nil
}
