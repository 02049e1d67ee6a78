//! Everything a rank holds on its device, and the sweeps over it.
//!
//! ```text
//!   group:  inputs up ─► forward sweep: block 0 … n-2, every micro-batch ─► last block: loss and its gradient
//!           ─► backward sweep: block n-2 … 0, every micro-batch ─► gradients of each block out as it is done
//! ```
//! All buffers are allocated in [`Session::new`], from the plan; a sweep allocates nothing and waits for nothing on the
//! host but for pages that their owners have not published yet.

use crate::api::EngineError;
use crate::batch::{HostBatch, InputBuffers, Part, Reader};
use crate::early::Ahead;
use crate::model::{Grads, Keep, LossGrads, MicroBatch, Model, Shape, Tables, Visit, Weights};
use crate::plan::{EnginePlan, GRADIENT_RING, held_pages, rope_table_bytes, staged_pages};
use crate::weights::WeightCache;
use ramtorch_cpu::Collectives;
use ramtorch_device::trace::{Label, Wait};
use ramtorch_device::{
    AttentionShape, DevBuf, Device, DeviceGradients, Dtype, Event, Gang, GradientPiece, HeldPage, Ranks, StagedPage, Stream, staged_rooms,
    state_bytes,
};
use ramtorch_failpoint::{Point, hit};
use ramtorch_modelio::Architecture;
use ramtorch_store::{GradientFormat, PageId, Store};
use std::sync::Arc;

struct GradientBuffer {
    buf: DevBuf,
    /// Its last contents are out.
    free: Event,
    full: Event,
}

/// Gradient buffers: one a block, or a ring (and one for an embedding that the head shares).
struct GradientBuffers {
    buffers: Vec<GradientBuffer>,
    /// Buffer of a block that has its own.
    own: Vec<Option<usize>>,
    ring: std::ops::Range<usize>,
    next: usize,
    /// Rounded gradients on their way out, used in turn; none where the copy stream rounds.
    packed: Vec<GradientBuffer>,
    next_packed: usize,
    /// Of blocks whose rounded gradients stay for held pages.
    packed_of: Vec<Option<GradientBuffer>>,
    /// Blocks whose rounded gradients are copied to where their sums were, and stay there for held pages.
    copied_back: Vec<bool>,
    /// Gradients stay on the device, in this format: in the sums' own buffers, or rounded in `kept`.
    stay: Option<GradientFormat>,
    /// One a block where rounded sums stay.
    kept: Vec<DevBuf>,
}

/// See the module.
pub(crate) struct Session {
    pub dev: Box<dyn Device>,
    pub model: Model,
    pub store: Arc<Store>,
    pub weights: WeightCache,
    shape: Shape,
    tables: Tables,
    scratch: DevBuf,
    inputs: Vec<InputBuffers>,
    losses: DevBuf,
    /// `[block][micro-batch]`: what the block put out.
    boundaries: Vec<Vec<DevBuf>>,
    /// Gradient that travels down, a micro-batch.
    d: Vec<DevBuf>,
    keep: Vec<Keep>,
    /// `[block][micro-batch]`, empty for blocks that are recomputed.
    saved: Vec<Vec<DevBuf>>,
    shared_saved: Option<DevBuf>,
    gradients: Option<GradientBuffers>,
    /// After the last copy of each block's gradients.
    outs: Vec<Event>,
    /// Σ of the squares of each block's gradients, f64, where the device works them out.
    squares: Option<DevBuf>,
    staging: Option<Staging>,
    /// Memory for pages whose state stays on the device.
    held_rooms: Vec<DevBuf>,
    /// Memory for those that visit, and the blocks whose sums of gradients it belongs to: from the last on.
    visiting_rooms: Vec<(usize, DevBuf)>,
    visiting: Vec<Visiting>,
    /// Those pages, until the optimizer takes them.
    held: Vec<HeldPage>,
    pub bytes_out: u64,
    ranks: Ranks,
    /// Pages whose gradients of the step that is run again are not wanted.
    ahead: Option<Arc<Ahead>>,
    /// Nothing that was enqueued still needs the other ranks.
    closed: bool,
}

/// Pages whose state is brought to the device during the backward pass (`plan::staging`).
struct Staging {
    /// Pages of each block, at most.
    most: Vec<usize>,
    /// Of each block: the pages that go into its activations.
    pages: Vec<Vec<PageId>>,
    /// After each block's backward visit.
    visited: Vec<Event>,
    /// Those of the step that is enqueued.
    staged: Vec<StagedPage>,
}

/// A page whose state lies where block `block`'s sum was, from the end of that sum to the beginning of the next step's.
struct Visiting {
    block: usize,
    page: PageId,
    state: Vec<DevBuf>,
}

/// Sequences of one step on one rank, cut up.
pub(crate) struct StepBatches {
    /// Indices of the sequences of each micro-batch.
    pub micro: Vec<Vec<u64>>,
    /// Micro-batches of each group.
    pub groups: Vec<std::ops::Range<usize>>,
}

impl StepBatches {
    /// Cuts `indices` into micro-batches, and those into at most `groups` groups of at most `group_len`.
    pub fn new(indices: &[u64], micro_batch: usize, group_len: usize) -> Self {
        let micro: Vec<Vec<u64>> = indices.chunks(micro_batch.max(1)).map(<[u64]>::to_vec).collect();
        let groups = (0..micro.len()).step_by(group_len.max(1)).map(|a| a..(a + group_len).min(micro.len())).collect();
        StepBatches { micro, groups }
    }
}

impl Session {
    /// Opens buffers for `plan`. Without `train` there are none for gradients, and activations are not kept. Where the plan
    /// has several ranks, [`Session::join`] comes before the first sweep.
    pub fn new(mut dev: Box<dyn Device>, model: Model, store: Arc<Store>, plan: &EnginePlan, train: bool) -> Result<Session, EngineError> {
        let d = dev.as_mut();
        let begin = std::time::Instant::now();
        d.register_store(&store)?;
        tracing::info!("{} bytes of the store made reachable for {} in {:.1} s", store.len(), d.name(), begin.elapsed().as_secs_f64());
        // The page updater takes its own staging, later.
        d.reserve(plan.uses.allocated() - plan.uses.optimizer)?;
        let shape = plan.shape();
        let rows = shape.rows() as u64;
        let dt = model.dtype.size();
        let tables = Tables { rope: rope_table(d, &model.architecture, plan.seq)? };
        let needed = {
            // Asking makes the device's plans for these shapes: none is left for the first step.
            let ask = |s: &AttentionShape| d.attention_workspace(s);
            model.scratch_bytes(shape, &|s| plan.attention_workspace(s, &ask))?
        };
        let scratch = d.alloc(needed.max(plan.uses.scratch), "scratch")?;
        let weights = WeightCache::new(d, store.clone(), &model, &plan.resident, plan.slots, plan.loading_ranks())?;
        let last = model.len() - 1;
        let group = plan.group_len;
        let gradients = if train { Some(GradientBuffers::new(d, &model, plan)?) } else { None };
        let outs = (0..if train { model.len() } else { 0 }).map(|_| d.event()).collect::<Result<_, _>>()?;
        let squares = if train && plan.squares() { Some(d.alloc(8 * model.len() as u64, "squares of gradients")?) } else { None };
        let inputs = (0..group).map(|_| InputBuffers::new(d, &model, shape)).collect::<Result<_, _>>()?;
        let losses = d.alloc(rows * 4 * plan.micro_batches as u64, "losses")?;
        let widest = (0..model.len()).map(|b| model.width(b)).max().unwrap_or(0) as u64;
        let mut boundaries: Vec<Vec<DevBuf>> = Vec::new();
        let mut travelling = Vec::new();
        if plan.forward_only() {
            // What a block puts out takes the place of its input's input.
            for _ in 0..2 {
                boundaries.push((0..group).map(|_| d.alloc(rows * widest * dt, "block inputs")).collect::<Result<_, _>>()?);
            }
            boundaries = (0..last).map(|b| boundaries[b % 2].clone()).collect();
        } else {
            for b in 0..last {
                let width = model.width(b) as u64;
                boundaries.push((0..group).map(|_| d.alloc(rows * width * dt, "block inputs")).collect::<Result<Vec<_>, _>>()?);
            }
            travelling = (0..group).map(|_| d.alloc(rows * widest * dt, "block gradients")).collect::<Result<Vec<_>, _>>()?;
        }
        let mut saved = vec![Vec::new(); last];
        for b in 0..last {
            let keep = plan.keep[b];
            if keep != Keep::Inputs {
                saved[b] = (0..group).map(|_| d.alloc(model.saved_bytes(b, shape, keep), "activations")).collect::<Result<Vec<_>, _>>()?;
            }
        }
        let shared = (0..last).map(|b| model.saved_bytes(b, shape, Keep::Inputs)).max().unwrap_or(0);
        let staging = if train && plan.staged_pages.iter().any(|n| *n > 0) {
            let visited = (0..last).map(|_| d.event()).collect::<Result<_, _>>()?;
            Some(Staging { most: plan.staged_pages.clone(), pages: vec![Vec::new(); last], visited, staged: Vec::new() })
        } else {
            None
        };
        let page_bytes = HeldPage::bytes(store.layout().spec(), u64::from(store.layout().page_parameters()));
        let held_rooms = (0..if train { plan.held_pages } else { 0 })
            .map(|_| d.alloc(page_bytes, "optimizer state that stays"))
            .collect::<Result<_, EngineError>>()?;
        let visiting_rooms = match &gradients {
            Some(g) if plan.visiting_pages > 0 => {
                let rooms = plan.visiting_rooms(&model);
                let room = |(b, offset): (usize, u64)| Some((b, g.buffers[g.own[b]?].buf.slice(offset, page_bytes)));
                rooms.into_iter().take(plan.visiting_pages).filter_map(room).collect()
            }
            _ => Vec::new(),
        };
        let any = (0..last).any(|b| plan.keep[b] == Keep::Inputs);
        let shared_saved = if any { Some(d.alloc(shared, "recomputed activations")?) } else { None };
        Ok(Session {
            dev,
            model,
            store,
            weights,
            shape,
            tables,
            scratch,
            inputs,
            losses,
            boundaries,
            d: travelling,
            keep: plan.keep.clone(),
            saved,
            shared_saved,
            gradients,
            outs,
            squares,
            staging,
            held_rooms,
            visiting_rooms,
            visiting: Vec::new(),
            held: Vec::new(),
            bytes_out: 0,
            ranks: plan.ranks(),
            ahead: None,
            closed: false,
        })
    }

    /// Connects the device with those of the other ranks; all ranks come here together.
    pub fn join(&mut self, comm: &Arc<Collectives>) -> Result<(), EngineError> {
        self.weights.join(comm);
        self.ranks = comm.ranks();
        self.own_pages();
        if comm.world() == 1 {
            return Ok(());
        }
        let begin = std::time::Instant::now();
        let gang: Arc<dyn Gang> = comm.clone();
        self.dev.join_gang(&gang)?;
        tracing::info!("{} joined a gang of {} ranks in {:.2} s", self.dev.name(), comm.world(), begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// The next step was begun by a gang that died, and these pages are ahead of it: its gradients of them are not stored, and
    /// their weights come from where those would be.
    pub fn set_ahead(&mut self, ahead: Arc<Ahead>) {
        self.weights.set_ahead(ahead.clone());
        self.ahead = Some(ahead);
    }

    /// The end, after a step or a validation that all ranks have finished.
    pub fn close(mut self) {
        self.closed = true;
    }

    fn saved(&self, b: usize, m: usize) -> Result<DevBuf, EngineError> {
        self.saved[b].get(m).copied().or(self.shared_saved).ok_or_else(|| EngineError::internal("no buffer for activations"))
    }

    /// Input of block `b` for micro-batch `m` of the group.
    fn input(&self, b: usize, m: usize, mb: &MicroBatch) -> DevBuf {
        if b == 0 { mb.input } else { self.boundaries[b - 1][m] }
    }

    /// Blocks in the order in which a training step (or an evaluation) acquires their weights.
    pub fn visits(&self, groups: usize, train: bool) -> Vec<usize> {
        let n = self.model.len();
        let mut list = Vec::new();
        for _ in 0..groups {
            list.extend((0..n).flat_map(|b| self.model.forward_needs(b)));
            if train {
                list.extend((0..n - 1).rev().filter(|b| self.model.backward_needs(*b)));
            }
        }
        list
    }

    /// Reads a group's micro-batches and sends them up.
    fn upload(
        &mut self,
        reader: &Reader,
        part: Part,
        batches: &StepBatches,
        group: std::ops::Range<usize>,
        host: &mut HostBatch,
    ) -> Result<Vec<MicroBatch>, EngineError> {
        let rows = self.shape.rows() as u64;
        group
            .enumerate()
            .map(|(m, i)| {
                reader.read(part, &batches.micro[i], host)?;
                let losses = self.losses.slice(i as u64 * rows * 4, rows * 4);
                reader.upload(self.dev.as_ref(), &self.inputs[m], host, losses)
            })
            .collect()
    }

    fn forward(&mut self, mbs: &[MicroBatch]) -> Result<(), EngineError> {
        for b in 0..self.model.len() - 1 {
            let needs = self.model.forward_needs(b);
            let w = self.weights.acquire(self.dev.as_ref(), &needs)?;
            for (m, mb) in mbs.iter().enumerate() {
                let (x, y, saved) = (self.input(b, m, mb), self.boundaries[b][m], self.saved(b, m)?);
                let v = Visit { dev: self.dev.as_ref(), shape: self.shape, tables: self.tables, mb, scratch: self.scratch };
                let stretch = self.dev.begin(Stream::Compute, &Label::work("forward").block(b).micro_batch(m))?;
                self.model.forward(b, &v, w[0], x, saved, self.keep[b], y)?;
                self.dev.end(Stream::Compute, stretch)?;
            }
            self.weights.release(self.dev.as_ref(), &needs)?;
        }
        Ok(())
    }

    fn last(&mut self, mbs: &[MicroBatch], scale: Option<f32>, grads: Option<(Grads, Option<Grads>)>) -> Result<(), EngineError> {
        let last = self.model.len() - 1;
        let needs = self.model.forward_needs(last);
        let w: Vec<Weights> = self.weights.acquire(self.dev.as_ref(), &needs)?;
        for (m, mb) in mbs.iter().enumerate() {
            let x = self.input(last, m, mb);
            let v = Visit { dev: self.dev.as_ref(), shape: self.shape, tables: self.tables, mb, scratch: self.scratch };
            let train = match (scale, grads) {
                (Some(scale), Some((grads, tied))) => Some(LossGrads { scale, d: self.d[m], grads, tied }),
                _ => None,
            };
            let stretch = self.dev.begin(Stream::Compute, &Label::work("head").block(last).micro_batch(m))?;
            self.model.loss(&v, &w, x, train.as_ref())?;
            self.dev.end(Stream::Compute, stretch)?;
        }
        self.weights.release(self.dev.as_ref(), &needs)
    }

    /// One training step's sweeps on this rank: gradients of `scale` × Σ weighted loss, reduced over ranks into the
    /// store. `before` is the step before: gradients of a page are overwritten only when the page is published at it. Everything
    /// is enqueued when this returns; [`Session::finish_gradients`] waits. `closed` is called with each block whose complete
    /// gradients are on their way, last block first.
    pub fn train_step(
        &mut self,
        reader: &Reader,
        batches: &StepBatches,
        scale: f32,
        groups: usize,
        before: u64,
        closed: &mut dyn FnMut(&Session, usize) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let mut host = HostBatch::default();
        let mut settled = false;
        // Ranks with fewer groups take part in every reduction all the same.
        for g in 0..groups {
            let mbs = match batches.groups.get(g) {
                Some(range) => self.upload(reader, Part::Train, batches, range.clone(), &mut host)?,
                None => Vec::new(),
            };
            self.forward(&mbs)?;
            let final_group = g + 1 == groups;
            let last = self.model.len() - 1;
            if g == 0 && self.gradients.as_ref().is_some_and(GradientBuffers::stay_in_place) {
                // The optimizer reads the very buffers that are opened next.
                self.weights.await_published(self.dev.as_ref(), 0..self.store.layout().span(), before)?;
            }
            let first = (g == 0).then_some(before);
            let tied = if self.model.tied() { Some(self.open_gradient(0, first)?) } else { None };
            let own = self.open_gradient(last, first)?;
            self.last(&mbs, Some(scale), Some((own, tied)))?;
            if !settled {
                hit(Point::StepForward);
                // All gathers come before the first reduction.
                self.weights.settle(self.dev.as_ref(), None)?;
                settled = true;
            }
            self.close_gradient(last, g, final_group, before)?;
            if final_group {
                self.fetch_visiting(last)?;
                closed(self, last)?;
            }
            for b in (0..last).rev() {
                let needs: Vec<usize> = if self.model.backward_needs(b) { vec![b] } else { vec![] };
                let w = self.weights.acquire(self.dev.as_ref(), &needs)?;
                let grads = match tied.filter(|_| b == 0) {
                    Some(g) => g,
                    None => self.open_gradient(b, first)?,
                };
                for (m, mb) in mbs.iter().enumerate() {
                    let (x, saved) = (self.input(b, m, mb), self.saved(b, m)?);
                    let v = Visit { dev: self.dev.as_ref(), shape: self.shape, tables: self.tables, mb, scratch: self.scratch };
                    if self.keep[b] == Keep::Inputs && !w.is_empty() {
                        let stretch = self.dev.begin(Stream::Compute, &Label::work("recompute").block(b).micro_batch(m))?;
                        self.model.recompute(b, &v, w[0], x, saved)?;
                        self.dev.end(Stream::Compute, stretch)?;
                    }
                    let stretch = self.dev.begin(Stream::Compute, &Label::work("backward").block(b).micro_batch(m))?;
                    self.model.backward(b, &v, w.first().copied(), x, saved, self.keep[b], self.d[m], grads)?;
                    self.dev.end(Stream::Compute, stretch)?;
                }
                self.weights.release(self.dev.as_ref(), &needs)?;
                self.close_gradient(b, g, final_group, before)?;
                if final_group {
                    self.fetch_visiting(b)?;
                    self.stage(b)?;
                    closed(self, b)?;
                }
            }
        }
        Ok(())
    }

    /// This rank's pages are those that it may hold, and stage.
    fn own_pages(&mut self) {
        let layout = self.store.layout();
        let rooms = std::mem::take(&mut self.held_rooms);
        let visiting = std::mem::take(&mut self.visiting_rooms);
        let mut pages = held_pages(layout, &self.weights.stay(), rooms.len() + visiting.len(), self.ranks);
        let mut others = pages.split_off(pages.len().min(rooms.len()));
        // What is not written back at every step has to stay.
        others.retain(|page| layout.may_lag(*page) == 0);
        self.held = pages.into_iter().zip(rooms).map(|(page, room)| HeldPage::new(layout, page, room)).collect();
        // The last page leaves first, and the last block's sum is wanted first.
        for (i, page) in others.iter().enumerate() {
            let (block, room) = visiting[others.len() - 1 - i];
            let held = HeldPage::new(layout, *page, room);
            self.visiting.push(Visiting { block, page: *page, state: held.state.clone() });
            self.held.push(held);
        }
        let parts = |bufs: &Vec<DevBuf>| bufs.iter().map(|buf| staged_rooms(layout, *buf).len()).sum();
        let rooms: Vec<usize> = self.saved.iter().map(parts).collect();
        if let Some(staging) = &mut self.staging {
            staging.pages = staged_pages(layout, self.ranks.rank as u32, &self.model.places, &rooms, &staging.most);
            for pages in &mut staging.pages {
                pages.retain(|p| self.held.binary_search_by_key(p, |h| h.page).is_err());
            }
        }
    }

    /// Begins to bring the state of pages to where block `b`'s sum of gradients was, which is closed for this step.
    fn fetch_visiting(&self, b: usize) -> Result<(), EngineError> {
        let (dev, layout) = (self.dev.as_ref(), self.store.layout());
        let bytes = state_bytes(layout.spec());
        let mut first = true;
        for visiting in self.visiting.iter().filter(|v| v.block == b) {
            let g = self.gradients.as_ref().ok_or_else(|| EngineError::internal("this session does not train"))?;
            if std::mem::take(&mut first) {
                // Rounded, and copied back.
                dev.wait(Stream::CopyIn, g.buffers[g.buffer_of(b)].free)?;
            }
            let range = layout.page_range(visiting.page);
            let stretch = dev.begin(Stream::CopyIn, &Label::copy("fetch page", (range.end - range.start) * bytes).page(visiting.page))?;
            let mut parts = visiting.state.iter().copied();
            StagedPage::load(dev, &self.store, visiting.page, || parts.next())?;
            dev.end(Stream::CopyIn, stretch)?;
        }
        Ok(())
    }

    /// Begins to bring the state of pages to where activations of block `b` were, whose backward visit is enqueued.
    fn stage(&mut self, b: usize) -> Result<(), EngineError> {
        let Some(staging) = self.staging.as_mut().filter(|s| !s.pages[b].is_empty()) else { return Ok(()) };
        let dev = self.dev.as_ref();
        dev.record(staging.visited[b], Stream::Compute)?;
        dev.wait(Stream::CopyIn, staging.visited[b])?;
        let layout = self.store.layout();
        let bytes = state_bytes(layout.spec());
        let mut parts = self.saved[b].iter().flat_map(|buf| staged_rooms(layout, *buf));
        for &page in &staging.pages[b] {
            let range = layout.page_range(page);
            let stretch = dev.begin(Stream::CopyIn, &Label::copy("stage page", (range.end - range.start) * bytes).page(page))?;
            staging.staged.push(StagedPage::load(dev, &self.store, page, || parts.next())?);
            dev.end(Stream::CopyIn, stretch)?;
        }
        Ok(())
    }

    /// The pages whose state stays on the device, ascending, for the optimizer.
    pub fn take_held(&mut self) -> Vec<HeldPage> {
        std::mem::take(&mut self.held)
    }

    /// The pages that were staged in the step that has just ended; blocks until they are there.
    pub fn take_staged(&mut self) -> Result<Vec<StagedPage>, EngineError> {
        let staged = self.staging.as_mut().map(|s| std::mem::take(&mut s.staged)).unwrap_or_default();
        // Those that visit are there then, too.
        if !staged.is_empty() || !self.visiting.is_empty() {
            self.dev.synchronize(Stream::CopyIn)?;
        }
        Ok(staged)
    }

    /// Σ of the squares of this step's gradients, where the device works it out (`EnginePlan::squares`); blocks until it has.
    pub fn squares_by_device(&self) -> Result<f64, EngineError> {
        let buf = self.squares.ok_or_else(|| EngineError::internal("the device does not square gradients"))?;
        let mut raw = vec![0u8; 8 * self.model.len()];
        self.dev.download(Stream::Compute, buf.slice(0, raw.len() as u64), &mut raw)?;
        // In the order of blocks.
        Ok(raw.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).sum())
    }

    /// Whether this rank's gradients of block `b` of a step, which are on their way, lie in the store; waits for them where `wait`
    /// says so. The backward pass goes on meanwhile.
    pub fn is_out(&self, b: usize, wait: bool) -> Result<bool, EngineError> {
        if wait {
            self.dev.synchronize_event(self.outs[b])?;
            return Ok(true);
        }
        self.dev.is_done(self.outs[b])
    }

    /// Pages, ascending, whose state goes to the device before the optimizer begins, or stays there.
    pub fn device_pages(&self) -> Vec<PageId> {
        let staged = self.staging.iter().flat_map(|s| s.pages.iter().flatten().copied());
        let mut pages: Vec<PageId> = staged.chain(self.held.iter().map(|h| h.page)).collect();
        pages.sort_unstable();
        pages
    }

    /// Blocks until every gradient of the step is where it belongs.
    pub fn finish_gradients(&self) -> Result<(), EngineError> {
        if self.gradients.as_ref().is_some_and(|g| g.stay.is_some()) {
            self.dev.synchronize(Stream::Compute)?;
        }
        self.dev.synchronize(Stream::CopyOut)
    }

    /// Where rounded gradients are that stay for held pages; those of other pages are not among them.
    pub fn held_gradients(&self) -> Option<DeviceGradients> {
        let g = self.gradients.as_ref()?;
        let of_block = |(b, (start, len)): (usize, &(u64, u64))| {
            let buf = g.rounded_of(b)?.slice(0, len * GradientFormat::Bf16.bytes());
            Some(GradientPiece { first: *start, end: start + len, buf })
        };
        let pieces: Vec<GradientPiece> = self.model.places.iter().enumerate().filter_map(of_block).collect();
        (!pieces.is_empty()).then(|| DeviceGradients::of_some(GradientFormat::Bf16, pieces))
    }

    /// Where gradients are that stay on the device.
    pub fn device_gradients(&self) -> Option<DeviceGradients> {
        let g = self.gradients.as_ref()?;
        let format = g.stay?;
        let of_block = |(b, (start, len)): (usize, &(u64, u64))| {
            let buf = g.kept.get(b).copied().or_else(|| Some(g.buffers[g.own[b]?].buf))?;
            Some(GradientPiece { first: *start, end: start + len, buf: buf.slice(0, len * format.bytes()) })
        };
        let pieces: Option<Vec<GradientPiece>> = self.model.places.iter().enumerate().map(of_block).collect();
        Some(DeviceGradients::new(format, pieces?))
    }

    /// Σ of the losses of the micro-batches of a step.
    pub fn sum_losses(&self, batches: &StepBatches) -> Result<f64, EngineError> {
        let mut sum = 0f64;
        self.add_losses(batches, &mut sum)?;
        Ok(sum)
    }

    /// Adds the losses of micro-batches to `sum`, one after the other.
    fn add_losses(&self, batches: &StepBatches, sum: &mut f64) -> Result<(), EngineError> {
        let rows = self.shape.rows();
        let mut raw = vec![0u8; rows * 4 * batches.micro.len()];
        self.dev.download(Stream::Compute, self.losses.slice(0, raw.len() as u64), &mut raw)?;
        for (i, micro) in batches.micro.iter().enumerate() {
            let part = &raw[i * rows * 4..][..micro.len() * self.shape.seq * 4];
            *sum += part.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c) as f64).sum::<f64>();
        }
        Ok(())
    }

    /// Adds the weighted losses of the sequences `indices` to `total`, forward only. `most` is how many the rank with most of them
    /// has: all make the same visits, since they may load weights together.
    pub fn evaluate(
        &mut self,
        reader: &Reader,
        part: Part,
        indices: &[u64],
        most: usize,
        micro_batches: usize,
        version: u64,
        total: &mut f64,
    ) -> Result<(), EngineError> {
        let mut host = HostBatch::default();
        let at_once = (self.shape.sequences * micro_batches).max(1);
        for at in (0..most.max(indices.len())).step_by(at_once) {
            let some = &indices[at.min(indices.len())..(at + at_once).min(indices.len())];
            let groups = (most.max(indices.len()) - at).min(at_once).div_ceil(self.shape.sequences).div_ceil(self.inputs.len());
            let batches = StepBatches::new(some, self.shape.sequences, self.inputs.len());
            self.weights.plan_visits(self.visits(groups, false), version);
            for g in 0..groups {
                let range = batches.groups.get(g).cloned().unwrap_or(0..0);
                let mbs = self.upload(reader, part, &batches, range, &mut host)?;
                self.forward(&mbs)?;
                self.last(&mbs, None, None)?;
            }
            self.add_losses(&batches, total)?;
        }
        Ok(())
    }

    /// The gradient buffer of block `b`, zeroed when it is opened for a new sum. `first_of`: by the first group of the step after that one.
    fn open_gradient(&mut self, b: usize, first_of: Option<u64>) -> Result<Grads, EngineError> {
        let len = self.model.places[b].1 * 4;
        let (dev, first_group) = (self.dev.as_ref(), first_of.is_some());
        if let Some(before) = first_of {
            for visiting in self.visiting.iter().filter(|v| v.block == b) {
                // They are in the store when they are published.
                self.weights.await_published(dev, self.store.layout().page_range(visiting.page), before)?;
            }
        }
        let g = self.gradients.as_mut().ok_or_else(|| EngineError::internal("this session does not train"))?;
        let i = g.buffer_of(b);
        let buffer = &g.buffers[i];
        let buf = buffer.buf.slice(0, len);
        if first_group || !g.resident() {
            dev.wait_measured(Stream::Compute, buffer.free, &Label::wait(Wait::Gradients).block(b))?;
            match g.kept.get(b) {
                // The groups before this one are in what stays.
                Some(kept) if !first_group => dev.to_f32(*kept, (len / 4) as usize, buf)?,
                _ => dev.zero(Stream::Compute, buf)?,
            }
        }
        Ok(Grads { buf })
    }

    /// The sum in block `b`'s buffer is complete for this group: send it out where it is due.
    fn close_gradient(&mut self, b: usize, group: usize, final_group: bool, before: u64) -> Result<(), EngineError> {
        let (start, len) = self.model.places[b];
        let (dev, ranks) = (self.dev.as_ref(), self.ranks);
        let own = ranks.own(len);
        let g = self.gradients.as_mut().ok_or_else(|| EngineError::internal("this session does not train"))?;
        let i = g.buffer_of(b);
        let resident = g.resident();
        if resident && !final_group {
            return Ok(());
        }
        // What this rank overwrites from here on is what the last step's pages are made of, and made again of after a crash.
        self.weights.await_published(dev, start + own.start..start + own.end, before)?;
        hit(Point::StepLeaving);
        let buffer = &g.buffers[i];
        let accumulate = group > 0 && !resident;
        let size = self.store.layout().spec().gradients.bytes();
        let sum = buffer.buf.slice(0, ranks.padded(len) * 4);
        if let Some(format) = g.stay {
            let (stays, dtype) = match g.kept.get(b) {
                Some(kept) => {
                    dev.from_f32(sum, len as usize, *kept)?;
                    (*kept, Dtype::Bf16)
                }
                None => (sum, Dtype::F32),
            };
            debug_assert_eq!(dtype.size(), format.bytes());
            if let Some(squares) = self.squares.filter(|_| final_group) {
                dev.sum_of_squares(stays, dtype, len as usize, squares.slice(8 * b as u64, 8))?;
            }
            g.advance(b);
            return Ok(());
        }
        let own_packed = g.packed_of.get(b).and_then(Option::as_ref);
        let takes_turns = own_packed.is_none();
        let packed = own_packed.or_else(|| g.packed.get(g.next_packed));
        // What leaves: the sum itself, or the sum rounded into a buffer of its own, which frees the sum's at once.
        let (leaving, src) = match packed {
            Some(packed) => {
                dev.wait_measured(Stream::Compute, packed.free, &Label::wait(Wait::Gradients).block(b))?;
                let out = packed.buf.slice(0, ranks.padded(len) * size);
                dev.from_f32(sum, len as usize, out)?;
                dev.record(buffer.free, Stream::Compute)?;
                (packed, out)
            }
            None => (buffer, sum),
        };
        let (dtype, width) = if packed.is_some() { (Dtype::Bf16, size) } else { (Dtype::F32, 4) };
        if let Some(squares) = self.squares {
            dev.sum_of_squares(src, dtype, len as usize, squares.slice(8 * b as u64, 8))?;
        }
        dev.record(leaving.full, Stream::Compute)?;
        if ranks.world > 1 {
            dev.wait(Stream::Peers, leaving.full)?;
            let stretch = dev.begin(Stream::Peers, &Label::collective("reduce gradients").bytes(src.bytes).block(b))?;
            dev.reduce_scatter(src, dtype)?;
            dev.end(Stream::Peers, stretch)?;
            dev.record(leaving.full, Stream::Peers)?;
        }
        if g.copied_back(b) && own.start < own.end {
            // The optimizer reads this rank's part there; the rest is as it was before the reduction, and nobody's.
            let stream = if ranks.world > 1 { Stream::Peers } else { Stream::Compute };
            let mine = |buf: DevBuf| buf.slice(own.start * width, (own.end - own.start) * width);
            dev.copy(stream, mine(sum), mine(src))?;
            dev.record(buffer.free, stream)?;
            dev.record(leaving.full, stream)?;
        }
        dev.wait(Stream::CopyOut, leaving.full)?;
        let (count, bytes) = (own.end - own.start, (own.end - own.start) * size);
        self.bytes_out += bytes;
        let stretch = dev.begin(Stream::CopyOut, &Label::copy("store gradients", bytes).block(b))?;
        // A short block: its last shares are nobody's.
        let mine = start + own.start..start + own.end;
        let wanted = match &self.ahead {
            Some(ahead) => ahead.wanted(self.store.layout(), mine.clone(), before),
            None => vec![mine.clone()],
        };
        if wanted.iter().map(|p| p.end - p.start).sum::<u64>() < count {
            hit(Point::RerunDropped);
        }
        let layout = self.store.layout();
        for part in wanted.into_iter().flat_map(|part| layout.gradient_parts(part)) {
            let (count, at) = (part.end - part.start, layout.gradient_at(part.start, before + 1));
            let src = src.slice((part.start - start) * width, count * width);
            if packed.is_some() {
                dev.store_packed_gradients(Stream::CopyOut, src, &self.store, at, count)?;
            } else {
                dev.store_gradients(Stream::CopyOut, src, &self.store, at, count, accumulate)?;
            }
        }
        dev.end(Stream::CopyOut, stretch)?;
        dev.record(leaving.free, Stream::CopyOut)?;
        dev.record(self.outs[b], Stream::CopyOut)?;
        if takes_turns && !g.packed.is_empty() {
            g.next_packed = (g.next_packed + 1) % g.packed.len();
        }
        g.advance(b);
        Ok(())
    }
}

impl Drop for Session {
    /// After an error the device may still wait for ranks that do not come any more: it stops to, before it is closed.
    fn drop(&mut self) {
        if !self.closed {
            self.weights.give_up();
        }
    }
}

impl GradientBuffers {
    fn new(dev: &mut dyn Device, model: &Model, plan: &EnginePlan) -> Result<Self, EngineError> {
        let (resident, packs) = (plan.resident_gradients, plan.packs());
        let mut g = GradientBuffers {
            buffers: Vec::new(),
            own: vec![None; model.len()],
            ring: 0..0,
            next: 0,
            packed: Vec::new(),
            next_packed: 0,
            packed_of: Vec::new(),
            copied_back: Vec::new(),
            stay: plan.device_gradients,
            kept: Vec::new(),
        };
        let buffer = |dev: &mut dyn Device, bytes: u64| -> Result<GradientBuffer, EngineError> {
            Ok(GradientBuffer { buf: dev.alloc(bytes, "gradients")?, free: dev.event()?, full: dev.event()? })
        };
        let ranks = plan.ranks();
        let new = |dev: &mut dyn Device, len: u64| buffer(dev, ranks.padded(len) * 4);
        for b in 0..model.len() {
            if resident || (b == 0 && model.tied()) {
                g.buffers.push(new(dev, model.places[b].1)?);
                g.own[b] = Some(g.buffers.len() - 1);
            }
        }
        if !resident {
            let largest = (0..model.len()).filter(|b| g.own[*b].is_none()).map(|b| model.places[b].1).max().unwrap_or(0);
            let first = g.buffers.len();
            for _ in 0..if packs || plan.keeps_rounded() { 1 } else { GRADIENT_RING } {
                g.buffers.push(new(dev, largest)?);
            }
            g.ring = first..g.buffers.len();
        }
        if plan.keeps_rounded() {
            let bytes = |b: usize| ranks.padded(model.places[b].1) * GradientFormat::Bf16.bytes();
            g.kept = (0..model.len()).map(|b| dev.alloc(bytes(b), "gradients that stay")).collect::<Result<_, _>>()?;
        }
        if packs {
            let bytes = |b: usize| ranks.padded(model.places[b].1) * plan.store.gradients.bytes();
            for b in 0..model.len() {
                g.packed_of.push(if plan.own_packed(b) { Some(buffer(dev, bytes(b))?) } else { None });
                g.copied_back.push(plan.copies_back(b));
            }
            if let Some(largest) = (0..model.len()).filter(|b| !plan.own_packed(*b)).map(bytes).max() {
                g.packed = (0..GRADIENT_RING).map(|_| buffer(dev, largest)).collect::<Result<_, _>>()?;
            }
        }
        Ok(g)
    }

    fn buffer_of(&self, b: usize) -> usize {
        self.own[b].unwrap_or(self.ring.start + self.next)
    }

    /// Whether sums stay over groups. A tied embedding's buffer is its own, but goes out with every group like the others.
    fn resident(&self) -> bool {
        self.ring.is_empty()
    }

    /// What leaves of block `b` is copied to where its sum was.
    fn copied_back(&self, b: usize) -> bool {
        self.copied_back.get(b).is_some_and(|back| *back)
    }

    /// Where block `b`'s rounded gradients stay for held pages.
    fn rounded_of(&self, b: usize) -> Option<DevBuf> {
        if self.copied_back(b) {
            return Some(self.buffers[self.own[b]?].buf);
        }
        self.packed_of.get(b)?.as_ref().map(|packed| packed.buf)
    }

    /// What the optimizer reads are the sums.
    fn stay_in_place(&self) -> bool {
        self.stay.is_some() && self.kept.is_empty()
    }

    fn advance(&mut self, b: usize) {
        if self.own[b].is_none() {
            self.next = (self.next + 1) % self.ring.len();
        }
    }
}

/// `[positions, head_dim/2, 2]` f32 cosines and sines on the device.
pub(crate) fn rope_table(dev: &mut dyn Device, a: &Architecture, positions: usize) -> Result<Option<DevBuf>, EngineError> {
    let Some(c) = a.transformer().filter(|c| c.rope.is_some()) else { return Ok(None) };
    let (frequencies, factor) = c.rope_inv_freq();
    let mut table = Vec::with_capacity(positions * c.head_dim * 4);
    for p in 0..positions {
        for f in &frequencies {
            let angle = p as f32 * f;
            table.extend_from_slice(&(angle.cos() * factor).to_le_bytes());
            table.extend_from_slice(&(angle.sin() * factor).to_le_bytes());
        }
    }
    let buf = dev.alloc(rope_table_bytes(a, positions), "rotary table")?;
    dev.upload(Stream::Compute, buf, &table)?;
    Ok(Some(buf))
}

#[cfg(test)]
mod tests;
