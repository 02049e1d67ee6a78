//! Starts worker processes and sees them end.
//!
//! Every child is started from one thread that lives as long as the daemon: workers ask the kernel for SIGKILL when
//! their parent dies (PDEATHSIG), and for that the *thread* that started them is the parent. Each child is the leader
//! of a process group of its own, so that Ctrl-C in the daemon's terminal does not reach it.
//!
//! One task a child waits for it (tokio uses a pidfd for that where the kernel has them) and is the only one that
//! signals it. The task reaps the child itself, so a signal can never hit another process that got the same pid.

use super::Identity;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use ramtorch_failpoint::{Point, hit};
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::sync::mpsc;

/// Names one worker process, alone in the life of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcKey(pub u64);

/// A process to start.
#[derive(Debug)]
pub struct SpawnRequest {
    /// Its name.
    pub key: ProcKey,
    /// Executable.
    pub exe: PathBuf,
    /// Arguments.
    pub args: Vec<OsString>,
    /// Added to the daemon's own environment.
    pub env: Vec<(&'static str, OsString)>,
    /// File that takes what it prints; created anew, mode 0640.
    pub log: PathBuf,
    /// Signals to send to its process group. Ends with the sender.
    pub signals: mpsc::UnboundedReceiver<Signal>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It never started, or could not be waited for.
    Unknown,
    /// It was not started, because the record of its job could not be made durable first.
    Unrecorded,
}

/// The end of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub status: Status,
    /// The end of its log where it did not end well, or why it did not start.
    pub tail: String,
}

/// What the spawner tells.
#[derive(Debug)]
pub enum Event {
    /// It runs.
    Started(ProcKey, Identity),
    /// It is gone and reaped.
    Ended(ProcKey, Ended),
}

/// Handle of the spawning thread. The thread ends, and with it every child, when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Spawner {
    requests: std::sync::mpsc::Sender<SpawnRequest>,
}

/// Bytes of a log that are looked at for the tail, and lines that are kept.
const TAIL_BYTES: u64 = 4096;
const TAIL_LINES: usize = 12;

impl Spawner {
    /// Starts the thread. `report` is called for every event, from the thread or from tasks of `runtime`; it must
    /// not block.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start<F>(runtime: tokio::runtime::Handle, boot_id: String, report: F) -> std::io::Result<Spawner>
    where
        F: Fn(Event) + Clone + Send + 'static,
    {
        let (requests, inbox) = std::sync::mpsc::channel::<SpawnRequest>();
        std::thread::Builder::new().name("spawner".into()).spawn(move || {
            let _runtime = runtime.enter();
            for request in inbox {
                spawn(request, &boot_id, report.clone());
            }
        })?;
        Ok(Spawner { requests })
    }

    /// Starts a process; what comes of it is told by events. `false`: the thread is gone.
    pub fn spawn(&self, request: SpawnRequest) -> bool {
        self.requests.send(request).is_ok()
    }
}

fn spawn<F: Fn(Event) + Send + 'static>(request: SpawnRequest, boot_id: &str, report: F) {
    let key = request.key;
    match start(&request, boot_id) {
        Ok((child, identity)) => {
            report(Event::Started(key, identity));
            tokio::spawn(attend(child, request, report));
        }
        Err(e) => {
            let tail = format!("cannot start {}: {e}", request.exe.display());
            report(Event::Ended(key, Ended { status: Status::Unknown, tail }));
        }
    }
}

fn start(request: &SpawnRequest, boot_id: &str) -> std::io::Result<(tokio::process::Child, Identity)> {
    if let Some(dir) = request.log.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let log = OpenOptions::new().create(true).append(true).mode(0o640).open(&request.log)?;
    let mut command = tokio::process::Command::new(&request.exe);
    command.args(&request.args).envs(request.env.iter().map(|(k, v)| (k, v)));
    for name in crate::notify::VARIABLES {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    hit(Point::WorkerSpawning);
    let child = command.spawn()?;
    hit(Point::WorkerSpawned);
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).ok_or_else(|| std::io::Error::other("the child has no pid"))?;
    // Not reaped yet, so the pid is surely its own. Without /proc there is no start time; 0 matches nobody later.
    let identity = Identity::of(pid, boot_id).unwrap_or(Identity { pid, start_ticks: 0, boot_id: boot_id.into() });
    Ok((child, identity))
}

/// Waits for one child and signals it when told to.
async fn attend<F: Fn(Event)>(mut child: tokio::process::Child, mut request: SpawnRequest, report: F) {
    let mut open = true;
    let waited = loop {
        tokio::select! {
            waited = child.wait() => break waited,
            signal = request.signals.recv(), if open => match signal {
                Some(signal) => send(&child, signal),
                None => open = false,
            },
        }
    };
    let status = match waited {
        Ok(s) => match (s.code(), std::os::unix::process::ExitStatusExt::signal(&s)) {
            (Some(code), _) => Status::Code(code),
            (None, Some(signal)) => Status::Signal(signal),
            (None, None) => Status::Unknown,
        },
        Err(_) => Status::Unknown,
    };
    let tail = match status {
        Status::Code(0) => String::new(),
        _ => {
            let log = request.log.clone();
            tokio::task::spawn_blocking(move || log_tail(&log)).await.unwrap_or_default()
        }
    };
    report(Event::Ended(request.key, Ended { status, tail }));
}

fn send(child: &tokio::process::Child, signal: Signal) {
    // `id` is None once the child is reaped; until then pid and group are its own.
    let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw) else { return };
    if killpg(pid, signal).is_err() {
        let _ = kill(pid, signal);
    }
}

/// The last lines of a log file; empty where there is none.
pub(crate) fn log_tail(path: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Status::Code(code) => write!(f, "exited with code {code}"),
            Status::Signal(number) => match Signal::try_from(*number) {
                Ok(Signal::SIGKILL) => write!(f, "was killed by SIGKILL (by hand, or by the kernel when memory ran out: see dmesg)"),
                Ok(signal) => write!(f, "was killed by {signal}"),
                Err(_) => write!(f, "was killed by signal {number}"),
            },
            Status::Unknown | Status::Unrecorded => write!(f, "did not start"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    struct Bench {
        spawner: Spawner,
        events: mpsc::UnboundedReceiver<Event>,
        dir: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Bench {
            let (tx, events) = mpsc::unbounded_channel();
            let report = move |e| {
                let _ = tx.send(e);
            };
            let spawner = Spawner::start(tokio::runtime::Handle::current(), "b".into(), report).unwrap();
            Bench { spawner, events, dir: tempfile::tempdir().unwrap() }
        }
        fn run(&self, script: &str) -> mpsc::UnboundedSender<Signal> {
            let (tx, signals) = mpsc::unbounded_channel();
            let (exe, args) = ("/bin/sh".into(), vec!["-c".into(), script.into()]);
            let env = vec![("GREETING", "hello".into())];
            let log = self.dir.path().join("logs/a.log");
            assert!(self.spawner.spawn(SpawnRequest { key: ProcKey(7), exe, args, env, log, signals }));
            tx
        }
        async fn next(&mut self) -> Event {
            tokio::time::timeout(Duration::from_secs(10), self.events.recv()).await.unwrap().unwrap()
        }
    }

    #[tokio::test]
    async fn exit_codes_and_output_arrive() {
        let mut bench = Bench::new();
        let _signals = bench.run("echo $GREETING; echo bye >&2; exit 3");
        assert!(matches!(bench.next().await, Event::Started(ProcKey(7), _)));
        let Event::Ended(_, ended) = bench.next().await else { panic!("not ended") };
        assert_eq!(ended, Ended { status: Status::Code(3), tail: "hello\nbye".into() });
    }

    #[tokio::test]
    async fn signals_reach_the_whole_group() {
        let mut bench = Bench::new();
        let signals = bench.run("sleep 60 & wait");
        assert!(matches!(bench.next().await, Event::Started(..)));
        tokio::time::sleep(Duration::from_millis(100)).await;
        signals.send(Signal::SIGTERM).unwrap();
        let Event::Ended(_, ended) = bench.next().await else { panic!("not ended") };
        assert_eq!(ended.status, Status::Signal(15));
        assert!(ended.status.to_string().contains("SIGTERM"));
    }

    #[tokio::test]
    async fn a_program_that_cannot_start_says_why() {
        let mut bench = Bench::new();
        let (_tx, signals) = mpsc::unbounded_channel();
        let log = bench.dir.path().join("a.log");
        let request = SpawnRequest { key: ProcKey(1), exe: "/no/such/program".into(), args: vec![], env: vec![], log, signals };
        bench.spawner.spawn(request);
        let Event::Ended(_, ended) = bench.next().await else { panic!("not ended") };
        assert!(ended.status == Status::Unknown && ended.tail.contains("/no/such/program"), "{ended:?}");
    }

    #[test]
    fn the_tail_is_short_and_survives_any_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut bytes: Vec<u8> = (0..5000).flat_map(|i| format!("line {i}\n").into_bytes()).collect();
        bytes.extend([0xff, 0xfe, b'\n']);
        std::fs::write(&path, bytes).unwrap();
        let tail = log_tail(&path);
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.contains("line 4999"));
        assert_eq!(log_tail(&dir.path().join("none")), "");
    }
}
