//! A device: memory, streams, events, copies, and the operations that models are made of.
//!
//! Everything but allocation and synchronisation is *enqueued*: it runs later, in order on its stream, and the call
//! returns at once. Streams run side by side; events order them. The engine is written once over `dyn Device`:
//!
//! ```text
//!   CopyIn   : load_parameters(block 1) ──record e1──► …            weights on their way into a slot
//!   Compute  : … block 0 … ──────────── wait e1 ──► block 1 …       all arithmetic
//!   CopyOut  : wait g0 ──► store_gradients(block 0) …               gradients on their way to the segment
//!   Peers    : all_gather(block 2) ──► reduce_scatter(block 0) …    between the devices of a gang, where there is one
//! ```
//!
//! The CPU device (`ramtorch_cpu::CpuDevice`) really runs its streams on threads of their own, so an event that is missing
//! here is a wrong result there too, on any machine.
//!
//! Matrices are row-major. `Dtype` is the compute format of activations and of weights in a slot; gradients of
//! parameters, normalisation statistics, losses and softmax statistics are always f32.

#![forbid(unsafe_code)]

mod bounds;
mod error;
mod gang;
mod optimizer;

pub use bounds::{check_gradients, check_load, check_room};
pub use error::{EngineError, ErrorKind, caught};
pub use gang::{Gang, Ranks, check_shares};
pub use optimizer::{
    AdamwStep, DecayRun, DeviceGradients, DirectWeights, GRADIENTS_AHEAD, GradientPiece, GradientReader, HeldPage, PageGradients,
    PageUpdater, STAGED_PARAMETERS, STAGINGS, StagedPage, gradient_reader_bytes, random_bits, random_key, staged_parameters, staged_parts,
    staged_rooms, staging_bytes, state_bytes, stochastic,
};
use ramtorch_store::{GradientFormat, Store};
pub use ramtorch_trace as trace;
use ramtorch_trace::{Label, Recorder, Row, Waits};
use std::sync::Arc;

/// Number format of activations and weights on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> u64 {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

/// A range of device memory. Plain data: valid as long as the device that allocated it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevBuf {
    /// Device address (CUDA pointer, or address inside the CPU device's arena).
    pub ptr: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl DevBuf {
    /// The part of `len` bytes at `offset`.
    ///
    /// # Panics
    /// When it does not lie inside: a defect of the engine, never of its input.
    pub fn slice(self, offset: u64, len: u64) -> DevBuf {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.bytes), "device range {offset}+{len} outside {} bytes", self.bytes);
        DevBuf { ptr: self.ptr + offset, bytes: len }
    }
}

/// An in-order queue of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// All arithmetic.
    Compute,
    /// Host to device.
    CopyIn,
    /// Device to host.
    CopyOut,
    /// Between the devices of a gang.
    Peers,
}

impl Stream {
    /// All of them.
    pub const ALL: [Stream; 4] = [Stream::Compute, Stream::CopyIn, Stream::CopyOut, Stream::Peers];

    /// Its place among them.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Its line in a trace.
    pub const fn row(self) -> Row {
        match self {
            Stream::Compute => Row::Compute,
            Stream::CopyIn => Row::CopyIn,
            Stream::CopyOut => Row::CopyOut,
            Stream::Peers => Row::Peers,
        }
    }
}

/// A stretch of a stream that was begun and not ended ([`Device::begin`]); nothing, where nobody wants to know its time.
#[must_use = "a stretch that is not ended is not measured"]
#[derive(Debug)]
pub struct Stretch(pub Option<u64>);

/// A point in a stream that others can wait for. Created once, recorded again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event(pub u32);

/// Work that a device has kept ([`Device::keep_work`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptWork(pub u32);

/// Row-major `D[m,n] = op(A)[m,k] · op(B)[k,n] (+ D) (+ add) (+ bias)`, f32 accumulation.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// Rows of D.
    pub m: usize,
    /// Columns of D.
    pub n: usize,
    /// Inner dimension.
    pub k: usize,
    /// A is stored `[k,m]` when set, `[m,k]` when not. Compute format.
    pub transpose_a: bool,
    /// B is stored `[n,k]` when set, `[k,n]` when not. Compute format.
    pub transpose_b: bool,
    /// Left matrix.
    pub a: DevBuf,
    /// Right matrix.
    pub b: DevBuf,
    /// Result.
    pub d: DevBuf,
    /// Format of D: the compute format, or f32 for parameter gradients.
    pub d_dtype: Dtype,
    /// Add to what D holds (parameter gradients).
    pub accumulate: bool,
    /// `[m,n]` in the compute format, added to the product (residual connections). Never with `accumulate`.
    pub add: Option<DevBuf>,
    /// `[n]` in the compute format, added to each row.
    pub bias: Option<DevBuf>,
}

/// Normalisation of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / sqrt(mean(x²) + eps) · w. Statistics: `[rows]` reciprocal roots.
    Rms,
    /// (x - mean) / sqrt(var + eps) · w + b. Statistics: `[rows, 2]` mean and reciprocal root.
    Layer,
}

/// Rows that are normalised: `rows × groups` vectors of `width` elements. Vector (r, g) starts at element
/// `r·row_stride + offset + g·width`. A plain `[rows, width]` matrix has groups 1, row_stride = width, offset 0.
#[derive(Debug, Clone, Copy)]
pub struct NormShape {
    /// Kind.
    pub kind: NormKind,
    /// Rows (tokens).
    pub rows: usize,
    /// Vectors in a row (heads, for the norms of queries and keys).
    pub groups: usize,
    /// Elements of a vector.
    pub width: usize,
    /// Elements from row to row.
    pub row_stride: usize,
    /// Elements before the first vector of a row.
    pub offset: usize,
    /// Added under the root.
    pub eps: f32,
}

impl NormShape {
    /// `[rows, width]`.
    pub fn plain(kind: NormKind, rows: usize, width: usize, eps: f32) -> Self {
        NormShape { kind, rows, groups: 1, width, row_stride: width, offset: 0, eps }
    }
    /// f32 values of statistics.
    pub fn stats_len(&self) -> usize {
        self.rows * self.groups * if self.kind == NormKind::Layer { 2 } else { 1 }
    }
}

/// Attention of packed queries, keys and values: row t of sequence b holds `heads` query heads, then `kv_heads` key
/// heads, then `kv_heads` value heads, each of `head_dim` elements.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Query t sees keys t-window+1 ..= t only.
    pub window: Option<usize>,
    /// `[batch·seq]` i32: the first token (index in its sequence) that a query may see.
    pub starts: Option<DevBuf>,
}

impl AttentionShape {
    /// Elements of one row of packed queries, keys and values.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Tokens.
    pub fn rows(&self) -> usize {
        self.batch * self.seq
    }
}

/// Attention of `new` tokens of each sequence to a cache that already holds them and all earlier ones.
#[derive(Debug, Clone, Copy)]
pub struct CachedAttentionShape {
    /// Sequences.
    pub batch: usize,
    /// New tokens a sequence (rows of the packed matrix a sequence).
    pub new: usize,
    /// Tokens that the cache has room for, a sequence.
    pub capacity: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Sliding window.
    pub window: Option<usize>,
}

/// Rotary embedding of the first `heads` heads of each row, in place. Pairs are (i, i + head_dim/2), as Hugging
/// Face's `rotate_half` has them.
#[derive(Debug, Clone, Copy)]
pub struct RopeShape {
    /// Tokens.
    pub rows: usize,
    /// Elements from row to row.
    pub row_stride: usize,
    /// Heads turned (queries and keys).
    pub heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Position of row r is r % seq, where `positions` is absent.
    pub seq: usize,
    /// `[rows]` i32 positions.
    pub positions: Option<DevBuf>,
    /// `[max_positions, head_dim/2, 2]` f32: cosine and sine.
    pub table: DevBuf,
    /// Turn back (the backward pass).
    pub inverse: bool,
}

/// Pointwise activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ActivationKind {
    Silu,
    /// 0.5·x·(1 + tanh(√(2/π)(x + 0.044715·x³))).
    GeluTanh,
    /// 0.5·x·(1 + erf(x/√2)).
    Gelu,
    Relu,
    Tanh,
}

/// Token ids of a micro-batch with their inverse, made on the host so that the scatter of the embedding's gradient
/// needs no atomics and has one order of summation.
#[derive(Debug, Clone, Copy)]
pub struct TokenIndex {
    /// Tokens.
    pub rows: usize,
    /// `[rows]` i32 ids.
    pub ids: DevBuf,
    /// `[rows]` i32 rows, ordered by (id, row).
    pub order: DevBuf,
    /// `[unique + 1]` i32: bounds in `order` of each distinct id.
    pub bounds: DevBuf,
    /// Distinct ids.
    pub unique: usize,
}

/// What a loss writes.
#[derive(Debug, Clone, Copy)]
pub struct LossOut {
    /// `[rows]` f32: weight × loss of each row, unscaled.
    pub losses: DevBuf,
    /// When set, the input is replaced by the gradient of scale × Σ weight × loss.
    pub gradient_scale: Option<f32>,
}

/// A device and its operations. Buffers are in the compute format where nothing else is said.
pub trait Device: Send {
    /// `cpu:0`, `cuda:1`.
    fn name(&self) -> String;
    /// Compute format.
    fn dtype(&self) -> Dtype;
    /// Takes `bytes` (rounded up to 256) of the budget, zeroed. `what` is for messages.
    fn alloc(&mut self, bytes: u64, what: &str) -> Result<DevBuf, EngineError>;
    /// Takes the memory of the next `bytes` that are allocated in one piece, where the device rounds what it takes: hundreds of buffers would
    /// otherwise lose a part of such a unit each. Counts nothing.
    fn reserve(&mut self, bytes: u64) -> Result<(), EngineError> {
        let _ = bytes;
        Ok(())
    }
    /// Bytes taken so far.
    fn allocated(&self) -> u64;
    /// Makes the store's pages reachable for fast copies (CUDA: page-locks the mapping).
    fn register_store(&mut self, store: &Arc<Store>) -> Result<(), EngineError>;
    /// An updater of the store's pages on this device, where it can do that; makes the store's pages reachable too. Its
    /// memory counts as taken ([`staging_bytes`]). It must be dropped before the device.
    fn page_updater(&mut self, store: &Arc<Store>) -> Result<Option<Box<dyn PageUpdater>>, EngineError>;
    /// A reader of gradients in `format` that stay on this device, for pages of at most `page_parameters`. It takes
    /// [`gradient_reader_bytes`] of RAM, and must be dropped before the device.
    fn gradient_reader(&mut self, format: GradientFormat, page_parameters: u64) -> Result<Box<dyn GradientReader>, EngineError>;
    /// A new event, done.
    fn event(&mut self) -> Result<Event, EngineError>;
    /// `event` is done when all work now on `stream` is.
    fn record(&self, event: Event, stream: Stream) -> Result<(), EngineError>;
    /// Later work on `stream` starts after the last recording of `event`.
    fn wait(&self, stream: Stream, event: Event) -> Result<(), EngineError>;
    /// Whether the last recording of `event` is done (or there was none).
    fn is_done(&self, event: Event) -> Result<bool, EngineError>;
    /// Blocks the caller until the last recording of `event` is done.
    fn synchronize_event(&self, event: Event) -> Result<(), EngineError>;
    /// Blocks the caller until `stream` is empty.
    fn synchronize(&self, stream: Stream) -> Result<(), EngineError>;
    /// Keeps what `work` enqueues on `Compute`, for [`Device::again`], which enqueues it in one call: what changes in between lies in the
    /// buffers that the work reads. Nothing of it runs now. `work` waits for no event and for nothing of the device, and has run once before, so that
    /// what a device does once for each shape is done. Kept as long as the device. Nothing where the device cannot, or need not.
    fn keep_work(&self, work: &mut dyn FnMut() -> Result<(), EngineError>) -> Result<Option<KeptWork>, EngineError> {
        let _ = work;
        Ok(None)
    }
    /// Enqueues work that was kept.
    fn again(&self, kept: KeptWork) -> Result<(), EngineError> {
        Err(EngineError::internal(format!("{} keeps no work: {kept:?}", self.name())))
    }

    /// From now on, stretches of this device's streams are measured for `recorder`: those of its traces, and waits always.
    /// To be called before [`Device::page_updater`], whose pages are recorded too.
    fn observe(&mut self, recorder: &Arc<Recorder>);
    /// A trace begins, or another step of it: ties the device's clock to the host's. Blocks until `CopyOut` is empty, so it
    /// belongs between steps.
    fn anchor(&self) -> Result<(), EngineError>;
    /// A stretch of `stream` begins: a span of the trace that is on, and a wait to be measured where `label` is one. Enqueues
    /// nothing where there is neither.
    fn begin(&self, stream: Stream, label: &Label) -> Result<Stretch, EngineError>;
    /// It ends, with all work now on `stream`.
    fn end(&self, stream: Stream, stretch: Stretch) -> Result<(), EngineError>;
    /// Reads the clocks of stretches that are over, without waiting for others; how long waits were, since the last call.
    fn resolve(&self) -> Result<Waits, EngineError>;
    /// [`Device::wait`], measured: how long `stream` stands still for it.
    fn wait_measured(&self, stream: Stream, event: Event, label: &Label) -> Result<(), EngineError> {
        if self.is_done(event)? {
            return self.wait(stream, event);
        }
        let stretch = self.begin(stream, label)?;
        self.wait(stream, event)?;
        self.end(stream, stretch)
    }

    /// Copies small host data (ids, targets, tables) into `dst`; the data is taken over before the call returns.
    fn upload(&self, stream: Stream, dst: DevBuf, data: &[u8]) -> Result<(), EngineError>;
    /// Copies device memory to the host; blocks until all work now on `stream` and the copy are done.
    fn download(&self, stream: Stream, src: DevBuf, out: &mut [u8]) -> Result<(), EngineError>;
    /// As [`Device::download`], for somebody who only looks at the data: where the device has page-locked memory of its own for
    /// it, it is copied there and no further. `look` is called once; it calls no `read` of this device.
    fn read(&self, stream: Stream, src: DevBuf, look: &mut dyn FnMut(&[u8])) -> Result<(), EngineError> {
        let mut data = vec![0; src.bytes as usize];
        self.download(stream, src, &mut data)?;
        look(&data);
        Ok(())
    }
    /// Device to device.
    fn copy(&self, stream: Stream, dst: DevBuf, src: DevBuf) -> Result<(), EngineError>;
    /// Fills with zero bytes.
    fn zero(&self, stream: Stream, dst: DevBuf) -> Result<(), EngineError>;
    /// Loads `count` parameters from physical page `physical` of the store, from element `offset` of the page on,
    /// into `dst` in the compute format (bf16: the high halves; f32: the exact master).
    fn load_parameters(
        &self,
        stream: Stream,
        dst: DevBuf,
        store: &Arc<Store>,
        physical: u32,
        offset: u64,
        count: u64,
    ) -> Result<(), EngineError>;
    /// Copies the state of `count` parameters of physical page `physical`, from element `offset` of the page on, into `dst` as
    /// it is in the store: both halves of the master, then both moments, one array behind the other. For
    /// [`PageUpdater::submit`].
    fn load_state(
        &self,
        stream: Stream,
        dst: DevBuf,
        store: &Arc<Store>,
        physical: u32,
        offset: u64,
        count: u64,
    ) -> Result<(), EngineError>;
    /// Writes `count` f32 gradients from `src` into the store's array of gradients from place `at` on
    /// ([`Layout::gradient_at`](ramtorch_store::Layout::gradient_at)), in the store's gradient format (rounded to nearest), or
    /// adds them to what is there.
    fn store_gradients(
        &self,
        stream: Stream,
        src: DevBuf,
        store: &Arc<Store>,
        at: u64,
        count: u64,
        accumulate: bool,
    ) -> Result<(), EngineError>;
    /// Copies `count` gradients that are in the store's format already into its array of gradients from place `at` on.
    /// For devices that would otherwise convert on a copy stream, where a kernel waits for arithmetic to make room.
    fn store_packed_gradients(&self, stream: Stream, src: DevBuf, store: &Arc<Store>, at: u64, count: u64) -> Result<(), EngineError>;
    /// Connects this device with those of the gang's other ranks; all ranks call it at the same place, once, and only where
    /// there are several. It must be dropped no later than the gang ends. Once [`Gang::aborted`] says that the rank has given
    /// up, what waits for peers on the device ends within a second, its results worthless.
    ///
    /// # Errors
    /// A library is missing, or the peers do not come in time.
    fn join_gang(&mut self, gang: &Arc<dyn Gang>) -> Result<(), EngineError>;
    /// On [`Stream::Peers`]: fills the other ranks' shares of `buf`, which holds one share a rank ([`Ranks::padded`]) and this
    /// rank's in place. In the compute format.
    ///
    /// # Errors
    /// The rank has given up, or is in no gang.
    fn all_gather(&self, buf: DevBuf) -> Result<(), EngineError>;
    /// On [`Stream::Peers`]: replaces this rank's share of `buf` by the sum of all ranks', in an order that depends on the
    /// gang and the length alone. The other shares are worthless afterwards. bf16 sums may be rounded on their way from rank
    /// to rank.
    ///
    /// # Errors
    /// As [`Device::all_gather`].
    fn reduce_scatter(&self, buf: DevBuf, dtype: Dtype) -> Result<(), EngineError>;

    /// See [`Gemm`].
    fn gemm(&self, g: &Gemm) -> Result<(), EngineError>;
    /// `out = Σ x²`: one f64 of `count` values of `dtype`, always added up in the same order.
    fn sum_of_squares(&self, x: DevBuf, dtype: Dtype, count: usize, out: DevBuf) -> Result<(), EngineError>;
    /// `out[n] += Σ_rows x[rows, n]`, out f32.
    fn column_sum(&self, x: DevBuf, rows: usize, n: usize, out: DevBuf) -> Result<(), EngineError>;
    /// y = norm(x); `stats` receives the statistics. `bias` for layer norms only.
    fn norm_forward(
        &self,
        s: &NormShape,
        x: DevBuf,
        weight: DevBuf,
        bias: Option<DevBuf>,
        y: DevBuf,
        stats: DevBuf,
    ) -> Result<(), EngineError>;
    /// dx = (add or 0) + gradient through the norm; `dweight`, `dbias` (f32) are added to. `dx` may be `dy` or `add`.
    fn norm_backward(
        &self,
        s: &NormShape,
        dy: DevBuf,
        x: DevBuf,
        weight: DevBuf,
        stats: DevBuf,
        add: Option<DevBuf>,
        dx: DevBuf,
        dweight: DevBuf,
        dbias: Option<DevBuf>,
    ) -> Result<(), EngineError>;
    /// See [`RopeShape`].
    fn rope(&self, s: &RopeShape, x: DevBuf) -> Result<(), EngineError>;
    /// Causal softmax attention: `out [rows, heads·head_dim]`, `lse [batch, heads, seq]` f32.
    fn attention_forward(&self, s: &AttentionShape, qkv: DevBuf, out: DevBuf, lse: DevBuf) -> Result<(), EngineError>;
    /// `dqkv` (packed like qkv) is overwritten. `workspace` has [`Device::attention_workspace`] bytes.
    fn attention_backward(
        &self,
        s: &AttentionShape,
        dout: DevBuf,
        qkv: DevBuf,
        out: DevBuf,
        lse: DevBuf,
        dqkv: DevBuf,
        workspace: DevBuf,
    ) -> Result<(), EngineError>;
    /// Bytes that `attention_backward` (and forward) needs.
    fn attention_workspace(&self, s: &AttentionShape) -> Result<u64, EngineError>;
    /// Appends the keys and values of packed `qkv [batch·new, row]` to the caches at `past[b]` and attends to all.
    /// Caches are `[batch, capacity, kv_heads·head_dim]`; `past` is `[batch]` i32.
    fn attention_cached(
        &self,
        s: &CachedAttentionShape,
        qkv: DevBuf,
        keys: DevBuf,
        values: DevBuf,
        past: DevBuf,
        out: DevBuf,
    ) -> Result<(), EngineError>;
    /// `h[rows, n] = act(x[:, ..n]) · x[:, n..]` for `x [rows, 2n]`.
    fn glu_forward(&self, act: ActivationKind, x: DevBuf, rows: usize, n: usize, h: DevBuf) -> Result<(), EngineError>;
    /// Gradient of [`Device::glu_forward`]; `dx` may be `x`.
    fn glu_backward(&self, act: ActivationKind, dh: DevBuf, x: DevBuf, rows: usize, n: usize, dx: DevBuf) -> Result<(), EngineError>;
    /// y = act(x), `count` elements.
    fn activation_forward(&self, act: ActivationKind, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError>;
    /// dx = dy · act'(x); `dx` may be `dy`.
    fn activation_backward(&self, act: ActivationKind, dy: DevBuf, x: DevBuf, count: usize, dx: DevBuf) -> Result<(), EngineError>;
    /// `x[rows, width] = table[ids] (+ positions[row % seq])`; `past` `[rows]` i32 gives explicit positions.
    fn embedding_forward(
        &self,
        t: &TokenIndex,
        table: DevBuf,
        width: usize,
        position_table: Option<DevBuf>,
        seq: usize,
        positions: Option<DevBuf>,
        x: DevBuf,
    ) -> Result<(), EngineError>;
    /// `dtable` and `dpositions` (f32) are added to.
    fn embedding_backward(
        &self,
        t: &TokenIndex,
        dx: DevBuf,
        width: usize,
        dtable: DevBuf,
        dpositions: Option<DevBuf>,
        seq: usize,
    ) -> Result<(), EngineError>;
    /// Softmax cross-entropy of `logits [rows, classes]` with `targets [rows]` i32 and `weights [rows]` f32.
    fn cross_entropy(
        &self,
        logits: DevBuf,
        rows: usize,
        classes: usize,
        targets: DevBuf,
        weights: DevBuf,
        out: &LossOut,
    ) -> Result<(), EngineError>;
    /// Squared error summed over `n` columns of `x` against `targets [rows, n]` f32, times `weights [rows]`.
    fn squared_error(&self, x: DevBuf, rows: usize, n: usize, targets: DevBuf, weights: DevBuf, out: &LossOut) -> Result<(), EngineError>;
    /// Copies row `rows[i]` of `x [_, width]` to row i of `y`; `rows` is `[count]` i32 on the device.
    fn gather_rows(&self, x: DevBuf, width: usize, rows: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError>;
    /// y += x, `count` elements.
    fn add(&self, x: DevBuf, y: DevBuf, count: usize) -> Result<(), EngineError>;
    /// Converts to f32.
    fn to_f32(&self, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError>;
    /// Converts f32 host-like data on the device into the compute format.
    #[allow(clippy::wrong_self_convention)] // the pair of to_f32, on the device's buffers
    fn from_f32(&self, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError>;
}
