//! Attention: cuDNN where it takes the problem, this crate's kernels where not.
//!
//! cuDNN: bfloat16, head sizes that are multiples of 8; windows and packed documents become a tensor of first keys.
//! Everything else (single precision, odd heads, caches) runs on the tiled kernels of attention.cu. Both are
//! deterministic; cuDNN's backward pass only in deterministic mode, where its workspace grows with the square of the
//! sequence: then sequences are taken a few at a time.

use crate::GpuInfo;
use crate::cudnn::{self, Handle, Plan, Problem, Target, io};
use crate::device::{CudaDevice, PARTIALS_BYTES};
use crate::driver::{Function, RawStream, cu};
use crate::kernels::{self, Kernels, Launch, launch};
use crate::ops::{address, check, int};
use ramtorch_device::{AttentionShape, CachedAttentionShape, DevBuf, Dtype, EngineError, Stream};
use std::collections::HashMap;

/// Queries and keys of a tile of the kernels, and bytes of their shared memory.
const TILE: usize = 64;
const CHUNK_BYTES: u32 = 64 * 33 * 4;
const SCORES_BYTES: u32 = 64 * 65 * 4;
/// `SPLIT` of attention.cu: keys of a block that works for single queries.
const SPLIT: usize = 128;
/// New tokens from which the tiled kernel beats the one for single queries.
const TILED_FROM: usize = 8;
/// Workspace of a deterministic backward pass above which fewer sequences are taken at a time.
const DETERMINISTIC_BYTES: u64 = 1 << 30;

/// `Attention` of attention.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Parameters {
    q: u64,
    k: u64,
    v: u64,
    q_row: u64,
    q_sequence: u64,
    k_row: u64,
    k_sequence: u64,
    seq: i32,
    heads: i32,
    kv_heads: i32,
    head_dim: i32,
    scale: f32,
    window: i32,
    starts: u64,
    past: u64,
}

/// `Gradients` of attention.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gradients {
    dout: u64,
    lse: u64,
    delta: u64,
    dq: u64,
    dk: u64,
    dv: u64,
}

/// cuDNN's plans for one shape, and how many sequences they take at a time.
struct Pair {
    forward: Plan,
    backward: Plan,
    backward_batch: usize,
    /// Of what is left when the batch is no multiple.
    backward_rest: Option<Plan>,
}

/// Plans and kernels met so far.
pub(crate) struct Attention {
    deterministic: bool,
    capability: (i32, i32),
    dtype: Dtype,
    /// `None`: cuDNN refused the shape. Before the handle they were made with, so that they go first.
    plans: HashMap<Problem, Option<Pair>>,
    kernels: HashMap<u32, Kernels>,
    handle: Option<Handle>,
}

impl Attention {
    pub(crate) fn new(info: &GpuInfo, dtype: Dtype, deterministic: bool, stream: &RawStream) -> Result<Attention, EngineError> {
        let handle = if info.cudnn && dtype == Dtype::Bf16 { Some(Handle::new(stream)?) } else { None };
        Ok(Attention { handle, deterministic, capability: info.compute_capability, dtype, plans: HashMap::new(), kernels: HashMap::new() })
    }

    fn function(&mut self, head_dim: usize, name: &str) -> Result<Function, EngineError> {
        let chunks = kernels::attention_chunks(head_dim)?;
        if !self.kernels.contains_key(&chunks) {
            let loaded = Kernels::load_attention(self.capability, self.dtype, chunks)?;
            for name in ["attention_forward", "attention_backward_keys", "attention_backward_queries"] {
                loaded.get(name)?.allow_shared(2 * CHUNK_BYTES + 2 * SCORES_BYTES)?;
            }
            self.kernels.insert(chunks, loaded);
        }
        match self.kernels.get(&chunks) {
            Some(k) => k.get(name),
            None => Err(EngineError::internal("attention kernels")),
        }
    }

    /// cuDNN's plans for `s`, if it takes the shape.
    fn plans(&mut self, s: &AttentionShape, workspace: u64) -> Option<(&Handle, &Pair)> {
        let handle = self.handle.as_ref().filter(|_| s.head_dim.is_multiple_of(8) && s.head_dim <= 256 && s.seq > 1)?;
        let problem = Problem::new(s, s.batch, masked(s));
        if !self.plans.contains_key(&problem) {
            let made = make_plans(handle, s, self.deterministic, workspace);
            if let Err(e) = &made {
                tracing::warn!("cuDNN refuses attention of {problem:?}, using slower kernels: {e}");
            }
            self.plans.insert(problem, made.ok());
        }
        self.plans.get(&problem)?.as_ref().map(|p| (handle, p))
    }
}

/// Whether queries see less than everything before them.
fn masked(s: &AttentionShape) -> bool {
    s.window.is_some_and(|w| w < s.seq) || s.starts.is_some()
}

/// Bytes of the tensor of first keys.
fn first_bytes(s: &AttentionShape) -> u64 {
    if masked(s) { (s.rows() as u64 * 4).next_multiple_of(256) } else { 0 }
}

/// Where no key is seen yet, a tile of scores can be masked from end to end: with minus infinity its maximum would be
/// that, and differences from it not numbers. What is seen later removes a large finite value as well.
fn nothing(s: &AttentionShape) -> f32 {
    if masked(s) { -1e30 } else { f32::NEG_INFINITY }
}

/// Writes the tensor of first keys to `at`.
fn first_keys(d: &CudaDevice, s: &AttentionShape, at: u64) -> Result<(), EngineError> {
    let (starts, window, rows, seq) = (address(s.starts), int(s.window.filter(|w| *w < s.seq).unwrap_or(0))?, s.rows() as u64, int(s.seq)?);
    let l = Launch::new((s.rows().div_ceil(256) as u32, 1, 1), (256, 1));
    launch!(d.kernels.get("first_keys")?, l, d.stream(Stream::Compute), "first_keys"; starts, window, rows, seq, at)
}

fn make_plans(handle: &Handle, s: &AttentionShape, deterministic: bool, workspace: u64) -> Result<Pair, EngineError> {
    let target = Target::Live(handle);
    let problem = |batch| Problem::new(s, batch, masked(s));
    let forward = cudnn::forward(&target, &problem(s.batch))?;
    if forward.workspace.next_multiple_of(256) + first_bytes(s) > workspace {
        return Err(EngineError::internal(format!("forward pass wants {} bytes of workspace", forward.workspace)));
    }
    let mut batch = s.batch;
    let mut backward = cudnn::backward(&target, &problem(batch), deterministic)?;
    // Tensors of later parts must begin at multiples of 16 bytes.
    if deterministic && backward.workspace > DETERMINISTIC_BYTES && s.seq.is_multiple_of(4) {
        let parts = (backward.workspace.div_ceil(DETERMINISTIC_BYTES) as usize).min(s.batch);
        batch = s.batch.div_ceil(parts);
        backward = cudnn::backward(&target, &problem(batch), deterministic)?;
    }
    let rest = s.batch % batch;
    let backward_rest = if rest > 0 { Some(cudnn::backward(&target, &problem(rest), deterministic)?) } else { None };
    Ok(Pair { forward, backward, backward_batch: batch, backward_rest })
}

/// Parts of the backward pass's workspace: cuDNN's own, first keys, row sums, sums of the queries' gradients.
struct Workspace {
    own: u64,
    first: u64,
    delta: u64,
    dq_sum: u64,
}

impl Workspace {
    fn of(s: &AttentionShape, p: &Pair, deterministic: bool) -> Workspace {
        let own = p.backward.workspace.max(p.backward_rest.as_ref().map_or(0, |r| r.workspace));
        let delta = (p.backward_batch * s.heads * s.seq) as u64 * 4;
        let dq_sum = if deterministic { 0 } else { delta * s.head_dim as u64 };
        Workspace { own: own.next_multiple_of(256), first: first_bytes(s), delta: delta.next_multiple_of(256), dq_sum }
    }
    fn total(&self) -> u64 {
        self.own + self.first + self.delta + self.dq_sum
    }
}

fn delta_bytes(s: &AttentionShape) -> u64 {
    (s.batch * s.heads * s.seq) as u64 * 4
}

pub(crate) fn workspace(d: &CudaDevice, s: &AttentionShape) -> Result<u64, EngineError> {
    let mut a = d.attention.borrow_mut();
    if let Some((_, pair)) = a.plans(s, d.workspace.bytes) {
        return Ok(Workspace::of(s, pair, d.deterministic).total());
    }
    a.function(s.head_dim, "attention_forward")?; // compiled now and not in the first step
    Ok(delta_bytes(s))
}

fn validate(d: &CudaDevice, s: &AttentionShape, qkv: DevBuf, out: DevBuf, lse: DevBuf) -> Result<(), EngineError> {
    if s.kv_heads == 0 || !s.heads.is_multiple_of(s.kv_heads) || s.head_dim == 0 {
        return Err(EngineError::internal(format!("{} query heads, {} key heads of {} elements", s.heads, s.kv_heads, s.head_dim)));
    }
    let size = d.dtype.size();
    check(&[(qkv, s.rows() * s.row(), size), (out, s.rows() * s.heads * s.head_dim, size), (lse, s.batch * s.heads * s.seq, 4)])?;
    if let Some(starts) = s.starts {
        check(&[(starts, s.rows(), 4)])?;
    }
    Ok(())
}

/// Addresses of queries, keys and values in packed rows.
fn slices(s: &AttentionShape, packed: u64, size: u64) -> (u64, u64, u64) {
    let k = packed + (s.heads * s.head_dim) as u64 * size;
    (packed, k, k + (s.kv_heads * s.head_dim) as u64 * size)
}

fn parameters(s: &AttentionShape, qkv: DevBuf, size: u64) -> Result<Parameters, EngineError> {
    let (q, k, v) = slices(s, qkv.ptr, size);
    let (row, sequence) = (s.row() as u64, (s.seq * s.row()) as u64);
    Ok(Parameters {
        q,
        k,
        v,
        q_row: row,
        q_sequence: sequence,
        k_row: row,
        k_sequence: sequence,
        seq: int(s.seq)?,
        heads: int(s.heads)?,
        kv_heads: int(s.kv_heads)?,
        head_dim: int(s.head_dim)?,
        scale: s.scale,
        window: int(s.window.filter(|w| *w < s.seq).unwrap_or(0))?,
        starts: address(s.starts),
        past: 0,
    })
}

fn host(x: &f32) -> u64 {
    std::ptr::from_ref(x) as u64
}

pub(crate) fn forward(d: &CudaDevice, s: &AttentionShape, qkv: DevBuf, out: DevBuf, lse: DevBuf) -> Result<(), EngineError> {
    if s.rows() == 0 {
        return Ok(());
    }
    validate(d, s, qkv, out, lse)?;
    let mut a = d.attention.borrow_mut();
    let aligned = [qkv, out, lse].iter().all(|b| b.ptr.is_multiple_of(16));
    if let Some((handle, pair)) = a.plans(s, d.workspace.bytes).filter(|_| aligned) {
        let (q, k, v) = slices(s, qkv.ptr, d.dtype.size());
        let nothing = nothing(s);
        let mut tensors = vec![
            (io::Q, q),
            (io::K, k),
            (io::V, v),
            (io::OUT, out.ptr),
            (io::STATISTICS, lse.ptr),
            (io::SCALE, host(&s.scale)),
            (io::MASKED, host(&nothing)),
        ];
        if masked(s) {
            let first = d.workspace.ptr + pair.forward.workspace.next_multiple_of(256);
            first_keys(d, s, first)?;
            tensors.push((io::FIRST, first));
        }
        return pair.forward.run(handle, &tensors, d.workspace.ptr);
    }
    let f = a.function(s.head_dim, "attention_forward")?;
    let (p, out, lse) = (parameters(s, qkv, d.dtype.size())?, out.ptr, lse.ptr);
    let grid = (s.seq.div_ceil(TILE) as u32, s.heads as u32, s.batch as u32);
    let l = Launch { grid, block: (256, 1), shared: 2 * CHUNK_BYTES + SCORES_BYTES };
    launch!(f, l, d.stream(Stream::Compute), "attention_forward"; p, out, lse)
}

/// Buffers of [`ramtorch_device::Device::attention_backward`].
pub(crate) struct Backward {
    pub(crate) dout: DevBuf,
    pub(crate) qkv: DevBuf,
    pub(crate) out: DevBuf,
    pub(crate) lse: DevBuf,
    pub(crate) dqkv: DevBuf,
    pub(crate) workspace: DevBuf,
}

pub(crate) fn backward(d: &CudaDevice, s: &AttentionShape, b: &Backward) -> Result<(), EngineError> {
    if s.rows() == 0 {
        return Ok(());
    }
    validate(d, s, b.qkv, b.out, b.lse)?;
    validate(d, s, b.dqkv, b.dout, b.lse)?;
    let mut a = d.attention.borrow_mut();
    let capability = a.capability;
    let aligned = [b.qkv, b.out, b.lse, b.dout, b.dqkv, b.workspace].iter().all(|b| b.ptr.is_multiple_of(16));
    if let Some((handle, pair)) = a.plans(s, d.workspace.bytes).filter(|_| aligned) {
        let w = Workspace::of(s, pair, d.deterministic);
        check(&[(b.workspace, w.total() as usize, 1)])?;
        return backward_cudnn(d, s, b, handle, pair, &w, capability);
    }
    let delta = delta_bytes(s);
    check(&[(b.workspace, delta as usize, 1)])?;
    let stream = d.stream(Stream::Compute);
    let f = a.function(s.head_dim, "attention_delta")?;
    let (dout, out, delta) = (b.dout.ptr, b.out.ptr, b.workspace.ptr);
    let (rows, seq, heads, head_dim) = (s.rows() as u64, int(s.seq)?, int(s.heads)?, int(s.head_dim)?);
    let l = Launch::new(((s.rows() * s.heads).div_ceil(8) as u32, 1, 1), (256, 1));
    launch!(f, l, stream, "attention_delta"; dout, out, rows, seq, heads, head_dim, delta)?;
    let p = parameters(s, b.qkv, d.dtype.size())?;
    let (dq, dk, dv) = slices(s, b.dqkv.ptr, d.dtype.size());
    let g = Gradients { dout, lse: b.lse.ptr, delta, dq, dk, dv };
    let tiles = s.seq.div_ceil(TILE) as u32;
    let f = a.function(s.head_dim, "attention_backward_keys")?;
    let l = Launch { grid: (tiles, s.kv_heads as u32, s.batch as u32), block: (256, 1), shared: 2 * CHUNK_BYTES + 2 * SCORES_BYTES };
    launch!(f, l, stream, "attention_backward_keys"; p, g)?;
    let f = a.function(s.head_dim, "attention_backward_queries")?;
    let l = Launch { grid: (tiles, s.heads as u32, s.batch as u32), block: (256, 1), shared: 2 * CHUNK_BYTES + SCORES_BYTES };
    launch!(f, l, stream, "attention_backward_queries"; p, g)
}

fn backward_cudnn(
    d: &CudaDevice,
    s: &AttentionShape,
    b: &Backward,
    handle: &Handle,
    pair: &Pair,
    w: &Workspace,
    capability: (i32, i32),
) -> Result<(), EngineError> {
    let size = d.dtype.size();
    let own = b.workspace.ptr;
    let first_key = own + w.own;
    let delta = first_key + w.first;
    let dq_sum = delta + w.delta;
    let (nothing, one) = (nothing(s), 1f32);
    if masked(s) {
        first_keys(d, s, first_key)?;
    }
    let mut first = 0;
    while first < s.batch {
        let count = pair.backward_batch.min(s.batch - first);
        let plan = match &pair.backward_rest {
            Some(rest) if count < pair.backward_batch => rest,
            _ => &pair.backward,
        };
        let tokens = (first * s.seq) as u64;
        let (packed, plain) = (tokens * s.row() as u64 * size, tokens * (s.heads * s.head_dim) as u64 * size);
        let (q, k, v) = slices(s, b.qkv.ptr + packed, size);
        let (dq, dk, dv) = slices(s, b.dqkv.ptr + packed, size);
        let mut tensors = vec![
            (io::Q, q),
            (io::K, k),
            (io::V, v),
            (io::OUT, b.out.ptr + plain),
            (io::STATISTICS, b.lse.ptr + tokens * s.heads as u64 * 4),
            (io::DOUT, b.dout.ptr + plain),
            (io::DQ, dq),
            (io::DK, dk),
            (io::DV, dv),
            (io::SCALE, host(&s.scale)),
            (io::MASKED, host(&nothing)),
            (io::ONE, host(&one)),
            (io::DELTA, delta),
        ];
        if masked(s) {
            tensors.push((io::FIRST, first_key + tokens * 4));
        }
        if !d.deterministic {
            // Only Hopper's kernels clear the sums themselves.
            if capability.0 != 9 {
                cu!("attention_backward", cuMemsetD8Async(dq_sum, 0, w.dq_sum as usize, d.stream(Stream::Compute).0))?;
            }
            tensors.push((io::DQ_SUM, dq_sum));
        }
        plan.run(handle, &tensors, own)?;
        first += count;
    }
    Ok(())
}

pub(crate) fn cached(
    d: &CudaDevice,
    s: &CachedAttentionShape,
    qkv: DevBuf,
    keys: DevBuf,
    values: DevBuf,
    past: DevBuf,
    out: DevBuf,
) -> Result<(), EngineError> {
    let shape = AttentionShape {
        batch: s.batch,
        seq: s.new,
        heads: s.heads,
        kv_heads: s.kv_heads,
        head_dim: s.head_dim,
        scale: s.scale,
        window: None,
        starts: None,
    };
    if shape.rows() == 0 {
        return Ok(());
    }
    let size = d.dtype.size();
    let width = s.kv_heads * s.head_dim;
    check(&[(keys, s.batch * s.capacity * width, size), (values, s.batch * s.capacity * width, size), (past, s.batch, 4)])?;
    check(&[(qkv, shape.rows() * shape.row(), size), (out, shape.rows() * s.heads * s.head_dim, size)])?;
    let mut a = d.attention.borrow_mut();
    let stream = d.stream(Stream::Compute);
    let f = a.function(s.head_dim, "cache_append")?;
    let (source, new, capacity) = (qkv.ptr, int(s.new)?, int(s.capacity)?);
    let (heads, kv_heads, head_dim) = (int(s.heads)?, int(s.kv_heads)?, int(s.head_dim)?);
    let (lengths, k, v) = (past.ptr, keys.ptr, values.ptr);
    let l = Launch::new((shape.rows() as u32, 1, 1), (width.next_multiple_of(32).min(256) as u32, 1));
    launch!(f, l, stream, "cache_append"; source, new, capacity, heads, kv_heads, head_dim, lengths, k, v)?;
    let p = Parameters {
        k,
        v,
        k_row: width as u64,
        k_sequence: (s.capacity * width) as u64,
        window: int(s.window.unwrap_or(0))?,
        past: past.ptr,
        ..parameters(&shape, qkv, size)?
    };
    let (out, none) = (out.ptr, 0u64);
    if s.new >= TILED_FROM {
        let f = a.function(s.head_dim, "attention_forward")?;
        let grid = (s.new.div_ceil(TILE) as u32, s.heads as u32, s.batch as u32);
        let l = Launch { grid, block: (256, 1), shared: 2 * CHUNK_BYTES + SCORES_BYTES };
        return launch!(f, l, stream, "attention_cached"; p, out, none);
    }
    let parts = s.capacity.div_ceil(SPLIT);
    let partial_bytes = (shape.rows() * s.heads * parts * (s.head_dim + 2)) as u64 * 4;
    let aligned = d.width(&[qkv, keys, values], &[s.head_dim]) > 1;
    if aligned && partial_bytes <= PARTIALS_BYTES && parts <= 65_535 && shape.rows() <= 65_535 {
        let group = s.heads / s.kv_heads;
        let (name, at_once) = if group == 1 { ("attention_part_1", 1) } else { ("attention_part_4", 4) };
        let (f, partial) = (a.function(s.head_dim, name)?, d.partials.ptr);
        let grid = ((s.kv_heads * group.div_ceil(at_once)) as u32, parts as u32, shape.rows() as u32);
        launch!(f, Launch::new(grid, (256, 1)), stream, "attention_cached"; p, out, partial)?;
        if parts == 1 {
            return Ok(());
        }
        let f = a.function(s.head_dim, "attention_join")?;
        let (l, parts) = (Launch::new((s.heads as u32, s.new as u32, s.batch as u32), (256, 1)), int(parts)?);
        return launch!(f, l, stream, "attention_cached"; p, out, partial, parts);
    }
    let f = a.function(s.head_dim, "attention_decode")?;
    let l = Launch::new((s.heads as u32, s.new as u32, s.batch as u32), (256, 1));
    launch!(f, l, stream, "attention_cached"; p, out)
}
