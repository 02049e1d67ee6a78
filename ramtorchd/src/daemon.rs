//! Puts a daemon together, and takes it apart again.

use crate::config::Settings;
use crate::disk::Disk;
use crate::node;
use crate::process::Spawner;
use crate::recovery;
use crate::rpc::{Context, JobsService, MAX_REQUEST_BYTES, MAX_WORKER_BYTES, NodeService, WorkerService};
use crate::socket::{PATH_MAX_BYTES, Socket, SocketError};
use crate::statedir::{StateDir, StateDirError};
use crate::supervisor::devices::DevicePool;
use crate::supervisor::outside::Engine;
use crate::supervisor::{self, Handle, Message, Supervisor};
use crate::world::World;
use ramtorch_proto::FILE_DESCRIPTOR_SET;
use ramtorch_proto::v1::jobs_server::JobsServer;
use ramtorch_proto::v1::node_server::NodeServer;
use ramtorch_proto::v1::worker_server::WorkerServer;
use ramtorch_store::{Registry, StoreError};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

/// Open calls get so long to end after the last job has.
const DRAIN_LIMIT: Duration = Duration::from_millis(500);
/// A survivor of an earlier daemon is looked for this often.
const SURVIVOR_INTERVAL: Duration = Duration::from_secs(5);

/// Name of a folder for the workers' socket that lies outside of the state folder, and of the link to it.
const SHORT_PREFIX: &str = "ramtorchd-";
const SHORT_LINK: &str = "elsewhere";

/// Why a daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateDirError),
    /// A socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The registry of segments.
    #[error("cannot look after shared memory: {0}")]
    Store(#[from] StoreError),
    /// The operating system.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Reflection.
    #[error("cannot set up reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl StartError {
    /// Exit code of a daemon that ends with this.
    pub fn exit_code(&self) -> u8 {
        use ramtorch_client::exit;
        match self {
            StartError::State(StateDirError::InUse { .. }) | StartError::Socket(SocketError::InUse(_)) => exit::ALREADY_RUNNING,
            StartError::Socket(SocketError::NotASocket(_) | SocketError::TooLong(_)) => exit::USAGE,
            StartError::State(StateDirError::Io { .. }) | StartError::Socket(SocketError::Io { .. }) | StartError::Store(_) => exit::OUTPUT,
            StartError::System { .. } | StartError::Reflection(_) => exit::INTERNAL,
        }
    }
}

/// A running daemon.
pub struct Daemon {
    handle: Handle,
    supervisor: JoinHandle<Vec<String>>,
    servers: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
    sockets: Vec<Socket>,
    registry: Registry,
    keep_segments: Arc<AtomicBool>,
    // The last to go: the lock on the state folder.
    _state: StateDir,
    _short_run_dir: Option<tempfile::TempDir>,
}

impl Daemon {
    /// Starts a daemon: locks the state folder, recovers what an earlier daemon left, and listens.
    ///
    /// # Errors
    /// Another daemon runs, or something of the above cannot be done; nothing is left behind then.
    pub async fn start(settings: Settings, engine: Arc<dyn Engine>) -> Result<Daemon, StartError> {
        let system = |what| move |source| StartError::System { what, source };
        let state = StateDir::lock(&settings.state_dir)?;
        // First of all: nothing is touched that belongs to a daemon on the same socket.
        let (socket, clients) = Socket::bind(&settings.socket, 0o660).await?;
        let (run_dir, short_run_dir) = worker_socket_dir(&state).map_err(system("make a folder for the workers' socket"))?;
        let (worker_socket, workers) = Socket::bind(&run_dir.join("worker.sock"), 0o600).await?;
        let registry = Registry::open(state.segments())?;
        let boot_id = node::boot_id();
        let found = {
            let (jobs, registry, boot_id, history) = (state.jobs(), registry.clone(), boot_id.clone(), settings.jobs.metrics_history);
            let recovery = tokio::task::spawn_blocking(move || recovery::recover(&jobs, &registry, &boot_id, history));
            recovery.await.map_err(|e| system("recover")(std::io::Error::other(e)))??
        };
        let (handle, answers, inbox) = supervisor::channel();
        let reports = answers.clone();
        let report = move |event| drop(reports.send(Message::Process(event)));
        let runtime = tokio::runtime::Handle::current();
        let world = World {
            answers: answers.clone(),
            spawner: Spawner::start(runtime, boot_id.clone(), report).map_err(system("start a thread"))?,
            worker: settings.worker.clone(),
            worker_socket: worker_socket.path().to_path_buf(),
            engine: engine.clone(),
            registry: registry.clone(),
            disk: Disk::start(state.jobs()).map_err(system("start a thread"))?,
            jobs: state.jobs(),
            one_offs: state.empty_one_offs()?,
            cache: settings.cache_dir.clone(),
            boot_id: boot_id.clone(),
            signals: HashMap::new(),
        };
        tracing::info!(socket = %settings.socket.display(), state = %settings.state_dir.display(), "{}", settings.devices_note);
        let keep_segments = Arc::new(AtomicBool::new(settings.jobs.keep_segments_on_stop));
        let pool = DevicePool::new(settings.devices);
        let mut supervisor = Supervisor::new(settings.supervision, settings.jobs, pool, Box::new(world));
        for (identity, device) in found.survivors {
            supervisor.quarantine_survivor(&device, identity.pid);
            tokio::spawn(await_survivor(identity, boot_id.clone(), answers.clone()));
        }
        for (record, spec, history) in found.jobs {
            supervisor.adopt(record, spec, history);
        }
        let supervisor = tokio::spawn(supervisor::run(supervisor, inbox));
        let context = Context {
            handle: handle.clone(),
            engine,
            jobs: state.jobs(),
            cache: settings.cache_dir,
            state_dir: settings.state_dir,
            started_unix_ms: node::unix_ms(),
        };
        let servers = vec![serve_clients(context, clients).await?, serve_workers(handle.clone(), workers)];
        Ok(Daemon {
            handle,
            supervisor,
            servers,
            sockets: vec![socket, worker_socket],
            registry,
            keep_segments,
            _state: state,
            _short_run_dir: short_run_dir,
        })
    }

    /// A way to stop it. The first stop is orderly and bounded, the second kills.
    pub fn stopper(&self) -> Stopper {
        Stopper { handle: self.handle.clone(), keep_segments: self.keep_segments.clone() }
    }

    /// Waits until it has stopped, and cleans up. Returns what could not be cleaned up.
    pub async fn finish(mut self) -> Vec<String> {
        let mut left = match (&mut self.supervisor).await {
            Ok(left) => left,
            Err(e) => vec![format!("the state task ended by a defect: {e}")],
        };
        let mut tasks = Vec::new();
        for (stop, task) in self.servers.drain(..) {
            let _ = stop.send(());
            tasks.push(task);
        }
        let drained = tokio::time::timeout(DRAIN_LIMIT, async {
            for task in &mut tasks {
                let _ = task.await;
            }
        });
        if drained.await.is_err() {
            tasks.iter().for_each(JoinHandle::abort);
        }
        self.sockets.clear();
        if !self.keep_segments.load(Ordering::Relaxed) {
            let registry = self.registry.clone();
            let swept = tokio::task::spawn_blocking(move || registry.sweep(|_| false)).await;
            if let Ok(Err(e)) = swept {
                left.push(format!("shared memory was not all removed: {e}"));
            }
        }
        left
    }
}

/// Stops a daemon.
#[derive(Debug, Clone)]
pub struct Stopper {
    handle: Handle,
    keep_segments: Arc<AtomicBool>,
}

impl Stopper {
    /// Stops it; a second call does not wait for workers any more.
    pub async fn stop(&self) {
        self.handle.tell(Message::Stop).await;
    }

    /// Stops it for a successor, on the same state folder and in the same boot: jobs that have not ended stay in memory.
    pub async fn stop_keeping(&self) {
        self.keep_segments.store(true, Ordering::Relaxed);
        self.handle.tell(Message::StopKeeping).await;
    }
}

/// The workers' socket lies in the state folder, unless its path would be too long for a socket.
fn worker_socket_dir(state: &StateDir) -> std::io::Result<(PathBuf, Option<tempfile::TempDir>)> {
    let dir = state.run_dir();
    // That of a daemon that was killed.
    remove_short_dir(&dir);
    if dir.as_os_str().len() + "/worker.sock.1234567890".len() <= PATH_MAX_BYTES {
        return Ok((dir, None));
    }
    // Mode 0700 as well.
    let short = tempfile::Builder::new().prefix(SHORT_PREFIX).tempdir()?;
    std::os::unix::fs::symlink(short.path(), dir.join(SHORT_LINK))?;
    Ok((short.path().to_path_buf(), Some(short)))
}

/// Removes the folder that a killed daemon made for its workers' socket, outside of its state folder.
pub(crate) fn remove_short_dir(run_dir: &Path) {
    let link = run_dir.join(SHORT_LINK);
    let Ok(target) = std::fs::read_link(&link) else { return };
    // Only what a daemon makes: a folder of that name that holds the socket and nothing else.
    if target.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(SHORT_PREFIX)) {
        let _ = std::fs::remove_file(target.join("worker.sock"));
        let _ = std::fs::remove_dir(&target);
    }
    let _ = std::fs::remove_file(link);
}

/// Connections; an error of accept (too many open files) passes, and must not end the service.
fn incoming(listener: UnixListener) -> impl tokio_stream::Stream<Item = std::io::Result<tokio::net::UnixStream>> {
    UnixListenerStream::new(listener).filter_map(|connection| match connection {
        Ok(connection) => Some(Ok(connection)),
        Err(e) => {
            tracing::warn!("a connection was not accepted: {e}");
            None
        }
    })
}

async fn serve_clients(context: Context, listener: UnixListener) -> Result<(oneshot::Sender<()>, JoinHandle<()>), StartError> {
    let jobs = JobsServer::new(JobsService::new(context.clone())).max_decoding_message_size(MAX_REQUEST_BYTES);
    let node = NodeServer::new(NodeService::new(context)).max_decoding_message_size(MAX_REQUEST_BYTES);
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<JobsServer<JobsService>>().await;
    reporter.set_serving::<NodeServer<NodeService>>().await;
    let reflection = || tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET);
    let reflection = (
        reflection().register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET).build_v1()?,
        reflection().register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET).build_v1alpha()?,
    );
    let router =
        Server::builder().add_service(jobs).add_service(node).add_service(health).add_service(reflection.0).add_service(reflection.1);
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let signal = async {
            let _ = stopped.await;
        };
        if let Err(e) = router.serve_with_incoming_shutdown(incoming(listener), signal).await {
            tracing::error!("the service for clients ended: {e}");
        }
    });
    Ok((stop, task))
}

fn serve_workers(handle: Handle, listener: UnixListener) -> (oneshot::Sender<()>, JoinHandle<()>) {
    let service = WorkerServer::new(WorkerService::new(handle))
        .max_decoding_message_size(MAX_WORKER_BYTES)
        .max_encoding_message_size(MAX_WORKER_BYTES);
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(async move {
        let signal = async {
            let _ = stopped.await;
        };
        if let Err(e) = Server::builder().add_service(service).serve_with_incoming_shutdown(incoming(listener), signal).await {
            tracing::error!("the service for workers ended: {e}");
        }
    });
    (stop, task)
}

/// Tells when a process of an earlier daemon, which outlived SIGKILL, is gone at last.
async fn await_survivor(identity: crate::process::Identity, boot_id: String, answers: mpsc::UnboundedSender<Message>) {
    loop {
        tokio::time::sleep(SURVIVOR_INTERVAL).await;
        if crate::process::Identity::of(identity.pid, &boot_id).as_ref() != Some(&identity) {
            let _ = answers.send(Message::Survivor { pid: identity.pid });
            return;
        }
    }
}
