//! Few tokens: dot products of the weights' rows, read once and in place, with every token.
//!
//! At these sizes the time is that of reading the weights. Two phases: rows of the gate and up projections give the
//! hidden layer, rows of the down projection the output. A row is multiplied with a few tokens at a time while it is
//! in cache.

use super::buffer::{Buffer, Output};
use super::kernel::{Kernel, Sum};
use super::schedule::Schedule;
use super::{Element, Problem, Real};
use crate::parameters::{Matrix, Projection};
use candle_core::Result;

/// The most tokens that this kernel takes.
pub(crate) const MAX_TOKENS: usize = 8;

/// Rows of a projection in one task: their weights are about this many bytes, so that drawing a ticket costs nothing
/// beside them, and the wait for the last task of a phase little beside the phase.
const TASK_BYTES: usize = 128 << 10;

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
}

impl<K: Kernel> Rows<K> {
    /// Rows of `len` elements, their padding zero and the rest to be written.
    fn new(tokens: usize, len: usize) -> Result<Self> {
        let stride = len.div_ceil(K::DEPTH).next_multiple_of(K::LANES);
        let buffer = Buffer::<K::Operand>::new([tokens, stride])?;
        for token in 0..tokens {
            for i in (len / K::DEPTH)..stride {
                // SAFETY: within the row that was just reserved.
                unsafe { *buffer.as_mut_ptr().add(token * stride + i) = K::Operand::default() };
            }
        }
        Ok(Self { buffer, stride })
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
    pub(crate) fn new(problem: &'a Problem<'a, K::Element>, out: &'a mut [K::Element]) -> Result<Self> {
        let Problem { xs: input, gate, down, .. } = problem;
        let xs = Rows::new(input.rows, input.cols)?;
        for token in 0..input.rows {
            for i in 0..input.cols {
                // SAFETY: in range, and nothing else has the buffer yet.
                unsafe { xs.set(token, i, input.get(token, i)) };
            }
        }
        let hidden = Rows::new(input.rows, gate.weight.rows)?;
        let task_rows = |m: &Matrix<K::Element>, matrices: usize| {
            (TASK_BYTES / (m.cols * matrices * size_of::<K::Element>()).max(1)).max(1).next_multiple_of(4)
        };
        let task_rows = [task_rows(&gate.weight, 1 + problem.up.iter().len()), task_rows(&down.weight, 1)];
        Ok(Self { problem, xs, hidden, out: Output::new(out), task_rows })
    }

    /// The tasks of both phases.
    pub(crate) fn schedule(&self) -> Schedule {
        let Problem { gate, down, .. } = self.problem;
        Schedule::new([gate.weight.rows.div_ceil(self.task_rows[0]), down.weight.rows.div_ceil(self.task_rows[1])])
    }

    /// Does tasks of `R` rows and up to `T` tokens at a time until none is left.
    ///
    /// # Safety
    /// The processor has `K`'s instructions, this is inlined into a function compiled for them, every weight's
    /// columns are adjacent, and `schedule` is this call's.
    #[inline(always)]
    pub(crate) unsafe fn work<const R: usize, const T: usize>(&self, schedule: &Schedule) {
        while let Some(ticket) = schedule.draw() {
            let task_rows = self.task_rows[ticket.phase];
            let first = ticket.task * task_rows;
            let rows = if ticket.phase == 0 { self.problem.gate.weight.rows } else { self.problem.down.weight.rows };
            let end = rows.min(first + task_rows);
            for row in (first..end).step_by(R) {
                // Rows from `row` on, `R` at most, are this task's alone.
                if ticket.phase == 0 {
                    self.hidden_rows::<R, T>(row, end.min(row + R));
                } else {
                    self.out_rows::<R, T>(row, end.min(row + R));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn hidden_rows<const R: usize, const T: usize>(&self, row: usize, end: usize) {
        let Problem { xs, gate, up, activation, .. } = self.problem;
        for token in (0..xs.rows).step_by(T) {
            let tokens = T.min(xs.rows - token);
            let mut hidden = project::<K, R, T>(gate, row, end, &self.xs, token, tokens);
            activation.apply(hidden.as_flattened_mut());
            if let Some(up) = up {
                let up = project::<K, R, T>(up, row, end, &self.xs, token, tokens);
                for (hidden, up) in hidden.as_flattened_mut().iter_mut().zip(up.as_flattened()) {
                    *hidden = *hidden * *up;
                }
            }
            for r in 0..end - row {
                for t in 0..tokens {
                    self.hidden.set(token + t, row + r, K::Element::round(hidden[r][t]));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn out_rows<const R: usize, const T: usize>(&self, row: usize, end: usize) {
        let Problem { xs, down, .. } = self.problem;
        for token in (0..xs.rows).step_by(T) {
            let tokens = T.min(xs.rows - token);
            let out = project::<K, R, T>(down, row, end, &self.hidden, token, tokens);
            for r in 0..end - row {
                for t in 0..tokens {
                    *self.out.as_mut_ptr().add((token + t) * down.weight.rows + row + r) = K::Element::round(out[r][t]);
                }
            }
        }
    }
}

/// Rows `row..end` of a projection, at most `R`, of the tokens `token..token + tokens`, at most `T`.
#[inline(always)]
unsafe fn project<K: Kernel, const R: usize, const T: usize>(
    projection: &Projection<Matrix<K::Element>>,
    row: usize,
    end: usize,
    xs: &Rows<K>,
    token: usize,
    tokens: usize,
) -> [[Sum<K>; T]; R] {
    let Matrix { cols, row_stride, .. } = projection.weight;
    let first = projection.weight.as_ptr();
    // Where fewer rows are left, the last one is read again and not used.
    let weights: [*const K::Element; R] =
        std::array::from_fn(|r| first.wrapping_add((row + r).min(end - 1) * row_stride));
    let x = xs.buffer.as_mut_ptr().add(token * xs.stride).cast_const();
    let mut sums = [[Sum::<K>::ZERO; T]; R];
    macro_rules! of_tokens {
        ($($n:literal)*) => {
            match tokens {
                $($n if $n <= T => dots::<K, R, T, $n>(weights, cols, x, xs.stride, &mut sums),)*
                _ => {}
            }
        };
    }
    of_tokens!(1 2 3 4 5 6 7 8);
    if let Some(bias) = &projection.bias {
        for (r, sums) in sums.iter_mut().enumerate().take(end - row) {
            let bias = bias.get(0, row + r).widen();
            for sum in sums {
                *sum = *sum + bias;
            }
        }
    }
    sums
}

/// The dot products of `R` rows with `N` tokens. Each has one vector of sums, so that a product's bits do not depend
/// on which rows and tokens it is computed with.
#[inline(always)]
unsafe fn dots<K: Kernel, const R: usize, const T: usize, const N: usize>(
    weights: [*const K::Element; R],
    len: usize,
    xs: *const K::Operand,
    stride: usize,
    out: &mut [[Sum<K>; T]; R],
) {
    let step = K::LANES * K::DEPTH;
    let zero = K::splat(&K::Operand::default());
    let mut sums = [[K::zero(); N]; R];
    let whole = len / step;
    for i in 0..whole {
        let mut w = [zero; R];
        for r in 0..R {
            w[r] = K::elements(weights[r].add(i * step));
        }
        for t in 0..N {
            let x = K::load(xs.add(t * stride + i * K::LANES));
            for r in 0..R {
                sums[r][t] = K::multiply_add(sums[r][t], w[r], x);
            }
        }
    }
    if whole * step < len {
        let mut w = [zero; R];
        for r in 0..R {
            w[r] = K::elements_up_to(weights[r].add(whole * step), len - whole * step);
        }
        for t in 0..N {
            let x = K::load(xs.add(t * stride + whole * K::LANES));
            for r in 0..R {
                sums[r][t] = K::multiply_add(sums[r][t], w[r], x);
            }
        }
    }
    for r in 0..R {
        for t in 0..N {
            out[r][t] = K::total(sums[r][t]);
        }
    }
}
