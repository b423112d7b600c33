//! The kernels' workspaces: for few tokens the hidden rows and the counters that blocks meet at, for many the hidden rows.
//!
//! One of each per stream, since a stream runs one of our kernels after the other. A kernel leaves the counters as it found them,
//! at zero, so a workspace is cleared once. It only grows, and what it outgrew stays: a captured graph may still
//! point there. The workspaces of a dropped device and of an ended thread are freed.

use candle_core::cuda_backend::cudarc::driver::{sys, CudaSlice, CudaStream, DevicePtr};
use candle_core::{bail, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// The handle that means another stream in each host thread: what candle's `Device::new_cuda` has.
const PER_THREAD: usize = 2;

/// The most that is kept for many tokens: with more of them, allocating for each call takes little of its time.
pub(super) const MOST_KEPT: u64 = 16 << 20;

/// Which kernels' workspace.
#[derive(Clone, Copy)]
pub(super) enum Use {
    /// Those for few tokens, in one launch.
    Decode,
    /// Those for many, in two.
    Gemm,
}

/// A stream's workspaces, and the thread whose stream it is, where that is part of it.
struct Owned {
    thread: Option<ThreadId>,
    stream: Arc<CudaStream>,
    /// Of each use, from the smallest to the largest, which is in use.
    memory: [Vec<(u64, CudaSlice<u8>)>; 2],
}

impl Owned {
    /// Whether nobody can launch on this stream any more.
    fn is_abandoned(&self) -> bool {
        let ours = 1 + self.memory.iter().map(Vec::len).sum::<usize>();
        Arc::strong_count(&self.stream) == ours
    }
}

static WORKSPACES: Mutex<Vec<Owned>> = Mutex::new(Vec::new());

fn workspaces() -> MutexGuard<'static, Vec<Owned>> {
    WORKSPACES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread that has workspaces on streams of its own. When it ends it frees them.
struct Thread(ThreadId);

impl Drop for Thread {
    fn drop(&mut self) {
        release(&mut workspaces(), |w| w.thread == Some(self.0));
    }
}

thread_local! {
    static THREAD: Thread = Thread(thread::current().id());
}

/// The address and size of the calling thread's workspace of this use on this stream, of `bytes` at least. It stays valid as
/// long as the caller holds the stream.
///
/// # Errors
/// No memory left on the device, or a first use within the capture of a graph, to which new memory would belong.
pub(super) fn of(op: &str, stream: &Arc<CudaStream>, uses: Use, bytes: u64) -> Result<(u64, u64)> {
    let thread = match stream.cu_stream() as usize == PER_THREAD {
        false => None,
        true => match THREAD.try_with(|thread| thread.0) {
            Ok(thread) => Some(thread),
            Err(_) => bail!("{op}: expected a running thread, found one that ends"),
        },
    };
    let mut workspaces = workspaces();
    let found = workspaces.iter().position(|w| w.thread == thread && Arc::ptr_eq(&w.stream, stream));
    if let Some((address, memory)) = found.and_then(|i| workspaces[i].memory[uses as usize].last()) {
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
    let at = found.unwrap_or_else(|| {
        // A thread's own stream is another one to all others, which cannot free in its order.
        release(&mut workspaces, |w| w.is_abandoned() && (w.thread.is_none() || w.thread == thread));
        workspaces.push(Owned { thread, stream: stream.clone(), memory: [Vec::new(), Vec::new()] });
        workspaces.len() - 1
    });
    workspaces[at].memory[uses as usize].push((address, memory));
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

/// Frees workspaces in the order of their streams, behind the launches that use them. Nothing waits: to wait for a context breaks
/// the captures of all its streams.
fn release(workspaces: &mut Vec<Owned>, is_done: impl Fn(&Owned) -> bool) {
    // Dropped memory is freed in the thread's context. A workspace stays where there is none any more: the process ends.
    workspaces.retain(|w| !(is_done(w) && w.stream.context().bind_to_thread().is_ok()));
}
