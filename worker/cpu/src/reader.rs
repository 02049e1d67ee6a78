//! The CPU device's reader of gradients: a thread that copies, as a GPU's copy engine does, so that a page that is used before it
//! has come is a wrong result on any machine.

use crate::memory::view;
use ramtorch_device::trace::{Label, Recorder, Row};
use ramtorch_device::{EngineError, GRADIENTS_AHEAD, GradientPiece, GradientReader};
use ramtorch_store::{GradientFormat, Gradients, PageId};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

/// Gradients of one page on the host.
enum Buffer {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

impl Buffer {
    fn new(format: GradientFormat, parameters: usize) -> Option<Buffer> {
        match format {
            GradientFormat::None => None,
            GradientFormat::F32 => Some(Buffer::F32(Vec::with_capacity(parameters))),
            GradientFormat::Bf16 => Some(Buffer::Bf16(Vec::with_capacity(parameters))),
        }
    }

    fn fill(&mut self, pieces: &[GradientPiece]) {
        match self {
            Buffer::F32(x) => x.clear(),
            Buffer::Bf16(x) => x.clear(),
        }
        for p in pieces {
            let n = (p.end - p.first) as usize;
            // SAFETY: the gradients are whole and do not change until they are here (contract of `GradientReader::submit`).
            match self {
                // SAFETY: gradients that are whole and do not change until they are there (contract of `GradientReader::submit`).
                Buffer::F32(x) => x.extend_from_slice(unsafe { view::<f32>(p.buf, n) }),
                // SAFETY: as above.
                Buffer::Bf16(x) => x.extend_from_slice(unsafe { view::<u16>(p.buf, n) }),
            }
        }
    }
}

struct Work {
    page: PageId,
    pieces: Vec<GradientPiece>,
    buffer: Buffer,
}

/// See the module.
pub(crate) struct Reader {
    jobs: Option<mpsc::Sender<Work>>,
    done: mpsc::Receiver<Buffer>,
    free: Vec<Buffer>,
    /// The one that was finished last.
    current: Option<Buffer>,
    on_their_way: usize,
    page_parameters: u64,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    pub(crate) fn new(index: u32, format: GradientFormat, page_parameters: u64, recorder: Arc<Recorder>) -> Result<Reader, EngineError> {
        let free: Option<Vec<Buffer>> = (0..GRADIENTS_AHEAD).map(|_| Buffer::new(format, page_parameters as usize)).collect();
        let free = free.ok_or_else(|| EngineError::internal("a reader of gradients without a format"))?;
        let (jobs, inbox) = mpsc::channel::<Work>();
        let (report, done) = mpsc::channel();
        let run = move || {
            for mut work in inbox {
                let bytes = work.pieces.iter().map(|p| p.buf.bytes).sum();
                let span = recorder.scope(Row::CopyOut, Label::copy("fetch gradients", bytes).page(work.page));
                work.buffer.fill(&work.pieces);
                drop(span);
                if report.send(work.buffer).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name(format!("cpu{index}-gradients"))
            .spawn(run)
            .map_err(|e| EngineError::internal(format!("cpu:{index}: cannot start the reader of gradients: {e}")))?;
        Ok(Reader { jobs: Some(jobs), done, free, current: None, on_their_way: 0, page_parameters, thread: Some(thread) })
    }
}

impl GradientReader for Reader {
    fn submit(&mut self, page: PageId, pieces: &[GradientPiece]) -> Result<(), EngineError> {
        self.free.extend(self.current.take());
        if pieces.iter().map(|p| p.end - p.first).sum::<u64>() > self.page_parameters {
            return Err(EngineError::internal("gradients of more than a page"));
        }
        let buffer = self.free.pop().ok_or_else(|| EngineError::internal("gradients of too many pages are on their way"))?;
        let work = Work { page, pieces: pieces.to_vec(), buffer };
        if self.jobs.as_ref().is_none_or(|jobs| jobs.send(work).is_err()) {
            return Err(EngineError::internal("the thread that reads gradients has ended"));
        }
        self.on_their_way += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<Gradients<'_>, EngineError> {
        self.free.extend(self.current.take());
        self.on_their_way = self.on_their_way.checked_sub(1).ok_or_else(|| EngineError::internal("no gradients are on their way"))?;
        let buffer = self.done.recv().map_err(|_| EngineError::internal("the thread that reads gradients has ended"))?;
        Ok(match self.current.insert(buffer) {
            Buffer::F32(x) => Gradients::F32(x),
            Buffer::Bf16(x) => Gradients::Bf16(x),
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.jobs = None; // ends the loop once the queue is empty
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
