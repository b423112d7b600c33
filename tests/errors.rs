//! What the ops refuse, in which words, and what they make of empty tensors.

mod common;

use candle_core::{test_device, DType, Device, Result, Tensor};
use candle_fused_mlp::cpu::Tier;
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{Activation, GateUp, PackedOrder, Plan};
use candle_nn::Linear;
use common::*;

/// The first line of the error, which has all of `parts`.
fn says<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("no error with {parts:?}") };
    let error = error.to_string();
    let line = error.lines().next().unwrap();
    for part in parts {
        assert!(line.contains(part), "expected {part:?} in: {line}");
    }
}

fn zeros(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    on(&Tensor::zeros(dims, dtype, &Device::Cpu)?, device)
}

/// Hidden size 4, intermediate size 8, 5 output features, in f32; each tensor can be replaced.
struct Arguments {
    xs: Tensor,
    gate: Tensor,
    gate_bias: Option<Tensor>,
    up: Tensor,
    up_bias: Option<Tensor>,
    down: Tensor,
    down_bias: Option<Tensor>,
}

/// Replaces one of the arguments.
type Set = fn(&mut Arguments, Tensor);
/// One of the arguments.
type Get = fn(&mut Arguments) -> &mut Tensor;

impl Arguments {
    fn new(device: &Device) -> Result<Self> {
        let zeros = |dims: &[usize]| zeros(dims, DType::F32, device);
        Ok(Self {
            xs: zeros(&[3, 4])?,
            gate: zeros(&[8, 4])?,
            gate_bias: Some(zeros(&[8])?),
            up: zeros(&[8, 4])?,
            up_bias: Some(zeros(&[8])?),
            down: zeros(&[5, 8])?,
            down_bias: Some(zeros(&[5])?),
        })
    }

    fn with(device: &Device, change: impl Fn(&mut Self)) -> Result<Self> {
        let mut arguments = Self::new(device)?;
        change(&mut arguments);
        Ok(arguments)
    }

    fn layers(&self) -> (GateUp, Linear) {
        let linear = |weight: &Tensor, bias: &Option<Tensor>| Linear::new(weight.clone(), bias.clone());
        let (gate, up) = (linear(&self.gate, &self.gate_bias), linear(&self.up, &self.up_bias));
        (GateUp::Separate { gate, up }, linear(&self.down, &self.down_bias))
    }

    /// The plain op, whose plan has the same error if it has one.
    fn mlp(&self) -> Result<Tensor> {
        let (GateUp::Separate { gate, .. }, down) = self.layers() else { unreachable!() };
        let found = fused_mlp(&self.xs, &gate, &down, Activation::Silu);
        let plan = Plan::of_mlp(&self.xs, &gate, &down, Activation::Silu);
        same_error(found, plan)
    }

    /// The gated op, likewise.
    fn swiglu(&self) -> Result<Tensor> {
        let (gate_up, down) = self.layers();
        let found = fused_swiglu(&self.xs, &gate_up, &down, Activation::Silu);
        let plan = Plan::of_swiglu(&self.xs, &gate_up, &down, Activation::Silu);
        same_error(found, plan)
    }
}

fn same_error(found: Result<Tensor>, plan: Result<Plan>) -> Result<Tensor> {
    match (&found, plan) {
        (Ok(_), Ok(_)) => {}
        (Err(found), Err(plan)) => assert_eq!(found.to_string().lines().next(), plan.to_string().lines().next()),
        (found, plan) => panic!("{found:?} {plan:?}"),
    }
    found
}

fn shapes(device: &Device) -> Result<()> {
    let zeros = |dims: &[usize]| zeros(dims, DType::F32, device).unwrap();
    let with = |change: &dyn Fn(&mut Arguments)| Arguments::with(device, change);
    assert_eq!(with(&|_| ())?.mlp()?.dims(), [3, 5]);
    assert_eq!(with(&|_| ())?.swiglu()?.dims(), [3, 5]);

    let scalar = with(&|a| a.xs = zeros(&[]))?;
    says(scalar.mlp(), &["fused-mlp: xs: expected at least one dimension, found a scalar"]);
    says(scalar.swiglu(), &["fused-swiglu: xs: expected at least one dimension, found a scalar"]);
    // The weight is the first that does not go with x, so it is what the error names; with the shape of x.
    for (dims, shown) in [(&[3, 5][..], "[3, 5]"), (&[5], "[5]"), (&[4, 3, 2, 5], "[4, 3, 2, 5]")] {
        let wrong = with(&|a| a.xs = zeros(dims))?;
        let expected = ["expected shape [out_features, 5], found [8, 4]", "xs is", shown];
        says(wrong.mlp(), &[&["fused-mlp: fc1 weight"], &expected[..]].concat());
        says(wrong.swiglu(), &[&["fused-swiglu: gate weight"], &expected[..]].concat());
    }

    let matrices: [(&str, &str, Set, &str, usize); 3] = [
        ("fc1 weight", "gate weight", |a, t| a.gate = t, "[out_features, 4]", 4),
        ("", "up weight", |a, t| a.up = t, "[8, 4]", 4),
        ("fc2 weight", "down weight", |a, t| a.down = t, "[out_features, 8]", 8),
    ];
    for (plain, gated, set, expected, cols) in matrices {
        for dims in [vec![], vec![8], vec![1, 8, cols], vec![8, cols + 1], vec![8, 0]] {
            let wrong = with(&|a| set(a, zeros(&dims)))?;
            let shapes = [format!("expected shape {expected}, found {dims:?}")];
            says(wrong.swiglu(), &["fused-swiglu", gated, &shapes[0]]);
            if !plain.is_empty() {
                says(wrong.mlp(), &["fused-mlp", plain, &shapes[0]]);
            }
        }
    }
    says(with(&|a| a.up = zeros(&[7, 4]))?.swiglu(), &["fused-swiglu: up weight: expected shape [8, 4], found [7, 4]"]);

    let vectors: [(&str, &str, Set, usize); 3] = [
        ("fc1 bias", "gate bias", |a, t| a.gate_bias = Some(t), 8),
        ("", "up bias", |a, t| a.up_bias = Some(t), 8),
        ("fc2 bias", "down bias", |a, t| a.down_bias = Some(t), 5),
    ];
    for (plain, gated, set, len) in vectors {
        for dims in [vec![], vec![len - 1], vec![1], vec![0], vec![1, len], vec![len, 1]] {
            let wrong = with(&|a| set(a, zeros(&dims)))?;
            let shapes = format!("expected shape [{len}], found {dims:?}");
            says(wrong.swiglu(), &["fused-swiglu", gated, &shapes]);
            if !plain.is_empty() {
                says(wrong.mlp(), &["fused-mlp", plain, &shapes]);
            }
        }
    }
    Ok(())
}
test_device!(shapes, shapes_cpu, shapes_gpu, shapes_metal);

fn packed_shapes(device: &Device) -> Result<()> {
    let zeros = |dims: &[usize]| zeros(dims, DType::F32, device);
    let call = |weight: &[usize], bias: Option<&[usize]>| {
        let linear = Linear::new(zeros(weight)?, bias.map(zeros).transpose()?);
        let down = Linear::new(zeros(&[5, 8])?, None);
        let gate_up = GateUp::Packed { linear, order: PackedOrder::UpGate };
        fused_swiglu(&zeros(&[3, 4])?, &gate_up, &down, Activation::Silu)
    };
    assert_eq!(call(&[16, 4], Some(&[16]))?.dims(), [3, 5]);
    let name = "fused-swiglu: packed gate and up";
    says(call(&[15, 4], None), &[name, "even number of rows", "found shape [15, 4]"]);
    says(call(&[], None), &[name, "weight: expected shape [out_features, 4], found []"]);
    says(call(&[16], None), &[name, "weight: expected shape [out_features, 4], found [16]"]);
    says(call(&[16, 4, 1], None), &[name, "weight: expected shape [out_features, 4], found [16, 4, 1]"]);
    says(call(&[16, 5], None), &[name, "weight: expected shape [out_features, 4], found [16, 5]"]);
    says(call(&[16, 4], Some(&[8])), &[name, "bias: expected shape [16], found [8]"]);
    says(call(&[16, 4], Some(&[17])), &[name, "bias: expected shape [16], found [17]"]);
    says(call(&[18, 4], None), &["fused-swiglu: down weight: expected shape [out_features, 9], found [5, 8]"]);
    Ok(())
}
test_device!(packed_shapes, packed_shapes_cpu, packed_shapes_gpu, packed_shapes_metal);

fn dtypes(device: &Device) -> Result<()> {
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64, DType::F8E4M3] {
        let wrong = Arguments::with(device, |a| a.xs = zeros(&[3, 4], dtype, device).unwrap())?;
        let found = format!("found {}", dtype.as_str());
        says(wrong.mlp(), &["fused-mlp: xs: expected dtype f32, f16, bf16 or f64", &found]);
        says(wrong.swiglu(), &["fused-swiglu: xs: expected dtype f32, f16, bf16 or f64", &found]);
    }
    let arguments: [(&str, &str, Get); 7] = [
        ("fc1 weight", "gate weight", |a| &mut a.gate),
        ("fc1 bias", "gate bias", |a| a.gate_bias.as_mut().unwrap()),
        ("", "up weight", |a| &mut a.up),
        ("", "up bias", |a| a.up_bias.as_mut().unwrap()),
        ("fc2 weight", "down weight", |a| &mut a.down),
        ("fc2 bias", "down bias", |a| a.down_bias.as_mut().unwrap()),
        ("fc1 weight", "gate weight", |a| &mut a.xs),
    ];
    for dtype in [DType::F16, DType::BF16, DType::F64, DType::U32] {
        for (i, (plain, gated, argument)) in arguments.into_iter().enumerate() {
            let is_xs = i == 6;
            if is_xs && dtype == DType::U32 {
                continue;
            }
            let mut wrong = Arguments::new(device)?;
            let tensor = argument(&mut wrong);
            *tensor = tensor.to_dtype(dtype)?;
            let (expected, found) = if is_xs { (dtype, DType::F32) } else { (DType::F32, dtype) };
            let text = format!("expected dtype {} as xs has, found {}", expected.as_str(), found.as_str());
            says(wrong.swiglu(), &["fused-swiglu", gated, &text]);
            if !plain.is_empty() {
                says(wrong.mlp(), &["fused-mlp", plain, &text]);
            }
        }
    }
    Ok(())
}
test_device!(dtypes, dtypes_cpu, dtypes_gpu, dtypes_metal);

#[test]
fn activations() -> Result<()> {
    let (gate_up, down) = Arguments::new(&Device::Cpu)?.layers();
    let (gate, _) = gate_up.split()?;
    let xs = zeros(&[3, 4], DType::F32, &Device::Cpu)?;
    let expected = ["activation: expected an elementwise function, found Swiglu", "use FusedSwiGlu"];
    says(fused_mlp(&xs, &gate, &down, candle_nn::Activation::Swiglu), &expected);
    says(fused_swiglu(&xs, &gate_up, &down, candle_nn::Activation::Swiglu), &expected);
    says(Plan::of_mlp(&xs, &gate, &down, candle_nn::Activation::Swiglu), &expected);
    Ok(())
}

#[test]
fn tiers_that_the_processor_lacks() -> Result<()> {
    for tier in Tier::ALL {
        let ran = tier.with(|| Ok(Tier::current()));
        match tier.is_available() {
            true => assert_eq!(ran?, tier),
            false => says(ran, &["cpu: expected a tier that this processor has", tier.name()]),
        }
    }
    // An error or a tier within does not change what runs afterwards.
    let best = Tier::current();
    assert!(Tier::Plain.with(|| candle_core::bail!("inner") as Result<()>).is_err());
    assert_eq!(Tier::current(), best);
    let nested = Tier::Plain.with(|| Ok((best.with(|| Ok(Tier::current()))?, Tier::current())))?;
    assert_eq!(nested, (best, Tier::Plain));
    assert_eq!(Tier::current(), best);
    Ok(())
}

/// Views that say that they are larger than any memory, by a stride of 0.
#[test]
fn sizes_beyond_memory() -> Result<()> {
    let device = &Device::Cpu;
    let f32 = |dims: &[usize]| zeros(dims, DType::F32, device);
    let broadcast = |from: &[usize], to: &[usize]| f32(from)?.broadcast_as(to);
    let call = |xs: &Tensor, gate: &Tensor, down: &Tensor, part: &str| -> Result<()> {
        let (fc1, fc2) = (Linear::new(gate.clone(), None), Linear::new(down.clone(), None));
        says(fused_mlp(xs, &fc1, &fc2, Activation::Silu), &["fused-mlp: ", part, "found"]);
        let gate_up = GateUp::Separate { gate: fc1.clone(), up: fc1 };
        says(fused_swiglu(xs, &gate_up, &fc2, Activation::Silu), &["fused-swiglu: ", part, "found"]);
        Ok(())
    };
    let (gate, down) = (f32(&[8, 64])?, f32(&[64, 8])?);
    let count = "xs: expected a tensor whose element count fits in usize";
    let output = "expected an output that fits in memory";
    for (dims, part) in [
        (&[usize::MAX, 64][..], count),
        (&[usize::MAX / 64 + 1, 64], count),
        (&[1 << 32, 1 << 32, 64], count),
        (&[usize::MAX, 2, 0, 64], count),
        (&[0, usize::MAX, 2, 64], count),
        (&[2, usize::MAX, 0, 3, 64], count),
        (&[usize::MAX / 64, 64], output),
        (&[1 << 50, 64], output),
        (&[1 << 40, 64], output),
        (&[1 << 20, 1 << 20, 64], output),
    ] {
        call(&broadcast(&[1, 64], dims)?, &gate, &down, part)?;
    }
    // One stride does not describe these, so they are to be copied.
    let slices = f32(&[2, 1, 64])?.broadcast_as(&[2, 1 << 40, 64])?;
    call(&slices, &gate, &down, "xs: expected a tensor whose contiguous copy fits in memory")?;
    let twice = broadcast(&[2, 1, 64], &[2, usize::MAX / 64, 64])?;
    call(&twice, &gate, &down, count)?;
    // x has a size, the output has none.
    let (narrow, wide) = (f32(&[8, 1])?, f32(&[64, 8])?);
    call(&broadcast(&[1, 1], &[usize::MAX / 32, 1])?, &narrow, &wide, output)?;
    call(&broadcast(&[1, 1], &[0, usize::MAX / 32, 1])?, &narrow, &wide, output)?;
    // Weights: more rows or columns than can be counted in bytes.
    let one = f32(&[1, 1])?;
    call(&one, &broadcast(&[1, 1], &[8, 1])?, &broadcast(&[1, 8], &[usize::MAX, 8])?, "dimensions of at most")?;
    call(&one, &broadcast(&[1, 1], &[8, 1])?, &broadcast(&[1, 8], &[1 << 50, 8])?, output)?;
    let rows = usize::MAX - 2;
    call(&one, &broadcast(&[1, 1], &[rows, 1])?, &broadcast(&[1, 1], &[1, rows])?, "dimensions of at most")?;
    let xs = broadcast(&[1, 1], &[1, rows])?;
    call(&xs, &f32(&[0, rows])?, &f32(&[5, 0])?, "dimensions of at most")?;
    // A token count of zero stays zero however large the others are.
    let empty = broadcast(&[0, 1, 64], &[0, 1 << 40, 64])?;
    let (fc1, fc2) = (Linear::new(gate, None), Linear::new(down, None));
    assert_eq!(fused_mlp(&empty, &fc1, &fc2, Activation::Silu)?.dims(), [0, 1 << 40, 64]);
    Ok(())
}

/// Dimensions of size zero: no tokens, or sums without terms.
fn empty(device: &Device) -> Result<()> {
    let random = &mut Random::new(3);
    for dtype in DTYPES {
        for (leading, (hidden, intermediate, out)) in [
            (&[0][..], (4, 8, 5)),
            (&[2, 0, 3], (4, 8, 5)),
            (&[3, 0], (4, 8, 5)),
            (&[0], (0, 0, 0)),
            (&[], (0, 8, 5)),
            (&[3], (0, 8, 5)),
            (&[40], (0, 8, 5)),
            (&[], (4, 0, 5)),
            (&[3], (4, 0, 5)),
            (&[40], (4, 0, 50)),
            (&[3], (0, 0, 5)),
            (&[3], (4, 8, 0)),
            (&[40], (4, 8, 0)),
            (&[], (0, 0, 0)),
        ] {
            for biases in [[false; 3], [true; 3], [true, false, false], [false, false, true]] {
                let dims = |last| [leading, &[last]].concat();
                let xs = random.normal(&dims(hidden), 1., dtype, device)?;
                let gate = random.linear((intermediate, hidden), biases[0], dtype, device)?;
                let up = random.linear((intermediate, hidden), biases[1], dtype, device)?;
                let down = random.linear((out, intermediate), biases[2], dtype, device)?;
                let gate_up = GateUp::Separate { gate: gate.clone(), up: up.clone() };
                let mut found = Vec::new();
                for tier in tiers(device) {
                    let both = tier.with(|| {
                        let plain = fused_mlp(&xs, &gate, &down, Activation::Silu)?;
                        Ok([plain, fused_swiglu(&xs, &gate_up, &down, Activation::Silu)?])
                    })?;
                    found.push((tier, both));
                }

                let (xs, gate, up, down) = (xs.to_device(&Device::Cpu)?, host(&gate)?, host(&up)?, host(&down)?);
                let tokens = leading.iter().product::<usize>();
                // An empty sum is zero: the hidden layer is made of biases, the output of the hidden layer's.
                let bias = |linear: &Linear, features: usize| match linear.bias() {
                    Some(bias) => bias.to_dtype(DType::F64)?.broadcast_as((tokens, features))?.contiguous(),
                    None => Tensor::zeros((tokens, features), DType::F64, &Device::Cpu),
                };
                let first = |linear: &Linear| match hidden {
                    0 => bias(linear, intermediate),
                    _ => cast(linear, DType::F64)
                        .and_then(|linear| candle_core::Module::forward(&linear, &matrix(&xs)?.to_dtype(DType::F64)?)),
                };
                let second = |hidden: Tensor| match intermediate {
                    0 => bias(&down, out),
                    _ => candle_core::Module::forward(&cast(&down, DType::F64)?, &hidden),
                };
                let gated = (first(&gate)?.silu()? * first(&up)?)?;
                let exact = [second(first(&gate)?.silu()?)?, second(gated)?];
                for (tier, found) in found {
                    for (found, exact) in found.iter().zip(&exact) {
                        let case = format!("{dtype:?} {tier} {leading:?} {hidden} {intermediate} {out} {biases:?}");
                        assert_eq!((found.dims(), found.dtype()), (&dims(out)[..], dtype), "{case}");
                        let error = relative_error(found, exact)?;
                        assert!(error <= tolerance(dtype), "{case}: {error:e}");
                    }
                }
            }
        }
    }
    Ok(())
}
test_device!(empty, empty_cpu, empty_gpu, empty_metal);
