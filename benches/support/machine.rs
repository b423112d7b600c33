//! The machine: its processor or a GPU of it, the largest cache, and the speed at which it reads memory.

#[cfg(feature = "cuda")]
use super::gpu;
use super::memory;
use candle_core::utils::get_num_threads;
use candle_core::{Device, Result};
use std::fs;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The last-level cache in bytes, as Linux describes it; 32 MiB where it does not.
pub fn last_level_cache() -> usize {
    let caches = (0..8).filter_map(|index| {
        let text = fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/size")).ok()?;
        let text = text.trim();
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let shift = match unit {
            "K" => 10,
            "M" => 20,
            "G" => 30,
            _ => 0,
        };
        Some(number.parse::<usize>().ok()? << shift)
    });
    caches.max().unwrap_or(32 << 20)
}

/// How many layers of this many bytes exceed four times the last-level cache.
pub fn layers_beyond_cache(layer_bytes: usize) -> usize {
    layers_beyond(last_level_cache(), layer_bytes)
}

fn layers_beyond(cache: usize, layer_bytes: usize) -> usize {
    4 * cache / layer_bytes.max(1) + 1
}

/// The processor's name, as Linux gives it; the architecture where it does not.
pub fn processor() -> String {
    let description = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = description.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_string()
}

/// Memory whose reading is timed.
pub trait Memory {
    /// The bytes of one [`pass`](Self::pass).
    fn bytes(&self) -> usize;

    /// Reads every byte once, as fast as the machine can.
    ///
    /// # Errors
    /// A GPU's.
    fn pass(&self) -> Result<()>;
}

/// The processor or the GPU that a program measures on.
pub struct Machine {
    /// What it is.
    pub description: String,
    /// Its largest cache, in bytes.
    cache: usize,
    pub reader: Box<dyn Memory>,
    #[cfg(feature = "cuda")]
    pool: Option<gpu::Pool>,
}

impl Machine {
    /// What this device is a part of.
    ///
    /// # Errors
    /// A GPU's.
    pub fn of(device: &Device) -> Result<Self> {
        let (description, cache) = describe(device)?;
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let (reader, pool) = (Box::new(gpu::Reader::new(device)?), Some(gpu::Pool::of(device)?));
            return Ok(Self { description, cache, reader, pool });
        }
        Ok(Self {
            description,
            cache,
            reader: Box::new(Reader::new()),
            #[cfg(feature = "cuda")]
            pool: None,
        })
    }

    /// How many layers of this many bytes exceed four times the largest cache.
    pub fn layers_beyond_cache(&self, layer_bytes: usize) -> usize {
        layers_beyond(self.cache, layer_bytes)
    }

    /// What `f` returns, and the most memory that the device held during it beyond what it held before: the heap, or a GPU's.
    ///
    /// # Errors
    /// A GPU's.
    pub fn peak<R>(&self, f: impl FnOnce() -> R) -> Result<(R, usize)> {
        #[cfg(feature = "cuda")]
        if let Some(pool) = &self.pool {
            return pool.peak(f);
        }
        Ok(memory::peak(f))
    }
}

/// What a device is, and its largest cache in bytes.
///
/// # Errors
/// A GPU's.
pub fn describe(device: &Device) -> Result<(String, usize)> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return gpu::description(device);
    }
    debug_assert!(device.is_cpu());
    let (cache, threads) = (last_level_cache(), get_num_threads());
    let megabytes = cache as f64 / f64::from(1 << 20);
    Ok((format!("{}, {threads} threads, {megabytes:.0} MiB of last-level cache", processor()), cache))
}

/// Reads memory with all of candle's threads, as fast as the machine can.
pub struct Reader(Vec<u64>);

impl Reader {
    /// A reader of eight times the last-level cache.
    pub fn new() -> Self {
        Self((0..8 * last_level_cache() as u64 / 8).collect())
    }
}

impl Memory for Reader {
    fn bytes(&self) -> usize {
        size_of_val(self.0.as_slice())
    }

    /// On the threads that the ops run on (and one more, as they ask for one); parts are handed out as threads ask for
    /// them.
    fn pass(&self) -> Result<()> {
        let next = AtomicUsize::new(0);
        let read = || {
            while let Some(part) = self.0.chunks(PART).nth(next.fetch_add(1, Relaxed)) {
                black_box(sum(part));
            }
        };
        rayon::in_place_scope(|scope| {
            for _ in 0..get_num_threads() {
                scope.spawn(|_| read());
            }
            read();
        });
        Ok(())
    }
}

/// Elements that a thread reads at a time.
const PART: usize = 1 << 15;
/// Elements in a cache line.
const LINE: usize = 8;

/// The sum of all values, in four lines of independent sums, with each line asked for 4 KiB ahead.
///
/// On an AVX-512 machine this read as fast as explicit 512-bit loads, and as two, four or eight streams side by side:
/// the differences were below those from one pass to the next. Without the prefetch it was 2 to 16% slower.
fn sum(values: &[u64]) -> u64 {
    let mut sums = [[0u64; LINE]; 4];
    for lines in values.chunks_exact(4 * LINE) {
        for (sums, line) in sums.iter_mut().zip(lines.chunks_exact(LINE)) {
            prefetch(line.as_ptr().wrapping_add(512));
            for (sum, value) in sums.iter_mut().zip(line) {
                *sum = sum.wrapping_add(*value);
            }
        }
    }
    sums.iter().flatten().fold(0, |total, sum| total.wrapping_add(*sum))
}

#[inline(always)]
fn prefetch(at: *const u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint: it reads nothing that the program could see, and faults on no address.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
