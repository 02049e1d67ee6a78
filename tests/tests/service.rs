//! What systemd sees of the daemon (`Type=notify`, `WatchdogSec=`): the datagrams themselves, on a socket of the test's.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use ramtorch_tests::{Daemon, Fixture, Sandbox};
use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

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
