//! What would run: the kernel that an op chooses, and what it costs beside candle's own ops.

use crate::cpu;
use crate::ops::{mlp_sizes, swiglu_sizes, Sizes};
use crate::parameters::rows_adjacent;
use crate::{Activation, GateUp, IntoActivation};
use candle_core::{bail, DType, DeviceLocation, Error, Result, Tensor};
use candle_nn::Linear;
use serde::{Serialize, Serializer};
use std::fmt;

/// An MLP and the number of tokens it is to work on: what a [`plan`] is asked for.
///
/// [`mlp`](Self::mlp) and [`swiglu`](Self::swiglu) fill in what most models have; every field can be changed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Workload {
    /// Whether the first layer has a gate: [`crate::ops::fused_swiglu`] rather than [`crate::ops::fused_mlp`].
    pub gated: bool,
    /// Whether gate and up are one matrix of `[2 intermediate_size, hidden_size]`. Says nothing of a plain MLP.
    pub packed: bool,
    /// The activation of the first layer, or of its gate.
    pub activation: Activation,
    /// The vectors in x, whatever its leading dimensions.
    pub tokens: usize,
    /// The length of a vector of x.
    pub hidden_size: usize,
    /// The length of a vector of the hidden layer.
    pub intermediate_size: usize,
    /// The length of a vector of the result.
    pub out_features: usize,
    /// Whether the first layer has a bias: `b1` of a plain MLP, the gate's of a gated one.
    pub gate_bias: bool,
    /// Whether the up projection has a bias. Says nothing of a plain MLP.
    pub up_bias: bool,
    /// Whether the second layer has a bias.
    pub down_bias: bool,
    /// The dtype of x and of every parameter.
    #[serde(serialize_with = "dtype_name")]
    pub dtype: DType,
    /// Whether the elements of each weight's rows are adjacent where the op reads them, as they are unless it is a
    /// transposed view. (Of several tracked parameters of a layer it reads copies, whose rows are adjacent.)
    pub rows_adjacent: bool,
}

fn dtype_name<S: Serializer>(dtype: &DType, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.as_str())
}

impl Workload {
    /// A plain MLP in f32 as BERT and GPT-2 have it: erf GELU, both biases, as many output features as input features.
    pub fn mlp(tokens: usize, hidden_size: usize, intermediate_size: usize) -> Self {
        Self {
            gated: false,
            packed: false,
            activation: Activation::Gelu,
            tokens,
            hidden_size,
            intermediate_size,
            out_features: hidden_size,
            gate_bias: true,
            up_bias: false,
            down_bias: true,
            dtype: DType::F32,
            rows_adjacent: true,
        }
    }

    /// A gated MLP in f32 as LLaMA has it: SiLU, no bias, as many output features as input features.
    pub fn swiglu(tokens: usize, hidden_size: usize, intermediate_size: usize) -> Self {
        Self {
            gated: true,
            activation: Activation::Silu,
            gate_bias: false,
            down_bias: false,
            ..Self::mlp(tokens, hidden_size, intermediate_size)
        }
    }

    /// The op's name: `mlp` or `swiglu`.
    pub fn op(&self) -> &'static str {
        if self.gated {
            "swiglu"
        } else {
            "mlp"
        }
    }

    fn with_sizes(self, Sizes { tokens, hidden_size, intermediate_size, out_features }: Sizes) -> Self {
        Self { tokens, hidden_size, intermediate_size, out_features, ..self }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { activation, tokens, hidden_size, intermediate_size, out_features, .. } = self;
        let (op, dtype) = (self.op(), self.dtype.as_str());
        write!(f, "{op} {hidden_size}x{intermediate_size}x{out_features}, {activation}, {dtype}, tokens: {tokens}")
    }
}

/// What one call costs on one path.
///
/// Bytes are those that the path's kernels ask for and hand over. For candle's path that is every op's operands and
/// result; how much of it a cache serves depends on the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Ops that candle dispatches: calls on the CPU, kernel launches on a GPU.
    pub launches: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Arithmetic operations: two for a multiply-add, and one an element for each elementwise step (a bias, an
    /// activation or each candle op that it consists of, a product, a conversion of dtype).
    pub operations: u64,
}

/// The kernel that a [`Workload`] runs on, and what it costs beside the same MLP as a chain of candle's own ops.
///
/// The fused path reads x, writes the result and reads the weights: once, or for many tokens once for each block of
/// them. The hidden layer stays in cache. (Conversions in registers are not counted.) On a GPU, kernels for few tokens
/// take 64 of them a launch; with `cuda-matmul` the hidden layer is written and read by candle's products and by the one
/// launch between them. Copies of weights whose strides candle's product does not take are not counted.
///
/// Candle's path writes the result of each op to memory and reads it again: matrix products, bias additions, the
/// activation (several ops, for some) and the product with up. For bf16 on the CPU each matrix product first
/// widens both operands to f32, weights included, in memory, and narrows its result.
///
/// The [`Display`](fmt::Display) form is a table of both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// What was asked.
    #[serde(flatten)]
    pub workload: Workload,
    /// The device: `cpu`, or `cuda:` and its number.
    pub device: String,
    /// The kernel's name: device, family (`decode` for few tokens, `gemm` for many) and instruction set
    /// ([`cpu::Tier::name`]), as in `cpu-decode-avx512-bf16`; on a GPU device and kernel, as in `cuda-decode-hopper` or
    /// `cuda-matmul`, and `cuda-none` where there is nothing to do.
    pub kernel: String,
    /// This crate's op.
    pub fused: Cost,
    /// Candle's own ops ([`crate::reference`]).
    pub unfused: Cost,
}

impl Plan {
    /// What [`crate::ops::fused_mlp`] would run for these arguments.
    ///
    /// # Errors
    /// Those of the op, and those of [`plan`].
    pub fn of_mlp(xs: &Tensor, fc1: &Linear, fc2: &Linear, activation: impl IntoActivation) -> Result<Self> {
        let sizes = mlp_sizes(xs, fc1, fc2)?;
        let workload = Workload {
            activation: activation.into_activation()?,
            gate_bias: fc1.bias().is_some(),
            down_bias: fc2.bias().is_some(),
            dtype: xs.dtype(),
            rows_adjacent: rows_adjacent(&[fc1]) && rows_adjacent(&[fc2]),
            ..Workload::mlp(0, 0, 0).with_sizes(sizes)
        };
        plan(&workload, xs.device().location())
    }

    /// What [`crate::ops::fused_swiglu`] would run for these arguments.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_fused_mlp::{Activation, GateUp, Plan};
    /// use candle_nn::Linear;
    ///
    /// let linear = |rows, cols| Tensor::randn(0f32, 0.1, (rows, cols), &Device::Cpu).map(|w| Linear::new(w, None));
    /// let gate_up = GateUp::Separate { gate: linear(96, 32)?, up: linear(96, 32)? };
    /// let xs = Tensor::randn(0f32, 1., (1, 5, 32), &Device::Cpu)?;
    /// let plan = Plan::of_swiglu(&xs, &gate_up, &linear(32, 96)?, Activation::Silu)?;
    /// println!("{plan}");
    /// assert_eq!((plan.fused.launches, plan.unfused.launches), (1, 5));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of the op, and those of [`plan`].
    pub fn of_swiglu(xs: &Tensor, gate_up: &GateUp, down: &Linear, activation: impl IntoActivation) -> Result<Self> {
        let sizes = swiglu_sizes(xs, gate_up, down)?;
        let (gate, up, packed) = match gate_up {
            GateUp::Separate { gate, up } => (gate, up, false),
            GateUp::Packed { linear, .. } => (linear, linear, true),
        };
        let first: &[&Linear] = if packed { &[gate] } else { &[gate, up] };
        let workload = Workload {
            packed,
            activation: activation.into_activation()?,
            gate_bias: gate.bias().is_some(),
            up_bias: up.bias().is_some(),
            down_bias: down.bias().is_some(),
            dtype: xs.dtype(),
            rows_adjacent: rows_adjacent(first) && rows_adjacent(&[down]),
            ..Workload::swiglu(0, 0, 0).with_sizes(sizes)
        };
        plan(&workload, xs.device().location())
    }
}

/// What would run for this workload on this device: on the CPU on this thread's instruction set
/// ([`cpu::Tier::current`]), on a GPU with x and weights that are contiguous and lie on 16 bytes.
///
/// ```
/// use candle_core::{DType, DeviceLocation};
/// use candle_fused_mlp::{plan, Workload};
///
/// let workload = Workload { dtype: DType::BF16, ..Workload::swiglu(1, 2048, 5632) };
/// let plan = plan(&workload, DeviceLocation::Cpu)?;
/// assert!(plan.kernel.starts_with("cpu-decode-"));
/// assert!(plan.unfused.bytes_read > 2 * plan.fused.bytes_read);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A device other than the CPU and, with the feature `cuda`, CUDA devices; a GPU that is not there; a dtype other than
/// f32, f16, bf16 and f64; and sizes whose costs do not fit in 64 bits.
pub fn plan(workload: &Workload, device: DeviceLocation) -> Result<Plan> {
    if !matches!(workload.dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
        bail!("plan: dtype: expected f32, f16, bf16 or f64, found {}", workload.dtype.as_str());
    }
    let (kernel, name, fused) = match device {
        DeviceLocation::Cpu => {
            let (tier, family) = cpu::choose(workload.dtype, workload.tokens, workload.rows_adjacent);
            let fused = fused_cost(workload, 1, family.passes(workload.tokens));
            (format!("cpu-{}-{tier}", family.name()), "cpu".to_string(), fused)
        }
        DeviceLocation::Cuda { gpu_id } => {
            let (kernel, fused) = on_cuda(workload, gpu_id)?;
            (kernel, format!("cuda:{gpu_id}"), fused)
        }
        DeviceLocation::Metal { gpu_id } => {
            bail!("plan: device: expected the CPU or a CUDA device, found metal:{gpu_id}")
        }
    };
    // candle's products widen bf16 on the CPU alone.
    let widens = workload.dtype == DType::BF16 && matches!(device, DeviceLocation::Cpu);
    let (fused, unfused) = fused
        .zip(unfused_cost(workload, widens))
        .ok_or_else(|| Error::msg(format!("plan: expected sizes whose costs fit in 64 bits, found {workload:?}")))?;
    Ok(Plan { workload: *workload, device: name, kernel, fused, unfused })
}

/// The kernel's name and the op's cost on a GPU; no cost if it overflows.
#[cfg(feature = "cuda")]
fn on_cuda(workload: &Workload, gpu_id: usize) -> Result<(String, Option<Cost>)> {
    use crate::cuda::{kernel_for, Kernel};
    Ok(match kernel_for("plan", workload, gpu_id)? {
        None => ("cuda-none".to_string(), Count::new(workload.dtype).cost()),
        Some(kernel @ (Kernel::Gemm | Kernel::GemmAmpere)) => (format!("cuda-{kernel}"), two_launches_cost(workload)),
        Some(Kernel::Matmul) => ("cuda-matmul".to_string(), products_cost(workload)),
        Some(kernel) => {
            let launches = kernel.passes(workload.tokens);
            (format!("cuda-{kernel}"), fused_cost(workload, launches as u64, launches))
        }
    })
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(_: &Workload, gpu_id: usize) -> Result<(String, Option<Cost>)> {
    bail!("plan: device: expected the CPU, in a build without the feature `cuda`, found cuda:{gpu_id}")
}

/// A product of sizes; `None` if it overflows.
fn product(factors: &[usize]) -> Option<u64> {
    factors.iter().try_fold(1u64, |n, &factor| n.checked_mul(u64::try_from(factor).ok()?))
}

/// The cost of one call of this crate's op, if it is so many launches and reads the weights `passes` times.
fn fused_cost(workload: &Workload, launches: u64, passes: usize) -> Option<Cost> {
    let mut count = Count::new(workload.dtype);
    let Workload { tokens, hidden_size, intermediate_size, out_features, .. } = *workload;
    let hidden = product(&[tokens, intermediate_size])?;
    let out = product(&[tokens, out_features])?;
    count.launches = launches;
    count.read(product(&[tokens, hidden_size])?)?;
    for (rows, cols, bias) in projections(workload, false) {
        count.read(product(&[passes, rows, cols])?)?;
        count.multiply_adds(product(&[tokens, rows, cols])?)?;
        if bias {
            count.read(product(&[rows])?)?;
            count.operate(product(&[tokens, rows])?)?;
        }
    }
    count.operate(hidden)?;
    if workload.gated {
        count.operate(hidden)?;
    }
    count.write(out)?;
    count.cost()
}

/// The cost of one call of this crate's op in two launches, which write the hidden layer and read it.
#[cfg(feature = "cuda")]
fn two_launches_cost(workload: &Workload) -> Option<Cost> {
    let cost = fused_cost(workload, 2, 1)?;
    let size = workload.dtype.size_in_bytes() as u64;
    let hidden = product(&[workload.tokens, workload.intermediate_size])?.checked_mul(size)?;
    let (bytes_read, bytes_written) = (cost.bytes_read.checked_add(hidden)?, cost.bytes_written.checked_add(hidden)?);
    Some(Cost { bytes_read, bytes_written, ..cost })
}

/// The cost of one call of this crate's op by candle's products, with one launch for all that is between the layers and
/// one for the second layer's bias.
#[cfg(feature = "cuda")]
fn products_cost(workload: &Workload) -> Option<Cost> {
    let mut count = Count::new(workload.dtype);
    let Workload { gated, tokens, intermediate_size, out_features, gate_bias, up_bias, down_bias, .. } = *workload;
    for (rows, cols, _) in projections(workload, false) {
        count.launches += 1;
        count.read(product(&[tokens, cols])?)?;
        count.read(product(&[rows, cols])?)?;
        count.multiply_adds(product(&[tokens, rows, cols])?)?;
        count.write(product(&[tokens, rows])?)?;
    }
    let hidden = product(&[tokens, intermediate_size])?;
    count.elementwise(hidden, hidden)?;
    if gated {
        count.read(hidden)?;
        count.operate(hidden)?;
    }
    for _ in [gate_bias, gated && up_bias].into_iter().filter(|&bias| bias) {
        count.read(product(&[intermediate_size])?)?;
        count.operate(hidden)?;
    }
    if down_bias {
        let out = product(&[tokens, out_features])?;
        count.elementwise(out, out.checked_add(product(&[out_features])?)?)?;
    }
    count.cost()
}

/// The cost of the same MLP as a chain of candle ops, whose matrix products widen their operands to f32 or not.
fn unfused_cost(workload: &Workload, widens: bool) -> Option<Cost> {
    let mut count = Count::new(workload.dtype);
    let Workload { tokens, intermediate_size, .. } = *workload;
    let hidden = product(&[tokens, intermediate_size])?;
    for (rows, cols, bias) in projections(workload, workload.packed) {
        let (x, weight, out) = (product(&[tokens, cols])?, product(&[rows, cols])?, product(&[tokens, rows])?);
        count.launches += 1;
        count.multiply_adds(product(&[tokens, rows, cols])?)?;
        for operand in [x, weight] {
            count.read(operand)?;
            if widens {
                count.operate(operand)?;
                count.write_f32(operand)?;
                count.read_f32(operand)?;
            }
        }
        if widens {
            count.write_f32(out)?;
            count.read_f32(out)?;
            count.operate(out)?;
        }
        count.write(out)?;
        if bias {
            count.elementwise(out, out.checked_add(product(&[rows])?)?)?;
        }
    }
    let (unary, binary) = workload.activation.unfused_ops();
    for _ in 0..unary {
        count.elementwise(hidden, hidden)?;
    }
    for _ in 0..binary + u64::from(workload.gated) {
        count.elementwise(hidden, hidden.checked_mul(2)?)?;
    }
    count.cost()
}

/// The projections of both layers: rows, columns, and whether there is a bias.
fn projections(workload: &Workload, packed: bool) -> impl Iterator<Item = (usize, usize, bool)> {
    let Workload { gated, hidden_size, intermediate_size, out_features, gate_bias, up_bias, down_bias, .. } = *workload;
    // Twice a size that overflows is not lost: it stays too large for any product.
    let gate_rows = if gated && packed { intermediate_size.saturating_mul(2) } else { intermediate_size };
    let up = (gated && !packed).then_some((intermediate_size, hidden_size, up_bias));
    [Some((gate_rows, hidden_size, gate_bias)), up, Some((out_features, intermediate_size, down_bias))]
        .into_iter()
        .flatten()
}

/// Adds up a [`Cost`]; each method returns `None` when a sum overflows.
struct Count {
    size: u64,
    launches: u64,
    bytes_read: u64,
    bytes_written: u64,
    operations: u64,
}

impl Count {
    fn new(dtype: DType) -> Self {
        Self { size: dtype.size_in_bytes() as u64, launches: 0, bytes_read: 0, bytes_written: 0, operations: 0 }
    }

    fn read(&mut self, elements: u64) -> Option<()> {
        self.bytes_read = self.bytes_read.checked_add(elements.checked_mul(self.size)?)?;
        Some(())
    }

    fn write(&mut self, elements: u64) -> Option<()> {
        self.bytes_written = self.bytes_written.checked_add(elements.checked_mul(self.size)?)?;
        Some(())
    }

    fn read_f32(&mut self, elements: u64) -> Option<()> {
        self.bytes_read = self.bytes_read.checked_add(elements.checked_mul(4)?)?;
        Some(())
    }

    fn write_f32(&mut self, elements: u64) -> Option<()> {
        self.bytes_written = self.bytes_written.checked_add(elements.checked_mul(4)?)?;
        Some(())
    }

    fn operate(&mut self, operations: u64) -> Option<()> {
        self.operations = self.operations.checked_add(operations)?;
        Some(())
    }

    fn multiply_adds(&mut self, products: u64) -> Option<()> {
        self.operate(products.checked_mul(2)?)
    }

    /// One elementwise candle op.
    fn elementwise(&mut self, elements: u64, read: u64) -> Option<()> {
        self.launches += 1;
        self.operate(elements)?;
        self.read(read)?;
        self.write(elements)
    }

    fn cost(self) -> Option<Cost> {
        let Self { launches, bytes_read, bytes_written, operations, .. } = self;
        Some(Cost { launches, bytes_read, bytes_written, operations })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workload, device, kernel, fused, unfused } = self;
        writeln!(f, "{workload}, on {device}")?;
        let width = kernel.len().max(10);
        writeln!(f, "{:<14}  {:>width$}  {:>10}", "", "fused", "unfused")?;
        writeln!(f, "{:<14}  {kernel:>width$}  {:>10}", "kernel", "candle's")?;
        writeln!(f, "{:<14}  {:>width$}  {:>10}", "launches", fused.launches, unfused.launches)?;
        let row = |name, fused, unfused, unit| {
            format!("{name:<14}  {:>width$}  {:>10}", scaled(fused, unit), scaled(unfused, unit))
        };
        writeln!(f, "{}", row("bytes read", fused.bytes_read, unfused.bytes_read, "B"))?;
        writeln!(f, "{}", row("bytes written", fused.bytes_written, unfused.bytes_written, "B"))?;
        write!(f, "{}", row("operations", fused.operations, unfused.operations, "op"))
    }
}

/// A number with a decimal prefix, to three digits or four.
fn scaled(value: u64, unit: &str) -> String {
    const PREFIXES: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    let mut scaled = value as f64;
    let mut prefixes = PREFIXES.into_iter();
    let mut prefix = prefixes.next().unwrap_or_default();
    while scaled >= 1000. {
        match prefixes.next() {
            Some(next) => (scaled, prefix) = (scaled / 1000., next),
            None => break,
        }
    }
    let decimals = if prefix.is_empty() { 0 } else { 2 };
    format!("{scaled:.decimals$} {prefix}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn costs(workload: &Workload) -> (Cost, Cost) {
        let plan = plan(workload, DeviceLocation::Cpu).unwrap();
        (plan.fused, plan.unfused)
    }

    #[test]
    fn gated_f32_by_hand() {
        // 3 tokens, hidden 4, intermediate 5: x 12 elements, weights 20 each, hidden layer 15, result 12.
        let (fused, unfused) = costs(&Workload::swiglu(3, 4, 5));
        assert_eq!(
            fused,
            Cost { launches: 1, bytes_read: 4 * (12 + 60), bytes_written: 4 * 12, operations: 2 * 180 + 15 + 15 }
        );
        // Products read 12 + 20, 12 + 20 and 15 + 20; SiLU 15; the product 30.
        assert_eq!(
            unfused,
            Cost {
                launches: 5,
                bytes_read: 4 * (32 + 32 + 35 + 15 + 30),
                bytes_written: 4 * (15 + 15 + 12 + 15 + 15),
                operations: 2 * 180 + 15 + 15,
            }
        );
        // Packed: one product reads x once.
        let (packed_fused, packed) = costs(&Workload { packed: true, ..Workload::swiglu(3, 4, 5) });
        assert_eq!(packed_fused, fused);
        assert_eq!((packed.launches, packed.bytes_read), (4, unfused.bytes_read - 4 * 12));
        assert_eq!((packed.bytes_written, packed.operations), (unfused.bytes_written, unfused.operations));
    }

    #[test]
    fn plain_bf16_by_hand() {
        // 1 token, hidden 2, intermediate 3, out 7, biases on both layers: weights 6 and 21.
        let workload = Workload { dtype: DType::BF16, out_features: 7, ..Workload::mlp(1, 2, 3) };
        let (fused, unfused) = costs(&workload);
        assert_eq!(
            fused,
            Cost {
                launches: 1,
                bytes_read: 2 * (2 + 6 + 3 + 21 + 7),
                bytes_written: 2 * 7,
                operations: 2 * 27 + 3 + 7 + 3,
            }
        );
        // Widened: x 2 and weight 6 to a product of 3, hidden 3 and weight 21 to a product of 7.
        let widened = 2 + 6 + 3 + 3 + 21 + 7;
        let read = (2 + 6) + (3 + 3) + 3 + (3 + 21) + (7 + 7);
        let written = 3 + 3 + 3 + 7 + 7;
        assert_eq!(
            unfused,
            Cost {
                launches: 5,
                bytes_read: 2 * read + 4 * widened,
                bytes_written: 2 * written + 4 * widened,
                operations: 2 * 27 + 3 + 3 + 7 + widened,
            }
        );
    }

    #[test]
    fn activations_run_as_many_ops_as_their_row_says() -> Result<()> {
        for activation in Activation::ALL {
            let xs = Var::new(&[0.5f32, -0.5], &Device::Cpu)?;
            let launches = activation.unfused(&xs)?.sorted_nodes().len() as u64 - 1;
            let (unary, binary) = activation.unfused_ops();
            assert_eq!(unary + binary, launches, "{activation}");
        }
        Ok(())
    }

    #[test]
    fn weights_are_read_again_for_each_block_of_tokens() {
        let weights = 4 * 3 * 8 * 16;
        for (tokens, passes) in [(1, 1), (8, 1), (9, 1), (512, 1), (513, 2), (4096, 8)] {
            let (fused, _) = costs(&Workload::swiglu(tokens, 8, 16));
            assert_eq!(fused.bytes_read, weights * passes + 4 * 8 * tokens as u64, "{tokens}");
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn candle_products_by_hand() {
        // 3 tokens, hidden 4, intermediate 5: three products, what is between the layers, the second layer's bias.
        let workload = Workload { up_bias: true, down_bias: true, dtype: DType::BF16, ..Workload::swiglu(3, 4, 5) };
        assert_eq!(
            products_cost(&workload),
            Some(Cost {
                launches: 5,
                bytes_read: 2 * (2 * (12 + 20) + (15 + 20) + (15 + 15 + 5) + (12 + 4)),
                bytes_written: 2 * (15 + 15 + 12 + 15 + 12),
                operations: 2 * 180 + 15 + 15 + 15 + 12,
            })
        );
    }

    #[test]
    fn names_the_kernel_that_runs() -> Result<()> {
        for tier in cpu::Tier::ALL.into_iter().filter(|tier| tier.is_available()) {
            let kernel = |workload: Workload| tier.with(|| Ok(plan(&workload, DeviceLocation::Cpu)?.kernel));
            let has_pairs = matches!(tier, cpu::Tier::Avx512Amx | cpu::Tier::Avx512Bf16);
            let wide = if has_pairs { cpu::Tier::Avx512 } else { tier };
            let family = if tier == cpu::Tier::Avx512Amx { "gemm" } else { "decode" };
            let few = Workload::swiglu(8, 4, 5);
            assert_eq!(kernel(few)?, format!("cpu-decode-{wide}"));
            assert_eq!(kernel(Workload { dtype: DType::BF16, ..few })?, format!("cpu-{family}-{tier}"));
            assert_eq!(kernel(Workload { dtype: DType::BF16, tokens: 1, ..few })?, format!("cpu-decode-{tier}"));
            assert_eq!(kernel(Workload { dtype: DType::F64, ..few })?, "cpu-decode-plain");
            assert_eq!(kernel(Workload { tokens: 100, ..few })?, format!("cpu-gemm-{wide}"));
            assert_eq!(kernel(Workload { rows_adjacent: false, ..few })?, format!("cpu-gemm-{wide}"));
        }
        Ok(())
    }

    #[test]
    fn plans_what_the_arguments_are() -> Result<()> {
        let linear = |rows: usize, cols: usize, bias: bool| -> Result<Linear> {
            let bias = bias.then(|| Tensor::zeros(rows, DType::F16, &Device::Cpu)).transpose()?;
            Ok(Linear::new(Tensor::zeros((rows, cols), DType::F16, &Device::Cpu)?, bias))
        };
        let xs = Tensor::zeros((2, 3, 4), DType::F16, &Device::Cpu)?;
        let found = Plan::of_mlp(&xs, &linear(5, 4, false)?, &linear(7, 5, true)?, Activation::Relu)?;
        let expected = Workload {
            activation: Activation::Relu,
            gate_bias: false,
            out_features: 7,
            dtype: DType::F16,
            ..Workload::mlp(6, 4, 5)
        };
        assert_eq!(found.workload, expected);
        assert_eq!(found, plan(&expected, DeviceLocation::Cpu)?);

        let separate = GateUp::Separate { gate: linear(5, 4, true)?, up: linear(5, 4, false)? };
        let transposed = Linear::new(Tensor::zeros((5, 4), DType::F16, &Device::Cpu)?.t()?, None);
        let found = Plan::of_swiglu(&xs, &separate, &transposed, Activation::Silu)?;
        let expected =
            Workload { gate_bias: true, dtype: DType::F16, rows_adjacent: false, ..Workload::swiglu(6, 4, 5) };
        assert_eq!(found.workload, expected);

        // Of two variables of a layer, the op reads copies.
        let variable = || Var::zeros((5, 4), DType::F16, &Device::Cpu)?.as_tensor().t();
        for (bias, rows_adjacent) in [(None, false), (Some(Var::zeros(4, DType::F16, &Device::Cpu)?), true)] {
            let down = Linear::new(variable()?, bias.map(|bias| bias.as_tensor().clone()));
            assert_eq!(Plan::of_swiglu(&xs, &separate, &down, Activation::Silu)?.workload.rows_adjacent, rows_adjacent);
        }

        let packed = GateUp::Packed { linear: linear(10, 4, true)?, order: crate::PackedOrder::UpGate };
        let found = Plan::of_swiglu(&xs, &packed, &linear(4, 5, false)?, Activation::Silu)?;
        let expected =
            Workload { packed: true, gate_bias: true, up_bias: true, dtype: DType::F16, ..Workload::swiglu(6, 4, 5) };
        assert_eq!(found.workload, expected);

        let error = Plan::of_mlp(&xs, &linear(5, 3, false)?, &linear(7, 5, true)?, Activation::Relu).unwrap_err();
        assert!(error.to_string().contains("fused-mlp: fc1 weight: expected shape [out_features, 4]"), "{error}");
        Ok(())
    }

    #[test]
    fn says_what_it_cannot_plan() {
        let workload = Workload::swiglu(1, 4, 5);
        let message = |workload, device| plan(&workload, device).unwrap_err().to_string();
        #[cfg(not(feature = "cuda"))]
        {
            let cuda = message(workload, DeviceLocation::Cuda { gpu_id: 1 });
            assert!(cuda.contains("without the feature `cuda`, found cuda:1"), "{cuda}");
        }
        let metal = message(workload, DeviceLocation::Metal { gpu_id: 0 });
        assert!(metal.contains("metal:0"), "{metal}");
        let dtype = message(Workload { dtype: DType::U8, ..workload }, DeviceLocation::Cpu);
        assert!(dtype.contains("expected f32, f16, bf16 or f64, found u8"), "{dtype}");
        for huge in [
            Workload { tokens: usize::MAX, ..workload },
            Workload { hidden_size: usize::MAX / 2, ..workload },
            Workload { intermediate_size: usize::MAX, packed: true, ..workload },
            Workload { out_features: usize::MAX / 4, tokens: 0, ..workload },
        ] {
            let overflow = message(huge, DeviceLocation::Cpu);
            assert!(overflow.contains("expected sizes whose costs fit in 64 bits"), "{overflow}");
        }
    }

    #[test]
    fn prints_a_table_and_serialises() -> Result<()> {
        let workload = Workload { dtype: DType::F64, ..Workload::swiglu(1, 576, 1536) };
        let plan = plan(&workload, DeviceLocation::Cpu)?;
        let expected = "\
swiglu 576x1536x576, silu, f64, tokens: 1, on cpu
                           fused     unfused
kernel          cpu-decode-plain    candle's
launches                       1           5
bytes read              21.24 MB    21.29 MB
bytes written            4.61 kB    53.76 kB
operations               5.31 Mop    5.31 Mop";
        assert_eq!(plan.to_string().replace(' ', ""), expected.replace(' ', ""));
        let json = serde_json::to_value(&plan).unwrap();
        assert_eq!((&json["dtype"], &json["activation"]), (&"f64".into(), &"silu".into()));
        assert_eq!((&json["kernel"], &json["unfused"]["launches"]), (&"cpu-decode-plain".into(), &5.into()));
        Ok(())
    }
}
