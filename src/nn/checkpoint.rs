//! Under which names checkpoints keep an MLP: the table of namings, finding out which one is there, and reading by it.
//!
//! A new naming is one row of the table.

use crate::{GateUp, PackedOrder};
use candle_core::{bail, Result, Tensor};
use candle_nn::init::{FanInOut, NonLinearity, NormalOrUniform, DEFAULT_KAIMING_NORMAL};
use candle_nn::{Init, Linear, VarBuilder};
use std::borrow::Cow;
use std::fmt;

/// What to expect of a layer's bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bias {
    /// There is one: it is an error if a checkpoint lacks it, and a `VarMap` makes it.
    Required,
    /// There is one if the checkpoint has it. An empty `VarMap` has none, and none is made.
    IfPresent,
    /// There is none: it is an error if the checkpoint has one.
    Absent,
}

/// A layer's name, relative to the MLP's prefix and without `.weight` or `.bias`.
type Name = Cow<'static, str>;

/// The first layer's names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum First {
    Plain(Name),
    Separate { gate: Name, up: Name },
    Packed { gate_up: Name, order: PackedOrder },
}

/// How a checkpoint names an MLP's layers, how it lays them out and which have biases.
///
/// The constants are the namings in use; which activation goes with them is in a model's configuration, and only
/// hinted at here. Others are made by [`Naming::plain`], [`Naming::gated`] and [`Naming::packed`]. Names are relative
/// to the prefix of the `VarBuilder`: `model.layers.0.mlp` for [`Naming::LLAMA`], the layer itself for
/// [`Naming::BERT`].
///
/// Not here, for they have something else between the layers: EVA-02's `fc1_g`, `fc1_x`, norm, `fc2` and SegFormer's
/// convolution.
///
/// ```
/// use candle_fused_mlp::{Bias, Naming};
/// let naming = Naming::gated("experts.3.w1", "experts.3.w3", "experts.3.w2").with_bias(Bias::Absent, Bias::Required);
/// assert_eq!(naming.layers(), ["experts.3.w1", "experts.3.w3", "experts.3.w2"]);
/// assert_eq!(Naming::PHI3.to_string(), "PHI3: gate_up_proj, down_proj (packed, gate first)");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Naming {
    preset: Option<&'static str>,
    first: First,
    second: Name,
    first_bias: Bias,
    second_bias: Bias,
    transposed: bool,
}

const fn plain(name: &'static str) -> First {
    First::Plain(Cow::Borrowed(name))
}

const fn separate(gate: &'static str, up: &'static str) -> First {
    First::Separate { gate: Cow::Borrowed(gate), up: Cow::Borrowed(up) }
}

const fn packed(gate_up: &'static str, order: PackedOrder) -> First {
    First::Packed { gate_up: Cow::Borrowed(gate_up), order }
}

/// One row a naming: `NAME = first layer, second layer, [first bias, second bias]`, then `transposed` where weights
/// are `[in_features, out_features]`.
macro_rules! namings {
    ($(
        $(#[$doc:meta])*
        $name:ident = $first:expr, $second:literal, [$first_bias:ident, $second_bias:ident] $(, $transposed:ident)?;
    )*) => {
        impl Naming {
            $(
                $(#[$doc])*
                pub const $name: Self = Self {
                    preset: Some(stringify!($name)),
                    first: $first,
                    second: Cow::Borrowed($second),
                    first_bias: Bias::$first_bias,
                    second_bias: Bias::$second_bias,
                    transposed: namings!(@is_transposed $($transposed)?),
                };
            )*

            /// Every naming that has a name here: those that [`Naming::detect`] tries.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
    (@is_transposed transposed) => { true };
    (@is_transposed) => { false };
}

namings! {
    // Gated, gate and up apart.

    /// `gate_proj`, `up_proj`, `down_proj`: LLaMA, Mistral, Qwen, Yi, OLMo, StableLM, DeepSeek, Helium, SmolLM3 and
    /// most experts (SiLU); Gemma, RecurrentGemma (tanh GELU).
    LLAMA = separate("gate_proj", "up_proj"), "down_proj", [IfPresent, IfPresent];
    /// `w1` (gate), `w3` (up), `w2`: LLaMA as first published, Mixtral's experts, CSM, LFM2, Z-Image (SiLU).
    MIXTRAL = separate("w1", "w3"), "w2", [IfPresent, IfPresent];
    /// `swiglu.w1` (gate), `swiglu.w3` (up), `w2`: MetaVoice's transformer (SiLU).
    METAVOICE = separate("swiglu.w1", "swiglu.w3"), "w2", [IfPresent, IfPresent];
    /// `w1` (gate), `w3` (up), `c_proj`: MetaVoice's GPT (SiLU).
    METAVOICE_GPT = separate("w1", "w3"), "c_proj", [IfPresent, IfPresent];
    /// `wi_0` (gate), `wi_1` (up), `wo`: T5 v1.1, Flan-T5, UL2 (tanh GELU or SiLU).
    T5_GATED = separate("wi_0", "wi_1"), "wo", [IfPresent, IfPresent];
    /// `fc12` (gate), `fc11` (up), `fc2`: Nomic BERT (SiLU).
    NOMIC_BERT = separate("fc12", "fc11"), "fc2", [IfPresent, IfPresent];

    /// `ffn_gate`, `ffn_up`, `ffn_down`: most models in GGUF files, dequantized (SiLU, in Gemma tanh GELU).
    GGUF = separate("ffn_gate", "ffn_up"), "ffn_down", [IfPresent, IfPresent];

    // Gated, gate and up packed into one.

    /// `gate_up_proj` (gate first), `down_proj`: Phi-3, GLM-4 in transformers' format (SiLU).
    PHI3 = packed("gate_up_proj", PackedOrder::GateUp), "down_proj", [IfPresent, IfPresent];
    /// `up_gate_proj` (up first), `down_proj` with a bias: Stella 400M (GELU).
    STELLA = packed("up_gate_proj", PackedOrder::UpGate), "down_proj", [IfPresent, Required];
    /// `dense_h_to_4h` (gate first), `dense_4h_to_h`: ChatGLM, CodeGeeX4, GLM-4 (SiLU). Told from
    /// [`Naming::GPT_NEOX`] by its shape.
    CHATGLM = packed("dense_h_to_4h", PackedOrder::GateUp), "dense_4h_to_h", [IfPresent, IfPresent];
    /// `input_linear` (gate first), `output_linear`: `shared_mlp` of Granite's hybrid models (SiLU).
    GRANITE_HYBRID = packed("input_linear", PackedOrder::GateUp), "output_linear", [IfPresent, IfPresent];
    /// `fc1` (up first), `fc2`: Based (SiLU). Told from [`Naming::FC1_FC2`] by its shape.
    BASED = packed("fc1", PackedOrder::UpGate), "fc2", [IfPresent, IfPresent];
    /// `Wi` (gate first), `Wo`: ModernBERT (GELU).
    MODERN_BERT = packed("Wi", PackedOrder::GateUp), "Wo", [IfPresent, IfPresent];
    /// `gated_layers` (gate first), `wo` with a bias: Jina BERT v2 (GELU); residual and norm are the model's.
    JINA_BERT = packed("gated_layers", PackedOrder::GateUp), "wo", [IfPresent, Required];
    /// `linear_in` (gate first), `linear_out`: `gating` of Mimi and Moshi (SiLU).
    MIMI = packed("linear_in", PackedOrder::GateUp), "linear_out", [IfPresent, IfPresent];
    /// `net.0.proj` (up first), `net.2`: diffusers' GEGLU and SwiGLU, Stable Diffusion (GELU, in candle its tanh
    /// form). Told from [`Naming::DIFFUSERS_PLAIN`] by its shape.
    DIFFUSERS = packed("net.0.proj", PackedOrder::UpGate), "net.2", [IfPresent, IfPresent];
    /// `net.0` (up first), `net.2`: NV-Embed's latent attention (tanh GELU).
    NV_EMBED = packed("net.0", PackedOrder::UpGate), "net.2", [IfPresent, IfPresent];
    /// `ffn_up` (gate first), `ffn_down`: Phi-3 and GLM-4 in GGUF files, dequantized (SiLU). Told from
    /// [`Naming::GGUF_PLAIN`] by its shape.
    GGUF_PACKED = packed("ffn_up", PackedOrder::GateUp), "ffn_down", [IfPresent, IfPresent];

    // Plain.

    /// `fc1`, `fc2`: CLIP (quick GELU), SigLIP, BLIP, BEiT, DINOv2, Hiera, Whisper, Marian, TrOCR, OPT, Phi,
    /// diffusion transformers, Mimi (GELU in either form, or ReLU).
    FC1_FC2 = plain("fc1"), "fc2", [IfPresent, IfPresent];
    /// `c_fc`, `c_proj`: OpenCLIP, GPT-BigCode, StarCoder2, MetaVoice (GELU in either form). Told from
    /// [`Naming::GPT2`] by its shape.
    OPEN_CLIP = plain("c_fc"), "c_proj", [IfPresent, IfPresent];
    /// `c_fc`, `c_proj`, both with biases and with weights of `[in_features, out_features]`: GPT-2 (tanh GELU).
    GPT2 = plain("c_fc"), "c_proj", [Required, Required], transposed;
    /// `fc_in`, `fc_out`: GPT-J, CodeGen (tanh GELU).
    GPT_J = plain("fc_in"), "fc_out", [IfPresent, IfPresent];
    /// `dense_h_to_4h`, `dense_4h_to_h`: GPT-NeoX, BLOOM, Falcon (GELU in either form).
    GPT_NEOX = plain("dense_h_to_4h"), "dense_4h_to_h", [IfPresent, IfPresent];
    /// `intermediate.dense`, `output.dense` under the layer's prefix, both with biases: BERT, RoBERTa, DeBERTa, ViT,
    /// BLIP's text model (GELU); residual and norm are the model's.
    BERT = plain("intermediate.dense"), "output.dense", [Required, Required];
    /// `lin1`, `lin2`, both with biases: DistilBERT, Segment Anything (GELU).
    DISTIL_BERT = plain("lin1"), "lin2", [Required, Required];
    /// `linear_fc1`, `linear_fc2`: Qwen-VL's vision models (GELU in either form, or SiLU).
    QWEN_VISION = plain("linear_fc1"), "linear_fc2", [IfPresent, IfPresent];
    /// `wi`, `wo`: the first T5 (ReLU).
    T5 = plain("wi"), "wo", [IfPresent, IfPresent];
    /// `up_proj`, `down_proj` and no `gate_proj`: MPT (GELU), Nemotron (squared ReLU).
    MPT = plain("up_proj"), "down_proj", [IfPresent, IfPresent];
    /// `0`, `2`, the children of a sequence: FLUX's `img_mlp` and `txt_mlp` (tanh GELU), LLaVA's `mm_projector` (GELU).
    SEQUENTIAL = plain("0"), "2", [IfPresent, IfPresent];
    /// `linear_1`, `linear_2`: multimodal projectors, of LLaVA and Pixtral in transformers' format (GELU).
    PROJECTOR = plain("linear_1"), "linear_2", [IfPresent, IfPresent];
    /// `in_layer`, `out_layer`: FLUX's embedders of time, guidance and pooled text (SiLU).
    FLUX_EMBEDDER = plain("in_layer"), "out_layer", [IfPresent, IfPresent];
    /// `ffw_layer_1`, `ffw_layer_2`: Gemma's audio model (SiLU); clamp, norm and scale are the model's.
    GEMMA_AUDIO = plain("ffw_layer_1"), "ffw_layer_2", [IfPresent, IfPresent];
    /// `key`, `value`: `feed_forward` of RWKV (squared ReLU); token shift and receptance are the model's.
    RWKV = plain("key"), "value", [IfPresent, IfPresent];
    /// `net.0.proj`, `net.2`: diffusers' feed-forward without a gate (GELU in either form).
    DIFFUSERS_PLAIN = plain("net.0.proj"), "net.2", [IfPresent, IfPresent];
    /// `ffn_up`, `ffn_down` and no `ffn_gate`: Phi-2, Falcon, GPT-2 and others in GGUF files, dequantized (tanh GELU).
    GGUF_PLAIN = plain("ffn_up"), "ffn_down", [IfPresent, IfPresent];
}

/// An MLP's sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub in_features: usize,
    pub intermediate_size: usize,
    pub out_features: usize,
}

/// Makes a fresh `[in_features, out_features]` weight as candle makes a `[out_features, in_features]` one.
const TRANSPOSED_KAIMING_NORMAL: Init =
    Init::Kaiming { dist: NormalOrUniform::Normal, fan: FanInOut::FanOut, non_linearity: NonLinearity::ReLU };

impl Naming {
    /// Names of a plain MLP's layers, relative to the prefix and without `.weight`; biases if present.
    pub fn plain(fc1: impl Into<Cow<'static, str>>, fc2: impl Into<Cow<'static, str>>) -> Self {
        Self::custom(First::Plain(fc1.into()), fc2.into())
    }

    /// Names of a gated MLP's layers, relative to the prefix and without `.weight`; biases if present.
    pub fn gated(
        gate: impl Into<Cow<'static, str>>,
        up: impl Into<Cow<'static, str>>,
        down: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::custom(First::Separate { gate: gate.into(), up: up.into() }, down.into())
    }

    /// Names of a gated MLP's layers, gate and up packed, relative to the prefix and without `.weight`; biases if
    /// present.
    pub fn packed(
        gate_up: impl Into<Cow<'static, str>>,
        order: PackedOrder,
        down: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::custom(First::Packed { gate_up: gate_up.into(), order }, down.into())
    }

    fn custom(first: First, second: Name) -> Self {
        let (first_bias, second_bias) = (Bias::IfPresent, Bias::IfPresent);
        Self { preset: None, first, second, first_bias, second_bias, transposed: false }
    }

    /// The same names with other expectations of biases: the first layer's (gate and up alike) and the second's.
    pub fn with_bias(self, first: Bias, second: Bias) -> Self {
        Self { first_bias: first, second_bias: second, ..self }
    }

    /// The same names with weights of `[in_features, out_features]`, as transformers' `Conv1D` has them. They are read
    /// through a transposed view and never copied.
    pub fn with_transposed_weights(self) -> Self {
        Self { transposed: true, ..self }
    }

    /// The name of the constant that this is, or was made from.
    pub fn preset(&self) -> Option<&'static str> {
        self.preset
    }

    /// Whether it is of a gated MLP, so of a [`FusedSwiGlu`](crate::FusedSwiGlu).
    pub fn is_gated(&self) -> bool {
        !matches!(self.first, First::Plain(_))
    }

    /// How gate and up are packed, where they are.
    pub fn order(&self) -> Option<PackedOrder> {
        match self.first {
            First::Packed { order, .. } => Some(order),
            _ => None,
        }
    }

    /// Whether weights are `[in_features, out_features]`.
    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// What is expected of the first layer's biases and of the second's.
    pub fn biases(&self) -> (Bias, Bias) {
        (self.first_bias, self.second_bias)
    }

    /// The layers' names: `fc1, fc2`, or `gate, up, down`, or `gate_up, down`.
    pub fn layers(&self) -> Vec<&str> {
        match &self.first {
            First::Plain(name) | First::Packed { gate_up: name, .. } => vec![name, &self.second],
            First::Separate { gate, up } => vec![gate, up, &self.second],
        }
    }

    /// The naming of [`Naming::ALL`] under which `vb` has an MLP of this input and intermediate size.
    ///
    /// It is told by the names that are there; where those fit several (`fc1` may be packed), by the first layer's
    /// shape. Sizes are not checked otherwise: reading does that.
    ///
    /// # Errors
    /// No naming fits: the message says which tensors were looked for, under the whole prefix. Or several do: of
    /// `c_fc` with as many inputs as outputs nothing tells whether it is transposed, so name [`Naming::GPT2`] or
    /// [`Naming::OPEN_CLIP`] then.
    pub fn detect(hidden_size: usize, intermediate_size: usize, vb: &VarBuilder) -> Result<Self> {
        let is_there = |layer: &&str| vb.contains_tensor(&weight(layer));
        let named: Vec<&Self> = Self::ALL.iter().filter(|naming| naming.layers().iter().all(is_there)).collect();
        // A gated MLP's names may include a plain one's: `gate_proj`, `up_proj`, `down_proj`.
        let within = |a: &Self, b: &Self| {
            let (a, b) = (a.layers(), b.layers());
            a.len() < b.len() && a.iter().all(|layer| b.contains(layer))
        };
        let named: Vec<&Self> = named.iter().filter(|a| !named.iter().any(|b| within(a, b))).copied().collect();
        let prefix = vb.prefix();
        match named.as_slice() {
            [] => {
                let dot = if prefix.is_empty() { "" } else { "." };
                let mut tried: Vec<String> = Vec::new();
                for naming in Self::ALL {
                    let names = format!("{prefix}{dot}{{{}}}.weight", naming.layers().join(", "));
                    if !tried.contains(&names) {
                        tried.push(names);
                    }
                }
                let mut present: Vec<&str> = Self::ALL.iter().flat_map(Self::layers).filter(is_there).collect();
                present.sort_unstable();
                present.dedup();
                let present = match present.as_slice() {
                    [] => "none of their tensors".to_string(),
                    some => format!("only {prefix}{dot}{{{}}}.weight", some.join(", ")),
                };
                bail!("no MLP at prefix {prefix:?}: expected one of {}; found {present}", tried.join(", "))
            }
            [naming] => Ok((*naming).clone()),
            several => {
                let mut fitting = Vec::new();
                let mut misfits = Vec::new();
                for naming in several {
                    match naming.first_weight(hidden_size, intermediate_size, vb) {
                        Ok(_) => fitting.push(*naming),
                        Err(error) => {
                            // What follows the first line is a backtrace, if candle takes them.
                            let error = error.to_string();
                            misfits.push(format!("{naming}: {}", error.lines().next().unwrap_or_default()));
                        }
                    }
                }
                match fitting.as_slice() {
                    [naming] => Ok((*naming).clone()),
                    [] => bail!(
                        "no MLP of hidden size {hidden_size} and intermediate size {intermediate_size} at prefix \
                         {prefix:?}: {}",
                        misfits.join("; ")
                    ),
                    several => {
                        let several: Vec<String> = several.iter().map(|naming| naming.to_string()).collect();
                        bail!(
                            "more than one naming fits the MLP at prefix {prefix:?}, so name one of them: {}",
                            several.join("; ")
                        )
                    }
                }
            }
        }
    }

    /// The first layer's first weight: an error if its shape is another than this naming's.
    fn first_weight(&self, hidden_size: usize, intermediate_size: usize, vb: &VarBuilder) -> Result<Tensor> {
        let rows = match self.first {
            First::Packed { .. } => twice(intermediate_size)?,
            _ => intermediate_size,
        };
        let shape = if self.transposed { (hidden_size, rows) } else { (rows, hidden_size) };
        vb.get(shape, &weight(self.layers()[0]))
    }

    /// A plain MLP's layers.
    ///
    /// # Errors
    /// A naming of a gated MLP; a tensor that is missing, of another shape, or there though excluded.
    pub(super) fn plain_layers(&self, sizes: Sizes, vb: &VarBuilder) -> Result<(Linear, Linear)> {
        let First::Plain(fc1) = &self.first else {
            bail!(
                "FusedMlp: expected a naming of a plain MLP, found {self} at prefix {:?}: use FusedSwiGlu",
                vb.prefix()
            );
        };
        Ok((self.first_layer(fc1, sizes.intermediate_size, sizes, vb)?, self.second_layer(sizes, vb)?))
    }

    /// A gated MLP's layers.
    ///
    /// # Errors
    /// A naming of a plain MLP; a tensor that is missing, of another shape, or there though excluded.
    pub(super) fn gated_layers(&self, sizes: Sizes, vb: &VarBuilder) -> Result<(GateUp, Linear)> {
        let gate_up = match &self.first {
            First::Plain(_) => {
                bail!(
                    "FusedSwiGlu: expected a naming of a gated MLP, found {self} at prefix {:?}: use FusedMlp",
                    vb.prefix()
                );
            }
            First::Separate { gate, up } => GateUp::Separate {
                gate: self.first_layer(gate, sizes.intermediate_size, sizes, vb)?,
                up: self.first_layer(up, sizes.intermediate_size, sizes, vb)?,
            },
            First::Packed { gate_up, order } => GateUp::Packed {
                linear: self.first_layer(gate_up, twice(sizes.intermediate_size)?, sizes, vb)?,
                order: *order,
            },
        };
        Ok((gate_up, self.second_layer(sizes, vb)?))
    }

    fn first_layer(&self, name: &str, rows: usize, sizes: Sizes, vb: &VarBuilder) -> Result<Linear> {
        linear(sizes.in_features, rows, self.first_bias, self.transposed, vb.pp(name))
    }

    fn second_layer(&self, sizes: Sizes, vb: &VarBuilder) -> Result<Linear> {
        linear(sizes.intermediate_size, sizes.out_features, self.second_bias, self.transposed, vb.pp(&self.second))
    }
}

impl fmt::Display for Naming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(preset) = self.preset {
            write!(f, "{preset}: ")?;
        }
        let kind = match &self.first {
            First::Plain(_) => "plain",
            First::Separate { .. } => "gated",
            First::Packed { order: PackedOrder::GateUp, .. } => "packed, gate first",
            First::Packed { order: PackedOrder::UpGate, .. } => "packed, up first",
        };
        let transposed = if self.transposed { ", transposed" } else { "" };
        write!(f, "{} ({kind}{transposed})", self.layers().join(", "))
    }
}

fn weight(layer: &str) -> String {
    format!("{layer}.weight")
}

fn twice(intermediate_size: usize) -> Result<usize> {
    match intermediate_size.checked_mul(2) {
        Some(rows) => Ok(rows),
        None => bail!("expected an intermediate size whose double fits in usize, found {intermediate_size}"),
    }
}

/// Reads (in a `VarMap`, makes) a layer, as candle's `linear` does.
fn linear(in_features: usize, out_features: usize, bias: Bias, transposed: bool, vb: VarBuilder) -> Result<Linear> {
    let weight = if transposed {
        vb.get_with_hints((in_features, out_features), "weight", TRANSPOSED_KAIMING_NORMAL)?.t()?
    } else {
        vb.get_with_hints((out_features, in_features), "weight", DEFAULT_KAIMING_NORMAL)?
    };
    let wanted = match bias {
        Bias::Required => true,
        Bias::IfPresent => vb.contains_tensor("bias"),
        Bias::Absent if vb.contains_tensor("bias") => bail!("expected no bias, found {}.bias", vb.prefix()),
        Bias::Absent => false,
    };
    let bias = if wanted {
        let bound = 1. / (in_features as f64).sqrt();
        Some(vb.get_with_hints(out_features, "bias", Init::Uniform { lo: -bound, up: bound })?)
    } else {
        None
    };
    Ok(Linear::new(weight, bias))
}
