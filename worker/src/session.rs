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
use crate::plan::{EnginePlan, rope_table_bytes};
use crate::weights::WeightCache;
use ramtorch_cpu::Collectives;
use ramtorch_device::trace::Label;
use ramtorch_device::{AttentionShape, DevBuf, Device, Event, Gang, HeldPage, Ranks, Stream};
use ramtorch_failpoint::{Point, hit};
use ramtorch_modelio::Architecture;
use ramtorch_store::Store;
use std::sync::Arc;

mod gradients;
mod pages;

use gradients::GradientBuffers;
use pages::{Staging, Visiting};

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
        let room = |(b, offset): (usize, u64)| Some((b, gradients.as_ref()?.sum_of(b)?.slice(offset, page_bytes)));
        let visiting_rooms = plan.visited_rooms(&model).into_iter().filter_map(room).collect();
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
                    self.stage(b, before)?;
                    closed(self, b)?;
                }
            }
        }
        Ok(())
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
}

impl Drop for Session {
    /// After an error the device may still wait for ranks that do not come any more: it stops to, before it is closed.
    fn drop(&mut self) {
        if !self.closed {
            self.weights.give_up();
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
