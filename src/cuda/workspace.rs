//! The decode kernels' workspace: the hidden rows and the counters that blocks meet at.
//!
//! One per stream, since a stream runs one of our kernels after the other. A kernel leaves the counters as it found them,
//! at zero, so a workspace is cleared once. It only grows, and what it outgrew stays: a captured graph may still
//! point there.

use candle_core::cuda_backend::cudarc::driver::{sys, CudaSlice, CudaStream, DevicePtr};
use candle_core::{bail, Result};
use std::cell::OnceCell;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// The handle that means another stream in each host thread: what candle's `Device::new_cuda` has.
const PER_THREAD: usize = 2;

/// A stream's workspaces, and the thread whose stream it is, where that is part of it.
struct Owned {
    thread: Option<Weak<()>>,
    stream: Arc<CudaStream>,
    /// From the smallest to the largest, which is in use.
    memory: Vec<(u64, CudaSlice<u8>)>,
}

impl Owned {
    fn is(&self, stream: &Arc<CudaStream>, thread: Option<&Arc<()>>) -> bool {
        let same_thread = match (&self.thread, thread) {
            (None, None) => true,
            (Some(owner), Some(thread)) => Weak::ptr_eq(owner, &Arc::downgrade(thread)),
            _ => false,
        };
        same_thread && Arc::ptr_eq(&self.stream, stream)
    }

    /// Whether nobody can launch on this stream any more.
    fn is_abandoned(&self) -> bool {
        let ours = 1 + self.memory.len();
        Arc::strong_count(&self.stream) == ours || self.thread.as_ref().is_some_and(|t| t.strong_count() == 0)
    }
}

static WORKSPACES: Mutex<Vec<Owned>> = Mutex::new(Vec::new());

thread_local! {
    /// Alive as long as its thread.
    static THREAD: OnceCell<Arc<()>> = const { OnceCell::new() };
}

/// The address and size of the calling thread's workspace on this stream, of `bytes` at least. It stays valid as long as
/// the caller holds the stream.
///
/// # Errors
/// No memory left on the device, or a first use within the capture of a graph, to which new memory would belong.
pub(super) fn of(op: &str, stream: &Arc<CudaStream>, bytes: u64) -> Result<(u64, u64)> {
    let thread = match stream.cu_stream() as usize == PER_THREAD {
        false => None,
        true => match THREAD.try_with(|cell| cell.get_or_init(|| Arc::new(())).clone()) {
            Ok(thread) => Some(thread),
            Err(_) => bail!("{op}: expected a running thread, found one that ends"),
        },
    };
    let mut workspaces = WORKSPACES.lock().unwrap_or_else(PoisonError::into_inner);
    let found = workspaces.iter().position(|w| w.is(stream, thread.as_ref()));
    if let Some((address, memory)) = found.and_then(|i| workspaces[i].memory.last()) {
        if memory.len() as u64 >= bytes {
            return Ok((*address, memory.len() as u64));
        }
    }
    let (address, memory) = match allocate(stream, bytes) {
        Ok(Some(allocated)) => allocated,
        Ok(None) => bail!(
            "{op}: expected a call of this size on this stream before the capture of a CUDA graph, found none: it \
             allocates the workspace"
        ),
        Err(error) => bail!("{op}: a workspace of {bytes} bytes: {error}"),
    };
    let len = memory.len() as u64;
    match found {
        Some(i) => workspaces[i].memory.push((address, memory)),
        None => {
            release_abandoned(&mut workspaces);
            let thread = thread.as_ref().map(Arc::downgrade);
            workspaces.push(Owned { thread, stream: stream.clone(), memory: vec![(address, memory)] });
        }
    }
    Ok((address, len))
}

type Allocated = (u64, CudaSlice<u8>);

/// A cleared workspace, its size rounded up so that a stream goes through few of them; none within a capture.
fn allocate(
    stream: &Arc<CudaStream>,
    bytes: u64,
) -> std::result::Result<Option<Allocated>, Box<dyn std::error::Error>> {
    if stream.capture_status()? != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
        return Ok(None);
    }
    let memory = stream.alloc_zeros::<u8>(usize::try_from(bytes)?.next_power_of_two())?;
    let address = memory.device_ptr(stream).0;
    Ok(Some((address, memory)))
}

/// Frees the workspaces of dropped devices and ended threads, whose last launches are waited for.
fn release_abandoned(workspaces: &mut Vec<Owned>) {
    workspaces.retain(|w| !(w.is_abandoned() && w.stream.context().synchronize().is_ok()));
}
