//! Sentence embeddings of a BERT, by candle_transformers' model and by the same model with fused MLPs.
//!
//! ```text
//! export FUSED_MLP_MINILM=$(tests/fetch_models.sh minilm)
//! cargo run --release --example bert_embed
//! cargo run --release --example bert_embed -- --model FOLDER --sentences lines.txt --batch 1,16 --json
//! ```
//!
//! An embedding is the mean of the last layer's outputs over a sentence's tokens, divided by its length. Both models'
//! embeddings of each sentence are compared: exit code 0 if the cosine of every pair is at least 0.99999, 1 if one is
//! not, 2 if the input is wrong. Both are timed by turns, without the tokenizer.
//!
//! | file | what it holds |
//! |---|---|
//! | `main.rs` | the order of things, and what is printed |
//! | `options.rs` | the command line |
//! | `model.rs` | the BERT with fused MLPs |
//! | `embed.rs` | batches of sentences, and embeddings of them |
//! | `measure.rs` | one row: times and cosines |

#[path = "../shared/cli.rs"]
#[allow(dead_code)] // a part of it is used here
mod cli;
mod embed;
mod measure;
mod model;
mod options;
#[path = "../../benches/support/mod.rs"]
mod support;

use anyhow::{bail, Context, Result};
use candle_core::DType;
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use embed::Encoder;
use measure::{Row, LOWEST_COSINE};
use model::FusedBert;
use options::Options;
use std::fs;
use std::process::ExitCode;
use support::machine::describe;
use support::table::markdown;

fn main() -> ExitCode {
    cli::run(run)
}

/// Measures and prints every row; whether all embeddings agree.
fn run(options: &Options) -> Result<bool> {
    let device = options.device.open()?;
    let folder = options.model_folder()?;
    let file = |name: &str| {
        let path = folder.join(name);
        if !path.is_file() {
            bail!("{}: no such file", path.display());
        }
        Ok(path)
    };
    let (config, weights, tokenizer) = (file("config.json")?, file("model.safetensors")?, file("tokenizer.json")?);
    let text = fs::read_to_string(&config).with_context(|| format!("{}: cannot be read", config.display()))?;
    let config: Config = serde_json::from_str(&text)
        .with_context(|| format!("{}: not the configuration of a BERT", config.display()))?;
    // SAFETY: as for every mapped file, nothing may change it while it is in use.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[&weights], DType::F32, &device) }
        .with_context(|| format!("{}: not a whole safetensors file", weights.display()))?;
    let of_weights = || format!("{}: not the weights of such a BERT", weights.display());
    let candle = BertModel::load(vb.clone(), &config).with_context(of_weights)?;
    let fused = FusedBert::load(&config, vb).with_context(of_weights)?;
    let encoder = Encoder::open(&tokenizer, config.max_position_embeddings, &device)?;
    let sentences = options.sentences()?;

    let rows: Vec<Row> = options
        .batches
        .iter()
        .map(|batch| {
            measure::row((options.rounds(), options.device), (&candle, &fused), &encoder, &sentences, batch.get())
        })
        .collect::<Result<_>>()?;
    if options.json {
        for row in &rows {
            println!("{}", serde_json::to_string(row)?);
        }
    } else {
        print(&folder.display().to_string(), &describe(&device)?.0, &config, &rows);
    }
    let wrong = rows.iter().filter(|row| !row.agrees());
    for row in wrong.clone() {
        eprintln!(
            "wrong: with batches of {} the cosine of an embedding pair is {}, less than {LOWEST_COSINE}",
            row.batch, row.lowest_cosine
        );
    }
    Ok(wrong.count() == 0)
}

/// For people.
fn print(folder: &str, machine: &str, config: &Config, rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    let Config { num_hidden_layers, hidden_size, intermediate_size, .. } = config;
    println!("Sentence embeddings: candle_transformers' BERT, and the same with fused MLPs\n");
    println!("model      {folder}");
    println!("layers     {num_hidden_layers}, hidden size {hidden_size}, intermediate size {intermediate_size}, f32");
    println!("sentences  {}", first.sentences);
    println!("machine    {machine}\n");
    let cells = rows.iter().map(|row| {
        vec![
            row.batch.to_string(),
            row.tokens.to_string(),
            format!("{:.1}", row.candle_sentences_per_s),
            format!("{:.1}", row.fused_sentences_per_s),
            format!("{:.2}x", row.speedup),
            format!("{:.2e}", 1. - row.lowest_cosine),
        ]
    });
    let header =
        ["batch", "tokens with padding", "candle, sentences/s", "fused, sentences/s", "speed-up", "1 - lowest cosine"];
    print!("{}", markdown(0, &header, &cells.collect::<Vec<_>>()));
    println!(
        "\nMedians over both models by turns, each embedding every sentence in batches of so many. A batch is padded to\n\
         its longest sentence."
    );
}
