//! Sampling text: prompts of any lengths side by side, layers streamed as in training, keys and values cached on the
//! device.
//!
//! ```text
//!   prefill: chunks of the padded prompts, positions 0 … longest ─► first token of each
//!   decode:  one token of every prompt a sweep, until all have ended
//! ```
//! A short prompt's padding writes keys past its end; they are overwritten before anything looks at them, since a
//! token sees only positions up to its own.

use crate::api::*;
use crate::errors;
use crate::inference::LoadedModel;
use crate::model::{Block, Cache, MicroBatch, Model, Shape, Tables, Visit};
use crate::plan::rounded;
use crate::prepare::tokenizer_source;
use crate::sampling;
use crate::session::rope_table;
use crate::weights::WeightCache;
use ramtorch_data::{TextStream, Tokenizer, TokenizerSource};
use ramtorch_device::{DevBuf, Device, Dtype, Ranks, Stream, TokenIndex};
use ramtorch_job::{JobSpec, Precision, SampleSpec};
use ramtorch_modelio::{Architecture, TransformerConfig};
use ramtorch_store::Store;
use std::sync::Arc;
use std::time::Instant;

/// Prompt tokens a sequence that one sweep takes.
const PREFILL: usize = 128;

/// The sample at the end of a job.
pub(crate) fn sample(
    a: &Assignment,
    spec: &JobSpec,
    architecture: &Architecture,
    store: &Arc<Store>,
    dtype: Dtype,
    s: &SampleSpec,
) -> Result<String, EngineError> {
    let source = tokenizer_source(&spec.model)
        .ok_or_else(|| EngineError::new(ErrorKind::JobFile, "`sample` needs a tokenizer; the model has none"))?;
    let request = GenerateRequest {
        prompts: vec![s.prompt.clone()],
        max_new_tokens: s.max_new_tokens,
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        seed: s.seed,
        chat: false,
        precision: None,
    };
    let done = generate(&a.device, architecture, store, store.record().step, &source, dtype, &request, &|_, _| {})?;
    Ok(format!("{}{}", s.prompt, done.texts.first().map_or("", String::as_str)))
}

/// [`Task::Generate`].
pub(crate) fn run(a: &Assignment, source: &Source, request: &GenerateRequest, control: &dyn Control) -> Result<Generated, EngineError> {
    control.heartbeat(0, "loading");
    let model = LoadedModel::open(source, control)?;
    let tokenizer =
        model.tokenizer().cloned().ok_or_else(|| EngineError::input("the model has no tokenizer.json, so prompts cannot be read"))?;
    let store = model.private_store(control)?;
    control.heartbeat(0, "generating");
    let dtype = match (request.precision, a.device.kind) {
        (Some(Precision::Fp32), _) | (None, DeviceKind::Cpu) => Dtype::F32,
        _ => Dtype::Bf16,
    };
    generate(&a.device, &model.architecture, &store, 0, &tokenizer, dtype, request, &|i, text| control.token(i, text))
}

fn generate(
    device: &DeviceSpec,
    architecture: &Architecture,
    store: &Arc<Store>,
    version: u64,
    tokenizer: &TokenizerSource,
    dtype: Dtype,
    request: &GenerateRequest,
    token: &dyn Fn(usize, &str),
) -> Result<Generated, EngineError> {
    let begin = Instant::now();
    let config = architecture.transformer().ok_or_else(|| EngineError::input("a plain stack generates no text"))?;
    let tokenizer = Tokenizer::load(tokenizer).map_err(errors::data)?;
    let prompts = encode(&tokenizer, config, request)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let capacity = longest + request.max_new_tokens;
    if config.rope.is_none() && capacity > config.max_positions {
        return Err(EngineError::input(format!(
            "{longest} prompt tokens and {} new ones are more than the model's {} positions; ask for fewer",
            request.max_new_tokens, config.max_positions
        )));
    }
    let mut runner = Runner::open(device, architecture, store, version, dtype, prompts.len(), longest.min(PREFILL), capacity)?;
    let mut streams: Vec<TextStream> = prompts.iter().map(|_| tokenizer.stream(true)).collect();
    let mut texts = vec![String::new(); prompts.len()];
    let mut ended = vec![request.max_new_tokens == 0; prompts.len()];
    let stop = |id: u32| tokenizer.eos_ids().contains(&id) || config.eos_token_ids.contains(&id);
    let mut logits = runner.prefill(&prompts)?;
    let mut new_tokens = 0u64;
    for step in 0..request.max_new_tokens {
        let mut next = vec![0u32; prompts.len()];
        for (i, id) in sampling::next_tokens(&logits, &ended, request, step)?.into_iter().enumerate() {
            let Some(id) = id else { continue };
            if stop(id) {
                ended[i] = true;
                continue;
            }
            new_tokens += 1;
            next[i] = id;
            let text = streams[i].push(id).map_err(errors::data)?;
            token(i, &text);
            texts[i].push_str(&text);
        }
        if ended.iter().all(|e| *e) || step + 1 == request.max_new_tokens {
            break;
        }
        runner.decode(&next, &prompts, step, &mut logits)?;
    }
    for (i, stream) in streams.iter_mut().enumerate() {
        let rest = stream.finish().map_err(errors::data)?;
        token(i, &rest);
        texts[i].push_str(&rest);
    }
    let prompt_tokens = prompts.iter().map(|p| p.len() as u64).sum();
    Ok(Generated { texts, prompt_tokens, new_tokens, seconds: begin.elapsed().as_secs_f64() })
}

fn encode(tokenizer: &Tokenizer, config: &TransformerConfig, request: &GenerateRequest) -> Result<Vec<Vec<u32>>, EngineError> {
    if request.prompts.is_empty() {
        return Err(EngineError::input("no prompt"));
    }
    request
        .prompts
        .iter()
        .map(|p| {
            let mut ids = if request.chat {
                let text =
                    tokenizer.apply_chat_template(&[serde_json::json!({ "role": "user", "content": p })], true).map_err(errors::data)?;
                tokenizer.encode(&text, false)
            } else {
                tokenizer.encode(p, true)
            }
            .map_err(errors::data)?;
            if ids.is_empty() {
                // Nothing to go on from: the text begins where a document does.
                ids.extend(tokenizer.bos().or(config.bos_token_id).or(tokenizer.eos()));
            }
            if ids.is_empty() {
                return Err(EngineError::input("an empty prompt needs a beginning-of-sequence token, and the tokenizer has none"));
            }
            match ids.iter().find(|id| **id as usize >= config.vocab_size) {
                Some(id) => Err(EngineError::input(format!("the tokenizer gives id {id}, but the model has {} tokens", config.vocab_size))),
                None => Ok(ids),
            }
        })
        .collect()
}

/// Device state of a generation.
struct Runner {
    dev: Box<dyn Device>,
    model: Model,
    weights: WeightCache,
    version: u64,
    tables: Tables,
    batch: usize,
    chunk: usize,
    capacity: usize,
    ids: DevBuf,
    positions: DevBuf,
    past: DevBuf,
    rows: DevBuf,
    x: [DevBuf; 2],
    saved: DevBuf,
    scratch: DevBuf,
    caches: Vec<(DevBuf, DevBuf)>,
}

impl Runner {
    fn open(
        spec: &DeviceSpec,
        architecture: &Architecture,
        store: &Arc<Store>,
        version: u64,
        dtype: Dtype,
        batch: usize,
        chunk: usize,
        capacity: usize,
    ) -> Result<Self, EngineError> {
        let model = Model::new(architecture, store.layout(), dtype)?;
        let shape = Shape { sequences: batch, seq: chunk, head_rows: batch };
        let rows = batch * chunk;
        let saved_bytes = (0..model.len()).map(|b| model.saved_bytes(b, shape, crate::model::Keep::All)).max().unwrap_or(0);
        let head_bytes = match model.blocks.last() {
            Some(Block::Head(h)) => h.predict_bytes(batch, dtype),
            _ => 0,
        };
        let hidden = model.width(0) as u64;
        let cache = |b: usize| match &model.blocks[b] {
            Block::Layer(l) => l.cache_bytes(batch, capacity, dtype),
            _ => 0,
        };
        let caches_bytes: u64 = (0..model.len()).map(|b| 2 * rounded(cache(b))).sum();
        let fixed = caches_bytes
            + rounded(saved_bytes)
            + rounded(head_bytes)
            + 2 * rounded(rows as u64 * hidden * dtype.size())
            + 4 * rounded(rows as u64 * 4)
            + crate::plan::rope_table_bytes(architecture, capacity);
        let size = |b: usize| rounded(model.places[b].1 * dtype.size());
        let budget = spec.memory_bytes.saturating_sub(crate::plan::library_bytes(spec.kind, true, 1));
        let sizes: Vec<u64> = (0..model.len()).map(size).collect();
        let layer = |b: usize| matches!(model.blocks[b], Block::Layer(_));
        let (resident, slots, weights) = resident(&sizes, layer, budget.saturating_sub(fixed));
        let need = fixed + weights;
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
        let weights = WeightCache::new(d, store.clone(), &model, &resident, slots, Ranks::ALONE)?;
        let tables = Tables { rope: rope_table(d, architecture, capacity)? };
        let caches = (0..model.len())
            .map(|b| Ok((d.alloc(cache(b), "key cache")?, d.alloc(cache(b), "value cache")?)))
            .collect::<Result<_, EngineError>>()?;
        let small = |d: &mut dyn Device| d.alloc(rows as u64 * 4, "ids");
        let (ids, positions, past, at) = (small(d)?, small(d)?, small(d)?, small(d)?);
        let x_bytes = rows as u64 * hidden * dtype.size();
        let x = [d.alloc(x_bytes, "activations")?, d.alloc(x_bytes, "activations")?];
        let saved = d.alloc(saved_bytes, "activations")?;
        let scratch = d.alloc(head_bytes, "logits")?;
        Ok(Runner {
            dev,
            model,
            weights,
            version,
            tables,
            batch,
            chunk,
            capacity,
            ids,
            positions,
            past,
            rows: at,
            x,
            saved,
            scratch,
            caches,
        })
    }

    fn put(&self, dst: DevBuf, values: impl Iterator<Item = u32>) -> Result<(), EngineError> {
        let bytes: Vec<u8> = values.flat_map(u32::to_le_bytes).collect();
        self.dev.upload(Stream::Compute, dst, &bytes)
    }

    /// One sweep over `new` tokens of every sequence from position `past[b]` on; f32 logits of the rows `wanted`, each given its
    /// part of `logits`.
    fn sweep(&mut self, tokens: &[u32], new: usize, past: &[usize], wanted: &[u32], logits: &mut Vec<u8>) -> Result<(), EngineError> {
        self.put(self.ids, tokens.iter().copied())?;
        self.put(self.positions, past.iter().flat_map(|p| (*p..*p + new).map(|x| x as u32)))?;
        self.put(self.past, past.iter().map(|p| *p as u32))?;
        let none = DevBuf { ptr: 0, bytes: 0 };
        let tokens = TokenIndex { rows: tokens.len(), ids: self.ids, order: none, bounds: none, unique: 0 };
        let mb =
            MicroBatch { sequences: self.batch, seq: new, tokens, input: none, targets: none, weights: none, losses: none, starts: None };
        let shape = Shape { sequences: self.batch, seq: self.chunk, head_rows: self.batch };
        // This sweep, and the one after it: its first weights are on their way while tokens are chosen.
        let visits: Vec<usize> = (0..self.model.len()).flat_map(|b| self.model.forward_needs(b)).collect();
        self.weights.plan_visits(visits.repeat(2), self.version);
        let mut at = 0;
        for b in 0..self.model.len() {
            let needs = self.model.forward_needs(b);
            let w = self.weights.acquire(self.dev.as_ref(), &needs)?;
            let v = Visit { dev: self.dev.as_ref(), shape, tables: self.tables, mb: &mb, scratch: self.scratch };
            let mut out = None;
            match &self.model.blocks[b] {
                Block::Embed(e) => e.at_positions(&v, w[0], self.positions, self.x[at])?,
                Block::Layer(l) => {
                    let (keys, values) = self.caches[b];
                    let cache = Cache { keys, values, capacity: self.capacity, past: self.past, positions: self.positions };
                    l.step(&v, w[0], self.x[at], self.saved, self.x[1 - at], &cache)?;
                    at = 1 - at;
                }
                Block::Head(h) if !wanted.is_empty() => {
                    self.put(self.rows, wanted.iter().copied())?;
                    out = Some((h.predict(self.dev.as_ref(), &w, self.x[at], self.rows, wanted.len(), self.scratch)?, h.vocab));
                }
                Block::Head(_) => {}
                Block::Stack(_) => return Err(EngineError::internal("a stack has no tokens")),
            }
            self.weights.release(self.dev.as_ref(), &needs)?;
            if let Some((rows, vocab)) = out {
                logits.resize(wanted.len() * vocab * 4, 0);
                self.dev.download(Stream::Compute, rows.slice(0, logits.len() as u64), logits)?;
            }
        }
        Ok(())
    }

    /// Runs the prompts; logits after the last token of each.
    fn prefill(&mut self, prompts: &[Vec<u32>]) -> Result<Vec<u8>, EngineError> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let (mut some, mut all) = (Vec::new(), Vec::new());
        for first in (0..longest).step_by(self.chunk) {
            let new = self.chunk.min(longest - first);
            let tokens: Vec<u32> = prompts.iter().flat_map(|p| (first..first + new).map(|t| p.get(t).copied().unwrap_or(0))).collect();
            let ends: Vec<usize> = (0..prompts.len()).filter(|b| (first..first + new).contains(&(prompts[*b].len() - 1))).collect();
            let wanted: Vec<u32> = ends.iter().map(|b| (b * new + prompts[*b].len() - 1 - first) as u32).collect();
            self.sweep(&tokens, new, &vec![first; prompts.len()], &wanted, &mut some)?;
            if ends.is_empty() {
                continue;
            }
            let row = some.len() / ends.len();
            all.resize(prompts.len() * row, 0);
            for (from, b) in ends.into_iter().enumerate() {
                all[b * row..(b + 1) * row].copy_from_slice(&some[from * row..(from + 1) * row]);
            }
        }
        Ok(all)
    }

    /// Runs token number `step` after each prompt; logits after it.
    fn decode(&mut self, tokens: &[u32], prompts: &[Vec<u32>], step: usize, logits: &mut Vec<u8>) -> Result<(), EngineError> {
        let past: Vec<usize> = prompts.iter().map(|p| p.len() + step).collect();
        let wanted: Vec<u32> = (0..prompts.len() as u32).collect();
        self.sweep(tokens, 1, &past, &wanted, logits)
    }
}

/// Slots for layers that are streamed: one in use, two on their way.
const SLOTS: usize = 3;

/// Blocks whose weights stay in `room` bytes, the number of slots for the others, and the bytes of both, which are more than `room`
/// where even one block at a time has none. The ends stay before any layer does: they are the largest, and a slot has room for
/// the largest of what is streamed. The first layers stay before the last: while they are at work, the others are on their way.
fn resident(sizes: &[u64], layer: impl Fn(usize) -> bool, room: u64) -> (Vec<bool>, usize, u64) {
    let mut stay = vec![true; sizes.len()];
    let mut bytes: u64 = sizes.iter().sum();
    let mut largest = 0;
    let order = (0..sizes.len()).rev().filter(|b| layer(*b)).chain((0..sizes.len()).rev().filter(|b| !layer(*b)));
    for b in order {
        if bytes + SLOTS as u64 * largest <= room {
            break;
        }
        stay[b] = false;
        bytes -= sizes[b];
        largest = largest.max(sizes[b]);
    }
    let slots = if largest > 0 { SLOTS } else { 0 };
    (stay, slots, bytes + slots as u64 * largest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_ends_stay_and_slots_have_the_size_of_a_layer() {
        let sizes = [800, 100, 100, 100, 100, 100, 100, 1];
        let layer = |b: usize| (1..7).contains(&b);
        assert_eq!(resident(&sizes, layer, 1401), (vec![true; 8], 0, 1401));
        // Three slots take what two layers and a little more left.
        let (stay, slots, bytes) = resident(&sizes, layer, 1301);
        assert_eq!((stay, slots, bytes), (vec![true, true, true, false, false, false, false, true], 3, 1301));
        let (stay, slots, bytes) = resident(&sizes, layer, 1000);
        assert_eq!((stay.iter().filter(|s| **s).count(), slots, bytes), (0, 3, 2400));
    }

    proptest! {
        #[test]
        fn more_room_keeps_more(sizes in proptest::collection::vec(1u64..1000, 3..20), room in 0u64..20_000, more in 0u64..2000) {
            let last = sizes.len() - 1;
            let layer = |b: usize| b > 0 && b < last;
            let (stay, slots, bytes) = resident(&sizes, layer, room);
            let count = stay.iter().filter(|s| **s).count();
            prop_assert!(bytes <= room || count == 0);
            prop_assert_eq!(slots == 0, count == sizes.len());
            prop_assert!(resident(&sizes, layer, room + more).0.iter().filter(|s| **s).count() >= count);
        }
    }
}
