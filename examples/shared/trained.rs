//! The weights that `examples/train` made of `examples/data/alice.txt`, inside the program.

/// `config.json`.
pub const CONFIG: &str = include_str!("../data/alice/config.json");
/// `tokenizer.json`.
pub const TOKENIZER: &str = include_str!("../data/alice/tokenizer.json");
/// `model.safetensors`.
pub const WEIGHTS: &[u8] = include_bytes!("../data/alice/model.safetensors");
