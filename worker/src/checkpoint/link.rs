//! Between the two threads of a checkpoint.

use ramtorch_modelio::PartWriter;
use std::sync::atomic::AtomicUsize;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::Instant;

/// Between the thread that copies and the one that writes.
#[derive(Default)]
pub(super) struct Link {
    /// The files, once they are open.
    pub part: OnceLock<PartWriter>,
    closed: Mutex<bool>,
    changed: Condvar,
    /// Pages, and how many are in their files.
    pub pages: usize,
    pub done: AtomicUsize,
    /// When the last page was let go.
    pub copied: OnceLock<Instant>,
}

impl Link {
    pub fn new(pages: usize) -> Link {
        Link { pages, ..Link::default() }
    }

    pub fn open(&self, part: PartWriter) {
        let _ = self.part.set(part);
        let _lock = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }

    /// There will be no files, or no more is to be written.
    pub fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// The files, as soon as they are open; `None` once it is closed.
    pub fn part(&self) -> Option<&PartWriter> {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        while !*closed {
            if let Some(part) = self.part.get() {
                return Some(part);
            }
            closed = self.changed.wait(closed).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }
}

/// Closes it, whichever way its holder ends.
pub(super) struct CloseOnDrop<'a>(pub &'a Link);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}
