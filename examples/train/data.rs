//! The text: its tokenizer and its batches.

use anyhow::{anyhow, bail, Context, Result};
use candle_core::{Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};
use std::fs;
use std::path::Path;
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{Tokenizer, TokenizerBuilder};

/// A text in tokens of its own.
pub struct Data {
    tokenizer: Tokenizer,
    ids: Vec<u32>,
    context: usize,
}

impl Data {
    /// Reads a text and makes a tokenizer of this many tokens of it: byte pairs, as GPT-2's, of the characters that occur.
    ///
    /// # Errors
    /// A file that is missing, not UTF-8, or shorter than one context.
    pub fn read(path: &Path, vocab_size: usize, context: usize) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let broken = |error: tokenizers::Error| anyhow!("{}: {error}", path.display());
        let bytes = ByteLevel::new(false, true, true);
        let mut tokenizer = TokenizerBuilder::new()
            .with_model(BPE::default())
            .with_normalizer(None::<tokenizers::NormalizerWrapper>)
            .with_pre_tokenizer(Some(bytes))
            .with_post_processor(None::<tokenizers::PostProcessorWrapper>)
            .with_decoder(Some(bytes))
            .build()
            .map_err(broken)?;
        let mut trainer = BpeTrainer::builder().vocab_size(vocab_size).show_progress(false).build();
        tokenizer.train(&mut trainer, text.lines().map(|line| format!("{line}\n"))).map_err(broken)?;
        let tokenizer: Tokenizer = serde_json::from_value(serde_json::to_value(&tokenizer)?)?;
        let ids = tokenizer.encode(text.as_str(), false).map_err(broken)?.get_ids().to_vec();
        if ids.len() <= context + 1 {
            bail!("{}: expected more than {} tokens of text, found {}", path.display(), context + 1, ids.len());
        }
        Ok(Self { tokenizer, ids, context })
    }

    /// The tokens of the text.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// The tokens there are.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// `tokenizer.json`.
    ///
    /// # Errors
    /// None for a tokenizer that was made here.
    pub fn tokenizer_json(&self) -> Result<String> {
        self.tokenizer.to_string(true).map_err(|error| anyhow!("{error}"))
    }

    /// Seeded random batches.
    pub fn batches(&self, seed: u64, batch: usize) -> Batches<'_> {
        Batches { data: self, random: StdRng::seed_from_u64(seed), batch }
    }
}

/// Batches without an end.
pub struct Batches<'a> {
    data: &'a Data,
    random: StdRng,
    batch: usize,
}

impl Batches<'_> {
    /// Pieces of the text, `[batch, context]`, and the tokens that follow each of theirs.
    ///
    /// # Errors
    /// Those of candle.
    pub fn next_batch(&mut self) -> Result<(Tensor, Tensor)> {
        let Data { ids, context, .. } = self.data;
        let starts: Vec<usize> = (0..self.batch).map(|_| self.random.random_range(0..ids.len() - context)).collect();
        let pieces = |shift: usize| -> Result<Tensor> {
            let pieces: Vec<u32> =
                starts.iter().flat_map(|at| &ids[at + shift..at + shift + context]).copied().collect();
            Ok(Tensor::from_vec(pieces, (self.batch, *context), &Device::Cpu)?)
        };
        Ok((pieces(0)?, pieces(1)?))
    }
}
