//! Weights on the device: blocks that stay, and a ring of slots for those that are streamed.
//!
//! ```text
//!   schedule: the blocks that coming visits need, in order
//!   load(b):  CopyIn waits until the buffer is free ─► each page of b: host waits until it is published ─► copy ─► ready
//!                                                                          or delivered: nothing to copy ────────┘
//!   acquire:  Compute waits for ready        release: records free on Compute
//!   shared:   load(b) is decided ─► begun once this rank's share of b is published, in the order of decisions:
//!             CopyIn copies the share ─► Peers gathers the others' ─► ready
//! ```
//! Slots are filled ahead of use; the victim is the slot whose block is needed last. A block that stays is loaded again
//! once its pages are at a newer step. Where ranks share the loads out, all of them gather in one order: what is loaded, and
//! where to, is decided as if every page were published, so that it does not depend on time.
//!
//! In a step that is run again because its gang died with pages of it updated already, the weights of those pages come from where
//! their gradients were (`early::Ahead`).

use crate::api::EngineError;
use crate::early::Ahead;
use crate::model::{Model, Weights};
use ramtorch_cpu::{Collectives, kept_weights};
use ramtorch_device::trace::{Label, Wait};
use ramtorch_device::{DevBuf, Device, DirectWeights, Dtype, Event, Gang, Ranks, Stream};
use ramtorch_failpoint::{Point, hit};
use ramtorch_store::{PageId, Store};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

struct Buffer {
    buf: DevBuf,
    /// Block in it, and the step of its weights.
    holds: Option<(usize, u64)>,
    ready: Event,
    free: Event,
    in_use: bool,
}

/// See the module.
pub(crate) struct WeightCache {
    store: Arc<Store>,
    dtype: Dtype,
    places: Vec<(u64, u64)>,
    /// Index of the buffer of a block that stays.
    own: Vec<Option<usize>>,
    buffers: Vec<Buffer>,
    slots: std::ops::Range<usize>,
    schedule: VecDeque<usize>,
    version: u64,
    /// The gang, where there is one: waiting ends when it gives up.
    comm: Option<Arc<Collectives>>,
    /// Bytes copied to the device since they were last taken.
    pub bytes: u64,
    /// Ranks that share the loads out.
    ranks: Ranks,
    /// Loads that are decided and not begun: block and buffer.
    decided: VecDeque<(usize, usize)>,
    direct: Option<Arc<DirectWeights>>,
    /// Pages whose weights are in the place of their gradients.
    ahead: Option<Arc<Ahead>>,
}

impl WeightCache {
    /// Allocates buffers: one for each `resident` block, and `slots` for the others. `ranks` share the loads out.
    pub fn new(
        dev: &mut dyn Device,
        store: Arc<Store>,
        model: &Model,
        resident: &[bool],
        slots: usize,
        ranks: Ranks,
    ) -> Result<Self, EngineError> {
        let size = |b: usize| ranks.padded(model.places[b].1) * model.dtype.size();
        let mut buffers = Vec::new();
        let mut own = vec![None; model.len()];
        let mut add = |dev: &mut dyn Device, bytes: u64, what: &str| -> Result<usize, EngineError> {
            let buffer = Buffer { buf: dev.alloc(bytes, what)?, holds: None, ready: dev.event()?, free: dev.event()?, in_use: false };
            buffers.push(buffer);
            Ok(buffers.len() - 1)
        };
        for b in 0..model.len() {
            if resident[b] {
                own[b] = Some(add(dev, size(b), "weights that stay")?);
            }
        }
        let largest = (0..model.len()).filter(|b| !resident[*b]).map(size).max().unwrap_or(0);
        let mut first = usize::MAX;
        let mut end = 0;
        for _ in 0..if largest > 0 { slots } else { 0 } {
            let i = add(dev, largest, "a weight slot")?;
            (first, end) = (first.min(i), i + 1);
        }
        Ok(WeightCache {
            store,
            dtype: model.dtype,
            places: model.places.clone(),
            own,
            buffers,
            slots: first.min(end)..end,
            schedule: VecDeque::new(),
            version: 0,
            comm: None,
            bytes: 0,
            ranks,
            decided: VecDeque::new(),
            direct: None,
            ahead: None,
        })
    }

    /// Pages that are ahead of the step that is run again.
    pub fn set_ahead(&mut self, ahead: Arc<Ahead>) {
        self.ahead = Some(ahead);
    }

    /// Weights of `page` as of step `version` are in the place of its gradients.
    fn is_kept(&self, page: PageId, version: u64) -> bool {
        self.ahead.as_ref().is_some_and(|a| a.has(page, version))
    }

    /// This rank's gang.
    pub fn join(&mut self, comm: &Arc<Collectives>) {
        if self.ranks.world > 1 {
            self.ranks = comm.ranks();
        }
        self.comm = Some(comm.clone());
    }

    /// The gang, where there is one, goes on without this rank.
    pub fn give_up(&self) {
        if let Some(comm) = &self.comm {
            comm.abort();
        }
    }

    /// Announces the blocks that come, in the order in which they are acquired, with weights as of step `version`.
    pub fn plan_visits(&mut self, visits: impl IntoIterator<Item = usize>, version: u64) {
        self.schedule = visits.into_iter().collect();
        self.version = version;
    }

    fn find(&self, b: usize) -> Option<usize> {
        let current = |i: &usize| self.buffers[*i].holds == Some((b, self.version));
        match self.own[b] {
            Some(i) => Some(i).filter(current),
            None => self.slots.clone().find(current),
        }
    }

    /// How soon block `b` is needed again; `usize::MAX` for never.
    fn next_use(&self, b: usize) -> usize {
        self.schedule.iter().position(|x| *x == b).unwrap_or(usize::MAX)
    }

    /// The buffer that block `b`, needed at place `at` of the schedule, may be loaded into.
    fn victim(&self, b: usize, at: usize) -> Option<usize> {
        if let Some(i) = self.own[b] {
            return Some(i).filter(|i| !self.buffers[*i].in_use);
        }
        let need = |i: usize| match self.buffers[i].holds {
            Some((held, version)) if version == self.version => self.next_use(held),
            _ => usize::MAX,
        };
        let best = self.slots.clone().filter(|i| !self.buffers[*i].in_use).max_by_key(|i| (need(*i), usize::MAX - i))?;
        (need(best) > at).then_some(best)
    }

    /// Parameters of block `b` that this rank copies.
    fn own_part(&self, b: usize) -> std::ops::Range<u64> {
        let (start, len) = self.places[b];
        let own = self.ranks.own(len);
        start + own.start..start + own.end
    }

    /// Weights of the pages of block `b` can be had.
    fn published(&self, b: usize) -> bool {
        self.store.layout().pages_of(self.own_part(b)).all(|p| self.is_there(b, p))
    }

    /// Weights of page `p` can be had for block `b`.
    fn is_there(&self, b: usize, p: PageId) -> bool {
        self.was_published(p, self.version) || self.direct_of(b).is_some_and(|d| d.delivered(p, self.version))
    }

    /// `page` is published at `step` itself, or was when it went ahead.
    fn was_published(&self, page: PageId, step: u64) -> bool {
        self.store.entry(page).step == step || self.is_kept(page, step)
    }

    /// Who is told of weights that are written to the place of block `b`.
    fn direct_of(&self, b: usize) -> Option<&DirectWeights> {
        self.direct.as_deref().filter(|_| self.own[b].is_some())
    }

    /// Waits until all pages that lie in `params`, partly at least, are published at `step`, or were when they went ahead, or are
    /// no more steps behind than their gradients are kept for: those of the next step have a place then. Compute's waiting for
    /// that counts as waiting for pages.
    pub fn await_published(&self, dev: &dyn Device, params: std::ops::Range<u64>, step: u64) -> Result<(), EngineError> {
        let behind = |p: &PageId| {
            let at = self.store.entry(*p).step;
            let as_far = at <= step && step - at <= self.store.layout().may_lag(*p);
            !as_far && !self.is_kept(*p, step)
        };
        self.await_pages(dev, params, |page| !behind(&page))
    }

    /// Waits until `page` is published at `step` itself, or was when it went ahead: its state is that of the step.
    pub fn await_state(&self, dev: &dyn Device, page: PageId, step: u64) -> Result<(), EngineError> {
        self.await_pages(dev, self.store.layout().page_range(page), |page| self.was_published(page, step))
    }

    /// Waits until this rank's pages of block `b` are updated, published or not: what they were made of is read no more.
    pub fn await_updated(&self, dev: &dyn Device, b: usize) -> Result<(), EngineError> {
        self.await_pages(dev, self.own_part(b), |page| self.is_there(b, page))
    }

    /// Waits until all pages in `params` are `there`.
    fn await_pages(&self, dev: &dyn Device, params: std::ops::Range<u64>, there: impl Fn(PageId) -> bool) -> Result<(), EngineError> {
        let mut waiting = None;
        for page in self.store.layout().pages_of(params).filter(|page| !there(*page)) {
            if waiting.is_none() {
                waiting = Some(dev.begin(Stream::Compute, &Label::wait(Wait::Pages).page(page))?);
            }
            self.await_page(|| there(page))?;
        }
        match waiting {
            Some(stretch) => dev.end(Stream::Compute, stretch),
            None => Ok(()),
        }
    }

    /// Waits for a page's being `there`. Pages of other ranks come when their owners are done.
    fn await_page(&self, there: impl Fn() -> bool) -> Result<(), EngineError> {
        let mut tries = 0u32;
        while !there() {
            tries += 1;
            if self.comm.as_ref().is_some_and(|c| c.aborted()) {
                return Err(EngineError::internal("the optimizer has given up"));
            }
            if tries < 256 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }

    fn load(&mut self, dev: &dyn Device, b: usize, into: usize) -> Result<(), EngineError> {
        self.buffers[into].holds = Some((b, self.version));
        if self.ranks.world == 1 {
            return self.begin_load(dev, b, into);
        }
        self.decided.push_back((b, into));
        self.begin_loads(dev)
    }

    /// Begins decided loads as far as pages are published.
    fn begin_loads(&mut self, dev: &dyn Device) -> Result<(), EngineError> {
        while let Some(&(b, into)) = self.decided.front().filter(|d| self.published(d.0)) {
            self.decided.pop_front();
            self.begin_load(dev, b, into)?;
        }
        Ok(())
    }

    /// Whether the weights of each block stay on the device.
    pub fn stay(&self) -> Vec<bool> {
        self.own.iter().map(Option::is_some).collect()
    }

    /// Weights of blocks that stay, for an updater that writes them itself: what this rank copies of them. Comes after
    /// [`WeightCache::join`].
    pub fn direct(&mut self) -> Arc<DirectWeights> {
        let place = |b: usize| {
            let (start, part) = (self.places[b].0, self.own_part(b));
            let (at, bytes) = ((part.start - start) * self.dtype.size(), (part.end - part.start) * self.dtype.size());
            self.own[b].filter(|_| bytes > 0).map(|i| (part, self.buffers[i].buf.slice(at, bytes)))
        };
        let direct = Arc::new(DirectWeights::new(self.store.layout(), (0..self.places.len()).filter_map(place).collect()));
        self.direct = Some(direct.clone());
        direct
    }

    /// Begins decided loads up to that of block `b`, of all blocks without one; waits for their pages.
    pub fn settle(&mut self, dev: &dyn Device, b: Option<usize>) -> Result<(), EngineError> {
        while let Some(&(first, into)) = self.decided.front().filter(|_| b.is_none_or(|b| self.decided.iter().any(|d| d.0 == b))) {
            self.decided.pop_front();
            self.begin_load(dev, first, into)?;
        }
        Ok(())
    }

    fn begin_load(&mut self, dev: &dyn Device, b: usize, into: usize) -> Result<(), EngineError> {
        let (start, part) = (self.places[b].0, self.own_part(b));
        let buffer = &self.buffers[into];
        let shared = self.ranks.world > 1;
        dev.wait(Stream::CopyIn, buffer.free)?;
        if shared {
            // What was gathered into it last may never have been used.
            dev.wait(Stream::CopyIn, buffer.ready)?;
        }
        let layout = self.store.layout();
        let (direct, version) = (self.direct.clone().filter(|_| self.own[b].is_some()), self.version);
        let delivered = |page: PageId| direct.as_ref().is_some_and(|d| d.delivered(page, version));
        // What counts as waiting is not the host's time, but that in which Compute has run out of work.
        let mut waiting = None;
        for page in layout.pages_of(part.clone()) {
            let kept = self.is_kept(page, version);
            let there = || kept || delivered(page) || self.store.entry(page).step == self.version;
            if !there() {
                if waiting.is_none() {
                    waiting = Some(dev.begin(Stream::Compute, &Label::wait(Wait::Pages).block(b))?);
                }
                self.await_page(there)?;
            }
            if delivered(page) {
                continue;
            }
            let range = layout.page_range(page);
            let (from, to) = (range.start.max(part.start), range.end.min(part.end));
            let bytes = (to - from) * self.dtype.size();
            let dst = buffer.buf.slice((from - start) * self.dtype.size(), bytes);
            let stretch = dev.begin(Stream::CopyIn, &Label::copy("load weights", bytes).block(b).page(page))?;
            if kept {
                dev.upload(Stream::CopyIn, dst, &kept_weights(&self.store, self.dtype, from..to, version + 1)?)?;
                hit(Point::RerunLoaded);
            } else {
                dev.load_parameters(Stream::CopyIn, dst, &self.store, self.store.entry(page).physical, from - range.start, to - from)?;
            }
            dev.end(Stream::CopyIn, stretch)?;
            self.bytes += bytes;
        }
        if let Some(stretch) = waiting {
            dev.end(Stream::Compute, stretch)?;
        }
        dev.record(buffer.ready, Stream::CopyIn)?;
        if !shared {
            return Ok(());
        }
        let whole = buffer.buf.slice(0, self.ranks.padded(self.places[b].1) * self.dtype.size());
        dev.wait(Stream::Peers, buffer.ready)?;
        let stretch = dev.begin(Stream::Peers, &Label::collective("gather weights").bytes(whole.bytes).block(b))?;
        dev.all_gather(whole)?;
        dev.end(Stream::Peers, stretch)?;
        dev.record(buffer.ready, Stream::Peers)
    }

    /// Starts loads for coming visits as far as buffers are free and pages published.
    pub fn prefetch(&mut self, dev: &dyn Device) -> Result<(), EngineError> {
        self.begin_loads(dev)?;
        // Every block's next visit is looked at once: a step of many groups has thousands of visits.
        let mut seen = vec![false; self.places.len()];
        let mut left = seen.len();
        for at in 0..self.schedule.len() {
            let b = self.schedule[at];
            if std::mem::replace(&mut seen[b], true) {
                continue;
            }
            left -= 1;
            if self.find(b).is_some() {
                if left == 0 {
                    return Ok(());
                }
                continue;
            }
            let Some(i) = self.victim(b, at) else {
                if self.own[b].is_some() {
                    continue; // in use with older weights: cannot happen within a step
                }
                return Ok(());
            };
            if self.ranks.world == 1 && !self.published(b) {
                return Ok(());
            }
            self.load(dev, b, i)?;
            if left == 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Weights of the blocks `needs`, which must be the next of the schedule. Compute waits for them.
    pub fn acquire(&mut self, dev: &dyn Device, needs: &[usize]) -> Result<Vec<Weights>, EngineError> {
        let mut held = Vec::with_capacity(needs.len());
        for &b in needs {
            let i = match self.find(b) {
                Some(i) => i,
                None => {
                    let i = self
                        .victim(b, 0)
                        .or_else(|| self.any_free())
                        .ok_or_else(|| EngineError::internal("no slot is free for the next block"))?;
                    self.load(dev, b, i)?;
                    i
                }
            };
            self.settle(dev, Some(b))?;
            self.buffers[i].in_use = true;
            dev.wait_measured(Stream::Compute, self.buffers[i].ready, &Label::wait(Wait::Weights).block(b))?;
            held.push(i);
            if self.schedule.front() == Some(&b) {
                self.schedule.pop_front();
            }
        }
        self.prefetch(dev)?;
        Ok(held
            .iter()
            .zip(needs)
            .map(|(i, b)| Weights { buf: self.buffers[*i].buf.slice(0, self.places[*b].1 * self.dtype.size()), dtype: self.dtype })
            .collect())
    }

    fn any_free(&self) -> Option<usize> {
        self.slots.clone().find(|i| !self.buffers[*i].in_use)
    }

    /// The visit is enqueued: its buffers are free once Compute gets there.
    pub fn release(&mut self, dev: &dyn Device, needs: &[usize]) -> Result<(), EngineError> {
        for b in needs {
            if let Some(i) = self.find(*b) {
                self.buffers[i].in_use = false;
                dev.record(self.buffers[i].free, Stream::Compute)?;
            }
        }
        self.prefetch(dev)
    }
}
