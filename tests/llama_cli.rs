//! The examples `llama` and `train` as programs: their exit codes, and what they print.

mod common;
#[path = "common/program.rs"]
mod program;

use common::file_of;
use program::{fails, succeeds};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The model that is inside the program, as a folder.
fn alice() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/alice")
}

/// A copy of it, to be broken.
fn copied() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::copy(alice().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn object(arguments: &[&str]) -> Value {
    let printed = succeeds("llama", &[arguments, &["--json"]].concat());
    assert_eq!(printed.lines().count(), 1, "{printed}");
    serde_json::from_str(&printed).unwrap()
}

#[test]
fn writes_without_an_argument() {
    let printed = succeeds("llama", &[]);
    for part in ["\nAlice was", "128 written", "prefill, tokens/s", "MLPs' share", "| fused "] {
        assert!(printed.contains(part), "expected {part:?} in {printed}");
    }
    assert!(!printed.contains("| unfused"), "{printed}");
}

#[test]
fn compares_both_paths() {
    let printed = succeeds("llama", &["--compare", "--tokens", "12"]);
    for part in ["| unfused", "| fused", "speed-up", "the same, all 12", "logits    differ by at most"] {
        assert!(printed.contains(part), "expected {part:?} in {printed}");
    }
    let both = object(&["--compare", "--tokens", "12", "--rounds", "1"]);
    assert_eq!((&both["same_tokens"], &both["first_difference"]), (&true.into(), &Value::Null));
    assert!(both["max_logit_difference"].as_f64().unwrap() < 1e-3, "{both}");
    for path in ["fused", "unfused"] {
        assert_eq!(both[path]["mlp"], path);
        for name in ["prefill_tokens_per_s", "decode_tokens_per_s", "prefill_mlp_share", "decode_mlp_share"] {
            assert!(both[path][name].as_f64().unwrap() > 0., "{path}'s {name} in {both}");
        }
    }
    assert!(both["prefill_speedup"].is_f64() && both["decode_speedup"].is_f64(), "{both}");
}

#[test]
fn folders_whole_and_sharded_are_the_model_inside() {
    let inside = object(&["--tokens", "24"]);
    assert_eq!((&inside["tokens"], &inside["mlp"], &inside["device"]), (&24.into(), &"fused".into(), &"cpu".into()));
    let folder = alice();
    let prompt = ["--prompt", "Alice was", "--tokens", "24"];
    let whole = object(&[&["--model", folder.to_str().unwrap()], &prompt[..]].concat());
    assert_eq!(whole["text"], inside["text"]);

    let copy = copied();
    let at = |name: &str| copy.path().join(name);
    let tensors = candle_core::safetensors::load(at("model.safetensors"), &candle_core::Device::Cpu).unwrap();
    let (mut shards, mut files) = ([Vec::new(), Vec::new()], serde_json::Map::new());
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        files.insert(name.clone(), format!("shard-{}.safetensors", i % 2).into());
        shards[i % 2].push((name, tensor));
    }
    for (i, shard) in shards.into_iter().enumerate() {
        candle_core::safetensors::save(&shard.into_iter().collect(), at(&format!("shard-{i}.safetensors"))).unwrap();
    }
    fs::write(at("model.safetensors.index.json"), serde_json::json!({ "weight_map": files }).to_string()).unwrap();
    fs::remove_file(at("model.safetensors")).unwrap();
    let arguments = [&["--model", copy.path().to_str().unwrap()], &prompt[..]].concat();
    assert_eq!(object(&arguments)["text"], inside["text"]);
    fs::remove_file(at("shard-1.safetensors")).unwrap();
    fails("llama", &arguments, &["shard-1.safetensors", "cannot be read"]);
}

#[test]
fn samples_by_seed() {
    let text = |seed: &str| {
        object(&["--temperature", "0.9", "--top-p", "0.95", "--seed", seed, "--tokens", "24"])["text"].clone()
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn reads_stories260k() {
    let Some(folder) = file_of("FUSED_MLP_SHARED", "the folder with models/stories260k") else { return };
    let folder = folder.join("models/stories260k");
    let printed = succeeds("llama", &["--model", folder.to_str().unwrap(), "--tokens", "60", "--mlp", "unfused"]);
    let story =
        "\nOnce upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she";
    assert!(printed.contains(story), "{printed}");
}

#[test]
fn one_line_and_exit_code_2_for_wrong_input() {
    let fails = |arguments: &[&str], parts: &[&str]| fails("llama", arguments, parts);
    fails(&["--model", "/no/such/folder"], &["/no/such/folder/config.json", "cannot be read"]);
    fails(&["--gguf", "/no/such/file.gguf"], &["/no/such/file.gguf", "cannot be read"]);
    fails(&["--gguf", alice().join("config.json").to_str().unwrap()], &["config.json", "not a whole GGUF file"]);
    fails(&["--model", "a", "--gguf", "b"], &["--model", "--gguf"]);
    fails(&["--dtype", "f64"], &["--dtype", "expected f32, f16 or bf16"]);
    fails(&["--temperature", "0"], &["--temperature", "expected a number above 0"]);
    fails(&["--top-p", "0.9"], &["--temperature"]);
    fails(&["--temperature", "1", "--top-p", "1.5"], &["--top-p", "at most 1"]);
    fails(&["--tokens", "0"], &["--tokens"]);
    fails(&["--tokens", "100000"], &["at most 512 tokens", "found 100"]);
    fails(&["--prompt", ""], &["--prompt", "at least one token"]);
    fails(&["--chat"], &["--chat", "<|im_start|>"]);
    fails(&["--compare", "--mlp", "fused"], &["--compare", "--mlp"]);
    fails(&["--synthetic", "2b"], &["--synthetic", "1b, 8b"]);
    fails(&["--graph"], &["--graph", "expected a CUDA device, found cpu"]);
    fails(&["--frobnicate"], &["--frobnicate"]);
    if !candle_core::utils::cuda_is_available() {
        fails(&["--device", "cuda:1"], &["cuda:1", "built without CUDA"]);
    }

    let copy = copied();
    let at = |name: &str| copy.path().join(name);
    let folder = ["--model", copy.path().to_str().unwrap()];
    let config = fs::read_to_string(at("config.json")).unwrap();
    for (from, to, parts) in [
        ("\"llama\"", "\"gpt2\"", ["model_type", "expected one of llama, mistral, qwen2, found gpt2"]),
        ("\"hidden_size\": 64", "\"hidden_size\": \"64\"", ["config.json", "invalid type"]),
        ("\"hidden_size\": 64", "\"width\": 64", ["config.json", "missing field `hidden_size`"]),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", ["num_attention_heads", "4 and 3"]),
        ("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 5", ["model.layers.4.", "cannot find tensor"]),
        ("\"vocab_size\": 512", "\"vocab_size\": 500", ["model.embed_tokens.weight", "[500, 64]"]),
        ("\"silu\"", "\"softmax\"", ["config.json", "silu"]),
    ] {
        assert!(config.contains(from), "{from}");
        fs::write(at("config.json"), config.replace(from, to)).unwrap();
        fails(&folder, &parts);
    }
    fs::write(at("config.json"), &config).unwrap();
    fs::write(at("tokenizer.json"), "{}").unwrap();
    fails(&folder, &["tokenizer.json"]);
    let bytes = fs::read(at("model.safetensors")).unwrap();
    fs::write(at("model.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
    fails(&folder, &["model.safetensors", "not a whole safetensors file"]);
}

#[test]
fn trains() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new");
    let out = out.to_str().unwrap();
    let small = ["--steps", "3", "--batch", "2", "--context", "16", "--out"];
    let printed = succeeds("train", &[&small[..], &[out]].concat());
    for part in ["parameters", "| unfused", "| fused", "memory of a step, MB", "written to"] {
        assert!(printed.contains(part), "expected {part:?} in {printed}");
    }
    let plot = fs::read_to_string(Path::new(out).join("loss.svg")).unwrap();
    assert!(plot.starts_with("<svg") && plot.contains("FusedSwiGlu"), "{plot}");
    assert_eq!(object(&["--model", out, "--tokens", "4"])["tokens"], 4);
    // The tokenizer does not depend on the training, so it is the one inside.
    let tokenizer = |folder: &Path| fs::read_to_string(folder.join("tokenizer.json")).unwrap();
    assert!(tokenizer(Path::new(out)) == tokenizer(&alice()), "another tokenizer came out of the same text");

    fails("train", &["--text", "/no/such/text", "--out", out], &["/no/such/text", "cannot be read"]);
    let file = folder.path().join("short.txt");
    fs::write(&file, "Alice.").unwrap();
    let file = file.to_str().unwrap();
    fails("train", &["--text", file, "--out", out], &["short.txt", "expected more than 97 tokens"]);
    fails("train", &["--out", file, "--steps", "1"], &["short.txt", "cannot be made"]);
    fails("train", &["--steps", "0"], &["--steps"]);
}
