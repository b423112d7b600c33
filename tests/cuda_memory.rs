//! What happens when the GPU's memory is full, and what is kept of it. A program of its own, since it leaves none for anybody else.
#![cfg(feature = "cuda")]

mod common;

use candle_core::cuda_backend::cudarc::driver::result::mem_get_info;
use candle_core::{DType, Device, Error, Module, Result, Tensor};
use candle_fused_mlp::FusedMlp;
use common::*;
use std::sync::{Mutex, PoisonError};

/// Held by each test: what another one holds would count.
static MEMORY: Mutex<()> = Mutex::new(());

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
    let _memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Each thread of candle's default device has a stream of its own, and so a workspace: of 32 MiB here.
#[test]
fn an_ended_thread_leaves_no_workspace() -> Result<()> {
    let _memory = MEMORY.lock().unwrap_or_else(PoisonError::into_inner);
    let device = &Device::new_cuda(0)?;
    let random = &mut Random::new(9);
    let fc1 = random.linear((1 << 17, 64), false, DType::BF16, device)?;
    let fc2 = random.linear((64, 1 << 17), false, DType::BF16, device)?;
    let module = &FusedMlp::from_linears(&fc1, &fc2, candle_fused_mlp::Activation::Gelu)?;
    let xs = &random.normal(&[3, 64], 1., DType::BF16, device)?;
    let expected = &values(&module.forward(xs)?)?;
    let free = || -> Result<usize> {
        device.synchronize()?;
        Ok(mem_get_info().map_err(Error::wrap)?.0)
    };
    let before = free()?;
    for _ in 0..32 {
        std::thread::scope(|scope| {
            let call = move || -> Result<()> {
                assert_eq!(&values(&module.forward(xs)?)?, expected);
                Ok(())
            };
            scope.spawn(call).join().expect("a thread panicked")
        })?;
    }
    let kept = before.saturating_sub(free()?);
    assert!(kept < 256 << 20, "{kept} bytes are kept of 32 threads");
    Ok(())
}
