package main

import (
	"fmt"
	"image/color"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/common/model"
	xfnt "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	vgdraw "gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

const (
	columns = 2

	// A README is about this wide, and its text 16 high.
	width      vg.Length = 830
	margin     vg.Length = 16
	panelWidth           = (width - (columns+1)*margin) / columns
	plotHeight vg.Length = 140 // with the time axis
	lineHeight vg.Length = 21  // of titles and legends
	heading              = 2*lineHeight + 12

	titleSize = 16
	textSize  = 15
)

// These are the colors on a light page.
var (
	background = color.RGBA{0xff, 0xff, 0xff, 0xff}
	foreground = color.RGBA{0x24, 0x29, 0x2f, 0xff}
	faint      = color.RGBA{0x57, 0x60, 0x6a, 0xff}
	gridColor  = color.RGBA{0xd8, 0xde, 0xe4, 0xff}
	faultColor = color.RGBA{0xfd, 0xec, 0xea, 0xff}
	faultInk   = color.RGBA{0xb3, 0x26, 0x1e, 0xff}

	// colors are Grafana's, in shades for a light background.
	colors = map[string]color.RGBA{
		"green":  {0x56, 0xa6, 0x4b, 0xff},
		"blue":   {0x32, 0x74, 0xd9, 0xff},
		"yellow": {0xe0, 0xb4, 0x00, 0xff},
		"orange": {0xff, 0x78, 0x0a, 0xff},
		"red":    {0xe0, 0x2f, 0x44, 0xff},
		"purple": {0xa3, 0x52, 0xcc, 0xff},
		"gray":   {0x80, 0x80, 0x80, 0xff},
	}
	palette = []string{"blue", "orange", "purple", "yellow", "red", "green"}
)

// onDark are the colors that are others on a dark page.
var onDark = []struct {
	property    string
	light, dark color.RGBA
}{
	{"fill", background, darkBackground},
	{"fill", foreground, color.RGBA{0xe6, 0xed, 0xf3, 0xff}},
	{"fill", faint, color.RGBA{0x9d, 0xa7, 0xb3, 0xff}},
	{"stroke", gridColor, color.RGBA{0x30, 0x36, 0x3d, 0xff}},
	{"fill", faultColor, color.RGBA{0x32, 0x17, 0x1b, 0xff}},
	{"fill", faultInk, color.RGBA{0xff, 0x7b, 0x72, 0xff}},
}

var darkBackground = color.RGBA{0x0d, 0x11, 0x17, 0xff}

// draw returns the panels of a recording as SVG.
func draw(r *recording) ([]byte, error) {
	plot.DefaultFont = font.Font{Typeface: "Liberation", Variant: "Sans"}
	faults := r.legend().lines(width - 2*margin)
	tiles := vgdraw.Tiles{
		Rows: (len(r.charts) + columns - 1) / columns, Cols: columns,
		PadTop:    2*margin + vg.Length(len(faults))*lineHeight + heading,
		PadBottom: margin, PadLeft: margin, PadRight: margin,
		PadX: margin, PadY: margin + heading,
	}
	height := tiles.PadTop + vg.Length(tiles.Rows)*(plotHeight+tiles.PadY) - tiles.PadY + tiles.PadBottom
	sheet := &canvas{Canvas: vgsvg.New(width, height)}
	dc := vgdraw.New(sheet)
	dc.FillPolygon(background, rectangle(dc.Rectangle))
	write(dc, vg.Point{X: margin, Y: height - margin}, faults)

	plots := make([][]*plot.Plot, tiles.Rows)
	for row := range plots {
		plots[row] = make([]*plot.Plot, columns)
	}
	for i, c := range r.charts {
		p, err := c.plot(r)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.Title, err)
		}
		plots[i/columns][i%columns] = p
	}
	for row, canvases := range plot.Align(plots, tiles, dc) {
		charts := r.charts[row*columns : min((row+1)*columns, len(r.charts))]
		lines := 1 // of the longest legend
		for _, c := range charts {
			lines = max(lines, len(c.legend().lines(panelWidth)))
		}
		for col, c := range charts {
			plots[row][col].Draw(vgdraw.Crop(canvases[col], 0, 0, 0, -vg.Length(lines-1)*lineHeight))
			top := vg.Point{X: tiles.At(dc, col, row).Min.X, Y: tiles.At(dc, col, row).Max.Y + heading}
			dc.FillText(style(titleSize, foreground, true), vg.Point{X: top.X, Y: top.Y - lineHeight/2}, c.Title)
			write(dc, vg.Point{X: top.X, Y: top.Y - lineHeight}, c.legend().lines(panelWidth))
		}
	}
	return sheet.svg()
}

func style(size float64, c color.Color, bold bool) text.Style {
	f := font.From(plot.DefaultFont, vg.Points(size))
	if bold {
		f.Weight = xfnt.WeightBold
	}
	return text.Style{Color: c, Font: f, Handler: plot.DefaultTextHandler, YAlign: text.YCenter}
}

// legend explains numbers or colors.
type legend []entry

// entry is a text after a number or, without one, a swatch of a color.
type entry struct {
	number string
	color  color.RGBA
	text   string
}

const (
	swatch       vg.Length = 14
	afterMark    vg.Length = 6
	betweenMarks vg.Length = 18 // from a text to the next mark
)

func (e entry) markWidth() vg.Length {
	if e.number == "" {
		return swatch
	}
	return style(textSize, nil, true).Width(e.number)
}

func (e entry) width() vg.Length {
	return e.markWidth() + afterMark + style(textSize, nil, false).Width(e.text)
}

// lines breaks a legend where a line would be too wide.
func (l legend) lines(width vg.Length) []legend {
	lines := []legend{nil}
	used := vg.Length(0)
	for _, e := range l {
		if used > 0 && used+e.width() > width {
			lines, used = append(lines, nil), 0
		}
		last := len(lines) - 1
		lines[last] = append(lines[last], e)
		used += e.width() + betweenMarks
	}
	return lines
}

// write writes lines below a point.
func write(dc vgdraw.Canvas, at vg.Point, lines []legend) {
	for i, line := range lines {
		x, y := at.X, at.Y-(vg.Length(i)+0.5)*lineHeight
		for _, e := range line {
			ink := foreground
			if e.number == "" {
				ink = faint
				dc.FillPolygon(e.color, rectangle(vg.Rectangle{Min: vg.Point{X: x, Y: y - 3}, Max: vg.Point{X: x + swatch, Y: y + 3}}))
			} else {
				dc.FillText(style(textSize, e.color, true), vg.Point{X: x, Y: y}, e.number)
			}
			dc.FillText(style(textSize, ink, false), vg.Point{X: x + e.markWidth() + afterMark, Y: y}, e.text)
			x += e.width() + betweenMarks
		}
	}
}

// legend explains the numbers of the faults.
func (r *recording) legend() legend {
	l := make(legend, len(r.faults))
	for i, f := range r.faults {
		l[i] = entry{strconv.Itoa(i + 1), faultInk, f.name}
	}
	return l
}

// legend explains the panel's colors.
func (c *chart) legend() legend {
	if mappings := c.mappings(); mappings != nil {
		l := make(legend, len(mappings))
		for value := range l {
			m := mappings[strconv.Itoa(value)]
			l[value] = entry{color: m.color, text: m.text}
		}
		return l
	}
	l := make(legend, len(c.series))
	for i, s := range c.series {
		l[i] = entry{color: c.color(i), text: s.name}
	}
	return l
}

// plot returns the panel with its data.
func (c *chart) plot(r *recording) (*plot.Plot, error) {
	p := plot.New()
	p.BackgroundColor = background
	p.X.Min, p.X.Max = 0, r.end.Sub(r.start).Seconds()
	p.X.Tick.Marker = minutes{}
	p.Y.Min, p.Y.Max = 0, 1
	for _, axis := range []*plot.Axis{&p.X, &p.Y} {
		axis.Color = faint
		axis.LineStyle.Width = 0
		axis.Padding = 2
		axis.Tick.Color = gridColor
		axis.Tick.Length = 4
		axis.Tick.Label.Color = faint
		axis.Tick.Label.Font.Size = textSize
	}
	p.X.Padding = 6 // so that the labels of 0 don't touch
	p.Add(bands{r})

	if mappings := c.mappings(); mappings != nil {
		t := timeline{rows: c.series, mappings: mappings, start: r.start}
		p.Add(t)
		p.Y.Max = (1 + headroom) * float64(len(c.series))
		p.Y.Tick.Marker = t
		p.Y.Tick.Length = 0
		return p, nil
	}

	p.Y.Tick.Marker = unit(c.FieldConfig.Defaults.Unit)
	grid := plotter.NewGrid()
	grid.Vertical.Width = 0
	grid.Horizontal.Color, grid.Horizontal.Width = gridColor, vg.Points(0.75)
	p.Add(grid)
	lines := c.lines(r.start)
	for i, points := range slices.Backward(lines) { // of a stack, the highest is the last
		shade := c.color(i)
		for _, part := range whole(points) {
			line, err := plotter.NewLine(part)
			if err != nil {
				return nil, err
			}
			line.Color, line.Width = shade, vg.Points(1.4)
			if c.stacked() {
				line.FillColor = mix(shade, background)
			}
			p.Add(line)
		}
	}
	p.Y.Max = c.ceiling(lines)
	return p, nil
}

// headroom is for the numbers of the faults, as a part of the height of what is
// below them.
const headroom = 0.33

// ceiling is the end of the y axis.
func (c *chart) ceiling(lines []plotter.XYs) float64 {
	highest := 0.0
	for _, points := range lines {
		for _, point := range points {
			if !math.IsNaN(point.Y) {
				highest = max(highest, point.Y)
			}
		}
	}
	return (1 + headroom) * highest
}

// lines returns the points of the series; of a stack, their sums.
func (c *chart) lines(start time.Time) []plotter.XYs {
	below := make(map[model.Time]float64)
	lines := make([]plotter.XYs, len(c.series))
	for i, s := range c.series {
		for _, sample := range s.samples {
			y := float64(sample.Value)
			if c.stacked() {
				below[sample.Timestamp] += y
				y = below[sample.Timestamp]
			}
			lines[i] = append(lines[i], plotter.XY{X: seconds(sample, start), Y: y})
		}
	}
	return lines
}

// whole splits a line where it has gaps, and leaves out points that change
// nothing.
func whole(points plotter.XYs) []plotter.XYs {
	var parts []plotter.XYs
	last := math.Inf(-1)
	for _, point := range points {
		if math.IsNaN(point.Y) {
			continue
		}
		if point.X-last > 1.5*step.Seconds() {
			parts = append(parts, nil)
		}
		last = point.X
		part := parts[len(parts)-1]
		if n := len(part); n >= 2 && part[n-1].Y == point.Y && part[n-2].Y == point.Y {
			part = part[:n-1]
		}
		parts[len(parts)-1] = append(part, point)
	}
	return parts
}

func (c *chart) stacked() bool { return c.FieldConfig.Defaults.Custom.Stacking.Mode == "normal" }

// color returns the color of a series: what the panel says, or another.
func (c *chart) color(i int) color.RGBA {
	for _, o := range c.FieldConfig.Overrides {
		if o.Matcher.Options == c.series[i].name {
			return colors[o.Properties[0].Value.FixedColor]
		}
	}
	return colors[palette[i%len(palette)]]
}

// mappings returns what the panel's values mean, if they are no measures.
func (c *chart) mappings() map[string]mapping {
	if len(c.FieldConfig.Defaults.Mappings) == 0 {
		return nil
	}
	mappings := make(map[string]mapping)
	for value, m := range c.FieldConfig.Defaults.Mappings[0].Options {
		mappings[value] = mapping{m.Text, colors[m.Color]}
	}
	return mappings
}

// mapping is what a value means.
type mapping struct {
	text  string
	color color.RGBA
}

// bands shades the faults, and numbers them.
type bands struct{ *recording }

func (b bands) Plot(c vgdraw.Canvas, p *plot.Plot) {
	x, _ := p.Transforms(&c)
	for i, f := range b.faults {
		from, to := x(f.from.Sub(b.start).Seconds()), x(f.to.Sub(b.start).Seconds())
		c.FillPolygon(faultColor, rectangle(vg.Rectangle{Min: vg.Point{X: from, Y: c.Min.Y}, Max: vg.Point{X: to, Y: c.Max.Y}}))
		number := style(textSize, faultInk, true)
		number.XAlign = text.XCenter
		c.FillText(number, vg.Point{X: (from + to) / 2, Y: c.Max.Y - 10}, strconv.Itoa(i+1))
	}
}

// timeline draws values that are states: a row for each series, and the color
// tells the value. It is the ticks of its own y axis, too.
type timeline struct {
	rows     []series
	mappings map[string]mapping
	start    time.Time
}

func (t timeline) Plot(c vgdraw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	for i, row := range t.rows {
		top := float64(len(t.rows) - i)
		samples := row.samples
		for len(samples) > 0 {
			n := 1
			for n < len(samples) && samples[n].Value == samples[0].Value {
				n++
			}
			end := samples[min(n, len(samples)-1)]
			c.FillPolygon(t.mappings[samples[0].Value.String()].color, rectangle(vg.Rectangle{
				Min: vg.Point{X: x(seconds(samples[0], t.start)), Y: y(top - 0.8)},
				Max: vg.Point{X: x(seconds(end, t.start)), Y: y(top - 0.2)},
			}))
			samples = samples[n:]
		}
	}
}

func (t timeline) Ticks(_, _ float64) []plot.Tick {
	ticks := make([]plot.Tick, len(t.rows))
	for i, row := range t.rows {
		ticks[i] = plot.Tick{Value: float64(len(t.rows)-i) - 0.5, Label: row.name}
	}
	return ticks
}

// minutes are the ticks of the time axis.
type minutes struct{}

func (minutes) Ticks(_, to float64) []plot.Tick {
	var ticks []plot.Tick
	for minute := 0; float64(60*minute) <= to; minute++ {
		ticks = append(ticks, plot.Tick{Value: float64(60 * minute), Label: fmt.Sprintf("%d min", minute)})
	}
	return ticks
}

// unit is the unit of a y axis, by Grafana's name.
type unit string

func (u unit) Ticks(from, to float64) []plot.Tick {
	suffix := map[unit]string{"s": " s", "reqps": " /s", "opm": " /min"}[u]
	var ticks []plot.Tick
	for _, tick := range (plot.DefaultTicks{}).Ticks(from, to/(1+headroom)) {
		if tick.Label != "" {
			ticks = append(ticks, plot.Tick{Value: tick.Value, Label: strconv.FormatFloat(tick.Value, 'g', 3, 64) + suffix})
		}
	}
	return ticks
}

func seconds(s model.SamplePair, since time.Time) float64 {
	return s.Timestamp.Time().Sub(since).Seconds()
}

func rectangle(r vg.Rectangle) []vg.Point {
	return []vg.Point{r.Min, {X: r.Max.X, Y: r.Min.Y}, r.Max, {X: r.Min.X, Y: r.Max.Y}}
}

// mix returns the color halfway between two, as areas are filled.
func mix(a, b color.RGBA) color.RGBA {
	half := func(a, b uint8) uint8 { return uint8((int(a) + int(b)) / 2) }
	return color.RGBA{half(a.R, b.R), half(a.G, b.G), half(a.B, b.B), 0xff}
}
