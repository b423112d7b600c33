//! Layers on a GPU, the ways to run them, and their times beside each other.
#![allow(dead_code)] // each program uses a part of it

use crate::support::gpu::capture;
use candle_core::{DType, Device, Error, Result, Tensor};
use candle_fused_mlp::cuda::Kernel;
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{reference, Activation, GateUp};
use candle_nn::Linear;
use std::time::Instant;

/// Weights in a stack: four times the largest second-level cache of today's GPUs.
const COLD_BYTES: usize = 256 << 20;

/// An MLP without biases and with SiLU if it is gated, with biases and erf GELU if it is not.
pub enum Layer {
    Plain(Linear, Linear),
    Gated(GateUp, Linear),
}

impl Layer {
    /// A layer of random normal weights that keep a unit variance.
    ///
    /// # Errors
    /// Those of candle's ops.
    pub fn new(
        gated: bool,
        (hidden_size, intermediate_size): (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let tensor =
            |dims: &[usize], scale: f64| Tensor::randn(0f32, 1., dims, device)?.affine(scale, 0.)?.to_dtype(dtype);
        let linear = |rows: usize, cols: usize| {
            let bias = if gated { None } else { Some(tensor(&[rows], 0.1)?) };
            Ok::<_, Error>(Linear::new(tensor(&[rows, cols], 1.3 / (cols as f64).sqrt())?, bias))
        };
        let (first, down) = (linear(intermediate_size, hidden_size)?, linear(hidden_size, intermediate_size)?);
        Ok(if gated {
            Self::Gated(GateUp::Separate { gate: first, up: linear(intermediate_size, hidden_size)? }, down)
        } else {
            Self::Plain(first, down)
        })
    }

    /// As many layers as the second-level cache cannot hold, four at least.
    ///
    /// # Errors
    /// Those of candle's ops.
    pub fn stack(gated: bool, sizes: (usize, usize), dtype: DType, device: &Device) -> Result<Vec<Self>> {
        let bytes = Self::weight_bytes(gated, sizes, dtype);
        (0..(COLD_BYTES / bytes + 1).max(4)).map(|_| Self::new(gated, sizes, dtype, device)).collect()
    }

    /// The bytes of one layer's weights.
    pub fn weight_bytes(gated: bool, (hidden_size, intermediate_size): (usize, usize), dtype: DType) -> usize {
        hidden_size * intermediate_size * if gated { 3 } else { 2 } * dtype.size_in_bytes()
    }

    fn fused(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(fc1, fc2) => fused_mlp(xs, fc1, fc2, Activation::Gelu),
            Self::Gated(gate_up, down) => fused_swiglu(xs, gate_up, down, Activation::Silu),
        }
    }

    fn unfused(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(fc1, fc2) => reference::mlp(xs, fc1, fc2, Activation::Gelu),
            Self::Gated(gate_up, down) => reference::swiglu(xs, gate_up, down, Activation::Silu),
        }
    }
}

/// A way to run a layer.
#[derive(Clone, Copy)]
pub enum Way {
    /// candle's own ops.
    Candle,
    /// The op, on the kernel that it chooses.
    Chosen,
    /// The op on this kernel, which need not take the layer.
    Forced(Kernel),
}

impl Way {
    /// The layer's output.
    ///
    /// # Errors
    /// A kernel that does not take the layer, or a launch that fails.
    pub fn run(self, layer: &Layer, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Candle => layer.unfused(xs),
            Self::Chosen => layer.fused(xs),
            Self::Forced(kernel) => kernel.with(|| layer.fused(xs)),
        }
    }
}

/// The value in the middle; of two, the larger one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// How long to time: so many turns, of so many microseconds each.
#[derive(Clone, Copy)]
pub struct Turns {
    pub count: usize,
    pub microseconds: f64,
}

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// Calls, until the GPU has done them.
    Calls,
    /// Replays of a CUDA graph of a walk through the stack, until the GPU has done them.
    Replays,
    /// Calls, until the host has enqueued them: so few that the queue takes them all, whatever the GPU does.
    Host,
}

/// What a stream takes before its host has to wait, with room to spare, and the most that a layer puts there by candle's ops:
/// launches, allocations and frees.
const QUEUE: usize = 512;
const ENTRIES: usize = 16;

/// Microseconds of one layer each way, `None` where the kernel does not take it: the ways take turns, each layer reads what the
/// one before gave, every fourth `first` again, and a number is the median over the turns.
///
/// # Errors
/// Those of candle's ops, and of a capture.
pub fn time(layers: &[Layer], first: &Tensor, ways: &[Way], turns: Turns, clock: Clock) -> Result<Vec<Option<f64>>> {
    let device = first.device();
    let once = |way: Way| -> Result<()> {
        let mut xs = first.clone();
        for (i, layer) in layers.iter().enumerate() {
            xs = way.run(layer, if i % 4 == 0 { first } else { &xs })?;
        }
        Ok(())
    };
    let turn = |walk: &dyn Fn() -> Result<()>, walks: usize| -> Result<f64> {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..walks {
            walk()?;
        }
        let enqueued = start.elapsed();
        device.synchronize()?;
        let elapsed = if clock == Clock::Host { enqueued } else { start.elapsed() };
        Ok(elapsed.as_secs_f64() * 1e6 / (walks * layers.len()) as f64)
    };
    type Walk<'a> = Box<dyn Fn() -> Result<()> + 'a>;
    let mut walks: Vec<Option<(Walk, usize)>> = Vec::new();
    for &way in ways {
        if once(way).is_err() {
            walks.push(None);
            continue;
        }
        let walk: Walk = match clock {
            Clock::Calls | Clock::Host => Box::new(move || once(way)),
            Clock::Replays => {
                let graph = capture(device, &mut || once(way))?;
                Box::new(move || graph.launch().map_err(Error::wrap))
            }
        };
        let count = match clock {
            Clock::Calls | Clock::Replays => {
                (turns.microseconds / (turn(&*walk, 1)? * layers.len() as f64)).ceil().max(1.) as usize
            }
            Clock::Host => (QUEUE / ENTRIES / layers.len()).max(1),
        };
        walks.push(Some((walk, count)));
    }
    let mut times = vec![Vec::new(); ways.len()];
    for _ in 0..turns.count {
        for (walk, times) in walks.iter().zip(&mut times) {
            if let Some((walk, count)) = walk {
                times.push(turn(&**walk, *count)?);
            }
        }
    }
    Ok(times.into_iter().map(|t| if t.is_empty() { None } else { Some(median(t)) }).collect())
}
