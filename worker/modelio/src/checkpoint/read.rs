//! Reading a checkpoint.

use super::MANIFEST_FILE;
use super::format::{CheckpointMeta, FORMAT, Manifest, PART_SUFFIXES, VERSION};
use super::pieces::part_dtype;
use crate::assets::ModelAssets;
use crate::error::ModelError;
use crate::files::{plain_name, read_limited};
use crate::source::{WeightSource, outside};
use crate::tensorfile::{TensorFile, TensorInfo};
use ramtorch_store::MomentFormat;
use rayon::prelude::*;
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Longest checkpoint.json that is read, in bytes.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;
/// Largest piece under one checksum that is read, in elements.
const MAX_PIECE_ELEMENTS: u64 = 1 << 24;

/// An open checkpoint: every file has the size that was written, and every tensor of the model is there.
///
/// Every read verifies the checksums of the pieces that it touches.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    files: Vec<TensorFile>,
    places: HashMap<String, Place>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    file: usize,
    elements: u64,
    /// Master weight, then the moments if there are any.
    parts: Vec<Stored>,
}

/// A tensor of a file with its checksums.
#[derive(Debug)]
struct Stored {
    info: TensorInfo,
    checksums: Vec<u32>,
}

impl Checkpoint {
    /// Open the checkpoint in folder `path` (a `step-N`), and check everything but the tensors' bytes.
    ///
    /// # Errors
    /// The folder is no checkpoint, is of another version, or a file is missing, of the wrong size or damaged.
    pub fn open(path: &Path) -> Result<Checkpoint, ModelError> {
        let file = path.join(MANIFEST_FILE);
        let bad = |text: String| ModelError::format(&file, text);
        let manifest = parse_manifest(&read_limited(&file, MAX_MANIFEST_BYTES)?).map_err(bad)?;
        let blocks = manifest.meta.architecture.blocks();
        let shapes: HashMap<&str, &[u64]> = crate::hf::inventory(&blocks).collect();
        let mut files = Vec::with_capacity(manifest.shards.len());
        let mut places = HashMap::with_capacity(shapes.len());
        for (number, shard) in manifest.shards.iter().enumerate() {
            if !plain_name(&shard.file) {
                return Err(bad(format!("names the file \"{}\", which is not in this folder", shard.file)));
            }
            let opened = TensorFile::open(&path.join(&shard.file))?;
            if opened.bytes() != shard.bytes {
                return Err(ModelError::format(opened.path(), format_args!("has {} bytes, {} were written", opened.bytes(), shard.bytes)));
            }
            for tensor in &shard.tensors {
                let Some(&shape) = shapes.get(tensor.name.as_str()) else {
                    return Err(bad(format!("names tensor `{}`, which the model does not have", tensor.name)));
                };
                let elements: u64 = shape.iter().product();
                let mut parts = Vec::new();
                for (part, suffix) in PART_SUFFIXES.iter().enumerate() {
                    let Some(dtype) = part_dtype(manifest.moments, part) else { continue };
                    let name = format!("{}{suffix}", tensor.name);
                    let Some(info) = opened.tensor(&name) else {
                        return Err(ModelError::MissingTensor { path: opened.path().to_owned(), tensor: name });
                    };
                    if info.shape != shape {
                        let (found, expected) = (info.shape.clone(), shape.to_vec());
                        return Err(ModelError::Shape { path: opened.path().to_owned(), tensor: name, found, expected });
                    }
                    if info.dtype != dtype {
                        return Err(ModelError::format(
                            opened.path(),
                            format_args!("tensor `{name}` has type {}, not {}", info.dtype.name(), dtype.name()),
                        ));
                    }
                    let checksums = tensor.part(part).clone();
                    if checksums.len() as u64 != elements.div_ceil(manifest.piece_elements) {
                        return Err(bad(format!("has {} checksums for tensor `{name}`", checksums.len())));
                    }
                    parts.push(Stored { info: info.clone(), checksums });
                }
                if places.insert(tensor.name.clone(), Place { file: number, elements, parts }).is_some() {
                    return Err(bad(format!("names tensor `{}` twice", tensor.name)));
                }
            }
            files.push(opened);
        }
        if let Some((name, _)) = crate::hf::inventory(&blocks).find(|(name, _)| !places.contains_key(*name)) {
            return Err(ModelError::MissingTensor { path: path.to_owned(), tensor: name.to_owned() });
        }
        Ok(Checkpoint { path: path.to_owned(), manifest, files, places })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its step.
    pub fn step(&self) -> u64 {
        self.manifest.meta.step
    }

    /// What the engine said of it.
    pub fn meta(&self) -> &CheckpointMeta {
        &self.manifest.meta
    }

    /// Format of its moments.
    pub fn moments(&self) -> MomentFormat {
        self.manifest.moments
    }

    /// Bytes of its shards.
    pub fn bytes(&self) -> u64 {
        self.manifest.shards.iter().map(|s| s.bytes).sum()
    }

    /// Configuration and tokenizer files.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn assets(&self) -> Result<ModelAssets, ModelError> {
        ModelAssets::from_folder(&self.path, None)
    }

    /// Read everything and compare all checksums, on the caller's rayon pool.
    ///
    /// # Errors
    /// [`ModelError::Damaged`] names the first damaged tensor and its file; or a file cannot be read.
    pub fn verify(&self) -> Result<(), ModelError> {
        let piece = self.manifest.piece_elements;
        let stored = self.places.values().flat_map(|place| place.parts.iter().map(|part| (place.file, part)));
        let pieces: Vec<_> = stored.flat_map(|(file, part)| (0..part.checksums.len()).map(move |n| (file, part, n))).collect();
        pieces.into_par_iter().try_for_each_init(Vec::new, |buffer, (file, part, n)| self.read_piece(file, part, n as u64, piece, buffer))
    }

    /// Read piece `n` of a stored tensor into `buffer` and verify it.
    fn read_piece(&self, file: usize, stored: &Stored, n: u64, piece: u64, buffer: &mut Vec<u8>) -> Result<(), ModelError> {
        let start = n * piece;
        let elements = piece.min(stored.info.elements - start);
        buffer.resize((elements * stored.info.dtype.size()) as usize, 0);
        let file = &self.files[file];
        file.read_bytes(&stored.info, start, buffer)?;
        if crc32c::crc32c(buffer) != stored.checksums[n as usize] {
            return Err(ModelError::Damaged { path: file.path().to_owned(), tensor: stored.info.name.clone() });
        }
        Ok(())
    }

    fn read_part(&self, tensor: &str, part: usize, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        let Some(place) = self.places.get(tensor) else {
            return Err(ModelError::MissingTensor { path: self.path.clone(), tensor: tensor.to_owned() });
        };
        let end = start.checked_add(out.len() as u64).filter(|&end| end <= place.elements);
        let end = end.ok_or_else(|| outside(tensor, start, out.len()))?;
        let stored = &place.parts[part];
        let (piece, size) = (self.manifest.piece_elements, stored.info.dtype.size());
        let mut buffer = Vec::new();
        let mut at = start;
        while at < end {
            let n = at / piece;
            self.read_piece(place.file, stored, n, piece, &mut buffer)?;
            let stop = end.min((n + 1) * piece);
            let bytes = ((at - n * piece) * size) as usize..((stop - n * piece) * size) as usize;
            stored.info.dtype.decode(&buffer[bytes], &mut out[(at - start) as usize..(stop - start) as usize]);
            at = stop;
        }
        Ok(())
    }
}

#[cfg(test)]
impl Checkpoint {
    /// Where the bytes of a tensor or moment begin in its file.
    pub(super) fn place_of(&self, name: &str) -> u64 {
        self.files.iter().find_map(|file| file.tensor(name)).unwrap().offset
    }
}

impl WeightSource for Checkpoint {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        self.read_part(tensor, 0, start, out)
    }

    fn read_moments(&self, tensor: &str, start: u64, first: &mut [f32], second: &mut [f32]) -> Result<bool, ModelError> {
        if self.manifest.moments == MomentFormat::None {
            return Ok(false);
        }
        self.read_part(tensor, 1, start, first)?;
        self.read_part(tensor, 2, start, second)?;
        Ok(true)
    }
}

/// The run that wrote the checkpoint in folder `path`, if that can be told.
pub(super) fn run_of(path: &Path) -> Option<String> {
    let text = read_limited(&path.join(MANIFEST_FILE), MAX_MANIFEST_BYTES).ok()?;
    parse_manifest(&text).ok().map(|manifest| manifest.meta.run)
}

/// Understand checkpoint.json, the version first: another one may have other fields.
fn parse_manifest(text: &[u8]) -> Result<Manifest, String> {
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u32,
    }
    let damaged = |e: serde_json::Error| format!("is damaged: {e}");
    let head: Head = serde_json::from_slice(text).map_err(damaged)?;
    if head.format != FORMAT {
        return Err(format!("is of the format \"{}\", not {FORMAT}", head.format));
    }
    if head.version != VERSION {
        return Err(format!("has version {}, this program reads version {VERSION}: use the program that wrote it", head.version));
    }
    let manifest: Manifest = serde_json::from_slice(text).map_err(damaged)?;
    manifest.meta.architecture.validate()?;
    if !(1..=MAX_PIECE_ELEMENTS).contains(&manifest.piece_elements) {
        return Err(format!("has checksums over {} elements each, 1 to {MAX_PIECE_ELEMENTS} are possible", manifest.piece_elements));
    }
    if manifest.parameters != manifest.meta.architecture.parameter_count() {
        return Err(format!("counts {} parameters, the model has {}", manifest.parameters, manifest.meta.architecture.parameter_count()));
    }
    Ok(manifest)
}
