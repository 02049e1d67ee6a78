//! Spans of a trace, which the device's clock tells: where they lie on the host's, and in which order.

use crate::Test;
use crate::optimizer::{k, put_gradients, store};
use ramtorch_cuda::CudaDevice;
use ramtorch_device::trace::{Kind, Label, RankTrace, Recorder, Row, Span, Wait, now_ns};
use ramtorch_device::*;
use ramtorch_store::{GradientFormat, MomentFormat, SharedOwner, Update};
use std::sync::Arc;

pub const TESTS: &[Test] = &[("trace_of_streams_lies_where_the_host_saw_it", streams), ("trace_of_pages_has_their_parts_in_order", pages)];

/// What two readings of the device's clock may be off by against one another, nanoseconds.
const READ: u64 = 2000;

/// The host's clock before work was enqueued and after it was waited for.
struct Bracket {
    begin: u64,
    end: u64,
    /// How long it took to tie the clocks together: the device's moment lies somewhere in it.
    tie: u64,
}

impl Bracket {
    #[track_caller]
    fn holds(&self, s: &Span) {
        // The clocks drift apart by less than a thousandth.
        let slack = self.tie + READ + (self.end - self.begin) / 1000;
        let inside = s.begin_ns + slack >= self.begin && s.begin_ns <= s.end_ns && s.end_ns <= self.end + slack;
        assert!(inside, "{} of step {}: {}..{} outside {}..{}, slack {slack}", s.name, s.step, s.begin_ns, s.end_ns, self.begin, self.end);
    }
}

/// `a` is over when `b` begins.
#[track_caller]
fn before(a: &Span, b: &Span) {
    assert!(a.end_ns <= b.begin_ns + READ, "{} ends at {}, {} begins at {}", a.name, a.end_ns, b.name, b.begin_ns);
}

fn length(s: &Span) -> u64 {
    s.end_ns - s.begin_ns
}

/// The one span of that step and name.
#[track_caller]
fn only<'a>(trace: &'a RankTrace, step: u64, name: &str) -> &'a Span {
    let found: Vec<&Span> = trace.spans.iter().filter(|s| s.step == step && s.name == name).collect();
    assert_eq!(found.len(), 1, "{name} of step {step}: {found:?}");
    found[0]
}

/// Two stretches of arithmetic, one of them long, and a copy on another stream that has to wait for both; in two steps, each with
/// an anchor of its own.
fn streams() {
    let mut d = CudaDevice::open(0, Dtype::Bf16, 1 << 30, false).unwrap();
    let recorder = Arc::new(Recorder::default());
    d.observe(&recorder);
    let n = 64usize << 20;
    let [x, y, z] = ["x", "y", "z"].map(|what| d.alloc(2 * n as u64, what).unwrap());
    let done = d.event().unwrap();
    let work = |name: &'static str, times: usize| {
        let stretch = d.begin(Stream::Compute, &Label::work(name)).unwrap();
        let measured = stretch.0.is_some();
        (0..times).for_each(|_| d.add(x, y, n).unwrap());
        d.end(Stream::Compute, stretch).unwrap();
        measured
    };
    assert!(!work("before", 1), "no trace is on");
    d.synchronize(Stream::Compute).unwrap();
    recorder.start(1, 2);
    let mut seen = Vec::new();
    for step in 1..=2 {
        recorder.set_step(step);
        let asked = now_ns();
        d.anchor().unwrap();
        let begin = now_ns();
        assert!(work("short", 50) && work("long", 400));
        d.record(done, Stream::Compute).unwrap();
        // Some tens of milliseconds are enqueued: it stands still.
        d.wait_measured(Stream::CopyIn, done, &Label::wait(Wait::Weights)).unwrap();
        let stretch = d.begin(Stream::CopyIn, &Label::copy("copy", z.bytes)).unwrap();
        d.copy(Stream::CopyIn, z, y).unwrap();
        d.end(Stream::CopyIn, stretch).unwrap();
        // Takes what is over, and leaves the rest for the next time.
        let mut waited = d.resolve().unwrap().weights;
        Stream::ALL.iter().for_each(|s| d.synchronize(*s).unwrap());
        let bracket = Bracket { begin, end: now_ns(), tie: begin - asked };
        waited += d.resolve().unwrap().weights;
        seen.push((step, bracket, waited));
    }
    let trace = recorder.finish();
    assert!(!work("after", 1), "the trace is off");
    assert_eq!((trace.spans.len(), trace.dropped), (8, 0), "{:?}", trace.spans);
    for (step, bracket, waited) in &seen {
        let [short, long, wait, copy] = ["short", "long", Wait::Weights.name(), "copy"].map(|name| only(&trace, *step, name));
        for span in [short, long, wait, copy] {
            bracket.holds(span);
        }
        assert_eq!([short.row, long.row, wait.row, copy.row], [Row::Compute, Row::Compute, Row::CopyIn, Row::CopyIn]);
        assert_eq!((wait.kind, copy.kind, copy.bytes), (Kind::Wait(Wait::Weights), Kind::Copy, z.bytes));
        before(short, long);
        before(long, copy);
        before(wait, copy);
        assert!(wait.end_ns + READ >= long.end_ns, "the wait ends before what it waits for");
        assert!(length(long) > 2 * length(short), "eight times the work in {} ns, once in {}", length(long), length(short));
        let off = (waited * 1e9 - length(wait) as f64).abs();
        assert!(off <= READ as f64, "{waited} s were waited, the span says {} ns", length(wait));
        let (tie, whole) = (bracket.tie as f64 / 1e3, (bracket.end - bracket.begin) as f64 / 1e6);
        println!("    step {step}: clocks tied within {tie:.0} us, {whole:.1} ms, waited {:.1} ms of them", waited * 1e3);
    }
}

/// Every page goes up, is updated and comes down, in this order and as a whole; the next page goes up when the kernel is done.
fn pages() {
    let s = store("trace", 20_011, 3 * (2 << 20) + 5 * 1024, MomentFormat::F32, GradientFormat::Bf16);
    put_gradients(&s, 1);
    let mut d = CudaDevice::open(0, Dtype::Bf16, 1 << 30, false).unwrap();
    let recorder = Arc::new(Recorder::default());
    d.observe(&recorder);
    let mut updater = d.page_updater(&s).unwrap().unwrap();
    let owner = SharedOwner::new(s.claim(0).unwrap());
    let layout = s.layout();
    recorder.start(1, 2);
    let mut seen = Vec::new();
    for step in 1..=2 {
        let updates: Vec<Update> = owner.pages().map(|page| owner.begin(page, step).unwrap().unwrap()).collect();
        let (begin, mut tie) = (now_ns(), None);
        for update in &updates {
            let runs = DecayRun::of(layout, &layout.page_range(update.page()));
            updater.submit(&k(step), update, &runs, &[], PageGradients::Segment).unwrap();
            // The first of a step ties the clocks together.
            tie.get_or_insert_with(|| now_ns() - begin);
        }
        for update in updates {
            updater.finish().unwrap();
            owner.publish(update).unwrap();
        }
        seen.push((step, Bracket { begin, end: now_ns(), tie: tie.unwrap() }));
    }
    let trace = recorder.finish();
    assert_eq!(trace.dropped, 0);
    let pages: Vec<u32> = (0..layout.page_count()).collect();
    assert!(pages.len() > 1);
    for (step, bracket) in &seen {
        let rows = [Row::OptimizerIn, Row::OptimizerKernel, Row::OptimizerOut];
        let [up, kernel, down] = rows.map(|row| trace.spans.iter().filter(|s| s.row == row && s.step == *step).collect::<Vec<&Span>>());
        let state = state_bytes(layout.spec());
        for (spans, name, each) in
            [(&up, "page in", state + layout.spec().gradients.bytes()), (&kernel, "adamw", 0), (&down, "page out", state)]
        {
            assert_eq!(spans.iter().map(|s| s.page.unwrap()).collect::<Vec<_>>(), pages, "{name} of step {step}");
            assert!(spans.iter().all(|s| s.name == name));
            assert_eq!(spans.iter().map(|s| s.bytes).sum::<u64>(), layout.span() * each, "{name}");
            spans.iter().for_each(|s| bracket.holds(s));
            spans.windows(2).for_each(|w| before(w[0], w[1]));
        }
        for i in 0..pages.len() {
            before(up[i], kernel[i]);
            before(kernel[i], down[i]);
            if i > 0 {
                before(kernel[i - 1], up[i]);
            }
        }
        let (tie, whole) = (bracket.tie as f64 / 1e3, (bracket.end - bracket.begin) as f64 / 1e6);
        println!("    step {step}: clocks tied within {tie:.0} us, {} pages in {whole:.1} ms", pages.len());
    }
}
