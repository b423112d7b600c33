#![doc = include_str!("../README.md")]
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
mod plan;
pub mod reference;

pub use activation::{Activation, IntoActivation};
pub use nn::{fused_mlp, fused_projector, fused_swiglu, Bias, FusedMlp, FusedSwiGlu, Naming};
pub use parameters::{GateUp, PackedOrder};
pub use plan::{plan, Cost, Plan, Workload};
