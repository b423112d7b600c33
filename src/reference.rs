//! The unfused twins: the same functions as a chain of candle's own ops, as a model without this crate computes them.
//!
//! Tests compare every fused op with its twin, the benches and the example time it beside them.

use crate::{Activation, GateUp, PackedOrder};
use candle_core::{Module, Result, Tensor, D};
use candle_nn::Linear;

/// `act(x W1ᵀ + b1) W2ᵀ + b2` by candle's own ops: the twin of [`crate::ops::fused_mlp`].
///
/// # Errors
/// Those of the candle ops.
pub fn mlp(xs: &Tensor, fc1: &Linear, fc2: &Linear, activation: Activation) -> Result<Tensor> {
    fc2.forward(&activation.unfused(&fc1.forward(xs)?)?)
}

/// `(act(x Wgᵀ + bg) · (x Wuᵀ + bu)) Wdᵀ + bd` by candle's own ops: the twin of [`crate::ops::fused_swiglu`].
///
/// # Errors
/// Those of the candle ops.
pub fn swiglu(xs: &Tensor, gate_up: &GateUp, down: &Linear, activation: Activation) -> Result<Tensor> {
    let (gate, up) = match gate_up {
        GateUp::Separate { gate, up } => (gate.forward(xs)?, up.forward(xs)?),
        GateUp::Packed { linear, order } => {
            let halves = linear.forward(xs)?.chunk(2, D::Minus1)?;
            match order {
                PackedOrder::GateUp => (halves[0].clone(), halves[1].clone()),
                PackedOrder::UpGate => (halves[1].clone(), halves[0].clone()),
            }
        }
    };
    down.forward(&(activation.unfused(&gate)? * up)?)
}
