//! Where every number of a store's pages goes in the files of a checkpoint.
//!
//! ```text
//!   page of a rank ──► pieces: one tensor, one part, at most 262,144 elements under one checksum
//!                        │
//!                        ├──► file of the shard that holds the tensor, at a place that follows from the layout alone
//!                        └──► checksum of the piece; a piece that crosses into another page has two, which are joined
//! ```
//! All of it follows from the layout and the number of shards, so every rank works it out by itself and writes its own
//! pages, wherever they go, in any order.

use super::format::PART_SUFFIXES;
use super::partition;
use crate::dtype::Dtype;
use crate::error::ModelError;
use crate::stream::PIECE_ELEMENTS;
use crate::tensorfile::{PlannedTensor, head};
use ramtorch_store::{Layout, MomentFormat, PageId, Part, StoreError};
use rayon::prelude::*;
use std::ops::Range;

pub(super) const PARTS: [Part; 3] = [Part::Weight, Part::Moment1, Part::Moment2];

/// Type of a part of a tensor in the files; none for a part that is not kept.
pub(super) fn part_dtype(moments: MomentFormat, part: usize) -> Option<Dtype> {
    match (part, moments) {
        (0, _) | (_, MomentFormat::F32) => Some(Dtype::F32),
        (_, MomentFormat::Bf16) => Some(Dtype::BF16),
        (_, MomentFormat::None) => None,
    }
}

/// The files of a checkpoint of one step of a store, before anything is written.
#[derive(Debug)]
pub struct CheckpointFiles {
    pub(super) step: u64,
    pub(super) moments: MomentFormat,
    pub(super) shards: Vec<ShardFile>,
    tensors: Vec<Place>,
    /// Parameters of each page.
    pages: Vec<Range<u64>>,
}

/// A file.
#[derive(Debug)]
pub(super) struct ShardFile {
    pub(super) name: String,
    /// What stands before the tensors' bytes.
    pub(super) head: Vec<u8>,
    /// Size of the whole file.
    pub(super) bytes: u64,
    /// Its tensors, as indices into those of the layout.
    pub(super) tensors: Vec<usize>,
}

/// A tensor.
#[derive(Debug)]
struct Place {
    name: String,
    /// Parameters of the index space.
    parameters: Range<u64>,
    shard: usize,
    /// Where each part begins in the file.
    offsets: [u64; 3],
}

/// Consecutive elements of one part of a tensor, all in one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub(super) tensor: usize,
    pub(super) part: usize,
    /// First element, within the tensor.
    pub(super) element: u64,
    pub(super) elements: u64,
    /// The same as a parameter of the index space.
    pub(super) parameter: u64,
    pub(super) shard: usize,
    /// Place in the shard's file.
    pub(super) offset: u64,
    dtype: Dtype,
}

impl Piece {
    /// Bytes in the file.
    pub fn bytes(&self) -> usize {
        (self.elements * self.dtype.size()) as usize
    }
}

impl CheckpointFiles {
    /// Works out the files of a checkpoint of `step`: as many as there are ranks that write.
    ///
    /// # Errors
    /// `shards` is 0.
    pub fn new(layout: &Layout, shards: u32, step: u64) -> Result<CheckpointFiles, ModelError> {
        if shards == 0 {
            return Err(ModelError::Invalid("a checkpoint has at least one shard".into()));
        }
        let moments = layout.spec().moments;
        let sizes: Vec<u64> = layout.tensors().iter().map(|t| t.len.saturating_mul(4 + 2 * moments.bytes())).collect();
        let owners = partition(&sizes, shards);
        let mut places: Vec<Place> = layout
            .tensors()
            .iter()
            .zip(&owners)
            .map(|(t, shard)| Place { name: t.name.clone(), parameters: t.start..t.start + t.len, shard: *shard as usize, offsets: [0; 3] })
            .collect();
        let mut files = Vec::with_capacity(shards as usize);
        for shard in 0..shards {
            let tensors: Vec<usize> = (0..places.len()).filter(|t| owners[*t] == shard).collect();
            let mut planned = Vec::new();
            for &t in &tensors {
                for (part, suffix) in PART_SUFFIXES.iter().enumerate() {
                    let Some(dtype) = part_dtype(moments, part) else { continue };
                    let (name, shape) = (format!("{}{suffix}", places[t].name), layout.tensors()[t].shape.clone());
                    planned.push((t, part, PlannedTensor { name, dtype, shape }));
                }
            }
            planned.sort_by_key(|(_, _, t)| std::cmp::Reverse(t.dtype.size()));
            let plans: Vec<PlannedTensor> = planned.iter().map(|(_, _, t)| t.clone()).collect();
            let head = head(&plans, &[("format", "pt".to_owned()), ("step", step.to_string())]);
            let mut at = head.len() as u64;
            for (t, part, plan) in &planned {
                places[*t].offsets[*part] = at;
                at += plan.bytes();
            }
            files.push(ShardFile { name: format!("shard-{shard:05}-of-{shards:05}.safetensors"), head, bytes: at, tensors });
        }
        let pages = (0..layout.page_count()).map(|p| layout.page_range(p)).collect();
        Ok(CheckpointFiles { step, moments, shards: files, tensors: places, pages })
    }

    /// Its step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.bytes).sum()
    }

    /// The most bytes that a page of such a store has in the files.
    pub fn page_bytes(layout: &Layout) -> u64 {
        u64::from(layout.page_parameters()) * (4 + 2 * layout.spec().moments.bytes())
    }

    pub(super) fn tensor_name(&self, tensor: usize) -> &str {
        &self.tensors[tensor].name
    }

    pub(super) fn tensor_elements(&self, tensor: usize) -> u64 {
        self.tensors[tensor].parameters.end - self.tensors[tensor].parameters.start
    }

    pub(super) fn tensor_count(&self) -> usize {
        self.tensors.len()
    }

    /// Pages that rank `rank` of `ranks` writes, ascending.
    pub fn pages(&self, rank: u32, ranks: u32) -> impl Iterator<Item = PageId> + use<> {
        (rank..self.pages.len() as u32).step_by(ranks.max(1) as usize)
    }

    /// What of a page goes where, in the order of the index space. Padding goes nowhere.
    pub fn pieces(&self, page: PageId) -> Vec<Piece> {
        let Some(page) = self.pages.get(page as usize) else { return Vec::new() };
        let first = self.tensors.partition_point(|t| t.parameters.end <= page.start);
        let mut pieces = Vec::new();
        for (tensor, place) in self.tensors.iter().enumerate().skip(first).take_while(|(_, t)| t.parameters.start < page.end) {
            let (from, to) = (place.parameters.start.max(page.start), place.parameters.end.min(page.end));
            let (mut element, end) = (from - place.parameters.start, to - place.parameters.start);
            while element < end {
                let stop = ((element / PIECE_ELEMENTS as u64 + 1) * PIECE_ELEMENTS as u64).min(end);
                for part in 0..PARTS.len() {
                    let Some(dtype) = part_dtype(self.moments, part) else { continue };
                    pieces.push(Piece {
                        tensor,
                        part,
                        element,
                        elements: stop - element,
                        parameter: place.parameters.start + element,
                        shard: place.shard,
                        offset: place.offsets[part] + element * dtype.size(),
                        dtype,
                    });
                }
                element = stop;
            }
        }
        pieces
    }
}

/// Puts the bytes of `pieces` into `buffer`, one behind the other, on the caller's rayon pool; returns their checksums.
/// `read` gets a parameter of the index space, and may be called from several threads.
///
/// # Errors
/// That of `read`.
///
/// # Panics
/// When the buffer is too small.
pub fn encode(
    pieces: &[Piece],
    buffer: &mut [u8],
    read: impl Fn(u64, Part, &mut [f32]) -> Result<(), StoreError> + Sync,
) -> Result<Vec<u32>, ModelError> {
    let mut places = Vec::with_capacity(pieces.len());
    let mut rest = buffer;
    for piece in pieces {
        let (here, behind) = std::mem::take(&mut rest).split_at_mut(piece.bytes());
        places.push((piece, here));
        rest = behind;
    }
    let one = |values: &mut Vec<f32>, (piece, bytes): (&Piece, &mut [u8])| -> Result<u32, ModelError> {
        values.resize(piece.elements as usize, 0.0);
        read(piece.parameter, PARTS[piece.part], values)?;
        piece.dtype.encode(values, bytes);
        Ok(crc32c::crc32c(bytes))
    };
    places.into_par_iter().map_init(Vec::new, one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{store_spec, tiny_llama};

    /// Head and pieces of all pages fill every file exactly, without a gap and without an overlap.
    #[test]
    fn every_byte_of_every_file_is_written_once() {
        for (ranks, shards, moments) in [(1, 1, MomentFormat::F32), (3, 3, MomentFormat::Bf16), (2, 5, MomentFormat::None)] {
            let layout = Layout::new(&store_spec(&tiny_llama(), ranks, moments)).unwrap();
            let files = CheckpointFiles::new(&layout, shards, 7).unwrap();
            let mut written: Vec<Vec<Range<u64>>> = files.shards.iter().map(|s| vec![0..s.head.len() as u64]).collect();
            for rank in 0..ranks {
                for page in files.pages(rank, ranks) {
                    let pieces = files.pieces(page);
                    assert!(pieces.iter().map(|p| p.bytes() as u64).sum::<u64>() <= CheckpointFiles::page_bytes(&layout));
                    pieces.iter().for_each(|p| written[p.shard].push(p.offset..p.offset + p.bytes() as u64));
                }
            }
            for (file, mut ranges) in files.shards.iter().zip(written) {
                ranges.sort_by_key(|r| r.start);
                assert!(ranges.windows(2).all(|w| w[0].end == w[1].start), "{}", file.name);
                assert_eq!((ranges[0].start, ranges.last().unwrap().end), (0, file.bytes));
            }
        }
    }
}
