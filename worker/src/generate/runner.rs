//! What a generation holds on its device, and the sweeps over it.
//!
//! ```text
//!   sweep:  tokens up ─► block 0, every chunk ─► … ─► block n-1: logits of the rows that are asked for
//! ```
//! A chunk is a part of every sequence. A prompt of many chunks goes through a block as a whole before the next block's turn,
//! where weights are streamed and memory allows: they cross the bus once for all of its chunks.
//!
//! Where all weights stay, a device that keeps work gets the sweep for one token of each sequence in one call: one by one, the launches of
//! its hundreds of small kernels are a part of a token's time.

use crate::api::*;
use crate::model::{Block, Cache, Head, MicroBatch, Model, Shape, Tables, Visit, Weights};
use crate::plan::{resident, rounded};
use crate::session::rope_table;
use crate::weights::WeightCache;
use ramtorch_device::{DevBuf, Device, Dtype, KeptWork, Ranks, Stream, TokenIndex};
use ramtorch_modelio::Architecture;
use ramtorch_store::Store;
use std::sync::Arc;

/// Prompt tokens of a sequence that go through the layers together.
const PREFILL: usize = 128;
/// Of the memory for weights, chunks that go through a block together take one part in so many at most.
const ROOM_SHARE: u64 = 8;

/// How much a generation is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub prompts: usize,
    /// Tokens of the longest prompt.
    pub longest: usize,
    /// Tokens of it and of what may be made after it.
    pub capacity: usize,
}

/// Tokens of every sequence that go through the layers together.
struct Chunk {
    /// `new` of each sequence.
    tokens: Vec<u32>,
    new: usize,
    /// Tokens of each sequence that went before.
    past: Vec<usize>,
    /// Rows of the chunk whose logits are wanted.
    wanted: Vec<u32>,
}

/// See the module.
pub(super) struct Runner {
    dev: Box<dyn Device>,
    model: Model,
    weights: WeightCache,
    version: u64,
    tables: Tables,
    /// Sizes that buffers are divided by: a chunk of all prompts.
    shape: Shape,
    capacity: usize,
    /// Chunks that go through a block together, at most.
    group: usize,
    /// Tokens that are in the cache, of each sequence that has a row.
    lengths: Vec<usize>,
    ids: DevBuf,
    positions: DevBuf,
    past: DevBuf,
    rows: DevBuf,
    /// Activations of the chunks of a group, and of one more: what a block makes of a chunk lies where the one before it was.
    x: DevBuf,
    saved: DevBuf,
    scratch: DevBuf,
    caches: Vec<(DevBuf, DevBuf)>,
    /// All weights are on the device from the first sweep on.
    stays: bool,
    kept: Option<KeptSweep>,
}

/// A sweep for one token of each of so many sequences, if the device keeps it, and where its logits lie.
struct KeptSweep {
    sequences: usize,
    work: Option<KeptWork>,
    logits: DevBuf,
}

impl Runner {
    pub fn open(
        spec: &DeviceSpec,
        architecture: &Architecture,
        store: &Arc<Store>,
        version: u64,
        dtype: Dtype,
        room: Room,
    ) -> Result<Self, EngineError> {
        Self::with_chunks(spec, architecture, store, version, dtype, room, room.longest.min(PREFILL))
    }

    fn with_chunks(
        spec: &DeviceSpec,
        architecture: &Architecture,
        store: &Arc<Store>,
        version: u64,
        dtype: Dtype,
        room: Room,
        chunk: usize,
    ) -> Result<Self, EngineError> {
        let Room { prompts: batch, longest, capacity } = room;
        let model = Model::new(architecture, store.layout(), dtype)?;
        let shape = Shape { sequences: batch, seq: chunk, head_rows: batch };
        let saved_bytes = (0..model.len()).map(|b| model.saved_bytes(b, shape, crate::model::Keep::All)).max().unwrap_or(0);
        let head_bytes = match model.blocks.last() {
            Some(Block::Head(h)) => h.predict_bytes(batch, dtype),
            _ => 0,
        };
        let cache = |b: usize| match &model.blocks[b] {
            Block::Layer(l) => l.cache_bytes(batch, capacity, dtype),
            _ => 0,
        };
        let caches_bytes: u64 = (0..model.len()).map(|b| 2 * rounded(cache(b))).sum();
        let (rows, each) = (shape.rows() as u64, chunk_bytes(&model, shape));
        let fixed = |group: u64| {
            caches_bytes
                + rounded(saved_bytes)
                + rounded(head_bytes)
                + rounded((group + 1) * each)
                + 2 * rounded(group * rows * 4)
                + rounded(group * batch as u64 * 4)
                + rounded(batch as u64 * 4)
                + crate::plan::rope_table_bytes(architecture, capacity)
        };
        let budget = spec.memory_bytes.saturating_sub(crate::plan::library_bytes(spec.kind, true, 1));
        let weights = |group: u64| resident(&model, budget.saturating_sub(fixed(group)));
        let (mut group, mut kept) = (1, weights(1));
        if kept.slots > 0 {
            let more = budget.saturating_sub(fixed(1)) / ROOM_SHARE / each.max(1);
            let several = (1 + more).min(longest.div_ceil(chunk.max(1)) as u64);
            let with_several = weights(several);
            if fixed(several) + with_several.bytes <= budget {
                (group, kept) = (several, with_several);
            }
        }
        let need = fixed(group) + kept.bytes;
        if need > budget {
            return Err(EngineError::new(
                ErrorKind::Resources,
                format!(
                    "generating {batch} texts of {capacity} tokens needs {need} bytes of device memory, {budget} are given; use fewer prompts or tokens, or give the device more memory"
                ),
            ));
        }
        let mut dev = crate::device::open(spec, dtype, need, true)?;
        let d = dev.as_mut();
        d.register_store(store)?;
        let weights = WeightCache::new(d, store.clone(), &model, &kept.stay, kept.slots, Ranks::ALONE)?;
        let tables = Tables { rope: rope_table(d, architecture, capacity)? };
        let caches = (0..model.len())
            .map(|b| Ok((d.alloc(cache(b), "key cache")?, d.alloc(cache(b), "value cache")?)))
            .collect::<Result<_, EngineError>>()?;
        let (ids, positions) = (d.alloc(group * rows * 4, "ids")?, d.alloc(group * rows * 4, "positions")?);
        let past = d.alloc(group * batch as u64 * 4, "lengths")?;
        let rows = d.alloc(batch as u64 * 4, "rows")?;
        let x = d.alloc((group + 1) * each, "activations")?;
        let saved = d.alloc(saved_bytes, "activations")?;
        let scratch = d.alloc(head_bytes, "logits")?;
        let mut runner = Runner {
            dev,
            model,
            weights,
            version,
            tables,
            shape,
            capacity,
            group: group as usize,
            lengths: vec![0; batch],
            ids,
            positions,
            past,
            rows,
            x,
            saved,
            scratch,
            caches,
            stays: kept.slots == 0,
            kept: None,
        };
        runner.warm(spec.kind)?;
        Ok(runner)
    }

    /// Loads what stays, and runs an arbitrary token through one block of each kind: what a device does once for each new shape
    /// is done before the first token that somebody waits for. The keys that it leaves behind are overwritten.
    fn warm(&mut self, kind: DeviceKind) -> Result<(), EngineError> {
        self.weights.plan_visits(self.visits(0..self.model.len()), self.version);
        self.weights.prefetch(self.dev.as_ref())?;
        self.dev.synchronize(Stream::CopyIn)?;
        let (batch, longest) = (self.lengths.len(), self.shape.seq);
        let blocks = [0, 1, self.model.len() - 1];
        // A CPU device prepares nothing: one token there keeps this code under test.
        let sizes: &[usize] = match kind {
            _ if self.model.len() < 3 => &[],
            DeviceKind::Cpu => &[1],
            DeviceKind::Cuda => &[longest, 1],
        };
        for &new in sizes {
            let chunk = Chunk { tokens: vec![0; batch * new], new, past: vec![0; batch], wanted: (0..batch as u32).collect() };
            self.sweep(&blocks, &[chunk], &mut |_, _| {})?;
        }
        Ok(())
    }

    fn visits(&self, blocks: impl IntoIterator<Item = usize>) -> Vec<usize> {
        blocks.into_iter().flat_map(|b| self.model.forward_needs(b)).collect()
    }

    fn put(&self, dst: DevBuf, values: impl Iterator<Item = u32>) -> Result<(), EngineError> {
        let bytes: Vec<u8> = values.flat_map(u32::to_le_bytes).collect();
        self.dev.upload(Stream::Compute, dst, &bytes)
    }

    /// The chunk `mb` through block `b`, where that is not the head. What becomes of `x` lies where is said first; the other place is free.
    fn pass(
        &self,
        b: usize,
        w: Weights,
        mb: &MicroBatch,
        (positions, past): (DevBuf, DevBuf),
        (x, free): (DevBuf, DevBuf),
    ) -> Result<(DevBuf, DevBuf), EngineError> {
        let v = Visit { dev: self.dev.as_ref(), shape: self.shape, tables: self.tables, mb, scratch: self.scratch };
        match &self.model.blocks[b] {
            Block::Embed(e) => e.at_positions(&v, w, positions, x).map(|()| (x, free)),
            Block::Layer(l) => {
                let (keys, values) = self.caches[b];
                let cache = Cache { keys, values, capacity: self.capacity, past, positions };
                l.step(&v, w, x, self.saved, free, &cache).map(|()| (free, x))
            }
            Block::Head(_) => Ok((x, free)),
            Block::Stack(_) => Err(EngineError::internal("a stack has no tokens")),
        }
    }

    /// Logits of the first `count` of `rows` of what lies at `x`.
    fn logits(&self, head: &Head, w: &[Weights], x: DevBuf, count: usize) -> Result<DevBuf, EngineError> {
        let predicted = head.predict(self.dev.as_ref(), w, x, self.rows, count, self.scratch)?;
        Ok(predicted.slice(0, (count * head.vocab) as u64 * self.model.dtype.size()))
    }

    /// Places of the activations of so many chunks, and the one that is free.
    fn places(&self, chunks: usize) -> (Vec<DevBuf>, DevBuf) {
        let each = chunk_bytes(&self.model, self.shape);
        let place = |at: usize| self.x.slice(at as u64 * each, each);
        ((0..chunks).map(place).collect(), place(chunks))
    }

    /// Runs the chunks of a group, in the order of their positions, through `blocks`. `look` is shown the logits of the rows that
    /// each chunk wants, in the compute format, where it wants any. A product for the rows of several chunks at once could have
    /// other bits than one for each.
    fn sweep(&mut self, blocks: &[usize], chunks: &[Chunk], look: &mut dyn FnMut(usize, &[u8])) -> Result<(), EngineError> {
        self.put(self.ids, chunks.iter().flat_map(|c| c.tokens.iter().copied()))?;
        let positions = |c: &Chunk| c.past.iter().flat_map(|p| *p..*p + c.new).map(|p| p as u32).collect::<Vec<_>>();
        self.put(self.positions, chunks.iter().flat_map(positions))?;
        self.put(self.past, chunks.iter().flat_map(|c| c.past.iter().map(|p| *p as u32)))?;
        // This sweep, and the one after it: its first weights are on their way while tokens are chosen.
        self.weights.plan_visits(self.visits(blocks.iter().copied()).repeat(2), self.version);
        let (mut places, mut free) = self.places(chunks.len());
        for &b in blocks {
            let needs = self.model.forward_needs(b);
            let w = self.weights.acquire(self.dev.as_ref(), &needs)?;
            let mut first = 0;
            for (c, chunk) in chunks.iter().enumerate() {
                let part = |buf: DevBuf| buf.slice(first as u64 * 4, chunk.tokens.len() as u64 * 4);
                let (ids, positions) = (part(self.ids), part(self.positions));
                first += chunk.tokens.len();
                let past = self.past.slice((c * chunk.past.len()) as u64 * 4, chunk.past.len() as u64 * 4);
                (places[c], free) = self.pass(b, w[0], &micro_batch(chunk, ids), (positions, past), (places[c], free))?;
            }
            // The last logits are looked at when the weights are free for what comes next.
            let mut last = None;
            if let Block::Head(h) = &self.model.blocks[b] {
                for (c, chunk) in chunks.iter().enumerate().filter(|(_, chunk)| !chunk.wanted.is_empty()) {
                    if let Some((c, before)) = last.take() {
                        self.dev.read(Stream::Compute, before, &mut |logits| look(c, logits))?;
                    }
                    self.put(self.rows, chunk.wanted.iter().copied())?;
                    last = Some((c, self.logits(h, &w, places[c], chunk.wanted.len())?));
                }
            }
            self.weights.release(self.dev.as_ref(), &needs)?;
            if let Some((c, predicted)) = last {
                self.dev.read(Stream::Compute, predicted, &mut |logits| look(c, logits))?;
            }
        }
        Ok(())
    }

    fn all_blocks(&self) -> Vec<usize> {
        (0..self.model.len()).collect()
    }

    /// Runs the prompts; logits after the last token of each, in the compute format.
    pub fn prefill(&mut self, prompts: &[Vec<u32>]) -> Result<Vec<u8>, EngineError> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let firsts: Vec<usize> = (0..longest).step_by(self.shape.seq.max(1)).collect();
        let mut all = Vec::new();
        for group in firsts.chunks(self.group) {
            let (mut chunks, mut whose) = (Vec::new(), Vec::new());
            for &first in group {
                let new = self.shape.seq.min(longest - first);
                let token = |p: &Vec<u32>, t: usize| p.get(t).copied().unwrap_or(0);
                let tokens = prompts.iter().flat_map(|p| (first..first + new).map(|t| token(p, t))).collect();
                let ends: Vec<usize> = (0..prompts.len()).filter(|b| (first..first + new).contains(&(prompts[*b].len() - 1))).collect();
                let wanted = ends.iter().map(|b| (b * new + prompts[*b].len() - 1 - first) as u32).collect();
                chunks.push(Chunk { tokens, new, past: vec![first; prompts.len()], wanted });
                whose.push(ends);
            }
            self.sweep(&self.all_blocks(), &chunks, &mut |chunk, some| {
                let row = some.len() / whose[chunk].len();
                all.resize(prompts.len() * row, 0);
                for (from, b) in whose[chunk].iter().enumerate() {
                    all[b * row..(b + 1) * row].copy_from_slice(&some[from * row..(from + 1) * row]);
                }
            })?;
        }
        self.lengths = prompts.iter().map(Vec::len).collect();
        Ok(all)
    }

    /// One token of each of `sequences` through all blocks: their logits. Ids, positions and rows are on the device, and weights.
    fn token(&self, weights: &[Vec<Weights>], sequences: usize) -> Result<DevBuf, EngineError> {
        let ids = self.ids.slice(0, sequences as u64 * 4);
        let chunk = Chunk { tokens: vec![0; sequences], new: 1, past: vec![0; sequences], wanted: Vec::new() };
        let mb = micro_batch(&chunk, ids);
        let (places, free) = self.places(1);
        let mut places = (places[0], free);
        // Where one token is new, its position is how many went before.
        let positions = self.positions.slice(0, sequences as u64 * 4);
        for (b, w) in weights.iter().enumerate() {
            if let Block::Head(h) = &self.model.blocks[b] {
                return self.logits(h, w, places.0, sequences);
            }
            places = self.pass(b, w[0], &mb, (positions, positions), places)?;
        }
        Err(EngineError::internal("no head to tell tokens"))
    }

    /// What each block's visit needs, where all of it stays: later work on the device finds it there.
    fn weights_that_stay(&mut self) -> Result<Vec<Vec<Weights>>, EngineError> {
        let blocks = self.all_blocks();
        self.weights.plan_visits(self.visits(blocks.iter().copied()), self.version);
        let mut weights = Vec::new();
        for b in blocks {
            let needs = self.model.forward_needs(b);
            weights.push(self.weights.acquire(self.dev.as_ref(), &needs)?);
            self.weights.release(self.dev.as_ref(), &needs)?;
        }
        Ok(weights)
    }

    /// Has the device keep the sweep for one token of each of `sequences`, which has run before.
    fn keep_sweep(&mut self, sequences: usize) -> Result<KeptSweep, EngineError> {
        let weights = self.weights_that_stay()?;
        self.put(self.rows, 0..sequences as u32)?;
        let mut logits = DevBuf { ptr: 0, bytes: 0 };
        let work = self.dev.keep_work(&mut || {
            logits = self.token(&weights, sequences)?;
            Ok(())
        })?;
        Ok(KeptSweep { sequences, work, logits })
    }

    /// Runs the next token of each sequence that has a row, and has `choose` look at the logits after it.
    pub fn decode<R>(&mut self, tokens: &[u32], choose: impl Fn(&[u8]) -> Result<R, EngineError>) -> Result<R, EngineError> {
        let mut chosen = None;
        let mut look = |logits: &[u8]| chosen = Some(choose(logits));
        match self.kept.as_ref().filter(|kept| kept.sequences == tokens.len()).and_then(|kept| Some((kept.work?, kept.logits))) {
            Some((work, logits)) => {
                self.put(self.ids, tokens.iter().copied())?;
                self.put(self.positions, self.lengths.iter().map(|n| *n as u32))?;
                self.dev.again(work)?;
                self.dev.read(Stream::Compute, logits, &mut look)?;
            }
            None => {
                let wanted = (0..tokens.len() as u32).collect();
                let chunk = Chunk { tokens: tokens.to_vec(), new: 1, past: self.lengths.clone(), wanted };
                self.sweep(&self.all_blocks(), &[chunk], &mut |_, logits| look(logits))?;
                if self.stays && self.kept.as_ref().is_none_or(|kept| kept.sequences != tokens.len()) {
                    self.kept = Some(self.keep_sweep(tokens.len())?);
                }
            }
        }
        self.lengths.iter_mut().for_each(|n| *n += 1);
        chosen.unwrap_or_else(|| Err(EngineError::internal("a sweep without logits")))
    }

    /// Gives up all rows but these, ascending: they are the first ones from now on.
    pub fn keep(&mut self, rows: &[usize]) -> Result<(), EngineError> {
        for (b, (keys, values)) in self.caches.iter().enumerate() {
            let Block::Layer(l) = &self.model.blocks[b] else { continue };
            let sequence = l.cache_bytes(1, self.capacity, self.model.dtype);
            for (to, &from) in rows.iter().enumerate().filter(|(to, from)| to != *from) {
                let used = l.cache_bytes(1, self.lengths[from], self.model.dtype);
                for cache in [keys, values] {
                    let part = |row: usize| cache.slice(row as u64 * sequence, used);
                    self.dev.copy(Stream::Compute, part(to), part(from))?;
                }
            }
        }
        self.lengths = rows.iter().map(|row| self.lengths[*row]).collect();
        Ok(())
    }
}

/// Bytes of the activations of a chunk.
fn chunk_bytes(model: &Model, shape: Shape) -> u64 {
    shape.rows() as u64 * model.width(0) as u64 * model.dtype.size()
}

fn micro_batch(chunk: &Chunk, ids: DevBuf) -> MicroBatch {
    let none = DevBuf { ptr: 0, bytes: 0 };
    let tokens = TokenIndex { rows: chunk.tokens.len(), ids, order: none, bounds: none, unique: 0 };
    MicroBatch {
        sequences: chunk.past.len(),
        seq: chunk.new,
        tokens,
        input: none,
        targets: none,
        weights: none,
        losses: none,
        starts: None,
    }
}

#[cfg(test)]
mod tests;
