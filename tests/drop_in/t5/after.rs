use candle_core::{Module, Result, Tensor};
use candle_fused_mlp::{fused_swiglu, FusedSwiGlu, Naming};
use candle_nn::VarBuilder;
use candle_transformers::models::t5::Config;

pub struct T5DenseGatedActDense {
    fused: FusedSwiGlu,
}

impl T5DenseGatedActDense {
    pub fn load(vb: VarBuilder, cfg: &Config) -> Result<Self> {
        let act = cfg.feed_forward_proj.activation;
        let fused = fused_swiglu(cfg.d_model, cfg.d_ff, act, &Naming::T5_GATED, vb)?;
        Ok(Self { fused })
    }
}

impl Module for T5DenseGatedActDense {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.fused.forward(xs)
    }
}
