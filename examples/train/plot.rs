//! The loss curves.

use crate::run::Training;
use anyhow::{anyhow, Result};
use plotters::prelude::*;
use std::path::Path;

/// Draws the losses over the steps: the unfused run's as a broad line, the fused one's as a thin one upon it.
///
/// # Errors
/// A file that cannot be written.
pub fn draw(path: &Path, [unfused, fused]: [&Training; 2]) -> Result<()> {
    let area = SVGBackend::new(path, (800, 450)).into_drawing_area();
    let highest = fused.losses().iter().chain(unfused.losses()).copied().fold(0., f64::max);
    let steps = fused.losses().len() as f64;
    let draw = || -> std::result::Result<(), DrawingAreaErrorKind<_>> {
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption("Training loss with the MLP fused and unfused", ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0f64..steps, 0f64..1.05 * highest)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("cross-entropy of the batch, nats a token")
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (training, name, style) in [
            (unfused, "candle's ops", RGBColor(240, 170, 60).stroke_width(5)),
            (fused, "FusedSwiGlu", RGBColor(20, 60, 140).stroke_width(1)),
        ] {
            let points = training.losses().iter().enumerate().map(|(step, &loss)| (step as f64, loss));
            chart
                .draw_series(LineSeries::new(points, style))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
        }
        chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
        area.present()
    };
    draw().map_err(|error| anyhow!("{}: {error}", path.display()))
}
