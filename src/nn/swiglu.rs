//! The gated MLP as a module.

use super::checkpoint::{Naming, Sizes};
use crate::ops::{self, Check};
use crate::{Activation, GateUp, IntoActivation, PackedOrder, Plan};
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::{Linear, VarBuilder};

/// `y = (act(x Wgᵀ + bg) · (x Wuᵀ + bu)) Wdᵀ + bd`: a gated MLP as one op; SwiGLU with SiLU, GeGLU with GELU.
///
/// Its tensors are those that it was made from, never copies: variables of a `VarMap` keep their names and train, and
/// what an optimiser writes into them is what the next call reads. `forward` takes `[.., hidden_size]` and gives
/// `[.., out_features]`, of the parameters' dtype (f32, f16, bf16 or f64) and on their device.
///
/// In a model that has the three layers, it is one line:
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_fused_mlp::FusedSwiGlu;
/// use candle_nn::Linear;
///
/// # let linear = |rows, cols| Ok::<_, candle_core::Error>(
/// #     Linear::new(Tensor::randn(0f32, 0.1, (rows, cols), &Device::Cpu)?, None));
/// # let (gate_proj, up_proj, down_proj) = (linear(172, 64)?, linear(172, 64)?, linear(64, 172)?);
/// # let xs = Tensor::randn(0f32, 1., (1, 64), &Device::Cpu)?;
/// // before: (gate_proj.forward(&xs)?.silu()? * up_proj.forward(&xs)?)?.apply(&down_proj)?
/// let mlp = FusedSwiGlu::from_linears(&gate_proj, &up_proj, &down_proj)?;
/// let ys = mlp.forward(&xs)?;
/// # assert_eq!(ys.dims(), &[1, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FusedSwiGlu {
    gate_up: GateUp,
    down: Linear,
    activation: Activation,
    span: tracing::Span,
}

impl FusedSwiGlu {
    /// The module of these weights: gate and up `[intermediate_size, hidden_size]`, down `[out_features,
    /// intermediate_size]`, each with any strides (a transposed view is not copied). With biases:
    /// [`FusedSwiGlu::from_linears`].
    ///
    /// # Errors
    /// Tensors of other shapes, of a dtype other than f32, f16, bf16 and f64, or not all of one dtype and on one
    /// device; an activation that is not elementwise.
    pub fn new(gate: Tensor, up: Tensor, down: Tensor, activation: impl IntoActivation) -> Result<Self> {
        let (gate, up) = (Linear::new(gate, None), Linear::new(up, None));
        Self::checked(GateUp::Separate { gate, up }, Linear::new(down, None), activation)
    }

    /// The module of a model's own three layers, whose tensors it shares, with SiLU; with another activation:
    /// [`FusedSwiGlu::with_activation`].
    ///
    /// # Errors
    /// Those of [`FusedSwiGlu::new`].
    pub fn from_linears(gate: &Linear, up: &Linear, down: &Linear) -> Result<Self> {
        Self::checked(GateUp::Separate { gate: gate.clone(), up: up.clone() }, down.clone(), Activation::Silu)
    }

    /// The module of a model whose gate and up are one layer of `[2 intermediate_size, hidden_size]`, with SiLU; with
    /// another activation: [`FusedSwiGlu::with_activation`].
    ///
    /// # Errors
    /// Those of [`FusedSwiGlu::new`]; an odd number of rows in `gate_up`.
    pub fn from_packed(gate_up: &Linear, order: PackedOrder, down: &Linear) -> Result<Self> {
        Self::checked(GateUp::Packed { linear: gate_up.clone(), order }, down.clone(), Activation::Silu)
    }

    /// The module out of a checkpoint under whichever naming [`Naming::detect`] finds at `vb`.
    ///
    /// # Errors
    /// Those of [`Naming::detect`] and of [`fused_swiglu`]; a plain MLP at `vb`.
    pub fn detect(
        hidden_size: usize,
        intermediate_size: usize,
        activation: impl IntoActivation,
        vb: VarBuilder,
    ) -> Result<Self> {
        let naming = Naming::detect(hidden_size, intermediate_size, &vb)?;
        fused_swiglu(hidden_size, intermediate_size, activation, &naming, vb)
    }

    /// The same module with this activation on its gate.
    ///
    /// # Errors
    /// An activation that is not elementwise.
    pub fn with_activation(self, activation: impl IntoActivation) -> Result<Self> {
        Ok(Self { activation: activation.into_activation()?, ..self })
    }

    fn checked(gate_up: GateUp, down: Linear, activation: impl IntoActivation) -> Result<Self> {
        const NAME: &str = "FusedSwiGlu";
        let (gate, up) = gate_up.split()?;
        let check = Check { op: NAME, like: gate.weight(), like_name: "gate weight" };
        check.dtype()?;
        let &[_, hidden_size] = gate.weight().dims() else {
            bail!(
                "{NAME}: gate weight: expected shape [intermediate_size, hidden_size], found {:?}",
                gate.weight().dims()
            );
        };
        let intermediate_size = check.linear("gate", &gate, None, hidden_size)?;
        check.linear("up", &up, Some(intermediate_size), hidden_size)?;
        check.linear("down", &down, None, intermediate_size)?;
        let activation = activation.into_activation()?;
        Ok(Self { gate_up, down, activation, span: tracing::span!(tracing::Level::TRACE, "mlp") })
    }

    /// The gate and up projections.
    pub fn gate_up(&self) -> &GateUp {
        &self.gate_up
    }

    /// The down projection.
    pub fn down(&self) -> &Linear {
        &self.down
    }

    /// The activation on the gate.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// The size of what `forward` takes.
    pub fn hidden_size(&self) -> usize {
        match &self.gate_up {
            GateUp::Separate { gate: linear, .. } | GateUp::Packed { linear, .. } => linear.weight().dims()[1],
        }
    }

    /// The size between the layers: of the gate, and of up.
    pub fn intermediate_size(&self) -> usize {
        self.down.weight().dims()[1]
    }

    /// The size of what `forward` gives: as a rule the hidden size.
    pub fn out_features(&self) -> usize {
        self.down.weight().dims()[0]
    }

    /// What `forward` would run for this x, and what it costs beside candle's own ops.
    ///
    /// # Errors
    /// Those of `forward`; sizes whose costs do not fit in 64 bits.
    pub fn plan(&self, xs: &Tensor) -> Result<Plan> {
        Plan::of_swiglu(xs, &self.gate_up, &self.down, self.activation)
    }
}

impl Module for FusedSwiGlu {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let _enter = self.span.enter();
        ops::fused_swiglu(xs, &self.gate_up, &self.down, self.activation)
    }
}

/// A [`FusedSwiGlu`] out of a `VarBuilder`, its tensors under the names of `naming`; a `VarMap` makes those it lacks.
///
/// # Errors
/// A tensor that is missing or of another shape, a bias that `naming` excludes, a `naming` of a plain MLP, and those
/// of [`FusedSwiGlu::new`].
pub fn fused_swiglu(
    hidden_size: usize,
    intermediate_size: usize,
    activation: impl IntoActivation,
    naming: &Naming,
    vb: VarBuilder,
) -> Result<FusedSwiGlu> {
    let sizes = Sizes { in_features: hidden_size, intermediate_size, out_features: hidden_size };
    let (gate_up, down) = naming.gated_layers(sizes, &vb)?;
    FusedSwiGlu::checked(gate_up, down, activation)
}
