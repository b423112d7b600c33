//! Times of several paths, by turns in one process.

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

/// The median time of each path in seconds: after one round to warm up, rounds in which each path runs once in turn,
/// so that a change of the machine's speed meets all of them.
///
/// # Errors
/// Those of the paths.
pub fn alternate<const N: usize>(rounds: Rounds, paths: [&dyn Fn() -> Result<()>; N]) -> Result<[f64; N]> {
    for path in &paths {
        path()?;
    }
    let start = Instant::now();
    let mut samples = [const { Vec::new() }; N];
    while rounds.goes_on(samples[0].len(), start.elapsed()) {
        for (path, samples) in paths.iter().zip(&mut samples) {
            let start = Instant::now();
            path()?;
            samples.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(samples.map(|mut samples| {
        samples.sort_by(f64::total_cmp);
        let middle = samples.len() / 2;
        if samples.len() % 2 == 1 {
            samples[middle]
        } else {
            (samples[middle - 1] + samples[middle]) / 2.
        }
    }))
}
