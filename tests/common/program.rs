//! An example as a program: its exit code, and what it prints.

use std::process::{Command, Output};

/// Runs an example in the profile that this test was built in.
pub fn example(name: &str, arguments: &[&str]) -> Output {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["run", "--quiet", "--example", name]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo.arg("--").args(arguments).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs an example, which is to succeed, and gives what it printed.
pub fn succeeds(name: &str, arguments: &[&str]) -> String {
    let output = example(name, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs an example, which is to fail with exit code 2 and one line that has all of `parts`.
pub fn fails(name: &str, arguments: &[&str], parts: &[&str]) {
    let output = example(name, arguments);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    let lines: Vec<_> = error.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "{arguments:?}: {error}");
    for part in parts {
        assert!(lines[0].contains(part), "{arguments:?}: expected {part:?} in {:?}", lines[0]);
    }
}
