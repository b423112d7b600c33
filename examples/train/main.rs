//! Trains a small LLaMA on a book twice, step by step by turns: its MLPs fused, and as candle's own ops. Same seed, same
//! batches. Draws both loss curves, and writes the fused one's weights as a Hugging Face folder.
//!
//! ```text
//! cargo run --release --example train                                  # some minutes; into target/train
//! cargo run --release --example train -- --steps 50                    # a look at time and memory
//! cargo run --release --example llama -- --model target/train --prompt "Alice was"
//! ```
//!
//! What it made with `--out examples/data/alice` is in the repository: the examples `llama` and `llama_mlp_block` have
//! it inside. The text is Lewis Carroll's "Alice's Adventures in Wonderland" (1865, in the public domain), a paragraph a
//! line. The exit code is 0, or 2 if the input is wrong.
//!
//! | file | what it holds |
//! |---|---|
//! | `main.rs` | the order of things |
//! | `data.rs` | the text: its tokenizer and its batches |
//! | `run.rs` | one model in training |
//! | `plot.rs` | the loss curves |

mod data;
#[path = "../../benches/support/mod.rs"]
mod measuring;
#[path = "../llama/model.rs"]
#[allow(dead_code)] // what writes text is not used here
mod model;
mod plot;
mod run;
#[path = "../shared/mod.rs"]
mod shared;

use anyhow::{Context, Result};
use clap::Parser;
use data::Data;
use indicatif::{ProgressBar, ProgressStyle};
use measuring::memory;
use measuring::table::markdown;
use model::{Config, MlpPath};
use run::{Plan, Training};
use serde_json::json;
use std::fs;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// Trains a small LLaMA on a book, its MLPs fused and not, by turns.
#[derive(Parser, Debug)]
#[command(name = "train")]
struct Options {
    /// Steps of training.
    #[arg(long, default_value = "1200")]
    steps: NonZeroUsize,
    /// Texts in a batch.
    #[arg(long, default_value = "12")]
    batch: NonZeroUsize,
    /// Tokens in each of them.
    #[arg(long, default_value = "96")]
    context: NonZeroUsize,
    /// The highest learning rate: it rises to it in the first steps and falls to a tenth at the end.
    #[arg(long, default_value_t = 4e-3)]
    learning_rate: f64,
    /// Seed of the first weights and of the batches.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The text, in UTF-8.
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/alice.txt"))]
    text: PathBuf,
    /// Where to write config.json, tokenizer.json, model.safetensors and loss.svg.
    #[arg(long, value_name = "FOLDER", default_value = "target/train")]
    out: PathBuf,
}

fn main() -> ExitCode {
    shared::cli::run(run)
}

const VOCABULARY: usize = 512;

fn run(options: &Options) -> Result<bool> {
    let data = Data::read(&options.text, VOCABULARY, options.context.get())?;
    // Here, not after minutes: whether there is a place for the results.
    fs::create_dir_all(&options.out).with_context(|| format!("{}: cannot be made", options.out.display()))?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": data.vocab_size(),
        "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "rope_theta": 10_000., "tie_word_embeddings": true, "torch_dtype": "float16",
    });
    let model: Config = serde_json::from_value(config.clone())?;
    let plan = Plan { steps: options.steps.get(), learning_rate: options.learning_rate, seed: options.seed };
    let mut trainings = [MlpPath::Unfused, MlpPath::Fused]
        .map(|path| Training::new(&model, path, &plan))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    println!(
        "A LLaMA of {} parameters on {}: {} tokens, {} steps of {} x {}\n",
        trainings[0].parameters(),
        options.text.display(),
        data.len(),
        plan.steps,
        options.batch,
        options.context
    );

    let bar = ProgressBar::new(plan.steps as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len}  {msg}  {elapsed}, {eta} to go")?);
    let mut batches = data.batches(options.seed, options.batch.get());
    for _ in 0..plan.steps {
        let (inputs, targets) = batches.next_batch()?;
        for training in &mut trainings {
            training.step(&inputs, &targets)?;
        }
        bar.set_message(format!("loss {:.3}", trainings[1].smoothed_loss()));
        bar.inc(1);
    }
    bar.finish_and_clear();

    let [unfused, fused] = trainings.as_slice() else { unreachable!("two were made") };
    let rows: Vec<Vec<String>> = trainings
        .iter()
        .map(|training| {
            vec![
                format!("{:?}", training.path()).to_lowercase(),
                format!("{:.3}", training.losses()[0]),
                format!("{:.3}", training.smoothed_loss()),
                format!("{:.1}", 1e3 * training.median_seconds()),
                format!("{:.2}", training.most_bytes() as f64 / 1e6),
            ]
        })
        .collect();
    let header = ["MLP", "first loss", "last loss (mean of 20)", "a step, ms (median)", "memory of a step, MB"];
    print!("{}", markdown(1, &header, &rows));
    let apart = unfused.losses().iter().zip(fused.losses()).map(|(a, b)| (a - b).abs());
    println!(
        "\nThe losses of a step are at most {:.1e} apart; time: {:.2}x, memory: {:.2}x",
        apart.fold(0., f64::max),
        unfused.median_seconds() / fused.median_seconds(),
        unfused.most_bytes() as f64 / fused.most_bytes() as f64
    );

    let write = |name: &str, contents: &str| {
        let path = options.out.join(name);
        fs::write(&path, contents).with_context(|| format!("{}: cannot be written", path.display()))
    };
    write("config.json", &(serde_json::to_string_pretty(&config)? + "\n"))?;
    write("tokenizer.json", &(data.tokenizer_json()? + "\n"))?;
    fused.save(&options.out.join("model.safetensors"))?;
    plot::draw(&options.out.join("loss.svg"), [unfused, fused])?;
    println!("\nwritten to {}", options.out.display());
    Ok(true)
}
