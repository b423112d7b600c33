//! Fused MLPs for candle.
#![deny(missing_docs)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod activation;
mod backward;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod nn;
pub mod ops;
mod parameters;
pub mod reference;

pub use activation::{Activation, IntoActivation};
pub use nn::{fused_mlp, fused_projector, fused_swiglu, Bias, FusedMlp, FusedSwiGlu, Naming};
pub use parameters::{GateUp, PackedOrder};
