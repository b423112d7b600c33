//! A GPU: its name and second-level cache, the speed at which it reads memory, the peak of its memory while a path runs, and
//! what runs as a CUDA graph.

use super::machine::Memory;
use candle_core::cuda_backend::cudarc::driver::{sys, CudaGraph, CudaSlice, DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::{bail, CudaDevice, Device, Error, Result, Storage, Tensor};
use std::time::Instant;

/// The driver's memory pool, out of which candle's tensors come.
pub struct Pool {
    device: Device,
    pool: sys::CUmemoryPool,
}

impl Pool {
    /// The pool of this device.
    ///
    /// # Errors
    /// A device that is no GPU.
    pub fn of(device: &Device) -> Result<Self> {
        let ordinal = device.as_cuda_device()?.cuda_stream().context().cu_device();
        let mut pool = std::ptr::null_mut();
        // SAFETY: the device exists, the result is written to `pool`.
        unsafe { sys::cuDeviceGetMemPool(&mut pool, ordinal) }.result().map_err(Error::wrap)?;
        Ok(Self { device: device.clone(), pool })
    }

    fn get(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut bytes = 0u64;
        // SAFETY: both attributes asked for are 64-bit numbers, and `bytes` is one.
        unsafe { sys::cuMemPoolGetAttribute(self.pool, attribute, (&raw mut bytes).cast()) }
            .result()
            .map_err(Error::wrap)?;
        Ok(bytes)
    }

    /// What `f` returns, and the most bytes that were handed out during it beyond those before it.
    ///
    /// # Errors
    /// The driver's.
    pub fn peak<R>(&self, f: impl FnOnce() -> R) -> Result<(R, usize)> {
        const HIGH: sys::CUmemPool_attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        self.device.synchronize()?;
        let before = self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        let mut zero = 0u64;
        // SAFETY: the attribute is a 64-bit number, and zero is what it can be set to.
        unsafe { sys::cuMemPoolSetAttribute(self.pool, HIGH, (&raw mut zero).cast()) }.result().map_err(Error::wrap)?;
        let result = f();
        self.device.synchronize()?;
        Ok((result, self.get(HIGH)?.saturating_sub(before) as usize))
    }
}

/// What a GPU is, and its second-level cache in bytes.
///
/// # Errors
/// A device that is no GPU; the driver's.
pub fn description(device: &Device) -> Result<(String, usize)> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let context = stream.context();
    let attribute = |attribute| context.attribute(attribute).map_err(Error::wrap);
    let name = context.name().map_err(Error::wrap)?;
    let processors = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let cache = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;
    let megabytes = cache as f64 / f64::from(1 << 20);
    Ok((format!("{name}, {processors} multiprocessors, {megabytes:.0} MiB of second-level cache"), cache))
}

/// Reads memory by a kernel that does nothing else, with as many blocks as read fastest.
pub struct Reader {
    device: CudaDevice,
    data: Tensor,
    sink: CudaSlice<u32>,
    blocks: u32,
    /// Bytes a second, the median of nine passes.
    pub bandwidth: f64,
}

impl Reader {
    /// A reader of 4 GiB, or of an eighth of a smaller memory.
    ///
    /// # Errors
    /// A device that is no GPU, or has no memory left.
    pub fn new(device: &Device) -> Result<Self> {
        let cuda = device.as_cuda_device()?.clone();
        let total = cuda.cuda_stream().context().total_mem().map_err(Error::wrap)?;
        let data = Tensor::randn(0f32, 1., (total / 8).min(4 << 30) / 16 * 4, device)?;
        let sink = cuda.alloc_zeros::<u32>(1)?;
        let mut reader = Self { device: cuda, data, sink, blocks: 0, bandwidth: 0. };
        device.synchronize()?;
        for blocks in [132, 264, 528, 2112] {
            let mut rates = Vec::new();
            for _ in 0..9 {
                let start = Instant::now();
                reader.read(blocks)?;
                rates.push(reader.bytes() as f64 / start.elapsed().as_secs_f64());
            }
            rates.sort_by(f64::total_cmp);
            let median = rates[rates.len() / 2];
            if median > reader.bandwidth {
                (reader.blocks, reader.bandwidth) = (blocks, median);
            }
        }
        Ok(reader)
    }

    /// Reads every byte once and waits for it.
    fn read(&self, blocks: u32) -> Result<()> {
        let stream = self.device.cuda_stream();
        let (storage, _) = self.data.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("expected a CUDA tensor") };
        let (from, _reads) = storage.as_cuda_slice::<f32>()?.device_ptr(&stream);
        let (to, _writes) = self.sink.device_ptr(&stream);
        let source = include_str!("../read.ptx");
        let kernel = self.device.get_or_load_custom_func("read_all", "candle-fused-mlp-bench", source)?;
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (512, 1, 1), shared_mem_bytes: 0 };
        let pieces = (self.data.elem_count() / 4) as u64;
        let mut launch = kernel.builder();
        launch.arg(&from).arg(&pieces).arg(&to);
        // SAFETY: the kernel reads the 16-byte pieces of `data` and writes `sink` at most.
        unsafe { launch.launch(config) }.map_err(Error::wrap)?;
        stream.synchronize().map_err(Error::wrap)
    }
}

impl Memory for Reader {
    fn bytes(&self) -> usize {
        self.data.elem_count() * 4
    }

    fn pass(&self) -> Result<()> {
        self.read(self.blocks)
    }
}

/// The graph of what `run` launches, on a device without candle's events between streams, which cannot be captured.
///
/// # Errors
/// Those of `run`, the driver's, and where nothing was launched.
pub fn capture<E: From<Error>>(
    device: &Device,
    run: &mut dyn FnMut() -> std::result::Result<(), E>,
) -> std::result::Result<CudaGraph, E> {
    const MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    const AUTO_FREE: sys::CUgraphInstantiate_flags =
        sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    // Shapes and strides that ops upload stay where they are while this lives, to be found by the captured ops. The first run
    // uploads them, loads the kernels and makes what libraries keep for their next call.
    let _uploads = cuda.enable_cuda_graph_htod_cache();
    run()?;
    device.synchronize()?;
    stream.begin_capture(MODE).map_err(Error::wrap)?;
    let captured = run();
    // A capture has to be ended, whatever came of it, and what it ran into says more than that it cannot be ended well.
    let graph = stream.end_capture(AUTO_FREE).map_err(Error::wrap);
    captured?;
    Ok(graph?.ok_or_else(|| Error::msg("nothing was launched"))?)
}
