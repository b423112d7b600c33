//! The plot of times over tokens.

use crate::axis;
use crate::data::{Measurements, Op, Shape, Way};
use anyhow::{anyhow, bail, Result};
use plotters::prelude::*;
use std::path::Path;

/// Draws the time of one SwiGLU over the number of tokens, a line for each path that was measured, and the floor.
///
/// # Errors
/// No time of this SwiGLU; a file that cannot be written.
pub fn draw(file: &Path, measurements: &Measurements, (hidden, intermediate): (usize, usize)) -> Result<()> {
    let shape = Shape { op: Op::Swiglu, hidden, intermediate };
    let lines: Vec<_> = [
        (Way::Candle, "candle's ops", RGBColor(230, 130, 20)),
        (Way::TorchGraph, "PyTorch, CUDA graph", RGBColor(60, 150, 80)),
        (Way::TorchCompile, "PyTorch, torch.compile", RGBColor(150, 90, 180)),
        (Way::Fused, "candle-fused-mlp", RGBColor(20, 90, 190)),
    ]
    .into_iter()
    .map(|(path, name, colour)| (measurements.line(shape, path), name, colour))
    .filter(|(points, ..)| !points.is_empty())
    .collect();
    let floor = measurements.line(shape, Way::Floor);
    let points = lines.iter().flat_map(|(points, ..)| points).chain(&floor);
    if points.clone().next().is_none() {
        bail!("nothing of {shape} in {} on {}", measurements.dtype, measurements.machine);
    }
    let (y_range, y_marks) = axis::logarithmic(points.clone().map(|(_, us)| *us));
    let mut x_marks: Vec<f64> = points.map(|(tokens, _)| *tokens).collect();
    x_marks.sort_by(f64::total_cmp);
    x_marks.dedup();
    let x_range = x_marks[0] / 1.15..x_marks[x_marks.len() - 1] * 1.15;

    let area = SVGBackend::new(file, (860, 500)).into_drawing_area();
    let draw = || -> std::result::Result<(), DrawingAreaErrorKind<_>> {
        area.fill(&WHITE)?;
        let title = format!("Time of one {shape} ({})", measurements.origin());
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(64)
            .build_cartesian_2d(
                x_range.log_scale().with_key_points(x_marks),
                y_range.log_scale().with_key_points(y_marks),
            )?;
        chart
            .configure_mesh()
            .x_desc("tokens (logarithmic)")
            .y_desc("microseconds (logarithmic)")
            .x_label_formatter(&|tokens| format!("{tokens:.0}"))
            .y_label_formatter(&|us| us.to_string())
            .label_style(("sans-serif", 14))
            .axis_desc_style(("sans-serif", 16))
            .bold_line_style(RGBColor(220, 220, 220))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (points, name, colour) in &lines {
            let style = colour.stroke_width(2);
            chart
                .draw_series(LineSeries::new(points.iter().copied(), style))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 28, y)], style));
            chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
        }
        if !floor.is_empty() {
            let style = BLACK.stroke_width(1);
            chart
                .draw_series(DashedLineSeries::new(floor.iter().copied(), 6, 4, style))?
                .label("floor: memory and arithmetic")
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 28, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .label_font(("sans-serif", 15))
            .legend_area_size(34)
            .background_style(WHITE.mix(0.9))
            .border_style(RGBColor(180, 180, 180))
            .draw()?;
        area.present()
    };
    draw().map_err(|error| anyhow!("{}: {error}", file.display()))
}
