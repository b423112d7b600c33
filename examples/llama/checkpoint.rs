//! Where a model comes from: a Hugging Face folder, a GGUF file, the weights inside the program, or random ones.

use crate::measuring::random::Random;
use crate::model::Config;
use crate::shared::safetensors::{cause, file_of_each_tensor, mapped};
use crate::shared::trained;
use crate::tokenizer;
use anyhow::{anyhow, bail, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use serde_json::json;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tokenizers::Tokenizer;

/// A model that can be loaded.
pub struct Checkpoint {
    pub name: String,
    pub config: Config,
    /// None where weights are random.
    pub tokenizer: Option<Tokenizer>,
    /// The tensors, under Hugging Face's names.
    pub vb: VarBuilder<'static>,
}

impl Checkpoint {
    /// A folder with `config.json`, `model.safetensors` or `model.safetensors.index.json`, and `tokenizer.json` or a
    /// tokenizer in llama2.c's format, `tok<vocabulary>.bin`.
    ///
    /// # Errors
    /// A file that is missing or not what it should be.
    pub fn folder(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).with_context(|| format!("{}: cannot be read", path.display()))
        };
        let config = config(&read("config.json")?).with_context(|| folder.join("config.json").display().to_string())?;
        let index = folder.join("model.safetensors.index.json");
        let files: BTreeSet<PathBuf> = if index.exists() {
            file_of_each_tensor(&index)?.into_values().collect()
        } else {
            [folder.join("model.safetensors")].into()
        };
        let tensors = mapped(&files.into_iter().collect::<Vec<_>>())?;
        let llama2c = folder.join(format!("tok{}.bin", config.vocab_size));
        let tokenizer = if llama2c.exists() {
            tokenizer::from_llama2c(&llama2c, config.vocab_size)?
        } else {
            let json = read("tokenizer.json")?;
            tokenizer::from_json(&json).with_context(|| folder.join("tokenizer.json").display().to_string())?
        };
        Ok(Self {
            name: folder.display().to_string(),
            config,
            tokenizer: Some(tokenizer),
            vb: VarBuilder::from_backend(Box::new(tensors), dtype, device.clone()),
        })
    }

    /// A GGUF file of llama.cpp's architecture `llama`, its tensors dequantised.
    ///
    /// # Errors
    /// A file that is missing, broken or of another architecture.
    pub fn gguf(path: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let shown = path.display();
        let mut file = BufReader::new(File::open(path).with_context(|| format!("{shown}: cannot be read"))?);
        let broken = |error: candle_core::Error| anyhow!("{shown}: not a whole GGUF file: {}", cause(&error));
        let content = Content::read(&mut file).map_err(broken)?;
        let config = gguf_config(&content).with_context(|| shown.to_string())?;
        let (heads, key_heads, _) = config.heads().with_context(|| shown.to_string())?;
        let mut tensors = HashMap::new();
        for name in content.tensor_infos.keys() {
            let tensor =
                content.tensor(&mut file, name, &Device::Cpu).and_then(|tensor| tensor.dequantize(&Device::Cpu));
            let mut tensor = tensor.map_err(broken)?;
            let name = hugging_face_name(name).with_context(|| format!("{shown}: unknown tensor {name}"))?;
            // llama.cpp turns neighbours of a head by one angle, Hugging Face's layout a head's first half and second.
            if name.ends_with("q_proj.weight") {
                tensor = halves(&tensor, heads)?;
            } else if name.ends_with("k_proj.weight") {
                tensor = halves(&tensor, key_heads)?;
            }
            tensors.insert(name, tensor.to_dtype(dtype)?.to_device(device)?);
        }
        Ok(Self {
            name: shown.to_string(),
            config,
            tokenizer: Some(tokenizer::from_gguf(&content).with_context(|| shown.to_string())?),
            vb: VarBuilder::from_tensors(tensors, dtype, device),
        })
    }

    /// The weights that `examples/train` made, inside the program.
    ///
    /// # Errors
    /// None, unless the program was built from broken files.
    pub fn trained(dtype: DType, device: &Device) -> Result<Self> {
        Ok(Self {
            name: "trained on Alice's Adventures in Wonderland by examples/train".to_string(),
            config: config(trained::CONFIG)?,
            tokenizer: Some(tokenizer::from_json(trained::TOKENIZER)?),
            vb: VarBuilder::from_slice_safetensors(trained::WEIGHTS, dtype, device)?,
        })
    }

    /// Seeded random weights of a published model's shape, without a tokenizer; on a GPU made there.
    ///
    /// # Errors
    /// A device without room for them.
    pub fn synthetic(shape: Synthetic, dtype: DType, device: &Device) -> Result<Self> {
        let (name, config) = match shape {
            Synthetic::Llama1b => ("Llama-3.2-1B", llama3((2048, 8192, 16), 64, 32., true)),
            Synthetic::Llama8b => ("Llama-3.1-8B", llama3((4096, 14336, 32), 128, 8., false)),
        };
        if device.is_cuda() {
            device.set_seed(0)?;
        }
        let random = RandomWeights(Mutex::new(Random::new(0)));
        Ok(Self {
            name: format!("random weights of {name}'s shape"),
            config: serde_json::from_value(config)?,
            tokenizer: None,
            vb: VarBuilder::from_backend(Box::new(random), dtype, device.clone()),
        })
    }
}

/// A published model's shape.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Synthetic {
    /// Llama-3.2-1B: 16 layers of 2048 x 8192.
    #[value(name = "1b")]
    Llama1b,
    /// Llama-3.1-8B: 32 layers of 4096 x 14336.
    #[value(name = "8b")]
    Llama8b,
}

fn config(json: &str) -> Result<Config> {
    Ok(serde_json::from_str(json)?)
}

fn llama3(
    (hidden, intermediate, layers): (usize, usize, usize),
    head_dim: usize,
    stretch: f64,
    tied: bool,
) -> serde_json::Value {
    json!({
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": head_dim,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "rope_theta": 500_000.,
        "rope_scaling": {
            "rope_type": "llama3", "factor": stretch, "low_freq_factor": 1., "high_freq_factor": 4.,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": tied,
    })
}

fn gguf_config(content: &Content) -> Result<Config> {
    let value = |key: &str| content.metadata.get(key).with_context(|| format!("no {key} in the metadata"));
    let architecture = value("general.architecture")?.to_string()?;
    if architecture != "llama" {
        bail!("expected architecture llama, found {architecture}");
    }
    if content.tensor_infos.contains_key("rope_freqs.weight")
        || content.metadata.contains_key("llama.rope.scaling.type")
    {
        bail!("expected plain rotary embeddings, found scaled ones: take the Hugging Face folder");
    }
    let number = |key: &str| Ok::<_, anyhow::Error>(value(&format!("llama.{key}"))?.to_u32()? as usize);
    let id = |key: &str| content.metadata.get(key).and_then(|value: &Value| value.to_u32().ok());
    let vocab_size = content.tensor_infos.get("token_embd.weight").context("no token_embd.weight")?.shape.dims()[0];
    let config = json!({
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": number("embedding_length")?,
        "intermediate_size": number("feed_forward_length")?,
        "num_hidden_layers": number("block_count")?,
        "num_attention_heads": number("attention.head_count")?,
        "num_key_value_heads": number("attention.head_count_kv")?,
        "head_dim": number("rope.dimension_count")?,
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon")?.to_f32()?,
        "max_position_embeddings": number("context_length")?,
        "rope_theta": content.metadata.get("llama.rope.freq_base").and_then(|value| value.to_f32().ok()),
        "tie_word_embeddings": !content.tensor_infos.contains_key("output.weight"),
        "eos_token_id": id("tokenizer.ggml.eos_token_id"),
    });
    Ok(serde_json::from_value(config)?)
}

/// Hugging Face's name of a tensor that llama.cpp names so.
fn hugging_face_name(name: &str) -> Option<String> {
    const WHOLE: [(&str, &str); 3] =
        [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
    const IN_A_LAYER: [(&str, &str); 9] = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    let stem = name.strip_suffix(".weight")?;
    let renamed =
        |table: &[(&str, &'static str)], stem: &str| table.iter().find(|(from, _)| *from == stem).map(|(_, to)| *to);
    match stem.strip_prefix("blk.") {
        None => Some(format!("{}.weight", renamed(&WHOLE, stem)?)),
        Some(rest) => {
            let (layer, part) = rest.split_once('.')?;
            Some(format!("model.layers.{layer}.{}.weight", renamed(&IN_A_LAYER, part)?))
        }
    }
}

/// A projection to heads with each head's pairs of neighbouring rows taken apart into its first half and its second.
fn halves(weight: &Tensor, heads: usize) -> Result<Tensor> {
    let (rows, cols) = weight.dims2()?;
    Ok(weight.reshape((heads, rows / heads / 2, 2, cols))?.transpose(1, 2)?.contiguous()?.reshape((rows, cols))?)
}

/// Random weights for every tensor asked for: normal, at the scale that keeps a unit variance; norms are ones.
struct RandomWeights(Mutex<Random>);

impl SimpleBackend for RandomWeights {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        match *shape.dims() {
            // Billions of them would take a processor longer than all the rest.
            [_, cols] if device.is_cuda() => {
                Tensor::randn(0f32, (cols as f32).powf(-0.5), shape, device)?.to_dtype(dtype)
            }
            [rows, cols] => {
                let mut random = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                random.weight((rows, cols), dtype)?.to_device(device)
            }
            [_] => Tensor::ones(shape, dtype, device),
            _ => candle_core::bail!("random weights: {name}: expected a matrix or a vector, found {shape:?}"),
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("random weights: {name}: expected a shape")
    }

    /// Weights are there, biases are not.
    fn contains_tensor(&self, name: &str) -> bool {
        name.ends_with(".weight")
    }
}
