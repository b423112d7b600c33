//! Both ops on tensors of every layout that candle can make, against their unfused twins in f64.

mod common;

use candle_core::{test_device, DType, Device, Result, Tensor};
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{Activation, GateUp, PackedOrder};
use candle_nn::Linear;
use common::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

/// One step from a contiguous tensor to a view of it. Dimensions are counted modulo the rank.
#[derive(Debug, Clone)]
enum Step {
    Transposed(usize, usize),
    /// A range of a dimension that has this many more entries before and after.
    Narrowed(usize, usize, usize),
    /// Every n-th entry of a dimension.
    Stepped(usize, usize),
    /// One entry for the whole dimension: stride 0.
    Broadcast(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let dim = 0usize..4;
    prop_oneof![
        3 => (dim.clone(), dim.clone()).prop_map(|(i, j)| Step::Transposed(i, j)),
        3 => (dim.clone(), 0usize..3, 0usize..3).prop_map(|(d, before, after)| Step::Narrowed(d, before, after)),
        1 => (dim.clone(), 2usize..4).prop_map(|(d, n)| Step::Stepped(d, n)),
        1 => dim.prop_map(Step::Broadcast),
    ]
}

/// How a tensor is laid out: the steps to it, the last one first.
fn layout() -> impl Strategy<Value = Vec<Step>> {
    vec(step(), 0..3)
}

/// A random tensor of these dimensions, laid out like this.
fn tensor(
    random: &mut Random,
    dims: &[usize],
    scale: f64,
    dtype: DType,
    device: &Device,
    steps: &[Step],
) -> Result<Tensor> {
    let Some((step, steps)) = steps.split_first() else {
        return random.normal(dims, scale, dtype, device);
    };
    let mut inner = dims.to_vec();
    let mut whole = |inner: &[usize]| tensor(random, inner, scale, dtype, device, steps);
    match *step {
        Step::Transposed(i, j) => {
            let (i, j) = (i % dims.len(), j % dims.len());
            inner.swap(i, j);
            whole(&inner)?.transpose(i, j)
        }
        Step::Narrowed(d, before, after) => {
            let d = d % dims.len();
            inner[d] += before + after;
            whole(&inner)?.narrow(d, before, dims[d])
        }
        Step::Stepped(d, n) => {
            let d = d % dims.len();
            inner.insert(d + 1, n);
            whole(&inner)?.narrow(d + 1, n - 1, 1)?.squeeze(d + 1)
        }
        Step::Broadcast(d) => {
            inner[d % dims.len()] = 1;
            whole(&inner)?.broadcast_as(dims)
        }
    }
}

/// One call of an op. A projection is the layout of its weight and, where it has one, of its bias.
#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    dtype: DType,
    activation: Activation,
    leading: Vec<usize>,
    /// Hidden size, intermediate size, output features.
    sizes: (usize, usize, usize),
    xs: Vec<Step>,
    first: Projection,
    down: Projection,
    up: Up,
}

type Projection = (Vec<Step>, Option<Vec<Step>>);

#[derive(Debug, Clone)]
enum Up {
    /// A plain MLP.
    Missing,
    Apart(Projection),
    /// The first layer is packed.
    Packed(PackedOrder),
}

fn case() -> impl Strategy<Value = Case> {
    let projection = || (layout(), option::of(layout()));
    let size = |most: usize| prop_oneof![1 => Just(1usize), 1 => 2usize..9, 3 => 2..most];
    let up = prop_oneof![
        2 => Just(Up::Missing),
        2 => projection().prop_map(Up::Apart),
        1 => Just(Up::Packed(PackedOrder::GateUp)),
        1 => Just(Up::Packed(PackedOrder::UpGate)),
    ];
    // The rank is that of `leading` and one.
    let leading = vec(prop_oneof![1 => Just(0usize), 10 => Just(1), 30 => 2usize..6], 0..4);
    (
        (any::<u64>(), proptest::sample::select(&DTYPES[..]), proptest::sample::select(Activation::ALL)),
        leading,
        (size(70), size(90), size(60)),
        (layout(), projection(), projection(), up),
    )
        .prop_map(|((seed, dtype, activation), leading, sizes, (xs, first, down, up))| Case {
            seed,
            dtype,
            activation,
            leading,
            sizes,
            xs,
            first,
            down,
            up,
        })
}

/// The error that each value may have: this part of what it would be if no two terms cancelled.
fn allowed(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 2e-6,
        DType::F16 => 1.5e-3,
        _ => 1e-2,
    }
}

/// `|x| |W|ᵀ + |b|`
fn magnitude(xs: &Tensor, linear: &Linear) -> Result<Tensor> {
    let magnitude = xs.abs()?.matmul(&linear.weight().abs()?.t()?)?;
    match linear.bias() {
        Some(bias) => magnitude.broadcast_add(&bias.abs()?),
        None => Ok(magnitude),
    }
}

/// What the op's values would be if no two terms cancelled, from parameters in f64.
fn magnitudes(xs: &Tensor, gate_up: &GateUp, plain: bool, down: &Linear, activation: Activation) -> Result<Tensor> {
    let (gate, up) = gate_up.split()?;
    let gate = magnitude(xs, &gate)?;
    // No activation exceeds |x| + 1 but one.
    let mut hidden = if activation == Activation::Relu2 { gate.sqr()? } else { (gate + 1.)? };
    if !plain {
        hidden = (hidden * magnitude(xs, &up)?)?;
    }
    magnitude(&hidden, down)
}

fn check(case: &Case, device: &Device) -> Result<()> {
    let Case { dtype, activation, sizes: (hidden, intermediate, out), .. } = *case;
    let random = &mut Random::new(case.seed);
    let mut linear = |(rows, cols): (usize, usize), (weight, bias): &Projection| -> Result<Linear> {
        let weight = tensor(random, &[rows, cols], (cols as f64).powf(-0.5), dtype, device, weight)?;
        let bias = bias.as_ref().map(|bias| tensor(random, &[rows], 0.5, dtype, device, bias)).transpose()?;
        Ok(Linear::new(weight, bias))
    };
    let (gate_up, plain) = match &case.up {
        Up::Missing => {
            let fc1 = linear((intermediate, hidden), &case.first)?;
            (GateUp::Separate { gate: fc1.clone(), up: fc1 }, true)
        }
        Up::Apart(up) => {
            let gate = linear((intermediate, hidden), &case.first)?;
            (GateUp::Separate { gate, up: linear((intermediate, hidden), up)? }, false)
        }
        Up::Packed(order) => {
            (GateUp::Packed { linear: linear((2 * intermediate, hidden), &case.first)?, order: *order }, false)
        }
    };
    let down = linear((out, intermediate), &case.down)?;
    let mut dims = case.leading.clone();
    dims.push(hidden);
    let xs = tensor(random, &dims, 1., dtype, device, &case.xs)?;

    let (fc1, _) = gate_up.split()?;
    let (host_xs, host_gate_up, host_down) = (xs.to_device(&Device::Cpu)?, host_gate_up(&gate_up)?, host(&down)?);
    let exact = match plain {
        true => exact_mlp(&host_xs, &host(&fc1)?, &host_down, activation)?,
        false => exact_swiglu(&host_xs, &host_gate_up, &host_down, activation)?,
    };
    let wide_xs = matrix(&host_xs.to_dtype(DType::F64)?)?;
    let (wide_gate_up, wide_down) = (cast_gate_up(&host_gate_up, DType::F64)?, cast(&host_down, DType::F64)?);
    let magnitudes = magnitudes(&wide_xs, &wide_gate_up, plain, &wide_down, activation)?;
    dims[case.leading.len()] = out;
    for tier in tiers(device) {
        let found = tier.with(|| match plain {
            true => fused_mlp(&xs, &fc1, &down, activation),
            false => fused_swiglu(&xs, &gate_up, &down, activation),
        })?;
        assert_eq!((found.dims(), found.dtype()), (&dims[..], dtype));
        let (found, exact, magnitudes) = (values(&found)?, values(&exact)?, values(&magnitudes)?);
        for (i, (found, exact)) in found.iter().zip(&exact).enumerate() {
            let error = (found - exact).abs();
            assert!(
                error <= allowed(dtype) * magnitudes[i] + 1e-6 * allowed(dtype),
                "{tier}, value {i}: {found} {exact}"
            );
        }
    }
    Ok(())
}

fn any_layout(device: &Device) -> Result<()> {
    let config = Config { cases: 1500, failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..Config::default() };
    let outcome = TestRunner::new(config)
        .run(&case(), |case| check(&case, device).map_err(|error| TestCaseError::fail(error.to_string())));
    outcome.map_err(candle_core::Error::wrap)
}
test_device!(any_layout, any_layout_cpu, any_layout_gpu, any_layout_metal);
