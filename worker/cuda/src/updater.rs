//! AdamW on pages of the store, staged through the device's memory.
//!
//! ```text
//!   up:      part 0 ─ part 1 ─ part 2 ─ …      state and gradients, from the segment into a slot
//!   kernel:           part 0 ─ part 1 ─ …      in place, in the slot
//!   down:                      part 0 ─ …      new state, from the slot into the spare page
//! ```
//! Of pages whose state was brought before ([`ramtorch_device::StagedPage`]), the gradients alone go up. Gradients that stay on
//! the device are read where they are: a slot has no room for them.
//!
//! A page goes through in parts, the parts through a ring of slots; events order the three streams, so the host enqueues a
//! page and waits only for whole pages. Both directions of the bus are busy at once.
//!
//! A part goes up only when the kernel of the one before it is done. The engine that copies to the device changes to another
//! stream only when this one has nothing to do: without these pauses, of some hundredths of the time, the weights that the
//! next forward pass wants come when the last page is up (measured: 400 ms late, instead of 8). On the way down, a part waits for
//! what the reader of gradients ([`crate::reader`]) has asked for by then: a few pages' gradients, for want of which the
//! processor would stand still while this stream keeps the engine busy. All of it is beside the device's
//! own streams: the updater has streams, memory, kernels and a context reference of its own and is used from one thread.

use crate::copies::Registration;
use crate::device::CudaDevice;
use crate::driver::{Context, Memory, RawEvent, RawStream, cu};
use crate::kernels::{Kernels, Launch, launch};
use crate::timing::Timing;
use ramtorch_device::trace::{Label, Recorder, Row};
use ramtorch_device::{
    AdamwStep, DecayRun, DevBuf, DirectWeights, EngineError, GradientPiece, PageGradients, PageUpdater, STAGINGS, staged_parameters,
    state_bytes,
};
use ramtorch_store::{GradientFormat, MomentFormat, PageId, Store, Update};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

/// Factors as the kernels take them.
#[repr(C)]
struct Factors {
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,
    sqrt_bias2: f32,
    eps: f32,
    gradient_scale: f32,
}

/// Room for one part of a page: weights, remainders, two moments, gradients, one array behind the other.
struct Slot {
    memory: Memory,
    /// Its last part is down.
    free: RawEvent,
    loaded: RawEvent,
    computed: RawEvent,
}

/// A whole page on its way: its end, its number, and the step of its weights where they are delivered.
type InHand = (RawEvent, PageId, Option<u64>);

/// See the module. Field order matters: whatever uses the context goes before it.
pub(crate) struct Updater {
    name: String,
    kernels: Kernels,
    slots: Vec<Slot>,
    next_slot: usize,
    /// Parameters of a slot.
    part: u64,
    moments: MomentFormat,
    /// Of the store: none where they stay on the device.
    gradients: GradientFormat,
    /// After the gradients that the reader was asked for last.
    fetched: Arc<RawEvent>,
    /// Whole pages on their way, oldest first, and events that are not in use.
    pages: VecDeque<InHand>,
    /// Weights that are written here as well.
    direct: Option<Arc<DirectWeights>>,
    spare_events: Vec<RawEvent>,
    timing: Timing,
    /// Step that the clocks were tied together in, where a trace is on.
    anchored: Option<u64>,
    up: RawStream,
    compute: RawStream,
    down: RawStream,
    registration: Arc<Registration>,
    context: Context,
}

impl Updater {
    /// Takes [`ramtorch_device::staging_bytes`] of device memory, which the caller counts. `fetched` follows the copies of
    /// gradients to the host. `None`: the store has no moments.
    pub(crate) fn new(
        ordinal: u32,
        capability: (i32, i32),
        registration: Arc<Registration>,
        fetched: Arc<RawEvent>,
        recorder: Option<Arc<Recorder>>,
    ) -> Result<Option<Updater>, EngineError> {
        let store = registration.store();
        let spec = store.layout().spec();
        if spec.moments == MomentFormat::None {
            return Ok(None);
        }
        let context = Context::open(ordinal)?;
        let part = staged_parameters(u64::from(store.layout().page_parameters()));
        let (moments, state, gradients) = (spec.moments, state_bytes(spec), spec.gradients);
        let slots = (0..STAGINGS)
            .map(|_| {
                Ok(Slot {
                    memory: Memory::new(part * (state + gradients.bytes()), "optimizer staging")?,
                    free: RawEvent::new()?,
                    loaded: RawEvent::new()?,
                    computed: RawEvent::new()?,
                })
            })
            .collect::<Result<Vec<_>, EngineError>>()?;
        Ok(Some(Updater {
            name: format!("cuda:{ordinal}: optimizer"),
            kernels: Kernels::load_optimizer(capability)?,
            slots,
            next_slot: 0,
            part,
            moments,
            gradients,
            fetched,
            pages: VecDeque::new(),
            direct: None,
            spare_events: Vec::new(),
            timing: Timing::new(recorder),
            anchored: None,
            up: RawStream::new(false)?,
            // Short kernels that copies wait for: first in line.
            compute: RawStream::new(true)?,
            down: RawStream::new(false)?,
            registration,
            context,
        }))
    }

    /// `params` cut where the places of their weights end, each with its address; uncut with 0 where none are `wanted`.
    fn direct_pieces(&self, wanted: bool, params: Range<u64>) -> Vec<(Range<u64>, u64)> {
        match self.direct.as_ref().filter(|_| wanted).and_then(|d| d.pieces(params.clone())) {
            Some(pieces) => pieces.into_iter().map(|(range, buf)| (range, buf.ptr)).collect(),
            None => vec![(params, 0)],
        }
    }

    /// Sends `count` parameters from `offset` of the page through a slot; of those whose state is `staged` the gradients alone,
    /// and of those whose gradients stay on the device the state alone.
    fn part(
        &mut self,
        k: &AdamwStep,
        update: &Update,
        runs: &[DecayRun],
        start: u64,
        (offset, count): (u64, u64),
        staged: Option<&DevBuf>,
        gradients: PageGradients<'_>,
        direct: bool,
    ) -> Result<(), EngineError> {
        let store: &Store = self.registration.store();
        let (live, spare) = (store.page_ptrs(update.live()), store.page_ptrs(update.spare()));
        let slot = &self.slots[self.next_slot];
        let format = match gradients {
            PageGradients::Segment => self.gradients,
            PageGradients::Device(format, _) => format,
        };
        let (mb, gb, state) = (self.moments.bytes(), format.bytes(), state_bytes(store.layout().spec()));
        let kernel = match (self.moments, format) {
            (MomentFormat::F32, GradientFormat::F32) => "adamw_f32_f32",
            (MomentFormat::F32, GradientFormat::Bf16) => "adamw_f32_bf16",
            (MomentFormat::Bf16, GradientFormat::F32) => "adamw_bf16_f32",
            (MomentFormat::Bf16, GradientFormat::Bf16) => "adamw_bf16_bf16",
            (MomentFormat::None, _) | (_, GradientFormat::None) => {
                return Err(EngineError::internal("a page without moments or gradients cannot be updated"));
            }
        };
        let from = start + offset;
        let in_segment = matches!(gradients, PageGradients::Segment);
        // Arrays of a slot: `part` parameters each, a multiple of 1024, so each begins aligned; staged ones as long as the part.
        let (hi, each) = staged.map_or((slot.memory.ptr, self.part), |s| (s.ptr, count));
        if staged.is_some_and(|s| s.bytes < count * state) {
            return Err(EngineError::internal("a staged part of a page is too short"));
        }
        let lo = hi + 2 * each;
        let m = lo + 2 * each;
        let v = m + mb * each;
        let g = slot.memory.ptr + state * self.part;
        // Behind the state in the slot, or where the backward pass has left them.
        let in_slot = [GradientPiece { first: from, end: from + count, buf: DevBuf { ptr: g, bytes: gb * count } }];
        let pieces: Vec<GradientPiece> = match gradients {
            PageGradients::Segment => {
                debug_assert!(g + gb * self.part <= slot.memory.ptr + slot.memory.bytes);
                in_slot.to_vec()
            }
            PageGradients::Device(_, pieces) => GradientPiece::within(pieces, from..from + count, format).collect(),
        };
        let whole = pieces.iter().try_fold(from, |at, p| (p.first == at && p.buf.bytes >= gb * (p.end - at)).then_some(p.end));
        if whole != Some(from + count) {
            return Err(EngineError::internal("the gradients of a page have a gap"));
        }
        let (n, at) = (count as usize, offset as usize);
        let (mb_, gb_) = (mb as usize, gb as usize);
        // SAFETY: offset + count lies inside the page (`submit`), in each of its arrays.
        let (old, new) = unsafe {
            let place = |p: ramtorch_store::PagePtrs| {
                (
                    p.hi.add(at).cast::<c_void>(),
                    p.lo.add(at).cast::<c_void>(),
                    p.m.add(at * mb_).cast::<c_void>(),
                    p.v.add(at * mb_).cast::<c_void>(),
                )
            };
            (place(live), place(spare))
        };
        let what = &self.name;
        let tracing = self.timing.is_tracing();
        // Done or never recorded, for the first parts of a step: no wait.
        let before = &self.slots[(self.next_slot + self.slots.len() - 1) % self.slots.len()].computed;
        let label = |name, bytes| Label::copy(name, bytes).step(k.step).page(update.page());
        cu!(what, cuStreamWaitEvent(self.up.0, slot.free.0, 0))?;
        cu!(what, cuStreamWaitEvent(self.up.0, before.0, 0))?;
        let bytes_in = count * (if staged.is_some() { 0 } else { state } + if in_segment { gb } else { 0 });
        let span = if tracing { Some(self.timing.begin(&self.up, Row::OptimizerIn, &label("page in", bytes_in))?) } else { None };
        if staged.is_none() {
            cu!(what, cuMemcpyHtoDAsync_v2(hi, old.0, n * 2, self.up.0))?;
            cu!(what, cuMemcpyHtoDAsync_v2(lo, old.1, n * 2, self.up.0))?;
            cu!(what, cuMemcpyHtoDAsync_v2(m, old.2, n * mb_, self.up.0))?;
            cu!(what, cuMemcpyHtoDAsync_v2(v, old.3, n * mb_, self.up.0))?;
        }
        if in_segment {
            cu!(what, cuMemcpyHtoDAsync_v2(g, store.gradient_ptr(from).cast::<c_void>(), n * gb_, self.up.0))?;
        }
        if let Some(span) = span {
            self.timing.end(&self.up, span)?;
        }
        slot.loaded.record(&self.up)?;
        cu!(what, cuStreamWaitEvent(self.compute.0, slot.loaded.0, 0))?;
        let work = Label::work("adamw").step(k.step).page(update.page());
        let span = if tracing { Some(self.timing.begin(&self.compute, Row::OptimizerKernel, &work)?) } else { None };
        let factors = Factors {
            beta1: k.beta1,
            beta2: k.beta2,
            one_minus_beta1: k.one_minus_beta1,
            one_minus_beta2: k.one_minus_beta2,
            step_size: k.step_size,
            sqrt_bias2: k.sqrt_bias2,
            eps: k.eps,
            gradient_scale: k.gradient_scale,
        };
        // Runs end where the gradients, or the places of the weights, go on elsewhere.
        for piece in &pieces {
            for run in DecayRun::within(runs, piece.first..piece.end) {
                for (range, weights) in self.direct_pieces(direct, run.first..run.end) {
                    let (skip, len) = (range.start - from, range.end - range.start);
                    let (hi, lo, m, v) = (hi + 2 * skip, lo + 2 * skip, m + mb * skip, v + mb * skip);
                    let g = piece.buf.ptr + gb * (range.start - piece.first);
                    // Staged parts, weights and gradients follow one another without gaps.
                    let aligned =
                        [(hi, 2), (lo, 2), (m, mb), (v, mb), (g, gb), (weights, 2)].iter().all(|(p, size)| p.is_multiple_of(4 * size));
                    let vector = aligned && len.is_multiple_of(4);
                    let function = self.kernels.get(&format!("{kernel}_{}", if vector { 'v' } else { 's' }))?;
                    let a_thread = if vector { 4 } else { 1 };
                    let grid = Launch::new((len.div_ceil(256 * a_thread).clamp(1, 512) as u32, 1, 1), (256, 1));
                    let keep: f32 = if run.decay { k.keep } else { 1.0 };
                    let (first, step): (u64, u64) = (range.start, k.step);
                    launch!(function, grid, &self.compute, what; hi, lo, m, v, g, weights, len, first, step, keep, factors)?;
                }
            }
        }
        if let Some(span) = span {
            self.timing.end(&self.compute, span)?;
        }
        slot.computed.record(&self.compute)?;
        cu!(what, cuStreamWaitEvent(self.down.0, slot.computed.0, 0))?;
        if !in_segment {
            cu!(what, cuStreamWaitEvent(self.down.0, self.fetched.0, 0))?;
        }
        let span = if tracing { Some(self.timing.begin(&self.down, Row::OptimizerOut, &label("page out", count * state))?) } else { None };
        cu!(what, cuMemcpyDtoHAsync_v2(new.0, hi, n * 2, self.down.0))?;
        cu!(what, cuMemcpyDtoHAsync_v2(new.1, lo, n * 2, self.down.0))?;
        cu!(what, cuMemcpyDtoHAsync_v2(new.2, m, n * mb_, self.down.0))?;
        cu!(what, cuMemcpyDtoHAsync_v2(new.3, v, n * mb_, self.down.0))?;
        if let Some(span) = span {
            self.timing.end(&self.down, span)?;
        }
        slot.free.record(&self.down)?;
        self.next_slot = (self.next_slot + 1) % self.slots.len();
        Ok(())
    }
}

impl PageUpdater for Updater {
    fn depth(&self) -> usize {
        2 // the parts of one page are done while those of the next come up
    }

    fn submit(
        &mut self,
        k: &AdamwStep,
        update: &Update,
        runs: &[DecayRun],
        state: &[DevBuf],
        gradients: PageGradients<'_>,
    ) -> Result<(), EngineError> {
        self.context.enter()?;
        let tracing = self.timing.is_tracing().then_some(k.step);
        if tracing != self.anchored {
            // Once a step, and only while a trace is on, this waits for the parts on their way up.
            self.timing.anchor(&self.up)?;
            self.anchored = tracing;
        }
        let params = self.registration.store().layout().page_range(update.page());
        let len = params.end - params.start;
        if !state.is_empty() && state.len() as u64 != len.div_ceil(self.part) {
            return Err(EngineError::internal(format!("{} staged parts of a page of {len} parameters", state.len())));
        }
        let direct = self.direct.as_ref().is_some_and(|d| d.pieces(params.clone()).is_some());
        for (i, offset) in (0..len).step_by(self.part as usize).enumerate() {
            let part = (offset, self.part.min(len - offset));
            self.part(k, update, runs, params.start, part, state.get(i), gradients, direct)?;
        }
        let done = match self.spare_events.pop() {
            Some(e) => e,
            None => RawEvent::blocking()?,
        };
        done.record(&self.down)?;
        self.pages.push_back((done, update.page(), direct.then_some(k.step)));
        Ok(())
    }

    fn deliver_to(&mut self, weights: Arc<DirectWeights>) {
        self.direct = Some(weights);
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        self.context.enter()?;
        let Some((done, page, delivered)) = self.pages.pop_front() else {
            return Err(EngineError::internal("no page is in the device's hand"));
        };
        done.synchronize()?;
        if let (Some(direct), Some(step)) = (&self.direct, delivered) {
            direct.deliver(page, step);
        }
        self.spare_events.push(done);
        self.timing.resolve()?;
        Ok(())
    }
}

impl Drop for Updater {
    fn drop(&mut self) {
        // Nothing may still read a slot or write a page.
        if self.context.enter().is_ok() {
            for s in [&self.up, &self.compute, &self.down] {
                let _ = s.synchronize("close");
            }
        }
    }
}

/// What [`ramtorch_device::Device::page_updater`] is for a CUDA device.
pub(crate) fn open(d: &mut CudaDevice, store: &Arc<Store>) -> Result<Option<Box<dyn PageUpdater>>, EngineError> {
    let registration = d.registration(store)?;
    let layout = store.layout();
    let bytes = ramtorch_device::staging_bytes(layout.spec(), u64::from(layout.page_parameters()));
    let fetched = d.fetched()?;
    match Updater::new(d.info.ordinal, d.info.compute_capability, registration, fetched, d.timing.get_mut().recorder())? {
        None => Ok(None),
        Some(updater) => {
            d.count(bytes, "optimizer staging")?;
            Ok(Some(Box::new(updater)))
        }
    }
}
