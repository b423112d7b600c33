//! AMX: tiles of sixteen rows of 64 bytes, two of which one instruction multiplies as pairs of bf16 and adds to a third, of f32.
//!
//! The first tile is of weights as they lie in memory, sixteen rows of 32 elements; the second of tokens, whose pairs lie in vectors as
//! [`Gemm`](super::Gemm) lays them out; the third of sums, rows of weights by tokens. As Intel describes it, the instruction adds up the products of the
//! pairs' first elements, one after the other from zero on and each rounded once, to nearest; the same of their second ones; then
//! these two sums; and that to the third tile's. It takes subnormal operands for zero, and makes results that are subnormal zero.
//! A sum goes on over the whole depth, in steps of 32 elements, so that no bit depends on how the work is cut up.

use super::gemm::Weights;
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
use std::sync::OnceLock;

/// Rows of a tile, and operands in each of them.
pub(crate) const TILE: usize = 16;
/// Bytes of a tile's row: a vector of operands.
const ROW: usize = 64;

/// Whether this processor has AMX with bf16, and the system lets this process use it: Linux asks every process to ask.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && is_permitted())
}

/// Whether the processor has the instructions, and the system keeps the tiles when it switches threads.
fn has_instructions() -> bool {
    /// AMX-BF16 and AMX-TILE, in EDX of leaf 7.
    const INSTRUCTIONS: u32 = 1 << 22 | 1 << 24;
    /// The tiles' configuration and data, in XCR0.
    const STATES: u64 = 1 << 17 | 1 << 18;
    if __cpuid(0).eax < 7 || !is_x86_feature_detected!("xsave") {
        return false;
    }
    let instructions = __cpuid_count(7, 0).edx & INSTRUCTIONS == INSTRUCTIONS;
    // SAFETY: the processor has the instruction, and the system allows it (that is what the feature says).
    instructions && unsafe { _xgetbv(0) } & STATES == STATES
}

/// Asks the system for the tiles.
fn is_permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: u64 = 158;
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        const XFEATURE_XTILEDATA: u64 = 18;
        let mut result = ARCH_PRCTL;
        // SAFETY: a system call that reads no memory and writes none; it clobbers these two registers.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack)
            );
        }
        result == 0
    }
    #[cfg(not(target_os = "linux"))]
    {
        false
    }
}

/// This thread's tiles, all of them whole, from [`configure`](Self::configure) on until it is dropped.
pub(crate) struct Tiles(());

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// # Safety
    /// [`is_available`].
    pub(crate) unsafe fn configure() -> Self {
        let mut configuration =
            Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        configuration.row_bytes[..8].fill(ROW as u16);
        configuration.rows[..8].fill(TILE as u8);
        asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly));
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made this has the instruction.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Where a product's factors and sums begin: with weights and sums, the bytes from a row to the next.
#[derive(Clone, Copy)]
struct Place {
    weights: (*const u8, usize),
    xs: *const u8,
    sums: (*mut f32, usize),
}

/// A function that adds to the sums of two tiles' rows of weights (of which the second may be the first again) and of these vectors
/// of tokens the products over so many tiles, at least one.
macro_rules! add_products {
    ($name:ident, vectors: $vectors:literal, [$($load:literal),*], [$($product:literal),*], [$($store:literal),*]) => {
        #[inline(always)]
        unsafe fn $name(place: Place, rows: usize, tiles: usize) {
            let (w, w_row) = place.weights;
            let (s, s_row) = place.sums;
            asm!(
                $($load,)*
                "2:",
                $($product,)*
                "add {w}, 64",
                "add {w_later}, 64",
                "add {x}, 16*64*{vectors}",
                "dec {tiles}",
                "jnz 2b",
                $($store,)*
                vectors = const $vectors,
                w = inout(reg) w => _,
                w_later = inout(reg) if rows > TILE { w.wrapping_add(TILE * w_row) } else { w } => _,
                w_row = in(reg) w_row,
                x = inout(reg) place.xs => _,
                x_row = in(reg) ROW * $vectors,
                s = in(reg) s,
                s_later = in(reg) s.wrapping_byte_add(TILE * s_row),
                s_row = in(reg) s_row,
                tiles = inout(reg) tiles => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack)
            );
        }
    };
}

add_products!(
    add_products_of_one,
    vectors: 1,
    ["tileloadd tmm0, [{s} + {s_row}*1]", "tileloadd tmm2, [{s_later} + {s_row}*1]"],
    [
        "tileloadd tmm4, [{w} + {w_row}*1]",
        "tileloadd tmm6, [{x} + {x_row}*1]",
        "tileloadd tmm5, [{w_later} + {w_row}*1]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm2, tmm5, tmm6"
    ],
    ["tilestored [{s} + {s_row}*1], tmm0", "tilestored [{s_later} + {s_row}*1], tmm2"]
);
add_products!(
    add_products_of_two,
    vectors: 2,
    [
        "tileloadd tmm0, [{s} + {s_row}*1]",
        "tileloadd tmm1, [{s} + {s_row}*1 + 64]",
        "tileloadd tmm2, [{s_later} + {s_row}*1]",
        "tileloadd tmm3, [{s_later} + {s_row}*1 + 64]"
    ],
    [
        "tileloadd tmm4, [{w} + {w_row}*1]",
        "tileloadd tmm6, [{x} + {x_row}*1]",
        "tileloadd tmm5, [{w_later} + {w_row}*1]",
        "tileloadd tmm7, [{x} + {x_row}*1 + 64]",
        "tdpbf16ps tmm0, tmm4, tmm6",
        "tdpbf16ps tmm1, tmm4, tmm7",
        "tdpbf16ps tmm2, tmm5, tmm6",
        "tdpbf16ps tmm3, tmm5, tmm7"
    ],
    [
        "tilestored [{s} + {s_row}*1], tmm0",
        "tilestored [{s} + {s_row}*1 + 64], tmm1",
        "tilestored [{s_later} + {s_row}*1], tmm2",
        "tilestored [{s_later} + {s_row}*1 + 64], tmm3"
    ]
);

/// Adds the products of up to two tiles' rows of weights, and the operands of one vector of tokens or two, to sums, or begins
/// them if `fresh`.
///
/// # Safety
/// As for [`Kernel`](super::Kernel); this thread has its [`Tiles`].
#[inline(always)]
pub(crate) unsafe fn multiply(
    vectors: usize,
    Weights { start, stride, rows }: Weights<u32>,
    depth: usize,
    xs: *const u32,
    sums: *mut f32,
    fresh: bool,
) {
    if fresh {
        sums.write_bytes(0, rows.next_multiple_of(TILE) * vectors * TILE);
    }
    let place = Place { weights: (start.cast(), stride), xs: xs.cast(), sums: (sums, vectors * ROW) };
    match (vectors, depth / TILE) {
        (_, 0) => {}
        (1, tiles) => add_products_of_one(place, rows, tiles),
        (_, tiles) => add_products_of_two(place, rows, tiles),
    }
}
