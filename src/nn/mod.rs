//! The modules: the ops with their weights, from tensors, from candle's `Linear`s or from a checkpoint.
//!
//! | file | what it holds |
//! |---|---|
//! | `mlp.rs` | `FusedMlp`: two layers and an activation |
//! | `swiglu.rs` | `FusedSwiGlu`: gate, up and down |
//! | `checkpoint.rs` | under which names checkpoints keep these weights, in one table; finding out which; reading them |

mod checkpoint;
mod mlp;
mod swiglu;

pub use checkpoint::{Bias, Naming};
pub use mlp::{fused_mlp, fused_projector, FusedMlp};
pub use swiglu::{fused_swiglu, FusedSwiGlu};
