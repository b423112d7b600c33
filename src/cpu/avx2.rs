//! AVX2 with FMA and F16C: eight f32 lanes.

use super::kernel::{Lanes32, TOTALS};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// AVX2, FMA and F16C.
pub(crate) struct Avx2;

// SAFETY: each method is one instruction (or a few) on the 8 elements from its pointer on.
unsafe impl Lanes32 for Avx2 {
    type V = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        _mm256_setzero_ps()
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        _mm256_loadu_ps(from)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        _mm256_storeu_ps(to, v)
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> __m256 {
        _mm256_broadcast_ss(&*from)
    }
    #[inline(always)]
    unsafe fn multiply_add(sums: __m256, a: __m256, b: __m256) -> __m256 {
        _mm256_fmadd_ps(a, b, sums)
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn total(v: __m256) -> f32 {
        let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
    #[inline(always)]
    unsafe fn totals(v: &[__m256; TOTALS]) -> [f32; TOTALS] {
        // Each sum of four neighbours, then the two halves.
        let fours = |i: usize| _mm256_hadd_ps(_mm256_hadd_ps(v[i], v[i + 1]), _mm256_hadd_ps(v[i + 2], v[i + 3]));
        let (a, b) = (fours(0), fours(4));
        let sums = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
        std::mem::transmute::<__m256, [f32; TOTALS]>(sums)
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [__m256]) {
        let rows: &mut [__m256; 8] = rows.try_into().unwrap_unchecked();
        // Two rounds inside the 128-bit halves, four rows at a time, then one that exchanges the halves.
        let mut t = *rows;
        for i in [0, 4] {
            let (a, b) = (_mm256_unpacklo_ps(rows[i], rows[i + 1]), _mm256_unpackhi_ps(rows[i], rows[i + 1]));
            let (c, d) = (_mm256_unpacklo_ps(rows[i + 2], rows[i + 3]), _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]));
            t[i] = _mm256_shuffle_ps::<0x44>(a, c);
            t[i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            t[i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            t[i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        for i in 0..4 {
            rows[i] = _mm256_permute2f128_ps::<0x20>(t[i], t[i + 4]);
            rows[i + 4] = _mm256_permute2f128_ps::<0x31>(t[i], t[i + 4]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m256 {
        _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m256 {
        let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
    #[inline(always)]
    unsafe fn round_f16(to: *mut f16, v: __m256) {
        _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
    }
    #[inline(always)]
    unsafe fn round_bf16(to: *mut bf16, v: __m256) {
        // To nearest, ties to even; a NaN keeps its upper bits and becomes quiet.
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        let chosen = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
        let packed = _mm256_permute4x64_epi64::<0x08>(_mm256_packus_epi32(chosen, chosen));
        _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed))
    }
}
