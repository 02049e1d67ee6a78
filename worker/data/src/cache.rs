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

/// Makes the checksums of a whole cache right, as an attacker would.
#[cfg(fuzzing)]
pub(crate) fn seal(bytes: &mut [u8]) {
    let words = *blake3::hash(&bytes[HEADER_BYTES..]).as_bytes();
    bytes[48..80].copy_from_slice(&words);
    let sum = *blake3::hash(&bytes[..CHECKED_BYTES]).as_bytes();
    bytes[CHECKED_BYTES..CHECKED_BYTES + 32].copy_from_slice(&sum);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DataErrorKind;
    use proptest::prelude::*;
    use std::fs;

    fn key(text: &str) -> blake3::Hash {
        blake3::hash(text.as_bytes())
    }

    fn words(path: &Path) -> Vec<u32> {
        fs::read(path).unwrap()[HEADER_BYTES..].chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn written(dir: &Path, key: blake3::Hash) -> Source {
        let mut w = Writer::create(dir, key).unwrap();
        w.part(&[5, 6], None, true).unwrap();
        w.part(&[7, 8, 9], Some(&[false, true, false]), true).unwrap();
        w.part(&[], None, true).unwrap();
        w.part(&[3], None, false).unwrap();
        w.finish().unwrap().0
    }

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn words_carry_documents_and_loss() {
        let dir = tempfile::tempdir().unwrap();
        let source = written(&dir.path().join("made/for/it"), key("a"));
        assert_eq!((source.tokens, source.loss_tokens, source.documents), (6, 4, 2));
        let (s, n) = (FLAG_START, FLAG_NO_LOSS);
        assert_eq!(words(&source.files[0].path), [5 | s, 6, 7 | s | n, 8, 9 | n, 3]);
        let (found, contents) = find(&dir.path().join("made/for/it"), &key("a")).unwrap();
        assert_eq!(found, source);
        assert_eq!(contents, Contents { tokens: 6, documents: 2, loss_tokens: 4, max_id: 9 });
        assert!(find(dir.path(), &key("b")).is_none());
    }

    #[test]
    fn every_damaged_byte_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), key("a")).files[0].path.clone();
        let good = fs::read(&path).unwrap();
        let checked = (0..CHECKED_BYTES + 32).chain(HEADER_BYTES..good.len());
        for i in checked {
            let mut bad = good.clone();
            bad[i] ^= 0x10;
            fs::write(&path, bad).unwrap();
            assert!(find(dir.path(), &key("a")).is_none(), "byte {i}");
        }
        for length in [0, 7, HEADER_BYTES - 1, HEADER_BYTES, good.len() - 4, good.len() - 1] {
            fs::write(&path, &good[..length]).unwrap();
            assert!(find(dir.path(), &key("a")).is_none(), "length {length}");
        }
        fs::write(&path, [&good[..], &[0; 4]].concat()).unwrap();
        assert!(find(dir.path(), &key("a")).is_none());
        fs::write(&path, &good).unwrap();
        assert!(find(dir.path(), &key("a")).is_some());
    }

    #[test]
    fn a_cache_of_other_data_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path(), key("a")).files[0].path.clone();
        fs::rename(path, path_of(dir.path(), &key("b"))).unwrap();
        assert!(find(dir.path(), &key("b")).is_none());
    }

    #[test]
    fn two_writers_do_not_disturb_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Writer::create(dir.path(), key("a")).unwrap();
        first.part(&[1, 2], None, true).unwrap();
        // The second one sweeps, and must leave the first one's file alone.
        let mut second = Writer::create(dir.path(), key("a")).unwrap();
        second.part(&[1, 2], None, true).unwrap();
        let (from_second, _) = second.finish().unwrap();
        let opened = from_second.files[0].map().unwrap();
        let (from_first, contents) = first.finish().unwrap();
        assert_eq!(from_first.files[0].blake3, from_second.files[0].blake3);
        assert_eq!(find(dir.path(), &key("a")).unwrap().1, contents);
        // The replaced file stays mapped, and its description is still good for the file in its place.
        assert_eq!(opened[HEADER_BYTES], 1);
        from_second.files[0].map().unwrap();
        assert_eq!(names(dir.path()).len(), 1);
    }

    #[test]
    fn what_a_writer_leaves_behind_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        drop(Writer::create(dir.path(), key("a")).unwrap());
        assert_eq!(names(dir.path()), [""; 0]);
        // As after SIGKILL: the file is there, its lock is not.
        fs::write(dir.path().join(format!("0123.x{PARTIAL}")), "half").unwrap();
        fs::write(dir.path().join("unrelated.txt"), "stays").unwrap();
        written(dir.path(), key("a"));
        let mut names = names(dir.path());
        names.sort();
        assert_eq!(names.len(), 2);
        assert_eq!(names[1], "unrelated.txt");
    }

    #[test]
    fn folders_that_cannot_be_written_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let e = Writer::create(&file.join("cache"), key("a")).unwrap_err();
        assert_eq!(e.kind(), DataErrorKind::Output);
        assert!(e.to_string().contains("file/cache") && e.to_string().contains("data.cache"), "{e}");
    }

    #[test]
    fn a_full_disk_is_an_output_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = Writer::create(dir.path(), key("a")).unwrap();
        // The device that is always full takes the place of the file.
        w.out = BufWriter::new(OpenOptions::new().write(true).open("/dev/full").unwrap());
        w.part(&[1, 2, 3], None, true).unwrap();
        let e = w.finish().unwrap_err();
        assert_eq!(e.kind(), DataErrorKind::Output);
        assert!(e.to_string().contains("No space left"), "{e}");
        assert_eq!(names(dir.path()), [""; 0]);
    }

    proptest! {
        #[test]
        fn random_bytes_are_never_a_cache(head in prop::collection::vec(any::<u8>(), 0..200), magic: bool) {
            let dir = tempfile::tempdir().unwrap();
            let mut bytes = if magic { MAGIC.to_vec() } else { Vec::new() };
            bytes.extend(head);
            bytes.resize(HEADER_BYTES + 8, 0);
            fs::write(path_of(dir.path(), &key("a")), bytes).unwrap();
            prop_assert!(find(dir.path(), &key("a")).is_none());
        }

        #[test]
        fn documents_come_back_as_written(documents in prop::collection::vec(prop::collection::vec((0u32..ID_MASK, any::<bool>()), 1..20), 1..20)) {
            let dir = tempfile::tempdir().unwrap();
            let mut w = Writer::create(dir.path(), key("a")).unwrap();
            for d in &documents {
                let (ids, loss): (Vec<u32>, Vec<bool>) = d.iter().copied().unzip();
                w.part(&ids, Some(&loss), true).unwrap();
            }
            let (source, _) = w.finish().unwrap();
            let mut back: Vec<Vec<(u32, bool)>> = Vec::new();
            for word in words(&source.files[0].path) {
                if word & FLAG_START != 0 {
                    back.push(Vec::new());
                }
                back.last_mut().unwrap().push((word & ID_MASK, word & FLAG_NO_LOSS == 0));
            }
            prop_assert_eq!(back, documents);
        }
    }
}
