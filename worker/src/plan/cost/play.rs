//! A step's streams, played against one another: when each visit, copy and page of it ends.
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

use super::{Breakdown, Cost, Times};
use crate::model::Model;
use crate::plan::{EnginePlan, GRADIENT_RING};
use ramtorch_store::GradientFormat;
use std::collections::VecDeque;

/// Held pages go out with a pause after each.
const WRITE_BACK: f64 = 0.88;
/// Copies out slow the arithmetic beside them by this share of their own time.
const DRAG_OUT: f64 = 0.08;
/// Gradients that are rounded, or added to those in the segment, on their way out go in pieces of so many parameters, and each
/// piece's kernel waits until products make room for it: 4.1 ms beside products of 32,768 rows. Products of few rows, and so
/// short ones, make room sooner: within this share of a backward visit.
const PIECE: f64 = (1u64 << 24) as f64;
const PIECE_WAIT: f64 = 4e-3;
const PIECE_WAIT_SHARE: f64 = 0.2;
/// From a block's publication to the start of its copy; from the last gradient to the optimizer's start. Seconds.
const NOTICE: f64 = 1e-4;
const TURN: f64 = 3e-3;

/// The streams of one step; times are ends of what was enqueued so far.
pub(super) struct Run<'a> {
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
    /// When what visits where each block's sum was is published, but for the same time.
    left: Vec<f64>,
    /// Seconds in which state that visits where each block's sum was comes; from when on what is due may, and how long that takes; the end of
    /// what has come.
    visits: Vec<f64>,
    due: (f64, f64),
    fetched: f64,
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
    pub(super) fn new(
        cost: &'a Cost,
        model: &'a Model,
        p: &'a EnginePlan,
        t: &'a Times,
        rate: f64,
        held: &'a [f64],
        early: &[f64],
    ) -> Self {
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
        // What visits goes before what stays, in the order of its rooms.
        let (mut left, mut visits) = (vec![0.0; model.len()], vec![0.0; model.len()]);
        let page = p.store.page_parameters.map_or(0.0, f64::from) * state;
        for (i, (b, _)) in p.visited_rooms(model).iter().enumerate() {
            left[*b] = end + (i + 1) as f64 * page / (cost.both[1] * WRITE_BACK);
            visits[*b] += page / cost.both[0];
        }
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
            left,
            visits,
            due: (0.0, 0.0),
            fetched: 0.0,
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

    /// The whole step, added to what `s` has of it already.
    pub(super) fn play(mut self, mut s: Breakdown) -> Breakdown {
        // Groups in the middle are alike: a few are played, the rest follow from the last of them.
        const PLAYED: usize = 4;
        let played = self.p.groups.min(PLAYED);
        for g in 0..played {
            let start = (self.compute, self.s);
            self.group(g, g + 1 == played);
            if g + 2 == played && self.p.groups > PLAYED {
                // This one stands for those that are not played.
                let more = (self.p.groups - PLAYED) as f64;
                self.skip((self.compute - start.0) * more);
                self.s.wait_copies += (self.s.wait_copies - start.1.wait_copies) * more;
                self.s.wait_gradients += (self.s.wait_gradients - start.1.wait_gradients) * more;
                self.s.copies_in += (self.s.copies_in - start.1.copies_in) * more;
                self.s.copies_out += (self.s.copies_out - start.1.copies_out) * more;
            }
        }
        self.fetch();
        let r = self.s;
        let committed = self.published.iter().copied().fold(0.0, f64::max) + self.gradients;
        let copied = self.compute.max(self.out).max(self.fetched).max(if self.written_back > 0.0 { committed } else { 0.0 });
        let end = if self.cost.norm_beside { copied.max(self.norm) } else { copied + s.norm };
        s.tail = copied - self.compute + TURN;
        s.wait_norm = end - copied;
        s.step = end + TURN;
        (s.copies_in, s.copies_out) = (r.copies_in, r.copies_out);
        (s.wait_optimizer, s.wait_copies, s.wait_gradients) = (r.wait_optimizer, r.wait_copies, r.wait_gradients);
        s
    }

    fn skip(&mut self, seconds: f64) {
        self.compute += seconds;
        self.copy_in += seconds;
        self.peers += seconds;
        self.out += seconds;
        self.slots.iter_mut().map(|(_, end)| end).chain(&mut self.ring).for_each(|x| *x += seconds);
    }

    /// What is due comes, behind the next block's weights, whose copy was enqueued before.
    fn fetch(&mut self) {
        let (from, seconds) = std::mem::take(&mut self.due);
        if seconds > 0.0 {
            self.copy_in = self.copy_in.max(from) + seconds;
            self.fetched = self.copy_in;
        }
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
            let (seconds, gather) = (bytes(loaded) / n / rate, Self::between(bytes(len), n, self.cost.peers));
            let mut start = self.copy_in.max(free);
            if first {
                start = start.max(self.updated[b] + NOTICE);
                gate = gate.max(self.updated[b] + NOTICE + seconds + gather);
            }
            self.copy_in = start + seconds;
            self.compute += self.cost.drag_in * seconds + self.cost.drag_peers[0] * gather;
            self.s.copies_in += seconds;
            if gather > 0.0 {
                self.peers = self.peers.max(self.copy_in) + gather;
                ready = ready.max(self.peers);
            }
            ready = ready.max(self.copy_in);
        }
        self.fetch();
        (ready, gate)
    }

    /// Seconds in which each of `n` ranks receives its part of `bytes` from the others, at `rate`.
    fn between(bytes: f64, n: f64, rate: f64) -> f64 {
        bytes * (n - 1.0) / n / rate
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
        if self.left[b] > 0.0 {
            let idle = (self.left[b] + self.gradients + NOTICE - self.compute).max(0.0);
            self.s.wait_optimizer += idle;
            self.compute += idle;
        }
        if !self.p.resident_gradients && self.ring.len() >= GRADIENT_RING {
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
        let reduce = Self::between(elements * wire, n, self.cost.reduces);
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
        self.compute += DRAG_OUT * seconds + self.cost.drag_peers[1] * reduce;
        if self.p.copies_back(b) {
            self.compute += 2.0 * bytes / self.cost.memory;
        }
        if last_group && self.visits[b] > 0.0 {
            self.fetch();
            self.due = (self.compute, self.visits[b]);
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
        self.compute += if first { DRAG_OUT * self.written_back } else { 0.0 };
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
