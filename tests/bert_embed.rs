//! The example `bert_embed` as a program: what it finds in a trained BERT, its exit codes, and what it says of wrong input.
//!
//! `FUSED_MLP_MINILM` names the file that `tests/fetch_models.sh minilm` fetches.

mod common;
#[path = "common/program.rs"]
mod program;

use common::file_of;
use serde_json::Value;
use std::fs;

const NAME: &str = "bert_embed";

#[test]
fn embeddings_are_candles() {
    let Some(model) = file_of("FUSED_MLP_MINILM", "the file that tests/fetch_models.sh minilm fetches") else { return };
    let model = model.to_str().unwrap();
    let printed = program::succeeds(NAME, &["--model", model, "--batch", "1,5,64", "--iters", "1", "--json"]);
    let rows: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.iter().map(|row| row["batch"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 5, 64]);
    for row in &rows {
        let cosine = row["lowest_cosine"].as_f64().unwrap();
        assert!((0.99999..1.00001).contains(&cosine), "{row}");
        assert!(row["fused_sentences_per_s"].as_f64().unwrap() > 0., "{row}");
    }
    // One sentence at a time needs no padding.
    assert!(rows[0]["tokens"].as_u64() < rows[1]["tokens"].as_u64());

    let folder = tempfile::tempdir().unwrap();
    let sentences = folder.path().join("lines.txt");
    fs::write(&sentences, "One.\n\n  Two sentences, three lines.\n").unwrap();
    let arguments = ["--model", model, "--sentences", sentences.to_str().unwrap(), "--batch", "2", "--iters", "1"];
    let printed = program::succeeds(NAME, &arguments);
    for part in ["sentences  2", "layers     6, hidden size 384, intermediate size 1536", "speed-up", "lowest cosine"] {
        assert!(printed.contains(part), "expected {part:?} in {printed}");
    }
}

#[test]
fn wrong_input_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    program::fails(NAME, &["--batch", "0"], &["--batch", "'0'"]);
    program::fails(NAME, &["--model", "/no/such/folder"], &["/no/such/folder", "no such folder"]);
    program::fails(NAME, &["--model", path], &["config.json", "no such file"]);
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::write(folder.path().join(name), "{}").unwrap();
    }
    program::fails(NAME, &["--model", path], &["config.json", "not the configuration of a BERT", "vocab_size"]);
    let config = r#"{"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "hidden_act": "gelu", "hidden_dropout_prob": 0, "max_position_embeddings": 8,
        "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0}"#;
    fs::write(folder.path().join("config.json"), config).unwrap();
    program::fails(NAME, &["--model", path], &["model.safetensors", "not a whole safetensors file"]);
}
