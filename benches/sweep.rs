//! Many sizes on a GPU, fused beside candle's own ops, to find where fused is slower.
//!
//!     cargo bench --features cuda --bench sweep -- [--seconds 600] [--dtype bf16] [--tokens 64,65,512] [--hidden 4096] [--all-rows]
//!
//! Every model's sizes get an equal share of the time and go through token counts in a random order until it is used up, so a
//! short run is a sample and a long one (some 20 minutes) goes through all. Prints the ten sizes that fare worst.

#[path = "support/layers.rs"]
mod layers;
#[path = "support/mod.rs"]
mod support;

use candle_core::{DType, Device, Result, Tensor};
use clap::Parser;
use layers::{time, Clock, Layer, Turns, Way};
use rand::{rngs::StdRng, seq::SliceRandom, SeedableRng};
use std::time::{Duration, Instant};

/// Times every size for a moment and prints the ten where fused is furthest behind candle's own ops.
#[derive(Parser)]
struct Arguments {
    /// Time for all.
    #[arg(long, default_value_t = 600., value_parser = seconds)]
    seconds: f64,
    #[arg(long, default_value = "bf16", value_parser = ["bf16", "f16", "f32"])]
    dtype: String,
    /// These token counts only.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Vec<u32>,
    /// These hidden sizes only.
    #[arg(long, value_delimiter = ',')]
    hidden: Vec<usize>,
    /// Print all rows, not the worst alone.
    #[arg(long)]
    all_rows: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0. && seconds < 1e6 => Ok(seconds),
        _ => Err("expected a positive number of seconds".to_string()),
    }
}

const TURNS: Turns = Turns { count: 5, microseconds: 1500. };
const WORST: usize = 10;

/// Gated, hidden size, intermediate size: two to four times the hidden size, and those of models that are odd.
fn models() -> Vec<(bool, usize, usize)> {
    let mut models = Vec::new();
    for hidden in [384, 576, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 8192] {
        for times in [2, 3, 4] {
            models.extend([(true, hidden, hidden * times), (false, hidden, hidden * times)]);
        }
    }
    models.extend([
        (true, 64, 172),
        (true, 4096, 11008),
        (true, 5120, 13824),
        (false, 4544, 18176),
        (true, 3584, 18944),
        (true, 2048, 5632),
        (true, 4096, 14336),
        (true, 8192, 28672),
    ]);
    models
}

/// Powers of two from 1 to 8192, each with its neighbours.
fn token_counts() -> Vec<u32> {
    let mut counts: Vec<u32> = (0..=13).flat_map(|i| [(1 << i) - 1, 1 << i, (1 << i) + 1]).collect();
    counts.retain(|count| (1..=8192).contains(count));
    counts.sort_unstable();
    counts.dedup();
    counts
}

struct Row {
    gated: bool,
    sizes: (usize, usize),
    tokens: u32,
    candle: f64,
    fused: f64,
}

impl Row {
    fn ratio(&self) -> f64 {
        self.candle / self.fused
    }

    fn cells(&self) -> Vec<String> {
        let (hidden, intermediate) = self.sizes;
        vec![
            format!("{} {hidden}x{intermediate}", if self.gated { "swiglu" } else { "mlp" }),
            self.tokens.to_string(),
            format!("{:.1}", self.candle),
            format!("{:.1}", self.fused),
            format!("{:.3}", self.ratio()),
        ]
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let dtype = match arguments.dtype.as_str() {
        "f16" => DType::F16,
        "f32" => DType::F32,
        _ => DType::BF16,
    };
    let device = &Device::new_cuda(0)?;
    let mut random = StdRng::seed_from_u64(arguments.seed);
    let mut models = models();
    models.retain(|(_, hidden, _)| arguments.hidden.is_empty() || arguments.hidden.contains(hidden));
    models.shuffle(&mut random);
    let mut counts = if arguments.tokens.is_empty() { token_counts() } else { arguments.tokens.clone() };
    let (start, total) = (Instant::now(), models.len());
    let mut rows = Vec::new();
    for (done, (gated, hidden, intermediate)) in models.into_iter().enumerate() {
        let until = Duration::from_secs_f64(arguments.seconds * (done + 1) as f64 / total as f64);
        let sizes = (hidden, intermediate);
        let layers = Layer::stack(gated, sizes, dtype, device)?;
        counts.shuffle(&mut random);
        for &tokens in counts.iter().take_while(|_| start.elapsed() < until) {
            let first = Tensor::randn(0f32, 1., (tokens as usize, hidden), device)?.to_dtype(dtype)?;
            let times = time(&layers, &first, &[Way::Candle, Way::Chosen], TURNS, Clock::Calls)?;
            if let [Some(candle), Some(fused)] = times[..] {
                rows.push(Row { gated, sizes, tokens, candle, fused });
            }
        }
    }
    rows.sort_by(|a, b| a.ratio().total_cmp(&b.ratio()));
    let slower = rows.iter().filter(|row| row.ratio() < 0.97).count();
    println!("{} rows, {slower} below 0.97 of candle's speed, in {:.0} s\n", rows.len(), start.elapsed().as_secs_f64());
    let shown = if arguments.all_rows { rows.len() } else { WORST.min(rows.len()) };
    let cells: Vec<_> = rows[..shown].iter().map(Row::cells).collect();
    print!("{}", support::table::markdown(1, &["MLP", "tokens", "candle, us", "fused, us", "candle / fused"], &cells));
    Ok(())
}
