//! A child process with its output collected, a time limit, and a process group of its own.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(10);

/// A process that may still run. Dropping it kills its group.
///
/// Its output goes to files and not to pipes: a child that outlives it can then neither block on a full pipe nor keep
/// the test waiting for the end of one.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    stdout: PathBuf,
    stderr: PathBuf,
    started: Instant,
    reaped: bool,
}

/// A process that has ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Its command line, for messages.
    pub name: String,
    /// Exit code; 128 + signal where a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it ran.
    pub elapsed: Duration,
}

impl Process {
    /// Starts `command`, its output in `folder`.
    pub fn start(mut command: Command, folder: &Path) -> Process {
        let name = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|a| a.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ");
        let unique = tempfile::Builder::new().prefix("output-").tempdir_in(folder).expect("a folder for output").keep();
        let (stdout, stderr) = (unique.join("stdout"), unique.join("stderr"));
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).expect("a file for standard output"))
            .stderr(File::create(&stderr).expect("a file for standard error"))
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        Process { child, name, stdout, stderr, started: Instant::now(), reaped: false }
    }

    /// Process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid fits"))
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(self.pid(), signal).expect("the process is a child of this one");
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        lossy(&self.stdout)
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        lossy(&self.stderr)
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("waiting for a child").is_some()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It still runs when `limit` is over, counted from now; its group is killed first.
    pub fn wait(mut self, limit: Duration) -> Finished {
        let end = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waiting for a child") {
                break status;
            }
            if Instant::now() > end {
                let (name, out, err) = (self.name.clone(), self.stdout(), self.stderr());
                drop(self);
                panic!("{name}: still running after {limit:?}\n--- stdout\n{out}\n--- stderr\n{err}");
            }
            std::thread::sleep(POLL);
        };
        self.reaped = true;
        Finished {
            name: self.name.clone(),
            code: code(status),
            stdout: self.stdout(),
            stderr: self.stderr(),
            elapsed: self.started.elapsed(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            // The group may be gone already.
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

impl Finished {
    /// Checks the exit code; returns itself.
    ///
    /// # Panics
    /// It is another one; the whole output is shown.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Finished {
        assert_eq!(self.code, code, "exit code of {}\n--- stdout\n{}\n--- stderr\n{}", self.name, self.stdout, self.stderr);
        self
    }

    /// Checks that it succeeded; returns itself.
    #[track_caller]
    pub fn expect_success(self) -> Finished {
        self.expect_code(crate::exit::OK)
    }

    /// Checks a refusal: this exit code, and exactly one message which holds every one of `words`, without the marks of a
    /// crash. A command that shows a job's progress tells its failure there; others write to standard error. Returns
    /// itself.
    #[track_caller]
    pub fn expect_refusal(self, code: i32, words: &[&str]) -> Finished {
        let this = self.expect_code(code);
        let text = this.text();
        for word in words {
            assert!(text.contains(word), "{}: the message does not say {word:?}:\n{text}", this.name);
        }
        for crash in ["panicked", "RUST_BACKTRACE", "stack backtrace", "core dumped", "SIGSEGV", "SIGBUS", "SIGKILL"] {
            assert!(!text.contains(crash), "{}: a crash and not a message:\n{text}", this.name);
        }
        let is_error = |line: &&str| ["ramtorch: ", "ramtorchd: ", "error: ", "failed "].iter().any(|mark| line.starts_with(mark));
        let errors = text.lines().filter(is_error).count();
        assert!(errors == 1, "{}: {errors} error messages, not one:\n{text}", this.name);
        this
    }

    /// Standard output and standard error, one after the other.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{}: not JSON ({e}):\n{}", self.name, self.stdout))
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn lossy(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
