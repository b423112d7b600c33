//! Safetensors files, whole or sharded, with errors that name the file.

use anyhow::{anyhow, bail, Context, Result};
use candle_core::safetensors::MmapedSafetensors;
use serde::Deserialize;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The index of a sharded checkpoint.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, PathBuf>,
}

/// Which file holds which tensor: of a safetensors file, or of the index of several.
///
/// # Errors
/// A file that is missing or is neither.
pub fn file_of_each_tensor(path: &Path) -> Result<HashMap<String, PathBuf>> {
    if path.extension().is_some_and(|extension| extension == "json") {
        let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let index: Index = serde_json::from_str(&text)
            .with_context(|| format!("{}: not the index of a sharded checkpoint", path.display()))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        Ok(index.weight_map.into_iter().map(|(name, file)| (name, folder.join(file))).collect())
    } else {
        let names = mapped(&[path.to_path_buf()])?;
        Ok(names.tensors().into_iter().map(|(name, _)| (name, path.to_path_buf())).collect())
    }
}

/// The tensors of these files, mapped.
///
/// # Errors
/// A file that is missing or no whole safetensors file.
pub fn mapped(files: &[PathBuf]) -> Result<MmapedSafetensors> {
    for file in files {
        fs::File::open(file).with_context(|| format!("{}: cannot be read", file.display()))?;
        if file.is_dir() {
            bail!("{}: expected a safetensors file, found a folder", file.display());
        }
        // SAFETY: as for every mapped file, nothing may change it while it is in use.
        unsafe { MmapedSafetensors::new(file) }
            .map_err(|error| anyhow!("{}: not a whole safetensors file: {}", file.display(), cause(&error)))?;
    }
    // SAFETY: as above.
    Ok(unsafe { MmapedSafetensors::multi(files) }?)
}

/// What candle's error is about, without the path and the backtrace around it.
pub fn cause(error: &candle_core::Error) -> &candle_core::Error {
    match error {
        candle_core::Error::WithPath { inner, .. } | candle_core::Error::WithBacktrace { inner, .. } => cause(inner),
        other => other,
    }
}
