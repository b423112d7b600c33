//! The ops on a CUDA device.
//!
//! | file | what it holds |
//! |---|---|
//! | `mod.rs` | which kernel runs, and the ways to run an MLP: one launch, two, or candle's products |
//! | `ffi.rs` | the kernels' C interface |
//! | `workspace.rs` | the memory that a launch needs besides its arguments, one per stream |
//! | `../../cuda/` | the kernels |
//!
//! Everything is enqueued on the device's own stream, nothing waits for it, and a call can be captured in a CUDA graph
//! once a call of the same size has been made on that stream (the first one allocates the workspace). A graph is to be
//! replayed on the stream where it was captured, or while that stream runs none of these ops: they share the workspace.
//!
//! Besides the output a call needs memory for the hidden rows. A stream keeps it from call to call: for few tokens what 64 rows
//! and some counters and partial sums take, for many up to 32 MiB. More than 16 MiB are allocated for a call and freed behind it.

mod ffi;
mod workspace;

use crate::parameters::{Extent, Projection};
use crate::{Activation, Workload};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
};
use candle_core::cuda_backend::CudaDType;
use candle_core::{bail, CudaDevice, CudaStorage, DType, Layout, Result, Shape};
use half::{bf16, f16};
use std::cell::Cell;
use std::fmt;

/// A way to run an MLP on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Both layers in one launch, each cluster of eight blocks for a few tokens by itself; from sm_90 on, for models of at most
    /// 131,072 weights, whatever their dtype and alignment.
    DecodeCluster,
    /// Both layers in one launch, each multiprocessor's weights in its shared memory at once; on sm_90, for 1 to 32 tokens
    /// of bf16 and f16 and small models whose weights fit there, with the hidden rows of all tokens.
    DecodeResident,
    /// Both layers in one launch, tokens as the rows of the tensor cores' products; on sm_90, for some dozens of tokens of bf16
    /// and f16, where all rows lie on 16 bytes and are whole pieces of 128 bytes. A row has the bits that
    /// [`DecodeHopper`](Self::DecodeHopper) gives it; it is chosen from 33 tokens on, for outputs of at most 32 columns per
    /// multiprocessor.
    DecodeWide,
    /// Both layers in one launch, weights by tensor copies to the tensor cores; on sm_90, for bf16, f16 and f32 where all rows
    /// lie on 16 bytes and are whole pieces of 128 bytes. In f32 each product is three of parts of 11 bits, as accurate as f32's own.
    DecodeHopper,
    /// As [`Decode`](Self::Decode), in a launch that overlaps with the ones before and after it; from sm_90 on.
    DecodeDependent,
    /// Both layers in one launch, weights from memory straight into registers; from sm_80 on, where all rows lie on 16
    /// bytes, not for f64.
    Decode,
    /// Both layers in one launch, for any GPU, alignment and dtype.
    DecodePortable,
    /// A launch for each layer, the second one beginning while the first one ends, on Hopper's tensor cores (sm_90); for
    /// bf16, f16 and f32 where all rows lie on 16 bytes, with SiLU, GELU (both), quick GELU or ReLU. In f32 each product is
    /// three of parts of 11 bits, as accurate as f32's own.
    Gemm,
    /// A launch for each layer on the tensor cores of any GPU from sm_80 on; for bf16 and f16 where all rows lie on 16 bytes,
    /// with the activations of [`Gemm`](Self::Gemm), which is faster on sm_90. It was measured on an H100 only.
    GemmAmpere,
    /// candle's products, and one launch for all that is between them. In f16 and bf16 a product is rounded before its bias is
    /// added, as in candle's own ops; the other kernels round once a layer.
    Matmul,
}

thread_local! {
    static FORCED: Cell<Option<Kernel>> = const { Cell::new(None) };
}

impl Kernel {
    /// Every kernel.
    pub const ALL: [Self; 10] = [
        Self::DecodeCluster,
        Self::DecodeResident,
        Self::DecodeWide,
        Self::DecodeHopper,
        Self::DecodeDependent,
        Self::Decode,
        Self::DecodePortable,
        Self::Gemm,
        Self::GemmAmpere,
        Self::Matmul,
    ];

    /// The name, as in a plan.
    pub fn name(self) -> &'static str {
        match self {
            Self::DecodeCluster => "decode-cluster",
            Self::DecodeResident => "decode-resident",
            Self::DecodeWide => "decode-wide",
            Self::DecodeHopper => "decode-hopper",
            Self::DecodeDependent => "decode-dependent",
            Self::Decode => "decode",
            Self::DecodePortable => "decode-portable",
            Self::Gemm => "gemm",
            Self::GemmAmpere => "gemm-ampere",
            Self::Matmul => "matmul",
        }
    }

    /// Calls `f` with the ops that this thread runs on this kernel, whatever would be chosen: for comparisons and tests.
    /// An op that the kernel does not take is an error; weights whose rows are not contiguous go to
    /// [`Matmul`](Self::Matmul) all the same.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn with<R>(self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        struct Restore(Option<Kernel>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        let _restore = Restore(FORCED.replace(Some(self)));
        f()
    }

    /// How many launches it takes, and how often it reads the weights: a decode kernel takes up to 64 tokens at a time.
    pub(crate) fn passes(self, tokens: usize) -> usize {
        match self {
            Self::Gemm | Self::GemmAmpere | Self::Matmul => 1,
            _ => tokens.div_ceil(64),
        }
    }

    /// The path of the C interface.
    fn path(self) -> i32 {
        match self {
            Self::DecodeCluster => ffi::PATH_CLUSTER,
            Self::DecodeResident => ffi::PATH_RESIDENT,
            Self::DecodeWide => ffi::PATH_WIDE,
            Self::DecodeHopper => ffi::PATH_HOPPER,
            Self::DecodeDependent => ffi::PATH_DIRECT_DEPENDENT,
            Self::Decode => ffi::PATH_DIRECT,
            Self::DecodePortable => ffi::PATH_PORTABLE,
            Self::GemmAmpere => ffi::PATH_GEMM_AMPERE,
            Self::Gemm | Self::Matmul => ffi::PATH_AUTO,
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the choice of a kernel depends on.
struct Facts {
    /// The best path that the device, the dtype and the alignment allow.
    path: i32,
    dtype: DType,
    gated: bool,
    tokens: usize,
    /// Elements of all weights.
    weights: usize,
}

/// Which kernel runs where weights' rows are contiguous: the one place where that is decided, by what was measured
/// (`PERFORMANCE.md`). Other weights go to [`Kernel::Matmul`]. `takes` says whether [`Kernel::Gemm`] or [`Kernel::GemmAmpere`]
/// takes them.
///
/// # Errors
/// Those of `takes`.
fn choose(facts: &Facts, takes: impl Fn(Kernel) -> Result<bool>) -> Result<Kernel> {
    let &Facts { path, dtype, gated, tokens, weights } = facts;
    if weights == 0 {
        // candle's product has no rule for sums of nothing.
        return Ok(Kernel::DecodePortable);
    }
    if let Some(kernel) = FORCED.get() {
        return Ok(kernel);
    }
    let millions = weights / 1_000_000;
    let most_tokens = || -> Result<usize> {
        Ok(match (dtype, millions) {
            (DType::F32, 0..4) if !takes(Kernel::Gemm)? => 64,
            (DType::F32, 96..) if tokens == 1 => 0,
            (DType::F32, _) => 16,
            (_, 0..8) => 64,
            (_, 8..20) => 32,
            (_, 20..96) => 16,
            (_, 96..256) => 2,
            (_, 256..) => 1,
        })
    };
    // Where the last of few waves of tiles would be half empty.
    let matmul_is_faster = match (dtype, tokens) {
        (DType::F32, 0..=16) => true,
        (DType::F32, 17..=48) => (8..96).contains(&millions),
        (DType::F32, _) => false,
        (_, 257..=320) => millions >= 256,
        _ => false,
    };
    // Where it took no longer than candle's own ops, in ordinary calls of both on an H100. cuBLAS has instructions there that
    // these kernels and older GPUs have not, so on those there may be more such sizes: none was measured.
    let ampere_is_no_slower = tokens > 64
        && match (gated, millions) {
            (true, 0..8) | (false, 0..96) => true,
            (true, 8..96) => tokens <= 128,
            _ => false,
        };
    Ok(match path {
        ffi::PATH_CLUSTER if tokens <= 64 => Kernel::DecodeCluster,
        ffi::PATH_RESIDENT => Kernel::DecodeResident,
        // Chosen only where it is faster than the others.
        ffi::PATH_WIDE => Kernel::DecodeWide,
        ffi::PATH_HOPPER if tokens <= 64 => Kernel::DecodeHopper,
        ffi::PATH_DIRECT_DEPENDENT if tokens <= most_tokens()? => Kernel::DecodeDependent,
        ffi::PATH_DIRECT if tokens <= most_tokens()? => Kernel::Decode,
        _ if !matmul_is_faster && takes(Kernel::Gemm)? => Kernel::Gemm,
        _ if ampere_is_no_slower && takes(Kernel::GemmAmpere)? => Kernel::GemmAmpere,
        _ => Kernel::Matmul,
    })
}

/// A dtype that the ops take.
trait Element: CudaDType + DeviceRepr + 'static {
    /// Its number in the C interface.
    const CODE: i32;
}

macro_rules! elements {
    ($($element:ty = $code:literal),*) => { $(impl Element for $element { const CODE: i32 = $code; })* };
}
elements!(bf16 = 0, f16 = 1, f32 = 2, f64 = 3);

/// Calls a generic function with the element of a dtype.
macro_rules! dispatch {
    ($op:expr, $dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            DType::BF16 => $function::<bf16>($($argument),*),
            DType::F16 => $function::<f16>($($argument),*),
            DType::F32 => $function::<f32>($($argument),*),
            DType::F64 => $function::<f64>($($argument),*),
            other => bail!("{}: expected dtype f32, f16, bf16 or f64, found {}", $op, other.as_str()),
        }
    };
}

/// [`choose`] for these arguments, whose output and workspace are not needed yet.
///
/// # Errors
/// A device that the kernels were not compiled for.
fn chosen(op: &str, args: &ffi::DecodeArgs, dtype: DType, stream: &CudaStream) -> Result<Kernel> {
    let path = ffi::decode_path(op, args, stream)?;
    let [hidden_size, intermediate_size, out_features] =
        [args.hidden_size, args.intermediate_size, args.output_size].map(|size| size as usize);
    let projections = if args.gated != 0 { 2 } else { 1 };
    // A layer of no inputs has no weights to count either way.
    let weights = match hidden_size {
        0 => 0,
        _ => intermediate_size.saturating_mul(projections * hidden_size + out_features),
    };
    let facts = Facts { path, dtype, gated: args.gated != 0, tokens: args.tokens as usize, weights };
    choose(&facts, |kernel| ffi::gemm_takes(op, &ffi::DecodeArgs { path: kernel.path(), ..*args }, stream))
}

/// The kernel that [`forward`] takes on a GPU where x and all weights are contiguous and lie on 16 bytes, or where the
/// workload says that a weight's rows are not contiguous; `None` where there is nothing to do. Neither allocates nor
/// launches.
///
/// # Errors
/// A GPU that is not there, or that the kernels were not compiled for.
pub(crate) fn kernel_for(op: &str, workload: &Workload, gpu_id: usize) -> Result<Option<Kernel>> {
    let Workload { gated, activation, tokens, hidden_size, intermediate_size, out_features, .. } = *workload;
    let context = match CudaContext::new(gpu_id) {
        Ok(context) => context,
        Err(error) => bail!("{op}: cuda:{gpu_id}: {error}"),
    };
    if tokens == 0 || out_features == 0 {
        return Ok(None);
    }
    let is_small = [tokens, hidden_size, intermediate_size, out_features].iter().all(|&size| size <= LARGEST);
    if !workload.rows_adjacent || !is_small {
        return Ok(Some(Kernel::Matmul));
    }
    /// Stands for the tensors' addresses, which are only looked at, for their alignment and distance.
    const ALIGNED: u64 = 256;
    let args = ffi::DecodeArgs {
        x: ALIGNED,
        gate: ALIGNED,
        up: if gated { 2 * ALIGNED } else { 0 },
        down: ALIGNED,
        bias_gate: 0,
        bias_up: 0,
        bias_down: 0,
        out: 0,
        workspace: 0,
        workspace_bytes: 0,
        x_stride: hidden_size as i64,
        gate_stride: hidden_size as i64,
        up_stride: if gated { hidden_size as i64 } else { 0 },
        down_stride: intermediate_size as i64,
        tokens: tokens as i32,
        hidden_size: hidden_size as i32,
        intermediate_size: intermediate_size as i32,
        output_size: out_features as i32,
        dtype: dispatch!(op, workload.dtype, code()),
        gated: gated.into(),
        activation: activation.index(),
        path: ffi::PATH_AUTO,
        activation_param: activation.parameter().unwrap_or(0.),
    };
    chosen(op, &args, workload.dtype, &context.default_stream()).map(Some)
}

/// An element's number in the C interface.
fn code<E: Element>() -> i32 {
    E::CODE
}

/// A tensor's part of a storage.
pub(crate) type View<'a> = (&'a CudaStorage, &'a Layout);

/// An MLP and its input.
pub(crate) struct Problem<'a> {
    pub op: &'static str,
    /// Of any rank from 1 on.
    pub xs: View<'a>,
    /// `xs` as `[tokens, hidden_size]`, if one stride can describe all its leading dimensions.
    pub flat_xs: Option<Layout>,
    /// What the activation is applied to: the gate, or the first layer of a plain MLP.
    pub gate: Projection<View<'a>>,
    /// What the activated gate is multiplied with, in a gated MLP.
    pub up: Option<Projection<View<'a>>>,
    pub down: Projection<View<'a>>,
    pub activation: Activation,
}

/// The output `[tokens, out_features]` of an MLP of so many tokens, row by row.
///
/// # Errors
/// No memory left on the device, or a launch that fails.
pub(crate) fn forward(problem: &Problem, tokens: usize) -> Result<CudaStorage> {
    dispatch!(problem.op, problem.xs.0.dtype(), forward_of(problem, tokens))
}

/// Sizes up to which the decode kernels' arithmetic of bytes fits their integers.
const LARGEST: usize = 1 << 27;

fn forward_of<E: Element>(problem: &Problem, tokens: usize) -> Result<CudaStorage> {
    let Problem { op, xs, gate, up, down, activation, .. } = problem;
    let (&[intermediate_size, hidden_size], &[out_features, _]) = (gate.weight.1.dims(), down.weight.1.dims()) else {
        bail!("{op}: expected weights of rank 2, found {:?} and {:?}", gate.weight.1.dims(), down.weight.1.dims());
    };
    let device = xs.0.device();
    let stream = device.cuda_stream();
    if tokens == 0 || out_features == 0 {
        return Ok(CudaStorage::wrap_cuda_slice(allocate::<E>(device, 0)?, device.clone()));
    }
    let xs = match &problem.flat_xs {
        Some(layout) if rows_are_contiguous(layout) => Source::Given((xs.0, layout)),
        _ => Source::copy(*xs, (tokens, hidden_size))?,
    };
    let bias_gate = Source::vector(&gate.bias)?;
    let bias_up = up.as_ref().map(|up| Source::vector(&up.bias)).transpose()?.flatten();
    let bias_down = Source::vector(&down.bias)?;

    let weights = [Some(&gate.weight), up.as_ref().map(|up| &up.weight), Some(&down.weight)];
    let sizes = [tokens, hidden_size, intermediate_size, out_features];
    let addressable = weights.iter().flatten().all(|(_, layout)| rows_are_contiguous(layout))
        && sizes.iter().all(|&size| size <= LARGEST);
    if addressable {
        // The guards tell candle of these reads when they are dropped, after the launch.
        let [x, gate, down] =
            [xs.view(), gate.weight, down.weight].map(|(storage, layout)| Address::of::<E>(storage, layout, &stream));
        let (x, gate, down) = (x?, gate?, down?);
        let up = up.as_ref().map(|up| Address::of::<E>(up.weight.0, up.weight.1, &stream)).transpose()?;
        let bias_gate = Address::of_bias::<E>(&bias_gate, &stream)?;
        let bias_up = Address::of_bias::<E>(&bias_up, &stream)?;
        let bias_down = Address::of_bias::<E>(&bias_down, &stream)?;
        let at = |address: &Option<Address>| address.as_ref().map_or(0, |a| a.at);
        let args = ffi::DecodeArgs {
            x: x.at,
            gate: gate.at,
            up: at(&up),
            down: down.at,
            bias_gate: at(&bias_gate),
            bias_up: at(&bias_up),
            bias_down: at(&bias_down),
            out: 0,
            workspace: 0,
            workspace_bytes: 0,
            x_stride: x.row_stride,
            gate_stride: gate.row_stride,
            up_stride: up.as_ref().map_or(0, |up| up.row_stride),
            down_stride: down.row_stride,
            tokens: tokens as i32,
            hidden_size: hidden_size as i32,
            intermediate_size: intermediate_size as i32,
            output_size: out_features as i32,
            dtype: E::CODE,
            gated: up.is_some().into(),
            activation: activation.index(),
            path: ffi::PATH_AUTO,
            activation_param: activation.parameter().unwrap_or(0.),
        };
        let kernel = chosen(op, &args, xs.view().0.dtype(), &stream)?;
        if matches!(kernel, Kernel::Gemm | Kernel::GemmAmpere) {
            let args = ffi::DecodeArgs { path: kernel.path(), ..args };
            let bytes = ffi::gemm_workspace_bytes(op, &args, &stream)?;
            let mut large = match bytes > workspace::MOST_KEPT {
                true => Some(allocate::<E>(device, bytes as usize / size_of::<E>())?),
                false => None,
            };
            let mut out = allocate::<E>(device, tokens * out_features)?;
            let large = large.as_mut().map(|large| large.device_ptr_mut(&stream));
            let (workspace, workspace_bytes) = match &large {
                Some((at, _)) => (*at, bytes),
                None => workspace::of(op, &stream, workspace::Use::Gemm, bytes)?,
            };
            let (at, guard) = out.device_ptr_mut(&stream);
            let args = ffi::DecodeArgs { out: at, workspace, workspace_bytes, ..args };
            // SAFETY: every address was checked to have its rows within its storage, the hidden rows and the output have
            // `tokens` rows; all are freed in the order of this stream; the workspace is this stream's own.
            unsafe { ffi::gemm(op, &args, &stream)? };
            drop((large, guard));
            return Ok(CudaStorage::wrap_cuda_slice(out, device.clone()));
        }
        if kernel != Kernel::Matmul {
            let (workspace, workspace_bytes) =
                workspace::of(op, &stream, workspace::Use::Decode, ffi::workspace_bytes(&args))?;
            let mut out = allocate::<E>(device, tokens * out_features)?;
            let (at, guard) = out.device_ptr_mut(&stream);
            let args = ffi::DecodeArgs { out: at, workspace, workspace_bytes, path: kernel.path(), ..args };
            // SAFETY: every address was checked to have its rows within its storage, the output has `tokens` rows; all
            // are freed in the order of this stream; the workspace is this stream's own.
            unsafe { ffi::decode(op, &args, &stream)? };
            drop(guard);
            return Ok(CudaStorage::wrap_cuda_slice(out, device.clone()));
        }
    }

    let (x, x_layout) = xs.view();
    let mut hidden = product(x, x_layout, gate.weight)?;
    let up = up.as_ref().map(|up| product(x, x_layout, up.weight)).transpose()?;
    let layout = Layout::contiguous((tokens, intermediate_size));
    {
        let up = up.as_ref().map(|up| Address::of::<E>(up, &layout, &stream)).transpose()?;
        let bias_gate = Address::of_bias::<E>(&bias_gate, &stream)?;
        let bias_up = Address::of_bias::<E>(&bias_up, &stream)?;
        let at = |address: &Option<Address>| address.as_ref().map_or(0, |a| a.at);
        let (gate, _guard) = hidden.as_cuda_slice_mut::<E>()?.device_ptr_mut(&stream);
        let args = ffi::HiddenArgs {
            gate,
            up: at(&up),
            bias_gate: at(&bias_gate),
            bias_up: at(&bias_up),
            gradient: 0,
            hidden: gate,
            d_gate: 0,
            d_up: 0,
            rows: tokens as i64,
            cols: intermediate_size as i64,
            dtype: E::CODE,
            activation: activation.index(),
            activation_param: activation.parameter().unwrap_or(0.),
        };
        // SAFETY: the products are matrices of this size, the biases were checked to be as long as their rows.
        unsafe { ffi::hidden(op, &args, &stream)? };
    }
    let mut out = product(&hidden, &layout, down.weight)?;
    if let Some(bias) = Address::of_bias::<E>(&bias_down, &stream)? {
        let (at, _guard) = out.as_cuda_slice_mut::<E>()?.device_ptr_mut(&stream);
        // SAFETY: the product is a matrix of this size, the bias was checked to be as long as its rows.
        unsafe { ffi::add_bias(op, (at, bias.at), (tokens as i64, out_features as i64), E::CODE, &stream)? };
    }
    Ok(out)
}

/// `[3 or 2, rows, cols]`: the hidden layer and the gradients of the gate's and (in a gated MLP, where `up` is given) up's
/// preactivations, from these and the hidden layer's gradient, all contiguous matrices of one shape.
///
/// # Errors
/// Arguments that are not contiguous, no memory left on the device, or a launch that fails.
pub(crate) fn hidden_gradients(
    op: &'static str,
    activation: Activation,
    gate: View,
    up: Option<View>,
    gradient: View,
) -> Result<CudaStorage> {
    dispatch!(op, gate.0.dtype(), hidden_gradients_of(op, activation, gate, up, gradient))
}

fn hidden_gradients_of<E: Element>(
    op: &'static str,
    activation: Activation,
    gate: View,
    up: Option<View>,
    gradient: View,
) -> Result<CudaStorage> {
    let device = gate.0.device();
    let stream = device.cuda_stream();
    let shape = gate.1.shape();
    let (rows, cols) = shape.dims2()?;
    let len = shape.elem_count();
    for (_, layout) in [Some(&gate), up.as_ref(), Some(&gradient)].into_iter().flatten() {
        if !layout.is_contiguous() || layout.shape() != shape {
            bail!("{op}: expected contiguous arguments of shape {shape:?}, found {layout:?}");
        }
    }
    let mut out = allocate::<E>(device, len * if up.is_some() { 3 } else { 2 })?;
    {
        let (g, d) = (Address::of::<E>(gate.0, gate.1, &stream)?, Address::of::<E>(gradient.0, gradient.1, &stream)?);
        let u = up.as_ref().map(|(storage, layout)| Address::of::<E>(storage, layout, &stream)).transpose()?;
        let (at, _guard) = out.device_ptr_mut(&stream);
        let part = |i: usize| at + (i * len * size_of::<E>()) as u64;
        let args = ffi::HiddenArgs {
            gate: g.at,
            up: u.as_ref().map_or(0, |u| u.at),
            bias_gate: 0,
            bias_up: 0,
            gradient: d.at,
            hidden: at,
            d_gate: part(1),
            d_up: part(2),
            rows: rows as i64,
            cols: cols as i64,
            dtype: E::CODE,
            activation: activation.index(),
            activation_param: activation.parameter().unwrap_or(0.),
        };
        // SAFETY: the arguments are contiguous matrices of this size, the output has room for two or three; the third is
        // written only if there is an `up`.
        unsafe { ffi::hidden_gradients(op, &args, &stream)? };
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}

/// Room for so many elements, and for one where there are none: the driver has no allocation of nothing.
fn allocate<E: Element>(device: &CudaDevice, len: usize) -> Result<CudaSlice<E>> {
    // SAFETY: whoever allocates has a kernel write every element.
    unsafe { device.alloc::<E>(len.max(1)) }
}

/// Whether a matrix's rows are contiguous each.
fn rows_are_contiguous(layout: &Layout) -> bool {
    matches!((layout.dims(), layout.stride()), (&[_, cols], &[_, stride]) if stride == 1 || cols == 1)
}

/// `x wᵀ` by candle's own product.
fn product(x: &CudaStorage, x_layout: &Layout, w: View) -> Result<CudaStorage> {
    /// As candle's product takes it: contiguous, or the transposed of a contiguous matrix.
    fn dense<'a>(storage: &'a CudaStorage, layout: &'a Layout) -> Result<Source<'a>> {
        if layout.is_contiguous() || layout.transpose(0, 1)?.is_contiguous() {
            Ok(Source::Given((storage, layout)))
        } else {
            Source::copy((storage, layout), layout.shape().dims2()?)
        }
    }
    let (x, w) = (dense(x, x_layout)?, dense(w.0, w.1)?);
    let ((x, x_layout), (w, w_layout)) = (x.view(), w.view());
    let ((m, k), n) = (x_layout.shape().dims2()?, w_layout.dims()[0]);
    x.matmul(w, (1, m, n, k), x_layout, &w_layout.transpose(0, 1)?)
}

/// A tensor as it was given, or a copy whose elements lie in order.
enum Source<'a> {
    Given(View<'a>),
    Copied(CudaStorage, Layout),
}

impl<'a> Source<'a> {
    fn view(&self) -> (&CudaStorage, &Layout) {
        match self {
            Self::Given((storage, layout)) => (storage, layout),
            Self::Copied(storage, layout) => (storage, layout),
        }
    }

    fn copy((storage, layout): View<'a>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        // SAFETY: the copy writes every element.
        let mut copy = unsafe { storage.device().alloc_uninit(&shape, storage.dtype())? };
        storage.copy_strided_src(&mut copy, 0, layout)?;
        Ok(Self::Copied(copy, Layout::contiguous(shape)))
    }

    /// A vector whose elements lie in order.
    fn vector(view: &Option<View<'a>>) -> Result<Option<Self>> {
        match view {
            None => Ok(None),
            Some(view) if view.1.is_contiguous() => Ok(Some(Self::Given(*view))),
            Some(view) => Self::copy(*view, view.1.dims()).map(Some),
        }
    }
}

/// Where a kernel reads a matrix or a vector, checked to lie within its storage.
struct Address<'a> {
    at: u64,
    row_stride: i64,
    /// When dropped, tells candle that the stream reads the storage until here.
    _guard: SyncOnDrop<'a>,
}

impl<'a> Address<'a> {
    fn of<E: Element>(storage: &'a CudaStorage, layout: &Layout, stream: &'a CudaStream) -> Result<Self> {
        let slice = storage.as_cuda_slice::<E>()?;
        let extent = Extent::of(layout, slice.len())?;
        let (at, guard) = slice.device_ptr(stream);
        let at = at + (extent.start() * size_of::<E>()) as u64;
        Ok(Self { at, row_stride: extent.row_stride as i64, _guard: guard })
    }

    fn of_bias<E: Element>(bias: &'a Option<Source>, stream: &'a CudaStream) -> Result<Option<Self>> {
        match bias.as_ref().map(Source::view) {
            None => Ok(None),
            Some((storage, layout)) => Self::of::<E>(storage, layout, stream).map(Some),
        }
    }
}
