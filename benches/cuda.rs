//! One MLP of a model on a GPU, beside candle's own ops and the time that its weights need to be read.
//!
//!     cargo bench --features cuda --bench cuda -- [bf16|f16|f32|f64]... [TOKENS]... [all|KERNEL...] [graph|host|energy]
//!
//! Microseconds of one layer of a stack whose weights are four times the second-level cache, in an ordinary loop of candle
//! calls: random data, each layer reads what the one before gave, every fourth the first x again. The columns take
//! turns; a number is the median of five turns of some milliseconds. `all` or a kernel's name adds its own column. `graph` replays a
//! CUDA graph of the stack's calls instead, `host` times how long the host takes to enqueue a call (and, first, to allocate and
//! free an output, which is a part of it), and `energy` measures millijoules a layer: NVML's counter over two seconds of each.

#[path = "support/layers.rs"]
mod layers;
#[path = "support/mod.rs"]
mod support;

use candle_core::{DType, Device, Error, Result, Tensor};
use candle_fused_mlp::cuda::Kernel;
use layers::{median, time, Clock, Layer, Turns, Way};
use std::time::{Duration, Instant};
use support::gpu;

/// Name, gated, hidden size, intermediate size.
const MODELS: [(&str, bool, usize, usize); 9] = [
    ("swiglu 8192x28672", true, 8192, 28672),
    ("swiglu 4096x14336", true, 4096, 14336),
    ("swiglu 2048x8192", true, 2048, 8192),
    ("swiglu 2048x5632", true, 2048, 5632),
    ("swiglu 576x1536", true, 576, 1536),
    ("swiglu 64x172", true, 64, 172),
    ("mlp 4096x4096 GELU, biases", false, 4096, 4096),
    ("mlp 1280x5120 GELU, biases", false, 1280, 5120),
    ("mlp 768x3072 GELU, biases", false, 768, 3072),
];

const TURNS: Turns = Turns { count: 5, microseconds: 4000. };
const ENERGY_TIME: Duration = Duration::from_secs(2);

/// Millijoules of one layer, each way, of the first GPU that NVML knows.
fn energy(layers: &[Layer], first: &Tensor, ways: &[Way]) -> Result<Vec<Option<f64>>> {
    let nvml = nvml_wrapper::Nvml::init().map_err(Error::wrap)?;
    let gpu = nvml.device_by_index(0).map_err(Error::wrap)?;
    let mut each = Vec::new();
    for &way in ways {
        let mut xs = first.clone();
        first.device().synchronize()?;
        let (before, start) = (gpu.total_energy_consumption().map_err(Error::wrap)?, Instant::now());
        let mut done = 0usize;
        while start.elapsed() < ENERGY_TIME {
            for (i, layer) in layers.iter().enumerate() {
                xs = way.run(layer, if i % 4 == 0 { first } else { &xs })?;
            }
            first.device().synchronize()?;
            done += layers.len();
        }
        let after = gpu.total_energy_consumption().map_err(Error::wrap)?;
        each.push(Some((after - before) as f64 / done as f64));
    }
    Ok(each)
}

/// Microseconds of the host to allocate and free an output by candle, with its events.
fn allocation(device: &Device) -> Result<f64> {
    const CALLS: usize = 64;
    let cuda = device.as_cuda_device()?;
    let mut times = Vec::new();
    for _ in 0..TURNS.count * 3 {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            // SAFETY: nothing reads what is allocated.
            drop(unsafe { cuda.alloc::<f32>(4096) }?);
        }
        times.push(start.elapsed().as_secs_f64() * 1e6 / CALLS as f64);
    }
    Ok(median(times))
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let mut tokens: Vec<usize> = arguments.iter().filter_map(|a| a.parse().ok()).collect();
    if tokens.is_empty() {
        tokens = vec![1, 2, 4, 8, 16, 32, 64];
    }
    let known = [("bf16", DType::BF16), ("f16", DType::F16), ("f32", DType::F32), ("f64", DType::F64)];
    let mut dtypes: Vec<_> = known.into_iter().filter(|(name, _)| arguments.iter().any(|a| a == name)).collect();
    if dtypes.is_empty() {
        dtypes = known[..3].to_vec();
    }
    let asked = |name: &str| arguments.iter().any(|a| a == name);
    let clock = match (asked("graph"), asked("host")) {
        (true, _) => Clock::Replays,
        (false, true) => Clock::Host,
        (false, false) => Clock::Calls,
    };
    let mut ways = vec![Way::Candle, Way::Chosen];
    ways.extend(Kernel::ALL.into_iter().filter(|kernel| asked("all") || asked(kernel.name())).map(Way::Forced));
    let header = ways.iter().map(|way| match way {
        Way::Candle => "candle".to_string(),
        Way::Chosen => "fused".to_string(),
        Way::Forced(kernel) => kernel.to_string(),
    });
    let header = header.collect::<Vec<_>>().join(" | ");

    let device = &match clock {
        Clock::Replays => Device::new_cuda_with_stream(0)?,
        Clock::Calls | Clock::Host => Device::new_cuda(0)?,
    };
    if clock == Clock::Replays {
        // SAFETY: there is one stream, on which all that is launched or freed comes in order.
        unsafe { device.as_cuda_device()?.disable_event_tracking() };
    }
    let bandwidth = gpu::Reader::new(device)?.bandwidth;
    println!("read bandwidth: {:.3} TB/s\n", bandwidth * 1e-12);
    if clock == Clock::Host {
        println!("allocating and freeing an output: {:.2} us\n", allocation(device)?);
    }
    println!("| MLP | dtype | tokens | floor | {header} | candle / fused |");
    println!("|---|---|---|---|{}---|", "---|".repeat(ways.len()));
    for (name, dtype) in dtypes {
        for (model, gated, hidden, intermediate) in MODELS {
            let sizes = (hidden, intermediate);
            let floor = Layer::weight_bytes(gated, sizes, dtype) as f64 / bandwidth * 1e6;
            let layers = Layer::stack(gated, sizes, dtype, device)?;
            for &tokens in &tokens {
                let first = Tensor::randn(0f32, 1., (tokens, hidden), device)?.to_dtype(dtype)?;
                let times = match asked("energy") {
                    true => energy(&layers, &first, &ways)?,
                    false => time(&layers, &first, &ways, TURNS, clock)?,
                };
                let cells: Vec<String> =
                    times.iter().map(|t| t.map_or("-".to_string(), |t| format!("{t:.2}"))).collect();
                let gain = times[0].zip(times[1]).map_or("-".to_string(), |(c, f)| format!("{:.2}", c / f));
                println!("| {model} | {name} | {tokens} | {floor:.1} | {} | {gain} |", cells.join(" | "));
            }
        }
    }
    Ok(())
}
