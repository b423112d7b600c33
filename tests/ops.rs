//! Both ops against their unfused twins in f64: shapes, dtypes, activations, biases, tiers; NaN and infinity.

mod common;

use candle_core::{test_device, DType, Device, Result, Tensor};
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{reference, Activation, GateUp, PackedOrder};
use candle_nn::Linear;
use common::*;

/// Checks both ops at one size, every tier.
fn check(
    seed: u64,
    (tokens, hidden, intermediate): (usize, usize, usize),
    dtype: DType,
    device: &Device,
) -> Result<()> {
    let random = &mut Random::new(seed);
    let activation = Activation::ALL[random.range(0..Activation::ALL.len())];
    let biases: [bool; 3] = std::array::from_fn(|_| random.range(0..2) == 1);
    let xs = random.normal(&[tokens, hidden], 1., dtype, device)?;
    let gate = random.linear((intermediate, hidden), biases[0], dtype, device)?;
    let up = random.linear((intermediate, hidden), biases[1], dtype, device)?;
    let down = random.linear((hidden, intermediate), biases[2], dtype, device)?;
    let gate_up = GateUp::Separate { gate: gate.clone(), up };
    let exact = [exact_mlp(&xs, &gate, &down, activation)?, exact_swiglu(&xs, &gate_up, &down, activation)?];
    for tier in tiers(device) {
        tier.with(|| {
            let found = [fused_mlp(&xs, &gate, &down, activation)?, fused_swiglu(&xs, &gate_up, &down, activation)?];
            for (op, (found, exact)) in ["mlp", "swiglu"].iter().zip(found.iter().zip(&exact)) {
                let error = relative_error(found, exact)?;
                let size = format!("{tokens} x {hidden} x {intermediate}, {activation}, biases {biases:?}");
                // Of a few terms all may cancel.
                let tolerance = tolerance(dtype) * if hidden.min(intermediate) < 8 { 2. } else { 1. };
                assert!(error <= tolerance, "{op} {dtype:?} {tier} {size}: {error:e}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn sizes(device: &Device) -> Result<()> {
    let tokens = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 64, 65, 130];
    let layers = [(1, 1), (3, 5), (8, 16), (16, 48), (31, 33), (32, 48), (64, 172), (88, 172), (100, 1), (257, 513)];
    for dtype in DTYPES {
        for (i, tokens) in tokens.into_iter().enumerate() {
            for (j, (hidden, intermediate)) in layers.into_iter().enumerate() {
                check((i * layers.len() + j) as u64, (tokens, hidden, intermediate), dtype, device)?;
            }
        }
        check(1000, (600, 96, 200), dtype, device)?;
        check(1001, (1025, 40, 100), dtype, device)?;
        check(1002, (20, 300, 11008), dtype, device)?;
    }
    Ok(())
}
test_device!(sizes, sizes_cpu, sizes_gpu, sizes_metal);

fn packed_is_separate(device: &Device) -> Result<()> {
    let random = &mut Random::new(7);
    for bias in [false, true] {
        let xs = random.normal(&[3, 24], 1., DType::F32, device)?;
        let (gate, up) =
            (random.linear((40, 24), bias, DType::F32, device)?, random.linear((40, 24), bias, DType::F32, device)?);
        let down = random.linear((24, 40), bias, DType::F32, device)?;
        let expected =
            fused_swiglu(&xs, &GateUp::Separate { gate: gate.clone(), up: up.clone() }, &down, Activation::Silu)?;
        for order in [PackedOrder::GateUp, PackedOrder::UpGate] {
            let found = fused_swiglu(&xs, &packed(&gate, &up, order)?, &down, Activation::Silu)?;
            assert_eq!(values(&found)?, values(&expected)?);
        }
    }
    Ok(())
}
test_device!(packed_is_separate, packed_is_separate_cpu, packed_is_separate_gpu, packed_is_separate_metal);

/// What kind of number this is: `nan`, `inf`, `-inf` or nothing.
fn kind(value: f64) -> &'static str {
    match value {
        v if v.is_nan() => "nan",
        f64::INFINITY => "inf",
        f64::NEG_INFINITY => "-inf",
        _ => "",
    }
}

/// A copy of this tensor with `special` at one place, in every row or in one.
fn with_special(random: &mut Random, tensor: &Tensor, special: f64, every_row: bool) -> Result<Tensor> {
    let cols = *tensor.dims().last().unwrap();
    let mut data = values(tensor)?;
    let (at, rows) = (random.range(0..data.len()), data.len() / cols);
    if every_row {
        (0..rows).for_each(|row| data[row * cols + at % cols] = special);
    } else {
        data[at] = special;
    }
    Tensor::from_vec(data, tensor.dims(), tensor.device())?.to_dtype(tensor.dtype())
}

/// NaN and infinity, in x or in a parameter, come out where candle's own ops have them on the CPU, and nowhere else: nothing
/// that pads a vector or a panel adds any. (On CUDA candle's minimum and maximum, in ReLU6 and leaky ReLU, lose NaN.)
fn not_finite_where_candle_is_not(device: &Device) -> Result<()> {
    let random = &mut Random::new(11);
    let sizes =
        [(1, 5, 1, 6), (3, 5, 3, 6), (2, 17, 33, 7), (9, 40, 7, 50), (20, 5, 1, 6), (20, 37, 51, 6), (40, 3, 97, 49)];
    let mut seen = std::collections::BTreeMap::<(&str, &str), usize>::new();
    for (dtype, transposed) in DTYPES.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
        for (tokens, hidden, intermediate, out) in sizes {
            for _ in 0..3 {
                let activation = Activation::ALL[random.range(0..Activation::ALL.len())];
                for special in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    for place in 0..7 {
                        // On a GPU candle's product of transposed weights rounds before the bias, so that a gate or a
                        // hidden element of almost zero can be zero; times infinity that is NaN.
                        if (2..=4).contains(&place) && transposed && device.is_cuda() && dtype.size_in_bytes() == 2 {
                            continue;
                        }
                        let mut xs = random.normal(&[tokens, hidden], 1., dtype, device)?;
                        let mut weights = [(intermediate, hidden), (intermediate, hidden), (out, intermediate)]
                            .map(|size| random.linear(size, true, dtype, device).unwrap());
                        // Far out, candle's tanh GELU rounds to zero before ours: zero times infinity.
                        weights[0] =
                            Linear::new((weights[0].weight() * 0.3)?, Some((weights[0].bias().unwrap() * 0.3)?));
                        let every_row = random.range(0..2) == 1;
                        if place == 6 {
                            xs = with_special(random, &xs, special, false)?;
                        } else {
                            let (linear, is_bias) = (&weights[place / 2], place % 2 == 1);
                            let (mut weight, mut bias) = (linear.weight().clone(), linear.bias().unwrap().clone());
                            let changed = if is_bias { &mut bias } else { &mut weight };
                            *changed = with_special(random, changed, special, every_row)?;
                            weights[place / 2] = Linear::new(weight, Some(bias));
                        }
                        let [gate, up, down] = weights.map(|linear| match transposed {
                            true => {
                                let weight = linear.weight().t().unwrap().contiguous().unwrap().t().unwrap();
                                Linear::new(weight, linear.bias().cloned())
                            }
                            false => linear,
                        });
                        // In 16 bits candle rounds after every op, to zero and to infinity too.
                        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                        let (host_xs, host_down) = (xs.to_device(&Device::Cpu)?, host(&down)?);
                        let gate_up = GateUp::Separate { gate: gate.clone(), up };
                        let (wide_xs, wide_down) = (host_xs.to_dtype(wide)?, cast(&host_down, wide)?);
                        let expected = [
                            reference::mlp(&wide_xs, &cast(&host(&gate)?, wide)?, &wide_down, activation)?,
                            reference::swiglu(
                                &wide_xs,
                                &cast_gate_up(&host_gate_up(&gate_up)?, wide)?,
                                &wide_down,
                                activation,
                            )?,
                        ]
                        .map(|expected| values(&expected).unwrap());
                        for tier in tiers(device) {
                            let found = tier.with(|| {
                                let plain = fused_mlp(&xs, &gate, &down, activation)?;
                                Ok([plain, fused_swiglu(&xs, &gate_up, &down, activation)?])
                            })?;
                            for ((op, found), expected) in ["mlp", "swiglu"].into_iter().zip(&found).zip(&expected) {
                                let found: Vec<_> = values(found)?.into_iter().map(kind).collect();
                                let size = format!("{tokens}x{hidden}x{intermediate}x{out}");
                                for (i, (found, expected)) in found.into_iter().zip(expected).enumerate() {
                                    *seen.entry((op, kind(*expected))).or_default() += 1;
                                    assert_eq!(
                                        found,
                                        kind(*expected),
                                        "value {i} of {op} {dtype:?} {tier} {size} {activation}, {special} in {place}, \
                                         transposed {transposed}"
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    // Every kind was there to be found.
    for kind in [("mlp", "nan"), ("mlp", "inf"), ("mlp", "-inf"), ("mlp", ""), ("swiglu", "inf"), ("swiglu", "-inf")] {
        assert!(seen[&kind] > 500, "{seen:?}");
    }
    Ok(())
}
test_device!(
    not_finite_where_candle_is_not,
    not_finite_where_candle_is_not_cpu,
    not_finite_where_candle_is_not_gpu,
    not_finite_where_candle_is_not_metal
);
