//! Writing a checkpoint.

use super::format::{CheckpointMeta, FORMAT, Manifest, ShardInfo, TensorChecksums, VERSION};
use super::part::{Note, PartWriter, join, note_name};
use super::pieces::CheckpointFiles;
use super::{LATEST_FILE, MANIFEST_FILE, PARTIAL, REPLACED, folder_name, step_of};
use crate::assets::ModelAssets;
use crate::durable::{self, FolderLock};
use crate::error::ModelError;
use crate::files::read_limited;
use crate::stream::PIECE_ELEMENTS;
use ramtorch_failpoint::{Point, hit};
use ramtorch_store::Store;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Holds the identity of the writer inside the temporary folder.
const WRITER_FILE: &str = "writer";
/// Longest note of a rank that is read, in bytes.
const MAX_NOTE_BYTES: u64 = 512 << 20;

/// A checkpoint under way.
///
/// One rank calls [`begin`](Self::begin); when it has, the others [`join`](Self::join). Each rank writes its
/// [`part`](Self::part); when all have, one calls [`commit`](Self::commit). Dropping the first rank's writer without a
/// commit removes what was written.
pub struct CheckpointWriter {
    root: PathBuf,
    partial: PathBuf,
    files: Arc<CheckpointFiles>,
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
    /// Begin the checkpoint of these files in folder `root`, which is created: all of its files get their names, their room
    /// and their headers. What a dead writer left there is removed.
    ///
    /// # Errors
    /// The folder cannot be written, the disk is too full, or another process is writing a checkpoint into the folder.
    pub fn begin(root: &Path, files: &Arc<CheckpointFiles>) -> Result<CheckpointWriter, ModelError> {
        durable::create_folder(root)?;
        let lock = FolderLock::take(root)?.ok_or_else(|| ModelError::Exists {
            path: root.to_owned(),
            message: "another process is writing a checkpoint into this folder; give every job a folder of its own".into(),
        })?;
        clean(root)?;
        let step = files.step();
        let partial = root.join(format!("{}{PARTIAL}", folder_name(step)));
        durable::create_temporary_folder(&partial)?;
        let writer = identity();
        let files = files.clone();
        let this = CheckpointWriter { root: root.to_owned(), partial, files, step, writer, lock: Some(lock), committed: false };
        durable::write_file(&this.partial.join(WRITER_FILE), this.writer.as_bytes())?;
        durable::check_space(&this.partial, this.files.bytes())?;
        for shard in &this.files.shards {
            let mut file = durable::create(&this.partial.join(&shard.name))?;
            file.reserve(shard.bytes)?;
            file.set_len(shard.bytes)?;
            file.write_all(&shard.head)?;
            file.finish()?;
        }
        Ok(this)
    }

    /// Take part in the checkpoint that another rank began.
    ///
    /// # Errors
    /// No such checkpoint is under way.
    pub fn join(root: &Path, files: &Arc<CheckpointFiles>) -> Result<CheckpointWriter, ModelError> {
        let step = files.step();
        let partial = root.join(format!("{}{PARTIAL}", folder_name(step)));
        let writer = read_limited(&partial.join(WRITER_FILE), 4096)?;
        let writer = String::from_utf8(writer).map_err(|_| ModelError::format(&partial.join(WRITER_FILE), "is not text"))?;
        Ok(CheckpointWriter { root: root.to_owned(), partial, files: files.clone(), step, writer, lock: None, committed: false })
    }

    /// Bytes that a checkpoint of this store takes on disk, headers aside.
    pub fn bytes_needed(store: &Store) -> u64 {
        store.layout().parameters().saturating_mul(4 + 2 * store.layout().spec().moments.bytes())
    }

    /// The part of rank `rank` of `ranks`: every `ranks`-th page from its own number on. The note that
    /// [`commit`](Self::commit) needs is left in the temporary folder when it is finished.
    ///
    /// # Errors
    /// The files cannot be opened, or there is no such rank.
    pub fn part(&self, rank: u32, ranks: u32) -> Result<PartWriter, ModelError> {
        PartWriter::new(&self.partial, &self.writer, rank, ranks, &self.files)
    }

    /// Make the checkpoint final once every shard is written, then remove those of the same run that are older than
    /// the `keep` newest sound ones (0: keep all).
    ///
    /// # Errors
    /// A shard is missing or not of this writer, or the disk fails: the checkpoints before are then as they were.
    pub fn commit(mut self, meta: &CheckpointMeta, assets: &ModelAssets, keep: usize) -> Result<Committed, ModelError> {
        let notes = self.notes()?;
        let ranks = notes.len() as u32;
        let shards = self.shards(notes)?;
        let bytes = shards.iter().map(|s| s.bytes).sum();
        let manifest = self.manifest(meta, shards)?;
        let text = serde_json::to_vec(&manifest).map_err(|e| ModelError::Invalid(e.to_string()))?;
        for (name, content) in assets.all() {
            durable::write_file(&self.partial.join(name), content)?;
        }
        durable::write_file(&self.partial.join(MANIFEST_FILE), &text)?;
        for rank in 0..ranks {
            durable::remove_file(&self.partial.join(note_name(rank)))?;
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

    /// The notes of all ranks, checked against each other.
    fn notes(&self) -> Result<Vec<Note>, ModelError> {
        let mut notes: Vec<Note> = Vec::new();
        let mut count = 1;
        while (notes.len() as u32) < count {
            let path = self.partial.join(note_name(notes.len() as u32));
            let bad = |text: &str| ModelError::format(&path, text);
            let note: Note = serde_json::from_slice(&read_limited(&path, MAX_NOTE_BYTES)?).map_err(|e| bad(&e.to_string()))?;
            if notes.is_empty() {
                count = note.ranks;
            }
            if note.writer != self.writer
                || note.step != self.step
                || note.rank != notes.len() as u32
                || note.ranks != count
                || note.moments != self.files.moments
            {
                return Err(bad("does not belong to this checkpoint"));
            }
            notes.push(note);
        }
        Ok(notes)
    }

    /// What the manifest says of each file, checked: every element was written once, and every file has its size.
    fn shards(&self, notes: Vec<Note>) -> Result<Vec<ShardInfo>, ModelError> {
        let sums = join(&self.files, notes).map_err(|e| ModelError::Invalid(format!("checkpoint of step {}: {e}", self.step)))?;
        let mut sums: Vec<Option<TensorChecksums>> = sums.into_iter().map(Some).collect();
        let one = |(number, shard): (usize, &super::pieces::ShardFile)| {
            let file = self.partial.join(&shard.name);
            let size = std::fs::metadata(&file).map_err(|e| ModelError::read(&file, e))?.len();
            if size != shard.bytes {
                return Err(ModelError::format(&file, format_args!("has {size} bytes, {} were written", shard.bytes)));
            }
            Ok(ShardInfo {
                shard: number as u32,
                shards: self.files.shards.len() as u32,
                step: self.step,
                writer: self.writer.clone(),
                moments: self.files.moments,
                file: shard.name.clone(),
                bytes: shard.bytes,
                tensors: shard.tensors.iter().filter_map(|t| sums[*t].take()).collect(),
            })
        };
        self.files.shards.iter().enumerate().map(one).collect()
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

/// Tells this writer from all others: process, start of this call, and a counter.
fn identity() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}-{}", std::process::id(), now.as_nanos(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Put a checkpoint folder in order after a death: what was left unfinished is removed, `latest` moved on, or back where it names
/// what is no checkpoint (any more), and older ones
/// than the `keep` newest of `run` go. Returns the newest whole checkpoint of `run` up to step `step`. Does nothing while
/// another process writes there, and nothing to a folder that is not there.
///
/// # Errors
/// The folder cannot be read or written.
pub fn tidy(root: &Path, step: u64, run: &str, keep: usize) -> Result<Option<(u64, PathBuf)>, ModelError> {
    if !root.is_dir() {
        return Ok(None);
    }
    let whole = |&(s, ref path): &(u64, PathBuf)| super::Checkpoint::open(path).is_ok_and(|c| c.step() == s && c.meta().run == run);
    let newest = super::find::list(root)?.into_iter().filter(|(s, _)| *s <= step).find(whole);
    if let Some(_lock) = FolderLock::take(root)? {
        clean(root)?;
        let latest = root.join(LATEST_FILE);
        let named = read_limited(&latest, 4096).ok().and_then(|t| step_of(String::from_utf8_lossy(&t).trim()));
        if let Some((newest, _)) = newest {
            // Somebody may have removed what it names, or a disk lost it.
            let sound = |named: u64| super::Checkpoint::open(&root.join(folder_name(named))).is_ok_and(|c| c.step() == named);
            if named.is_none_or(|named| named < newest || !sound(named)) {
                durable::replace_file(&latest, format!("{}\n", folder_name(newest)).as_bytes())?;
            }
            for old in superseded(root, keep, newest, run) {
                remove(&old)?;
            }
        }
    }
    Ok(newest.map(|(step, _)| (step, root.join(folder_name(step)))))
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
