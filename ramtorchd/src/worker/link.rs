//! The worker's way to its daemon: a thread with the gRPC stream, and queues that the engine never waits for.
//!
//! What the engine says is queued and sent in order. Metrics and events are kept until they are sent; progress is only
//! worth its newest state, and text of one prompt is joined. The queue is bounded, since a daemon that hangs must not
//! eat the worker's memory; what had to be left out then is counted and told.

use super::was_stopped;
use hyper_util::rt::TokioIo;
use ramtorch_proto::v1 as pb;
use ramtorch_proto::v1::worker_client::WorkerClient;
use ramtorch_proto::v1::worker_report::Report;
use ramtorch_worker::{Assignment, Command, Control, EngineError, Level, RankTrace, StepMetrics, TraceCommand};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// Time between two heartbeats.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// A new phase is told at once, but not more often than this.
const NEWS: Duration = Duration::from_millis(100);
/// Connecting and registering may take so long.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Reports that may wait to be sent.
const QUEUE_MAX: usize = 65_536;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Threads, sockets.
    #[error("cannot {what}: {detail}")]
    Connect {
        /// What was tried.
        what: &'static str,
        /// Why not.
        detail: String,
    },
    /// The daemon does not want this worker.
    #[error("the daemon refused this worker: {0}")]
    Refused(String),
    /// The assignment cannot be read.
    #[error("the assignment makes no sense: {0}")]
    Assignment(String),
}

#[derive(Default)]
struct Queue {
    step: u64,
    phase: &'static str,
    told: Option<Instant>,
    reports: VecDeque<Report>,
    progress: Option<pb::Progress>,
    left_out: u64,
    result: Option<pb::WorkerResult>,
}

struct Shared {
    queue: Mutex<Queue>,
    commands: Mutex<VecDeque<Command>>,
    wake: Notify,
}

/// A connection to the daemon.
pub struct Link {
    shared: Arc<Shared>,
    flushed: std_mpsc::Receiver<()>,
}

/// The engine's view of it.
struct LinkControl(Arc<Shared>);

impl Link {
    /// Connects and registers.
    ///
    /// # Errors
    /// The daemon is not there, or has no use for this process.
    pub fn connect(socket: PathBuf, token: String) -> Result<(Link, Assignment), LinkError> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { phase: "starting", ..Queue::default() }),
            commands: Mutex::default(),
            wake: Notify::new(),
        });
        let (registered, answer) = std_mpsc::channel();
        let (done, flushed) = std_mpsc::channel();
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name("link".into()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(e) => {
                    let _ = registered.send(Err(LinkError::Connect { what: "start a runtime", detail: e.to_string() }));
                    return;
                }
            };
            runtime.block_on(async move {
                let limit = tokio::time::timeout(CONNECT_LIMIT, register(&socket, &token)).await;
                let late = || LinkError::Connect { what: "register with the daemon", detail: "it does not answer".into() };
                let (client, assignment) = match limit.unwrap_or_else(|_| Err(late())) {
                    Ok(pair) => pair,
                    Err(e) => {
                        let _ = registered.send(Err(e));
                        return;
                    }
                };
                let _ = registered.send(Ok(assignment));
                serve(client, &token, &of_thread).await;
                let _ = done.send(());
            });
        });
        let failed = |what: &'static str| move |e: String| LinkError::Connect { what, detail: e };
        thread.map_err(|e| failed("start a thread")(e.to_string()))?;
        let assignment = answer.recv().map_err(|e| failed("hear from the link's thread")(e.to_string()))??;
        let assignment = serde_json::from_str(&assignment.json).map_err(|e| LinkError::Assignment(e.to_string()))?;
        Ok((Link { shared, flushed }, assignment))
    }

    /// For the engine.
    pub fn control(&self) -> impl Control + use<> {
        LinkControl(self.shared.clone())
    }

    /// Tells the result, after everything that was said before. `false`: the daemon had not taken it all in time.
    pub fn finish(self, result: Result<serde_json::Value, EngineError>, limit: Duration) -> bool {
        let message = match result {
            Ok(value) => pb::WorkerResult { ok: true, stopped: was_stopped(&value), json: value.to_string(), ..Default::default() },
            Err(e) => pb::WorkerResult {
                exit_code: u32::from(e.kind.exit_code()),
                // Some errors lose their code where something is added to their text; the name is still in it.
                device_code: e.device_code.or_else(|| crate::faults::table::cuda_named(&e.message)),
                error: e.message,
                ..Default::default()
            },
        };
        lock(&self.shared.queue).result = Some(message);
        self.shared.wake.notify_one();
        self.flushed.recv_timeout(limit).is_ok()
    }
}

async fn register(socket: &Path, token: &str) -> Result<(WorkerClient<Channel>, pb::Assignment), LinkError> {
    let path = socket.to_path_buf();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://ramtorchd");
    let channel = endpoint
        .connect_with_connector(connector)
        .await
        .map_err(|e| LinkError::Connect { what: "connect to the daemon", detail: format!("{}: {:?}", socket.display(), e) })?;
    let mut client = WorkerClient::new(channel)
        .max_decoding_message_size(crate::rpc::MAX_WORKER_BYTES)
        .max_encoding_message_size(crate::rpc::MAX_WORKER_BYTES);
    let pid = i32::try_from(std::process::id()).unwrap_or(0);
    let start_time_ticks = crate::process::Identity::of(pid, "").map_or(0, |i| i.start_ticks);
    let request = pb::RegisterRequest { token: token.to_string(), pid, start_time_ticks };
    let assignment = client.register(request).await.map_err(|s| LinkError::Refused(s.message().to_string()))?.into_inner();
    Ok((client, assignment))
}

/// Runs the control stream until the result is sent and heard. Losing the daemon before that ends this process.
async fn serve(mut client: WorkerClient<Channel>, token: &str, shared: &Shared) {
    let (reports, outgoing) = mpsc::channel(64);
    let mut sequence = 0;
    let first = heartbeat(shared, &mut sequence);
    let _ = reports.send(pb::WorkerReport { token: token.to_string(), report: Some(first) }).await;
    let commands = match client.control(ReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => lost(status.message()),
    };
    let mut reading = std::pin::pin!(read(commands, shared));
    let mut timer = tokio::time::interval(HEARTBEAT);
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            _ = timer.tick() => batch.push(heartbeat(shared, &mut sequence)),
            () = shared.wake.notified() => {}
            () = &mut reading => lost("the control stream ended"),
        }
        let finished = drain(shared, &mut batch);
        for report in batch {
            let message = pb::WorkerReport { token: token.to_string(), report: Some(report) };
            tokio::select! {
                sent = reports.send(message) => if sent.is_err() { lost("the control stream is broken") },
                () = &mut reading => lost("the control stream ended"),
            }
        }
        if finished {
            break;
        }
    }
    // The end of our half; the daemon ends its own when it has heard everything.
    drop(reports);
    reading.await;
}

async fn read(mut commands: Streaming<pb::Command>, shared: &Shared) {
    while let Ok(Some(message)) = commands.message().await {
        let command = match message.command {
            Some(pb::command::Command::Stop(s)) => Command::Stop { checkpoint: s.checkpoint },
            Some(pb::command::Command::Checkpoint(c)) => Command::Checkpoint { request: c.request },
            Some(pb::command::Command::Trace(t)) => {
                Command::Trace(TraceCommand { request: t.request, first_step: t.first_step, steps: t.steps })
            }
            None => continue,
        };
        lock(&shared.commands).push_back(command);
    }
}

/// Without its daemon a worker has no purpose, and somebody else may soon work on the same segment: end here and now,
/// without destructors that could hang in a driver. The segment is sound at any instant.
fn lost(why: &str) -> ! {
    eprintln!("ramtorchd worker: lost the daemon: {why}");
    let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    std::process::abort()
}

fn heartbeat(shared: &Shared, sequence: &mut u64) -> Report {
    *sequence += 1;
    let queue = lock(&shared.queue);
    Report::Heartbeat(pb::Heartbeat { step: queue.step, phase: queue.phase.to_string(), sequence: *sequence })
}

/// Takes everything that waits; whether the result was part of it.
fn drain(shared: &Shared, batch: &mut Vec<Report>) -> bool {
    let mut queue = lock(&shared.queue);
    batch.extend(queue.reports.drain(..));
    batch.extend(queue.progress.take().map(Report::Progress));
    if queue.left_out > 0 {
        let text = format!("{} reports of this worker were left out: the daemon did not take them fast enough", queue.left_out);
        queue.left_out = 0;
        batch.push(Report::Event(event("warn", &text)));
    }
    let result = queue.result.take();
    let finished = result.is_some();
    batch.extend(result.map(Report::Result));
    finished
}

fn event(level: &str, text: &str) -> pb::Event {
    pb::Event { unix_ms: crate::node::unix_ms(), level: level.into(), text: text.into(), rank: None }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LinkControl {
    fn push(&self, report: Report) {
        let mut queue = lock(&self.0.queue);
        if queue.reports.len() >= QUEUE_MAX {
            queue.left_out += 1;
        } else {
            queue.reports.push_back(report);
        }
        drop(queue);
        self.0.wake.notify_one();
    }
}

impl Control for LinkControl {
    fn heartbeat(&self, step: u64, phase: &'static str) {
        let mut queue = lock(&self.0.queue);
        let news = queue.phase != phase && queue.told.is_none_or(|at| at.elapsed() >= NEWS);
        (queue.step, queue.phase) = (step, phase);
        if news {
            queue.told = Some(Instant::now());
            queue.reports.push_back(Report::Heartbeat(pb::Heartbeat { step, phase: phase.to_string(), sequence: 0 }));
            drop(queue);
            self.0.wake.notify_one();
        }
    }

    fn metrics(&self, metrics: &StepMetrics, line: &str) {
        self.push(Report::Metrics(crate::supervisor::record::metrics_to_pb(metrics, line)));
    }

    fn event(&self, level: Level, text: &str) {
        let level = match level {
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        };
        eprintln!("{level}: {text}");
        self.push(Report::Event(event(level, text)));
    }

    fn progress(&self, what: &str, done: u64, total: u64) {
        // Sent with the next heartbeat: some loops call this for every line of a file.
        lock(&self.0.queue).progress = Some(pb::Progress { what: what.into(), done, total });
    }

    fn token(&self, prompt: usize, text: &str) {
        let prompt = u32::try_from(prompt).unwrap_or(u32::MAX);
        let mut queue = lock(&self.0.queue);
        if let Some(Report::TokenText(last)) = queue.reports.back_mut().filter(|r| matches!(r, Report::TokenText(t) if t.prompt == prompt))
        {
            last.text.push_str(text);
            drop(queue);
            self.0.wake.notify_one();
            return;
        }
        drop(queue);
        self.push(Report::TokenText(pb::TokenText { prompt, text: text.into() }));
    }

    fn checkpoint(&self, path: &Path, step: u64, request: u64, error: Option<&str>) {
        let path = path.to_string_lossy().into_owned();
        self.push(Report::Checkpoint(pb::CheckpointWritten { path, step, request, error: error.unwrap_or_default().into() }));
    }

    fn trace(&self, request: u64, trace: RankTrace) {
        for part in ramtorch_client::trace::parts(trace) {
            self.push(Report::Trace(pb::TraceReport { request, part: Some(part) }));
        }
    }

    fn command(&self) -> Option<Command> {
        lock(&self.0.commands).pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> (LinkControl, Arc<Shared>) {
        let shared = Arc::new(Shared { queue: Mutex::default(), commands: Mutex::default(), wake: Notify::new() });
        (LinkControl(shared.clone()), shared)
    }

    fn drained(shared: &Shared) -> Vec<Report> {
        let mut batch = Vec::new();
        drain(shared, &mut batch);
        batch
    }

    #[test]
    fn what_a_hung_daemon_does_not_take_is_bounded_and_told() {
        let (control, shared) = control();
        for step in 0..QUEUE_MAX as u64 + 5 {
            control.checkpoint(Path::new("/c"), step, 0, None);
        }
        let batch = drained(&shared);
        assert_eq!(batch.len(), QUEUE_MAX + 1);
        let Some(Report::Event(event)) = batch.last() else { panic!("nothing is said of it") };
        assert!(event.text.starts_with("5 reports"), "{}", event.text);
        assert!(drained(&shared).is_empty());
    }

    #[test]
    fn text_of_a_prompt_is_joined_and_progress_is_only_the_newest() {
        let (control, shared) = control();
        for (prompt, text) in [(0, "a"), (0, "b"), (1, "c"), (0, "d")] {
            control.token(prompt, text);
        }
        control.progress("x", 1, 9);
        control.progress("x", 2, 9);
        let batch = drained(&shared);
        let texts: Vec<(u32, &str)> =
            batch.iter().filter_map(|r| if let Report::TokenText(t) = r { Some((t.prompt, t.text.as_str())) } else { None }).collect();
        assert_eq!(texts, [(0, "ab"), (1, "c"), (0, "d")]);
        assert_eq!(batch.last(), Some(&Report::Progress(pb::Progress { what: "x".into(), done: 2, total: 9 })));
    }

    #[test]
    fn a_new_phase_is_news_but_not_too_often() {
        let (control, shared) = control();
        for step in 0..1000 {
            control.heartbeat(step, "computing");
            control.heartbeat(step, "optimizing");
        }
        let news = drained(&shared).len();
        assert!((1..20).contains(&news), "{news}");
        let queue = lock(&shared.queue);
        assert_eq!((queue.step, queue.phase), (999, "optimizing"));
    }

    #[test]
    fn the_result_comes_last() {
        let (control, shared) = control();
        control.event(Level::Info, "before");
        lock(&shared.queue).result = Some(pb::WorkerResult { ok: true, ..Default::default() });
        let mut batch = Vec::new();
        assert!(drain(&shared, &mut batch));
        assert!(matches!(batch[..], [Report::Event(_), Report::Result(_)]));
        assert!(!drain(&shared, &mut batch), "only once");
    }
}
