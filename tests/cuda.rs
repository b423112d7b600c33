//! What only a GPU can get wrong: every kernel against f64, rows' independence, streams, threads.
#![cfg(feature = "cuda")]

mod common;

use candle_core::{DType, Device, DeviceLocation, Module, Result, Tensor, Var};
use candle_fused_mlp::cuda::Kernel;
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{plan, Activation, GateUp, PackedOrder, Workload};
use candle_nn::Linear;
use common::*;

const DECODE: [Kernel; 7] = [
    Kernel::DecodeCluster,
    Kernel::DecodeResident,
    Kernel::DecodeWide,
    Kernel::DecodeHopper,
    Kernel::DecodeDependent,
    Kernel::Decode,
    Kernel::DecodePortable,
];

/// The kernels that take this dtype and these sizes, where all is aligned.
fn kernels(dtype: DType, (hidden, intermediate): (usize, usize)) -> Vec<Kernel> {
    let half = matches!(dtype, DType::BF16 | DType::F16);
    let takes = |kernel: &Kernel| match kernel {
        Kernel::DecodeCluster => 3 * hidden * intermediate <= 1 << 17,
        Kernel::DecodeResident => half && hidden % 64 == 0 && intermediate % 256 == 0 && intermediate <= 3072,
        Kernel::DecodeWide => half && hidden % 64 == 0 && intermediate % 64 == 0,
        Kernel::DecodeHopper => {
            let chunk = 128 / dtype.size_in_bytes();
            dtype != DType::F64 && hidden % chunk == 0 && intermediate % chunk == 0
        }
        Kernel::GemmAmpere => half && hidden % 8 == 0 && intermediate % 8 == 0,
        Kernel::Gemm => {
            let pieces = 16 / dtype.size_in_bytes();
            dtype != DType::F64 && hidden % pieces == 0 && intermediate % pieces == 0
        }
        Kernel::DecodeDependent | Kernel::Decode => {
            let pieces = 16 / dtype.size_in_bytes();
            dtype != DType::F64 && hidden % pieces == 0 && intermediate % pieces == 0
        }
        _ => true,
    };
    Kernel::ALL.into_iter().filter(takes).collect()
}

/// The most tokens of a launch. The small models' kernel has room for so many hidden elements, and fewer beside wide rows.
fn most_tokens(kernel: Kernel, (hidden, intermediate): (usize, usize)) -> usize {
    match kernel {
        Kernel::DecodeResident if hidden < 1024 => (49152 / intermediate).min(32),
        Kernel::DecodeResident => (49152 / intermediate).min(16),
        _ => usize::MAX,
    }
}

/// The kernels for many tokens.
const GEMMS: [Kernel; 2] = [Kernel::Gemm, Kernel::GemmAmpere];

/// The activations that they have.
const GEMM: [Activation; 5] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Relu];

/// Each kernel, also those that another GPU would choose.
#[test]
fn every_kernel() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    for dtype in DTYPES {
        for (hidden, intermediate) in [(72, 200), (128, 192)] {
            for kernel in kernels(dtype, (hidden, intermediate)) {
                for (i, &activation) in Activation::ALL.iter().enumerate() {
                    let tokens = [1, 3, 8, 12, 20, 64, 100][i % 7].min(most_tokens(kernel, (hidden, intermediate)));
                    if GEMMS.contains(&kernel) && !GEMM.contains(&activation) {
                        continue;
                    }
                    let random = &mut Random::new(i as u64);
                    let xs = random.normal(&[tokens, hidden], 1., dtype, device)?;
                    let gate = random.linear((intermediate, hidden), i % 2 == 0, dtype, device)?;
                    let up = random.linear((intermediate, hidden), i % 3 == 0, dtype, device)?;
                    let down = random.linear((40, intermediate), i % 4 < 2, dtype, device)?;
                    let gate_up = GateUp::Separate { gate: gate.clone(), up };
                    let what = format!("{kernel} {activation} {tokens}");
                    let found = kernel.with(|| fused_mlp(&xs, &gate, &down, activation))?;
                    assert_near(&found, &exact_mlp(&xs, &gate, &down, activation)?, &what)?;
                    let found = kernel.with(|| fused_swiglu(&xs, &gate_up, &down, activation))?;
                    assert_near(&found, &exact_swiglu(&xs, &gate_up, &down, activation)?, &what)?;
                }
            }
        }
    }
    Ok(())
}

/// The kernel for few tokens of small models: sizes that fill some blocks or all, gate before up in memory and behind it,
/// and the same bits as the kernel for more tokens.
#[test]
fn small_models() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    let sizes = [(64, 256, 40), (576, 1536, 576), (768, 3072, 768), (1024, 2816, 1000), (384, 1536, 384)];
    for dtype in [DType::BF16, DType::F16] {
        for (i, (hidden, intermediate, out)) in sizes.into_iter().enumerate() {
            let random = &mut Random::new(70 + i as u64);
            let gate = random.linear((intermediate, hidden), i % 2 == 0, dtype, device)?;
            let up = random.linear((intermediate, hidden), i % 2 == 0, dtype, device)?;
            let down = random.linear((out, intermediate), i % 3 != 1, dtype, device)?;
            for (j, &activation) in Activation::ALL.iter().enumerate() {
                let tokens =
                    [1, 2, 5, 8, 9, 16, 17, 32][j % 8].min(most_tokens(Kernel::DecodeResident, (hidden, intermediate)));
                let xs = random.normal(&[tokens, hidden], 1., dtype, device)?;
                let what = format!("{hidden}x{intermediate} {activation} {tokens}");
                let gate_up = match j % 3 {
                    0 => GateUp::Separate { gate: gate.clone(), up: up.clone() },
                    1 => packed(&gate, &up, PackedOrder::UpGate)?,
                    _ => packed(&gate, &up, PackedOrder::GateUp)?,
                };
                let run = |kernel: Kernel| {
                    kernel.with(|| {
                        let plain = fused_mlp(&xs, &gate, &down, activation)?;
                        Ok((plain, fused_swiglu(&xs, &gate_up, &down, activation)?))
                    })
                };
                let (plain, gated) = run(Kernel::DecodeResident)?;
                assert_near(&plain, &exact_mlp(&xs, &gate, &down, activation)?, &what)?;
                assert_near(&gated, &exact_swiglu(&xs, &gate_up, &down, activation)?, &what)?;
                let (other_plain, other_gated) = run(Kernel::DecodeHopper)?;
                assert_eq!(values(&plain)?, values(&other_plain)?, "{what}");
                assert_eq!(values(&gated)?, values(&other_gated)?, "{what}, gated");
            }
        }
    }
    Ok(())
}

/// Every tile of the kernels for many tokens: sizes that end within a tile, with and without biases, packed and
/// separate weights, twice the same bits.
#[test]
fn many_tokens() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    let sizes =
        [(72, 200, 40), (576, 1536, 576), (264, 1000, 520), (768, 3072, 768), (1024, 2816, 1000), (128, 4160, 1024)];
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for (i, (hidden, intermediate, out)) in sizes.into_iter().enumerate() {
            let random = &mut Random::new(20 + i as u64);
            let gate = random.linear((intermediate, hidden), i % 2 == 0, dtype, device)?;
            let up = random.linear((intermediate, hidden), i % 2 == 0, dtype, device)?;
            let down = random.linear((out, intermediate), i % 3 != 1, dtype, device)?;
            for (j, tokens) in [1, 65, 100, 129, 200, 300, 512, 700, 1025].into_iter().enumerate() {
                let activation = GEMM[(i + j) % GEMM.len()];
                let xs = random.normal(&[tokens, hidden], 1., dtype, device)?;
                let what = format!("{hidden}x{intermediate} {activation} {tokens}");
                let gate_up = match j % 2 {
                    0 => GateUp::Separate { gate: gate.clone(), up: up.clone() },
                    _ => packed(&gate, &up, PackedOrder::UpGate)?,
                };
                let exact = exact_mlp(&xs, &gate, &down, activation)?;
                let exact_gated = exact_swiglu(&xs, &gate_up, &down, activation)?;
                for kernel in kernels(dtype, (hidden, intermediate)).into_iter().filter(|k| GEMMS.contains(k)) {
                    let what = format!("{kernel} {what}");
                    kernel.with(|| {
                        assert_near(&fused_mlp(&xs, &gate, &down, activation)?, &exact, &what)?;
                        let found = fused_swiglu(&xs, &gate_up, &down, activation)?;
                        assert_near(&found, &exact_gated, &what)?;
                        let again = fused_swiglu(&xs, &gate_up, &down, activation)?;
                        assert_eq!(values(&again)?, values(&found)?, "{what}, again");
                        Ok(())
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// Rows that no tensor map describes, and what the kernels for many tokens have no arithmetic for, take another path.
#[test]
fn what_tensor_maps_cannot_describe() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    for dtype in [DType::BF16, DType::F16] {
        let random = &mut Random::new(30);
        let wide = random.normal(&[300, 130], 0.2, dtype, device)?;
        let xs = random.normal(&[300, 64], 1., dtype, device)?;
        let aligned = Linear::new(random.normal(&[64, 64], 0.2, dtype, device)?, None);
        // Rows of an odd length apart, an odd offset, a length of no multiple of 8.
        let strided = Linear::new(wide.narrow(0, 0, 64)?.narrow(1, 0, 64)?, None);
        let offset = Linear::new(wide.narrow(0, 0, 64)?.narrow(1, 1, 64)?, None);
        let short = [random.linear((60, 64), true, dtype, device)?, random.linear((64, 60), true, dtype, device)?];
        for (fc1, fc2) in [(&strided, &aligned), (&aligned, &offset), (&short[0], &short[1])] {
            let dense = |linear: &Linear| -> Result<Linear> {
                Ok(Linear::new(linear.weight().contiguous()?, linear.bias().cloned()))
            };
            let exact = exact_mlp(&xs, &dense(fc1)?, &dense(fc2)?, Activation::Silu)?;
            assert_near(&fused_mlp(&xs, fc1, fc2, Activation::Silu)?, &exact, "chosen")?;
            for kernel in GEMMS {
                let forced = kernel.with(|| fused_mlp(&xs, fc1, fc2, Activation::Silu));
                let error = forced.map(|ys| ys.dims().to_vec()).unwrap_err().to_string();
                assert!(error.contains("kernel that does not take this"), "{error}");
            }
        }
        let found = fused_mlp(&xs, &aligned, &aligned, Activation::Mish)?;
        assert_near(&found, &exact_mlp(&xs, &aligned, &aligned, Activation::Mish)?, "mish")?;
    }
    Ok(())
}

/// In a decode kernel a row's bits depend neither on its company nor on the run.
#[test]
fn rows_are_independent() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    for dtype in DTYPES {
        for sizes in [(576, 1536), (64, 172), (1024, 2816)] {
            let random = &mut Random::new(3);
            let module = gated(random, sizes, dtype, device)?;
            let xs = random.normal(&[64, sizes.0], 1., dtype, device)?;
            for kernel in kernels(dtype, sizes).into_iter().filter(|k| DECODE.contains(k)) {
                // What takes few tokens or some dozens is compared with what takes the others.
                let most = most_tokens(kernel, sizes).min(64);
                let whole = match kernel {
                    Kernel::DecodeResident | Kernel::DecodeWide => Kernel::DecodeHopper,
                    _ => kernel,
                };
                let xs = xs.narrow(0, 0, if kernel == whole { most } else { 64 })?;
                let all = whole.with(|| values(&module.forward(&xs)?))?;
                kernel.with(|| {
                    for _ in 0..10 {
                        let again = values(&module.forward(&xs.narrow(0, 0, most)?)?)?;
                        assert_eq!(again, all[..most * sizes.0], "{kernel} {dtype:?} {sizes:?}, again");
                    }
                    for tokens in [1, 2, 7, 16, 33].into_iter().filter(|&tokens| tokens <= most) {
                        for first in [0, xs.dim(0)? - tokens] {
                            let some = values(&module.forward(&xs.narrow(0, first, tokens)?)?)?;
                            let expected = &all[first * sizes.0..(first + tokens) * sizes.0];
                            assert_eq!(some, expected, "{kernel} {dtype:?} {sizes:?}, {tokens} from {first}");
                        }
                    }
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}

/// In a kernel for many tokens a row's bits do not depend on its place among as many.
#[test]
fn rows_in_any_order() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for sizes in [(576, 1536), (1024, 2816), (264, 8200)] {
            let random = &mut Random::new(15);
            let module = gated(random, sizes, dtype, device)?;
            for kernel in kernels(dtype, sizes).into_iter().filter(|k| GEMMS.contains(k)) {
                for tokens in [65, 130, 300, 1000] {
                    let xs = random.normal(&[tokens, sizes.0], 1., dtype, device)?;
                    let order: Vec<u32> = (0..tokens as u32).map(|i| (i * 37 + 11) % tokens as u32).collect();
                    let order = Tensor::new(order, device)?;
                    kernel.with(|| {
                        let expected = module.forward(&xs)?.index_select(&order, 0)?;
                        let found = module.forward(&xs.index_select(&order, 0)?)?;
                        assert_eq!(values(&found)?, values(&expected)?, "{kernel} {dtype:?} {sizes:?} {tokens}");
                        Ok(())
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// Two threads, on two streams and on candle's stream that is another one in each thread.
#[test]
fn two_streams_at_once() -> Result<()> {
    let sizes = [(576, 1536), (256, 4096), (1024, 2816), (64, 172)];
    let run = |device: Device, seed: u64| -> Result<()> {
        let random = &mut Random::new(seed);
        let mut calls = Vec::new();
        for (i, sizes) in sizes.into_iter().enumerate() {
            let dtype = [DType::BF16, DType::F32, DType::F16, DType::F32][i];
            let module = gated(random, sizes, dtype, &device)?;
            let some = [
                (1, Kernel::DecodeCluster),
                (11, Kernel::DecodeCluster),
                (1, Kernel::DecodeResident),
                (7, Kernel::DecodeResident),
                (12, Kernel::DecodeResident),
                (32, Kernel::DecodeResident),
                (1, Kernel::DecodeHopper),
                (40, Kernel::DecodeHopper),
                (40, Kernel::DecodeWide),
                (100, Kernel::DecodeWide),
                (1, Kernel::DecodeDependent),
                (9, Kernel::Decode),
                (5, Kernel::DecodePortable),
                (150, Kernel::Gemm),
                (150, Kernel::GemmAmpere),
                (150, Kernel::Matmul),
            ];
            let takes =
                |tokens, kernel| kernels(dtype, sizes).contains(&kernel) && tokens <= most_tokens(kernel, sizes);
            for (tokens, kernel) in some.into_iter().filter(|&(tokens, kernel)| takes(tokens, kernel)) {
                let xs = random.normal(&[tokens, sizes.0], 1., dtype, &device)?;
                let expected = kernel.with(|| module.forward(&xs))?;
                assert_near(&expected, &exact(&module, &xs)?, &format!("{kernel}"))?;
                calls.push((module.clone(), xs, kernel, values(&expected)?));
            }
        }
        for round in 0..60 {
            let mut found = Vec::new();
            for i in 0..10 * calls.len() {
                let (module, xs, kernel, _) = &calls[(i * 7 + round) % calls.len()];
                found.push(kernel.with(|| module.forward(xs))?);
            }
            for i in 0..calls.len() {
                assert_eq!(values(&found[i])?, calls[(i * 7 + round) % calls.len()].3);
            }
        }
        Ok(())
    };
    let shared = Device::new_cuda(0)?;
    let pairs = [[Device::new_cuda_with_stream(0)?, Device::new_cuda_with_stream(0)?], [shared.clone(), shared]];
    for devices in pairs {
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> =
                devices.into_iter().zip(1..).map(|(device, seed)| scope.spawn(move || run(device, seed))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a thread panicked")).collect::<Vec<_>>()
        });
        results.into_iter().collect::<Result<()>>()?;
    }
    Ok(())
}

#[test]
fn any_strides() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    for dtype in DTYPES {
        let random = &mut Random::new(8);
        let module = gated(random, (48, 96), dtype, device)?;
        for (tokens, wide) in
            [(5, random.normal(&[6, 80], 1., dtype, device)?), (40, random.normal(&[41, 80], 1., dtype, device)?)]
        {
            let padded = wide.narrow(1, 16, 48)?.narrow(0, 1, tokens)?;
            let odd = wide.narrow(1, 3, 48)?.narrow(0, 0, tokens)?;
            let transposed = wide.narrow(1, 0, tokens.min(40))?.t()?;
            let transposed = Tensor::cat(&[&transposed; 8], 1)?.t()?.contiguous()?.narrow(0, 0, 48)?.t()?;
            let repeated = wide.narrow(0, 0, 1)?.narrow(1, 0, 48)?.broadcast_as((tokens, 48))?;
            let deep = wide.narrow(0, 0, 4)?.reshape((2, 2, 80))?.narrow(2, 8, 48)?.transpose(0, 1)?;
            for xs in [padded, odd, transposed, repeated, deep] {
                let what = format!("{:?}", xs.layout());
                assert_near(&module.forward(&xs)?, &exact(&module, &xs)?, &what)?;
            }
        }
        // Weights and biases: transposed, with padded rows, off any alignment, every other row, repeated.
        let square = random.normal(&[48, 48], 0.2, dtype, device)?;
        let wide = random.normal(&[97, 50], 0.2, dtype, device)?;
        let ways = [
            square.t()?,
            wide.narrow(0, 0, 48)?.narrow(1, 0, 48)?,
            wide.narrow(0, 1, 48)?.narrow(1, 1, 48)?,
            wide.narrow(0, 0, 96)?.reshape((48, 2, 50))?.narrow(1, 0, 1)?.squeeze(1)?.narrow(1, 0, 48)?,
            wide.narrow(0, 0, 1)?.narrow(1, 0, 48)?.broadcast_as((48, 48))?,
            wide.narrow(0, 0, 96)?.t()?.narrow(0, 0, 48)?.narrow(1, 0, 48)?,
        ];
        let bias = wide.narrow(0, 0, 48)?.narrow(1, 0, 1)?.squeeze(1)?;
        for weight in ways {
            for tokens in [1, 7, 40] {
                let xs = random.normal(&[tokens, 48], 1., dtype, device)?;
                let layer = Linear::new(weight.clone(), Some(bias.clone()));
                let what = format!("{tokens} {:?}", weight.layout());
                let found = fused_mlp(&xs, &layer, &layer, Activation::Silu)?;
                // candle's own product does not take all of these strides.
                let dense = Linear::new(weight.contiguous()?, Some(bias.contiguous()?));
                assert_near(&found, &exact_mlp(&xs, &dense, &dense, Activation::Silu)?, &what)?;
            }
        }
    }
    Ok(())
}

#[test]
fn no_tokens() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    for dtype in DTYPES {
        let module = gated(&mut Random::new(9), (48, 96), dtype, device)?;
        let none = Tensor::ones((2, 4, 48), dtype, device)?.narrow(1, 0, 0)?;
        assert_eq!(module.forward(&none)?.dims(), &[2, 0, 48]);
    }
    Ok(())
}

/// Layers of no inputs give their biases, as on the CPU.
#[test]
fn sums_of_nothing() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    let random = &mut Random::new(13);
    let [fc1, fc2] = [(16, 8), (8, 16)].map(|size| random.linear(size, true, DType::F32, &Device::Cpu));
    let (fc1, fc2) = (fc1?, fc2?);
    let xs = random.normal(&[70, 8], 1., DType::F32, &Device::Cpu)?;
    // [hidden size, intermediate size]
    for [hidden, intermediate] in [[0, 16], [8, 0], [0, 0]] {
        let run = |device: &Device| -> Result<Tensor> {
            let (fc1, fc2, xs) = (fc1.clone(), fc2.clone(), xs.to_device(device)?.narrow(1, 0, hidden)?);
            let part = |linear: &Linear, rows: usize, cols: usize| -> Result<Linear> {
                let weight = linear.weight().to_device(device)?.narrow(0, 0, rows)?.narrow(1, 0, cols)?;
                let bias = linear.bias().map(|bias| bias.to_device(device)?.narrow(0, 0, rows)).transpose()?;
                Ok(Linear::new(weight, bias))
            };
            let (fc1, fc2) = (part(&fc1, intermediate, hidden)?, part(&fc2, 8, intermediate)?);
            fused_mlp(&xs, &fc1, &fc2, Activation::Gelu)
        };
        let (found, expected) = (run(device)?, run(&Device::Cpu)?);
        assert!(relative_error(&found, &expected)? <= 1e-6, "{hidden} {intermediate}");
    }
    Ok(())
}

#[test]
fn errors_say_what_was_expected() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    let random = &mut Random::new(10);
    let module = gated(random, (48, 96), DType::F64, device)?;
    let says = |result: Result<Tensor>, parts: &[&str]| {
        let error = result.map(|ys| ys.dims().to_vec()).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "expected {part:?} in: {error}");
        }
    };
    let xs = random.normal(&[1, 48], 1., DType::F64, device)?;
    says(module.forward(&xs.to_device(&Device::Cpu)?), &["gate weight", "Cpu as xs is", "Cuda"]);
    says(module.forward(&xs.to_dtype(DType::F32)?), &["gate weight", "dtype f32", "f64"]);
    says(module.forward(&xs.narrow(1, 0, 40)?), &["gate weight", "[out_features, 40]", "[96, 48]"]);
    says(Kernel::Decode.with(|| module.forward(&xs)), &["fused-swiglu", "kernel that does not take this dtype"]);
    assert_near(&module.forward(&xs)?, &exact(&module, &xs)?, "after the errors")
}

/// What does not fit on the device is an error, and the next call works.
#[test]
fn out_of_memory() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    let random = &mut Random::new(11);
    let module = gated(random, (64, 128), DType::BF16, device)?;
    let huge = Linear::new(random.normal(&[1, 128], 1., DType::BF16, device)?.broadcast_as((1 << 30, 128))?, None);
    for tokens in [1, 4096] {
        let xs = random.normal(&[tokens, 64], 1., DType::BF16, device)?;
        assert!(fused_swiglu(&xs, module.gate_up(), &huge, Activation::Silu).is_err());
        let xs = xs.narrow(0, 0, 1)?;
        assert_near(&module.forward(&xs)?, &exact(&module, &xs)?, "after running out of memory")?;
    }
    Ok(())
}

/// The gradients on the GPU are the CPU's.
#[test]
fn gradients() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    for (i, &activation) in Activation::ALL.iter().enumerate() {
        for tokens in [3, 40] {
            let random = &mut Random::new(12 + i as u64);
            let shapes: [&[usize]; 6] = [&[tokens, 24], &[56, 24], &[56, 24], &[24, 56], &[56], &[24]];
            let tensors: Vec<_> =
                shapes.iter().map(|dims| random.normal(dims, 0.5, DType::F64, &Device::Cpu)).collect::<Result<_>>()?;
            let gradients = |device: &Device, is_gated: bool| -> Result<Vec<Tensor>> {
                let vars =
                    tensors.iter().map(|t| Var::from_tensor(&t.to_device(device)?)).collect::<Result<Vec<_>>>()?;
                let [xs, gate, up, down, gate_bias, down_bias] =
                    [0, 1, 2, 3, 4, 5].map(|i| vars[i].as_tensor().clone());
                let (gate, down) = (Linear::new(gate, Some(gate_bias)), Linear::new(down, Some(down_bias)));
                let ys = if is_gated {
                    fused_swiglu(&xs, &GateUp::Separate { gate, up: Linear::new(up, None) }, &down, activation)?
                } else {
                    fused_mlp(&xs, &gate, &down, activation)?
                };
                let gradients = ys.sqr()?.sum_all()?.backward()?;
                Ok(vars.iter().filter_map(|var| gradients.get(var).cloned()).collect())
            };
            for is_gated in [false, true] {
                let (found, expected) = (gradients(device, is_gated)?, gradients(&Device::Cpu, is_gated)?);
                assert_eq!(found.len(), if is_gated { 6 } else { 5 });
                for (found, expected) in found.iter().zip(&expected) {
                    assert_near(found, expected, &format!("{activation} {tokens} {:?}", found.dims()))?;
                }
            }
        }
    }
    Ok(())
}

/// A plan names the kernel that runs: asked for by that name, it gives the same bits.
#[test]
fn plans_what_runs() -> Result<()> {
    let device = &Device::new_cuda(0)?;
    for dtype in DTYPES {
        for sizes in [(576, 1536), (60, 172), (61, 171)] {
            let random = &mut Random::new(14);
            let module = gated(random, sizes, dtype, device)?;
            for tokens in [1, 64, 100] {
                let xs = random.normal(&[tokens, sizes.0], 1., dtype, device)?;
                let plan = module.plan(&xs)?;
                let what = format!("{dtype:?} {sizes:?} {tokens} {}", plan.kernel);
                let planned = Kernel::ALL.into_iter().find(|kernel| plan.kernel == format!("cuda-{kernel}"));
                let planned = planned.unwrap_or_else(|| panic!("{what}: no such kernel"));
                assert!(kernels(dtype, sizes).contains(&planned), "{what}");
                let (found, forced) = (module.forward(&xs)?, planned.with(|| module.forward(&xs))?);
                assert_eq!(values(&found)?, values(&forced)?, "{what}");
                if planned == Kernel::Matmul {
                    // Three products, one launch between the layers, the second layer's bias.
                    assert_eq!(plan.fused.launches, 5, "{what}");
                }
                for kernel in kernels(dtype, sizes) {
                    let plan = kernel.with(|| module.plan(&xs))?;
                    assert_eq!(plan.kernel, format!("cuda-{kernel}"), "{what}");
                }
            }
        }
    }
    Ok(())
}

/// What cannot be planned says why, and a plan of nothing costs nothing.
#[test]
fn plans_at_the_edges() -> Result<()> {
    let device = DeviceLocation::Cuda { gpu_id: 0 };
    let none = plan(&Workload::swiglu(0, 64, 128), device)?;
    assert_eq!((none.kernel.as_str(), none.fused.launches, none.fused.bytes_read), ("cuda-none", 0, 0));
    let transposed = plan(&Workload { rows_adjacent: false, ..Workload::swiglu(1, 64, 128) }, device)?;
    assert_eq!((transposed.kernel.as_str(), transposed.device.as_str()), ("cuda-matmul", "cuda:0"));
    let absent = plan(&Workload::swiglu(1, 64, 128), DeviceLocation::Cuda { gpu_id: 999 }).unwrap_err().to_string();
    assert!(absent.contains("plan: cuda:999"), "{absent}");
    Ok(())
}
