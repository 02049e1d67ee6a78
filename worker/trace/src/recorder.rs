//! Recording: spans of one trace, from many threads.
//!
//! ```text
//!            start(steps)                     finish
//!   off ──────────────────► on (an epoch) ──────────► off
//!                            begin: room is taken, under the epoch's number
//!                            stamp: times are put in, whenever they are known
//! ```
//! While it is off, `begin` is one relaxed load. A stamp that comes after its trace was finished is left out, and so is
//! a span that never got both of its times.

use crate::{Kind, Label, RankTrace, Row, SPANS_MAX, Span};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Nanoseconds of CLOCK_MONOTONIC.
pub fn now_ns() -> u64 {
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC) {
        Ok(t) => t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64,
        Err(_) => 0, // the kernel always has this clock
    }
}

/// A span that was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanId {
    epoch: u64,
    index: u32,
}

struct Entry {
    row: Row,
    label: Label,
    step: u64,
    begin: u64,
    end: u64,
}

#[derive(Default)]
struct Inner {
    epoch: u64,
    first: u64,
    last: u64,
    limit: usize,
    dropped: u64,
    entries: Vec<Entry>,
}

/// See the module.
#[derive(Default)]
pub struct Recorder {
    on: AtomicBool,
    /// Step of the sweep under way.
    step: AtomicU64,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("on", &self.is_on()).finish_non_exhaustive()
    }
}

impl Recorder {
    /// Whether a trace is being recorded.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a trace of the steps `first..=last`; what was recorded before is gone. Of the optimizer, which works beside
    /// the next step, step `first - 1` is recorded too.
    pub fn start(&self, first: u64, last: u64) {
        self.start_with_room(first, last, SPANS_MAX);
    }

    fn start_with_room(&self, first: u64, last: u64, limit: usize) {
        let mut inner = self.lock();
        *inner = Inner { epoch: inner.epoch + 1, first, last, limit, dropped: 0, entries: Vec::with_capacity(limit.min(4096)) };
        self.on.store(true, Ordering::Relaxed);
    }

    /// Ends the trace: what was recorded, without the rank's name and device.
    pub fn finish(&self) -> RankTrace {
        let inner = {
            let mut inner = self.lock();
            self.on.store(false, Ordering::Relaxed);
            let epoch = inner.epoch;
            std::mem::replace(&mut *inner, Inner { epoch: epoch + 1, ..Inner::default() })
        };
        let mut spans: Vec<Span> = inner.entries.iter().filter(|e| e.is_told()).map(Entry::span).collect();
        tidy(&mut spans);
        let steps = spans.iter().filter(|s| s.kind == Kind::Step).count() as u64;
        RankTrace { first_step: inner.first, steps, dropped: inner.dropped, spans, ..RankTrace::default() }
    }

    /// The sweep of step `step` begins.
    pub fn set_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Takes room for a span. `None`: no trace is on, the step is not one of it, or there is no room left.
    pub fn begin(&self, row: Row, label: &Label) -> Option<SpanId> {
        if !self.is_on() {
            return None;
        }
        let step = label.step.unwrap_or_else(|| self.step.load(Ordering::Relaxed));
        let mut inner = self.lock();
        let first = match row {
            Row::Optimizer | Row::OptimizerCpu | Row::OptimizerIn | Row::OptimizerKernel | Row::OptimizerOut => {
                inner.first.saturating_sub(1)
            }
            Row::Loop | Row::Compute | Row::CopyIn | Row::CopyOut | Row::Peers => inner.first,
        };
        if !(first..=inner.last).contains(&step) {
            return None;
        }
        // A span that is left out must not be a whole step: those say what the trace covers.
        if inner.entries.len() >= inner.limit && label.kind != Kind::Step {
            inner.dropped += 1;
            return None;
        }
        let index = u32::try_from(inner.entries.len()).ok()?;
        inner.entries.push(Entry { row, label: *label, step, begin: 0, end: 0 });
        Some(SpanId { epoch: inner.epoch, index })
    }

    fn entry(&self, span: SpanId, f: impl FnOnce(&mut Entry)) {
        let mut inner = self.lock();
        if inner.epoch == span.epoch {
            if let Some(e) = inner.entries.get_mut(span.index as usize) {
                f(e);
            }
        }
    }

    /// When a span began.
    pub fn stamp_begin(&self, span: SpanId, ns: u64) {
        self.entry(span, |e| e.begin = ns);
    }

    /// When it ended.
    pub fn stamp_end(&self, span: SpanId, ns: u64) {
        self.entry(span, |e| e.end = ns);
    }

    /// A span of the calling thread, from now until the value is dropped.
    pub fn scope(&self, row: Row, label: Label) -> Scope<'_> {
        let span = self.begin(row, &label);
        if let Some(s) = span {
            self.stamp_begin(s, now_ns());
        }
        Scope { recorder: self, span }
    }
}

/// See [`Recorder::scope`].
#[must_use = "a span ends when this is dropped"]
#[derive(Debug)]
pub struct Scope<'a> {
    recorder: &'a Recorder,
    span: Option<SpanId>,
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        if let Some(s) = self.span {
            self.recorder.stamp_end(s, now_ns());
        }
    }
}

/// Waits shorter than this are those of the clock, nanoseconds.
const NOTICEABLE: u64 = 2000;

impl Entry {
    /// Whether it has both of its times, and they say something.
    fn is_told(&self) -> bool {
        let known = self.begin > 0 && self.end > 0;
        known && !(matches!(self.label.kind, Kind::Wait(_)) && self.end < self.begin.saturating_add(NOTICEABLE))
    }

    fn span(&self) -> Span {
        let l = &self.label;
        Span {
            row: self.row,
            name: l.name.into(),
            kind: l.kind,
            step: self.step,
            block: l.block,
            micro_batch: l.micro_batch,
            page: l.page,
            bytes: l.bytes,
            begin_ns: self.begin,
            end_ns: self.end.max(self.begin),
        }
    }
}

/// Sorts spans, and makes those of a row lie beside or within one another: clocks of devices are read to half a
/// microsecond, so that neighbours may seem to overlap by that much.
pub(crate) fn tidy(spans: &mut [Span]) {
    // Moving a begin may change the order, so that another span has to be looked at again.
    loop {
        spans.sort_by_key(|s| (s.row.number(), s.begin_ns, std::cmp::Reverse(s.end_ns)));
        let mut open: Vec<u64> = Vec::new();
        let (mut row, mut moved) = (None, false);
        for s in spans.iter_mut() {
            if row != Some(s.row) {
                row = Some(s.row);
                open.clear();
            }
            while open.last().is_some_and(|end| *end <= s.begin_ns) {
                open.pop();
            }
            match open.last() {
                // What began within another and ends after it begins where that ends.
                Some(end) if s.end_ns > *end => {
                    s.begin_ns = *end;
                    moved = true;
                }
                _ => open.push(s.end_ns),
            }
        }
        if !moved {
            return;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // tests
mod tests {
    use super::*;
    use crate::Wait;
    use proptest::prelude::*;

    #[test]
    fn only_steps_of_the_trace_are_recorded() {
        let r = Recorder::default();
        let work = Label::work("w");
        assert!(r.begin(Row::Compute, &work).is_none(), "off");
        r.start(3, 4);
        for (step, row, kept) in [
            (2, Row::Compute, false),
            (3, Row::Compute, true),
            (4, Row::CopyIn, true),
            (5, Row::Loop, false),
            (1, Row::OptimizerCpu, false),
            (2, Row::OptimizerCpu, true),
            (4, Row::OptimizerIn, true),
            (5, Row::Optimizer, false),
        ] {
            assert_eq!(r.begin(row, &work.step(step)).is_some(), kept, "{step} {row:?}");
            r.set_step(step);
            assert_eq!(r.begin(row, &work).is_some(), kept, "{step} {row:?}, of the sweep");
        }
        r.finish();
        assert!(r.begin(Row::Compute, &work.step(3)).is_none());
    }

    #[test]
    fn spans_without_both_times_or_of_an_old_trace_are_left_out() {
        let r = Recorder::default();
        r.start(1, 1);
        let label = Label::wait(Wait::Pages).step(1).block(7).bytes(5);
        let (whole, half, late) =
            (r.begin(Row::Compute, &label).unwrap(), r.begin(Row::Compute, &label).unwrap(), r.begin(Row::Compute, &label).unwrap());
        r.stamp_begin(whole, 10);
        r.stamp_end(whole, 20_010);
        r.stamp_begin(half, 30);
        let t = r.finish();
        assert_eq!(t.spans.len(), 1);
        assert_eq!((t.spans[0].begin_ns, t.spans[0].end_ns, t.spans[0].block, t.spans[0].bytes), (10, 20_010, Some(7), 5));
        r.start(1, 1);
        let new = r.begin(Row::Compute, &label).unwrap();
        r.stamp_begin(late, 1);
        r.stamp_end(late, 2);
        r.stamp_begin(new, 3);
        r.stamp_end(new, 4000);
        assert_eq!(r.finish().spans.iter().map(|s| s.begin_ns).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_full_trace_counts_what_it_leaves_out_but_keeps_steps() {
        let r = Recorder::default();
        r.start_with_room(1, 1, 3);
        for _ in 0..10 {
            drop(r.scope(Row::Loop, Label::work("w").step(1)));
        }
        drop(r.scope(Row::Loop, Label::new("step", Kind::Step).step(1)));
        let t = r.finish();
        assert_eq!((t.spans.len(), t.dropped, t.steps), (4, 7, 1));
    }

    proptest! {
        #[test]
        fn tidy_spans_nest(raw in proptest::collection::vec((0u32..3, 1u64..1000, 0u64..200), 0..60)) {
            let mut spans: Vec<Span> = raw.iter().map(|(row, begin, len)| Span {
                row: Row::from_number(*row).unwrap(), name: "x".into(), kind: Kind::Work, step: 1, block: None, micro_batch: None,
                page: None, bytes: 0, begin_ns: *begin, end_ns: begin + len,
            }).collect();
            let n = spans.len();
            tidy(&mut spans);
            prop_assert_eq!(spans.len(), n);
            for (i, a) in spans.iter().enumerate() {
                prop_assert!(a.begin_ns <= a.end_ns);
                for b in &spans[i + 1..] {
                    let beside = a.row != b.row || b.begin_ns >= a.end_ns;
                    prop_assert!(beside || b.end_ns <= a.end_ns, "{:?} {:?}", a, b);
                }
            }
        }
    }
}
