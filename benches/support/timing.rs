//! Times of several paths, by turns in one process.

use super::machine::Memory;
use candle_core::Result;
use std::time::{Duration, Instant};

/// How many rounds to time.
#[derive(Debug, Clone, Copy)]
pub enum Rounds {
    /// Just so many.
    Exactly(usize),
    /// As many as take about this long, at least 3 and at most 200.
    For(Duration),
}

impl Rounds {
    fn goes_on(self, done: usize, elapsed: Duration) -> bool {
        match self {
            Self::Exactly(rounds) => done < rounds,
            Self::For(duration) => done < 3 || (done < 200 && elapsed < duration),
        }
    }
}

/// The times of some paths in seconds, a round an array.
pub struct Samples<const N: usize>(Vec<[f64; N]>);

impl<const N: usize> Samples<N> {
    /// The median over all rounds of what `f` makes of one.
    pub fn median(&self, f: impl Fn(&[f64; N]) -> f64) -> f64 {
        let mut values: Vec<f64> = self.0.iter().map(f).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        if values.len() % 2 == 1 {
            values[middle]
        } else {
            (values[middle - 1] + values[middle]) / 2.
        }
    }
}

/// Times paths by turns: after one round to warm up, rounds in which each path runs once, so that a change of the
/// machine's speed meets all of them.
///
/// # Errors
/// Those of the paths.
pub fn alternate<const N: usize>(rounds: Rounds, paths: [&dyn Fn() -> Result<()>; N]) -> Result<Samples<N>> {
    for path in &paths {
        path()?;
    }
    let start = Instant::now();
    let mut samples = Vec::new();
    while rounds.goes_on(samples.len(), start.elapsed()) {
        let mut round = [0.; N];
        for (path, time) in paths.iter().zip(&mut round) {
            let start = Instant::now();
            path()?;
            *time = start.elapsed().as_secs_f64();
        }
        samples.push(round);
    }
    Ok(Samples(samples))
}

/// A fused path beside the unfused one and beside reading memory.
pub struct Comparison {
    /// Median times of one layer, in seconds.
    pub unfused: f64,
    pub fused: f64,
    /// The bytes that the fused path reads over its time, and those that the machine reads, in bytes a second.
    pub bandwidth: f64,
    pub machine: f64,
    /// The one over the other: the median of each round's, since the speed of a machine's memory changes with what
    /// else it is used for.
    pub share: f64,
}

/// Compares walks through a stack of `layers`, in each of which the fused path reads `bytes`. Each round reads memory
/// before and after the fused path. On a GPU the paths wait for it before they return.
///
/// # Errors
/// Those of the paths.
pub fn compare(
    rounds: Rounds,
    reader: &dyn Memory,
    (layers, bytes): (usize, u64),
    unfused: &dyn Fn() -> Result<()>,
    fused: &dyn Fn() -> Result<()>,
) -> Result<Comparison> {
    let read = || reader.pass();
    let samples = alternate(rounds, [unfused, &read, fused, &read])?;
    let layers = layers as f64;
    let bytes = layers * bytes as f64;
    let bandwidth = |[_, _, fused, _]: &[f64; 4]| bytes / fused;
    let machine = |[_, before, _, after]: &[f64; 4]| 2. * reader.bytes() as f64 / (before + after);
    Ok(Comparison {
        unfused: samples.median(|[unfused, ..]| unfused / layers),
        fused: samples.median(|[_, _, fused, _]| fused / layers),
        bandwidth: samples.median(bandwidth),
        machine: samples.median(machine),
        share: samples.median(|round| bandwidth(round) / machine(round)),
    })
}
