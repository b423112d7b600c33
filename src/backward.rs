//! The gradients of both ops: the hidden layer computed again, its elementwise parts in one pass, the products by
//! candle's matmul.

use crate::cpu::{Element, Real};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::parameters::{assemble, Projection};
use crate::Activation;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp3, DType, Layout, Module, Result, Shape, Tensor};
use candle_nn::Linear;
use half::{bf16, f16};
use rayon::prelude::*;

thread_local! {
    /// What candle's backward pass makes of this variable, read as late.
    static KEEP_GRAPH: bool =
        std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|value| !value.is_empty() && value != "0");
}

type Gradients = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// The gradients of x and of the two layers' arguments, each `None` where it is not tracked.
///
/// With `p = x Wᵀ + b` for the gate and up, `h = act(gate) · up` (`act(fc1)` in a plain MLP) and `y = h Wdᵀ + bd`:
///
/// - `dh = dy Wd`, `dWd = dyᵀ h`, `dbd = Σ dy` over the tokens
/// - `d gate = dh · up · act'(gate)`, `d up = dh · act(gate)`
/// - `dW = dpᵀ x`, `db = Σ dp` over the tokens, `dx = Σ dp W` over the projections
///
/// candle hands over gradients without their graph, unless `CANDLE_GRAD_DO_NOT_DETACH` asks for gradients of gradients.
/// Only then is the graph of this pass kept (otherwise it would keep every hidden layer in memory), and a second pass
/// through it ends in an error that names [`HiddenGradients`].
///
/// # Errors
/// Those of the candle ops.
pub(crate) fn gradients(
    activation: Activation,
    xs: &Tensor,
    (gate, up, down): (&Projection, Option<&Projection>, &Projection),
    (first_argument, second_argument): (&Tensor, &Tensor),
    out_gradient: &Tensor,
) -> Result<Gradients> {
    let keep_graph = KEEP_GRAPH.with(|keep| *keep);
    let plain = |t: &Tensor| if keep_graph { t.clone() } else { t.detach() };
    let (xs, tracks_xs) = (plain(xs), xs.track_op());
    let (first_argument, second_argument) = (plain(first_argument), plain(second_argument));
    let tensors = |projection: &&Projection| projection.map(|slot| dense(slot.tensor(&first_argument)?));
    let first = [gate].into_iter().chain(up).collect::<Vec<_>>();
    let first_tensors = first.iter().map(tensors).collect::<Result<Vec<_>>>()?;
    let down_weight = dense(down.weight.tensor(&second_argument)?)?;

    let Some((&hidden_size, leading)) = xs.dims().split_last() else {
        bail!("expected x of at least one dimension, found a scalar");
    };
    let tokens = leading.iter().product::<usize>();
    let flat_xs = xs.reshape((tokens, hidden_size))?;
    let dy = out_gradient.reshape((tokens, down_weight.dim(0)?))?;

    let preactivations = || {
        let forward = |p: &Projection<Tensor>| Linear::new(p.weight.clone(), p.bias.clone()).forward(&flat_xs);
        first_tensors.iter().map(forward).collect::<Result<Vec<_>>>()
    };
    if !tracks_xs && !first.iter().any(|projection| projection.is_tracked()) {
        // Only the second layer's parameters are asked for, which need the hidden layer at most.
        let hidden = || {
            let preactivations = preactivations()?;
            let act = activation.unfused(&preactivations[0])?;
            preactivations.get(1).map_or(Ok(act.clone()), |up| act * up)
        };
        let gradients = vec![projection_gradients(down, &dy, hidden)?];
        return Ok((None, None, assemble(&second_argument, &[down], gradients)?));
    }
    let preactivations = preactivations()?;
    let dh = dy.matmul(&down_weight)?;
    let op = HiddenGradients { activation, gated: preactivations.len() == 2 };
    let hidden = preactivations[0].apply_op3(preactivations.get(1).unwrap_or(&preactivations[0]), &dh, op)?;

    let second_gradients = vec![projection_gradients(down, &dy, || hidden.get(0))?];
    let mut dxs: Option<Tensor> = None;
    let mut first_gradients = Vec::with_capacity(first.len());
    for (i, (slots, tensors)) in first.iter().zip(&first_tensors).enumerate() {
        let dp = hidden.get(i + 1)?;
        first_gradients.push(projection_gradients(slots, &dp, || Ok(flat_xs.clone()))?);
        if tracks_xs {
            let part = dp.matmul(&tensors.weight)?;
            dxs = Some(match dxs {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
    }
    Ok((
        dxs.map(|dxs| dxs.reshape(xs.shape())).transpose()?,
        assemble(&first_argument, &first, first_gradients)?,
        assemble(&second_argument, &[down], second_gradients)?,
    ))
}

/// The same parameter as candle's matmul takes it on every device: contiguous, or a transposed view of what is.
fn dense(parameter: Tensor) -> Result<Tensor> {
    match parameter.rank() {
        2 if parameter.t()?.is_contiguous() => Ok(parameter),
        _ => parameter.contiguous(),
    }
}

/// The gradients of a projection's tracked parameters, given that of its output and (where asked for) its input.
fn projection_gradients(
    slots: &Projection,
    output: &Tensor,
    input: impl FnOnce() -> Result<Tensor>,
) -> Result<Projection<Option<Tensor>>> {
    let weight = if slots.weight.is_tracked() { Some(output.t()?.matmul(&input()?)?) } else { None };
    let bias = match &slots.bias {
        Some(slot) if slot.is_tracked() => Some(token_sum(output)?),
        _ => None,
    };
    Ok(Projection { weight, bias: slots.bias.as_ref().map(|_| bias) })
}

/// The sum over the tokens of `[tokens, features]`, in f32 at least, rounded once.
fn token_sum(xs: &Tensor) -> Result<Tensor> {
    match xs.dtype() {
        DType::F16 | DType::BF16 => xs.to_dtype(DType::F32)?.sum(0)?.to_dtype(xs.dtype()),
        _ => xs.sum(0),
    }
}

/// The elementwise part of the backward pass, in one reading of its inputs: from the gate's and up's preactivations
/// and the hidden layer's gradient, all `[tokens, intermediate_size]`, to the stack of
/// `[hidden, gate's gradient, up's gradient]` (plain MLP, where the second argument is not read: no third part).
struct HiddenGradients {
    activation: Activation,
    gated: bool,
}

impl HiddenGradients {
    fn parts(&self) -> usize {
        if self.gated {
            3
        } else {
            2
        }
    }

    fn run<E: Element>(&self, gate: &[E], up: &[E], dh: &[E]) -> CpuStorage {
        const BLOCK: usize = 1024;
        let len = gate.len();
        let mut out = vec![E::default(); self.parts() * len];
        let (hidden, gradients) = out.split_at_mut(len);
        let (d_gate, d_up) = gradients.split_at_mut(len);
        let chunk = |values: &[E], start: usize| -> Vec<E::Sum> {
            values[start..(start + BLOCK).min(len)].iter().map(|v| v.widen()).collect()
        };
        let block = |i: usize, hidden: &mut [E], d_gate: &mut [E], d_up: &mut [E]| {
            let start = i * BLOCK;
            let (mut act, dh) = (chunk(gate, start), chunk(dh, start));
            let mut slope = act.clone();
            self.activation.apply(&mut act);
            self.activation.apply_slope(&mut slope);
            let up = if self.gated { chunk(up, start) } else { vec![E::Sum::ONE; act.len()] };
            for j in 0..act.len() {
                hidden[j] = E::round(act[j] * up[j]);
                d_gate[j] = E::round(dh[j] * up[j] * slope[j]);
                if let Some(d_up) = d_up.get_mut(j) {
                    *d_up = E::round(dh[j] * act[j]);
                }
            }
        };
        let blocks = hidden.par_chunks_mut(BLOCK).zip(d_gate.par_chunks_mut(BLOCK)).enumerate();
        if self.gated {
            blocks.zip(d_up.par_chunks_mut(BLOCK)).for_each(|((i, (h, g)), u)| block(i, h, g, u));
        } else {
            blocks.for_each(|(i, (h, g))| block(i, h, g, &mut []));
        }
        E::to_cpu_storage_owned(out)
    }
}

impl CustomOp3 for HiddenGradients {
    fn name(&self) -> &'static str {
        "fused-mlp-hidden-gradients"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
        dh: &CpuStorage,
        dh_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut dims = vec![self.parts()];
        dims.extend(gate_layout.dims());
        let range = |layout: &Layout| match layout.contiguous_offsets() {
            Some((start, end)) => Ok(start..end),
            None => bail!("{}: expected contiguous arguments, found {layout:?}", self.name()),
        };
        let (g, u, d) = (range(gate_layout)?, range(up_layout)?, range(dh_layout)?);
        macro_rules! run {
            ($E:ty) => {
                self.run(&gate.as_slice::<$E>()?[g], &up.as_slice::<$E>()?[u], &dh.as_slice::<$E>()?[d])
            };
        }
        let out = match gate {
            CpuStorage::F32(_) => run!(f32),
            CpuStorage::F16(_) => run!(f16),
            CpuStorage::BF16(_) => run!(bf16),
            CpuStorage::F64(_) => run!(f64),
            _ => bail!("{}: expected f32, f16, bf16 or f64", self.name()),
        };
        Ok((out, dims.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gate: &CudaStorage,
        gate_layout: &Layout,
        up: &CudaStorage,
        up_layout: &Layout,
        dh: &CudaStorage,
        dh_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let mut dims = vec![self.parts()];
        dims.extend(gate_layout.dims());
        let up = self.gated.then_some((up, up_layout));
        let (gate, dh) = ((gate, gate_layout), (dh, dh_layout));
        Ok((cuda::hidden_gradients(self.name(), self.activation, gate, up, dh)?, dims.into()))
    }
}
