//! Every naming loads, by its name and by detection, out of every kind of file, and is what its family computes.

mod common;

use candle_core::{test_device, DType, Device, Module, Result, Tensor, D};
use candle_fused_mlp::{
    fused_mlp, fused_projector, fused_swiglu, Activation, Bias, FusedMlp, FusedSwiGlu, Naming, PackedOrder,
};
use candle_nn::{Linear, VarBuilder, VarMap};
use common::*;
use std::collections::HashMap;

/// What a family of models does with its tensors, written out apart from the crate's table.
enum Family {
    /// Activation of the first, times the second, through the third.
    Gated(&'static str, &'static str, &'static str),
    /// Activation of the first half of the first layer's output, times the second half.
    GateFirst(&'static str, &'static str),
    /// The first half of the first layer's output, times the activation of the second half.
    GateLast(&'static str, &'static str),
    Plain(&'static str, &'static str),
    /// Plain, with weights that x is multiplied with as they are.
    Conv1d(&'static str, &'static str),
}
use Family::*;

/// Each naming, its family and the layers that cannot do without a bias.
fn table() -> Vec<(Naming, Family, &'static [&'static str])> {
    vec![
        (Naming::LLAMA, Gated("gate_proj", "up_proj", "down_proj"), &[]),
        (Naming::MIXTRAL, Gated("w1", "w3", "w2"), &[]),
        (Naming::METAVOICE, Gated("swiglu.w1", "swiglu.w3", "w2"), &[]),
        (Naming::METAVOICE_GPT, Gated("w1", "w3", "c_proj"), &[]),
        (Naming::T5_GATED, Gated("wi_0", "wi_1", "wo"), &[]),
        (Naming::NOMIC_BERT, Gated("fc12", "fc11", "fc2"), &[]),
        (Naming::GGUF, Gated("ffn_gate", "ffn_up", "ffn_down"), &[]),
        (Naming::PHI3, GateFirst("gate_up_proj", "down_proj"), &[]),
        (Naming::STELLA, GateLast("up_gate_proj", "down_proj"), &["down_proj"]),
        (Naming::CHATGLM, GateFirst("dense_h_to_4h", "dense_4h_to_h"), &[]),
        (Naming::GRANITE_HYBRID, GateFirst("input_linear", "output_linear"), &[]),
        (Naming::BASED, GateLast("fc1", "fc2"), &[]),
        (Naming::MODERN_BERT, GateFirst("Wi", "Wo"), &[]),
        (Naming::JINA_BERT, GateFirst("gated_layers", "wo"), &["wo"]),
        (Naming::MIMI, GateFirst("linear_in", "linear_out"), &[]),
        (Naming::DIFFUSERS, GateLast("net.0.proj", "net.2"), &[]),
        (Naming::NV_EMBED, GateLast("net.0", "net.2"), &[]),
        (Naming::GGUF_PACKED, GateFirst("ffn_up", "ffn_down"), &[]),
        (Naming::FC1_FC2, Plain("fc1", "fc2"), &[]),
        (Naming::OPEN_CLIP, Plain("c_fc", "c_proj"), &[]),
        (Naming::GPT2, Conv1d("c_fc", "c_proj"), &["c_fc", "c_proj"]),
        (Naming::GPT_J, Plain("fc_in", "fc_out"), &[]),
        (Naming::GPT_NEOX, Plain("dense_h_to_4h", "dense_4h_to_h"), &[]),
        (Naming::BERT, Plain("intermediate.dense", "output.dense"), &["intermediate.dense", "output.dense"]),
        (Naming::DISTIL_BERT, Plain("lin1", "lin2"), &["lin1", "lin2"]),
        (Naming::QWEN_VISION, Plain("linear_fc1", "linear_fc2"), &[]),
        (Naming::T5, Plain("wi", "wo"), &[]),
        (Naming::MPT, Plain("up_proj", "down_proj"), &[]),
        (Naming::SEQUENTIAL, Plain("0", "2"), &[]),
        (Naming::PROJECTOR, Plain("linear_1", "linear_2"), &[]),
        (Naming::FLUX_EMBEDDER, Plain("in_layer", "out_layer"), &[]),
        (Naming::GEMMA_AUDIO, Plain("ffw_layer_1", "ffw_layer_2"), &[]),
        (Naming::RWKV, Plain("key", "value"), &[]),
        (Naming::DIFFUSERS_PLAIN, Plain("net.0.proj", "net.2"), &[]),
        (Naming::GGUF_PLAIN, Plain("ffn_up", "ffn_down"), &[]),
    ]
}

impl Family {
    fn is_gated(&self) -> bool {
        matches!(self, Gated(..) | GateFirst(..) | GateLast(..))
    }

    /// The layers and their output and input sizes.
    fn layers(&self, hidden: usize, intermediate: usize) -> Vec<(&'static str, (usize, usize))> {
        let (first, second) = ((intermediate, hidden), (hidden, intermediate));
        match *self {
            Gated(gate, up, down) => vec![(gate, first), (up, first), (down, second)],
            GateFirst(first, down) | GateLast(first, down) => {
                vec![(first, (2 * intermediate, hidden)), (down, second)]
            }
            Plain(fc1, fc2) | Conv1d(fc1, fc2) => vec![(fc1, first), (fc2, second)],
        }
    }

    /// A checkpoint of this family in f64, with biases on the layers of which `bias` says so.
    fn checkpoint(
        &self,
        random: &mut Random,
        (hidden, intermediate): (usize, usize),
        bias: impl Fn(usize, &str) -> bool,
    ) -> Result<HashMap<String, Tensor>> {
        let mut tensors = HashMap::new();
        for (i, (name, size)) in self.layers(hidden, intermediate).into_iter().enumerate() {
            let linear = random.linear(size, bias(i, name), DType::F64, &Device::Cpu)?;
            let weight = match self {
                Conv1d(..) => linear.weight().t()?.contiguous()?,
                _ => linear.weight().clone(),
            };
            tensors.insert(format!("{PREFIX}.{name}.weight"), weight);
            if let Some(bias) = linear.bias() {
                tensors.insert(format!("{PREFIX}.{name}.bias"), bias.clone());
            }
        }
        Ok(tensors)
    }

    /// What a model of this family computes from its tensors, by candle's ops.
    fn compute(&self, tensors: &HashMap<String, Tensor>, xs: &Tensor, activation: Activation) -> Result<Tensor> {
        let weight = |name: &str| tensors[&format!("{PREFIX}.{name}.weight")].clone();
        let layer = |name: &str, xs: &Tensor| match tensors.get(&format!("{PREFIX}.{name}.bias")) {
            _ if matches!(self, Conv1d(..)) => {
                xs.matmul(&weight(name))?.broadcast_add(&tensors[&format!("{PREFIX}.{name}.bias")])
            }
            bias => Linear::new(weight(name), bias.cloned()).forward(xs),
        };
        let act = |xs: &Tensor| activation.unfused(xs);
        match *self {
            Gated(gate, up, down) => layer(down, &(act(&layer(gate, xs)?)? * layer(up, xs)?)?),
            GateFirst(first, down) => {
                let halves = layer(first, xs)?.chunk(2, D::Minus1)?;
                layer(down, &(act(&halves[0])? * &halves[1])?)
            }
            GateLast(first, down) => {
                let halves = layer(first, xs)?.chunk(2, D::Minus1)?;
                layer(down, &(&halves[0] * act(&halves[1])?)?)
            }
            Plain(fc1, fc2) | Conv1d(fc1, fc2) => layer(fc2, &act(&layer(fc1, xs)?)?),
        }
    }
}

const PREFIX: &str = "model.layers.3.mlp";
const HIDDEN: usize = 12;
const INTERMEDIATE: usize = 20;

fn builder(tensors: &HashMap<String, Tensor>, device: &Device) -> VarBuilder<'static> {
    VarBuilder::from_tensors(tensors.clone(), DType::F64, device).pp(PREFIX)
}

/// The module at `vb`, by `naming` or by detection.
fn load(
    gated: bool,
    naming: Option<&Naming>,
    (hidden, intermediate): (usize, usize),
    activation: Activation,
    vb: VarBuilder,
) -> Result<Box<dyn Module>> {
    Ok(match (gated, naming) {
        (true, Some(naming)) => Box::new(fused_swiglu(hidden, intermediate, activation, naming, vb)?),
        (true, None) => Box::new(FusedSwiGlu::detect(hidden, intermediate, activation, vb)?),
        (false, Some(naming)) => Box::new(fused_mlp(hidden, intermediate, activation, naming, vb)?),
        (false, None) => Box::new(FusedMlp::detect(hidden, intermediate, activation, vb)?),
    })
}

#[test]
fn the_table_is_whole() {
    let table = table();
    assert_eq!(table.len(), Naming::ALL.len());
    for (i, (naming, family, _)) in table.iter().enumerate() {
        assert!(Naming::ALL.contains(naming), "{naming}");
        assert!(!table[..i].iter().any(|(other, ..)| other == naming), "{naming}");
        assert_eq!(naming.is_gated(), family.is_gated(), "{naming}");
        assert_eq!(naming.is_transposed(), matches!(family, Conv1d(..)), "{naming}");
        let names: Vec<&str> = family.layers(1, 1).into_iter().map(|(name, _)| name).collect();
        assert_eq!(naming.layers(), names, "{naming}");
        let order = match family {
            GateFirst(..) => Some(PackedOrder::GateUp),
            GateLast(..) => Some(PackedOrder::UpGate),
            _ => None,
        };
        assert_eq!(naming.order(), order, "{naming}");
        assert!(naming.to_string().starts_with(&format!("{}: {}", naming.preset().unwrap(), names[0])));
    }
}

fn every_naming_loads(device: &Device) -> Result<()> {
    for (seed, (naming, family, needs_bias)) in table().into_iter().enumerate() {
        let random = &mut Random::new(seed as u64);
        let xs = random.normal(&[2, 3, HIDDEN], 1., DType::F64, device)?;
        // Intermediate size below, equal to and above the hidden size; biases: none, all, one at a time.
        for intermediate in [7, HIDDEN, 2 * HIDDEN, INTERMEDIATE] {
            let sizes = (HIDDEN, intermediate);
            for biases in [0b000, 0b111, 0b001, 0b010, 0b100] {
                let tensors =
                    family.checkpoint(random, sizes, |i, name| biases & (1 << i) != 0 || needs_bias.contains(&name))?;
                let exact = family.compute(&tensors, &xs.to_device(&Device::Cpu)?.flatten_to(1)?, Activation::Silu)?;
                let vb = builder(&tensors, device);
                let mut ways = vec![Some(&naming)];
                let square = matches!(family, Plain("c_fc", _) | Conv1d(..)) && intermediate == HIDDEN;
                if !square {
                    assert_eq!(Naming::detect(HIDDEN, intermediate, &vb)?, naming);
                    ways.push(None);
                }
                for way in ways {
                    let found = load(family.is_gated(), way, sizes, Activation::Silu, vb.clone())?.forward(&xs)?;
                    assert_eq!(found.dims(), &[2, 3, HIDDEN]);
                    let error = relative_error(&found, &exact)?;
                    assert!(error <= 1e-12, "{naming}, {sizes:?}, biases {biases:03b}: {error:e}");
                }
            }
        }
    }
    Ok(())
}
test_device!(every_naming_loads, every_naming_loads_cpu, every_naming_loads_gpu, every_naming_loads_metal);

/// A folder of this test's own.
fn folder(name: &str) -> Result<std::path::PathBuf> {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Every way that a `VarBuilder` reads files, each with what it is; `tensors` have been written to all.
fn builders(
    tensors: &HashMap<String, Tensor>,
    name: &str,
    device: &Device,
) -> Result<Vec<(String, VarBuilder<'static>)>> {
    let folder = folder(name)?;
    let (whole, npz) = (folder.join("model.safetensors"), folder.join("model.npz"));
    candle_core::safetensors::save(tensors, &whole)?;
    let mut shards = [HashMap::new(), HashMap::new()];
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by_key(|(name, _)| *name);
    for (i, (name, tensor)) in sorted.iter().enumerate() {
        shards[i % 2].insert(name.to_string(), (*tensor).clone());
    }
    let parts = [folder.join("model-00001-of-00002.safetensors"), folder.join("model-00002-of-00002.safetensors")];
    for (shard, part) in shards.iter().zip(&parts) {
        assert!(!shard.is_empty());
        candle_core::safetensors::save(shard, part)?;
    }
    Tensor::write_npz(&sorted, &npz)?;
    // SAFETY: nothing else writes to these files while they are mapped.
    let (mmaped, sharded) = unsafe {
        (
            VarBuilder::from_mmaped_safetensors(&[&whole], DType::F64, device)?,
            VarBuilder::from_mmaped_safetensors(&parts, DType::F64, device)?,
        )
    };
    Ok(vec![
        ("mapped".to_string(), mmaped),
        ("sharded".to_string(), sharded),
        ("buffered".to_string(), VarBuilder::from_buffered_safetensors(std::fs::read(&whole)?, DType::F64, device)?),
        ("npz".to_string(), VarBuilder::from_npz(&npz, DType::F64, device)?),
    ])
}

fn every_file_loads(device: &Device) -> Result<()> {
    for (seed, (naming, family, _)) in table().into_iter().enumerate() {
        let random = &mut Random::new(100 + seed as u64);
        let xs = random.normal(&[4, HIDDEN], 1., DType::F64, device)?;
        let sizes = (HIDDEN, INTERMEDIATE);
        let tensors = family.checkpoint(random, sizes, |_, _| true)?;
        let exact = family.compute(&tensors, &xs.to_device(&Device::Cpu)?, Activation::Gelu)?;
        let gpu = if device.is_cpu() { "cpu" } else { "gpu" };
        let files = builders(&tensors, &format!("files-{gpu}-{}", naming.preset().unwrap()), device)?;
        for (file, vb) in files {
            let vb = vb.pp("model.layers").pp(3).pp("mlp");
            for way in [Some(&naming), None] {
                let module = load(family.is_gated(), way, sizes, Activation::Gelu, vb.clone())?;
                let error = relative_error(&module.forward(&xs)?, &exact)?;
                assert!(error <= 1e-12, "{naming} {file}: {error:e}");
            }
        }
    }
    Ok(())
}
test_device!(every_file_loads, every_file_loads_cpu, every_file_loads_gpu, every_file_loads_metal);

fn dtype_is_the_builders(device: &Device) -> Result<()> {
    let random = &mut Random::new(5);
    let family = Gated("gate_proj", "up_proj", "down_proj");
    let tensors = family.checkpoint(random, (HIDDEN, INTERMEDIATE), |_, _| true)?;
    for dtype in DTYPES {
        let xs = random.normal(&[4, HIDDEN], 1., dtype, device)?;
        let vb = builder(&tensors, device).to_dtype(dtype);
        let found = FusedSwiGlu::detect(HIDDEN, INTERMEDIATE, Activation::Silu, vb)?.forward(&xs)?;
        assert_eq!(found.dtype(), dtype);
        let xs = xs.to_dtype(DType::F64)?.to_device(&Device::Cpu)?;
        let error = relative_error(&found, &family.compute(&tensors, &xs, Activation::Silu)?)?;
        assert!(error <= 2. * tolerance(dtype), "{dtype:?}: {error:e}");
    }
    Ok(())
}
test_device!(dtype_is_the_builders, dtype_is_the_builders_cpu, dtype_is_the_builders_gpu, dtype_is_the_builders_metal);

fn custom_names(device: &Device) -> Result<()> {
    let random = &mut Random::new(6);
    let xs = random.normal(&[4, HIDDEN], 1., DType::F64, device)?;
    let sizes = (HIDDEN, INTERMEDIATE);
    let cases = [
        (Naming::gated("a.g", "a.u", format!("experts.{}.d", 3)), Gated("a.g", "a.u", "experts.3.d")),
        (Naming::packed("gu", PackedOrder::GateUp, "d"), GateFirst("gu", "d")),
        (Naming::packed("ug", PackedOrder::UpGate, "d"), GateLast("ug", "d")),
        (Naming::plain("up", "down"), Plain("up", "down")),
        (Naming::plain("up", "down").with_transposed_weights(), Conv1d("up", "down")),
    ];
    for (naming, family) in cases {
        let tensors = family.checkpoint(random, sizes, |_, _| true)?;
        let exact = family.compute(&tensors, &xs.to_device(&Device::Cpu)?, Activation::Relu)?;
        let module = load(family.is_gated(), Some(&naming), sizes, Activation::Relu, builder(&tensors, device))?;
        let error = relative_error(&module.forward(&xs)?, &exact)?;
        assert!(error <= 1e-12, "{naming}: {error:e}");
        assert_eq!(naming.preset(), None);
    }
    Ok(())
}
test_device!(custom_names, custom_names_cpu, custom_names_gpu, custom_names_metal);

fn projector(device: &Device) -> Result<()> {
    let random = &mut Random::new(7);
    let xs = random.normal(&[2, 3, HIDDEN], 1., DType::F64, device)?;
    let fc1 = random.linear((INTERMEDIATE, HIDDEN), true, DType::F64, device)?;
    let fc2 = random.linear((9, INTERMEDIATE), true, DType::F64, device)?;
    let mut tensors = HashMap::new();
    for (name, linear) in [("0", &fc1), ("2", &fc2)] {
        tensors.insert(format!("{PREFIX}.{name}.weight"), linear.weight().clone());
        tensors.insert(format!("{PREFIX}.{name}.bias"), linear.bias().unwrap().clone());
    }
    let vb = builder(&tensors, device);
    let naming = Naming::detect(HIDDEN, INTERMEDIATE, &vb)?;
    assert_eq!(naming, Naming::SEQUENTIAL);
    let module = fused_projector(HIDDEN, INTERMEDIATE, 9, Activation::Gelu, &naming, vb)?;
    assert_eq!((module.hidden_size(), module.intermediate_size(), module.out_features()), (HIDDEN, INTERMEDIATE, 9));
    let found = module.forward(&xs)?;
    assert_eq!(found.dims(), &[2, 3, 9]);
    assert!(relative_error(&found, &exact_mlp(&xs, &fc1, &fc2, Activation::Gelu)?)? <= 1e-12);
    Ok(())
}
test_device!(projector, projector_cpu, projector_gpu, projector_metal);

/// The message of what should fail.
fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        // What follows the first line is a backtrace, if candle takes them.
        Err(error) => error.to_string().lines().next().unwrap_or_default().to_string(),
    }
}

/// Asserts that the message has all of these.
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

const CPU: &Device = &Device::Cpu;

#[test]
fn nothing_there_lists_what_was_tried() -> Result<()> {
    let tensors = HashMap::from([(format!("{PREFIX}.other.weight"), Tensor::zeros((2, 2), DType::F64, CPU)?)]);
    let vb = builder(&tensors, CPU);
    let gated = message(FusedSwiGlu::detect(HIDDEN, INTERMEDIATE, Activation::Silu, vb.clone()));
    let plain = message(FusedMlp::detect(HIDDEN, INTERMEDIATE, Activation::Silu, vb.clone()));
    for message in [gated, plain, message(Naming::detect(HIDDEN, INTERMEDIATE, &vb))] {
        for (naming, ..) in table() {
            let names = format!("{PREFIX}.{{{}}}.weight", naming.layers().join(", "));
            assert_eq!(message.matches(&names).count(), 1, "{names} in: {message}");
        }
        assert_says(&message, &["no MLP at prefix \"model.layers.3.mlp\"", "found none of their tensors"]);
    }
    let root = VarBuilder::from_tensors(tensors, DType::F64, CPU);
    assert_says(&message(Naming::detect(HIDDEN, INTERMEDIATE, &root)), &["prefix \"\"", " {fc1, fc2}.weight"]);
    let variables = VarMap::new();
    let vb = VarBuilder::from_varmap(&variables, DType::F64, CPU);
    assert_says(&message(Naming::detect(HIDDEN, INTERMEDIATE, &vb)), &["found none of their tensors"]);
    assert!(variables.all_vars().is_empty());
    Ok(())
}

#[test]
fn an_incomplete_mlp_says_what_is_there() -> Result<()> {
    let family = Gated("gate_proj", "up_proj", "down_proj");
    let mut tensors = family.checkpoint(&mut Random::new(8), (HIDDEN, INTERMEDIATE), |_, _| false)?;
    tensors.remove(&format!("{PREFIX}.down_proj.weight"));
    let vb = builder(&tensors, CPU);
    let detected = message(FusedSwiGlu::detect(HIDDEN, INTERMEDIATE, Activation::Silu, vb.clone()));
    assert_says(&detected, &["found only model.layers.3.mlp.{gate_proj, up_proj}.weight"]);
    let named = message(fused_swiglu(HIDDEN, INTERMEDIATE, Activation::Silu, &Naming::LLAMA, vb));
    assert_says(&named, &["model.layers.3.mlp.down_proj.weight"]);
    Ok(())
}

#[test]
fn the_other_kind_says_so() -> Result<()> {
    let random = &mut Random::new(9);
    let gated = Gated("w1", "w3", "w2").checkpoint(random, (HIDDEN, INTERMEDIATE), |_, _| false)?;
    let found = message(FusedMlp::detect(HIDDEN, INTERMEDIATE, Activation::Silu, builder(&gated, CPU)));
    assert_says(&found, &["MIXTRAL: w1, w3, w2 (gated)", PREFIX, "use FusedSwiGlu"]);
    let plain = Plain("fc1", "fc2").checkpoint(random, (HIDDEN, INTERMEDIATE), |_, _| false)?;
    let found = message(FusedSwiGlu::detect(HIDDEN, INTERMEDIATE, Activation::Silu, builder(&plain, CPU)));
    assert_says(&found, &["FC1_FC2: fc1, fc2 (plain)", PREFIX, "use FusedMlp"]);
    Ok(())
}

#[test]
fn ambiguous_checkpoints_are_not_guessed() -> Result<()> {
    let random = &mut Random::new(10);
    let square = Conv1d("c_fc", "c_proj").checkpoint(random, (HIDDEN, HIDDEN), |_, _| true)?;
    let found = message(FusedMlp::detect(HIDDEN, HIDDEN, Activation::GeluTanh, builder(&square, CPU)));
    assert_says(&found, &["more than one naming", PREFIX, "OPEN_CLIP: c_fc, c_proj (plain)", "GPT2", "transposed"]);
    let mut two = Gated("w1", "w3", "w2").checkpoint(random, (HIDDEN, INTERMEDIATE), |_, _| false)?;
    two.extend(Plain("fc1", "fc2").checkpoint(random, (HIDDEN, INTERMEDIATE), |_, _| false)?);
    let found = message(Naming::detect(HIDDEN, INTERMEDIATE, &builder(&two, CPU)));
    assert_says(&found, &["more than one naming", "MIXTRAL", "FC1_FC2"]);
    Ok(())
}

#[test]
fn wrong_sizes_name_the_tensor() -> Result<()> {
    let random = &mut Random::new(11);
    let tensors = Plain("fc1", "fc2").checkpoint(random, (HIDDEN, INTERMEDIATE), |_, _| true)?;
    let vb = builder(&tensors, CPU);
    let found = message(FusedMlp::detect(HIDDEN, 30, Activation::Relu, vb.clone()));
    assert_says(
        &found,
        &["hidden size 12 and intermediate size 30", "FC1_FC2", "BASED", "[30, 12]", "[60, 12]", "[20, 12]"],
    );
    let found = message(fused_mlp(HIDDEN, 30, Activation::Relu, &Naming::FC1_FC2, vb.clone()));
    assert_says(&found, &["model.layers.3.mlp.fc1.weight", "[30, 12]", "[20, 12]"]);
    let found = message(fused_projector(HIDDEN, INTERMEDIATE, 5, Activation::Relu, &Naming::FC1_FC2, vb.clone()));
    assert_says(&found, &["model.layers.3.mlp.fc2.weight", "[5, 20]", "[12, 20]"]);
    for intermediate in [usize::MAX, usize::MAX / 2 + 1] {
        let found = message(fused_swiglu(HIDDEN, intermediate, Activation::Relu, &Naming::BASED, vb.clone()));
        assert_says(&found, &["double fits in usize", &intermediate.to_string()]);
        message(Naming::detect(HIDDEN, intermediate, &vb));
    }
    let found = message(fused_mlp(HIDDEN, INTERMEDIATE, Activation::Relu, &Naming::FC1_FC2, vb.to_dtype(DType::U32)));
    assert_says(&found, &["fc1 weight", "expected dtype f32, f16, bf16 or f64", "u32"]);
    let mut wrong = tensors.clone();
    wrong.insert(format!("{PREFIX}.fc2.bias"), Tensor::zeros(HIDDEN + 1, DType::F64, CPU)?);
    let found = message(FusedMlp::detect(HIDDEN, INTERMEDIATE, Activation::Relu, builder(&wrong, CPU)));
    assert_says(&found, &["model.layers.3.mlp.fc2.bias", "[12]", "[13]"]);
    Ok(())
}

#[test]
fn biases_as_asked_for() -> Result<()> {
    use Bias::*;
    let random = &mut Random::new(12);
    for (naming, family, _) in table() {
        let layers = naming.layers().into_iter().map(str::to_string).collect::<Vec<_>>();
        let (first, last) = (&layers[0], &layers[layers.len() - 1]);
        let with = family.checkpoint(random, (HIDDEN, INTERMEDIATE), |_, _| true)?;
        let without = family.checkpoint(random, (HIDDEN, INTERMEDIATE), |_, _| false)?;
        let load = |biases: (Bias, Bias), tensors| {
            let naming = naming.clone().with_bias(biases.0, biases.1);
            assert_eq!(naming.biases(), biases);
            load(family.is_gated(), Some(&naming), (HIDDEN, INTERMEDIATE), Activation::Relu, builder(tensors, CPU))
        };
        load((Required, Required), &with)?;
        load((IfPresent, IfPresent), &with)?;
        load((IfPresent, IfPresent), &without)?;
        load((Absent, Absent), &without)?;
        assert_says(&message(load((Absent, IfPresent), &with)), &["no bias", &format!("{PREFIX}.{first}.bias")]);
        assert_says(&message(load((IfPresent, Absent), &with)), &["no bias", &format!("{PREFIX}.{last}.bias")]);
        assert_says(&message(load((Required, IfPresent), &without)), &[&format!("{PREFIX}.{first}.bias")]);
        assert_says(&message(load((IfPresent, Required), &without)), &[&format!("{PREFIX}.{last}.bias")]);
        for (i, bias) in [naming.biases().0, naming.biases().1].into_iter().enumerate() {
            if bias == Required {
                let tensors = family.checkpoint(random, (HIDDEN, INTERMEDIATE), |layer, _| layer != i)?;
                let vb = builder(&tensors, CPU);
                assert_eq!(Naming::detect(HIDDEN, INTERMEDIATE, &vb)?, naming);
                let sizes = (HIDDEN, INTERMEDIATE);
                let found = message(crate::load(family.is_gated(), None, sizes, Activation::Relu, vb));
                assert_says(&found, &[&format!("{PREFIX}.{}.bias", layers[i])]);
            }
        }
    }
    Ok(())
}

#[test]
fn a_var_map_gets_the_checkpoints_names() -> Result<()> {
    const WIDE: usize = 600;
    for (naming, family, needs_bias) in table() {
        for (first, second) in [naming.biases(), (Bias::Required, Bias::Required), (Bias::Absent, Bias::Absent)] {
            let naming = naming.clone().with_bias(first, second);
            let variables = VarMap::new();
            let vb = VarBuilder::from_varmap(&variables, DType::F64, CPU).pp(PREFIX);
            let module = load(family.is_gated(), Some(&naming), (HIDDEN, WIDE), Activation::Silu, vb.clone())?;
            let layers = family.layers(HIDDEN, WIDE);
            let mut expected = Vec::new();
            for (i, (name, (rows, cols))) in layers.iter().enumerate() {
                let weight = if naming.is_transposed() { vec![*cols, *rows] } else { vec![*rows, *cols] };
                expected.push((format!("{PREFIX}.{name}.weight"), weight));
                let bias = if i + 1 == layers.len() { second } else { first };
                if bias == Bias::Required {
                    expected.push((format!("{PREFIX}.{name}.bias"), vec![*rows]));
                }
            }
            expected.sort();
            let tensors: HashMap<String, Tensor> =
                variables.data().lock().unwrap().iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect();
            let mut found: Vec<_> = tensors.iter().map(|(k, v)| (k.clone(), v.dims().to_vec())).collect();
            found.sort();
            assert_eq!(found, expected, "{naming}");
            // Initialised as candle's `linear` is: variance 2 / in_features.
            for tensor in tensors.values().filter(|t| t.rank() == 2) {
                let flat = values(tensor)?;
                let variance = flat.iter().map(|v| v * v).sum::<f64>() / flat.len() as f64;
                let fan_in = if naming.is_transposed() { tensor.dims()[0] } else { tensor.dims()[1] };
                assert!((variance * fan_in as f64 / 2. - 1.).abs() < 0.2, "{naming}: {variance} {fan_in}");
            }
            // What a second reading finds: the same variables, by name and by detection.
            let xs = Random::new(13).normal(&[3, HIDDEN], 1., DType::F64, CPU)?;
            if second != Bias::Absent || needs_bias.is_empty() {
                let again = load(family.is_gated(), None, (HIDDEN, WIDE), Activation::Silu, vb)?;
                assert_eq!(values(&again.forward(&xs)?)?, values(&module.forward(&xs)?)?, "{naming}");
                let exact = family.compute(&tensors, &xs, Activation::Silu)?;
                assert!(relative_error(&again.forward(&xs)?, &exact)? <= 1e-12, "{naming}");
            }
            assert_eq!(variables.all_vars().len(), expected.len());
        }
    }
    Ok(())
}
