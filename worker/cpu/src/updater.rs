//! The CPU device's page updater: one thread that behaves like a GPU with its own copies and kernels, so that the sharing
//! of pages is tested on any machine.

use crate::adamw::adamw_page;
use ramtorch_device::trace::{Label, Recorder, Row};
use ramtorch_device::{
    AdamwStep, DecayRun, DevBuf, DirectWeights, EngineError, GradientPiece, HeldPage, PageGradients, PageUpdater, StagedPage, caught,
    staged_parameters, state_bytes,
};
use ramtorch_store::{GradientFormat, Gradients, MomentFormat, MomentsMut, MomentsRef, PageId, PageMut, PagePtrs, PageView, Store, Update};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

/// What is done with a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Task {
    /// Arrays the live page, or from `state`, into the spare.
    Update,
    /// Arrays the live page, or from `state` where that is at the step before, into `state`.
    Advance { current: bool },
    /// Arrays `state` into the spare.
    WriteBack,
}

/// Who hears of it when work is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    /// Whoever finishes the page, and before that the places of its weights.
    All,
    /// Whoever finishes the page.
    Finisher,
    /// Nobody, but of an error.
    Nobody,
}

struct Work {
    task: Task,
    page: u32,
    k: AdamwStep,
    runs: Vec<DecayRun>,
    params: Range<u64>,
    live: PagePtrs,
    /// None for what is advanced.
    spare: Option<PagePtrs>,
    state: Vec<DevBuf>,
    /// Where they are not in the segment.
    gradients: Option<(GradientFormat, Vec<GradientPiece>)>,
    direct: Option<Arc<DirectWeights>>,
    told: Told,
}

/// See the module.
pub(crate) struct Updater {
    store: Arc<Store>,
    jobs: Option<mpsc::Sender<Work>>,
    done: mpsc::Receiver<Result<(), EngineError>>,
    direct: Option<Arc<DirectWeights>>,
    thread: Option<JoinHandle<()>>,
    /// What has not been told of yet, while it is held back.
    held_back: Option<Vec<(PageId, u64)>>,
    /// Pages that are prepared and have not gone out.
    prepared: VecDeque<PageId>,
}

impl Updater {
    pub(crate) fn new(index: u32, store: &Arc<Store>, recorder: Arc<Recorder>) -> Result<Updater, EngineError> {
        let failed = |e: &dyn std::fmt::Display| EngineError::internal(format!("cpu:{index}: cannot start the page updater: {e}"));
        let (jobs, inbox) = mpsc::channel::<Work>();
        let (report, done) = mpsc::channel();
        let (mapping, pool) = (store.clone(), rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(|e| failed(&e))?);
        let run = move || {
            for work in inbox {
                let span = recorder.scope(Row::OptimizerKernel, Label::work("adamw").step(work.k.step).page(work.page));
                let result = caught("the page updater", || pool.install(|| run(&mapping, &work)));
                drop(span);
                if (work.told != Told::Nobody || result.is_err()) && report.send(result).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("cpu{index}-adamw")).spawn(run).map_err(|e| failed(&e))?;
        Ok(Updater {
            store: store.clone(),
            jobs: Some(jobs),
            done,
            direct: None,
            thread: Some(thread),
            held_back: None,
            prepared: VecDeque::new(),
        })
    }
}

/// Arrays from one parameter on.
#[derive(Clone, Copy)]
struct Arrays {
    first: u64,
    ptrs: PagePtrs,
}

impl Arrays {
    /// From parameter `first` on, which lies behind the arrays' own first.
    fn at(self, first: u64, moment: u64) -> Arrays {
        let (skip, bytes) = ((first - self.first) as usize, ((first - self.first) * moment) as usize);
        let PagePtrs { hi, lo, m, v } = self.ptrs;
        let ptrs = PagePtrs { hi: hi.wrapping_add(skip), lo: lo.wrapping_add(skip), m: m.wrapping_add(bytes), v: v.wrapping_add(bytes) };
        Arrays { first, ptrs }
    }

    /// The state of `n` parameters from `first` on, as it lies in one piece of memory from `address` on.
    fn packed(first: u64, address: u64, n: u64, moment: u64) -> Arrays {
        let at = |bytes: u64| (address + bytes) as *mut u8;
        Arrays { first, ptrs: PagePtrs { hi: at(0).cast(), lo: at(2 * n).cast(), m: at(4 * n), v: at((4 + moment) * n) } }
    }

    /// Copies the state of `n` parameters.
    ///
    /// # Safety
    /// Both have as many from their first on, with moments of `moment` bytes, and do not overlap; nobody else touches them.
    unsafe fn copy_to(self, to: Arrays, n: u64, moment: u64) {
        let (n, bytes) = (n as usize, (n * moment) as usize);
        // SAFETY: the caller's.
        unsafe {
            std::ptr::copy_nonoverlapping(self.ptrs.hi, to.ptrs.hi, n);
            std::ptr::copy_nonoverlapping(self.ptrs.lo, to.ptrs.lo, n);
            if bytes > 0 {
                std::ptr::copy_nonoverlapping(self.ptrs.m, to.ptrs.m, bytes);
                std::ptr::copy_nonoverlapping(self.ptrs.v, to.ptrs.v, bytes);
            }
        }
    }
}

fn run(store: &Store, w: &Work) -> Result<(), EngineError> {
    let moment = store.layout().spec().moments.bytes();
    let live = Arrays { first: w.params.start, ptrs: w.live };
    let spare = w.spare.map(|ptrs| Arrays { first: w.params.start, ptrs });
    // Places of weights, where all of the page have one.
    let direct = w.direct.as_ref().and_then(|d| Some((d, d.pieces(w.params.clone())?)));
    let missing = || EngineError::internal("a page on its way has no spare");
    let parts: Vec<(Range<u64>, Option<Arrays>)> = if w.state.is_empty() {
        vec![(w.params.clone(), None)]
    } else {
        let size = staged_parameters(u64::from(store.layout().page_parameters()));
        let part = |(i, buf): (usize, &DevBuf)| {
            let start = w.params.start + i as u64 * size;
            let params = start..(start + size).min(w.params.end);
            let n = params.end - params.start;
            if buf.bytes < n * state_bytes(store.layout().spec()) {
                return Err(EngineError::internal("a staged part of a page is too short"));
            }
            Ok((params, Some(Arrays::packed(start, buf.ptr, n, moment))))
        };
        w.state.iter().enumerate().map(part).collect::<Result<_, _>>()?
    };
    for (params, state) in parts {
        let n = params.end - params.start;
        let new = match (w.task, state) {
            (Task::Update, state) => {
                let spare = spare.ok_or_else(missing)?.at(params.start, moment);
                part(store, w, params.clone(), state.unwrap_or(live), spare)?;
                spare
            }
            (Task::Advance { current }, Some(state)) => {
                let mut room = vec![0u64; (n * state_bytes(store.layout().spec())).div_ceil(8) as usize];
                let old = Arrays::packed(params.start, room.as_mut_ptr() as u64, n, moment);
                let from = if current { state } else { live.at(params.start, moment) };
                // SAFETY: `n` parameters of the live page or of a held part whose length was checked, and as many in `room`.
                unsafe { from.copy_to(old, n, moment) };
                part(store, w, params.clone(), old, state)?;
                state
            }
            (Task::WriteBack, Some(state)) => {
                // SAFETY: a held part whose length was checked; the spare belongs to the update in hand.
                unsafe { state.copy_to(spare.ok_or_else(missing)?.at(params.start, moment), n, moment) };
                continue;
            }
            (_, None) => return Err(EngineError::internal("a held page has no state")),
        };
        for (range, buf) in direct.iter().flat_map(|d| &d.1) {
            let (start, end) = (range.start.max(params.start), range.end.min(params.end));
            if start < end {
                let to = (buf.ptr + 2 * (start - range.start)) as *mut u16;
                // SAFETY: new weights, written above; nobody reads or writes the places of weights while pages of a step are
                // updated (contract of `PageUpdater::deliver_to`), and each is as long as its range.
                unsafe { std::ptr::copy_nonoverlapping(new.at(start, moment).ptrs.hi, to, (end - start) as usize) };
            }
        }
    }
    if let (Some((direct, _)), Told::All) = (direct, w.told) {
        // Before `finish` returns, and so before the page is published.
        direct.deliver(w.page, w.k.step);
    }
    Ok(())
}

/// Updates `params` of the page from `old` into `new`, piece by piece where gradients lie in several buffers.
fn part(store: &Store, w: &Work, params: Range<u64>, old: Arrays, new: Arrays) -> Result<(), EngineError> {
    let Some((format, pieces)) = &w.gradients else {
        let g = store.gradient_ptr(store.layout().gradient_at(params.start, w.k.step));
        return piece(store, w, params, old, new, (store.layout().spec().gradients, g));
    };
    let mut at = params.start;
    for p in GradientPiece::within(pieces, params.clone(), *format) {
        if p.first != at || p.buf.bytes < (p.end - p.first) * format.bytes() {
            return Err(EngineError::internal("the gradients of a page have a gap"));
        }
        at = p.end;
        piece(store, w, p.first..p.end, old, new, (*format, p.buf.ptr as *mut u8))?;
    }
    if at == params.end { Ok(()) } else { Err(EngineError::internal("a page's gradients are missing")) }
}

/// Updates `params` of the page from gradients in one place.
fn piece(
    store: &Store,
    w: &Work,
    params: Range<u64>,
    old: Arrays,
    new: Arrays,
    (format, g): (GradientFormat, *mut u8),
) -> Result<(), EngineError> {
    let n = (params.end - params.start) as usize;
    let spec = store.layout().spec();
    let at = |from: Arrays| from.at(params.start, spec.moments.bytes()).ptrs;
    let (old, new) = (at(old), at(new));
    let runs: Vec<DecayRun> = DecayRun::within(&w.runs, params.clone()).collect();
    // SAFETY: the arrays of a page hold a whole page of the store's format, aligned, those of a part of a page as many
    // parameters as the part; the work whose arrays these are is under way until it is reported (contract of `PageUpdater`),
    // so nobody writes the live page, the state on the device or the gradients, and nobody else touches the spare; old and
    // new do not overlap (`run`). Arrays of moments exist where the format has them; there are `n` gradients from `g` on (of
    // the store, or of a piece that was checked).
    unsafe {
        let moments = |p: *mut u8| match spec.moments {
            MomentFormat::None => MomentsRef::None,
            MomentFormat::F32 => MomentsRef::F32(std::slice::from_raw_parts(p.cast(), n)),
            MomentFormat::Bf16 => MomentsRef::Bf16(std::slice::from_raw_parts(p.cast(), n)),
        };
        let moments_mut = |p: *mut u8| match spec.moments {
            MomentFormat::None => MomentsMut::None,
            MomentFormat::F32 => MomentsMut::F32(std::slice::from_raw_parts_mut(p.cast(), n)),
            MomentFormat::Bf16 => MomentsMut::Bf16(std::slice::from_raw_parts_mut(p.cast(), n)),
        };
        let gradients = match format {
            GradientFormat::None => Gradients::None,
            GradientFormat::F32 => Gradients::F32(std::slice::from_raw_parts(g.cast(), n)),
            GradientFormat::Bf16 => Gradients::Bf16(std::slice::from_raw_parts(g.cast(), n)),
        };
        let old = PageView {
            params: params.clone(),
            hi: std::slice::from_raw_parts(old.hi, n),
            lo: std::slice::from_raw_parts(old.lo, n),
            m: moments(old.m),
            v: moments(old.v),
        };
        let new = PageMut {
            params,
            hi: std::slice::from_raw_parts_mut(new.hi, n),
            lo: std::slice::from_raw_parts_mut(new.lo, n),
            m: moments_mut(new.m),
            v: moments_mut(new.v),
        };
        adamw_page(&w.k, &runs, old, new, gradients)
    }
}

impl Updater {
    fn send(&self, work: Work) -> Result<(), EngineError> {
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(work).is_ok());
        if sent == Some(true) { Ok(()) } else { Err(EngineError::internal("the page updater's thread has ended")) }
    }

    fn work(&self, task: Task, page: u32, k: &AdamwStep, runs: &[DecayRun], state: &[DevBuf], gradients: PageGradients<'_>) -> Work {
        Work {
            task,
            page,
            k: *k,
            runs: runs.to_vec(),
            params: self.store.layout().page_range(page),
            live: self.store.page_ptrs(self.store.entry(page).physical),
            spare: None,
            state: state.to_vec(),
            gradients: match gradients {
                PageGradients::Segment => None,
                PageGradients::Device(format, pieces) => Some((format, pieces.to_vec())),
            },
            direct: self.direct.clone(),
            told: Told::All,
        }
    }
}

impl PageUpdater for Updater {
    fn depth(&self) -> usize {
        2
    }

    fn submit(
        &mut self,
        k: &AdamwStep,
        update: &Update,
        runs: &[DecayRun],
        state: &[DevBuf],
        gradients: PageGradients<'_>,
    ) -> Result<(), EngineError> {
        let work = self.work(Task::Update, update.page(), k, runs, state, gradients);
        self.send(Work { live: self.store.page_ptrs(update.live()), spare: Some(self.store.page_ptrs(update.spare())), ..work })
    }

    fn prepare(&mut self, k: &AdamwStep, staged: &StagedPage, runs: &[DecayRun], gradients: PageGradients<'_>) -> Result<(), EngineError> {
        if matches!(gradients, PageGradients::Segment) {
            return Err(EngineError::internal("a page is prepared whose gradients are in the segment"));
        }
        let work = self.work(Task::Advance { current: true }, staged.page, k, runs, &staged.state, gradients);
        self.prepared.push_back(staged.page);
        self.send(Work { told: Told::Nobody, ..work })
    }

    fn submit_prepared(&mut self, k: &AdamwStep, update: &Update, staged: &StagedPage) -> Result<(), EngineError> {
        if self.prepared.pop_front() != Some(update.page()) || staged.page != update.page() {
            return Err(EngineError::internal(format!("page {} is not the one that was prepared first", update.page())));
        }
        let work = self.work(Task::WriteBack, staged.page, k, &[], &staged.state, PageGradients::Segment);
        self.send(Work { spare: Some(self.store.page_ptrs(update.spare())), ..work })
    }

    fn advance(&mut self, k: &AdamwStep, held: &HeldPage, runs: &[DecayRun], gradients: PageGradients<'_>) -> Result<(), EngineError> {
        let task = Task::Advance { current: held.is_before(k.step) };
        let params = self.store.layout().page_range(held.page);
        let has_places = self.direct.as_ref().is_some_and(|d| d.pieces(params).is_some());
        let told = match &mut self.held_back {
            Some(told) => {
                told.extend(has_places.then_some((held.page, k.step)));
                Told::Finisher
            }
            None => Told::All,
        };
        let work = self.work(task, held.page, k, runs, &held.state, gradients);
        self.send(Work { told, ..work })
    }

    fn write_back(&mut self, update: &Update, held: &HeldPage) -> Result<(), EngineError> {
        let work = self.work(Task::WriteBack, held.page, &AdamwStep::default(), &[], &held.state, PageGradients::Segment);
        self.send(Work { spare: Some(self.store.page_ptrs(update.spare())), told: Told::Finisher, ..work })
    }

    fn deliver_to(&mut self, weights: Arc<DirectWeights>) {
        self.direct = Some(weights);
    }

    fn hold_back(&mut self, hold: bool) {
        let told = std::mem::replace(&mut self.held_back, hold.then(Vec::new));
        for (page, step) in told.into_iter().flatten() {
            if let Some(direct) = &self.direct {
                direct.deliver(page, step);
            }
        }
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        self.done.recv().map_err(|_| EngineError::internal("the page updater's thread has ended"))?
    }
}

impl Drop for Updater {
    fn drop(&mut self) {
        self.jobs = None; // ends the loop once the queue is empty
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
