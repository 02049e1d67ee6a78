//! All pages of a rank from one step to the next, on the CPU and on a device at once.
//!
//! ```text
//!                        ┌──► the pool: one page at a time on all threads ──► published
//!   pages in order ──────┤
//!                        └──┐
//!                           ├► the device: some pages in hand ──────────────► published
//!   pages whose state lies ─┘
//!   on the device already
//! ```
//! The device begins with the pages that it has, and goes on with the others; the pool takes the first of all that nobody has
//! taken, so that neither is far ahead of what the next forward pass waits for.
//! Whoever is free takes the next page. Which of them updates a page changes nothing in it (`ramtorch_device` defines
//! an update to the bit), so the sharing needs no plan and leaves no trace that recovery would have to know.
//!
//! Pages whose state is held on the device come before all others, and stay there: [`write_back`] publishes them, beside the
//! steps that follow.
//!
//! Where gradients stay on the device ([`Kept`]), the device reads them there. The pool takes its pages some ahead, and their
//! gradients come to the host while it works on the one before.

use crate::adamw::adamw_page;
use ramtorch_device::trace::{Label, Recorder, Row};
use ramtorch_device::{
    AdamwStep, DecayRun, DevBuf, DeviceGradients, EngineError, GradientReader, HeldPage, PageGradients, PageUpdater, StagedPage, caught,
};
use ramtorch_store::{Begun, PageId, SharedOwner, Store, Update};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Who did how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PagesUpdated {
    /// Pages that the CPU updated.
    pub cpu: u64,
    /// Pages that the device updated.
    pub device: u64,
    /// Time it took.
    pub elapsed: Duration,
}

/// Gradients that stay on the device.
pub struct Kept<'a> {
    /// Where they are.
    pub gradients: &'a DeviceGradients,
    /// Who brings those of the pool's pages to the host.
    pub reader: &'a mut dyn GradientReader,
}

/// Pages that nobody has taken yet.
pub(crate) struct Queue {
    pages: Vec<PageId>,
    next: AtomicUsize,
    /// Pages whose state lies on the device.
    staged: Vec<StagedPage>,
    next_staged: AtomicUsize,
    /// Someone failed: nobody takes another page.
    stopped: AtomicBool,
}

impl Queue {
    /// `staged`: those of the owner's pages that the device need not fetch. Those that it holds are nobody's here.
    pub(crate) fn new(owner: &SharedOwner<'_>, mut staged: Vec<StagedPage>, held: &[HeldPage]) -> Queue {
        staged.sort_by_key(|s| s.page);
        let elsewhere =
            |page: &PageId| staged.binary_search_by_key(page, |s| s.page).is_err() && held.binary_search_by_key(page, |h| h.page).is_err();
        let pages = owner.pages().filter(elsewhere).collect();
        Queue { pages, next: AtomicUsize::new(0), staged, next_staged: AtomicUsize::new(0), stopped: AtomicBool::new(false) }
    }

    fn next_unstaged(&self) -> Option<PageId> {
        self.pages.get(self.next.fetch_add(1, Ordering::Relaxed)).copied()
    }

    fn next_staged_page(&self) -> Option<&StagedPage> {
        self.staged.get(self.next_staged.fetch_add(1, Ordering::Relaxed))
    }

    /// The pool's next page: the first that is left, or where the device takes it meanwhile, one soon after.
    fn take(&self) -> Option<PageId> {
        if self.stopped.load(Ordering::Relaxed) {
            return None;
        }
        let unstaged = self.pages.get(self.next.load(Ordering::Relaxed));
        let staged = self.staged.get(self.next_staged.load(Ordering::Relaxed));
        let devices = || self.next_staged_page().map(|s| s.page);
        match (unstaged, staged) {
            (Some(page), Some(s)) if s.page < *page => devices().or_else(|| self.next_unstaged()),
            _ => self.next_unstaged().or_else(devices),
        }
    }

    /// The device's next page whose state is there.
    fn take_staged(&self) -> Option<&StagedPage> {
        if self.stopped.load(Ordering::Relaxed) { None } else { self.next_staged_page() }
    }

    /// The device's next page, and its state where it is there.
    fn take_for_device(&self) -> Option<(PageId, &[DevBuf])> {
        if self.stopped.load(Ordering::Relaxed) {
            return None;
        }
        match self.next_staged_page() {
            Some(s) => Some((s.page, &s.state)),
            None => self.next_unstaged().map(|page| (page, [].as_slice())),
        }
    }

    /// Passes a result on, and stops the others where it is an error.
    fn watch<T>(&self, result: Result<T, EngineError>) -> Result<T, EngineError> {
        if result.is_err() {
            self.stopped.store(true, Ordering::Relaxed);
        }
        result
    }
}

/// Brings every page of `owner` that is one step behind to `k.step`, in ascending order, which is that of the next
/// forward pass. The CPU's part runs on the current rayon pool; `updater` gets as many pages at a time as it wants and
/// the rank's spares allow, if one is left for the CPU.
///
/// # Errors
/// Those of the store and of the device. Pages that were published stay so; the others are at the old step.
pub fn update_pages(owner: &SharedOwner<'_>, k: &AdamwStep, updater: Option<&mut dyn PageUpdater>) -> Result<PagesUpdated, EngineError> {
    update_pages_recorded(owner, k, updater, Vec::new(), (&mut [], None), None, &Recorder::default())
}

/// As [`update_pages`]; the CPU's part of the work is recorded. `staged` are pages whose state at the step before lies in
/// memory of the updater's device. `held` are those, ascending, whose state stays there: they are updated there and not
/// published, which [`write_back`] does; with their gradients where those are on the device too, all of them before anybody is told of the
/// first. `kept`: gradients are not in the segment.
///
/// # Errors
/// Those of [`update_pages`].
pub fn update_pages_recorded(
    owner: &SharedOwner<'_>,
    k: &AdamwStep,
    updater: Option<&mut dyn PageUpdater>,
    staged: Vec<StagedPage>,
    (held, held_gradients): (&mut [HeldPage], Option<&DeviceGradients>),
    kept: Option<Kept<'_>>,
    recorder: &Recorder,
) -> Result<PagesUpdated, EngineError> {
    let begin = Instant::now();
    let layout = owner.store().layout();
    // An update of another step's state would be lost, or worse, and nobody would see it. Pages that are at the step already are skipped.
    if let Some(s) = staged.iter().find(|s| s.step + 1 != k.step && s.step != k.step) {
        return Err(EngineError::internal(format!("page {} was brought to the device at step {}, for step {}", s.page, s.step, k.step)));
    }
    // Nobody else could bring these pages to the step.
    let held = if updater.is_some() { held } else { &mut [] };
    let holds = !held.is_empty();
    let queue = Queue::new(owner, staged, held);
    let spares = layout.spec().spare_pages_per_rank as usize;
    let depth = updater.as_ref().map_or(0, |u| u.depth().min(spares.saturating_sub(1)));
    let (mut cpu, mut device) = (Ok(0), Ok(0));
    let gradients = kept.as_ref().map(|k| k.gradients);
    match updater.filter(|_| depth > 0 || holds) {
        None => cpu = on_cpu(owner, k, &queue, kept, recorder),
        Some(updater) => std::thread::scope(|scope| {
            let feeder = std::thread::Builder::new().name("optimizer-device".into()).spawn_scoped(scope, || {
                queue.watch(caught("the device's part of the optimizer", || {
                    let advanced = advance(owner, k, held, updater, gradients, held_gradients)?;
                    let updated = if depth > 0 { on_device(owner, k, &queue, updater, gradients, depth)? } else { 0 };
                    Ok(advanced + updated)
                }))
            });
            match feeder {
                Ok(feeder) => {
                    cpu = queue.watch(caught("the processor's part of the optimizer", || on_cpu(owner, k, &queue, kept, recorder)));
                    device = feeder.join().unwrap_or_else(|_| Err(EngineError::internal("the device's part of the optimizer panicked")));
                }
                Err(error) if holds => {
                    cpu = Err(EngineError::internal(format!("no thread for the device's part of the optimizer: {error}")));
                }
                // It would only have helped.
                Err(error) => {
                    tracing::warn!(%error, "no thread for the device's part of the optimizer: the CPU does all of it");
                    cpu = on_cpu(owner, k, &queue, kept, recorder);
                }
            }
        }),
    }
    Ok(PagesUpdated { cpu: cpu?, device: device?, elapsed: begin.elapsed() })
}

fn on_cpu(owner: &SharedOwner<'_>, k: &AdamwStep, queue: &Queue, kept: Option<Kept<'_>>, recorder: &Recorder) -> Result<u64, EngineError> {
    let layout = owner.store().layout();
    let mut done = 0;
    if let Some(Kept { gradients, reader }) = kept {
        let mut ahead = VecDeque::new();
        loop {
            while let Some(page) = if ahead.len() < reader.depth() { queue.take() } else { None } {
                reader.submit(page, &gradients.of(&layout.page_range(page)))?;
                ahead.push_back(page);
            }
            let Some(page) = ahead.pop_front() else { return Ok(done) };
            let runs = DecayRun::of(layout, &layout.page_range(page));
            let g = reader.finish()?;
            let _span = recorder.scope(Row::OptimizerCpu, Label::work("adamw").step(k.step).page(page));
            done += u64::from(owner.update(page, k.step, |old, new, _| adamw_page(k, &runs, old, new, g))?);
        }
    }
    while let Some(page) = queue.take() {
        let runs = DecayRun::of(layout, &layout.page_range(page));
        let _span = recorder.scope(Row::OptimizerCpu, Label::work("adamw").step(k.step).page(page));
        done += u64::from(owner.update(page, k.step, |old, new, g| adamw_page(k, &runs, old, new, g))?);
    }
    Ok(done)
}

/// The gradients of `params`, where the device is to read them.
fn with_gradients<T>(
    kept: Option<&DeviceGradients>,
    params: &Range<u64>,
    f: impl FnOnce(PageGradients<'_>) -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    match kept {
        Some(kept) => f(PageGradients::Device(kept.format(), &kept.of(params))),
        None => f(PageGradients::Segment),
    }
}

/// Held pages that are asked for and not done: enough that the device always has some.
const ADVANCING: usize = 3;

/// Brings held pages to `k.step` on the device, but for those that the store has at that step already: they are read anew
/// at the next. Those whose gradients are there come first, and nobody hears of them before all of them are done.
fn advance(
    owner: &SharedOwner<'_>,
    k: &AdamwStep,
    held: &mut [HeldPage],
    updater: &mut dyn PageUpdater,
    kept: Option<&DeviceGradients>,
    here: Option<&DeviceGradients>,
) -> Result<u64, EngineError> {
    let layout = owner.store().layout();
    let is_here = |h: &HeldPage| here.is_some_and(|g| g.cover(&layout.page_range(h.page)));
    let (mut at_once, mut others): (Vec<_>, Vec<_>) = held.iter_mut().partition(|h| is_here(h));
    updater.hold_back(true);
    let first = advance_some(owner, k, &mut at_once, updater, here);
    updater.hold_back(false);
    Ok(first? + advance_some(owner, k, &mut others, updater, kept)?)
}

fn advance_some(
    owner: &SharedOwner<'_>,
    k: &AdamwStep,
    held: &mut [&mut HeldPage],
    updater: &mut dyn PageUpdater,
    kept: Option<&DeviceGradients>,
) -> Result<u64, EngineError> {
    let store = owner.store();
    let (mut in_hand, mut done) = (0, 0);
    for h in held {
        if store.entry(h.page).step == k.step {
            h.at = None;
            continue;
        }
        if in_hand == ADVANCING {
            updater.finish()?;
            in_hand -= 1;
        }
        let params = store.layout().page_range(h.page);
        with_gradients(kept, &params, |g| updater.advance(k, h, &DecayRun::of(store.layout(), &params), g))?;
        h.at = Some(k.step);
        in_hand += 1;
        done += 1;
    }
    for _ in 0..in_hand {
        updater.finish()?;
    }
    Ok(done)
}

/// Brings `page` to `k.step` from the step before, on the current rayon pool: an update that a device made, and took with it, made
/// again from the log of gradients.
///
/// # Errors
/// Those of the store, and of formats that AdamW does not know.
pub fn replay_page(owner: &SharedOwner<'_>, k: &AdamwStep, page: PageId) -> Result<(), EngineError> {
    let layout = owner.store().layout();
    let runs = DecayRun::of(layout, &layout.page_range(page));
    owner.update(page, k.step, |old, new, g| adamw_page(k, &runs, old, new, g)).map(drop)
}

/// Whether a held page is written back at `step`: all are where there is no log of gradients, otherwise each at every so many
/// steps as the log has, some at every step.
fn is_due(store: &Store, page: PageId, step: u64) -> bool {
    let every = store.layout().may_lag(page) + 1;
    (step + u64::from(page)).is_multiple_of(every) || store.entry(page).step + every <= step
}

/// Writes those held pages that are due, or all where `whole` says so, into the store, last page first: the next
/// backward pass, which overwrites their gradients, begins there. [`update_pages_recorded`] has brought them to `step`. One after
/// the other: between two of them the device's copies
/// stand still, and the gradients that the backward pass wants to be rid of get their turn.
///
/// # Errors
/// Those of the store and of the device; what was published stays so.
pub fn write_back(
    owner: &SharedOwner<'_>,
    step: u64,
    updater: &mut dyn PageUpdater,
    held: &[HeldPage],
    whole: bool,
) -> Result<(), EngineError> {
    for h in held.iter().rev().filter(|h| h.at == Some(step) && (whole || is_due(owner.store(), h.page, step))) {
        let Some(update) = owner.begin_behind(h.page, step)? else { continue };
        updater.write_back(&update, h)?;
        updater.finish()?;
        owner.publish(update)?;
    }
    Ok(())
}

/// Pages with state and gradients on the device that are updated there before they go out: beside the forward pass their kernels
/// wait for products to end, and some pages on their way keep the bus busy meanwhile.
const PREPARED: usize = 16;

/// What the device does next.
enum Next<'q> {
    /// Out with it.
    Prepared(&'q StagedPage),
    /// The whole update, from state that is there, or in the store where that is empty.
    Whole(PageId, &'q [DevBuf]),
}

impl Next<'_> {
    fn page(&self) -> PageId {
        match self {
            Next::Prepared(staged) => staged.page,
            Next::Whole(page, _) => *page,
        }
    }
}

pub(crate) fn on_device(
    owner: &SharedOwner<'_>,
    k: &AdamwStep,
    queue: &Queue,
    updater: &mut dyn PageUpdater,
    kept: Option<&DeviceGradients>,
    depth: usize,
) -> Result<u64, EngineError> {
    let layout = owner.store().layout();
    let mut in_hand: VecDeque<Update> = VecDeque::new();
    let mut prepared: VecDeque<&StagedPage> = VecDeque::new();
    let mut done = 0;
    // A page that was taken and has no spare yet: a snapshot needs what is in them.
    let mut taken = None;
    // After an error the updates in hand stay taken until the claim ends: the device may still write their spares.
    loop {
        if kept.is_some() && prepared.len() <= PREPARED / 2 {
            while let Some(staged) = if prepared.len() < PREPARED { queue.take_staged() } else { None } {
                // Whoever goes on after a death finds some pages done.
                if owner.store().entry(staged.page).step == k.step {
                    continue;
                }
                let params = layout.page_range(staged.page);
                with_gradients(kept, &params, |g| updater.prepare(k, staged, &DecayRun::of(layout, &params), g))?;
                prepared.push_back(staged);
            }
        }
        let mut take =
            || prepared.pop_front().map(Next::Prepared).or_else(|| queue.take_for_device().map(|(page, s)| Next::Whole(page, s)));
        if let Some(next) = taken.take().or_else(|| if in_hand.len() < depth { take() } else { None }) {
            let page = next.page();
            let begun = if in_hand.is_empty() {
                owner.begin(page, k.step)?.map_or(Begun::Done, Begun::Update)
            } else {
                owner.try_begin(page, k.step)?
            };
            match (begun, &next) {
                (Begun::Update(update), Next::Prepared(staged)) => {
                    updater.submit_prepared(k, &update, staged)?;
                    in_hand.push_back(update);
                    continue;
                }
                (Begun::Update(update), Next::Whole(_, state)) => {
                    let params = layout.page_range(page);
                    with_gradients(kept, &params, |g| updater.submit(k, &update, &DecayRun::of(layout, &params), state, g))?;
                    in_hand.push_back(update);
                    continue;
                }
                (Begun::Done, Next::Prepared(_)) => return Err(EngineError::internal(format!("page {page} was updated twice"))),
                (Begun::Done, Next::Whole(..)) => continue,
                // What is in hand is waited for, too: it is published first.
                (Begun::Pinned, _) => taken = Some(next),
            }
        }
        let Some(update) = in_hand.pop_front() else { return Ok(done) };
        updater.finish()?;
        owner.publish(update)?;
        done += 1;
    }
}
