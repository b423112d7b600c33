use candle_core::{Module, Result, Tensor};
use candle_nn::{layer_norm, linear, LayerNorm, Linear, VarBuilder};
use candle_transformers::models::bert::{Config, HiddenAct};

/// What follows the attention in a `BertLayer`.
pub struct FeedForward {
    intermediate: Linear,
    act: HiddenAct,
    output: Linear,
    layer_norm: LayerNorm,
}

impl FeedForward {
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let (h_size, i_size) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            intermediate: linear(h_size, i_size, vb.pp("intermediate.dense"))?,
            act: config.hidden_act,
            output: linear(i_size, h_size, vb.pp("output.dense"))?,
            layer_norm: layer_norm(h_size, config.layer_norm_eps, vb.pp("output.LayerNorm"))?,
        })
    }

    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let ys = self.intermediate.forward(xs)?;
        let ys = match self.act {
            HiddenAct::Gelu => ys.gelu_erf()?,
            HiddenAct::GeluApproximate => ys.gelu()?,
            HiddenAct::Relu => ys.relu()?,
        };
        let ys = self.output.forward(&ys)?;
        self.layer_norm.forward(&(ys + xs)?)
    }
}
