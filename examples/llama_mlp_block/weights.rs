//! Finding the block in a checkpoint, or making one.

use crate::options::Options;
use crate::support::random::Random;
use anyhow::{anyhow, bail, Context, Result};
use candle_core::safetensors::{save, MmapedSafetensors};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The block's projections, as LLaMA names them.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// A checkpoint's file or files, and the block in it.
pub struct Weights {
    /// What was opened: a safetensors file or an index.
    pub path: PathBuf,
    /// Where the block is: what comes before `.gate_proj.weight`.
    pub prefix: String,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    /// The files that hold the block's tensors.
    files: Vec<PathBuf>,
    /// The folder of a file that was made, removed with this.
    made: Option<TempDir>,
}

impl Weights {
    /// The weights that the options ask for.
    ///
    /// # Errors
    /// A file that is missing or no whole safetensors file, a prefix where no block is, tensors of other shapes than a
    /// block has.
    pub fn open(options: &Options) -> Result<Self> {
        let prefix = options.prefix();
        let (path, made) = match &options.weights {
            Some(path) => (path.clone(), None),
            None => {
                let folder = TempDir::new().context("no room for a file of random weights")?;
                let path = folder.path().join("model.safetensors");
                make(&path, &prefix, options.hidden.get(), options.intermediate.get())?;
                (path, Some(folder))
            }
        };
        let shards = Shards::of(&path)?;
        let files = shards.files(&prefix)?;
        let tensors = mapped(&files)?;
        let shape = |name: &str| -> Result<[usize; 2]> {
            let name = format!("{prefix}.{name}.weight");
            let view = tensors.get(&name).map_err(|_| anyhow!("{}: expected a tensor {name}", files[0].display()))?;
            let dims = view.shape();
            dims.try_into().map_err(|_| anyhow!("{name}: expected a matrix, found shape {dims:?}"))
        };
        let [intermediate_size, hidden_size] = shape("gate_proj")?;
        for (name, expected) in
            [("up_proj", [intermediate_size, hidden_size]), ("down_proj", [hidden_size, intermediate_size])]
        {
            let found = shape(name)?;
            if found != expected {
                bail!("{prefix}.{name}.weight: expected shape {expected:?} to go with gate_proj, found {found:?}");
            }
        }
        Ok(Self { path, prefix, hidden_size, intermediate_size, files, made })
    }

    /// A builder at the block: each tensor that is taken from it gets memory of its own.
    ///
    /// # Errors
    /// A file that has gone since it was opened.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        let tensors = mapped(&self.files)?;
        Ok(VarBuilder::from_backend(Box::new(tensors), dtype, device.clone()).pp(&self.prefix))
    }

    /// Whether the weights were made rather than given.
    pub fn are_random(&self) -> bool {
        self.made.is_some()
    }

    /// The parameters of the block.
    pub fn elements(&self) -> usize {
        PROJECTIONS.len() * self.hidden_size * self.intermediate_size
    }
}

/// Writes a safetensors file with one block of random weights, in f32 and at the scale of a trained model's.
fn make(path: &Path, prefix: &str, hidden_size: usize, intermediate_size: usize) -> Result<()> {
    let mut random = Random::new(0);
    let shapes = [(intermediate_size, hidden_size), (intermediate_size, hidden_size), (hidden_size, intermediate_size)];
    let tensors: HashMap<String, Tensor> = PROJECTIONS
        .into_iter()
        .zip(shapes)
        .map(|(name, shape)| Ok((format!("{prefix}.{name}.weight"), random.weight(shape, DType::F32)?)))
        .collect::<Result<_>>()?;
    save(&tensors, path).with_context(|| format!("{}: cannot be written", path.display()))
}

/// Which file holds which tensor.
struct Shards {
    path: PathBuf,
    file_of: HashMap<String, PathBuf>,
}

/// The index of a sharded checkpoint.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, PathBuf>,
}

impl Shards {
    fn of(path: &Path) -> Result<Self> {
        let file_of = if path.extension().is_some_and(|extension| extension == "json") {
            let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
            let index: Index = serde_json::from_str(&text)
                .with_context(|| format!("{}: not the index of a sharded checkpoint", path.display()))?;
            let folder = path.parent().unwrap_or(Path::new(""));
            index.weight_map.into_iter().map(|(name, file)| (name, folder.join(file))).collect()
        } else {
            let names = mapped(&[path.to_path_buf()])?;
            names.tensors().into_iter().map(|(name, _)| (name, path.to_path_buf())).collect()
        };
        Ok(Self { path: path.to_path_buf(), file_of })
    }

    /// The files that hold the block at this prefix.
    fn files(&self, prefix: &str) -> Result<Vec<PathBuf>> {
        let names = PROJECTIONS.map(|name| format!("{prefix}.{name}.weight"));
        let biases = PROJECTIONS.map(|name| format!("{prefix}.{name}.bias"));
        let files: Option<BTreeSet<_>> = names.iter().map(|name| self.file_of.get(name).cloned()).collect();
        let Some(mut files) = files else {
            let (path, looked_for) = (self.path.display(), names.join(", "));
            bail!("{path}: no block at {prefix}: looked for {looked_for}; {}", self.prefixes());
        };
        files.extend(biases.iter().filter_map(|name| self.file_of.get(name).cloned()));
        Ok(files.into_iter().collect())
    }

    /// The prefixes at which there is a block, as a sentence.
    fn prefixes(&self) -> String {
        const SHOWN: usize = 6;
        let ending = format!(".{}.weight", PROJECTIONS[0]);
        let mut prefixes: Vec<_> = self.file_of.keys().filter_map(|name| name.strip_suffix(&ending)).collect();
        prefixes.sort_unstable_by_key(|prefix| (prefix.len(), *prefix));
        let more = prefixes.len().saturating_sub(SHOWN);
        let shown = prefixes[..prefixes.len() - more].join(", ");
        match (prefixes.is_empty(), more) {
            (true, _) => "it has none at any prefix".to_string(),
            (false, 0) => format!("there are {shown}"),
            (false, _) => format!("there are {shown} and {more} more"),
        }
    }
}

/// The tensors of these files, mapped.
fn mapped(files: &[PathBuf]) -> Result<MmapedSafetensors> {
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
fn cause(error: &candle_core::Error) -> &candle_core::Error {
    match error {
        candle_core::Error::WithPath { inner, .. } | candle_core::Error::WithBacktrace { inner, .. } => cause(inner),
        other => other,
    }
}
