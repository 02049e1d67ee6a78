//! A running daemon and its client.

use crate::{Binary, Finished, JobFile, Process, Sandbox};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const START_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(30);
const CALL_LIMIT: Duration = Duration::from_secs(180);

/// `ramtorchd start` in a sandbox. Dropping it kills it; [`Daemon::stop`] is how a test ends it.
#[derive(Debug)]
pub struct Daemon<'a> {
    sandbox: &'a Sandbox,
    process: Option<Process>,
    socket: PathBuf,
}

impl<'a> Daemon<'a> {
    /// Starts it and waits until it answers.
    #[track_caller]
    pub(crate) fn start(sandbox: &'a Sandbox, devices: &str, more: &[&str]) -> Daemon<'a> {
        let socket = sandbox.path("run/test.sock");
        let mut daemon = Daemon { sandbox, process: None, socket };
        let mut process = daemon.spawn(devices, more);
        let end = Instant::now() + START_LIMIT;
        while daemon.client(["node"]).code != crate::exit::OK {
            if process.has_ended() || Instant::now() > end {
                let finished = process.wait(Duration::from_secs(1));
                panic!("the daemon does not answer; exit code {}\n{}", finished.code, finished.stderr);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon.process = Some(process);
        daemon
    }

    /// Starts one with these variables in its environment. `None`: it died before it answered.
    ///
    /// # Panics
    /// It ended by itself, and not by a signal.
    #[track_caller]
    pub fn try_start(sandbox: &'a Sandbox, devices: &str, more: &[&str], environment: &[(String, String)]) -> Option<Daemon<'a>> {
        let socket = sandbox.path("run/test.sock");
        let mut daemon = Daemon { sandbox, process: None, socket };
        let mut command = daemon.command(devices, more);
        command.envs(environment.iter().map(|(k, v)| (k, v)));
        let mut process = sandbox.start(command);
        let end = Instant::now() + START_LIMIT;
        // A stale socket refuses at once; a listening one has a daemon behind it that has recovered.
        while !daemon.answers() {
            if process.has_ended() {
                let finished = process.wait(Duration::from_secs(1));
                assert!(finished.code > 128, "the daemon ended with code {}\n{}", finished.code, finished.stderr);
                return None;
            }
            assert!(Instant::now() < end, "the daemon does not answer:\n{}", process.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon.process = Some(process);
        Some(daemon)
    }

    fn answers(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.socket).is_ok()
    }

    fn command(&self, devices: &str, more: &[&str]) -> std::process::Command {
        let mut command = self.sandbox.command(Binary::Daemon);
        command.args(["start", "--devices", devices, "--socket"]).arg(&self.socket).arg("--state-dir").arg(self.state_dir()).args(more);
        command
    }

    /// As [`Daemon::ask`]; `None` where there is no answer.
    pub fn try_ask<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Option<Value> {
        let arguments: Vec<_> = arguments.into_iter().map(|a| a.as_ref().to_owned()).collect();
        let all = ["--output", "json"].iter().map(|a| OsStr::new(*a).to_owned()).chain(arguments);
        let finished = self.client(all);
        (finished.code == crate::exit::OK).then(|| serde_json::from_str(&finished.stdout).ok())?
    }

    /// Starts a daemon on this one's socket without waiting for it: for tests of a second one.
    pub fn spawn(&self, devices: &str, more: &[&str]) -> Process {
        self.sandbox.start(self.command(devices, more))
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.sandbox.path("state")
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the daemon was started")
    }

    /// `ramtorch` with these arguments, to its end.
    #[track_caller]
    pub fn client<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        self.start_client(arguments).wait(CALL_LIMIT)
    }

    /// `ramtorch` with these arguments, started.
    pub fn start_client<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Process {
        let mut command = self.sandbox.command(Binary::Client);
        command.env("RAMTORCH_SOCKET", &self.socket).args(arguments);
        self.sandbox.start(command)
    }

    /// `ramtorch --output json` with these arguments: what it prints, after success.
    #[track_caller]
    pub fn ask<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Value {
        let arguments: Vec<_> = arguments.into_iter().map(|a| a.as_ref().to_owned()).collect();
        let all = ["--output", "json"].iter().map(|a| OsStr::new(*a).to_owned()).chain(arguments);
        self.client(all).expect_success().json()
    }

    /// Submits a job; returns its id.
    #[track_caller]
    pub fn submit(&self, file: &str, job: &JobFile) -> String {
        let path = self.sandbox.write_job(file, job);
        let answer = self.ask([OsStr::new("submit"), path.as_os_str()]);
        answer["id"].as_str().filter(|id| !id.is_empty()).unwrap_or_else(|| panic!("no id: {answer}")).to_owned()
    }

    /// The job as the daemon describes it.
    #[track_caller]
    pub fn job(&self, id: &str) -> Value {
        self.ask(["describe", id])
    }

    /// Waits until the job satisfies `done`; returns it.
    ///
    /// # Panics
    /// It does not within the time limit.
    #[track_caller]
    pub fn wait_for(&self, id: &str, what: &str, done: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + CALL_LIMIT;
        loop {
            let job = self.job(id);
            if done(&job) {
                return job;
            }
            assert!(Instant::now() < end, "waited too long for {what}: {job:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the job runs and has done `step` steps; returns it.
    #[track_caller]
    pub fn wait_for_step(&self, id: &str, step: u64) -> Value {
        self.wait_for(id, "steps", |j| j["step"].as_u64() >= Some(step) && j["state"] == "running")
    }

    /// For each (rank, step): kills the worker of that rank once the job has done so many steps, and waits for the restart.
    #[track_caller]
    pub fn kill_ranks(&self, id: &str, deaths: &[(usize, u64)]) {
        for (rank, step) in deaths {
            let running = self.wait_for_step(id, *step);
            let pid = running["workers"][rank]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
            let pid = pid.unwrap_or_else(|| panic!("no worker of rank {rank}: {running:#}"));
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("the worker runs");
            self.wait_for(id, "the restart", |j| j["restarts"].as_u64() > running["restarts"].as_u64());
        }
    }

    /// Waits until the job has ended in `state`.
    #[track_caller]
    pub fn wait_for_state(&self, id: &str, state: &str) -> Value {
        let ended = |j: &Value| matches!(j["state"].as_str(), Some("succeeded" | "failed" | "cancelled"));
        let job = self.wait_for(id, state, |j| j["state"] == state || ended(j));
        assert_eq!(job["state"], state, "{job:#}");
        job
    }

    /// Its process, to wait for its end.
    pub fn into_process(mut self) -> Process {
        self.process.take().expect("the daemon was started")
    }

    /// Ends it with SIGTERM; it must end in time, with success, and leave nothing.
    #[track_caller]
    pub fn stop(self) -> Finished {
        self.stop_with(Signal::SIGTERM)
    }

    /// Ends it with a signal; it must end in time, with success, and leave nothing.
    #[track_caller]
    pub fn stop_with(mut self, signal: Signal) -> Finished {
        let process = self.process.take().expect("the daemon was started");
        process.signal(signal);
        let finished = process.wait(STOP_LIMIT).expect_success();
        self.sandbox.assert_clean();
        finished
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if let (true, Some(process)) = (std::thread::panicking(), &mut self.process) {
            let state = if process.has_ended() { "has ended" } else { "still runs" };
            eprintln!("the daemon {state}; its log:\n{}", process.stderr());
        }
    }
}
