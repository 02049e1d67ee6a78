//! The plan: where everything goes and what a step costs, worked out before anything is allocated.
//!
//! Everything the engine allocates is listed here ([`DeviceUse`]) by the same code that sizes the buffers, so the bytes
//! of the plan are the bytes of the run. [`search`] goes through micro-batch sizes, groups, weights and gradients that
//! stay, spends what the device has left on activations, and takes the fastest combination by [`cost`].

mod cost;
mod residence;
mod search;
mod staging;
#[cfg(test)]
mod tests;
mod text;

pub(crate) use residence::{Residence, resident};
pub(crate) use staging::{Schedule, held_pages, staged_pages};

use crate::api::*;
use crate::early::kept_numbers;
use crate::model::{Block, Keep, Model, Shape};
use cost::Cost;
use ramtorch_cpu::Collectives;
use ramtorch_device::{AttentionShape, DevBuf, Dtype, HeldPage, Ranks};
use ramtorch_job::{GradientPlace, JobSpec, Precision};
use ramtorch_modelio::Architecture;
use ramtorch_store::{GradientFormat, GradientLog, Layout, MomentFormat, PageId, StoreError, StoreSpec};
use serde::{Deserialize, Serialize};

/// Bytes of logits that the head makes at once: enough rows for efficient products on either kind.
fn head_logit_bytes(kind: DeviceKind) -> u64 {
    match kind {
        DeviceKind::Cpu => 64 << 20,
        DeviceKind::Cuda => 1 << 30,
    }
}

/// The engine's part of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct EnginePlan {
    pub world: usize,
    pub dtype: Dtype,
    pub store: StoreSpec,
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    pub seq: usize,
    pub head_rows: usize,
    /// Groups a step (on the rank with most sequences).
    pub groups: usize,
    /// Micro-batches of the largest group.
    pub group_len: usize,
    /// Micro-batches a step, of the rank with most sequences.
    pub micro_batches: usize,
    /// Sequences a step, of that rank.
    pub sequences: usize,
    /// Sizes of micro-batches that a step has: the full one, and what is left over on some rank.
    pub batch_sizes: Vec<usize>,
    /// Attention stops at the bounds of documents.
    pub documents: bool,
    /// What of each block's activations is kept from the forward pass.
    pub keep: Vec<Keep>,
    /// Blocks whose weights stay on the device during a step.
    pub resident: Vec<bool>,
    /// Buffers for the weights of the other blocks.
    pub slots: usize,
    /// Gradients stay on the device until the last group of a step.
    pub resident_gradients: bool,
    /// The device rounds gradients to the store's format itself, between other arithmetic, before they leave; where they
    /// are not added to what is in the segment.
    #[serde(default)]
    pub pack_gradients: bool,
    /// Gradients stay on the device, in this format, until their step is committed; the segment has no room for them. fp32: the
    /// sums themselves, one a block. bf16: each block's sum rounded into a buffer of its own, to which later groups add.
    #[serde(default)]
    pub device_gradients: Option<GradientFormat>,
    /// The device updates pages too, beside the CPU.
    #[serde(default)]
    pub optimizer_split: bool,
    /// Each rank copies its share of a block, and the devices gather the shares; otherwise each rank copies all of it.
    #[serde(default)]
    pub gather_weights: bool,
    /// Addresses of devices on the bus, by rank, for the place of their pages.
    #[serde(default)]
    pub bus_ids: Vec<Option<String>>,
    /// For each block but the last (or empty: none): pages whose state is brought to the device after the block's visit of the backward pass, into
    /// memory of activations that are done with (`plan::staging`).
    #[serde(default)]
    pub staged_pages: Vec<usize>,
    /// Pages of a rank whose state stays on its device, beside the one in RAM: the first of those whose weights stay there whole. They
    /// are published beside the sweeps of the next step.
    #[serde(default)]
    pub held_pages: usize,
    /// Pages of a rank behind those, whose state comes to the device during each backward pass and leaves it during the next: until then it lies where
    /// sums of gradients were ([`EnginePlan::visiting_rooms`]). Otherwise they are as those that stay.
    #[serde(default)]
    pub visiting_pages: usize,
    /// Blocks (or empty: none) whose rounded gradients stay on the device until the next backward pass, beside those in the segment: held
    /// pages are updated from there, all at once before the next forward pass.
    #[serde(default)]
    pub held_gradients: Vec<bool>,
    /// The device squares gradients before they leave, where what leaves is what is stored.
    #[serde(default)]
    pub squares_on_device: bool,
    /// Pages are updated as soon as their own gradients are whole: they are not clipped, and the place of gradients has room for
    /// the weights that a death would want back.
    #[serde(default)]
    pub early_updates: bool,
    pub uses: DeviceUse,
    /// Bytes of RAM of each rank in which pages of a checkpoint wait for the disk.
    #[serde(default)]
    pub checkpoint_staging: u64,
}

/// Bytes of device memory by purpose; each is what the engine allocates, rounded as devices round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct DeviceUse {
    pub tables: u64,
    pub scratch: u64,
    pub resident_weights: u64,
    pub slots: u64,
    pub gradients: u64,
    pub inputs: u64,
    pub boundaries: u64,
    pub activations: u64,
    /// Staging of pages that the device updates.
    #[serde(default)]
    pub optimizer: u64,
    /// State of pages that stays.
    #[serde(default)]
    pub held: u64,
    /// What the driver, its libraries and the device's own buffers take beside what the engine allocates.
    #[serde(default)]
    pub libraries: u64,
}

impl DeviceUse {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.allocated() + self.libraries
    }

    /// What the engine allocates, and may.
    pub fn allocated(&self) -> u64 {
        self.tables
            + self.scratch
            + self.resident_weights
            + self.slots
            + self.gradients
            + self.inputs
            + self.boundaries
            + self.activations
            + self.optimizer
            + self.held
    }
}

/// Device memory that an open device of a gang of `world` takes beside what is allocated on it.
pub(crate) fn library_bytes(kind: DeviceKind, deterministic: bool, world: usize) -> u64 {
    match kind {
        DeviceKind::Cpu => 0,
        DeviceKind::Cuda => {
            ramtorch_cuda::CudaDevice::outside_bytes(deterministic) + if world > 1 { ramtorch_cuda::CudaDevice::PEERS_BYTES } else { 0 }
        }
    }
}

/// Rounds as `Device::alloc` does.
pub(crate) fn rounded(bytes: u64) -> u64 {
    bytes.max(1).next_multiple_of(256)
}

/// Sequences of rank `rank`: positions in the step's batch.
pub(crate) fn rank_share(batch: usize, rank: usize, world: usize) -> std::ops::Range<usize> {
    batch * rank / world..batch * (rank + 1) / world
}

impl EnginePlan {
    /// Gradients leave rounded: nothing in the segment is added to.
    pub fn packs(&self) -> bool {
        self.pack_gradients && self.device_gradients.is_none() && (self.resident_gradients || self.groups == 1)
    }

    /// Sums are rounded into buffers that stay.
    pub fn keeps_rounded(&self) -> bool {
        self.device_gradients == Some(GradientFormat::Bf16)
    }

    /// The norm of the gradients comes from the device: their sums are whole there, in the format that the optimizer reads.
    pub fn squares(&self) -> bool {
        if self.device_gradients.is_some() {
            return true;
        }
        let whole = self.store.gradients == GradientFormat::F32 && (self.resident_gradients || self.groups == 1);
        self.squares_on_device && (self.packs() || whole)
    }

    /// Nothing is trained: there are no gradients, and a block's input is not needed once the block is done.
    pub fn forward_only(&self) -> bool {
        self.store.gradients == GradientFormat::None && self.device_gradients.is_none()
    }

    /// Rounded gradients of block `b` stay on the device until the next backward pass.
    pub fn keeps_packed(&self, b: usize) -> bool {
        self.packs() && self.held_gradients.get(b).is_some_and(|keeps| *keeps)
    }

    /// They are copied to where the block's sum was, which is free once it is rounded.
    pub fn copies_back(&self, b: usize) -> bool {
        self.resident_gradients && self.keeps_packed(b)
    }

    /// Where state of pages may lie from the end of a step's sums to the next step's first: blocks, from the last on, and offsets in the buffers of
    /// their sums, behind rounded gradients that stay there. A tied embedding's sum is opened first of all, before anything has left.
    pub fn visiting_rooms(&self, model: &Model) -> Vec<(usize, u64)> {
        let Some(page) = self.store.page_parameters.filter(|_| self.packs() && self.resident_gradients) else { return Vec::new() };
        let (each, ranks) = (rounded(HeldPage::bytes(&self.store, u64::from(page))), self.ranks());
        let of_block = |b: usize| {
            let parameters = ranks.padded(model.places[b].1);
            let first = if self.copies_back(b) { rounded(parameters * self.store.gradients.bytes()) } else { 0 };
            let count = (parameters * 4).saturating_sub(first) / each;
            (0..count).map(move |i| (b, first + i * each))
        };
        (usize::from(model.tied())..model.len()).rev().flat_map(of_block).collect()
    }

    /// Those of them that pages visit.
    pub fn visited_rooms(&self, model: &Model) -> Vec<(usize, u64)> {
        if self.visiting_pages == 0 {
            return Vec::new();
        }
        let mut rooms = self.visiting_rooms(model);
        rooms.truncate(self.visiting_pages);
        rooms
    }

    /// They are rounded into a buffer of their own.
    pub fn own_packed(&self, b: usize) -> bool {
        !self.resident_gradients && self.keeps_packed(b)
    }

    pub fn shape(&self) -> Shape {
        Shape { sequences: self.micro_batch, seq: self.seq, head_rows: self.head_rows }
    }

    /// The first rank: sizes are the same on all of them.
    pub fn ranks(&self) -> Ranks {
        Ranks { rank: 0, world: self.world }
    }

    /// The first of those that share the loads of weights out.
    pub fn loading_ranks(&self) -> Ranks {
        if self.gather_weights { self.ranks() } else { Ranks::ALONE }
    }

    /// Bytes of a gradient in the segment.
    pub fn gradient_bytes(&self) -> u64 {
        self.store.gradients.bytes()
    }

    /// The most that `workspace` tells of all shapes of attention that micro-batches of this plan have.
    pub fn attention_workspace(
        &self,
        s: &AttentionShape,
        workspace: &dyn Fn(&AttentionShape) -> Result<u64, EngineError>,
    ) -> Result<u64, EngineError> {
        let mut most = workspace(s)?;
        for batch in &self.batch_sizes {
            let starts = self.documents.then_some(DevBuf { ptr: 0, bytes: 0 });
            most = most.max(workspace(&AttentionShape { batch: *batch, starts, ..*s })?);
        }
        Ok(most)
    }

    /// The same for each layer's window, asked once.
    pub fn attention_workspaces(
        &self,
        model: &Model,
        workspace: &dyn Fn(&AttentionShape) -> Result<u64, EngineError>,
    ) -> Result<Vec<(Option<usize>, u64)>, EngineError> {
        let mut seen: Vec<(Option<usize>, u64)> = Vec::new();
        for b in &model.blocks {
            if let Block::Layer(l) = b {
                let s = l.attention_shape(self.shape());
                if !seen.iter().any(|x| x.0 == s.window) {
                    seen.push((s.window, self.attention_workspace(&s, workspace)?));
                }
            }
        }
        Ok(seen)
    }

    pub fn of(plan: &Plan) -> Result<EnginePlan, EngineError> {
        serde_json::from_value(plan.detail.clone()).map_err(|e| EngineError::internal(format!("the plan does not read: {e}")))
    }
}

/// Device memory that a training run takes; shared by the search and, as a check, by the engine.
pub(crate) fn device_use(
    model: &Model,
    p: &EnginePlan,
    workspace: &dyn Fn(&AttentionShape) -> Result<u64, EngineError>,
) -> Result<DeviceUse, EngineError> {
    let (shape, dt) = (p.shape(), p.dtype.size());
    let rows = shape.rows() as u64;
    let last = model.len() - 1;
    // Where ranks share a block, its buffers have room for equal shares.
    let (loading, ranks) = (p.loading_ranks(), p.ranks());
    let weights = |b: usize| rounded(loading.padded(model.places[b].1) * dt);
    let streamed = (0..model.len()).filter(|b| !p.resident[*b]).map(weights).max().unwrap_or(0);
    let mut u = DeviceUse {
        tables: rope_table_bytes(&model.architecture, p.seq),
        scratch: rounded(model.scratch_bytes(shape, &|s| p.attention_workspace(s, workspace))?),
        resident_weights: (0..model.len()).filter(|b| p.resident[*b]).map(weights).sum(),
        slots: streamed * p.slots as u64,
        libraries: p.uses.libraries,
        ..Default::default()
    };
    let gradient = |b: usize| rounded(ranks.padded(model.places[b].1) * 4);
    u.gradients = if p.resident_gradients {
        (0..model.len()).map(gradient).sum()
    } else if p.forward_only() {
        0
    } else {
        let own = usize::from(model.tied()); // block 0 collects over the whole sweep
        let ring = (own..model.len()).map(gradient).max().unwrap_or(0) * GRADIENT_RING as u64;
        let ring = if p.packs() || p.keeps_rounded() { ring / GRADIENT_RING as u64 } else { ring };
        ring + if model.tied() { gradient(0) } else { 0 }
    };
    if p.packs() && p.store.gradients != GradientFormat::None {
        let packed = |b: usize| rounded(ranks.padded(model.places[b].1) * p.store.gradients.bytes());
        let (own, others): (Vec<usize>, Vec<usize>) = (0..model.len()).partition(|b| p.own_packed(*b));
        u.gradients += own.into_iter().map(packed).sum::<u64>();
        u.gradients += others.into_iter().map(packed).max().unwrap_or(0) * GRADIENT_RING as u64;
    }
    if p.keeps_rounded() {
        u.gradients += (0..model.len()).map(|b| rounded(ranks.padded(model.places[b].1) * GradientFormat::Bf16.bytes())).sum::<u64>();
    }
    if let Some(page) = p.store.page_parameters.filter(|_| p.optimizer_split) {
        u.optimizer = ramtorch_device::staging_bytes(&p.store, u64::from(page));
    }
    if let Some(page) = p.store.page_parameters.filter(|_| p.held_pages > 0) {
        u.held = p.held_pages as u64 * rounded(HeldPage::bytes(&p.store, u64::from(page)));
    }
    let group = p.group_len as u64;
    u.inputs = group * inputs_bytes(model, shape) + rounded(rows * 4 * p.micro_batches as u64);
    if p.squares() {
        u.inputs += rounded(8 * model.len() as u64);
    }
    let width = |b: usize| rounded(rows * model.width(b) as u64 * dt);
    let widest = (0..model.len()).map(width).max().unwrap_or(0);
    u.boundaries = group * if p.forward_only() { 2 * widest } else { (0..last).map(width).sum::<u64>() + widest };
    let saved = |b: usize, keep: Keep| rounded(model.saved_bytes(b, shape, keep));
    let kept: u64 = (0..last).filter(|b| p.keep[*b] != Keep::Inputs).map(|b| saved(b, p.keep[b])).sum();
    let shared = (0..last).any(|b| p.keep[b] == Keep::Inputs);
    u.activations = group * kept + if shared { (0..last).map(|b| saved(b, Keep::Inputs)).max().unwrap_or(0) } else { 0 };
    Ok(u)
}

/// Buffers in which gradients wait for their way out, where they do not stay.
pub(crate) const GRADIENT_RING: usize = 2;

/// Bytes of one micro-batch's ids (or matrix), their inverse, targets, weights and document starts.
pub(crate) fn inputs_bytes(model: &Model, shape: Shape) -> u64 {
    let rows = shape.rows() as u64;
    let input = if model.input_width() > 0 {
        // the matrix in the compute format, and as it came
        rounded(rows * model.input_width() as u64 * model.dtype.size()) + rounded(rows * model.input_width() as u64 * 4)
    } else {
        2 * rounded(rows * 4) + rounded((rows + 1) * 4) + rounded(rows * 4)
    };
    input + rounded(rows * model.target_width().max(1) as u64 * 4) + rounded(rows * 4)
}

/// Bytes of the rotary table for `positions` positions.
pub(crate) fn rope_table_bytes(a: &Architecture, positions: usize) -> u64 {
    match a.transformer() {
        Some(c) if c.rope.is_some() => rounded((positions * c.head_dim * 4) as u64),
        _ => 0,
    }
}

/// Rows of logits made at once.
pub(crate) fn head_rows(a: &Architecture, dtype: Dtype, rows: usize, kind: DeviceKind) -> usize {
    let Some(c) = a.transformer() else { return rows };
    let most = (head_logit_bytes(kind) / (c.vocab_size as u64 * dtype.size())) as usize;
    (most / 64 * 64).max(64).min(rows)
}

fn dtype_of(spec: &JobSpec, kind: DeviceKind) -> Dtype {
    match spec.train.precision {
        Some(Precision::Fp32) => Dtype::F32,
        Some(Precision::Bf16) => Dtype::Bf16,
        None if kind == DeviceKind::Cuda => Dtype::Bf16,
        None => Dtype::F32,
    }
}

/// Sequences at once of all micro-batches that a plan for `world` ranks may have, largest first.
pub(crate) fn batch_sizes(spec: &JobSpec, world: usize, seq: usize, kind: DeviceKind) -> Vec<usize> {
    search::batch_sizes(spec, world, seq, kind)
}

/// Where the parameters of a job's model lie, and the number format of its arithmetic.
pub(crate) fn layout_of(spec: &JobSpec, architecture: &Architecture, kind: DeviceKind) -> Result<(Layout, Dtype), EngineError> {
    let dtype = dtype_of(spec, kind);
    let store = store_of(spec, architecture, 1, dtype, String::new());
    Ok((Layout::new(&store).map_err(|e| EngineError::new(ErrorKind::Resources, e))?, dtype))
}

fn store_spec(spec: &JobSpec, prepared: &Prepared, architecture: &Architecture, world: usize, dtype: Dtype) -> StoreSpec {
    let metadata = serde_json::json!({ "name": spec.name, "architecture": prepared.architecture, "model": spec.model }).to_string();
    store_of(spec, architecture, world, dtype, metadata)
}

fn store_of(spec: &JobSpec, architecture: &Architecture, world: usize, dtype: Dtype, metadata: String) -> StoreSpec {
    let gradients = match (spec.train.gradients, dtype) {
        (Some(Precision::Fp32), _) | (None, Dtype::F32) => GradientFormat::F32,
        _ => GradientFormat::Bf16,
    };
    let moments = match spec.optimizer.moments {
        Precision::Fp32 => MomentFormat::F32,
        Precision::Bf16 => MomentFormat::Bf16,
    };
    StoreSpec {
        blocks: architecture.blocks(),
        world_size: world as u32,
        moments,
        gradients,
        page_parameters: None,
        spare_pages_per_rank: 1,
        exchange_bytes: Collectives::exchange_bytes(world),
        log: GradientLog::NONE,
        metadata,
    }
}

/// Spare pages of a rank whose device updates pages too: the CPU has one in hand, the device two.
const SPLIT_SPARES: u32 = 3;

/// Makes room for updates by the CPU and the device at once. Spares take at most a hundredth of the pages, unless pages
/// would get so small that work on them is not worth its overhead.
fn split_optimizer(store: StoreSpec) -> Result<StoreSpec, StoreError> {
    const SMALLEST: u64 = 1 << 20;
    let layout = Layout::new(&store)?;
    let page = layout.span() / (100 * u64::from(store.world_size) * u64::from(SPLIT_SPARES)) / 1024 * 1024;
    let page = page.max(SMALLEST).min(u64::from(layout.page_parameters()));
    Ok(StoreSpec { page_parameters: Some(page as u32), spare_pages_per_rank: SPLIT_SPARES, ..store })
}

/// Bytes that a device's attention wants beyond its inputs and outputs, where the device itself cannot be asked.
pub(crate) fn assumed_workspace(kind: DeviceKind, deterministic: bool) -> impl Fn(&AttentionShape) -> Result<u64, EngineError> {
    move |s| {
        let per_sequence = (s.heads * s.seq) as u64;
        Ok(match kind {
            DeviceKind::Cpu => 0,
            // cuDNN's deterministic backward pass wants 2 bytes a score at most; the device takes fewer sequences at a time
            // above 1 GiB, and no more than necessary. The other one adds the queries' gradients up in f32, which it is given room for, and nearly as much
            // of its own (measured: 571 MiB beside 640). Row sums come on top of either.
            DeviceKind::Cuda => {
                let scores = per_sequence * s.seq as u64 * 2;
                let parts = (s.batch as u64 * scores).min(1 << 30).max(scores);
                let sums = per_sequence * s.batch as u64 * s.head_dim as u64 * 4;
                (if deterministic { parts } else { 2 * sums }) + 2 * per_sequence * s.batch as u64 * 4 + (64 << 20)
            }
        })
    }
}

/// Works out the plan. Pure.
pub fn plan(request: &PlanRequest) -> Result<Plan, EngineError> {
    let PlanRequest { spec, prepared, devices, .. } = request;
    let architecture: Architecture = serde_json::from_value(prepared.architecture.clone())
        .map_err(|e| EngineError::internal(format!("the architecture does not read: {e}")))?;
    let first = devices
        .first()
        .ok_or_else(|| EngineError::new(ErrorKind::Resources, "no device to run on; start the daemon with --devices or --gpus"))?;
    let world = devices.len();
    if world > ramtorch_cpu::MAX_RANKS {
        return Err(EngineError::new(ErrorKind::Resources, format!("{world} devices: at most {} make a gang", ramtorch_cpu::MAX_RANKS)));
    }
    let dtype = dtype_of(spec, first.kind);
    let mut store = store_spec(spec, prepared, &architecture, world, dtype);
    // On CPU devices only to hold state, where a job asks for it: that is how it is tried out on any machine.
    let asked = spec.train.held_state_gib.is_some_and(|gib| gib > 0.0) && dtype == Dtype::Bf16;
    let optimizer_split = first.kind == DeviceKind::Cuda || asked;
    if optimizer_split {
        store = split_optimizer(store).map_err(|e| EngineError::new(ErrorKind::Resources, e))?;
    }
    let mut layout = Layout::new(&store).map_err(|e| EngineError::new(ErrorKind::Resources, e))?;
    // A CPU device's memory is the same RAM: moving gradients there by itself would gain nothing and lose something.
    let short = layout.bytes() > request.segment_bytes_available && first.kind == DeviceKind::Cuda && world == 1;
    let place = spec.train.gradients_in;
    let mut device_gradients = None;
    if place == Some(GradientPlace::Device) || (place.is_none() && short) {
        if world > 1 {
            return Err(EngineError::new(
                ErrorKind::Resources,
                format!(
                    "gradients_in = \"device\" is for one rank alone, and there are {world} devices: a page's gradients would lie on several of them. Set [device] ranks = 1, or leave gradients in the segment"
                ),
            ));
        }
        device_gradients = Some(store.gradients);
        store.gradients = GradientFormat::None;
        layout = Layout::new(&store).map_err(|e| EngineError::new(ErrorKind::Resources, e))?;
    }
    // Beside a GPU the processor has nothing better to do; on a CPU device it is the one that computes gradients.
    let wanted = spec.optimizer.clip_norm == 0.0 && spec.optimizer.early_updates.unwrap_or(first.kind == DeviceKind::Cuda);
    let early_updates = wanted && ramtorch_cpu::keeps_weights(store.gradients, dtype);
    if early_updates {
        store.exchange_bytes += Collectives::kept_bytes(kept_numbers(layout.page_count(), store.blocks.len(), world));
        layout = Layout::new(&store).map_err(|e| EngineError::new(ErrorKind::Resources, e))?;
    }
    if layout.bytes() > request.segment_bytes_available {
        let smaller = match (device_gradients, first.kind, world) {
            (None, DeviceKind::Cuda, 1) => ", leave gradients_in out so that gradients may stay on the GPU,",
            (None, DeviceKind::Cuda, _) => ", use one GPU, on which gradients may stay,",
            _ => ",",
        };
        return Err(EngineError::new(
            ErrorKind::Resources,
            format!(
                "{} needs a segment of {} bytes in shared memory, {} are free: {} bytes are missing. Free memory, enlarge /dev/shm{smaller} or use moments = \"bf16\"",
                prepared.description,
                layout.bytes(),
                request.segment_bytes_available,
                layout.bytes() - request.segment_bytes_available
            ),
        ));
    }
    let model = Model::new(&architecture, &layout, dtype)?;
    let budget = devices.iter().map(|d| spec.device.memory_bytes.map_or(d.memory_bytes, |m| m.min(d.memory_bytes))).min().unwrap_or(0);
    let moment = match store.moments {
        MomentFormat::Bf16 => 2,
        _ => 4,
    };
    let cost = Cost::new(prepared.rates.clone(), first.kind, dtype, moment, optimizer_split, world);
    let assumed = assumed_workspace(first.kind, spec.train.deterministic);
    let known: &[(usize, u64)] = prepared.rates.gpu.as_ref().map_or(&[], |g| &g.workspace);
    let workspace = |s: &AttentionShape| {
        let told = known.iter().find(|k| k.0 == s.batch && s.starts.is_none() && s.window.is_none());
        told.map_or_else(|| assumed(s), |k| Ok(k.1))
    };
    let space = search::Space {
        model: &model,
        spec,
        store: &store,
        device_gradients,
        early_updates,
        documents: prepared.dataset.get("document_mask").and_then(serde_json::Value::as_bool).unwrap_or(false),
        optimizer_split,
        seq: prepared.sequence_length,
        kind: first.kind,
        world,
        budget,
        // The other half is for what else needs RAM: checkpoints on their way, other jobs.
        log_bytes: (request.segment_bytes_available - layout.bytes()) / 2,
        cost: &cost,
        workspace: &workspace,
    };
    let mut found = match search::run(&space)? {
        Ok(found) => found,
        Err(need) => {
            return Err(EngineError::new(
                ErrorKind::Resources,
                format!(
                    "{} with sequences of {} tokens needs at least {need} bytes on each device, {budget} are given: {} bytes are missing. Use a smaller micro_batch_size or sequence_length, or give the device more memory (--device-memory)",
                    prepared.description,
                    prepared.sequence_length,
                    need.saturating_sub(budget)
                ),
            ));
        }
    };
    // Pages that reach into a block whose weights do not stay are not held; the search counts parameters.
    let p = &found.plan;
    let of_rank = |rank| held_pages(&layout, &p.resident, p.held_pages + p.visiting_pages, Ranks { rank, world }).len();
    let most = (0..world).map(of_rank).max().unwrap_or(0);
    found.plan.held_pages = p.held_pages.min(most);
    found.plan.visiting_pages = found.plan.visiting_pages.min(most - found.plan.held_pages);
    found.plan.store.log = logged(&layout, &found.plan, request.segment_bytes_available);
    layout = Layout::new(&found.plan.store).map_err(|e| EngineError::new(ErrorKind::Resources, e))?;
    found.plan.uses = device_use(&model, &found.plan, &workspace)?;
    found.plan.bus_ids = devices.iter().map(|d| d.bus_id.clone()).collect();
    let device = found.plan.uses.total();
    let host = if first.kind == DeviceKind::Cpu { device * world as u64 } else { 0 };
    let ahead = found.plan.device_gradients.map_or(0, |f| ramtorch_device::gradient_reader_bytes(f, u64::from(layout.page_parameters())));
    let host = host + ahead;
    let left = request.ram_bytes_available.max(request.segment_bytes_available).saturating_sub(layout.bytes()).saturating_sub(host);
    found.plan.checkpoint_staging = crate::checkpoint::staging_bytes(spec, &layout, left);
    let host = host + found.plan.checkpoint_staging * world as u64;
    let p = &found.plan;
    let mut text = text::describe(&model, &layout, &found, devices, prepared, budget, &cost, place.is_some());
    if wanted && !early_updates {
        let gradients = if device_gradients.is_some() { "gradients that stay on the device" } else { "bf16 gradients" };
        text += &format!(
            "             pages wait for the end of the backward pass, though gradients are not clipped: the place of {gradients} has no room for the weights that a death would want back\n"
        );
    }
    Ok(Plan {
        parameters: layout.parameters(),
        segment_bytes: layout.bytes(),
        device_bytes: vec![device; world],
        host_bytes: host,
        step_seconds: found.parts.step,
        bound_by: found.parts.bound_by().into(),
        text,
        detail: serde_json::to_value(p).map_err(EngineError::internal)?,
    })
}

/// The log of gradients of the pages that `p` holds, as long as it chose, or as has room in `available` bytes beside the rest.
fn logged(layout: &Layout, p: &EnginePlan, available: u64) -> GradientLog {
    let of_rank = |rank| held_pages(layout, &p.resident, p.held_pages, Ranks { rank, world: p.world });
    let pages: std::collections::BTreeSet<PageId> = (0..p.world).flat_map(of_rank).collect();
    let parameters: u64 = pages.iter().map(|page| layout.page_range(*page)).map(|r| r.end - r.start).sum();
    let bytes = |steps: u32| u64::from(steps - 1) * parameters * p.store.gradients.bytes();
    // Sections are rounded up, and the manifest names the pages.
    let room = available.saturating_sub(layout.bytes() + (1 << 20));
    let steps = (2..=p.store.log.steps).rev().find(|steps| bytes(*steps) <= room).unwrap_or(1);
    GradientLog::of(steps, pages)
}

/// Slots that a visit of any block, with the next one on its way, needs.
fn slots_for(model: &Model) -> usize {
    let most = (0..model.len()).map(|b| model.forward_needs(b).len()).max().unwrap_or(1);
    (most + 1).min(model.len())
}

/// Micro-batches that go through a block together, at most, where weights are streamed.
const MOST_TOGETHER: usize = 16;

/// The plan of a model that is only run forward: no gradients, nothing kept. Where not all weights can stay on the device, several
/// micro-batches (`most_together` at most) go through each block in turn, as many as make the bytes least that a token costs.
pub(crate) fn inference(
    model: &Model,
    store: &StoreSpec,
    micro_batch: usize,
    seq: usize,
    budget: u64,
    kind: DeviceKind,
    most_together: usize,
) -> Result<EnginePlan, EngineError> {
    let workspace = &assumed_workspace(kind, true);
    let together = |count: usize| EnginePlan {
        world: 1,
        dtype: model.dtype,
        store: StoreSpec { gradients: GradientFormat::None, ..store.clone() },
        micro_batch,
        seq,
        head_rows: head_rows(&model.architecture, model.dtype, micro_batch * seq, kind),
        groups: 1,
        group_len: count,
        micro_batches: count,
        sequences: micro_batch * count,
        batch_sizes: Vec::new(),
        documents: false,
        keep: vec![Keep::Inputs; model.len()],
        resident: vec![false; model.len()],
        slots: 0,
        resident_gradients: false,
        pack_gradients: false,
        device_gradients: None,
        optimizer_split: false,
        gather_weights: false,
        bus_ids: Vec::new(),
        staged_pages: Vec::new(),
        held_pages: 0,
        visiting_pages: 0,
        held_gradients: Vec::new(),
        squares_on_device: false,
        early_updates: false,
        uses: DeviceUse { libraries: library_bytes(kind, true, 1), ..Default::default() },
        checkpoint_staging: 0,
    };
    // The plan, and the bytes that are loaded for each group.
    let fitted = |count: usize| -> Result<(EnginePlan, Residence), EngineError> {
        let mut p = together(count);
        let kept = resident(model, budget.saturating_sub(device_use(model, &p, workspace)?.total()));
        p.resident = kept.stay.clone();
        p.slots = kept.slots;
        p.uses = device_use(model, &p, workspace)?;
        Ok((p, kept))
    };
    let (mut best, mut kept) = fitted(1)?;
    if best.uses.total() > budget {
        return Err(EngineError::new(
            ErrorKind::Resources,
            format!(
                "{} bytes of device memory are needed at least, {budget} are given; use shorter sequences, fewer prompts, or give the device more memory",
                best.uses.total()
            ),
        ));
    }
    for count in 2..=most_together.min(MOST_TOGETHER) {
        if kept.streamed == 0 {
            break;
        }
        let (p, more) = fitted(count)?;
        if p.uses.total() <= budget && u128::from(more.streamed) * (best.group_len as u128) < u128::from(kept.streamed) * count as u128 {
            (best, kept) = (p, more);
        }
    }
    Ok(best)
}
