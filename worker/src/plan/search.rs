//! The search for the fastest plan within a device's memory.
//!
//! Sizes of micro-batches, numbers of groups, gradients that stay or not, slots, and how many blocks' weights stay are gone
//! through one by one. What is left of the memory goes to activations: layers are alike, so that the best split between
//! "all kept", "products kept" and "computed again" is found by trying every number of the first. The times of a combination
//! come from [`super::cost`]; one whose arithmetic alone takes longer than the best step so far is not played.

use super::cost::{Breakdown, Cost, Times};
use super::{DeviceUse, EnginePlan, device_use, head_rows, library_bytes, rank_share, rounded, slots_for};
use crate::api::{DeviceKind, EngineError};
use crate::model::{Block, Keep, Model};
use ramtorch_device::{AttentionShape, HeldPage};
use ramtorch_job::{JobSpec, Precision, Recompute};
use ramtorch_store::{GradientFormat, GradientLog, StoreSpec};

/// What the search goes through, and by what it judges.
pub(super) struct Space<'a> {
    pub model: &'a Model,
    pub spec: &'a JobSpec,
    pub store: &'a StoreSpec,
    /// Gradients are not in the segment; the job wants them in this format.
    pub device_gradients: Option<GradientFormat>,
    /// Pages are updated beside the backward pass.
    pub early_updates: bool,
    pub documents: bool,
    /// The device updates pages too.
    pub optimizer_split: bool,
    pub seq: usize,
    pub kind: DeviceKind,
    pub world: usize,
    /// Bytes of a device.
    pub budget: u64,
    /// Bytes of RAM that a log of gradients may take.
    pub log_bytes: u64,
    pub cost: &'a Cost,
    pub workspace: &'a dyn Fn(&AttentionShape) -> Result<u64, EngineError>,
}

/// The fastest plan.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub plan: EnginePlan,
    pub parts: Breakdown,
    /// What the plans are compared by: the seconds of a step, and a little for the RAM of a log.
    judged: f64,
    /// Combinations that were played.
    pub played: usize,
}

/// Tokens of the largest micro-batch that is looked at: products gain nothing beyond.
fn most_rows(kind: DeviceKind) -> usize {
    match kind {
        DeviceKind::Cpu => 4096,
        DeviceKind::Cuda => 32_768,
    }
}

/// Most groups that the search tries by itself.
const GROUPS_MAX: usize = 64;
/// Numbers of blocks that stay are gone through in at most so many steps.
const RESIDENT_STEPS: usize = 36;
/// Numbers of pages that are held on the device are gone through in about so many steps.
const HOLDINGS: usize = 24;
/// Numbers of steps whose gradients may be kept, and what each step more has to gain to be worth its RAM.
const LOGS: [u32; 6] = [1, 2, 3, 4, 6, 8];
pub(super) const LOG_WORTH: f64 = 5e-3;
/// A larger plan has to be better by this share; among equals the first found stays, which has the larger micro-batch.
const BETTER: f64 = 1e-9;

/// Micro-batch sizes to look at, larger first.
pub(super) fn micro_batches(spec: &JobSpec, share: usize, seq: usize, kind: DeviceKind) -> Vec<usize> {
    let share = share.max(1);
    if let Some(mb) = spec.train.micro_batch_size {
        return vec![mb.min(share)];
    }
    let most = (most_rows(kind) / seq.max(1)).clamp(1, share);
    // Equal parts of the share, half as large ones and so on, and between any two of them the parts where it is cut half as often again.
    let mut sizes = Vec::new();
    let mut parts = share.div_ceil(most);
    while sizes.last().is_none_or(|n| *n > 1) {
        sizes.push(share.div_ceil(parts));
        sizes.push(share.div_ceil(parts + parts.div_ceil(2)));
        parts *= 2;
    }
    sizes.dedup();
    sizes
}

/// Micro-batches of `micro_batch` sequences, and what is left over on some rank of `world`.
fn sizes_of(batch: usize, world: usize, micro_batch: usize) -> Vec<usize> {
    let mut sizes = vec![micro_batch];
    for rank in 0..world {
        let left = rank_share(batch, rank, world).len() % micro_batch;
        if left > 0 && !sizes.contains(&left) {
            sizes.push(left);
        }
    }
    sizes
}

/// Sequences at once of all micro-batches that a plan may have, largest first, each once.
pub(super) fn batch_sizes(spec: &JobSpec, world: usize, seq: usize, kind: DeviceKind) -> Vec<usize> {
    let (batch, world) = (spec.train.batch_size, world.max(1));
    let chosen = micro_batches(spec, batch.div_ceil(world), seq, kind);
    let mut sizes: Vec<usize> = chosen.into_iter().flat_map(|n| sizes_of(batch, world, n)).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes.dedup();
    sizes
}

/// Numbers of groups to look at: 1, 2, 3, 4, 6, 8, 12, …
fn groups(spec: &JobSpec, micro_batches: usize) -> Vec<usize> {
    if let Some(g) = spec.train.groups {
        return vec![g.clamp(1, micro_batches)];
    }
    let mut list = vec![1];
    let mut g = 2;
    while g <= micro_batches.min(GROUPS_MAX) {
        list.push(g);
        if g / 2 * 3 <= micro_batches.min(GROUPS_MAX) && g >= 2 {
            list.push(g / 2 * 3);
        }
        g *= 2;
    }
    list.dedup();
    list
}

/// Whether `i` of `n` is among `k` that are spread evenly.
fn spread(i: usize, k: usize, n: usize) -> bool {
    n > 0 && (i + 1) * k / n > i * k / n
}

/// Blocks whose weights stay, when `count` do: first the ends, which are large and take little time, then layers at equal
/// distances, so that what is streamed between them has time to come.
pub(super) fn resident(model: &Model, count: usize) -> Vec<bool> {
    let n = model.len();
    let layer = |b: usize| matches!(model.blocks[b], Block::Layer(_) | Block::Stack(_));
    let ends: Vec<usize> = (0..n).rev().filter(|b| !layer(*b)).collect();
    let mut stay = vec![false; n];
    ends.iter().take(count).for_each(|b| stay[*b] = true);
    let layers: Vec<usize> = (0..n).filter(|b| layer(*b)).collect();
    let more = count.saturating_sub(ends.len());
    layers.iter().enumerate().filter(|(i, _)| spread(*i, more, layers.len())).for_each(|(_, b)| stay[*b] = true);
    stay
}

/// Decides how activations are kept: `all` layers whole, `products` more in part; evenly spread, blocks that save nothing whole.
fn levels(sizes: &[u64], all: usize, products: usize) -> Vec<Keep> {
    let n = sizes.iter().filter(|s| **s > 0).count();
    let (mut i, mut j) = (0, 0);
    sizes
        .iter()
        .map(|size| {
            if *size == 0 {
                return Keep::All;
            }
            i += 1;
            if spread(i - 1, all, n) {
                return Keep::All;
            }
            j += 1;
            if spread(j - 1, products, n - all) { Keep::Products } else { Keep::Inputs }
        })
        .collect()
}

/// Bytes of one micro-batch's activations of each block but the last.
struct Sizes {
    all: Vec<u64>,
    /// Of the largest layer.
    all_most: u64,
    products_most: u64,
    layers: usize,
    /// Of the blocks that save nothing: the least a device gives out each.
    nothing: u64,
}

impl Sizes {
    fn new(model: &Model, p: &EnginePlan) -> Sizes {
        let bytes = |b: usize, keep: Keep| match model.saved_bytes(b, p.shape(), keep) {
            0 => 0,
            n => rounded(n),
        };
        let last = model.len() - 1;
        let all: Vec<u64> = (0..last).map(|b| bytes(b, Keep::All)).collect();
        let products_most = (0..last).map(|b| bytes(b, Keep::Products)).max().unwrap_or(0);
        let layers = all.iter().filter(|s| **s > 0).count();
        let nothing = (all.len() - layers) as u64 * rounded(0);
        Sizes { all_most: all.iter().copied().max().unwrap_or(0), products_most, layers, nothing, all }
    }

    /// The fastest way to keep activations in `room` bytes; layers are taken for as large as the largest.
    fn keep(&self, room: u64, group: u64, times: &Times) -> Option<Vec<Keep>> {
        let (all, products) = (self.all_most * group, self.products_most * group);
        let room = room.checked_sub(self.nothing * group)?;
        let b = (0..self.all.len()).find(|b| self.all[*b] > 0);
        let (whole, part) = b.map_or((0.0, 0.0), |b| (times.inputs[b], times.inputs[b] - times.products[b]));
        let mut best: Option<(f64, usize, usize)> = None;
        let mut offer = |saved: f64, a: usize, p: usize| {
            if best.is_none_or(|x| saved > x.0) {
                best = Some((saved, a, p));
            }
        };
        for a in 0..=self.layers {
            let left = self.layers - a;
            // Nothing made again as a whole needs no buffer for it.
            if a as u64 * all + left as u64 * products <= room {
                offer(a as f64 * whole + left as f64 * part, a, left);
            }
            let Some(rest) = room.checked_sub(self.all_most + a as u64 * all) else { break };
            let p = if products > 0 && part > 0.0 { ((rest / products) as usize).min(left) } else { 0 };
            offer(a as f64 * whole + p as f64 * part, a, p);
        }
        best.map(|(_, a, p)| levels(&self.all, a, p))
    }
}

/// Searches. The inner error is the least memory that would do.
pub(super) fn run(s: &Space) -> Result<Result<Found, u64>, EngineError> {
    let mut best: Option<Found> = None;
    let (mut least, mut played) = (u64::MAX, 0);
    // Sums of several groups are not rounded after each where they fit in fp32.
    for rounded in [false, true] {
        each_size(s, rounded, &mut best, &mut least, &mut played)?;
        if best.is_some() {
            break;
        }
    }
    Ok(match best {
        Some(mut found) => {
            found.plan.store = StoreSpec { log: found.plan.store.log.clone(), ..s.store.clone() };
            Ok(Found { played, ..found })
        }
        None => Err(least),
    })
}

/// Plans with micro-batches of all sizes, in groups of all lengths.
fn each_size(s: &Space, rounded: bool, best: &mut Option<Found>, least: &mut u64, played: &mut usize) -> Result<(), EngineError> {
    let batch = s.spec.train.batch_size;
    let share = batch.div_ceil(s.world);
    for micro_batch in micro_batches(s.spec, share, s.seq, s.kind) {
        let micro_batches = share.div_ceil(micro_batch).max(1);
        let rows = micro_batch * s.seq;
        let head = head_rows(&s.model.architecture, s.model.dtype, rows, s.kind);
        let times = s.cost.times(s.model, rows, s.seq, head);
        let start = EnginePlan {
            world: s.world,
            dtype: s.model.dtype,
            // Thousands of plans are looked at; the names of all tensors go into the last one only.
            store: StoreSpec { blocks: Vec::new(), metadata: String::new(), ..s.store.clone() },
            micro_batch,
            seq: s.seq,
            head_rows: head,
            groups: 1,
            group_len: micro_batches,
            micro_batches,
            sequences: share,
            batch_sizes: sizes_of(batch, s.world, micro_batch),
            documents: s.documents,
            keep: Vec::new(),
            resident: vec![false; s.model.len()],
            slots: slots_for(s.model),
            resident_gradients: false,
            // Where ranks add them up, sums are rounded afterwards, unless the job says otherwise.
            pack_gradients: (s.world == 1 || s.spec.train.reduce == Some(Precision::Bf16))
                && s.store.gradients == GradientFormat::Bf16
                && s.model.dtype == ramtorch_device::Dtype::Bf16,
            device_gradients: s.device_gradients,
            optimizer_split: s.optimizer_split,
            gather_weights: s.world > 1 && s.spec.train.gather_weights.unwrap_or(s.cost.gathers),
            bus_ids: Vec::new(),
            staged_pages: Vec::new(),
            held_pages: 0,
            visiting_pages: 0,
            held_gradients: Vec::new(),
            squares_on_device: s.world == 1 && s.kind == DeviceKind::Cuda,
            early_updates: s.early_updates,
            uses: DeviceUse { libraries: library_bytes(s.kind, s.spec.train.deterministic, s.world), ..Default::default() },
            checkpoint_staging: 0,
        };
        let sizes = Sizes::new(s.model, &start);
        // cuDNN may be asked for each shape: once is enough.
        let scratch = start.attention_workspaces(s.model, s.workspace)?;
        let workspace = |shape: &AttentionShape| Ok(scratch.iter().find(|x| x.0 == shape.window).map_or(0, |x| x.1));
        for groups in groups(s.spec, micro_batches) {
            let group_len = micro_batches.div_ceil(groups);
            let base = EnginePlan { groups: micro_batches.div_ceil(group_len), group_len, ..start.clone() };
            let c = Combination { s, rounded, times: &times, sizes: &sizes, workspace: &workspace };
            c.go(base, best, least, played)?;
        }
    }
    Ok(())
}

/// One size of micro-batch.
struct Combination<'a> {
    s: &'a Space<'a>,
    /// Sums of a group may be added to those before it in the segment's bf16.
    rounded: bool,
    times: &'a Times,
    sizes: &'a Sizes,
    workspace: &'a dyn Fn(&AttentionShape) -> Result<u64, EngineError>,
}

impl Combination<'_> {
    fn go(&self, base: EnginePlan, best: &mut Option<Found>, least: &mut u64, played: &mut usize) -> Result<(), EngineError> {
        let (s, n) = (self.s, self.s.model.len());
        let few = base.slots;
        // Gradients that are nowhere else stay: rounded, each group's added to those before it, or as fp32 sums. Where there is
        // one group, they are rounded once, as on their way to the segment.
        let stay: &[(bool, Option<GradientFormat>)] = match s.device_gradients {
            None if base.groups > 1 && s.store.gradients == GradientFormat::Bf16 && !self.rounded => &[(true, None)],
            None => &[(false, None), (true, None)],
            Some(GradientFormat::Bf16) if s.model.dtype == ramtorch_device::Dtype::Bf16 => {
                let both = &[(false, Some(GradientFormat::Bf16)), (true, Some(GradientFormat::F32))];
                if base.groups == 1 { &both[..1] } else { both }
            }
            Some(_) => &[(true, Some(GradientFormat::F32))],
        };
        for &(resident_gradients, device_gradients) in stay {
            let step = n.div_ceil(RESIDENT_STEPS);
            for count in (0..n).step_by(step).chain([n]) {
                let mut p = EnginePlan { resident_gradients, device_gradients, resident: resident(s.model, count), ..base.clone() };
                let slots: &[usize] = if count == n { &[0] } else { &[few, few + 1, few + 2] };
                for &slots in slots.iter().filter(|x| **x <= n) {
                    p.slots = slots;
                    // What there is no room for, without and with gradients: more has none either.
                    let mut too_many = [usize::MAX; 2];
                    for (held, here) in self.holdings(&p) {
                        if held >= too_many[usize::from(here)] {
                            continue;
                        }
                        (p.held_pages, p.visiting_pages, p.store.log) = (held, 0, GradientLog::NONE);
                        p.held_gradients = match (here, p.resident_gradients) {
                            (false, _) => Vec::new(),
                            // Where their sums were, they take nothing.
                            (true, true) => vec![true; n],
                            (true, false) => s.cost.held(s.model, &p).iter().map(|held| *held > 0.0).collect(),
                        };
                        let Some(keep) = self.keep(&mut p, least)? else {
                            too_many[usize::from(here)] = held;
                            continue;
                        };
                        p.keep = keep;
                        let (compute, _) = s.cost.compute(s.model, &p, self.times);
                        if best.as_ref().is_some_and(|b| compute >= b.judged) {
                            continue;
                        }
                        p.uses = device_use(s.model, &p, self.workspace)?;
                        if p.uses.total() > s.budget {
                            continue; // layers of unequal sizes
                        }
                        let visiting = match here && p.resident_gradients {
                            true => p.visiting_rooms(s.model).len().min(self.pages_that_stay(&p).saturating_sub(held)),
                            false => 0,
                        };
                        for visiting in if visiting > 0 { vec![visiting, visiting / 2, 0] } else { vec![0] } {
                            p.visiting_pages = visiting;
                            self.play(&mut p, best, played);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Plays `p`, which has room, with logs of all lengths, and keeps what is better than the best so far.
    fn play(&self, p: &mut EnginePlan, best: &mut Option<Found>, played: &mut usize) {
        let s = self.s;
        p.staged_pages = s.cost.staged_pages(s.model, p, self.times);
        let mut shorter = f64::INFINITY;
        for steps in self.logs(p) {
            *played += 1;
            p.store.log.steps = steps;
            let parts = s.cost.step(s.model, p, self.times);
            let judged = parts.step * (1.0 + LOG_WORTH * f64::from(steps - 1));
            if best.as_ref().is_none_or(|b| judged < b.judged * (1.0 - BETTER)) {
                *best = Some(Found { plan: p.clone(), parts, judged, played: 0 });
            }
            // What a longer log does not gain, an even longer one does not either.
            if judged >= shorter {
                break;
            }
            shorter = judged;
        }
    }

    /// Numbers of pages to hold on the device, and whether their gradients are too. Only where their weights need not leave it, and gradients of pages that are not
    /// published yet outlive the process.
    fn holdings(&self, p: &EnginePlan) -> Vec<(usize, bool)> {
        let Some(page) = p.store.page_parameters.filter(|_| self.s.cost.holds(p)) else { return vec![(0, false)] };
        let allowed = self.s.spec.train.held_state_gib.map_or(u64::MAX, |gib| (gib * f64::from(1 << 30)) as u64);
        let most = self.pages_that_stay(p).min((allowed / HeldPage::bytes(&p.store, u64::from(page))) as usize);
        if self.s.kind == DeviceKind::Cpu {
            // It gains nothing and is done where the job says so; what has room is tried first.
            return vec![(most, p.packs())];
        }
        let numbers = (0..=most).step_by((most / HOLDINGS).max(1));
        // All of them, too, where their gradients stay: then nothing is left for the processor. None, too, where others visit.
        let all = numbers.clone().chain([most]);
        let least = usize::from(!p.resident_gradients || allowed == 0);
        numbers.map(|held| (held, false)).chain(all.filter(|held| *held >= least && p.packs()).map(|held| (held, true))).collect()
    }

    /// Pages of a rank whose weights stay on its device.
    fn pages_that_stay(&self, p: &EnginePlan) -> usize {
        let page = p.store.page_parameters.map_or(1, u64::from);
        let stay: u64 = (0..self.s.model.len()).map(|b| Cost::holdable(p, page, self.s.model, b)).sum();
        (stay / p.world as u64 / page) as usize
    }

    /// Lengths of a log of gradients to look at for a plan that holds pages. Which pages have it, is worked out for the last plan only.
    fn logs(&self, p: &EnginePlan) -> Vec<u32> {
        if p.held_pages == 0 {
            return vec![1];
        }
        if let Some(steps) = self.s.spec.train.write_back_steps {
            return vec![steps];
        }
        let held = p.held_pages as u64 * p.world as u64 * p.store.page_parameters.map_or(0, u64::from);
        let bytes = |steps: u32| u64::from(steps - 1) * held * p.store.gradients.bytes();
        LOGS.into_iter().take_while(|steps| bytes(*steps) <= self.s.log_bytes).collect()
    }

    /// How activations are best kept in what `p` leaves; nothing where `p` does not fit, which tells `least`.
    fn keep(&self, p: &mut EnginePlan, least: &mut u64) -> Result<Option<Vec<Keep>>, EngineError> {
        let n = self.s.model.len();
        let fixed = match self.s.spec.train.recompute {
            Recompute::Always => Some(levels(&self.sizes.all, 0, 0)),
            Recompute::Never => Some(vec![Keep::All; n - 1]),
            Recompute::Auto => None,
        };
        p.keep = fixed.clone().unwrap_or_else(|| levels(&self.sizes.all, 0, 0));
        p.keep.push(Keep::All); // the last block keeps nothing beyond its visit
        let uses = device_use(self.s.model, p, self.workspace)?;
        // What is all kept may take less than what is made again in a buffer.
        let smallest = match &fixed {
            None => {
                let products = (self.sizes.layers as u64 * self.sizes.products_most + self.sizes.nothing) * p.group_len as u64;
                uses.total() - uses.activations + uses.activations.min(products)
            }
            Some(_) => uses.total(),
        };
        if smallest > self.s.budget {
            *least = (*least).min(smallest);
            return Ok(None);
        }
        if fixed.is_some() {
            return Ok(Some(p.keep.clone()));
        }
        let room = self.s.budget - (uses.total() - uses.activations);
        let keep = self.sizes.keep(room, p.group_len as u64, self.times);
        Ok(keep.map(|k| k.into_iter().chain([Keep::All]).collect()))
    }
}
