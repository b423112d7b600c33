//! The whole models of `examples/llama`, against golden tokens, transformers' f64 logits and candle-transformers' models,
//! with the MLP fused and not.
//!
//! `FUSED_MLP_SHARED` names a folder with `models/stories260k` and `goldens`, `FUSED_MLP_SMOLLM2` the file that
//! `tests/fetch_models.sh smollm2` fetches.

#[path = "../examples/llama/checkpoint.rs"]
#[allow(dead_code)]
mod checkpoint;
mod common;
#[path = "../benches/support/mod.rs"]
mod measuring;
#[path = "../examples/llama/model.rs"]
#[allow(dead_code)]
mod model;
#[path = "../examples/shared/mod.rs"]
mod shared;
#[path = "llama/stories.rs"]
mod stories;
#[path = "../examples/llama/tokenizer.rs"]
mod tokenizer;

use anyhow::Result;
use candle_core::quantized::{gguf_file as gguf, GgmlDType, QTensor};
use candle_core::{test_device, DType, Device, Tensor, D};
use candle_nn::loss::cross_entropy;
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::{llama as candle_llama, mistral as candle_mistral, qwen2 as candle_qwen2};
use checkpoint::Checkpoint;
use common::*;
use model::{Config, Llama, MlpPath};
use serde_json::{json, Value};
use std::collections::HashMap;
use std::fs;
use stories::{apart, stories, PATHS};

/// The likeliest tokens after the prompt, and the logits that each was chosen by.
fn greedy(model: &Llama, prompt: &[u32], tokens: usize) -> Result<(Vec<u32>, Vec<Vec<f32>>)> {
    let mut state = model.state(prompt.len() + tokens)?;
    let (mut ids, mut all): (Vec<u32>, Vec<Vec<f32>>) = (Vec::new(), Vec::new());
    while ids.len() < tokens {
        let logits = model.next(ids.last().map_or(prompt, std::slice::from_ref), &mut state)?;
        ids.push(logits.argmax(D::Minus1)?.to_scalar()?);
        all.push(logits.to_vec1()?);
    }
    Ok((ids, all))
}

/// All golden tokens in f32; in f16 and bf16 logits near those of f32, and where the first token differs.
fn stories260k_tokens(device: &Device) -> Result<()> {
    let Some((checkpoint, model, golden)) = stories(DType::F32, device)? else { return Ok(()) };
    let expected: Vec<u32> = serde_json::from_value(golden["greedy_ids"].clone())?;
    assert_eq!(expected.len(), 256);
    let tokenizer = checkpoint.tokenizer.unwrap();
    let start = golden["bos"].as_u64().unwrap() as u32;
    let mut exact = Vec::new();
    for path in PATHS {
        let (ids, logits) = greedy(&model.with_mlp(path), &[start], expected.len())?;
        assert_eq!(ids, expected, "{path:?}");
        exact = logits;
    }
    let text = golden["text"].as_str().unwrap();
    assert_eq!(tokenizer.decode(&expected, true).unwrap(), text.trim_start());
    let ids = tokenizer.encode(text.trim_start(), true).unwrap().get_ids().to_vec();
    assert_eq!(ids, [&[start], &expected[..]].concat(), "the tokenizer takes its own text apart otherwise");

    for (dtype, tolerance) in [(DType::F16, 0.2), (DType::BF16, 1.2)] {
        let model = stories(dtype, device)?.unwrap().1;
        for path in PATHS {
            let (ids, logits) = greedy(&model.with_mlp(path), &[start], expected.len())?;
            let same = ids.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(ids.len());
            let worst = logits.iter().zip(&exact).take(same + 1).map(|(a, b)| apart(a, b)).fold(0., f64::max);
            assert!(worst <= tolerance, "{dtype:?} {path:?}: logits differ by {worst}");
            eprintln!(
                "stories260k, {}, {path:?}: the first {same} of 256 tokens are f32's; logits differ by at most {worst:.1e}",
                dtype.as_str()
            );
        }
    }
    Ok(())
}
test_device!(stories260k_tokens, stories260k_tokens_cpu, stories260k_tokens_gpu, stories260k_tokens_metal);

/// The logits of candle-transformers' llama.rs at every position, token by token and all at once.
fn stories260k_logits(device: &Device) -> Result<()> {
    let Some((checkpoint, model, golden)) = stories(DType::F32, device)? else { return Ok(()) };
    let mut ids: Vec<u32> = serde_json::from_value(golden["greedy_ids"].clone())?;
    ids.insert(0, golden["bos"].as_u64().unwrap() as u32);
    let expected = candle_llama_logits(&checkpoint.config, checkpoint.vb, &ids, device)?;
    check_every_position(&model, &ids, &expected, 1e-4, "stories260k")
}
test_device!(stories260k_logits, stories260k_logits_cpu, stories260k_logits_gpu, stories260k_logits_metal);

/// The logits after each of these ids, by candle-transformers.
fn candle_llama_logits(config: &Config, vb: VarBuilder, ids: &[u32], device: &Device) -> Result<Vec<Vec<f32>>> {
    let config: candle_llama::LlamaConfig = serde_json::from_value(serde_json::to_value(config)?)?;
    let config = config.into_config(false);
    let candle = candle_llama::Llama::load(vb, &config)?;
    let mut cache = candle_llama::Cache::new(true, DType::F32, &config, device)?;
    let step = |(at, &id): (usize, &u32)| -> Result<Vec<f32>> {
        Ok(candle.forward(&Tensor::new(&[[id]], device)?, at, &mut cache)?.flatten_all()?.to_vec1()?)
    };
    ids.iter().enumerate().map(step).collect()
}

/// Checks a model against these logits: by tokens one at a time, at positions on the host and on the device, by a prompt and
/// the rest, and without a cache.
fn check_every_position(model: &Llama, ids: &[u32], expected: &[Vec<f32>], tolerance: f64, name: &str) -> Result<()> {
    assert_eq!(ids.len(), expected.len());
    for path in PATHS {
        let model = model.with_mlp(path);
        let mut state = model.state(ids.len())?;
        let mut worst = 0f64;
        for (id, expected) in ids.iter().zip(expected) {
            worst = worst.max(apart(&model.next(&[*id], &mut state)?.to_vec1()?, expected));
        }
        let device = model.device();
        let mut state = model.state(ids.len())?;
        let tables = model.tables(&state)?;
        for (at, (id, expected)) in ids.iter().zip(expected).enumerate() {
            let (id, at) = (Tensor::new(&[[*id]], device)?, Tensor::new(&[at as u32], device)?);
            worst = worst.max(apart(&model.step(&id, &at, &tables, &mut state)?.to_vec1()?, expected));
        }
        let mut state = model.state(ids.len())?;
        let half = ids.len() / 2;
        for (part, last) in [(&ids[..half], half - 1), (&ids[half..], ids.len() - 1)] {
            worst = worst.max(apart(&model.next(part, &mut state)?.to_vec1()?, &expected[last]));
        }
        let whole = model.forward(&Tensor::new(ids, model.device())?.unsqueeze(0)?)?;
        for (found, expected) in whole.squeeze(0)?.to_vec2::<f32>()?.iter().zip(expected) {
            worst = worst.max(apart(found, expected));
        }
        assert!(worst <= tolerance, "{name}, {path:?}: logits differ by {worst:e}");
        eprintln!("{name}, {path:?}: logits differ by at most {worst:.1e}");
    }
    Ok(())
}

/// A whole LLaMA of transformers', whose logits are in f64.
fn tiny_llama(device: &Device) -> Result<()> {
    let Some(folder) = file_of("FUSED_MLP_SHARED", "the folder with goldens/tiny_llama.safetensors") else {
        return Ok(());
    };
    let folder = folder.join("goldens");
    let tensors = candle_core::safetensors::load(folder.join("tiny_llama.safetensors"), device)?;
    let config: Config = serde_json::from_str(&fs::read_to_string(folder.join("tiny_llama.json"))?)?;
    let ids: Vec<i64> = tensors["golden.ids"].flatten_all()?.to_vec1()?;
    let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
    let expected: Vec<Vec<f32>> = tensors["golden.logits"].squeeze(0)?.to_dtype(DType::F32)?.to_vec2()?;
    let model = Llama::load(&config, MlpPath::Fused, VarBuilder::from_tensors(tensors, DType::F32, device))?;
    check_every_position(&model, &ids, &expected, 2e-4, "transformers' tiny LLaMA")
}
test_device!(tiny_llama, tiny_llama_cpu, tiny_llama_gpu, tiny_llama_metal);

/// A small model's configuration with these fields beside the usual ones.
fn small_config(fields: Value) -> Result<Config> {
    let mut config = json!({
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "rope_theta": 10_000.,
    });
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    Ok(serde_json::from_value(config)?)
}

/// Random weights for a small model, with biases on queries, keys and values if asked for.
fn small_weights(config: &Config, biases: bool, device: &Device) -> Result<VarBuilder<'static>> {
    let random = &mut Random::new(4);
    let map = VarMap::new();
    Llama::load(config, MlpPath::Fused, VarBuilder::from_varmap(&map, DType::F32, device))?;
    let mut tensors = HashMap::new();
    for (name, variable) in map.data().lock().unwrap().iter() {
        let deviation = (*variable.dims().last().unwrap() as f64).powf(-0.5);
        let tensor = random.normal(variable.dims(), deviation, DType::F32, device)?;
        tensors.insert(name.clone(), if variable.rank() == 1 { (tensor + 1.)? } else { tensor });
        let stem = name.strip_suffix(".weight").unwrap();
        if biases && ["q_proj", "k_proj", "v_proj"].iter().any(|name| stem.ends_with(name)) {
            tensors.insert(format!("{stem}.bias"), random.normal(&variable.dims()[..1], 0.5, DType::F32, device)?);
        }
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, device))
}

/// Scaled rotary embeddings, untied embeddings, biases and sliding windows, against candle-transformers' files for them.
fn like_candle_transformers(device: &Device) -> Result<()> {
    let random = &mut Random::new(5);
    let ids: Vec<u32> = (0..150).map(|_| random.range(0..101) as u32).collect();
    let one_by_one = |step: &mut dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor>| -> Result<Vec<Vec<f32>>> {
        let step = |(at, &id): (usize, &u32)| -> Result<Vec<f32>> {
            Ok(step(&Tensor::new(&[[id]], device)?, at)?.flatten_all()?.to_vec1()?)
        };
        ids.iter().enumerate().map(step).collect()
    };

    // The original 32 positions put the heads' four frequencies into all three parts of the scaling.
    let scaling = json!({
        "rope_type": "llama3", "factor": 8., "low_freq_factor": 1., "high_freq_factor": 4.,
        "original_max_position_embeddings": 32,
    });
    let config = small_config(json!({ "model_type": "llama", "rope_scaling": scaling }))?;
    let vb = small_weights(&config, false, device)?;
    let expected = candle_llama_logits(&config, vb.clone(), &ids, device)?;
    let model = Llama::load(&config, MlpPath::Fused, vb.clone())?;
    check_every_position(&model, &ids, &expected, 1e-4, "Llama 3's scaling")?;
    let unscaled = Config { rope_scaling: None, ..config };
    let unscaled =
        Llama::load(&unscaled, MlpPath::Fused, vb)?.forward(&Tensor::new(&ids[..], device)?.unsqueeze(0)?)?;
    let last = unscaled.squeeze(0)?.get(ids.len() - 1)?.to_vec1()?;
    assert!(apart(&last, &expected[ids.len() - 1]) > 1e-2, "the scaling makes no difference here");

    let config = small_config(json!({
        "model_type": "qwen2", "tie_word_embeddings": true, "use_sliding_window": false, "sliding_window": 8,
        "max_window_layers": 2,
    }))?;
    let vb = small_weights(&config, true, device)?;
    let mut fields = serde_json::to_value(&config)?;
    fields["max_window_layers"] = 2.into();
    let mut candle = candle_qwen2::ModelForCausalLM::new(&serde_json::from_value(fields)?, vb.clone())?;
    let expected = one_by_one(&mut |id, at| candle.forward(id, at))?;
    check_every_position(&Llama::load(&config, MlpPath::Fused, vb)?, &ids, &expected, 1e-4, "Qwen2's biases")?;

    let config = small_config(json!({ "model_type": "mistral", "sliding_window": 16 }))?;
    let vb = small_weights(&config, false, device)?;
    let mut fields = serde_json::to_value(&config)?;
    // transformers counts the token itself among the window's, candle's file beside them.
    fields["sliding_window"] = 15.into();
    let fields: candle_mistral::Config = serde_json::from_value(fields)?;
    // With a cache that file looks at the window in the prompt only. So every position as the end of a prompt.
    let expected = (0..ids.len())
        .map(|last| {
            let mut candle = candle_mistral::Model::new(&fields, vb.clone())?;
            let prompt = Tensor::new(&ids[..=last], device)?.unsqueeze(0)?;
            Ok(candle.forward(&prompt, 0)?.flatten_all()?.to_vec1()?)
        })
        .collect::<Result<Vec<Vec<f32>>>>()?;
    check_every_position(&Llama::load(&config, MlpPath::Fused, vb)?, &ids, &expected, 1e-4, "Mistral's window")
}
test_device!(
    like_candle_transformers,
    like_candle_transformers_cpu,
    like_candle_transformers_gpu,
    like_candle_transformers_metal
);

/// Every weight has a gradient, and fused and unfused have the same.
fn gradients(device: &Device) -> Result<()> {
    let config = small_config(json!({ "model_type": "llama" }))?;
    let map = VarMap::new();
    let model = Llama::load(&config, MlpPath::Fused, VarBuilder::from_varmap(&map, DType::F32, device))?;
    let random = &mut Random::new(6);
    let mut pieces = || -> Result<Tensor> {
        let ids: Vec<u32> = (0..2 * 24).map(|_| random.range(0..101) as u32).collect();
        Ok(Tensor::from_vec(ids, (2, 24), device)?)
    };
    let (inputs, targets) = (pieces()?, pieces()?);
    let [fused, unfused] = PATHS.map(|path| -> Result<_> {
        let logits = model.with_mlp(path).forward(&inputs)?;
        let loss = cross_entropy(&logits.flatten_to(1)?, &targets.flatten_all()?)?;
        Ok((loss.to_scalar::<f32>()?, loss.backward()?))
    });
    let ((fused_loss, fused), (unfused_loss, unfused)) = (fused?, unfused?);
    assert!((fused_loss - unfused_loss).abs() <= 1e-5, "{fused_loss} and {unfused_loss}");
    let variables = map.data().lock().unwrap().clone();
    assert_eq!(variables.len(), 2 * 9 + 3);
    for (name, variable) in variables {
        let [fused, unfused] =
            [&fused, &unfused].map(|all| all.get(&variable).unwrap_or_else(|| panic!("{name}: none")));
        assert!(values(unfused)?.iter().any(|value| *value != 0.), "{name}: all zero");
        let error = relative_error(fused, unfused)?;
        assert!(error <= 2e-5, "{name}: {error:e}");
    }
    Ok(())
}
test_device!(gradients, gradients_cpu, gradients_gpu, gradients_metal);

/// A GGUF file of the model inside the program, as llama.cpp would have written it, gives that model.
#[test]
fn gguf_is_what_its_folder_was() -> Result<()> {
    let device = &Device::Cpu;
    let Checkpoint { config, tokenizer, .. } = Checkpoint::trained(DType::F32, device)?;
    let (heads, key_heads, size) = config.heads()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");

    let json: Value = serde_json::from_str(&tokenizer.unwrap().to_string(false).unwrap())?;
    let mut tokens = vec![String::new(); config.vocab_size];
    for (token, id) in json["model"]["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges = merges.map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap())).collect();
    let strings = |all: Vec<String>| gguf::Value::Array(all.into_iter().map(gguf::Value::String).collect());
    let number = |number: usize| gguf::Value::U32(number as u32);
    let metadata = [
        ("general.architecture", gguf::Value::String("llama".to_string())),
        ("llama.embedding_length", number(config.hidden_size)),
        ("llama.feed_forward_length", number(config.intermediate_size)),
        ("llama.block_count", number(config.num_hidden_layers)),
        ("llama.attention.head_count", number(heads)),
        ("llama.attention.head_count_kv", number(key_heads)),
        ("llama.rope.dimension_count", number(size)),
        ("llama.context_length", number(config.max_position_embeddings)),
        ("llama.attention.layer_norm_rms_epsilon", gguf::Value::F32(config.rms_norm_eps as f32)),
        ("tokenizer.ggml.model", gguf::Value::String("gpt2".to_string())),
        ("tokenizer.ggml.pre", gguf::Value::String("smollm".to_string())),
        ("tokenizer.ggml.tokens", strings(tokens)),
        ("tokenizer.ggml.merges", strings(merges)),
    ];
    let mut tensors = Vec::new();
    for (name, tensor) in candle_core::safetensors::load_buffer(shared::trained::WEIGHTS, device)? {
        let tensor = tensor.to_dtype(DType::F32)?;
        // A head's first half and second, value by value in turn.
        let in_turn = |tensor: &Tensor, heads: usize| -> Result<Tensor> {
            let cols = tensor.dim(1)?;
            let turned = tensor.reshape((heads, 2, size / 2, cols))?.transpose(1, 2)?.contiguous()?;
            Ok(turned.reshape((heads * size, cols))?)
        };
        let tensor = match name.as_str() {
            name if name.contains("q_proj") => in_turn(&tensor, heads)?,
            name if name.contains("k_proj") => in_turn(&tensor, key_heads)?,
            _ => tensor,
        };
        let mut name = name.replace("model.layers.", "blk.");
        for (long, short) in [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ] {
            name = name.replace(long, short);
        }
        tensors.push((name, QTensor::quantize(&tensor, GgmlDType::F32)?));
    }
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let named: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf::write(&mut fs::File::create(&path)?, &metadata, &named)?;

    let prompt = "Alice was not a bit hurt, and she jumped up";
    let [from_gguf, inside] = [Checkpoint::gguf(&path, DType::F32, device)?, Checkpoint::trained(DType::F32, device)?]
        .map(|checkpoint| {
            let Checkpoint { config, tokenizer, vb, .. } = checkpoint;
            let model = Llama::load(&config, MlpPath::Fused, vb)?;
            let ids = tokenizer.unwrap().encode(prompt, true).unwrap().get_ids().to_vec();
            Ok((model.next(&ids, &mut model.state(ids.len())?)?.to_vec1::<f32>()?, ids))
        });
    let (from_gguf, inside): (Result<_>, Result<_>) = (from_gguf, inside);
    assert_eq!(from_gguf?, inside?);
    Ok(())
}

/// A real model from a GGUF file: the same 200 tokens fused and unfused, and English.
fn smollm2(device: &Device) -> Result<()> {
    let Some(path) = file_of("FUSED_MLP_SMOLLM2", "the file that tests/fetch_models.sh smollm2 prints") else {
        return Ok(());
    };
    let Checkpoint { config, tokenizer, vb, .. } = Checkpoint::gguf(&path, DType::F32, device)?;
    assert_eq!((config.hidden_size, config.intermediate_size, config.num_hidden_layers), (576, 1536, 30));
    let tokenizer = tokenizer.unwrap();
    let encode = |text: &str| tokenizer.encode(text, true).unwrap().get_tokens().join("|");
    // As transformers takes it apart: no space before the text, digits one by one.
    assert_eq!(encode("Once upon 1903"), "Once|Ġupon|Ġ|1|9|0|3");
    let model = Llama::load(&config, MlpPath::Fused, vb)?;
    let prompt = tokenizer.encode("The sea is salty because", true).unwrap().get_ids().to_vec();
    let (fused, fused_logits) = greedy(&model, &prompt, 200)?;
    let (unfused, unfused_logits) = greedy(&model.with_mlp(MlpPath::Unfused), &prompt, 200)?;
    let text = tokenizer.decode(&fused, true).unwrap();
    assert_eq!(fused, unfused, "{text}");
    let worst = fused_logits.iter().zip(&unfused_logits).map(|(a, b)| apart(a, b)).fold(0., f64::max);
    assert!(worst <= 1e-2, "logits differ by {worst:e}");
    for word in ["salt", "sea", " the ", " is "] {
        assert!(text.contains(word), "expected {word:?} in {text:?}");
    }
    eprintln!("SmolLM2: 200 tokens the same, logits differ by at most {worst:.1e}: {text}");
    Ok(())
}
test_device!(smollm2, smollm2_cpu, smollm2_gpu, smollm2_metal);

/// The model inside the program writes words of the book that it was trained on, fused and unfused the same.
fn trained(device: &Device) -> Result<()> {
    let Checkpoint { config, tokenizer, vb, .. } = Checkpoint::trained(DType::F32, device)?;
    let tokenizer = tokenizer.unwrap();
    let model = Llama::load(&config, MlpPath::Fused, vb)?;
    let prompt = tokenizer.encode("Alice was", true).unwrap().get_ids().to_vec();
    let (ids, _) = greedy(&model, &prompt, 200)?;
    assert_eq!(ids, greedy(&model.with_mlp(MlpPath::Unfused), &prompt, 200)?.0);
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| word.len() > 1).map(str::to_string).collect()
    };
    let book = words(include_str!("../examples/data/alice.txt"));
    let text = tokenizer.decode(&ids, true).unwrap();
    let written = words(&text);
    let known = written.iter().filter(|word| book.contains(word)).count();
    assert!(written.len() >= 40 && known * 10 >= written.len() * 9, "{known} of {} words: {text}", written.len());
    Ok(())
}
test_device!(trained, trained_cpu, trained_gpu, trained_metal);
