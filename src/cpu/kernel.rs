//! What an instruction set has to offer to the kernels, for one dtype.

#![allow(clippy::needless_range_loop)] // registers are arrays indexed in loops that the compiler unrolls

use super::{Element, Real};
use std::marker::PhantomData;

/// Vector operations on sums, and on what is multiplied into them.
///
/// # Safety
/// Implementors promise that every method reads and writes just the elements that its documentation names.
/// Callers promise that the processor has the implementor's instructions, that pointers are valid for those elements,
/// and that the call is inlined into a function compiled for those instructions.
pub(crate) unsafe trait Kernel {
    /// The tensors' dtype.
    type Element: Element;
    /// One lane of what is multiplied: a widened element, or a pair of neighbouring elements.
    type Operand: Copy + Default + Send + Sync + 'static;
    /// `LANES` operands.
    type Vector: Copy;
    /// `LANES` sums.
    type Sums: Copy;
    /// Operands in a vector.
    const LANES: usize;
    /// Elements in an operand.
    const DEPTH: usize;

    /// Zeros.
    unsafe fn zero() -> Self::Sums;
    /// The `LANES` sums from `from` on.
    unsafe fn load_sums(from: *const Sum<Self>) -> Self::Sums;
    /// Writes the `LANES` sums from `to` on.
    unsafe fn store_sums(to: *mut Sum<Self>, sums: Self::Sums);
    /// `sums + a b`, lane by lane (over the pair, where an operand is one).
    unsafe fn multiply_add(sums: Self::Sums, a: Self::Vector, b: Self::Vector) -> Self::Sums;
    /// `a + b`, lane by lane.
    unsafe fn add(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// The sum over the lanes, always in the same order.
    unsafe fn total(sums: Self::Sums) -> Sum<Self>;
    /// The [`total`](Self::total) of each.
    #[inline(always)]
    unsafe fn totals(sums: &[Self::Sums; TOTALS]) -> [Sum<Self>; TOTALS]
    where
        Self: Sized,
    {
        sums.map(|sums| Self::total(sums))
    }
    /// The `LANES * DEPTH` elements from `from` on.
    unsafe fn elements(from: *const Self::Element) -> Self::Vector;
    /// The `LANES` operands from `from` on.
    unsafe fn load(from: *const Self::Operand) -> Self::Vector;
    /// Writes the `LANES` operands from `to` on.
    unsafe fn store(to: *mut Self::Operand, vector: Self::Vector);
    /// `LANES` times the operand at `from`.
    unsafe fn splat(from: *const Self::Operand) -> Self::Vector;
    /// Turns `LANES` rows of `LANES` operands into its columns.
    unsafe fn transpose(rows: &mut [Self::Vector]);
    /// The same, of sums.
    unsafe fn transpose_sums(rows: &mut [Self::Sums]);
    /// Rounds `LANES` sums to elements, and writes them from `to` on.
    unsafe fn round(to: *mut Self::Element, sums: Self::Sums);
    /// Rounds `LANES` sums of operands' first elements, and of their second if they have two, to elements, and writes the
    /// operands from `to` on.
    #[inline(always)]
    unsafe fn round_operands(to: *mut Self::Operand, [sums, _]: [Self::Sums; 2]) {
        debug_assert_eq!(Self::DEPTH, 1);
        let mut elements = [Self::Element::default(); MAX_LANES];
        Self::round(elements.as_mut_ptr(), sums);
        Self::store(to, Self::elements(elements.as_ptr()));
    }
    /// The operand of these elements, of which the first `DEPTH` count.
    fn operand(elements: [Self::Element; 2]) -> Self::Operand;

    /// The first `len <= LANES * DEPTH` elements from `from` on, then zeros.
    #[inline(always)]
    unsafe fn elements_up_to(from: *const Self::Element, len: usize) -> Self::Vector {
        let mut buffer = [Self::Element::default(); MAX_LANES * 2];
        std::ptr::copy_nonoverlapping(from, buffer.as_mut_ptr(), len);
        Self::elements(buffer.as_ptr())
    }

    /// Asks for the cache line at `at` to be brought into the first cache; any address will do.
    #[inline(always)]
    fn prefetch(at: *const Self::Element) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch of any address is no access; SSE is part of x86-64.
        unsafe {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            _mm_prefetch::<_MM_HINT_T0>(at.cast())
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }

    /// The same, into the second cache only.
    #[inline(always)]
    fn prefetch_far(at: *const Self::Element) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        unsafe {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T1};
            _mm_prefetch::<_MM_HINT_T1>(at.cast())
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }
}

/// A vector of the elements from `from` on, of which there are `left`; zeros after those.
#[inline(always)]
pub(crate) unsafe fn elements_of<K: Kernel>(from: *const K::Element, left: usize) -> K::Vector {
    if left >= K::LANES * K::DEPTH {
        K::elements(from)
    } else {
        K::elements_up_to(from, left)
    }
}

/// How many vectors of sums a kernel totals at a time.
pub(crate) const TOTALS: usize = 8;

/// The type that a kernel sums in.
pub(crate) type Sum<K> = <<K as Kernel>::Element as Element>::Sum;

/// The most lanes of any kernel.
pub(crate) const MAX_LANES: usize = 16;

/// f32 lanes of an instruction set, with its conversions from and to the 16-bit dtypes.
///
/// # Safety
/// As for [`Kernel`].
pub(crate) unsafe trait Lanes32 {
    type V: Copy;
    const LANES: usize;

    unsafe fn zero() -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn splat(from: *const f32) -> Self::V;
    unsafe fn multiply_add(sums: Self::V, a: Self::V, b: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn total(v: Self::V) -> f32;
    #[inline(always)]
    unsafe fn totals(v: &[Self::V; TOTALS]) -> [f32; TOTALS] {
        v.map(|v| Self::total(v))
    }
    unsafe fn transpose(rows: &mut [Self::V]);
    unsafe fn load_f16(from: *const half::f16) -> Self::V;
    unsafe fn load_bf16(from: *const half::bf16) -> Self::V;
    unsafe fn round_f16(to: *mut half::f16, v: Self::V);
    unsafe fn round_bf16(to: *mut half::bf16, v: Self::V);
}

/// The kernel that widens elements of `E` to f32 and multiplies those.
pub(crate) struct Widened<L, E>(PhantomData<(L, E)>);

macro_rules! widened {
    ($element:ty, $load:ident, $round:ident) => {
        // SAFETY: each method is one of `Lanes32`, whose implementors promise the same.
        unsafe impl<L: Lanes32> Kernel for Widened<L, $element> {
            type Element = $element;
            type Operand = f32;
            type Vector = L::V;
            type Sums = L::V;
            const LANES: usize = L::LANES;
            const DEPTH: usize = 1;

            #[inline(always)]
            unsafe fn zero() -> L::V {
                L::zero()
            }
            #[inline(always)]
            unsafe fn load_sums(from: *const f32) -> L::V {
                L::load(from)
            }
            #[inline(always)]
            unsafe fn store_sums(to: *mut f32, sums: L::V) {
                L::store(to, sums)
            }
            #[inline(always)]
            unsafe fn multiply_add(sums: L::V, a: L::V, b: L::V) -> L::V {
                L::multiply_add(sums, a, b)
            }
            #[inline(always)]
            unsafe fn add(a: L::V, b: L::V) -> L::V {
                L::add(a, b)
            }
            #[inline(always)]
            unsafe fn total(sums: L::V) -> f32 {
                L::total(sums)
            }
            #[inline(always)]
            unsafe fn totals(sums: &[L::V; TOTALS]) -> [f32; TOTALS] {
                L::totals(sums)
            }
            #[inline(always)]
            unsafe fn elements(from: *const $element) -> L::V {
                L::$load(from)
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> L::V {
                L::load(from)
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, vector: L::V) {
                L::store(to, vector)
            }
            #[inline(always)]
            unsafe fn splat(from: *const f32) -> L::V {
                L::splat(from)
            }
            #[inline(always)]
            unsafe fn transpose(rows: &mut [L::V]) {
                L::transpose(rows)
            }
            #[inline(always)]
            unsafe fn transpose_sums(rows: &mut [L::V]) {
                L::transpose(rows)
            }
            #[inline(always)]
            unsafe fn round(to: *mut $element, sums: L::V) {
                L::$round(to, sums)
            }
            #[inline(always)]
            fn operand(elements: [$element; 2]) -> f32 {
                elements[0].widen()
            }
        }
    };
}

widened!(f32, load, store);
widened!(half::f16, load_f16, round_f16);
widened!(half::bf16, load_bf16, round_bf16);

/// The plain Rust kernel: arrays of lanes, in loops that a compiler turns into whatever vectors it may use.
pub(crate) struct Plain<E>(PhantomData<E>);

/// Lanes of [`Plain`]: a cache line of f64, half of one of f32.
pub(crate) const PLAIN_LANES: usize = 8;

// SAFETY: each method reads or writes `PLAIN_LANES` elements through the pointer it is given, with no special
// instruction.
unsafe impl<E: Element> Kernel for Plain<E> {
    type Element = E;
    type Operand = E::Sum;
    type Vector = [E::Sum; PLAIN_LANES];
    type Sums = [E::Sum; PLAIN_LANES];
    const LANES: usize = PLAIN_LANES;
    const DEPTH: usize = 1;

    #[inline(always)]
    unsafe fn zero() -> Self::Sums {
        [E::Sum::ZERO; PLAIN_LANES]
    }
    #[inline(always)]
    unsafe fn load_sums(from: *const E::Sum) -> Self::Sums {
        from.cast::<Self::Sums>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store_sums(to: *mut E::Sum, sums: Self::Sums) {
        to.cast::<Self::Sums>().write_unaligned(sums)
    }
    #[inline(always)]
    unsafe fn multiply_add(mut sums: Self::Sums, a: Self::Vector, b: Self::Vector) -> Self::Sums {
        for i in 0..PLAIN_LANES {
            sums[i] = a[i].multiply_add(b[i], sums[i]);
        }
        sums
    }
    #[inline(always)]
    unsafe fn add(mut a: Self::Sums, b: Self::Sums) -> Self::Sums {
        for i in 0..PLAIN_LANES {
            a[i] = a[i] + b[i];
        }
        a
    }
    #[inline(always)]
    unsafe fn total(sums: Self::Sums) -> E::Sum {
        let mut sums = sums;
        let mut half = PLAIN_LANES / 2;
        while half > 0 {
            for i in 0..half {
                sums[i] = sums[i] + sums[i + half];
            }
            half /= 2;
        }
        sums[0]
    }
    #[inline(always)]
    unsafe fn elements(from: *const E) -> Self::Vector {
        from.cast::<[E; PLAIN_LANES]>().read_unaligned().map(|e| e.widen())
    }
    #[inline(always)]
    unsafe fn load(from: *const E::Sum) -> Self::Vector {
        Self::load_sums(from)
    }
    #[inline(always)]
    unsafe fn store(to: *mut E::Sum, vector: Self::Vector) {
        Self::store_sums(to, vector)
    }
    #[inline(always)]
    unsafe fn splat(from: *const E::Sum) -> Self::Vector {
        [*from; PLAIN_LANES]
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self::Vector]) {
        for i in 0..PLAIN_LANES {
            for j in 0..i {
                let (a, b) = (rows[i][j], rows[j][i]);
                rows[i][j] = b;
                rows[j][i] = a;
            }
        }
    }
    #[inline(always)]
    unsafe fn transpose_sums(rows: &mut [Self::Sums]) {
        Self::transpose(rows)
    }
    #[inline(always)]
    unsafe fn round(to: *mut E, sums: Self::Sums) {
        to.cast::<[E; PLAIN_LANES]>().write_unaligned(sums.map(E::round))
    }
    #[inline(always)]
    fn operand(elements: [E; 2]) -> E::Sum {
        elements[0].widen()
    }
}
