//! One rank's part in the writing of a checkpoint: its pages, into whichever files their tensors lie in.

use super::format::TensorChecksums;
use super::pieces::{CheckpointFiles, PARTS, Piece, encode};
use crate::durable::{self, DurableFile};
use crate::error::ModelError;
use crate::stream::PIECE_ELEMENTS;
use ramtorch_store::{MomentFormat, PageId, Part, Store, StoreError};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes written into a file before they are brought to the disk: bounds what the kernel holds back, and so how long the
/// end takes.
const WRITE_BACK_BYTES: u64 = 256 << 20;
/// Pieces that are encoded at once where a page goes straight to the files: bounds the memory to 16 MiB.
const PIECES_AT_ONCE: usize = 16;

/// Checksum of a piece: tensor, part, first element, elements, CRC-32C.
type Sum = (u32, u8, u64, u64, u32);

/// What a rank tells the one that commits.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) rank: u32,
    pub(super) ranks: u32,
    pub(super) step: u64,
    /// Which writer it belongs to; notes of a dead one are refused.
    pub(super) writer: String,
    pub(super) moments: MomentFormat,
    pub(super) sums: Vec<Sum>,
}

/// See the module. Pages may be written from several threads.
pub struct PartWriter {
    partial: PathBuf,
    files: Arc<CheckpointFiles>,
    open: Vec<(DurableFile, AtomicU64)>,
    note: Mutex<Note>,
}

impl PartWriter {
    pub(super) fn new(partial: &Path, writer: &str, rank: u32, ranks: u32, files: &Arc<CheckpointFiles>) -> Result<PartWriter, ModelError> {
        if rank >= ranks {
            return Err(ModelError::Invalid(format!("rank {rank} of {ranks} does not exist")));
        }
        let open = files.shards.iter().map(|s| Ok((durable::open(&partial.join(&s.name))?, AtomicU64::new(0))));
        let (step, moments) = (files.step, files.moments);
        Ok(PartWriter {
            partial: partial.to_owned(),
            open: open.collect::<Result<_, ModelError>>()?,
            files: files.clone(),
            note: Mutex::new(Note { rank, ranks, step, writer: writer.to_owned(), moments, sums: Vec::new() }),
        })
    }

    /// Writes pieces that were encoded into `bytes` with these checksums.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn write(&self, pieces: &[Piece], checksums: &[u32], bytes: &[u8]) -> Result<(), ModelError> {
        let mut at = 0;
        for piece in pieces {
            let (file, unwritten) = &self.open[piece.shard];
            file.write_all_at(&bytes[at..at + piece.bytes()], piece.offset)?;
            at += piece.bytes();
            let before = unwritten.fetch_add(piece.bytes() as u64, Ordering::Relaxed);
            if before + piece.bytes() as u64 >= WRITE_BACK_BYTES {
                unwritten.store(0, Ordering::Relaxed);
                file.write_back()?;
            }
        }
        let mut note = self.note.lock().unwrap_or_else(PoisonError::into_inner);
        note.sums.extend(pieces.iter().zip(checksums).map(|(p, sum)| (p.tensor as u32, p.part as u8, p.element, p.elements, *sum)));
        Ok(())
    }

    /// Writes a page straight from where it is, through 16 MiB of memory, on the caller's rayon pool.
    ///
    /// # Errors
    /// As [`PartWriter::write`], and those of `read`.
    pub fn write_page(
        &self,
        page: PageId,
        read: impl Fn(u64, Part, &mut [f32]) -> Result<(), StoreError> + Sync,
    ) -> Result<(), ModelError> {
        let mut buffer = Vec::new();
        for some in self.files.pieces(page).chunks(PIECES_AT_ONCE) {
            let bytes = some.iter().map(Piece::bytes).sum();
            if buffer.len() < bytes {
                buffer.resize(bytes, 0);
            }
            let checksums = encode(some, &mut buffer, &read)?;
            self.write(some, &checksums, &buffer)?;
        }
        Ok(())
    }

    /// Makes all that this rank wrote durable, and leaves the note that a commit needs.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn finish(&self) -> Result<(), ModelError> {
        let note = self.note.lock().unwrap_or_else(PoisonError::into_inner);
        for (file, _) in &self.open {
            file.sync()?;
        }
        let text = serde_json::to_vec(&*note).map_err(|e| ModelError::Invalid(e.to_string()))?;
        durable::write_file(&self.partial.join(note_name(note.rank)), &text)?;
        durable::sync_folder(&self.partial)
    }

    /// Writes the whole part of a store that stands still, and finishes.
    ///
    /// # Errors
    /// As [`PartWriter::write_page`]; a page of the store is not at the checkpoint's step.
    pub fn write_all(&self, store: &Store) -> Result<(), ModelError> {
        let step = self.files.step;
        let (rank, ranks) = {
            let note = self.note.lock().unwrap_or_else(PoisonError::into_inner);
            (note.rank, note.ranks)
        };
        for page in self.files.pages(rank, ranks) {
            self.write_page(page, |start, part, out| store.read_at_step(start, part, step, out))?;
        }
        self.finish()
    }
}

pub(super) fn note_name(rank: u32) -> String {
    format!("rank-{rank:05}.json")
}

/// Joins the checksums of all ranks' pieces, per tensor of the layout; says which elements nobody wrote, or somebody twice.
pub(super) fn join(files: &CheckpointFiles, notes: Vec<Note>) -> Result<Vec<TensorChecksums>, String> {
    let mut by_part: Vec<Vec<(u64, u64, u32)>> = vec![Vec::new(); files.tensor_count() * PARTS.len()];
    for (tensor, part, element, elements, sum) in notes.into_iter().flat_map(|n| n.sums) {
        let place = (tensor as usize).checked_mul(PARTS.len()).and_then(|t| by_part.get_mut(t + usize::from(part).min(PARTS.len() - 1)));
        place.ok_or_else(|| format!("a rank wrote tensor number {tensor}, which there is not"))?.push((element, elements, sum));
    }
    let mut tensors = Vec::with_capacity(files.tensor_count());
    for tensor in 0..files.tensor_count() {
        let name = files.tensor_name(tensor);
        let mut sums = TensorChecksums { name: name.to_owned(), weight: Vec::new(), exp_avg: Vec::new(), exp_avg_sq: Vec::new() };
        for part in 0..PARTS.len() {
            let Some(dtype) = super::pieces::part_dtype(files.moments, part) else { continue };
            let pieces = &mut by_part[tensor * PARTS.len() + part];
            pieces.sort_unstable();
            let (out, mut at) = (sums.part_mut(part), 0);
            for &(element, elements, sum) in pieces.iter() {
                if element != at {
                    return Err(format!("element {} of tensor `{name}` was written by no rank, or by two", element.min(at)));
                }
                match out.last_mut().filter(|_| element % PIECE_ELEMENTS as u64 != 0) {
                    Some(last) => *last = crc32c::crc32c_combine(*last, sum, (elements * dtype.size()) as usize),
                    None => out.push(sum),
                }
                at += elements;
            }
            if at != files.tensor_elements(tensor) {
                return Err(format!("element {at} of tensor `{name}` was written by no rank"));
            }
        }
        tensors.push(sums);
    }
    Ok(tensors)
}
