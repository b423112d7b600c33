//! The model stories260k and its golden tokens.

use crate::checkpoint::Checkpoint;
use crate::common::file_of;
use crate::model::{Llama, MlpPath};
use anyhow::Result;
use candle_core::{DType, Device};
use serde_json::Value;
use std::fs;

pub const PATHS: [MlpPath; 2] = [MlpPath::Fused, MlpPath::Unfused];

/// The largest difference of two rows of logits; infinite if one is no number.
pub fn apart(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
    differences.fold(0., |largest, value| if value.is_nan() { f64::INFINITY } else { largest.max(value) })
}

/// The model with its MLPs fused and the golden file beside it, if `FUSED_MLP_SHARED` says where.
pub fn stories(dtype: DType, device: &Device) -> Result<Option<(Checkpoint, Llama, Value)>> {
    let Some(folder) = file_of("FUSED_MLP_SHARED", "the folder with models/stories260k") else {
        return Ok(None);
    };
    let folder = folder.join("models/stories260k");
    let checkpoint = Checkpoint::folder(&folder, dtype, device)?;
    let model = Llama::load(&checkpoint.config, MlpPath::Fused, checkpoint.vb.clone())?;
    Ok(Some((checkpoint, model, serde_json::from_str(&fs::read_to_string(folder.join("golden.json"))?)?)))
}
