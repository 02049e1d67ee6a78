//! Page-locked memory between the caller's data and asynchronous copies.
//!
//! ```text
//!   ring:   … free … │ entry (event not done) │ entry │ entry │ … free …
//!                    ▲ oldest                                 ▲ next
//! ```
//! An upload takes room at `next`, copies the caller's bytes there, enqueues the copy and an event, and returns. Room is
//! taken back from the oldest entry on, once its event is done. Only when the ring is full does the caller wait.
//!
//! Small pieces are copied by a kernel, and not by the engine that copies to the device: while one stream keeps that engine
//! busy, another's copies wait for as long as it does, and with them all that comes after them in their stream.

use crate::driver::{Function, Pinned, RawEvent, RawStream, cu};
use crate::kernels::{Launch, launch};
use ramtorch_device::EngineError;
use std::collections::VecDeque;

struct Entry {
    start: usize,
    end: usize,
    done: RawEvent,
}

/// See the module.
pub(crate) struct Ring {
    memory: Pinned,
    entries: VecDeque<Entry>,
    spare: Vec<RawEvent>,
    next: usize,
}

/// Alignment of entries.
const STEP: usize = 256;
/// Pieces up to here go by kernel.
const BY_KERNEL: usize = 1 << 20;

impl Ring {
    pub(crate) fn new(bytes: usize) -> Result<Ring, EngineError> {
        Ok(Ring { memory: Pinned::new(bytes / STEP * STEP, "upload ring")?, entries: VecDeque::new(), spare: Vec::new(), next: 0 })
    }

    /// Enqueues copies of `data` to device address `target` on `stream`; `data` is free for reuse when this returns.
    /// `kernel` is `upload` of `store.cu`.
    pub(crate) fn upload(&mut self, kernel: Function, stream: &RawStream, target: u64, data: &[u8]) -> Result<(), EngineError> {
        // A quarter of the ring at a time, so that large uploads overlap with their own copies.
        let mut target = target;
        for piece in data.chunks(self.memory.bytes / 4) {
            let at = self.room(piece.len().next_multiple_of(STEP))?;
            // SAFETY: at + len lies inside the ring, and no copy in flight reads that range (room).
            let source = unsafe {
                let p = self.memory.ptr.add(at);
                std::ptr::copy_nonoverlapping(piece.as_ptr(), p, piece.len());
                p
            };
            if piece.len() <= BY_KERNEL {
                let (bytes, grid) = (piece.len() as u64, Launch::new((piece.len().div_ceil(256 * 16).clamp(1, 32) as u32, 1, 1), (256, 1)));
                // Page-locked memory has one address for the host and the device.
                launch!(kernel, grid, stream, "upload"; target, source, bytes)?;
            } else {
                cu!("upload", cuMemcpyHtoDAsync_v2(target, source.cast(), piece.len(), stream.0))?;
            }
            let done = match self.spare.pop() {
                Some(e) => e,
                None => RawEvent::new()?,
            };
            done.record(stream)?;
            self.entries.push_back(Entry { start: at, end: at + piece.len().next_multiple_of(STEP), done });
            target += piece.len() as u64;
        }
        Ok(())
    }

    /// A free range of `len` bytes; waits for the oldest copies where there is none.
    fn room(&mut self, len: usize) -> Result<usize, EngineError> {
        while self.entries.front().is_some_and(|e| e.done.done()) {
            self.drop_oldest();
        }
        loop {
            if let Some(at) = free_range(self.memory.bytes, self.next, self.entries.front().map(|e| e.start), len) {
                self.next = at + len;
                return Ok(at);
            }
            match self.entries.front() {
                Some(e) => e.done.synchronize()?,
                None => return Err(EngineError::internal("an upload larger than the ring")),
            }
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        if let Some(e) = self.entries.pop_front() {
            debug_assert!(e.start < e.end);
            self.spare.push(e.done);
        }
    }
}

/// Where `len` bytes fit in a ring of `size`, when entries occupy `oldest .. next` (around the end, if oldest ≥ next) or
/// nothing. Entries never wrap: what is left at the end is skipped.
fn free_range(size: usize, next: usize, oldest: Option<usize>, len: usize) -> Option<usize> {
    match oldest {
        None => (len <= size).then_some(0),
        Some(o) if o < next => {
            if len <= size - next {
                Some(next)
            } else {
                (len <= o).then_some(0)
            }
        }
        Some(o) => (len <= o - next).then_some(next),
    }
}

#[cfg(test)]
mod tests {
    use super::free_range;
    use std::collections::VecDeque;

    #[test]
    fn ranges_in_flight_never_overlap() {
        let (size, mut next) = (1024usize, 0usize);
        let mut live: VecDeque<(usize, usize)> = VecDeque::new();
        let mut seed = 7u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let len = ((seed >> 33) % 8 + 1) as usize * 32;
            loop {
                if let Some(at) = free_range(size, next, live.front().map(|e| e.0), len) {
                    assert!(at + len <= size);
                    assert!(live.iter().all(|(s, e)| at + len <= *s || at >= *e), "{at}+{len} in {live:?}");
                    live.push_back((at, at + len));
                    next = at + len;
                    break;
                }
                live.pop_front().expect("a ring with nothing in flight has room");
            }
        }
    }
}
