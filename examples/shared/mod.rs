//! What the examples share beside the benches' support code.
//!
//! | file | what it holds |
//! |---|---|
//! | `cli.rs` | devices, dtypes and errors on the command line |
//! | `safetensors.rs` | safetensors files, whole or sharded, with errors that name the file |
//! | `trained.rs` | the weights that `examples/train` made, inside the program |
#![allow(dead_code)] // each program uses a part of it

pub mod cli;
pub mod safetensors;
pub mod trained;
