//! A text file is one document, read in pieces.

use super::{Batch, BatchSize, Document, Reader, Unit};
use crate::DataError;
use crate::file::read_full;
use crate::pieces::{CONTEXT_BYTES, PIECE_BYTES};
use std::fs::File;
use std::path::{Path, PathBuf};

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

pub(crate) struct TextFile {
    path: PathBuf,
    file: File,
    pieces_per_batch: usize,
    /// Bytes from `begin` on that have been read and are still needed.
    window: Vec<u8>,
    begin: u64,
    /// Start of the core of the next piece.
    core: u64,
    /// Whether the file has been read to its end.
    complete: bool,
    done: bool,
}

impl TextFile {
    pub(crate) fn open(path: &Path, size: BatchSize) -> Result<TextFile, DataError> {
        let file = File::open(path).map_err(DataError::read(path))?;
        let pieces_per_batch = (size.bytes / PIECE_BYTES).max(1);
        Ok(TextFile {
            path: path.to_path_buf(),
            file,
            pieces_per_batch,
            window: Vec::new(),
            begin: 0,
            core: 0,
            complete: false,
            done: false,
        })
    }

    /// Reads until the window reaches byte `end`, or the end of the file.
    fn fill(&mut self, end: u64) -> Result<(), DataError> {
        let have = self.begin + self.window.len() as u64;
        if self.complete || have >= end {
            return Ok(());
        }
        let old = self.window.len();
        self.window.resize(old + (end - have) as usize, 0);
        let n = read_full(&mut self.file, &mut self.window[old..]).map_err(DataError::read(&self.path))?;
        self.complete = n < self.window.len() - old;
        self.window.truncate(old + n);
        Ok(())
    }

    /// The text between two bytes, narrowed to whole characters, and where it begins.
    fn text(&self, start: u64, end: u64) -> Result<(String, u64), DataError> {
        let bytes = &self.window[(start - self.begin) as usize..(end - self.begin) as usize];
        // A piece that begins inside of a character begins after it: the piece before has it whole.
        let skip = if start == 0 { 0 } else { bytes.iter().take(3).take_while(|b| **b & 0xC0 == 0x80).count() };
        let (bytes, start) = (&bytes[skip..], start + skip as u64);
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok((text.to_string(), start)),
            Err(e) => {
                let good = e.valid_up_to();
                let last = self.complete && end == self.begin + self.window.len() as u64;
                match std::str::from_utf8(&bytes[..good]) {
                    // A character that is cut off here is whole in the next piece.
                    Ok(text) if e.error_len().is_none() && !last => Ok((text.to_string(), start)),
                    _ => Err(DataError::NotUtf8 { path: self.path.clone(), offset: start + good as u64 }),
                }
            }
        }
    }
}

impl Reader for TextFile {
    fn next_batch(&mut self) -> Result<Option<Batch>, DataError> {
        if self.done {
            return Ok(None);
        }
        let (piece, context) = (PIECE_BYTES as u64, CONTEXT_BYTES as u64);
        let mut units = Vec::with_capacity(self.pieces_per_batch);
        let first = self.core;
        while units.len() < self.pieces_per_batch && !self.done {
            // One byte more than needed tells whether this piece is the last.
            self.fill(self.core + piece + context + 1)?;
            let file_end = self.begin + self.window.len() as u64;
            let end = (self.core + piece + context).min(file_end);
            self.done = self.complete && end == file_end;
            let mut start = self.core.saturating_sub(context);
            if start == 0 && self.window.starts_with(BYTE_ORDER_MARK) {
                start = BYTE_ORDER_MARK.len() as u64;
            }
            let (text, at) = self.text(start, end)?;
            if self.core == 0 && self.done {
                units.push(Unit::Document { document: Document::Text(text), row: None });
            } else {
                units.push(Unit::Piece { text, at, first: self.core == 0, last: self.done });
            }
            self.core = if self.done { file_end } else { self.core + piece };
            let keep = self.core.saturating_sub(context);
            self.window.drain(..(keep - self.begin) as usize);
            self.begin = keep;
        }
        Ok(Some(Batch { units, bytes: self.core - first }))
    }
}
