//! Writing text, and measuring it.

use crate::model::{Llama, MlpPath};
use crate::text::{self, Text};
use anyhow::Result;
use candle_core::Tensor;
use candle_transformers::generation::LogitsProcessor;
use serde::Serialize;
use std::time::{Duration, Instant};

/// How the next token is chosen, and when to end.
pub struct Settings<'a> {
    /// Tokens to write, at most.
    pub tokens: usize,
    /// The tokens that end a text.
    pub end_tokens: &'a [u32],
    /// The likeliest token without it.
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub seed: u64,
}

/// What was written, and how long it took.
pub struct Written {
    pub ids: Vec<u32>,
    /// From the prompt to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// Goes on from the prompt; `each` sees every token with the logits that it was chosen by.
///
/// # Errors
/// Those of the model and of `each`.
pub fn generate(
    text: &mut dyn Text,
    prompt: &[u32],
    settings: &Settings,
    mut each: impl FnMut(u32, &Tensor) -> Result<()>,
) -> Result<Written> {
    let mut chooser = LogitsProcessor::new(settings.seed, settings.temperature, settings.top_p);
    let mut ids: Vec<u32> = Vec::new();
    let start = Instant::now();
    let mut prefill = None;
    loop {
        let logits = match ids.last() {
            None => text.begin(prompt)?,
            Some(&last) => text.go_on(last)?,
        };
        let id = chooser.sample(&logits)?;
        prefill.get_or_insert_with(|| start.elapsed());
        ids.push(id);
        each(id, &logits)?;
        if ids.len() == settings.tokens || settings.end_tokens.contains(&id) {
            break;
        }
    }
    let prefill = prefill.unwrap_or_default();
    Ok(Written { ids, prefill, decode: start.elapsed() - prefill })
}

/// The speed of one path.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Speed {
    pub mlp: MlpPath,
    /// Of the prompt, to the first token.
    pub prefill_tokens_per_s: f64,
    /// Of the tokens after the first; of none if there are none.
    pub decode_tokens_per_s: Option<f64>,
    /// The MLPs' part of the time, in a pass of its own in which the device is waited for around each MLP; of tokens in a CUDA
    /// graph the time of a graph of the MLPs alone over a whole token's.
    pub prefill_mlp_share: f64,
    pub decode_mlp_share: Option<f64>,
}

impl Speed {
    /// The speed of these runs of a text, of which the median counts.
    ///
    /// # Errors
    /// Those of the model.
    pub fn of(model: &Llama, text: &mut dyn Text, prompt: &[u32], runs: &[Written]) -> Result<Self> {
        let median = |time: fn(&Written) -> f64| {
            let mut times: Vec<f64> = runs.iter().map(time).collect();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let decoded = |run: &Written| run.ids.len() > 1;
        let (prefill_mlp_share, launched_mlp_share) = mlp_shares(model, prompt, &runs[0].ids)?;
        let decode_mlp_share = text.mlp_share()?.or(launched_mlp_share);
        Ok(Self {
            mlp: model.mlp_path,
            prefill_tokens_per_s: prompt.len() as f64 / median(|run| run.prefill.as_secs_f64()),
            decode_tokens_per_s: runs
                .iter()
                .all(decoded)
                .then(|| 1. / median(|run| run.decode.as_secs_f64() / (run.ids.len() - 1) as f64)),
            prefill_mlp_share,
            decode_mlp_share,
        })
    }
}

/// The MLPs' part of the time of the prompt, and of some tokens after it.
fn mlp_shares(model: &Llama, prompt: &[u32], ids: &[u32]) -> Result<(f64, Option<f64>)> {
    const STEPS: usize = 8;
    let mut state = model.state(prompt.len() + ids.len())?;
    let mut share = |steps: &[&[u32]]| -> Result<f64> {
        state.mlp_time = Some(Duration::ZERO);
        let start = Instant::now();
        for step in steps {
            model.next(step, &mut state)?;
        }
        model.device().synchronize()?;
        let total = start.elapsed();
        Ok(state.mlp_time.unwrap_or_default().as_secs_f64() / total.as_secs_f64())
    };
    let prefill = share(&[prompt])?;
    let steps: Vec<&[u32]> = ids[..ids.len() - 1].chunks(1).take(STEPS).collect();
    Ok((prefill, if steps.is_empty() { None } else { Some(share(&steps)?) }))
}

/// Both paths from the same prompt.
#[derive(Serialize)]
pub struct Comparison {
    /// Whether all tokens are the same; if not, the first that differ, counted from 0.
    pub same_tokens: bool,
    pub first_difference: Option<usize>,
    /// The largest difference of two logits, over the tokens up to and with the first that differ, which follow the
    /// same text.
    pub max_logit_difference: f32,
    /// The largest absolute logit among them, to see it by.
    pub max_logit: f32,
    pub unfused: Speed,
    pub fused: Speed,
    pub prefill_speedup: f64,
    pub decode_speedup: Option<f64>,
    #[serde(skip)]
    pub ids: Vec<u32>,
}

/// Runs both paths once for their tokens and logits, then `rounds` times by turns for their speed.
///
/// # Errors
/// Those of the model.
pub fn compare(
    model: &Llama,
    prompt: &[u32],
    settings: &Settings,
    (rounds, in_graph): (usize, bool),
) -> Result<Comparison> {
    let models = [MlpPath::Unfused, MlpPath::Fused].map(|path| model.with_mlp(path));
    let [unfused, fused] = &models;
    let room = prompt.len() + settings.tokens;
    let mut texts = [text::open(unfused, room, in_graph)?, text::open(fused, room, in_graph)?];
    let (mut expected, mut found) = (Vec::new(), Vec::new());
    let keep = |kept: &mut Vec<Vec<f32>>, logits: &Tensor| {
        kept.push(logits.to_vec1()?);
        Ok(())
    };
    let a = generate(&mut *texts[0], prompt, settings, |_, logits| keep(&mut expected, logits))?.ids;
    let b = generate(&mut *texts[1], prompt, settings, |_, logits| keep(&mut found, logits))?.ids;
    let first_difference = a.iter().zip(&b).position(|(a, b)| a != b);
    let comparable = first_difference.map_or(a.len(), |at| at + 1);
    let pairs = || expected.iter().zip(&found).take(comparable).flat_map(|(a, b)| a.iter().zip(b));
    // `max` passes over NaN, which is no small difference.
    let largest = |values: &mut dyn Iterator<Item = f32>| {
        values.fold(0f32, |largest, value| if value.is_nan() { value } else { largest.max(value) })
    };
    let max_logit_difference = largest(&mut pairs().map(|(a, b)| (a - b).abs()));
    let max_logit = largest(&mut pairs().map(|(a, _)| a.abs()));

    let mut runs = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (text, runs) in texts.iter_mut().zip(&mut runs) {
            runs.push(generate(&mut **text, prompt, settings, |_, _| Ok(()))?);
        }
    }
    let unfused = Speed::of(unfused, &mut *texts[0], prompt, &runs[0])?;
    let fused = Speed::of(fused, &mut *texts[1], prompt, &runs[1])?;
    Ok(Comparison {
        same_tokens: a == b,
        first_difference,
        max_logit_difference,
        max_logit,
        unfused,
        fused,
        prefill_speedup: fused.prefill_tokens_per_s / unfused.prefill_tokens_per_s,
        decode_speedup: fused
            .decode_tokens_per_s
            .zip(unfused.decode_tokens_per_s)
            .map(|(fused, unfused)| fused / unfused),
        ids: b,
    })
}
