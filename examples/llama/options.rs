//! The command line.

use crate::checkpoint::Synthetic;
use crate::model::MlpPath;
use crate::shared::cli::{dtype, Place};
use anyhow::{bail, Result};
use candle_core::DType;
use clap::Parser;
use std::num::NonZeroUsize;
use std::path::PathBuf;

/// A language model of the LLaMA family that writes text, its MLPs fused or not. Without a model it takes the small one
/// that is inside the program.
#[derive(Parser, Debug)]
#[command(name = "llama")]
pub struct Options {
    /// A folder with config.json, model.safetensors (or model.safetensors.index.json) and tokenizer.json, as Hugging Face
    /// has them, or with a tokenizer of llama2.c's format (tok512.bin).
    #[arg(long, value_name = "FOLDER", group = "source")]
    pub model: Option<PathBuf>,
    /// A GGUF file of the architecture llama: its weights are dequantised, its tokenizer is taken along.
    #[arg(long, value_name = "FILE", group = "source")]
    pub gguf: Option<PathBuf>,
    /// Random weights of Llama-3.2-1B's or Llama-3.1-8B's shape, to measure.
    #[arg(long, value_name = "SHAPE", group = "source", conflicts_with_all = ["prompt", "chat"])]
    pub synthetic: Option<Synthetic>,
    /// The text to go on from; "Alice was" for the model inside, "Once upon a time" for others, if not given.
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Random tokens to go on from, in place of a text.
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["prompt", "chat"])]
    pub prompt_tokens: Option<NonZeroUsize>,
    /// Take the prompt as a user's message to an assistant, in the ChatML format (SmolLM2 Instruct, Qwen2 Instruct).
    #[arg(long)]
    pub chat: bool,
    /// Tokens to write, at most.
    #[arg(long, value_name = "COUNT", default_value = "128")]
    pub tokens: NonZeroUsize,
    /// Go on when the model ends its text.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Sample at this temperature, in place of taking the likeliest token.
    #[arg(long, value_parser = temperature)]
    pub temperature: Option<f64>,
    /// Sample among the likeliest tokens that have this probability together.
    #[arg(long, value_name = "P", value_parser = probability, requires = "temperature")]
    pub top_p: Option<f64>,
    /// Seed of the samples, and of random prompts.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Which MLP runs.
    #[arg(long, value_enum, default_value = "fused", conflicts_with = "compare")]
    pub mlp: MlpPath,
    /// Run both, and compare tokens, logits and speed.
    #[arg(long)]
    pub compare: bool,
    /// Timed rounds of --compare, of which the median counts.
    #[arg(long, default_value = "3", requires = "compare")]
    pub rounds: NonZeroUsize,
    /// Where to run: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: Place,
    /// On CUDA: every token after the prompt is one launch of a CUDA graph.
    #[arg(long)]
    pub graph: bool,
    /// The dtype to run in: f32, f16 or bf16. Weights of another dtype are converted.
    #[arg(long, default_value = "f32", value_parser = model_dtype)]
    pub dtype: DType,
    /// Print one JSON object at the end in place of text.
    #[arg(long)]
    pub json: bool,
}

/// candle's norms have no f64 on every device.
fn model_dtype(name: &str) -> Result<DType> {
    match dtype(name) {
        Ok(dtype @ (DType::F32 | DType::F16 | DType::BF16)) => Ok(dtype),
        _ => bail!("expected f32, f16 or bf16"),
    }
}

fn temperature(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(temperature) if temperature > 0. && f64::is_finite(temperature) => Ok(temperature),
        _ => bail!("expected a number above 0"),
    }
}

fn probability(text: &str) -> Result<f64> {
    match text.parse() {
        Ok(probability) if probability > 0. && probability <= 1. => Ok(probability),
        _ => bail!("expected a number above 0 and at most 1"),
    }
}
