//! Batches of sentences, and embeddings of them.

use anyhow::{anyhow, Result};
use candle_core::{DType, Device, Tensor, D};
use std::path::Path;
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

/// Turns sentences into batches of token ids.
pub struct Encoder {
    tokenizer: Tokenizer,
    device: Device,
}

/// Sentences that go through the model together, `[sentences, tokens]` each.
pub struct Batch {
    pub ids: Tensor,
    /// All zero: a sentence alone is the first of a pair.
    pub types: Tensor,
    /// 1 where there is a token, 0 where there is padding.
    pub mask: Tensor,
}

impl Encoder {
    /// The encoder of a `tokenizer.json`; sentences are cut at `longest` tokens.
    ///
    /// # Errors
    /// A file that is no tokenizer.
    pub fn open(path: &Path, longest: usize, device: &Device) -> Result<Self> {
        let wrong = |error| anyhow!("{}: not a tokenizer: {error}", path.display());
        let mut tokenizer = Tokenizer::from_file(path).map_err(wrong)?;
        tokenizer.with_padding(Some(PaddingParams::default()));
        tokenizer
            .with_truncation(Some(TruncationParams { max_length: longest, ..Default::default() }))
            .map_err(wrong)?;
        Ok(Self { tokenizer, device: device.clone() })
    }

    /// The sentences in batches of `size`, in their order, each padded to its longest.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn batches(&self, sentences: &[String], size: usize) -> Result<Vec<Batch>> {
        sentences
            .chunks(size)
            .map(|chunk| {
                let encoded = self.tokenizer.encode_batch(chunk.to_vec(), true).map_err(|error| anyhow!(error))?;
                let ids: Vec<_> = encoded.iter().map(|sentence| sentence.get_ids()).collect();
                let mask: Vec<_> = encoded.iter().map(|sentence| sentence.get_attention_mask()).collect();
                let ids = Tensor::new(ids, &self.device)?;
                Ok(Batch { types: ids.zeros_like()?, mask: Tensor::new(mask, &self.device)?, ids })
            })
            .collect()
    }
}

/// The embeddings `[sentences, hidden_size]` of length 1 that a model's outputs `[sentences, tokens, hidden_size]` give.
///
/// # Errors
/// Those of candle's ops.
pub fn pooled(outputs: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
    let mask = mask.to_dtype(outputs.dtype())?.unsqueeze(2)?;
    let mean = outputs.broadcast_mul(&mask)?.sum(1)?.broadcast_div(&mask.sum(1)?)?;
    mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)
}

/// The lowest cosine of two lists of embeddings, pair by pair; NaN if there is one.
///
/// # Errors
/// Those of candle's ops.
pub fn lowest_cosine(a: &Tensor, b: &Tensor) -> candle_core::Result<f64> {
    let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    let lengths = (a.sqr()?.sum(D::Minus1)? * b.sqr()?.sum(D::Minus1)?)?.sqrt()?;
    let cosines = ((a * b)?.sum(D::Minus1)? / lengths)?.to_vec1::<f64>()?;
    Ok(cosines.into_iter().fold(1., |lowest, cosine| if cosine < lowest || cosine.is_nan() { cosine } else { lowest }))
}
