//! From what a user names to a model: the `[model]` table of a job file, or a path.

#[cfg(test)]
mod tests;

use crate::arch::{Architecture, StackConfig};
use crate::assets::{CONFIG, ModelAssets};
use crate::checkpoint::{Checkpoint, FindOptions, MANIFEST_FILE, Skipped, find_sound};
use crate::config::{MAX_CONFIG_BYTES, ParsedConfig, parse_config};
use crate::dtype::Dtype;
use crate::error::ModelError;
use crate::export::STACK_FILE;
use crate::files::read_limited;
use crate::hf::HfFolder;
use crate::init::SeededInit;
use crate::source::WeightSource;
use ramtorch_job::{ModelSpec, Precision};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The model of a job, before its weights are read.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInput {
    /// What it is made of.
    pub architecture: Architecture,
    /// Configuration and tokenizer files.
    pub assets: ModelAssets,
    /// Folder (or file, for a plain stack) with the initial weights; none: seeded.
    pub weights: Option<PathBuf>,
    /// Number format that the configuration declares.
    pub dtype: Option<Precision>,
    /// Sentences for the user.
    pub warnings: Vec<String>,
}

/// Find the model that a job file's `[model]` names. Weights are checked by [`open_weights`].
///
/// # Errors
/// The configuration cannot be read or is not supported; the table names no model.
pub fn resolve(spec: &ModelSpec) -> Result<ModelInput, ModelError> {
    let tokenizer = spec.tokenizer.as_deref();
    if let Some(widths) = &spec.layers {
        let architecture = Architecture::Stack(StackConfig { widths: widths.clone(), activation: spec.activation, loss: spec.loss });
        architecture.validate().map_err(|e| ModelError::Request(format!("[model] layers: {e}")))?;
        let weights = spec.weights.clone();
        return Ok(ModelInput { architecture, assets: ModelAssets::default(), weights, dtype: None, warnings: Vec::new() });
    }
    let (config, assets, weights) = match (&spec.path, &spec.config) {
        (Some(folder), _) => {
            let assets = ModelAssets::from_folder(folder, tokenizer)?;
            (folder.join(CONFIG), assets, Some(folder.clone()))
        }
        (None, Some(config)) => (config.clone(), ModelAssets::from_config(config, tokenizer)?, None),
        (None, None) => return Err(ModelError::Request("[model] needs one of path, config and layers".into())),
    };
    let parsed = parse(&config, &assets)?;
    let ParsedConfig { config, dtype, warnings } = parsed;
    Ok(ModelInput { architecture: Architecture::Transformer(config), assets, weights, dtype, warnings })
}

fn parse(path: &Path, assets: &ModelAssets) -> Result<ParsedConfig, ModelError> {
    match &assets.config {
        Some(bytes) => parse_config(bytes, path),
        None => Err(ModelError::read(path, std::io::ErrorKind::NotFound.into())),
    }
}

/// Open initial weights: a Hugging Face folder, one safetensors file, or (without a path) those that `seed` gives.
///
/// # Errors
/// As [`HfFolder::open`].
pub fn open_weights(
    architecture: &Architecture,
    weights: Option<&Path>,
    seed: u64,
) -> Result<Box<dyn WeightSource + Send + Sync>, ModelError> {
    Ok(match weights {
        None => Box::new(SeededInit::new(architecture, seed)),
        Some(path) if path.is_dir() => Box::new(HfFolder::open(path, architecture)?),
        Some(path) => Box::new(HfFolder::open_file(path, architecture)?),
    })
}

/// A model on disk with its weights.
pub struct OpenModel {
    /// What it is made of.
    pub architecture: Architecture,
    /// Configuration and tokenizer files.
    pub assets: ModelAssets,
    /// Step of a checkpoint.
    pub step: Option<u64>,
    /// Number format for an export that is not told another: that of the folder, or that which a checkpoint's configuration
    /// declares.
    pub dtype: Dtype,
    /// The weights, and a checkpoint's moments.
    pub weights: Box<dyn WeightSource + Send + Sync>,
    /// Newer checkpoints that were passed over.
    pub skipped: Vec<Skipped>,
    /// Sentences for the user.
    pub warnings: Vec<String>,
}

impl OpenModel {
    /// Open a checkpoint, a folder of checkpoints (the newest sound one), a Hugging Face folder or an exported stack.
    ///
    /// # Errors
    /// The folder is none of these, or what it holds cannot be used.
    pub fn open(path: &Path) -> Result<OpenModel, ModelError> {
        if path.join(MANIFEST_FILE).is_file() {
            return Self::checkpoint(Checkpoint::open(path)?, Vec::new());
        }
        if path.join(CONFIG).is_file() {
            return Self::folder(path);
        }
        if path.join(STACK_FILE).is_file() {
            return Self::stack(path);
        }
        let search = find_sound(path, &FindOptions::default())?;
        if let Some(checkpoint) = search.found {
            return Self::checkpoint(checkpoint, search.skipped);
        }
        if let Some(first) = search.skipped.first() {
            let text = format_args!("none of its {} checkpoints can be used; the newest: {}", search.skipped.len(), first.reason);
            return Err(ModelError::format(path, text));
        }
        if !path.exists() {
            return Err(ModelError::read(path, std::io::ErrorKind::NotFound.into()));
        }
        Err(ModelError::format(path, format_args!("holds neither a model ({CONFIG}) nor checkpoints (step-…)")))
    }

    fn checkpoint(checkpoint: Checkpoint, skipped: Vec<Skipped>) -> Result<OpenModel, ModelError> {
        let assets = checkpoint.assets()?;
        let declared = match &assets.config {
            Some(config) => parse_config(config, &checkpoint.path().join(CONFIG))?.dtype,
            None => None,
        };
        Ok(OpenModel {
            architecture: checkpoint.meta().architecture.clone(),
            assets,
            step: Some(checkpoint.step()),
            dtype: declared.map_or(Dtype::F32, Dtype::from),
            weights: Box::new(checkpoint),
            skipped,
            warnings: Vec::new(),
        })
    }

    fn folder(path: &Path) -> Result<OpenModel, ModelError> {
        let assets = ModelAssets::from_folder(path, None)?;
        let ParsedConfig { config, warnings, .. } = parse(&path.join(CONFIG), &assets)?;
        let architecture = Architecture::Transformer(config);
        let weights = HfFolder::open(path, &architecture)?;
        let dtype = weights.dtype();
        Ok(OpenModel { architecture, assets, step: None, dtype, weights: Box::new(weights), skipped: Vec::new(), warnings })
    }

    fn stack(path: &Path) -> Result<OpenModel, ModelError> {
        #[derive(Deserialize)]
        struct Described {
            architecture: Architecture,
        }
        let file = path.join(STACK_FILE);
        let bad = |text: String| ModelError::format(&file, text);
        let described: Described = serde_json::from_slice(&read_limited(&file, MAX_CONFIG_BYTES)?).map_err(|e| bad(e.to_string()))?;
        let architecture = described.architecture;
        architecture.validate().map_err(bad)?;
        let weights = HfFolder::open(path, &architecture)?;
        let (dtype, assets) = (weights.dtype(), ModelAssets::default());
        Ok(OpenModel { architecture, assets, step: None, dtype, weights: Box::new(weights), skipped: Vec::new(), warnings: Vec::new() })
    }
}
