use candle_core::{Module, Result, Tensor};
use candle_fused_mlp::{fused_mlp, Activation, FusedMlp, Naming};
use candle_nn::{layer_norm, LayerNorm, VarBuilder};

/// What follows the attention in a `ResidualAttentionBlock`.
pub struct FeedForward {
    mlp: FusedMlp,
    mlp_ln: LayerNorm,
}

impl FeedForward {
    pub fn load(n_state: usize, vb: VarBuilder) -> Result<Self> {
        let n_mlp = n_state * 4;
        let mlp = fused_mlp(n_state, n_mlp, Activation::GeluTanh, &Naming::FC1_FC2, vb.clone())?;
        let mlp_ln = layer_norm(n_state, 1e-5, vb.pp("final_layer_norm"))?;
        Ok(Self { mlp, mlp_ln })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mlp = self.mlp.forward(&self.mlp_ln.forward(x)?)?;
        x + mlp
    }
}
