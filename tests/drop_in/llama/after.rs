use candle_core::{Module, Result, Tensor};
use candle_fused_mlp::{fused_swiglu, Activation, FusedSwiGlu, Naming};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::Config;

pub struct Mlp {
    fused: FusedSwiGlu,
}

impl Mlp {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fused.forward(x)
    }

    pub fn load(vb: VarBuilder, cfg: &Config) -> Result<Self> {
        let h_size = cfg.hidden_size;
        let i_size = cfg.intermediate_size;
        let fused = fused_swiglu(h_size, i_size, Activation::Silu, &Naming::LLAMA, vb)?;
        Ok(Self { fused })
    }
}
