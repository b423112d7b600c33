use candle_core::{Module, Result, Tensor};
use candle_nn::{layer_norm, linear, LayerNorm, Linear, VarBuilder};

/// What follows the attention in a `ResidualAttentionBlock`.
pub struct FeedForward {
    mlp_linear1: Linear,
    mlp_linear2: Linear,
    mlp_ln: LayerNorm,
}

impl FeedForward {
    pub fn load(n_state: usize, vb: VarBuilder) -> Result<Self> {
        let n_mlp = n_state * 4;
        let mlp_linear1 = linear(n_state, n_mlp, vb.pp("fc1"))?;
        let mlp_linear2 = linear(n_mlp, n_state, vb.pp("fc2"))?;
        let mlp_ln = layer_norm(n_state, 1e-5, vb.pp("final_layer_norm"))?;
        Ok(Self { mlp_linear1, mlp_linear2, mlp_ln })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mlp = self.mlp_linear2.forward(&self.mlp_linear1.forward(&self.mlp_ln.forward(x)?)?.gelu()?)?;
        x + mlp
    }
}
