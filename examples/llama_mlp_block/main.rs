//! One MLP block of a LLaMA, run by candle's own ops and by this crate's, from the same weights.
//!
//! ```text
//! cargo run --release --example llama_mlp_block
//! cargo run --release --example llama_mlp_block -- --weights model.safetensors --layer 3 --tokens 1,16 --dtype bf16
//! cargo run --release --example llama_mlp_block -- --weights model.safetensors.index.json --json
//! cargo run --release --example llama_mlp_block -- --hidden 2048 --intermediate 8192 --tokens 4096 --iters 1
//! cargo run --release --features cuda --example llama_mlp_block -- --device cuda --hidden 4096 --intermediate 14336
//! ```
//!
//! Without `--weights` it runs on the trained weights that it has inside, then on a safetensors file of random ones that it
//! makes, with a LLaMA's names; with `--hidden` or `--intermediate` on random ones alone. Each row of the result is checked
//! against f64. The exit code is 0 if every row is within its tolerance, 1 if one is not, 2 if the input is wrong.
//!
//! | file | what it holds |
//! |---|---|
//! | `main.rs` | the order of things |
//! | `options.rs` | the command line |
//! | `weights.rs` | finding the block in a checkpoint, or making one |
//! | `blocks.rs` | the block twice: as candle has it, and fused |
//! | `measure.rs` | one row: plan, error, time, memory |
//! | `report.rs` | what is printed |

mod blocks;
mod measure;
mod options;
mod report;
#[path = "../shared/mod.rs"]
mod shared;
#[path = "../../benches/support/mod.rs"]
mod support;
mod weights;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use options::Options;
use std::process::ExitCode;
use std::time::Duration;
use support::machine::Machine;
use support::memory;
use weights::Weights;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

fn main() -> ExitCode {
    shared::cli::run(run)
}

/// Measures and prints every row; whether all are within their tolerance.
fn run(options: &Options) -> Result<bool> {
    let device = options.device.open()?;
    let all = Weights::open(options)?;
    let machine = Machine::of(&device)?;
    let bar = ProgressBar::new((all.len() * options.dtypes.len() * options.tokens.len()) as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len}  {msg}  {elapsed}")?);
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut results = Vec::new();
    for weights in &all {
        let mut rows = Vec::new();
        for &dtype in &options.dtypes {
            rows.extend(measure::rows(options, weights, dtype, &device, &machine, &bar)?);
        }
        results.push((weights, rows));
    }
    bar.finish_and_clear();
    for (i, (weights, rows)) in results.iter().enumerate() {
        if options.json {
            report::json(rows)?;
        } else {
            print!("{}", if i > 0 { "\n\n" } else { "" });
            report::human(weights, &machine, rows);
        }
    }
    let wrong: Vec<_> = results.iter().flat_map(|(_, rows)| rows).filter(|row| !row.is_within_tolerance()).collect();
    for row in &wrong {
        eprintln!(
            "wrong: {} with {} tokens differs from f64 by {:.1e} (relative l2), more than {:.0e}",
            row.dtype,
            row.tokens,
            row.rel_l2_err,
            row.tolerance()
        );
    }
    Ok(wrong.is_empty())
}
