//! Whole models in CUDA graphs. A program of its own: other tests drop devices, for which cuBLAS waits for the whole GPU, and that
//! breaks a capture.
//!
//! `FUSED_MLP_SHARED` names a folder with `models/stories260k`.
#![cfg(feature = "cuda")]

#[path = "../examples/llama/checkpoint.rs"]
#[allow(dead_code)]
mod checkpoint;
mod common;
#[path = "../examples/llama/graph.rs"]
mod graph;
#[path = "../benches/support/mod.rs"]
mod measuring;
#[path = "../examples/llama/model.rs"]
#[allow(dead_code)]
mod model;
#[path = "../examples/shared/mod.rs"]
mod shared;
#[path = "llama/stories.rs"]
mod stories;
#[path = "../examples/llama/text.rs"]
#[allow(dead_code)]
mod text;
#[path = "../examples/llama/tokenizer.rs"]
mod tokenizer;

use anyhow::Result;
use candle_core::{DType, D};
use stories::{apart, stories, PATHS};

/// Every token by a CUDA graph: the same as by launches, in texts one after the other, and no token more than there is room for.
#[test]
fn graphs_write_the_same_text() -> Result<()> {
    let device = &shared::cli::Place::Cuda(0).open_to_capture()?;
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let Some((_, model, golden)) = stories(dtype, device)? else { return Ok(()) };
        let expected: Vec<u32> = serde_json::from_value(golden["greedy_ids"].clone())?;
        for path in PATHS {
            let model = model.with_mlp(path);
            let prompt = [golden["bos"].as_u64().unwrap() as u32];
            let room = expected.len();
            let mut text = text::open(&model, room, true)?;
            for prompt in [&expected[..5], &prompt, &prompt] {
                let mut logits = text.begin(prompt)?;
                let mut state = model.state(room)?;
                let mut launched = model.next(prompt, &mut state)?;
                let mut ids: Vec<u32> = Vec::new();
                for _ in 0..room - prompt.len() {
                    let difference = apart(&logits.to_vec1()?, &launched.to_vec1()?);
                    let tolerance = if dtype == DType::F32 { 1e-4 } else { 1.2 };
                    assert!(difference <= tolerance, "{dtype:?} {path:?}, token {}: {difference}", ids.len());
                    let id = logits.argmax(D::Minus1)?.to_scalar()?;
                    ids.push(id);
                    (logits, launched) = (text.go_on(id)?, model.next(&[id], &mut state)?);
                }
                if dtype == DType::F32 && prompt.len() == 1 {
                    assert_eq!(ids, expected[..ids.len()], "{path:?}");
                }
            }
            let error = text.go_on(0).unwrap_err().to_string();
            assert!(error.contains("expected at most 256 tokens"), "{error}");
            let share = text.mlp_share()?.unwrap();
            assert!(share > 0. && share < 1., "{share}");
        }
    }
    Ok(())
}
