//! Collectives between the GPUs of a gang, over NCCL.
//!
//! ```text
//!   rank 0 makes an id ─► Gang::broadcast ─► every rank begins to connect (does not block) ─► connected
//!   connected: all_gather, reduce_scatter: enqueued on the device's stream to peers, in one order on every rank
//!       │  a watcher looks every few milliseconds: has this rank given up? does NCCL report an error?
//!       └─► over: the rank gives up (first!), then the communicator is aborted: what waits for peers on the device ends,
//!                 its results worthless, and every later collective is an error
//! ```
//! A peer that dies makes no error by itself: NCCL's kernels wait for it. Whoever is told of it calls [`Gang::abort`] (or ends
//! the process). The communicator is behind a lock that is never held while something is waited for, so that the watcher gets
//! it at any time.

mod nccl;

use crate::driver::RawStream;
use nccl::{Api, ID_BYTES, IN_PROGRESS, SUCCESS};
use ramtorch_device::{DevBuf, Dtype, EngineError, ErrorKind, Gang, Ranks, check_shares};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time in which all ranks have to connect: peers that start slowly load kernels meanwhile.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// Time in which a collective has to be enqueued; the first ones set up their links.
const ENQUEUE_LIMIT: Duration = Duration::from_secs(30);
/// How often the watcher looks.
const WATCH: Duration = Duration::from_millis(10);

/// Where NCCL writes the communicator, during and after the call that begins to connect.
struct Cell(UnsafeCell<cudarc::nccl::sys::ncclComm_t>);

/// A communicator that is alive, or why there is none any more.
enum State {
    Alive(Box<Cell>),
    Over(String),
}

// SAFETY: the cell is read and the communicator used under the lock alone; NCCL's own thread writes the cell once, before the
// communicator tells that it is connected, and the value is the one that is in it already.
unsafe impl Send for State {}

struct Shared {
    api: &'static Api,
    state: Mutex<State>,
    gang: Arc<dyn Gang>,
    closing: AtomicBool,
}

/// See the module.
pub(crate) struct Peers {
    shared: Arc<Shared>,
    ranks: Ranks,
    watcher: Option<JoinHandle<()>>,
}

impl Cell {
    fn get(&self) -> cudarc::nccl::sys::ncclComm_t {
        // SAFETY: NCCL may store the same pointer once more meanwhile, from its thread; a whole, aligned word.
        unsafe { std::ptr::read_volatile(self.0.get()) }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the communicator says of itself.
    fn ask(&self) -> Result<u32, EngineError> {
        match &*self.lock() {
            // SAFETY: alive, and under the lock.
            State::Alive(cell) => Ok(unsafe { self.api.state(cell.get()) }),
            State::Over(why) => Err(over(why)),
        }
    }

    /// Waits until what was begun is done.
    fn settle(&self, what: &str, mut status: u32, limit: Duration) -> Result<(), EngineError> {
        let begin = Instant::now();
        let mut tries = 0u32;
        loop {
            match status {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                other => {
                    let e = match &*self.lock() {
                        State::Alive(cell) => self.api.error(what, other, cell.get()),
                        State::Over(why) => over(why),
                    };
                    self.end(&e.message);
                    return Err(e);
                }
            }
            if self.gang.aborted() {
                self.end("this rank has given up");
                return Err(over("this rank has given up"));
            }
            if begin.elapsed() > limit {
                let text = format!("{what}: the other ranks did not come within {} s", limit.as_secs());
                self.end(&text);
                return Err(EngineError::internal(text));
            }
            tries += 1;
            if tries < 200 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
            status = self.ask()?;
        }
    }

    /// Gives up: the rank first, so that nobody takes what is on the device for results; then the communicator.
    fn end(&self, why: &str) {
        self.gang.abort();
        let mut state = self.lock();
        if let State::Alive(cell) = std::mem::replace(&mut *state, State::Over(why.to_owned())) {
            let comm = cell.get();
            if !comm.is_null() {
                // SAFETY: alive until here, under the lock, and not used again.
                unsafe { self.api.abort(comm) };
            }
            // NCCL's thread has ended with the communicator: nobody writes to the cell any more.
            drop(cell);
        }
    }

    fn watch(&self) {
        while !self.closing.load(Ordering::Acquire) {
            if self.gang.aborted() {
                return self.end("this rank has given up");
            }
            match self.ask() {
                Ok(SUCCESS | IN_PROGRESS) => {}
                Ok(status) => {
                    let why = self.api.error("NCCL", status, std::ptr::null_mut()).message;
                    tracing::error!("the connection to the other GPUs is lost: {why}");
                    return self.end(&why);
                }
                Err(_) => return,
            }
            std::thread::park_timeout(WATCH);
        }
    }
}

fn over(why: &str) -> EngineError {
    EngineError::internal(format!("the connection to the other GPUs is given up: {why}"))
}

/// Whether these GPUs, by ordinal, have what they need to work on one job. Long before they connect: loading a job's weights
/// takes minutes.
///
/// # Errors
/// There are several, and NCCL is missing or too old (the message says where it was looked for).
pub fn check_peers(gpus: &[u32]) -> Result<(), EngineError> {
    if gpus.len() < 2 { Ok(()) } else { nccl::api().map(drop) }
}

impl Peers {
    /// Connects with the other ranks of `gang`, all of which do the same now. The device's context is current.
    ///
    /// # Errors
    /// NCCL is missing or too old, or refuses, or the others do not come in time.
    pub(crate) fn connect(gang: &Arc<dyn Gang>) -> Result<Peers, EngineError> {
        let (api, ranks) = (nccl::api()?, gang.ranks());
        let mut id = [0; ID_BYTES];
        if ranks.rank == 0 {
            id = api.unique_id()?;
        }
        gang.broadcast(&mut id)?;
        let cell = Box::new(Cell(UnsafeCell::new(std::ptr::null_mut())));
        // SAFETY: the cell is kept until the communicator is aborted (`Shared::end`), or for ever where there is none.
        let status = unsafe { api.init(cell.0.get(), &id, ranks.rank, ranks.world) };
        if cell.get().is_null() {
            // Nothing that could be asked or aborted; NCCL may still know the cell.
            let e = api.error("ncclCommInitRankConfig", status, std::ptr::null_mut());
            Box::leak(cell);
            return Err(e);
        }
        let shared = Arc::new(Shared { api, state: Mutex::new(State::Alive(cell)), gang: gang.clone(), closing: AtomicBool::new(false) });
        shared.settle("ncclCommInitRankConfig", status, CONNECT_LIMIT)?;
        let watched = shared.clone();
        let watcher = std::thread::Builder::new().name(format!("peers{}", ranks.rank)).spawn(move || watched.watch());
        let watcher = match watcher {
            Ok(w) => w,
            Err(e) => {
                shared.end("no watcher");
                return Err(EngineError::new(ErrorKind::Resources, format!("cannot start a thread: {e}")));
            }
        };
        tracing::info!("rank {} of {} is connected with the other GPUs", ranks.rank, ranks.world);
        Ok(Peers { shared, ranks, watcher: Some(watcher) })
    }

    /// Enqueues a collective over the shares in `buf`.
    fn enqueue(
        &self,
        what: &str,
        buf: DevBuf,
        dtype: Dtype,
        f: impl FnOnce(cudarc::nccl::sys::ncclComm_t, u64) -> u32,
    ) -> Result<(), EngineError> {
        check_shares(self.ranks, buf.bytes, dtype)?;
        let share = buf.bytes / dtype.size() / self.ranks.world as u64;
        let status = match &*self.shared.lock() {
            State::Alive(cell) => f(cell.get(), share),
            State::Over(why) => return Err(over(why)),
        };
        self.shared.settle(what, status, ENQUEUE_LIMIT)
    }

    /// See [`ramtorch_device::Device::all_gather`].
    pub(crate) fn all_gather(&self, buf: DevBuf, dtype: Dtype, stream: &RawStream) -> Result<(), EngineError> {
        let (api, rank) = (self.shared.api, self.ranks.rank);
        self.enqueue("ncclAllGather", buf, dtype, |comm, share| {
            // SAFETY: alive and under the lock; the buffer holds all shares (checked) and lives as long as the device.
            unsafe { api.all_gather(comm, buf.ptr, rank, share, dtype, stream.0.cast()) }
        })
    }

    /// See [`ramtorch_device::Device::reduce_scatter`].
    pub(crate) fn reduce_scatter(&self, buf: DevBuf, dtype: Dtype, stream: &RawStream) -> Result<(), EngineError> {
        let (api, rank) = (self.shared.api, self.ranks.rank);
        self.enqueue("ncclReduceScatter", buf, dtype, |comm, share| {
            // SAFETY: as in `all_gather`.
            unsafe { api.reduce_scatter(comm, buf.ptr, rank, share, dtype, stream.0.cast()) }
        })
    }

    /// Before the device's streams are waited for, for the last time: nothing on them may wait for peers that do not come.
    pub(crate) fn before_close(&self) {
        if self.shared.gang.aborted() {
            self.shared.end("this rank has given up");
        }
    }
}

impl Drop for Peers {
    /// The device's streams are empty: there is nothing to wait for, and no peer is asked.
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        if let Some(w) = self.watcher.take() {
            w.thread().unpark();
            let _ = w.join();
        }
        let mut state = self.shared.lock();
        if let State::Alive(cell) = std::mem::replace(&mut *state, State::Over("closed".into())) {
            // SAFETY: alive, under the lock, and not used again.
            unsafe { self.shared.api.abort(cell.get()) };
        }
    }
}
