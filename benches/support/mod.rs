//! What the benches and the example share: how to measure.
//!
//! | file | what it holds |
//! |---|---|
//! | `machine.rs` | the processor or GPU, its largest cache, and the speed at which it reads memory |
//! | `gpu.rs` | the same of a GPU, the peak of its memory, and CUDA graphs |
//! | `timing.rs` | times of several paths, by turns in one process |
//! | `memory.rs` | the peak of the heap while a path runs |
//! | `random.rs` | random normal tensors, fast enough for large weights |
//! | `table.rs` | a markdown table |
//!
//! Weights in cache say nothing about a model, whose layers come from memory each time. So a path is timed on a
//! stack of layers that all have weights of their own, together more than four times the last-level cache
//! ([`machine::layers_beyond_cache`]), and one sample is a walk through the stack.
#![allow(dead_code)] // each program uses a part of it

#[cfg(feature = "cuda")]
pub mod gpu;
pub mod machine;
pub mod memory;
pub mod random;
pub mod table;
pub mod timing;
