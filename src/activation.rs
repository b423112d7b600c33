//! The activations, in one table: their names, their formula, its derivative and the chain of candle ops that an
//! unfused model runs in their place.
//!
//! A new activation is one row of the table below (and one line of the CUDA header): every other place, the CPU
//! kernels' epilogues included, goes through it.

use crate::cpu::Real;
use candle_core::{bail, Result, Tensor};
use std::fmt;
use std::str::FromStr;

/// Builds [`Activation`] and all that is known about each of its variants out of one row a variant:
/// `Variant(parameter = default) "name" | "alias"... { unfused, ops, value, slope }`. `ops` counts the candle ops that
/// `unfused` runs: those of one tensor (or a tensor and a number), and those of two.
macro_rules! activations {
    ($(
        $(#[$doc:meta])*
        $variant:ident $(($parameter:ident = $default:literal))? $name:literal $(| $alias:literal)* {
            unfused: |$tensor:ident| $unfused:expr,
            ops: ($unary:literal, $binary:literal),
            value: |$x:ident| $value:expr,
            slope: |$y:ident| $slope:expr $(,)?
        }
    )*) => {
        /// An elementwise activation.
        ///
        /// Parsed from and written as the names that Hugging Face configurations use (`hidden_act`), by [`FromStr`],
        /// [`Display`](fmt::Display) and serde alike; a parameter goes in parentheses: `leaky_relu(0.2)`.
        #[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        #[non_exhaustive]
        pub enum Activation {
            $($(#[$doc])* $variant $((activations!(@type $parameter)))?,)*
        }

        impl Activation {
            /// Every activation, those with a parameter at its default.
            pub const ALL: &'static [Self] = &[$(Self::$variant $(($default))?),*];

            /// The name without the parameter.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant $((activations!(@ignore $parameter)))? => $name,)*
                }
            }

            /// The parameter (ELU's alpha, leaky ReLU's slope), where there is one.
            pub fn parameter(&self) -> Option<f64> {
                match *self {
                    $(Self::$variant $(($parameter))? => activations!(@option $($parameter)?),)*
                }
            }

            /// Its place in the table, which is its number in the CUDA header.
            #[cfg(feature = "cuda")]
            pub(crate) fn index(&self) -> i32 {
                /// The variants without their parameters.
                enum Row {
                    $($variant,)*
                }
                (match self {
                    $(Self::$variant $((activations!(@ignore $parameter)))? => Row::$variant,)*
                }) as i32
            }

            /// The activation of this name, its parameter replaced by `parameter` where it has one.
            fn from_name(name: &str, given: Option<f64>) -> Option<Self> {
                match name {
                    $($name $(| $alias)* => {
                        $(let $parameter = given.unwrap_or($default);)?
                        let found = Self::$variant $(($parameter))?;
                        (given.is_none() || found.parameter().is_some()).then_some(found)
                    })*
                    _ => None,
                }
            }

            /// The activation as candle's own differentiable ops compute it: what an unfused model runs.
            ///
            /// # Errors
            /// Those of the candle ops.
            pub fn unfused(&self, xs: &Tensor) -> Result<Tensor> {
                match *self {
                    $(Self::$variant $(($parameter))? => {
                        let $tensor = xs;
                        $unfused
                    })*
                }
            }

            /// How many candle ops of one tensor, and how many of two, [`unfused`](Self::unfused) runs.
            pub(crate) fn unfused_ops(&self) -> (u64, u64) {
                match self {
                    $(Self::$variant $((activations!(@ignore $parameter)))? => ($unary, $binary),)*
                }
            }

            /// Replaces each value by the activation of it.
            #[inline(always)]
            pub(crate) fn apply<R: Real>(&self, values: &mut [R]) {
                match *self {
                    $(Self::$variant $(($parameter))? => {
                        $(let $parameter = R::of($parameter);)?
                        for value in values {
                            let $x = *value;
                            *value = $value;
                        }
                    })*
                }
            }

            /// Replaces each value by the derivative of the activation at it.
            pub(crate) fn apply_slope<R: Real>(&self, values: &mut [R]) {
                match *self {
                    $(Self::$variant $(($parameter))? => {
                        $(let $parameter = R::of($parameter);)?
                        for value in values {
                            let $y = *value;
                            *value = $slope;
                        }
                    })*
                }
            }
        }
    };
    (@type $parameter:ident) => { f64 };
    (@ignore $parameter:ident) => { _ };
    (@option $parameter:ident) => { Some($parameter) };
    (@option) => { None };
}

activations! {
    /// `x Φ(x)` with the normal distribution function Φ, by the error function (Hendrycks & Gimpel, 2016).
    Gelu "gelu" {
        unfused: |xs| xs.gelu_erf(),
        ops: (1, 0),
        value: |x| x * normal_cdf(x),
        slope: |x| normal_cdf(x) + x * normal_density(x),
    }
    /// GELU's approximation by tanh: `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    GeluTanh "gelu_pytorch_tanh" | "gelu_new" | "gelu_tanh" | "gelu_fast" {
        unfused: |xs| xs.gelu(),
        ops: (1, 0),
        value: |x| x * sigmoid(gelu_tanh_argument(x)),
        slope: |x| {
            let s = sigmoid(gelu_tanh_argument(x));
            s + x * s * (R::ONE - s) * gelu_tanh_argument_slope(x)
        },
    }
    /// CLIP's `x σ(1.702 x)`.
    QuickGelu "quick_gelu" {
        unfused: |xs| xs * candle_nn::ops::sigmoid(&(xs * 1.702)?)?,
        ops: (2, 1),
        value: |x| x * sigmoid(x * R::of(1.702)),
        slope: |x| {
            let s = sigmoid(x * R::of(1.702));
            s + x * s * (R::ONE - s) * R::of(1.702)
        },
    }
    /// `max(x, 0)`.
    Relu "relu" {
        unfused: |xs| xs.relu(),
        ops: (1, 0),
        value: |x| x.max_number(R::ZERO),
        slope: |x| if x >= R::ZERO { R::ONE } else { R::ZERO },
    }
    /// `max(x, 0)²` (Primer, RWKV, Nemotron).
    Relu2 "relu2" | "relu_squared" | "squared_relu" {
        unfused: |xs| xs.relu()?.sqr(),
        ops: (2, 0),
        value: |x| {
            let x = x.max_number(R::ZERO);
            x * x
        },
        slope: |x| x.max_number(R::ZERO) * R::of(2.),
    }
    /// `min(max(x, 0), 6)`.
    Relu6 "relu6" {
        unfused: |xs| xs.clamp(0f32, 6f32),
        ops: (2, 0),
        value: |x| clamp(x, R::ZERO, R::of(6.)),
        slope: |x| if x > R::ZERO && x < R::of(6.) { R::ONE } else { R::ZERO },
    }
    /// `x σ(x)`, also called swish.
    Silu "silu" | "swish" {
        unfused: |xs| xs.silu(),
        ops: (1, 0),
        value: |x| x / (R::ONE + (-x).exp()),
        slope: |x| {
            let s = sigmoid(x);
            s + x * s * (R::ONE - s)
        },
    }
    /// The logistic function `σ(x) = 1 / (1 + exp(-x))`.
    Sigmoid "sigmoid" {
        unfused: |xs| candle_nn::ops::sigmoid(xs),
        ops: (1, 0),
        value: |x| sigmoid(x),
        slope: |x| {
            let s = sigmoid(x);
            s * (R::ONE - s)
        },
    }
    /// `(x + 3) / 6`, kept between 0 and 1.
    HardSigmoid "hard_sigmoid" | "hardsigmoid" {
        unfused: |xs| candle_nn::ops::hard_sigmoid(xs),
        ops: (4, 0),
        value: |x| hard_sigmoid(x),
        slope: |x| hard_sigmoid_slope(x),
    }
    /// `x` times [`HardSigmoid`](Self::HardSigmoid) of it.
    HardSwish "hard_swish" | "hardswish" {
        unfused: |xs| xs * candle_nn::ops::hard_sigmoid(xs)?,
        ops: (4, 1),
        value: |x| x * hard_sigmoid(x),
        slope: |x| hard_sigmoid(x) + x * hard_sigmoid_slope(x),
    }
    /// `x tanh(ln(1 + exp(x)))`.
    Mish "mish" {
        unfused: |xs| candle_nn::ops::mish(xs),
        ops: (4, 1),
        value: |x| x * tanh_softplus(x),
        slope: |x| {
            let t = tanh_softplus(x);
            t + x * (R::ONE - t * t) * sigmoid(x)
        },
    }
    /// `x` where it is positive, `alpha (exp(x) - 1)` elsewhere.
    Elu(alpha = 1.0) "elu" {
        unfused: |xs| xs.elu(alpha),
        ops: (1, 0),
        value: |x| if x.is_positive() { x } else { (x.exp() - R::ONE) * alpha },
        slope: |x| if x.is_positive() { R::ONE } else { x.exp() * alpha },
    }
    /// `x` where it is positive, `slope x` elsewhere.
    LeakyRelu(slope = 0.01) "leaky_relu" {
        unfused: |xs| candle_nn::ops::leaky_relu(xs, slope),
        ops: (1, 3),
        value: |x| x.max_or_nan(R::ZERO) + x.min_or_nan(R::ZERO) * slope,
        slope: |x| if x > R::ZERO { R::ONE } else { slope },
    }
}

#[inline(always)]
fn sigmoid<R: Real>(x: R) -> R {
    R::ONE / (R::ONE + (-x).exp())
}

/// Φ(x). Both tails keep their relative accuracy: the upper one is 1 minus the lower one's mirror image.
#[inline(always)]
fn normal_cdf<R: Real>(x: R) -> R {
    let tail = x.normal_tail();
    if x < R::ZERO {
        tail
    } else {
        R::ONE - tail
    }
}

/// `exp(-x²/2) / √(2π)`
#[inline(always)]
fn normal_density<R: Real>(x: R) -> R {
    (x * x * R::of(-0.5)).exp() * R::of(0.398_942_280_401_432_7)
}

/// `2 √(2/π) (x + 0.044715 x³)`: twice the argument of GELU's tanh, since `(1 + tanh(u)) / 2 = σ(2u)`.
#[inline(always)]
fn gelu_tanh_argument<R: Real>(x: R) -> R {
    x * R::of(1.595_769_121_605_730_7) * (R::ONE + x * x * R::of(0.044715))
}

#[inline(always)]
fn gelu_tanh_argument_slope<R: Real>(x: R) -> R {
    R::of(1.595_769_121_605_730_7) * (R::ONE + x * x * R::of(3. * 0.044715))
}

/// Keeps NaN, as candle's `clamp` does.
#[inline(always)]
fn clamp<R: Real>(x: R, low: R, high: R) -> R {
    x.max_or_nan(low).min_or_nan(high)
}

#[inline(always)]
fn hard_sigmoid<R: Real>(x: R) -> R {
    clamp((x + R::of(3.)) / R::of(6.), R::ZERO, R::ONE)
}

#[inline(always)]
fn hard_sigmoid_slope<R: Real>(x: R) -> R {
    if x > R::of(-3.) && x < R::of(3.) {
        R::of(1. / 6.)
    } else {
        R::ZERO
    }
}

/// `tanh(ln(1 + exp(x)))`, which is `n / (n + 2)` with `n = exp(x) (exp(x) + 2)`; 1 to the last bit from 20 on.
#[inline(always)]
fn tanh_softplus<R: Real>(x: R) -> R {
    let e = x.min_or_nan(R::of(20.)).exp();
    let n = e * (e + R::of(2.));
    n / (n + R::of(2.))
}

impl Activation {
    /// The activation of a candle [`candle_nn::Activation`].
    ///
    /// # Errors
    /// `Swiglu` is no elementwise function: it halves its input. The error names what to use in its place.
    pub fn from_candle(activation: candle_nn::Activation) -> Result<Self> {
        use candle_nn::Activation as C;
        Ok(match activation {
            C::Gelu => Self::Gelu,
            C::NewGelu | C::GeluPytorchTanh => Self::GeluTanh,
            C::Relu => Self::Relu,
            C::Relu2 => Self::Relu2,
            C::Relu6 => Self::Relu6,
            C::Silu | C::Swish => Self::Silu,
            C::Sigmoid => Self::Sigmoid,
            C::HardSigmoid => Self::HardSigmoid,
            C::HardSwish => Self::HardSwish,
            C::Mish => Self::Mish,
            C::Elu(alpha) => Self::Elu(alpha),
            C::LeakyRelu(slope) => Self::LeakyRelu(slope),
            C::Swiglu => bail!(
                "activation: expected an elementwise function, found Swiglu, which splits its input in two: use \
                 FusedSwiGlu with Activation::Silu and a packed gate and up projection"
            ),
        })
    }
}

/// What can be given where an activation is asked for: an [`Activation`] or a [`candle_nn::Activation`].
pub trait IntoActivation {
    /// The activation meant.
    ///
    /// # Errors
    /// `candle_nn::Activation::Swiglu`, which is not elementwise.
    fn into_activation(self) -> Result<Activation>;
}

impl IntoActivation for Activation {
    fn into_activation(self) -> Result<Activation> {
        Ok(self)
    }
}

impl IntoActivation for candle_nn::Activation {
    fn into_activation(self) -> Result<Activation> {
        Activation::from_candle(self)
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self.parameter() {
            Some(parameter) => write!(f, "({parameter})"),
            None => Ok(()),
        }
    }
}

impl FromStr for Activation {
    type Err = candle_core::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, parameter) = match text.trim().strip_suffix(')').and_then(|t| t.split_once('(')) {
            Some((name, parameter)) => (name, Some(parameter.trim().parse::<f64>().ok())),
            None => (text.trim(), None),
        };
        let found = match parameter {
            Some(None) => None,
            given => Self::from_name(&name.to_ascii_lowercase(), given.flatten()),
        };
        match found {
            Some(activation) => Ok(activation),
            None => {
                let known = Self::ALL.iter().map(|a| a.to_string()).collect::<Vec<_>>().join(", ");
                bail!("activation: expected one of {known}, found {text:?}")
            }
        }
    }
}

impl TryFrom<String> for Activation {
    type Error = candle_core::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Activation> for String {
    fn from(activation: Activation) -> Self {
        activation.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    /// Points that reach every branch, both tails and the exponential's limits.
    fn points() -> Vec<f64> {
        let mut points: Vec<f64> = (-400..=400).map(|i| i as f64 * 0.05 + 0.003).collect();
        points.extend([-1e30, -700.3, -120.5, -90.1, 88.2, 95.5, 1e30, 1e-30, -1e-30]);
        points
    }

    #[test]
    fn values_are_candles() -> Result<()> {
        for activation in Activation::ALL {
            let xs = points();
            let expected = activation.unfused(&Tensor::new(xs.clone(), &Device::Cpu)?)?.to_vec1::<f64>()?;
            let (mut wide, mut narrow) = (xs.clone(), xs.iter().map(|&x| x as f32).collect::<Vec<_>>());
            activation.apply(&mut wide);
            activation.apply(&mut narrow);
            for (i, &x) in xs.iter().enumerate() {
                let scale = expected[i].abs().max(0.1);
                assert!(
                    (wide[i] - expected[i]).abs() <= 1e-13 * scale,
                    "{activation} at {x}: {} {}",
                    wide[i],
                    expected[i]
                );
                if expected[i].abs() < 1e38 {
                    let error = (narrow[i] as f64 - expected[i]).abs();
                    assert!(error <= 1.5e-6 * scale, "{activation} at {x} in f32: {} {}", narrow[i], expected[i]);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn slopes_are_the_values_differences() {
        for activation in Activation::ALL {
            for x in points().into_iter().filter(|x| x.abs() < 20. && x.abs() > 1e-10) {
                let step = 1e-6;
                let (mut ends, mut slope) = ([x + step, x - step], [x]);
                activation.apply(&mut ends);
                activation.apply_slope(&mut slope);
                let measured = (ends[0] - ends[1]) / (2. * step);
                assert!(
                    (measured - slope[0]).abs() < 1e-7 * x.abs().max(1.),
                    "{activation} at {x}: {measured} {slope:?}"
                );
            }
        }
    }

    #[test]
    fn not_finite_where_candle_is_not() -> Result<()> {
        let xs = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0., -0.];
        for activation in Activation::ALL {
            let expected = activation.unfused(&Tensor::new(&xs, &Device::Cpu)?)?.to_dtype(DType::F32)?;
            let mut found = xs;
            activation.apply(&mut found);
            for ((x, e), f) in xs.iter().zip(expected.to_vec1::<f32>()?).zip(found) {
                assert!(e.is_nan() == f.is_nan() && e.is_infinite() == f.is_infinite(), "{activation} at {x}: {e} {f}");
            }
        }
        Ok(())
    }

    #[test]
    fn names_round_trip() {
        for activation in Activation::ALL {
            assert_eq!(activation.to_string().parse::<Activation>().unwrap(), *activation);
        }
        assert_eq!("LeakyReLU".parse::<Activation>().ok(), None);
        assert_eq!("leaky_relu(0.2)".parse::<Activation>().unwrap(), Activation::LeakyRelu(0.2));
        assert_eq!("elu".parse::<Activation>().unwrap(), Activation::Elu(1.0));
        for wrong in ["", "gelu(", "gelu(1)", "elu(x)", "elu()", "softmax"] {
            let error = wrong.parse::<Activation>().unwrap_err().to_string();
            assert!(error.contains("expected one of gelu,") && error.contains("quick_gelu"), "{wrong}: {error}");
        }
        assert_eq!(Activation::from_candle(candle_nn::Activation::NewGelu).unwrap(), Activation::GeluTanh);
        assert!(Activation::from_candle(candle_nn::Activation::Swiglu)
            .unwrap_err()
            .to_string()
            .contains("FusedSwiGlu"));
    }
}
