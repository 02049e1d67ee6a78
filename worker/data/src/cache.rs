//! The token cache: documents that were tokenised once.
//!
//! One file for each list of data files, named by its key: a hash of the contents of the files and of everything else
//! that decides which tokens they become. All numbers are little-endian.
//!
//! ```text
//!    0  magic "RTTOKENS"          8  format version u32        12  zero u32
//!   16  key, 32 bytes            48  BLAKE3 of the words, 32 bytes
//!   80  words u64                88  documents u64             96  words with loss u64
//!  104  largest id u32          108  zero u32                 112  BLAKE3 of bytes 0..112, 32 bytes
//!  144  zeros
//! 4096  words: u32 each; bits 0..30 token id, bit 30 begins a document, bit 31 no loss where it is a target
//! ```
//!
//! A cache is written under another name and renamed when it is complete and on disk, so a file with the right name is
//! whole; two writers of one cache write the same bytes under names of their own, and the later rename wins. A file
//! that fails its checks (a damaged disk, another program's file) is written anew. Partial files of writers that were
//! killed are removed by the next writer: a living one holds a lock on its file.

use crate::stream::{FLAG_NO_LOSS, FLAG_START, ID_MASK};
use crate::{DataError, DataFile, Source, file::modified_ns};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"RTTOKENS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const CHECKED_BYTES: usize = 112;
const BLOCK_BYTES: usize = 4 << 20;
const PARTIAL: &str = ".partial";

/// What a cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) tokens: u64,
    pub(crate) documents: u64,
    pub(crate) loss_tokens: u64,
    pub(crate) max_id: u32,
}

/// The path of the cache with this key.
pub(crate) fn path_of(dir: &Path, key: &blake3::Hash) -> PathBuf {
    dir.join(format!("{}.tokens", &key.to_hex()[..32]))
}

/// Opens the cache with this key, if there is a sound one; every byte is checked. Says in the log why one is not.
pub(crate) fn find(dir: &Path, key: &blake3::Hash) -> Option<(Source, Contents)> {
    let path = path_of(dir, key);
    match check(&path, key) {
        Ok(found) => Some(found),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => {
            tracing::warn!(path = %path.display(), reason = %e, "token cache cannot be used and is made again");
            None
        }
    }
}

fn check(path: &Path, key: &blake3::Hash) -> io::Result<(Source, Contents)> {
    let bad = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_string());
    let mut file = File::open(path)?;
    let meta = file.metadata()?;
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).map_err(|_| bad("shorter than its header"))?;
    let at = |i: usize| u64::from_le_bytes(header[i..i + 8].try_into().unwrap_or_default());
    let word = |i: usize| u32::from_le_bytes(header[i..i + 4].try_into().unwrap_or_default());
    if &header[..8] != MAGIC {
        return Err(bad("not a token cache"));
    }
    if word(8) != VERSION {
        return Err(bad("written by another version"));
    }
    if blake3::hash(&header[..CHECKED_BYTES]).as_bytes() != &header[CHECKED_BYTES..CHECKED_BYTES + 32] {
        return Err(bad("damaged header"));
    }
    if &header[16..48] != key.as_bytes() {
        return Err(bad("cache of other data under this name"));
    }
    let contents = Contents { tokens: at(80), documents: at(88), loss_tokens: at(96), max_id: word(104) };
    if contents.tokens.checked_mul(4).and_then(|n| n.checked_add(HEADER_BYTES as u64)) != Some(meta.len()) {
        return Err(bad("cut short"));
    }
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        match crate::file::read_full(&mut file, &mut block)? {
            0 => break,
            n => hasher.update_rayon(&block[..n]),
        };
    }
    if hasher.finalize().as_bytes() != &header[48..80] {
        return Err(bad("damaged tokens"));
    }
    Ok((source(path, &meta, &hasher.finalize(), &contents), contents))
}

fn source(path: &Path, meta: &std::fs::Metadata, hash: &blake3::Hash, contents: &Contents) -> Source {
    let file = DataFile {
        path: path.to_path_buf(),
        bytes: meta.len(),
        modified_ns: modified_ns(meta),
        blake3: hash.to_hex().to_string(),
        data_offset: HEADER_BYTES as u64,
        items: contents.tokens,
    };
    Source { files: vec![file], tokens: contents.tokens, loss_tokens: contents.loss_tokens, documents: contents.documents }
}

/// Writes a cache. Dropped before [`Writer::finish`], it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Writer {
    /// Holds the lock that says this writer is alive.
    out: BufWriter<File>,
    partial: tempfile::TempPath,
    path: PathBuf,
    key: blake3::Hash,
    hasher: blake3::Hasher,
    contents: Contents,
    block: Vec<u8>,
}

impl Writer {
    /// Begins the cache with this key; the folder is made if it is not there.
    pub(crate) fn create(dir: &Path, key: blake3::Hash) -> Result<Writer, DataError> {
        std::fs::create_dir_all(dir).map_err(DataError::write(dir))?;
        sweep(dir);
        let path = path_of(dir, &key);
        let (file, partial) = locked_partial(dir, &key).map_err(DataError::write(dir))?;
        let mut writer = Writer {
            out: BufWriter::with_capacity(BLOCK_BYTES, file),
            partial,
            path,
            key,
            hasher: blake3::Hasher::new(),
            contents: Contents::default(),
            block: Vec::new(),
        };
        writer.out.write_all(&[0; HEADER_BYTES]).map_err(DataError::write(&writer.path))?;
        Ok(writer)
    }

    /// Adds tokens; `first` where they begin a document. `loss` says which of them count where they are targets (all
    /// without it).
    pub(crate) fn part(&mut self, ids: &[u32], loss: Option<&[bool]>, first: bool) -> Result<(), DataError> {
        self.block.clear();
        for (i, &id) in ids.iter().enumerate() {
            let counts = loss.is_none_or(|l| l[i]);
            let start = first && i == 0;
            let word = (id & ID_MASK) | if start { FLAG_START } else { 0 } | if counts { 0 } else { FLAG_NO_LOSS };
            self.contents.documents += u64::from(start);
            self.contents.loss_tokens += u64::from(counts);
            self.contents.max_id = self.contents.max_id.max(id);
            self.block.extend_from_slice(&word.to_le_bytes());
        }
        self.contents.tokens += ids.len() as u64;
        self.hasher.update(&self.block);
        self.out.write_all(&self.block).map_err(DataError::write(&self.path))
    }

    /// Makes the cache durable and gives it its name.
    pub(crate) fn finish(mut self) -> Result<(Source, Contents), DataError> {
        let hash = self.hasher.finalize();
        let c = self.contents;
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..48].copy_from_slice(self.key.as_bytes());
        header[48..80].copy_from_slice(hash.as_bytes());
        header[80..88].copy_from_slice(&c.tokens.to_le_bytes());
        header[88..96].copy_from_slice(&c.documents.to_le_bytes());
        header[96..104].copy_from_slice(&c.loss_tokens.to_le_bytes());
        header[104..108].copy_from_slice(&c.max_id.to_le_bytes());
        let sum = blake3::hash(&header[..CHECKED_BYTES]);
        header[CHECKED_BYTES..CHECKED_BYTES + 32].copy_from_slice(sum.as_bytes());

        let mut durable = || -> io::Result<std::fs::Metadata> {
            self.out.flush()?;
            let file = self.out.get_mut();
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header)?;
            file.sync_all()?;
            file.metadata()
        };
        let meta = durable().map_err(DataError::write(&self.path))?;
        self.partial.persist(&self.path).map_err(|e| DataError::Write { path: self.path.clone(), source: e.error })?;
        if let Some(dir) = self.path.parent() {
            File::open(dir).and_then(|d| d.sync_all()).map_err(DataError::write(dir))?;
        }
        Ok((source(&self.path, &meta, &hash, &c), c))
    }
}

/// A new file that other processes recognise as being written.
fn locked_partial(dir: &Path, key: &blake3::Hash) -> io::Result<(File, tempfile::TempPath)> {
    loop {
        let (file, path) =
            tempfile::Builder::new().prefix(&format!("{}.", &key.to_hex()[..32])).suffix(PARTIAL).tempfile_in(dir)?.into_parts();
        // File systems without locks lose only the removal of left-over files.
        let _ = file.lock();
        // Between creation and lock a sweeper may have taken the file for a dead one.
        if path.exists() {
            return Ok((file, path));
        }
    }
}

/// Removes partial files whose writer is gone. What cannot be removed stays: it is only space.
fn sweep(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if !path.to_string_lossy().ends_with(PARTIAL) {
            continue;
        }
        let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else { continue };
        if file.try_lock().is_ok() && std::fs::remove_file(&path).is_ok() {
            tracing::info!(path = %path.display(), "removed what a writer of a token cache left behind when it ended early");
        }
    }
}

/// The words of a cache, for tests.
#[cfg(test)]
pub(crate) fn words(path: &Path) -> Vec<u32> {
    std::fs::read(path).unwrap()[HEADER_BYTES..].chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}
