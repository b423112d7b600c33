//! Scratch memory that the tasks of one run share.
//!
//! What a call has used is kept for the next one, up to [`KEPT_BYTES`] in the process: fresh pages cost more than the
//! products of a small model's call.

use candle_core::{bail, Result};
use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A cache line.
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; LINE]); // memory only: read and written through pointers of other types

const LINE: usize = 64;

/// Uninitialised memory, aligned to a cache line. Tasks write and read disjoint parts of it, or are kept apart by the
/// phases of a schedule.
pub(crate) struct Buffer<T> {
    lines: Vec<Line>,
    start: *mut T,
    values: PhantomData<T>,
}

// SAFETY: a buffer gives out raw pointers only; those who use them keep the accesses apart.
unsafe impl<T: Send> Sync for Buffer<T> {}

/// The most bytes that are kept for later calls.
const KEPT_BYTES: usize = 32 << 20;

/// Memory for later calls, what was used last at the end.
static KEPT: Mutex<Vec<Vec<Line>>> = Mutex::new(Vec::new());

fn kept() -> MutexGuard<'static, Vec<Vec<Line>>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kept memory of at least this many lines, and not of many more.
fn reuse(lines: usize) -> Option<Vec<Line>> {
    let mut kept = kept();
    let fits = |memory: &Vec<Line>| (lines..=2 * lines).contains(&memory.capacity());
    let found = (0..kept.len()).filter(|&i| fits(&kept[i])).min_by_key(|&i| kept[i].capacity())?;
    Some(kept.remove(found))
}

impl<T: Copy> Buffer<T> {
    /// Room for the product of `dims` values.
    ///
    /// # Errors
    /// More bytes than there are.
    pub(crate) fn new<const N: usize>(dims: [usize; N]) -> Result<Self> {
        let bytes = dims.iter().try_fold(size_of::<T>(), |n, &d| n.checked_mul(d));
        let lines = bytes.map(|bytes| bytes.div_ceil(LINE).max(1)).filter(|&lines| lines <= isize::MAX as usize / LINE);
        let mut memory = lines.and_then(reuse).unwrap_or_default();
        match lines {
            Some(lines) if memory.try_reserve_exact(lines).is_ok() => {}
            _ => bail!("cpu: expected room for a buffer of {dims:?} values of {} bytes, found none", size_of::<T>()),
        }
        Ok(Self { start: memory.as_mut_ptr().cast(), lines: memory, values: PhantomData })
    }

    /// The first value.
    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        self.start
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        let mut kept = kept();
        kept.push(std::mem::take(&mut self.lines));
        let mut bytes: usize = kept.iter().map(|memory| memory.capacity() * LINE).sum();
        while bytes > KEPT_BYTES {
            bytes -= kept.remove(0).capacity() * LINE;
        }
    }
}

/// A slice that tasks write disjoint parts of.
pub(crate) struct Output<T> {
    start: *mut T,
}

// SAFETY: as for `Buffer`.
unsafe impl<T: Send> Sync for Output<T> {}

impl<T> Output<T> {
    /// Lends the slice out for as long as the borrow lasts.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr() }
    }

    /// The first value.
    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_kept_and_bounded() {
        let first = Buffer::<f32>::new([3, 7919]).unwrap();
        let start = first.as_mut_ptr();
        assert_eq!(start as usize % LINE, 0);
        drop(first);
        assert!(kept().iter().any(|memory| memory.as_ptr().cast() == start.cast_const()));
        drop(Buffer::<u8>::new([KEPT_BYTES + 1]).unwrap());
        assert!(kept().iter().map(|memory| memory.capacity() * LINE).sum::<usize>() <= KEPT_BYTES);
    }

    #[test]
    fn too_much_is_an_error() {
        for dims in [[usize::MAX, 2], [usize::MAX / 8, 1], [1 << 60, 1]] {
            let error = Buffer::<f64>::new(dims).err().unwrap().to_string();
            assert!(error.contains("expected room for a buffer"), "{error}");
        }
    }
}
