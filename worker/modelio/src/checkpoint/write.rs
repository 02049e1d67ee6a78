//! Writing a checkpoint.

use super::format::{CheckpointMeta, FORMAT, Manifest, PART_SUFFIXES, ShardInfo, TensorChecksums, VERSION};
use super::{LATEST_FILE, MANIFEST_FILE, PARTIAL, REPLACED, folder_name, partition, step_of};
use crate::assets::ModelAssets;
use crate::dtype::Dtype;
use crate::durable::{self, FolderLock};
use crate::error::ModelError;
use crate::files::{plain_name, read_limited};
use crate::source::StoreWeights;
use crate::stream::{PIECE_ELEMENTS, Stream};
use crate::tensorfile::{PlannedTensor, StreamWriter};
use ramtorch_failpoint::{Point, hit};
use ramtorch_store::{MomentFormat, Part, Store};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Holds the identity of the writer inside the temporary folder.
const WRITER_FILE: &str = "writer";
/// Longest note of a rank that is read, in bytes.
const MAX_NOTE_BYTES: u64 = 512 << 20;
const PARTS: [Part; 3] = [Part::Weight, Part::Moment1, Part::Moment2];

/// A checkpoint under way.
///
/// One rank calls [`begin`](Self::begin); when it has, the others [`join`](Self::join). Each rank writes its shard; when all
/// have, one calls [`commit`](Self::commit). Dropping the first rank's writer without a commit removes what was written.
pub struct CheckpointWriter {
    root: PathBuf,
    partial: PathBuf,
    step: u64,
    writer: String,
    /// Held by the rank that began.
    lock: Option<FolderLock>,
    committed: bool,
}

/// A checkpoint that is on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Its folder.
    pub path: PathBuf,
    /// Bytes of its shards.
    pub bytes: u64,
    /// Older checkpoints that were removed.
    pub removed: Vec<PathBuf>,
    /// What went wrong after the checkpoint was safe: `latest` could not be moved, an older one not removed.
    pub warnings: Vec<String>,
}

/// Could checkpoints be written into `folder`? To be asked before the work that they keep. Changes nothing.
///
/// # Errors
/// It is not a folder, or it may not be written.
pub fn check_folder(folder: &Path) -> Result<(), ModelError> {
    durable::check_writable(folder)
}

impl CheckpointWriter {
    /// Begin the checkpoint of `step` in folder `root`, which is created. What a dead writer left there is removed.
    ///
    /// # Errors
    /// The folder cannot be written, or another process is writing a checkpoint into it.
    pub fn begin(root: &Path, step: u64) -> Result<CheckpointWriter, ModelError> {
        durable::create_folder(root)?;
        let lock = FolderLock::take(root)?.ok_or_else(|| ModelError::Exists {
            path: root.to_owned(),
            message: "another process is writing a checkpoint into this folder; give every job a folder of its own".into(),
        })?;
        clean(root)?;
        let partial = root.join(format!("{}{PARTIAL}", folder_name(step)));
        durable::create_folder(&partial)?;
        let writer = identity();
        let this = CheckpointWriter { root: root.to_owned(), partial, step, writer, lock: Some(lock), committed: false };
        durable::write_file(&this.partial.join(WRITER_FILE), this.writer.as_bytes())?;
        Ok(this)
    }

    /// Take part in the checkpoint that another rank began.
    ///
    /// # Errors
    /// No such checkpoint is under way.
    pub fn join(root: &Path, step: u64) -> Result<CheckpointWriter, ModelError> {
        let partial = root.join(format!("{}{PARTIAL}", folder_name(step)));
        let writer = read_limited(&partial.join(WRITER_FILE), 4096)?;
        let writer = String::from_utf8(writer).map_err(|_| ModelError::format(&partial.join(WRITER_FILE), "is not text"))?;
        Ok(CheckpointWriter { root: root.to_owned(), partial, step, writer, lock: None, committed: false })
    }

    /// Bytes that a checkpoint of this store takes on disk, headers aside.
    pub fn bytes_needed(store: &Store) -> u64 {
        store.layout().parameters().saturating_mul(4 + 2 * store.layout().spec().moments.bytes())
    }

    /// Write shard `shard` of `shards`: the tensors that are its share, from `store` at the checkpoint's step.
    ///
    /// Streams through 32 MiB of private memory on the caller's rayon pool. The note that [`commit`](Self::commit) needs is
    /// left in the temporary folder, and returned.
    ///
    /// # Errors
    /// The disk is full or fails; a page of the store is not at the checkpoint's step.
    pub fn write_shard(&self, shard: u32, shards: u32, store: &Store) -> Result<ShardInfo, ModelError> {
        if shard >= shards {
            return Err(ModelError::Invalid(format!("shard {shard} of {shards} does not exist")));
        }
        let layout = store.layout();
        let moments = layout.spec().moments;
        let sizes: Vec<u64> = layout.tensors().iter().map(|t| t.len.saturating_mul(4 + 2 * moments.bytes())).collect();
        let owners = partition(&sizes, shards);
        let mine = layout.tensors().iter().zip(&owners).filter(|&(_, &owner)| owner == shard).map(|(t, _)| t);

        let mut planned = Vec::new();
        for (number, tensor) in mine.clone().enumerate() {
            for (part, suffix) in PART_SUFFIXES.iter().enumerate() {
                let Some(dtype) = part_dtype(moments, part) else { continue };
                planned.push((
                    number,
                    part,
                    PlannedTensor { name: format!("{}{suffix}", tensor.name), dtype, shape: tensor.shape.clone() },
                ));
            }
        }
        planned.sort_by_key(|(_, _, t)| std::cmp::Reverse(t.dtype.size()));
        let plans: Vec<PlannedTensor> = planned.iter().map(|(_, _, t)| t.clone()).collect();
        durable::check_space(&self.partial, plans.iter().map(PlannedTensor::bytes).sum())?;

        let file = format!("shard-{shard:05}-of-{shards:05}.safetensors");
        let metadata = [("format", "pt".to_owned()), ("step", self.step.to_string())];
        let mut out = StreamWriter::create(&self.partial.join(&file), &plans, &metadata)?;
        let names: Vec<&str> = mine.map(|t| t.name.as_str()).collect();
        let empty =
            |name: &&str| TensorChecksums { name: (*name).to_owned(), weight: Vec::new(), exp_avg: Vec::new(), exp_avg_sq: Vec::new() };
        let mut tensors: Vec<TensorChecksums> = names.iter().map(empty).collect();
        let source = StoreWeights::at_step(store, self.step);
        let mut stream = Stream::new();
        for (number, part, plan) in &planned {
            let read = |start, values: &mut [f32]| source.part(names[*number], PARTS[*part], start, values);
            *tensors[*number].part_mut(*part) = stream.copy(plan.elements(), plan.dtype, read, |bytes| out.write_all(bytes))?;
        }
        let bytes = out.finish()?;
        let info = ShardInfo { shard, shards, step: self.step, writer: self.writer.clone(), moments, file, bytes, tensors };
        let note = serde_json::to_vec(&info).map_err(|e| ModelError::Invalid(e.to_string()))?;
        durable::write_file(&self.partial.join(note_name(shard)), &note)?;
        durable::sync_folder(&self.partial)?;
        Ok(info)
    }

    /// Make the checkpoint final once every shard is written, then remove those of the same run that are older than
    /// the `keep` newest sound ones (0: keep all).
    ///
    /// # Errors
    /// A shard is missing or not of this writer, or the disk fails: the checkpoints before are then as they were.
    pub fn commit(mut self, meta: &CheckpointMeta, assets: &ModelAssets, keep: usize) -> Result<Committed, ModelError> {
        let shards = self.notes()?;
        let bytes = shards.iter().map(|s| s.bytes).sum();
        let manifest = self.manifest(meta, shards)?;
        let text = serde_json::to_vec(&manifest).map_err(|e| ModelError::Invalid(e.to_string()))?;
        for (name, content) in assets.all() {
            durable::write_file(&self.partial.join(name), content)?;
        }
        durable::write_file(&self.partial.join(MANIFEST_FILE), &text)?;
        for shard in 0..manifest.shards.len() as u32 {
            durable::remove_file(&self.partial.join(note_name(shard)))?;
        }
        durable::remove_file(&self.partial.join(WRITER_FILE))?;
        durable::sync_folder(&self.partial)?;

        let path = self.root.join(folder_name(self.step));
        let replaced = durable::put_folder(&self.partial, &path, &self.root.join(format!("{}{REPLACED}", folder_name(self.step))))?;
        self.committed = true;
        hit(Point::CheckpointNamed);
        durable::sync_folder(&self.root)?;

        // The checkpoint is safe from here on: what fails below is told, but does not undo it.
        let mut done = Committed { path, bytes, removed: Vec::new(), warnings: Vec::new() };
        let mut warn = |result: Result<(), ModelError>| match result {
            Ok(()) => true,
            Err(e) => {
                done.warnings.push(e.to_string());
                false
            }
        };
        if replaced {
            warn(durable::remove_folder(&self.partial));
        }
        if warn(durable::replace_file(&self.root.join(LATEST_FILE), format!("{}\n", folder_name(self.step)).as_bytes())) {
            hit(Point::CheckpointLatest);
            for old in superseded(&self.root, keep, self.step, &meta.run) {
                if warn(remove(&old)) {
                    done.removed.push(old);
                }
            }
        }
        Ok(done)
    }

    /// Give the checkpoint up and remove what was written of it.
    ///
    /// # Errors
    /// It cannot be removed; the next [`begin`](Self::begin) will.
    pub fn abort(mut self) -> Result<(), ModelError> {
        self.committed = true;
        durable::remove_folder(&self.partial)
    }

    /// The notes of all ranks, checked against each other and against the files.
    fn notes(&self) -> Result<Vec<ShardInfo>, ModelError> {
        let mut notes = Vec::new();
        let mut count = 1;
        while (notes.len() as u32) < count {
            let path = self.partial.join(note_name(notes.len() as u32));
            let bad = |text: &str| ModelError::format(&path, text);
            let note: ShardInfo = serde_json::from_slice(&read_limited(&path, MAX_NOTE_BYTES)?).map_err(|e| bad(&e.to_string()))?;
            if notes.is_empty() {
                count = note.shards;
            }
            if note.writer != self.writer
                || note.step != self.step
                || note.shard != notes.len() as u32
                || note.shards != count
                || !plain_name(&note.file)
            {
                return Err(bad("does not belong to this checkpoint"));
            }
            let file = self.partial.join(&note.file);
            let size = std::fs::metadata(&file).map_err(|e| ModelError::read(&file, e))?.len();
            if size != note.bytes {
                return Err(ModelError::format(&file, format_args!("has {size} bytes, {} were written", note.bytes)));
            }
            notes.push(note);
        }
        Ok(notes)
    }

    fn manifest(&self, meta: &CheckpointMeta, shards: Vec<ShardInfo>) -> Result<Manifest, ModelError> {
        let bad = |text: String| Err(ModelError::Invalid(format!("checkpoint of step {}: {text}", self.step)));
        if meta.step != self.step {
            return bad(format!("its facts are of step {}", meta.step));
        }
        let blocks = meta.architecture.blocks();
        let mut missing: HashMap<&str, u64> = crate::hf::inventory(&blocks).map(|(name, shape)| (name, shape.iter().product())).collect();
        for tensor in shards.iter().flat_map(|s| &s.tensors) {
            if missing.remove(tensor.name.as_str()).is_none() {
                return bad(format!("tensor `{}` is not the model's, or written twice", tensor.name));
            }
        }
        if let Some(name) = missing.keys().next() {
            return bad(format!("tensor `{name}` was not written"));
        }
        let Some(moments) = shards.first().map(|s| s.moments).filter(|m| shards.iter().all(|s| s.moments == *m)) else {
            return bad("its shards have moments of different formats".into());
        };
        Ok(Manifest {
            format: FORMAT.into(),
            version: VERSION,
            meta: meta.clone(),
            parameters: meta.architecture.parameter_count(),
            moments,
            piece_elements: PIECE_ELEMENTS as u64,
            shards,
        })
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if self.lock.is_some() && !self.committed {
            // Nothing relies on it: the next writer removes what is left.
            let _ = durable::remove_folder(&self.partial);
        }
    }
}

/// Type of a part of a tensor in the files; none for a part that is not kept.
pub(super) fn part_dtype(moments: MomentFormat, part: usize) -> Option<Dtype> {
    match (part, moments) {
        (0, _) | (_, MomentFormat::F32) => Some(Dtype::F32),
        (_, MomentFormat::Bf16) => Some(Dtype::BF16),
        (_, MomentFormat::None) => None,
    }
}

fn note_name(shard: u32) -> String {
    format!("shard-{shard:05}.json")
}

/// Tells this writer from all others: process, start of this call, and a counter.
fn identity() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}-{}", std::process::id(), now.as_nanos(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Put a checkpoint folder in order after a death: what was left unfinished is removed, `latest` moved on, and older ones
/// than the `keep` newest of `run` go. Returns the folder of step `step`, if `run` has a whole one. Does nothing while
/// another process writes there, and nothing to a folder that is not there.
///
/// # Errors
/// The folder cannot be read or written.
pub fn tidy(root: &Path, step: u64, run: &str, keep: usize) -> Result<Option<PathBuf>, ModelError> {
    if !root.is_dir() {
        return Ok(None);
    }
    let path = root.join(folder_name(step));
    let whole = super::Checkpoint::open(&path).is_ok_and(|c| c.step() == step && c.meta().run == run);
    if let Some(_lock) = FolderLock::take(root)? {
        clean(root)?;
        let latest = root.join(LATEST_FILE);
        let named = read_limited(&latest, 4096).ok().and_then(|t| step_of(String::from_utf8_lossy(&t).trim()));
        if whole && named.is_none_or(|named| named < step) {
            durable::replace_file(&latest, format!("{}\n", folder_name(step)).as_bytes())?;
        }
        if whole {
            for old in superseded(root, keep, step, run) {
                remove(&old)?;
            }
        }
    }
    Ok(whole.then_some(path))
}

/// Remove a checkpoint. It loses its name first: one that is only half there would count as damaged, and for ever.
fn remove(path: &Path) -> Result<(), ModelError> {
    let mut gone = path.as_os_str().to_owned();
    gone.push(PARTIAL);
    let gone = PathBuf::from(gone);
    durable::rename(path, &gone)?;
    durable::remove_folder(&gone)
}

/// Remove what dead writers left, and undo a replacement that was cut off.
fn clean(root: &Path) -> Result<(), ModelError> {
    let entries = std::fs::read_dir(root).map_err(|e| ModelError::read(root, e))?;
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if let Some(place) = name.strip_suffix(REPLACED).filter(|n| step_of(n).is_some()) {
            durable::recover(&root.join(place), &entry.path())?;
        }
    }
    let entries = std::fs::read_dir(root).map_err(|e| ModelError::read(root, e))?;
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.strip_suffix(PARTIAL).is_some_and(|n| step_of(n).is_some()) {
            durable::remove_folder(&entry.path())?;
        } else if name.strip_suffix(durable::ASIDE) == Some(LATEST_FILE) {
            durable::remove_file(&entry.path())?;
        }
    }
    Ok(())
}

/// Checkpoints of this run that are older than the `keep` newest sound ones up to `step`. Those of other runs stay, as do
/// later ones, which a run that began again from an earlier step left behind: neither is this run's to remove.
fn superseded(root: &Path, keep: usize, step: u64, run: &str) -> Vec<PathBuf> {
    if keep == 0 {
        return Vec::new();
    }
    let mut kept = 0;
    let mut old = Vec::new();
    for (_, path) in super::find::list(root).unwrap_or_default().into_iter().filter(|&(s, _)| s <= step) {
        if super::read::run_of(&path).is_none_or(|of| of != run) {
            continue;
        }
        if kept >= keep {
            old.push(path);
        } else if super::Checkpoint::open(&path).is_ok() {
            kept += 1;
        }
    }
    old
}
