//! Safetensors files, read in place.
//!
//! A file is `u64` header length, a JSON header, then the tensors' bytes. Nothing in the header is believed before it is
//! checked against the file's length: types, shapes, products, offsets, gaps, overlaps and duplicate names. Ranges are
//! read with positioned reads (no mapping: a file that shrinks under us is an error and not a SIGBUS), so any number of
//! threads can read one file at once, each with a small buffer of its own.

mod header;
#[cfg(test)]
mod tests;
mod writer;

pub use header::TensorInfo;
pub(crate) use header::parse;
pub(crate) use writer::{PlannedTensor, StreamWriter, head};

use crate::error::ModelError;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Longest header that is read, in bytes; the limit of the safetensors library.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes converted at once: small enough to stay in a core's cache.
const CHUNK_BYTES: usize = 256 << 10;

/// An open safetensors file whose header was checked.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    others: HashSet<String>,
    metadata: Vec<(String, String)>,
    bytes: u64,
}

impl TensorFile {
    /// Open a file and check its header.
    ///
    /// # Errors
    /// The file cannot be read, its header is damaged or too long, or the file is shorter or longer than the header says.
    pub fn open(path: &Path) -> Result<TensorFile, ModelError> {
        let failed = |e| ModelError::read(path, e);
        let file = File::open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if !meta.is_file() {
            return Err(ModelError::format(path, "is not a regular file"));
        }
        let file_bytes = meta.len();
        if file_bytes < 8 {
            return Err(ModelError::format(path, format_args!("is {file_bytes} bytes long, too short for a safetensors file")));
        }
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0).map_err(failed)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES || header_bytes > file_bytes - 8 {
            let text = format_args!(
                "is not a safetensors file, or truncated: its header would be {header_bytes} bytes long, the file has {file_bytes}"
            );
            return Err(ModelError::format(path, text));
        }
        let mut text = vec![0; header_bytes as usize];
        file.read_exact_at(&mut text, 8).map_err(failed)?;
        let header = parse(&text, 8 + header_bytes, file_bytes).map_err(|e| ModelError::format(path, e))?;
        let by_name = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(TensorFile {
            path: path.to_owned(),
            file,
            tensors: header.tensors,
            by_name,
            others: header.others,
            metadata: header.metadata,
            bytes: file_bytes,
        })
    }

    /// Path as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The tensors, in the order of the header.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// Names of the tensors whose type no weight has: integers, masks, 8-bit floats.
    pub fn other_tensors(&self) -> &HashSet<String> {
        &self.others
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// Read elements `start .. start + out.len()` of a tensor of this file as fp32.
    ///
    /// # Errors
    /// The range leaves the tensor, or the file cannot be read.
    pub fn read(&self, tensor: &TensorInfo, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        let size = tensor.dtype.size();
        let per_chunk = CHUNK_BYTES / size as usize;
        let mut buffer = vec![0; CHUNK_BYTES.min(out.len() * size as usize)];
        let mut at = start;
        for piece in out.chunks_mut(per_chunk) {
            let bytes = &mut buffer[..piece.len() * size as usize];
            self.read_bytes(tensor, at, bytes)?;
            tensor.dtype.decode(bytes, piece);
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Read the raw bytes of elements from `start` on.
    pub(crate) fn read_bytes(&self, tensor: &TensorInfo, start: u64, out: &mut [u8]) -> Result<(), ModelError> {
        let size = tensor.dtype.size();
        let end = start.checked_mul(size).and_then(|from| from.checked_add(out.len() as u64));
        if end.is_none_or(|end| end > tensor.bytes()) {
            let text =
                format!("{}: read of {} bytes at element {start} of tensor `{}` leaves it", self.path.display(), out.len(), tensor.name);
            return Err(ModelError::Invalid(text));
        }
        let failed = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                ModelError::format(&self.path, format_args!("tensor `{}` is cut off: the file was shortened while in use", tensor.name))
            }
            _ => ModelError::read(&self.path, e),
        };
        self.file.read_exact_at(out, tensor.offset + start * size).map_err(failed)
    }
}
