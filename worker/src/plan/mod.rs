//! The plan: where everything goes and what a step costs, worked out before anything is allocated.
//!
//! Everything the engine allocates is listed here ([`DeviceUse`]) by the same code that sizes the buffers, so the bytes
//! of the plan are the bytes of the run. The search is small: for each micro-batch size and number of groups, spend
//! what the device has left on what saves most time a byte (activations that need no recomputation, weights that stay),
//! and take the cheapest combination.

mod cost;
#[cfg(test)]
mod tests;
mod text;

use crate::api::*;
use crate::model::{Model, Shape};
use cost::Cost;
use ramtorch_cpu::Collectives;
use ramtorch_device::{AttentionShape, Dtype};
use ramtorch_job::{JobSpec, Precision, Recompute};
use ramtorch_modelio::Architecture;
use ramtorch_store::{GradientFormat, Layout, MomentFormat, StoreError, StoreSpec};
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
    /// Blocks whose activations are kept from the forward pass.
    pub keep: Vec<bool>,
    /// Blocks whose weights stay on the device during a step.
    pub resident: Vec<bool>,
    /// Buffers for the weights of the other blocks.
    pub slots: usize,
    /// Gradients stay on the device until the last group of a step.
    pub resident_gradients: bool,
    /// The device updates pages too, beside the CPU.
    #[serde(default)]
    pub optimizer_split: bool,
    pub uses: DeviceUse,
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
}

impl DeviceUse {
    pub fn total(&self) -> u64 {
        let streamed = self.resident_weights + self.slots + self.gradients + self.optimizer;
        self.tables + self.scratch + streamed + self.inputs + self.boundaries + self.activations
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
    pub fn shape(&self) -> Shape {
        Shape { sequences: self.micro_batch, seq: self.seq, head_rows: self.head_rows }
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
    let streamed = (0..model.len()).filter(|b| !p.resident[*b]).map(|b| rounded(model.places[b].1 * dt)).max().unwrap_or(0);
    let mut u = DeviceUse {
        tables: rope_table_bytes(&model.architecture, p.seq),
        scratch: rounded(model.scratch_bytes(shape, workspace)?),
        resident_weights: (0..model.len()).filter(|b| p.resident[*b]).map(|b| rounded(model.places[b].1 * dt)).sum(),
        slots: streamed * p.slots as u64,
        ..Default::default()
    };
    let gradient = |b: usize| rounded(model.places[b].1 * 4);
    u.gradients = if p.store.gradients == GradientFormat::None {
        0
    } else if p.resident_gradients {
        (0..model.len()).map(gradient).sum()
    } else {
        let own = usize::from(model.tied()); // block 0 collects over the whole sweep
        let ring = (own..model.len()).map(gradient).max().unwrap_or(0) * GRADIENT_RING as u64;
        ring + if model.tied() { gradient(0) } else { 0 }
    };
    if let Some(page) = p.store.page_parameters.filter(|_| p.optimizer_split) {
        u.optimizer = ramtorch_device::staging_bytes(&p.store, u64::from(page));
    }
    let group = p.group_len as u64;
    u.inputs = group * inputs_bytes(model, shape) + rounded(rows * 4 * p.micro_batches as u64);
    let width = |b: usize| rounded(rows * model.width(b) as u64 * dt);
    let widest = (0..model.len()).map(width).max().unwrap_or(0);
    u.boundaries = group * ((0..last).map(width).sum::<u64>() + widest);
    let saved = |b: usize| rounded(model.saved_bytes(b, shape));
    let kept: u64 = (0..last).filter(|b| p.keep[*b]).map(saved).sum();
    u.activations = group * kept + if (0..last).all(|b| p.keep[b]) { 0 } else { (0..last).map(saved).max().unwrap_or(0) };
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

fn store_spec(spec: &JobSpec, prepared: &Prepared, architecture: &Architecture, world: usize, dtype: Dtype) -> StoreSpec {
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
        metadata: serde_json::json!({ "name": spec.name, "architecture": prepared.architecture, "model": spec.model }).to_string(),
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
pub(crate) fn assumed_workspace(kind: DeviceKind) -> impl Fn(&AttentionShape) -> Result<u64, EngineError> {
    move |s| {
        let per_sequence = (s.heads * s.seq) as u64;
        Ok(match kind {
            DeviceKind::Cpu => 0,
            // cuDNN's deterministic backward pass wants 2 bytes a score; the device takes fewer sequences at a time
            // above 1 GiB. The other one keeps the queries' gradients in f32. Row sums come on top of either.
            DeviceKind::Cuda => {
                let scores = per_sequence * s.seq as u64 * 2;
                let mut at_once = s.batch as u64;
                while at_once > 1 && at_once * scores > 1 << 30 {
                    at_once = at_once.div_ceil(2);
                }
                let sums = per_sequence * s.batch as u64 * s.head_dim as u64 * 4;
                (at_once * scores).max(sums) + 2 * per_sequence * s.batch as u64 * 4 + (64 << 20)
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
    let batch = spec.train.batch_size;
    if world > ramtorch_cpu::MAX_RANKS {
        return Err(EngineError::new(ErrorKind::Resources, format!("{world} devices: at most {} make a gang", ramtorch_cpu::MAX_RANKS)));
    }
    let dtype = dtype_of(spec, first.kind);
    let mut store = store_spec(spec, prepared, &architecture, world, dtype);
    let optimizer_split = first.kind == DeviceKind::Cuda;
    if optimizer_split {
        store = split_optimizer(store).map_err(|e| EngineError::new(ErrorKind::Resources, e))?;
    }
    let layout = Layout::new(&store).map_err(|e| EngineError::new(ErrorKind::Resources, e))?;
    if layout.bytes() > request.segment_bytes_available {
        return Err(EngineError::new(
            ErrorKind::Resources,
            format!(
                "{} needs a segment of {} bytes in shared memory, {} are free: {} bytes are missing. Free memory, enlarge /dev/shm, or use moments = \"bf16\"",
                prepared.description,
                layout.bytes(),
                request.segment_bytes_available,
                layout.bytes() - request.segment_bytes_available
            ),
        ));
    }
    let model = Model::new(&architecture, &layout, dtype)?;
    let budget = devices.iter().map(|d| spec.device.memory_bytes.map_or(d.memory_bytes, |m| m.min(d.memory_bytes))).min().unwrap_or(0);
    let workspace = assumed_workspace(first.kind);
    let cost = Cost::new(prepared.rates, first.kind);
    let share = batch.div_ceil(world);
    let mut best: Option<(f64, EnginePlan)> = None;
    let mut least: Option<u64> = None;
    for micro_batch in micro_batches(spec, share, prepared.sequence_length, first.kind) {
        let micro_batches = share.div_ceil(micro_batch);
        let mut groups = 1;
        loop {
            let p = EnginePlan {
                world,
                dtype,
                store: store.clone(),
                micro_batch,
                seq: prepared.sequence_length,
                head_rows: head_rows(&architecture, dtype, micro_batch * prepared.sequence_length, first.kind),
                groups,
                group_len: micro_batches.div_ceil(groups),
                micro_batches,
                keep: vec![spec.train.recompute == Recompute::Never; model.len()],
                resident: vec![false; model.len()],
                slots: slots_for(&model),
                resident_gradients: false,
                optimizer_split,
                uses: DeviceUse::default(),
            };
            match fill(&model, p, budget, spec.train.recompute, &cost, &workspace)? {
                Ok(p) => {
                    let seconds = cost.step(&model, &p);
                    if best.as_ref().is_none_or(|(s, _)| seconds < *s) {
                        best = Some((seconds, p));
                    }
                }
                Err(need) => least = Some(least.map_or(need, |l| l.min(need))),
            }
            let next = match spec.train.groups {
                Some(g) if groups < g.min(micro_batches) => g.min(micro_batches),
                Some(_) => break,
                None => groups * 2,
            };
            if next > micro_batches || groups >= 64 {
                break;
            }
            groups = next;
        }
    }
    let Some((seconds, p)) = best else {
        let need = least.unwrap_or(0);
        return Err(EngineError::new(
            ErrorKind::Resources,
            format!(
                "{} with sequences of {} tokens needs at least {need} bytes on each device, {budget} are given: {} bytes are missing. Use a smaller micro_batch_size or sequence_length, or give the device more memory (--device-memory)",
                prepared.description,
                prepared.sequence_length,
                need.saturating_sub(budget)
            ),
        ));
    };
    let device = p.uses.total();
    let host = if first.kind == DeviceKind::Cpu { device * world as u64 } else { 0 };
    Ok(Plan {
        parameters: layout.parameters(),
        segment_bytes: layout.bytes(),
        device_bytes: vec![device; world],
        host_bytes: host,
        step_seconds: seconds,
        bound_by: cost.bound_by(&model, &p).into(),
        text: text::describe(&model, &layout, &p, devices, prepared, seconds, &cost),
        detail: serde_json::to_value(&p).map_err(EngineError::internal)?,
    })
}

/// Micro-batch sizes to look at, larger first.
fn micro_batches(spec: &JobSpec, share: usize, seq: usize, kind: DeviceKind) -> Vec<usize> {
    if let Some(mb) = spec.train.micro_batch_size {
        return vec![mb.min(share.max(1))];
    }
    let rows = if kind == DeviceKind::Cpu { 4096 } else { 16384 };
    let mut sizes = vec![(rows / seq).clamp(1, share.max(1))];
    while let Some(&n) = sizes.last().filter(|n| **n > 1) {
        sizes.push(n.div_ceil(2));
    }
    sizes
}

/// Slots that a visit of any block, with the next one on its way, needs.
fn slots_for(model: &Model) -> usize {
    let most = (0..model.len()).map(|b| model.forward_needs(b).len()).max().unwrap_or(1);
    (most + 1).min(model.len())
}

/// Spends what `budget` leaves on what saves most time a byte. The inner error is the least that would be needed.
fn fill(
    model: &Model,
    mut p: EnginePlan,
    budget: u64,
    recompute: Recompute,
    cost: &Cost,
    workspace: &dyn Fn(&AttentionShape) -> Result<u64, EngineError>,
) -> Result<Result<EnginePlan, u64>, EngineError> {
    p.uses = device_use(model, &p, workspace)?;
    // Everything resident needs no slots: the cheapest plan of all where it fits.
    let mut all = p.clone();
    all.resident.fill(true);
    all.slots = 0;
    all.uses = device_use(model, &all, workspace)?;
    if all.uses.total() <= budget {
        p = all;
    } else if p.uses.total() > budget {
        return Ok(Err(p.uses.total().min(all.uses.total())));
    }
    let fits = |p: &EnginePlan| p.uses.total() <= budget;
    if p.groups > 1 {
        let mut q = p.clone();
        q.resident_gradients = true;
        q.uses = device_use(model, &q, workspace)?;
        if fits(&q) {
            p = q;
        }
    }
    // (seconds saved a byte, keep activations?, block): best first, earlier blocks first among equals.
    let mut wishes: Vec<(f64, bool, usize)> = Vec::new();
    for b in 0..model.len() - 1 {
        let saved = model.saved_bytes(b, p.shape()) * p.group_len as u64;
        if recompute == Recompute::Auto && !p.keep[b] {
            wishes.push((if saved == 0 { f64::MAX } else { cost.recompute(model, &p, b) / saved as f64 }, true, b));
        }
    }
    for b in 0..model.len() {
        if !p.resident[b] {
            let bytes = (model.places[b].1 * p.dtype.size()).max(1);
            wishes.push((cost.reload(model, &p, b) / bytes as f64, false, b));
        }
    }
    wishes.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.2.cmp(&y.2)));
    for (_, keep, b) in wishes {
        let mut q = p.clone();
        if keep {
            q.keep[b] = true
        } else {
            q.resident[b] = true
        }
        if q.resident.iter().all(|r| *r) {
            q.slots = 0;
        }
        q.uses = device_use(model, &q, workspace)?;
        if fits(&q) {
            p = q;
        }
    }
    Ok(Ok(p))
}

/// Weights of a model that is only run forward: no gradients, nothing kept, as many weights as fit staying on the
/// device.
pub(crate) fn inference(
    model: &Model,
    store: &StoreSpec,
    micro_batch: usize,
    seq: usize,
    budget: u64,
    kind: DeviceKind,
) -> Result<EnginePlan, EngineError> {
    let workspace = &assumed_workspace(kind);
    let mut p = EnginePlan {
        world: 1,
        dtype: model.dtype,
        store: StoreSpec { gradients: GradientFormat::None, ..store.clone() },
        micro_batch,
        seq,
        head_rows: head_rows(&model.architecture, model.dtype, micro_batch * seq, kind),
        groups: 1,
        group_len: 1,
        micro_batches: 1,
        keep: vec![false; model.len()],
        resident: vec![true; model.len()],
        slots: 0,
        resident_gradients: false,
        optimizer_split: false,
        uses: DeviceUse::default(),
    };
    p.uses = device_use(model, &p, workspace)?;
    // Give up resident blocks from the last one on until it fits.
    for b in (0..model.len()).rev() {
        if p.uses.total() <= budget {
            return Ok(p);
        }
        p.resident[b] = false;
        p.slots = slots_for(model);
        p.uses = device_use(model, &p, workspace)?;
    }
    if p.uses.total() <= budget {
        return Ok(p);
    }
    Err(EngineError::new(
        ErrorKind::Resources,
        format!(
            "{} bytes of device memory are needed at least, {budget} are given; use shorter sequences, fewer prompts, or give the device more memory",
            p.uses.total()
        ),
    ))
}
