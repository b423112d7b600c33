//! The command line.

use crate::shared::cli::{dtype, first_line, Place};
use anyhow::{anyhow, Result};
use candle_core::DType;
use candle_fused_mlp::Activation;
use clap::Parser;
use std::num::NonZeroUsize;
use std::path::PathBuf;

/// One MLP block of a LLaMA, run by candle's own ops and by this crate's, from the same weights: checked against f64,
/// timed by turns.
#[derive(Parser, Debug)]
#[command(name = "llama_mlp_block")]
pub struct Options {
    /// A checkpoint: a safetensors file, or the index of a sharded one (model.safetensors.index.json). Without it and
    /// without sizes: the trained weights inside the program, and random ones.
    #[arg(long, value_name = "FILE-OR-INDEX", conflicts_with_all = ["hidden", "intermediate"])]
    pub weights: Option<PathBuf>,
    /// Where the block is in the checkpoint: what comes before .gate_proj.weight.
    #[arg(long, conflicts_with = "layer")]
    pub prefix: Option<String>,
    /// The block of this layer: short for --prefix model.layers.N.mlp.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub layer: usize,
    /// Hidden size of random weights; 576 if not given.
    #[arg(long, value_name = "SIZE")]
    pub hidden: Option<NonZeroUsize>,
    /// Intermediate size of random weights; 1536 if not given.
    #[arg(long, value_name = "SIZE")]
    pub intermediate: Option<NonZeroUsize>,
    /// Numbers of tokens, one row each.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    pub tokens: Vec<NonZeroUsize>,
    /// Dtypes to run in: f32, f16, bf16 or f64. Weights of another dtype are converted.
    #[arg(long = "dtype", value_name = "DTYPE", value_delimiter = ',', value_parser = dtype)]
    #[arg(default_value = "f32,bf16")]
    pub dtypes: Vec<DType>,
    /// Where to run: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: Place,
    /// The gate's activation, by its name in a Hugging Face config.
    #[arg(long, default_value = "silu", value_parser = activation)]
    pub activation: Activation,
    /// Timed rounds, of which the median counts; as many as fit in a fifth of a second, three at least, if not given.
    #[arg(long, value_name = "ROUNDS")]
    pub iters: Option<NonZeroUsize>,
    /// Copies of the block that take turns; as many as exceed four times the largest cache, at most 64, if not given.
    #[arg(long)]
    pub copies: Option<NonZeroUsize>,
    /// Print one JSON object for each row in place of the tables.
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// Where the block is in the checkpoint.
    pub fn prefix(&self) -> String {
        self.prefix.clone().unwrap_or_else(|| format!("model.layers.{}.mlp", self.layer))
    }
}

fn activation(name: &str) -> Result<Activation> {
    name.parse().map_err(|error: candle_core::Error| anyhow!("{}", first_line(&error.to_string())))
}
