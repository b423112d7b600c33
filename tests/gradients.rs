//! The backward pass: against differences of the forward pass in f64, and against candle's own of the unfused twins.

mod common;

use candle_core::backprop::GradStore;
use candle_core::{test_device, DType, Device, Result, Tensor, Var};
use candle_fused_mlp::ops::{fused_mlp, fused_swiglu};
use candle_fused_mlp::{reference, Activation, GateUp, PackedOrder};
use candle_nn::Linear;
use common::*;
use std::process::Command;

/// `Σ y c` with fixed c that differ (each a bf16): a loss with a gradient of every size for y.
fn loss(ys: &Tensor) -> Result<Tensor> {
    let weights: Vec<f64> = (0..ys.elem_count()).map(|i| (i as f64 * 0.7 + 0.3).sin()).collect();
    let weights = Tensor::from_vec(weights, ys.shape(), ys.device())?.to_dtype(DType::BF16)?.to_dtype(ys.dtype())?;
    (ys * weights)?.sum_all()
}

/// Checks the gradient of every leaf by central differences of the loss, in f64.
fn check_by_differences(name: &str, leaves: &[Tensor], model: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    let variables: Vec<Var> = leaves.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let tracked: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
    let gradients = loss(&model(&tracked)?)?.backward()?;
    let at = |leaf: usize, moved: &[f64]| -> Result<f64> {
        let mut leaves = leaves.to_vec();
        leaves[leaf] = Tensor::from_slice(moved, leaves[leaf].shape(), leaves[leaf].device())?;
        loss(&model(&leaves)?)?.to_scalar()
    };
    for (leaf, variable) in variables.iter().enumerate() {
        let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{name}: leaf {leaf} has no gradient"));
        assert_eq!(gradient.shape(), variable.shape());
        let (gradient, point) = (values(gradient)?, values(&leaves[leaf])?);
        for i in 0..point.len() {
            let step = 1e-5;
            let mut moved = point.clone();
            moved[i] = point[i] + step;
            let above = at(leaf, &moved)?;
            moved[i] = point[i] - step;
            let measured = (above - at(leaf, &moved)?) / (2. * step);
            let error = (measured - gradient[i]).abs();
            assert!(error <= 1e-7 * measured.abs().max(1.), "{name}, leaf {leaf}, {i}: {measured} {}", gradient[i]);
        }
    }
    Ok(())
}

const HIDDEN: usize = 4;
const INTERMEDIATE: usize = 5;
const OUT: usize = 3;

/// Takes leaves one after the other as the layers of an MLP.
struct Leaves<'a>(std::slice::Iter<'a, Tensor>);

impl Leaves<'_> {
    fn next(&mut self) -> Tensor {
        self.0.next().unwrap().clone()
    }

    /// A weight and, where there is one, its bias.
    fn linear(&mut self, bias: bool) -> Linear {
        Linear::new(self.next(), bias.then(|| self.next()))
    }
}

fn by_differences(device: &Device) -> Result<()> {
    let random = &mut Random::new(1);
    let mut normal = |dims: &[usize]| random.normal(dims, 0.7, DType::F64, device);
    for activation in Activation::ALL {
        for biases in 0..8 {
            let has = |bit: usize| biases & (1 << bit) != 0;
            let mut leaves = vec![normal(&[2, 3, HIDDEN])?];
            let mut layer = |leaves: &mut Vec<Tensor>, rows: usize, cols: usize, bias: bool| {
                leaves.push(normal(&[rows, cols])?);
                if bias {
                    leaves.push(normal(&[rows])?);
                }
                Ok::<_, candle_core::Error>(())
            };
            layer(&mut leaves, INTERMEDIATE, HIDDEN, has(0))?;
            layer(&mut leaves, OUT, INTERMEDIATE, has(2))?;
            if !has(1) {
                check_by_differences(&format!("mlp, {activation}, biases {biases:03b}"), &leaves, |leaves| {
                    let mut leaves = Leaves(leaves.iter());
                    fused_mlp(&leaves.next(), &leaves.linear(has(0)), &leaves.linear(has(2)), *activation)
                })?;
            }
            layer(&mut leaves, INTERMEDIATE, HIDDEN, has(1))?;
            check_by_differences(&format!("swiglu, {activation}, biases {biases:03b}"), &leaves, |leaves| {
                let mut leaves = Leaves(leaves.iter());
                let (xs, gate) = (leaves.next(), leaves.linear(has(0)));
                let (down, up) = (leaves.linear(has(2)), leaves.linear(has(1)));
                fused_swiglu(&xs, &GateUp::Separate { gate, up }, &down, *activation)
            })?;
        }
    }
    Ok(())
}
test_device!(by_differences, by_differences_cpu, by_differences_gpu, by_differences_metal);

/// Views of the leaves: the gradients come through candle's own ops behind them.
fn by_differences_of_views(device: &Device) -> Result<()> {
    let random = &mut Random::new(2);
    let mut normal = |dims: &[usize]| random.normal(dims, 0.7, DType::F64, device);
    let leaves = [
        normal(&[HIDDEN, 3, 2])?,
        normal(&[HIDDEN, INTERMEDIATE])?,
        normal(&[INTERMEDIATE])?,
        normal(&[INTERMEDIATE + 2, OUT])?,
        normal(&[2 * OUT])?,
    ];
    for x in ["transposed", "broadcast", "one token"] {
        check_by_differences(&format!("mlp, x {x}"), &leaves, |leaves| {
            let xs = leaves[0].transpose(0, 2)?;
            let xs = match x {
                "transposed" => xs,
                "broadcast" => xs.narrow(1, 1, 1)?.broadcast_as((2, 3, HIDDEN))?,
                _ => xs.get(0)?.get(0)?,
            };
            let fc1 = Linear::new(leaves[1].t()?, Some(leaves[2].clone()));
            let fc2 = Linear::new(leaves[3].narrow(0, 1, INTERMEDIATE)?.t()?, Some(leaves[4].narrow(0, OUT, OUT)?));
            fused_mlp(&xs, &fc1, &fc2, Activation::Gelu)
        })?;
    }
    // Alone in its layer, a tracked tensor is read in place, whatever its strides.
    check_by_differences("mlp, lone weights", &[leaves[1].clone(), leaves[3].clone()], |weights| {
        let fc1 = Linear::new(weights[0].t()?, Some(leaves[2].clone()));
        let fc2 = Linear::new(weights[1].narrow(0, 1, INTERMEDIATE)?.t()?, None);
        fused_mlp(&leaves[0].transpose(0, 2)?, &fc1, &fc2, Activation::GeluTanh)
    })?;
    check_by_differences("mlp, lone biases", &[leaves[2].clone(), leaves[4].clone()], |biases| {
        let fc1 = Linear::new(leaves[1].t()?, Some(biases[0].clone()));
        let fc2 = Linear::new(leaves[3].narrow(0, 1, INTERMEDIATE)?.t()?, Some(biases[1].narrow(0, 1, OUT)?));
        fused_mlp(&leaves[0].transpose(0, 2)?, &fc1, &fc2, Activation::Mish)
    })?;
    // One tensor in three places: its gradients add up.
    check_by_differences("swiglu, shared", &[normal(&[HIDDEN, HIDDEN])?], |leaves| {
        let linear = Linear::new(leaves[0].clone(), None);
        let gate_up = GateUp::Separate { gate: linear.clone(), up: linear.clone() };
        fused_swiglu(&leaves[0], &gate_up, &linear, Activation::Silu)
    })?;
    for order in [PackedOrder::GateUp, PackedOrder::UpGate] {
        for bias in [false, true] {
            let mut leaves =
                vec![normal(&[3, HIDDEN])?, normal(&[HIDDEN, 2 * INTERMEDIATE])?, normal(&[OUT, INTERMEDIATE])?];
            if bias {
                leaves.push(normal(&[2 * INTERMEDIATE])?);
            }
            check_by_differences(&format!("swiglu, {order:?}, bias {bias}"), &leaves, |leaves| {
                let linear = Linear::new(leaves[1].t()?, leaves.get(3).cloned());
                let down = Linear::new(leaves[2].clone(), None);
                fused_swiglu(&leaves[0], &GateUp::Packed { linear, order }, &down, Activation::Silu)
            })?;
        }
    }
    Ok(())
}
test_device!(
    by_differences_of_views,
    by_differences_of_views_cpu,
    by_differences_of_views_gpu,
    by_differences_of_views_metal
);

/// Both ops with every parameter and x tracked, the same values in another dtype beside them.
struct Tracked {
    xs: Var,
    layers: [(Var, Var); 3],
}

impl Tracked {
    fn new(seed: u64, tokens: &[usize], [hidden, intermediate, out]: [usize; 3], device: &Device) -> Result<Self> {
        let random = &mut Random::new(seed);
        let mut layer = |rows, cols| {
            let linear = random.linear((rows, cols), true, DType::F32, device)?;
            Ok::<_, candle_core::Error>((Var::from_tensor(linear.weight())?, Var::from_tensor(linear.bias().unwrap())?))
        };
        let layers = [layer(intermediate, hidden)?, layer(intermediate, hidden)?, layer(out, intermediate)?];
        let xs = Var::from_tensor(&random.normal(&[tokens, &[hidden]].concat(), 1., DType::F32, device)?)?;
        Ok(Self { xs, layers })
    }

    fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let cast = |var: &Var| Var::from_tensor(&var.to_dtype(dtype)?);
        let [a, b, c] = &self.layers;
        let layer = |(weight, bias): &(Var, Var)| Ok::<_, candle_core::Error>((cast(weight)?, cast(bias)?));
        Ok(Self { xs: cast(&self.xs)?, layers: [layer(a)?, layer(b)?, layer(c)?] })
    }

    fn linears(&self) -> [Linear; 3] {
        let [a, b, c] = &self.layers;
        [a, b, c].map(|(weight, bias)| Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone())))
    }

    fn gradients(&self, gated: bool, fused: bool, activation: Activation) -> Result<Vec<Tensor>> {
        let [gate, up, down] = self.linears();
        let xs = self.xs.as_tensor();
        let gate_up = GateUp::Separate { gate: gate.clone(), up };
        let gradients: GradStore = loss(&match (gated, fused) {
            (false, true) => fused_mlp(xs, &gate, &down, activation)?,
            (false, false) => reference::mlp(xs, &gate, &down, activation)?,
            (true, true) => fused_swiglu(xs, &gate_up, &down, activation)?,
            (true, false) => reference::swiglu(xs, &gate_up, &down, activation)?,
        })?
        .backward()?;
        let [a, b, c] = &self.layers;
        let mut variables = vec![&self.xs, &a.0, &a.1, &c.0, &c.1];
        if gated {
            variables.extend([&b.0, &b.1]);
        }
        Ok(variables.into_iter().map(|variable| gradients.get(variable).expect("a gradient").clone()).collect())
    }
}

/// Whether the slope has jumps.
fn jumps(activation: Activation) -> bool {
    use Activation::{HardSigmoid, HardSwish, LeakyRelu, Relu, Relu6};
    matches!(activation, Relu | Relu6 | LeakyRelu(_) | HardSigmoid | HardSwish)
}

fn as_candle_has_them(device: &Device) -> Result<()> {
    for (seed, (tokens, sizes)) in
        [(&[3][..], [24, 40, 16]), (&[2, 10], [31, 33, 17]), (&[600], [16, 24, 8])].into_iter().enumerate()
    {
        for activation in Activation::ALL {
            for dtype in DTYPES {
                // Rounded to 16 bits, some preactivations fall on the other side of a slope's jump.
                if matches!(dtype, DType::F16 | DType::BF16) && jumps(*activation) {
                    continue;
                }
                let tracked = Tracked::new(seed as u64, tokens, sizes, device)?.to_dtype(dtype)?;
                let exact = tracked.to_dtype(DType::F64)?;
                // candle's derivatives of both GELUs have constants of six digits.
                let allowed = match dtype {
                    DType::F64 | DType::F32 if matches!(activation, Activation::Gelu | Activation::GeluTanh) => 1e-5,
                    DType::F64 => 1e-12,
                    DType::F32 => 3e-6,
                    DType::F16 => 2e-3,
                    _ => 1.6e-2,
                };
                for gated in [false, true] {
                    let found = tracked.gradients(gated, true, *activation)?;
                    let expected = exact.gradients(gated, false, *activation)?;
                    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        assert_eq!((found.dtype(), found.shape()), (dtype, expected.shape()));
                        let error = relative_error(found, expected)?;
                        let case = format!("{activation}, {dtype:?}, {sizes:?}, gated {gated}, gradient {i}");
                        assert!(error <= allowed, "{case}: {error:e}");
                    }
                }
            }
        }
    }
    Ok(())
}
test_device!(as_candle_has_them, as_candle_has_them_cpu, as_candle_has_them_gpu, as_candle_has_them_metal);

/// Gradients go to what is tracked and to nothing else, and the output is the same whatever is tracked.
fn only_what_is_tracked(device: &Device) -> Result<()> {
    let random = &mut Random::new(4);
    let linears = [
        random.linear((INTERMEDIATE, HIDDEN), true, DType::F64, device)?,
        random.linear((INTERMEDIATE, HIDDEN), true, DType::F64, device)?,
        random.linear((OUT, INTERMEDIATE), true, DType::F64, device)?,
    ];
    let tensors: Vec<Tensor> = std::iter::once(random.normal(&[6, HIDDEN], 1., DType::F64, device)?)
        .chain(linears.iter().flat_map(|linear| [linear.weight().clone(), linear.bias().unwrap().clone()]))
        .collect();
    for gated in [false, true] {
        for subset in 0u32..1 << tensors.len() {
            let used: Vec<Tensor> = tensors
                .iter()
                .enumerate()
                .map(|(i, tensor)| match subset & (1 << i) {
                    0 => Ok(tensor.copy()?),
                    _ => Ok(Var::from_tensor(tensor)?.as_tensor().clone()),
                })
                .collect::<Result<_>>()?;
            let linear = |i: usize| Linear::new(used[i].clone(), Some(used[i + 1].clone()));
            let gate_up = GateUp::Separate { gate: linear(1), up: linear(3) };
            let ran = |fused: bool| match (gated, fused) {
                (true, true) => fused_swiglu(&used[0], &gate_up, &linear(5), Activation::Silu),
                (true, false) => reference::swiglu(&used[0], &gate_up, &linear(5), Activation::Silu),
                (false, true) => fused_mlp(&used[0], &linear(1), &linear(5), Activation::Silu),
                (false, false) => reference::mlp(&used[0], &linear(1), &linear(5), Activation::Silu),
            };
            let (found, expected) = (ran(true)?, ran(false)?);
            assert_eq!(found.track_op(), expected.track_op(), "{subset:07b}");
            let error = relative_error(&found, &expected)?;
            assert!(error <= 1e-12, "gated {gated}, {subset:07b}: {error:e}");
            if !found.track_op() {
                continue;
            }
            let (found, expected) = (loss(&found)?.backward()?, loss(&expected)?.backward()?);
            for (i, tensor) in used.iter().enumerate() {
                let case = format!("gated {gated}, {subset:07b}, tensor {i}");
                let is_used = gated || !(3..=4).contains(&i);
                if subset & (1 << i) == 0 || !is_used {
                    assert!(found.get(tensor).is_none(), "{case}: a gradient");
                    continue;
                }
                let gradient = found.get(tensor).unwrap_or_else(|| panic!("{case}: no gradient"));
                assert!(!gradient.track_op(), "{case}: the graph of the backward pass is kept");
                let error = relative_error(gradient, expected.get(tensor).unwrap())?;
                assert!(error <= 1e-12, "{case}: {error:e}");
            }
        }
    }
    Ok(())
}
test_device!(only_what_is_tracked, only_what_is_tracked_cpu, only_what_is_tracked_gpu, only_what_is_tracked_metal);

/// Sizes of zero: gradients of the right shape, all of them zero but the output's bias's.
///
/// On the CPU alone. candle's backward pass adds each gradient to a tensor of zeros of its shape (`GradStore::or_insert` in
/// candle-core's `backprop.rs`), and on a GPU its elementwise ops launch a block for each 1024 elements, so none for none
/// (`LaunchConfig::for_num_elems` in `cuda_backend/mod.rs`), which the driver refuses. The loss of an empty result ends there
/// too. The forward passes of such sizes, in `errors.rs`, run there.
#[test]
fn empty() -> Result<()> {
    let device = &Device::Cpu;
    for dtype in DTYPES {
        for (tokens, sizes) in [
            (&[0][..], [4, 5, 3]),
            (&[2, 0], [4, 5, 3]),
            (&[6], [0, 5, 3]),
            (&[6], [4, 0, 3]),
            (&[6], [4, 5, 0]),
            (&[2, 3], [0, 0, 3]),
            (&[0], [0, 0, 0]),
        ] {
            let tracked = Tracked::new(5, tokens, sizes, device)?.to_dtype(dtype)?;
            for gated in [false, true] {
                let case = format!("{dtype:?}, {tokens:?}, {sizes:?}, gated {gated}");
                let found = tracked.gradients(gated, true, Activation::Silu)?;
                let [a, b, c] = &tracked.layers;
                for (i, variable) in [&tracked.xs, &a.0, &a.1, &c.0, &c.1, &b.0, &b.1].into_iter().enumerate() {
                    let Some(found) = found.get(i) else { continue };
                    assert_eq!((found.dtype(), found.shape()), (dtype, variable.shape()), "{case}, gradient {i}");
                    let values = values(found)?;
                    assert!(values.iter().all(|v| v.is_finite()), "{case}, gradient {i}: {values:?}");
                    // With no hidden size, gate and up are their biases.
                    let flows = tokens != [0] && tokens != [2, 0] && sizes[2] > 0;
                    let expected = match i {
                        2..=4 if sizes[0] == 0 => flows,
                        6 if sizes[0] == 0 => flows,
                        4 => flows,
                        _ => false,
                    };
                    assert_eq!(values.iter().any(|v| *v != 0.), expected && !values.is_empty(), "{case}, gradient {i}");
                }
            }
        }
    }
    Ok(())
}

const KEEP: &str = "CANDLE_GRAD_DO_NOT_DETACH";

/// Gradients of gradients, which candle has where a variable of the environment asks for them: an error, never a wrong
/// value or a missing one.
#[test]
fn second_order() -> Result<()> {
    if std::env::var_os(KEEP).is_none() {
        let program = std::env::current_exe().unwrap();
        let run = Command::new(program).args(["--exact", "second_order"]).env(KEEP, "1").output().unwrap();
        let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success() && text.contains("1 passed"), "{text}");
        return Ok(());
    }
    let tracked = Tracked::new(6, &[3], [HIDDEN, INTERMEDIATE, OUT], &Device::Cpu)?.to_dtype(DType::F64)?;
    let [gate, up, down] = tracked.linears();
    let xs = tracked.xs.as_tensor();
    let gate_up = GateUp::Separate { gate: gate.clone(), up };
    let run = |xs: &Tensor, gated: bool| match gated {
        true => fused_swiglu(xs, &gate_up, &down, Activation::Silu),
        false => fused_mlp(xs, &gate, &down, Activation::Silu),
    };
    // The gradient that reaches the op: untracked of a sum, tracked of a square's.
    let losses: [fn(&Tensor) -> Result<Tensor>; 2] = [|ys| ys.sum_all(), |ys| ys.sqr()?.sum_all()];
    for loss in losses {
        for gated in [false, true] {
            let gradients = loss(&run(xs, gated)?)?.backward()?;
            for variable in [&tracked.xs, &tracked.layers[0].0, &tracked.layers[0].1, &tracked.layers[2].0] {
                let gradient = gradients.get(variable).unwrap();
                assert!(gradient.track_op());
                let error = gradient.sqr()?.sum_all()?.backward().expect_err("an error").to_string();
                assert!(error.contains("backward is not supported for fused-mlp-hidden-gradients"), "{error}");
            }
        }
    }
    // The loss Σ y² has the second derivative 2 by each bias of y and token.
    let bias = Var::zeros(OUT, DType::F64, &Device::Cpu)?;
    let linear = |linear: &Linear| Linear::new(linear.weight().detach(), None);
    let down = Linear::new(down.weight().detach(), Some(bias.as_tensor().clone()));
    let ys = fused_mlp(&xs.detach(), &linear(&gate), &down, Activation::Silu)?;
    let gradients = ys.sqr()?.sum_all()?.backward()?;
    let second = gradients.get(&bias).unwrap().sum_all()?.backward()?;
    assert_eq!(values(second.get(&bias).unwrap())?, [6.; OUT]);
    Ok(())
}
