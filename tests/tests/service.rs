//! What systemd sees of the daemon (`Type=notify`, `WatchdogSec=`): the datagrams themselves, on a socket of the test's.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use ramtorch_failpoint::{MARKS_VARIABLE, VARIABLE};
use ramtorch_tests::{Daemon, Fixture, Sandbox, exit};
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// For what must come.
const LIMIT: Duration = Duration::from_secs(60);
/// The service manager's patience, in microseconds. The daemon speaks up three times as often.
const WATCHDOG_USEC: &str = "3000000";
/// Some of its intervals, in which a stopped process says nothing.
const SILENCE: Duration = Duration::from_secs(3);

/// A service manager's end.
struct Manager {
    socket: UnixDatagram,
    _dir: tempfile::TempDir,
    path: String,
}

impl Manager {
    fn new() -> Manager {
        // Not in the sandbox, in which no socket may be left.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify").to_str().unwrap().to_owned();
        Manager { socket: UnixDatagram::bind(&path).unwrap(), _dir: dir, path }
    }

    fn environment(&self) -> Vec<(String, String)> {
        [("NOTIFY_SOCKET", self.path.as_str()), ("WATCHDOG_USEC", WATCHDOG_USEC)].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
    }

    /// The next datagram, if one comes in time.
    fn next(&self, limit: Duration) -> Option<String> {
        let mut buffer = [0; 4096];
        self.socket.set_read_timeout(Some(limit)).unwrap();
        match self.socket.recv(&mut buffer) {
            Ok(n) => Some(String::from_utf8(buffer[..n].to_vec()).unwrap()),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
            Err(e) => panic!("{e}"),
        }
    }

    /// Waits for one that has this line; returns it.
    #[track_caller]
    fn wait_for(&self, line: &str) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let said = self.next(left).unwrap_or_else(|| panic!("waited too long for {line}"));
            if said.lines().any(|l| l == line) {
                return said;
            }
        }
    }

    /// Takes what has come.
    fn drain(&self) {
        while self.next(Duration::from_millis(1)).is_some() {}
    }
}

/// The state letter of a process, as in proc(5).
fn state(pid: Pid) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

#[test]
fn the_service_manager_is_told_and_the_watchdog_fed_while_the_daemon_runs() {
    let sandbox = Sandbox::new();
    let manager = Manager::new();
    let mut daemon = Daemon::try_start(&sandbox, "cpu:1", &[], &manager.environment()).unwrap();
    manager.wait_for("READY=1");
    for _ in 0..2 {
        manager.wait_for("WATCHDOG=1");
    }
    let job = Fixture::load("llama").job("endless").set("train.steps", 1_000_000).set("schedule.warmup_steps", 0).unset("output.path");
    let id = daemon.submit("endless", &job);
    manager.wait_for("STATUS=1 job(s) under way, 0 waiting");
    // The variables are the daemon's: a worker that spoke up for it would feed the watchdog of a daemon that hangs.
    let running = daemon.wait_for_step(&id, 1);
    let worker = running["workers"][0]["pid"].as_i64().unwrap();
    let environment = std::fs::read(format!("/proc/{worker}/environ")).unwrap();
    for name in ["NOTIFY_SOCKET=", "WATCHDOG_USEC=", "WATCHDOG_PID="] {
        assert!(!environment.split(|b| *b == 0).any(|v| v.starts_with(name.as_bytes())), "a worker has {name}");
    }
    daemon.client(["cancel", &id]).expect_success();
    daemon.wait_for_state(&id, "cancelled");

    let pid = daemon.process().pid();
    daemon.process().signal(Signal::SIGSTOP);
    let end = Instant::now() + LIMIT;
    while state(pid) != 'T' {
        assert!(Instant::now() < end, "it does not stop");
        std::thread::sleep(Duration::from_millis(5));
    }
    // What it said before.
    manager.drain();
    assert_eq!(manager.next(SILENCE), None, "a process that stands still has fed the watchdog");
    daemon.process().signal(Signal::SIGCONT);
    manager.wait_for("WATCHDOG=1");

    daemon.stop();
    manager.wait_for("STOPPING=1");
}

/// What the daemon's health service says of itself and of its jobs' service.
fn health(daemon: &Daemon) -> [ServingStatus; 2] {
    let endpoint = tonic::transport::Endpoint::try_from(format!("unix://{}", daemon.socket().display())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = HealthClient::new(endpoint.connect().await.unwrap());
        let mut said = [ServingStatus::Unknown; 2];
        for (said, service) in said.iter_mut().zip(["", "ramtorch.v1.Jobs"]) {
            let request = HealthCheckRequest { service: service.to_owned() };
            *said = client.check(request).await.unwrap().into_inner().status();
        }
        said
    })
}

fn wait_for_health(daemon: &Daemon, wanted: ServingStatus) {
    let end = Instant::now() + LIMIT;
    while health(daemon) != [wanted; 2] {
        assert!(Instant::now() < end, "{:?}, not {wanted:?}", health(daemon));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The loop that owns all state is stuck, and it alone: the process has not stopped, takes connections and answers what it need not
/// ask the loop for. A watchdog that anything else than the loop fed would be content with that.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn the_watchdog_is_not_fed_by_a_daemon_whose_state_loop_is_stuck() {
    let sandbox = Sandbox::new();
    let manager = Manager::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let mut environment = manager.environment();
    let armed = [(VARIABLE, "job.submitted=hold"), (MARKS_VARIABLE, marks.to_str().unwrap())];
    environment.extend(armed.map(|(k, v)| (k.to_owned(), v.to_owned())));
    let mut daemon = Daemon::try_start(&sandbox, "cpu:1", &[], &environment).unwrap();
    manager.wait_for("READY=1");
    for _ in 0..2 {
        manager.wait_for("WATCHDOG=1");
    }
    assert_eq!(health(&daemon), [ServingStatus::Serving; 2]);
    let job = Fixture::load("llama").job("held").set("train.steps", 2).set("schedule.warmup_steps", 0).unset("output.path");
    let mut submission = daemon.start_client(["submit".as_ref(), sandbox.write_job("held", &job).as_os_str()]);
    let end = Instant::now() + LIMIT;
    while !marks.join("0-job.submitted").exists() {
        assert!(Instant::now() < end, "the loop was not reached:\n{}", submission.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
    // What it said before.
    manager.drain();
    assert_eq!(manager.next(SILENCE), None, "a daemon whose state loop is stuck has fed the watchdog");
    let wrong = sandbox.write_job("wrong", &job.set("train.steps", "many"));
    daemon.client(["submit".as_ref(), wrong.as_os_str()]).expect_refusal(exit::JOB_FILE, &["steps"]);
    assert_ne!(state(daemon.process().pid()), 'T');
    assert!(!submission.has_ended(), "nobody but the loop can answer this:\n{}", submission.stdout());
    assert_eq!(manager.next(Duration::from_millis(1)), None, "it was fed meanwhile");
    // Whoever asks for its health is told, too, when it has lasted.
    wait_for_health(&daemon, ServingStatus::NotServing);

    std::fs::write(marks.join("0-job.submitted.go"), "").unwrap();
    manager.wait_for("WATCHDOG=1");
    submission.wait(LIMIT).expect_success();
    wait_for_health(&daemon, ServingStatus::Serving);
    daemon.wait_for_state("held", "succeeded");
    daemon.stop();
    manager.wait_for("STOPPING=1");
}
