//! One model in training.

use crate::measuring::memory::peak;
use crate::measuring::random::Random;
use crate::model::{Config, Llama, MlpPath};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::loss::cross_entropy;
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use std::collections::{BTreeMap, HashMap};
use std::f64::consts::PI;
use std::path::Path;
use std::time::Instant;

/// How to train.
pub struct Plan {
    pub steps: usize,
    pub learning_rate: f64,
    pub seed: u64,
}

/// A model, its optimizer and what was measured.
pub struct Training<'a> {
    plan: &'a Plan,
    model: Llama,
    variables: BTreeMap<String, Var>,
    optimizer: AdamW,
    losses: Vec<f64>,
    seconds: Vec<f64>,
    bytes: Vec<usize>,
}

impl<'a> Training<'a> {
    /// A fresh model: the same weights for the same seed, whichever MLP it has.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(config: &Config, path: MlpPath, plan: &'a Plan) -> Result<Self> {
        let map = VarMap::new();
        let model = Llama::load(config, path, VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu))?;
        let variables: BTreeMap<String, Var> =
            map.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone().into_iter().collect();
        // candle's random numbers on the CPU cannot be seeded. Norms stay at one.
        let mut random = Random::new(plan.seed);
        for (name, variable) in variables.iter().filter(|(_, variable)| variable.rank() == 2) {
            // Layers that add to the stream start smaller, by how many there are.
            let adds = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let depth = if adds { (2. * config.num_hidden_layers as f64).sqrt() } else { 1. };
            let deviation = if name.contains("embed") { 0.02 } else { (variable.dims()[1] as f64).powf(-0.5) / depth };
            variable.set(&random.normal(variable.dims(), deviation, DType::F32)?)?;
        }
        let settings = ParamsAdamW { lr: 0., beta1: 0.9, beta2: 0.99, weight_decay: 0.1, ..Default::default() };
        let optimizer = AdamW::new(variables.values().cloned().collect(), settings)?;
        Ok(Self { plan, model, variables, optimizer, losses: Vec::new(), seconds: Vec::new(), bytes: Vec::new() })
    }

    /// One step on these tokens, `[batch, context]`, and those that follow each.
    ///
    /// # Errors
    /// Those of candle.
    pub fn step(&mut self, inputs: &Tensor, targets: &Tensor) -> Result<()> {
        self.optimizer.set_learning_rate(self.learning_rate());
        let start = Instant::now();
        let (loss, bytes) = peak(|| -> Result<f32> {
            let loss = cross_entropy(&self.model.forward(inputs)?.flatten_to(1)?, &targets.flatten_all()?)?;
            self.optimizer.backward_step(&loss)?;
            Ok(loss.to_scalar()?)
        });
        self.seconds.push(start.elapsed().as_secs_f64());
        self.losses.push(f64::from(loss?));
        self.bytes.push(bytes);
        Ok(())
    }

    /// Up in a straight line, then down in a cosine's half turn.
    fn learning_rate(&self) -> f64 {
        let Plan { steps, learning_rate, .. } = *self.plan;
        let (done, warm_up) = (self.losses.len() as f64, (steps as f64 / 20.).max(1.));
        if done < warm_up {
            return learning_rate * (done + 1.) / (warm_up + 1.);
        }
        let way = (done - warm_up) / (steps as f64 - warm_up).max(1.);
        learning_rate * (0.1 + 0.9 * (0.5 + 0.5 * (PI * way).cos()))
    }

    /// Which MLP it has.
    pub fn path(&self) -> MlpPath {
        self.model.mlp_path
    }

    /// Trained numbers.
    pub fn parameters(&self) -> usize {
        self.variables.values().map(|variable| variable.elem_count()).sum()
    }

    /// The loss of each step.
    pub fn losses(&self) -> &[f64] {
        &self.losses
    }

    /// The mean loss of the last 20 steps.
    pub fn smoothed_loss(&self) -> f64 {
        let last = &self.losses[self.losses.len().saturating_sub(20)..];
        last.iter().sum::<f64>() / last.len() as f64
    }

    /// The median time of a step, in seconds.
    pub fn median_seconds(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }

    /// The most heap that a step takes beyond weights and the optimizer's state. The first step makes that, so it is not
    /// counted where there are others.
    pub fn most_bytes(&self) -> usize {
        self.bytes.iter().skip(usize::from(self.bytes.len() > 1)).copied().max().unwrap_or(0)
    }

    /// Writes the weights, in f16.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let half = |(name, variable): (&String, &Var)| Ok((name.clone(), variable.to_dtype(DType::F16)?));
        let tensors: HashMap<String, Tensor> = self.variables.iter().map(half).collect::<Result<_>>()?;
        candle_core::safetensors::save(&tensors, path).with_context(|| format!("{}: cannot be written", path.display()))
    }
}
