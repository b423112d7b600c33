//! What the test programs share: random tensors, errors against f64, and the tiers of this machine.
#![allow(dead_code)] // each test program uses a part of it

use candle_core::{DType, Device, Result, Tensor};
use candle_fused_mlp::cpu::Tier;
use candle_fused_mlp::{reference, Activation, FusedSwiGlu, GateUp, PackedOrder};
use candle_nn::Linear;
use rand::{rngs::StdRng, Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use std::io::Write;
use std::path::PathBuf;

/// Seeded random tensors.
pub struct Random(StdRng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    pub fn range(&mut self, range: std::ops::Range<usize>) -> usize {
        self.0.random_range(range)
    }

    /// Normal values of this standard deviation.
    pub fn normal(&mut self, dims: &[usize], scale: f64, dtype: DType, device: &Device) -> Result<Tensor> {
        let len = dims.iter().product();
        let values: Vec<f64> =
            (0..len).map(|_| scale * Distribution::<f64>::sample(&StandardNormal, &mut self.0)).collect();
        on(&Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)?, device)
    }

    /// A layer at the scale that keeps a unit variance.
    pub fn linear(
        &mut self,
        (rows, cols): (usize, usize),
        bias: bool,
        dtype: DType,
        device: &Device,
    ) -> Result<Linear> {
        let weight = self.normal(&[rows, cols], (cols.max(1) as f64).powf(-0.5), dtype, device)?;
        let bias = if bias { Some(self.normal(&[rows], 0.5, dtype, device)?) } else { None };
        Ok(Linear::new(weight, bias))
    }
}

/// A copy on this device. A GPU's driver has no memory of nothing, so there an empty tensor is a view of some.
pub fn on(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    if device.is_cpu() || tensor.elem_count() > 0 {
        return tensor.to_device(device);
    }
    let some: Vec<usize> = tensor.dims().iter().map(|&len| len.max(1)).collect();
    let view = Tensor::zeros(some, tensor.dtype(), device)?;
    let dims = tensor.dims().iter().enumerate();
    dims.filter(|(_, &len)| len == 0).try_fold(view, |view, (dim, _)| view.narrow(dim, 0, 0))
}

/// A copy in the processor's memory, where candle's own ops take sizes of zero too: on a GPU they launch nothing for
/// nothing (`LaunchConfig::for_num_elems`), which the driver refuses.
pub fn host(linear: &Linear) -> Result<Linear> {
    let copy = |t: &Tensor| t.to_device(&Device::Cpu);
    Ok(Linear::new(copy(linear.weight())?, linear.bias().map(copy).transpose()?))
}

/// Likewise.
pub fn host_gate_up(gate_up: &GateUp) -> Result<GateUp> {
    Ok(match gate_up {
        GateUp::Separate { gate, up } => GateUp::Separate { gate: host(gate)?, up: host(up)? },
        GateUp::Packed { linear, order } => GateUp::Packed { linear: host(linear)?, order: *order },
    })
}

/// `linear` in another dtype, its tensors contiguous.
pub fn cast(linear: &Linear, dtype: DType) -> Result<Linear> {
    let copy = |t: &Tensor| t.to_dtype(dtype)?.force_contiguous();
    Ok(Linear::new(copy(linear.weight())?, linear.bias().map(copy).transpose()?))
}

/// `gate_up` in another dtype.
pub fn cast_gate_up(gate_up: &GateUp, dtype: DType) -> Result<GateUp> {
    Ok(match gate_up {
        GateUp::Separate { gate, up } => GateUp::Separate { gate: cast(gate, dtype)?, up: cast(up, dtype)? },
        GateUp::Packed { linear, order } => GateUp::Packed { linear: cast(linear, dtype)?, order: *order },
    })
}

/// x as the matrix that candle's `Linear` takes.
pub fn matrix(xs: &Tensor) -> Result<Tensor> {
    let cols = *xs.dims().last().unwrap();
    xs.force_contiguous()?.reshape((xs.elem_count() / cols.max(1), cols))
}

/// The plain MLP in f64, by candle's own ops.
pub fn exact_mlp(xs: &Tensor, fc1: &Linear, fc2: &Linear, activation: Activation) -> Result<Tensor> {
    let (fc1, fc2) = (cast(fc1, DType::F64)?, cast(fc2, DType::F64)?);
    reference::mlp(&matrix(&xs.to_dtype(DType::F64)?)?, &fc1, &fc2, activation)
}

/// The gated MLP in f64, by candle's own ops.
pub fn exact_swiglu(xs: &Tensor, gate_up: &GateUp, down: &Linear, activation: Activation) -> Result<Tensor> {
    let (gate_up, down) = (cast_gate_up(gate_up, DType::F64)?, cast(down, DType::F64)?);
    reference::swiglu(&matrix(&xs.to_dtype(DType::F64)?)?, &gate_up, &down, activation)
}

/// Every value as f64, in order.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// `|found - exact| / |exact|` in the l2 norm; NaN anywhere counts as infinite.
pub fn relative_error(found: &Tensor, exact: &Tensor) -> Result<f64> {
    let (found, exact) = (values(found)?, values(exact)?);
    assert_eq!(found.len(), exact.len());
    let error: f64 = found.iter().zip(&exact).map(|(f, e)| (f - e).powi(2)).sum();
    let norm: f64 = exact.iter().map(|e| e * e).sum();
    let relative = (error / norm.max(f64::MIN_POSITIVE)).sqrt();
    Ok(if relative.is_nan() { f64::INFINITY } else { relative })
}

/// The relative l2 error that a dtype may have.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-6,
        DType::F16 => 1e-3,
        _ => 8e-3,
    }
}

/// The dtypes that the ops take.
pub const DTYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];

/// The tiers to go through on this device: all that the processor has on the CPU, one elsewhere.
pub fn tiers(device: &Device) -> Vec<Tier> {
    match device {
        Device::Cpu => Tier::ALL.into_iter().filter(|tier| tier.is_available()).collect(),
        _ => vec![Tier::Plain],
    }
}

/// Gate and up packed into one layer in this order.
pub fn packed(gate: &Linear, up: &Linear, order: PackedOrder) -> Result<GateUp> {
    let (first, second) = match order {
        PackedOrder::GateUp => (gate, up),
        PackedOrder::UpGate => (up, gate),
    };
    let bias = match (first.bias(), second.bias()) {
        (Some(first), Some(second)) => Some(Tensor::cat(&[first, second], 0)?),
        _ => None,
    };
    let weight = Tensor::cat(&[first.weight(), second.weight()], 0)?;
    Ok(GateUp::Packed { linear: Linear::new(weight, bias), order })
}

/// The path in an environment variable. Where it is not set, the test is to be skipped: this says so, and why, past the
/// capture of a test's output.
pub fn file_of(variable: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty());
    if path.is_none() {
        let test = std::thread::current().name().unwrap_or_default().to_string();
        let line = format!("SKIPPED {test}: {variable} is not set to {what}\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
    path.map(PathBuf::from)
}

/// A gated MLP with a bias of the gate and of down.
pub fn gated(
    random: &mut Random,
    (hidden, intermediate): (usize, usize),
    dtype: DType,
    device: &Device,
) -> Result<FusedSwiGlu> {
    let gate = random.linear((intermediate, hidden), true, dtype, device)?;
    let up = random.linear((intermediate, hidden), false, dtype, device)?;
    let down = random.linear((hidden, intermediate), true, dtype, device)?;
    FusedSwiGlu::from_linears(&gate, &up, &down)
}

/// Its output in f64.
pub fn exact(module: &FusedSwiGlu, xs: &Tensor) -> Result<Tensor> {
    exact_swiglu(xs, module.gate_up(), module.down(), module.activation())
}

/// An error within the dtype's.
pub fn assert_near(found: &Tensor, exact: &Tensor, what: &str) -> Result<()> {
    let (error, dtype) = (relative_error(found, exact)?, found.dtype());
    assert!(error <= tolerance(dtype), "{what} {dtype:?}: {error:e}");
    Ok(())
}
