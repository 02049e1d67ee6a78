//! Documents of text, JSON Lines and Parquet files, read in batches of bounded size.

mod jsonl;
mod parquet;
mod text;

use crate::DataError;
use crate::chat::Conversation;
use crate::file::{Fingerprint, unchanged};
use ramtorch_job::DataFormat;
use std::path::{Path, PathBuf};

/// What one document is.
#[derive(Debug, Clone)]
pub(crate) enum Document {
    /// Plain text.
    Text(String),
    /// A conversation, for the chat template.
    Chat(Conversation),
}

/// Something that one thread turns into tokens.
#[derive(Debug)]
pub(crate) enum Unit {
    /// A line of a JSON Lines file, not parsed yet, with its number from 1.
    Line { json: Vec<u8>, line: u64 },
    /// A whole document; `row` from 0 where the file has rows.
    Document { document: Document, row: Option<u64> },
    /// A piece of a text file: text with its context, the place where it begins, and whether it is the first or the
    /// last of the file.
    Piece { text: String, at: u64, first: bool, last: bool },
}

/// Some units of one file, in order, and the bytes of the file that they stand for.
#[derive(Debug)]
struct Batch {
    units: Vec<Unit>,
    bytes: u64,
}

/// Reads one file batch by batch.
trait Reader: Send {
    /// The next batch; `None` at the end of the file.
    fn next_batch(&mut self) -> Result<Option<Batch>, DataError>;
}

/// Limits of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchSize {
    /// Bytes of text; one document may be longer.
    pub(crate) bytes: usize,
}

impl BatchSize {
    /// Work for every thread, in pieces small enough that none waits long for another.
    pub(crate) fn for_this_machine() -> Self {
        BatchSize { bytes: (rayon::current_num_threads() * (1 << 20)).clamp(4 << 20, 128 << 20) }
    }
}

/// Units of several files, packed into batches, so that many small files keep all threads busy as well.
pub(crate) struct Files<'a> {
    pub(crate) format: DataFormat,
    pub(crate) column: Option<&'a str>,
    pub(crate) size: BatchSize,
    /// Files and what they were when they were hashed.
    pub(crate) files: &'a [(PathBuf, Fingerprint)],
    reader: Option<Box<dyn Reader>>,
}

/// Some units with their files, in order, and the bytes of the files that they stand for.
#[derive(Debug)]
pub(crate) struct FilesBatch<'a> {
    pub(crate) units: Vec<(&'a Path, Unit)>,
    pub(crate) bytes: u64,
}

impl<'a> Files<'a> {
    pub(crate) fn new(format: DataFormat, column: Option<&'a str>, size: BatchSize, files: &'a [(PathBuf, Fingerprint)]) -> Files<'a> {
        Files { format, column, size, files, reader: None }
    }

    /// The next batch; `None` after the last file. A file that changed since it was hashed is an error.
    pub(crate) fn next_batch(&mut self) -> Result<Option<FilesBatch<'a>>, DataError> {
        let mut batch = FilesBatch { units: Vec::new(), bytes: 0 };
        while let [(path, print), rest @ ..] = self.files {
            if batch.bytes >= self.size.bytes as u64 || batch.units.len() >= UNITS_MAX {
                break;
            }
            let mut reader = match self.reader.take() {
                Some(reader) => reader,
                None => open(self.format, path, self.column, self.size)?,
            };
            match reader.next_batch()? {
                Some(Batch { units, bytes }) => {
                    batch.units.extend(units.into_iter().map(|u| (path.as_path(), u)));
                    batch.bytes += bytes;
                    self.reader = Some(reader);
                }
                None => {
                    unchanged(path, print)?;
                    self.files = rest;
                }
            }
        }
        Ok((!batch.units.is_empty() || !self.files.is_empty()).then_some(batch))
    }
}

/// Most units of a batch, where documents are very short.
const UNITS_MAX: usize = 1 << 20;

/// Opens a file of documents.
fn open(format: DataFormat, path: &Path, column: Option<&str>, size: BatchSize) -> Result<Box<dyn Reader>, DataError> {
    Ok(match format {
        DataFormat::Jsonl => Box::new(jsonl::JsonLines::open(path, size)?),
        DataFormat::Parquet => Box::new(parquet::ParquetRows::open(path, column, size)?),
        _ => Box::new(text::TextFile::open(path, size)?),
    })
}

pub(crate) use jsonl::parse_line;
