//! Writing a model folder that `transformers`, vLLM and ramtorch itself load.

#[cfg(test)]
mod tests;

use crate::arch::Architecture;
use crate::assets::{CONFIG, ModelAssets};
use crate::dtype::Dtype;
use crate::durable::{self, FolderLock};
use crate::error::ModelError;
use crate::held::{self, HeldFolder};
use crate::hf::{INDEX_FILE, SINGLE_FILE, inventory};
use crate::source::WeightSource;
use crate::stream::Stream;
use crate::tensorfile::{PlannedTensor, StreamWriter};
use serde_json::{Map, Value, json};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// Describes a plain stack in its folder, as config.json does a language model.
pub const STACK_FILE: &str = "ramtorch.json";
/// Largest shard, in bytes of tensors: the Hub's convention.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// How to export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportOptions {
    /// Number format of the weights.
    pub dtype: Dtype,
    /// Replace a model folder that is there.
    pub overwrite: bool,
    /// Largest shard, in bytes of tensors; one tensor may be larger.
    pub shard_bytes: u64,
    /// Links on the way to the folder are followed. Otherwise they are refused, at any moment of the export: somebody has found out
    /// where the folder is, and what is allowed there.
    pub follow_links: bool,
}

impl ExportOptions {
    /// Weights of this format, in shards of 5 GB.
    pub fn new(dtype: Dtype, overwrite: bool) -> Self {
        ExportOptions { dtype, overwrite, shard_bytes: SHARD_BYTES, follow_links: true }
    }
}

/// Write the model as a Hugging Face folder and return the bytes of its weight files.
///
/// The folder is written under a temporary name beside `folder`, made durable and renamed, so that `folder` is whole or as
/// before. config.json is the one that came in, with the number format corrected. Memory: 32 MiB, whatever the model.
///
/// # Errors
/// `folder` is there and `overwrite` is not set, or it holds files that no model folder has; the weights cannot be read
/// (from a live store: not at one step); the disk is full or fails.
pub fn export_hf(
    folder: &Path,
    architecture: &Architecture,
    assets: &ModelAssets,
    source: &dyn WeightSource,
    options: &ExportOptions,
) -> Result<u64, ModelError> {
    if options.follow_links {
        let (target, name) = target(folder)?;
        check_target(&target, options.overwrite)?;
        durable::create_folder(durable::parent(&target))?;
        return export_to(durable::parent(&target), &name, architecture, assets, source, options);
    }
    let Some(name) = folder.file_name() else {
        return Err(ModelError::Exists { path: folder.to_owned(), message: "is not a name for a new folder".into() });
    };
    let held = held::parent_of(folder)?;
    if held.through().join(name).symlink_metadata().is_ok_and(|m| m.is_symlink()) {
        return Err(held::refused(folder));
    }
    let result = check_target(&held.through().join(name), options.overwrite)
        .and_then(|()| export_to(&held.through(), name, architecture, assets, source, options));
    result.map_err(|e| held.named(e))
}

/// Writes the folder `name` in the folder `parent`, which is there.
fn export_to(
    parent: &Path,
    name: &OsStr,
    architecture: &Architecture,
    assets: &ModelAssets,
    source: &dyn WeightSource,
    options: &ExportOptions,
) -> Result<u64, ModelError> {
    let beside = |suffix: &str| {
        let mut name = name.to_owned();
        name.push(suffix);
        parent.join(name)
    };
    let (target, partial, aside) = (parent.join(name), beside(".partial"), beside(".replaced"));
    durable::recover(&target, &aside)?;
    let (_lock, held) = claim(&partial)?;
    let inside = held.through();
    let result = write_folder(&inside, architecture, assets, source, options).map_err(|e| e.renamed(&inside, &partial));
    let result = result.and_then(|bytes| {
        durable::sync_folder(&inside).map_err(|e| e.renamed(&inside, &partial))?;
        if !held.is_at(&partial) {
            let message = "was moved away while the model was written to it".into();
            return Err(ModelError::Exists { path: partial.clone(), message });
        }
        let replaced = durable::put_folder(&partial, &target, &aside)?;
        durable::sync_folder(parent)?;
        if replaced {
            durable::remove_folder(&partial)?;
        }
        Ok(bytes)
    });
    if result.is_err() {
        // The error that matters is the first one; a later export removes what is left.
        let _ = durable::remove_folder(&partial);
    }
    result
}

/// Could a model folder be written to `folder`, replacing an earlier one? To be asked before the work whose result it is.
/// Changes nothing.
///
/// # Errors
/// What [`export_hf`] with `overwrite` would say, but for a disk that is full.
pub fn check_export_folder(folder: &Path) -> Result<(), ModelError> {
    let (target, _) = target(folder)?;
    check_target(&target, true)?;
    durable::check_writable(durable::parent(&target))
}

/// The folder that is written or replaced, and its name. A link is followed, so that the folder behind it is replaced and not
/// the link.
fn target(folder: &Path) -> Result<(PathBuf, OsString), ModelError> {
    let target = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    match target.file_name().map(ToOwned::to_owned) {
        Some(name) => Ok((target, name)),
        None => Err(ModelError::Exists { path: target, message: "is not a name for a new folder".into() }),
    }
}

/// Make the temporary folder this export's own, and hold it: a link that takes its name later leads nowhere.
fn claim(partial: &Path) -> Result<(FolderLock, HeldFolder), ModelError> {
    let busy = || ModelError::Exists { path: partial.to_owned(), message: "another export is writing there; wait for it to end".into() };
    if let Ok(found) = partial.symlink_metadata() {
        if found.is_dir() {
            drop(FolderLock::take(partial)?.ok_or_else(busy)?);
        }
        durable::remove_folder(partial)?;
    }
    durable::create_temporary_folder(partial)?;
    let held = HeldFolder::of(partial)?;
    let lock = FolderLock::take(&held.through()).map_err(|e| held.named(e))?.ok_or_else(busy)?;
    Ok((lock, held))
}

/// May this folder be written?
fn check_target(target: &Path, overwrite: bool) -> Result<(), ModelError> {
    let refuse = |message: String| Err(ModelError::Exists { path: target.to_owned(), message });
    let entries = match std::fs::read_dir(target) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => return refuse("is a file; choose another folder".into()),
        Err(e) => return Err(ModelError::read(target, e)),
    };
    for entry in entries {
        let name = entry.map_err(|e| ModelError::read(target, e))?.file_name();
        let name = name.to_string_lossy();
        if !overwrite {
            return refuse("is there already and not empty; choose another folder or ask for it to be overwritten".into());
        }
        let ours = ModelAssets::is_known(&name) || name == STACK_FILE || name == INDEX_FILE || name.ends_with(".safetensors");
        if !ours {
            return refuse(format!("holds \"{name}\", which no export wrote; move it away or choose another folder"));
        }
    }
    Ok(())
}

fn write_folder(
    folder: &Path,
    architecture: &Architecture,
    assets: &ModelAssets,
    source: &dyn WeightSource,
    options: &ExportOptions,
) -> Result<u64, ModelError> {
    let blocks = architecture.blocks();
    let plan = |(name, shape): (&str, &[u64])| PlannedTensor { name: name.to_owned(), dtype: options.dtype, shape: shape.to_vec() };
    let tensors: Vec<PlannedTensor> = inventory(&blocks).map(plan).collect();
    let total: u64 = tensors.iter().map(PlannedTensor::bytes).sum();
    durable::check_space(folder, total)?;

    let shards = shards(&tensors, options.shard_bytes);
    let metadata = [("format", "pt".to_owned())];
    let mut stream = Stream::new();
    let mut bytes = 0;
    let mut places = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE_FILE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let mut out = StreamWriter::create(&folder.join(&name), shard, &metadata)?;
        for tensor in *shard {
            let read = |start, values: &mut [f32]| source.read(&tensor.name, start, values);
            stream.copy(tensor.elements(), tensor.dtype, read, |piece| out.write_all(piece))?;
            places.insert(tensor.name.clone(), Value::String(name.clone()));
        }
        bytes += out.finish()?;
    }
    if shards.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": places });
        write_json(&folder.join(INDEX_FILE), &index)?;
    }
    match architecture {
        Architecture::Stack(_) => write_json(&folder.join(STACK_FILE), &json!({ "architecture": architecture }))?,
        Architecture::Transformer(c) => {
            let Some(config) = &assets.config else {
                return Err(ModelError::Invalid("a language model cannot be exported without its config.json".into()));
            };
            let path = folder.join(CONFIG);
            write_json(&path, &corrected_config(config, c.family.class(), options.dtype).map_err(|e| ModelError::format(&path, e))?)?;
        }
    }
    for (name, content) in &assets.files {
        durable::write_file(&folder.join(name), content)?;
    }
    Ok(bytes)
}

/// Consecutive tensors up to the limit, at least one in each.
fn shards(tensors: &[PlannedTensor], limit: u64) -> Vec<&[PlannedTensor]> {
    let mut shards = Vec::new();
    let (mut start, mut size) = (0, 0u64);
    for (i, tensor) in tensors.iter().enumerate() {
        if i > start && size.saturating_add(tensor.bytes()) > limit {
            shards.push(&tensors[start..i]);
            (start, size) = (i, 0);
        }
        size = size.saturating_add(tensor.bytes());
    }
    shards.push(&tensors[start..]);
    shards
}

/// The configuration that came in, saying how the weights are stored now.
fn corrected_config(config: &[u8], class: &str, dtype: Dtype) -> Result<Value, serde_json::Error> {
    let mut config: Map<String, Value> = serde_json::from_slice(config)?;
    let name = Value::String(dtype.torch_name().to_owned());
    // Newer versions of transformers write `dtype`, older ones read only `torch_dtype`; both read the latter.
    let keys: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
    for key in if keys.is_empty() { vec!["torch_dtype"] } else { keys } {
        config.insert(key.to_owned(), name.clone());
    }
    if config.get("architectures").is_none_or(Value::is_null) {
        config.insert("architectures".to_owned(), json!([class]));
    }
    Ok(Value::Object(config))
}

fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| ModelError::format(path, e))?;
    text.push('\n');
    durable::write_file(path, text.as_bytes())
}
