//! Tokenizers, all as Hugging Face's: of a `tokenizer.json`, of llama2.c's format and of a GGUF file.

use crate::shared::safetensors::cause;
use anyhow::{anyhow, bail, Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use std::fs;
use std::path::Path;
use tokenizers::decoders::{byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip};
use tokenizers::models::bpe::{Vocab, BPE};
use tokenizers::normalizers::Prepend;
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence as PreTokenizers};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

/// Their errors as ours.
fn as_error(error: tokenizers::Error) -> anyhow::Error {
    anyhow!("{error}")
}

/// The tokenizer in the text of a `tokenizer.json`.
///
/// # Errors
/// Text that is no tokenizer.
pub fn from_json(json: &str) -> Result<Tokenizer> {
    json.parse().map_err(as_error)
}

/// The tokenizer of a GGUF file's metadata.
///
/// # Errors
/// Metadata without a byte-pair tokenizer.
pub fn from_gguf(content: &Content) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(content).map_err(|error| anyhow!("tokenizer: {}", cause(&error)))?;
    let pre = content.metadata.get("tokenizer.ggml.pre").and_then(|value| value.to_string().ok());
    if pre.is_some_and(|pre| pre == "smollm") {
        // candle reads this as GPT-2's with a space before the text; SmolLM has none there, and splits numbers.
        let steps = vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()];
        tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
    }
    Ok(tokenizer)
}

/// The tokenizer in llama2.c's format: the longest token's length, then for each token a score, a length and the bytes.
///
/// # Errors
/// A file that is missing, or holds another number of tokens than `vocab_size`.
pub fn from_llama2c(path: &Path, vocab_size: usize) -> Result<Tokenizer> {
    let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let entries = llama2c_entries(&bytes)
        .filter(|entries| entries.len() == vocab_size)
        .with_context(|| format!("{}: expected {vocab_size} tokens in llama2.c's format", path.display()))?;
    const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
    let mut tokens: Vec<String> = entries.iter().map(|(_, token)| token.clone()).collect();
    if tokens.len() < SPECIAL.len() {
        bail!("{}: expected at least {} tokens", path.display(), SPECIAL.len());
    }
    for (token, name) in tokens.iter_mut().zip(SPECIAL) {
        *token = name.to_string();
    }
    let vocab: Vocab = tokens.iter().zip(0..).map(|(token, id)| (token.clone(), id)).collect();

    // Of two neighbours that make a token, those with the highest score are joined first. Here the order of merges says so.
    let mut order: Vec<usize> = (SPECIAL.len()..tokens.len()).collect();
    order.sort_by(|&a, &b| entries[b].0.total_cmp(&entries[a].0));
    let merges = order
        .into_iter()
        .flat_map(|id| {
            let token = &tokens[id];
            token.char_indices().skip(1).map(|(at, _)| token.split_at(at))
        })
        .filter(|&(left, right)| vocab.contains_key(left) && vocab.contains_key(right))
        .map(|(left, right)| (left.to_string(), right.to_string()))
        .collect();

    let bpe = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).unk_token(SPECIAL[0].to_string());
    let mut tokenizer = Tokenizer::new(bpe.build().map_err(as_error)?);
    tokenizer.add_special_tokens(SPECIAL.map(|token| AddedToken::from(token, true))).map_err(as_error)?;
    let start = TemplateProcessing::builder()
        .try_single("<s> $A")
        .map_err(|error| anyhow!("{error}"))?
        .special_tokens(vec![("<s>", 1)])
        .build()?;
    let steps = vec![ByteFallback::new().into(), Fuse::new().into(), Strip::new(' ', 1, 0).into()];
    tokenizer
        .with_normalizer(Some(Prepend::new(" ".to_string())))
        .map_err(as_error)?
        .with_post_processor(Some(start))
        .with_decoder(Some(Decoders::new(steps)));
    Ok(tokenizer)
}

/// Scores and tokens; `None` if the bytes are not in the format.
fn llama2c_entries(bytes: &[u8]) -> Option<Vec<(f32, String)>> {
    let (_longest, mut rest) = bytes.split_first_chunk::<4>()?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (score, after) = rest.split_first_chunk::<4>()?;
        let (len, after) = after.split_first_chunk::<4>()?;
        let (token, after) = after.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        entries.push((f32::from_le_bytes(*score), String::from_utf8(token.to_vec()).ok()?));
        rest = after;
    }
    Some(entries)
}
