//! What a GPU does with a job's layers: whole visits of one decoder layer and of the head, copies, launches.
//!
//! ```text
//!   cache hit ──────────────────────────────────────────────► rates, `cached`
//!   no hit ─► device free for this process? ─ no ─► none: the plan uses typical figures
//!                        └ yes ─► layers, largest micro-batch first ─► head ─► copies, AdamW ─► cache
//! ```
//! The layer that is timed is the engine's own, on random numbers (zeros draw less power, and are faster). Nothing is
//! allocated beyond what the device's budget says, and everything is given back before the plan is made.

use crate::api::{DeviceSpec, EngineError, GpuRates, LayerTimes, Rates};
use crate::model::{Block, Grads, Keep, LossGrads, MicroBatch, Model, Shape, Tables, Visit, Weights};
use crate::optimizer::{StepScalars, factors, optimizer_threads, sum_of_squares};
use crate::session::rope_table;
use ramtorch_cpu::{read_gradients, update_pages};
use ramtorch_device::{AttentionShape, DevBuf, Device, Dtype, Gemm, Stream, TokenIndex};
use ramtorch_job::OptimizerSpec;
use ramtorch_store::{GradientFormat, MomentFormat, SharedOwner, Store, StoreSpec};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What rates depend on, besides the machine.
pub(super) struct Question<'a> {
    pub device: &'a DeviceSpec,
    pub model: &'a Model,
    pub seq: usize,
    /// Sequences of the largest micro-batch.
    pub sequences: usize,
    /// Those of all that a plan may have, largest first: how much memory attention wants for them does not follow from one another.
    pub batches: Vec<usize>,
    /// Rows of a chunk of the head, at most.
    pub head_rows: usize,
    pub deterministic: bool,
    pub moments: MomentFormat,
}

/// No third size of micro-batch is begun after this.
const LIMIT: Duration = Duration::from_secs(5);
/// Sizes of micro-batches whose memory is asked for; it takes a while.
const ASKED: usize = 24;
/// Tokens of the smallest micro-batch that is timed, where sequences are shorter.
const FEW_ROWS: usize = 1024;
/// Parameters of the store that copies and AdamW are timed with.
const PARAMETERS: u64 = 16 << 20;
/// Part of a device's budget that the measurement may take.
const SHARE: u64 = 2;
/// Part of every key in the cache: a new one whenever what is measured changes.
const VERSION: u32 = 4;

/// How long visits are repeated: so long that the GPU's limit of power shows, and as long whatever their size. A few small ones run at
/// a clock that nothing sustains, and a plan made from that prefers them.
const FORWARD: Duration = Duration::from_millis(280);
const BACKWARD: Duration = Duration::from_millis(200);
const SHORT: Duration = Duration::from_millis(60);
/// Calls, at most.
const CALLS: f64 = 400.0;

/// Seconds of one call of `f`, on average over about `time`, after two that are not counted.
fn timed_over(dev: &dyn Device, time: Duration, mut f: impl FnMut() -> Result<(), EngineError>) -> Result<f64, EngineError> {
    let once = timed(dev, 1, &mut f)?;
    timed(dev, (time.as_secs_f64() / once).clamp(2.0, CALLS) as u32, f)
}

/// Seconds of one of `count` calls of `f`, after one that is not counted.
fn timed(dev: &dyn Device, count: u32, mut f: impl FnMut() -> Result<(), EngineError>) -> Result<f64, EngineError> {
    f()?;
    dev.synchronize(Stream::Compute)?;
    let begin = Instant::now();
    for _ in 0..count {
        f()?;
    }
    dev.synchronize(Stream::Compute)?;
    // Never zero: rates are divided by it, and have to be finite to be told.
    Ok((begin.elapsed().as_secs_f64() / f64::from(count)).max(1e-9))
}

/// Fills `buf` with uniform random numbers between -`size` and `size`.
pub(super) fn randomise(dev: &dyn Device, buf: DevBuf, dtype: Dtype, size: f32) -> Result<(), EngineError> {
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((seed >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * size
    };
    let first = buf.bytes.min(4 << 20);
    let data: Vec<u8> = match dtype {
        Dtype::F32 => (0..first / 4).flat_map(|_| next().to_le_bytes()).collect(),
        Dtype::Bf16 => (0..first / 2).flat_map(|_| half::bf16::from_f32(next()).to_le_bytes()).collect(),
    };
    dev.upload(Stream::Compute, buf.slice(0, data.len() as u64), &data)?;
    let mut done = data.len() as u64;
    while done > 0 && done < buf.bytes {
        let n = done.min(buf.bytes - done);
        dev.copy(Stream::Compute, buf.slice(done, n), buf.slice(0, n))?;
        done += n;
    }
    Ok(())
}

/// Sizes of micro-batches to time: the largest, few rows, and a quarter of the largest where there is time. Without the ends, the
/// plan would have to guess what many small micro-batches cost, and did so too well.
fn sizes(largest: usize, few: usize) -> Vec<usize> {
    let mut list = vec![largest];
    for size in [few, largest / 4] {
        if size >= few && !list.contains(&size) {
            list.push(size);
        }
    }
    list
}

/// Device memory that timing `sequences` takes.
fn needs(dev: &dyn Device, q: &Question, layer: usize, sequences: usize) -> Result<u64, EngineError> {
    let shape = Shape { sequences, seq: q.seq, head_rows: q.head_rows.min(sequences * q.seq) };
    let ask = |s: &AttentionShape| dev.attention_workspace(s);
    let (m, dt) = (q.model, q.model.dtype.size());
    let last = m.places.len() - 1;
    let table = m.forward_needs(last).iter().map(|b| m.places[*b].1).max().unwrap_or(0);
    let most = m.places[layer].1.max(table);
    let rows = (shape.rows() * m.width(layer)) as u64;
    Ok(most * (dt + 4) + m.scratch_bytes(shape, &ask)? + m.saved_bytes(layer, shape, Keep::All) + 3 * rows * dt + (64 << 20))
}

/// Times visits on `dev`. `rates` has what came out even where this ends early.
pub(super) fn visits(dev: &mut dyn Device, q: &Question, rates: &mut GpuRates) -> Result<(), EngineError> {
    let begin = Instant::now();
    let m = q.model;
    let Some(layer) = (0..m.len()).find(|b| matches!(m.blocks[*b], Block::Layer(_))) else { return Ok(()) };
    let (last, dt) = (m.len() - 1, m.dtype);
    let few = FEW_ROWS.div_ceil(q.seq.max(1)).clamp(1, q.sequences);
    let mut largest = q.sequences;
    while largest > few && needs(dev, q, layer, largest)? > q.device.memory_bytes / SHARE {
        largest = (largest / 4).max(few);
    }
    let list = sizes(largest, few);
    let shape = Shape { sequences: list[0], seq: q.seq, head_rows: q.head_rows.min(list[0] * q.seq) };
    let needed = {
        let ask = |s: &AttentionShape| {
            list.iter().map(|n| dev.attention_workspace(&AttentionShape { batch: *n, ..*s })).try_fold(0, |a, b| b.map(|b| a.max(b)))
        };
        m.scratch_bytes(shape, &ask)?
    };
    let table = m.forward_needs(last).iter().map(|b| m.places[*b].1).max().unwrap_or(0);
    let most = m.places[layer].1.max(table);
    let rows = shape.rows();
    let mut alloc = |bytes: u64| dev.alloc(bytes, "measurement");
    let (weights, gradients) = (alloc(most * dt.size())?, alloc(most * 4)?);
    let (scratch, saved) = (alloc(needed)?, alloc(m.saved_bytes(layer, shape, Keep::All))?);
    let state = (rows * m.width(layer)) as u64 * dt.size();
    let (x, y, d) = (alloc(state)?, alloc(state)?, alloc(state)?);
    let row = rows as u64 * 4;
    let (targets, ones, losses) = (alloc(row)?, alloc(row)?, alloc(row)?);
    let tables = Tables { rope: rope_table(dev, &m.architecture, q.seq)? };
    let dev = &*dev;
    randomise(dev, weights, dt, 0.03)?;
    randomise(dev, x, dt, 1.0)?;
    dev.upload(Stream::Compute, ones, &1f32.to_le_bytes().repeat(rows))?;
    let w = |b: usize| Weights { buf: weights.slice(0, m.places[b].1 * dt.size()), dtype: dt };
    let g = |b: usize| Grads { buf: gradients.slice(0, m.places[b].1 * 4) };
    for (i, sequences) in list.iter().copied().enumerate() {
        if i > 1 && begin.elapsed() > LIMIT {
            break;
        }
        let r = sequences * q.seq;
        let tokens = TokenIndex { rows: r, ids: targets, order: targets, bounds: targets, unique: 0 };
        let mb = MicroBatch { sequences, seq: q.seq, tokens, input: x, targets, weights: ones, losses, starts: None };
        let s = Shape { sequences, ..shape };
        let v = Visit { dev, shape: s, tables, mb: &mb, scratch };
        let forward = timed_over(dev, FORWARD, || m.forward(layer, &v, w(layer), x, saved, Keep::All, y))?;
        let backward = |keep: Keep| {
            randomise(dev, d, dt, 1e-3)?;
            timed_over(dev, BACKWARD, || m.backward(layer, &v, Some(w(layer)), x, saved, keep, d, g(layer)))
        };
        let whole = backward(Keep::All)?;
        let recompute = timed_over(dev, SHORT, || m.recompute(layer, &v, w(layer), x, saved))?;
        // What is kept lies elsewhere then: the forward visit writes it there.
        m.forward(layer, &v, w(layer), x, saved, Keep::Products, y)?;
        let rebuilt = backward(Keep::Products)?;
        let at = rates.layers.partition_point(|l| l.rows < r);
        rates.layers.insert(at, LayerTimes { rows: r, forward, backward: whole, rebuild: (rebuilt - whole).max(0.0), recompute });
        if let Block::Layer(l) = &m.blocks[layer] {
            rates.products.insert(at, products(dev, l.widest(), r, dt, x, weights, gradients, scratch)?);
            if i == 0 {
                rates.attention = attention(dev, &l.attention_shape(s), saved, scratch)?;
            }
        }
    }
    // Otherwise `free_order` asks.
    if let (Block::Layer(l), true) = (&m.blocks[layer], q.deterministic) {
        let ask = |n: &usize| dev.attention_workspace(&l.attention_shape(Shape { sequences: *n, ..shape })).map(|bytes| (*n, bytes));
        rates.workspace = q.batches.iter().take(ASKED).map(ask).collect::<Result<_, _>>()?;
    }
    // The head, one chunk of it.
    let r = shape.head_rows.min(rows);
    let sequences = r.div_ceil(q.seq).max(1);
    let tokens = TokenIndex { rows: r, ids: targets, order: targets, bounds: targets, unique: 0 };
    // Rows need not be whole sequences here: the head knows none.
    let mb = MicroBatch { sequences: r, seq: 1, tokens, input: x, targets, weights: ones, losses, starts: None };
    let v = Visit { dev, shape: Shape { sequences, seq: q.seq, head_rows: r }, tables, mb: &mb, scratch };
    let needs = m.forward_needs(last);
    let held: Vec<Weights> = needs.iter().map(|b| w(*b)).collect();
    let train = LossGrads { scale: 1e-4, d, grads: g(last), tied: needs.get(1).map(|b| g(*b)) };
    rates.head = (r, timed_over(dev, SHORT, || m.loss(&v, &held, x, Some(&train)))?);
    // Elementwise passes and launches.
    let count = (x.bytes / dt.size()) as usize;
    rates.memory_bytes = 3.0 * x.bytes as f64 / timed(dev, 10, || dev.add(x, y, count))?;
    rates.launch_seconds = timed(dev, 200, || dev.add(x, y, 1))?;
    Ok(())
}

fn products(
    dev: &dyn Device,
    (n, k): (usize, usize),
    rows: usize,
    dtype: Dtype,
    x: DevBuf,
    weights: DevBuf,
    gradients: DevBuf,
    scratch: DevBuf,
) -> Result<[f64; 4], EngineError> {
    let wide = scratch.slice(0, (rows * n) as u64 * dtype.size());
    let base = Gemm {
        m: rows,
        n,
        k,
        transpose_a: false,
        transpose_b: true,
        a: x,
        b: weights,
        d: wide,
        d_dtype: dtype,
        accumulate: false,
        add: None,
        bias: None,
    };
    let back = Gemm { n: k, k: n, transpose_b: false, a: wide, d: x, ..base };
    let sum = Gemm {
        m: n,
        n: k,
        k: rows,
        transpose_a: true,
        transpose_b: false,
        a: wide,
        b: x,
        d: gradients,
        d_dtype: Dtype::F32,
        accumulate: true,
        ..base
    };
    let flops = 2.0 * (rows * n) as f64 * k as f64;
    let rate = |g: &Gemm| timed_over(dev, SHORT, || dev.gemm(g)).map(|s| flops / s);
    let rates = [rows as f64, rate(&base)?, rate(&sum)?, rate(&back)?];
    // The input was written over.
    randomise(dev, x, dtype, 1.0)?;
    Ok([rates[0], rates[1], rates[3], rates[2]])
}

/// Operations a second of attention's passes over what a forward visit left in `saved`.
fn attention(dev: &dyn Device, s: &AttentionShape, saved: DevBuf, scratch: DevBuf) -> Result<[f64; 2], EngineError> {
    let (rows, size) = (s.rows() as u64, dev.dtype().size());
    let (packed, plain, sums) = (rows * s.row() as u64 * size, rows * (s.heads * s.head_dim) as u64 * size, rows * s.heads as u64 * 4);
    let at = |n: u64| n.next_multiple_of(256);
    if saved.bytes < at(packed) + at(plain) + sums || scratch.bytes < at(packed) + at(plain) {
        return Ok([0.0; 2]);
    }
    let (qkv, out, lse) = (saved.slice(0, packed), saved.slice(at(packed), plain), saved.slice(at(packed) + at(plain), sums));
    let (dqkv, dout) = (scratch.slice(0, packed), scratch.slice(at(packed), plain));
    let workspace = scratch.slice(at(packed) + at(plain), scratch.bytes - at(packed) - at(plain));
    randomise(dev, qkv, dev.dtype(), 1.0)?;
    randomise(dev, dout, dev.dtype(), 1e-3)?;
    let flops = 2.0 * rows as f64 * s.window.unwrap_or(s.seq) as f64 * (s.heads * s.head_dim) as f64;
    let forward = timed_over(dev, SHORT, || dev.attention_forward(s, qkv, out, lse))?;
    let enough = dev.attention_workspace(s)? <= workspace.bytes;
    let backward =
        if enough { timed_over(dev, SHORT, || dev.attention_backward(s, dout, qkv, out, lse, dqkv, workspace))? } else { f64::INFINITY };
    Ok([flops / forward, 2.5 * flops / backward])
}

/// Copies between page-locked pages and `dev`: in, out, both at once, bytes a second.
fn copies(dev: &mut dyn Device, store: &Arc<Store>, rates: &mut GpuRates) -> Result<(), EngineError> {
    dev.register_store(store)?;
    let (weights, gradients) = (dev.alloc(PARAMETERS * dev.dtype().size(), "copies in")?, dev.alloc(PARAMETERS * 4, "copies out")?);
    let dev = &*dev;
    let layout = store.layout();
    let all_in = || -> Result<(), EngineError> {
        for page in 0..layout.page_count() {
            let r = layout.page_range(page);
            let size = dev.dtype().size();
            let dst = weights.slice(r.start * size, (r.end - r.start) * size);
            dev.load_parameters(Stream::CopyIn, dst, store, store.entry(page).physical, 0, r.end - r.start)?;
        }
        Ok(())
    };
    let all_out = || dev.store_gradients(Stream::CopyOut, gradients, store, 0, PARAMETERS, false);
    let (bytes_in, bytes_out) = (PARAMETERS * dev.dtype().size(), PARAMETERS * store.layout().spec().gradients.bytes());
    const ROUNDS: u64 = 8;
    let round = |into: bool, out: bool| -> Result<[f64; 2], EngineError> {
        let begin = Instant::now();
        for _ in 0..ROUNDS {
            if into {
                all_in()?;
            }
            if out {
                all_out()?;
            }
        }
        dev.synchronize(Stream::CopyIn)?;
        let first = begin.elapsed().as_secs_f64();
        dev.synchronize(Stream::CopyOut)?;
        let second = begin.elapsed().as_secs_f64();
        Ok([(ROUNDS * bytes_in) as f64 / first, (ROUNDS * bytes_out) as f64 / second])
    };
    round(true, true)?;
    rates.to_device = round(true, false)?[0];
    rates.from_device = round(false, true)?[1];
    rates.both = round(true, true)?;
    Ok(())
}

/// AdamW and the norm of gradients on the processor: parameters a second.
fn processor(store: &Store, threads: usize) -> Option<[f64; 2]> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build().ok()?;
    let optimizer = OptimizerSpec::default();
    let mut owner = store.claim(0).ok()?;
    let pages: Vec<u32> = owner.pages().collect();
    for page in &pages {
        owner.initialise(*page, 0, |p| p.hi.iter_mut().for_each(|x| *x = 0x3c00)).ok()?;
    }
    let owner = SharedOwner::new(owner);
    // The best of some rounds: the first touches pages, and a machine that has just come up has other things to do.
    const ROUNDS: u64 = 6;
    let mut adamw = 0f64;
    for step in 1..=ROUNDS {
        let begin = Instant::now();
        let k = factors(&optimizer, &StepScalars { step, lr: 1e-5, gradient_scale: 1.0 });
        pool.install(|| update_pages(&owner, &k, None)).ok()?;
        adamw = adamw.max(PARAMETERS as f64 / begin.elapsed().as_secs_f64());
    }
    let squares = || pool.install(|| pages.iter().map(|p| read_gradients(store, *p, 0, sum_of_squares)).sum::<f64>());
    let mut norm = 0f64;
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        std::hint::black_box(squares());
        norm = norm.max(PARAMETERS as f64 / begin.elapsed().as_secs_f64());
    }
    Some([adamw, norm])
}

/// What an entry of the cache holds, and for what.
#[derive(serde::Serialize, serde::Deserialize)]
struct Entry {
    key: String,
    rates: Rates,
}

/// Name of the entry for `key`: FNV-1a, the same in every build.
fn entry_path(folder: &Path, key: &str) -> PathBuf {
    let hash = key.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    folder.join("rates").join(format!("{hash:016x}.json"))
}

pub(super) fn cached(folder: &Path, key: &str) -> Option<Rates> {
    let text = std::fs::read(entry_path(folder, key)).ok()?;
    let mut entry: Entry = serde_json::from_slice(&text).ok()?;
    entry.rates.gpu.as_mut()?.cached = true;
    (entry.key == key).then_some(entry.rates)
}

/// Best effort: without it the next job measures again.
pub(super) fn remember(folder: &Path, key: &str, rates: &Rates) {
    let path = entry_path(folder, key);
    let entry = Entry { key: key.to_string(), rates: rates.clone() };
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder.join("rates"))?;
        let aside = path.with_extension(format!("{}.new", std::process::id()));
        std::fs::write(&aside, serde_json::to_vec(&entry)?)?;
        std::fs::rename(&aside, &path)
    };
    if let Err(e) = write() {
        tracing::debug!("{}: the node's rates are not kept: {e}", path.display());
    }
}

/// The GPU's rates into `rates`: from the cache, or taken now if the device is free for this process (it has a budget).
pub(super) fn measure(q: &Question, cache: &Path, rates: &mut Rates) -> Result<(), EngineError> {
    let known = ramtorch_cuda::available()?;
    let Some(info) = known.iter().find(|g| g.ordinal == q.device.index) else { return Ok(()) };
    let config = q.model.architecture.transformer().map(|c| {
        (c.hidden_size, c.intermediate_size, c.heads, c.kv_heads, c.head_dim, c.vocab_size, c.qk_norm, c.attention_bias, c.tie_embeddings)
    });
    let key = format!(
        "{VERSION} {} {} driver {} {:?} deterministic {} {config:?} {:?} x {} head {} threads {} {:?}",
        env!("CARGO_PKG_VERSION"),
        info.name,
        info.driver_version,
        q.model.dtype,
        q.deterministic,
        q.batches,
        q.seq,
        q.head_rows,
        q.device.threads,
        q.moments
    );
    if let Some(found) = cached(cache, &key) {
        *rates = Rates { gemm_flops: rates.gemm_flops, copy_bytes: rates.copy_bytes, ..found };
        return Ok(());
    }
    if q.device.memory_bytes == 0 {
        return Ok(()); // another job's: its memory is not touched
    }
    let budget = q.device.memory_bytes / SHARE;
    let mut gpu = GpuRates { name: info.name.clone(), ..Default::default() };
    let mut took = || -> Result<(), EngineError> {
        // A search for algorithms would take longer than all the rest, and gains little.
        let mut dev = ramtorch_cuda::CudaDevice::open(q.device.index, q.model.dtype, budget, true)?;
        visits(&mut dev, q, &mut gpu)?;
        drop(dev);
        if !q.deterministic {
            free_order(q, budget, &mut gpu)?;
        }
        let mut dev = ramtorch_cuda::CudaDevice::open(q.device.index, q.model.dtype, PARAMETERS * 8 + 4096, true)?;
        let store = super::temporary(&StoreSpec {
            moments: q.moments,
            gradients: GradientFormat::Bf16,
            page_parameters: Some((PARAMETERS / 4) as u32),
            ..super::one_block(PARAMETERS)
        })?;
        if let Some([adamw, norm]) = processor(&store, optimizer_threads(q.device.kind, q.device.threads)) {
            (rates.optimizer_parameters, rates.norm_parameters) = (adamw, norm);
        }
        copies(&mut dev, &store, &mut gpu)
    };
    if let Err(e) = took() {
        tracing::warn!("cuda:{}: part of its rates could not be measured: {e}", q.device.index);
        if gpu.layers.is_empty() {
            return Err(e);
        }
        rates.gpu = Some(gpu);
        return Ok(()); // good for this plan, not for the next job's
    }
    rates.gpu = Some(gpu);
    remember(cache, &key, rates);
    Ok(())
}

/// Where the order of additions is free, attention's backward pass is faster, and wants other memory: corrects the layers' times.
fn free_order(q: &Question, budget: u64, gpu: &mut GpuRates) -> Result<(), EngineError> {
    let (m, dt) = (q.model, q.model.dtype);
    let Some(Block::Layer(l)) = m.blocks.iter().find(|b| matches!(b, Block::Layer(_))) else { return Ok(()) };
    let Some(largest) = gpu.layers.last().copied().filter(|_| gpu.attention[1] > 0.0) else { return Ok(()) };
    let sequences = largest.rows / q.seq.max(1);
    let s = l.attention_shape(Shape { sequences, seq: q.seq, head_rows: 64 });
    let mut dev = ramtorch_cuda::CudaDevice::open(q.device.index, dt, budget, false)?;
    let (packed, plain) = ((s.rows() * s.row()) as u64 * dt.size(), (s.rows() * s.heads * s.head_dim) as u64 * dt.size());
    let saved = dev.alloc(packed + plain + (s.rows() * s.heads) as u64 * 4 + 4096, "measurement")?;
    let workspace = dev.attention_workspace(&s)?;
    let scratch = dev.alloc(packed + plain + workspace + 4096, "measurement")?;
    for sequences in q.batches.iter().copied().take(ASKED) {
        gpu.workspace.push((sequences, dev.attention_workspace(&AttentionShape { batch: sequences, ..s })?));
    }
    let now = attention(&dev, &s, saved, scratch)?;
    if now[1] > 0.0 {
        let flops = 5.0 * s.window.unwrap_or(s.seq) as f64 * (s.heads * s.head_dim) as f64;
        let less = flops / gpu.attention[1] - flops / now[1]; // seconds a row
        gpu.layers.iter_mut().for_each(|x| x.backward = (x.backward - less * x.rows as f64).max(0.5 * x.backward));
        gpu.attention = now;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::DeviceKind;
    use ramtorch_cpu::CpuDevice;
    use ramtorch_modelio::Architecture;
    use ramtorch_store::{GradientLog, Layout};

    fn model(tied: bool) -> Model {
        let text = format!(
            r#"{{"model_type":"qwen2","vocab_size":211,"hidden_size":48,"intermediate_size":80,"num_hidden_layers":2,
            "num_attention_heads":4,"num_key_value_heads":2,"max_position_embeddings":64,"rms_norm_eps":1e-5,
            "tie_word_embeddings":{tied},"hidden_act":"silu"}}"#
        );
        let config = ramtorch_modelio::parse_config(text.as_bytes(), Path::new("config.json")).unwrap().config;
        let a = Architecture::Transformer(config);
        let spec = StoreSpec {
            blocks: a.blocks(),
            world_size: 1,
            moments: MomentFormat::F32,
            gradients: GradientFormat::F32,
            page_parameters: None,
            spare_pages_per_rank: 1,
            exchange_bytes: 0,
            log: GradientLog::NONE,
            metadata: String::new(),
        };
        Model::new(&a, &Layout::new(&spec).unwrap(), Dtype::F32).unwrap()
    }

    #[test]
    fn visits_are_timed_at_every_size_and_cached_rates_come_back() {
        for tied in [false, true] {
            let model = model(tied);
            let device = DeviceSpec { kind: DeviceKind::Cpu, index: 0, threads: 1, memory_bytes: 1 << 30, bus_id: None };
            let q = Question {
                device: &device,
                model: &model,
                seq: 512,
                sequences: 8,
                batches: vec![8, 6, 4],
                head_rows: 100,
                deterministic: true,
                moments: MomentFormat::F32,
            };
            let mut dev = CpuDevice::open(0, Dtype::F32, 1, 512 << 20).unwrap();
            let mut gpu = GpuRates::default();
            visits(&mut dev, &q, &mut gpu).unwrap();
            assert!(!gpu.layers.is_empty() && gpu.layers.is_sorted_by_key(|l| l.rows), "{gpu:?}");
            assert_eq!(gpu.layers.last().unwrap().rows, 4096);
            assert_eq!(gpu.workspace.iter().map(|w| w.0).collect::<Vec<_>>(), [8, 6, 4]);
            for l in &gpu.layers {
                assert!(l.forward > 0.0 && l.backward > 0.0 && l.recompute > 0.0 && l.rebuild >= 0.0, "{l:?}");
            }
            assert_eq!((gpu.head.0, gpu.head.1 > 0.0), (100, true));
            assert!(gpu.attention.iter().all(|x| *x > 0.0) && gpu.memory_bytes > 0.0 && gpu.launch_seconds > 0.0);
            assert!(gpu.products.iter().flatten().all(|x| *x > 0.0 && x.is_finite()));

            let folder = tempfile::tempdir().unwrap();
            let rates = Rates { gpu: Some(gpu), optimizer_parameters: 5.0, ..Default::default() };
            assert_eq!(cached(folder.path(), "a"), None);
            remember(folder.path(), "a", &rates);
            let back = cached(folder.path(), "a").unwrap();
            assert!(back.gpu.as_ref().unwrap().cached && back.optimizer_parameters == 5.0);
            assert_eq!(cached(folder.path(), "b"), None);
        }
    }
}
