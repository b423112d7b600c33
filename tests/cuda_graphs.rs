//! CUDA graphs of the ops. A program of its own, whose tests run one after the other: where a device is made or dropped, candle and
//! cuBLAS wait for the whole GPU, and that breaks the captures of all threads.
#![cfg(feature = "cuda")]

mod common;

use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_fused_mlp::cuda::Kernel;
use common::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device whose stream can be captured: candle's events between streams cannot.
fn capturable() -> Result<Device> {
    let device = Device::new_cuda_with_stream(0)?;
    // SAFETY: the test that asks for this device uses it on one thread and one stream.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    Ok(device)
}

const THREAD_LOCAL: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const AUTO_FREE: CUgraphInstantiate_flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;

#[test]
fn graphs_replay() -> Result<()> {
    let _alone = alone();
    let device = &capturable()?;
    let stream = device.as_cuda_device()?.cuda_stream();
    for (dtype, kernel, tokens) in [
        (DType::BF16, Kernel::DecodeCluster, 1),
        (DType::F32, Kernel::DecodeCluster, 7),
        (DType::BF16, Kernel::DecodeResident, 1),
        (DType::F16, Kernel::DecodeResident, 8),
        (DType::BF16, Kernel::DecodeResident, 32),
        (DType::BF16, Kernel::DecodeHopper, 1),
        (DType::F16, Kernel::DecodeHopper, 64),
        (DType::BF16, Kernel::DecodeWide, 64),
        (DType::F16, Kernel::DecodeWide, 100),
        (DType::F32, Kernel::DecodeHopper, 5),
        (DType::BF16, Kernel::DecodeDependent, 1),
        (DType::BF16, Kernel::Decode, 16),
        (DType::F32, Kernel::DecodeDependent, 5),
        (DType::F64, Kernel::DecodePortable, 3),
        (DType::BF16, Kernel::Gemm, 200),
        (DType::F32, Kernel::Gemm, 200),
        (DType::F16, Kernel::GemmAmpere, 200),
    ] {
        let random = &mut Random::new(6);
        let sizes = if kernel == Kernel::DecodeCluster { (64, 172) } else { (576, 1536) };
        let layers: Vec<_> = (0..3).map(|_| gated(random, sizes, dtype, device)).collect::<Result<_>>()?;
        let model = |xs: &Tensor| kernel.with(|| layers.iter().try_fold(xs.clone(), |xs, layer| layer.forward(&xs)));
        let xs = random.normal(&[tokens, sizes.0], 1., dtype, device)?;
        let out = xs.zeros_like()?;
        model(&xs)?;
        stream.begin_capture(THREAD_LOCAL).map_err(candle_core::Error::wrap)?;
        let captured = model(&xs).and_then(|ys| out.slice_set(&ys, 0, 0));
        let graph = stream.end_capture(AUTO_FREE).map_err(candle_core::Error::wrap)?.expect("a graph");
        captured?;
        for _ in 0..3 {
            let fresh = random.normal(&[tokens, sizes.0], 1., dtype, device)?;
            let expected = values(&model(&fresh)?)?;
            xs.slice_set(&fresh, 0, 0)?;
            for _ in 0..1000 {
                graph.launch().map_err(candle_core::Error::wrap)?;
            }
            assert_eq!(values(&out)?, expected, "{kernel} {dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn a_first_call_cannot_be_captured() -> Result<()> {
    let _alone = alone();
    let device = &capturable()?;
    let stream = device.as_cuda_device()?.cuda_stream();
    let random = &mut Random::new(7);
    let module = gated(random, (64, 192), DType::F32, device)?;
    let xs = random.normal(&[1, 64], 1., DType::F32, device)?;
    stream.begin_capture(THREAD_LOCAL).map_err(candle_core::Error::wrap)?;
    let captured = module.forward(&xs).map(|ys| ys.dims().to_vec());
    stream.end_capture(AUTO_FREE).map_err(candle_core::Error::wrap)?;
    let error = captured.unwrap_err().to_string();
    assert!(error.contains("before the capture of a CUDA graph"), "{error}");
    assert_near(&module.forward(&xs)?, &exact(&module, &xs)?, "after the capture")
}

/// A dropped device's workspace is freed at the next stream's first call, an ended thread's when it ends: neither may wait for
/// a stream that somebody captures.
#[test]
fn workspaces_are_freed_beside_a_capture() -> Result<()> {
    let _alone = alone();
    let device = &capturable()?;
    let stream = device.as_cuda_device()?.cuda_stream();
    let random = &mut Random::new(9);
    let module = gated(random, (64, 192), DType::F32, device)?;
    let xs = random.normal(&[1, 64], 1., DType::F32, device)?;
    let call = |device: &Device| -> Result<()> {
        let random = &mut Random::new(10);
        let module = gated(random, (64, 192), DType::F32, device)?;
        let xs = random.normal(&[1, 64], 1., DType::F32, device)?;
        assert_near(&module.forward(&xs)?, &exact(&module, &xs)?, "beside a capture")
    };
    let (shared, next) = (Device::new_cuda(0)?, Device::new_cuda_with_stream(0)?);
    let out = xs.zeros_like()?;
    let expected = values(&module.forward(&xs)?)?;
    call(&Device::new_cuda_with_stream(0)?)?;
    stream.begin_capture(THREAD_LOCAL).map_err(candle_core::Error::wrap)?;
    let captured = module.forward(&xs).and_then(|ys| out.slice_set(&ys, 0, 0));
    let beside = std::thread::scope(|scope| {
        scope.spawn(|| call(&shared)).join().expect("a thread panicked")?;
        scope.spawn(|| call(&next)).join().expect("a thread panicked")
    });
    let graph = stream.end_capture(AUTO_FREE).map_err(candle_core::Error::wrap)?.expect("a graph");
    captured?;
    beside?;
    graph.launch().map_err(candle_core::Error::wrap)?;
    assert_eq!(values(&out)?, expected);
    Ok(())
}
