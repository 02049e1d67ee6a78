//! AdamW on pages of the store, staged through the device's memory.
//!
//! ```text
//!   up:      part 0 ─ part 1 ─ part 2 ─ …      state and gradients, from the segment into a slot
//!   kernel:           part 0 ─ part 1 ─ …      in place, in the slot
//!   down:                      part 0 ─ …      new state, from the slot into the spare page
//! ```
//! Of pages whose state was brought before ([`ramtorch_device::StagedPage`]), the gradients alone go up. Gradients that stay on
//! the device are read where they are: a slot has no room for them. Pages whose state is held ([`ramtorch_device::HeldPage`])
//! are updated where it is, and go down at another time, one by one: the engine that copies from the device is held by a stream that
//! has something to do, as the other one is, and without a pause after each page gradients would leave when the last one is out
//! (measured: the backward pass stood still for a fifth of the step; with a pause after each part the pages took two thirds longer).
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
    AdamwStep, DecayRun, DevBuf, DirectWeights, EngineError, GradientPiece, HeldPage, PageGradients, PageUpdater, STAGINGS,
    staged_parameters, state_bytes,
};
use ramtorch_store::{GradientFormat, MomentFormat, PageId, PagePtrs, Store, Update};
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

/// A page, and how it goes through.
struct Passage<'a> {
    page: PageId,
    runs: &'a [DecayRun],
    gradients: PageGradients<'a>,
    /// Where its state comes from; nothing where it is on the device.
    live: Option<PagePtrs>,
    /// Where its state goes to; nothing where it stays on the device.
    spare: Option<PagePtrs>,
    /// Its weights go to their places on the device as well.
    direct: bool,
}

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
    trial: (u64, u64),
    bounce: [RawStream; 2],
    bounced: [[RawEvent; 2]; 2],
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
        let trial: Vec<u64> = std::env::var("RAMTORCH_TRIAL").unwrap_or_default().split(',').filter_map(|x| x.parse().ok()).collect();
        let slots = (0..trial.first().copied().unwrap_or(STAGINGS))
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
            trial: (trial.get(1).copied().unwrap_or(0), trial.get(2).copied().unwrap_or(0)),
            bounce: [RawStream::new(true)?, RawStream::new(true)?],
            bounced: [[RawEvent::new()?, RawEvent::new()?], [RawEvent::new()?, RawEvent::new()?]],
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

    /// Sends `count` parameters from `offset` of the page through a slot, or through `state` where they have memory of their own.
    fn part(
        &mut self,
        k: &AdamwStep,
        p: &Passage<'_>,
        start: u64,
        (offset, count): (u64, u64),
        state: Option<&DevBuf>,
    ) -> Result<(), EngineError> {
        let (store, gradients): (&Store, _) = (self.registration.store(), p.gradients);
        let slot = &self.slots[self.next_slot];
        let format = match gradients {
            PageGradients::Segment => self.gradients,
            PageGradients::Device(format, _) => format,
        };
        let (mb, gb, each_state) = (self.moments.bytes(), format.bytes(), state_bytes(store.layout().spec()));
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
        // Arrays of a slot: `part` parameters each, a multiple of 1024, so each begins aligned; others as long as the part.
        let (hi, each) = state.map_or((slot.memory.ptr, self.part), |s| (s.ptr, count));
        if state.is_some_and(|s| s.bytes < count * each_state) {
            return Err(EngineError::internal("the memory for a part of a page is too short"));
        }
        let lo = hi + 2 * each;
        let m = lo + 2 * each;
        let v = m + mb * each;
        let g = slot.memory.ptr + each_state * self.part;
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
        let (n, mb_, gb_) = (count as usize, mb as usize, gb as usize);
        let what = &self.name;
        let tracing = self.timing.is_tracing();
        // Done or never recorded, for the first parts of a step: no wait.
        let before = &self.slots[(self.next_slot + self.slots.len() - 1) % self.slots.len()].computed;
        let label = |name, bytes| Label::copy(name, bytes).step(k.step).page(p.page);
        cu!(what, cuStreamWaitEvent(self.up.0, slot.free.0, 0))?;
        match self.trial.0 {
            0 => cu!(what, cuStreamWaitEvent(self.up.0, before.0, 0))?,
            1 => self.pause(&self.up, 0)?,
            _ => {}
        }
        let bytes_in = count * (if p.live.is_some() { each_state } else { 0 } + if in_segment { gb } else { 0 });
        let span = if tracing { Some(self.timing.begin(&self.up, Row::OptimizerIn, &label("page in", bytes_in))?) } else { None };
        if let Some(live) = p.live {
            let old = self.arrays(live, offset);
            cu!(what, cuMemcpyHtoDAsync_v2(hi, old[0], n * 2, self.up.0))?;
            cu!(what, cuMemcpyHtoDAsync_v2(lo, old[1], n * 2, self.up.0))?;
            cu!(what, cuMemcpyHtoDAsync_v2(m, old[2], n * mb_, self.up.0))?;
            cu!(what, cuMemcpyHtoDAsync_v2(v, old[3], n * mb_, self.up.0))?;
        }
        if in_segment {
            cu!(what, cuMemcpyHtoDAsync_v2(g, store.gradient_ptr(from).cast::<c_void>(), n * gb_, self.up.0))?;
        }
        if let Some(span) = span {
            self.timing.end(&self.up, span)?;
        }
        slot.loaded.record(&self.up)?;
        cu!(what, cuStreamWaitEvent(self.compute.0, slot.loaded.0, 0))?;
        let work = Label::work("adamw").step(k.step).page(p.page);
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
            for run in DecayRun::within(p.runs, piece.first..piece.end) {
                for (range, weights) in self.direct_pieces(p.direct, run.first..run.end) {
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
        let Some(spare) = p.spare else {
            slot.free.record(&self.compute)?;
            self.next_slot = (self.next_slot + 1) % self.slots.len();
            return Ok(());
        };
        cu!(what, cuStreamWaitEvent(self.down.0, slot.computed.0, 0))?;
        if !in_segment {
            cu!(what, cuStreamWaitEvent(self.down.0, self.fetched.0, 0))?;
        }
        self.down(&label("page out", count * each_state), hi, each, spare, (offset, count))?;
        let slot = &self.slots[self.next_slot];
        slot.free.record(&self.down)?;
        self.next_slot = (self.next_slot + 1) % self.slots.len();
        Ok(())
    }

    fn pause(&self, stream: &RawStream, which: usize) -> Result<(), EngineError> {
        let (what, [a, b]) = (&self.name, &self.bounced[which]);
        a.record(stream)?;
        cu!(what, cuStreamWaitEvent(self.bounce[which].0, a.0, 0))?;
        b.record(&self.bounce[which])?;
        cu!(what, cuStreamWaitEvent(stream.0, b.0, 0))
    }

    /// The arrays of a page from `offset` on, which lies inside the page.
    fn arrays(&self, p: PagePtrs, offset: u64) -> [*mut c_void; 4] {
        let (at, moment) = (offset as usize, (offset * self.moments.bytes()) as usize);
        [p.hi.wrapping_add(at).cast(), p.lo.wrapping_add(at).cast(), p.m.wrapping_add(moment).cast(), p.v.wrapping_add(moment).cast()]
    }

    /// Sends `count` parameters, whose state lies at `hi` in arrays of `each`, into the spare page from `offset` on.
    fn down(&mut self, label: &Label, hi: u64, each: u64, spare: PagePtrs, (offset, count): (u64, u64)) -> Result<(), EngineError> {
        let (what, mb) = (&self.name, self.moments.bytes());
        if self.trial.1 == 1 {
            self.pause(&self.down, 1)?;
        }
        let (lo, m) = (hi + 2 * each, hi + 4 * each);
        let v = m + mb * each;
        let (n, mb) = (count as usize, mb as usize);
        let new = self.arrays(spare, offset);
        let span = if self.timing.is_tracing() { Some(self.timing.begin(&self.down, Row::OptimizerOut, label)?) } else { None };
        cu!(what, cuMemcpyDtoHAsync_v2(new[0], hi, n * 2, self.down.0))?;
        cu!(what, cuMemcpyDtoHAsync_v2(new[1], lo, n * 2, self.down.0))?;
        cu!(what, cuMemcpyDtoHAsync_v2(new[2], m, n * mb, self.down.0))?;
        cu!(what, cuMemcpyDtoHAsync_v2(new[3], v, n * mb, self.down.0))?;
        match span {
            Some(span) => self.timing.end(&self.down, span),
            None => Ok(()),
        }
    }

    /// Sends a whole page through, in `state` where its parts have memory of their own, and takes it in hand.
    fn pass(&mut self, k: &AdamwStep, p: &Passage<'_>, state: &[DevBuf]) -> Result<(), EngineError> {
        let tracing = self.timing.is_tracing().then_some(k.step);
        if tracing != self.anchored {
            // Once a step, and only while a trace is on, this waits for the parts on their way up.
            self.timing.anchor(&self.up)?;
            self.anchored = tracing;
        }
        let params = self.registration.store().layout().page_range(p.page);
        let len = params.end - params.start;
        if !state.is_empty() && state.len() as u64 != len.div_ceil(self.part) {
            return Err(EngineError::internal(format!("{} parts of memory for a page of {len} parameters", state.len())));
        }
        for (i, offset) in (0..len).step_by(self.part as usize).enumerate() {
            self.part(k, p, params.start, (offset, self.part.min(len - offset)), state.get(i))?;
        }
        let delivered = p.direct.then_some(k.step);
        if p.spare.is_some() { self.in_hand(p.page, delivered, |u| &u.down) } else { self.in_hand(p.page, delivered, |u| &u.compute) }
    }

    /// A page is done when `stream` gets here.
    fn in_hand(&mut self, page: PageId, delivered: Option<u64>, stream: fn(&Updater) -> &RawStream) -> Result<(), EngineError> {
        let done = match self.spare_events.pop() {
            Some(e) => e,
            None => RawEvent::blocking()?,
        };
        done.record(stream(self))?;
        self.pages.push_back((done, page, delivered));
        Ok(())
    }

    /// All weights of `page` have a place.
    fn has_places(&self, page: PageId) -> bool {
        let params = self.registration.store().layout().page_range(page);
        self.direct.as_ref().is_some_and(|d| d.pieces(params).is_some())
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
        let store = self.registration.store();
        let live = if state.is_empty() { Some(store.page_ptrs(update.live())) } else { None };
        let spare = Some(store.page_ptrs(update.spare()));
        let page = update.page();
        self.pass(k, &Passage { page, runs, gradients, live, spare, direct: self.has_places(page) }, state)
    }

    fn advance(&mut self, k: &AdamwStep, held: &HeldPage, runs: &[DecayRun], gradients: PageGradients<'_>) -> Result<(), EngineError> {
        self.context.enter()?;
        let (store, page) = (self.registration.store(), held.page);
        let live = if held.is_before(k.step) { None } else { Some(store.page_ptrs(store.entry(page).physical)) };
        self.pass(k, &Passage { page, runs, gradients, live, spare: None, direct: self.has_places(page) }, &held.state)
    }

    fn write_back(&mut self, update: &Update, held: &HeldPage) -> Result<(), EngineError> {
        self.context.enter()?;
        let store = self.registration.store();
        let (params, spare) = (store.layout().page_range(held.page), store.page_ptrs(update.spare()));
        let (len, state) = (params.end - params.start, state_bytes(store.layout().spec()));
        if held.page != update.page() || held.state.len() as u64 != len.div_ceil(self.part) {
            return Err(EngineError::internal(format!("what is held is not page {}", update.page())));
        }
        for (offset, buf) in (0..len).step_by(self.part as usize).zip(&held.state) {
            let count = self.part.min(len - offset);
            if buf.bytes < count * state {
                return Err(EngineError::internal("the memory for a part of a page is too short"));
            }
            let label = Label::copy("held page out", count * state).page(held.page);
            self.down(&label, buf.ptr, count, spare, (offset, count))?;
        }
        self.in_hand(held.page, None, |u| &u.down)
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
