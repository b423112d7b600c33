//! How a layer's weights and biases reach an op that takes three tensors only.
//!
//! A candle op differentiates with respect to its arguments, and there are three: x and one for each layer. So a
//! layer's *tracked* parameters (variables, or computed from some) travel in that layer's argument, and those that
//! are not tracked stay in the op itself ([`Slot::Held`]): they are read in place, never copied, and cost nothing in
//! the backward pass. One tracked tensor is the argument as it is; several are concatenated, flattened, by candle's
//! differentiable ops, so that each gets its part of the gradient. At inference nothing is tracked and nothing is
//! ever copied; and a module never holds a copy that an optimiser's step would leave behind.

use candle_core::{bail, Layout, Result, Shape, Tensor};
use candle_nn::Linear;
use std::borrow::Cow;

/// Which half of a packed first layer is which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PackedOrder {
    /// The first half of the rows is the gate (Phi-3, GLM, ModernBERT).
    GateUp,
    /// The first half of the rows is up, the second the gate (diffusers' GEGLU, Stella).
    UpGate,
}

/// The first layer of a gated MLP: two projections, apart or packed into one.
#[derive(Debug, Clone)]
pub enum GateUp {
    /// Two layers of `[intermediate_size, hidden_size]`.
    Separate {
        /// The projection that the activation is applied to.
        gate: Linear,
        /// The projection that the activated gate is multiplied with.
        up: Linear,
    },
    /// One layer of `[2 intermediate_size, hidden_size]`.
    Packed {
        /// Both projections' rows, one after the other.
        linear: Linear,
        /// Which come first.
        order: PackedOrder,
    },
}

impl GateUp {
    /// The gate and up projections as two layers; of a packed one, views (no copy, differentiable).
    ///
    /// # Errors
    /// A packed weight or bias whose first dimension is odd, or a weight or bias without dimensions.
    pub fn split(&self) -> Result<(Linear, Linear)> {
        match self {
            Self::Separate { gate, up } => Ok((gate.clone(), up.clone())),
            Self::Packed { linear, order } => {
                let half = |second: bool| -> Result<Linear> {
                    let part = |t: &Tensor| {
                        let len = halved(t)?;
                        t.narrow(0, if second { len } else { 0 }, len)
                    };
                    Ok(Linear::new(part(linear.weight())?, linear.bias().map(part).transpose()?))
                };
                Ok(match order {
                    PackedOrder::GateUp => (half(false)?, half(true)?),
                    PackedOrder::UpGate => (half(true)?, half(false)?),
                })
            }
        }
    }
}

/// Half of the first dimension of a packed weight or bias.
pub(crate) fn halved(packed: &Tensor) -> Result<usize> {
    match packed.dims().first() {
        Some(rows) if rows % 2 == 0 => Ok(rows / 2),
        _ => bail!(
            "fused-swiglu: packed gate and up projection: expected an even number of rows, gate and up in equal parts, \
             found shape {:?}",
            packed.dims()
        ),
    }
}

/// Where an op finds one parameter.
#[derive(Debug, Clone)]
pub(crate) enum Slot {
    /// In the op itself: not tracked.
    Held(Tensor),
    /// The rows `start..start + len` of the layer's argument, which is the layer's only tracked tensor.
    Rows { start: usize, len: usize },
    /// From element `start` on in the layer's argument, a concatenation of flattened tensors.
    Flat { start: usize, shape: Shape },
}

impl Slot {
    /// The rows `start..start + len` of this parameter.
    fn rows(&self, start: usize, len: usize) -> Result<Self> {
        Ok(match self {
            Self::Held(tensor) => Self::Held(tensor.narrow(0, start, len)?),
            Self::Rows { start: first, .. } => Self::Rows { start: first + start, len },
            Self::Flat { start: first, shape } => {
                let mut dims = shape.dims().to_vec();
                dims[0] = len;
                let row_size = dims[1..].iter().product::<usize>();
                Self::Flat { start: first + start * row_size, shape: dims.into() }
            }
        })
    }

    /// The parameter as a tensor, given its layer's argument.
    pub(crate) fn tensor(&self, argument: &Tensor) -> Result<Tensor> {
        match self {
            Self::Held(tensor) => Ok(tensor.clone()),
            Self::Rows { start, len } => argument.narrow(0, *start, *len),
            Self::Flat { start, shape } => argument.narrow(0, *start, shape.elem_count())?.reshape(shape),
        }
    }

    /// Where the parameter lies: in the op's own tensor, or else in the argument of this layout.
    pub(crate) fn locate(&self, argument: &Layout) -> Result<(Option<&Tensor>, Cow<'_, Layout>)> {
        Ok(match self {
            Self::Held(tensor) => (Some(tensor), Cow::Borrowed(tensor.layout())),
            Self::Rows { start, len } => (None, Cow::Owned(argument.narrow(0, *start, *len)?)),
            Self::Flat { start, shape } => {
                (None, Cow::Owned(Layout::contiguous_with_offset(shape.clone(), argument.start_offset() + start)))
            }
        })
    }

    /// Whether the parameter is in the layer's argument, so that a gradient is asked of it.
    pub(crate) fn is_tracked(&self) -> bool {
        !matches!(self, Self::Held(_))
    }

    /// Its place among the layer's tracked parameters.
    fn start(&self) -> usize {
        match self {
            Self::Held(_) => 0,
            Self::Rows { start, .. } | Self::Flat { start, .. } => *start,
        }
    }
}

/// The slots of one projection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Projection<T = Slot> {
    pub weight: T,
    pub bias: Option<T>,
}

impl<T> Projection<T> {
    pub(crate) fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> Result<U>) -> Result<Projection<U>> {
        Ok(Projection { weight: f(&self.weight)?, bias: self.bias.as_ref().map(f).transpose()? })
    }

    fn parts(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

impl Projection<Slot> {
    /// Whether a gradient is asked of any of its parameters.
    pub(crate) fn is_tracked(&self) -> bool {
        self.parts().any(Slot::is_tracked)
    }

    fn rows(&self, start: usize, len: usize) -> Result<Self> {
        self.map(|slot| slot.rows(start, len))
    }
}

/// A layer: the argument that stands for it, and where its projections' parameters are.
pub(crate) type Packed<const N: usize> = (Tensor, [Projection; N]);

/// The parameters of a layer, in the order of [`Projection::parts`].
fn parameters<'a>(linears: &'a [&Linear]) -> impl Iterator<Item = &'a Tensor> {
    linears.iter().flat_map(|linear| std::iter::once(linear.weight()).chain(linear.bias()))
}

/// Packs a layer of one or more projections.
///
/// # Errors
/// Those of candle's `cat`.
pub(crate) fn pack<const N: usize>(linears: [&Linear; N]) -> Result<Packed<N>> {
    let tracked: Vec<&Tensor> = parameters(&linears).filter(|t| t.track_op()).collect();
    let argument = match tracked.as_slice() {
        [] => linears[0].weight().clone(),
        [only] => (*only).clone(),
        several => Tensor::cat(&several.iter().map(|t| t.flatten_all()).collect::<Result<Vec<_>>>()?, 0)?,
    };
    let mut start = 0;
    let mut slot = |tensor: &Tensor| match tracked.len() {
        _ if !tensor.track_op() => Slot::Held(tensor.clone()),
        1 => Slot::Rows { start: 0, len: tensor.dims().first().copied().unwrap_or(1) },
        _ => {
            let found = Slot::Flat { start, shape: tensor.shape().clone() };
            start += tensor.elem_count();
            found
        }
    };
    let projections =
        linears.map(|linear| Projection { weight: slot(linear.weight()), bias: linear.bias().map(&mut slot) });
    Ok((argument, projections))
}

/// Whether the elements of every weight's rows are adjacent where the op reads them, once a layer of these projections
/// is packed: several tracked parameters are copied, which makes them so.
pub(crate) fn rows_adjacent(linears: &[&Linear]) -> bool {
    let copied = parameters(linears).filter(|t| t.track_op()).count() > 1;
    linears.iter().map(|linear| linear.weight()).all(|w| w.stride().last() == Some(&1) || copied && w.track_op())
}

/// Packs the first layer of a gated MLP; its two projections are the gate and up, in this order.
///
/// # Errors
/// Those of [`pack`] and of [`GateUp::split`].
pub(crate) fn pack_gate_up(gate_up: &GateUp) -> Result<Packed<2>> {
    match gate_up {
        GateUp::Separate { gate, up } => pack([gate, up]),
        GateUp::Packed { linear, order } => {
            let len = halved(linear.weight())?;
            let (argument, [both]) = pack([linear])?;
            let (first, second) = (both.rows(0, len)?, both.rows(len, len)?);
            Ok(match order {
                PackedOrder::GateUp => (argument, [first, second]),
                PackedOrder::UpGate => (argument, [second, first]),
            })
        }
    }
}

/// The gradient of a layer's argument out of those of its parameters; `None` where nothing is tracked.
///
/// # Errors
/// Those of candle's `cat` and `reshape`.
pub(crate) fn assemble(
    argument: &Tensor,
    slots: &[&Projection],
    gradients: Vec<Projection<Option<Tensor>>>,
) -> Result<Option<Tensor>> {
    let mut parts: Vec<(usize, Tensor)> = slots
        .iter()
        .flat_map(|projection| projection.parts())
        .zip(gradients.iter().flat_map(Projection::parts))
        .filter_map(|(slot, gradient)| Some((slot.start(), gradient.clone()?)))
        .collect();
    parts.sort_by_key(|(start, _)| *start);
    match parts.as_slice() {
        [] => Ok(None),
        [(_, whole)] => whole.reshape(argument.shape()).map(Some),
        several => {
            let flat = several.iter().map(|(_, t)| t.flatten_all()).collect::<Result<Vec<_>>>()?;
            Tensor::cat(&flat, 0)?.reshape(argument.shape()).map(Some)
        }
    }
}

/// Where a layout's matrix or vector lies in its storage, checked to lie within it. A vector is one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
    /// The first element and the one past the last, both 0 where there is none.
    start: usize,
    end: usize,
}

impl Extent {
    /// # Errors
    /// A layout of another rank, or one that reaches past the storage's `len` elements.
    pub(crate) fn of(layout: &Layout, len: usize) -> Result<Self> {
        let (rows, cols, row_stride, col_stride) = match (layout.dims(), layout.stride()) {
            (&[cols], &[col_stride]) => (1, cols, 0, col_stride),
            (&[rows, cols], &[row_stride, col_stride]) => (rows, cols, row_stride, col_stride),
            (dims, _) => bail!("expected a matrix or a vector, found shape {dims:?}"),
        };
        let extent = |start, end| Self { rows, cols, row_stride, col_stride, start, end };
        if rows == 0 || cols == 0 {
            return Ok(extent(0, 0));
        }
        let last_row = (rows - 1).checked_mul(row_stride);
        let last_col = (cols - 1).checked_mul(col_stride);
        let end = last_row
            .zip(last_col)
            .and_then(|(r, c)| r.checked_add(c)?.checked_add(layout.start_offset())?.checked_add(1));
        match end {
            Some(end) if end <= len => Ok(extent(layout.start_offset(), end)),
            _ => bail!("a layout of {layout:?} reaches past the {len} elements of its storage"),
        }
    }

    /// The first element's place in the storage.
    #[cfg(feature = "cuda")]
    pub(crate) fn start(&self) -> usize {
        self.start
    }
}

/// A matrix or vector that a kernel reads, checked to lie within its storage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a, E> {
    data: &'a [E],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a, E> Matrix<'a, E> {
    /// The view that `layout` has of `storage`; a vector is one row.
    ///
    /// # Errors
    /// A layout of another rank, or one that reaches past the end of the storage.
    pub(crate) fn new(storage: &'a [E], layout: &Layout) -> Result<Self> {
        let Extent { rows, cols, row_stride, col_stride, start, end } = Extent::of(layout, storage.len())?;
        Ok(Self { data: &storage[start..end], rows, cols, row_stride, col_stride })
    }

    /// The first element. Element (r, c) is `r * row_stride + c * col_stride` after it, for every r and c in range.
    pub(crate) fn as_ptr(&self) -> *const E {
        self.data.as_ptr()
    }

    /// Element (row, col).
    pub(crate) fn get(&self, row: usize, col: usize) -> E
    where
        E: Copy,
    {
        self.data[row * self.row_stride + col * self.col_stride]
    }
}
