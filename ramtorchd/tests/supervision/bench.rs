//! A daemon in a private folder, a client, and the proof at the end that nothing is left.

use crate::fake::{FakeEngine, Script};
use ramtorch_client::{Client, ClientError, Endpoint, v1};
use ramtorch_worker::{DeviceKind, DeviceSpec};
use ramtorchd::config::{JobLimits, KeepSegments, Service, Settings, Supervision, WorkerCommand};
use ramtorchd::daemon::{Daemon, StartError, Stopper};
use ramtorchd::devices::Device;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use v1::JobState;

pub const LIMIT: Duration = Duration::from_secs(60);

/// One test's place.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub settings: Settings,
    pub engine: FakeEngine,
    /// Where the daemon listens for TCP, and for those who want metrics.
    pub tcp: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    daemon: Option<(Stopper, JoinHandle<Vec<String>>)>,
}

/// Settings of a daemon whose state is in `dir`, impatient enough for tests.
pub fn settings(dir: &Path, devices: u32) -> Settings {
    let device = |index| Device {
        spec: DeviceSpec { kind: DeviceKind::Cpu, index, threads: 1, memory_bytes: 1 << 30, bus_id: None },
        model: "CPU".into(),
    };
    Settings {
        socket: dir.join("d.sock"),
        state_dir: dir.join("state"),
        cache_dir: dir.join("cache"),
        devices: (0..devices).map(device).collect(),
        devices_note: "fake".into(),
        worker: WorkerCommand { exe: std::env::current_exe().unwrap(), args: vec!["worker".into(), dir.join("script").into_os_string()] },
        supervision: Supervision {
            heartbeat_timeout_seconds: 3.0,
            register_timeout_seconds: 10.0,
            restart_budget: 3,
            restart_backoff_seconds: 0.05,
            settle_seconds: 0.1,
            stop_timeout_seconds: 3.0,
            stall_timeout_seconds: Some(60.0),
            prepare_timeout_seconds: 60.0,
            kill_timeout_seconds: 5.0,
        },
        jobs: JobLimits::default(),
        service: Service::default(),
    }
}

impl Bench {
    /// A place for a daemon with CPU devices, and what its workers do.
    pub fn new(devices: u32, script: Script) -> Bench {
        let dir = tempfile::Builder::new().prefix("rtd").tempdir_in("/tmp").unwrap();
        let settings = settings(dir.path(), devices);
        let bench = Bench { dir, settings, engine: FakeEngine::default(), tcp: None, metrics: None, daemon: None };
        bench.script(&script);
        bench
    }

    /// A running daemon.
    pub async fn start(devices: u32, script: Script) -> (Bench, Client) {
        let mut bench = Bench::new(devices, script);
        let client = bench.up().await;
        (bench, client)
    }

    /// Changes what workers do that start from now on.
    pub fn script(&self, script: &Script) {
        let path = self.dir.path().join("script");
        std::fs::write(path.with_extension("new"), serde_json::to_vec(script).unwrap()).unwrap();
        std::fs::rename(path.with_extension("new"), path).unwrap();
    }

    /// From now on workers can only be ended by SIGKILL.
    pub fn stubborn(&self) {
        std::fs::write(self.dir.path().join("script.stubborn"), "").unwrap();
    }

    /// Starts the daemon in this process.
    pub async fn up(&mut self) -> Client {
        self.try_up().await.unwrap();
        self.client().await
    }

    pub async fn try_up(&mut self) -> Result<(), StartError> {
        let daemon = Daemon::start(self.settings.clone(), Arc::new(self.engine.clone())).await?;
        (self.tcp, self.metrics) = (daemon.tcp_address(), daemon.metrics_address());
        self.daemon = Some((daemon.stopper(), tokio::spawn(daemon.finish())));
        Ok(())
    }

    pub async fn client(&self) -> Client {
        Client::connect(Endpoint::unix(&self.settings.socket)).await.unwrap()
    }

    /// Stops the daemon in order; it must take less than its limit and leave nothing.
    pub async fn down(&mut self) {
        let (stopper, finished) = self.daemon.take().unwrap();
        let start = Instant::now();
        stopper.stop().await;
        let left = tokio::time::timeout(LIMIT, finished).await.unwrap().unwrap();
        assert!(left.is_empty(), "{left:?}");
        let most = self.settings.supervision.stop_timeout_seconds + 2.5;
        assert!(start.elapsed().as_secs_f64() < most, "stopping took {:?}", start.elapsed());
        assert!(!self.settings.socket.exists(), "the socket is left");
    }

    /// Ends every job, stops the daemon and checks that nothing is left of it.
    pub async fn end(mut self) {
        let mut client = self.client().await;
        // One that has ended meanwhile is fine, and so is a daemon that takes no more calls in a test of that.
        for job in client.list(false).await.unwrap_or_default() {
            let _ = client.cancel(&job.id).await;
        }
        self.down().await;
        self.assert_clean();
    }

    /// As [`Bench::assert_clean`], after a stop that kept what the next daemon goes on from: so many segments.
    pub fn assert_kept(&self, segments: usize) {
        let left = self.workers();
        assert!(left.is_empty(), "processes left: {left:?}");
        let (kept, names) = (self.segments(), std::fs::read_dir(self.settings.state_dir.join("segments")).unwrap());
        let registered: Vec<_> = names.flatten().map(|e| e.file_name()).collect();
        assert_eq!((kept.len(), registered.len()), (segments, segments), "{kept:?}, {registered:?}");
        assert!(!self.settings.state_dir.join("run/worker.sock").exists());
    }

    pub fn assert_clean(&self) {
        let left = self.workers();
        assert!(left.is_empty(), "processes left: {left:?}");
        let segments = self.segments();
        assert!(segments.is_empty(), "segments left: {segments:?}");
        let registered: Vec<_> = std::fs::read_dir(self.settings.state_dir.join("segments")).unwrap().collect();
        assert!(registered.is_empty(), "registrations left: {registered:?}");
        assert!(!self.settings.state_dir.join("run/worker.sock").exists());
        let logs: Vec<_> = std::fs::read_dir(self.settings.state_dir.join("oneoff")).unwrap().collect();
        assert!(logs.is_empty(), "logs of one-off work left: {logs:?}");
    }

    /// Live workers of this bench's daemons: the script's path is on their command line.
    pub fn workers(&self) -> Vec<i32> {
        let script = self.dir.path().join("script");
        let mark = script.to_str().unwrap();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|b| *b == 0).any(|a| a == mark.as_bytes()) && line.split(|b| *b == 0).any(|a| a == b"worker")
        })
        .collect()
    }

    /// Segments of this bench's jobs.
    pub fn segments(&self) -> Vec<String> {
        let jobs: Vec<String> = std::fs::read_dir(self.settings.state_dir.join("jobs"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        let shm = std::fs::read_dir("/dev/shm").unwrap().flatten().filter_map(|e| e.file_name().into_string().ok());
        shm.filter(|name| jobs.iter().any(|j| name.starts_with(&format!("ramtorch-{j}-")))).collect()
    }

    /// A job file.
    pub fn job(&self, name: &str, steps: u64, more: &str) -> v1::SubmitRequest {
        let job_toml = format!(
            "name = \"{name}\"\n[model]\npath = \"m\"\n[data]\nformat = \"tokens\"\ntrain = \"t\"\n[train]\nsteps = {steps}\nbatch_size = 2\n{more}"
        );
        let base_dir = self.dir.path().to_str().unwrap().to_string();
        v1::SubmitRequest { job_toml, base_dir, file_name: "job.toml".into(), dry_run: false }
    }
}

impl Drop for Bench {
    /// What a test let a daemon keep goes with the test.
    fn drop(&mut self) {
        for segment in self.segments() {
            let _ = std::fs::remove_file(Path::new("/dev/shm").join(segment));
        }
    }
}

/// Waits until the job is as wanted.
pub async fn wait_for(client: &mut Client, id: &str, what: &str, done: impl Fn(&v1::Job) -> bool) -> v1::Job {
    let end = Instant::now() + LIMIT;
    loop {
        let job = client.get(id).await.unwrap();
        if done(&job) {
            return job;
        }
        assert!(Instant::now() < end, "waited too long for {what}: {} {}", job.state().as_str_name(), job.message);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits for a state.
pub async fn wait_state(client: &mut Client, id: &str, state: JobState) -> v1::Job {
    let ended = |s| matches!(s, JobState::Succeeded | JobState::Failed | JobState::Cancelled);
    let job = wait_for(client, id, state.as_str_name(), |j| j.state() == state || ended(j.state())).await;
    assert_eq!(job.state(), state, "{}", job.message);
    job
}

/// Everything that a watcher sees until the job's end.
pub async fn watch(client: &mut Client, id: &str) -> Vec<v1::watch_event::Event> {
    let mut events = client.watch(id, 1_000_000).await.unwrap();
    let mut seen = Vec::new();
    while let Some(event) = events.next().await.unwrap() {
        seen.extend(event.event);
    }
    seen
}

/// The exit code of a refusal.
pub fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (u8, String) {
    let e = result.unwrap_err();
    (e.exit_code(), e.to_string())
}

/// `daemon DIR DEVICES`: a daemon in a process of its own, until SIGTERM.
pub fn daemon_main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let dir = PathBuf::from(&arguments[2]);
    let mut settings = settings(&dir, arguments[3].parse().unwrap());
    settings.jobs.keep_segments_on_stop = match arguments.get(4).map(String::as_str) {
        Some("keep") => KeepSegments::Always,
        Some("never") => KeepSegments::Never,
        _ => KeepSegments::default(),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
        let daemon = Daemon::start(settings, Arc::new(FakeEngine::default())).await.unwrap();
        let stopper = daemon.stopper();
        let mut finished = std::pin::pin!(daemon.finish());
        loop {
            tokio::select! {
                left = &mut finished => return ExitCode::from(u8::from(!left.is_empty())),
                _ = terminate.recv() => stopper.stop().await,
            }
        }
    })
}
