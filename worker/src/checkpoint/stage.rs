//! Room in RAM where copies of pages wait for the disk.

use ramtorch_job::JobSpec;
use ramtorch_modelio::{CheckpointFiles, encode_pieces};
use ramtorch_modelio::{ModelError, Piece};
use ramtorch_store::{Layout, PageId, Snapshot};
use std::sync::{Mutex, PoisonError};

/// A page, as it goes into the files. Its room is free again when this is dropped.
pub(super) struct Staged<'s> {
    pub pieces: Vec<Piece>,
    pub checksums: Vec<u32>,
    pub bytes: Vec<u8>,
    stage: &'s Stage,
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        self.stage.give(std::mem::take(&mut self.bytes));
    }
}

/// Buffers of one rank, each for one page. They are allocated in the first steps, or when they are first needed, and kept.
pub(super) struct Stage {
    page_bytes: usize,
    buffers: Mutex<Buffers>,
}

struct Buffers {
    free: Vec<Vec<u8>>,
    /// May still be allocated.
    left: u64,
}

impl Stage {
    /// Room for as many pages as fit `bytes`; none is fine.
    pub fn new(bytes: u64, layout: &Layout) -> Stage {
        let page_bytes = CheckpointFiles::page_bytes(layout);
        Stage { page_bytes: page_bytes as usize, buffers: Mutex::new(Buffers { free: Vec::new(), left: bytes / page_bytes.max(1) }) }
    }

    /// Copies a page of a snapshot, on the caller's rayon pool. `None`: there is no room.
    pub fn copy(&self, snapshot: &Snapshot<'_>, pieces: &[Piece]) -> Result<Option<Staged<'_>>, ModelError> {
        let Some(bytes) = self.take() else { return Ok(None) };
        let mut staged = Staged { pieces: pieces.to_vec(), checksums: Vec::new(), bytes, stage: self };
        staged.checksums = encode_pieces(pieces, &mut staged.bytes, |start, part, out| snapshot.read(start, part, out))?;
        Ok(Some(staged))
    }

    fn take(&self) -> Option<Vec<u8>> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = buffers.free.pop() {
            return Some(buffer);
        }
        buffers.left = buffers.left.checked_sub(1)?;
        drop(buffers);
        Some(vec![0; self.page_bytes])
    }

    /// Allocates one more buffer and touches all of it, which takes longer than to copy a page into it later. `false`: all are
    /// there.
    pub fn warm_one(&self) -> bool {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(left) = buffers.left.checked_sub(1) else { return false };
        buffers.left = left;
        drop(buffers);
        let mut buffer = vec![0; self.page_bytes];
        buffer.iter_mut().step_by(4096).for_each(|byte| *byte = std::hint::black_box(1));
        self.give(buffer);
        true
    }

    fn give(&self, buffer: Vec<u8>) {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).free.push(buffer);
    }
}

/// Bytes of staging of one rank: what the job file says, or half of `available`, which is the RAM left beside the segment
/// and the workers of all ranks; never more than the rank's pages take, and nothing where no checkpoint can be written.
pub(crate) fn staging_bytes(spec: &JobSpec, layout: &Layout, available: u64) -> u64 {
    if spec.checkpoint.path.is_none() {
        return 0;
    }
    let world = u64::from(layout.spec().world_size);
    let page = CheckpointFiles::page_bytes(layout);
    let most = most_pages(layout).saturating_mul(page);
    let wanted = match spec.checkpoint.staging_gib {
        Some(gib) => (gib * (1u64 << 30) as f64) as u64 / world,
        None => available / 2 / world,
    };
    wanted.min(most) / page.max(1) * page
}

/// Pages of the rank that has most.
fn most_pages(layout: &Layout) -> u64 {
    let pages: PageId = layout.page_count();
    u64::from(pages.div_ceil(layout.spec().world_size))
}
