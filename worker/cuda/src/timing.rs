//! How long stretches of streams take, by pairs of events that are read when they are over.
//!
//! ```text
//!   begin ─► event ─► … work of the stream … ─► event ◄─ end        resolve: elapsed(begin, end), and for a trace
//!                                                                            anchor + elapsed(anchor, begin)
//! ```
//! An anchor is an event whose time on the host's clock is known. A stretch belongs to the anchor that was newest when it
//! began, so that it is never long ago: the driver tells distances in single precision. Events are used again and again;
//! nothing here waits for the device, but for [`Timing::anchor`].

use crate::driver::{RawEvent, RawStream, elapsed_ms};
use ramtorch_device::trace::{Kind, Label, Recorder, Row, SpanId, Wait, Waits, now_ns};
use ramtorch_device::{EngineError, Stretch};
use std::sync::Arc;

/// Stretches in hand, at most; others are not measured.
const OPEN_MAX: usize = 1 << 15;
/// Events that are made when a trace begins.
const PREPARED: usize = 512;

/// A moment on both clocks.
struct Anchor {
    event: RawEvent,
    ns: u64,
}

struct Open {
    id: u64,
    span: Option<(SpanId, Arc<Anchor>)>,
    wait: Option<Wait>,
    begin: RawEvent,
    end: Option<RawEvent>,
}

/// See the module. Used from one thread at a time, with the context current.
pub(crate) struct Timing {
    recorder: Option<Arc<Recorder>>,
    anchor: Option<Arc<Anchor>>,
    /// In the order in which they began.
    open: Vec<Open>,
    next: u64,
    free: Vec<RawEvent>,
}

impl Timing {
    pub(crate) fn new(recorder: Option<Arc<Recorder>>) -> Timing {
        Timing { recorder, anchor: None, open: Vec::new(), next: 0, free: Vec::new() }
    }

    pub(crate) fn observe(&mut self, recorder: &Arc<Recorder>) {
        self.recorder = Some(recorder.clone());
    }

    pub(crate) fn recorder(&self) -> Option<Arc<Recorder>> {
        self.recorder.clone()
    }

    /// Whether spans can be recorded.
    pub(crate) fn is_tracing(&self) -> bool {
        self.recorder.as_ref().is_some_and(|r| r.is_on())
    }

    /// Ties the clocks together, where a trace is on; blocks until `stream` is empty.
    pub(crate) fn anchor(&mut self, stream: &RawStream) -> Result<(), EngineError> {
        if !self.is_tracing() {
            self.anchor = None;
            return Ok(());
        }
        while self.free.len() < PREPARED {
            self.free.push(RawEvent::timed()?);
        }
        let event = RawEvent::timed()?;
        // With nothing before it on the stream, the event happens between these two readings.
        stream.synchronize("anchor")?;
        let before = now_ns();
        event.record(stream)?;
        event.synchronize()?;
        let after = now_ns();
        self.anchor = Some(Arc::new(Anchor { event, ns: before + (after - before) / 2 }));
        Ok(())
    }

    pub(crate) fn begin(&mut self, stream: &RawStream, row: Row, label: &Label) -> Result<Stretch, EngineError> {
        let Some(recorder) = &self.recorder else { return Ok(Stretch(None)) };
        let wait = match label.kind {
            Kind::Wait(w) => Some(w),
            _ => None,
        };
        let span = match &self.anchor {
            Some(anchor) => recorder.begin(row, label).map(|s| (s, anchor.clone())),
            None => None,
        };
        if (span.is_none() && wait.is_none()) || self.open.len() >= OPEN_MAX {
            return Ok(Stretch(None));
        }
        let begin = self.event()?;
        begin.record(stream)?;
        self.next += 1;
        self.open.push(Open { id: self.next, span, wait, begin, end: None });
        Ok(Stretch(Some(self.next)))
    }

    pub(crate) fn end(&mut self, stream: &RawStream, stretch: Stretch) -> Result<(), EngineError> {
        let Some(id) = stretch.0 else { return Ok(()) };
        let end = self.event()?;
        end.record(stream)?;
        // Those that are not over yet are among the last.
        match self.open.iter_mut().rev().find(|o| o.id == id) {
            Some(o) => o.end = Some(end),
            None => return Err(EngineError::internal("a stretch of another device ends")),
        }
        Ok(())
    }

    fn event(&mut self) -> Result<RawEvent, EngineError> {
        self.free.pop().map_or_else(RawEvent::timed, Ok)
    }

    /// Reads what is over.
    pub(crate) fn resolve(&mut self) -> Result<Waits, EngineError> {
        let mut waits = Waits::default();
        let (over, open): (Vec<Open>, Vec<Open>) =
            std::mem::take(&mut self.open).into_iter().partition(|o| o.end.as_ref().is_some_and(RawEvent::done));
        self.open = open;
        for o in over {
            let Some(end) = o.end else { continue };
            if let Some(wait) = o.wait {
                waits.add(wait, f64::from(elapsed_ms(&o.begin, &end)?) / 1e3);
            }
            if let (Some((span, anchor)), Some(recorder)) = (&o.span, &self.recorder) {
                let at = |e: &RawEvent| -> Result<u64, EngineError> {
                    Ok(anchor.ns + (f64::from(elapsed_ms(&anchor.event, e)?).max(0.0) * 1e6) as u64)
                };
                recorder.stamp_begin(*span, at(&o.begin)?);
                recorder.stamp_end(*span, at(&end)?);
            }
            self.free.extend([o.begin, end]);
        }
        Ok(waits)
    }
}
