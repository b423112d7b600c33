//! Random normal tensors, fast enough for large weights.

use candle_core::{bail, DType, Device, Result, Tensor, WithDType};
use half::{bf16, f16};
use rand::{rngs::StdRng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

/// A seeded source of normal values. There are as many as the prime below, then they repeat: drawing hundreds of
/// millions would take longer than what they are for.
pub struct Random {
    values: Vec<f64>,
    next: usize,
}

const PERIOD: usize = 1_000_003;

impl Random {
    /// The source of this seed.
    pub fn new(seed: u64) -> Self {
        let values = StandardNormal.sample_iter(StdRng::seed_from_u64(seed)).take(PERIOD).collect();
        Self { values, next: 0 }
    }

    /// A tensor of normal values of this standard deviation.
    ///
    /// # Errors
    /// A dtype other than f32, f16, bf16 and f64.
    pub fn normal(&mut self, dims: &[usize], deviation: f64, dtype: DType) -> Result<Tensor> {
        match dtype {
            DType::F32 => self.of::<f32>(dims, deviation),
            DType::F16 => self.of::<f16>(dims, deviation),
            DType::BF16 => self.of::<bf16>(dims, deviation),
            DType::F64 => self.of::<f64>(dims, deviation),
            other => bail!("random: expected dtype f32, f16, bf16 or f64, found {}", other.as_str()),
        }
    }

    /// The weight of a layer that keeps a unit variance, `[rows, cols]`.
    ///
    /// # Errors
    /// Those of [`normal`](Self::normal).
    pub fn weight(&mut self, (rows, cols): (usize, usize), dtype: DType) -> Result<Tensor> {
        self.normal(&[rows, cols], (cols as f64).powf(-0.5), dtype)
    }

    fn of<T: WithDType>(&mut self, dims: &[usize], deviation: f64) -> Result<Tensor> {
        let len = dims.iter().product();
        let block: Vec<T> = self.values.iter().map(|value| T::from_f64(deviation * value)).collect();
        let mut values = Vec::with_capacity(len);
        while values.len() < len {
            let end = PERIOD.min(self.next + len - values.len());
            values.extend_from_slice(&block[self.next..end]);
            self.next = end % PERIOD;
        }
        Tensor::from_vec(values, dims, &Device::Cpu)
    }
}
