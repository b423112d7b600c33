//! Both ops against their unfused twins in f64: shapes, dtypes, activations, biases, strides, tiers.

mod common;

use candle_core::{test_device, DType, Device, Result};
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{Activation, GateUp, PackedOrder};
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
