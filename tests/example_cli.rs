//! The example `llama_mlp_block` as a program: its exit codes, and what it prints.

#[path = "common/program.rs"]
mod program;

use program::succeeds;
use serde_json::Value;
use std::fs;
use std::path::Path;

const NAME: &str = "llama_mlp_block";

fn fails(arguments: &[&str], parts: &[&str]) {
    program::fails(NAME, arguments, parts);
}

/// A file of random weights, small, as another program would have written it.
fn checkpoint(path: &Path) {
    use candle_core::{Device, Tensor};
    let tensor = |dims: (usize, usize)| Tensor::randn(0f32, 0.1, dims, &Device::Cpu).unwrap();
    let mut tensors = std::collections::HashMap::new();
    for layer in 0..2 {
        for (name, dims) in [("gate_proj", (44, 16)), ("up_proj", (44, 16)), ("down_proj", (16, 44))] {
            tensors.insert(format!("model.layers.{layer}.mlp.{name}.weight"), tensor(dims));
        }
    }
    candle_core::safetensors::save(&tensors, path).unwrap();
}

#[test]
fn prints_tables_and_succeeds() {
    // Its own sizes take long without optimisation.
    let small = ["--hidden", "64", "--intermediate", "172", "--iters", "1", "--copies", "1"];
    let printed = succeeds(NAME, if cfg!(debug_assertions) { &small } else { &[] });
    for part in ["launches", "bytes read", "relative l2", "speed-up", "share", "| bf16"] {
        assert!(printed.contains(part), "expected {part:?} in {printed}");
    }
}

#[test]
fn runs_on_trained_weights_and_on_random_ones() {
    let printed = succeeds(NAME, &["--tokens", "2", "--dtype", "f32", "--iters", "1", "--copies", "1", "--layer", "3"]);
    for part in ["trained on Alice", "hidden size 64, intermediate size 172", "random,", "hidden size 576"] {
        assert!(printed.contains(part), "expected {part:?} in {printed}");
    }
    fails(&["--layer", "4"], &["no block at model.layers.4.mlp", "there are model.layers.0.mlp"]);
}

#[test]
fn prints_an_object_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    checkpoint(&file);
    let options = ["--layer", "1", "--tokens", "1,9", "--dtype", "f64,f16", "--iters", "1", "--copies", "2", "--json"];
    let printed = succeeds(NAME, &[&["--weights", file.to_str().unwrap()], &options[..]].concat());
    let rows: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let found: Vec<_> =
        rows.iter().map(|row| (row["dtype"].as_str().unwrap(), row["tokens"].as_u64().unwrap())).collect();
    assert_eq!(found, [("f64", 1), ("f64", 9), ("f16", 1), ("f16", 9)]);
    for row in &rows {
        assert_eq!((&row["op"], &row["device"]), (&"swiglu".into(), &"cpu".into()));
        assert_eq!((&row["hidden"], &row["intermediate"], &row["launches"]), (&16.into(), &44.into(), &1.into()));
        assert!(row["kernel"].as_str().unwrap().starts_with("cpu-"), "{row}");
        for name in ["unfused_us", "fused_us", "speedup", "max_abs_err", "rel_l2_err", "read_gbs", "share_of_bandwidth"]
        {
            assert!(row[name].is_f64(), "{name} in {row}");
        }
    }
}

#[test]
fn reads_sharded_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.safetensors");
    checkpoint(&whole);
    let tensors = candle_core::safetensors::load(&whole, &candle_core::Device::Cpu).unwrap();
    // In order, so that each layer is in both shards.
    let tensors: std::collections::BTreeMap<_, _> = tensors.into_iter().collect();
    let (mut shards, mut files) = ([Vec::new(), Vec::new()], serde_json::Map::new());
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        files.insert(name.clone(), format!("shard-{}.safetensors", i % 2).into());
        shards[i % 2].push((name, tensor));
    }
    for (i, shard) in shards.into_iter().enumerate() {
        let path = folder.path().join(format!("shard-{i}.safetensors"));
        candle_core::safetensors::save(&shard.into_iter().collect(), path).unwrap();
    }
    let index = folder.path().join("model.safetensors.index.json");
    fs::write(&index, serde_json::json!({ "weight_map": files }).to_string()).unwrap();
    let small = ["--dtype", "f32", "--tokens", "2", "--iters", "1", "--copies", "1", "--json"];
    let arguments = [&["--weights", index.to_str().unwrap()], &small[..]].concat();
    succeeds(NAME, &arguments);
    fs::remove_file(folder.path().join("shard-1.safetensors")).unwrap();
    fails(&arguments, &["shard-1.safetensors", "cannot be read"]);
}

#[test]
fn one_line_and_exit_code_2_for_wrong_input() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    checkpoint(&file);
    let path = file.to_str().unwrap();
    fails(&["--weights", "/no/such/file.safetensors"], &["/no/such/file.safetensors", "cannot be read"]);
    fails(
        &["--weights", path, "--prefix", "layers.0"],
        &["layers.0.gate_proj.weight", "layers.0.down_proj.weight", "there are model.layers.0.mlp, model.layers.1.mlp"],
    );
    fails(&["--weights", path, "--layer", "2"], &["no block at model.layers.2.mlp"]);
    fails(&["--dtype", "u8"], &["--dtype", "expected f32, f16, bf16 or f64"]);
    fails(&["--activation", "softmax"], &["--activation", "expected one of", "silu"]);
    fails(&["--tokens", "0"], &["--tokens"]);
    fails(&["--frobnicate"], &["--frobnicate"]);
    if !candle_core::utils::cuda_is_available() {
        fails(&["--device", "cuda:1"], &["cuda:1", "built without CUDA"]);
    }
    let bytes = fs::read(&file).unwrap();
    let weights = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
    let integers = weights.into_iter().map(|(name, tensor)| match name.contains("0.mlp.down_proj") {
        true => (name, tensor.to_dtype(candle_core::DType::U32).unwrap()),
        false => (name, tensor),
    });
    candle_core::safetensors::save(&integers.collect(), &file).unwrap();
    fails(&["--weights", path, "--layer", "0"], &["layers.0.mlp.down_proj.weight", "expected floating-point", "U32"]);
    for len in [0, 5, 100, bytes.len() - 1] {
        fs::write(&file, &bytes[..len]).unwrap();
        fails(&["--weights", path], &["model.safetensors", "not a whole safetensors file"]);
    }
}
