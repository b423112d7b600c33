//! The same bits from run to run, for every number of threads, and from whichever threads call at once.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_fused_mlp::cpu::Tier;
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{Activation, GateUp};
use candle_nn::Linear;
use common::*;
use rayon::prelude::*;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::process::Command;

/// One MLP and its input.
struct Case {
    name: String,
    tier: Tier,
    xs: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Case {
    /// Of the results of both ops.
    fn hash(&self) -> Result<u64> {
        let gate_up = GateUp::Separate { gate: self.gate.clone(), up: self.up.clone() };
        let mut hasher = DefaultHasher::new();
        self.tier.with(|| {
            for result in [
                fused_mlp(&self.xs, &self.gate, &self.down, Activation::Gelu)?,
                fused_swiglu(&self.xs, &gate_up, &self.down, Activation::Silu)?,
            ] {
                // Exact, and so that different bits are different values.
                for value in values(&result)? {
                    value.to_bits().hash(&mut hasher);
                }
            }
            Ok(hasher.finish())
        })
    }
}

/// Tokens, hidden size, intermediate size, output features.
type Size = (usize, usize, usize, usize);

/// Few tokens and many, more tokens than a block has, more of the hidden layer than a block has, and work for many
/// threads: smaller where code is not optimised.
const SIZES: &[Size] = if cfg!(debug_assertions) {
    &[(1, 300, 700, 100), (7, 31, 70, 31), (16, 32, 131, 17), (33, 32, 131, 17), (70, 3, 7700, 3), (600, 4, 150, 5)]
} else {
    &[
        (1, 1024, 2100, 1000),
        (7, 301, 700, 301),
        (16, 256, 1031, 77),
        (33, 256, 1031, 77),
        (70, 16, 11008, 16),
        (600, 24, 2500, 24),
        (1100, 24, 300, 51),
    ]
};

/// The same for the test that runs them many times.
const SMALL_SIZES: &[Size] = if cfg!(debug_assertions) {
    &[(1, 64, 172, 64), (9, 33, 70, 31), (40, 16, 103, 17)]
} else {
    &[(1, 512, 1100, 500), (9, 301, 700, 301), (40, 128, 1031, 77), (520, 40, 300, 51)]
};

/// Every size, dtype and tier; weights transposed as well.
fn cases(sizes: &[Size]) -> Result<Vec<Case>> {
    let random = &mut Random::new(1);
    let mut cases = Vec::new();
    for &(tokens, hidden, intermediate, out) in sizes {
        let mut layer = |rows, cols| random.linear((rows, cols), true, DType::F32, &Device::Cpu);
        let (gate, up) = (layer(intermediate, hidden)?, layer(intermediate, hidden)?);
        let down = layer(out, intermediate)?;
        let xs = random.normal(&[tokens, hidden], 1., DType::F32, &Device::Cpu)?;
        for dtype in DTYPES {
            // f64 has one tier.
            let tiers = if dtype == DType::F64 { vec![Tier::Plain] } else { tiers(&Device::Cpu) };
            for tier in tiers {
                for transposed in [false, true] {
                    let linear = |linear: &Linear| {
                        let linear = cast(linear, dtype)?;
                        let weight = match transposed {
                            true => linear.weight().t()?.contiguous()?.t()?,
                            false => linear.weight().clone(),
                        };
                        Ok::<_, candle_core::Error>(Linear::new(weight, linear.bias().cloned()))
                    };
                    let size = format!("{tokens}x{hidden}x{intermediate}x{out}");
                    cases.push(Case {
                        name: format!("{size} {} {tier} transposed={transposed}", dtype.as_str()),
                        tier,
                        xs: xs.to_dtype(dtype)?,
                        gate: linear(&gate)?,
                        up: linear(&up)?,
                        down: linear(&down)?,
                    });
                }
            }
        }
    }
    Ok(cases)
}

/// In a process of its own: the hash of every case, a line each.
const CHILD: &str = "FUSED_MLP_TEST_HASHES";

#[test]
fn hashes() -> Result<()> {
    if std::env::var_os(CHILD).is_some() {
        println!("threads {}", candle_core::utils::get_num_threads());
        for case in cases(SIZES)? {
            println!("hash {} {:016x}", case.name, case.hash()?);
        }
        return Ok(());
    }
    let run = |threads: usize| {
        let program = std::env::current_exe().unwrap();
        let output = Command::new(program)
            .args(["--exact", "hashes", "--nocapture"])
            .env(CHILD, "1")
            .env("RAYON_NUM_THREADS", threads.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains(&format!("threads {threads}\n")), "{text}");
        text.lines().filter(|line| line.starts_with("hash ")).map(str::to_string).collect::<Vec<_>>()
    };
    let expected = run(1);
    assert_eq!(expected.len(), cases(SIZES)?.len());
    for threads in [1, 2, 3, 8] {
        for (found, expected) in run(threads).iter().zip(&expected) {
            assert_eq!(found, expected, "{threads} threads");
        }
    }
    Ok(())
}

#[test]
fn from_many_threads() -> Result<()> {
    let cases = cases(SMALL_SIZES)?;
    let expected = cases.iter().map(Case::hash).collect::<Result<Vec<_>>>()?;
    let check = |first: usize| {
        for i in 0..cases.len() {
            let i = (first + i) % cases.len();
            assert_eq!(cases[i].hash().unwrap(), expected[i], "{}", cases[i].name);
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let check = &check;
            scope.spawn(move || check(thread * 5));
        }
    });
    // On rayon's own threads, all of them busy with calls.
    (0..8).into_par_iter().for_each(|task| check(task * 3));
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| check(0));
        pool.install(|| (0..4).into_par_iter().for_each(|task| check(task * 7)));
    }
    Ok(())
}
