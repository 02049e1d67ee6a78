//! Weights in a Hugging Face folder: one safetensors file, or shards with an index.

#[cfg(test)]
mod tests;

use crate::arch::{Architecture, Family};
use crate::dtype::Dtype;
use crate::error::ModelError;
use crate::files::{plain_name, read_limited};
use crate::source::WeightSource;
use crate::tensorfile::{TensorFile, TensorInfo};
use ramtorch_store::BlockSpec;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// File name of unsharded weights.
pub const SINGLE_FILE: &str = "model.safetensors";
/// File name of the list of shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Longest index that is read, in bytes.
const MAX_INDEX_BYTES: u64 = 256 << 20;
/// Most shards.
const MAX_SHARDS: usize = 10_000;

/// Tensors of a model in one or more safetensors files, each found and of the right shape.
///
/// Opening checks every header against the architecture, so that reading afterwards fails only if a file cannot be read.
#[derive(Debug)]
pub struct HfFolder {
    path: PathBuf,
    files: Vec<TensorFile>,
    /// File and tensor for each name of the architecture.
    places: HashMap<String, (usize, TensorInfo)>,
}

impl HfFolder {
    /// Open `model.safetensors`, or the shards that `model.safetensors.index.json` lists, in folder `path`.
    ///
    /// Rotary and mask buffers that older files carry are ignored, as is `lm_head.weight` where the head is tied to the
    /// embedding. Names with and without the base model's prefix (`model.`, `transformer.`) are accepted.
    ///
    /// # Errors
    /// There are no weights, a file is damaged or cut off, a tensor is missing, unknown, twice there or of the wrong
    /// shape or type: each names the tensor and the file.
    pub fn open(path: &Path, architecture: &Architecture) -> Result<HfFolder, ModelError> {
        let index = path.join(INDEX_FILE);
        let single = path.join(SINGLE_FILE);
        // An index without its shards beside a complete single file is what a re-saved model leaves behind.
        if single.is_file() {
            return Self::collect(path, vec![TensorFile::open(&single)?], None, architecture);
        }
        if index.is_file() {
            let index = Index::read(&index)?;
            let files = index.files.iter().map(|name| TensorFile::open(&path.join(name))).collect::<Result<Vec<_>, _>>()?;
            return Self::collect(path, files, Some(&index), architecture);
        }
        let legacy = std::fs::read_dir(path)
            .map_err(|e| ModelError::read(path, e))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .find(|name| name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth") || name.ends_with(".gguf"));
        let hint = legacy.map(|name| format!("; {name} is not read, convert the model to safetensors")).unwrap_or_default();
        Err(ModelError::format(path, format_args!("holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")))
    }

    /// Open one safetensors file that holds all of the model's tensors: a plain stack's weights.
    ///
    /// # Errors
    /// As [`HfFolder::open`].
    pub fn open_file(path: &Path, architecture: &Architecture) -> Result<HfFolder, ModelError> {
        Self::collect(path, vec![TensorFile::open(path)?], None, architecture)
    }

    fn collect(path: &Path, files: Vec<TensorFile>, index: Option<&Index>, architecture: &Architecture) -> Result<Self, ModelError> {
        let blocks = architecture.blocks();
        let expected: HashMap<&str, &[u64]> = inventory(&blocks).collect();
        let names = Names::new(architecture);
        let mut places = HashMap::with_capacity(expected.len());
        for (number, file) in files.iter().enumerate() {
            if let Some(index) = index {
                index.check(file)?;
            }
            if let Some(name) = file.other_tensors().iter().find(|name| !names.ignored(name)) {
                let hint = if names.canonical(name, &expected).is_some() { "; F64, F32, F16 and BF16 are read" } else { "" };
                return Err(ModelError::format(file.path(), format_args!("tensor `{name}` has a type that weights cannot have{hint}")));
            }
            for tensor in file.tensors() {
                if names.ignored(&tensor.name) {
                    continue;
                }
                let Some(name) = names.canonical(&tensor.name, &expected) else {
                    let (tensor, path) = (tensor.name.clone(), file.path().to_owned());
                    return Err(ModelError::ExtraTensor { path, tensor, model: architecture.describe() });
                };
                let shape = expected[name.as_str()];
                if tensor.shape != shape {
                    return Err(ModelError::Shape {
                        path: file.path().to_owned(),
                        tensor: tensor.name.clone(),
                        found: tensor.shape.clone(),
                        expected: shape.to_vec(),
                    });
                }
                if let Some((other, _)) = places.insert(name, (number, tensor.clone())) {
                    let other = files[other].path().display();
                    return Err(ModelError::format(file.path(), format_args!("tensor `{}` is in {other} as well", tensor.name)));
                }
            }
        }
        for (name, _) in inventory(&blocks) {
            if !places.contains_key(name) {
                return Err(ModelError::MissingTensor { path: path.to_owned(), tensor: name.to_owned() });
            }
        }
        Ok(HfFolder { path: path.to_owned(), files, places })
    }

    /// Folder or file as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number format of a tensor.
    pub fn dtype_of(&self, tensor: &str) -> Option<Dtype> {
        self.places.get(tensor).map(|(_, info)| info.dtype)
    }

    /// The number format that most elements have.
    pub fn dtype(&self) -> Dtype {
        let mut elements = BTreeMap::new();
        for (_, info) in self.places.values() {
            *elements.entry(info.dtype).or_insert(0u64) += info.elements;
        }
        elements.into_iter().max_by_key(|&(_, n)| n).map_or(Dtype::F32, |(dtype, _)| dtype)
    }
}

impl WeightSource for HfFolder {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        let Some((file, info)) = self.places.get(tensor) else {
            return Err(ModelError::MissingTensor { path: self.path.clone(), tensor: tensor.to_owned() });
        };
        self.files[*file].read(info, start, out)
    }

    fn dtype(&self, tensor: &str) -> &'static str {
        self.dtype_of(tensor).map_or("F32", Dtype::name)
    }
}

/// Names and shapes of all tensors, in order.
pub(crate) fn inventory(blocks: &[BlockSpec]) -> impl Iterator<Item = (&str, &[u64])> {
    blocks.iter().flat_map(|b| &b.tensors).map(|t| (t.name.as_str(), t.shape.as_slice()))
}

/// How names in files relate to names of the architecture.
struct Names {
    prefix: &'static str,
    family: Option<Family>,
    tied: bool,
}

impl Names {
    fn new(architecture: &Architecture) -> Self {
        match architecture {
            Architecture::Transformer(c) => {
                let prefix = if c.family == Family::Gpt2 { "transformer." } else { "model." };
                Names { prefix, family: Some(c.family), tied: c.tie_embeddings }
            }
            Architecture::Stack(_) => Names { prefix: "", family: None, tied: false },
        }
    }

    fn canonical(&self, name: &str, expected: &HashMap<&str, &[u64]>) -> Option<String> {
        if expected.contains_key(name) {
            return Some(name.to_owned());
        }
        let prefixed = format!("{}{name}", self.prefix);
        expected.contains_key(prefixed.as_str()).then_some(prefixed)
    }

    /// Not a weight, or one that the model takes from elsewhere.
    fn ignored(&self, name: &str) -> bool {
        let Some(family) = self.family else { return false };
        let buffer = match family {
            Family::Gpt2 => name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"),
            _ => name.ends_with(".rotary_emb.inv_freq"),
        };
        buffer || (self.tied && name == "lm_head.weight")
    }
}

/// `model.safetensors.index.json`.
struct Index {
    path: PathBuf,
    /// Shards, each once.
    files: BTreeSet<String>,
    weight_map: HashMap<String, String>,
}

impl Index {
    fn read(path: &Path) -> Result<Index, ModelError> {
        #[derive(Deserialize)]
        struct Raw {
            weight_map: HashMap<String, String>,
        }
        let bytes = read_limited(path, MAX_INDEX_BYTES)?;
        let raw: Raw = serde_json::from_slice(&bytes).map_err(|e| ModelError::format(path, format_args!("damaged index: {e}")))?;
        let files: BTreeSet<String> = raw.weight_map.values().cloned().collect();
        if files.is_empty() || files.len() > MAX_SHARDS {
            return Err(ModelError::format(path, format_args!("lists {} files; 1 to {MAX_SHARDS} are possible", files.len())));
        }
        for file in &files {
            if !plain_name(file) {
                return Err(ModelError::format(path, format_args!("names \"{file}\", which is not a file of this folder")));
            }
        }
        Ok(Index { path: path.to_owned(), files, weight_map: raw.weight_map })
    }

    /// What the index says of this file must be in it.
    fn check(&self, file: &TensorFile) -> Result<(), ModelError> {
        let name = file.path().file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let listed = self.weight_map.iter().filter(|(_, f)| f.as_str() == name);
        for (tensor, _) in listed {
            if file.tensor(tensor).is_none() && !file.other_tensors().contains(tensor) {
                return Err(ModelError::format(&self.path, format_args!("places tensor `{tensor}` in {name}, which does not hold it")));
            }
        }
        Ok(())
    }
}
