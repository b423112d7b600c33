//! Arithmetic on sums: what the activations need of f32 and f64.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// The type that products are summed in, f32 or f64.
///
/// The f32 functions have no branch and no call, so that a loop over them becomes vector code in whatever
/// instruction set the caller was compiled for.
pub trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;

    /// The nearest value to `x`.
    fn of(x: f64) -> Self;

    /// `e` to the power of `self`; 0, infinity and NaN where they belong.
    fn exp(self) -> Self;

    /// `erfc(|self| / √2) / 2`: the probability that a normal variable exceeds `|self|`.
    fn normal_tail(self) -> Self;

    /// The larger; `other` where `self` is NaN.
    fn max_number(self, other: Self) -> Self;

    /// `self * a + b`, rounded once where the target the crate is built for has an instruction for that, else twice.
    fn multiply_add(self, a: Self, b: Self) -> Self;

    /// Whether the sign bit is clear.
    fn is_positive(self) -> bool;

    /// The larger; NaN where `self` is.
    #[inline(always)]
    fn max_or_nan(self, other: Self) -> Self {
        if self < other {
            other
        } else {
            self
        }
    }

    /// The smaller; NaN where `self` is.
    #[inline(always)]
    fn min_or_nan(self, other: Self) -> Self {
        if self > other {
            other
        } else {
            self
        }
    }
}

/// Whether every processor that the crate is built for multiplies and adds in one instruction.
const FUSES: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// `(((c₀ x + c₁) x + ...) x + cₙ`
#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    coefficients.into_iter().fold(0., |sum, c| sum * x + c)
}

impl Real for f32 {
    const ZERO: Self = 0.;
    const ONE: Self = 1.;

    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }

    /// `2ⁿ exp(r)` with n the nearest integer to x / ln 2. The polynomial is a weighted minimax fit on |r| <= 0.354
    /// with a relative error of 3.6e-9; rounding leaves about one unit in the last place.
    #[inline(always)]
    fn exp(self) -> Self {
        const ROUND: f32 = 12_582_912.; // 1.5 * 2^23: adding it rounds to an integer
        let x = self.max_or_nan(-104.).min_or_nan(89.);
        let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
        let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
        let q = polynomial(r, [0.001_381_166, 0.008_370_135, 0.041_668_53, 0.166_665_09, 0.499_999_93]);
        let p = 1. + (r + r * r * q);
        // In two factors, so that neither overflows where the result is subnormal or near the largest number.
        let half = (n * 0.5 + ROUND) - ROUND;
        let power = |n: f32| f32::from_bits(((n + (ROUND + 127.)).to_bits() << 23) & 0x7f80_0000);
        let result = p * power(half) * power(n - half);
        if self.is_nan() {
            self
        } else {
            result
        }
    }

    /// `exp(-z²) g(1 / (1 + 0.4 z))` with z = |x| / √2 and g a weighted minimax polynomial for `exp(z²) erfc(z) / 2`
    /// (relative error 1.3e-8 before rounding).
    #[inline(always)]
    fn normal_tail(self) -> Self {
        let z = self.abs() * std::f32::consts::FRAC_1_SQRT_2;
        let t = 1. / (1. + 0.4 * z);
        let g = polynomial(
            t,
            [
                -0.026_026_705,
                0.178_828_64,
                -0.454_205_8,
                0.488_713_46,
                -0.236_244_77,
                0.246_670_91,
                0.138_289_56,
                0.213_114_65,
                0.225_163_76,
                0.225_696_32,
            ],
        );
        // The trait's `exp`: f32's own is a call.
        0.5 * t * g * Real::exp(-(z * z))
    }

    #[inline(always)]
    fn max_number(self, other: Self) -> Self {
        self.max(other)
    }

    #[inline(always)]
    fn multiply_add(self, a: Self, b: Self) -> Self {
        if FUSES {
            self.mul_add(a, b)
        } else {
            self * a + b
        }
    }

    #[inline(always)]
    fn is_positive(self) -> bool {
        self.is_sign_positive()
    }
}

impl Real for f64 {
    const ZERO: Self = 0.;
    const ONE: Self = 1.;

    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }

    #[inline(always)]
    fn normal_tail(self) -> Self {
        0.5 * libm::erfc(self.abs() * std::f64::consts::FRAC_1_SQRT_2)
    }

    #[inline(always)]
    fn max_number(self, other: Self) -> Self {
        self.max(other)
    }

    #[inline(always)]
    fn multiply_add(self, a: Self, b: Self) -> Self {
        if FUSES {
            self.mul_add(a, b)
        } else {
            self * a + b
        }
    }

    #[inline(always)]
    fn is_positive(self) -> bool {
        self.is_sign_positive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_of_the_exact_value() {
        for i in -1_040_000..=890_000 {
            let x = i as f32 * 1e-4;
            let (exact, found) = (f64::exp(x as f64), Real::exp(x) as f64);
            let unit = (exact * 2f64.powi(-23)).max(2f64.powi(-149));
            assert!((found - exact).abs() <= 2. * unit || exact > f32::MAX as f64, "{x}: {found} {exact}");
        }
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(Real::exp(0f32), 1.);
        assert!(Real::exp(f32::NAN).is_nan());
    }

    #[test]
    fn normal_tail_keeps_its_relative_accuracy() {
        for i in 0..=120_000 {
            let x = i as f32 * 1e-4;
            let exact = 0.5 * libm::erfc(x as f64 * std::f64::consts::FRAC_1_SQRT_2);
            // The exponent is rounded: its error grows with its size.
            let allowed = 5e-7 + 1.2e-7 * (x * x) as f64;
            assert!((x.normal_tail() as f64 / exact - 1.).abs() < allowed, "{x}: {} {exact}", x.normal_tail());
            assert_eq!(x.normal_tail(), (-x).normal_tail());
        }
        assert_eq!(f32::INFINITY.normal_tail(), 0.);
        assert!(f32::NAN.normal_tail().is_nan());
    }
}
