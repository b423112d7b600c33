//! The plot of speed-ups by model.

use crate::data::{Measurements, Op, Shape, Way};
use anyhow::{anyhow, bail, Result};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

/// Models that have an MLP of these sizes.
const MODELS: [(Op, usize, usize, &str); 8] = [
    (Op::Swiglu, 576, 1536, "SmolLM2 135M"),
    (Op::Swiglu, 2048, 5632, "TinyLlama 1.1B"),
    (Op::Swiglu, 2048, 8192, "Llama 3.2 1B"),
    (Op::Swiglu, 4096, 14336, "Llama 3 8B"),
    (Op::Swiglu, 8192, 28672, "Llama 3 70B"),
    (Op::Mlp, 768, 3072, "BERT base"),
    (Op::Mlp, 1280, 5120, "Whisper large"),
    (Op::Mlp, 4096, 4096, "square"),
];

fn model(shape: Shape) -> &'static str {
    let known = MODELS.iter().find(|(op, hidden, intermediate, _)| {
        (*op, *hidden, *intermediate) == (shape.op, shape.hidden, shape.intermediate)
    });
    known.map_or("", |(.., name)| name)
}

/// Draws candle's time over the fused one as bars, a group a shape, a bar in it for each of `tokens`.
///
/// # Errors
/// No shape that was timed by both; a file that cannot be written.
pub fn draw(file: &Path, measurements: &Measurements, tokens: &[usize]) -> Result<()> {
    let mut groups = Vec::new();
    for shape in measurements.shapes() {
        let speedup = |tokens: &usize| {
            let candle = measurements.time(shape, Way::Candle, *tokens)?;
            Some(candle / measurements.time(shape, Way::Fused, *tokens)?)
        };
        let bars: Vec<Option<f64>> = tokens.iter().map(speedup).collect();
        if bars.iter().any(Option::is_some) {
            groups.push((shape, bars));
        }
    }
    let highest = groups.iter().flat_map(|(_, bars)| bars.iter().flatten()).copied().fold(0., f64::max);
    if groups.is_empty() {
        bail!("no MLP on {} was timed by candle and fused with {tokens:?} tokens", measurements.machine);
    }

    let area = SVGBackend::new(file, (1060, 500)).into_drawing_area();
    let draw = || -> std::result::Result<(), DrawingAreaErrorKind<_>> {
        area.fill(&WHITE)?;
        let title = format!("Speed-up of one MLP over candle's ops ({})", measurements.origin());
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(14)
            .x_label_area_size(56)
            .y_label_area_size(56)
            .build_cartesian_2d(0f64..groups.len() as f64, 0f64..1.12 * highest)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_desc("candle's time / fused time")
            .y_label_formatter(&|speedup| format!("{speedup:.0}"))
            .label_style(("sans-serif", 14))
            .axis_desc_style(("sans-serif", 16))
            .bold_line_style(RGBColor(220, 220, 220))
            .light_line_style(TRANSPARENT)
            .draw()?;
        let small = |size: i32, vertical: VPos| {
            ("sans-serif", size).into_text_style(&area).pos(Pos::new(HPos::Center, vertical))
        };
        let width = 0.8 / tokens.len() as f64;
        for (bar, tokens) in tokens.iter().enumerate() {
            // From light to dark.
            let shade = |light: i32, dark: i32| (light - (light - dark) * bar as i32 / 2).clamp(0, 255) as u8;
            let colour = RGBColor(shade(150, 10), shade(190, 60), shade(235, 140)).filled();
            let left = |group: usize| group as f64 + 0.1 + width * bar as f64;
            let speedups = groups.iter().enumerate().filter_map(|(group, (_, bars))| Some((left(group), bars[bar]?)));
            chart
                .draw_series(speedups.clone().map(|(x, y)| Rectangle::new([(x, 0.), (x + width * 0.92, y)], colour)))?
                .label(if *tokens == 1 { "1 token".to_string() } else { format!("{tokens} tokens") })
                .legend(move |(x, y)| Rectangle::new([(x, y - 6), (x + 16, y + 6)], colour));
            chart.draw_series(speedups.map(|(x, y)| {
                Text::new(format!("{y:.2}"), (x + width * 0.46, y + 0.01 * highest), small(11, VPos::Bottom))
            }))?;
        }
        let even = BLACK.stroke_width(1);
        chart.draw_series([PathElement::new([(0., 1.), (groups.len() as f64, 1.)], even)])?;
        for (group, (shape, _)) in groups.iter().enumerate() {
            let (x, y) = chart.backend_coord(&(group as f64 + 0.5, 0.));
            area.draw(&Text::new(model(*shape), (x, y + 8), small(14, VPos::Top)))?;
            area.draw(&Text::new(shape.to_string(), (x, y + 28), small(12, VPos::Top)))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(("sans-serif", 15))
            .background_style(WHITE.mix(0.9))
            .border_style(RGBColor(180, 180, 180))
            .draw()?;
        area.present()
    };
    draw().map_err(|error| anyhow!("{}: {error}", file.display()))
}
