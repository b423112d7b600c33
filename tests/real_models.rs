//! Trained models: every layer's MLP against candle's own.
//!
//! `FUSED_MLP_SHARED` names a folder with `models/stories260k/model.safetensors` (a LLaMA), `FUSED_MLP_MINILM` the file
//! that `tests/fetch_models.sh minilm` fetches (a BERT).

mod common;

use candle_core::{test_device, DType, Device, Module, Result, Tensor};
use candle_fused_mlp::{fused_mlp, fused_swiglu, Activation, FusedMlp, FusedSwiGlu, Naming};
use candle_nn::{linear, linear_no_bias, VarBuilder};
use common::*;
use std::path::Path;

fn open(path: &Path, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    // SAFETY: nothing writes to the file while it is mapped.
    unsafe { VarBuilder::from_mmaped_safetensors(&[path], dtype, device) }
}

/// Checks a layer's modules against the exact result and, in f32 and f64, candle's own.
fn check(modules: [&dyn Module; 2], xs: &Tensor, candle: impl Fn(&Tensor, DType) -> Result<Tensor>) -> Result<f64> {
    let dtype = xs.dtype();
    let exact = candle(&xs.to_dtype(DType::F64)?, DType::F64)?;
    let mut worst = 0f64;
    for tier in tiers(xs.device()) {
        for module in modules {
            let found = tier.with(|| module.forward(xs))?;
            assert_eq!(found.dims(), xs.dims());
            let error = relative_error(&found, &exact)?;
            assert!(error <= tolerance(dtype), "{dtype:?} {tier} {:?}: {error:e}", xs.dims());
            if matches!(dtype, DType::F32 | DType::F64) {
                let apart = relative_error(&found, &candle(xs, dtype)?)?;
                assert!(apart <= 2. * tolerance(dtype), "{dtype:?} {tier}: {apart:e} from candle's");
            }
            worst = worst.max(error);
        }
    }
    Ok(worst)
}

fn stories260k(device: &Device) -> Result<()> {
    let Some(folder) = file_of("FUSED_MLP_SHARED", "the folder with models/stories260k/model.safetensors") else {
        return Ok(());
    };
    let (hidden, intermediate, layers) = (64, 172, 5);
    let random = &mut Random::new(1);
    for dtype in DTYPES {
        let path = folder.join("models/stories260k/model.safetensors");
        let (vb, wide) = (open(&path, dtype, device)?, open(&path, DType::F64, device)?);
        let mut worst = 0f64;
        for layer in 0..layers {
            let at = |vb: &VarBuilder<'static>| vb.pp("model.layers").pp(layer).pp("mlp");
            let named = fused_swiglu(hidden, intermediate, Activation::Silu, &Naming::LLAMA, at(&vb))?;
            let detected = FusedSwiGlu::detect(hidden, intermediate, Activation::Silu, at(&vb))?;
            let candle = |xs: &Tensor, dtype: DType| {
                let vb = if dtype == DType::F64 { at(&wide) } else { at(&vb) };
                let gate = linear_no_bias(hidden, intermediate, vb.pp("gate_proj"))?.forward(xs)?.silu()?;
                let up = linear_no_bias(hidden, intermediate, vb.pp("up_proj"))?.forward(xs)?;
                linear_no_bias(intermediate, hidden, vb.pp("down_proj"))?.forward(&(gate * up)?)
            };
            for tokens in [1, 7, 64] {
                let xs = random.normal(&[1, tokens, hidden], 1., dtype, device)?;
                worst = worst.max(check([&named, &detected], &xs, candle)?);
            }
        }
        eprintln!("stories260k, {layers} layers, {}: largest error {worst:.1e}", dtype.as_str());
    }
    Ok(())
}
test_device!(stories260k, stories260k_cpu, stories260k_gpu, stories260k_metal);

fn minilm(device: &Device) -> Result<()> {
    let Some(path) = file_of("FUSED_MLP_MINILM", "the file that tests/fetch_models.sh minilm prints") else {
        return Ok(());
    };
    let (hidden, intermediate, layers) = (384, 1536, 6);
    let random = &mut Random::new(2);
    for dtype in DTYPES {
        let (vb, wide) = (open(&path, dtype, device)?, open(&path, DType::F64, device)?);
        let mut worst = 0f64;
        for layer in 0..layers {
            let at = |vb: &VarBuilder<'static>| vb.pp("encoder.layer").pp(layer);
            let named = fused_mlp(hidden, intermediate, Activation::Gelu, &Naming::BERT, at(&vb))?;
            let detected = FusedMlp::detect(hidden, intermediate, Activation::Gelu, at(&vb))?;
            assert!(named.fc1().bias().is_some() && named.fc2().bias().is_some());
            let candle = |xs: &Tensor, dtype: DType| {
                let vb = if dtype == DType::F64 { at(&wide) } else { at(&vb) };
                let fc1 = linear(hidden, intermediate, vb.pp("intermediate.dense"))?;
                let fc2 = linear(intermediate, hidden, vb.pp("output.dense"))?;
                fc2.forward(&fc1.forward(xs)?.gelu_erf()?)
            };
            for tokens in [1, 33] {
                let xs = random.normal(&[2, tokens, hidden], 1., dtype, device)?;
                worst = worst.max(check([&named, &detected], &xs, candle)?);
            }
        }
        eprintln!("MiniLM, {layers} layers, {}: largest error {worst:.1e}", dtype.as_str());
    }
    Ok(())
}
test_device!(minilm, minilm_cpu, minilm_gpu, minilm_metal);
