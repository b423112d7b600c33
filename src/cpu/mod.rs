//! The ops on the CPU.
//!
//! | file | what it holds |
//! |---|---|
//! | `mod.rs` | which kernel runs: by dtype, instruction set, number of tokens and strides |
//! | `decode.rs` | the kernel for few tokens, at the speed of reading the weights |
//! | `gemm.rs` | the kernel for many tokens, and for weights of any strides |
//! | `kernel.rs` | what both ask of an instruction set; the plain Rust one |
//! | `avx512.rs`, `avx2.rs` | the others |
//! | `amx.rs` | AMX's tiles: whether they are there, and their product |
//! | `real.rs` | arithmetic on sums, for the activations |
//! | `schedule.rs` | how threads share the work |

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod buffer;
mod decode;
mod gemm;
mod kernel;
mod real;
mod schedule;

use crate::parameters::{Matrix, Projection};
use crate::Activation;
use candle_core::{bail, DType, Layout, Result, WithDType};
use decode::Decode;
use gemm::{Ahead, Gemm, Weights};
use half::{bf16, f16};
use kernel::{Kernel, Plain, Sum, Widened};
use schedule::Schedule;
use std::cell::Cell;
use std::fmt;
use std::sync::OnceLock;

pub(crate) use real::Real;

/// A dtype that the ops take.
pub(crate) trait Element: WithDType + Default {
    /// What its products are summed in.
    type Sum: Real;

    /// The value as a sum.
    fn widen(self) -> Self::Sum;

    /// The nearest element to a sum.
    fn round(sum: Self::Sum) -> Self;

    /// Runs a problem of this dtype.
    fn run(tier: Tier, family: Family, problem: &Problem<Self>, out: &mut [Self]) -> Result<()>;
}

/// An MLP and its input.
pub(crate) struct Problem<'a, E> {
    /// `[tokens, hidden_size]`
    pub xs: Matrix<'a, E>,
    /// What the activation is applied to: the gate, or the first layer of a plain MLP.
    pub gate: Projection<Matrix<'a, E>>,
    /// What the activated gate is multiplied with, in a gated MLP.
    pub up: Option<Projection<Matrix<'a, E>>>,
    pub down: Projection<Matrix<'a, E>>,
    pub activation: Activation,
}

impl<E: Copy> Problem<'_, E> {
    fn weights(&self) -> impl Iterator<Item = &Matrix<'_, E>> {
        [Some(&self.gate), self.up.as_ref(), Some(&self.down)].into_iter().flatten().map(|p| &p.weight)
    }
}

/// An instruction set that the CPU kernels are written for, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// AVX-512 (F, BW, DQ, VL) with the BF16 instructions, and AMX's tiles of bf16 for more than one token.
    Avx512Amx,
    /// AVX-512 (F, BW, DQ, VL) with the BF16 instructions.
    Avx512Bf16,
    /// AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Plain Rust, for any processor.
    Plain,
}

thread_local! {
    static FORCED: Cell<Option<Tier>> = const { Cell::new(None) };
}

impl Tier {
    /// Every tier, the best first.
    pub const ALL: [Self; 5] = [Self::Avx512Amx, Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Plain];

    /// The name, as in a plan's kernel: `avx512-amx`, `avx512-bf16`, `avx512`, `avx2` or `plain`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Amx => "avx512-amx",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Plain => "plain",
        }
    }

    /// Whether this processor has the tier's instructions, and the system lets this process use them.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let avx512_bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
            match self {
                Self::Avx512Amx => avx512_bf16 && amx::is_available(),
                Self::Avx512Bf16 => avx512_bf16,
                Self::Avx512 => avx512,
                Self::Avx2 => avx2,
                Self::Plain => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Plain
        }
    }

    /// The tier that runs on this thread now: the one that [`with`](Self::with) asks for, or else the best available.
    pub fn current() -> Self {
        let best = || Self::ALL.into_iter().find(|tier| tier.is_available()).unwrap_or(Self::Plain);
        FORCED.get().unwrap_or_else(best)
    }

    /// Calls `f` with the ops that this thread runs on this tier, whatever the processor could do better: for
    /// comparisons and tests.
    ///
    /// # Errors
    /// The processor has no such instructions; and those of `f`.
    pub fn with<R>(self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        struct Restore(Option<Tier>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        if !self.is_available() {
            bail!("cpu: expected a tier that this processor has, found {self}");
        }
        let _restore = Restore(FORCED.replace(Some(self)));
        f()
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The two ways to go through the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Family {
    /// Rows of weights against few tokens.
    Decode,
    /// Blocks of the hidden layer, for many tokens.
    Gemm,
}

impl Family {
    /// How often the family reads the weights for this many tokens.
    pub(crate) fn passes(self, tokens: usize) -> usize {
        match self {
            Self::Decode => 1,
            Self::Gemm => gemm::passes(tokens),
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Gemm => "gemm",
        }
    }
}

/// Which kernel runs: the one place where that is decided. `rows_adjacent` says whether every weight's rows are
/// contiguous.
pub(crate) fn choose(dtype: DType, tokens: usize, rows_adjacent: bool) -> (Tier, Family) {
    let tier = match Tier::current() {
        _ if dtype == DType::F64 => Tier::Plain,
        // Pairs of bf16 are neighbours in a row. In a transposed weight they are not, and widening is faster.
        Tier::Avx512Amx | Tier::Avx512Bf16 if dtype != DType::BF16 || !rows_adjacent => Tier::Avx512,
        tier => tier,
    };
    // A tile multiplies sixteen tokens in the time of one.
    let few = if tier == Tier::Avx512Amx { 1 } else { decode::MAX_TOKENS };
    let family = if tokens <= few && rows_adjacent { Family::Decode } else { Family::Gemm };
    (tier, family)
}

/// Operations that a thread should have to do before another is worth waking.
const OPERATIONS_PER_THREAD: usize = 1 << 18;

/// The largest size of a dimension: what is left of usize is room for rounding up, and for counting bytes.
const MAX_SIZE: usize = isize::MAX as usize / 16;

/// The output `[tokens, out_features]` of an MLP, row by row.
///
/// # Errors
/// A dimension, of x or of a weight, that no memory could hold the vectors of; more output than there is memory for.
pub(crate) fn forward<E: Element>(op: &'static str, problem: &Problem<E>) -> Result<Vec<E>> {
    let (tokens, out_features) = (problem.xs.rows, problem.down.weight.rows);
    for size in [tokens, problem.xs.cols, problem.gate.weight.rows, out_features] {
        if size > MAX_SIZE {
            bail!("{op}: expected dimensions of at most {MAX_SIZE}, found one of {size}");
        }
    }
    let mut out: Vec<E> = Vec::new();
    match tokens.checked_mul(out_features) {
        Some(len) if out.try_reserve_exact(len).is_ok() => out.resize(len, E::default()),
        _ => bail!("{op}: expected an output that fits in memory, found one of shape [{tokens}, {out_features}]"),
    }
    if !out.is_empty() {
        let rows_adjacent = problem.weights().all(|w| w.col_stride == 1);
        let (tier, family) = choose(E::DTYPE, tokens, rows_adjacent);
        E::run(tier, family, problem, &mut out)?;
    }
    Ok(out)
}

/// The elements of an op's x in order, whatever its strides.
///
/// # Errors
/// A layout that reaches past the storage, or more elements than there is memory for.
pub(crate) fn gather<E: Copy>(op: &str, storage: &[E], layout: &Layout) -> Result<Vec<E>> {
    let (dims, strides) = (layout.dims(), layout.stride());
    let len = layout.shape().elem_count();
    let mut out = Vec::new();
    if out.try_reserve_exact(len).is_err() {
        bail!("{op}: xs: expected a tensor whose contiguous copy fits in memory, found shape {dims:?}");
    }
    let mut index = vec![0; dims.len()];
    for _ in 0..len {
        let offset = layout.start_offset() + index.iter().zip(strides).map(|(i, s)| i * s).sum::<usize>();
        match storage.get(offset) {
            Some(value) => out.push(*value),
            None => bail!("{op}: xs: expected a layout within its storage, found {layout:?}"),
        }
        for (i, &dim) in index.iter_mut().zip(dims).rev() {
            *i += 1;
            if *i < dim {
                break;
            }
            *i = 0;
        }
    }
    Ok(out)
}

/// The threads that a problem is worth: candle's number at most.
fn threads<E: Copy>(problem: &Problem<E>) -> usize {
    let operations = problem.weights().fold(0usize, |sum, w| sum.saturating_add(w.rows.saturating_mul(w.cols)));
    let operations = operations.saturating_mul(problem.xs.rows);
    candle_threads().min(operations / OPERATIONS_PER_THREAD).max(1)
}

/// candle's number of threads, asked for once: where no variable names it, candle reads the machine's description anew at
/// each call, tens of microseconds, and rayon's pool keeps the size that it began with anyway.
fn candle_threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(candle_core::utils::get_num_threads)
}

/// A kernel together with the code that was compiled for its instructions.
///
/// # Safety
/// Implementors promise that [`decode`](Self::decode) and [`gemm`](Self::gemm) run on a processor that has
/// [`Tier`]'s instructions.
unsafe trait Compiled: Kernel + Sized {
    /// The rows of weights in a tile of [`Gemm`] with 1, 2 and more vectors of tokens.
    const ROWS: &[usize];
    /// Rows of weights that a task multiplies: a multiple of the lanes, and of the rows of every tile, so that sums have room for
    /// whole tiles.
    const PANEL: usize = 48;
    /// Tokens that a task multiplies a panel of weights with, a multiple of every tile's: few enough that two or three parts stay in
    /// the second cache, and that threads which differ in speed end a phase together.
    const PART: usize = 128;
    /// Operands of the summed dimension that are summed at a time: a multiple of the lanes.
    const DEPTH_BLOCK: usize = 96;
    /// Products take rows of weights and operands of the summed dimension by multiples of this.
    const WHOLE: usize = 1;

    /// [`gemm::multiply`] on a tile with so many vectors of tokens.
    ///
    /// # Safety
    /// As for [`Kernel`].
    unsafe fn multiply(
        vectors: usize,
        weights: Weights<Self::Operand>,
        depth: usize,
        xs: *const Self::Operand,
        ahead: Ahead<Self::Element>,
        sums: *mut Sum<Self>,
        fresh: bool,
    );

    /// Does tasks of [`Decode`] until none is left.
    ///
    /// # Safety
    /// The processor has the kernel's instructions, and the arguments belong together.
    unsafe fn decode(job: &Decode<Self>, schedule: &Schedule);

    /// Does tasks of [`Gemm`] until none is left.
    ///
    /// # Safety
    /// As for [`decode`](Self::decode).
    unsafe fn gemm(job: &Gemm<Self>, schedule: &Schedule);
}

/// The two functions of [`Compiled`] that do tasks, compiled for these instructions. What `$ready` gives lives as long as the
/// tasks of a [`Gemm`].
macro_rules! compiled_work {
    ($kernel:ty, [$($feature:literal),*], ($f:literal, $r:literal, $halve:literal), $ready:expr) => {
        unsafe fn decode(job: &Decode<Self>, schedule: &Schedule) {
            $(#[target_feature(enable = $feature)])*
            unsafe fn inner(job: &Decode<$kernel>, schedule: &Schedule) {
                job.work::<$f, $r, $halve>(schedule)
            }
            inner(job, schedule)
        }

        unsafe fn gemm(job: &Gemm<Self>, schedule: &Schedule) {
            $(#[target_feature(enable = $feature)])*
            unsafe fn inner(job: &Gemm<$kernel>, schedule: &Schedule) {
                let _ready = $ready;
                job.work(schedule)
            }
            inner(job, schedule)
        }
    };
}

/// Names, for a kernel: the instructions it is compiled for, its tiles (vectors of tokens, and rows of weights), and the
/// rows of its dot products (of 2 to 4 tokens, of more, and whether these are taken in halves). They are as many as the
/// vector registers hold, less one or two where the compiler would otherwise keep a sum in memory; more than 8 rows of a
/// tile would need more addresses than there are registers for.
macro_rules! compiled {
    (
        $kernel:ty, [$($feature:literal),*],
        tiles: [$(($n:literal, $m:literal)),*],
        rows: ($f:literal, $r:literal, $halve:literal)
    ) => {
        // SAFETY: the code is compiled for just the features named, which are its tier's.
        unsafe impl Compiled for $kernel {
            const ROWS: &[usize] = &[$($m),*];

            #[inline(always)]
            unsafe fn multiply(
                vectors: usize,
                weights: Weights<Self::Operand>,
                depth: usize,
                xs: *const Self::Operand,
                ahead: Ahead<Self::Element>,
                sums: *mut Sum<Self>,
                fresh: bool,
            ) {
                match vectors {
                    $($n => gemm::multiply::<Self, $n, $m>(weights, depth, xs, ahead, sums, fresh),)*
                    _ => unreachable!("no tile has more vectors than ROWS has numbers"),
                }
            }

            compiled_work!($kernel, [$($feature),*], ($f, $r, $halve), ());
        }
    };
}

/// The kernels of x86-64's tiers.
#[cfg(target_arch = "x86_64")]
mod tiers {
    use super::amx::{self, Tiles};
    use super::avx2::Avx2;
    use super::avx512::{Avx512, Pairs};
    use super::*;

    macro_rules! avx512 {
        ($kernel:ty $(, $feature:literal)?) => {
            compiled!(
                $kernel, ["avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c" $(, $feature)?],
                tiles: [(1, 8), (2, 8), (3, 8), (4, 6)], rows: (1, 3, false)
            );
        };
    }
    avx512!(Pairs<false>, "avx512bf16");
    avx512!(Widened<Avx512, f32>);
    avx512!(Widened<Avx512, f16>);
    avx512!(Widened<Avx512, bf16>);

    // SAFETY: the code is compiled for just the features named, which are the tier's, and uses the tiles that it has configured
    // before.
    unsafe impl Compiled for Pairs<true> {
        const ROWS: &[usize] = &[2 * amx::TILE, 2 * amx::TILE];
        const PANEL: usize = 96;
        const PART: usize = 256;
        // Whole pages of a row, which the processor reads ahead by itself, and no tile's sums to memory in between.
        const DEPTH_BLOCK: usize = 1024;
        const WHOLE: usize = amx::TILE;

        #[inline(always)]
        unsafe fn multiply(
            vectors: usize,
            weights: Weights<u32>,
            depth: usize,
            xs: *const u32,
            _: Ahead<bf16>, // what the processor asks for of itself measured faster
            sums: *mut f32,
            fresh: bool,
        ) {
            amx::multiply(vectors, weights, depth, xs, sums, fresh)
        }

        compiled_work!(
            Pairs<true>,
            ["avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c", "avx512bf16"],
            (1, 3, false),
            Tiles::configure()
        );
    }
    compiled!(Widened<Avx2, f32>, ["avx2", "fma", "f16c"], tiles: [(1, 8), (2, 6)], rows: (3, 2, true));
    compiled!(Widened<Avx2, f16>, ["avx2", "fma", "f16c"], tiles: [(1, 8), (2, 6)], rows: (2, 2, true));
    compiled!(Widened<Avx2, bf16>, ["avx2", "fma", "f16c"], tiles: [(1, 8), (2, 6)], rows: (2, 2, true));
}

compiled!(Plain<f32>, [], tiles: [(1, 4)], rows: (1, 1, false));
compiled!(Plain<f16>, [], tiles: [(1, 4)], rows: (1, 1, false));
compiled!(Plain<bf16>, [], tiles: [(1, 4)], rows: (1, 1, false));
compiled!(Plain<f64>, [], tiles: [(1, 4)], rows: (1, 1, false));

/// Runs a problem on a kernel.
///
/// # Safety
/// The processor has the kernel's instructions.
unsafe fn run<K: Compiled>(family: Family, problem: &Problem<K::Element>, out: &mut [K::Element]) -> Result<()> {
    let threads = threads(problem);
    match family {
        Family::Decode => {
            let job = Decode::<K>::new(problem, out, threads)?;
            // SAFETY: the caller's promise; the schedule is the job's.
            job.schedule().run(threads, |schedule| unsafe { K::decode(&job, schedule) });
        }
        Family::Gemm => {
            let job = Gemm::<K>::new(problem, out, threads)?;
            // SAFETY: as above.
            job.schedule().run(threads, |schedule| unsafe { K::gemm(&job, schedule) });
        }
    }
    Ok(())
}

macro_rules! element {
    ($element:ty, $sum:ty, $widen:expr, $round:expr, {$($tier:ident => $kernel:ty),*}) => {
        impl Element for $element {
            type Sum = $sum;

            #[inline(always)]
            fn widen(self) -> $sum {
                $widen(self)
            }

            #[inline(always)]
            fn round(sum: $sum) -> Self {
                $round(sum)
            }

            fn run(tier: Tier, family: Family, problem: &Problem<Self>, out: &mut [Self]) -> Result<()> {
                // SAFETY: a tier other than plain is current only if it is available.
                unsafe {
                    match tier {
                        $(#[cfg(target_arch = "x86_64")] Tier::$tier => run::<$kernel>(family, problem, out),)*
                        _ => run::<Plain<$element>>(family, problem, out),
                    }
                }
            }
        }
    };
}

element!(f32, f32, |x| x, |x| x, { Avx512 => Widened<avx512::Avx512, f32>, Avx2 => Widened<avx2::Avx2, f32> });
element!(f16, f32, f16::to_f32, f16::from_f32, { Avx512 => Widened<avx512::Avx512, f16>, Avx2 => Widened<avx2::Avx2, f16> });
element!(bf16, f32, bf16::to_f32, bf16::from_f32, {
    Avx512Amx => avx512::Pairs<true>,
    Avx512Bf16 => avx512::Pairs<false>,
    Avx512 => Widened<avx512::Avx512, bf16>,
    Avx2 => Widened<avx2::Avx2, bf16>
});
element!(f64, f64, |x| x, |x| x, {});
