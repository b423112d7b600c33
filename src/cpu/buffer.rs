//! Scratch memory that the tasks of one run share.

use candle_core::{bail, Result};

/// Uninitialised memory, aligned to a cache line. Tasks write and read disjoint parts of it, or are kept apart by the
/// phases of a schedule.
pub(crate) struct Buffer<T> {
    start: *mut T,
    _memory: Vec<T>,
}

const ALIGNMENT: usize = 64;

// SAFETY: a buffer gives out raw pointers only; those who use them keep the accesses apart.
unsafe impl<T: Send> Sync for Buffer<T> {}

impl<T: Copy> Buffer<T> {
    /// Room for the product of `dims` values.
    ///
    /// # Errors
    /// More bytes than there are.
    pub(crate) fn new<const N: usize>(dims: [usize; N]) -> Result<Self> {
        let padding = ALIGNMENT / size_of::<T>();
        let len = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).and_then(|n| n.checked_add(padding));
        let mut memory: Vec<T> = Vec::new();
        match len {
            Some(len) if memory.try_reserve_exact(len).is_ok() => {}
            _ => bail!("cpu: expected room for a buffer of {dims:?} values of {} bytes, found none", size_of::<T>()),
        }
        let start = memory.as_mut_ptr();
        let offset = start.align_offset(ALIGNMENT).min(padding);
        // SAFETY: the offset is at most the padding, which was reserved.
        Ok(Self { start: unsafe { start.add(offset) }, _memory: memory })
    }

    /// The first value.
    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        self.start
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
