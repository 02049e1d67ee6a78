//! From documents to a token cache: files are read in batches, each batch is tokenised by all threads while the next
//! one is read, and what comes out is written in order. Memory holds two batches, whatever the size of the files.

use crate::cache::{self, Contents, Writer};
use crate::documents::{self, BatchSize, Document, Files, FilesBatch, Unit};
use crate::file::{Fingerprint, fingerprints};
use crate::pieces::{Piece, Stitcher, encode_text};
use crate::{DataError, Source, Tokenizer};
use ramtorch_job::DataFormat;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How far a preparation is: what is being done, how much of it is done, and how much there is (bytes).
pub type Progress<'a> = &'a (dyn Fn(&str, u64, u64) + Sync);

/// What to tokenise, and how.
pub(crate) struct Job<'a> {
    pub(crate) format: DataFormat,
    pub(crate) column: Option<&'a str>,
    pub(crate) files: &'a [PathBuf],
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) vocab_size: Option<usize>,
    pub(crate) cache_dir: &'a Path,
    pub(crate) batch: BatchSize,
}

/// What one unit became.
enum Encoded {
    Document { ids: Vec<u32>, loss: Option<Vec<bool>> },
    Piece { piece: Piece, first: bool, last: bool },
}

impl Job<'_> {
    /// Finds the files' cache, or makes it.
    pub(crate) fn run(&self, progress: Progress) -> Result<Source, DataError> {
        let total: u64 = self.files.iter().map(|p| p.metadata().map_or(0, |m| m.len())).sum();
        let done = AtomicU64::new(0);
        let prints = fingerprints(self.files, &|n| progress("reading data", done.fetch_add(n, Ordering::Relaxed) + n, total))?;
        let key = self.key(&prints);
        if let Some((source, contents)) = cache::find(self.cache_dir, &key) {
            tracing::info!(path = %cache::path_of(self.cache_dir, &key).display(), tokens = contents.tokens, "token cache found");
            self.check_id(contents.max_id)?;
            return Ok(source);
        }
        let mut writer = Writer::create(self.cache_dir, key)?;
        let files: Vec<_> = self.files.iter().cloned().zip(prints).collect();
        let empty = self.tokenise(&files, &mut writer, &|done| progress("tokenising", done.min(total), total))?;
        let (source, Contents { tokens, documents, loss_tokens, .. }) = writer.finish()?;
        tracing::info!(path = %source.files[0].path.display(), tokens, documents, loss_tokens, empty_documents = empty, "token cache written");
        Ok(source)
    }

    /// Hash of all that decides which words the cache holds.
    fn key(&self, prints: &[Fingerprint]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        // The number counts changes of what this module and the template and mask code make of the same input.
        hasher.update(b"ramtorch token cache, rules 1\n");
        hasher.update(self.tokenizer.digest().as_bytes());
        hasher.update(format!("{:?} {:?} {}\n", self.format, self.column, prints.len()).as_bytes());
        for print in prints {
            hasher.update(print.hash.as_bytes());
        }
        hasher.finalize()
    }

    /// Tokenises all files; returns the number of empty documents, which are left out.
    fn tokenise(&self, files: &[(PathBuf, Fingerprint)], writer: &mut Writer, progress: &dyn Fn(u64)) -> Result<u64, DataError> {
        let mut reader = Files::new(self.format, self.column, self.batch, files);
        let mut out = Output { job: self, writer, stitcher: Stitcher::default(), begins: false, ids: Vec::new(), empty: 0 };
        let mut batch = reader.next_batch()?;
        let mut done = 0;
        while let Some(FilesBatch { units, bytes }) = batch {
            let (next, encoded) =
                rayon::join(|| reader.next_batch(), || units.into_par_iter().map(|(path, unit)| self.unit(path, unit)).collect::<Vec<_>>());
            // Errors come in the order of the files, whatever thread met them first.
            for unit in encoded {
                out.add(unit?)?;
            }
            done += bytes;
            progress(done);
            batch = next?;
        }
        Ok(out.empty)
    }

    fn unit(&self, path: &Path, unit: Unit) -> Result<Encoded, DataError> {
        let (document, place) = match unit {
            Unit::Piece { text, at, first, last } => {
                return Ok(Encoded::Piece { piece: Piece::encode(self.tokenizer, text, at)?, first, last });
            }
            Unit::Line { json, line } => (documents::parse_line(path, &json, line)?, Place::Line(line)),
            Unit::Document { document, row } => (document, row.map_or(Place::File, Place::Row)),
        };
        match document {
            Document::Text(text) => {
                let body = encode_text(self.tokenizer, &text)?;
                Ok(Encoded::Document { ids: if body.is_empty() { body } else { self.framed(body) }, loss: None })
            }
            Document::Chat(conversation) => {
                let marked = self.tokenizer.encode_conversation(&conversation).map_err(|e| place.of(path, e))?;
                Ok(Encoded::Document { ids: marked.ids, loss: Some(marked.assistant) })
            }
        }
    }

    /// A text document with the tokenizer's own special tokens, ended by the end-of-text token (once).
    fn framed(&self, body: Vec<u32>) -> Vec<u32> {
        [self.tokenizer.around().0, &body, &self.tail()].concat()
    }

    fn tail(&self) -> Vec<u32> {
        let mut tail = self.tokenizer.around().1.to_vec();
        tail.extend(self.tokenizer.eos().filter(|eos| tail.last() != Some(eos)));
        tail
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), DataError> {
        ids.iter().copied().max().map_or(Ok(()), |max| self.check_id(max))
    }

    fn check_id(&self, id: u32) -> Result<(), DataError> {
        match self.vocab_size {
            Some(vocab_size) if id as usize >= vocab_size => {
                Err(DataError::TokenizerRange { path: self.tokenizer.path().to_path_buf(), id, vocab_size })
            }
            _ => Ok(()),
        }
    }
}

/// Where in a file a document stands.
enum Place {
    File,
    Line(u64),
    Row(u64),
}

impl Place {
    /// Adds the place to an error that does not know it.
    fn of(self, path: &Path, e: DataError) -> DataError {
        let (path, reason) = (path.to_path_buf(), e.to_string());
        match self {
            Place::File => DataError::File { path, reason },
            Place::Line(line) => DataError::Line { path, line, reason },
            Place::Row(row) => DataError::Row { path, row, reason },
        }
    }
}

/// Writes what the units became.
struct Output<'a, 'w> {
    job: &'a Job<'a>,
    writer: &'w mut Writer,
    stitcher: Stitcher,
    /// In a document that comes in pieces: whether the next ids are its first.
    begins: bool,
    ids: Vec<u32>,
    empty: u64,
}

impl Output<'_, '_> {
    fn add(&mut self, encoded: Encoded) -> Result<(), DataError> {
        match encoded {
            Encoded::Document { ids, .. } if ids.is_empty() => self.empty += 1,
            Encoded::Document { ids, loss } => {
                self.job.check_ids(&ids)?;
                self.writer.part(&ids, loss.as_deref(), true)?;
            }
            Encoded::Piece { piece, first, last } => {
                let tokenizer = self.job.tokenizer;
                self.begins |= first;
                self.ids.clear();
                if first {
                    self.ids.extend_from_slice(tokenizer.around().0);
                }
                self.stitcher.push(tokenizer, piece, &mut self.ids)?;
                if last {
                    self.stitcher.finish(&mut self.ids);
                    self.ids.extend(self.job.tail());
                }
                self.job.check_ids(&self.ids)?;
                self.writer.part(&self.ids, None, self.begins)?;
                // The first piece may be held back whole, so that nothing has been written yet.
                self.begins &= self.ids.is_empty();
            }
        }
        Ok(())
    }
}
