//! BERT as in candle_transformers' `bert.rs`, op for op, but for the MLP: where a layer there has `BertIntermediate` and
//! the `dense` of `BertOutput`, it has a `FusedMlp` here.

use candle_core::{Module, Result, Tensor, D};
use candle_fused_mlp::{fused_mlp, Activation, FusedMlp, Naming};
use candle_nn::{embedding, layer_norm, linear, ops, Embedding, LayerNorm, Linear, VarBuilder};
use candle_transformers::models::bert::{Config, HiddenAct};

/// The encoder with its embeddings.
pub struct FusedBert {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl FusedBert {
    /// The model at `vb`.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape.
    pub fn load(config: &Config, vb: VarBuilder) -> Result<Self> {
        let (size, embeddings) = (config.hidden_size, vb.pp("embeddings"));
        Ok(Self {
            words: embedding(config.vocab_size, size, embeddings.pp("word_embeddings"))?,
            positions: embedding(config.max_position_embeddings, size, embeddings.pp("position_embeddings"))?,
            types: embedding(config.type_vocab_size, size, embeddings.pp("token_type_embeddings"))?,
            norm: layer_norm(size, config.layer_norm_eps, embeddings.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers)
                .map(|layer| Layer::load(config, vb.pp("encoder.layer").pp(layer)))
                .collect::<Result<_>>()?,
        })
    }

    /// The last layer's outputs `[batch, tokens, hidden_size]` for ids and types `[batch, tokens]`, in f32; `mask` is 1
    /// where there is a token and 0 where there is padding.
    ///
    /// # Errors
    /// Those of candle's ops.
    pub fn forward(&self, ids: &Tensor, types: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let positions = Tensor::arange(0, ids.dim(1)? as u32, ids.device())?;
        let embedded = (self.words.forward(ids)? + self.types.forward(types)?)?;
        let mut xs = self.norm.forward(&embedded.broadcast_add(&self.positions.forward(&positions)?)?)?;
        let mask = mask.unsqueeze(1)?.unsqueeze(1)?.to_dtype(xs.dtype())?;
        let mask = ((mask.ones_like()? - mask)? * f64::from(f32::MIN))?;
        for layer in &self.layers {
            xs = layer.forward(&xs, &mask)?;
        }
        Ok(xs)
    }
}

struct Layer {
    attention: Attention,
    mlp: FusedMlp,
    norm: LayerNorm,
}

impl Layer {
    fn load(config: &Config, vb: VarBuilder) -> Result<Self> {
        let Config { hidden_size, intermediate_size, layer_norm_eps, .. } = *config;
        let activation = match config.hidden_act {
            HiddenAct::Gelu => Activation::Gelu,
            HiddenAct::GeluApproximate => Activation::GeluTanh,
            HiddenAct::Relu => Activation::Relu,
        };
        Ok(Self {
            attention: Attention::load(config, vb.pp("attention"))?,
            norm: layer_norm(hidden_size, layer_norm_eps, vb.pp("output.LayerNorm"))?,
            mlp: fused_mlp(hidden_size, intermediate_size, activation, &Naming::BERT, vb)?,
        })
    }

    fn forward(&self, xs: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let xs = self.attention.forward(xs, mask)?;
        self.norm.forward(&(self.mlp.forward(&xs)? + xs)?)
    }
}

struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    norm: LayerNorm,
    heads: usize,
}

impl Attention {
    fn load(config: &Config, vb: VarBuilder) -> Result<Self> {
        let size = config.hidden_size;
        Ok(Self {
            query: linear(size, size, vb.pp("self.query"))?,
            key: linear(size, size, vb.pp("self.key"))?,
            value: linear(size, size, vb.pp("self.value"))?,
            output: linear(size, size, vb.pp("output.dense"))?,
            norm: layer_norm(size, config.layer_norm_eps, vb.pp("output.LayerNorm"))?,
            heads: config.num_attention_heads,
        })
    }

    fn forward(&self, xs: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (batch, tokens, size) = xs.dims3()?;
        let head_size = size / self.heads;
        let heads = |linear: &Linear| {
            linear.forward(xs)?.reshape((batch, tokens, self.heads, head_size))?.transpose(1, 2)?.contiguous()
        };
        let (query, key, value) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let scores = (query.matmul(&key.t()?)? / (head_size as f64).sqrt())?.broadcast_add(mask)?;
        let mixed = ops::softmax(&scores, D::Minus1)?.matmul(&value)?;
        let mixed = mixed.transpose(1, 2)?.contiguous()?.flatten_from(D::Minus2)?;
        self.norm.forward(&(self.output.forward(&mixed)? + xs)?)
    }
}
