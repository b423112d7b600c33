//! The MLP of every model family of candle-transformers 0.11.1, under its own names, against the formula in its file.
//!
//! A row of the table is a formula as a file states it, read there and written out by candle's ops, with nothing of this
//! crate's in it; the naming that loads its weights; and the activation that goes with it here. Weights are random. Where
//! the file's own module is public, the module itself is run as well ([`public_modules`]).
//!
//! What to mind:
//! - "gelu" is the erf form in `bert.rs`, but the tanh form in `distilbert.rs`, `dinov2.rs`, `beit.rs`, `hiera.rs`,
//!   `whisper`, `falcon.rs`, `bigcode.rs` and `stable_diffusion`, since `Tensor::gelu` is the tanh form.
//! - The gate is the second half in `based.rs`, `stable_diffusion/attention.rs`, `nvembed_v2/model.rs` and Stella's small
//!   variant, and the first half elsewhere.
//! - `nomic_bert.rs` has its gate in `fc12`, and `fc11` is what it is multiplied with.
//! - `quantized_gemma3.rs` has SiLU where `gemma3.rs` has the tanh GELU of the configuration.
//! - `recurrent_gemma.rs` has half of its configuration's `intermediate_size`.
//!
//! What is not here, for no two layers with an elementwise function between them can replace it:
//! - `eva2.rs` has a norm, `segformer.rs` a convolution between the layers; `rwkv_v7.rs` in its variants a and b a second
//!   gate (without it, it is as `rwkv_v6.rs`).
//! - `flux` in its single blocks has the MLP's layers merged with those of the attention.
//! - `efficientvit.rs`, `fastvit.rs`, `mobileclip.rs`, `wuerstchen` and the convolutional variant of `convnext.rs` have
//!   convolutions of 1 x 1 over channels that come first.
//! - `segment_anything/mask_decoder.rs` and LLaVA's `mlp3x_gelu` have three layers.
//! - Of mixtures of experts, an expert and a shared expert are here; routing is the model's.
//! - Quantized files multiply with quantized weights. Dequantized, these load under the same names as here: under those of
//!   the model's other file, or of GGUF.
//! - `with_tracing.rs`, `colpali.rs`, `paligemma.rs`, `depth_anything_v2.rs` have the MLPs of models above.
//!   `mamba.rs`, `mamba2.rs`, `persimmon.rs` (a configuration only), codecs and image convolution networks have none.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_fused_mlp::{fused_projector, fused_swiglu, Activation, IntoActivation, Naming};
use candle_nn::{Activation as Config, LayerNorm, Linear, VarBuilder};
use candle_transformers::models::{
    debertav2, llava, mimi, mmdit, pixtral, segment_anything, stable_diffusion, voxtral, z_image,
};
use common::*;
use std::collections::HashMap;

/// Which layers have biases.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Biases {
    None,
    All,
    /// The second layer only.
    Second,
    /// A configuration decides: with and without.
    Either,
}
use Biases::{All, Either, Second};

/// An activation, as a file has it.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// A function that the file calls, and its name here.
    Call(fn(&Tensor) -> Result<Tensor>, Activation),
    /// candle's enum, out of a configuration.
    Config(Config),
}
use Act::Call;

impl Act {
    fn of_candle(self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Call(function, _) => function(xs),
            Act::Config(activation) => activation.forward(xs),
        }
    }

    fn here(self) -> Result<Activation> {
        match self {
            Call(_, activation) => Ok(activation),
            Act::Config(activation) => activation.into_activation(),
        }
    }
}

fn quick_gelu(xs: &Tensor) -> Result<Tensor> {
    xs * candle_nn::ops::sigmoid(&(xs * 1.702f64)?)?
}

fn relu_squared(xs: &Tensor) -> Result<Tensor> {
    xs.relu()?.sqr()
}

const SILU: Act = Call(candle_nn::ops::silu, Activation::Silu);
const GELU_ERF: Act = Call(Tensor::gelu_erf, Activation::Gelu);
const GELU_TANH: Act = Call(Tensor::gelu, Activation::GeluTanh);
const QUICK_GELU: Act = Call(quick_gelu, Activation::QuickGelu);
const RELU: Act = Call(Tensor::relu, Activation::Relu);
const RELU_SQUARED: Act = Call(relu_squared, Activation::Relu2);

/// What a file computes of its layers.
#[derive(Clone, Copy, Debug)]
enum Formula {
    /// The third of the activation of the first, times the second.
    Gated(&'static str, &'static str, &'static str),
    /// The second of the activation of the first's first half, times its second half.
    GateFirst(&'static str, &'static str),
    /// The second of the first's first half, times the activation of its second half.
    GateLast(&'static str, &'static str),
    /// The second of the activation of the first.
    Plain(&'static str, &'static str),
    /// [`Plain`](Formula::Plain), whose first layer's output size is also the output's, and the input's another.
    Projector(&'static str, &'static str),
}
use Formula::*;

/// Files that state the same: their names under `src/models`, and where in a checkpoint one of them has it.
struct Family {
    files: &'static [&'static str],
    prefix: &'static str,
    formula: Formula,
    biases: Biases,
    acts: &'static [Act],
    naming: Naming,
}

const fn family(
    files: &'static [&'static str],
    prefix: &'static str,
    formula: Formula,
    biases: Biases,
    acts: &'static [Act],
    naming: Naming,
) -> Family {
    Family { files, prefix, formula, biases, acts, naming }
}

/// `gate_proj`, `up_proj`, `down_proj`.
const PROJ: Formula = Gated("gate_proj", "up_proj", "down_proj");
const DENSE: Formula = Plain("intermediate.dense", "output.dense");
const FC: Formula = Plain("fc1", "fc2");
const NONE: Biases = Biases::None;

#[rustfmt::skip] // a row a line
fn families() -> Vec<Family> {
    const CONFIG_SILU: Act = Act::Config(Config::Silu);
    const CONFIG_GELU: Act = Act::Config(Config::Gelu);
    const CONFIG_NEW_GELU: Act = Act::Config(Config::NewGelu);
    const CONFIG_TANH: Act = Act::Config(Config::GeluPytorchTanh);
    const CONFIG_RELU: Act = Act::Config(Config::Relu);
    const CONFIG_SWISH: Act = Act::Config(Config::Swish);
    vec![
        // Gated, three matrices.
        family(&["llama", "granite", "voxtral/voxtral_llama", "llama2_c", "quantized_llama2_c"], "model.layers.0.mlp", PROJ, NONE, &[SILU], Naming::LLAMA),
        family(&["mistral", "qwen2", "qwen3", "yi", "olmo", "olmo2", "stable_lm", "deepseek2", "nvembed_v2/embedding", "z_image/text_encoder",
            "qwen3_vl/text", "pixtral/vision_model", "stella_en_v5 (large)", "quantized_mistral", "quantized_stable_lm"],
            "model.layers.0.mlp", PROJ, NONE, &[CONFIG_SILU], Naming::LLAMA),
        family(&["helium", "smol/smollm3", "paddleocr_vl/text"], "model.layers.0.mlp", PROJ, Either, &[CONFIG_SILU], Naming::LLAMA),
        family(&["gemma", "gemma2", "gemma3", "gemma4/vision"], "model.layers.0.mlp", PROJ, NONE, &[CONFIG_TANH], Naming::LLAMA),
        family(&["gemma4/text"], "model.layers.0.mlp", PROJ, Either, &[CONFIG_TANH], Naming::LLAMA),
        family(&["recurrent_gemma", "quantized_recurrent_gemma"], "model.layers.0.mlp_block", PROJ, All, &[CONFIG_TANH], Naming::LLAMA),
        family(&["qwen2_moe", "qwen3_moe", "deepseek2 (experts)", "../fused_moe"], "model.layers.0.mlp.experts.3", PROJ, NONE, &[CONFIG_SILU], Naming::LLAMA),
        family(&["qwen2_moe (shared)"], "model.layers.0.mlp.shared_expert", PROJ, NONE, &[CONFIG_SILU], Naming::LLAMA),
        family(&["deepseek2 (shared)"], "model.layers.0.mlp.shared_experts", PROJ, NONE, &[CONFIG_SILU], Naming::LLAMA),
        family(&["mixtral"], "model.layers.0.block_sparse_moe.experts.3", Gated("w1", "w3", "w2"), NONE, &[CONFIG_SILU], Naming::MIXTRAL),
        family(&["csm"], "backbone.layers.0.mlp", Gated("w1", "w3", "w2"), NONE, &[SILU], Naming::MIXTRAL),
        family(&["lfm2", "z_image/transformer"], "layers.0.feed_forward", Gated("w1", "w3", "w2"), NONE, &[SILU], Naming::MIXTRAL),
        family(&["metavoice (transformer)", "quantized_metavoice"], "layers.0.feed_forward", Gated("swiglu.w1", "swiglu.w3", "w2"), NONE, &[SILU], Naming::METAVOICE),
        family(&["metavoice (gpt, swiglu)"], "transformer.h.0.mlp", Gated("w1", "w3", "c_proj"), Either, &[SILU], Naming::METAVOICE_GPT),
        family(&["nomic_bert"], "encoder.layers.0.mlp", Gated("fc12", "fc11", "fc2"), Either, &[SILU], Naming::NOMIC_BERT),
        family(&["t5 (gated)", "quantized_t5"], "encoder.block.0.layer.1.DenseReluDense", Gated("wi_0", "wi_1", "wo"), NONE, &[CONFIG_NEW_GELU, CONFIG_SILU], Naming::T5_GATED),
        family(&["quantized_llama", "quantized_qwen2", "quantized_qwen3", "quantized_qwen3_moe", "quantized_lfm2", "quantized_gemma3", "smol/quantized_smollm3"],
            "blk.0", Gated("ffn_gate", "ffn_up", "ffn_down"), NONE, &[SILU], Naming::GGUF),

        // Gated, packed.
        family(&["phi3", "glm4_new"], "model.layers.0.mlp", GateFirst("gate_up_proj", "down_proj"), NONE, &[CONFIG_SILU], Naming::PHI3),
        family(&["chatglm", "codegeex4_9b", "glm4"], "transformer.encoder.layers.0.mlp", GateFirst("dense_h_to_4h", "dense_4h_to_h"), Either, &[SILU], Naming::CHATGLM),
        family(&["granitemoehybrid"], "model.layers.0.shared_mlp", GateFirst("input_linear", "output_linear"), NONE, &[SILU], Naming::GRANITE_HYBRID),
        family(&["based"], "transformer.layers.0.mlp", GateLast("fc1", "fc2"), NONE, &[SILU], Naming::BASED),
        family(&["modernbert"], "model.layers.0.mlp", GateFirst("Wi", "Wo"), NONE, &[GELU_ERF], Naming::MODERN_BERT),
        family(&["jina_bert"], "encoder.layer.0.mlp", GateFirst("gated_layers", "wo"), Second, &[CONFIG_GELU], Naming::JINA_BERT),
        family(&["mimi/transformer (gating)"], "layers.0.gating", GateFirst("linear_in", "linear_out"), NONE, &[CONFIG_SILU], Naming::MIMI),
        family(&["stable_diffusion/attention"], "transformer_blocks.0.ff", GateLast("net.0.proj", "net.2"), All, &[GELU_TANH], Naming::DIFFUSERS),
        family(&["nvembed_v2/model"], "latent_attention_model.cross_attend_blocks.1.fn", GateLast("net.0", "net.2"), All, &[GELU_TANH], Naming::NV_EMBED),
        family(&["stella_en_v5 (small)"], "encoder.layer.0.mlp", GateLast("up_gate_proj", "down_proj"), Second, &[CONFIG_GELU], Naming::STELLA),
        family(&["quantized_phi3", "quantized_glm4"], "blk.0", GateFirst("ffn_up", "ffn_down"), NONE, &[SILU], Naming::GGUF_PACKED),

        // Plain.
        family(&["bert", "debertav2"], "encoder.layer.0", DENSE, All, &[GELU_ERF, GELU_TANH, RELU], Naming::BERT),
        family(&["xlm_roberta", "blip_text", "quantized_blip_text", "vit"], "encoder.layer.0", DENSE, All, &[CONFIG_GELU], Naming::BERT),
        family(&["chinese_clip/text_model"], "encoder.layer.0", DENSE, All, &[QUICK_GELU, GELU_ERF, GELU_TANH, RELU], Naming::BERT),
        family(&["distilbert"], "transformer.layer.0.ffn", Plain("lin1", "lin2"), All, &[GELU_TANH, RELU], Naming::DISTIL_BERT),
        family(&["segment_anything"], "blocks.0.mlp", Plain("lin1", "lin2"), All, &[CONFIG_GELU, CONFIG_RELU], Naming::DISTIL_BERT),
        family(&["clip/text_model", "clip/vision_model"], "text_model.encoder.layers.0.mlp", FC, All, &[QUICK_GELU], Naming::FC1_FC2),
        family(&["chinese_clip/vision_model"], "vision_model.encoder.layers.0.mlp", FC, All, &[QUICK_GELU, GELU_ERF, GELU_TANH, RELU], Naming::FC1_FC2),
        family(&["stable_diffusion/clip"], "text_model.encoder.layers.0.mlp", FC, All, &[QUICK_GELU, GELU_TANH, GELU_ERF], Naming::FC1_FC2),
        family(&["openclip/text_model"], "transformer.resblocks.0.mlp", Plain("c_fc", "c_proj"), All, &[GELU_ERF], Naming::OPEN_CLIP),
        family(&["siglip", "moondream", "quantized_moondream", "paddleocr_vl/vision"], "encoder.layers.0.mlp", FC, All, &[CONFIG_TANH], Naming::FC1_FC2),
        family(&["blip", "quantized_blip", "mixformer", "quantized_mixformer", "voxtral/model"], "encoder.layers.0.mlp", FC, All, &[CONFIG_GELU, CONFIG_NEW_GELU], Naming::FC1_FC2),
        family(&["mmdit/projections"], "joint_blocks.0.x_block.mlp", FC, All, &[CONFIG_TANH], Naming::FC1_FC2),
        family(&["beit", "dinov2", "dinov2reg4", "hiera", "segment_anything/tiny_vit"], "blocks.0.mlp", FC, All, &[GELU_TANH], Naming::FC1_FC2),
        family(&["convnext (linear)"], "stages.0.blocks.0.mlp", FC, All, &[GELU_ERF], Naming::FC1_FC2),
        family(&["whisper/model", "whisper/quantized_model"], "model.encoder.layers.0", FC, All, &[GELU_TANH], Naming::FC1_FC2),
        family(&["marian"], "model.decoder.layers.0", FC, All, &[CONFIG_RELU, CONFIG_SWISH], Naming::FC1_FC2),
        family(&["trocr", "parler_tts"], "model.decoder.layers.0", FC, NONE, &[CONFIG_GELU], Naming::FC1_FC2),
        family(&["phi"], "model.layers.0.mlp", FC, All, &[CONFIG_NEW_GELU], Naming::FC1_FC2),
        family(&["mimi/transformer (no gating)"], "layers.0.mlp", FC, Either, &[GELU_ERF], Naming::FC1_FC2),
        family(&["qwen3_vl/vision"], "blocks.0.mlp", Plain("linear_fc1", "linear_fc2"), All, &[CONFIG_GELU, CONFIG_TANH], Naming::QWEN_VISION),
        family(&["t5"], "encoder.block.0.layer.1.DenseReluDense", Plain("wi", "wo"), NONE, &[CONFIG_RELU], Naming::T5),
        family(&["falcon"], "transformer.h.0.mlp", Plain("dense_h_to_4h", "dense_4h_to_h"), Either, &[GELU_TANH], Naming::GPT_NEOX),
        family(&["bigcode"], "transformer.h.0.mlp", Plain("c_fc", "c_proj"), All, &[GELU_TANH], Naming::OPEN_CLIP),
        family(&["starcoder2"], "model.layers.0.mlp", Plain("c_fc", "c_proj"), Either, &[CONFIG_TANH], Naming::OPEN_CLIP),
        family(&["metavoice (gpt, gelu)"], "transformer.h.0.mlp", Plain("c_fc", "c_proj"), Either, &[GELU_TANH], Naming::OPEN_CLIP),
        family(&["mpt", "quantized_mpt"], "transformer.blocks.0.ffn", Plain("up_proj", "down_proj"), NONE, &[GELU_ERF], Naming::MPT),
        family(&["flux/model", "flux/quantized_model"], "double_blocks.0.img_mlp", Plain("0", "2"), All, &[GELU_TANH], Naming::SEQUENTIAL),
        family(&["gemma4/audio"], "conformer.0.ffw_layer_start", Plain("ffw_layer_1", "ffw_layer_2"), NONE, &[SILU], Naming::GEMMA_AUDIO),
        family(&["rwkv_v5", "rwkv_v6", "rwkv_v7", "quantized_rwkv_v5", "quantized_rwkv_v6"], "rwkv.blocks.0.feed_forward", Plain("key", "value"), NONE, &[RELU_SQUARED], Naming::RWKV),
        family(&["quantized_phi"], "blk.0", Plain("ffn_up", "ffn_down"), All, &[GELU_TANH], Naming::GGUF_PLAIN),

        // Plain, between the parts of a model.
        family(&["llava (hf)", "pixtral/llava"], "multi_modal_projector", Projector("linear_1", "linear_2"), All, &[CONFIG_GELU], Naming::PROJECTOR),
        family(&["llava"], "model.mm_projector", Projector("0", "2"), All, &[CONFIG_GELU], Naming::SEQUENTIAL),
        family(&["voxtral/model (projector)"], "multi_modal_projector", Projector("linear_1", "linear_2"), NONE, &[CONFIG_GELU, CONFIG_RELU], Naming::PROJECTOR),
        family(&["paddleocr_vl/vision (projector)"], "mlp_AR", Projector("linear_1", "linear_2"), All, &[GELU_TANH], Naming::PROJECTOR),
        family(&["stable_diffusion/embeddings"], "time_embedding", Projector("linear_1", "linear_2"), All, &[SILU], Naming::PROJECTOR),
        family(&["mmdit/embedding", "z_image/transformer (time)"], "t_embedder.mlp", Projector("0", "2"), All, &[SILU], Naming::SEQUENTIAL),
        family(&["flux/model (embedders)", "flux/quantized_model (embedders)"], "time_in", Projector("in_layer", "out_layer"), All, &[SILU], Naming::FLUX_EMBEDDER),
    ]
}

const HIDDEN: usize = 24;
const INTERMEDIATE: usize = 40;

/// Sizes of the input, between the layers, and of the output.
type Sizes = (usize, usize, usize);

impl Formula {
    fn is_gated(self) -> bool {
        matches!(self, Gated(..) | GateFirst(..) | GateLast(..))
    }

    fn sizes(self) -> Sizes {
        (HIDDEN, INTERMEDIATE, if matches!(self, Projector(..)) { INTERMEDIATE } else { HIDDEN })
    }

    /// Random weights, f64, by name; whether the first layer and the second have biases.
    fn weights(self, random: &mut Random, bias: (bool, bool)) -> Result<HashMap<String, Tensor>> {
        let (input, between, output) = self.sizes();
        let (first, second) = ((between, input), (output, between));
        let layers = match self {
            Gated(gate, up, down) => vec![(gate, first, bias.0), (up, first, bias.0), (down, second, bias.1)],
            GateFirst(packed, down) | GateLast(packed, down) => {
                vec![(packed, (2 * between, input), bias.0), (down, second, bias.1)]
            }
            Plain(fc1, fc2) | Projector(fc1, fc2) => vec![(fc1, first, bias.0), (fc2, second, bias.1)],
        };
        let mut weights = HashMap::new();
        for (name, shape, bias) in layers {
            let linear = random.linear(shape, bias, DType::F64, &Device::Cpu)?;
            weights.insert(format!("{name}.weight"), linear.weight().clone());
            if let Some(bias) = linear.bias() {
                weights.insert(format!("{name}.bias"), bias.clone());
            }
        }
        Ok(weights)
    }

    /// What the file computes.
    fn of_candle(self, weights: &HashMap<String, Tensor>, act: Act, xs: &Tensor) -> Result<Tensor> {
        let layer = |name: &str, xs: &Tensor| {
            let bias = weights.get(&format!("{name}.bias")).cloned();
            Linear::new(weights[&format!("{name}.weight")].clone(), bias).forward(xs)
        };
        match self {
            Gated(gate, up, down) => layer(down, &(act.of_candle(&layer(gate, xs)?)? * layer(up, xs)?)?),
            GateFirst(packed, down) | GateLast(packed, down) => {
                let halves = layer(packed, xs)?;
                let first = halves.narrow(D::Minus1, 0, INTERMEDIATE)?;
                let last = halves.narrow(D::Minus1, INTERMEDIATE, INTERMEDIATE)?;
                let (gate, up) = if matches!(self, GateFirst(..)) { (first, last) } else { (last, first) };
                layer(down, &(act.of_candle(&gate)? * up)?)
            }
            Plain(fc1, fc2) | Projector(fc1, fc2) => layer(fc2, &act.of_candle(&layer(fc1, xs)?)?),
        }
    }
}

/// A builder of these weights in this dtype, under `prefix`.
fn builder(weights: &HashMap<String, Tensor>, prefix: &str, dtype: DType) -> VarBuilder<'static> {
    let weights = weights.iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor.clone())).collect();
    VarBuilder::from_tensors(weights, dtype, &Device::Cpu).pp(prefix)
}

/// The module of this crate at `vb`.
fn load(gated: bool, sizes: Sizes, act: Activation, naming: &Naming, vb: VarBuilder) -> Result<Box<dyn Module>> {
    let (input, between, output) = sizes;
    Ok(if gated {
        Box::new(fused_swiglu(input, between, act, naming, vb)?)
    } else {
        Box::new(fused_projector(input, between, output, act, naming, vb)?)
    })
}

#[test]
fn every_family() -> Result<()> {
    let random = &mut Random::new(5);
    for Family { files, prefix, formula, biases, acts, naming } in families() {
        let biases: &[(bool, bool)] = match biases {
            Biases::None => &[(false, false)],
            All => &[(true, true)],
            Second => &[(false, true)],
            Either => &[(false, false), (true, true)],
        };
        for &bias in biases {
            let weights = formula.weights(random, bias)?;
            // Outputs of the first layer up to 3 or so, where the forms of GELU are 5e-4 apart.
            let xs = random.normal(&[2, 3, HIDDEN], 1., DType::F64, &Device::Cpu)?;
            for &act in acts {
                let what = || format!("{files:?} {naming} {act:?} {bias:?}");
                let exact = formula.of_candle(&weights, act, &xs)?;
                for dtype in [DType::F64, DType::F32] {
                    let vb = builder(&weights, prefix, dtype);
                    assert_eq!(Naming::detect(HIDDEN, INTERMEDIATE, &vb)?, naming, "{}", what());
                    let module = load(formula.is_gated(), formula.sizes(), act.here()?, &naming, vb)?;
                    let error = relative_error(&module.forward(&xs.to_dtype(dtype)?)?, &exact)?;
                    assert!(error <= tolerance(dtype), "{} {dtype:?}: {error:e}", what());
                }
            }
        }
    }
    Ok(())
}

/// The forms that are easily taken for each other differ by more than the test allows, so that it can tell them apart.
#[test]
fn a_wrong_row_would_fail() -> Result<()> {
    let random = &mut Random::new(6);
    let xs = random.normal(&[2, 3, HIDDEN], 1., DType::F64, &Device::Cpu)?;
    let weights = GateFirst("fc1", "fc2").weights(random, (true, true))?;
    let differ = |a: (Formula, Act), b: (Formula, Act)| -> Result<()> {
        let apart = relative_error(&a.0.of_candle(&weights, a.1, &xs)?, &b.0.of_candle(&weights, b.1, &xs)?)?;
        assert!(apart > 10. * tolerance(DType::F32), "{a:?} {b:?}: {apart:e}");
        Ok(())
    };
    let (first, last) = (GateFirst("fc1", "fc2"), GateLast("fc1", "fc2"));
    differ((first, SILU), (last, SILU))?;
    for (i, act) in [SILU, GELU_ERF, GELU_TANH, QUICK_GELU, RELU, RELU_SQUARED].into_iter().enumerate() {
        for other in [SILU, GELU_ERF, GELU_TANH, QUICK_GELU, RELU, RELU_SQUARED].into_iter().skip(i + 1) {
            differ((first, act), (first, other))?;
        }
    }
    Ok(())
}

/// A module of candle-transformers beside the row that is to replace it, from the same weights.
fn check(
    name: &str,
    (formula, biases): (Formula, (bool, bool)),
    (naming, act): (Naming, Activation),
    original: impl Fn(VarBuilder<'static>) -> Result<Box<dyn Module>>,
) -> Result<()> {
    let random = &mut Random::new(7);
    let weights = formula.weights(random, biases)?;
    for dtype in [DType::F64, DType::F32] {
        let vb = builder(&weights, "mlp", dtype);
        let xs = random.normal(&[2, 3, HIDDEN], 1., dtype, &Device::Cpu)?;
        let expected = original(vb.clone())?.forward(&xs)?;
        let found = load(formula.is_gated(), formula.sizes(), act, &naming, vb)?.forward(&xs)?;
        let error = relative_error(&found, &expected)?;
        assert!(error <= 2. * tolerance(dtype), "{name} {dtype:?}: {error:e}");
    }
    Ok(())
}

/// `vb` for a module that looks for its tensors under `inner`, where they are at `vb` itself.
fn within(vb: VarBuilder<'static>, inner: &str) -> VarBuilder<'static> {
    let outer = format!("{}.{inner}.", vb.prefix());
    // The builder adds its prefix again.
    vb.rename_f(move |name| name.replacen(&outer, "", 1))
}

#[test]
fn public_modules() -> Result<()> {
    check("mmdit Mlp", (FC, (true, true)), (Naming::FC1_FC2, Activation::GeluTanh), |vb| {
        Ok(Box::new(mmdit::projections::Mlp::new(HIDDEN, INTERMEDIATE, vb)?))
    })?;
    let w = Gated("w1", "w3", "w2");
    check("z_image FeedForward", (w, (false, false)), (Naming::MIXTRAL, Activation::Silu), |vb| {
        Ok(Box::new(z_image::transformer::FeedForward::new(HIDDEN, INTERMEDIATE, vb)?))
    })?;
    let lin = Plain("lin1", "lin2");
    check("segment_anything MlpBlock", (lin, (true, true)), (Naming::DISTIL_BERT, Activation::Gelu), |vb| {
        Ok(Box::new(segment_anything::MlpBlock::new(HIDDEN, INTERMEDIATE, Config::Gelu, vb)?))
    })?;

    let mimi = |gating, bias_ff, dim_feedforward| mimi::transformer::Config {
        d_model: HIDDEN,
        num_heads: 1,
        num_layers: 1,
        causal: true,
        norm_first: true,
        bias_ff,
        bias_attn: false,
        layer_scale: None,
        positional_embedding: mimi::transformer::PositionalEmbedding::None,
        use_conv_block: false,
        cross_attention: false,
        conv_kernel_size: 3,
        use_conv_bias: true,
        gating,
        norm: mimi::NormType::LayerNorm,
        context: 8,
        max_period: 100,
        max_seq_len: 8,
        kv_repeat: 1,
        dim_feedforward,
        conv_layout: false,
    };
    check("mimi Mlp", (FC, (true, true)), (Naming::FC1_FC2, Activation::Gelu), |vb| {
        Ok(Box::new(mimi::transformer::Mlp::new(&mimi(None, true, INTERMEDIATE), within(vb, "mlp"))?))
    })?;
    let packed = GateFirst("linear_in", "linear_out");
    check("mimi Mlp with gating", (packed, (false, false)), (Naming::MIMI, Activation::Silu), |vb| {
        // It has two thirds of this.
        let config = mimi(Some(Config::Silu), false, 3 * INTERMEDIATE / 2);
        Ok(Box::new(mimi::transformer::Mlp::new(&config, within(vb, "gating"))?))
    })?;

    let projector = Projector("linear_1", "linear_2");
    check("voxtral projector", (projector, (false, false)), (Naming::PROJECTOR, Activation::Gelu), |vb| {
        let mut config = voxtral::VoxtralConfig::default();
        config.audio_config.intermediate_size = HIDDEN;
        config.text_config.hidden_size = INTERMEDIATE;
        let projector = voxtral::model::VoxtralMultiModalProjector::new(&config, vb)?;
        Ok(Box::new(candle_nn::func(move |xs| projector.forward(xs))))
    })?;
    check("pixtral projector", (projector, (true, true)), (Naming::PROJECTOR, Activation::Gelu), |vb| {
        let mut vision_config = pixtral::vision_model::Config::pixtral_12b_2409();
        vision_config.hidden_size = HIDDEN;
        let mut text_config = candle_transformers::models::mistral::Config::config_7b_v0_1(false);
        text_config.hidden_size = INTERMEDIATE;
        let config = pixtral::Config {
            projector_hidden_act: Config::Gelu,
            text_config,
            vision_config,
            image_token_index: 0,
            image_seq_length: 1,
        };
        Ok(Box::new(pixtral::llava::MultiModalProjector::new(&config, vb)?))
    })?;
    check("stable_diffusion embedding", (projector, (true, true)), (Naming::PROJECTOR, Activation::Silu), |vb| {
        Ok(Box::new(stable_diffusion::embeddings::TimestepEmbedding::new(vb, HIDDEN, INTERMEDIATE)?))
    })?;
    for (hf, layers, naming, at) in [
        (true, projector, Naming::PROJECTOR, "multi_modal_projector"),
        (false, Projector("0", "2"), Naming::SEQUENTIAL, "model.mm_projector"),
    ] {
        check("llava projector", (layers, (true, true)), (naming, Activation::Gelu), |vb| {
            let config: llava::config::LLaVAConfig = serde_json::from_value(serde_json::json!({
                "architectures": [], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": INTERMEDIATE,
                "image_crop_resolution": 1, "image_grid_pinpoints": [], "image_split_resolution": 1,
                "intermediate_size": 1, "max_position_embeddings": 1, "mm_hidden_size": HIDDEN,
                "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": false, "mm_vision_select_feature": "patch",
                "mm_vision_select_layer": -2, "model_type": "llava", "num_attention_heads": 1, "num_hidden_layers": 1,
                "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
                "torch_dtype": "float16", "use_cache": true, "vocab_size": 1, "hf": hf
            }))
            .map_err(candle_core::Error::wrap)?;
            Ok(Box::new(llava::MMProjector::load(&within(vb, at), &config)?.modules))
        })?;
    }
    Ok(())
}

/// DeBERTa's two halves are public, with the residual and the norm in the second one.
#[test]
fn debertas_layer() -> Result<()> {
    let random = &mut Random::new(8);
    let mut weights = DENSE.weights(random, (true, true))?;
    for name in ["output.LayerNorm.weight", "output.LayerNorm.bias"] {
        weights.insert(name.to_string(), random.normal(&[HIDDEN], 1., DType::F64, &Device::Cpu)?);
    }
    let vb = builder(&weights, "encoder.layer.0", DType::F32);
    let config: debertav2::Config = serde_json::from_value(serde_json::json!({
        "vocab_size": 8, "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": INTERMEDIATE, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 8, "type_vocab_size": 0,
        "initializer_range": 0.02, "layer_norm_eps": 1e-7, "relative_attention": true, "max_relative_positions": -1,
        "position_biased_input": false, "pos_att_type": "p2c|c2p"
    }))
    .map_err(candle_core::Error::wrap)?;
    let (first, second) = (
        debertav2::DebertaV2Intermediate::load(vb.clone(), &config)?,
        debertav2::DebertaV2Output::load(vb.clone(), &config)?,
    );
    let norm = |name: &str| vb.get(HIDDEN, &format!("output.LayerNorm.{name}"));
    let norm = LayerNorm::new(norm("weight")?, norm("bias")?, config.layer_norm_eps);
    let mlp = load(false, (HIDDEN, INTERMEDIATE, HIDDEN), Activation::Gelu, &Naming::BERT, vb.clone())?;
    // candle's norm has no f64.
    let xs = random.normal(&[2, 3, HIDDEN], 1., DType::F32, &Device::Cpu)?;
    let expected = second.forward(&first.forward(&xs)?, &xs)?;
    let error = relative_error(&norm.forward(&(mlp.forward(&xs)? + &xs)?)?, &expected)?;
    assert!(error <= 2. * tolerance(DType::F32), "{error:e}");
    Ok(())
}
