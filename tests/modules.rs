//! The modules: what they are made from, what they refuse, and training.

mod common;

use candle_core::{test_device, DType, Device, Module, Result, Tensor, Var};
use candle_fused_mlp::{
    fused_mlp, fused_swiglu, reference, Activation, Bias, FusedMlp, FusedSwiGlu, GateUp, Naming, PackedOrder, Plan,
};
use candle_nn::{AdamW, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use common::*;
use std::collections::HashMap;

fn from_a_models_layers(device: &Device) -> Result<()> {
    let random = &mut Random::new(1);
    for bias in [false, true] {
        let xs = random.normal(&[2, 3, 24], 1., DType::F64, device)?;
        let gate = random.linear((40, 24), bias, DType::F64, device)?;
        let up = random.linear((40, 24), !bias, DType::F64, device)?;
        let down = random.linear((24, 40), bias, DType::F64, device)?;

        let module = FusedSwiGlu::from_linears(&gate, &up, &down)?;
        let hidden = (gate.forward(&xs)?.silu()? * up.forward(&xs)?)?;
        assert!(relative_error(&module.forward(&xs)?, &down.forward(&hidden)?)? <= 1e-12);
        assert_eq!((module.hidden_size(), module.intermediate_size(), module.out_features()), (24, 40, 24));
        assert_eq!(module.activation(), Activation::Silu);
        assert_eq!(module.down().weight().id(), down.weight().id());
        let GateUp::Separate { gate: held_gate, up: held_up } = module.gate_up() else { panic!() };
        assert_eq!(held_gate.weight().id(), gate.weight().id());
        assert_eq!(held_up.weight().id(), up.weight().id());

        assert_eq!(module.plan(&xs)?, Plan::of_swiglu(&xs, module.gate_up(), &down, Activation::Silu)?);
        let workload = module.plan(&xs)?.workload;
        assert_eq!((workload.tokens, workload.gate_bias, workload.up_bias), (6, bias, !bias));

        let geglu = module.clone().with_activation(candle_nn::Activation::NewGelu)?;
        assert_eq!(geglu.activation(), Activation::GeluTanh);
        let hidden = (gate.forward(&xs)?.gelu()? * up.forward(&xs)?)?;
        assert!(relative_error(&geglu.forward(&xs)?, &down.forward(&hidden)?)? <= 1e-12);

        let up = random.linear((40, 24), bias, DType::F64, device)?;
        let exact = down.forward(&(gate.forward(&xs)?.silu()? * up.forward(&xs)?)?)?;
        for order in [PackedOrder::GateUp, PackedOrder::UpGate] {
            let GateUp::Packed { linear, .. } = packed(&gate, &up, order)? else { panic!() };
            let module = FusedSwiGlu::from_packed(&linear, order, &down)?;
            assert!(relative_error(&module.forward(&xs)?, &exact)? <= 1e-12, "{order:?}");
            assert_eq!((module.hidden_size(), module.intermediate_size(), module.out_features()), (24, 40, 24));
        }
        let (gate, up) = (Linear::new(gate.weight().clone(), None), Linear::new(up.weight().clone(), None));
        let down = Linear::new(down.weight().clone(), None);
        let parts = (gate.weight().clone(), up.weight().clone(), down.weight().clone());
        let module = FusedSwiGlu::new(parts.0, parts.1, parts.2, Activation::Relu)?;
        let exact = down.forward(&(gate.forward(&xs)?.relu()? * up.forward(&xs)?)?)?;
        assert!(relative_error(&module.forward(&xs)?, &exact)? <= 1e-12);
    }
    for (fc1_bias, fc2_bias) in [(false, false), (true, false), (false, true), (true, true)] {
        let xs = random.normal(&[5, 24], 1., DType::F64, device)?;
        let fc1 = random.linear((40, 24), fc1_bias, DType::F64, device)?;
        let fc2 = random.linear((10, 40), fc2_bias, DType::F64, device)?;
        let exact = fc2.forward(&fc1.forward(&xs)?.gelu_erf()?)?;
        let (w1, w2) = (fc1.weight().clone(), fc2.weight().clone());
        let modules = [
            FusedMlp::from_linears(&fc1, &fc2, candle_nn::Activation::Gelu)?,
            FusedMlp::new(w1, fc1.bias().cloned(), w2, fc2.bias().cloned(), Activation::Gelu)?,
        ];
        for module in modules {
            assert!(relative_error(&module.forward(&xs)?, &exact)? <= 1e-12);
            assert_eq!((module.hidden_size(), module.intermediate_size(), module.out_features()), (24, 40, 10));
            assert_eq!(module.activation(), Activation::Gelu);
            let workload = module.plan(&xs)?.workload;
            assert_eq!(workload, Plan::of_mlp(&xs, &fc1, &fc2, Activation::Gelu)?.workload);
            assert_eq!((workload.out_features, workload.gate_bias, workload.down_bias), (10, fc1_bias, fc2_bias));
            assert_eq!(module.fc1().weight().id(), fc1.weight().id());
            assert_eq!(module.fc2().weight().id(), fc2.weight().id());
            assert_eq!(module.fc2().bias().map(|b| b.id()), fc2.bias().map(|b| b.id()));
            assert!(format!("{:?}", module.clone()).contains("activation: Gelu"));
        }
    }
    Ok(())
}
test_device!(from_a_models_layers, from_a_models_layers_cpu, from_a_models_layers_gpu, from_a_models_layers_metal);

/// GPT-2 keeps `[in_features, out_features]`: transposed views go in as they are.
fn transposed_weights(device: &Device) -> Result<()> {
    let random = &mut Random::new(2);
    for dtype in DTYPES {
        let xs = random.normal(&[6, 24], 1., dtype, device)?;
        let (c_fc, c_fc_bias) =
            (random.normal(&[24, 96], 0.2, dtype, device)?, random.normal(&[96], 0.2, dtype, device)?);
        let (c_proj, c_proj_bias) =
            (random.normal(&[96, 24], 0.1, dtype, device)?, random.normal(&[24], 0.2, dtype, device)?);
        let module = FusedMlp::new(
            c_fc.t()?,
            Some(c_fc_bias.clone()),
            c_proj.t()?,
            Some(c_proj_bias.clone()),
            candle_nn::Activation::GeluPytorchTanh,
        )?;
        let wide = |t: &Tensor| t.to_dtype(DType::F64);
        let hidden = wide(&xs)?.matmul(&wide(&c_fc)?)?.broadcast_add(&wide(&c_fc_bias)?)?.gelu()?;
        let exact = hidden.matmul(&wide(&c_proj)?)?.broadcast_add(&wide(&c_proj_bias)?)?;
        for tier in tiers(device) {
            let error = relative_error(&tier.with(|| module.forward(&xs))?, &exact)?;
            assert!(error <= tolerance(dtype), "{dtype:?} {tier}: {error:e}");
        }
    }
    Ok(())
}
test_device!(transposed_weights, transposed_weights_cpu, transposed_weights_gpu, transposed_weights_metal);

#[test]
fn wrong_tensors_are_named() -> Result<()> {
    let zeros = |dims: &[usize], dtype: DType| Tensor::zeros(dims, dtype, &Device::Cpu);
    let f32 = |dims: &[usize]| zeros(dims, DType::F32);
    let linear = |dims: &[usize]| Ok::<_, candle_core::Error>(Linear::new(f32(dims)?, None));
    let says = |result: Result<String>, parts: &[&str]| {
        let error = result.expect_err(&format!("{parts:?}")).to_string();
        for part in parts {
            assert!(error.contains(part), "expected {part:?} in: {error}");
        }
    };
    let mlp = |w1: Tensor, b1: Option<Tensor>, w2: Tensor, b2: Option<Tensor>| {
        FusedMlp::new(w1, b1, w2, b2, Activation::Relu).map(|m| format!("{m:?}"))
    };
    says(
        mlp(f32(&[])?, None, f32(&[4, 8])?, None),
        &["FusedMlp: fc1 weight", "[intermediate_size, hidden_size]", "[]"],
    );
    says(mlp(f32(&[8])?, None, f32(&[4, 8])?, None), &["fc1 weight", "found [8]"]);
    says(mlp(f32(&[1, 8, 4])?, None, f32(&[4, 8])?, None), &["fc1 weight", "found [1, 8, 4]"]);
    says(mlp(f32(&[8, 4])?, None, f32(&[4, 9])?, None), &["fc2 weight", "[out_features, 8]", "[4, 9]"]);
    says(mlp(f32(&[8, 4])?, None, f32(&[8])?, None), &["fc2 weight", "found [8]"]);
    says(mlp(f32(&[8, 4])?, Some(f32(&[7])?), f32(&[4, 8])?, None), &["fc1 bias", "[8]", "[7]"]);
    says(mlp(f32(&[8, 4])?, None, f32(&[4, 8])?, Some(f32(&[1, 4])?)), &["fc2 bias", "[4]", "[1, 4]"]);
    says(mlp(f32(&[8, 4])?, None, zeros(&[4, 8], DType::F16)?, None), &["fc2 weight", "dtype f32", "f16"]);
    says(mlp(f32(&[8, 4])?, Some(zeros(&[8], DType::F64)?), f32(&[4, 8])?, None), &["fc1 bias", "f32", "f64"]);
    says(mlp(zeros(&[8, 4], DType::U8)?, None, f32(&[4, 8])?, None), &["fc1 weight", "f32, f16, bf16 or f64", "u8"]);

    let swiglu = |gate: &[usize], up: &[usize], down: &[usize]| {
        FusedSwiGlu::from_linears(&linear(gate)?, &linear(up)?, &linear(down)?).map(|m| format!("{m:?}"))
    };
    says(swiglu(&[8], &[8, 4], &[4, 8]), &["FusedSwiGlu: gate weight", "found [8]"]);
    says(swiglu(&[8, 4], &[8, 5], &[4, 8]), &["up weight", "[8, 4]", "[8, 5]"]);
    says(swiglu(&[8, 4], &[9, 4], &[4, 8]), &["up weight", "[8, 4]", "[9, 4]"]);
    says(swiglu(&[8, 4], &[8, 4], &[8, 4]), &["down weight", "[out_features, 8]", "[8, 4]"]);
    let packed = |gate_up: Linear, down: &[usize]| {
        FusedSwiGlu::from_packed(&gate_up, PackedOrder::GateUp, &linear(down)?).map(|m| format!("{m:?}"))
    };
    says(packed(linear(&[15, 4])?, &[4, 8]), &["packed gate and up", "even number of rows", "[15, 4]"]);
    says(packed(linear(&[])?, &[4, 8]), &["packed gate and up", "[]"]);
    says(packed(linear(&[16])?, &[4, 8]), &["gate weight", "found [8]"]);
    says(packed(linear(&[16, 4])?, &[4, 16]), &["down weight", "[out_features, 8]", "[4, 16]"]);
    says(packed(Linear::new(f32(&[16, 4])?, Some(f32(&[8])?)), &[4, 8]), &["gate bias", "[8]", "[4]"]);

    let swiglu = candle_nn::Activation::Swiglu;
    let error = FusedMlp::from_linears(&linear(&[8, 4])?, &linear(&[4, 8])?, swiglu).map(|m| format!("{m:?}"));
    says(error, &["elementwise", "FusedSwiGlu"]);
    let module = FusedSwiGlu::from_linears(&linear(&[8, 4])?, &linear(&[8, 4])?, &linear(&[4, 8])?)?;
    says(module.clone().with_activation(swiglu).map(|m| format!("{m:?}")), &["elementwise"]);
    says(module.plan(&f32(&[2, 5])?).map(|plan| plan.to_string()), &["fused-swiglu", "[out_features, 5]", "[8, 4]"]);
    says(module.forward(&f32(&[2, 5])?).map(|y| format!("{y:?}")), &["fused-swiglu", "[out_features, 5]", "[8, 4]"]);
    Ok(())
}

const HIDDEN: usize = 12;
const INTERMEDIATE: usize = 32;

/// The model without this crate: the formula of `naming`'s family on its own variables.
fn unfused(naming: &Naming, activation: Activation, vb: &VarBuilder, xs: &Tensor) -> Result<Tensor> {
    let layer = |name: &str, rows: usize, cols: usize| {
        let vb = vb.pp(name);
        let weight = match naming.is_transposed() {
            true => vb.get((cols, rows), "weight")?.t()?,
            false => vb.get((rows, cols), "weight")?,
        };
        let bias = if vb.contains_tensor("bias") { Some(vb.get(rows, "bias")?) } else { None };
        Ok::<_, candle_core::Error>(Linear::new(weight, bias))
    };
    let names = naming.layers();
    let second = layer(names[names.len() - 1], HIDDEN, INTERMEDIATE)?;
    if !naming.is_gated() {
        return reference::mlp(xs, &layer(names[0], INTERMEDIATE, HIDDEN)?, &second, activation);
    }
    let gate_up = match naming.order() {
        Some(order) => GateUp::Packed { linear: layer(names[0], 2 * INTERMEDIATE, HIDDEN)?, order },
        None => GateUp::Separate {
            gate: layer(names[0], INTERMEDIATE, HIDDEN)?,
            up: layer(names[1], INTERMEDIATE, HIDDEN)?,
        },
    };
    reference::swiglu(xs, &gate_up, &second, activation)
}

/// A copy of the variables, which trains apart.
fn copied(variables: &VarMap) -> Result<VarMap> {
    let copies = VarMap::new();
    for (name, variable) in variables.data().lock().unwrap().iter() {
        copies.data().lock().unwrap().insert(name.clone(), Var::from_tensor(&variable.as_tensor().copy()?)?);
    }
    Ok(copies)
}

/// The losses over some steps of AdamW, in which `model` learns `targets`.
fn losses(
    variables: &VarMap,
    (xs, targets): (&Tensor, &Tensor),
    model: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Vec<f64>> {
    let params = ParamsAdamW { lr: 0.02, ..Default::default() };
    let mut optimizer = AdamW::new(variables.all_vars(), params)?;
    (0..40)
        .map(|_| {
            let loss = (model(xs)? - targets)?.sqr()?.mean_all()?;
            let gradients = loss.backward()?;
            for (name, variable) in variables.data().lock().unwrap().iter() {
                let gradient = gradients.get(variable.as_tensor());
                let gradient = values(gradient.unwrap_or_else(|| panic!("{name} has no gradient")))?;
                assert!(gradient.iter().any(|g| *g != 0.), "{name}'s gradient is zero");
            }
            optimizer.step(&gradients)?;
            loss.to_dtype(DType::F64)?.to_scalar::<f64>()
        })
        .collect()
}

/// The fused module and an unfused model, from the same values, through the same training.
fn trains_as_unfused(device: &Device) -> Result<()> {
    let namings = [
        Naming::LLAMA,
        Naming::LLAMA.with_bias(Bias::Required, Bias::Required),
        Naming::NOMIC_BERT.with_bias(Bias::Required, Bias::Absent),
        Naming::PHI3,
        Naming::PHI3.with_bias(Bias::Required, Bias::Required),
        Naming::STELLA,
        Naming::FC1_FC2.with_bias(Bias::Absent, Bias::Absent),
        Naming::BERT,
        Naming::GPT2,
    ];
    let activations = [Activation::Silu, Activation::Gelu, Activation::GeluTanh];
    let kinds = [(DType::F64, 0), (DType::F64, 1), (DType::F64, 2), (DType::F32, 0)];
    for (seed, naming) in namings.into_iter().enumerate() {
        for (dtype, activation) in kinds {
            let random = &mut Random::new(20 + seed as u64);
            let activation = activations[activation];
            let xs = random.normal(&[4, 8, HIDDEN], 1., dtype, device)?;
            let targets = (xs.sin()? * random.normal(&[HIDDEN], 1., dtype, device)?.broadcast_as(xs.shape())?)?;

            let variables = VarMap::new();
            let vb = VarBuilder::from_varmap(&variables, dtype, device).pp("mlp");
            let module: Box<dyn Module> = if naming.is_gated() {
                Box::new(fused_swiglu(HIDDEN, INTERMEDIATE, activation, &naming, vb)?)
            } else {
                Box::new(fused_mlp(HIDDEN, INTERMEDIATE, activation, &naming, vb)?)
            };
            let mut names: Vec<String> = variables.data().lock().unwrap().keys().cloned().collect();
            names.sort();
            for name in names {
                let variable = variables.data().lock().unwrap()[&name].clone();
                variable.set(&random.normal(variable.dims(), 0.3, dtype, device)?)?;
            }
            let copies = copied(&variables)?;
            let vb = VarBuilder::from_varmap(&copies, dtype, device).pp("mlp");

            let fused = losses(&variables, (&xs, &targets), |xs| module.forward(xs))?;
            let expected = losses(&copies, (&xs, &targets), |xs| unfused(&naming, activation, &vb, xs))?;
            assert!(expected[39] < 0.2 * expected[0], "{naming}: nothing was learnt: {expected:?}");
            // candle's derivatives of both GELUs have constants of six digits.
            let tolerance = match (dtype, activation) {
                (DType::F64, Activation::Silu) => 1e-12,
                _ => 1e-5,
            };
            for (step, (f, e)) in fused.iter().zip(&expected).enumerate() {
                assert!((f - e).abs() <= tolerance * e, "{naming} {dtype:?}, step {step}: {f} {e}");
            }
        }
    }
    Ok(())
}
test_device!(trains_as_unfused, trains_as_unfused_cpu, trains_as_unfused_gpu, trains_as_unfused_metal);

/// Fine-tuning: of a model's layers some parameters are variables, the others are frozen.
fn some_parameters_train(device: &Device) -> Result<()> {
    let random = &mut Random::new(40);
    let xs = random.normal(&[9, HIDDEN], 1., DType::F64, device)?;
    let mut tensors = HashMap::new();
    for (name, dims) in [
        ("gate", vec![INTERMEDIATE, HIDDEN]),
        ("gate bias", vec![INTERMEDIATE]),
        ("up", vec![INTERMEDIATE, HIDDEN]),
        ("up bias", vec![INTERMEDIATE]),
        ("gate_up", vec![2 * INTERMEDIATE, HIDDEN]),
        ("gate_up bias", vec![2 * INTERMEDIATE]),
        ("down", vec![HIDDEN, INTERMEDIATE]),
        ("down bias", vec![HIDDEN]),
    ] {
        tensors.insert(name, random.normal(&dims, 0.3, DType::F64, device)?);
    }
    let layers = [vec!["gate", "up", "down"], vec!["gate_up", "down"]];
    for layers in layers {
        let parameters: Vec<String> =
            layers.iter().flat_map(|layer| [layer.to_string(), format!("{layer} bias")]).collect();
        for tracked in 1..1u32 << parameters.len() {
            let mut variables = Vec::new();
            let mut used = HashMap::new();
            for (i, name) in parameters.iter().enumerate() {
                let tensor = tensors[name.as_str()].clone();
                if tracked & (1 << i) != 0 {
                    let variable = Var::from_tensor(&tensor)?;
                    used.insert(name.as_str(), variable.as_tensor().clone());
                    variables.push((name, variable));
                } else {
                    used.insert(name.as_str(), tensor);
                }
            }
            let linear = |name: &str| Linear::new(used[name].clone(), Some(used[&*format!("{name} bias")].clone()));
            let down = linear("down");
            let (module, gate_up) = if layers.len() == 3 {
                let (gate, up) = (linear("gate"), linear("up"));
                (FusedSwiGlu::from_linears(&gate, &up, &down)?, GateUp::Separate { gate, up })
            } else {
                let order = PackedOrder::UpGate;
                let linear = linear("gate_up");
                (FusedSwiGlu::from_packed(&linear, order, &down)?, GateUp::Packed { linear, order })
            };
            let loss = |ys: Tensor| ys.sqr()?.sum_all()?.backward();
            let found = loss(module.forward(&xs)?)?;
            let expected = loss(reference::swiglu(&xs, &gate_up, &down, Activation::Silu)?)?;
            assert!(found.get(&xs).is_none());
            for (name, variable) in &variables {
                let (Some(found), Some(expected)) = (found.get(variable), expected.get(variable)) else {
                    panic!("{name} of {tracked:08b}: no gradient");
                };
                let error = relative_error(found, expected)?;
                assert!(error <= 1e-12, "{name} of {tracked:08b}: {error:e}");
            }
        }
    }
    Ok(())
}
test_device!(some_parameters_train, some_parameters_train_cpu, some_parameters_train_gpu, some_parameters_train_metal);

/// What is written into a layer's variable after the module was made is what the module computes with.
fn a_step_is_never_missed(device: &Device) -> Result<()> {
    let random = &mut Random::new(41);
    let xs = random.normal(&[3, HIDDEN], 1., DType::F64, device)?;
    let gate_up = Var::from_tensor(&random.normal(&[2 * INTERMEDIATE, HIDDEN], 0.3, DType::F64, device)?)?;
    let down = random.linear((HIDDEN, INTERMEDIATE), true, DType::F64, device)?;
    let linear = Linear::new(gate_up.as_tensor().clone(), None);
    let module = FusedSwiGlu::from_packed(&linear, PackedOrder::GateUp, &down)?;
    let before = module.forward(&xs)?;
    gate_up.set(&random.normal(&[2 * INTERMEDIATE, HIDDEN], 0.3, DType::F64, device)?)?;
    let after = module.forward(&xs)?;
    assert!(relative_error(&after, &before)? > 0.1);
    let exact = reference::swiglu(&xs, module.gate_up(), &down, Activation::Silu)?;
    assert!(relative_error(&after, &exact)? <= 1e-12);
    Ok(())
}
test_device!(
    a_step_is_never_missed,
    a_step_is_never_missed_cpu,
    a_step_is_never_missed_gpu,
    a_step_is_never_missed_metal
);
