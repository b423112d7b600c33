//! The modules' tracing span. Alone in its program: a span is not seen by a thread's own subscriber if a thread without
//! one comes to it first.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_fused_mlp::{Activation, FusedMlp, FusedSwiGlu};
use candle_nn::Linear;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// Counts the spans named `mlp` that are entered.
struct Spans(Arc<AtomicUsize>);

impl tracing::Subscriber for Spans {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.name() == "mlp"
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, _: &tracing::Event<'_>) {}
    fn enter(&self, _: &tracing::span::Id) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn forward_enters_the_span_mlp() -> Result<()> {
    let entered = Arc::new(AtomicUsize::new(0));
    tracing::subscriber::with_default(Spans(entered.clone()), || {
        let linear =
            |dims| Ok::<_, candle_core::Error>(Linear::new(Tensor::ones(dims, DType::F32, &Device::Cpu)?, None));
        let (fc1, fc2) = (linear((8, 4))?, linear((4, 8))?);
        let xs = Tensor::ones((2, 4), DType::F32, &Device::Cpu)?;
        let plain = FusedMlp::from_linears(&fc1, &fc2, Activation::Relu)?;
        plain.forward(&xs)?;
        assert_eq!(entered.load(Ordering::Relaxed), 1);
        FusedSwiGlu::from_linears(&fc1, &fc1, &fc2)?.forward(&xs)?;
        assert_eq!(entered.load(Ordering::Relaxed), 2);
        plain.forward(&xs)?;
        assert_eq!(entered.load(Ordering::Relaxed), 3);
        Ok(())
    })
}
