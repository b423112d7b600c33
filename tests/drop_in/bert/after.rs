use candle_core::{Module, Result, Tensor};
use candle_fused_mlp::{fused_mlp, Activation, FusedMlp, Naming};
use candle_nn::{layer_norm, LayerNorm, VarBuilder};
use candle_transformers::models::bert::{Config, HiddenAct};

/// What follows the attention in a `BertLayer`.
pub struct FeedForward {
    mlp: FusedMlp,
    layer_norm: LayerNorm,
}

impl FeedForward {
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let (h_size, i_size) = (config.hidden_size, config.intermediate_size);
        let act = match config.hidden_act {
            HiddenAct::Gelu => Activation::Gelu,
            HiddenAct::GeluApproximate => Activation::GeluTanh,
            HiddenAct::Relu => Activation::Relu,
        };
        Ok(Self {
            mlp: fused_mlp(h_size, i_size, act, &Naming::BERT, vb.clone())?,
            layer_norm: layer_norm(h_size, config.layer_norm_eps, vb.pp("output.LayerNorm"))?,
        })
    }

    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let ys = self.mlp.forward(xs)?;
        self.layer_norm.forward(&(ys + xs)?)
    }
}
