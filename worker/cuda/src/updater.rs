//! AdamW on pages of the store, staged through the device's memory.
//!
//! ```text
//!   up:      page 0 ─ page 1 ─ page 2 ─ …      state and gradients, from the segment into a slot
//!   kernel:           page 0 ─ page 1 ─ …      in place, in the slot
//!   down:                      page 0 ─ …      new state, from the slot into the spare page
//! ```
//! Of pages whose state was brought before ([`ramtorch_device::StagedPage`]), the gradients alone go up. Gradients that stay on
//! the device are read where they are: a slot has no room for them. Pages that have both there are updated some ahead of their way down
//! (measured: a launch a page beside the forward pass left the bus out idle for 45 % of the time, each waiting for a product to end). Pages whose state is held ([`ramtorch_device::HeldPage`])
//! are updated where it is, and go down at another time, one by one: the engine that copies from the device is held by a stream that
//! has something to do, as the other one is, and without a pause after each page gradients would leave when the last one is out
//! (measured: the backward pass stood still for a fifth of the step; with a pause after each part the pages took two thirds longer).
//!
//! Pages go through a ring of slots; events order the three streams, so the host enqueues a page and waits only for its end. Both
//! directions of the bus are busy at once.
//!
//! A page is one launch. Matrix products keep all multiprocessors until they end, and a launch beside them waits for the end of
//! one, whatever its stream's priority, 2.7 ms behind products of 8192 rows and more: with eight launches a page the device
//! updated 0.8 billion parameters a second beside the forward pass, a quarter of what the bus allows.
//!
//! A page goes up only when the kernel of the one before it is done. The engine that copies to the device changes to another
//! stream only when this one has nothing to do: without these pauses the weights that the next forward pass wants come when the
//! last page is up (measured: 400 ms late, instead of 8; a pause of some microseconds is too short). On the way down, a page waits for
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
    AdamwStep, DecayRun, DevBuf, DirectWeights, EngineError, GradientPiece, HeldPage, PageGradients, PageUpdater, STAGINGS, StagedPage,
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
    root_scale: f32,
    eps: f32,
    gradient_scale: f32,
}

/// Parameters that follow one another with everything that belongs to them, as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    hi: u64,
    lo: u64,
    m: u64,
    v: u64,
    g: u64,
    weights: u64,
    count: u64,
    first: u64,
    keep: f32,
    whole: u32,
}

/// Segments of a launch: as many as optimizer.cu says.
const SEGMENTS: usize = 32;

#[repr(C)]
struct Segments {
    of: [Segment; SEGMENTS],
    count: u32,
}

/// Where the state of `count` parameters from `offset` of a page on is: at `hi`, in arrays of `each` one behind the other.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    count: u64,
    hi: u64,
    each: u64,
}

impl Place {
    /// The four arrays, from parameter `skip` of this place on.
    fn arrays(&self, skip: u64, moment: u64) -> [u64; 4] {
        let lo = self.hi + 2 * self.each;
        let m = lo + 2 * self.each;
        let v = m + moment * self.each;
        [self.hi + 2 * skip, lo + 2 * skip, m + moment * skip, v + moment * skip]
    }
}

/// Room for a page: weights, remainders, two moments, gradients, one array behind the other.
struct Slot {
    memory: Memory,
    /// Its last page is down.
    free: RawEvent,
    loaded: RawEvent,
    computed: RawEvent,
}

/// Blocks of a launch, at most: what all multiprocessors hold.
const BLOCKS: u64 = 1024;

/// A page that is updated and has not gone out: the end of its kernel, and its number.
type Prepared = (RawEvent, PageId);

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
    /// Parameters of a slot: a page.
    page: u64,
    moments: MomentFormat,
    /// Of the store: none where they stay on the device.
    gradients: GradientFormat,
    /// After the gradients that the reader was asked for last.
    fetched: Arc<RawEvent>,
    /// Whole pages on their way, oldest first, and events that are not in use.
    pages: VecDeque<InHand>,
    /// Pages that are updated where they are, oldest first.
    prepared: VecDeque<Prepared>,
    /// Weights that are written here as well.
    direct: Option<Arc<DirectWeights>>,
    /// What has not been told of yet, while it is held back.
    held_back: Option<Vec<(PageId, u64)>>,
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
        let page = u64::from(store.layout().page_parameters());
        let (moments, state, gradients) = (spec.moments, state_bytes(spec), spec.gradients);
        let slots = (0..STAGINGS)
            .map(|_| {
                Ok(Slot {
                    memory: Memory::new(page * (state + gradients.bytes()), "optimizer staging")?,
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
            page,
            moments,
            gradients,
            fetched,
            pages: VecDeque::new(),
            prepared: VecDeque::new(),
            direct: None,
            held_back: None,
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

    /// Where a page of `len` parameters has its state on the device: in the slot, or in `state`, a buffer for each part.
    fn places(&self, slot: &Slot, len: u64, state: &[DevBuf]) -> Result<Vec<Place>, EngineError> {
        if state.is_empty() {
            return Ok(vec![Place { offset: 0, count: len, hi: slot.memory.ptr, each: self.page }]);
        }
        let (part, bytes) = (staged_parameters(self.page), state_bytes(self.registration.store().layout().spec()));
        if state.len() as u64 != len.div_ceil(part) {
            return Err(EngineError::internal(format!("{} parts of memory for a page of {len} parameters", state.len())));
        }
        let places: Vec<Place> = (0..len)
            .step_by(part as usize)
            .zip(state)
            .map(|(offset, buf)| Place { offset, count: part.min(len - offset), hi: buf.ptr, each: part.min(len - offset) })
            .collect();
        if places.iter().zip(state).any(|(place, buf)| buf.bytes < place.count * bytes) {
            return Err(EngineError::internal("the memory for a part of a page is too short"));
        }
        Ok(places)
    }

    /// What the kernel goes through: cut where the state, the gradients, the decay or the places of the weights go on elsewhere.
    fn segments(&self, k: &AdamwStep, p: &Passage<'_>, start: u64, places: &[Place], pieces: &[GradientPiece], each: u64) -> Vec<Segment> {
        let moment = self.moments.bytes();
        let mut segments = Vec::new();
        for place in places {
            let here = start + place.offset..start + place.offset + place.count;
            for piece in pieces.iter().filter(|x| x.first < here.end && x.end > here.start) {
                for run in DecayRun::within(p.runs, piece.first.max(here.start)..piece.end.min(here.end)) {
                    for (range, weights) in self.direct_pieces(p.direct, run.first..run.end) {
                        let count = range.end - range.start;
                        let [hi, lo, m, v] = place.arrays(range.start - here.start, moment);
                        let g = piece.buf.ptr + each * (range.start - piece.first);
                        let arrays = [(hi, 2), (lo, 2), (m, moment), (v, moment), (g, each), (weights, 2)];
                        // Parts, weights and gradients follow one another without gaps.
                        let whole = count.is_multiple_of(4) && arrays.iter().all(|(p, size)| p.is_multiple_of(4 * size));
                        let keep = if run.decay { k.keep } else { 1.0 };
                        segments.push(Segment { hi, lo, m, v, g, weights, count, first: range.start, keep, whole: u32::from(whole) });
                    }
                }
            }
        }
        segments
    }

    fn launch(&self, k: &AdamwStep, format: GradientFormat, segments: &[Segment]) -> Result<(), EngineError> {
        let kernel = match (self.moments, format) {
            (MomentFormat::F32, GradientFormat::F32) => "adamw_f32_f32",
            (MomentFormat::F32, GradientFormat::Bf16) => "adamw_f32_bf16",
            (MomentFormat::Bf16, GradientFormat::F32) => "adamw_bf16_f32",
            (MomentFormat::Bf16, GradientFormat::Bf16) => "adamw_bf16_bf16",
            (MomentFormat::None, _) | (_, GradientFormat::None) => {
                return Err(EngineError::internal("a page without moments or gradients cannot be updated"));
            }
        };
        let function = self.kernels.get(kernel)?;
        let factors = Factors {
            beta1: k.beta1,
            beta2: k.beta2,
            one_minus_beta1: k.one_minus_beta1,
            one_minus_beta2: k.one_minus_beta2,
            step_size: k.step_size,
            root_scale: k.root_scale,
            eps: k.eps,
            gradient_scale: k.gradient_scale,
        };
        for segments in segments.chunks(SEGMENTS) {
            let none = Segment { hi: 0, lo: 0, m: 0, v: 0, g: 0, weights: 0, count: 0, first: 0, keep: 1.0, whole: 0 };
            let mut all = Segments { of: [none; SEGMENTS], count: segments.len() as u32 };
            all.of[..segments.len()].copy_from_slice(segments);
            let units: u64 = segments.iter().map(|s| s.count.div_ceil(4)).sum();
            let grid = Launch::new((units.div_ceil(256).clamp(1, BLOCKS) as u32, 1, 1), (256, 1));
            let step = k.step;
            launch!(function, grid, &self.compute, &self.name; all, step, factors)?;
        }
        Ok(())
    }

    /// Sends a whole page through, in `state` where its parts have memory of their own, and takes it in hand.
    fn pass(&mut self, k: &AdamwStep, p: &Passage<'_>, state: &[DevBuf]) -> Result<(), EngineError> {
        let tracing = self.anchor(k)?;
        let (store, what): (&Store, _) = (self.registration.store(), &self.name);
        let params = store.layout().page_range(p.page);
        let (start, len) = (params.start, params.end - params.start);
        let slot = &self.slots[self.next_slot];
        let places = self.places(slot, len, state)?;
        let (mb, state_bytes) = (self.moments.bytes(), state_bytes(store.layout().spec()));
        // Behind the state in the slot, or where the backward pass has left them.
        let in_slot = slot.memory.ptr + state_bytes * self.page;
        let (format, pieces) = match p.gradients {
            PageGradients::Segment => {
                let bytes = self.gradients.bytes() * len;
                debug_assert!(in_slot + bytes <= slot.memory.ptr + slot.memory.bytes);
                (self.gradients, vec![GradientPiece { first: start, end: params.end, buf: DevBuf { ptr: in_slot, bytes } }])
            }
            PageGradients::Device(format, pieces) => (format, whole_pieces(pieces, params.clone(), format)?),
        };
        let gb = format.bytes();
        let in_segment = matches!(p.gradients, PageGradients::Segment);
        // Done or never recorded, for the first pages of a step: no wait.
        let before = &self.slots[(self.next_slot + self.slots.len() - 1) % self.slots.len()].computed;
        let label = |name, bytes| Label::copy(name, bytes).step(k.step).page(p.page);
        cu!(what, cuStreamWaitEvent(self.up.0, slot.free.0, 0))?;
        cu!(what, cuStreamWaitEvent(self.up.0, before.0, 0))?;
        let bytes_in = len * (if p.live.is_some() { state_bytes } else { 0 } + if in_segment { gb } else { 0 });
        let span = if tracing { Some(self.timing.begin(&self.up, Row::OptimizerIn, &label("page in", bytes_in))?) } else { None };
        if let Some(live) = p.live {
            for place in &places {
                let old = self.arrays(live, place.offset);
                for ((to, from), bytes) in place.arrays(0, mb).into_iter().zip(old).zip([2, 2, mb, mb]) {
                    cu!(what, cuMemcpyHtoDAsync_v2(to, from, (place.count * bytes) as usize, self.up.0))?;
                }
            }
        }
        if in_segment {
            let from = store.gradient_ptr(store.layout().gradient_at(start, k.step)).cast::<c_void>();
            cu!(what, cuMemcpyHtoDAsync_v2(in_slot, from, (len * gb) as usize, self.up.0))?;
        }
        if let Some(span) = span {
            self.timing.end(&self.up, span)?;
        }
        slot.loaded.record(&self.up)?;
        cu!(what, cuStreamWaitEvent(self.compute.0, slot.loaded.0, 0))?;
        let work = Label::work("adamw").step(k.step).page(p.page);
        let span = if tracing { Some(self.timing.begin(&self.compute, Row::OptimizerKernel, &work)?) } else { None };
        self.launch(k, format, &self.segments(k, p, start, &places, &pieces, gb))?;
        if let Some(span) = span {
            self.timing.end(&self.compute, span)?;
        }
        let slot = &self.slots[self.next_slot];
        slot.computed.record(&self.compute)?;
        let delivered = p.direct.then_some(k.step);
        let Some(spare) = p.spare else {
            slot.free.record(&self.compute)?;
            self.next_slot = (self.next_slot + 1) % self.slots.len();
            return self.in_hand(p.page, delivered, |u| &u.compute);
        };
        cu!(what, cuStreamWaitEvent(self.down.0, slot.computed.0, 0))?;
        if !in_segment {
            cu!(what, cuStreamWaitEvent(self.down.0, self.fetched.0, 0))?;
        }
        self.down(&label("page out", len * state_bytes), &places, spare)?;
        let slot = &self.slots[self.next_slot];
        slot.free.record(&self.down)?;
        self.next_slot = (self.next_slot + 1) % self.slots.len();
        self.in_hand(p.page, delivered, |u| &u.down)
    }

    /// Whether a trace is on. Once a step, and only then, this waits for the pages on their way up.
    fn anchor(&mut self, k: &AdamwStep) -> Result<bool, EngineError> {
        let tracing = self.timing.is_tracing();
        if tracing.then_some(k.step) != self.anchored {
            self.timing.anchor(&self.up)?;
            self.anchored = tracing.then_some(k.step);
        }
        Ok(tracing)
    }

    /// An event that its thread waits for without keeping a processor.
    fn event(&mut self) -> Result<RawEvent, EngineError> {
        self.spare_events.pop().map_or_else(RawEvent::blocking, Ok)
    }

    /// The arrays of a page from `offset` on, which lies inside the page.
    fn arrays(&self, p: PagePtrs, offset: u64) -> [*mut c_void; 4] {
        let (at, moment) = (offset as usize, (offset * self.moments.bytes()) as usize);
        [p.hi.wrapping_add(at).cast(), p.lo.wrapping_add(at).cast(), p.m.wrapping_add(moment).cast(), p.v.wrapping_add(moment).cast()]
    }

    /// Sends the state at `places` into the spare page.
    fn down(&mut self, label: &Label, places: &[Place], spare: PagePtrs) -> Result<(), EngineError> {
        let (what, mb) = (&self.name, self.moments.bytes());
        let span = if self.timing.is_tracing() { Some(self.timing.begin(&self.down, Row::OptimizerOut, label)?) } else { None };
        for place in places {
            let new = self.arrays(spare, place.offset);
            for ((to, from), bytes) in new.into_iter().zip(place.arrays(0, mb)).zip([2, 2, mb, mb]) {
                cu!(what, cuMemcpyDtoHAsync_v2(to, from, (place.count * bytes) as usize, self.down.0))?;
            }
        }
        match span {
            Some(span) => self.timing.end(&self.down, span),
            None => Ok(()),
        }
    }

    /// A page is done when `stream` gets here.
    fn in_hand(&mut self, page: PageId, delivered: Option<u64>, stream: fn(&Updater) -> &RawStream) -> Result<(), EngineError> {
        let done = self.event()?;
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

/// Of `pieces`, what has the gradients of `params`, all of them.
fn whole_pieces(pieces: &[GradientPiece], params: Range<u64>, format: GradientFormat) -> Result<Vec<GradientPiece>, EngineError> {
    let pieces: Vec<GradientPiece> = GradientPiece::within(pieces, params.clone(), format).collect();
    let size = format.bytes();
    let whole = pieces.iter().try_fold(params.start, |at, p| (p.first == at && p.buf.bytes >= size * (p.end - at)).then_some(p.end));
    if whole == Some(params.end) { Ok(pieces) } else { Err(EngineError::internal("the gradients of a page have a gap")) }
}

impl PageUpdater for Updater {
    fn depth(&self) -> usize {
        2 // one is done and goes down while the next comes up
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

    fn prepare(&mut self, k: &AdamwStep, staged: &StagedPage, runs: &[DecayRun], gradients: PageGradients<'_>) -> Result<(), EngineError> {
        self.context.enter()?;
        let PageGradients::Device(format, pieces) = gradients else {
            return Err(EngineError::internal("a page is prepared whose gradients are in the segment"));
        };
        let tracing = self.anchor(k)?;
        let params = self.registration.store().layout().page_range(staged.page);
        let (start, len) = (params.start, params.end - params.start);
        let pieces = whole_pieces(pieces, params, format)?;
        let places = self.places(&self.slots[0], len, &staged.state)?;
        let direct = self.has_places(staged.page);
        let p = Passage { page: staged.page, runs, gradients, live: None, spare: None, direct };
        let segments = self.segments(k, &p, start, &places, &pieces, format.bytes());
        let work = Label::work("adamw").step(k.step).page(staged.page);
        let span = if tracing { Some(self.timing.begin(&self.compute, Row::OptimizerKernel, &work)?) } else { None };
        self.launch(k, format, &segments)?;
        if let Some(span) = span {
            self.timing.end(&self.compute, span)?;
        }
        let computed = self.event()?;
        computed.record(&self.compute)?;
        self.prepared.push_back((computed, staged.page));
        Ok(())
    }

    fn submit_prepared(&mut self, k: &AdamwStep, update: &Update, staged: &StagedPage) -> Result<(), EngineError> {
        self.context.enter()?;
        let page = update.page();
        let Some((computed, _)) = self.prepared.pop_front().filter(|p| p.1 == page && staged.page == page) else {
            return Err(EngineError::internal(format!("page {page} is not the one that was prepared first")));
        };
        let store = self.registration.store();
        let (params, spare) = (store.layout().page_range(page), store.page_ptrs(update.spare()));
        let (len, state) = (params.end - params.start, state_bytes(store.layout().spec()));
        let places = self.places(&self.slots[0], len, &staged.state)?;
        let what = &self.name;
        cu!(what, cuStreamWaitEvent(self.down.0, computed.0, 0))?;
        cu!(what, cuStreamWaitEvent(self.down.0, self.fetched.0, 0))?;
        // What waits for it was told.
        self.spare_events.push(computed);
        self.down(&Label::copy("page out", len * state).step(k.step).page(page), &places, spare)?;
        let delivered = self.has_places(page).then_some(k.step);
        self.in_hand(page, delivered, |u| &u.down)
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
        if held.page != update.page() || held.state.is_empty() {
            return Err(EngineError::internal(format!("what is held is not page {}", update.page())));
        }
        let places = self.places(&self.slots[0], len, &held.state)?;
        self.down(&Label::copy("held page out", len * state).page(held.page), &places, spare)?;
        self.in_hand(held.page, None, |u| &u.down)
    }

    fn deliver_to(&mut self, weights: Arc<DirectWeights>) {
        self.direct = Some(weights);
    }

    fn hold_back(&mut self, hold: bool) {
        let told = std::mem::replace(&mut self.held_back, hold.then(Vec::new));
        for (page, step) in told.into_iter().flatten() {
            if let Some(direct) = &self.direct {
                direct.deliver(page, step);
            }
        }
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        self.context.enter()?;
        let Some((done, page, delivered)) = self.pages.pop_front() else {
            return Err(EngineError::internal("no page is in the device's hand"));
        };
        done.synchronize()?;
        match (&self.direct, delivered, &mut self.held_back) {
            (Some(_), Some(step), Some(told)) => told.push((page, step)),
            (Some(direct), Some(step), None) => direct.deliver(page, step),
            _ => {}
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
