//! The example `plots` as a program: the plots in `docs` and the table in PERFORMANCE.md are those of the data, and wrong data is
//! named.

#[path = "common/program.rs"]
mod program;

use std::fs;

const NAME: &str = "plots";
const HEADER: &str = "machine,date,op,hidden,intermediate,dtype,tokens,path,us";

#[test]
fn the_plots_are_of_the_data() {
    let folder = tempfile::tempdir().unwrap();
    let performance = fs::read_to_string(format!("{}/PERFORMANCE.md", env!("CARGO_MANIFEST_DIR"))).unwrap();
    // The plots that are kept are the second's.
    for data in ["docs/data/cuda-h100.csv", "docs/data/cuda.csv"] {
        let table = program::succeeds(NAME, &["--data", data, "--out", folder.path().to_str().unwrap()]);
        assert!(performance.contains(&table), "PERFORMANCE.md has not the table that plots prints of {data}:\n{table}");
    }
    for name in ["time-over-tokens.svg", "speedup.svg"] {
        let drawn = fs::read_to_string(folder.path().join(name)).unwrap();
        let kept = fs::read_to_string(format!("{}/docs/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(drawn == kept, "docs/{name} is not what `cargo run --example plots` draws");
    }
}

#[test]
fn wrong_data_is_one_line_and_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data.csv");
    let row = "A GPU,2026-01-01,swiglu,4096,14336,bf16,1,candle,100.5";
    let fails = |rows: &[&str], arguments: &[&str], parts: &[&str]| {
        fs::write(&data, rows.join("\n")).unwrap();
        let mut all = vec!["--data", data.to_str().unwrap(), "--out", folder.path().to_str().unwrap()];
        all.extend(arguments);
        program::fails(NAME, &all, parts);
    };
    fails(&[row], &[], &["expected the header machine,date,op"]);
    fails(&[HEADER, row, "A GPU,2026-01-01"], &[], &["line 3", "expected the 9 fields", "found 2"]);
    fails(&[HEADER, &row.replace("candle", "jax")], &[], &["line 2", "path", "jax"]);
    fails(&[HEADER, &row.replace("100.5", "-1")], &[], &["line 2", "positive microseconds", "-1"]);
    fails(&[HEADER, row, row], &[], &["two times of SwiGLU 4096x14336 with 1 tokens"]);
    fails(&[HEADER, row, &row.replace("A GPU", "B GPU")], &[], &["--machine", "A GPU, B GPU"]);
    fails(&[HEADER, row], &["--dtype", "f32"], &["A GPU", "f32"]);
    fails(&[HEADER, row], &["--swiglu", "576x1536"], &["nothing of SwiGLU 576x1536"]);
    fails(&[HEADER, row], &["--swiglu", "576"], &["expected sizes as 4096x14336"]);
    fails(&[HEADER, row], &[], &["no MLP on A GPU was timed"]);
}
