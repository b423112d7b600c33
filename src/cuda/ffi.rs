//! The kernels' C interface, as in `cuda/fused_mlp.h`, and its statuses as errors.

use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{bail, Result};
use std::ffi::{c_char, c_int, c_void, CStr};

/// `FusedMlpArgs`: pointers are to the device, strides and sizes in elements.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct DecodeArgs {
    pub x: u64,
    pub gate: u64,
    pub up: u64,
    pub down: u64,
    pub bias_gate: u64,
    pub bias_up: u64,
    pub bias_down: u64,
    pub out: u64,
    pub workspace: u64,
    pub workspace_bytes: u64,
    pub x_stride: i64,
    pub gate_stride: i64,
    pub up_stride: i64,
    pub down_stride: i64,
    pub tokens: i32,
    pub hidden_size: i32,
    pub intermediate_size: i32,
    pub output_size: i32,
    pub dtype: i32,
    pub gated: i32,
    pub activation: i32,
    pub path: i32,
    pub activation_param: f64,
}

/// `FusedMlpHiddenArgs`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct HiddenArgs {
    pub gate: u64,
    pub up: u64,
    pub bias_gate: u64,
    pub bias_up: u64,
    pub gradient: u64,
    pub hidden: u64,
    pub d_gate: u64,
    pub d_up: u64,
    pub rows: i64,
    pub cols: i64,
    pub dtype: i32,
    pub activation: i32,
    pub activation_param: f64,
}

/// `FUSED_MLP_PATH_AUTO` and the paths.
pub(super) const PATH_AUTO: i32 = 0;
pub(super) const PATH_PORTABLE: i32 = 1;
pub(super) const PATH_DIRECT: i32 = 2;
pub(super) const PATH_DIRECT_DEPENDENT: i32 = 3;
pub(super) const PATH_HOPPER: i32 = 4;
pub(super) const PATH_RESIDENT: i32 = 5;
pub(super) const PATH_CLUSTER: i32 = 6;
pub(super) const PATH_GEMM_AMPERE: i32 = 7;
pub(super) const PATH_WIDE: i32 = 8;

extern "C" {
    fn fused_mlp_decode_workspace_bytes(args: *const DecodeArgs) -> u64;
    fn fused_mlp_decode_path(args: *const DecodeArgs, path: *mut c_int) -> c_int;
    fn fused_mlp_decode(args: *const DecodeArgs, stream: *mut c_void) -> c_int;
    fn fused_mlp_gemm_takes(args: *const DecodeArgs, takes: *mut c_int) -> c_int;
    fn fused_mlp_gemm_workspace_bytes(args: *const DecodeArgs, bytes: *mut u64) -> c_int;
    fn fused_mlp_gemm(args: *const DecodeArgs, stream: *mut c_void) -> c_int;
    fn fused_mlp_hidden(args: *const HiddenArgs, stream: *mut c_void) -> c_int;
    fn fused_mlp_hidden_gradients(args: *const HiddenArgs, stream: *mut c_void) -> c_int;
    fn fused_mlp_add_bias(out: u64, bias: u64, rows: i64, cols: i64, dtype: i32, stream: *mut c_void) -> c_int;
    fn fused_mlp_status_text(status: c_int) -> *const c_char;
}

fn checked(op: &str, status: c_int) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the function returns a static string for every number.
    let text = unsafe { CStr::from_ptr(fused_mlp_status_text(status)) }.to_string_lossy();
    bail!("{op}: CUDA status {status}: {text}")
}

/// Bytes of workspace that a call with these sizes needs.
pub(super) fn workspace_bytes(args: &DecodeArgs) -> u64 {
    // SAFETY: reads the struct.
    unsafe { fused_mlp_decode_workspace_bytes(args) }
}

/// The path that `PATH_AUTO` takes for these arguments on the stream's device.
///
/// # Errors
/// A device that the kernels were not compiled for.
pub(super) fn decode_path(op: &str, args: &DecodeArgs, stream: &CudaStream) -> Result<i32> {
    let mut path = PATH_AUTO;
    bind(op, stream)?;
    // SAFETY: reads the struct and attributes of the thread's device.
    checked(op, unsafe { fused_mlp_decode_path(args, &mut path) })?;
    Ok(path)
}

/// Enqueues an MLP for few tokens.
///
/// # Safety
/// The pointers are to memory of the stream's device, large enough for the sizes and strides, and live until the
/// stream has done the work; nobody else uses the workspace at the same time.
///
/// # Errors
/// A path that cannot be taken, or a launch that fails.
pub(super) unsafe fn decode(op: &str, args: &DecodeArgs, stream: &CudaStream) -> Result<()> {
    bind(op, stream)?;
    checked(op, fused_mlp_decode(args, stream.cu_stream().cast()))
}

/// Whether [`gemm`] takes these arguments on the stream's device, by `PATH_AUTO` or `PATH_GEMM_AMPERE`.
///
/// # Errors
/// A device whose properties cannot be asked for.
pub(super) fn gemm_takes(op: &str, args: &DecodeArgs, stream: &CudaStream) -> Result<bool> {
    let mut takes = 0;
    bind(op, stream)?;
    // SAFETY: reads the struct and attributes of the thread's device.
    checked(op, unsafe { fused_mlp_gemm_takes(args, &mut takes) })?;
    Ok(takes != 0)
}

/// Bytes of workspace with which [`gemm`] is fastest, a multiple of an element's.
///
/// # Errors
/// A device whose properties cannot be asked for.
pub(super) fn gemm_workspace_bytes(op: &str, args: &DecodeArgs, stream: &CudaStream) -> Result<u64> {
    let mut bytes = 0;
    bind(op, stream)?;
    // SAFETY: reads the struct and attributes of the thread's device.
    checked(op, unsafe { fused_mlp_gemm_workspace_bytes(args, &mut bytes) })?;
    Ok(bytes)
}

/// Enqueues an MLP for many tokens; the workspace is for the hidden rows and for sums of parts of a depth.
///
/// # Safety
/// As for [`decode`].
///
/// # Errors
/// Arguments that the kernel does not take, or a launch that fails.
pub(super) unsafe fn gemm(op: &str, args: &DecodeArgs, stream: &CudaStream) -> Result<()> {
    bind(op, stream)?;
    checked(op, fused_mlp_gemm(args, stream.cu_stream().cast()))
}

/// Enqueues the hidden layer out of the preactivations.
///
/// # Safety
/// As for [`decode`].
///
/// # Errors
/// A launch that fails.
pub(super) unsafe fn hidden(op: &str, args: &HiddenArgs, stream: &CudaStream) -> Result<()> {
    bind(op, stream)?;
    checked(op, fused_mlp_hidden(args, stream.cu_stream().cast()))
}

/// Enqueues the hidden layer and the preactivations' gradients.
///
/// # Safety
/// As for [`decode`].
///
/// # Errors
/// A launch that fails.
pub(super) unsafe fn hidden_gradients(op: &str, args: &HiddenArgs, stream: &CudaStream) -> Result<()> {
    bind(op, stream)?;
    checked(op, fused_mlp_hidden_gradients(args, stream.cu_stream().cast()))
}

/// Enqueues the addition of a bias to rows of the same length.
///
/// # Safety
/// As for [`decode`].
///
/// # Errors
/// A launch that fails.
pub(super) unsafe fn add_bias(
    op: &str,
    (out, bias): (u64, u64),
    (rows, cols): (i64, i64),
    dtype: i32,
    stream: &CudaStream,
) -> Result<()> {
    bind(op, stream)?;
    checked(op, fused_mlp_add_bias(out, bias, rows, cols, dtype, stream.cu_stream().cast()))
}

/// Makes the stream's device the thread's: the runtime library launches there.
fn bind(op: &str, stream: &CudaStream) -> Result<()> {
    match stream.context().bind_to_thread() {
        Ok(()) => Ok(()),
        Err(error) => bail!("{op}: {error}"),
    }
}
