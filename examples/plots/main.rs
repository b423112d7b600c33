//! Draws PERFORMANCE.md's plots out of measured times.
//!
//! ```text
//! cargo run --release --example plots
//! cargo run --release --example plots -- --data docs/data/cuda.csv --machine "NVIDIA H200" --out docs
//! ```
//!
//! It reads a CSV file of times and writes `time-over-tokens.svg`, of one SwiGLU, and `speedup.svg`, of all MLPs, and prints the
//! table of PERFORMANCE.md's section "What others promise". It has no figure of its own.
//!
//! | file | what it holds |
//! |---|---|
//! | `main.rs` | the command line |
//! | `data.rs` | the measured times |
//! | `axis.rs` | limits and marks of a logarithmic axis |
//! | `time.rs` | the plot of times over tokens |
//! | `speedup.rs` | the plot of speed-ups by model |
//! | `promises.rs` | the table beside what others promise |

mod axis;
#[path = "../shared/cli.rs"]
#[allow(dead_code)] // a part of it is used here
mod cli;
mod data;
mod promises;
mod speedup;
#[path = "../../benches/support/table.rs"]
mod table;
mod time;

use anyhow::{bail, Context, Result};
use clap::Parser;
use data::Measurements;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

/// Draws PERFORMANCE.md's plots out of measured times.
#[derive(Parser, Debug)]
#[command(name = "plots")]
struct Options {
    /// Measured times: a CSV file with the columns machine, date, op (swiglu or mlp), hidden, intermediate, dtype,
    /// tokens, path (candle, fused, torch_eager, torch_graph, torch_compile or floor) and us (microseconds).
    #[arg(long, value_name = "FILE", default_value = "docs/data/cuda.csv")]
    data: PathBuf,
    /// The machine whose times are drawn. Needed where the file has several.
    #[arg(long)]
    machine: Option<String>,
    /// The folder to write time-over-tokens.svg and speedup.svg into.
    #[arg(long, value_name = "FOLDER", default_value = "docs")]
    out: PathBuf,
    /// The SwiGLU of the plot over tokens, as hidden x intermediate.
    #[arg(long, value_name = "SIZES", default_value = "4096x14336", value_parser = sizes)]
    swiglu: (usize, usize),
    /// The dtype of both plots.
    #[arg(long, default_value = "bf16")]
    dtype: String,
    /// Tokens of the bars in the plot of speed-ups.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    tokens: Vec<usize>,
}

/// Sizes as `4096x14336`.
fn sizes(text: &str) -> Result<(usize, usize)> {
    match text.split_once('x').map(|(hidden, intermediate)| (hidden.parse(), intermediate.parse())) {
        Some((Ok(hidden), Ok(intermediate))) => Ok((hidden, intermediate)),
        _ => bail!("expected sizes as 4096x14336"),
    }
}

fn main() -> ExitCode {
    cli::run(|options: &Options| {
        let measurements = Measurements::read(&options.data, options.machine.as_deref(), &options.dtype)?;
        fs::create_dir_all(&options.out).with_context(|| format!("{}: no such folder", options.out.display()))?;
        time::draw(&options.out.join("time-over-tokens.svg"), &measurements, options.swiglu)?;
        speedup::draw(&options.out.join("speedup.svg"), &measurements, &options.tokens)?;
        print!("{}", promises::table(&measurements));
        Ok(true)
    })
}
