//! AVX-512: sixteen f32 lanes, and pairs of bf16 where the processor multiplies those.

use super::kernel::{Kernel, Lanes32};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ and VL.
pub(crate) struct Avx512;

/// Transposes 16 rows of 16 32-bit lanes.
#[inline(always)]
unsafe fn transpose_16(rows: &mut [__m512]) {
    let rows: &mut [__m512; 16] = rows.try_into().unwrap_unchecked();
    // Two rounds inside the 128-bit parts, four rows at a time, then two that exchange the parts.
    let mut t = *rows;
    for i in (0..16).step_by(4) {
        let (a, b) = (_mm512_unpacklo_ps(rows[i], rows[i + 1]), _mm512_unpackhi_ps(rows[i], rows[i + 1]));
        let (c, d) = (_mm512_unpacklo_ps(rows[i + 2], rows[i + 3]), _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
        let pd = |v: __m512| _mm512_castps_pd(v);
        t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(a), pd(c)));
        t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(a), pd(c)));
        t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(b), pd(d)));
        t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(b), pd(d)));
    }
    for i in 0..4 {
        let (a, b) = (_mm512_shuffle_f32x4::<0x88>(t[i], t[i + 4]), _mm512_shuffle_f32x4::<0xdd>(t[i], t[i + 4]));
        let (c, d) =
            (_mm512_shuffle_f32x4::<0x88>(t[i + 8], t[i + 12]), _mm512_shuffle_f32x4::<0xdd>(t[i + 8], t[i + 12]));
        rows[i] = _mm512_shuffle_f32x4::<0x88>(a, c);
        rows[i + 4] = _mm512_shuffle_f32x4::<0x88>(b, d);
        rows[i + 8] = _mm512_shuffle_f32x4::<0xdd>(a, c);
        rows[i + 12] = _mm512_shuffle_f32x4::<0xdd>(b, d);
    }
}

// SAFETY: each method is one instruction (or a few) on the 16 elements from its pointer on.
unsafe impl Lanes32 for Avx512 {
    type V = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        _mm512_setzero_ps()
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        _mm512_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        _mm512_storeu_ps(to, v)
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> __m512 {
        _mm512_set1_ps(*from)
    }
    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, a: __m512, b: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, sums)
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn total(v: __m512) -> f32 {
        _mm512_reduce_add_ps(v)
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [__m512]) {
        transpose_16(rows)
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m512 {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }
    #[inline(always)]
    unsafe fn round_f16(to: *mut f16, v: __m512) {
        _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
    }
    #[inline(always)]
    unsafe fn round_bf16(to: *mut bf16, v: __m512) {
        // To nearest, ties to even; a NaN keeps its upper bits and becomes quiet.
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let chosen = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet));
        _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(chosen))
    }
}

/// Pairs of bf16 multiplied and added to f32 sums by one instruction, which reads subnormal operands as zero: AVX512-BF16's or, of
/// many tokens, AMX's.
pub(crate) struct Pairs<const TILES: bool>;

/// Sixteen sums as bf16.
#[inline(always)]
unsafe fn rounded(sums: __m512) -> __m256i {
    std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(sums))
}

// SAFETY: as for `Avx512`; an operand is two elements.
unsafe impl<const TILES: bool> Kernel for Pairs<TILES> {
    type Element = bf16;
    type Operand = u32;
    type Vector = __m512i;
    type Sums = __m512;
    const LANES: usize = 16;
    const DEPTH: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        _mm512_setzero_ps()
    }
    #[inline(always)]
    unsafe fn load_sums(from: *const f32) -> __m512 {
        _mm512_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn store_sums(to: *mut f32, sums: __m512) {
        _mm512_storeu_ps(to, sums)
    }
    #[inline(always)]
    unsafe fn multiply_add(sums: __m512, a: __m512i, b: __m512i) -> __m512 {
        _mm512_dpbf16_ps(sums, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b))
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn total(sums: __m512) -> f32 {
        _mm512_reduce_add_ps(sums)
    }
    #[inline(always)]
    unsafe fn elements(from: *const bf16) -> __m512i {
        _mm512_loadu_si512(from.cast())
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> __m512i {
        _mm512_loadu_si512(from.cast())
    }
    #[inline(always)]
    unsafe fn store(to: *mut u32, vector: __m512i) {
        _mm512_storeu_si512(to.cast(), vector)
    }
    #[inline(always)]
    unsafe fn splat(from: *const u32) -> __m512i {
        _mm512_set1_epi32(from.read_unaligned() as i32)
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [__m512i]) {
        transpose_16(std::slice::from_raw_parts_mut(rows.as_mut_ptr().cast(), rows.len()))
    }
    #[inline(always)]
    unsafe fn transpose_sums(rows: &mut [__m512]) {
        transpose_16(rows)
    }
    #[inline(always)]
    unsafe fn round(to: *mut bf16, sums: __m512) {
        _mm256_storeu_si256(to.cast(), rounded(sums))
    }
    #[inline(always)]
    unsafe fn round_operands(to: *mut u32, [low, high]: [__m512; 2]) {
        let (low, high) = (_mm512_cvtepu16_epi32(rounded(low)), _mm512_cvtepu16_epi32(rounded(high)));
        Self::store(to, _mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
    }
    #[inline(always)]
    fn operand([low, high]: [bf16; 2]) -> u32 {
        low.to_bits() as u32 | (high.to_bits() as u32) << 16
    }
}
