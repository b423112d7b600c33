//! `docs/drop-in.md`: the code before and after each change compiles, computes the same, and is what the guide shows.
//!
//! The code is in `tests/drop_in/MODEL/before.rs` and `after.rs`.

#[path = "drop_in/bert/after.rs"]
mod bert_after;
#[path = "drop_in/bert/before.rs"]
mod bert_before;
mod common;
#[path = "drop_in/llama/after.rs"]
mod llama_after;
#[path = "drop_in/llama/before.rs"]
mod llama_before;
#[path = "drop_in/phi3/after.rs"]
mod phi3_after;
#[path = "drop_in/phi3/before.rs"]
mod phi3_before;
#[path = "drop_in/t5/after.rs"]
mod t5_after;
#[path = "drop_in/t5/before.rs"]
mod t5_before;
#[path = "drop_in/whisper/after.rs"]
mod whisper_after;
#[path = "drop_in/whisper/before.rs"]
mod whisper_before;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Activation, VarBuilder, VarMap};
use candle_transformers::models::{bert, llama, phi3, t5};
use common::{relative_error, tolerance, Random};

const HIDDEN: usize = 24;
const INTERMEDIATE: usize = 96;

/// Builds `before`, which makes weights, and `after` from these; checks that both compute the same of one x.
fn same(
    before: impl Fn(VarBuilder, &Tensor) -> Result<Tensor>,
    after: impl Fn(VarBuilder, &Tensor) -> Result<Tensor>,
) -> Result<()> {
    let random = &mut Random::new(3);
    let variables = VarMap::new();
    let vb = || VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu).pp("model.layers.0");
    let xs = random.normal(&[2, 5, HIDDEN], 1., DType::F32, &Device::Cpu)?;
    before(vb(), &xs)?;
    // Norms' weights begin as ones and zeros; random ones are a better test.
    let names: Vec<String> = variables.data().lock().unwrap().keys().cloned().collect();
    for name in &names {
        let variable = variables.data().lock().unwrap()[name].clone();
        variable.set(&random.normal(variable.dims(), 0.3, DType::F32, &Device::Cpu)?)?;
    }
    let (expected, found) = (before(vb(), &xs)?, after(vb(), &xs)?);
    assert_eq!(variables.data().lock().unwrap().len(), names.len(), "other names than before");
    let error = relative_error(&found, &expected)?;
    assert!(error <= 2. * tolerance(DType::F32), "{error:e}");
    Ok(())
}

#[test]
fn llama() -> Result<()> {
    let mut config = llama::Config::config_7b_v1(false);
    (config.hidden_size, config.intermediate_size) = (HIDDEN, INTERMEDIATE);
    same(
        |vb, xs| llama_before::Mlp::load(vb.pp("mlp"), &config)?.forward(xs),
        |vb, xs| llama_after::Mlp::load(vb.pp("mlp"), &config)?.forward(xs),
    )
}

#[test]
fn bert() -> Result<()> {
    for hidden_act in [bert::HiddenAct::Gelu, bert::HiddenAct::GeluApproximate, bert::HiddenAct::Relu] {
        let config =
            bert::Config { hidden_size: HIDDEN, intermediate_size: INTERMEDIATE, hidden_act, ..Default::default() };
        same(
            |vb, xs| bert_before::FeedForward::load(vb, &config)?.forward(xs),
            |vb, xs| bert_after::FeedForward::load(vb, &config)?.forward(xs),
        )?;
    }
    Ok(())
}

#[test]
fn whisper() -> Result<()> {
    same(
        |vb, xs| whisper_before::FeedForward::load(HIDDEN, vb)?.forward(xs),
        |vb, xs| whisper_after::FeedForward::load(HIDDEN, vb)?.forward(xs),
    )
}

#[test]
fn t5() -> Result<()> {
    for activation in [Activation::NewGelu, Activation::Silu] {
        let feed_forward_proj = t5::ActivationWithOptionalGating { gated: true, activation };
        let config = t5::Config { d_model: HIDDEN, d_ff: INTERMEDIATE, feed_forward_proj, ..Default::default() };
        same(
            |vb, xs| t5_before::T5DenseGatedActDense::load(vb, &config)?.forward(xs),
            |vb, xs| t5_after::T5DenseGatedActDense::load(vb, &config)?.forward(xs),
        )?;
    }
    Ok(())
}

#[test]
fn phi3() -> Result<()> {
    let config: phi3::Config = serde_json::from_value(serde_json::json!({
        "vocab_size": 8, "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 8
    }))
    .map_err(candle_core::Error::wrap)?;
    same(
        |vb, xs| phi3_before::Mlp::new(&config, vb.pp("mlp"))?.forward(xs),
        |vb, xs| phi3_after::Mlp::new(&config, vb.pp("mlp"))?.forward(xs),
    )
}

/// A diff in the guide without the lines that it adds is `before.rs`, without those that it removes `after.rs`.
#[test]
fn the_guide_shows_this_code() {
    macro_rules! code {
        ($($model:literal),*) => {
            [$(($model, include_str!(concat!("drop_in/", $model, "/before.rs")),
                include_str!(concat!("drop_in/", $model, "/after.rs")))),*]
        };
    }
    let guide = include_str!("../docs/drop-in.md");
    let mut diffs = guide.split("```diff\n").skip(1).map(|rest| rest.split_once("```\n").unwrap().0);
    for (model, before, after) in code!["llama", "phi3", "bert", "whisper", "t5"] {
        let diff = diffs.next().unwrap_or_else(|| panic!("{model}: no diff in the guide"));
        let without = |sign: char| -> String {
            let kept = diff.lines().filter(|line| !line.starts_with(sign));
            kept.map(|line| format!("{}\n", line.get(1..).unwrap_or_default())).collect()
        };
        assert_eq!(without('+'), before, "{model}: before");
        assert_eq!(without('-'), after, "{model}: after");
    }
    assert!(diffs.next().is_none(), "a diff of which no code is tested");
}
