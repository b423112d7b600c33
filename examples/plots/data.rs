//! The measured times.

use anyhow::{bail, Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

/// What was timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    Swiglu,
    Mlp,
}

/// By which path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    Candle,
    /// Timed by `benches/torch_cuda.py` if asked to; not drawn.
    TorchEager,
    TorchGraph,
    TorchCompile,
    Fused,
    /// The least that memory and arithmetic allow.
    Floor,
}

/// The columns of the file.
const COLUMNS: [&str; 9] = ["machine", "date", "op", "hidden", "intermediate", "dtype", "tokens", "path", "us"];

/// A line of the file.
struct Row<'a> {
    machine: &'a str,
    date: &'a str,
    shape: Shape,
    dtype: &'a str,
    tokens: usize,
    path: Way,
    us: f64,
}

impl<'a> Row<'a> {
    /// # Errors
    /// A line that is no measurement.
    fn parse(line: &'a str) -> Result<Self> {
        let fields: Vec<&str> = line.split(',').collect();
        let &[machine, date, op, hidden, intermediate, dtype, tokens, path, us] = fields.as_slice() else {
            bail!("expected the {} fields {}, found {}", COLUMNS.len(), COLUMNS.join(","), fields.len());
        };
        let number = |text: &str, column: &str| match text.parse::<usize>() {
            Ok(number) if number > 0 => Ok(number),
            _ => bail!("{column}: expected a positive number, found {text:?}"),
        };
        let op = match op {
            "swiglu" => Op::Swiglu,
            "mlp" => Op::Mlp,
            _ => bail!("op: expected swiglu or mlp, found {op:?}"),
        };
        let path = match path {
            "candle" => Way::Candle,
            "torch_eager" => Way::TorchEager,
            "torch_graph" => Way::TorchGraph,
            "torch_compile" => Way::TorchCompile,
            "fused" => Way::Fused,
            "floor" => Way::Floor,
            _ => {
                bail!("path: expected candle, torch_eager, torch_graph, torch_compile, fused or floor, found {path:?}")
            }
        };
        let (hidden, intermediate) = (number(hidden, "hidden")?, number(intermediate, "intermediate")?);
        let us = match us.parse::<f64>() {
            Ok(us) if us.is_finite() && us > 0. => us,
            _ => bail!("us: expected positive microseconds, found {us:?}"),
        };
        let shape = Shape { op, hidden, intermediate };
        Ok(Self { machine, date, shape, dtype, tokens: number(tokens, "tokens")?, path, us })
    }
}

/// An MLP: what it is, its hidden and its intermediate size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    pub op: Op,
    pub hidden: usize,
    pub intermediate: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let op = match self.op {
            Op::Swiglu => "SwiGLU",
            Op::Mlp => "MLP",
        };
        write!(f, "{op} {}x{}", self.hidden, self.intermediate)
    }
}

/// One machine's times in one dtype.
pub struct Measurements {
    pub machine: String,
    pub dtype: String,
    /// Of all rows, earliest first.
    dates: BTreeSet<String>,
    /// Microseconds.
    times: BTreeMap<(Shape, Way, usize), f64>,
}

impl Measurements {
    /// Reads the rows of this machine, or of the only one, and of this dtype.
    ///
    /// # Errors
    /// A file that is missing or has a line that is no measurement; two times of one thing; several machines where none
    /// is named; no row of this machine and dtype.
    pub fn read(path: &Path, machine: Option<&str>, dtype: &str) -> Result<Self> {
        let place = || path.display();
        let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", place()))?;
        let mut lines = text.lines().enumerate();
        if lines.next().map(|(_, header)| header) != Some(COLUMNS.join(",").as_str()) {
            bail!("{}: expected the header {}", place(), COLUMNS.join(","));
        }
        let rows: Vec<Row> = lines
            .map(|(number, line)| Row::parse(line).with_context(|| format!("{}: line {}", place(), number + 1)))
            .collect::<Result<_>>()?;
        let machines: BTreeSet<&str> = rows.iter().map(|row| row.machine).collect();
        let machine = match (machine, machines.len()) {
            (Some(machine), _) => machine,
            (None, 1) => machines.first().copied().unwrap_or_default(),
            (None, _) => {
                let machines: Vec<_> = machines.into_iter().collect();
                bail!("{}: expected --machine, one of: {}", place(), machines.join(", "));
            }
        };
        let mut found = Self {
            machine: machine.to_string(),
            dtype: dtype.to_string(),
            dates: BTreeSet::new(),
            times: BTreeMap::new(),
        };
        for row in rows.iter().filter(|row| row.machine == machine && row.dtype == dtype) {
            if found.times.insert((row.shape, row.path, row.tokens), row.us).is_some() {
                bail!("{}: two times of {} with {} tokens by {:?}", place(), row.shape, row.tokens, row.path);
            }
            found.dates.insert(row.date.to_string());
        }
        if found.times.is_empty() {
            bail!("{}: nothing of machine {machine:?} and dtype {dtype:?}", place());
        }
        Ok(found)
    }

    /// The shapes measured, SwiGLU first, in order of size.
    pub fn shapes(&self) -> Vec<Shape> {
        let mut shapes: Vec<_> = self.times.keys().map(|(shape, ..)| *shape).collect();
        shapes.dedup();
        shapes.sort_by_key(|shape| (shape.op, shape.hidden * shape.intermediate));
        shapes
    }

    /// Tokens and microseconds of one shape by one path, in order of tokens.
    pub fn line(&self, shape: Shape, path: Way) -> Vec<(f64, f64)> {
        let keys = (shape, path, 0)..=(shape, path, usize::MAX);
        self.times.range(keys).map(|((.., tokens), us)| (*tokens as f64, *us)).collect()
    }

    /// Microseconds of one shape by one path.
    pub fn time(&self, shape: Shape, path: Way, tokens: usize) -> Option<f64> {
        self.times.get(&(shape, path, tokens)).copied()
    }

    /// Machine, dtype and when, for a title.
    pub fn origin(&self) -> String {
        let dates = match (self.dates.first(), self.dates.last()) {
            (Some(first), Some(last)) if first != last => format!("{first} to {last}"),
            (Some(date), _) => date.clone(),
            _ => String::new(),
        };
        format!("{}, {}, {dates}", self.machine, self.dtype)
    }
}
