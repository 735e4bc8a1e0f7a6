package main

import (
	"fmt"
	"image/color"
	"strings"

	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/vgsvg"
)

// canvas knows how wide its texts are.
type canvas struct {
	*vgsvg.Canvas
	widths []vg.Length
}

func (c *canvas) FillString(face font.Face, at vg.Point, text string) {
	c.widths = append(c.widths, face.Width(text))
	c.Canvas.FillString(face, at, text)
}

// svg returns what is on the canvas. It looks the same whatever fonts there are,
// and has colors for dark pages as well.
func (c *canvas) svg() ([]byte, error) {
	var b strings.Builder
	if _, err := c.WriteTo(&b); err != nil {
		return nil, err
	}
	// The fonts are not in the file, so that the viewer takes others: they are
	// squeezed or stretched into the width that each text has been given.
	svg := strings.ReplaceAll(b.String(), "font-family:Liberation Sans;", "font-family:'Liberation Sans',Arial,Helvetica,sans-serif;")
	tags := strings.SplitAfter(svg, "<text ")
	for i, width := range c.widths {
		tags[i+1] = fmt.Sprintf(`textLength="%.5g" lengthAdjust="spacingAndGlyphs" `, width.Points()) + tags[i+1]
	}
	return []byte(strings.Replace(strings.Join(tags, ""), "<g ", darkStyle()+"<g ", 1)), nil
}

// darkStyle returns the style that replaces colors on a dark page.
func darkStyle() string {
	var b strings.Builder
	b.WriteString("<style>\n@media (prefers-color-scheme: dark) {\n")
	replace := func(property string, light, dark color.RGBA) {
		fmt.Fprintf(&b, "[style*=\"%[1]s:%[2]s\"] { %[1]s: %[3]s !important }\n", property, hex(light), hex(dark))
	}
	for _, c := range onDark {
		replace(c.property, c.light, c.dark)
	}
	for _, name := range palette {
		replace("fill", mix(colors[name], background), mix(colors[name], darkBackground))
	}
	b.WriteString("}\n</style>\n")
	return b.String()
}

// hex writes a color as it is in an SVG.
func hex(c color.RGBA) string { return fmt.Sprintf("#%02X%02X%02X", c.R, c.G, c.B) }
