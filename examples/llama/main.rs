//! A language model of the LLaMA family that writes text, its MLPs fused or as candle's own ops.
//!
//! ```text
//! cargo run --release --example llama                                          # a small model inside the program
//! cargo run --release --example llama -- --gguf "$(tests/fetch_models.sh smollm2)" --chat --prompt "What is a llama?"
//! cargo run --release --example llama -- --model FOLDER --temperature 0.8 --top-p 0.9 --seed 1
//! cargo run --release --example llama -- --model FOLDER --compare              # both paths: tokens, logits, speed
//! cargo run --release --example llama -- --synthetic 1b --dtype bf16 --prompt-tokens 64 --tokens 16 --compare --json
//! cargo run --release --features cuda --example llama -- --model FOLDER --device cuda --dtype bf16 --graph
//! ```
//!
//! `FOLDER` is any Hugging Face folder of a LLaMA, Mistral or Qwen2. The exit code is 0, or 2 if the input is wrong.
//!
//! On CUDA each op is launched by itself, or, with `--graph`, each token after the prompt is one launch of a CUDA graph. All
//! ops of candle 0.11.1 that run here can be captured, on a device whose stream is its own; not those that a token is chosen
//! by, which hand a number to the host. What a graph asks of the model is in `graph.rs`.
//!
//! | file | what it holds |
//! |---|---|
//! | `main.rs` | the order of things |
//! | `options.rs` | the command line |
//! | `model.rs` | the model, for text and for training |
//! | `checkpoint.rs` | where it comes from: a folder, a GGUF file, the program, or random weights |
//! | `tokenizer.rs` | tokenizers of three formats |
//! | `text.rs` | a text that is written token by token |
//! | `graph.rs` | a token's pass as a CUDA graph |
//! | `generate.rs` | writing text, and measuring it |
//! | `report.rs` | what is printed |

mod checkpoint;
mod generate;
#[cfg(feature = "cuda")]
mod graph;
#[path = "../../benches/support/mod.rs"]
mod measuring;
#[allow(dead_code)] // what trains is not used here
mod model;
mod options;
mod report;
#[path = "../shared/mod.rs"]
mod shared;
mod text;
mod tokenizer;

use anyhow::{anyhow, bail, Context, Result};
use candle_core::{Device, Tensor};
use checkpoint::Checkpoint;
use generate::{compare, generate, Settings, Speed};
use measuring::machine::describe;
use model::{Llama, MlpPath};
use options::Options;
use rand::{rngs::StdRng, Rng, SeedableRng};
use report::{Measured, Run};
use std::io::{stdout, Write};
use std::process::ExitCode;
use tokenizers::Tokenizer;

fn main() -> ExitCode {
    shared::cli::run(run)
}

fn run(options: &Options) -> Result<bool> {
    let device = if options.graph { options.device.open_to_capture()? } else { options.device.open()? };
    let checkpoint = open(options, &device)?;
    let Checkpoint { name, config, tokenizer, vb } = checkpoint;
    let prompt = prompt(options, config.vocab_size, tokenizer.as_ref())?;
    let path = if options.compare { MlpPath::Fused } else { options.mlp };
    let model = Llama::load(&config, path, vb).with_context(|| name.clone())?;

    let mut end_tokens = config.end_tokens().to_vec();
    if options.ignore_eos {
        end_tokens.clear();
    } else if options.chat {
        end_tokens.extend(tokenizer.as_ref().and_then(|tokenizer| tokenizer.token_to_id(TURN_END)));
    }
    let settings = Settings {
        tokens: options.tokens.get(),
        end_tokens: &end_tokens,
        temperature: options.temperature,
        top_p: options.top_p,
        seed: options.seed,
    };
    let room = prompt.len() + settings.tokens;
    // Whether there are positions for all of it: an error here comes before any output.
    model.state(room)?;
    let (machine, _) = describe(&device)?;
    let mut out = stdout().lock();
    if !options.json {
        report::opening(&mut out, &name, &machine, options.dtype.as_str())?;
    }
    // What a device does at its first launches is no part of the model's time.
    model.next(&prompt[..1], &mut model.state(1)?)?;

    let (ids, measured) = if options.compare {
        let both = compare(&model, &prompt, &settings, (options.rounds.get(), options.graph))?;
        (both.ids.clone(), Measured::Both(Box::new(both)))
    } else {
        let mut stream = tokenizer.as_ref().filter(|_| !options.json).map(|tokenizer| tokenizer.decode_stream(true));
        let mut show = |id: u32, shown: bool, out: &mut dyn Write| -> Result<()> {
            let piece =
                stream.as_mut().map(|stream| stream.step(id)).transpose().map_err(|error| anyhow!("{error}"))?;
            if let (Some(Some(piece)), true) = (piece, shown) {
                write!(out, "{piece}")?;
                out.flush()?;
            }
            Ok(())
        };
        for &id in &prompt {
            show(id, !options.chat, &mut out)?;
        }
        let mut text = text::open(&model, room, options.graph)?;
        let written = generate(&mut *text, &prompt, &settings, |id, _| show(id, true, &mut out))?;
        if !options.json && tokenizer.is_some() {
            writeln!(out)?;
        }
        (written.ids.clone(), Measured::One(Speed::of(&model, &mut *text, &prompt, &[written])?))
    };
    let text = tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&ids, true)).transpose();
    let text = text.map_err(|error| anyhow!("{error}"))?;
    if let (Some(text), true, false) = (&text, options.compare, options.json) {
        writeln!(out, "{text}")?;
    }
    let one = Tensor::zeros((1, config.hidden_size), options.dtype, &device)?;
    let plan = model.mlp().plan(&one)?;
    let run = Run {
        model: name,
        device: plan.device,
        machine,
        dtype: options.dtype.as_str(),
        graph: options.graph,
        prompt_tokens: prompt.len(),
        tokens: ids.len(),
        text,
        kernel: plan.kernel,
        measured,
    };
    if options.json {
        report::json(&mut out, &run)?;
    } else {
        report::closing(&mut out, &run)?;
    }
    Ok(true)
}

fn open(options: &Options, device: &Device) -> Result<Checkpoint> {
    match options {
        Options { model: Some(folder), .. } => Checkpoint::folder(folder, options.dtype, device),
        Options { gguf: Some(file), .. } => Checkpoint::gguf(file, options.dtype, device),
        Options { synthetic: Some(shape), .. } => Checkpoint::synthetic(*shape, options.dtype, device),
        _ => Checkpoint::trained(options.dtype, device),
    }
}

const TURN_START: &str = "<|im_start|>";
const TURN_END: &str = "<|im_end|>";

/// The tokens to go on from.
fn prompt(options: &Options, vocab_size: usize, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>> {
    let (Some(tokenizer), None) = (tokenizer, options.prompt_tokens) else {
        let mut random = StdRng::seed_from_u64(options.seed);
        let count = options.prompt_tokens.map_or(64, |count| count.get());
        return Ok((0..count).map(|_| random.random_range(0..vocab_size as u32)).collect());
    };
    let is_inside = options.model.is_none() && options.gguf.is_none();
    let text = match &options.prompt {
        Some(text) => text,
        None if is_inside => "Alice was",
        None => "Once upon a time",
    };
    let encoding = if options.chat {
        if tokenizer.token_to_id(TURN_START).is_none() {
            bail!("--chat: the model's tokenizer has no {TURN_START}: it was not made for this format");
        }
        tokenizer.encode(format!("{TURN_START}user\n{text}{TURN_END}\n{TURN_START}assistant\n"), true)
    } else {
        tokenizer.encode(text, true)
    };
    let ids = encoding.map_err(|error| anyhow!("--prompt: {error}"))?.get_ids().to_vec();
    if ids.is_empty() {
        bail!("--prompt: expected at least one token, found none");
    }
    Ok(ids)
}
