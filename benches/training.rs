//! What a forward and a training step take on a GPU, in time and in memory, beside candle's own ops.
//!
//!     cargo bench --features cuda --bench training -- [TOKENS]
//!
//! Memory is the most that the driver's pool handed out during one pass beyond what it held before (weights, x, and in a
//! training step the variables), in bf16. A training step is a forward, the sum of the output times a random gradient, and
//! a backward to x and every weight. The ways take turns; a time is the median of seven turns.

#[path = "support/mod.rs"]
mod support;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{reference, Activation, GateUp};
use candle_nn::Linear;
use std::time::Instant;
use support::gpu::Pool;

/// Name, gated, hidden size, intermediate size.
const MODELS: [(&str, bool, usize, usize); 4] = [
    ("swiglu 4096x14336", true, 4096, 14336),
    ("swiglu 2048x5632", true, 2048, 5632),
    ("swiglu 576x1536", true, 576, 1536),
    ("mlp 768x3072 GELU", false, 768, 3072),
];
const TURNS: usize = 7;
const MICROSECONDS_A_TURN: f64 = 20_000.;

/// An MLP whose weights are variables.
struct Layer {
    weights: Vec<Var>,
    gated: bool,
}

impl Layer {
    fn new(gated: bool, (hidden, intermediate): (usize, usize), device: &Device) -> Result<Self> {
        let weight = |rows: usize, cols: usize| -> Result<Var> {
            let weight = Tensor::randn(0f32, 1., (rows, cols), device)?.affine((cols as f64).powf(-0.5), 0.)?;
            Var::from_tensor(&weight.to_dtype(DType::BF16)?)
        };
        let mut weights = vec![weight(intermediate, hidden)?, weight(hidden, intermediate)?];
        if gated {
            weights.insert(1, weight(intermediate, hidden)?);
        }
        Ok(Self { weights, gated })
    }

    /// Its output; `track` says whether the pass is to be differentiated.
    fn forward(&self, xs: &Tensor, fused: bool, track: bool) -> Result<Tensor> {
        let linear = |i: usize| {
            let weight = self.weights[i].as_tensor();
            Linear::new(if track { weight.clone() } else { weight.detach() }, None)
        };
        if self.gated {
            let (gate_up, down) = (GateUp::Separate { gate: linear(0), up: linear(1) }, linear(2));
            match fused {
                true => fused_swiglu(xs, &gate_up, &down, Activation::Silu),
                false => reference::swiglu(xs, &gate_up, &down, Activation::Silu),
            }
        } else {
            let (fc1, fc2) = (linear(0), linear(1));
            match fused {
                true => fused_mlp(xs, &fc1, &fc2, Activation::Gelu),
                false => reference::mlp(xs, &fc1, &fc2, Activation::Gelu),
            }
        }
    }

    fn step(&self, xs: &Var, gradient: &Tensor, fused: bool) -> Result<()> {
        let loss = (self.forward(xs.as_tensor(), fused, true)? * gradient)?.sum_all()?;
        loss.backward().map(drop)
    }
}

/// Median microseconds of each.
fn time<const N: usize>(device: &Device, ways: [&dyn Fn() -> Result<()>; N]) -> Result<[f64; N]> {
    let turn = |way: &dyn Fn() -> Result<()>, calls: usize| -> Result<f64> {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..calls {
            way()?;
        }
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() * 1e6 / calls as f64)
    };
    let mut calls = [0; N];
    for (way, calls) in ways.iter().zip(&mut calls) {
        turn(way, 2)?;
        *calls = (MICROSECONDS_A_TURN / turn(way, 2)?).ceil() as usize;
    }
    let mut times: [Vec<f64>; N] = std::array::from_fn(|_| Vec::new());
    for _ in 0..TURNS {
        for ((way, &calls), times) in ways.iter().zip(&calls).zip(&mut times) {
            times.push(turn(way, calls)?);
        }
    }
    Ok(times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[TURNS / 2]
    }))
}

fn main() -> Result<()> {
    let tokens = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(4096usize);
    let device = &Device::new_cuda(0)?;
    let pool = Pool::of(device)?;
    let megabytes = |bytes: usize| bytes as f64 * 1e-6;
    println!("| MLP, bf16, {tokens} tokens | pass | candle, us | fused, us | ratio | candle, MB | fused, MB | ratio |");
    println!("|---|---|---:|---:|---:|---:|---:|---:|");
    for (name, gated, hidden, intermediate) in MODELS {
        let layer = Layer::new(gated, (hidden, intermediate), device)?;
        let normal = || Tensor::randn(0f32, 1., (tokens, hidden), device)?.to_dtype(DType::BF16);
        let (xs, gradient) = (Var::from_tensor(&normal()?)?, normal()?);
        let plain = xs.as_tensor().detach();
        let forward = |fused: bool| layer.forward(&plain, fused, false).map(drop);
        let step = |fused: bool| layer.step(&xs, &gradient, fused);
        for (pass, run) in [("forward", &forward as &dyn Fn(bool) -> Result<()>), ("training step", &step)] {
            let [candle, fused] = time(device, [&|| run(false), &|| run(true)])?;
            let peak = |fused| -> Result<usize> {
                let (result, bytes) = pool.peak(|| run(fused))?;
                result.map(|()| bytes)
            };
            let (more, less) = (peak(false)?, peak(true)?);
            println!(
                "| {name} | {pass} | {candle:.0} | {fused:.0} | {:.2} | {:.0} | {:.0} | {:.2} |",
                candle / fused,
                megabytes(more),
                megabytes(less),
                less as f64 / more as f64,
            );
        }
    }
    Ok(())
}
