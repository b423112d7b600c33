//! One row: plan, error, time, memory.

use crate::blocks::{load_fused, CandleMlp};
use crate::options::Options;
use crate::support::machine::Machine;
use crate::support::random::Random;
use crate::support::timing::{compare, Rounds};
use crate::weights::Weights;
use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor};
use candle_fused_mlp::Plan;
use indicatif::ProgressBar;
use serde::Serialize;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

/// What was found for one dtype and number of tokens. Serialised, its names stay the same from version to version.
#[derive(Serialize)]
pub struct Row {
    pub op: &'static str,
    pub device: String,
    pub dtype: &'static str,
    pub activation: String,
    pub hidden: usize,
    pub intermediate: usize,
    pub tokens: usize,
    /// Blocks that took turns, each with weights of its own.
    pub copies: usize,
    /// The kernel's name and the number of launches, as in the plan.
    pub kernel: String,
    pub launches: u64,
    /// Microseconds of one block.
    pub unfused_us: f64,
    pub fused_us: f64,
    pub speedup: f64,
    /// Of the fused block.
    pub tokens_per_s: f64,
    /// Against f64: of the fused block, and of candle's.
    pub max_abs_err: f64,
    pub rel_l2_err: f64,
    pub unfused_rel_l2_err: f64,
    /// What the fused block reads, by its plan, in 1e9 bytes a second; what the machine can, at the same time; the
    /// one over the other (the median of the rounds).
    pub read_gbs: f64,
    pub machine_read_gbs: f64,
    pub share_of_bandwidth: f64,
    /// The most memory that a forward pass takes beyond weights and input: of the heap, or of the GPU's.
    pub unfused_peak_bytes: usize,
    pub fused_peak_bytes: usize,
    #[serde(skip)]
    pub plan: Plan,
}

impl Row {
    /// The relative l2 error that the dtype may have.
    pub fn tolerance(&self) -> f64 {
        match self.plan.workload.dtype {
            DType::F64 => 1e-12,
            DType::F32 => 2e-6,
            DType::F16 => 1e-3,
            _ => 8e-3,
        }
    }

    /// Whether the fused block's error is; not, if it is no number.
    pub fn is_within_tolerance(&self) -> bool {
        self.rel_l2_err <= self.tolerance()
    }
}

/// The most copies of a block, unless more are asked for.
const MOST_COPIES: usize = 64;
/// How long a row's rounds take, unless their number is given.
const DURATION: Duration = Duration::from_millis(200);
/// What a path runs for at a time on a GPU, so that waiting for it costs little.
const GPU_SAMPLE: Duration = Duration::from_millis(4);

/// The rows of one dtype.
///
/// # Errors
/// Those of loading and of running the blocks.
pub fn rows(
    options: &Options,
    weights: &Weights,
    dtype: DType,
    device: &Device,
    machine: &Machine,
    bar: &ProgressBar,
) -> Result<Vec<Row>> {
    let vb = weights.var_builder(dtype, device)?;
    // One after the other, as many blocks with weights of their own as exceed the caches come from memory, as the
    // layers of a model do. Very small blocks stay in the caches, as the layers of a model of theirs do.
    let beyond_cache = machine.layers_beyond_cache(weights.elements() * dtype.size_in_bytes()).min(MOST_COPIES);
    let copies = 0..options.copies.map_or(beyond_cache, NonZeroUsize::get);
    let candle: Vec<_> = copies
        .clone()
        .map(|_| CandleMlp::load(weights, options.activation, &vb))
        .collect::<candle_core::Result<_>>()?;
    let fused: Vec<_> =
        copies.map(|_| load_fused(weights, options.activation, &vb)).collect::<candle_core::Result<_>>()?;
    let exact = candle[0].to_f64()?;
    let mut random = Random::new(1);
    let mut rows = Vec::new();
    for tokens in options.tokens.iter().map(|tokens| tokens.get()) {
        bar.set_message(format!("{} tokens, {}", tokens, dtype.as_str()));
        let xs = random.normal(&[tokens, weights.hidden_size], 1., dtype)?.to_device(device)?;
        let plan = fused[0].plan(&xs)?;

        let rounds = options.iters.map_or(Rounds::For(DURATION), |n| Rounds::Exactly(n.get()));
        let walks = if device.is_cpu() { 1 } else { walks_in(GPU_SAMPLE, || walk(&fused, &xs, 1))? };
        let walked = (walks * fused.len(), plan.fused.bytes_read);
        let (unfused_path, fused_path) = (|| walk(&candle, &xs, walks), || walk(&fused, &xs, walks));
        let found = compare(rounds, &*machine.reader, walked, &unfused_path, &fused_path)?;
        // After the timing, so that no buffer that is kept from a first call on is counted.
        let (unfused_result, unfused_peak_bytes) = machine.peak(|| candle[0].forward(&xs))?;
        let (fused_result, fused_peak_bytes) = machine.peak(|| fused[0].forward(&xs))?;
        let expected = exact.forward(&xs.to_dtype(DType::F64)?)?;
        let (max_abs_err, rel_l2_err) = errors(&fused_result?, &expected)?;
        let (_, unfused_rel_l2_err) = errors(&unfused_result?, &expected)?;

        rows.push(Row {
            op: plan.workload.op(),
            device: plan.device.clone(),
            dtype: dtype.as_str(),
            activation: options.activation.to_string(),
            hidden: weights.hidden_size,
            intermediate: weights.intermediate_size,
            tokens,
            copies: fused.len(),
            kernel: plan.kernel.clone(),
            launches: plan.fused.launches,
            unfused_us: 1e6 * found.unfused,
            fused_us: 1e6 * found.fused,
            speedup: found.unfused / found.fused,
            tokens_per_s: tokens as f64 / found.fused,
            max_abs_err,
            rel_l2_err,
            unfused_rel_l2_err,
            read_gbs: found.bandwidth / 1e9,
            machine_read_gbs: found.machine / 1e9,
            share_of_bandwidth: found.share,
            unfused_peak_bytes,
            fused_peak_bytes,
            plan,
        });
        bar.inc(1);
    }
    Ok(rows)
}

/// So many forward passes of every block of a stack, waited for.
fn walk(stack: &[impl Module], xs: &Tensor, walks: usize) -> candle_core::Result<()> {
    for block in (0..walks).flat_map(|_| stack) {
        black_box(block.forward(xs)?);
    }
    xs.device().synchronize()
}

/// How many walks take so long, one at least.
fn walks_in(duration: Duration, walk: impl Fn() -> candle_core::Result<()>) -> candle_core::Result<usize> {
    walk()?;
    let start = Instant::now();
    walk()?;
    Ok((duration.as_secs_f64() / start.elapsed().as_secs_f64()).ceil() as usize)
}

/// The largest absolute difference, and `|found - exact| / |exact|` in the l2 norm.
fn errors(found: &Tensor, exact: &Tensor) -> Result<(f64, f64)> {
    let values = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (found, exact) = (values(found)?, values(exact)?);
    let (mut largest, mut error, mut norm) = (0f64, 0f64, 0f64);
    for (found, exact) in found.iter().zip(&exact) {
        let difference = found - exact;
        largest = largest.max(difference.abs());
        error += difference * difference;
        norm += exact * exact;
    }
    // `max` passes over NaN, sums keep it.
    let largest = if error.is_nan() { error } else { largest };
    Ok((largest, if error == 0. { 0. } else { (error / norm).sqrt() }))
}
