//! The device: what it owns, and the [`Device`] trait over it.
//!
//! ```text
//!   upload ──ring of pinned memory──► CopyIn ──┐
//!   load_parameters ──registered segment──────►│ events ──► Compute: kernels, cuBLASLt, cuDNN ──► events
//!                                              │                                                    │
//!   segment ◄── staging ◄── CopyOut ◄──────── Peers (NCCL) ◄────────────────────────────────────────┘
//! ```
//! Operations enqueue and return. They allocate nothing and wait for nothing, with three exceptions, each the first time
//! only: a matrix product of a new shape (search for an algorithm), attention of a new shape (plan), and staging memory
//! of a stream that had none.

use crate::attention::{self, Attention};
use crate::driver::{Context, Memory, Pinned, RawEvent, RawStream, cu};
use crate::gemm::Products;
use crate::kernels::Kernels;
use crate::memory::Arena;
use crate::peers::Peers;
use crate::recording::Recording;
use crate::staging::Ring;
use crate::timing::Timing;
use crate::{GpuInfo, copies, ops, reader, updater};
use ramtorch_device::trace::{Label, Recorder, Waits};
use ramtorch_device::*;
use ramtorch_store::{GradientFormat, Store};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// Workspace of matrix products and of attention's forward pass, on the compute stream.
pub(crate) const WORKSPACE_BYTES: u64 = 64 << 20;
/// Partial sums of two-stage reductions, on the compute stream.
pub(crate) const PARTIALS_BYTES: u64 = 32 << 20;
/// Staging of a stream for formats that differ between store and device.
pub(crate) const STAGING_BYTES: u64 = 32 << 20;
const UPLOAD_RING_BYTES: usize = 64 << 20;

/// A GPU. Field order matters: whatever uses the context goes before it.
pub struct CudaDevice {
    pub(crate) info: GpuInfo,
    pub(crate) dtype: Dtype,
    pub(crate) deterministic: bool,
    synchronous: bool,
    last_operation: Cell<&'static str>,
    /// Work that is kept.
    recordings: RefCell<Vec<Recording>>,
    /// The connection to the other GPUs of its gang.
    peers: Option<Peers>,
    pub(crate) attention: RefCell<Attention>,
    pub(crate) products: RefCell<Products>,
    pub(crate) kernels: Kernels,
    arena: Arena,
    pub(crate) workspace: Memory,
    pub(crate) partials: Memory,
    /// Device memory for conversions, by stream.
    pub(crate) staging: [RefCell<Option<Memory>>; Stream::ALL.len()],
    pub(crate) ring: RefCell<Ring>,
    /// Where [`Device::read`] copies to; made when first needed.
    pub(crate) readings: RefCell<Option<Pinned>>,
    events: Vec<RawEvent>,
    pub(crate) timing: RefCell<Timing>,
    pub(crate) stores: Vec<Arc<copies::Registration>>,
    /// After the gradients that the reader of gradients was asked for last; made when first asked for.
    fetched: Option<Arc<RawEvent>>,
    streams: [RawStream; Stream::ALL.len()],
    context: Context,
}

impl CudaDevice {
    /// Device memory that every open device takes beside its budget (the driver's context comes on top).
    pub const INTERNAL_BYTES: u64 = WORKSPACE_BYTES + PARTIALS_BYTES + 3 * STAGING_BYTES;

    /// What the driver's context, the code of cuBLASLt and cuDNN and of this crate's kernels, and the driver's units of 2 MiB
    /// take, at most: an allowance, not a sum.
    const CONTEXT_BYTES: u64 = 1280 << 20;

    /// Device memory of this process beside the budget of [`CudaDevice::open`], at most: context, libraries, the device's own
    /// buffers and, where algorithms are searched for, the result they are tried on.
    pub const fn outside_bytes(deterministic: bool) -> u64 {
        Self::CONTEXT_BYTES + Self::INTERNAL_BYTES + if deterministic { 0 } else { crate::gemm::SEARCH_BYTES }
    }

    /// Device memory that the connection to the other GPUs of a gang takes, at most: NCCL's buffers and kernels.
    pub const PEERS_BYTES: u64 = 768 << 20;

    /// Opens GPU `ordinal` with a budget of `memory_bytes` for [`Device::alloc`]. `deterministic` gives the same bits run after
    /// run, at some cost in speed and in attention's workspace.
    ///
    /// # Errors
    /// When a library is missing, the GPU does not exist or is too old, kernels cannot be compiled, or its memory is taken.
    pub fn open(ordinal: u32, dtype: Dtype, memory_bytes: u64, deterministic: bool) -> Result<CudaDevice, EngineError> {
        let all = crate::available()?;
        let Some(info) = all.iter().find(|g| g.ordinal == ordinal).cloned() else {
            return Err(EngineError::new(ErrorKind::Resources, format!("there is no usable cuda:{ordinal}, only {} GPUs", all.len())));
        };
        if let Err(why) = crate::library::cudnn() {
            tracing::warn!("cuda:{ordinal}: cuDNN is not used, attention will be much slower: {why}");
        }
        let context = Context::open(ordinal)?;
        // Kernels of the copy streams are short and others wait for them: first in line.
        let streams = [RawStream::new(false)?, RawStream::new(true)?, RawStream::new(true)?, RawStream::new(true)?];
        let kernels = Kernels::load(info.compute_capability, dtype)?;
        let products = Products::new(dtype, deterministic)?;
        let attention = Attention::new(&info, dtype, deterministic, &streams[0])?;
        let device = CudaDevice {
            dtype,
            deterministic,
            synchronous: std::env::var_os("RAMTORCH_CUDA_SYNC").is_some_and(|v| v == "1"),
            last_operation: Cell::new("nothing"),
            recordings: RefCell::default(),
            peers: None,
            attention: RefCell::new(attention),
            products: RefCell::new(products),
            kernels,
            arena: Arena::new(memory_bytes),
            workspace: Memory::new(WORKSPACE_BYTES, "workspace")?,
            partials: Memory::new(PARTIALS_BYTES, "partial sums")?,
            staging: Default::default(),
            ring: RefCell::new(Ring::new(UPLOAD_RING_BYTES)?),
            readings: RefCell::default(),
            events: Vec::new(),
            timing: RefCell::new(Timing::new(None)),
            stores: Vec::new(),
            fetched: None,
            streams,
            context,
            info,
        };
        // The streams that will need staging get it now.
        if dtype == Dtype::F32 {
            device.staging(Stream::CopyIn)?;
        }
        device.staging(Stream::CopyOut)?;
        Ok(device)
    }

    /// What this device is.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Free and total bytes of the GPU's memory, now.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn memory_info(&self) -> Result<(u64, u64), EngineError> {
        self.context.enter()?;
        let (mut free, mut total) = (0, 0);
        cu!(self.name(), cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free as u64, total as u64))
    }

    pub(crate) fn stream(&self, s: Stream) -> &RawStream {
        &self.streams[s.index()]
    }

    /// Makes the context current on this thread; every call that reaches the driver begins here.
    pub(crate) fn enter(&self) -> Result<(), EngineError> {
        self.context.enter()
    }

    /// The registration of a store, made when first asked for.
    pub(crate) fn registration(&mut self, store: &Arc<Store>) -> Result<Arc<copies::Registration>, EngineError> {
        if let Some(r) = self.stores.iter().find(|r| r.holds(store)) {
            return Ok(r.clone());
        }
        let r = Arc::new(copies::Registration::new(store)?);
        self.stores.push(r.clone());
        Ok(r)
    }

    /// What the updater waits for, and the reader of gradients records.
    pub(crate) fn fetched(&mut self) -> Result<Arc<RawEvent>, EngineError> {
        if let Some(event) = &self.fetched {
            return Ok(event.clone());
        }
        Ok(self.fetched.insert(Arc::new(RawEvent::new()?)).clone())
    }

    /// Counts `bytes` as taken from the budget.
    pub(crate) fn count(&mut self, bytes: u64, what: &str) -> Result<(), EngineError> {
        let name = self.name();
        self.arena.count(bytes, &name, what)
    }

    /// Address of a stream's staging memory of [`STAGING_BYTES`], made when first asked for.
    pub(crate) fn staging(&self, s: Stream) -> Result<u64, EngineError> {
        let mut slot = self.staging[s.index()].borrow_mut();
        match slot.as_ref() {
            Some(m) => Ok(m.ptr),
            None => Ok(slot.insert(Memory::new(STAGING_BYTES, "staging")?).ptr),
        }
    }

    /// Runs `f`, an operation, and names it in errors.
    fn operation(&self, name: &'static str, stream: Stream, f: impl FnOnce() -> Result<(), EngineError>) -> Result<(), EngineError> {
        self.enter()?;
        f().map_err(|e| self.explain(e, name))?;
        self.last_operation.set(name);
        if self.synchronous {
            self.stream(stream).synchronize(name).map_err(|e| self.explain(e, name))?;
        }
        Ok(())
    }

    fn compute(&self, name: &'static str, f: impl FnOnce() -> Result<(), EngineError>) -> Result<(), EngineError> {
        self.operation(name, Stream::Compute, f)
    }

    fn explain(&self, e: EngineError, name: &str) -> EngineError {
        let message = format!("cuda:{}: {name}: {} (last operation enqueued: {})", self.info.ordinal, e.message, self.last_operation.get());
        EngineError { message, ..e }
    }

    fn handle(&self, e: Event) -> Result<&RawEvent, EngineError> {
        self.events.get(e.0 as usize).ok_or_else(|| EngineError::internal("an event of another device"))
    }

    /// The connection, for a collective.
    fn peers(&self) -> Result<&Peers, EngineError> {
        self.peers.as_ref().ok_or_else(|| EngineError::internal("a collective of a device without peers"))
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if let Some(peers) = &self.peers {
            peers.before_close();
        }
        // What is freed next must no longer be in use, on any stream.
        if self.context.enter().is_ok() {
            for s in &self.streams {
                let _ = s.synchronize("close");
            }
        }
    }
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        format!("cuda:{}", self.info.ordinal)
    }
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn alloc(&mut self, bytes: u64, what: &str) -> Result<DevBuf, EngineError> {
        self.enter()?;
        let name = self.name();
        self.arena.alloc(bytes, &name, what)
    }
    fn reserve(&mut self, bytes: u64) -> Result<(), EngineError> {
        self.enter()?;
        let name = self.name();
        self.arena.reserve(bytes, &name)
    }
    fn allocated(&self) -> u64 {
        self.arena.used()
    }
    fn register_store(&mut self, store: &Arc<Store>) -> Result<(), EngineError> {
        self.enter()?;
        self.registration(store).map(|_| ())
    }
    fn page_updater(&mut self, store: &Arc<Store>) -> Result<Option<Box<dyn PageUpdater>>, EngineError> {
        self.enter()?;
        updater::open(self, store)
    }
    fn gradient_reader(&mut self, format: GradientFormat, page_parameters: u64) -> Result<Box<dyn GradientReader>, EngineError> {
        self.enter()?;
        reader::open(self, format, page_parameters)
    }
    fn event(&mut self) -> Result<Event, EngineError> {
        self.enter()?;
        self.events.push(RawEvent::new()?);
        Ok(Event(self.events.len() as u32 - 1))
    }
    fn record(&self, event: Event, stream: Stream) -> Result<(), EngineError> {
        self.enter()?;
        self.handle(event)?.record(self.stream(stream)).map_err(|e| self.explain(e, "record"))
    }
    fn wait(&self, stream: Stream, event: Event) -> Result<(), EngineError> {
        self.enter()?;
        let event = self.handle(event)?;
        cu!("wait", cuStreamWaitEvent(self.stream(stream).0, event.0, 0)).map_err(|e| self.explain(e, "wait"))
    }
    fn is_done(&self, event: Event) -> Result<bool, EngineError> {
        self.enter()?;
        Ok(self.handle(event)?.done())
    }
    fn synchronize_event(&self, event: Event) -> Result<(), EngineError> {
        self.enter()?;
        self.handle(event)?.synchronize().map_err(|e| self.explain(e, "synchronize_event"))
    }
    fn synchronize(&self, stream: Stream) -> Result<(), EngineError> {
        self.enter()?;
        self.stream(stream).synchronize("stream").map_err(|e| self.explain(e, "synchronize"))
    }
    fn keep_work(&self, work: &mut dyn FnMut() -> Result<(), EngineError>) -> Result<Option<KeptWork>, EngineError> {
        self.enter()?;
        if self.synchronous {
            return Ok(None); // each operation is waited for
        }
        match Recording::of(self.stream(Stream::Compute), work) {
            Ok(recording) => {
                let mut all = self.recordings.borrow_mut();
                all.push(recording);
                Ok(Some(KeptWork(all.len() as u32 - 1)))
            }
            Err(e) => {
                // It can be enqueued piece by piece; where the GPU is at fault, that will say so.
                tracing::warn!("{}: work is not kept, and enqueued each time: {}", self.name(), self.explain(e, "keep_work"));
                Ok(None)
            }
        }
    }
    fn again(&self, kept: KeptWork) -> Result<(), EngineError> {
        self.compute("again", || {
            let all = self.recordings.borrow();
            let recording = all.get(kept.0 as usize).ok_or_else(|| EngineError::internal("work of another device"))?;
            recording.launch(self.stream(Stream::Compute))
        })
    }
    fn observe(&mut self, recorder: &Arc<Recorder>) {
        self.timing.get_mut().observe(recorder);
    }
    fn anchor(&self) -> Result<(), EngineError> {
        self.enter()?;
        self.timing.borrow_mut().anchor(self.stream(Stream::CopyOut)).map_err(|e| self.explain(e, "anchor"))
    }
    fn begin(&self, stream: Stream, label: &Label) -> Result<Stretch, EngineError> {
        self.enter()?;
        self.timing.borrow_mut().begin(self.stream(stream), stream.row(), label).map_err(|e| self.explain(e, label.name))
    }
    fn end(&self, stream: Stream, stretch: Stretch) -> Result<(), EngineError> {
        self.enter()?;
        self.timing.borrow_mut().end(self.stream(stream), stretch).map_err(|e| self.explain(e, "end of a stretch"))
    }
    fn resolve(&self) -> Result<Waits, EngineError> {
        self.enter()?;
        self.timing.borrow_mut().resolve().map_err(|e| self.explain(e, "resolve"))
    }

    fn upload(&self, stream: Stream, dst: DevBuf, data: &[u8]) -> Result<(), EngineError> {
        self.operation("upload", stream, || copies::upload(self, stream, dst, data))
    }
    fn download(&self, stream: Stream, src: DevBuf, out: &mut [u8]) -> Result<(), EngineError> {
        self.operation("download", stream, || copies::download(self, stream, src, out))
    }
    fn read(&self, stream: Stream, src: DevBuf, look: &mut dyn FnMut(&[u8])) -> Result<(), EngineError> {
        self.operation("read", stream, || copies::read(self, stream, src, look))
    }
    fn copy(&self, stream: Stream, dst: DevBuf, src: DevBuf) -> Result<(), EngineError> {
        let bytes = src.bytes.min(dst.bytes) as usize;
        self.operation("copy", stream, || cu!("copy", cuMemcpyDtoDAsync_v2(dst.ptr, src.ptr, bytes, self.stream(stream).0)))
    }
    fn zero(&self, stream: Stream, dst: DevBuf) -> Result<(), EngineError> {
        self.operation("zero", stream, || cu!("zero", cuMemsetD8Async(dst.ptr, 0, dst.bytes as usize, self.stream(stream).0)))
    }
    fn load_parameters(
        &self,
        stream: Stream,
        dst: DevBuf,
        store: &Arc<Store>,
        physical: u32,
        offset: u64,
        count: u64,
    ) -> Result<(), EngineError> {
        self.operation("load_parameters", stream, || copies::load_parameters(self, stream, dst, store, physical, offset, count))
    }
    fn load_state(
        &self,
        stream: Stream,
        dst: DevBuf,
        store: &Arc<Store>,
        physical: u32,
        offset: u64,
        count: u64,
    ) -> Result<(), EngineError> {
        self.operation("load_state", stream, || copies::load_state(self, stream, dst, store, physical, offset, count))
    }
    fn store_gradients(
        &self,
        stream: Stream,
        src: DevBuf,
        store: &Arc<Store>,
        at: u64,
        count: u64,
        accumulate: bool,
    ) -> Result<(), EngineError> {
        self.operation("store_gradients", stream, || copies::store_gradients(self, stream, src, store, at, count, accumulate))
    }
    fn store_packed_gradients(&self, stream: Stream, src: DevBuf, store: &Arc<Store>, at: u64, count: u64) -> Result<(), EngineError> {
        self.operation("store_packed_gradients", stream, || copies::store_packed_gradients(self, stream, src, store, at, count))
    }
    fn join_gang(&mut self, gang: &Arc<dyn Gang>) -> Result<(), EngineError> {
        self.enter()?;
        self.peers = Some(Peers::connect(gang).map_err(|e| self.explain(e, "join_gang"))?);
        // The first collectives set their links up: here a failure says what it is, and no step waits for it.
        let bytes = gang.ranks().world as u64 * ramtorch_store::SHARE_ALIGN * 4;
        let memory = Memory::new(bytes, "peers")?;
        let buf = DevBuf { ptr: memory.ptr, bytes };
        self.zero(Stream::Peers, buf)?;
        self.all_gather(buf.slice(0, bytes / 4 * self.dtype.size()))?;
        self.reduce_scatter(buf, Dtype::F32)?;
        self.synchronize(Stream::Peers)
    }
    fn all_gather(&self, buf: DevBuf) -> Result<(), EngineError> {
        let (peers, stream) = (self.peers()?, self.stream(Stream::Peers));
        self.operation("all_gather", Stream::Peers, || peers.all_gather(buf, self.dtype, stream))
    }
    fn reduce_scatter(&self, buf: DevBuf, dtype: Dtype) -> Result<(), EngineError> {
        let (peers, stream) = (self.peers()?, self.stream(Stream::Peers));
        self.operation("reduce_scatter", Stream::Peers, || peers.reduce_scatter(buf, dtype, stream))
    }

    fn gemm(&self, g: &Gemm) -> Result<(), EngineError> {
        self.compute("gemm", || ops::gemm(self, g))
    }
    fn sum_of_squares(&self, x: DevBuf, dtype: Dtype, count: usize, out: DevBuf) -> Result<(), EngineError> {
        self.compute("sum_of_squares", || ops::sum_of_squares(self, x, dtype, count, out))
    }
    fn column_sum(&self, x: DevBuf, rows: usize, n: usize, out: DevBuf) -> Result<(), EngineError> {
        self.compute("column_sum", || ops::column_sum(self, x, rows, n, out))
    }
    fn norm_forward(
        &self,
        s: &NormShape,
        x: DevBuf,
        weight: DevBuf,
        bias: Option<DevBuf>,
        y: DevBuf,
        stats: DevBuf,
    ) -> Result<(), EngineError> {
        self.compute("norm_forward", || ops::norm_forward(self, s, x, weight, bias, y, stats))
    }
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
    ) -> Result<(), EngineError> {
        self.compute("norm_backward", || ops::norm_backward(self, s, &ops::NormBackward { dy, x, weight, stats, add, dx, dweight, dbias }))
    }
    fn rope(&self, s: &RopeShape, x: DevBuf) -> Result<(), EngineError> {
        self.compute("rope", || ops::rope(self, s, x))
    }
    fn attention_forward(&self, s: &AttentionShape, qkv: DevBuf, out: DevBuf, lse: DevBuf) -> Result<(), EngineError> {
        self.compute("attention_forward", || attention::forward(self, s, qkv, out, lse))
    }
    fn attention_backward(
        &self,
        s: &AttentionShape,
        dout: DevBuf,
        qkv: DevBuf,
        out: DevBuf,
        lse: DevBuf,
        dqkv: DevBuf,
        workspace: DevBuf,
    ) -> Result<(), EngineError> {
        self.compute("attention_backward", || attention::backward(self, s, &attention::Backward { dout, qkv, out, lse, dqkv, workspace }))
    }
    fn attention_workspace(&self, s: &AttentionShape) -> Result<u64, EngineError> {
        self.enter()?;
        attention::workspace(self, s)
    }
    fn attention_cached(
        &self,
        s: &CachedAttentionShape,
        qkv: DevBuf,
        keys: DevBuf,
        values: DevBuf,
        past: DevBuf,
        out: DevBuf,
    ) -> Result<(), EngineError> {
        self.compute("attention_cached", || attention::cached(self, s, qkv, keys, values, past, out))
    }
    fn glu_forward(&self, act: ActivationKind, x: DevBuf, rows: usize, n: usize, h: DevBuf) -> Result<(), EngineError> {
        self.compute("glu_forward", || ops::glu_forward(self, act, x, rows, n, h))
    }
    fn glu_backward(&self, act: ActivationKind, dh: DevBuf, x: DevBuf, rows: usize, n: usize, dx: DevBuf) -> Result<(), EngineError> {
        self.compute("glu_backward", || ops::glu_backward(self, act, dh, x, rows, n, dx))
    }
    fn activation_forward(&self, act: ActivationKind, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
        self.compute("activation_forward", || ops::activation_forward(self, act, x, count, y))
    }
    fn activation_backward(&self, act: ActivationKind, dy: DevBuf, x: DevBuf, count: usize, dx: DevBuf) -> Result<(), EngineError> {
        self.compute("activation_backward", || ops::activation_backward(self, act, dy, x, count, dx))
    }
    fn embedding_forward(
        &self,
        t: &TokenIndex,
        table: DevBuf,
        width: usize,
        position_table: Option<DevBuf>,
        seq: usize,
        positions: Option<DevBuf>,
        x: DevBuf,
    ) -> Result<(), EngineError> {
        self.compute("embedding_forward", || ops::embedding_forward(self, t, table, width, position_table, seq, positions, x))
    }
    fn embedding_backward(
        &self,
        t: &TokenIndex,
        dx: DevBuf,
        width: usize,
        dtable: DevBuf,
        dpositions: Option<DevBuf>,
        seq: usize,
    ) -> Result<(), EngineError> {
        self.compute("embedding_backward", || ops::embedding_backward(self, t, dx, width, dtable, dpositions, seq))
    }
    fn cross_entropy(
        &self,
        logits: DevBuf,
        rows: usize,
        classes: usize,
        targets: DevBuf,
        weights: DevBuf,
        out: &LossOut,
    ) -> Result<(), EngineError> {
        self.compute("cross_entropy", || ops::cross_entropy(self, logits, rows, classes, targets, weights, out))
    }
    fn squared_error(&self, x: DevBuf, rows: usize, n: usize, targets: DevBuf, weights: DevBuf, out: &LossOut) -> Result<(), EngineError> {
        self.compute("squared_error", || ops::squared_error(self, x, rows, n, targets, weights, out))
    }
    fn gather_rows(&self, x: DevBuf, width: usize, rows: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
        self.compute("gather_rows", || ops::gather_rows(self, x, width, rows, count, y))
    }
    fn add(&self, x: DevBuf, y: DevBuf, count: usize) -> Result<(), EngineError> {
        self.compute("add", || ops::add(self, x, y, count))
    }
    fn to_f32(&self, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
        self.compute("to_f32", || ops::to_f32(self, x, count, y))
    }
    fn from_f32(&self, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
        self.compute("from_f32", || ops::from_f32(self, x, count, y))
    }
}
