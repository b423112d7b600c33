use candle_core::{Module, Result, Tensor};
use candle_fused_mlp::{fused_swiglu, FusedSwiGlu, Naming};
use candle_nn::VarBuilder;
use candle_transformers::models::phi3::Config;

pub struct Mlp {
    fused: FusedSwiGlu,
}

impl Mlp {
    pub fn new(cfg: &Config, vb: VarBuilder) -> Result<Self> {
        let fused = fused_swiglu(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, &Naming::PHI3, vb)?;
        Ok(Self { fused })
    }
}

impl Module for Mlp {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.fused.forward(xs)
    }
}
