//! The block twice: as candle has it, and fused.

use crate::weights::{Weights, PROJECTIONS};
use candle_core::{DType, Module, Result, Tensor};
use candle_fused_mlp::{fused_swiglu, Activation, FusedSwiGlu, Naming};
use candle_nn::{Linear, VarBuilder};

/// A projection, with its bias if the checkpoint has one.
fn projection(rows: usize, cols: usize, vb: VarBuilder) -> Result<Linear> {
    let bias = if vb.contains_tensor("bias") { Some(vb.get(rows, "bias")?) } else { None };
    Ok(Linear::new(vb.get((rows, cols), "weight")?, bias))
}

/// The block as candle's models have it: an op for each product, the activation and the multiplication.
pub struct CandleMlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl CandleMlp {
    pub fn load(weights: &Weights, activation: Activation, vb: &VarBuilder) -> Result<Self> {
        let (hidden, intermediate) = (weights.hidden_size, weights.intermediate_size);
        let [gate, up, down] = PROJECTIONS.map(|name| vb.pp(name));
        let (gate, up) = (projection(intermediate, hidden, gate)?, projection(intermediate, hidden, up)?);
        Ok(Self { gate, up, down: projection(hidden, intermediate, down)?, activation })
    }

    /// The same weights, exactly, in f64.
    pub fn to_f64(&self) -> Result<Self> {
        let widened = |linear: &Linear| -> Result<Linear> {
            let bias = linear.bias().map(|bias| bias.to_dtype(DType::F64)).transpose()?;
            Ok(Linear::new(linear.weight().to_dtype(DType::F64)?, bias))
        };
        let Self { gate, up, down, activation } = self;
        Ok(Self { gate: widened(gate)?, up: widened(up)?, down: widened(down)?, activation: *activation })
    }
}

impl Module for CandleMlp {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let gate = self.activation.unfused(&self.gate.forward(xs)?)?;
        self.down.forward(&(gate * self.up.forward(xs)?)?)
    }
}

/// The block in one op.
pub fn load_fused(weights: &Weights, activation: Activation, vb: &VarBuilder) -> Result<FusedSwiGlu> {
    fused_swiglu(weights.hidden_size, weights.intermediate_size, activation, &Naming::LLAMA, vb.clone())
}
