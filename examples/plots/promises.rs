//! The table beside what others promise.

use crate::data::{Measurements, Op, Shape, Way};
use crate::table::markdown;

/// The MLPs that promises are made for.
const SHAPES: [Shape; 2] = [
    Shape { op: Op::Swiglu, hidden: 4096, intermediate: 14336 },
    Shape { op: Op::Mlp, hidden: 4096, intermediate: 4096 },
];
const TOKENS: [usize; 4] = [1, 64, 512, 4096];

/// Microseconds by each path, and the fused one's over the floor; nothing where none of it was measured.
pub fn table(measurements: &Measurements) -> String {
    let rows: Vec<Vec<String>> = SHAPES
        .into_iter()
        .flat_map(|shape| TOKENS.map(|tokens| (shape, tokens)))
        .filter_map(|(shape, tokens)| {
            let time = |way| measurements.time(shape, way, tokens);
            let (fused, floor) = time(Way::Fused).zip(time(Way::Floor))?;
            let cell = |time: Option<f64>| time.map_or("-".to_string(), |us| format!("{us:.1}"));
            Some(vec![
                shape.to_string(),
                tokens.to_string(),
                format!("{floor:.1}"),
                cell(time(Way::Candle)),
                cell(time(Way::TorchGraph)),
                cell(time(Way::TorchCompile)),
                format!("{fused:.1}"),
                format!("{:.2}", fused / floor),
            ])
        })
        .collect();
    let header = ["MLP", "tokens", "floor", "candle", "PyTorch", "torch.compile", "fused", "fused / floor"];
    if rows.is_empty() {
        String::new()
    } else {
        markdown(1, &header, &rows)
    }
}
