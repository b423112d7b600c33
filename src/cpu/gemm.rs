//! Many tokens: blocks of the hidden layer that stay in cache.
//!
//! For a block of tokens: x is transposed, so that the lanes of a vector are tokens; then, for a block of the intermediate
//! dimension at a time, the gate and up projections give that block of the hidden layer (activation, product and rounding
//! included), which the down projection's columns of the same block turn into a part of the output's sums. The hidden
//! layer is never whole, and as one product leaves it the next one reads it: lanes are tokens from x to the output.
//!
//! A product runs on tiles: some rows of weights, `DEPTH_BLOCK` operands of each at a time, against a few vectors of
//! tokens, with all sums in registers. The tokens' operands stay in the first cache while the weights, copied from
//! their rows as they are, come by and are broadcast one by one. (With weights in the lanes it is they that would have to be transposed, for
//! each block of tokens again.) Each such block is summed from zero and then added to the blocks before it, which keeps
//! the rounding error of long sums small; blocks begin at multiples of their size, so that no bit depends on how the
//! work is cut up or how many threads do it.

#![allow(clippy::needless_range_loop)] // registers are arrays indexed in loops that the compiler unrolls

use super::buffer::{Buffer, Output};
use super::kernel::{elements_of, Kernel, Sum, MAX_LANES};
use super::schedule::Schedule;
use super::{Compiled, Element, Problem};
use crate::parameters::{Matrix, Projection};
use candle_core::Result;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tokens in a block: enough that reading the weights again for the next block costs little beside the products.
const TOKEN_BLOCK: usize = 512;
/// Bytes of a block of the hidden layer, at most (unless more threads than its panels ask for more).
const HIDDEN_BYTES: usize = 2 << 20;

/// How often the weights are read for this many tokens.
pub(crate) fn passes(tokens: usize) -> usize {
    tokens.div_ceil(TOKEN_BLOCK).max(1)
}

/// One call's sizes and buffers. What lies in vectors of tokens lies there by tiles: of a few vectors, one
/// after the other, each with its rows (or operands) from the first to the last.
pub(crate) struct Gemm<'a, K: Kernel> {
    problem: &'a Problem<'a, K::Element>,
    out: Output<K::Element>,
    threads: usize,
    /// Tokens in a block, a multiple of the lanes.
    block_tokens: usize,
    /// Operands of a block of tokens: tiles of `[hidden_size / DEPTH, tokens]`.
    xs: Buffer<K::Operand>,
    /// Operands of a block of the hidden layer: tiles of `[features / DEPTH, tokens]`.
    hidden: Buffer<K::Operand>,
    /// The output's sums of a block of tokens: for each panel, tiles of `[PANEL, tokens]`.
    sums: Buffer<Sum<K>>,
    phases: Vec<Phase>,
    /// One for each thread, and how many are taken.
    scratch: Vec<Scratch<K>>,
    taken: AtomicUsize,
}

/// What the tasks of one phase do.
#[derive(Clone)]
enum Phase {
    /// Transpose x, a vector of tokens a task.
    Copy { tokens: Range<usize> },
    /// A panel of the hidden layer for a part of the tokens a task.
    Hidden { tokens: Range<usize>, block: Range<usize> },
    /// A panel of the output for a part of the tokens a task.
    Out { tokens: Range<usize>, block: Range<usize> },
}

/// One thread's buffers.
struct Scratch<K: Kernel> {
    /// Operands of weights: `[PANEL, DEPTH_BLOCK]`.
    weights: Buffer<K::Operand>,
    /// The gate's and up's sums: twice tiles of `[PANEL, tokens]`.
    sums: Buffer<Sum<K>>,
}

/// What a task multiplies with each other.
struct Task {
    /// Rows of weights.
    rows: Range<usize>,
    /// Tokens, counted from the block's first.
    part: Range<usize>,
    /// Where the rows begin that this thread will most likely work on after these.
    later: usize,
}

/// A tile's place among a block's tokens.
#[derive(Clone, Copy)]
struct Tile {
    /// Its first token, in the block.
    first: usize,
    /// Its tokens, some of which may be past the last one.
    width: usize,
}

impl<'a, K: Compiled> Gemm<'a, K> {
    /// Lays out a call.
    ///
    /// # Errors
    /// No memory for the buffers.
    pub(crate) fn new(problem: &'a Problem<'a, K::Element>, out: &'a mut [K::Element], threads: usize) -> Result<Self> {
        const {
            assert!(K::PART.is_multiple_of(K::ROWS.len() * K::LANES), "a part ends where a tile does");
            assert!(K::WHOLE == 1 || K::PANEL.is_multiple_of(K::WHOLE * K::DEPTH), "panels are whole operands");
        }
        let tokens = problem.xs.rows;
        let block_tokens = tokens.div_ceil(passes(tokens)).next_multiple_of(K::LANES);
        // As many panels as the cache holds, at least two for each thread; then blocks of even size that begin where
        // blocks of the summed dimension do.
        let intermediate = problem.gate.weight.rows;
        let panels = intermediate.div_ceil(K::PANEL).max(1);
        let panel_bytes = block_tokens * K::PANEL / K::DEPTH * size_of::<K::Operand>();
        let most = (HIDDEN_BYTES / panel_bytes).max(2 * threads).min(panels);
        let unit = (K::DEPTH_BLOCK * K::DEPTH).div_ceil(K::PANEL);
        let block_panels = panels.div_ceil(panels.div_ceil(most)).next_multiple_of(unit).min(panels);

        let mut phases = Vec::new();
        for first in (0..tokens).step_by(block_tokens) {
            let tokens = first..tokens.min(first + block_tokens);
            phases.push(Phase::Copy { tokens: tokens.clone() });
            // An empty intermediate dimension still has an output, of biases.
            for first in (0..intermediate.max(1)).step_by(block_panels * K::PANEL) {
                let block = first..intermediate.min(first + block_panels * K::PANEL);
                phases.push(Phase::Hidden { tokens: tokens.clone(), block: block.clone() });
                phases.push(Phase::Out { tokens: tokens.clone(), block });
            }
        }
        let hidden_size = problem.xs.cols;
        let scratch = || {
            let weights = Buffer::new([K::PANEL, K::DEPTH_BLOCK])?;
            Ok(Scratch { weights, sums: Buffer::new([2, block_tokens.min(K::PART), K::PANEL])? })
        };
        Ok(Self {
            problem,
            out: Output::new(out),
            threads,
            block_tokens,
            xs: Buffer::new([block_tokens, operands_of::<K>(hidden_size)])?,
            hidden: Buffer::new([block_tokens, block_panels * K::PANEL / K::DEPTH])?,
            sums: Buffer::new([problem.down.weight.rows.div_ceil(K::PANEL) * K::PANEL, block_tokens])?,
            phases,
            scratch: (0..threads).map(|_| scratch()).collect::<Result<_>>()?,
            taken: AtomicUsize::new(0),
        })
    }

    /// The tasks of every phase.
    pub(crate) fn schedule(&self) -> Schedule {
        Schedule::new(self.phases.iter().map(|phase| match phase {
            Phase::Copy { tokens } => tokens.len().div_ceil(K::LANES),
            Phase::Hidden { tokens, block } => block.len().div_ceil(K::PANEL) * parts::<K>(tokens),
            Phase::Out { tokens, .. } => self.problem.down.weight.rows.div_ceil(K::PANEL) * parts::<K>(tokens),
        }))
    }

    /// Does tasks until none is left.
    ///
    /// # Safety
    /// The processor has `K`'s instructions, this is inlined into a function compiled for them, and `schedule` is
    /// this call's.
    #[inline(always)]
    pub(crate) unsafe fn work(&self, schedule: &Schedule) {
        let Some(scratch) = self.scratch.get(self.taken.fetch_add(1, Ordering::Relaxed)) else {
            return;
        };
        while let Some(ticket) = schedule.draw() {
            let task = ticket.task;
            match &self.phases[ticket.phase] {
                Phase::Copy { tokens } => self.copy(tokens, task),
                Phase::Hidden { tokens, block } => self.hidden_panel(tokens, block, task, scratch),
                Phase::Out { tokens, block } => self.out_panel(tokens, block, task, scratch),
            }
        }
    }

    /// A task of a phase: a panel of these rows of weights, and a part of the tokens.
    #[inline(always)]
    fn task(&self, tokens: &Range<usize>, rows: &Range<usize>, task: usize) -> Task {
        let parts = parts::<K>(tokens);
        let first = |task: usize| rows.start + task / parts * K::PANEL;
        let part = task % parts * K::PART;
        Task {
            rows: first(task)..rows.end.min(first(task) + K::PANEL),
            part: part..tokens.len().min(part + K::PART),
            later: first(task + self.threads),
        }
    }

    /// The tiles of some of a block's tokens.
    #[inline(always)]
    fn tiles(&self, tokens: &Range<usize>) -> impl Iterator<Item = Tile> {
        let end = tokens.end.next_multiple_of(K::LANES);
        let most = K::ROWS.len() * K::LANES;
        (tokens.start..end).step_by(most).map(move |first| Tile { first, width: most.min(end - first) })
    }

    /// Transposes a vector of tokens, those past the end as zeros.
    #[inline(always)]
    unsafe fn copy(&self, tokens: &Range<usize>, task: usize) {
        let depth = operands_of::<K>(self.problem.xs.cols);
        let first = task * K::LANES;
        for tile in self.tiles(&(0..tokens.len())) {
            if (tile.first..tile.first + tile.width).contains(&first) {
                let to = self.xs.as_mut_ptr().add(tile.first * depth + first - tile.first);
                let rows = tokens.start + first..tokens.end.min(tokens.start + first + K::LANES);
                transpose::<K>(&self.problem.xs, &rows, depth, to, tile.width);
            }
        }
    }

    /// Adds to a task's sums the products of its rows of a matrix (from this column on) over one block of the
    /// summed dimension, or begins them if `fresh`. The other factor's operands are tiles of this depth; `then` is where
    /// the weights lie that are read after these.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // a product's factors, and where it lies among the others
    unsafe fn product(
        &self,
        Task { rows, part, .. }: &Task,
        (matrix, first_col): (&Matrix<K::Element>, usize),
        d: &Range<usize>,
        then: *const K::Element,
        (xs, depth): (*const K::Operand, usize),
        scratch: &Scratch<K>,
        sums: *mut Sum<K>,
        fresh: bool,
    ) {
        let col = first_col + d.start * K::DEPTH;
        let whole = rows.len().is_multiple_of(K::WHOLE) && col + d.len() * K::DEPTH <= matrix.cols;
        let in_place = in_place::<K>() && matrix.col_stride == 1 && whole;
        let copies = scratch.weights.as_mut_ptr();
        for tile in self.tiles(part) {
            let vectors = tile.width / K::LANES;
            let step = K::ROWS[vectors - 1];
            let last = tile.first + tile.width >= part.end;
            for first in (0..rows.len()).step_by(step) {
                let group = rows.start + first..rows.end.min(rows.start + first + step);
                let (start, stride) = if in_place {
                    (at(matrix, group.start, col).cast(), matrix.row_stride * size_of::<K::Element>())
                } else {
                    (copies.add(first * K::DEPTH_BLOCK).cast_const(), K::DEPTH_BLOCK * size_of::<K::Operand>())
                };
                if !in_place && tile.first == part.start {
                    operands::<K>(matrix, &group, first_col, d, copies.add(first * K::DEPTH_BLOCK));
                }
                let next = match () {
                    _ if group.end < rows.end => at(matrix, group.end, col),
                    _ if last => then,
                    _ => at(matrix, rows.start, col),
                };
                let ahead = Ahead { start: next, row_stride: matrix.row_stride, wanted: matrix.col_stride == 1 };
                let x = xs.add(tile.first * depth + d.start * tile.width);
                let sums = sums.add((tile.first - part.start) * K::PANEL + first * tile.width);
                K::multiply(vectors, Weights { start, stride, rows: group.len() }, d.len(), x, ahead, sums, fresh);
            }
        }
    }

    /// A panel of the hidden layer.
    #[inline(always)]
    unsafe fn hidden_panel(&self, tokens: &Range<usize>, block: &Range<usize>, task: usize, scratch: &Scratch<K>) {
        let Problem { gate, up, activation, xs, .. } = self.problem;
        let task = self.task(tokens, block, task);
        let Task { rows, part, later } = &task;
        let depth = operands_of::<K>(xs.cols);
        let gate_sums = scratch.sums.as_mut_ptr();
        let up_sums = gate_sums.add(self.block_tokens.min(K::PART) * K::PANEL);

        for d in blocks::<K>(depth) {
            let (row, col) = if d.end < depth { (rows.start, d.end * K::DEPTH) } else { (*later, 0) };
            let then = at(&gate.weight, row, col);
            let x = (self.xs.as_mut_ptr().cast_const(), depth);
            match up {
                None => self.product(&task, (&gate.weight, 0), &d, then, x, scratch, gate_sums, d.start == 0),
                Some(up) => {
                    let up_first = at(&up.weight, rows.start, d.start * K::DEPTH);
                    self.product(&task, (&gate.weight, 0), &d, up_first, x, scratch, gate_sums, d.start == 0);
                    self.product(&task, (&up.weight, 0), &d, then, x, scratch, up_sums, d.start == 0);
                }
            }
        }

        let hidden_depth = operands_of::<K>(block.len());
        // What pads the block's last operands is zero: its sums may be NaN, where x is infinite.
        let padded = if rows.end < block.end { rows.len() } else { hidden_depth * K::DEPTH + block.start - rows.start };
        for tile in self.tiles(part) {
            let to = self.hidden.as_mut_ptr().add(tile.first * hidden_depth);
            let to = to.add((rows.start - block.start) / K::DEPTH * tile.width);
            // All rows at once: an activation's constants, and what its values wait for each other, are spread over many.
            let sums = (tile.first - part.start) * K::PANEL;
            let hidden = std::slice::from_raw_parts_mut(gate_sums.add(sums), rows.len() * tile.width);
            add_bias(hidden, tile.width, gate, rows.start);
            activation.apply(hidden);
            if let Some(up) = up {
                let up_values = std::slice::from_raw_parts_mut(up_sums.add(sums), hidden.len());
                add_bias(up_values, tile.width, up, rows.start);
                for (hidden, up) in hidden.iter_mut().zip(up_values) {
                    *hidden = *hidden * *up;
                }
            }
            for row in (0..padded).step_by(K::DEPTH) {
                let to = to.add(row / K::DEPTH * tile.width);
                for t in (0..tile.width).step_by(K::LANES) {
                    let mut sums = [K::zero(); 2];
                    for (row, sums) in (row..rows.len().min(row + K::DEPTH)).zip(&mut sums) {
                        *sums = K::load_sums(hidden.as_ptr().add(row * tile.width + t));
                    }
                    K::round_operands(to.add(t), sums);
                }
            }
        }
    }

    /// Adds a block of the hidden layer to a panel of the output's sums, and after the last block writes it.
    #[inline(always)]
    unsafe fn out_panel(&self, tokens: &Range<usize>, block: &Range<usize>, task: usize, scratch: &Scratch<K>) {
        let Problem { gate, down, .. } = self.problem;
        let out_features = down.weight.rows;
        let task = self.task(tokens, &(0..out_features), task);
        let Task { rows, part, later } = &task;
        let depth = operands_of::<K>(block.len());
        let sums = self.sums.as_mut_ptr().add(rows.start * self.block_tokens + part.start * K::PANEL);

        for d in blocks::<K>(depth) {
            let next = block.start + d.end * K::DEPTH;
            let (row, col) = if d.end < depth { (rows.start, next) } else { (*later, block.start) };
            let x = (self.hidden.as_mut_ptr().cast_const(), depth);
            let fresh = block.start == 0 && d.start == 0;
            let then = at(&down.weight, row, col);
            self.product(&task, (&down.weight, block.start), &d, then, x, scratch, sums, fresh);
        }
        if block.end < gate.weight.rows {
            return;
        }
        for tile in self.tiles(part) {
            let sums = sums.add((tile.first - part.start) * K::PANEL);
            for r in (0..rows.len()).step_by(K::LANES) {
                let features = K::LANES.min(rows.len() - r);
                for t in (0..tile.width).step_by(K::LANES) {
                    let mut lanes = [K::zero(); MAX_LANES];
                    for i in 0..features {
                        let sums = std::slice::from_raw_parts_mut(sums.add((r + i) * tile.width + t), K::LANES);
                        add_bias(sums, K::LANES, down, rows.start + r + i);
                        lanes[i] = K::load_sums(sums.as_ptr());
                    }
                    K::transpose_sums(&mut lanes[..K::LANES]);
                    let first = tokens.start + tile.first + t;
                    for (lane, token) in lanes.iter().zip(first..tokens.end.min(first + K::LANES)) {
                        let to = self.out.as_mut_ptr().add(token * out_features + rows.start + r);
                        if features == K::LANES {
                            K::round(to, *lane);
                        } else {
                            let mut rounded = [K::Element::default(); MAX_LANES];
                            K::round(rounded.as_mut_ptr(), *lane);
                            std::ptr::copy_nonoverlapping(rounded.as_ptr(), to, features);
                        }
                    }
                }
            }
        }
    }
}

/// The parts of a block of tokens.
fn parts<K: Compiled>(tokens: &Range<usize>) -> usize {
    tokens.len().div_ceil(K::PART)
}

/// The operands that so many elements are, those that fill up the last product with zeros included.
#[inline(always)]
fn operands_of<K: Compiled>(elements: usize) -> usize {
    elements.div_ceil(K::DEPTH).next_multiple_of(K::WHOLE)
}

/// The summed dimension in blocks; one empty block where it is empty, so that its sums become zeros.
#[inline(always)]
fn blocks<K: Compiled>(depth: usize) -> impl Iterator<Item = Range<usize>> {
    (0..depth.max(1)).step_by(K::DEPTH_BLOCK).map(move |d| d..depth.min(d + K::DEPTH_BLOCK))
}

/// Adds the biases of features, from this one on, to their sums: so many, side by side, of each.
#[inline(always)]
fn add_bias<E: Element>(sums: &mut [E::Sum], width: usize, projection: &Projection<Matrix<E>>, first: usize) {
    if let Some(bias) = &projection.bias {
        for (r, sums) in sums.chunks_exact_mut(width).enumerate() {
            let bias = bias.get(0, first + r).widen();
            for sum in sums {
                *sum = *sum + bias;
            }
        }
    }
}

/// Operand `d` of a row, whatever the strides.
#[inline(always)]
fn operand_at<K: Kernel>(matrix: &Matrix<K::Element>, row: usize, d: usize) -> K::Operand {
    let element = |col: usize| if col < matrix.cols { matrix.get(row, col) } else { K::Element::default() };
    K::operand([element(d * K::DEPTH), element(d * K::DEPTH + 1)])
}

/// Whether weights are operands as they lie in memory.
const fn in_place<K: Kernel>() -> bool {
    size_of::<K::Operand>() == K::DEPTH * size_of::<K::Element>()
}

/// The address of an element, which may be none.
#[inline(always)]
fn at<E>(matrix: &Matrix<E>, row: usize, col: usize) -> *const E {
    matrix.as_ptr().wrapping_add(row * matrix.row_stride + col * matrix.col_stride)
}

/// Operands of a few rows of weights.
pub(crate) struct Weights<T> {
    pub start: *const T,
    /// Bytes from a row to the next.
    pub stride: usize,
    pub rows: usize,
}

/// The weights that are read next: they come from memory while the products run.
pub(crate) struct Ahead<E> {
    start: *const E,
    row_stride: usize,
    /// Whether to ask for them at all. Rows that are not contiguous would cost a line an element; they are left to the
    /// processor.
    wanted: bool,
}

/// Bytes of a cache line.
const LINE: usize = 64;

/// Transposes the operands of up to `LANES` rows into `[depth, stride]`, of which this writes `LANES` columns, those of rows
/// that are missing as zeros.
#[inline(always)]
unsafe fn transpose<K: Kernel>(
    matrix: &Matrix<K::Element>,
    rows: &Range<usize>,
    depth: usize,
    to: *mut K::Operand,
    stride: usize,
) {
    if matrix.col_stride == 1 {
        let zero = K::splat(&K::Operand::default());
        for d in (0..depth).step_by(K::LANES) {
            let col = d * K::DEPTH;
            let mut lanes = [zero; MAX_LANES];
            for (lane, row) in lanes.iter_mut().zip(rows.clone()) {
                *lane = elements_of::<K>(matrix.as_ptr().add(row * matrix.row_stride + col), matrix.cols - col);
            }
            K::transpose(&mut lanes[..K::LANES]);
            for (i, lane) in lanes.iter().enumerate().take(K::LANES.min(depth - d)) {
                K::store(to.add((d + i) * stride), *lane);
            }
        }
    } else {
        for d in 0..depth {
            for lane in 0..K::LANES {
                let row = rows.start + lane;
                let operand = if row < rows.end { operand_at::<K>(matrix, row, d) } else { K::Operand::default() };
                *to.add(d * stride + lane) = operand;
            }
        }
    }
}

/// Writes the operands `depth` (counted from column `first_col` on) of some rows to `[rows, DEPTH_BLOCK]`.
#[inline(always)]
unsafe fn operands<K: Compiled>(
    matrix: &Matrix<K::Element>,
    rows: &Range<usize>,
    first_col: usize,
    depth: &Range<usize>,
    to: *mut K::Operand,
) {
    let Matrix { cols, row_stride, col_stride, .. } = *matrix;
    if col_stride == 1 {
        for (r, row) in rows.clone().enumerate() {
            for d in depth.clone().step_by(K::LANES) {
                let col = first_col + d * K::DEPTH;
                let operands = elements_of::<K>(matrix.as_ptr().add(row * row_stride + col), cols - col);
                K::store(to.add(r * K::DEPTH_BLOCK + d - depth.start), operands);
            }
        }
    } else if row_stride == 1 && K::DEPTH == 1 {
        let zero = K::splat(&K::Operand::default());
        for r in (0..rows.len()).step_by(K::LANES) {
            for d in depth.clone().step_by(K::LANES) {
                let mut lanes = [zero; MAX_LANES];
                for (lane, d) in lanes.iter_mut().zip(d..depth.end.min(d + K::LANES)) {
                    let from = matrix.as_ptr().add(rows.start + r + (first_col + d) * col_stride);
                    *lane = elements_of::<K>(from, rows.len() - r);
                }
                K::transpose(&mut lanes[..K::LANES]);
                for (i, lane) in lanes.iter().enumerate().take(K::LANES.min(rows.len() - r)) {
                    K::store(to.add((r + i) * K::DEPTH_BLOCK + d - depth.start), *lane);
                }
            }
        }
    } else {
        for (r, row) in rows.clone().enumerate() {
            for d in depth.clone() {
                *to.add(r * K::DEPTH_BLOCK + d - depth.start) = operand_at::<K>(matrix, row, first_col / K::DEPTH + d);
            }
        }
    }
}

/// Adds the products of up to `R` rows of weights and the operands of `N` vectors of tokens, `[depth, N * LANES]`, to sums
/// `[R, N * LANES]`, or begins them if `fresh`. Where there are fewer rows, it repeats the last one. Beside the products
/// it asks for what is `ahead`.
#[inline(always)]
pub(crate) unsafe fn multiply<K: Kernel, const N: usize, const R: usize>(
    weights: Weights<K::Operand>,
    depth: usize,
    xs: *const K::Operand,
    ahead: Ahead<K::Element>,
    sums: *mut Sum<K>,
    fresh: bool,
) {
    let width = N * K::LANES;
    let mut w = [weights.start; R];
    for r in 0..R {
        w[r] = weights.start.wrapping_byte_add(r.min(weights.rows - 1) * weights.stride);
    }
    let mut tile = [[K::zero(); N]; R];
    for start in (0..depth).step_by(K::LANES) {
        if ahead.wanted && start * K::DEPTH * size_of::<K::Element>() % LINE == 0 {
            for r in 0..R {
                let at = ahead.start.wrapping_add(r * ahead.row_stride + start * K::DEPTH);
                // As many lines as f32 has would push the tokens' operands out of the first cache.
                if size_of::<K::Element>() < size_of::<f32>() {
                    K::prefetch(at);
                } else {
                    K::prefetch_far(at);
                }
            }
        }
        for d in start..depth.min(start + K::LANES) {
            let mut x = [K::splat(&K::Operand::default()); N];
            for n in 0..N {
                x[n] = K::load(xs.add(d * width + n * K::LANES));
            }
            for r in 0..R {
                let w = K::splat(w[r].add(d));
                for n in 0..N {
                    tile[r][n] = K::multiply_add(tile[r][n], w, x[n]);
                }
            }
        }
    }
    for r in 0..R {
        for n in 0..N {
            let to = sums.add(r * width + n * K::LANES);
            K::store_sums(to, if fresh { tile[r][n] } else { K::add(K::load_sums(to), tile[r][n]) });
        }
    }
}
