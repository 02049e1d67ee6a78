//! Gradients that stay on the device, on their way to the processor that updates pages with them.
//!
//! ```text
//!   submit:  buffer ◄── pieces of a page, on a stream of its own ── done        (up to GRADIENTS_AHEAD pages)
//!   finish:  waits for done of the oldest ──► its gradients, until the next call
//! ```
//! The engine that copies from the device changes to another stream only when the one it serves has nothing to do, and the
//! updater's new state can keep it busy for the whole of the optimizer phase. So the updater waits for `fetched` before each of
//! its parts (see there); this stream has a few pages' copies enqueued at most, and waits for nobody.

use crate::device::CudaDevice;
use crate::driver::{Context, Pinned, RawEvent, RawStream, cu};
use crate::timing::Timing;
use ramtorch_device::trace::{Label, Recorder, Row};
use ramtorch_device::{EngineError, GRADIENTS_AHEAD, GradientPiece, GradientReader};
use ramtorch_store::{GradientFormat, Gradients, PageId};
use std::ffi::c_void;
use std::sync::Arc;

struct Buffer {
    memory: Pinned,
    /// The last copy into it is done.
    done: RawEvent,
    /// Gradients in it.
    count: usize,
}

/// See the module. Field order matters: whatever uses the context goes before it.
pub(crate) struct Reader {
    name: String,
    format: GradientFormat,
    /// A ring: `on_their_way` of them from `oldest` on.
    buffers: Vec<Buffer>,
    oldest: usize,
    on_their_way: usize,
    timing: Timing,
    /// The clocks are tied together: a trace is on.
    anchored: bool,
    fetched: Arc<RawEvent>,
    stream: RawStream,
    context: Context,
}

impl Reader {
    fn new(
        ordinal: u32,
        format: GradientFormat,
        page_parameters: u64,
        fetched: Arc<RawEvent>,
        recorder: Option<Arc<Recorder>>,
    ) -> Result<Reader, EngineError> {
        if format == GradientFormat::None {
            return Err(EngineError::internal("a reader of gradients without a format"));
        }
        let context = Context::open(ordinal)?;
        let bytes = (page_parameters * format.bytes()) as usize;
        let buffer = || Ok(Buffer { memory: Pinned::new(bytes, "gradients for the processor")?, done: RawEvent::blocking()?, count: 0 });
        Ok(Reader {
            name: format!("cuda:{ordinal}: gradients to the host"),
            format,
            buffers: (0..GRADIENTS_AHEAD).map(|_| buffer()).collect::<Result<_, EngineError>>()?,
            oldest: 0,
            on_their_way: 0,
            timing: Timing::new(recorder),
            anchored: false,
            fetched,
            stream: RawStream::new(false)?,
            context,
        })
    }
}

impl GradientReader for Reader {
    fn submit(&mut self, page: PageId, pieces: &[GradientPiece]) -> Result<(), EngineError> {
        self.context.enter()?;
        let size = self.format.bytes();
        let count: u64 = pieces.iter().map(|p| p.end - p.first).sum();
        if self.on_their_way == self.buffers.len() {
            return Err(EngineError::internal("gradients of too many pages are on their way"));
        }
        let tracing = self.timing.is_tracing();
        if tracing != self.anchored {
            // When a trace begins, this waits for what is on its way.
            self.timing.anchor(&self.stream)?;
            self.anchored = tracing;
        }
        let i = (self.oldest + self.on_their_way) % self.buffers.len();
        let buffer = &mut self.buffers[i];
        if (count * size) as usize > buffer.memory.bytes || pieces.iter().any(|p| p.buf.bytes < (p.end - p.first) * size) {
            return Err(EngineError::internal("gradients of more than a page, or of less than they are said to be"));
        }
        let what = &self.name;
        let label = Label::copy("fetch gradients", count * size).page(page);
        let span = if tracing { Some(self.timing.begin(&self.stream, Row::CopyOut, &label)?) } else { None };
        let mut at = 0usize;
        for p in pieces.iter().filter(|p| p.end > p.first) {
            let bytes = ((p.end - p.first) * size) as usize;
            // SAFETY: `at + bytes` is at most `count * size`, which the buffer holds (checked above).
            let to = unsafe { buffer.memory.ptr.add(at) };
            cu!(what, cuMemcpyDtoHAsync_v2(to.cast::<c_void>(), p.buf.ptr, bytes, self.stream.0))?;
            at += bytes;
        }
        if let Some(span) = span {
            self.timing.end(&self.stream, span)?;
        }
        buffer.count = count as usize;
        buffer.done.record(&self.stream)?;
        self.fetched.record(&self.stream)?;
        self.on_their_way += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<Gradients<'_>, EngineError> {
        self.context.enter()?;
        if self.on_their_way == 0 {
            return Err(EngineError::internal("no gradients are on their way"));
        }
        let i = self.oldest;
        self.buffers[i].done.synchronize()?;
        self.timing.resolve()?;
        self.oldest = (i + 1) % self.buffers.len();
        self.on_their_way -= 1;
        let (at, count) = (self.buffers[i].memory.ptr, self.buffers[i].count);
        // SAFETY: page-locked memory begins at a page; `count` gradients of the format were copied into it (`submit`) and are
        // there; nothing is copied into it again before `self` is borrowed anew, which ends this borrow.
        Ok(unsafe {
            match self.format {
                GradientFormat::None => Gradients::None,
                GradientFormat::F32 => Gradients::F32(std::slice::from_raw_parts(at.cast(), count)),
                GradientFormat::Bf16 => Gradients::Bf16(std::slice::from_raw_parts(at.cast(), count)),
            }
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Nothing may still write a buffer.
        if self.context.enter().is_ok() {
            let _ = self.stream.synchronize("close");
        }
    }
}

/// What [`ramtorch_device::Device::gradient_reader`] is for a CUDA device.
pub(crate) fn open(d: &mut CudaDevice, format: GradientFormat, page_parameters: u64) -> Result<Box<dyn GradientReader>, EngineError> {
    let fetched = d.fetched()?;
    Ok(Box::new(Reader::new(d.info.ordinal, format, page_parameters, fetched, d.timing.get_mut().recorder())?))
}
