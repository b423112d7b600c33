//! What is printed.

use crate::measure::Row;
use crate::support::machine::Machine;
use crate::support::table::markdown;
use crate::weights::Weights;
use anyhow::Result;

/// One JSON object a line.
///
/// # Errors
/// Output that is closed.
pub fn json(rows: &[Row]) -> Result<()> {
    for row in rows {
        println!("{}", serde_json::to_string(row)?);
    }
    Ok(())
}

/// For people: what was run, where, the plans, and a table for each question.
pub fn human(weights: &Weights, machine: &Machine, rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    let Weights { prefix, hidden_size, intermediate_size, .. } = weights;
    println!("One LLaMA MLP block: y = down({}(gate x) * up x)\n", first.activation);
    println!("weights   {}", weights.description());
    println!("block     {prefix}, hidden size {hidden_size}, intermediate size {intermediate_size}");
    println!("machine   {}", machine.description);

    println!("\nWhat runs for one call, by the crate's plan:");
    for (i, row) in rows.iter().enumerate() {
        // The first row of each dtype: the others differ in the number of tokens.
        if i == 0 || rows[i - 1].dtype != row.dtype {
            println!("\n{}", row.plan);
        }
    }

    println!("\nCorrect? Errors against f64, over all values of the result:\n");
    let cells = rows.iter().map(|row| {
        vec![
            row.dtype.to_string(),
            row.tokens.to_string(),
            format!("{:.1e}", row.max_abs_err),
            format!("{:.1e}", row.rel_l2_err),
            format!("{:.0e}", row.tolerance()),
            format!("{:.1e}", row.unfused_rel_l2_err),
            if row.is_within_tolerance() { "yes" } else { "NO" }.to_string(),
        ]
    });
    let header = ["dtype", "tokens", "max abs", "relative l2", "allowed", "candle's relative l2", "correct"];
    print!("{}", markdown(1, &header, &cells.collect::<Vec<_>>()));

    println!("\nFast? Time of one block, the median over both paths by turns:\n");
    let cells = rows.iter().map(|row| {
        vec![
            row.dtype.to_string(),
            row.kernel.clone(),
            row.copies.to_string(),
            row.tokens.to_string(),
            format!("{:.0}", row.unfused_us),
            format!("{:.0}", row.fused_us),
            format!("{:.2}x", row.speedup),
            format!("{:.0}", row.tokens_per_s),
            format!("{:.1}", row.read_gbs),
            format!("{:.1}", row.machine_read_gbs),
            format!("{:.0}%", 100. * row.share_of_bandwidth),
        ]
    });
    let header = [
        "dtype",
        "kernel",
        "copies",
        "tokens",
        "candle, us",
        "fused, us",
        "speed-up",
        "tokens/s",
        "reads, GB/s",
        "machine, GB/s",
        "share",
    ];
    print!("{}", markdown(2, &header, &cells.collect::<Vec<_>>()));
    println!(
        "\nCopies of the block take turns, so many (unless --copies says otherwise, and at most 64) that each has left\n\
         the caches by its next turn: weights come from memory, as in a model of many layers; those of very small\n\
         blocks stay in the caches. \"reads\" is what the fused block reads over its time, \"machine\" how fast this\n\
         machine reads memory. Few tokens are limited by that, many by arithmetic."
    );

    println!("\nSmall? The most memory that one call takes beyond weights and input:\n");
    let cells = rows.iter().map(|row| {
        vec![
            row.dtype.to_string(),
            row.tokens.to_string(),
            format!("{:.1}", row.unfused_peak_bytes as f64 / 1e3),
            format!("{:.1}", row.fused_peak_bytes as f64 / 1e3),
        ]
    });
    print!("{}", markdown(1, &["dtype", "tokens", "candle, kB", "fused, kB"], &cells.collect::<Vec<_>>()));
}
