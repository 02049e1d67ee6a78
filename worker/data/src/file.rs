//! Data files: globs, and what identifies a file's content.

use crate::{DataError, map::Map};
use ramtorch_job::OneOrMany;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// A file that workers map, and how they know that it still is the file that was prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// Its path.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Time of its last change, nanoseconds since 1970.
    pub modified_ns: i64,
    /// BLAKE3 of what follows `data_offset`, hexadecimal.
    pub blake3: String,
    /// Where its tokens begin (bytes).
    pub data_offset: u64,
    /// Tokens, or rows of a tensors file.
    pub items: u64,
}

impl DataFile {
    /// Maps the file, after making sure that it is the one that was prepared: same length, and same content where the
    /// time of change is another.
    pub(crate) fn map(&self) -> Result<Map, DataError> {
        let file = File::open(&self.path).map_err(DataError::read(&self.path))?;
        let meta = file.metadata().map_err(DataError::read(&self.path))?;
        if meta.len() != self.bytes {
            let reason = format!("it is {} bytes long instead of {}", meta.len(), self.bytes);
            return Err(DataError::Changed { path: self.path.clone(), reason });
        }
        if self.data_offset.checked_add(self.items).is_none_or(|end| end > self.bytes) {
            return Err(DataError::file(&self.path, "the description of this file is damaged; submit the job again"));
        }
        let map = Map::of(&file, &self.path)?;
        if modified_ns(&meta) != self.modified_ns
            && blake3::Hasher::new().update_rayon(&map[self.data_offset as usize..]).finalize().to_hex().as_str() != self.blake3
        {
            return Err(DataError::Changed { path: self.path.clone(), reason: "its content is different".into() });
        }
        Ok(map)
    }
}

/// Time of the last change in nanoseconds since 1970; 0 where the file system has none.
pub(crate) fn modified_ns(meta: &Metadata) -> i64 {
    meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).and_then(|d| i64::try_from(d.as_nanos()).ok()).unwrap_or(0)
}

/// The files that `patterns` name, in the order given; those of a glob sorted by name. Each must be a regular file,
/// and not empty. Files named twice are read twice.
pub(crate) fn resolve(key: &'static str, patterns: &OneOrMany) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for pattern in patterns.iter() {
        // A file whose name happens to hold wildcards is meant literally.
        if Path::new(pattern).exists() {
            files.push(PathBuf::from(pattern));
            continue;
        }
        let is_glob = pattern.contains(['*', '?', '[']);
        let options = glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };
        let found =
            glob::glob_with(pattern, options).map_err(|e| DataError::Spec { key, reason: format!("{pattern}: not a valid glob: {e}") })?;
        let mut found =
            found.collect::<Result<Vec<_>, _>>().map_err(|e| DataError::Read { path: e.path().to_path_buf(), source: e.into() })?;
        found.retain(|path| path.is_file());
        if found.is_empty() {
            return Err(DataError::NoMatch { key, pattern: pattern.to_string(), is_glob });
        }
        found.sort();
        files.append(&mut found);
    }
    for path in &files {
        let meta = path.metadata().map_err(DataError::read(path))?;
        if !meta.is_file() {
            let hint = if meta.is_dir() {
                "this is a folder; name the files in it, for example with a glob (…/*)"
            } else {
                "this is not a regular file"
            };
            return Err(DataError::file(path, hint));
        }
        if meta.len() == 0 {
            return Err(DataError::Empty { path: path.clone() });
        }
    }
    Ok(files)
}

/// Length, time of change and BLAKE3 of a file that is about to be read as documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    pub(crate) bytes: u64,
    pub(crate) modified_ns: i64,
    pub(crate) hash: blake3::Hash,
}

/// Reads and hashes files, in blocks, on all threads. `progress` gets the bytes of each block.
pub(crate) fn fingerprints(paths: &[PathBuf], progress: &(dyn Fn(u64) + Sync)) -> Result<Vec<Fingerprint>, DataError> {
    paths.par_iter().map(|path| fingerprint(path, progress)).collect()
}

fn fingerprint(path: &Path, progress: &(dyn Fn(u64) + Sync)) -> Result<Fingerprint, DataError> {
    let mut file = File::open(path).map_err(DataError::read(path))?;
    let meta = file.metadata().map_err(DataError::read(path))?;
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; HASH_BLOCK_BYTES.min(usize::try_from(meta.len()).unwrap_or(usize::MAX)).max(1)];
    let mut bytes = 0;
    loop {
        let n = read_full(&mut file, &mut block).map_err(DataError::read(path))?;
        if n == 0 {
            break;
        }
        hasher.update_rayon(&block[..n]);
        bytes += n as u64;
        progress(n as u64);
    }
    Ok(Fingerprint { bytes, modified_ns: modified_ns(&meta), hash: hasher.finalize() })
}

/// Fails where a file changed since its fingerprint was taken.
pub(crate) fn unchanged(path: &Path, print: &Fingerprint) -> Result<(), DataError> {
    let meta = path.metadata().map_err(DataError::read(path))?;
    if meta.len() != print.bytes || modified_ns(&meta) != print.modified_ns {
        return Err(DataError::file(path, "the file changed while it was being read; wait until it is complete and submit the job again"));
    }
    Ok(())
}

/// Fills `buffer` as far as the file goes.
pub(crate) fn read_full(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read(&mut buffer[n..]) {
            Ok(0) => break,
            Ok(k) => n += k,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}

const HASH_BLOCK_BYTES: usize = 4 << 20;
