//! A text that is written token by token: with a launch for each op, or a whole token in a CUDA graph.

#[cfg(feature = "cuda")]
use crate::graph::Captured;
use crate::model::{Llama, State};
use anyhow::Result;
use candle_core::Tensor;

/// A text and what it is written by.
pub trait Text {
    /// Begins afresh with this prompt; the logits of the token after it, `[vocab_size]` in f32.
    ///
    /// # Errors
    /// Those of the model.
    fn begin(&mut self, prompt: &[u32]) -> Result<Tensor>;

    /// Goes on with this token; the next one's logits, which the call after this one may overwrite.
    ///
    /// # Errors
    /// No room for it; those of the model.
    fn go_on(&mut self, id: u32) -> Result<Tensor>;

    /// The MLPs' part of the time of one token, where it can only be measured in a way of the text's own.
    ///
    /// # Errors
    /// Those of the model.
    fn mlp_share(&mut self) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// A text with room for so many tokens.
///
/// # Errors
/// More than the model has positions for; a graph on a device that has none, or of ops that cannot be captured.
pub fn open<'a>(model: &'a Llama, tokens: usize, in_graph: bool) -> Result<Box<dyn Text + 'a>> {
    let state = model.state(tokens)?;
    if !in_graph {
        return Ok(Box::new(Launched { model, state }));
    }
    #[cfg(feature = "cuda")]
    return Ok(Box::new(Captured::new(model, state)?));
    #[cfg(not(feature = "cuda"))]
    anyhow::bail!("a graph: this program was built without CUDA");
}

/// Each op is launched by itself.
struct Launched<'a> {
    model: &'a Llama,
    state: State,
}

impl Text for Launched<'_> {
    fn begin(&mut self, prompt: &[u32]) -> Result<Tensor> {
        self.state.clear();
        self.model.next(prompt, &mut self.state)
    }

    fn go_on(&mut self, id: u32) -> Result<Tensor> {
        self.model.next(&[id], &mut self.state)
    }
}
