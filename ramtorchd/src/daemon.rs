//! Puts a daemon together, and takes it apart again.

use crate::access::Policy;
use crate::access::config::TcpConfig;
use crate::access::gate::Gate;
use crate::access::outputs::Ledger;
use crate::access::paths::Roots;
use crate::access::serve::{self, Running};
use crate::access::tls::{Tls, TlsError};
use crate::config::Settings;
use crate::devices;
use crate::disk::Disk;
use crate::faults::{kept, kernel_log};
use crate::node;
use crate::notify::Watchdog;
use crate::process::Spawner;
use crate::recovery;
use crate::rpc::{Context, MAX_WORKER_BYTES, WorkerService};
use crate::socket::{PATH_MAX_BYTES, Socket, SocketError};
use crate::statedir::{StateDir, StateDirError};
use crate::supervisor::devices::DevicePool;
use crate::supervisor::outside::Engine;
use crate::supervisor::{self, Handle, Leftovers, Message, Pulse, Supervisor};
use crate::telemetry;
use crate::world::World;
use ramtorch_proto::v1::worker_server::WorkerServer;
use ramtorch_store::{Registry, StoreError};
use ramtorch_worker::DeviceKind;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, UnixListener};
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
    /// An address of `[tcp]` or `[metrics]`.
    #[error("[{section}] cannot listen on {address}: {source}")]
    Listen {
        /// Section of the configuration.
        section: &'static str,
        /// Its address.
        address: std::net::SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// `[access] socket_group`.
    #[error("[access] socket_group: {0}")]
    SocketGroup(String),
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
            StartError::Listen { .. } | StartError::Tls(_) | StartError::SocketGroup(_) => exit::USAGE,
            StartError::State(StateDirError::Io { .. }) | StartError::Socket(SocketError::Io { .. }) | StartError::Store(_) => exit::OUTPUT,
            StartError::System { .. } | StartError::Reflection(_) => exit::INTERNAL,
        }
    }
}

/// A running daemon.
pub struct Daemon {
    handle: Handle,
    supervisor: JoinHandle<Leftovers>,
    servers: Vec<Running>,
    tcp_address: Option<std::net::SocketAddr>,
    metrics_address: Option<std::net::SocketAddr>,
    sockets: Vec<Socket>,
    registry: Registry,
    /// Jobs that could not be understood, whose segments are not this daemon's to remove.
    left_alone: HashSet<String>,
    _kernel_log: Option<kernel_log::Watch>,
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
        let service = settings.service;
        if let Some(group) = &service.access.socket_group {
            socket.give_to(group).map_err(StartError::SocketGroup)?;
        }
        // Whatever the configuration has wrong is told before anything of an earlier daemon is touched.
        let tcp = match service.tcp {
            Some(config) => Some(open_tcp(config).await?),
            None => None,
        };
        let metrics = match service.metrics.listen {
            Some(address) => Some(listen("metrics", address).await?),
            None => None,
        };
        let (run_dir, short_run_dir) = worker_socket_dir(&state).map_err(system("make a folder for the workers' socket"))?;
        let (worker_socket, workers) = Socket::bind(&run_dir.join("worker.sock"), 0o600).await?;
        let registry = Registry::open(state.segments())?;
        let boot_id = node::boot_id();
        let found = {
            let (jobs, registry, boot_id, history) = (state.jobs(), registry.clone(), boot_id.clone(), settings.jobs.metrics_history);
            let recovery = tokio::task::spawn_blocking(move || recovery::recover(&jobs, &registry, &boot_id, history));
            recovery.await.map_err(|e| system("recover")(std::io::Error::other(e)))??
        };
        let roots = Arc::new(Roots::new(service.paths, vec![settings.cache_dir.clone()]));
        let (handle, answers, inbox) = supervisor::channel();
        let reports = answers.clone();
        let report = move |event| drop(reports.send(Message::Process(event)));
        let runtime = tokio::runtime::Handle::current();
        let disk = Disk::start(state.jobs()).map_err(system("start a thread"))?;
        let records = disk.witness();
        let world = World {
            answers: answers.clone(),
            spawner: Spawner::start(runtime, boot_id.clone(), report).map_err(system("start a thread"))?,
            worker: settings.worker.clone(),
            worker_socket: worker_socket.path().to_path_buf(),
            engine: engine.clone(),
            registry: registry.clone(),
            disk,
            jobs: state.jobs(),
            quarantine: state.quarantine(),
            one_offs: state.empty_one_offs()?,
            cache: settings.cache_dir.clone(),
            boot_id: boot_id.clone(),
            gpus_are_shared: devices::are_shared(&settings.devices),
            signals: HashMap::new(),
            roots: roots.clone(),
        };
        tracing::info!(socket = %settings.socket.display(), state = %settings.state_dir.display(), "{}", settings.devices_note);
        let has_gpus = settings.devices.iter().any(|d| d.spec.kind == DeviceKind::Cuda);
        let pool = DevicePool::new(settings.devices);
        let kernel_log = has_gpus.then(|| watch_kernel_log(answers.clone())).flatten();
        let mut supervisor = Supervisor::new(settings.supervision, settings.jobs, pool, Box::new(world));
        let made = found.jobs.iter().map(|(r, ..)| (&r.outputs[..], r.uid, r.created_unix_ms));
        let ledger = Arc::new(Ledger::open(state.outputs(), made));
        match kept::read(&state.quarantine()) {
            Ok(faults) => supervisor.restore_faults(faults),
            Err(e) => tracing::error!("{e}; GPUs that an earlier daemon found broken are in use again: look at them, and remove the file"),
        }
        for (record, spec, history) in found.jobs {
            supervisor.adopt(record, spec, history);
        }
        for (id, why) in found.held {
            supervisor.hold(&id, why);
        }
        for (id, worker) in found.survivors {
            supervisor.quarantine_survivor(&id, &worker);
            tokio::spawn(await_survivor(worker.identity, boot_id.clone(), answers.clone()));
        }
        let pulse = Pulse::new(Instant::now());
        let supervisor = tokio::spawn(supervisor::run(supervisor, inbox, Watchdog::from_environment(), pulse.clone()));
        let context = Context {
            handle: handle.clone(),
            pulse,
            engine,
            jobs: state.jobs(),
            records,
            cache: settings.cache_dir,
            state_dir: settings.state_dir,
            started_unix_ms: node::unix_ms(),
            request_bytes: service.limits.request_bytes,
            roots,
            ledger,
        };
        let counters = Arc::new(telemetry::rpc::RpcCounters::default());
        let bounds = serve::Bounds { connections: service.limits.connections, idle: service.limits.connection_idle() };
        let gate = Gate::new(Policy::new(service.access), service.limits, counters.clone());
        let mut servers = vec![serve_workers(handle.clone(), workers)];
        let (mut tcp_address, mut metrics_address) = (None, None);
        servers.push(serve::unix(context.clone(), gate.clone(), bounds, clients).await?);
        if let Some((listener, tls, reflection)) = tcp {
            tcp_address = listener.local_addr().ok();
            tracing::info!("listening on {} with mutual TLS", tcp_address.map(|a| a.to_string()).unwrap_or_default());
            servers.push(serve::tcp(context, gate, bounds, listener, tls, reflection).await?);
        }
        if let Some(listener) = metrics {
            metrics_address = listener.local_addr().ok();
            tracing::info!("metrics on http://{}/metrics", metrics_address.map(|a| a.to_string()).unwrap_or_default());
            servers.push(telemetry::http::serve(listener, handle.clone(), counters));
        }
        Ok(Daemon {
            handle,
            supervisor,
            servers,
            tcp_address,
            metrics_address,
            sockets: vec![socket, worker_socket],
            registry,
            left_alone: found.left_alone,
            _kernel_log: kernel_log,
            _state: state,
            _short_run_dir: short_run_dir,
        })
    }

    /// Where it listens for TCP, if it does; tells the port where the configuration left that to the kernel.
    pub fn tcp_address(&self) -> Option<std::net::SocketAddr> {
        self.tcp_address
    }

    /// Where it serves metrics, if it does.
    pub fn metrics_address(&self) -> Option<std::net::SocketAddr> {
        self.metrics_address
    }

    /// A way to stop it. The first stop is orderly and bounded, the second kills.
    pub fn stopper(&self) -> Stopper {
        Stopper { handle: self.handle.clone() }
    }

    /// Waits until it has stopped, and cleans up. Returns what could not be cleaned up.
    pub async fn finish(mut self) -> Vec<String> {
        let (mut left, kept) = match (&mut self.supervisor).await {
            Ok(Leftovers { problems, kept }) => (problems, Some(kept)),
            Err(e) => (vec![format!("the state task ended by a defect: {e}")], None),
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
        // What a defect has left is for the next daemon, which finds it as after a death of this one.
        if let Some(kept) = kept {
            let (registry, left_alone) = (self.registry.clone(), std::mem::take(&mut self.left_alone));
            let sweep = move || registry.sweep(|r| kept.contains(&r.name) || left_alone.contains(&r.job));
            let swept = tokio::task::spawn_blocking(sweep).await;
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
}

impl Stopper {
    /// Stops it; a second call does not wait for workers any more.
    pub async fn stop(&self) {
        self.handle.tell(Message::Stop).await;
    }

    /// Stops it for a successor, on the same state folder and in the same boot: jobs that have not ended stay in memory.
    pub async fn stop_keeping(&self) {
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

async fn listen(section: &'static str, address: std::net::SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { section, address, source })
}

async fn open_tcp(config: TcpConfig) -> Result<(TcpListener, Tls, bool), StartError> {
    let (address, reflection) = (config.listen, config.reflection);
    let tls = Tls::load(config)?;
    Ok((listen("tcp", address).await?, tls, reflection))
}

/// Errors of GPUs, from the kernel's log where it can be read.
fn watch_kernel_log(answers: mpsc::UnboundedSender<Message>) -> Option<kernel_log::Watch> {
    match kernel_log::Watch::start(move |xid| drop(answers.send(Message::Xid(xid)))) {
        Ok(watch) => Some(watch),
        Err(e) => {
            tracing::info!("/dev/kmsg cannot be read ({e}): errors of GPUs are known by what workers report");
            None
        }
    }
}

fn serve_workers(handle: Handle, listener: UnixListener) -> Running {
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
