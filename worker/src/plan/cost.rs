//! What a step costs: the times of visits, and a small simulation of the streams.
//!
//! ```text
//!   0 ─ gradients of the last step complete
//!   optimizer   │ pages of block 0 │ block 1 │ …                  │ committed
//!   CopyIn      ·        load 0 ───┤ load 1 ─┤ …
//!   Compute     ·                  forward 0 ┤ forward 1 … head   ┤ backward n-2 … 0, next group …
//!   CopyOut     ·                                                   gradients of n-1 … 0 (last group)
//!   processor                                                       norm of n-1 … 0 │ ─ the period of a step
//! ```
//! Pages whose state is held on the device are updated first, in little more time than their gradients take to come, and go out
//! after all others, last block first; with a log of gradients, at every few steps only. A block's gradients leave when its pages are published. Without clipping, the processor
//! has updated pages of the last blocks before this begins ([`Cost::early`]).
//!
//! On CPU devices everything shares the same cores: there the parts are added up.

use super::EnginePlan;
use crate::api::{DeviceKind, LayerTimes, Rates};
use crate::model::{Block, Keep, Model};
use ramtorch_device::Dtype;
use ramtorch_store::GradientFormat;
use std::collections::VecDeque;

/// Typical figures of a data-centre GPU on PCIe 5, where the node's own were not measured.
mod typical {
    /// Products of many rows, operations a second, after the GPU's power limit has shown.
    pub const PRODUCTS: f64 = 6.8e14;
    /// Rows at which products reach half of that.
    pub const HALF_ROWS: f64 = 300.0;
    pub const ATTENTION: [f64; 2] = [5e14, 3.4e14];
    pub const MEMORY: f64 = 2.3e12;
    pub const LAUNCH: f64 = 4e-6;
    pub const TO_DEVICE: f64 = 5.2e10;
    pub const FROM_DEVICE: f64 = 5.0e10;
    pub const BOTH: [f64; 2] = [4.4e10, 4.6e10];
    /// The processor beside it, parameters a second.
    pub const ADAMW: f64 = 4e9;
    pub const NORM: f64 = 2e10;
    /// What all GPUs of a node get together: in, out, both at once.
    pub const NODE: [f64; 2] = [1.65e11, 1.31e11];
    pub const NODE_BOTH: [f64; 2] = [8.4e10, 1.0e11];
    /// Bytes a second that a rank receives, and sends, in a gather or a reduction of 8 thread blocks beside products: two GPUs
    /// with NVLink. The most that is assumed, whatever copies between GPUs get.
    pub const PEERS: f64 = 9.5e10;
}

/// Kernels of a layer's visits: forward, backward, made again.
const KERNELS: [f64; 3] = [8.0, 16.0, 3.0];
/// Two updaters on one memory bus do a little less than the sum of each alone.
const TOGETHER: f64 = 0.92;
/// The host's memory for both, over what the processor's AdamW moves; bytes a second that it has at least on such nodes. Measured: 145 to
/// 152 GB/s where the processor alone moved 135 to 137.
const MEMORY_TOGETHER: f64 = 1.10;
const LEAST_MEMORY: f64 = 1.2e11;
/// Of it, what several GPUs leave to the processor at least is the rest.
const GPU_MEMORY: f64 = 0.8;
/// Bytes of a gradient that the optimizer reads, and of a weight.
const GRADIENT: f64 = 2.0;
const WEIGHT: f64 = 2.0;
/// Layers take longer in a step than in the measurement, which is too short for all of the GPU's limit of power to show: of 7B with 32,768 rows a
/// micro-batch 9.5 s for 9.2.
pub(super) const SUSTAINED: f64 = 1.04;
/// Of the bus's time during the backward pass that pages on their way may take.
const STAGED_SHARE: f64 = 0.91;
/// Bytes a parameter that an update on the GPU moves in and out, beside the moments: both halves in and out, a gradient in.
const STAGED_IN: f64 = 6.0;
const STAGED_OUT: f64 = 4.0;
/// Held pages go out with a pause after each.
const WRITE_BACK: f64 = 0.88;
/// Copies slow the arithmetic beside them by this share of their own time: in, out.
const DRAG: [f64; 2] = [0.01, 0.08];
/// Gathers and reductions take multiprocessors from the arithmetic beside them, 8 of 132: by this share of their own time, at
/// most (nothing could be measured).
const PEERS_DRAG: f64 = 0.06;
/// Gradients that are rounded, or added to those in the segment, on their way out go in pieces of so many parameters, and each
/// piece's kernel waits until products make room for it: 4.1 ms beside products of 32,768 rows. Products of few rows, and so
/// short ones, make room sooner: within this share of a backward visit.
const PIECE: f64 = (1u64 << 24) as f64;
const PIECE_WAIT: f64 = 4e-3;
const PIECE_WAIT_SHARE: f64 = 0.2;
/// From a block's publication to the start of its copy; from the last gradient to the optimizer's start. Seconds.
const NOTICE: f64 = 1e-4;
const TURN: f64 = 3e-3;

/// Seconds of one micro-batch's visits of each block.
#[derive(Debug, Clone)]
pub(crate) struct Times {
    pub forward: Vec<f64>,
    pub backward: Vec<f64>,
    /// Added to the backward visit, by [`Keep`].
    pub products: Vec<f64>,
    pub inputs: Vec<f64>,
}

impl Times {
    pub fn again(&self, b: usize, keep: Keep) -> f64 {
        match keep {
            Keep::All => 0.0,
            Keep::Products => self.products[b],
            Keep::Inputs => self.inputs[b],
        }
    }
}

/// Where a step's time goes, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Breakdown {
    pub step: f64,
    /// All visits, one after the other.
    pub compute: f64,
    /// Of them: what is computed a second time.
    pub again: f64,
    /// Bytes on their way in, and out, one after the other.
    pub copies_in: f64,
    pub copies_out: f64,
    /// All pages.
    pub optimizer: f64,
    /// Compute stands still for pages, for copies in, for gradients on their way out.
    pub wait_optimizer: f64,
    pub wait_copies: f64,
    pub wait_gradients: f64,
    /// After the last visit: gradients on their way, their norm.
    pub tail: f64,
    pub norm: f64,
    /// Of the norm: after everything else.
    pub wait_norm: f64,
}

impl Breakdown {
    pub fn bound_by(&self) -> &'static str {
        let idle = [
            (self.compute, "matrix products"),
            (self.wait_optimizer + self.wait_norm, "the optimizer"),
            (self.wait_copies + self.wait_gradients + self.tail, "copies between host and device"),
        ];
        idle.iter().fold(idle[0], |a, b| if b.0 > a.0 { *b } else { a }).1
    }
}

/// Where rates come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Basis {
    Measured,
    Cached,
    Typical,
}

/// Rates with stand-ins where nothing was measured.
pub(crate) struct Cost {
    rates: Rates,
    kind: DeviceKind,
    dtype: Dtype,
    /// Copies in and out alone, and both at once.
    to_device: f64,
    from_device: f64,
    both: [f64; 2],
    memory: f64,
    launch: f64,
    norm: f64,
    /// Bytes of a moment.
    moment: f64,
    /// Gradients are squared as they come, and not after the last of them.
    pub norm_beside: bool,
    /// Pages on the processor, and on the GPUs (0: none), of all ranks together.
    pub adamw: f64,
    pub adamw_gpu: f64,
    pub basis: Basis,
    /// Bytes a second of gathers and reductions, by what a rank receives of others; infinite for one that is alone.
    peers: f64,
    /// Sharing loads out is faster than each rank's copying everything.
    pub gathers: bool,
}

fn or(x: f64, default: f64) -> f64 {
    if x > 0.0 && x.is_finite() { x } else { default }
}

impl Cost {
    /// `moment` is the bytes of one moment of a parameter; `split`: the device updates pages too; of `world` ranks.
    pub fn new(rates: Rates, kind: DeviceKind, dtype: Dtype, moment: u64, split: bool, world: usize) -> Cost {
        if kind == DeviceKind::Cpu {
            let copy = or(rates.copy_bytes, 4e9);
            let basis = if rates.gemm_flops > 0.0 { Basis::Measured } else { Basis::Typical };
            let adamw = or(rates.optimizer_parameters, 2e8);
            let norm = or(rates.norm_parameters, 4.0 * adamw);
            return Cost {
                rates,
                kind,
                dtype,
                to_device: copy,
                from_device: copy,
                both: [copy; 2],
                memory: copy,
                launch: 0.0,
                norm,
                moment: moment as f64,
                norm_beside: false,
                adamw,
                adamw_gpu: 0.0,
                basis,
                peers: if world > 1 { copy } else { f64::INFINITY },
                // The segment is as near as another rank's memory.
                gathers: false,
            };
        }
        let g = rates.gpu.clone().unwrap_or_default();
        let basis = match &rates.gpu {
            Some(g) if g.cached => Basis::Cached,
            Some(_) => Basis::Measured,
            None => Basis::Typical,
        };
        let n = world as f64;
        // The links of several GPUs end in the same memory.
        let shared = |alone: f64, node: f64| if world > 1 { alone.min(node / n) } else { alone };
        let both = [
            shared(or(g.both[0], typical::BOTH[0]), typical::NODE_BOTH[0]),
            shared(or(g.both[1], typical::BOTH[1]), typical::NODE_BOTH[1]),
        ];
        let to_device = shared(or(g.to_device, typical::TO_DEVICE), typical::NODE[0]);
        // Measured are copies, for which NVLink has more than collectives with few thread blocks take; slower links have what
        // copies get.
        let peers = or(rates.peer_bytes, typical::PEERS).min(typical::PEERS);
        // A block's share over the own link and the others' from their devices, or all of it over the own link.
        let gathers = world > 1 && rates.peer_access.unwrap_or(false) && 1.0 / n / to_device + (n - 1.0) / n / peers < 1.0 / to_device;
        let moments = 2.0 * moment as f64;
        Cost {
            kind,
            dtype,
            to_device,
            from_device: shared(or(g.from_device, typical::FROM_DEVICE), typical::NODE[1]),
            both,
            memory: or(g.memory_bytes, typical::MEMORY),
            launch: or(g.launch_seconds, typical::LAUNCH),
            norm: or(rates.norm_parameters, typical::NORM * n),
            moment: moment as f64,
            norm_beside: true,
            adamw: or(if rates.gpu.is_some() { rates.optimizer_parameters } else { 0.0 }, typical::ADAMW * n),
            adamw_gpu: if split { n / ((STAGED_IN + moments) / both[0]).max((STAGED_OUT + moments) / both[1]) } else { 0.0 },
            basis,
            peers: if world > 1 { peers } else { f64::INFINITY },
            gathers,
            rates,
        }
    }

    /// Streams run beside each other.
    pub fn overlapped(&self) -> bool {
        self.kind == DeviceKind::Cuda
    }

    /// Parameters a second that processor and GPU update together, of those that are not held. What bounds them is the host's memory,
    /// which all that they move goes through, and the bus; pages that are on the GPU already need only go out.
    fn update_rate(&self, model: &Model, p: &EnginePlan, held: &[f64]) -> f64 {
        if self.adamw_gpu <= 0.0 {
            return self.adamw;
        }
        let moments = 2.0 * self.moment;
        let (traffic, state) = (10.0 + 2.0 * moments, STAGED_OUT + moments);
        let memory = (self.adamw * traffic * MEMORY_TOGETHER).max(LEAST_MEMORY);
        // Gradients that are on the GPU do not cross the bus to it, but to the processor.
        let here = p.device_gradients.is_some();
        let gradient = if here { 0.0 } else { GRADIENT };
        // A new weight crosses to the GPU.
        let by_processor = traffic + WEIGHT + if here { GRADIENT } else { 0.0 };
        let staged = self.staged_share(model, p, held);
        let (mut processor, mut gpu) = (self.adamw, self.adamw_gpu);
        // Who does more of them has more of them staged: some rounds find the balance.
        for _ in 0..8 {
            let fetched = 1.0 - (staged * (processor + gpu) / gpu).min(1.0);
            let into = fetched * state + gradient;
            let bus = (state / self.both[1]).max(into / self.both[0]);
            gpu = (p.world as f64 / bus).min(GPU_MEMORY * memory / (state + into));
            processor = self.adamw.min((memory - gpu * (state + into)) / by_processor);
        }
        ((self.adamw + gpu) * TOGETHER).min(processor + gpu)
    }

    /// The device may hold the state of pages from step to step.
    pub fn holds(&self, p: &EnginePlan) -> bool {
        p.optimizer_split
            && (self.adamw_gpu > 0.0 || !self.overlapped())
            && (p.world == 1 || p.gather_weights)
            && p.dtype == Dtype::Bf16
            && p.device_gradients.is_none()
    }

    /// Parameters of each block whose state could be held: those of pages that lie in one rank's share, but for one a share.
    pub fn holdable(p: &EnginePlan, page: u64, model: &Model, b: usize) -> u64 {
        let lost = if p.world == 1 { 0 } else { page * p.world as u64 };
        if p.resident[b] { model.places[b].1.saturating_sub(lost) } else { 0 }
    }

    /// Parameters of each block whose state is held by all ranks, or visits them.
    pub fn held(&self, model: &Model, p: &EnginePlan) -> Vec<f64> {
        self.first_pages(model, p, p.held_pages + p.visiting_pages)
    }

    /// Parameters of each block that lie in the first so many pages of each rank that may be held.
    fn first_pages(&self, model: &Model, p: &EnginePlan, pages: usize) -> Vec<f64> {
        let page = p.store.page_parameters.map_or(0, u64::from);
        let mut left = pages as u64 * page * p.world as u64;
        let of_block = |b: usize| {
            let held = left.min(Cost::holdable(p, page, model, b));
            left -= held;
            held as f64
        };
        (0..model.len()).map(of_block).collect()
    }

    /// Parameters of each block that the processor brings to their step beside the backward pass of the last group, last block
    /// first, as far as it comes. Keeping the old weights and looking at the gradients once more makes it slower by what that
    /// moves. Pages that the device holds or has fetched are not its.
    fn early(&self, model: &Model, p: &EnginePlan, t: &Times, held: &[f64]) -> Vec<f64> {
        let n = model.len();
        let mut early = vec![0.0; n];
        if !p.early_updates || !self.overlapped() {
            return early;
        }
        let (traffic, again) = (10.0 + 4.0 * self.moment, 3.0 * p.store.gradients.bytes() as f64);
        let rate = self.adamw * traffic / (traffic + again);
        let count = p.sequences as f64 / p.micro_batch as f64 / p.groups as f64;
        let visit = |b: usize| (t.backward[b] + t.again(b, p.keep[b])) * count;
        let all: f64 = (0..n - 1).map(visit).sum();
        let fetched = |b: usize| {
            let pages = p.staged_pages.get(b).copied().unwrap_or(0) as f64;
            pages * p.store.page_parameters.map_or(0.0, f64::from) * p.world as f64
        };
        let (mut visited, mut busy) = (0.0, 0f64);
        for b in (1..n).rev() {
            if b + 1 < n {
                visited += visit(b);
            }
            let begin = busy.max(visited);
            let rest = (model.places[b].1 as f64 - held[b] - fetched(b)).max(0.0);
            early[b] = rest.min((all - begin).max(0.0) * rate);
            busy = begin + early[b] / rate;
        }
        early
    }

    /// For each block but the last: pages whose state comes to the device during its backward pass in the last group, into its
    /// activations. As many as the bus has time for beside the block's own weights, where there is room. What is made again
    /// takes time too, but counts for nothing: more memory, where less is made again, shall not mean fewer pages. What is left of
    /// the time of one block, less than a page's, goes to the next: its last page may come a little late.
    pub fn staged_pages(&self, model: &Model, p: &EnginePlan, t: &Times) -> Vec<usize> {
        let Some(page) = p.store.page_parameters.filter(|_| self.overlapped() && p.optimizer_split && self.adamw_gpu > 0.0) else {
            return Vec::new();
        };
        let parameters = f64::from(page);
        let page = parameters * ramtorch_device::state_bytes(&p.store) as f64;
        let held = self.held(model, p);
        let mut visiting = vec![0.0; model.len()];
        if p.visiting_pages > 0 {
            p.visiting_rooms(model).iter().take(p.visiting_pages).for_each(|(b, _)| visiting[*b] += page);
        }
        let mut pages = vec![0; model.len() - 1];
        // Those that visit where the last block's sums were come first.
        let mut left = -visiting[model.len() - 1];
        for b in (0..pages.len()).rev() {
            if p.keep[b] == Keep::Inputs || !matches!(model.blocks[b], Block::Layer(_)) {
                left -= visiting[b];
                continue;
            }
            let seconds = t.backward[b] * p.group_len as f64;
            let weights = if p.resident[b] { 0.0 } else { (model.places[b].1 * p.dtype.size()) as f64 };
            let time = (seconds * self.both[0] * STAGED_SHARE - weights).max(0.0) + left - visiting[b];
            let room = model.saved_bytes(b, p.shape(), p.keep[b]) as f64 * p.group_len as f64;
            pages[b] = (time.min(room) / page).min((model.places[b].1 as f64 - held[b]) / parameters).max(0.0) as usize;
            left = (time - pages[b] as f64 * page).min(page);
        }
        pages
    }

    /// Share of the parameters that are not held whose pages are staged, by all ranks.
    fn staged_share(&self, model: &Model, p: &EnginePlan, held: &[f64]) -> f64 {
        let Some(page) = p.store.page_parameters else { return 0.0 };
        let of_ranks = f64::from(page) * p.world as f64;
        let staged: f64 =
            p.staged_pages.iter().zip(&model.places).map(|(pages, place)| (*pages as f64 * of_ranks).min(place.1 as f64)).sum();
        let held: f64 = held.iter().sum();
        (staged / (model.places.iter().map(|x| x.1 as f64).sum::<f64>() - held).max(1.0)).min(1.0)
    }

    /// Operations a second of products with `rows` rows.
    fn products(&self, rows: f64) -> f64 {
        if self.kind == DeviceKind::Cpu {
            return or(self.rates.gemm_flops, 5e10);
        }
        let peak = if self.dtype == Dtype::F32 { typical::PRODUCTS / 14.0 } else { typical::PRODUCTS };
        peak * rows / (rows + typical::HALF_ROWS)
    }

    /// Of a layer's visits with one micro-batch, from formulas.
    fn layer(&self, model: &Model, b: usize, rows: usize, seq: usize) -> LayerTimes {
        let (r, size) = (rows as f64, self.dtype.size() as f64);
        let matrix = model.places[b].1 as f64;
        let product = 2.0 * matrix * r / self.products(r);
        let Block::Layer(l) = &model.blocks[b] else {
            return LayerTimes { rows, forward: product, backward: 2.0 * product, rebuild: 0.0, recompute: product };
        };
        let window = l.window().unwrap_or(seq).min(seq) as f64;
        let scores = 2.0 * r * window * l.attention_widths().1 as f64;
        let [fast, slow] = match self.kind {
            DeviceKind::Cpu => [self.products(r); 2],
            DeviceKind::Cuda => typical::ATTENTION.map(|x| x * self.products(1e9) / typical::PRODUCTS),
        };
        let passes = l.elementwise().map(|n| n as f64 * r * size / self.memory);
        let launches = KERNELS.map(|k| k * self.launch);
        // Weight gradients are read and written in f32, partly beside the arithmetic.
        let sums = 4.0 * matrix / self.memory;
        let forward = product + scores / fast + passes[0] + launches[0];
        // Without the last product of the layer.
        let down = 2.0 * (l.hidden * l.inner()) as f64 * r / self.products(r);
        LayerTimes {
            rows,
            forward,
            backward: 2.0 * product + 2.5 * scores / slow + passes[1] + sums + launches[1],
            rebuild: passes[2] + launches[2],
            recompute: forward - down,
        }
    }

    /// Of a layer's visits, from the measured points where there are some: seconds a row between two points follow the
    /// logarithm of the rows; beyond the first and the last they change as the formulas do.
    fn layer_times(&self, model: &Model, b: usize, rows: usize, seq: usize) -> LayerTimes {
        let points: &[LayerTimes] = self.rates.gpu.as_ref().map_or(&[], |g| &g.layers);
        let is_layer = matches!(model.blocks[b], Block::Layer(_));
        let (Some(first), Some(last)) = (points.first().filter(|_| is_layer), points.last()) else {
            return self.layer(model, b, rows, seq);
        };
        let nearest = if rows < first.rows { first } else { last };
        if rows < first.rows || rows > last.rows {
            let (here, there) = (self.layer(model, b, rows, seq), self.layer(model, b, nearest.rows, seq));
            let scaled = |f: fn(&LayerTimes) -> f64| SUSTAINED * f(nearest) * f(&here) / f(&there).max(f64::MIN_POSITIVE);
            return LayerTimes {
                rows,
                forward: scaled(|p| p.forward),
                backward: scaled(|p| p.backward),
                rebuild: scaled(|p| p.rebuild),
                recompute: scaled(|p| p.recompute),
            };
        }
        let above = points.iter().find(|p| p.rows >= rows).unwrap_or(last);
        let below = points.iter().rev().find(|p| p.rows <= rows).unwrap_or(first);
        let span = (above.rows as f64 / below.rows.max(1) as f64).ln();
        let t = if span > 0.0 { (rows as f64 / below.rows as f64).ln() / span } else { 0.0 };
        let mix = |f: fn(&LayerTimes) -> f64| {
            let (x, y) = (f(below) / below.rows.max(1) as f64, f(above) / above.rows.max(1) as f64);
            SUSTAINED * (x + (y - x) * t) * rows as f64
        };
        LayerTimes {
            rows,
            forward: mix(|p| p.forward),
            backward: mix(|p| p.backward),
            rebuild: mix(|p| p.rebuild),
            recompute: mix(|p| p.recompute),
        }
    }

    /// Of all visits with one micro-batch of `rows` tokens.
    pub fn times(&self, model: &Model, rows: usize, seq: usize, head_rows: usize) -> Times {
        let n = model.len();
        let mut t = Times { forward: vec![0.0; n], backward: vec![0.0; n], products: vec![0.0; n], inputs: vec![0.0; n] };
        let mut same: Option<LayerTimes> = None;
        for b in 0..n {
            let r = rows as f64;
            match &model.blocks[b] {
                Block::Embed(e) => {
                    let pass = 2.0 * r * e.hidden as f64 * self.dtype.size() as f64 / self.memory;
                    (t.forward[b], t.backward[b]) = (pass + self.launch, 3.0 * pass + self.launch);
                }
                Block::Head(h) => {
                    let measured = self.rates.gpu.as_ref().map(|g| g.head).filter(|h| h.0 > 0 && h.1 > 0.0);
                    t.forward[b] = match measured {
                        Some((timed, seconds)) => SUSTAINED * seconds * r / timed as f64,
                        None => {
                            let flops = 6.0 * (h.hidden * h.vocab) as f64 * r;
                            let chunks = (rows as f64 / head_rows.max(1) as f64).ceil();
                            let passes = r * (4.0 * h.vocab as f64 + 14.0 * h.hidden as f64) * self.dtype.size() as f64;
                            let sums = chunks * 4.0 * (h.hidden * h.vocab) as f64;
                            flops / self.products(head_rows as f64) + (passes + sums) / self.memory + 7.0 * chunks * self.launch
                        }
                    };
                }
                Block::Layer(l) => {
                    // Layers differ in nothing but their window.
                    let x = match same {
                        Some(x) if l.window().is_none() => x,
                        _ => self.layer_times(model, b, rows, seq),
                    };
                    if l.window().is_none() {
                        same = Some(x);
                    }
                    (t.forward[b], t.backward[b], t.products[b], t.inputs[b]) = (x.forward, x.backward, x.rebuild, x.recompute);
                }
                Block::Stack(_) => {
                    let x = self.layer(model, b, rows, seq);
                    t.forward[b] = if b + 1 == n { x.forward + x.backward } else { x.forward };
                    if b + 1 < n {
                        (t.backward[b], t.inputs[b]) = (x.backward, x.recompute);
                    }
                }
            }
        }
        t
    }

    /// All visits of a step, and of them what is done a second time.
    pub fn compute(&self, model: &Model, p: &EnginePlan, t: &Times) -> (f64, f64) {
        let count = p.sequences as f64 / p.micro_batch as f64;
        let last = model.len() - 1;
        let again: f64 = (0..last).map(|b| t.again(b, p.keep[b])).sum::<f64>() * count;
        let once: f64 = (0..model.len()).map(|b| t.forward[b] + t.backward[b]).sum::<f64>() * count;
        (once + again, again)
    }

    /// The parts of a step.
    pub fn step(&self, model: &Model, p: &EnginePlan, t: &Times) -> Breakdown {
        let (compute, again) = self.compute(model, p, t);
        let parameters: f64 = model.places.iter().map(|x| x.1 as f64).sum();
        let held = self.held(model, p);
        let rate = self.update_rate(model, p, &held);
        let base = Breakdown {
            compute,
            again,
            optimizer: (parameters - held.iter().sum::<f64>()) / rate,
            norm: parameters / self.norm,
            ..Default::default()
        };
        let early = self.early(model, p, t, &held);
        if self.overlapped() { self.simulate(Run::new(self, model, p, t, rate, &held, &early), base) } else { self.sum(model, p, base) }
    }

    fn sum(&self, model: &Model, p: &EnginePlan, mut s: Breakdown) -> Breakdown {
        let loads = 2.0 * p.groups as f64 - 1.0;
        let n = p.world as f64;
        let out = match p.device_gradients {
            Some(_) => 0.0,
            None if p.resident_gradients => 1.0,
            None => 2.0 * p.groups as f64 - 1.0,
        };
        for b in 0..model.len() {
            let bytes = model.places[b].1 as f64 * p.dtype.size() as f64;
            s.copies_in += bytes * if p.resident[b] { 1.0 } else { 1.0 + loads } / self.to_device;
            s.copies_out += bytes * out / self.from_device;
            if p.world > 1 {
                s.copies_out += model.places[b].1 as f64 * 4.0 * out * (n - 1.0) / n / self.peers;
            }
        }
        (s.wait_copies, s.wait_gradients, s.wait_optimizer, s.wait_norm) = (s.copies_in, s.copies_out, s.optimizer, s.norm);
        s.step = s.compute + s.copies_in + s.copies_out + s.optimizer + s.norm;
        s
    }

    fn simulate(&self, mut run: Run<'_>, mut s: Breakdown) -> Breakdown {
        // Groups in the middle are alike: a few are played, the rest follow from the last of them.
        const PLAYED: usize = 4;
        let p = run.p;
        let played = p.groups.min(PLAYED);
        for g in 0..played {
            let start = (run.compute, run.s);
            run.group(g, g + 1 == played);
            if g + 2 == played && p.groups > PLAYED {
                // This one stands for those that are not played.
                let more = (p.groups - PLAYED) as f64;
                run.skip((run.compute - start.0) * more);
                run.s.wait_copies += (run.s.wait_copies - start.1.wait_copies) * more;
                run.s.wait_gradients += (run.s.wait_gradients - start.1.wait_gradients) * more;
                run.s.copies_in += (run.s.copies_in - start.1.copies_in) * more;
                run.s.copies_out += (run.s.copies_out - start.1.copies_out) * more;
            }
        }
        let r = run.s;
        let committed = run.published.iter().copied().fold(0.0, f64::max) + run.gradients;
        let copied = run.compute.max(run.out).max(if run.written_back > 0.0 { committed } else { 0.0 });
        let end = if self.norm_beside { copied.max(run.norm) } else { copied + s.norm };
        s.tail = copied - run.compute + TURN;
        s.wait_norm = end - copied;
        s.step = end + TURN;
        (s.copies_in, s.copies_out) = (r.copies_in, r.copies_out);
        (s.wait_optimizer, s.wait_copies, s.wait_gradients) = (r.wait_optimizer, r.wait_copies, r.wait_gradients);
        s
    }
}

/// The streams of one step; times are ends of what was enqueued so far.
struct Run<'a> {
    cost: &'a Cost,
    model: &'a Model,
    p: &'a EnginePlan,
    t: &'a Times,
    /// Micro-batches a group, on average.
    count: f64,
    /// Parameters of each block whose state, and so weights, the device has.
    held: &'a [f64],
    /// When each block's weights can be had.
    updated: Vec<f64>,
    /// When each block's pages are published, but for the time in which gradients of blocks behind it go out.
    published: Vec<f64>,
    /// Seconds in which held pages go out.
    written_back: f64,
    /// Seconds of copies of gradients so far.
    gradients: f64,
    compute: f64,
    copy_in: f64,
    peers: f64,
    out: f64,
    norm: f64,
    /// Streamed blocks in slots, the one visited last at the back, and the end of each one's visit.
    slots: VecDeque<(usize, f64)>,
    /// Ends of the copies out of the ring's buffers.
    ring: VecDeque<f64>,
    s: Breakdown,
}

impl<'a> Run<'a> {
    /// `held` parameters of each block are updated where they are, `early` ones have been, the others are at `rate` a second.
    fn new(cost: &'a Cost, model: &'a Model, p: &'a EnginePlan, t: &'a Times, rate: f64, held: &'a [f64], early: &[f64]) -> Self {
        let (mut advanced, mut others) = (0.0, 0.0);
        let n = p.world as f64;
        let state = ramtorch_device::state_bytes(&p.store) as f64;
        // Where gradients are there, in one go before the first forward visit: what the device's memory takes.
        let here = |b: usize| p.keeps_packed(b);
        let at_once: f64 = (0..held.len()).filter(|b| here(*b)).map(|b| held[b]).sum::<f64>() / n * (2.0 * state + 2.0) / cost.memory;
        advanced += at_once;
        let mut updated: Vec<f64> = Vec::with_capacity(model.len());
        for (b, (((_, len), held), early)) in model.places.iter().zip(held).zip(early).enumerate() {
            let rest = *len as f64 - held - early;
            if !here(b) {
                advanced += held / n * p.store.gradients.bytes() as f64 / cost.both[0];
            }
            others += rest / rate;
            updated.push(match (*held > 0.0, rest > 0.0) {
                (true, true) => others.max(advanced),
                (true, false) => advanced,
                (false, _) => others,
            });
        }
        // Held pages go out when all others have.
        let end = updated.iter().copied().fold(0.0, f64::max);
        let mut written_back = 0.0;
        let mut published = updated.clone();
        let stays = cost.first_pages(model, p, p.held_pages);
        for b in (0..model.len()).rev().filter(|b| held[*b] > 0.0) {
            // With a log, so many steps share the way out among them; what visits leaves at each.
            let leaves = stays[b] / f64::from(p.store.log.steps) + held[b] - stays[b];
            written_back += leaves / n * state / (cost.both[1] * WRITE_BACK);
            published[b] = end + written_back;
        }
        Run {
            cost,
            model,
            p,
            t,
            held,
            count: p.sequences as f64 / p.micro_batch as f64 / p.groups as f64,
            updated,
            published,
            written_back,
            gradients: 0.0,
            compute: 0.0,
            copy_in: 0.0,
            peers: 0.0,
            out: 0.0,
            norm: 0.0,
            slots: VecDeque::new(),
            ring: VecDeque::new(),
            s: Breakdown::default(),
        }
    }

    fn skip(&mut self, seconds: f64) {
        self.compute += seconds;
        self.copy_in += seconds;
        self.peers += seconds;
        self.out += seconds;
        self.slots.iter_mut().map(|(_, end)| end).chain(&mut self.ring).for_each(|x| *x += seconds);
    }

    /// When the weights that a visit needs have come; `first` for the sweep that follows the optimizer.
    fn load(&mut self, needs: &[usize], first: bool, busy_out: bool) -> (f64, f64) {
        let rate = if busy_out || first { self.cost.both[0] } else { self.cost.to_device };
        let (mut ready, mut gate) = (0f64, 0f64);
        for &b in needs {
            // When there is a slot for it.
            let mut free = 0.0;
            if !self.p.resident[b] {
                let held = self.slots.iter().position(|(block, _)| *block == b).and_then(|i| self.slots.remove(i));
                if held.is_none() && self.slots.len() >= self.p.slots.max(1) {
                    free = self.slots.pop_front().map_or(0.0, |(_, end)| end);
                }
                self.slots.push_back((b, held.map_or(0.0, |(_, end)| end)));
                if held.is_some() && !first {
                    continue;
                }
            } else if !first {
                continue;
            }
            let bytes = |parameters: f64| parameters * self.p.dtype.size() as f64;
            let len = self.model.places[b].1 as f64;
            let n = self.p.loading_ranks().world as f64;
            // Weights of held pages are where they belong.
            let loaded = if self.p.resident[b] { len - self.held[b] } else { len };
            let (seconds, gather) = (bytes(loaded) / n / rate, self.between(bytes(len), n));
            let mut start = self.copy_in.max(free);
            if first {
                start = start.max(self.updated[b] + NOTICE);
                gate = gate.max(self.updated[b] + NOTICE + seconds + gather);
            }
            self.copy_in = start + seconds;
            self.compute += DRAG[0] * seconds + PEERS_DRAG * gather;
            self.s.copies_in += seconds;
            if gather > 0.0 {
                self.peers = self.peers.max(self.copy_in) + gather;
                ready = ready.max(self.peers);
            }
            ready = ready.max(self.copy_in);
        }
        (ready, gate)
    }

    /// Seconds in which `n` ranks gather or reduce `bytes`.
    fn between(&self, bytes: f64, n: f64) -> f64 {
        bytes * (n - 1.0) / n / self.cost.peers
    }

    fn visit(&mut self, needs: &[usize], seconds: f64, first: bool, busy_out: bool) {
        let (ready, gate) = self.load(needs, first, busy_out);
        let idle = (ready - self.compute).max(0.0);
        let for_pages = (gate - self.compute).clamp(0.0, idle);
        self.s.wait_optimizer += for_pages;
        self.s.wait_copies += idle - for_pages;
        self.compute = self.compute.max(ready) + seconds;
        for (_, end) in self.slots.iter_mut().filter(|(b, _)| needs.contains(b)) {
            *end = self.compute;
        }
    }

    /// Room for a block's gradients, zeroed.
    fn open(&mut self, b: usize, g: usize) {
        if g > 0 && self.p.resident_gradients {
            return;
        }
        if !self.p.resident_gradients && self.ring.len() >= super::GRADIENT_RING {
            let free = self.ring.pop_front().unwrap_or(0.0);
            let idle = (free - self.compute).max(0.0);
            self.s.wait_gradients += idle;
            self.compute += idle;
        }
        self.compute += self.model.places[b].1 as f64 * 4.0 / self.cost.memory;
    }

    fn close(&mut self, b: usize, g: usize, last_group: bool) {
        if self.p.resident_gradients && !last_group {
            return;
        }
        if g == 0 || self.p.resident_gradients {
            // What leaves overwrites what the block's pages were made of.
            let idle = (self.published[b] + self.gradients + NOTICE - self.compute).max(0.0);
            self.s.wait_optimizer += idle;
            self.compute += idle;
        }
        let (elements, n) = (self.model.places[b].1 as f64, self.p.world as f64);
        if let Some(format) = self.p.device_gradients {
            // Rounded, and read once more for the norm; nothing leaves.
            let passes = if self.p.keeps_rounded() { 6.0 } else { 0.0 } + if last_group { format.bytes() as f64 } else { 0.0 };
            self.compute += elements * passes / self.cost.memory;
            return;
        }
        let bytes = elements * self.p.gradient_bytes() as f64 / n;
        let wire = if self.p.packs() { self.p.gradient_bytes() as f64 } else { 4.0 };
        let reduce = self.between(elements * wire, n);
        let loads = if self.p.groups > 1 && !self.p.resident.iter().all(|r| *r) { self.cost.both[1] } else { self.cost.from_device };
        let mut seconds = bytes / loads;
        if g > 0 && !self.p.resident_gradients {
            seconds += bytes / self.cost.both[0];
        }
        if !self.p.packs() && self.p.store.gradients == GradientFormat::Bf16 {
            let visit = if self.t.backward[b] > 0.0 { self.t.backward[b] } else { self.t.forward[b] };
            seconds += (elements / n / PIECE).ceil() * PIECE_WAIT.min(visit * PIECE_WAIT_SHARE);
        }
        let mut whole = self.compute;
        if reduce > 0.0 {
            self.peers = self.peers.max(self.compute) + reduce;
            whole = self.peers;
        }
        self.out = self.out.max(whole) + seconds;
        if self.written_back > 0.0 {
            self.gradients += seconds;
        }
        self.compute += DRAG[1] * seconds + PEERS_DRAG * reduce;
        if self.p.copies_back(b) {
            self.compute += 2.0 * bytes / self.cost.memory;
        }
        if last_group && self.p.squares() {
            self.compute += bytes / self.cost.memory;
        } else if last_group {
            self.norm = self.norm.max(self.out) + elements / self.cost.norm;
        }
        self.s.copies_out += seconds;
        if !self.p.resident_gradients {
            self.ring.push_back(self.out);
        }
    }

    /// Gradients that the optimizer reads where they are may not be overwritten before the last step is committed.
    fn await_commit(&mut self) {
        let committed = self.published.iter().copied().fold(0.0, f64::max) + NOTICE;
        let idle = (committed - self.compute).max(0.0);
        self.s.wait_optimizer += idle;
        self.compute += idle;
    }

    fn group(&mut self, g: usize, last_group: bool) {
        let last = self.model.len() - 1;
        let first = g == 0;
        for b in 0..last {
            self.visit(&[b], self.t.forward[b] * self.count, first, false);
        }
        // Sums that stay are opened in their own buffers, which belong to the step before until it is committed.
        let in_place = self.p.device_gradients == Some(GradientFormat::F32);
        if first && in_place {
            self.await_commit();
        }
        self.open(last, g);
        let needs = self.model.forward_needs(last);
        // A tied head finds the embedding's pages published.
        self.visit(&needs[..1], 0.0, first, false);
        let more: &[usize] = if needs.len() > 1 && !self.p.resident[needs[1]] { &needs[1..] } else { &[] };
        self.visit(more, self.t.forward[last] * self.count, false, false);
        self.compute += if first { DRAG[1] * self.written_back } else { 0.0 };
        self.close(last, g, last_group);
        let out = last_group || !self.p.resident_gradients;
        for b in (0..last).rev() {
            self.open(b, g);
            let needs: &[usize] = if self.model.backward_needs(b) { &[b] } else { &[] };
            let seconds = (self.t.backward[b] + self.t.again(b, self.p.keep[b])) * self.count;
            self.visit(needs, seconds, false, out);
            self.close(b, g, last_group);
        }
    }
}
