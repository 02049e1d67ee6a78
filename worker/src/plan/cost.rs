//! What a step costs: the times of visits from rates, and how a step's streams play together ([`play`]).
//!
//! On CPU devices everything shares the same cores: there the parts are added up.

use super::{EnginePlan, Schedule};
use crate::api::{DeviceKind, LayerTimes, Rates};
use crate::model::{Block, Keep, Model};
use ramtorch_device::Dtype;

mod play;

use play::Run;

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
/// Copies in slow the arithmetic beside them by this share of their own time.
const DRAG_IN: f64 = 0.01;
/// Gathers and reductions take multiprocessors from the arithmetic beside them, 8 of 132: by this share of their own time, at
/// most, where it was not measured.
const PEERS_DRAG: f64 = 0.06;
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
/// More of them than the GPU comes to by the rates: who is faster than expected shall not run short.
const STAGED_MORE: f64 = 1.2;
/// Bytes a parameter that an update on the GPU moves in and out, beside the moments: both halves in and out, a gradient in.
const STAGED_IN: f64 = 6.0;
const STAGED_OUT: f64 = 4.0;

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
    /// Bytes a second of gathers, and of reductions, by what a rank receives of others; infinite for one that is alone.
    peers: f64,
    reduces: f64,
    /// Share of their time that loads, gathers and reductions take from the arithmetic beside them.
    drag_in: f64,
    drag_peers: [f64; 2],
    /// Sharing loads out is faster than each rank's copying everything.
    pub gathers: bool,
}

fn or(x: f64, default: f64) -> f64 {
    if x > 0.0 && x.is_finite() { x } else { default }
}

impl Cost {
    /// `moment` is the bytes of one moment of a parameter; `split`: the device updates pages too; of `world` ranks.
    pub fn new(rates: Rates, kind: DeviceKind, dtype: Dtype, moment: u64, split: bool, world: usize) -> Cost {
        let between = |ranks: f64| if world > 1 { ranks } else { f64::INFINITY };
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
                peers: between(copy),
                reduces: between(copy),
                drag_in: DRAG_IN,
                drag_peers: [PEERS_DRAG; 2],
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
        let together = rates.together.filter(|t| world > 1 && t.pull_bytes > 0.0 && t.gather_bytes > 0.0 && t.reduce_bytes > 0.0);
        let alone = shared(or(g.to_device, typical::TO_DEVICE), typical::NODE[0]);
        let to_device = together.map_or(alone, |t| t.pull_bytes.min(or(g.to_device, typical::TO_DEVICE)));
        // Measured are copies, for which NVLink has more than collectives with few thread blocks take; slower links have what
        // copies get.
        let peers = or(rates.peer_bytes, typical::PEERS).min(typical::PEERS);
        // A block's share over the own link and the others' from their devices, or all of it over the own link.
        let faster = match together {
            // Seconds for a byte of a block, and those of arithmetic that they cost.
            Some(t) => (2.0 - t.gather_products) / t.gather_bytes < (2.0 - t.pull_products) / t.pull_bytes,
            None => 1.0 / n / to_device + (n - 1.0) / n / peers < 1.0 / to_device,
        };
        let gathers = world > 1 && rates.peer_access.unwrap_or(false) && faster;
        let received = |of_blocks: f64| of_blocks * (n - 1.0) / n;
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
            peers: together.map_or(between(peers), |t| received(t.gather_bytes)),
            reduces: together.map_or(between(peers), |t| received(t.reduce_bytes)),
            drag_in: together.map_or(DRAG_IN, |t| 1.0 - t.pull_products),
            drag_peers: together.map_or([PEERS_DRAG; 2], |t| [1.0 - t.gather_products, 1.0 - t.reduce_products]),
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

    /// For each block but the last: pages whose state comes to the device after its visit of the backward pass of the last group, into
    /// what is no longer needed ([`Schedule`]). As many as the bus has time for beside the next block's weights, where there is room, and as
    /// the device comes to. What is made again takes time too, but counts for nothing: more memory, where less is made again,
    /// shall not mean fewer pages. What is left of the time of one block, less than a page's, goes to the next: its last page
    /// may come a little late.
    pub fn staged_pages(&self, model: &Model, p: &EnginePlan, t: &Times) -> Vec<usize> {
        let Some(page) = p.store.page_parameters.filter(|_| self.overlapped() && p.optimizer_split && self.adamw_gpu > 0.0) else {
            return Vec::new();
        };
        let (parameters, state) = (f64::from(page), ramtorch_device::state_bytes(&p.store));
        let bytes = parameters * state as f64;
        let held = self.held(model, p);
        let mut visiting = vec![0.0; model.len()];
        p.visited_rooms(model).iter().for_each(|(b, _)| visiting[*b] += bytes);
        let n = model.len() - 1;
        let (mut caps, mut rooms, mut own) = (vec![0; n], vec![0; n], vec![0; n]);
        // Those that visit where the last block's sums were come first.
        let mut left = -visiting[n];
        let part = ramtorch_device::staged_parameters(u64::from(page));
        let parts_a_page = ramtorch_device::staged_parts(u64::from(page));
        for b in (0..n).rev() {
            // Beside the next visit, which is a layer's but for the first layer.
            let seconds = if b == 0 { 0.0 } else { t.backward[b].min(t.backward[b - 1]) } * p.group_len as f64;
            let weights = if p.resident[b] { 0.0 } else { (model.places[b].1 * p.dtype.size()) as f64 };
            let time = (seconds * self.both[0] * STAGED_SHARE - weights).max(0.0) + left - visiting[b];
            let saved = if p.keep[b] == Keep::Inputs { 0 } else { model.saved_bytes(b, p.shape(), p.keep[b]) };
            let output = (p.shape().rows() * model.width(b)) as u64 * p.dtype.size();
            rooms[b] = ((saved / (part * state) + output / (part * state)) * p.group_len as u64 / parts_a_page) as usize;
            own[b] = ((model.places[b].1 as f64 - held[b]) / p.world as f64 / parameters).max(0.0) as usize;
            caps[b] = (time / bytes).max(0.0) as usize;
            left = (time - caps[b] as f64 * bytes).min(bytes);
        }
        let all = (model.places.iter().map(|place| place.1 as f64).sum::<f64>() - held.iter().sum::<f64>()) / p.world as f64 / parameters;
        let gpu = p.world as f64 * self.both[1] / state as f64;
        Schedule::new(&own, &rooms, &caps, (STAGED_MORE * all * gpu / (gpu + self.adamw)) as usize).loads()
    }

    /// Share of the parameters that are not held whose pages are staged, by all ranks.
    fn staged_share(&self, model: &Model, p: &EnginePlan, held: &[f64]) -> f64 {
        let Some(page) = p.store.page_parameters else { return 0.0 };
        let of_ranks = f64::from(page) * p.world as f64;
        let staged = p.staged_pages.iter().sum::<usize>() as f64 * of_ranks;
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
        if self.overlapped() { Run::new(self, model, p, t, rate, &held, &early).play(base) } else { self.sum(model, p, base) }
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
                s.copies_out += model.places[b].1 as f64 * 4.0 * out * (n - 1.0) / n / self.reduces;
            }
        }
        (s.wait_copies, s.wait_gradients, s.wait_optimizer, s.wait_norm) = (s.copies_in, s.copies_out, s.optimizer, s.norm);
        s.step = s.compute + s.copies_in + s.copies_out + s.optimizer + s.norm;
        s
    }
}
