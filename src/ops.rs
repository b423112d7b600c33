//! The fused ops: a whole MLP as one candle op, differentiable.
//!
//! Both are `CustomOp3`s of x, the first layer's parameters and the second layer's (see the source of `parameters`
//! for how several parameters travel as one argument), or, where nothing is tracked, `CustomOp1`s of x. Weights are
//! `[out_features, in_features]` as in [`candle_nn::Linear`], contiguous or with any other strides; x has any rank from 1
//! on, with any strides.
//!
//! Sums are kept in f32 (f64 for f64), and each layer rounds once, at its end: the hidden layer after activation and
//! product, the output after its bias. (Where candle's products run on a GPU, see `cuda::Kernel::Matmul`, those round by themselves,
//! before biases.) The backward pass recomputes the hidden layer instead of storing it.
//!
//! NaN and infinity come out where candle's own ops have them, in x or in a parameter, but for two cases, both for want
//! of a rounding: in f16 and bf16 candle rounds after every op, so that what overflows or vanishes between the layers
//! there need not do so here; and far below zero candle's tanh GELU is 0 where this one is a small number, which tells
//! only where up is infinite, and their product NaN there.

use crate::backward;
use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda::{self, View};
use crate::parameters::{halved, pack, pack_gate_up, Matrix, Projection};
use crate::{Activation, GateUp, IntoActivation};
use candle_core::backend::BackendStorage;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    bail, CpuStorage, CustomOp1, CustomOp3, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor,
};
use candle_nn::Linear;
use half::{bf16, f16};
use std::borrow::Cow;

/// `y = act(x W1ᵀ + b1) W2ᵀ + b2` in one op.
///
/// `xs` is `[.., hidden_size]`, `fc1` `[intermediate_size, hidden_size]`, `fc2` `[out_features, intermediate_size]`;
/// each bias is optional. The result is `[.., out_features]`. All are f32, f16, bf16 or f64, of one dtype and on one
/// device.
///
/// # Errors
/// A dtype, device, rank or size other than these; the message names the argument, what was expected and what came.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_fused_mlp::{ops::fused_mlp, Activation};
/// use candle_nn::Linear;
///
/// let fc1 = Linear::new(Tensor::randn(0f32, 0.1, (128, 32), &Device::Cpu)?, None);
/// let fc2 = Linear::new(Tensor::randn(0f32, 0.1, (32, 128), &Device::Cpu)?, None);
/// let xs = Tensor::randn(0f32, 1., (2, 5, 32), &Device::Cpu)?;
/// assert_eq!(fused_mlp(&xs, &fc1, &fc2, Activation::Gelu)?.dims(), &[2, 5, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn fused_mlp(xs: &Tensor, fc1: &Linear, fc2: &Linear, activation: impl IntoActivation) -> Result<Tensor> {
    let activation = activation.into_activation()?;
    mlp_sizes(xs, fc1, fc2)?;
    let ((first, [gate]), (second, [down])) = (pack([fc1])?, pack([fc2])?);
    MlpOp { name: MLP, activation, gate, up: None, down }.apply(xs, &first, &second)
}

/// `y = (act(x Wgᵀ + bg) · (x Wuᵀ + bu)) Wdᵀ + bd` in one op: SwiGLU with SiLU, GeGLU with GELU, ReGLU with ReLU.
///
/// `xs` is `[.., hidden_size]`, gate and up `[intermediate_size, hidden_size]` each or `[2 intermediate_size,
/// hidden_size]` packed, `down` `[out_features, intermediate_size]`; each bias is optional. The result is
/// `[.., out_features]`. All are f32, f16, bf16 or f64, of one dtype and on one device. (Shazeer, 2020, "GLU Variants
/// Improve Transformer".)
///
/// # Errors
/// A dtype, device, rank or size other than these; the message names the argument, what was expected and what came.
pub fn fused_swiglu(xs: &Tensor, gate_up: &GateUp, down: &Linear, activation: impl IntoActivation) -> Result<Tensor> {
    let activation = activation.into_activation()?;
    swiglu_sizes(xs, gate_up, down)?;
    let ((first, [gate, up]), (second, [down])) = (pack_gate_up(gate_up)?, pack([down])?);
    MlpOp { name: SWIGLU, activation, gate, up: Some(up), down }.apply(xs, &first, &second)
}

const MLP: &str = "fused-mlp";
const SWIGLU: &str = "fused-swiglu";

/// The sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub tokens: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub out_features: usize,
}

/// Checks the arguments of [`fused_mlp`].
pub(crate) fn mlp_sizes(xs: &Tensor, fc1: &Linear, fc2: &Linear) -> Result<Sizes> {
    let check = Check { op: MLP, like: xs, like_name: "xs" };
    let hidden_size = check.input()?;
    let intermediate_size = check.linear("fc1", fc1, None, hidden_size)?;
    let out_features = check.linear("fc2", fc2, None, intermediate_size)?;
    check.sizes(intermediate_size, out_features)
}

/// Checks the arguments of [`fused_swiglu`].
pub(crate) fn swiglu_sizes(xs: &Tensor, gate_up: &GateUp, down: &Linear) -> Result<Sizes> {
    let check = Check { op: SWIGLU, like: xs, like_name: "xs" };
    let hidden_size = check.input()?;
    let intermediate_size = match gate_up {
        GateUp::Separate { gate, up } => {
            let rows = check.linear("gate", gate, None, hidden_size)?;
            check.linear("up", up, Some(rows), hidden_size)?
        }
        GateUp::Packed { linear, .. } => {
            check.linear("packed gate and up", linear, None, hidden_size)?;
            halved(linear.weight())?
        }
    };
    let out_features = check.linear("down", down, None, intermediate_size)?;
    check.sizes(intermediate_size, out_features)
}

/// The checks of one call's arguments, or of one module's parameters.
pub(crate) struct Check<'a> {
    /// What the messages begin with.
    pub op: &'static str,
    /// The tensor that the others must go with: x, or a module's first weight.
    pub like: &'a Tensor,
    pub like_name: &'static str,
}

impl Check<'_> {
    /// Checks x and returns its last dimension.
    fn input(&self) -> Result<usize> {
        let Self { op, like, like_name } = self;
        match like.device() {
            Device::Cpu => {}
            Device::Cuda(_) if cfg!(feature = "cuda") => {}
            Device::Cuda(_) => bail!(
                "{op}: {like_name}: expected a tensor on the CPU, found one on {:?}, and candle-fused-mlp was built \
                 without its feature `cuda`",
                like.device().location()
            ),
            other => {
                bail!("{op}: {like_name}: expected a tensor on the CPU or on CUDA, found one on {:?}", other.location())
            }
        }
        self.dtype()?;
        Ok(tokens_of(op, like.shape())?.1)
    }

    /// The sizes of a call, whose output is checked to have a size.
    fn sizes(&self, intermediate_size: usize, out_features: usize) -> Result<Sizes> {
        let Self { op, like, .. } = self;
        let (tokens, hidden_size) = tokens_of(op, like.shape())?;
        let dims = || with_last(like.dims(), out_features);
        if !has_size(dims()) {
            bail!("{op}: expected an output that fits in memory, found one of shape {:?}", dims().collect::<Vec<_>>());
        }
        Ok(Sizes { tokens, hidden_size, intermediate_size, out_features })
    }

    /// Checks that the dtype is one of those that the ops take.
    pub(crate) fn dtype(&self) -> Result<()> {
        let Self { op, like, like_name } = self;
        if !matches!(like.dtype(), DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
            bail!("{op}: {like_name}: expected dtype f32, f16, bf16 or f64, found {}", like.dtype().as_str());
        }
        Ok(())
    }

    /// Checks a projection (of `rows` output features, if they are known) and returns its output features.
    pub(crate) fn linear(&self, name: &str, linear: &Linear, rows: Option<usize>, cols: usize) -> Result<usize> {
        let (op, weight) = (self.op, linear.weight());
        self.same_kind((name, "weight"), weight)?;
        let found = match (weight.dims(), rows) {
            (&[r, c], None) if c == cols => r,
            (&[r, c], Some(rows)) if c == cols && r == rows => r,
            (dims, rows) => {
                let rows = rows.map_or_else(|| "out_features".to_string(), |r| r.to_string());
                bail!(
                    "{op}: {name} weight: expected shape [{rows}, {cols}], found {dims:?} ({} is {:?})",
                    self.like_name,
                    self.like.dims()
                )
            }
        };
        if let Some(bias) = linear.bias() {
            self.same_kind((name, "bias"), bias)?;
            if bias.dims() != [found] {
                bail!("{op}: {name} bias: expected shape [{found}], found {:?}", bias.dims());
            }
        }
        Ok(found)
    }

    fn same_kind(&self, (name, part): (&str, &str), tensor: &Tensor) -> Result<()> {
        let Self { op, like, like_name } = self;
        let (dtype, location) = (like.dtype(), like.device().location());
        if tensor.dtype() != dtype {
            let found = tensor.dtype().as_str();
            bail!("{op}: {name} {part}: expected dtype {} as {like_name} has, found {found}", dtype.as_str());
        }
        if tensor.device().location() != location {
            let found = tensor.device().location();
            bail!("{op}: {name} {part}: expected a tensor on {location:?} as {like_name} is, found one on {found:?}");
        }
        Ok(())
    }
}

/// Both ops: the first layer is the gate alone (plain) or the gate and up, the second is down.
struct MlpOp {
    name: &'static str,
    activation: Activation,
    gate: Projection,
    up: Option<Projection>,
    down: Projection,
}

impl MlpOp {
    /// The op's output, with its gradient where x or a parameter is tracked.
    fn apply(self, xs: &Tensor, first: &Tensor, second: &Tensor) -> Result<Tensor> {
        let projections = [Some(&self.gate), self.up.as_ref(), Some(&self.down)];
        if xs.track_op() || projections.into_iter().flatten().any(Projection::is_tracked) {
            xs.apply_op3(first, second, self)
        } else {
            // Comparing three arguments' devices, candle clones each, with all that it shares: a third of what a call takes of
            // the host besides the driver's part.
            xs.apply_op1_no_bwd(&self)
        }
    }

    fn cpu_fwd_of<E: cpu::Element>(
        &self,
        (xs, xs_layout): (&CpuStorage, &Layout),
        first: (&CpuStorage, &Layout),
        second: (&CpuStorage, &Layout),
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, down) = (sources(&self.gate, first.1)?, sources(&self.down, second.1)?);
        let up = self.up.as_ref().map(|up| sources(up, first.1)).transpose()?;
        let gathered;
        let xs = xs.as_slice::<E>()?;
        let (tokens, hidden_size) = tokens_of(self.name, xs_layout.shape())?;
        let xs = match flattened(xs_layout, tokens) {
            Some(layout) => Matrix::new(xs, &layout)?,
            None => {
                gathered = cpu::gather(self.name, xs, xs_layout)?;
                Matrix::new(&gathered, &Layout::contiguous((tokens, hidden_size)))?
            }
        };
        let problem = cpu::Problem {
            xs,
            gate: matrices(&gate, first.0)?,
            up: up.as_ref().map(|up| matrices(up, first.0)).transpose()?,
            down: matrices(&down, second.0)?,
            activation: self.activation,
        };
        let out = cpu::forward(self.name, &problem)?;
        Ok((
            E::to_cpu_storage_owned(out),
            with_last(xs_layout.dims(), problem.down.weight.rows).collect::<Vec<_>>().into(),
        ))
    }
}

/// Where a parameter lies: in a tensor that the op holds, locked for reading, or else in its layer's argument.
type Source<'a> = (Option<StorageRef<'a>>, Cow<'a, Layout>);

fn sources<'a>(projection: &'a Projection, argument: &'a Layout) -> Result<Projection<Source<'a>>> {
    projection.map(|slot| {
        let (held, layout) = slot.locate(argument)?;
        Ok((held.map(|tensor| tensor.storage_and_layout().0), layout))
    })
}

fn matrices<'a, E: cpu::Element>(
    sources: &'a Projection<Source<'a>>,
    argument: &'a CpuStorage,
) -> Result<Projection<Matrix<'a, E>>> {
    sources.map(|(held, layout)| {
        let storage = match held.as_deref() {
            None => argument,
            Some(Storage::Cpu(storage)) => storage,
            Some(_) => bail!("expected every parameter on the CPU"),
        };
        Matrix::new(storage.as_slice::<E>()?, layout)
    })
}

#[cfg(feature = "cuda")]
fn views<'a>(sources: &'a Projection<Source<'a>>, argument: &'a CudaStorage) -> Result<Projection<View<'a>>> {
    sources.map(|(held, layout)| match held.as_deref() {
        None => Ok((argument, layout.as_ref())),
        Some(Storage::Cuda(storage)) => Ok((storage, layout.as_ref())),
        Some(_) => bail!("expected every parameter on the CUDA device of xs"),
    })
}

/// The number of vectors in an op's x of this shape, and their length.
fn tokens_of(op: &str, shape: &Shape) -> Result<(usize, usize)> {
    let dims = shape.dims();
    match dims.split_last() {
        None => bail!("{op}: xs: expected at least one dimension, found a scalar"),
        Some(_) if !has_size(dims.iter().copied()) => {
            bail!("{op}: xs: expected a tensor whose element count fits in usize, found shape {dims:?}")
        }
        Some((&hidden_size, leading)) => Ok((leading.iter().product(), hidden_size)),
    }
}

/// Whether the element count of these dimensions fits in usize, and so does every stride of a tensor of them.
fn has_size(mut dims: impl Iterator<Item = usize>) -> bool {
    dims.try_fold(1usize, |n, d| n.checked_mul(d.max(1))).is_some()
}

/// These dimensions, the last one replaced.
fn with_last(dims: &[usize], last: usize) -> impl Iterator<Item = usize> + '_ {
    let leading = dims.len().saturating_sub(1);
    dims[..leading].iter().copied().chain([last])
}

/// The same elements as a matrix of `[tokens, hidden_size]`, if one stride can describe all the leading dimensions.
fn flattened(layout: &Layout, tokens: usize) -> Option<Layout> {
    let (&hidden_size, leading) = layout.dims().split_last()?;
    let (&col_stride, strides) = layout.stride().split_last()?;
    let mut row_stride = 0;
    let mut inner = 1usize;
    for (&dim, &stride) in leading.iter().zip(strides).rev().filter(|(&dim, _)| dim != 1) {
        if inner == 1 {
            row_stride = stride;
        } else if inner.checked_mul(row_stride) != Some(stride) {
            return None;
        }
        inner *= dim;
    }
    Some(Layout::new((tokens, hidden_size).into(), vec![row_stride, col_stride], layout.start_offset()))
}

/// The op of parameters that are not tracked. It holds them all, so that nothing is read of the arguments for the layers.
impl CustomOp1 for MlpOp {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        CustomOp3::cpu_fwd(self, xs, layout, xs, layout, xs, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, xs: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        CustomOp3::cuda_fwd(self, xs, layout, xs, layout, xs, layout)
    }
}

impl CustomOp3 for MlpOp {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (xs, first, second) = ((xs, xs_layout), (first, first_layout), (second, second_layout));
        match xs.0 {
            CpuStorage::F32(_) => self.cpu_fwd_of::<f32>(xs, first, second),
            CpuStorage::F16(_) => self.cpu_fwd_of::<f16>(xs, first, second),
            CpuStorage::BF16(_) => self.cpu_fwd_of::<bf16>(xs, first, second),
            CpuStorage::F64(_) => self.cpu_fwd_of::<f64>(xs, first, second),
            other => bail!("{}: xs: expected dtype f32, f16, bf16 or f64, found {:?}", self.name, other.dtype()),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        xs: &CudaStorage,
        xs_layout: &Layout,
        first: &CudaStorage,
        first_layout: &Layout,
        second: &CudaStorage,
        second_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (gate, down) = (sources(&self.gate, first_layout)?, sources(&self.down, second_layout)?);
        let up = self.up.as_ref().map(|up| sources(up, first_layout)).transpose()?;
        let down = views(&down, second)?;
        let (tokens, _) = tokens_of(self.name, xs_layout.shape())?;
        let shape = with_last(xs_layout.dims(), down.weight.1.dims().first().copied().unwrap_or(0));
        let problem = cuda::Problem {
            op: self.name,
            xs: (xs, xs_layout),
            flat_xs: flattened(xs_layout, tokens),
            gate: views(&gate, first)?,
            up: up.as_ref().map(|up| views(up, first)).transpose()?,
            down,
            activation: self.activation,
        };
        Ok((cuda::forward(&problem, tokens)?, shape.collect::<Vec<_>>().into()))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        first: &Tensor,
        second: &Tensor,
        _out: &Tensor,
        out_gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let projections = (&self.gate, self.up.as_ref(), &self.down);
        backward::gradients(self.activation, xs, projections, (first, second), out_gradient)
    }
}
