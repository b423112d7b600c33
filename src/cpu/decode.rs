//! Few tokens: dot products of the weights' rows, read once and in place, with every token.
//!
//! At these sizes the time is that of reading the weights, and memory is read fastest as one sequential stream a
//! thread: so a row (a few rows, where tokens are many enough to keep the vector units busy) is multiplied with all
//! tokens before the next is begun, and prefetches run ahead of it. Of several tokens, a block of columns at a time is
//! multiplied with a chunk of rows, so that the tokens' operands stay in the first cache. Two phases: rows of the gate
//! and up projections give the hidden layer, rows of the down projection the output.

#![allow(clippy::needless_range_loop)] // registers are arrays indexed in loops that the compiler unrolls

use super::buffer::{Buffer, Output};
use super::kernel::{elements_of, Kernel, Sum};
use super::schedule::Schedule;
use super::{Element, Problem, Real};
use crate::parameters::{Matrix, Projection};
use candle_core::Result;
use std::ops::Range;

/// The most tokens that this kernel takes.
pub(crate) const MAX_TOKENS: usize = 8;

/// A task reads about this many bytes of weights in a stream, fewer where the threads would get too few tasks to end
/// a phase together.
const TASK_BYTES: usize = 1 << 20;
/// Tasks of a phase that a thread should get.
const TASKS_PER_THREAD: usize = 16;
/// Rows whose sums are kept until the activation is applied to all of them.
const CHUNK: usize = 16;
/// Bytes of the operands that stay in the first cache while a chunk of rows is multiplied with them.
const BLOCK_BYTES: usize = 16 << 10;
/// How many groups of rows before their use their weights are asked for.
const GROUPS_AHEAD: usize = 2;
/// How far prefetches run ahead of the one row being read, in bytes.
const AHEAD: usize = 8 << 10;

/// One call's buffers.
pub(crate) struct Decode<'a, K: Kernel> {
    problem: &'a Problem<'a, K::Element>,
    /// x and the hidden layer as operands, a token a row, padded with zeros to whole vectors.
    xs: Rows<K>,
    hidden: Rows<K>,
    out: Output<K::Element>,
    task_rows: [usize; 2],
}

/// Operands of a few tokens.
struct Rows<K: Kernel> {
    buffer: Buffer<K::Operand>,
    stride: usize,
    tokens: usize,
}

impl<K: Kernel> Rows<K> {
    /// Rows of `len` elements, to be written; their padding is zero.
    fn new(tokens: usize, len: usize) -> Result<Self> {
        let end = len.div_ceil(K::DEPTH).next_multiple_of(K::LANES);
        // Rows a multiple of 4 KiB apart would compete for the same few places in the first cache.
        let line = 64 / size_of::<K::Operand>();
        let stride = end.next_multiple_of(64 * line) + 64 / MAX_TOKENS * line;
        let buffer = Buffer::<K::Operand>::new([tokens, stride])?;
        for token in 0..tokens {
            for i in len / K::DEPTH..end {
                // SAFETY: within the row that was just reserved.
                unsafe { *buffer.as_mut_ptr().add(token * stride + i) = K::Operand::default() };
            }
        }
        Ok(Self { buffer, stride, tokens })
    }

    /// Copies a token.
    ///
    /// # Safety
    /// `token` is in range of both, `from`'s rows are this long, and no other thread accesses this row.
    unsafe fn fill(&self, token: usize, from: &Matrix<K::Element>) {
        // Operands of the elements' own size are elements as they are stored.
        if from.col_stride == 1 && size_of::<K::Operand>() == K::DEPTH * size_of::<K::Element>() {
            let to = self.buffer.as_mut_ptr().add(token * self.stride).cast::<K::Element>();
            std::ptr::copy_nonoverlapping(from.as_ptr().add(token * from.row_stride), to, from.cols);
        } else {
            for i in 0..from.cols {
                self.set(token, i, from.get(token, i));
            }
        }
    }

    /// # Safety
    /// `token` and `i` are in range, and no other thread accesses this element.
    #[inline(always)]
    unsafe fn set(&self, token: usize, i: usize, value: K::Element) {
        let row = self.buffer.as_mut_ptr().add(token * self.stride);
        if K::DEPTH == 1 {
            *row.add(i) = K::operand([value, value]);
        } else {
            *row.cast::<K::Element>().add(i) = value;
        }
    }
}

impl<'a, K: Kernel> Decode<'a, K> {
    /// Lays out a call, x already copied.
    ///
    /// # Errors
    /// No memory for the buffers.
    pub(crate) fn new(problem: &'a Problem<'a, K::Element>, out: &'a mut [K::Element], threads: usize) -> Result<Self> {
        let Problem { xs: input, gate, down, .. } = problem;
        let xs = Rows::new(input.rows, input.cols)?;
        for token in 0..input.rows {
            // SAFETY: elements in range, and nothing else has the buffer yet.
            unsafe { xs.fill(token, input) };
        }
        let hidden = Rows::new(input.rows, gate.weight.rows)?;
        let task_rows = |weight: &Matrix<K::Element>, matrices: usize| {
            let row_bytes = weight.cols * matrices * size_of::<K::Element>();
            let even = weight.rows.div_ceil(TASKS_PER_THREAD * threads);
            (TASK_BYTES / row_bytes.max(1)).min(even).max(1).next_multiple_of(2)
        };
        let task_rows = [task_rows(&gate.weight, 1 + problem.up.iter().len()), task_rows(&down.weight, 1)];
        Ok(Self { problem, xs, hidden, out: Output::new(out), task_rows })
    }

    /// The tasks of both phases.
    pub(crate) fn schedule(&self) -> Schedule {
        let Problem { gate, down, .. } = self.problem;
        Schedule::new([gate.weight.rows.div_ceil(self.task_rows[0]), down.weight.rows.div_ceil(self.task_rows[1])])
    }

    /// Does tasks until none is left, `R` rows at a time where tokens are many.
    ///
    /// # Safety
    /// The processor has `K`'s instructions, this is inlined into a function compiled for them, every weight's
    /// columns are adjacent, and `schedule` is this call's.
    #[inline(always)]
    pub(crate) unsafe fn work<const R: usize>(&self, schedule: &Schedule) {
        let Problem { gate, up, down, activation, .. } = self.problem;
        let mut sums = [[Sum::<K>::ZERO; MAX_TOKENS]; CHUNK];
        let mut up_sums = [[Sum::<K>::ZERO; MAX_TOKENS]; CHUNK];
        while let Some(ticket) = schedule.draw() {
            let projection = if ticket.phase == 0 { gate } else { down };
            let first = ticket.task * self.task_rows[ticket.phase];
            let end = projection.weight.rows.min(first + self.task_rows[ticket.phase]);
            for row in (first..end).step_by(CHUNK) {
                let rows = row..end.min(row + CHUNK);
                if ticket.phase == 0 {
                    project::<K, R>(gate, &rows, &self.xs, &mut sums);
                    activation.apply(sums[..rows.len()].as_flattened_mut());
                    if let Some(up) = up {
                        project::<K, R>(up, &rows, &self.xs, &mut up_sums);
                        for (hidden, up) in sums.as_flattened_mut().iter_mut().zip(up_sums.as_flattened()) {
                            *hidden = *hidden * *up;
                        }
                    }
                } else {
                    project::<K, R>(down, &rows, &self.hidden, &mut sums);
                }
                for (row, sums) in rows.zip(&sums) {
                    for (token, sum) in sums.iter().enumerate().take(self.xs.tokens) {
                        let value = K::Element::round(*sum);
                        // The rows from `first` to `end` are this task's alone.
                        if ticket.phase == 0 {
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

/// The rows of a projection, `CHUNK` at most, of every token, bias included.
#[inline(always)]
unsafe fn project<K: Kernel, const R: usize>(
    projection: &Projection<Matrix<K::Element>>,
    rows: &Range<usize>,
    xs: &Rows<K>,
    sums: &mut [[Sum<K>; MAX_TOKENS]; CHUNK],
) {
    let weight = &projection.weight;
    macro_rules! of_tokens {
        ($($tokens:literal: $r:expr, $u:literal;)*) => {
            match xs.tokens {
                $($tokens => groups::<K, { $r }, $tokens, $u>(weight, rows, xs, sums),)*
                _ => groups::<K, R, MAX_TOKENS, 1>(weight, rows, xs, sums),
            }
        };
    }
    // Few tokens: one row, and sums that are added to in turn to hide the latency of an addition.
    of_tokens!(1: 1, 4; 2: 1, 2; 3: 1, 2; 4: 1, 2; 5: R, 1; 6: R, 1; 7: R, 1;);
    if let Some(bias) = &projection.bias {
        for (row, sums) in rows.clone().zip(sums) {
            let bias = bias.get(0, row).widen();
            for sum in sums {
                *sum = *sum + bias;
            }
        }
    }
}

/// Goes through the rows in groups of `R` for each block of columns, for `N` tokens.
/// Where there are fewer rows than a group's, it repeats the last one.
#[inline(always)]
unsafe fn groups<K: Kernel, const R: usize, const N: usize, const U: usize>(
    weight: &Matrix<K::Element>,
    rows: &Range<usize>,
    xs: &Rows<K>,
    sums: &mut [[Sum<K>; MAX_TOKENS]; CHUNK],
) {
    let step = K::LANES * K::DEPTH;
    let block = if N == 1 { weight.cols.max(1) } else { BLOCK_BYTES / (N * size_of::<K::Operand>()) * K::DEPTH };
    let block = block.next_multiple_of(step * U);
    let groups = rows.len().div_ceil(R);
    let blocks = weight.cols.div_ceil(block).max(1);
    let at = |group: usize, r: usize, block_start: usize| {
        let row = rows.start + (group * R + r).min(rows.len() - 1);
        weight.as_ptr().wrapping_add(row * weight.row_stride + block_start)
    };
    let mut partial = [[[K::zero(); N]; R]; CHUNK];
    for b in 0..blocks {
        let start = b * block;
        let len = block.min(weight.cols - start);
        let x = xs.buffer.as_mut_ptr().add(start / K::DEPTH).cast_const();
        for group in 0..groups {
            // What is read some groups later, or else the rows after these.
            let later = group + GROUPS_AHEAD;
            let ahead = match () {
                _ if N == 1 => at(group, 0, AHEAD / size_of::<K::Element>()),
                _ if later < groups => at(later, 0, start),
                _ if b + 1 < blocks => at(later - groups, 0, start + block),
                _ => weight.as_ptr().wrapping_add((rows.end + later - groups) * weight.row_stride),
            };
            let mut w = [std::ptr::null(); R];
            for r in 0..R {
                w[r] = at(group, r, start);
            }
            let group_sums = &mut partial[group];
            if b == 0 {
                *group_sums = [[K::zero(); N]; R];
            }
            dots::<K, R, N, U>(w, (ahead, weight.row_stride), len, (x, xs.stride), group_sums);
            if b + 1 == blocks {
                for r in 0..R.min(rows.len() - group * R) {
                    for t in 0..N {
                        sums[group * R + r][t] = K::total(group_sums[r][t]);
                    }
                }
            }
        }
    }
}

/// Adds the products of `R` rows' next `len` elements with `N` tokens', over `U` vectors of sums in turn. Prefetches
/// `R` rows from `ahead` on, which it is given with their stride.
#[inline(always)]
unsafe fn dots<K: Kernel, const R: usize, const N: usize, const U: usize>(
    w: [*const K::Element; R],
    (ahead, row_stride): (*const K::Element, usize),
    len: usize,
    (x, stride): (*const K::Operand, usize),
    out: &mut [[K::Sums; N]; R],
) {
    let step = K::LANES * K::DEPTH;
    let line = 64 / size_of::<K::Element>();
    let zero = K::splat(&K::Operand::default());
    let mut sums = [[[K::zero(); U]; N]; R];
    for r in 0..R {
        for t in 0..N {
            sums[r][t][0] = out[r][t];
        }
    }
    let whole = len / (step * U) * U;
    for i in (0..whole).step_by(U) {
        for u in 0..U {
            let at = (i + u) * step;
            let mut v = [zero; R];
            for r in 0..R {
                if at % line == 0 {
                    K::prefetch(ahead.wrapping_add(r * row_stride + at));
                }
                v[r] = K::elements(w[r].add(at));
            }
            for t in 0..N {
                let x = K::load(x.add(t * stride + (i + u) * K::LANES));
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
                sums[r][t][0] = K::multiply_add(sums[r][t][0], v, K::load(x.add(t * stride + i * K::LANES)));
            }
        }
    }
    for r in 0..R {
        for t in 0..N {
            for u in 1..U {
                sums[r][t][0] = K::add(sums[r][t][0], sums[r][t][u]);
            }
            out[r][t] = sums[r][t][0];
        }
    }
}
