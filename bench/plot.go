// The plots of RESULTS.md.

package main

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// A picture is a plot of a record. Its title is for those who can't see it, too.
type picture struct {
	title string
	draw  func(r *record, title string) *vgsvg.Canvas // nil if there is nothing to show
}

const (
	cpuPicture     = "cpu.svg"
	latencyPicture = "latency.svg"
	failedPicture  = "failed.svg"
)

// pictures are by the names of their files.
var pictures = map[string]picture{
	cpuPicture:     {"CPU time of one request at saturation, in µs: median and spread of the rounds", drawCPU},
	latencyPicture: {"Latency at 1,500 requests a second, on a logarithmic scale", drawLatency},
	failedPicture:  {"Failed requests, on a logarithmic scale", drawFailed},
}

// The colours are of the palette of Okabe and Ito: everybody can tell them apart.
var (
	blue       = color.RGBA{0x00, 0x72, 0xb2, 0xff}
	orange     = color.RGBA{0xe6, 0x9f, 0x00, 0xff}
	vermillion = color.RGBA{0xd5, 0x5e, 0x00, 0xff}
	grey       = color.RGBA{0x99, 0x99, 0x99, 0xff}
	faint      = color.RGBA{0xd0, 0xd0, 0xd0, 0xff}
)

// Lengths are in points.
const (
	width     = 600
	rowHeight = 20
	around    = 64 // what a plot needs above and below its rows
	barWidth  = 11
	gap       = 4
)

// svg returns the file, or nothing if the record has nothing to show.
func (p picture) svg(r *record) ([]byte, error) {
	canvas := p.draw(r, p.title)
	if canvas == nil {
		return nil, nil
	}
	var b bytes.Buffer
	if _, err := canvas.WriteTo(&b); err != nil {
		return nil, err
	}
	// Letters of these fonts have the same widths, and every reader has one of them.
	return bytes.ReplaceAll(b.Bytes(), []byte("font-family:Liberation Sans"),
		[]byte("font-family:'Liberation Sans',Arial,Helvetica,sans-serif")), nil
}

func drawCPU(r *record, title string) *vgsvg.Canvas {
	names := r.having(valueCPU, "saturation")
	if len(names) == 0 {
		return nil
	}
	p := newPlot(title, names)
	for i, name := range names {
		f := r.figure(setup{scenario: "saturation", candidate: name}, valueCPU)
		fill := blue
		if name == yardstick {
			fill = grey
		}
		y := row(i, names)
		addBar(p, y, f.median*1e6, fill)
		p.Add(&plotter.XErrorBars{
			XYs:       plotter.XYs{{X: f.median * 1e6, Y: y}},
			XErrors:   plotter.XErrors{{Low: (f.least - f.median) * 1e6, High: (f.most - f.median) * 1e6}},
			LineStyle: draw.LineStyle{Color: color.Black, Width: 1},
			CapWidth:  barWidth / 2,
		})
		addLabel(p, y, f.most*1e6, significant(f.median*1e6))
	}
	canvas, inside := newCanvas(around + rowHeight*len(names))
	p.Draw(inside)
	return canvas
}

func drawLatency(r *record, title string) *vgsvg.Canvas {
	names := r.having(valueP50, "open loop")
	if len(names) == 0 {
		return nil
	}
	p := newPlot(title, names)
	p.X.Scale = plot.LogScale{}
	p.X.Min = math.Inf(1) // the points set it
	percentiles := []string{valueP50, valueP99, valueP999}
	glyphs := []draw.GlyphStyle{
		{Color: blue, Radius: 4, Shape: draw.CircleGlyph{}},
		{Color: orange, Radius: 5, Shape: draw.PyramidGlyph{}},
		{Color: vermillion, Radius: 3.5, Shape: draw.BoxGlyph{}},
	}
	for i, name := range names {
		line := &plotter.Line{LineStyle: draw.LineStyle{Color: grey, Width: 1.5}}
		var points []plot.Plotter
		for j, value := range percentiles {
			f := r.figure(setup{scenario: "open loop", candidate: name}, value)
			if f.median > 0 { // as each time is: 0 has no logarithm
				line.XYs = append(line.XYs, plotter.XY{X: f.median, Y: row(i, names)})
				points = append(points, &plotter.Scatter{XYs: line.XYs[len(line.XYs)-1:], GlyphStyle: glyphs[j]})
			}
		}
		p.Add(line)
		p.Add(points...)
	}
	if math.IsInf(p.X.Min, 1) {
		return nil
	}
	// The axis begins and ends with a power of ten: only those have labels.
	first := int(math.Floor(math.Log10(p.X.Min)))
	last := max(int(math.Ceil(math.Log10(p.X.Max))), first+1)
	p.X.Min, p.X.Max = math.Pow10(first), math.Pow10(last)
	var ticks plot.ConstantTicks
	for power := first; power <= last; power++ {
		label := fmt.Sprintf("%g ms", math.Pow10(power+3))
		if power >= 0 {
			label = fmt.Sprintf("%g s", math.Pow10(power))
		}
		ticks = append(ticks, plot.Tick{Value: math.Pow10(power), Label: label})
	}
	p.X.Tick.Marker = ticks

	const legend = 20
	canvas, inside := newCanvas(around + legend + rowHeight*len(names))
	p.Draw(draw.Crop(inside, 0, 0, legend, 0))
	for i, value := range percentiles {
		at := vg.Point{X: width/2 - 80 + vg.Length(i)*60, Y: inside.Min.Y + legend/3}
		inside.DrawGlyph(glyphs[i], at)
		inside.FillText(sans(10, text.XLeft), at.Add(vg.Point{X: 2 * gap}), value)
	}
	return canvas
}

// drawFailed draws a panel for each scenario with trouble.
func drawFailed(r *record, title string) *vgsvg.Canvas {
	var shown []table
	var scenarios []string
	for _, t := range tables {
		hasTrouble := slices.ContainsFunc(t.columns, func(c column) bool { return c.value == valueRecovery })
		if hasTrouble && len(r.having(valueFailed, t.scenario)) > 0 {
			shown, scenarios = append(shown, t), append(scenarios, t.scenario)
		}
	}
	if len(shown) == 0 {
		return nil
	}
	names := r.having(valueFailed, scenarios...)
	most := 0.0
	for _, one := range r.Results {
		if slices.Contains(scenarios, one.Scenario) {
			most = max(most, one.Values[valueFailed])
		}
	}

	const columns, head, panelTitle = 2, 16, 20
	tiles := draw.Tiles{Rows: (len(shown) + columns - 1) / columns, Cols: columns, PadX: 10, PadY: panelTitle, PadTop: head + panelTitle}
	panels := make([][]*plot.Plot, tiles.Rows)
	for i := range panels {
		panels[i] = make([]*plot.Plot, columns)
	}
	for i, t := range shown {
		labels := names
		if i%columns > 0 {
			labels = make([]string, len(names)) // they are left of the row's first panel
		}
		panels[i/columns][i%columns] = failedPanel(r, t.scenario, names, labels, most)
	}

	canvas, inside := newCanvas(head + tiles.Rows*(around+rowHeight*len(names)))
	inside.FillText(sans(12, text.XCenter), vg.Point{X: width / 2, Y: inside.Max.Y - gap}, title)
	places := plot.Align(panels, tiles, inside)
	for i, t := range shown {
		p, place := panels[i/columns][i%columns], places[i/columns][i%columns]
		p.Draw(place)
		left := p.DataCanvas(place).Min.X
		inside.FillText(sans(9.5, text.XLeft), vg.Point{X: left, Y: place.Max.Y + panelTitle/3}, t.title)
	}
	return canvas
}

// failedPanel draws the logarithm of 1+n: so 0 has a place, and a few failed requests
// are seen beside thousands.
func failedPanel(r *record, scenario string, names, labels []string, most float64) *plot.Plot {
	p := newPlot("", labels)
	p.X.Tick.Label.Font.Size = 8
	most = max(most, 10)
	ticks := plot.ConstantTicks{{Value: 0, Label: "0"}}
	for n := 10.0; n <= most; n *= 10 {
		ticks = append(ticks, plot.Tick{Value: math.Log10(1 + n), Label: count(n)})
	}
	p.X.Tick.Marker = ticks
	for i, name := range names {
		f := r.figure(setup{scenario: scenario, candidate: name}, valueFailed)
		label := "—" // it was not measured
		if f.rounds > 0 {
			label = count(f.median)
		}
		length := math.Log10(1 + f.median)
		addBar(p, row(i, names), length, blue)
		addLabel(p, row(i, names), length, label)
	}
	p.X.Max = math.Log10(1 + most) // all panels have the same scale
	return p
}

// having returns the candidates of which some scenario has a value.
func (r *record) having(value string, scenarios ...string) []string {
	return slices.DeleteFunc(r.candidates(), func(name string) bool {
		return !slices.ContainsFunc(scenarios, func(scenario string) bool {
			return r.figure(setup{scenario: scenario, candidate: name}, value).rounds > 0
		})
	})
}

// newPlot returns a plot with a row for each name. The first one is at the top.
func newPlot(title string, names []string) *plot.Plot {
	p := plot.New()
	p.Title.Text = title
	p.Title.Padding = 2 * gap
	p.Title.TextStyle = sans(12, text.XCenter)
	p.Title.TextStyle.YAlign = text.YTop
	p.X.Tick.Label = sans(9, text.XCenter)
	p.X.Tick.Label.YAlign = text.YTop
	p.Y.Tick.Label = sans(10, text.XRight)
	bottomUp := slices.Clone(names)
	slices.Reverse(bottomUp)
	p.NominalY(bottomUp...)
	p.X.Min, p.X.Max = 0, 0
	p.Y.Min, p.Y.Max = -0.6, float64(len(names))-0.4
	grid := plotter.NewGrid()
	grid.Horizontal.Color = nil
	grid.Vertical = draw.LineStyle{Color: faint, Width: 0.5}
	p.Add(grid)
	return p
}

// row returns where the row of a name is on the axis.
func row(i int, names []string) float64 { return float64(len(names) - 1 - i) }

func addBar(p *plot.Plot, y, length float64, fill color.Color) {
	p.Add(&plotter.BarChart{
		Values: plotter.Values{length}, XMin: y, Width: barWidth, Horizontal: true,
		Color: fill, LineStyle: draw.LineStyle{Color: fill},
	})
}

// addLabel writes right of what ends at x.
func addLabel(p *plot.Plot, y, x float64, label string) {
	p.Add(&plotter.Labels{
		XYs: plotter.XYs{{X: x, Y: y}}, Labels: []string{label},
		TextStyle: []text.Style{sans(9, text.XLeft)}, Offset: vg.Point{X: gap, Y: 1},
	})
}

func sans(size font.Length, align text.XAlignment) text.Style {
	return text.Style{
		Color: color.Black, Font: font.Font{Typeface: "Liberation", Variant: "Sans", Size: size},
		XAlign: align, YAlign: text.YCenter, Handler: plot.DefaultTextHandler,
	}
}

// newCanvas returns a white canvas, since a page may be dark, and what is inside its
// margin.
func newCanvas(height int) (canvas *vgsvg.Canvas, inside draw.Canvas) {
	canvas = vgsvg.New(width, vg.Length(height))
	inside = draw.New(canvas)
	canvas.SetColor(color.White)
	canvas.Fill(inside.Path())
	const margin = 8
	return canvas, draw.Crop(inside, margin, -margin, margin, -margin)
}
