//! The CPU device's page updater: one thread that behaves like a GPU with its own copies and kernels, so that the sharing
//! of pages is tested on any machine.

use crate::adamw::adamw_page;
use ramtorch_device::trace::{Label, Recorder, Row};
use ramtorch_device::{
    AdamwStep, DecayRun, DevBuf, DirectWeights, EngineError, GradientPiece, PageGradients, PageUpdater, staged_parameters, state_bytes,
};
use ramtorch_store::{GradientFormat, Gradients, MomentFormat, MomentsMut, MomentsRef, PageMut, PagePtrs, PageView, Store, Update};
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

struct Work {
    page: u32,
    k: AdamwStep,
    runs: Vec<DecayRun>,
    params: Range<u64>,
    live: PagePtrs,
    spare: PagePtrs,
    state: Vec<DevBuf>,
    /// Where they are not in the segment.
    gradients: Option<(GradientFormat, Vec<GradientPiece>)>,
    direct: Option<Arc<DirectWeights>>,
}

/// See the module.
pub(crate) struct Updater {
    store: Arc<Store>,
    jobs: Option<mpsc::Sender<Work>>,
    done: mpsc::Receiver<Result<(), EngineError>>,
    direct: Option<Arc<DirectWeights>>,
    thread: Option<JoinHandle<()>>,
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
                let result = pool.install(|| run(&mapping, &work));
                drop(span);
                if report.send(result).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("cpu{index}-adamw")).spawn(run).map_err(|e| failed(&e))?;
        Ok(Updater { store: store.clone(), jobs: Some(jobs), done, direct: None, thread: Some(thread) })
    }
}

fn run(store: &Store, w: &Work) -> Result<(), EngineError> {
    update(store, w)?;
    let Some((direct, pieces)) = w.direct.as_ref().and_then(|d| Some((d, d.pieces(w.params.clone())?))) else { return Ok(()) };
    for (range, buf) in pieces {
        let (at, n) = ((range.start - w.params.start) as usize, (range.end - range.start) as usize);
        // SAFETY: the spare's weights, written above; nobody reads or writes the places of weights while pages of a step are
        // updated (contract of `PageUpdater::deliver_to`), and each is as long as its range.
        unsafe { std::ptr::copy_nonoverlapping(w.spare.hi.add(at), buf.ptr as *mut u16, n) };
    }
    // Before `finish` returns, and so before the page is published.
    direct.deliver(w.page, w.k.step);
    Ok(())
}

fn update(store: &Store, w: &Work) -> Result<(), EngineError> {
    if w.state.is_empty() {
        return part(store, w, w.params.clone(), w.live);
    }
    let size = staged_parameters(u64::from(store.layout().page_parameters()));
    for (i, buf) in w.state.iter().enumerate() {
        let start = w.params.start + i as u64 * size;
        let params = start..(start + size).min(w.params.end);
        let (n, moment) = (params.end - params.start, store.layout().spec().moments.bytes());
        if buf.bytes < n * state_bytes(store.layout().spec()) {
            return Err(EngineError::internal("a staged part of a page is too short"));
        }
        let at = |bytes: u64| (buf.ptr + bytes) as *mut u8;
        part(store, w, params, PagePtrs { hi: at(0).cast(), lo: at(2 * n).cast(), m: at(4 * n), v: at((4 + moment) * n) })?;
    }
    Ok(())
}

/// Updates `params` of the page: from `old`, whose first parameter is theirs, into the spare; piece by piece where gradients lie
/// in several buffers.
fn part(store: &Store, w: &Work, params: Range<u64>, old: PagePtrs) -> Result<(), EngineError> {
    let Some((format, pieces)) = &w.gradients else {
        let g = store.gradient_ptr(params.start);
        return piece(store, w, params, old, (store.layout().spec().gradients, g));
    };
    let moment = store.layout().spec().moments.bytes() as usize;
    let mut at = params.start;
    for p in GradientPiece::within(pieces, params.clone(), *format) {
        let skip = (p.first - params.start) as usize;
        if p.first != at || p.buf.bytes < (p.end - p.first) * format.bytes() {
            return Err(EngineError::internal("the gradients of a page have a gap"));
        }
        at = p.end;
        let old = PagePtrs {
            hi: old.hi.wrapping_add(skip),
            lo: old.lo.wrapping_add(skip),
            m: old.m.wrapping_add(skip * moment),
            v: old.v.wrapping_add(skip * moment),
        };
        piece(store, w, p.first..p.end, old, (*format, p.buf.ptr as *mut u8))?;
    }
    if at == params.end { Ok(()) } else { Err(EngineError::internal("a page's gradients are missing")) }
}

/// Updates `params` of the page from gradients in one place.
fn piece(store: &Store, w: &Work, params: Range<u64>, old: PagePtrs, (format, g): (GradientFormat, *mut u8)) -> Result<(), EngineError> {
    let n = (params.end - params.start) as usize;
    let at = (params.start - w.params.start) as usize;
    let spec = store.layout().spec();
    let runs: Vec<DecayRun> = DecayRun::within(&w.runs, params.clone()).collect();
    // SAFETY: the arrays of a page hold a whole page of the store's format, aligned, those of a staged part `n` parameters;
    // the update whose pages these are is under way until this is reported (contract of `PageUpdater::submit`), so nobody
    // writes the live page, the staged parts or the gradients, and nobody else touches the spare. Arrays of moments exist
    // where the format has them; there are `n` gradients from `g` on (of the store, or of a piece that was checked).
    unsafe {
        let moments = |p: *mut u8| match spec.moments {
            MomentFormat::None => MomentsRef::None,
            MomentFormat::F32 => MomentsRef::F32(std::slice::from_raw_parts(p.cast(), n)),
            MomentFormat::Bf16 => MomentsRef::Bf16(std::slice::from_raw_parts(p.cast(), n)),
        };
        let moments_mut = |p: *mut u8| match spec.moments {
            MomentFormat::None => MomentsMut::None,
            MomentFormat::F32 => MomentsMut::F32(std::slice::from_raw_parts_mut(p.cast::<f32>().add(at), n)),
            MomentFormat::Bf16 => MomentsMut::Bf16(std::slice::from_raw_parts_mut(p.cast::<u16>().add(at), n)),
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
            hi: std::slice::from_raw_parts_mut(w.spare.hi.add(at), n),
            lo: std::slice::from_raw_parts_mut(w.spare.lo.add(at), n),
            m: moments_mut(w.spare.m),
            v: moments_mut(w.spare.v),
        };
        adamw_page(&w.k, &runs, old, new, gradients)
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
        let work = Work {
            page: update.page(),
            k: *k,
            runs: runs.to_vec(),
            params: self.store.layout().page_range(update.page()),
            live: self.store.page_ptrs(update.live()),
            spare: self.store.page_ptrs(update.spare()),
            state: state.to_vec(),
            gradients: match gradients {
                PageGradients::Segment => None,
                PageGradients::Device(format, pieces) => Some((format, pieces.to_vec())),
            },
            direct: self.direct.clone(),
        };
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(work).is_ok());
        if sent == Some(true) { Ok(()) } else { Err(EngineError::internal("the page updater's thread has ended")) }
    }

    fn deliver_to(&mut self, weights: Arc<DirectWeights>) {
        self.direct = Some(weights);
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
