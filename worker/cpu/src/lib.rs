//! The CPU device: threads, a memory budget of its own, and the reference of every operation.
//!
//! Streams run on threads of their own and events order them, as on a GPU, so schedules, budgets and refusals are
//! tested on any machine. The compute stream's thread belongs to a rayon pool over which operations spread. The
//! result of an operation depends on its input and on the instruction set, not on the number of threads.

mod adamw;
mod attention;
mod collectives;
mod early;
mod embedding;
mod gemm;
mod loss;
mod memory;
mod norm;
mod pages;
mod parameters;
mod pauses;
mod pointwise;
mod reader;
mod simd;
mod stream;
mod timing;
mod updater;

pub use adamw::{adamw_page, adamw_page_at, sum_of_squares, sum_of_squares_bf16};
pub use collectives::{Channel, Collectives, MAX_RANKS, read_gradient_range, read_gradients};
pub use early::{keeps_weights, kept_weights, update_page_early};
use memory::{Arena, Bf16, view, view_mut};
pub use pages::{Kept, PagesUpdated, replay_page, update_pages, update_pages_recorded, write_back};
pub use pauses::Pauses;
use ramtorch_device::trace::{Label, Recorder, Waits};
use ramtorch_device::*;
use ramtorch_store::{GradientFormat, Store};
pub use simd::Level;
use std::sync::Arc;
use stream::{EventState, Failure, Queue};

/// A CPU device. Field order matters: the queues drain before the arena is freed.
pub struct CpuDevice {
    index: u32,
    dtype: Dtype,
    queues: [Queue; 4],
    gang: Option<Arc<dyn Gang>>,
    events: Vec<Arc<EventState>>,
    timing: timing::Timing,
    failure: Arc<Failure>,
    arena: Arena,
}

impl CpuDevice {
    /// Device number `index` with `threads` threads for arithmetic and a budget of `memory_bytes`.
    pub fn open(index: u32, dtype: Dtype, threads: usize, memory_bytes: u64) -> Result<CpuDevice, EngineError> {
        let start = |e: &dyn std::fmt::Display| EngineError::new(ErrorKind::Resources, format!("cpu:{index}: cannot start threads: {e}"));
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(move |i| format!("cpu{index}-{i}"))
            .stack_size(4 << 20)
            .build()
            .map_err(|e| start(&e))?;
        let failure = Arc::new(Failure::default());
        let compute = Queue::new(failure.clone(), |run| pool.spawn(run));
        let mut failed = None;
        let mut copier = |name: &str| {
            let name = format!("cpu{index}-{name}");
            Queue::new(failure.clone(), |run| {
                if let Err(e) = std::thread::Builder::new().name(name).spawn(run) {
                    failed = Some(start(&e));
                }
            })
        };
        let (copy_in, copy_out, peers) = (copier("in"), copier("out"), copier("peers"));
        if let Some(e) = failed {
            // The queue without a thread would wait for ever: leave it, the process is about to end.
            std::mem::forget((copy_in, copy_out, peers));
            return Err(e);
        }
        Ok(CpuDevice {
            index,
            dtype,
            queues: [compute, copy_in, copy_out, peers],
            gang: None,
            events: Vec::new(),
            timing: Default::default(),
            failure,
            arena: Arena::new(memory_bytes),
        })
    }

    /// For tests: has each stream's work begin late at times, as `seed` has it, so that what one stream does not wait for on another
    /// shows.
    pub fn be_late(&self, seed: u64) {
        (1..).zip(&self.queues).for_each(|(i, queue)| queue.be_late(seed.wrapping_mul(i)));
    }

    fn queue(&self, s: Stream) -> &Queue {
        &self.queues[s.index()]
    }

    /// The gang, for collectives on `buf`.
    fn gang(&self, buf: DevBuf, dtype: Dtype) -> Result<Arc<dyn Gang>, EngineError> {
        let gang = self.gang.clone().ok_or_else(|| EngineError::internal("a collective of a device without peers"))?;
        check_shares(gang.ranks(), buf.bytes, dtype)?;
        Ok(gang)
    }

    fn state(&self, e: Event) -> Result<&Arc<EventState>, EngineError> {
        self.events.get(e.0 as usize).ok_or_else(|| EngineError::internal("an event of another device"))
    }
}

/// Enqueues `$f::<T>(…)` on the compute stream for the device's format.
macro_rules! compute {
    ($self:ident, $f:path, $($a:expr),* $(,)?) => {{
        let dtype = $self.dtype;
        $self.queues[0].run(move || { use $f as f; match dtype { Dtype::F32 => f::<f32>($($a),*), Dtype::Bf16 => f::<Bf16>($($a),*) } })
    }};
}

impl Device for CpuDevice {
    fn name(&self) -> String {
        format!("cpu:{}", self.index)
    }
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn alloc(&mut self, bytes: u64, what: &str) -> Result<DevBuf, EngineError> {
        let name = self.name();
        self.arena.alloc(bytes, &name, what)
    }
    fn allocated(&self) -> u64 {
        self.arena.used()
    }
    fn register_store(&mut self, _store: &Arc<Store>) -> Result<(), EngineError> {
        Ok(()) // mapped memory is reachable as it is
    }
    fn page_updater(&mut self, store: &Arc<Store>) -> Result<Option<Box<dyn PageUpdater>>, EngineError> {
        Ok(Some(Box::new(updater::Updater::new(self.index, store, self.timing.recorder())?)))
    }
    fn gradient_reader(&mut self, format: GradientFormat, page_parameters: u64) -> Result<Box<dyn GradientReader>, EngineError> {
        Ok(Box::new(reader::Reader::new(self.index, format, page_parameters, self.timing.recorder())?))
    }
    fn event(&mut self) -> Result<Event, EngineError> {
        self.events.push(EventState::new());
        Ok(Event(self.events.len() as u32 - 1))
    }
    fn record(&self, event: Event, stream: Stream) -> Result<(), EngineError> {
        self.queue(stream).record(self.state(event)?)
    }
    fn wait(&self, stream: Stream, event: Event) -> Result<(), EngineError> {
        self.queue(stream).wait(self.state(event)?)
    }
    fn is_done(&self, event: Event) -> Result<bool, EngineError> {
        Ok(self.state(event)?.is_done())
    }
    fn synchronize_event(&self, event: Event) -> Result<(), EngineError> {
        self.state(event)?.wait_latest();
        self.failure.check()
    }
    fn synchronize(&self, stream: Stream) -> Result<(), EngineError> {
        let done = EventState::new();
        self.queue(stream).record(&done)?;
        done.wait_latest();
        self.failure.check()
    }
    fn observe(&mut self, recorder: &Arc<Recorder>) {
        self.timing.observe(recorder);
    }
    fn anchor(&self) -> Result<(), EngineError> {
        Ok(()) // its clock is the host's
    }
    fn begin(&self, stream: Stream, label: &Label) -> Result<Stretch, EngineError> {
        self.timing.begin(self.queue(stream), stream.row(), label)
    }
    fn end(&self, stream: Stream, stretch: Stretch) -> Result<(), EngineError> {
        self.timing.end(self.queue(stream), stretch)
    }
    fn resolve(&self) -> Result<Waits, EngineError> {
        Ok(self.timing.take_waits())
    }

    fn upload(&self, stream: Stream, dst: DevBuf, data: &[u8]) -> Result<(), EngineError> {
        let data = data.to_vec();
        // SAFETY: stream order (memory::view).
        self.queue(stream).run(move || unsafe { view_mut::<u8>(dst, data.len()) }.copy_from_slice(&data))
    }
    fn download(&self, stream: Stream, src: DevBuf, out: &mut [u8]) -> Result<(), EngineError> {
        self.synchronize(stream)?;
        // SAFETY: everything on the stream is done, and the engine enqueues no writer meanwhile.
        out.copy_from_slice(unsafe { view::<u8>(src, out.len()) });
        Ok(())
    }
    fn copy(&self, stream: Stream, dst: DevBuf, src: DevBuf) -> Result<(), EngineError> {
        let n = src.bytes.min(dst.bytes) as usize;
        // SAFETY: stream order; the engine copies between different buffers.
        self.queue(stream).run(move || unsafe { view_mut::<u8>(dst, n).copy_from_slice(view::<u8>(src, n)) })
    }
    fn zero(&self, stream: Stream, dst: DevBuf) -> Result<(), EngineError> {
        // SAFETY: stream order.
        self.queue(stream).run(move || unsafe { view_mut::<u8>(dst, dst.bytes as usize) }.fill(0))
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
        check_load(store, dst, offset, count, self.dtype.size(), "load of parameters")?;
        let (store, dtype) = (store.clone(), self.dtype);
        self.queue(stream).run(move || parameters::load(dst, dtype, &store, physical, offset, count))
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
        check_load(store, dst, offset, count, state_bytes(store.layout().spec()), "load of state")?;
        let store = store.clone();
        self.queue(stream).run(move || parameters::load_state(dst, &store, physical, offset, count))
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
        check_gradients(store, src, at, count, 4)?;
        let store = store.clone();
        self.queue(stream).run(move || parameters::store_gradients(src, &store, at, count, accumulate))
    }
    fn store_packed_gradients(&self, stream: Stream, src: DevBuf, store: &Arc<Store>, at: u64, count: u64) -> Result<(), EngineError> {
        check_gradients(store, src, at, count, store.layout().spec().gradients.bytes())?;
        let store = store.clone();
        self.queue(stream).run(move || parameters::store_packed_gradients(src, &store, at, count))
    }
    fn join_gang(&mut self, gang: &Arc<dyn Gang>) -> Result<(), EngineError> {
        self.gang = Some(gang.clone());
        Ok(())
    }
    fn all_gather(&self, buf: DevBuf) -> Result<(), EngineError> {
        let gang = self.gang(buf, self.dtype)?;
        self.queue(Stream::Peers).run(move || {
            // An error means that the rank has given up: nothing of this step is used.
            // SAFETY: stream order.
            let _ = gang.all_gather(unsafe { view_mut::<u8>(buf, buf.bytes as usize) });
        })
    }
    fn reduce_scatter(&self, buf: DevBuf, dtype: Dtype) -> Result<(), EngineError> {
        let gang = self.gang(buf, dtype)?;
        let n = (buf.bytes / dtype.size()) as usize;
        self.queue(Stream::Peers).run(move || {
            // An error means that the rank has given up: its gradients are never used.
            let _ = match dtype {
                // SAFETY: stream order.
                Dtype::F32 => gang.reduce_scatter(unsafe { view_mut::<f32>(buf, n) }),
                // SAFETY: as above.
                Dtype::Bf16 => gang.reduce_scatter_bf16(unsafe { view_mut::<u16>(buf, n) }),
            };
        })
    }

    fn gemm(&self, g: &Gemm) -> Result<(), EngineError> {
        let (g, dtype) = (*g, self.dtype);
        self.queues[0].run(move || gemm::run(&g, dtype))
    }
    fn sum_of_squares(&self, x: DevBuf, dtype: Dtype, count: usize, out: DevBuf) -> Result<(), EngineError> {
        self.queues[0].run(move || pointwise::sum_of_squares(x, dtype, count, out))
    }
    fn column_sum(&self, x: DevBuf, rows: usize, n: usize, out: DevBuf) -> Result<(), EngineError> {
        compute!(self, pointwise::column_sum, x, rows, n, out)
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
        let s = *s;
        compute!(self, norm::forward, s, x, weight, bias, y, stats)
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
        let s = *s;
        compute!(self, norm::backward, s, norm::Backward { dy, x, weight, stats, add, dx, dweight, dbias })
    }
    fn rope(&self, s: &RopeShape, x: DevBuf) -> Result<(), EngineError> {
        let s = *s;
        compute!(self, pointwise::rope, s, x)
    }
    fn attention_forward(&self, s: &AttentionShape, qkv: DevBuf, out: DevBuf, lse: DevBuf) -> Result<(), EngineError> {
        let s = *s;
        compute!(self, attention::forward, s, qkv, out, lse)
    }
    fn attention_backward(
        &self,
        s: &AttentionShape,
        dout: DevBuf,
        qkv: DevBuf,
        out: DevBuf,
        lse: DevBuf,
        dqkv: DevBuf,
        _workspace: DevBuf,
    ) -> Result<(), EngineError> {
        let s = *s;
        compute!(self, attention::backward, s, dout, qkv, out, lse, dqkv)
    }
    fn attention_workspace(&self, _s: &AttentionShape) -> Result<u64, EngineError> {
        Ok(0)
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
        let s = *s;
        compute!(self, attention::cached, s, qkv, keys, values, past, out)
    }
    fn glu_forward(&self, act: ActivationKind, x: DevBuf, rows: usize, n: usize, h: DevBuf) -> Result<(), EngineError> {
        compute!(self, pointwise::glu_forward, act, x, rows, n, h)
    }
    fn glu_backward(&self, act: ActivationKind, dh: DevBuf, x: DevBuf, rows: usize, n: usize, dx: DevBuf) -> Result<(), EngineError> {
        compute!(self, pointwise::glu_backward, act, dh, x, rows, n, dx)
    }
    fn activation_forward(&self, act: ActivationKind, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
        compute!(self, pointwise::activation_forward, act, x, count, y)
    }
    fn activation_backward(&self, act: ActivationKind, dy: DevBuf, x: DevBuf, count: usize, dx: DevBuf) -> Result<(), EngineError> {
        compute!(self, pointwise::activation_backward, act, dy, x, count, dx)
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
        let t = *t;
        compute!(self, embedding::forward, t, table, width, position_table, seq, positions, x)
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
        let t = *t;
        compute!(self, embedding::backward, t, dx, width, dtable, dpositions, seq)
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
        let out = *out;
        compute!(self, loss::cross_entropy, logits, rows, classes, targets, weights, out)
    }
    fn squared_error(&self, x: DevBuf, rows: usize, n: usize, targets: DevBuf, weights: DevBuf, out: &LossOut) -> Result<(), EngineError> {
        let out = *out;
        compute!(self, loss::squared_error, x, rows, n, targets, weights, out)
    }
    fn gather_rows(&self, x: DevBuf, width: usize, rows: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
        compute!(self, pointwise::gather_rows, x, width, rows, count, y)
    }
    fn add(&self, x: DevBuf, y: DevBuf, count: usize) -> Result<(), EngineError> {
        compute!(self, pointwise::add, x, y, count)
    }
    fn to_f32(&self, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
        compute!(self, pointwise::to_f32, x, count, y)
    }
    fn from_f32(&self, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
        compute!(self, pointwise::from_f32, x, count, y)
    }
}
