//! The plain MLP as a module.

use super::checkpoint::{Naming, Sizes};
use crate::ops::{self, Check};
use crate::{Activation, IntoActivation, Plan};
use candle_core::{bail, Module, Result, Tensor};
use candle_nn::{Linear, VarBuilder};

/// `y = act(x W1ᵀ + b1) W2ᵀ + b2`: two [`Linear`]s and the activation between them, as one op.
///
/// Its tensors are those that it was made from, never copies: variables of a `VarMap` keep their names and train, and
/// what an optimiser writes into them is what the next call reads. `forward` takes `[.., hidden_size]` and gives
/// `[.., out_features]`, of the parameters' dtype (f32, f16, bf16 or f64) and on their device.
///
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_fused_mlp::{fused_mlp, Activation, Naming};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let variables = VarMap::new();
/// let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let mlp = fused_mlp(32, 128, Activation::Gelu, &Naming::BERT, vb.pp("encoder.layer.0"))?;
/// let xs = Tensor::randn(0f32, 1., (2, 5, 32), &Device::Cpu)?;
/// assert_eq!(mlp.forward(&xs)?.dims(), &[2, 5, 32]);
/// assert!(variables.data().lock().unwrap().contains_key("encoder.layer.0.intermediate.dense.weight"));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FusedMlp {
    fc1: Linear,
    fc2: Linear,
    activation: Activation,
    span: tracing::Span,
}

impl FusedMlp {
    /// The module of these tensors: weights `[intermediate_size, hidden_size]` and `[out_features,
    /// intermediate_size]`, each with any strides (a transposed view is not copied), biases `[intermediate_size]` and
    /// `[out_features]`.
    ///
    /// # Errors
    /// Tensors of other shapes, of a dtype other than f32, f16, bf16 and f64, or not all of one dtype and on one
    /// device; an activation that is not elementwise.
    pub fn new(
        fc1_weight: Tensor,
        fc1_bias: Option<Tensor>,
        fc2_weight: Tensor,
        fc2_bias: Option<Tensor>,
        activation: impl IntoActivation,
    ) -> Result<Self> {
        Self::checked(Linear::new(fc1_weight, fc1_bias), Linear::new(fc2_weight, fc2_bias), activation)
    }

    /// The module of a model's own two layers, whose tensors it shares.
    ///
    /// # Errors
    /// Those of [`FusedMlp::new`].
    pub fn from_linears(fc1: &Linear, fc2: &Linear, activation: impl IntoActivation) -> Result<Self> {
        Self::checked(fc1.clone(), fc2.clone(), activation)
    }

    /// The module out of a checkpoint under whichever naming [`Naming::detect`] finds at `vb`.
    ///
    /// # Errors
    /// Those of [`Naming::detect`] and of [`fused_mlp`]; a gated MLP at `vb`.
    pub fn detect(
        hidden_size: usize,
        intermediate_size: usize,
        activation: impl IntoActivation,
        vb: VarBuilder,
    ) -> Result<Self> {
        let naming = Naming::detect(hidden_size, intermediate_size, &vb)?;
        fused_mlp(hidden_size, intermediate_size, activation, &naming, vb)
    }

    fn checked(fc1: Linear, fc2: Linear, activation: impl IntoActivation) -> Result<Self> {
        const NAME: &str = "FusedMlp";
        let check = Check { op: NAME, like: fc1.weight(), like_name: "fc1 weight" };
        check.dtype()?;
        let &[_, hidden_size] = fc1.weight().dims() else {
            bail!(
                "{NAME}: fc1 weight: expected shape [intermediate_size, hidden_size], found {:?}",
                fc1.weight().dims()
            );
        };
        let intermediate_size = check.linear("fc1", &fc1, None, hidden_size)?;
        check.linear("fc2", &fc2, None, intermediate_size)?;
        let activation = activation.into_activation()?;
        Ok(Self { fc1, fc2, activation, span: tracing::span!(tracing::Level::TRACE, "mlp") })
    }

    /// The first layer.
    pub fn fc1(&self) -> &Linear {
        &self.fc1
    }

    /// The second layer.
    pub fn fc2(&self) -> &Linear {
        &self.fc2
    }

    /// The activation between the layers.
    pub fn activation(&self) -> Activation {
        self.activation
    }

    /// The size of what `forward` takes.
    pub fn hidden_size(&self) -> usize {
        self.fc1.weight().dims()[1]
    }

    /// The size between the layers.
    pub fn intermediate_size(&self) -> usize {
        self.fc1.weight().dims()[0]
    }

    /// The size of what `forward` gives: the hidden size, but in a projector.
    pub fn out_features(&self) -> usize {
        self.fc2.weight().dims()[0]
    }

    /// What `forward` would run for this x, and what it costs beside candle's own ops.
    ///
    /// # Errors
    /// Those of `forward`; sizes whose costs do not fit in 64 bits.
    pub fn plan(&self, xs: &Tensor) -> Result<Plan> {
        Plan::of_mlp(xs, &self.fc1, &self.fc2, self.activation)
    }
}

impl Module for FusedMlp {
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let _enter = self.span.enter();
        ops::fused_mlp(xs, &self.fc1, &self.fc2, self.activation)
    }
}

/// A [`FusedMlp`] out of a `VarBuilder`, its tensors under the names of `naming`; a `VarMap` makes those it lacks.
///
/// # Errors
/// A tensor that is missing or of another shape, a bias that `naming` excludes, a `naming` of a gated MLP, and those
/// of [`FusedMlp::new`].
pub fn fused_mlp(
    hidden_size: usize,
    intermediate_size: usize,
    activation: impl IntoActivation,
    naming: &Naming,
    vb: VarBuilder,
) -> Result<FusedMlp> {
    fused_projector(hidden_size, intermediate_size, hidden_size, activation, naming, vb)
}

/// [`fused_mlp`] with an output of another size than the input, as between the parts of a multimodal model.
///
/// # Errors
/// Those of [`fused_mlp`].
pub fn fused_projector(
    in_features: usize,
    intermediate_size: usize,
    out_features: usize,
    activation: impl IntoActivation,
    naming: &Naming,
    vb: VarBuilder,
) -> Result<FusedMlp> {
    let (fc1, fc2) = naming.plain_layers(Sizes { in_features, intermediate_size, out_features }, &vb)?;
    FusedMlp::checked(fc1, fc2, activation)
}
