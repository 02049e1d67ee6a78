//! Streams and events of the CPU device.
//!
//! ```text
//!   enqueue ──► [ queue ] ──► one thread, in order ──► done
//!   event:  recorded n times (host) ──► completed up to n (stream thread) ──► waiters go on
//! ```
//! A stream is a queue with one thread. The compute stream's thread belongs to the rayon pool that operations use,
//! so that an operation starts without crossing threads.

use crate::pauses::Pauses;
use ramtorch_device::EngineError;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::Duration;

/// How late work begins at most, where it is to be late.
const LATE: Duration = Duration::from_millis(2);

type Job = Box<dyn FnOnce() + Send>;

/// First failure on any stream of a device; everything enqueued later is dropped.
#[derive(Default)]
pub(crate) struct Failure {
    set: AtomicBool,
    text: Mutex<String>,
}

impl Failure {
    fn put(&self, text: String) {
        let mut slot = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_empty() {
            *slot = text;
        }
        self.set.store(true, Ordering::Release);
    }

    pub(crate) fn check(&self) -> Result<(), EngineError> {
        if self.set.load(Ordering::Acquire) {
            let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
            return Err(EngineError::internal(format!("an operation of the CPU device failed: {text}")));
        }
        Ok(())
    }
}

/// How often an event was recorded, and how often that was reached.
pub(crate) struct EventState {
    recorded: AtomicU64,
    completed: Mutex<u64>,
    changed: Condvar,
}

impl EventState {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(EventState { recorded: AtomicU64::new(0), completed: Mutex::new(0), changed: Condvar::new() })
    }

    /// Number of the new recording.
    fn begin(&self) -> u64 {
        self.recorded.fetch_add(1, Ordering::AcqRel) + 1
    }

    fn complete(&self, n: u64) {
        let mut done = self.completed.lock().unwrap_or_else(PoisonError::into_inner);
        *done = (*done).max(n);
        self.changed.notify_all();
    }

    fn latest(&self) -> u64 {
        self.recorded.load(Ordering::Acquire)
    }

    fn wait_for(&self, n: u64) {
        let mut done = self.completed.lock().unwrap_or_else(PoisonError::into_inner);
        while *done < n {
            done = self.changed.wait(done).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the latest recording was reached.
    pub(crate) fn is_done(&self) -> bool {
        *self.completed.lock().unwrap_or_else(PoisonError::into_inner) >= self.latest()
    }

    pub(crate) fn wait_latest(&self) {
        self.wait_for(self.latest());
    }
}

/// An in-order queue with one thread.
pub(crate) struct Queue {
    jobs: Option<mpsc::Sender<Job>>,
    drained: Arc<EventState>,
    failure: Arc<Failure>,
    pauses: Arc<Pauses>,
}

impl Queue {
    /// A queue whose loop is started by `spawn` on a thread of its choice.
    pub(crate) fn new(failure: Arc<Failure>, spawn: impl FnOnce(Job)) -> Self {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let drained = EventState::new();
        let (end, failed) = (drained.clone(), failure.clone());
        let last = end.begin();
        spawn(Box::new(move || {
            for job in inbox {
                // Events must be completed even after a failure, or waiters would hang: jobs guard themselves.
                if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(job)) {
                    let text = panic
                        .downcast_ref::<String>()
                        .cloned()
                        .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()))
                        .unwrap_or_else(|| "unknown panic".into());
                    failed.put(text);
                }
            }
            end.complete(last);
        }));
        Queue { jobs: Some(jobs), drained, failure, pauses: Arc::new(Pauses::of(0)) }
    }

    fn push(&self, job: Job) -> Result<(), EngineError> {
        let gone = || EngineError::internal("the CPU device's stream has ended");
        self.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())
    }

    /// Has work begin late at times from now on.
    pub(crate) fn be_late(&self, seed: u64) {
        self.pauses.begin(seed);
    }

    /// Enqueues work; dropped without running once anything has failed.
    pub(crate) fn run(&self, work: impl FnOnce() + Send + 'static) -> Result<(), EngineError> {
        self.failure.check()?;
        let (failure, pauses) = (self.failure.clone(), self.pauses.clone());
        self.push(Box::new(move || {
            pauses.pause(16, LATE);
            if !failure.set.load(Ordering::Acquire) {
                work();
            }
        }))
    }

    pub(crate) fn record(&self, event: &Arc<EventState>) -> Result<(), EngineError> {
        let (event, n) = (event.clone(), event.begin());
        self.push(Box::new(move || event.complete(n)))
    }

    pub(crate) fn wait(&self, event: &Arc<EventState>) -> Result<(), EngineError> {
        let (event, n) = (event.clone(), event.latest());
        self.push(Box::new(move || event.wait_for(n)))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.jobs = None; // ends the loop once the queue is empty
        self.drained.wait_latest();
    }
}
