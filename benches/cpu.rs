//! The fused ops beside candle's unfused path on the CPU, in one process.
//!
//! ```text
//! cargo bench --bench cpu                              # everything, several minutes
//! cargo bench --bench cpu -- swiglu-2048x5632/bf16     # what matches
//! ```
//!
//! Criterion reports each path by itself. The table at the end, which is what PERFORMANCE.md records, has the medians
//! of both paths and of reading memory, taken by turns: ratios of one process at one time. Weights come from memory
//! (see `support`). The bandwidth is the bytes that the fused path reads (see `Plan`) over its time.

#[path = "support/mod.rs"]
mod support;

use candle_core::{DType, Result, Tensor};
use candle_fused_mlp::{ops, reference, Activation, GateUp, Plan};
use candle_nn::Linear;
use criterion::{Criterion, SamplingMode};
use std::cell::{Cell, OnceCell};
use std::hint::black_box;
use std::time::{Duration, Instant};
use support::machine::{last_level_cache, layers_beyond_cache, processor, Reader};
use support::random::Random;
use support::table;
use support::timing::{compare, Rounds};

/// The MLPs: whether gated, hidden and intermediate size. The plain ones have biases and erf GELU.
const SHAPES: [(bool, usize, usize); 5] =
    [(true, 576, 1536), (true, 2048, 5632), (true, 4096, 14336), (false, 768, 3072), (false, 4096, 4096)];
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const TOKENS: [usize; 4] = [1, 8, 64, 512];

/// One layer's parameters.
enum Mlp {
    Gated { gate_up: GateUp, down: Linear },
    Plain { fc1: Linear, fc2: Linear },
}

impl Mlp {
    fn random(
        random: &mut Random,
        (gated, hidden_size, intermediate_size): (bool, usize, usize),
        dtype: DType,
    ) -> Result<Self> {
        let mut linear = |rows, cols| -> Result<Linear> {
            let bias = if gated { None } else { Some(random.normal(&[rows], 0.1, dtype)?) };
            Ok(Linear::new(random.weight((rows, cols), dtype)?, bias))
        };
        let first = linear(intermediate_size, hidden_size)?;
        Ok(if gated {
            let up = linear(intermediate_size, hidden_size)?;
            let down = linear(hidden_size, intermediate_size)?;
            Self::Gated { gate_up: GateUp::Separate { gate: first, up }, down }
        } else {
            Self::Plain { fc1: first, fc2: linear(hidden_size, intermediate_size)? }
        })
    }

    fn fused(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gated { gate_up, down } => ops::fused_swiglu(xs, gate_up, down, Activation::Silu),
            Self::Plain { fc1, fc2 } => ops::fused_mlp(xs, fc1, fc2, Activation::Gelu),
        }
    }

    fn unfused(&self, xs: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gated { gate_up, down } => reference::swiglu(xs, gate_up, down, Activation::Silu),
            Self::Plain { fc1, fc2 } => reference::mlp(xs, fc1, fc2, Activation::Gelu),
        }
    }

    fn plan(&self, xs: &Tensor) -> Result<Plan> {
        match self {
            Self::Gated { gate_up, down } => Plan::of_swiglu(xs, gate_up, down, Activation::Silu),
            Self::Plain { fc1, fc2 } => Plan::of_mlp(xs, fc1, fc2, Activation::Gelu),
        }
    }
}

type Forward = fn(&Mlp, &Tensor) -> Result<Tensor>;

/// The layers of a stack, and input for it.
struct Stack {
    layers: Vec<Mlp>,
    xs: Tensor,
}

impl Stack {
    fn random(shape: (bool, usize, usize), dtype: DType) -> Result<Self> {
        let (gated, hidden_size, intermediate_size) = shape;
        let matrices = if gated { 3 } else { 2 };
        let bytes = matrices * hidden_size * intermediate_size * dtype.size_in_bytes();
        let mut random = Random::new(1);
        let layers =
            (0..layers_beyond_cache(bytes)).map(|_| Mlp::random(&mut random, shape, dtype)).collect::<Result<_>>()?;
        let most = TOKENS.into_iter().max().unwrap_or(1);
        Ok(Self { layers, xs: random.normal(&[most, hidden_size], 1., dtype)? })
    }

    /// The first `tokens` of the input.
    fn xs(&self, tokens: usize) -> Result<Tensor> {
        self.xs.narrow(0, 0, tokens)?.copy()
    }

    /// A forward pass of every layer.
    fn walk(&self, forward: Forward, xs: &Tensor) -> Result<()> {
        for layer in &self.layers {
            black_box(forward(layer, xs)?);
        }
        Ok(())
    }

    /// The time of `iterations` forward passes, on one layer after the other.
    fn time(&self, forward: Forward, xs: &Tensor, iterations: u64) -> Duration {
        let start = Instant::now();
        for layer in self.layers.iter().cycle().take(iterations as usize) {
            black_box(forward(layer, xs).expect("a forward pass"));
        }
        start.elapsed()
    }
}

/// Both paths and the machine by turns: a row of the table.
fn row(name: &str, stack: &Stack, tokens: usize, reader: &Reader) -> Result<Vec<String>> {
    let xs = stack.xs(tokens)?;
    let plan = stack.layers[0].plan(&xs)?;
    let rounds = Rounds::For(Duration::from_secs(1));
    let walked = (stack.layers.len(), plan.fused.bytes_read);
    let unfused = || stack.walk(Mlp::unfused, &xs);
    let found = compare(rounds, reader, walked, &unfused, &|| stack.walk(Mlp::fused, &xs))?;
    Ok(vec![
        name.to_string(),
        plan.workload.dtype.as_str().to_string(),
        plan.kernel,
        tokens.to_string(),
        format!("{:.0}", 1e6 * found.unfused),
        format!("{:.0}", 1e6 * found.fused),
        format!("{:.2}", found.unfused / found.fused),
        format!("{:.1}", found.bandwidth / 1e9),
        format!("{:.1}", found.machine / 1e9),
        format!("{:.0}%", 100. * found.share),
    ])
}

fn main() -> Result<()> {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    // `--list` and `--test` ask for no times.
    let arguments: Vec<String> = std::env::args().collect();
    let measures = |argument: &str| arguments.iter().any(|a| a == argument);
    let measures = measures("--bench") && !measures("--list") && !measures("--test");
    let reader = OnceCell::new();
    let mut rows = Vec::new();
    for shape in SHAPES {
        let (gated, hidden_size, intermediate_size) = shape;
        let op = if gated { "swiglu" } else { "mlp" };
        for dtype in DTYPES {
            let stack = OnceCell::new();
            let stack = || stack.get_or_init(|| Stack::random(shape, dtype).expect("memory for a stack of layers"));
            for tokens in TOKENS {
                let mut group = criterion.benchmark_group(format!(
                    "{op}-{hidden_size}x{intermediate_size}/{}/tokens-{tokens}",
                    dtype.as_str()
                ));
                group.sampling_mode(SamplingMode::Flat);
                // Criterion knows which names the filter lets through; it calls the others' closures not at all.
                let called = Cell::new(false);
                for (path, forward) in [("fused", Mlp::fused as Forward), ("candle", Mlp::unfused)] {
                    group.bench_function(path, |bencher| {
                        called.set(true);
                        let xs = stack().xs(tokens).expect("input");
                        bencher.iter_custom(|iterations| stack().time(forward, &xs, iterations));
                    });
                }
                group.finish();
                if called.get() && measures {
                    let name = format!("{op} {hidden_size}x{intermediate_size}");
                    rows.push(row(&name, stack(), tokens, reader.get_or_init(Reader::new))?);
                }
            }
        }
    }
    criterion.final_summary();
    let cache = last_level_cache() as f64 / f64::from(1 << 20);
    let threads = candle_core::utils::get_num_threads();
    println!("\n{}, {threads} threads, last-level cache {cache:.0} MiB", processor());
    if !rows.is_empty() {
        let header = [
            "MLP",
            "dtype",
            "kernel",
            "tokens",
            "candle, us",
            "fused, us",
            "ratio",
            "fused, GB/s",
            "memory, GB/s",
            "share",
        ];
        println!("\n{}", table::markdown(3, &header, &rows));
    }
    Ok(())
}
