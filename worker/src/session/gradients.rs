//! Sums of gradients on the device, and their way out.
//!
//! ```text
//!   open ─► visits add to the sum ─► close ─┬─ rounded where a buffer is for it ─► summed over ranks ─► the segment
//!                                           └─ or stays, in fp32 or rounded, until its step is committed
//! ```
//! Where sums of all blocks stay over groups, only the last group's leave. A sum's buffer is free once its rounded gradients have another place:
//! those of held pages are copied back to its first half, and state of pages visits the second ([`super::pages`]).

use super::Session;
use crate::api::EngineError;
use crate::model::{Grads, Model};
use crate::plan::{EnginePlan, GRADIENT_RING};
use ramtorch_device::trace::{Label, Wait};
use ramtorch_device::{DevBuf, Device, DeviceGradients, Dtype, Event, GradientPiece, Stream};
use ramtorch_failpoint::{Point, hit};
use ramtorch_store::GradientFormat;

struct GradientBuffer {
    buf: DevBuf,
    /// Its last contents are out.
    free: Event,
    full: Event,
}

/// Gradient buffers: one a block, or a ring (and one for an embedding that the head shares).
pub(super) struct GradientBuffers {
    buffers: Vec<GradientBuffer>,
    /// Buffer of a block that has its own.
    own: Vec<Option<usize>>,
    ring: std::ops::Range<usize>,
    next: usize,
    /// Rounded gradients on their way out, used in turn; none where the copy stream rounds.
    packed: Vec<GradientBuffer>,
    next_packed: usize,
    /// Of blocks whose rounded gradients stay for held pages.
    packed_of: Vec<Option<GradientBuffer>>,
    /// Blocks whose rounded gradients are copied to where their sums were, and stay there for held pages.
    copied_back: Vec<bool>,
    /// Gradients stay on the device, in this format: in the sums' own buffers, or rounded in `kept`.
    stay: Option<GradientFormat>,
    /// One a block where rounded sums stay.
    kept: Vec<DevBuf>,
}

impl GradientBuffers {
    pub(super) fn new(dev: &mut dyn Device, model: &Model, plan: &EnginePlan) -> Result<Self, EngineError> {
        let (resident, packs) = (plan.resident_gradients, plan.packs());
        let mut g = GradientBuffers {
            buffers: Vec::new(),
            own: vec![None; model.len()],
            ring: 0..0,
            next: 0,
            packed: Vec::new(),
            next_packed: 0,
            packed_of: Vec::new(),
            copied_back: Vec::new(),
            stay: plan.device_gradients,
            kept: Vec::new(),
        };
        let buffer = |dev: &mut dyn Device, bytes: u64| -> Result<GradientBuffer, EngineError> {
            Ok(GradientBuffer { buf: dev.alloc(bytes, "gradients")?, free: dev.event()?, full: dev.event()? })
        };
        let ranks = plan.ranks();
        let new = |dev: &mut dyn Device, len: u64| buffer(dev, ranks.padded(len) * 4);
        for b in 0..model.len() {
            if resident || (b == 0 && model.tied()) {
                g.buffers.push(new(dev, model.places[b].1)?);
                g.own[b] = Some(g.buffers.len() - 1);
            }
        }
        if !resident {
            let largest = (0..model.len()).filter(|b| g.own[*b].is_none()).map(|b| model.places[b].1).max().unwrap_or(0);
            let first = g.buffers.len();
            for _ in 0..if packs || plan.keeps_rounded() { 1 } else { GRADIENT_RING } {
                g.buffers.push(new(dev, largest)?);
            }
            g.ring = first..g.buffers.len();
        }
        if plan.keeps_rounded() {
            let bytes = |b: usize| ranks.padded(model.places[b].1) * GradientFormat::Bf16.bytes();
            g.kept = (0..model.len()).map(|b| dev.alloc(bytes(b), "gradients that stay")).collect::<Result<_, _>>()?;
        }
        if packs {
            let bytes = |b: usize| ranks.padded(model.places[b].1) * plan.store.gradients.bytes();
            for b in 0..model.len() {
                g.packed_of.push(if plan.own_packed(b) { Some(buffer(dev, bytes(b))?) } else { None });
                g.copied_back.push(plan.copies_back(b));
            }
            if let Some(largest) = (0..model.len()).filter(|b| !plan.own_packed(*b)).map(bytes).max() {
                g.packed = (0..GRADIENT_RING).map(|_| buffer(dev, largest)).collect::<Result<_, _>>()?;
            }
        }
        Ok(g)
    }

    /// Memory of block `b`'s sum, where it has its own.
    pub(super) fn sum_of(&self, b: usize) -> Option<DevBuf> {
        Some(self.buffers[self.own[b]?].buf)
    }

    /// When block `b`'s sum has been rounded, and what stays of it copied back.
    pub(super) fn is_free(&self, b: usize) -> Event {
        self.buffers[self.buffer_of(b)].free
    }

    fn buffer_of(&self, b: usize) -> usize {
        self.own[b].unwrap_or(self.ring.start + self.next)
    }

    /// Whether sums stay over groups. A tied embedding's buffer is its own, but goes out with every group like the others.
    fn resident(&self) -> bool {
        self.ring.is_empty()
    }

    /// What leaves of block `b` is copied to where its sum was.
    fn copied_back(&self, b: usize) -> bool {
        self.copied_back.get(b).is_some_and(|back| *back)
    }

    /// Where block `b`'s rounded gradients stay for held pages.
    fn rounded_of(&self, b: usize) -> Option<DevBuf> {
        if self.copied_back(b) {
            return self.sum_of(b);
        }
        self.packed_of.get(b)?.as_ref().map(|packed| packed.buf)
    }

    /// What the optimizer reads are the sums.
    pub(super) fn stay_in_place(&self) -> bool {
        self.stay.is_some() && self.kept.is_empty()
    }

    fn advance(&mut self, b: usize) {
        if self.own[b].is_none() {
            self.next = (self.next + 1) % self.ring.len();
        }
    }
}

impl Session {
    /// Σ of the squares of this step's gradients, where the device works it out (`EnginePlan::squares`); blocks until it has.
    pub fn squares_by_device(&self) -> Result<f64, EngineError> {
        let buf = self.squares.ok_or_else(|| EngineError::internal("the device does not square gradients"))?;
        let mut raw = vec![0u8; 8 * self.model.len()];
        self.dev.download(Stream::Compute, buf.slice(0, raw.len() as u64), &mut raw)?;
        // In the order of blocks.
        Ok(raw.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).sum())
    }

    /// Whether this rank's gradients of block `b` of a step, which are on their way, lie in the store; waits for them where `wait`
    /// says so. The backward pass goes on meanwhile.
    pub fn is_out(&self, b: usize, wait: bool) -> Result<bool, EngineError> {
        if wait {
            self.dev.synchronize_event(self.outs[b])?;
            return Ok(true);
        }
        self.dev.is_done(self.outs[b])
    }

    /// Blocks until every gradient of the step is where it belongs.
    pub fn finish_gradients(&self) -> Result<(), EngineError> {
        if self.gradients.as_ref().is_some_and(|g| g.stay.is_some()) {
            self.dev.synchronize(Stream::Compute)?;
        }
        self.dev.synchronize(Stream::CopyOut)
    }

    /// Where rounded gradients are that stay for held pages; those of other pages are not among them.
    pub fn held_gradients(&self) -> Option<DeviceGradients> {
        let g = self.gradients.as_ref()?;
        let of_block = |(b, (start, len)): (usize, &(u64, u64))| {
            let buf = g.rounded_of(b)?.slice(0, len * GradientFormat::Bf16.bytes());
            Some(GradientPiece { first: *start, end: start + len, buf })
        };
        let pieces: Vec<GradientPiece> = self.model.places.iter().enumerate().filter_map(of_block).collect();
        (!pieces.is_empty()).then(|| DeviceGradients::of_some(GradientFormat::Bf16, pieces))
    }

    /// Where gradients are that stay on the device.
    pub fn device_gradients(&self) -> Option<DeviceGradients> {
        let g = self.gradients.as_ref()?;
        let format = g.stay?;
        let of_block = |(b, (start, len)): (usize, &(u64, u64))| {
            let buf = g.kept.get(b).copied().or_else(|| g.sum_of(b))?;
            Some(GradientPiece { first: *start, end: start + len, buf: buf.slice(0, len * format.bytes()) })
        };
        let pieces: Option<Vec<GradientPiece>> = self.model.places.iter().enumerate().map(of_block).collect();
        Some(DeviceGradients::new(format, pieces?))
    }

    /// The gradient buffer of block `b`, zeroed when it is opened for a new sum. `first_of`: by the first group of the step after that one.
    pub(super) fn open_gradient(&mut self, b: usize, first_of: Option<u64>) -> Result<Grads, EngineError> {
        let len = self.model.places[b].1 * 4;
        let (dev, first_group) = (self.dev.as_ref(), first_of.is_some());
        let copied_back = self.gradients.as_ref().is_some_and(|g| g.copied_back(b));
        if let Some(before) = first_of {
            if copied_back {
                // Held pages are made of what lies there. Blocks that the forward pass has visited are; the last one is opened before.
                self.weights.await_updated(dev, b)?;
            }
            for visiting in self.visiting.iter().filter(|v| v.block == b) {
                // They are in the store when they are published.
                self.weights.await_published(dev, self.store.layout().page_range(visiting.page), before)?;
            }
        }
        let g = self.gradients.as_mut().ok_or_else(|| EngineError::internal("this session does not train"))?;
        let i = g.buffer_of(b);
        let buffer = &g.buffers[i];
        let buf = buffer.buf.slice(0, len);
        if first_group || !g.resident() {
            dev.wait_measured(Stream::Compute, buffer.free, &Label::wait(Wait::Gradients).block(b))?;
            match g.kept.get(b) {
                // The groups before this one are in what stays.
                Some(kept) if !first_group => dev.to_f32(*kept, (len / 4) as usize, buf)?,
                _ => dev.zero(Stream::Compute, buf)?,
            }
        }
        Ok(Grads { buf })
    }

    /// The sum in block `b`'s buffer is complete for this group: send it out where it is due.
    pub(super) fn close_gradient(&mut self, b: usize, group: usize, final_group: bool, before: u64) -> Result<(), EngineError> {
        let (start, len) = self.model.places[b];
        let (dev, ranks) = (self.dev.as_ref(), self.ranks);
        let own = ranks.own(len);
        let g = self.gradients.as_mut().ok_or_else(|| EngineError::internal("this session does not train"))?;
        let i = g.buffer_of(b);
        let resident = g.resident();
        if resident && !final_group {
            return Ok(());
        }
        // What this rank overwrites from here on is what the last step's pages are made of, and made again of after a crash.
        self.weights.await_published(dev, start + own.start..start + own.end, before)?;
        hit(Point::StepLeaving);
        let buffer = &g.buffers[i];
        let accumulate = group > 0 && !resident;
        let size = self.store.layout().spec().gradients.bytes();
        let sum = buffer.buf.slice(0, ranks.padded(len) * 4);
        if let Some(format) = g.stay {
            let (stays, dtype) = match g.kept.get(b) {
                Some(kept) => {
                    dev.from_f32(sum, len as usize, *kept)?;
                    (*kept, Dtype::Bf16)
                }
                None => (sum, Dtype::F32),
            };
            debug_assert_eq!(dtype.size(), format.bytes());
            if let Some(squares) = self.squares.filter(|_| final_group) {
                dev.sum_of_squares(stays, dtype, len as usize, squares.slice(8 * b as u64, 8))?;
            }
            g.advance(b);
            return Ok(());
        }
        let own_packed = g.packed_of.get(b).and_then(Option::as_ref);
        let takes_turns = own_packed.is_none();
        let packed = own_packed.or_else(|| g.packed.get(g.next_packed));
        // What leaves: the sum itself, or the sum rounded into a buffer of its own, which frees the sum's at once.
        let (leaving, src) = match packed {
            Some(packed) => {
                dev.wait_measured(Stream::Compute, packed.free, &Label::wait(Wait::Gradients).block(b))?;
                let out = packed.buf.slice(0, ranks.padded(len) * size);
                dev.from_f32(sum, len as usize, out)?;
                dev.record(buffer.free, Stream::Compute)?;
                (packed, out)
            }
            None => (buffer, sum),
        };
        let (dtype, width) = if packed.is_some() { (Dtype::Bf16, size) } else { (Dtype::F32, 4) };
        if let Some(squares) = self.squares {
            dev.sum_of_squares(src, dtype, len as usize, squares.slice(8 * b as u64, 8))?;
        }
        dev.record(leaving.full, Stream::Compute)?;
        if ranks.world > 1 {
            dev.wait(Stream::Peers, leaving.full)?;
            let stretch = dev.begin(Stream::Peers, &Label::collective("reduce gradients").bytes(src.bytes).block(b))?;
            dev.reduce_scatter(src, dtype)?;
            dev.end(Stream::Peers, stretch)?;
            dev.record(leaving.full, Stream::Peers)?;
        }
        if g.copied_back(b) && own.start < own.end {
            // The optimizer reads this rank's part there; the rest is as it was before the reduction, and nobody's.
            let stream = if ranks.world > 1 { Stream::Peers } else { Stream::Compute };
            let mine = |buf: DevBuf| buf.slice(own.start * width, (own.end - own.start) * width);
            dev.copy(stream, mine(sum), mine(src))?;
            dev.record(buffer.free, stream)?;
            dev.record(leaving.full, stream)?;
        }
        dev.wait(Stream::CopyOut, leaving.full)?;
        let (count, bytes) = (own.end - own.start, (own.end - own.start) * size);
        self.bytes_out += bytes;
        let stretch = dev.begin(Stream::CopyOut, &Label::copy("store gradients", bytes).block(b))?;
        // A short block: its last shares are nobody's.
        let mine = start + own.start..start + own.end;
        let wanted = match &self.ahead {
            Some(ahead) => ahead.wanted(self.store.layout(), mine.clone(), before),
            None => vec![mine.clone()],
        };
        if wanted.iter().map(|p| p.end - p.start).sum::<u64>() < count {
            hit(Point::RerunDropped);
        }
        let layout = self.store.layout();
        for part in wanted.into_iter().flat_map(|part| layout.gradient_parts(part)) {
            let (count, at) = (part.end - part.start, layout.gradient_at(part.start, before + 1));
            let src = src.slice((part.start - start) * width, count * width);
            if packed.is_some() {
                dev.store_packed_gradients(Stream::CopyOut, src, &self.store, at, count)?;
            } else {
                dev.store_gradients(Stream::CopyOut, src, &self.store, at, count, accumulate)?;
            }
        }
        dev.end(Stream::CopyOut, stretch)?;
        dev.record(leaving.free, Stream::CopyOut)?;
        dev.record(self.outs[b], Stream::CopyOut)?;
        if takes_turns && !g.packed.is_empty() {
            g.next_packed = (g.next_packed + 1) % g.packed.len();
        }
        g.advance(b);
        Ok(())
    }
}
