//! One row: times and cosines.

use crate::cli::Place;
use crate::embed::{lowest_cosine, pooled, Batch, Encoder};
use crate::model::FusedBert;
use crate::support::timing::{alternate, Rounds};
use anyhow::Result;
use candle_core::Tensor;
use candle_transformers::models::bert::BertModel;
use serde::Serialize;
use std::hint::black_box;

/// The cosine that both models' embeddings of a sentence have at least.
pub const LOWEST_COSINE: f64 = 0.99999;

/// What was found for one size of batch. Serialised, its names stay the same from version to version.
#[derive(Serialize)]
pub struct Row {
    pub device: String,
    pub batch: usize,
    pub sentences: usize,
    /// Of all batches, with their padding.
    pub tokens: usize,
    pub candle_sentences_per_s: f64,
    pub fused_sentences_per_s: f64,
    pub speedup: f64,
    /// Of both models' embeddings of a sentence.
    pub lowest_cosine: f64,
}

impl Row {
    /// Whether the models agree; not, if the cosine is no number.
    pub fn agrees(&self) -> bool {
        self.lowest_cosine >= LOWEST_COSINE
    }
}

/// The row of batches of `size` sentences.
///
/// # Errors
/// Those of the models and of the tokenizer.
pub fn row(
    (rounds, place): (Rounds, Place),
    (candle, fused): (&BertModel, &FusedBert),
    encoder: &Encoder,
    sentences: &[String],
    size: usize,
) -> Result<Row> {
    let batches = encoder.batches(sentences, size)?;
    let by_candle = |batch: &Batch| pooled(&candle.forward(&batch.ids, &batch.types, Some(&batch.mask))?, &batch.mask);
    let by_fused = |batch: &Batch| pooled(&fused.forward(&batch.ids, &batch.types, &batch.mask)?, &batch.mask);

    let mut lowest = 1f64;
    for batch in &batches {
        let cosine = lowest_cosine(&by_candle(batch)?, &by_fused(batch)?)?;
        lowest = if lowest.is_nan() || cosine.is_nan() { f64::NAN } else { lowest.min(cosine) };
    }

    let all = |embeddings: &dyn Fn(&Batch) -> candle_core::Result<Tensor>| {
        for batch in &batches {
            black_box(embeddings(batch)?);
        }
        candle.device.synchronize()
    };
    let samples = alternate(rounds, [&|| all(&by_candle), &|| all(&by_fused)])?;
    let (candle_time, fused_time) = (samples.median(|[candle, _]| *candle), samples.median(|[_, fused]| *fused));
    let count = sentences.len() as f64;
    Ok(Row {
        device: place.to_string(),
        batch: size,
        sentences: sentences.len(),
        tokens: batches.iter().map(|batch| batch.ids.elem_count()).sum(),
        candle_sentences_per_s: count / candle_time,
        fused_sentences_per_s: count / fused_time,
        speedup: candle_time / fused_time,
        lowest_cosine: lowest,
    })
}
