//! A token's pass as one CUDA graph.
//!
//! A graph repeats launches with the arguments that they had when it was captured. So everything that changes from token
//! to token is in memory whose place does not change: the id, the position (the graph itself moves it on), the keys and
//! values. They are [`Llama::step`]'s arguments; what its ops need between them lives in the graph's own memory.

use crate::measuring::gpu::capture;
use crate::model::{Llama, State, Tables};
use crate::text::Text;
use anyhow::{bail, Context, Result};
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::{DType, Tensor};
use std::time::Instant;

/// A text whose prompt goes op by op and every token after it by a graph.
pub struct Captured<'a> {
    token: CudaGraph,
    mlps: CudaGraph,
    // All that the graphs read and write.
    model: &'a Llama,
    state: State,
    _tables: Tables,
    _xs: Tensor,
    _one: Tensor,
    id: Tensor,
    at: Tensor,
    logits: Tensor,
    /// The position on the host's side.
    position: usize,
}

impl<'a> Captured<'a> {
    /// A text in this state's memory, on a device that [`Place::open_to_capture`](crate::shared::cli::Place::open_to_capture)
    /// opened.
    ///
    /// # Errors
    /// An op that cannot be captured: what it says of it.
    pub fn new(model: &'a Llama, mut state: State) -> Result<Self> {
        let device = model.device();
        let tables = model.tables(&state)?;
        let (id, at) = (Tensor::zeros((1, 1), DType::U32, device)?, Tensor::zeros(1, DType::U32, device)?);
        let one = at.ones_like()?;
        let logits = Tensor::zeros(model.vocab_size(), DType::F32, device)?;
        let xs = Tensor::randn(0f32, 1., (1, 1, model.mlp().hidden_size()), device)?.to_dtype(model.dtype())?;

        let mut step = || -> Result<()> {
            logits.slice_set(&model.step(&id, &at, &tables, &mut state)?, 0, 0)?;
            Ok(at.slice_set(&(&at + &one)?, 0, 0)?)
        };
        let token = capture(device, &mut step).context("a token's pass cannot be captured in a CUDA graph")?;
        let mlps =
            capture(device, &mut || model.all_mlps(&xs)).context("the MLPs cannot be captured in a CUDA graph")?;
        Ok(Self { token, mlps, model, state, _tables: tables, _xs: xs, _one: one, id, at, logits, position: 0 })
    }
}

impl Text for Captured<'_> {
    fn begin(&mut self, prompt: &[u32]) -> Result<Tensor> {
        self.state.clear();
        let logits = self.model.next(prompt, &mut self.state)?;
        self.position = prompt.len();
        self.at.slice_set(&Tensor::new(&[prompt.len() as u32], self.at.device())?, 0, 0)?;
        Ok(logits)
    }

    fn go_on(&mut self, id: u32) -> Result<Tensor> {
        if self.position >= self.state.room() {
            bail!("expected at most {} tokens, which there is room for", self.state.room());
        }
        self.id.slice_set(&Tensor::new(&[[id]], self.id.device())?, 0, 0)?;
        self.token.launch()?;
        self.position += 1;
        Ok(self.logits.clone())
    }

    /// Of graphs of a token and of its MLPs alone: the position stays within the room, since it starts again at 0.
    fn mlp_share(&mut self) -> Result<Option<f64>> {
        let device = self.model.device();
        let calls = self.state.room().min(32);
        let seconds = |graph: &CudaGraph| -> Result<f64> {
            self.at.slice_set(&self.at.zeros_like()?, 0, 0)?;
            device.synchronize()?;
            let start = Instant::now();
            for _ in 0..calls {
                graph.launch()?;
            }
            device.synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        };
        Ok(Some(seconds(&self.mlps)? / seconds(&self.token)?))
    }
}
