//! Many tokens: blocks of the hidden layer that stay in cache.
//!
//! For a block of tokens: x is copied into panels of `M` tokens; then, for a block of the intermediate dimension at
//! a time, the gate and up projections give that block of the hidden layer (activation, product and rounding included),
//! which the down projection's columns of the same block turn into a part of the output's sums. The hidden layer is
//! never whole.
//!
//! A product runs on panels: `PANEL` rows of weights, transposed `DEPTH_BLOCK` operands at a time into a buffer that
//! stays in the first cache, against `M` tokens, with all `M` x `PANEL` sums in registers. Each such block is summed
//! from zero and then added to the blocks before it, which keeps the rounding error of long sums small; blocks begin
//! at multiples of their size, so that no bit depends on how the work is cut up or how many threads do it.

#![allow(clippy::needless_range_loop)] // registers are arrays indexed in loops that the compiler unrolls

use super::buffer::{Buffer, Output};
use super::kernel::{elements_of, Kernel, Sum, MAX_LANES};
use super::schedule::Schedule;
use super::{Element, Problem};
use crate::parameters::{Matrix, Projection};
use candle_core::Result;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tokens in a block: enough that reading the weights again for the next block costs little beside the products.
const TOKEN_BLOCK: usize = 512;
/// Bytes of a block of the hidden layer, at most (unless more threads than its panels ask for more).
const HIDDEN_BYTES: usize = 2 << 20;
/// Operands of the summed dimension that are transposed and summed at a time: a multiple of every panel.
const DEPTH_BLOCK: usize = 96;

/// How often the weights are read for this many tokens.
pub(crate) fn passes(tokens: usize) -> usize {
    tokens.div_ceil(TOKEN_BLOCK).max(1)
}

/// One call's sizes and buffers.
pub(crate) struct Gemm<'a, K: Kernel> {
    problem: &'a Problem<'a, K::Element>,
    out: Output<K::Element>,
    threads: usize,
    /// Tokens in a panel.
    m: usize,
    /// Output features in a panel.
    panel: usize,
    /// Tokens in a block, a multiple of `m`.
    block_tokens: usize,
    /// Operands of a block of tokens: panels of `[hidden_size / DEPTH, m]`.
    xs: Buffer<K::Operand>,
    /// Operands of a block of the hidden layer: panels of `[block_panels * panel / DEPTH, m]`.
    hidden: Buffer<K::Operand>,
    /// The output's sums of a block of tokens: `[panels, block_tokens, panel]`.
    sums: Buffer<Sum<K>>,
    phases: Vec<Phase>,
    /// One for each thread, and how many are taken.
    scratch: Vec<Scratch<K>>,
    taken: AtomicUsize,
}

/// What the tasks of one phase do.
#[derive(Clone)]
enum Phase {
    /// Copy x, a panel of tokens a task.
    Copy { tokens: Range<usize> },
    /// A panel of the hidden layer a task.
    Hidden { tokens: Range<usize>, block: Range<usize> },
    /// A panel of the output a task.
    Out { tokens: Range<usize>, block: Range<usize> },
}

/// One thread's buffers.
struct Scratch<K: Kernel> {
    /// Transposed weights: `[DEPTH_BLOCK, panel]`.
    weights: Buffer<K::Operand>,
    /// The gate's and up's sums: `[2, block_tokens, panel]`.
    sums: Buffer<Sum<K>>,
}

impl<'a, K: Kernel> Gemm<'a, K> {
    /// Lays out a call for panels of `m` tokens by `n` vectors.
    ///
    /// # Errors
    /// No memory for the buffers.
    pub(crate) fn new(
        problem: &'a Problem<'a, K::Element>,
        out: &'a mut [K::Element],
        threads: usize,
        (m, n): (usize, usize),
    ) -> Result<Self> {
        let panel = n * K::LANES;
        let tokens = problem.xs.rows;
        let block_tokens = tokens.div_ceil(passes(tokens)).next_multiple_of(m);
        // As many panels as the cache holds, at least two for each thread; then blocks of even size that begin where
        // blocks of the summed dimension do.
        let intermediate = problem.gate.weight.rows;
        let panels = intermediate.div_ceil(panel).max(1);
        let panel_bytes = block_tokens * panel / K::DEPTH * size_of::<K::Operand>();
        let most = (HIDDEN_BYTES / panel_bytes).max(2 * threads).min(panels);
        let unit = DEPTH_BLOCK * K::DEPTH / panel;
        let block_panels = panels.div_ceil(panels.div_ceil(most)).next_multiple_of(unit).min(panels);

        let mut phases = Vec::new();
        for first in (0..tokens).step_by(block_tokens) {
            let tokens = first..tokens.min(first + block_tokens);
            phases.push(Phase::Copy { tokens: tokens.clone() });
            // An empty intermediate dimension still has an output, of biases.
            for first in (0..intermediate.max(1)).step_by(block_panels * panel) {
                let block = first..intermediate.min(first + block_panels * panel);
                phases.push(Phase::Hidden { tokens: tokens.clone(), block: block.clone() });
                phases.push(Phase::Out { tokens: tokens.clone(), block });
            }
        }
        let hidden_size = problem.xs.cols;
        let scratch = || {
            let weights = Buffer::new([DEPTH_BLOCK, panel])?;
            Ok(Scratch { weights, sums: Buffer::new([2, block_tokens, panel])? })
        };
        Ok(Self {
            problem,
            out: Output::new(out),
            threads,
            m,
            panel,
            block_tokens,
            xs: Buffer::new([block_tokens, hidden_size.div_ceil(K::DEPTH)])?,
            hidden: Buffer::new([block_tokens, block_panels * panel / K::DEPTH])?,
            sums: Buffer::new([problem.down.weight.rows.div_ceil(panel) * panel, block_tokens])?,
            phases,
            scratch: (0..threads).map(|_| scratch()).collect::<Result<_>>()?,
            taken: AtomicUsize::new(0),
        })
    }

    /// The tasks of every phase.
    pub(crate) fn schedule(&self) -> Schedule {
        Schedule::new(self.phases.iter().map(|phase| match phase {
            Phase::Copy { tokens } => tokens.len().div_ceil(self.m),
            Phase::Hidden { block, .. } => block.len().div_ceil(self.panel),
            Phase::Out { .. } => self.problem.down.weight.rows.div_ceil(self.panel),
        }))
    }

    /// Does tasks until none is left, on panels of `M` tokens by `N` vectors, which are those of [`new`](Self::new).
    ///
    /// # Safety
    /// The processor has `K`'s instructions, this is inlined into a function compiled for them, and `schedule` is
    /// this call's.
    #[inline(always)]
    pub(crate) unsafe fn work<const M: usize, const N: usize>(&self, schedule: &Schedule) {
        debug_assert_eq!((self.m, self.panel), (M, N * K::LANES));
        let Some(scratch) = self.scratch.get(self.taken.fetch_add(1, Ordering::Relaxed)) else {
            return;
        };
        while let Some(ticket) = schedule.draw() {
            let task = ticket.task;
            match &self.phases[ticket.phase] {
                Phase::Copy { tokens } => self.copy::<M>(tokens, task),
                Phase::Hidden { tokens, block } => self.hidden_panel::<M, N>(tokens, block, task, scratch),
                Phase::Out { tokens, block } => self.out_panel::<M, N>(tokens, block, task, scratch),
            }
        }
    }

    /// The first row of the panel that this thread will most likely work on after this one.
    fn later(&self, rows: &Range<usize>) -> usize {
        rows.start + self.threads * self.panel
    }

    /// Copies a panel of tokens, those past the end as zeros.
    #[inline(always)]
    unsafe fn copy<const M: usize>(&self, tokens: &Range<usize>, panel: usize) {
        let xs = &self.problem.xs;
        let depth = xs.cols.div_ceil(K::DEPTH);
        let to = self.xs.as_mut_ptr().add(panel * M * depth);
        let mut lanes = [K::Operand::default(); MAX_LANES];
        for m in 0..M {
            let token = tokens.start + panel * M + m;
            for d in (0..depth).step_by(K::LANES) {
                let len = K::LANES.min(depth - d);
                if token >= tokens.end {
                    lanes = [K::Operand::default(); MAX_LANES];
                } else if xs.col_stride == 1 {
                    let from = xs.as_ptr().add(token * xs.row_stride + d * K::DEPTH);
                    K::store(lanes.as_mut_ptr(), elements_of::<K>(from, xs.cols - d * K::DEPTH));
                } else {
                    for (i, lane) in lanes[..len].iter_mut().enumerate() {
                        *lane = operand_at::<K>(xs, token, d + i);
                    }
                }
                for (i, lane) in lanes[..len].iter().enumerate() {
                    *to.add((d + i) * M + m) = *lane;
                }
            }
        }
    }

    /// A panel of the hidden layer.
    #[inline(always)]
    unsafe fn hidden_panel<const M: usize, const N: usize>(
        &self,
        tokens: &Range<usize>,
        block: &Range<usize>,
        task: usize,
        scratch: &Scratch<K>,
    ) {
        let Problem { gate, up, activation, xs, .. } = self.problem;
        let first = block.start + task * self.panel;
        let rows = first..block.end.min(first + self.panel);
        let token_panels = tokens.len().div_ceil(M);
        let depth = xs.cols.div_ceil(K::DEPTH);
        let gate_sums = scratch.sums.as_mut_ptr();
        let up_sums = gate_sums.add(self.block_tokens * self.panel);
        let weights = scratch.weights.as_mut_ptr();

        for d in blocks(depth) {
            for (projection, sums) in std::iter::once((gate, gate_sums)).chain(up.iter().map(|up| (up, up_sums))) {
                let weight = &projection.weight;
                let (row, col) = if d.end < depth { (rows.start, d.end * K::DEPTH) } else { (self.later(&rows), 0) };
                let mut ahead = Ahead::new::<K>(weight, self.panel, row, col, token_panels);
                pack::<K, N>(weight, &rows, 0, &d, weights);
                for p in 0..token_panels {
                    ahead.prefetch::<K>();
                    let x = self.xs.as_mut_ptr().add((p * depth + d.start) * M);
                    multiply::<K, M, N>(d.len(), x, weights, sums.add(p * M * self.panel), d.start == 0);
                }
            }
        }

        let hidden_depth = block.len().div_ceil(K::DEPTH);
        let panel_depth = rows.len().div_ceil(K::DEPTH);
        for p in 0..token_panels {
            let to = self.hidden.as_mut_ptr().add((p * hidden_depth + task * self.panel / K::DEPTH) * M);
            for m in 0..M {
                let at = (p * M + m) * self.panel;
                let hidden = std::slice::from_raw_parts_mut(gate_sums.add(at), N * K::LANES);
                add_bias(hidden, gate, rows.start);
                activation.apply(hidden);
                if let Some(up) = up {
                    let up_values = std::slice::from_raw_parts_mut(up_sums.add(at), N * K::LANES);
                    add_bias(up_values, up, rows.start);
                    for (hidden, up) in hidden.iter_mut().zip(up_values) {
                        *hidden = *hidden * *up;
                    }
                }
                let mut rounded = round::<K, N>(hidden.as_ptr());
                // What pads the last pair: it may be NaN, where x is infinite.
                rounded[rows.len()..].fill(K::Element::default());
                for i in 0..panel_depth {
                    let pair = [rounded[i * K::DEPTH], rounded[i * K::DEPTH + K::DEPTH - 1]];
                    *to.add(i * M + m) = K::operand(pair);
                }
            }
        }
    }

    /// Adds a block of the hidden layer to a panel of the output's sums, and after the last block writes it.
    #[inline(always)]
    unsafe fn out_panel<const M: usize, const N: usize>(
        &self,
        tokens: &Range<usize>,
        block: &Range<usize>,
        task: usize,
        scratch: &Scratch<K>,
    ) {
        let Problem { gate, down, .. } = self.problem;
        let out_features = down.weight.rows;
        let first = task * self.panel;
        let rows = first..out_features.min(first + self.panel);
        let token_panels = tokens.len().div_ceil(M);
        let depth = block.len().div_ceil(K::DEPTH);
        let sums = self.sums.as_mut_ptr().add(first * self.block_tokens);
        let weights = scratch.weights.as_mut_ptr();

        for d in blocks(depth) {
            let next = block.start + d.end * K::DEPTH;
            let (row, col) = if d.end < depth { (rows.start, next) } else { (self.later(&rows), block.start) };
            let mut ahead = Ahead::new::<K>(&down.weight, self.panel, row, col, token_panels);
            pack::<K, N>(&down.weight, &rows, block.start, &d, weights);
            for p in 0..token_panels {
                ahead.prefetch::<K>();
                let x = self.hidden.as_mut_ptr().add((p * depth + d.start) * M);
                let fresh = block.start == 0 && d.start == 0;
                multiply::<K, M, N>(d.len(), x, weights, sums.add(p * M * self.panel), fresh);
            }
        }
        if block.end < gate.weight.rows {
            return;
        }
        for (t, token) in tokens.clone().enumerate() {
            let sums = std::slice::from_raw_parts_mut(sums.add(t * self.panel), N * K::LANES);
            add_bias(sums, down, rows.start);
            let rounded = round::<K, N>(sums.as_ptr());
            let to = self.out.as_mut_ptr().add(token * out_features + rows.start);
            std::ptr::copy_nonoverlapping(rounded.as_ptr(), to, rows.len());
        }
    }
}

/// The summed dimension in blocks; one empty block where it is empty, so that its sums become zeros.
#[inline(always)]
fn blocks(depth: usize) -> impl Iterator<Item = Range<usize>> {
    (0..depth.max(1)).step_by(DEPTH_BLOCK).map(move |d| d..depth.min(d + DEPTH_BLOCK))
}

/// Adds the bias of the features from `first` on to a token's sums, which may reach past the last feature.
#[inline(always)]
fn add_bias<E: Element>(sums: &mut [E::Sum], projection: &Projection<Matrix<E>>, first: usize) {
    if let Some(bias) = &projection.bias {
        for (i, sum) in sums.iter_mut().enumerate().take(bias.cols - first) {
            *sum = *sum + bias.get(0, first + i).widen();
        }
    }
}

/// The most elements in a panel: three vectors.
const MAX_PANEL: usize = 3 * MAX_LANES;

#[inline(always)]
unsafe fn round<K: Kernel, const N: usize>(sums: *const Sum<K>) -> [K::Element; MAX_PANEL] {
    let mut rounded = [K::Element::default(); MAX_PANEL];
    for n in 0..N {
        K::round(rounded.as_mut_ptr().add(n * K::LANES), K::load_sums(sums.add(n * K::LANES)));
    }
    rounded
}

/// Operand `d` of a row, whatever the strides.
#[inline(always)]
fn operand_at<K: Kernel>(matrix: &Matrix<K::Element>, row: usize, d: usize) -> K::Operand {
    let element = |col: usize| if col < matrix.cols { matrix.get(row, col) } else { K::Element::default() };
    K::operand([element(d * K::DEPTH), element(d * K::DEPTH + 1)])
}

/// The weights that are packed next: they come from memory while the products run, a share beside each panel of tokens.
/// (All at once they would hold up the loads of what is packed now.)
struct Ahead<E> {
    /// The start of the row that is asked for now, and the stride to the next.
    row: *const E,
    row_stride: usize,
    /// The element of the row that is asked for next, and where a row ends.
    col: usize,
    cols: usize,
    /// Cache lines to ask for, and those of one share.
    left: usize,
    share: usize,
}

impl<E> Ahead<E> {
    /// `DEPTH_BLOCK` operands of `rows` rows, from this row and column on, in `shares`.
    #[inline(always)]
    fn new<K: Kernel<Element = E>>(matrix: &Matrix<E>, rows: usize, row: usize, col: usize, shares: usize) -> Self {
        let cols = DEPTH_BLOCK * K::DEPTH;
        // Rows that are not contiguous cost more lines than this; they are left to the processor.
        let left = if matrix.col_stride == 1 { rows * (cols * size_of::<E>()).div_ceil(LINE) } else { 0 };
        let row = matrix.as_ptr().wrapping_add(row * matrix.row_stride + col);
        Self { row, row_stride: matrix.row_stride, col: 0, cols, left, share: left.div_ceil(shares.max(1)) }
    }

    /// Asks for the next share.
    #[inline(always)]
    fn prefetch<K: Kernel<Element = E>>(&mut self) {
        let lines = self.share.min(self.left);
        self.left -= lines;
        for _ in 0..lines {
            K::prefetch(self.row.wrapping_add(self.col));
            self.col += LINE / size_of::<E>();
            if self.col >= self.cols {
                (self.col, self.row) = (0, self.row.wrapping_add(self.row_stride));
            }
        }
    }
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Transposes the operands `depth` (counted from column `first_col` on) of up to `N * LANES` rows into
/// `[depth, N * LANES]`, the rows that are missing as zeros.
#[inline(always)]
unsafe fn pack<K: Kernel, const N: usize>(
    matrix: &Matrix<K::Element>,
    rows: &Range<usize>,
    first_col: usize,
    depth: &Range<usize>,
    to: *mut K::Operand,
) {
    let Matrix { cols, row_stride, col_stride, .. } = *matrix;
    let panel = N * K::LANES;
    for n in 0..N {
        let to = to.add(n * K::LANES);
        let row = rows.start + n * K::LANES;
        let valid = rows.end.saturating_sub(row).min(K::LANES);
        if col_stride == 1 {
            let zero = K::splat(&K::Operand::default());
            for d in depth.clone().step_by(K::LANES) {
                let col = first_col + d * K::DEPTH;
                let from = matrix.as_ptr().add(row * row_stride + col);
                let to = to.add((d - depth.start) * panel);
                let mut lanes = [zero; MAX_LANES];
                if valid == K::LANES && d + K::LANES <= depth.end && col + K::LANES * K::DEPTH <= cols {
                    for r in 0..K::LANES {
                        lanes[r] = K::elements(from.add(r * row_stride));
                    }
                    K::transpose(&mut lanes[..K::LANES]);
                    for i in 0..K::LANES {
                        K::store(to.add(i * panel), lanes[i]);
                    }
                } else {
                    for r in 0..valid {
                        lanes[r] = elements_of::<K>(from.add(r * row_stride), cols - col);
                    }
                    K::transpose(&mut lanes[..K::LANES]);
                    for (i, lane) in lanes.iter().enumerate().take(K::LANES.min(depth.end - d)) {
                        K::store(to.add(i * panel), *lane);
                    }
                }
            }
        } else if row_stride == 1 && K::DEPTH == 1 && valid == K::LANES {
            for d in depth.clone() {
                let from = matrix.as_ptr().add(row + (first_col + d) * col_stride);
                K::store(to.add((d - depth.start) * panel), K::elements(from));
            }
        } else {
            for d in depth.clone() {
                for r in 0..K::LANES {
                    let operand = if r < valid {
                        operand_at::<K>(matrix, row + r, first_col / K::DEPTH + d)
                    } else {
                        K::Operand::default()
                    };
                    *to.add((d - depth.start) * panel + r) = operand;
                }
            }
        }
    }
}

/// Adds the products of `M` tokens' operands `[depth, M]` and weights `[depth, N * LANES]` to sums
/// `[M, N * LANES]`, or begins them if `fresh`.
#[inline(always)]
unsafe fn multiply<K: Kernel, const M: usize, const N: usize>(
    depth: usize,
    xs: *const K::Operand,
    weights: *const K::Operand,
    to: *mut Sum<K>,
    fresh: bool,
) {
    let panel = N * K::LANES;
    let zero = K::splat(&K::Operand::default());
    let mut sums = [[K::zero(); N]; M];
    for d in 0..depth {
        let mut w = [zero; N];
        for n in 0..N {
            w[n] = K::load(weights.add(d * panel + n * K::LANES));
        }
        for m in 0..M {
            let x = K::splat(xs.add(d * M + m));
            for n in 0..N {
                sums[m][n] = K::multiply_add(sums[m][n], w[n], x);
            }
        }
    }
    for m in 0..M {
        for n in 0..N {
            let to = to.add(m * panel + n * K::LANES);
            K::store_sums(to, if fresh { sums[m][n] } else { K::add(K::load_sums(to), sums[m][n]) });
        }
    }
}
