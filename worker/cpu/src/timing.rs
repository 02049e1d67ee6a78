//! How long stretches of the CPU device's streams take: the stream's thread looks at the clock where they begin and end.

use crate::stream::Queue;
use ramtorch_device::trace::{Kind, Label, Recorder, Row, SpanId, Wait, Waits, now_ns};
use ramtorch_device::{EngineError, Stretch};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A stretch that was begun.
struct Open {
    id: u64,
    span: Option<SpanId>,
    wait: Option<Wait>,
    /// Written and read by the stream's thread.
    began: Arc<AtomicU64>,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Timing {
    recorder: Option<Arc<Recorder>>,
    open: RefCell<(u64, Vec<Open>)>,
    /// Nanoseconds of each kind of wait.
    waited: Arc<[AtomicU64; Wait::ALL.len()]>,
}

impl Timing {
    pub(crate) fn observe(&mut self, recorder: &Arc<Recorder>) {
        self.recorder = Some(recorder.clone());
    }

    /// That of [`Timing::observe`], or one that is always off.
    pub(crate) fn recorder(&self) -> Arc<Recorder> {
        self.recorder.clone().unwrap_or_default()
    }

    pub(crate) fn begin(&self, queue: &Queue, row: Row, label: &Label) -> Result<Stretch, EngineError> {
        let Some(recorder) = &self.recorder else { return Ok(Stretch(None)) };
        let wait = match label.kind {
            Kind::Wait(w) => Some(w),
            _ => None,
        };
        let span = recorder.begin(row, label);
        if span.is_none() && wait.is_none() {
            return Ok(Stretch(None));
        }
        let began = Arc::new(AtomicU64::new(0));
        let (cell, on) = (began.clone(), span.map(|s| (recorder.clone(), s)));
        queue.run(move || {
            let now = now_ns();
            cell.store(now, Ordering::Relaxed);
            if let Some((recorder, span)) = on {
                recorder.stamp_begin(span, now);
            }
        })?;
        let (next, open) = &mut *self.open.borrow_mut();
        *next += 1;
        open.push(Open { id: *next, span, wait, began });
        Ok(Stretch(Some(*next)))
    }

    pub(crate) fn end(&self, queue: &Queue, stretch: Stretch) -> Result<(), EngineError> {
        let Some(id) = stretch.0 else { return Ok(()) };
        let Some(Open { span, wait, began, .. }) = self.close(id) else {
            return Err(EngineError::internal("a stretch of another device ends"));
        };
        let on = span.and_then(|s| self.recorder.clone().map(|r| (r, s)));
        let waited = self.waited.clone();
        queue.run(move || {
            let now = now_ns();
            if let Some(w) = wait {
                waited[w as usize].fetch_add(now.saturating_sub(began.load(Ordering::Relaxed)), Ordering::Relaxed);
            }
            if let Some((recorder, span)) = on {
                recorder.stamp_end(span, now);
            }
        })
    }

    fn close(&self, id: u64) -> Option<Open> {
        let (_, open) = &mut *self.open.borrow_mut();
        let at = open.iter().rposition(|o| o.id == id)?;
        Some(open.swap_remove(at))
    }

    pub(crate) fn take_waits(&self) -> Waits {
        let mut sum = Waits::default();
        for w in Wait::ALL {
            sum.add(w, self.waited[w as usize].swap(0, Ordering::Relaxed) as f64 / 1e9);
        }
        sum
    }
}
