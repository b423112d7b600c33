//! The command line.

use anyhow::{anyhow, bail, Result};
use candle_core::{DType, Device};
use candle_fused_mlp::Activation;
use clap::error::ErrorKind;
use clap::Parser;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

/// One MLP block of a LLaMA, run by candle's own ops and by this crate's, from the same weights: checked against f64,
/// timed by turns.
#[derive(Parser, Debug)]
#[command(name = "llama_mlp_block")]
pub struct Options {
    /// A checkpoint: a safetensors file, or the index of a sharded one (model.safetensors.index.json). Without it, a
    /// file with random weights is made, and removed afterwards.
    #[arg(long, value_name = "FILE-OR-INDEX", conflicts_with_all = ["hidden", "intermediate"])]
    pub weights: Option<PathBuf>,
    /// Where the block is in the checkpoint: what comes before .gate_proj.weight.
    #[arg(long, conflicts_with = "layer")]
    pub prefix: Option<String>,
    /// The block of this layer: short for --prefix model.layers.N.mlp.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub layer: usize,
    /// Hidden size of random weights.
    #[arg(long, value_name = "SIZE", default_value = "576")]
    pub hidden: NonZeroUsize,
    /// Intermediate size of random weights.
    #[arg(long, value_name = "SIZE", default_value = "1536")]
    pub intermediate: NonZeroUsize,
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
    /// Timed rounds, of which the median counts; as many as fit in half a second if not given.
    #[arg(long, value_name = "ROUNDS")]
    pub iters: Option<NonZeroUsize>,
    /// Copies of the block that take turns; as many as exceed four times the last-level cache if not given.
    #[arg(long)]
    pub copies: Option<NonZeroUsize>,
    /// Print one JSON object for each row in place of the tables.
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// The options given; `None` if it was help that was asked for, and has been printed.
    ///
    /// # Errors
    /// A wrong option, in one line.
    pub fn from_command_line() -> Result<Option<Self>> {
        match Self::try_parse() {
            Ok(options) => Ok(Some(options)),
            Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
                error.print()?;
                Ok(None)
            }
            Err(error) => {
                let text = error.to_string();
                let lines: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
                Err(anyhow!("{} (--help lists the options)", lines.join(" ").trim_start_matches("error: ")))
            }
        }
    }

    /// Where the block is in the checkpoint.
    pub fn prefix(&self) -> String {
        self.prefix.clone().unwrap_or_else(|| format!("model.layers.{}.mlp", self.layer))
    }
}

fn dtype(name: &str) -> Result<DType> {
    match name.parse() {
        Ok(dtype @ (DType::F32 | DType::F16 | DType::BF16 | DType::F64)) => Ok(dtype),
        _ => bail!("expected f32, f16, bf16 or f64"),
    }
}

fn activation(name: &str) -> Result<Activation> {
    name.parse().map_err(|error: candle_core::Error| anyhow!("{}", first_line(&error.to_string())))
}

/// What an error says, without the backtrace that candle writes below it when asked to.
pub fn first_line(error: &str) -> &str {
    error.lines().next().unwrap_or_default()
}

/// A device to be opened.
#[derive(Debug, Clone, Copy)]
pub enum Place {
    Cpu,
    Cuda(usize),
}

impl FromStr for Place {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.split_once(':') {
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", ordinal)) if ordinal.parse::<usize>().is_ok() => Ok(Self::Cuda(ordinal.parse()?)),
            _ => bail!("expected cpu, cuda or cuda:N"),
        }
    }
}

impl Place {
    /// The device.
    ///
    /// # Errors
    /// A GPU, in a build without CUDA.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) if candle_core::utils::cuda_is_available() => Ok(Device::new_cuda(ordinal)?),
            Self::Cuda(ordinal) => bail!("--device cuda:{ordinal}: this program was built without CUDA"),
        }
    }
}
