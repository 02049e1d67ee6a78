//! Updating pages of the store: what a step's update is, and who can do it.
//!
//! The update of a page is defined to the bit. In f32, every operation rounded on its own and none fused, with `keep`
//! where the tensor decays and 1 elsewhere:
//! ```text
//!   g = gradient · gradient_scale
//!   m = beta1 · m + one_minus_beta1 · g
//!   v = beta2 · v + (one_minus_beta2 · g) · g
//!   p = p · keep − step_size · (m / (√v · root_scale + eps))
//! ```
//! bf16 moments are rounded stochastically afterwards, with [`random_bits`] of (step, parameter). So it does not matter
//! which instruction set or device updates a page, nor in how many parts: recovery does not need to know.

use crate::{DevBuf, Device, EngineError, Stream};
use ramtorch_store::{GradientFormat, Gradients, Layout, NEVER, PageId, Store, StoreSpec, Update};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Factors of one step, the same for every page.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AdamwStep {
    /// Step that pages are brought to.
    pub step: u64,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// 1 - beta1, rounded once.
    pub one_minus_beta1: f32,
    /// 1 - beta2, rounded once.
    pub one_minus_beta2: f32,
    /// Rate over 1 - beta1^t.
    pub step_size: f32,
    /// 1 over the root of 1 - beta2^t: a division less for each parameter.
    pub root_scale: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// Gradients are multiplied by this first.
    pub gradient_scale: f32,
    /// Weights that decay are multiplied by this.
    pub keep: f32,
}

/// What all parameters whose numbers begin with the same 32 bits have in common in a step, for [`random_bits`]: SplitMix64's
/// finalizer of both.
#[inline]
pub fn random_key(step: u64, i: u64) -> u32 {
    let mut x = step.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (i >> 32);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (x >> 32) as u32
}

/// Random bits of the parameter whose number ends with the 32 bits `low`, for both moments: the lower half for the first, the
/// upper for the second. 32 bits wide, and two multiplications for both: vector units have no fast 64-bit one, and with those the
/// processor's update of bf16 moments was bound by them (0.37 billion parameters a second and thread, for 0.45 with fp32 moments,
/// which move half as much again). The constants are C. Wellons' (`lowbias32`).
#[inline(always)]
pub fn random_bits(key: u32, low: u32) -> u32 {
    let mut x = low ^ key;
    x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
    x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
    x ^ (x >> 16)
}

/// Rounds to one of the two neighbouring bf16 values, with probabilities that make the mean right. Infinities and NaNs
/// stay what they are.
#[inline(always)]
pub fn stochastic(x: f32, random: u16) -> u16 {
    let b = x.to_bits();
    let quiet = if b & 0x7fff_ffff > 0x7f80_0000 { 0x40 } else { 0 };
    if b & 0x7f80_0000 == 0x7f80_0000 { (b >> 16) as u16 | quiet } else { (b.wrapping_add(u32::from(random)) >> 16) as u16 }
}

/// Neighbouring parameters that all decay, or all do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecayRun {
    /// First parameter of the store.
    pub first: u64,
    /// Past the last.
    pub end: u64,
    /// Weight decay applies.
    pub decay: bool,
}

impl DecayRun {
    /// Runs that cover `params` without a gap, in order. Padding does not decay.
    pub fn of(layout: &Layout, params: &Range<u64>) -> Vec<DecayRun> {
        let mut runs: Vec<DecayRun> = Vec::new();
        let mut push = |first: u64, end: u64, decay: bool| match runs.last_mut() {
            Some(last) if last.decay == decay => last.end = end,
            _ => runs.push(DecayRun { first, end, decay }),
        };
        let tensors = layout.tensors();
        let begin = tensors.partition_point(|t| t.start + t.len <= params.start);
        let mut at = params.start;
        for t in tensors[begin..].iter().take_while(|t| t.start < params.end) {
            let (first, end) = (t.start.max(params.start), (t.start + t.len).min(params.end));
            if at < first {
                push(at, first, false);
            }
            push(first, end, t.decay);
            at = end;
        }
        if at < params.end {
            push(at, params.end, false);
        }
        runs
    }

    /// The parts of `runs` that lie in `params`.
    pub fn within(runs: &[DecayRun], params: Range<u64>) -> impl Iterator<Item = DecayRun> + '_ {
        let begin = runs.partition_point(|r| r.end <= params.start);
        let (start, end) = (params.start, params.end);
        runs[begin..].iter().take_while(move |r| r.first < end).map(move |r| DecayRun {
            first: r.first.max(start),
            end: r.end.min(end),
            decay: r.decay,
        })
    }
}

/// Brings pages to their next state on a device, several at a time, beside everything else the device does.
///
/// ```text
///   submit(page a)  submit(page b)  finish ─► a is whole   submit(page c)  finish ─► b …
///   advance(held a) advance(held b) finish ─► a's weights are delivered …   later:  write_back(a)  finish ─► a is whole …
/// ```
/// What was asked for is finished in that order. Dropping it waits until it writes nothing any more.
pub trait PageUpdater: Send {
    /// Pages that it wants to have in hand at once; each takes a spare page of the rank.
    fn depth(&self) -> usize;
    /// Enqueues the update of a page of the store it was made for: reads the live page and the gradients, writes the
    /// spare. `runs` cover the page. The update must be neither published nor abandoned before it is finished.
    ///
    /// `state` is empty, or what the live page holds, on the device already ([`crate::Device::load_state`], done): one
    /// buffer for each [`staged_parameters`] of the page. They are overwritten, and free once the update is finished.
    /// `gradients` must be whole where they are, and stay so until the update is finished.
    ///
    /// # Errors
    /// Those of the device. Nothing may be submitted after one.
    fn submit(
        &mut self,
        k: &AdamwStep,
        update: &Update,
        runs: &[DecayRun],
        state: &[DevBuf],
        gradients: PageGradients<'_>,
    ) -> Result<(), EngineError>;
    /// Enqueues the update of a page whose state and gradients are on the device, in place: [`PageUpdater::submit_prepared`]
    /// takes it out. Several can be prepared before the first of them goes out, so that none waits on its way for the arithmetic of
    /// the next forward pass to make room for its kernel. `state` is as for [`PageUpdater::submit`], and belongs to the updater
    /// until the page is finished.
    ///
    /// # Errors
    /// As [`PageUpdater::submit`], and gradients that are in the segment.
    fn prepare(&mut self, k: &AdamwStep, staged: &StagedPage, runs: &[DecayRun], gradients: PageGradients<'_>) -> Result<(), EngineError>;
    /// Enqueues the copy of the page that was prepared first, of those that have not gone out, into the spare of `update`.
    ///
    /// # Errors
    /// As [`PageUpdater::submit`], and another page's update.
    fn submit_prepared(&mut self, k: &AdamwStep, update: &Update, staged: &StagedPage) -> Result<(), EngineError>;
    /// Enqueues the update of a page whose state is held on the device, in place: the store is read, not written. State that
    /// is not of the step before comes from the live page first. The page must not be updated otherwise meanwhile.
    ///
    /// # Errors
    /// As [`PageUpdater::submit`].
    fn advance(&mut self, k: &AdamwStep, held: &HeldPage, runs: &[DecayRun], gradients: PageGradients<'_>) -> Result<(), EngineError>;
    /// Enqueues the copy of a held page, which was advanced and finished, into the spare of `update`.
    ///
    /// # Errors
    /// As [`PageUpdater::submit`].
    fn write_back(&mut self, update: &Update, held: &HeldPage) -> Result<(), EngineError>;
    /// From now on, new weights of pages that lie whole in `weights` are written there as well. Nobody may read them there from
    /// the first submission of a step to the last of its pages.
    fn deliver_to(&mut self, weights: Arc<DirectWeights>);
    /// Whether pages that are advanced from now on tell nobody of their new weights until this is taken back, which tells of all of
    /// them. Beside the arithmetic that begins when the first weights are there, each launch would wait for it.
    fn hold_back(&mut self, hold: bool);
    /// Blocks until the oldest page in hand is done: whole in its spare and visible to the calling thread, or, where it was
    /// advanced, at the new step on the device.
    ///
    /// # Errors
    /// Those of the device, and having nothing in hand.
    fn finish(&mut self) -> Result<(), EngineError>;
}

/// Gradients of parameters `first..end` of the store, one behind the other at the start of `buf`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradientPiece {
    /// First parameter of the store.
    pub first: u64,
    /// Past the last.
    pub end: u64,
    /// Memory of the device.
    pub buf: DevBuf,
}

/// The gradients of a step, where they stay on the device and the segment has no room for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceGradients {
    format: GradientFormat,
    /// Ascending, without gaps.
    pieces: Vec<GradientPiece>,
}

impl DeviceGradients {
    /// Gradients in `format` that lie in `pieces`, which follow one another and cover the store.
    pub fn new(format: GradientFormat, pieces: Vec<GradientPiece>) -> DeviceGradients {
        debug_assert!(pieces.windows(2).all(|w| w[0].end == w[1].first));
        DeviceGradients { format, pieces }
    }

    /// As [`DeviceGradients::new`], of some parameters only: `pieces` ascend and may leave gaps.
    pub fn of_some(format: GradientFormat, pieces: Vec<GradientPiece>) -> DeviceGradients {
        debug_assert!(pieces.windows(2).all(|w| w[0].end <= w[1].first));
        DeviceGradients { format, pieces }
    }

    /// Whether all of `params` are there.
    pub fn cover(&self, params: &Range<u64>) -> bool {
        self.of(params).iter().map(|p| p.end - p.first).sum::<u64>() == params.end - params.start
    }

    /// Their format.
    pub fn format(&self) -> GradientFormat {
        self.format
    }

    /// Where those of `params` are: a page may begin in one block and end in another.
    pub fn of(&self, params: &Range<u64>) -> Vec<GradientPiece> {
        GradientPiece::within(&self.pieces, params.clone(), self.format).collect()
    }
}

impl GradientPiece {
    /// The parts of `pieces`, which ascend, that hold gradients of `params`.
    pub fn within(pieces: &[GradientPiece], params: Range<u64>, format: GradientFormat) -> impl Iterator<Item = GradientPiece> + '_ {
        let begin = pieces.partition_point(|p| p.end <= params.start);
        let (start, end, size) = (params.start, params.end, format.bytes());
        pieces[begin..].iter().take_while(move |p| p.first < end).map(move |p| {
            let (first, last) = (p.first.max(start), p.end.min(end));
            GradientPiece { first, end: last, buf: p.buf.slice((first - p.first) * size, (last - first) * size) }
        })
    }
}

/// Where the gradients of a page are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageGradients<'a> {
    /// In the segment, in the store's format.
    Segment,
    /// On the device, in this format; the pieces cover the page.
    Device(GradientFormat, &'a [GradientPiece]),
}

/// Brings gradients that stay on the device to the host, some pages ahead of whoever needs them there.
///
/// ```text
///   submit(page a)  submit(page b)  finish ─► gradients of a   submit(page c)  finish ─► those of b, a's room is free …
/// ```
/// What is submitted comes in that order. Dropping it waits until it writes nothing any more.
pub trait GradientReader: Send {
    /// Pages that may be submitted and not let go: the one that was finished last is let go by the next call.
    fn depth(&self) -> usize {
        GRADIENTS_AHEAD
    }
    /// Enqueues the copy of a page's gradients. They have to be whole, and must not change before they are there.
    ///
    /// # Errors
    /// Those of the device; too many pages, or too long ones. Nothing may be submitted after one.
    fn submit(&mut self, page: PageId, pieces: &[GradientPiece]) -> Result<(), EngineError>;
    /// Blocks until those of the oldest page are there.
    ///
    /// # Errors
    /// Those of the device, and having nothing on its way.
    fn finish(&mut self) -> Result<Gradients<'_>, EngineError>;
}

/// Pages whose gradients a [`GradientReader`] has in hand: one in use, two on their way.
pub const GRADIENTS_AHEAD: usize = 3;

/// Bytes of RAM that a [`GradientReader`] takes.
pub fn gradient_reader_bytes(format: GradientFormat, page_parameters: u64) -> u64 {
    GRADIENTS_AHEAD as u64 * page_parameters * format.bytes()
}

/// Weights on the device that a page updater writes itself, so that they need not come from the host.
#[derive(Debug)]
pub struct DirectWeights {
    /// Ranges of parameters, ascending, and where their weights lie in bf16.
    places: Vec<(Range<u64>, DevBuf)>,
    /// By page: the last step whose weights were written there.
    delivered: Vec<AtomicU64>,
}

impl DirectWeights {
    /// `places` are ranges of parameters in ascending order, each with a buffer of its bf16 weights.
    pub fn new(layout: &Layout, places: Vec<(Range<u64>, DevBuf)>) -> DirectWeights {
        DirectWeights { places, delivered: (0..layout.page_count()).map(|_| AtomicU64::new(NEVER)).collect() }
    }

    /// The places of `params`, ascending and without a gap; nothing where some of them have none.
    pub fn pieces(&self, params: Range<u64>) -> Option<Vec<(Range<u64>, DevBuf)>> {
        let mut pieces = Vec::new();
        let mut at = params.start;
        let first = self.places.partition_point(|(range, _)| range.end <= params.start);
        for (range, buf) in self.places[first..].iter().take_while(|(range, _)| range.start < params.end) {
            if range.start > at {
                return None;
            }
            let end = range.end.min(params.end);
            pieces.push((at..end, buf.slice((at - range.start) * 2, (end - at) * 2)));
            at = end;
        }
        (at == params.end).then_some(pieces)
    }

    /// All weights of `page` lie in their places, as of `step`. To be told before the page is published.
    pub fn deliver(&self, page: PageId, step: u64) {
        if let Some(d) = self.delivered.get(page as usize) {
            d.store(step, Ordering::Release);
        }
    }

    /// Whether the weights of `page` are in their places as of `step`, at which it was published.
    pub fn delivered(&self, page: PageId, step: u64) -> bool {
        self.delivered.get(page as usize).is_some_and(|d| d.load(Ordering::Acquire) == step)
    }
}

/// Parameters of a part of a page whose state is brought to the device in pieces, where there is room for it.
pub const STAGED_PARAMETERS: u64 = 2 << 20;
/// Pages that a device with memory of its own has there at once: one on its way in, the other in the kernel or on its way out.
pub const STAGINGS: u64 = 2;

/// Parameters of a part, for pages of `page_parameters`.
pub fn staged_parameters(page_parameters: u64) -> u64 {
    page_parameters.min(STAGED_PARAMETERS)
}

/// Parts that a staged page of so many parameters has.
pub fn staged_parts(page_parameters: u64) -> u64 {
    page_parameters.div_ceil(staged_parameters(page_parameters))
}

/// A page whose state lies on the device before its update begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagedPage {
    /// The page.
    pub page: PageId,
    /// Its state, a buffer for each [`staged_parameters`].
    pub state: Vec<DevBuf>,
    /// The step that the state is of.
    pub step: u64,
}

impl StagedPage {
    /// Enqueues the copies of `page`'s state, as it is published now, on `CopyIn`, into buffers that `room` gives, each for
    /// [`staged_parameters`] ([`staged_rooms`]). They have to be done, and the page not updated meanwhile, before it is used.
    ///
    /// # Errors
    /// Those of the device, and too little room.
    pub fn load(
        dev: &dyn Device,
        store: &Arc<Store>,
        page: PageId,
        mut room: impl FnMut() -> Option<DevBuf>,
    ) -> Result<StagedPage, EngineError> {
        let layout = store.layout();
        let range = layout.page_range(page);
        let (len, part) = (range.end - range.start, staged_parameters(u64::from(layout.page_parameters())));
        let (mut state, published) = (Vec::new(), store.entry(page));
        for offset in (0..len).step_by(part as usize) {
            let count = part.min(len - offset);
            let buf = room().ok_or_else(|| EngineError::internal(format!("no room for the state of page {page}")))?;
            let buf = buf.slice(0, count * state_bytes(layout.spec()));
            dev.load_state(Stream::CopyIn, buf, store, published.physical, offset, count)?;
            state.push(buf);
        }
        Ok(StagedPage { page, state, step: published.step })
    }
}

/// Cuts `buf` into rooms for parts of staged pages, one for each [`staged_parameters`]; what is left behind the last is not used.
pub fn staged_rooms(layout: &Layout, buf: DevBuf) -> impl ExactSizeIterator<Item = DevBuf> + use<> {
    let room = staged_parameters(u64::from(layout.page_parameters())) * state_bytes(layout.spec());
    (0..(buf.bytes / room) as usize).map(move |i| buf.slice(i as u64 * room, room))
}

/// A page whose state stays on the device from step to step, beside the one in the store that everybody else sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldPage {
    /// The page.
    pub page: PageId,
    /// Its state, a buffer for each [`staged_parameters`].
    pub state: Vec<DevBuf>,
    /// The step of what is in them; `None` before anything is.
    pub at: Option<u64>,
    /// It comes anew with every backward pass, from the store: of the step before, whichever that is.
    pub visits: bool,
}

impl HeldPage {
    /// Bytes of device memory that one takes.
    pub fn bytes(store: &StoreSpec, page_parameters: u64) -> u64 {
        page_parameters * state_bytes(store)
    }

    /// `page`, whose state will lie in `room`, which has [`HeldPage::bytes`].
    pub fn new(layout: &Layout, page: PageId, room: DevBuf) -> HeldPage {
        let (range, part) = (layout.page_range(page), staged_parameters(u64::from(layout.page_parameters())));
        let (len, each) = (range.end - range.start, state_bytes(layout.spec()));
        let state = (0..len).step_by(part as usize).map(|at| room.slice(at * each, part.min(len - at) * each)).collect();
        HeldPage { page, state, at: None, visits: false }
    }

    /// `page`, whose state visits `room`.
    pub fn visitor(layout: &Layout, page: PageId, room: DevBuf) -> HeldPage {
        HeldPage { visits: true, ..HeldPage::new(layout, page, room) }
    }

    /// What is held is of the step before `step`, and need not be read from the store.
    pub fn is_before(&self, step: u64) -> bool {
        self.visits || self.at.is_some_and(|at| at + 1 == step)
    }
}

/// Bytes of the state of one parameter: the master's halves and two moments.
pub fn state_bytes(store: &StoreSpec) -> u64 {
    4 + 2 * store.moments.bytes()
}

/// Device memory that a page updater with staging takes, in bytes. Gradients that are not in the segment are read where they are.
pub fn staging_bytes(store: &StoreSpec, page_parameters: u64) -> u64 {
    STAGINGS * page_parameters * (state_bytes(store) + store.gradients.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, TensorSpec};

    fn layout() -> Layout {
        let tensor = |name: &str, len: u64, joined, decay| TensorSpec { name: name.into(), shape: vec![len], joined, decay };
        let tensors =
            vec![tensor("a", 640, false, true), tensor("b", 64, false, true), tensor("c", 3, true, false), tensor("d", 5, false, true)];
        Layout::new(&StoreSpec {
            blocks: vec![BlockSpec { name: "x".into(), tensors }],
            world_size: 1,
            moments: MomentFormat::F32,
            gradients: GradientFormat::F32,
            page_parameters: Some(1024),
            spare_pages_per_rank: 1,
            exchange_bytes: 4096,
            log: GradientLog::NONE,
            metadata: String::new(),
        })
        .unwrap()
    }

    #[test]
    fn state_is_read_where_it_is_not_there_yet() {
        let (l, room) = (layout(), DevBuf { ptr: 4096, bytes: 1 << 20 });
        let mut held = HeldPage::new(&l, 0, room);
        assert!(!held.is_before(1), "nothing is there");
        held.at = Some(6);
        assert!(held.is_before(7) && !held.is_before(8) && !held.is_before(6));
        let visitor = HeldPage::visitor(&l, 0, room);
        assert!(visitor.is_before(1) && visitor.state == held.state, "the backward pass has brought it, in the first step, too");
    }

    #[test]
    fn runs_cover_a_range_and_join_neighbours() {
        let l = layout();
        let run = |first, end, decay| DecayRun { first, end, decay };
        // a and b touch; c follows b; padding up to 768 belongs to the run that does not decay.
        assert_eq!(DecayRun::of(&l, &(0..832)), [run(0, 704, true), run(704, 768, false), run(768, 773, true), run(773, 832, false)]);
        assert_eq!(DecayRun::of(&l, &(700..706)), [run(700, 704, true), run(704, 706, false)]);
        let all = DecayRun::of(&l, &(0..832));
        for start in (0..832).step_by(13) {
            for end in (start + 1..=832).step_by(29) {
                let part: Vec<_> = DecayRun::within(&all, start..end).collect();
                assert_eq!(part, DecayRun::of(&l, &(start..end)));
                assert!(part[0].first == start && part.last().unwrap().end == end && part.windows(2).all(|w| w[0].end == w[1].first));
            }
        }
    }

    #[test]
    fn gradients_of_a_page_may_lie_in_several_buffers() {
        let buf = |ptr, n: u64| DevBuf { ptr, bytes: 2 * n };
        let piece = |first, end, ptr| GradientPiece { first, end, buf: buf(ptr, end - first) };
        let all = DeviceGradients::new(GradientFormat::Bf16, vec![piece(0, 640, 1000), piece(640, 704, 9000), piece(704, 2048, 20_000)]);
        assert_eq!(all.of(&(0..640)), [piece(0, 640, 1000)]);
        assert_eq!(all.of(&(600..1000)), [piece(600, 640, 1000 + 1200), piece(640, 704, 9000), piece(704, 1000, 20_000)]);
        assert_eq!(all.of(&(704..705)), [piece(704, 705, 20_000)]);
        assert_eq!(all.of(&(1024..2048)), [piece(1024, 2048, 20_000 + 640)]);
        assert!(all.of(&(700..700)).iter().all(|p| p.first == p.end));
    }

    #[test]
    fn direct_weights_cover_a_range_or_are_not_used() {
        let buf = |ptr, n: u64| DevBuf { ptr, bytes: 2 * n };
        let d = DirectWeights::new(&layout(), vec![(0..100, buf(1000, 100)), (100..150, buf(5000, 50)), (200..300, buf(9000, 100))]);
        assert_eq!(d.pieces(90..110), Some(vec![(90..100, buf(1180, 10)), (100..110, buf(5000, 10))]));
        assert_eq!(d.pieces(250..300), Some(vec![(250..300, buf(9100, 50))]));
        for gap in [140..160, 160..170, 199..201, 290..301, 300..310] {
            assert_eq!(d.pieces(gap), None);
        }
        // Nothing is delivered at first, of whatever step.
        assert!(!d.delivered(0, 0) && !d.delivered(0, 3));
        d.deliver(0, 3);
        assert!(d.delivered(0, 3) && !d.delivered(0, 4) && !d.delivered(7, 3));
    }

    #[test]
    fn rooms_for_staged_parts_lie_one_behind_the_other() {
        let room = 1024 * 12;
        let cut = |bytes| staged_rooms(&layout(), DevBuf { ptr: 4096, bytes }).collect::<Vec<_>>();
        assert_eq!(cut(room - 1), []);
        assert_eq!(cut(3 * room - 1), [DevBuf { ptr: 4096, bytes: room }, DevBuf { ptr: 4096 + room, bytes: room }]);
        assert_eq!(staged_rooms(&layout(), DevBuf { ptr: 4096, bytes: 7 * room }).len(), 7);
    }

    fn bits(step: u64, i: u64, moment: u32) -> u16 {
        (random_bits(random_key(step, i), i as u32) >> (16 * moment)) as u16
    }

    /// Bits of neighbours, of both moments, of steps and of parameters 2^32 apart have nothing to do with one another.
    #[test]
    fn random_bits_are_even_and_independent() {
        const N: u64 = 1 << 16;
        let other: [&dyn Fn(u64) -> u16; 5] =
            [&|i| bits(7, i + 1, 0), &|i| bits(7, i, 1), &|i| bits(8, i, 0), &|i| bits(7, i + (1 << 32), 0), &|i| bits(7, i + 4096, 0)];
        for shift in [0, 5, 12] {
            let mut counts = [0u32; 16];
            (0..N).for_each(|i| counts[usize::from(bits(7, i, 0) >> shift & 15)] += 1);
            assert!(counts.iter().all(|c| c.abs_diff(4096) < 400), "{counts:?}");
        }
        for (n, other) in other.iter().enumerate() {
            let mean = |f: &dyn Fn(u64) -> f64| (0..N).map(f).sum::<f64>() / N as f64;
            let centred = |x: u16| f64::from(x) / 65536.0 - 0.5;
            let covariance = mean(&|i| centred(bits(7, i, 0)) * centred(other(i)));
            // Of independent ones, 1/12 over the root of their number.
            assert!(covariance.abs() < 5.0 / 12.0 / (N as f64).sqrt(), "{n}: {covariance}");
            let equal = (0..N).filter(|i| bits(7, *i, 0) == other(*i)).count();
            assert!(equal < 12, "{n}: {equal}");
        }
    }

    #[test]
    fn stochastic_rounding_is_unbiased_and_exact_on_bf16_values() {
        let exact = f32::from_bits(0x3f8a_0000);
        assert!((0..1000u16).all(|r| stochastic(exact, r.wrapping_mul(65)) == 0x3f8a));
        let x = f32::from_bits(0x3f80_4000); // a quarter of the way up
        let ups = (0..100_000u64).filter(|i| stochastic(x, bits(3, *i, 0)) == 0x3f81).count();
        assert!((ups as f64 / 1e5 - 0.25).abs() < 0.01, "{ups}");
        assert_eq!(stochastic(f32::INFINITY, 0xffff), 0x7f80);
        assert_eq!(stochastic(f32::NEG_INFINITY, 0xffff), 0xff80);
        assert_eq!(stochastic(f32::from_bits(0x7f80_0001), 0), 0x7fc0);
        assert_eq!(stochastic(f32::from_bits(0xffc1_2345), 9), 0xffc1);
    }
}
