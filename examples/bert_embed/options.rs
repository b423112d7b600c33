//! The command line.

use crate::cli::Place;
use crate::support::timing::Rounds;
use anyhow::{bail, Context, Result};
use clap::Parser;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;
use std::{env, fs};

/// The variable that names the model where `--model` does not.
const MODEL_VARIABLE: &str = "FUSED_MLP_MINILM";

/// Sentence embeddings of a BERT, by candle_transformers' model and by the same with fused MLPs: compared, and timed by
/// turns.
#[derive(Parser, Debug)]
#[command(name = "bert_embed")]
pub struct Options {
    /// A folder with config.json, model.safetensors and tokenizer.json of a BERT, or the model.safetensors in it.
    /// Without it: the environment variable FUSED_MLP_MINILM, which `tests/fetch_models.sh minilm` gives a value for.
    #[arg(long, value_name = "FOLDER")]
    model: Option<PathBuf>,
    /// A text file with a sentence a line. Without it: 64 sentences of the program's own.
    #[arg(long, value_name = "FILE")]
    sentences: Option<PathBuf>,
    /// Sentences in a batch, one row each.
    #[arg(long = "batch", value_name = "BATCH", value_delimiter = ',', default_value = "1,8,64")]
    pub batches: Vec<NonZeroUsize>,
    /// Where to run: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: Place,
    /// Rounds to time. Without it: what takes about 3 seconds, at least 3.
    #[arg(long, value_name = "N")]
    iters: Option<NonZeroUsize>,
    /// Print a JSON object a line in place of a table.
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// The folder of the model.
    ///
    /// # Errors
    /// None was named, or there is none of that name.
    pub fn model_folder(&self) -> Result<PathBuf> {
        let Some(path) = self
            .model
            .clone()
            .or_else(|| env::var_os(MODEL_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from))
        else {
            bail!(
                "no model: give --model FOLDER, or set {MODEL_VARIABLE} to what `tests/fetch_models.sh minilm` prints"
            );
        };
        match path.parent() {
            _ if path.is_dir() => Ok(path),
            Some(folder) if path.is_file() => Ok(folder.to_path_buf()),
            _ => bail!("{}: no such folder", path.display()),
        }
    }

    /// The sentences to embed.
    ///
    /// # Errors
    /// A file that cannot be read or has no sentence.
    pub fn sentences(&self) -> Result<Vec<String>> {
        let text = match &self.sentences {
            Some(path) => fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?,
            None => include_str!("sentences.txt").to_string(),
        };
        let sentences: Vec<String> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_string).collect();
        match &self.sentences {
            Some(path) if sentences.is_empty() => bail!("{}: expected a sentence a line, found none", path.display()),
            _ => Ok(sentences),
        }
    }

    /// How long to time.
    pub fn rounds(&self) -> Rounds {
        self.iters.map_or(Rounds::For(Duration::from_secs(3)), |n| Rounds::Exactly(n.get()))
    }
}
