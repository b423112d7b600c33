//! What is printed.

use crate::generate::{Comparison, Speed};
use crate::measuring::table::markdown;
use anyhow::Result;
use serde::Serialize;
use std::io::Write;

/// What a run was. Serialised, its names stay the same from version to version.
#[derive(Serialize)]
pub struct Run {
    pub model: String,
    pub device: String,
    /// The processor or the GPU.
    pub machine: String,
    pub dtype: &'static str,
    /// Whether tokens after the prompt were launches of a CUDA graph.
    pub graph: bool,
    pub prompt_tokens: usize,
    pub tokens: usize,
    /// What was written, where there is a tokenizer.
    pub text: Option<String>,
    /// The kernel that ran the MLP for one token.
    pub kernel: String,
    /// Of one path, or of both.
    #[serde(flatten)]
    pub measured: Measured,
}

/// One path's speed, or a comparison of both.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Measured {
    One(Speed),
    Both(Box<Comparison>),
}

/// One JSON object in a line.
///
/// # Errors
/// Output that is closed.
pub fn json(out: &mut impl Write, run: &Run) -> Result<()> {
    Ok(writeln!(out, "{}", serde_json::to_string(run)?)?)
}

/// What is known before the first token.
///
/// # Errors
/// Output that is closed.
pub fn opening(out: &mut impl Write, name: &str, machine: &str, dtype: &str) -> Result<()> {
    Ok(writeln!(out, "{name}, {dtype}, {machine}\n")?)
}

/// What is known after the last.
///
/// # Errors
/// Output that is closed.
pub fn closing(out: &mut impl Write, run: &Run) -> Result<()> {
    let Run { prompt_tokens, tokens, kernel, .. } = run;
    writeln!(
        out,
        "\n{prompt_tokens} tokens of prompt, {tokens} written; the fused MLP's kernel for one token is {kernel}\n"
    )?;
    let speeds: Vec<&Speed> = match &run.measured {
        Measured::One(speed) => vec![speed],
        Measured::Both(both) => vec![&both.unfused, &both.fused],
    };
    let share = |share: f64| format!("{:.0}%", 100. * share);
    let or_dash = |cell: Option<String>| cell.unwrap_or("-".to_string());
    let rows = speeds.into_iter().map(|speed| {
        vec![
            format!("{:?}", speed.mlp).to_lowercase(),
            format!("{:.1}", speed.prefill_tokens_per_s),
            share(speed.prefill_mlp_share),
            or_dash(speed.decode_tokens_per_s.map(|speed| format!("{speed:.1}"))),
            or_dash(speed.decode_mlp_share.map(share)),
        ]
    });
    let header = ["MLP", "prefill, tokens/s", "MLPs' share", "decode, tokens/s", "MLPs' share"];
    write!(out, "{}", markdown(1, &header, &rows.collect::<Vec<_>>()))?;
    if let Measured::Both(both) = &run.measured {
        let speedup = or_dash(both.decode_speedup.map(|speedup| format!("{speedup:.2}x")));
        writeln!(out, "\nspeed-up  prefill {:.2}x, decode {speedup}", both.prefill_speedup)?;
        match both.first_difference {
            None => writeln!(out, "tokens    the same, all {tokens}")?,
            Some(at) => writeln!(out, "tokens    the same up to number {at} (counted from 0), which differs")?,
        }
        writeln!(
            out,
            "logits    differ by at most {:.1e} where the text before is the same; the largest is {:.1}",
            both.max_logit_difference, both.max_logit
        )?;
    }
    Ok(())
}
