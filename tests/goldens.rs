//! The outputs of transformers' own MLP classes, in f64, loaded by naming and by detection.
//!
//! Reads `goldens/goldens_shared.safetensors` in the folder that the environment variable `FUSED_MLP_SHARED` names.

mod common;

use candle_core::{test_device, Device, Module, Result};
use candle_fused_mlp::{fused_mlp, fused_swiglu, Activation, Naming};
use candle_nn::VarBuilder;
use common::*;

const HIDDEN: usize = 88;
const INTERMEDIATE: usize = 172;

fn goldens(device: &Device) -> Result<()> {
    let Some(folder) = file_of("FUSED_MLP_SHARED", "the folder with goldens/goldens_shared.safetensors") else {
        return Ok(());
    };
    let path = folder.join("goldens/goldens_shared.safetensors");
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    let cases = [
        ("llama", Naming::LLAMA, Activation::Silu),
        ("phi3", Naming::PHI3, Activation::Silu),
        ("gemma2", Naming::LLAMA, Activation::GeluTanh),
        ("phi", Naming::FC1_FC2, Activation::GeluTanh),
        ("gptneox", Naming::GPT_NEOX, Activation::Gelu),
        ("t5_gated", Naming::T5_GATED, Activation::GeluTanh),
    ];
    let mut checked = 0;
    for (case, naming, activation) in cases {
        for dtype in DTYPES {
            // SAFETY: nothing writes to the file while it is mapped.
            let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[&path], dtype, device)? };
            // The file separates its parts by slashes.
            let vb = vb.rename_f(|name| name.replacen("/w.", "/w/", 1)).pp(format!("{case}/w"));
            assert_eq!(Naming::detect(HIDDEN, INTERMEDIATE, &vb)?, naming, "{case}");
            let module: Box<dyn Module> = if naming.is_gated() {
                Box::new(fused_swiglu(HIDDEN, INTERMEDIATE, activation, &naming, vb)?)
            } else {
                Box::new(fused_mlp(HIDDEN, INTERMEDIATE, activation, &naming, vb)?)
            };
            for k in 0..4 {
                let xs = tensors[&format!("{case}/x{k}")].to_device(device)?.to_dtype(dtype)?;
                let exact = &tensors[&format!("{case}/y{k}")];
                for tier in tiers(device) {
                    let found = tier.with(|| module.forward(&xs))?;
                    assert_eq!(found.dims(), exact.dims());
                    let error = relative_error(&found, exact)?;
                    assert!(error <= tolerance(dtype), "{case} {k} {dtype:?} {tier}: {error:e}");
                    checked += 1;
                }
            }
        }
    }
    assert_eq!(checked, 6 * 4 * 4 * tiers(device).len());
    eprintln!("goldens: {checked} outputs match transformers'");
    Ok(())
}
test_device!(goldens, goldens_cpu, goldens_gpu, goldens_metal);
