//! Pages that are updated beside the backward pass of their own step, where gradients are not clipped.
//!
//! ```text
//!   step loop          sweep s enqueued … gradients of block n-1 whole, n-2 … 0 ─► losses ─► gate closed ─► GradientsComplete(s)
//!                                              │ squared, squares kept, progress told              ▲ answers
//!   optimizer's thread  … Committed(s-1) ─► gate entered ─► all ranks past block n-1: Updating(s) ─┤
//!                                              page whose blocks all ranks are past ─► finite? ─► new state, old weights
//!                                              in the place of its gradients ─► published ─► the next page
//! ```
//! The clipping factor is 1 whatever the norm will be, so a page can be updated as soon as its own gradients are whole on every
//! rank, once all pages of all ranks are at s-1. By then nobody needs its weights of s-1 in this step any more: a block's gradients
//! are whole when its last visit is over, blocks are through in descending order, a page waits for all blocks that it lies in, and
//! a tied embedding is block 0, whose gradients come last.
//!
//! A death before GradientsComplete(s) takes the step back to its beginning ([`Ahead`]): weights of pages that are at s come from
//! the place of their gradients, and their gradients, which are computed again, are thrown away. What the norm needs of those was
//! kept behind the exchange area before the page was published ([`Watch`]). After GradientsComplete(s) recovery is what it is
//! without all this.
//!
//! Gradients that are not finite are never made weights of: updating ends there, and the step loop says that training has
//! diverged, as it finds by itself. Pages that the device has brought to itself, or holds, wait for the end of the backward pass.

use crate::api::EngineError;
use crate::optimizer::{StepScalars, factors, squares_of, sum_of_squares};
use crate::record::StepNumbers;
use crate::session::Session;
use ramtorch_cpu::{Collectives, read_gradients, update_page_early};
use ramtorch_device::{Gang, Ranks};
use ramtorch_failpoint::{Point, hit};
use ramtorch_job::OptimizerSpec;
use ramtorch_store::{Layout, PageId, SharedOwner, StepPhase, Store};
use ramtorch_trace::{Label, Recorder, Row};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// How often the optimizer's thread looks whether there is something to do.
const LOOK: Duration = Duration::from_micros(100);

/// Numbers that a step keeps for a gang that has to begin it anew: squares of each page's gradients on a rank that is alone, of
/// each rank's share of each block otherwise.
pub(crate) fn kept_numbers(pages: u32, blocks: usize, world: usize) -> u64 {
    if world == 1 { pages.into() } else { (blocks * world) as u64 }
}

/// Pages that a gang which died had brought to a step whose gradients it did not complete.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    step: u64,
    pages: Vec<bool>,
}

impl Ahead {
    /// Those that are at `step`, of all ranks. To be found before any rank updates another one.
    pub fn find(store: &Store, step: u64) -> Ahead {
        Ahead { step, pages: (0..store.layout().page_count()).map(|p| store.entry(p).step == step).collect() }
    }

    /// How many there are, and of how many.
    pub fn count(&self) -> (usize, usize) {
        (self.pages.iter().filter(|p| **p).count(), self.pages.len())
    }

    /// The weights of `page` as of step `version` are in the place of its gradients.
    pub fn has(&self, page: PageId, version: u64) -> bool {
        version + 1 == self.step && self.pages.get(page as usize).is_some_and(|p| *p)
    }

    /// The parts of `params` whose gradients of the step after `version` are wanted: those of pages that are not ahead.
    pub fn wanted(&self, layout: &Layout, params: Range<u64>, version: u64) -> Vec<Range<u64>> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        for page in layout.pages_of(params.clone()).filter(|p| !self.has(*p, version)) {
            let range = layout.page_range(page);
            let (start, end) = (range.start.max(params.start), range.end.min(params.end));
            match parts.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => parts.push(start..end),
            }
        }
        parts
    }
}

/// The time in which pages of one step may be updated early. Who enters it answers, once.
#[derive(Debug, Default)]
pub(crate) struct Gate(AtomicU8);

const ENTERED: u8 = 1;
const CLOSED: u8 = 2;

impl Gate {
    /// The optimizer's thread begins; `false`: it is too late.
    pub fn enter(&self) -> bool {
        self.0.compare_exchange(0, ENTERED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// No page is begun from now on. Whether somebody has entered, who ends with the page in hand and answers.
    pub fn close(&self) -> bool {
        self.0.swap(CLOSED, Ordering::AcqRel) == ENTERED
    }

    fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) == CLOSED
    }
}

/// What the step loop sees of one step's gradients while they come: squares them, each sum in one order whoever was complete
/// first, and tells the others how far this rank is.
pub(crate) struct Watch<'a> {
    pub store: &'a Store,
    pub comm: &'a Collectives,
    pub pool: &'a rayon::ThreadPool,
    pub recorder: &'a Recorder,
    pub ranks: Ranks,
    /// Step before.
    pub before: u64,
    pub ahead: Option<Arc<Ahead>>,
    /// Pages may be updated as their gradients come.
    pub early: bool,
    /// The device does not square them.
    pub by_host: bool,
    /// Progress before the step.
    pub base: u64,
    places: Vec<(u64, u64)>,
    /// Blocks that are not complete.
    left: usize,
    /// By page: blocks of it that are not complete.
    awaited: Vec<u32>,
    /// By page where this rank is alone, otherwise by block, of the part that it sends out itself.
    squares: Vec<f64>,
}

impl<'a> Watch<'a> {
    pub fn new(
        (store, comm, recorder): (&'a Store, &'a Collectives, &'a Recorder),
        pool: &'a rayon::ThreadPool,
        places: &[(u64, u64)],
        before: u64,
    ) -> Watch<'a> {
        let pages = store.layout().page_count() as usize;
        let mut awaited = vec![0u32; pages];
        for (start, len) in places {
            store.layout().pages_of(*start..start + len).for_each(|p| awaited[p as usize] += 1);
        }
        let sums = if comm.world() == 1 { pages } else { places.len() };
        Watch {
            store,
            comm,
            pool,
            recorder,
            ranks: comm.ranks(),
            before,
            ahead: None,
            early: false,
            by_host: true,
            base: 0,
            places: places.to_vec(),
            left: places.len(),
            awaited,
            squares: vec![0.0; sums],
        }
    }

    /// Looks at the blocks from the last one down to `down_to`, whose gradients must be on their way; waits for them where
    /// `wait` says so.
    pub fn advance(&mut self, session: &Session, down_to: usize, wait: bool) -> Result<(), EngineError> {
        while self.left > down_to && session.is_out(self.left - 1, wait)? {
            self.left -= 1;
            self.complete(self.left);
            if self.early {
                self.comm.tell_progress(self.base + (self.places.len() - self.left) as u64);
            }
        }
        Ok(())
    }

    /// Waits for all blocks. Σ of the squares of the gradients that this rank is the one to square, where it does.
    pub fn finish(mut self, session: &Session) -> Result<Option<f64>, EngineError> {
        self.advance(session, 0, true)?;
        if !self.by_host {
            return Ok(None);
        }
        Ok(Some(if self.comm.world() == 1 { self.squares.iter().sum() } else { self.squares.iter().rev().fold(0.0, |sum, x| sum + x) }))
    }

    fn complete(&mut self, b: usize) {
        if !self.by_host {
            return;
        }
        let (start, len) = self.places[b];
        if self.comm.world() > 1 {
            let own = self.ranks.own(len);
            if !own.is_empty() {
                let at = self.comm.rank() * self.places.len() + b;
                self.squares[b] = self.square(start + own.start..start + own.end, at, Label::work("square gradients"));
            }
            return;
        }
        for p in self.store.layout().pages_of(start..start + len) {
            self.awaited[p as usize] -= 1;
            if self.awaited[p as usize] == 0 {
                let range = self.store.layout().page_range(p);
                self.squares[p as usize] = self.square(range, p as usize, Label::work("square gradients").page(p));
            }
        }
    }

    /// Of the gradients of `params`, which are number `at` of what is kept.
    fn square(&self, params: Range<u64>, at: usize, label: Label) -> f64 {
        let kept = self.comm.kept().get(at).filter(|_| self.early);
        let layout = self.store.layout();
        let is_ahead = |a: &Arc<Ahead>| layout.pages_of(params.clone()).any(|p| a.has(p, self.before));
        if let Some(kept) = kept.filter(|_| self.ahead.as_ref().is_some_and(is_ahead)) {
            // Some of these gradients were thrown away. Their page was published after this was written.
            return f64::from_bits(kept.load(Ordering::Relaxed));
        }
        let _span = self.recorder.scope(Row::Loop, label);
        let sum = self.pool.install(|| squares_of(self.store, params, self.before + 1));
        if let Some(kept) = kept {
            kept.store(sum.to_bits(), Ordering::Relaxed);
        }
        sum
    }
}

/// What the optimizer's thread is to do beside a backward pass.
pub(crate) struct EarlyJob {
    /// Those of the step that are known before its sweeps.
    pub numbers: StepNumbers,
    /// Progress before the step.
    pub base: u64,
    pub gate: Arc<Gate>,
}

/// What it did.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct EarlyDone {
    pub pages: u64,
    pub elapsed: Duration,
}

/// A page that may be updated early.
#[derive(Debug, PartialEq, Eq)]
struct EarlyPage {
    page: PageId,
    /// Blocks that it lies in.
    blocks: Range<usize>,
}

/// A rank's part in updating pages early. See the module.
pub(crate) struct EarlyPages<'a> {
    store: &'a Store,
    comm: &'a Collectives,
    recorder: &'a Recorder,
    optimizer: &'a OptimizerSpec,
    pool: &'a rayon::ThreadPool,
    by_host: bool,
    blocks: usize,
    /// In the order in which their gradients become whole.
    pages: Vec<EarlyPage>,
}

impl<'a> EarlyPages<'a> {
    /// `own` but for those `elsewhere`, ascending, that are the device's. `by_host`: squares of gradients are kept.
    pub fn new(
        (store, comm, recorder): (&'a Store, &'a Collectives, &'a Recorder),
        optimizer: &'a OptimizerSpec,
        pool: &'a rayon::ThreadPool,
        places: &[(u64, u64)],
        own: impl Iterator<Item = PageId>,
        elsewhere: &[PageId],
        by_host: bool,
    ) -> EarlyPages<'a> {
        let own = own.filter(|p| elsewhere.binary_search(p).is_err());
        let pages = in_order_of_gradients(store.layout(), places, own);
        EarlyPages { store, comm, recorder, optimizer, pool, by_host, blocks: places.len(), pages }
    }

    /// Updates pages as their gradients become whole, until all are or the gate is closed.
    ///
    /// # Errors
    /// Those of the store.
    pub fn run(&self, owner: &SharedOwner<'_>, job: &EarlyJob) -> Result<EarlyDone, EngineError> {
        let step = job.numbers.step;
        let scalars = StepScalars { step, lr: job.numbers.lr, gradient_scale: job.numbers.gradient_scale as f32 };
        let k = factors(self.optimizer, &scalars);
        let mut done = EarlyDone::default();
        if !self.past(job, self.blocks - 1) || !self.announced(job)? {
            return Ok(done);
        }
        for EarlyPage { page, blocks } in &self.pages {
            if self.store.entry(*page).step == step {
                continue; // a gang before this one was here
            }
            if !self.past(job, blocks.start) || !self.finite(*page, blocks.clone(), step) {
                return Ok(done);
            }
            hit(Point::EarlyBegun);
            let begun = Instant::now();
            let span = self.recorder.scope(Row::OptimizerCpu, Label::work("adamw").step(step).page(*page));
            loop {
                if self.pool.install(|| update_page_early(owner, &k, *page))? != ramtorch_store::Early::Pinned {
                    break;
                }
                if self.is_over(job) {
                    return Ok(done);
                }
                // A checkpoint needs what is in the spare.
                std::thread::sleep(LOOK);
            }
            drop(span);
            hit(Point::EarlyPublished);
            done.pages += 1;
            done.elapsed += begun.elapsed();
        }
        Ok(done)
    }

    /// No page is begun any more. Where the rank has given up, the step loop knows why.
    fn is_over(&self, job: &EarlyJob) -> bool {
        job.gate.is_closed() || self.comm.aborted()
    }

    /// Waits until `there`; `false`: it is over.
    fn wait(&self, job: &EarlyJob, there: impl Fn() -> bool) -> bool {
        while !self.is_over(job) {
            if there() {
                return true;
            }
            std::thread::sleep(LOOK);
        }
        false
    }

    /// Waits until gradients of block `b`, and of all behind it, are whole on all ranks.
    fn past(&self, job: &EarlyJob, b: usize) -> bool {
        let needed = job.base + (self.blocks - b) as u64;
        self.wait(job, || self.comm.progress().is_ok_and(|told| told >= needed))
    }

    /// The record says that pages of this step may be ahead of its gradients: the leader sees to it, the others wait.
    fn announced(&self, job: &EarlyJob) -> Result<bool, EngineError> {
        let says = || {
            let record = self.store.record();
            (record.step, record.phase) == (job.numbers.step, StepPhase::Updating)
        };
        if self.comm.rank() == 0 && !says() {
            self.store.set_record(&job.numbers.record(StepPhase::Updating)).map_err(EngineError::internal)?;
            hit(Point::StepUpdating);
        }
        Ok(self.wait(job, says))
    }

    /// No gradient of `page`, which lies in `blocks`, is infinite or not a number, as far as squares tell: they are what decides
    /// whether training has diverged.
    fn finite(&self, page: PageId, blocks: Range<usize>, step: u64) -> bool {
        if !self.by_host {
            return self.pool.install(|| read_gradients(self.store, page, step, sum_of_squares)).is_finite();
        }
        let finite = |at: usize| self.comm.kept().get(at).is_some_and(|x| f64::from_bits(x.load(Ordering::Relaxed)).is_finite());
        match self.comm.world() {
            1 => finite(page as usize),
            world => (0..world).all(|rank| blocks.clone().all(|b| finite(rank * self.blocks + b))),
        }
    }
}

/// `pages` with the blocks that they lie in, those first whose gradients are whole first.
fn in_order_of_gradients(layout: &Layout, places: &[(u64, u64)], pages: impl Iterator<Item = PageId>) -> Vec<EarlyPage> {
    let mut pages: Vec<EarlyPage> = pages
        .filter_map(|page| {
            let range = layout.page_range(page);
            let first = places.partition_point(|(start, len)| start + len <= range.start);
            let end = places.partition_point(|(start, _)| *start < range.end);
            (first < end).then_some(EarlyPage { page, blocks: first..end })
        })
        .collect();
    // Blocks are complete from the last one down.
    pages.sort_by_key(|p| (std::cmp::Reverse(p.blocks.start), p.page));
    pages
}

#[cfg(test)]
mod tests;
