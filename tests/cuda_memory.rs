//! What happens when the GPU's memory is full. A program of its own, since it leaves none for anybody else.
#![cfg(feature = "cuda")]

mod common;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_fused_mlp::FusedMlp;
use common::*;

/// Takes what is left, in ever smaller pieces.
fn fill(device: &Device) -> Vec<Tensor> {
    let mut taken = Vec::new();
    let mut bytes = 1usize << 32;
    while bytes >= 1 << 20 {
        // SAFETY: nobody reads what is in it.
        match unsafe { Tensor::empty(bytes, DType::U8, device) } {
            Ok(tensor) => taken.push(tensor),
            Err(_) => bytes /= 2,
        }
    }
    taken
}

#[test]
fn without_memory_an_error_and_the_next_call_works() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    let random = &mut Random::new(8);
    let fc1 = random.linear((128, 64), true, DType::BF16, device)?;
    let fc2 = random.linear((64, 128), true, DType::BF16, device)?;
    let module = FusedMlp::from_linears(&fc1, &fc2, candle_fused_mlp::Activation::Gelu)?;
    let few = random.normal(&[3, 64], 1., DType::BF16, device)?;
    let many = Tensor::zeros((1 << 20, 64), DType::BF16, device)?;
    let expected = values(&module.forward(&few)?)?;
    module.forward(&many)?;
    let taken = fill(device);
    assert!(!taken.is_empty());
    let error = module.forward(&many).expect_err("no memory is left").to_string();
    assert!(error.to_lowercase().contains("memory"), "{error}");
    drop(taken);
    module.forward(&many)?;
    assert_eq!(values(&module.forward(&few)?)?, expected);
    Ok(())
}
