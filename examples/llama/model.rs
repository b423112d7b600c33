//! A causal language model of the LLaMA family, whose MLP runs fused or as candle's own ops from the same weights.
//!
//! It is LLaMA 1 to 3, Mistral and Qwen2: grouped-query attention, rotary embeddings (scaled as in Llama 3 where the
//! configuration says so), biases where the checkpoint has them, tied or untied embeddings. It runs with a cache of
//! keys and values to generate text, and without one to train.

use anyhow::{bail, Context, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_fused_mlp::{fused_swiglu, reference, Activation, FusedSwiGlu, Naming};
use candle_nn::rotary_emb::{rope, rope_slow};
use candle_nn::{Embedding, Init, Linear, Module, RmsNorm, VarBuilder};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;
use std::time::{Duration, Instant};

/// A model's `config.json`: the fields that are read of it, under Hugging Face's names.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// As many as attention heads if not given.
    pub num_key_value_heads: Option<usize>,
    /// The hidden size over the attention heads if not given.
    pub head_dim: Option<usize>,
    #[serde(default = "silu")]
    pub hidden_act: Activation,
    pub rms_norm_eps: f64,
    pub max_position_embeddings: usize,
    /// Before transformers 5; 10,000 if it is nowhere.
    pub rope_theta: Option<f64>,
    /// Before transformers 5.
    pub rope_scaling: Option<Rope>,
    /// From transformers 5 on.
    pub rope_parameters: Option<Rope>,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// How many positions back attention reaches; all if not given.
    pub sliding_window: Option<usize>,
    /// Qwen2's switch of the one above.
    pub use_sliding_window: Option<bool>,
    pub eos_token_id: Option<TokenIds>,
}

/// The scaling of rotary embeddings.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Rope {
    pub rope_theta: Option<f64>,
    pub rope_type: Option<String>,
    /// The older name of the type.
    #[serde(rename = "type")]
    pub old_type: Option<String>,
    pub factor: Option<f64>,
    pub low_freq_factor: Option<f64>,
    pub high_freq_factor: Option<f64>,
    pub original_max_position_embeddings: Option<usize>,
}

/// One token or several.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    One(u32),
    Several(Vec<u32>),
}

fn silu() -> Activation {
    Activation::Silu
}

impl Config {
    /// Attention heads, heads of keys and values, and the size of a head.
    ///
    /// # Errors
    /// Heads that do not divide evenly.
    pub fn heads(&self) -> Result<(usize, usize, usize)> {
        let heads = self.num_attention_heads;
        let key_heads = self.num_key_value_heads.unwrap_or(heads);
        if heads == 0 || key_heads == 0 || !heads.is_multiple_of(key_heads) {
            bail!(
                "expected num_attention_heads to be a multiple of num_key_value_heads, found {heads} and {key_heads}"
            );
        }
        let size = match self.head_dim {
            Some(size) => size,
            None if self.hidden_size.is_multiple_of(heads) => self.hidden_size / heads,
            None => bail!(
                "expected hidden_size to be a multiple of num_attention_heads, found {} and {heads}",
                self.hidden_size
            ),
        };
        if size == 0 || !size.is_multiple_of(2) {
            bail!("expected an even head_dim, found {size}");
        }
        Ok((heads, key_heads, size))
    }

    /// The tokens that end a text.
    pub fn end_tokens(&self) -> &[u32] {
        match &self.eos_token_id {
            None => &[],
            Some(TokenIds::One(id)) => std::slice::from_ref(id),
            Some(TokenIds::Several(ids)) => ids,
        }
    }

    /// How many positions back attention reaches, where there is a limit.
    fn window(&self) -> Option<usize> {
        self.sliding_window.filter(|_| self.use_sliding_window.unwrap_or(true))
    }

    /// The angle that each pair of a head's values turns by from one position to the next.
    ///
    /// # Errors
    /// A scaling other than none, `linear` and `llama3`, or one without its parameters.
    fn frequencies(&self, head_dim: usize) -> Result<Vec<f64>> {
        let rope = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref()).cloned().unwrap_or_default();
        let theta = rope.rope_theta.or(self.rope_theta).unwrap_or(10_000.);
        let plain = (0..head_dim).step_by(2).map(|i| theta.powf(-(i as f64) / head_dim as f64));
        let kind = rope.rope_type.as_deref().or(rope.old_type.as_deref()).unwrap_or("default");
        let given = |value: Option<f64>, name: &str| value.with_context(|| format!("rope scaling {kind}: no {name}"));
        let trained = rope.original_max_position_embeddings.map(|positions| positions as f64);
        match kind {
            "default" => Ok(plain.collect()),
            "linear" => {
                let factor = given(rope.factor, "factor")?;
                Ok(plain.map(|frequency| frequency / factor).collect())
            }
            "llama3" => {
                let factor = given(rope.factor, "factor")?;
                let low = given(rope.low_freq_factor, "low_freq_factor")?;
                let high = given(rope.high_freq_factor, "high_freq_factor")?;
                let trained = given(trained, "original_max_position_embeddings")?;
                // Waves that the first training saw few turns of are stretched, the others not, with a slope between.
                let scaled = plain.map(|frequency| {
                    let turns = trained * frequency / (2. * PI);
                    let kept = ((turns - low) / (high - low)).clamp(0., 1.);
                    frequency * (kept + (1. - kept) / factor)
                });
                Ok(scaled.collect())
            }
            other => bail!("rope scaling: expected default, linear or llama3, found {other}"),
        }
    }
}

/// Which MLP runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MlpPath {
    /// This crate's, in one op.
    Fused,
    /// An op of candle's for each product, the activation and the multiplication.
    Unfused,
}

/// A model. A clone shares the weights.
#[derive(Debug, Clone)]
pub struct Llama {
    pub mlp_path: MlpPath,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    frequencies: Vec<f64>,
    window: Option<usize>,
    capacity: usize,
}

#[derive(Debug, Clone)]
struct Layer {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: FusedSwiGlu,
}

#[derive(Debug, Clone)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: usize,
    key_heads: usize,
    head_dim: usize,
}

/// A text being written: the keys and values of what came so far.
#[derive(Debug)]
pub struct State {
    caches: Vec<Cache>,
    room: usize,
    position: usize,
    /// Where this is set, the time that the MLPs take is added to it; the device is waited for around each.
    pub mlp_time: Option<Duration>,
}

impl State {
    /// Forgets the text. The memory stays where it is.
    pub fn clear(&mut self) {
        self.position = 0;
    }

    /// The tokens that there is room for.
    pub fn room(&self) -> usize {
        self.room
    }
}

/// A layer's keys and values, `[1, key_heads, room, head_dim]` each.
#[derive(Debug)]
struct Cache {
    k: Tensor,
    v: Tensor,
}

/// What every position of a text looks up, on the device, so that a [`step`](Llama::step) needs nothing of the host.
#[derive(Debug)]
pub struct Tables {
    /// The rotations of each position, `[room, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    /// What is added to the scores of a key that is so many positions before the last that there is room for, `[2 room]`.
    mask: Tensor,
    /// For each key the room less its position, `[room]`.
    before: Tensor,
}

/// What all layers of one pass share.
struct Pass {
    cos: Tensor,
    sin: Tensor,
    mask: Option<Tensor>,
    place: Place,
}

/// Where in a cache the new keys and values go.
enum Place {
    /// From this position on.
    From(usize),
    /// At the position that this tensor holds in every element, `[1, key_heads, 1, head_dim]`.
    At(Tensor),
}

impl Llama {
    /// A model out of `vb`, its tensors under Hugging Face's names.
    ///
    /// # Errors
    /// A configuration of another family, or whose sizes do not go together; tensors that are missing or of other shapes.
    pub fn load(config: &Config, mlp_path: MlpPath, vb: VarBuilder) -> Result<Self> {
        const FAMILY: [&str; 3] = ["llama", "mistral", "qwen2"];
        if !FAMILY.contains(&config.model_type.as_str()) {
            bail!("model_type: expected one of {}, found {}", FAMILY.join(", "), config.model_type);
        }
        let (heads, key_heads, head_dim) = config.heads()?;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        // As transformers initialises them, for a model to be trained.
        let normal = Init::Randn { mean: 0., stdev: 0.02 };
        let (root, vb) = (vb.clone(), vb.pp("model"));
        let embedding = vb.pp("embed_tokens").get_with_hints((vocab, hidden), "weight", normal)?;
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            root.pp("lm_head").get_with_hints((vocab, hidden), "weight", normal)?
        };
        let norm = |vb: VarBuilder| candle_nn::rms_norm(hidden, config.rms_norm_eps, vb);
        let layer = |i| {
            let vb = vb.pp("layers").pp(i);
            let at = |name| vb.pp("self_attn").pp(name);
            anyhow::Ok(Layer {
                attention_norm: norm(vb.pp("input_layernorm"))?,
                attention: Attention {
                    q: projection(hidden, heads * head_dim, at("q_proj"))?,
                    k: projection(hidden, key_heads * head_dim, at("k_proj"))?,
                    v: projection(hidden, key_heads * head_dim, at("v_proj"))?,
                    o: projection(heads * head_dim, hidden, at("o_proj"))?,
                    heads,
                    key_heads,
                    head_dim,
                },
                mlp_norm: norm(vb.pp("post_attention_layernorm"))?,
                mlp: fused_swiglu(hidden, config.intermediate_size, config.hidden_act, &Naming::LLAMA, vb.pp("mlp"))?,
            })
        };
        Ok(Self {
            mlp_path,
            embedding: Embedding::new(embedding, hidden),
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: norm(vb.pp("norm"))?,
            head: Linear::new(head, None),
            frequencies: config.frequencies(head_dim)?,
            window: config.window(),
            capacity: config.max_position_embeddings,
        })
    }

    /// The same model with another MLP.
    pub fn with_mlp(&self, mlp_path: MlpPath) -> Self {
        Self { mlp_path, ..self.clone() }
    }

    /// The weights' dtype.
    pub fn dtype(&self) -> DType {
        self.embedding.embeddings().dtype()
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.embedding.embeddings().device()
    }

    /// The tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.embedding.embeddings().dims()[0]
    }

    /// The first layer's MLP.
    pub fn mlp(&self) -> &FusedSwiGlu {
        &self.layers[0].mlp
    }

    /// An empty text, with room for `tokens`.
    ///
    /// # Errors
    /// More tokens than the model has positions for.
    pub fn state(&self, tokens: usize) -> Result<State> {
        if tokens > self.capacity {
            bail!(
                "expected at most {} tokens with the prompt, which the model has positions for, found {tokens}",
                self.capacity
            );
        }
        let cache = |Layer { attention: Attention { key_heads, head_dim, .. }, .. }: &Layer| {
            let empty = || Tensor::zeros((1, *key_heads, tokens, *head_dim), self.dtype(), self.device());
            Ok(Cache { k: empty()?, v: empty()? })
        };
        let caches = self.layers.iter().map(cache).collect::<Result<_>>()?;
        Ok(State { caches, room: tokens, position: 0, mlp_time: None })
    }

    /// What follows the text: appends `ids` to it and gives the next token's logits, `[vocab_size]` in f32.
    ///
    /// # Errors
    /// No ids, or one that is not in the vocabulary; candle's.
    pub fn next(&self, ids: &[u32], state: &mut State) -> Result<Tensor> {
        let tokens = ids.len();
        let ids = Tensor::new(ids, self.device())?.unsqueeze(0)?;
        let hidden = self.hidden(&ids, &self.pass(state.position, tokens)?, Some(state))?;
        state.position += tokens;
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.contiguous()?;
        Ok(self.logits(&last)?.flatten_all()?.to_dtype(DType::F32)?)
    }

    /// What a [`step`](Self::step) looks up, for texts of this state's room.
    ///
    /// # Errors
    /// Those of candle.
    pub fn tables(&self, state: &State) -> Result<Tables> {
        let room = state.room;
        let (cos, sin) = self.rotations(0, room)?;
        let reach = self.window.unwrap_or(room);
        // An element for each of `at + room - key`: the keys after `at` first, then the one at it and those before.
        let mask: Vec<f32> =
            (0..2 * room).map(|i| if i < room || i - room >= reach { f32::NEG_INFINITY } else { 0. }).collect();
        let before: Vec<u32> = (0..room as u32).map(|key| room as u32 - key).collect();
        let device = self.device();
        Ok(Tables { cos, sin, mask: Tensor::new(mask, device)?, before: Tensor::new(before, device)? })
    }

    /// The next token's logits as of [`next`](Self::next), for one id, `[1, 1]`, at a position, `[1]`, that both are on the
    /// device: the launches are the same whatever the two are. Every key that there is room for is read, those after the
    /// position without weight. The state's own position stays as it is.
    ///
    /// # Errors
    /// Those of candle. A position without room is none, but an access out of bounds on a GPU.
    pub fn step(&self, id: &Tensor, at: &Tensor, tables: &Tables, state: &mut State) -> Result<Tensor> {
        let Some(Layer { attention: Attention { key_heads, head_dim, .. }, .. }) = self.layers.first() else {
            bail!("expected a model of one layer at least");
        };
        let place = at.broadcast_as((1, *key_heads, 1, *head_dim))?.contiguous()?;
        let mask = tables.mask.index_select(&tables.before.broadcast_add(at)?, 0)?.unsqueeze(0)?;
        let pass = Pass {
            cos: tables.cos.index_select(at, 0)?,
            sin: tables.sin.index_select(at, 0)?,
            mask: Some(mask),
            place: Place::At(place),
        };
        let hidden = self.hidden(id, &pass, Some(state))?;
        Ok(self.logits(&hidden)?.flatten_all()?.to_dtype(DType::F32)?)
    }

    /// Every layer's MLP of the same `[1, 1, hidden_size]`, and nothing else.
    ///
    /// # Errors
    /// Those of candle.
    pub fn all_mlps(&self, xs: &Tensor) -> Result<()> {
        self.layers.iter().try_for_each(|layer| self.run_mlp(&layer.mlp, xs).map(drop))
    }

    /// The logits after each position of whole texts: from `[batch, tokens]` ids `[batch, tokens, vocab_size]`.
    ///
    /// # Errors
    /// Those of [`next`](Self::next).
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.logits(&self.hidden(ids, &self.pass(0, ids.dim(1)?)?, None)?)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.head.forward(hidden)?)
    }

    /// The last layer's output, `[batch, tokens, hidden_size]`, of ids that follow `state`'s.
    fn hidden(&self, ids: &Tensor, pass: &Pass, mut state: Option<&mut State>) -> Result<Tensor> {
        let mut xs = self.embedding.forward(ids)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let cache = state.as_deref().map(|state| &state.caches[i]);
            xs = (&xs + layer.attention.forward(&norm(&layer.attention_norm, &xs)?, pass, cache)?)?;
            let normed = norm(&layer.mlp_norm, &xs)?;
            let ys = match state.as_deref_mut().and_then(|state| state.mlp_time.as_mut()) {
                None => self.run_mlp(&layer.mlp, &normed)?,
                Some(time) => {
                    self.device().synchronize()?;
                    let start = Instant::now();
                    let ys = self.run_mlp(&layer.mlp, &normed)?;
                    self.device().synchronize()?;
                    *time += start.elapsed();
                    ys
                }
            };
            xs = (xs + ys)?;
        }
        norm(&self.norm, &xs)
    }

    fn run_mlp(&self, mlp: &FusedSwiGlu, xs: &Tensor) -> Result<Tensor> {
        Ok(match self.mlp_path {
            MlpPath::Fused => mlp.forward(xs)?,
            MlpPath::Unfused => reference::swiglu(xs, mlp.gate_up(), mlp.down(), mlp.activation())?,
        })
    }

    /// The rotations of `tokens` positions from `start` on, and what each may not look at.
    fn pass(&self, start: usize, tokens: usize) -> Result<Pass> {
        let total = start + tokens;
        let (cos, sin) = self.rotations(start, tokens)?;
        let reach = self.window.unwrap_or(total);
        let mask = if tokens == 1 && total <= reach {
            None
        } else {
            let hidden = |at: usize, past: usize| past > at || at - past >= reach;
            let values: Vec<f32> = (start..total)
                .flat_map(|at| (0..total).map(move |past| if hidden(at, past) { f32::NEG_INFINITY } else { 0. }))
                .collect();
            Some(Tensor::from_vec(values, (tokens, total), self.device())?)
        };
        Ok(Pass { cos, sin, mask, place: Place::From(start) })
    }

    /// The cosines and sines of `tokens` positions from `start` on, `[tokens, head_dim / 2]`.
    fn rotations(&self, start: usize, tokens: usize) -> Result<(Tensor, Tensor)> {
        let table = |of: fn(f64) -> f64| -> Result<Tensor> {
            let angles = (start..start + tokens).flat_map(|at| self.frequencies.iter().map(move |f| at as f64 * f));
            let values: Vec<f32> = angles.map(|angle| of(angle) as f32).collect();
            Ok(Tensor::from_vec(values, (tokens, self.frequencies.len()), self.device())?.to_dtype(self.dtype())?)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }
}

impl Cache {
    /// Puts in new keys and values and gives all up to them; those of all the room, if only the device knows the place.
    fn append(&self, k: &Tensor, v: &Tensor, place: &Place) -> candle_core::Result<(Tensor, Tensor)> {
        let put = |all: &Tensor, new: &Tensor| match place {
            Place::From(start) => {
                all.slice_set(new, 2, *start)?;
                all.narrow(2, 0, start + new.dim(2)?)
            }
            Place::At(position) => {
                all.scatter_set(position, new, 2)?;
                Ok(all.clone())
            }
        };
        Ok((put(&self.k, k)?, put(&self.v, v)?))
    }
}

impl Attention {
    /// From `[batch, tokens, hidden_size]` to the same; with a cache, over all that came before as well.
    fn forward(&self, xs: &Tensor, pass: &Pass, cache: Option<&Cache>) -> Result<Tensor> {
        let &Self { heads, key_heads, head_dim, .. } = self;
        let (batch, tokens, _) = xs.dims3()?;
        let split = |linear: &Linear, heads| {
            linear.forward(xs)?.reshape((batch, tokens, heads, head_dim))?.transpose(1, 2)?.contiguous()
        };
        let q = rotate(&split(&self.q, heads)?, pass)?;
        let k = rotate(&split(&self.k, key_heads)?, pass)?;
        let v = split(&self.v, key_heads)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v, &pass.place)?,
            None => (k, v),
        };
        // The heads that share keys are rows of one product: nothing is repeated for them.
        let rows = heads / key_heads * tokens;
        let q = (q.reshape((batch, key_heads, rows, head_dim))? * (head_dim as f64).powf(-0.5))?;
        // In f32, as transformers has it.
        let scores = q.matmul(&k.t()?)?.to_dtype(DType::F32)?;
        let scores = match &pass.mask {
            None => scores,
            Some(mask) => {
                let scores = scores.reshape((batch, heads, tokens, ()))?.broadcast_add(mask)?;
                scores.reshape((batch, key_heads, rows, ()))?
            }
        };
        let weights = softmax(&scores)?.to_dtype(v.dtype())?;
        let mixed = weights.matmul(&v)?.reshape((batch, heads, tokens, head_dim))?;
        Ok(self.o.forward(&mixed.transpose(1, 2)?.reshape((batch, tokens, heads * head_dim))?)?)
    }
}

/// A projection, with its bias if the checkpoint has one.
fn projection(cols: usize, rows: usize, vb: VarBuilder) -> Result<Linear> {
    let weight =
        vb.get_with_hints((rows, cols), "weight", Init::Randn { mean: 0., stdev: (cols as f64).powf(-0.5) })?;
    let bias = if vb.contains_tensor("bias") { Some(vb.get(rows, "bias")?) } else { None };
    Ok(Linear::new(weight, bias))
}

// Three of candle's fused ops drop gradients without a word. So where x is tracked, for training, the same function
// runs as a chain of plain ops.

fn norm(norm: &RmsNorm, xs: &Tensor) -> Result<Tensor> {
    Ok(if xs.track_op() { norm.forward_diff(xs)? } else { norm.forward(xs)? })
}

fn rotate(xs: &Tensor, Pass { cos, sin, .. }: &Pass) -> Result<Tensor> {
    Ok(if xs.track_op() { rope_slow(xs, cos, sin)? } else { rope(xs, cos, sin)? })
}

fn softmax(xs: &Tensor) -> Result<Tensor> {
    Ok(if xs.track_op() { candle_nn::ops::softmax(xs, D::Minus1)? } else { candle_nn::ops::softmax_last_dim(xs)? })
}
