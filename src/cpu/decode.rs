//! Few tokens: dot products of the weights' rows, read once and in place, with every token.
//!
//! At these sizes the time is that of reading the weights, and memory is read fastest as one sequential stream a
//! thread: so a row (a few rows, where tokens are many enough to keep the vector units busy) is multiplied with all
//! tokens before the next is begun, and prefetches run ahead of it. Of several tokens, a block of columns at a time is
//! multiplied with a chunk of rows, so that the tokens' operands stay in the first cache. Three phases: x is copied, rows
//! of the gate and up projections give the hidden layer, rows of the down projection the output.

#![allow(clippy::needless_range_loop)] // registers are arrays indexed in loops that the compiler unrolls

use super::buffer::{Buffer, Output};
use super::kernel::{elements_of, Kernel, Sum, TOTALS};
use super::schedule::Schedule;
use super::{Element, Problem, Real};
use crate::parameters::{Matrix, Projection};
use candle_core::Result;
use std::ops::Range;

/// The most tokens that this kernel takes.
pub(crate) const MAX_TOKENS: usize = TOTALS;

/// A task reads about this many bytes of weights in a stream, fewer where the threads would get too few tasks to end
/// a phase together.
const TASK_BYTES: usize = 1 << 20;
/// Tasks of a phase that a thread should get.
const TASKS_PER_THREAD: usize = 16;
/// Rows whose sums are kept until the activation is applied to all of them: a multiple of every group of rows. Of several
/// tokens, a block of a chunk's columns is asked for during the one before it.
const CHUNK: usize = 24;
/// Bytes of the operands that stay in the first cache while a chunk of rows is multiplied with them.
const BLOCK_BYTES: usize = 20 << 10;
/// How far prefetches of one token run ahead of the row being read, in bytes.
const AHEAD: usize = 8 << 10;

/// One call's buffers.
pub(crate) struct Decode<'a, K: Kernel> {
    problem: &'a Problem<'a, K::Element>,
    /// x and the hidden layer.
    xs: Columns<K>,
    hidden: Columns<K>,
    out: Output<K::Element>,
    task_rows: [usize; 2],
    threads: usize,
}

/// Operands of a few tokens: a vector of the first token, one of the second and so on, then each token's next. So a
/// block of columns is one piece of memory, which spreads evenly over the first cache, and has one address.
struct Columns<K: Kernel> {
    buffer: Buffer<K::Operand>,
    tokens: usize,
}

impl<K: Kernel> Columns<K> {
    /// Columns of `len` elements, to be written; what pads the last vector is zero.
    fn new(tokens: usize, len: usize) -> Result<Self> {
        let vectors = len.div_ceil(K::LANES * K::DEPTH);
        let columns = Self { buffer: Buffer::new([vectors, tokens, K::LANES])?, tokens };
        for token in 0..tokens {
            for i in len..vectors * K::LANES * K::DEPTH {
                // SAFETY: within the vectors that were just reserved, and nothing else has them yet.
                unsafe { columns.set(token, i, K::Element::default()) };
            }
        }
        Ok(columns)
    }

    /// Copies a token.
    ///
    /// # Safety
    /// As for [`Decode::work`]; `token` is in range of both, `from`'s rows are this long, and no other thread accesses
    /// this token.
    #[inline(always)]
    unsafe fn fill(&self, token: usize, from: &Matrix<K::Element>) {
        let step = K::LANES * K::DEPTH;
        for i in (0..from.cols).step_by(step) {
            if from.col_stride == 1 {
                let lanes = self.buffer.as_mut_ptr().add((i / step * self.tokens + token) * K::LANES);
                K::store(lanes, elements_of::<K>(from.as_ptr().add(token * from.row_stride + i), from.cols - i));
            } else {
                for i in i..from.cols.min(i + step) {
                    self.set(token, i, from.get(token, i));
                }
            }
        }
    }

    /// # Safety
    /// `token` and `i` are in range, and no other thread accesses this element.
    #[inline(always)]
    unsafe fn set(&self, token: usize, i: usize, value: K::Element) {
        let vector = i / (K::LANES * K::DEPTH) * self.tokens + token;
        let lanes = self.buffer.as_mut_ptr().add(vector * K::LANES);
        let i = i % (K::LANES * K::DEPTH);
        if K::DEPTH == 1 {
            *lanes.add(i) = K::operand([value, value]);
        } else {
            // A pair is its elements as they are stored.
            *lanes.cast::<K::Element>().add(i) = value;
        }
    }
}

impl<'a, K: Kernel> Decode<'a, K> {
    /// Lays out a call.
    ///
    /// # Errors
    /// No memory for the buffers.
    pub(crate) fn new(problem: &'a Problem<'a, K::Element>, out: &'a mut [K::Element], threads: usize) -> Result<Self> {
        let Problem { xs: input, gate, down, .. } = problem;
        let xs = Columns::new(input.rows, input.cols)?;
        let hidden = Columns::new(input.rows, gate.weight.rows)?;
        let task_rows = |weight: &Matrix<K::Element>, matrices: usize| {
            let row_bytes = weight.cols * matrices * size_of::<K::Element>();
            let even = weight.rows.div_ceil(TASKS_PER_THREAD * threads);
            (TASK_BYTES / row_bytes.max(1)).min(even).max(1).next_multiple_of(2)
        };
        let task_rows = [task_rows(&gate.weight, 1 + problem.up.iter().len()), task_rows(&down.weight, 1)];
        Ok(Self { problem, xs, hidden, out: Output::new(out), task_rows, threads })
    }

    /// The tasks of the three phases: x is copied, a token a task (by the calling thread, most likely, before another
    /// is awake), then come the rows of the hidden layer, and those of the output.
    pub(crate) fn schedule(&self) -> Schedule {
        let Problem { xs, gate, down, .. } = self.problem;
        let [hidden, out] = self.task_rows;
        Schedule::new([xs.rows, gate.weight.rows.div_ceil(hidden), down.weight.rows.div_ceil(out)])
    }

    /// Does tasks until none is left: `F` rows at a time of 2 to 4 tokens, `R` of more, these in two halves one after
    /// the other if `HALVE` (where there are too few registers for the sums of all).
    ///
    /// # Safety
    /// The processor has `K`'s instructions, this is inlined into a function compiled for them, every weight's
    /// columns are adjacent, and `schedule` is this call's.
    #[inline(always)]
    pub(crate) unsafe fn work<const F: usize, const R: usize, const HALVE: bool>(&self, schedule: &Schedule) {
        let Problem { xs, gate, up, down, activation } = self.problem;
        let mut sums = [[Sum::<K>::ZERO; MAX_TOKENS]; CHUNK];
        let mut up_sums = [[Sum::<K>::ZERO; MAX_TOKENS]; CHUNK];
        while let Some(ticket) = schedule.draw() {
            if ticket.phase == 0 {
                self.xs.fill(ticket.task, xs);
                continue;
            }
            let is_hidden = ticket.phase == 1;
            let (projection, task_rows) = if is_hidden { (gate, self.task_rows[0]) } else { (down, self.task_rows[1]) };
            let first = ticket.task * task_rows;
            let end = projection.weight.rows.min(first + task_rows);
            for row in (first..end).step_by(CHUNK) {
                let rows = row..end.min(row + CHUNK);
                // What this thread reads after these, or most likely will.
                let after = if rows.end < end { rows.end } else { first + self.threads * task_rows };
                if is_hidden {
                    project::<K, F, R, HALVE>(gate, &rows, after, &self.xs, &mut sums);
                    activation.apply(sums[..rows.len()].as_flattened_mut());
                    if let Some(up) = up {
                        project::<K, F, R, HALVE>(up, &rows, after, &self.xs, &mut up_sums);
                        for (hidden, up) in sums.as_flattened_mut().iter_mut().zip(up_sums.as_flattened()) {
                            *hidden = *hidden * *up;
                        }
                    }
                } else {
                    project::<K, F, R, HALVE>(down, &rows, after, &self.hidden, &mut sums);
                }
                for token in 0..self.xs.tokens {
                    for (row, sums) in rows.clone().zip(&sums) {
                        let value = K::Element::round(sums[token]);
                        // The rows from `first` to `end` are this task's alone.
                        if is_hidden {
                            self.hidden.set(token, row, value);
                        } else {
                            *self.out.as_mut_ptr().add(token * down.weight.rows + row) = value;
                        }
                    }
                }
            }
        }
    }
}

/// The rows of a projection, `CHUNK` at most, of every token, bias included. It asks for the rows from `after` on.
#[inline(always)]
unsafe fn project<K: Kernel, const F: usize, const R: usize, const HALVE: bool>(
    projection: &Projection<Matrix<K::Element>>,
    rows: &Range<usize>,
    after: usize,
    xs: &Columns<K>,
    sums: &mut [[Sum<K>; MAX_TOKENS]; CHUNK],
) {
    let weight = &projection.weight;
    match xs.tokens {
        // One row, and sums that are added to in turn to hide the latency of an addition.
        1 => groups::<K, 1, 1, 0, 4>(weight, rows, after, xs, sums),
        2 => groups::<K, F, 2, 0, 2>(weight, rows, after, xs, sums),
        3 => groups::<K, F, 3, 0, 1>(weight, rows, after, xs, sums),
        4 => groups::<K, F, 4, 0, 1>(weight, rows, after, xs, sums),
        5 if HALVE => groups::<K, R, 3, 2, 1>(weight, rows, after, xs, sums),
        6 if HALVE => groups::<K, R, 3, 3, 1>(weight, rows, after, xs, sums),
        7 if HALVE => groups::<K, R, 4, 3, 1>(weight, rows, after, xs, sums),
        8 if HALVE => groups::<K, R, 4, 4, 1>(weight, rows, after, xs, sums),
        5 => groups::<K, R, 5, 0, 1>(weight, rows, after, xs, sums),
        6 => groups::<K, R, 6, 0, 1>(weight, rows, after, xs, sums),
        7 => groups::<K, R, 7, 0, 1>(weight, rows, after, xs, sums),
        _ => groups::<K, R, MAX_TOKENS, 0, 1>(weight, rows, after, xs, sums),
    }
    if let Some(bias) = &projection.bias {
        for (row, sums) in rows.clone().zip(sums) {
            let bias = bias.get(0, row).widen();
            for sum in sums {
                *sum = *sum + bias;
            }
        }
    }
}

/// Goes through the rows in groups of `R` for each block of columns, for `A` tokens and then `B` more.
/// Where there are fewer rows than a group's, it repeats the last one. Beside the products it asks for the next block of
/// columns or, during the last one, for the first of the rows from `after` on; of one token for what lies `AHEAD`.
#[inline(always)]
unsafe fn groups<K: Kernel, const R: usize, const A: usize, const B: usize, const U: usize>(
    weight: &Matrix<K::Element>,
    rows: &Range<usize>,
    after: usize,
    xs: &Columns<K>,
    sums: &mut [[Sum<K>; MAX_TOKENS]; CHUNK],
) {
    let step = K::LANES * K::DEPTH;
    let tokens = A + B;
    let block =
        if tokens == 1 { weight.cols.max(1) } else { BLOCK_BYTES / (tokens * size_of::<K::Operand>()) * K::DEPTH };
    // Of even size, since what is asked for during one block is as much as it reads itself.
    let blocks = weight.cols.div_ceil(block.next_multiple_of(step * U)).max(1);
    let block = weight.cols.div_ceil(blocks).next_multiple_of(step * U);
    let groups = rows.len().div_ceil(R);
    let row_bytes = weight.cols * size_of::<K::Element>();
    let groups_ahead = if tokens == 1 { (AHEAD / row_bytes.max(1)).clamp(1, groups) } else { groups };
    let at = |group: usize, r: usize, block_start: usize| {
        let row = rows.start + (group * R + r).min(rows.len() - 1);
        weight.as_ptr().wrapping_add(row * weight.row_stride + block_start)
    };
    let mut partial = [[K::zero(); MAX_TOKENS]; CHUNK];
    for b in 0..blocks {
        let start = b * block;
        let len = block.min(weight.cols - start);
        let x = xs.buffer.as_mut_ptr().add(start / K::DEPTH * tokens).cast_const();
        for group in 0..groups {
            let later = group + groups_ahead;
            let ahead = match () {
                _ if later < groups => at(later, 0, start),
                _ if b + 1 < blocks => at(later - groups, 0, start + block),
                _ => weight.as_ptr().wrapping_add((after + (later - groups) * R) * weight.row_stride),
            };
            let mut w = [std::ptr::null(); R];
            for r in 0..R {
                w[r] = at(group, r, start);
            }
            let passes = 1 + usize::from(B > 0);
            let ahead = |pass: usize| Ahead {
                start: ahead.wrapping_add(pass * (len / passes)),
                row_stride: weight.row_stride,
                passes,
            };
            let fresh = b == 0;
            let partial = &mut partial[group * R..(group + 1) * R];
            dots::<K, R, A, U>(w, ahead(0), len, x, (0, tokens), fresh, partial);
            if B > 0 {
                dots::<K, R, B, U>(w, ahead(1), len, x, (A, tokens), fresh, partial);
            }
            if b + 1 == blocks {
                for (sums, partial) in sums[group * R..].iter_mut().zip(partial) {
                    if tokens == 1 {
                        sums[0] = K::total(partial[0]);
                    } else {
                        *sums = K::totals(partial);
                    }
                }
            }
        }
    }
}

/// Rows that will be read later, prefetched while others are multiplied.
struct Ahead<E> {
    start: *const E,
    row_stride: usize,
    /// Into how many passes the columns are divided.
    passes: usize,
}

/// Adds the products of `R` rows' next `len` elements with those of `N` tokens, from the first of these on, over `U`
/// vectors of sums in turn: to `out`, or to zero if `fresh`.
#[inline(always)]
unsafe fn dots<K: Kernel, const R: usize, const N: usize, const U: usize>(
    w: [*const K::Element; R],
    ahead: Ahead<K::Element>,
    len: usize,
    x: *const K::Operand,
    (first, tokens): (usize, usize),
    fresh: bool,
    out: &mut [[K::Sums; MAX_TOKENS]],
) {
    let step = K::LANES * K::DEPTH;
    let line = 64 / size_of::<K::Element>();
    let zero = K::splat(&K::Operand::default());
    let mut sums = [[[K::zero(); U]; N]; R];
    for r in 0..R {
        for t in 0..N {
            sums[r][t][0] = if fresh { K::zero() } else { out[r][first + t] };
        }
    }
    let whole = len / (step * U) * U;
    for i in (0..whole).step_by(U) {
        for u in 0..U {
            let at = (i + u) * step;
            let mut v = [zero; R];
            for r in 0..R {
                if at % (line * ahead.passes) == 0 {
                    K::prefetch_far(ahead.start.wrapping_add(r * ahead.row_stride + at / ahead.passes));
                }
                v[r] = K::elements(w[r].add(at));
            }
            for t in 0..N {
                let x = K::load(x.add(((i + u) * tokens + first + t) * K::LANES));
                for r in 0..R {
                    sums[r][t][u] = K::multiply_add(sums[r][t][u], v[r], x);
                }
            }
        }
    }
    for i in whole..len.div_ceil(step) {
        for r in 0..R {
            let v = elements_of::<K>(w[r].add(i * step), len - i * step);
            for t in 0..N {
                sums[r][t][0] = K::multiply_add(sums[r][t][0], v, K::load(x.add((i * tokens + first + t) * K::LANES)));
            }
        }
    }
    for r in 0..R {
        for t in 0..N {
            for u in 1..U {
                sums[r][t][0] = K::add(sums[r][t][0], sums[r][t][u]);
            }
            out[r][first + t] = sums[r][t][0];
        }
    }
}
