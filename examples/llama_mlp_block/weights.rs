//! Finding the block in a checkpoint, or making one.

use crate::options::Options;
use crate::shared::safetensors::{file_of_each_tensor, mapped};
use crate::shared::trained;
use crate::support::random::Random;
use anyhow::{anyhow, bail, Context, Result};
use candle_core::safetensors::save;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
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
    origin: Origin,
    /// The folder of a file that was made for this run, removed with this.
    _folder: Option<TempDir>,
}

/// Where weights come from.
enum Origin {
    Given,
    Trained,
    Random,
}

impl Weights {
    /// The weights that the options ask for.
    ///
    /// # Errors
    /// A file that is missing or no whole safetensors file, a prefix where no block is, tensors of other shapes than a
    /// block has.
    pub fn open(options: &Options) -> Result<Vec<Self>> {
        let prefix = options.prefix();
        if let Some(path) = &options.weights {
            return Ok(vec![Self::at(path.clone(), prefix, Origin::Given, None)?]);
        }
        let mut all = Vec::new();
        if options.hidden.is_none() && options.intermediate.is_none() {
            let (folder, path) = file()?;
            fs::write(&path, trained::WEIGHTS).with_context(|| format!("{}: cannot be written", path.display()))?;
            all.push(Self::at(path, prefix.clone(), Origin::Trained, Some(folder))?);
        }
        let (folder, path) = file()?;
        let (hidden, intermediate) =
            (options.hidden.map_or(576, usize::from), options.intermediate.map_or(1536, usize::from));
        make(&path, &prefix, hidden, intermediate)?;
        all.push(Self::at(path, prefix, Origin::Random, Some(folder))?);
        Ok(all)
    }

    /// The block at this prefix of a checkpoint.
    fn at(path: PathBuf, prefix: String, origin: Origin, folder: Option<TempDir>) -> Result<Self> {
        let shards = Shards::of(&path)?;
        let files = shards.files(&prefix)?;
        let tensors = mapped(&files)?;
        let shape = |name: &str| -> Result<[usize; 2]> {
            let name = format!("{prefix}.{name}.weight");
            let view = tensors.get(&name).map_err(|_| anyhow!("{}: expected a tensor {name}", files[0].display()))?;
            // A builder would take integers, a quantised checkpoint's, for numbers.
            if !DType::try_from(view.dtype()).is_ok_and(|dtype| dtype.is_float()) {
                bail!("{name}: expected floating-point weights, found {:?}", view.dtype());
            }
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
        Ok(Self { path, prefix, hidden_size, intermediate_size, files, origin, _folder: folder })
    }

    /// A builder at the block: each tensor that is taken from it gets memory of its own.
    ///
    /// # Errors
    /// A file that has gone since it was opened.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        let tensors = mapped(&self.files)?;
        Ok(VarBuilder::from_backend(Box::new(tensors), dtype, device.clone()).pp(&self.prefix))
    }

    /// What they are, for people.
    pub fn description(&self) -> String {
        match self.origin {
            Origin::Given => self.path.display().to_string(),
            Origin::Trained => "trained on Alice's Adventures in Wonderland by examples/train".to_string(),
            Origin::Random => "random, through a safetensors file made for this run".to_string(),
        }
    }

    /// The parameters of the block.
    pub fn elements(&self) -> usize {
        PROJECTIONS.len() * self.hidden_size * self.intermediate_size
    }
}

/// A place for a checkpoint.
fn file() -> Result<(TempDir, PathBuf)> {
    let folder = TempDir::new().context("no room for a file of weights")?;
    let path = folder.path().join("model.safetensors");
    Ok((folder, path))
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

impl Shards {
    fn of(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_path_buf(), file_of: file_of_each_tensor(path)? })
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
