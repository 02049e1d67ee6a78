//! A private place for one test.

use crate::leaks::{self, MARK};
use crate::{Binary, Daemon, Finished, Fixture, JobFile, Process, binary};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

/// Longest that a run of a fixture may take, on a slow machine with other things to do.
const RUN_LIMIT: Duration = Duration::from_secs(180);

/// A temporary folder, an environment that leads nowhere else, and the proof at the end that nothing is left.
#[derive(Debug)]
pub struct Sandbox {
    folder: tempfile::TempDir,
    made: SystemTime,
}

impl Sandbox {
    /// A fresh one.
    ///
    /// # Panics
    /// The temporary folder cannot be made.
    pub fn new() -> Sandbox {
        // The file system's clock is coarser than the system's, and may be a tick behind.
        let made = SystemTime::now() - Duration::from_millis(20);
        // Short, because a socket's path has at most 107 bytes.
        let folder = tempfile::Builder::new().prefix("rt").tempdir_in("/tmp").expect("a temporary folder");
        for name in ["home", "tmp", "run", "output"] {
            std::fs::create_dir(folder.path().join(name)).expect("a folder in a fresh one");
        }
        Sandbox { folder, made }
    }

    /// Its folder.
    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// A path in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Writes a file; returns its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("a file lies in a folder")).expect("its folder");
        std::fs::write(&path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }

    /// A copy of a fixture's model folder that a test may damage.
    pub fn copy_model(&self, model: &str, name: &str) -> PathBuf {
        let (from, to) = (Fixture::model_path(model), self.path(name));
        std::fs::create_dir_all(&to).expect("a folder for the copy");
        for entry in std::fs::read_dir(&from).unwrap_or_else(|e| panic!("{}: {e}", from.display())).flatten() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy of a model file");
        }
        to
    }

    /// A command that runs one of the binaries in this sandbox.
    pub fn command(&self, which: Binary) -> Command {
        self.prepare(Command::new(binary(which)))
    }

    /// Any command, in this sandbox.
    pub fn prepare(&self, mut command: Command) -> Command {
        for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("RAMTORCH_")) {
            command.env_remove(name);
        }
        command
            .current_dir(self.root())
            .env(MARK, self.root())
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("XDG_STATE_HOME", self.path("home/state"))
            .env("XDG_CACHE_HOME", self.path("home/cache"))
            .env("XDG_CONFIG_HOME", self.path("home/config"))
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG");
        command
    }

    /// Starts a command of this sandbox.
    pub fn start(&self, command: Command) -> Process {
        Process::start(command, &self.path("output"))
    }

    /// Writes the job file as `<its name>.toml`.
    pub fn write_job(&self, file: &str, job: &JobFile) -> PathBuf {
        job.write(self.path(&format!("{file}.toml")))
    }

    /// `ramtorchd run` on a job, started.
    pub fn start_job(&self, file: &str, job: &JobFile, devices: &str) -> Process {
        let path = self.write_job(file, job);
        let mut command = self.command(Binary::Daemon);
        command.arg("run").arg(path).args(["--devices", devices]);
        self.start(command)
    }

    /// `ramtorchd run` on a job, to its end. Afterwards no process, segment, socket or temporary file may be left.
    #[track_caller]
    pub fn run_job(&self, file: &str, job: &JobFile, devices: &str) -> Finished {
        let finished = self.start_job(file, job, devices).wait(RUN_LIMIT);
        self.assert_clean();
        finished
    }

    /// One of the binaries with arguments, to its end.
    #[track_caller]
    pub fn run<A: AsRef<OsStr>>(&self, which: Binary, arguments: impl IntoIterator<Item = A>) -> Finished {
        let mut command = self.command(which);
        command.args(arguments);
        self.start(command).wait(RUN_LIMIT)
    }

    /// A daemon with these devices (`cpu:2`) and further arguments, ready to take jobs.
    #[track_caller]
    pub fn start_daemon(&self, devices: &str, more: &[&str]) -> Daemon<'_> {
        Daemon::start(self, devices, more)
    }

    /// `sh -ec SCRIPT` in a namespace of its own, in which it may mount file systems.
    pub fn namespace(&self, script: &str) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-ec", script]);
        self.prepare(command)
    }

    /// Whether `mount` succeeds in a namespace of its own. Where it does not, a test that needs it is skipped, and this says so.
    ///
    /// # Panics
    /// It does not although this is root, in CI: there the test would be skipped for ever, and nobody would notice.
    pub fn can_mount(&self, mount: &str) -> bool {
        let tried = self.namespace(mount).output();
        let why = match tried {
            Ok(o) if o.status.success() => return true,
            Ok(o) => String::from_utf8_lossy(&o.stderr).trim().to_owned(),
            Err(e) => format!("unshare: {e}"),
        };
        let text = format!("SKIPPED: this user may not mount a file system in a namespace: {why}");
        assert!(!(crate::in_ci() && nix::unistd::geteuid().is_root()), "{text}");
        crate::tell(&text);
        false
    }

    /// Processes of this sandbox that run now: pid and command line.
    pub fn processes(&self) -> Vec<(i32, String)> {
        leaks::processes(self.root())
    }

    /// Checks that nothing of this sandbox runs, listens or holds memory, and that no temporary file is left.
    ///
    /// # Panics
    /// Something is.
    #[track_caller]
    pub fn assert_clean(&self) {
        let processes = leaks::settle(|| leaks::processes(self.root()));
        assert!(processes.is_empty(), "processes left behind: {processes:?}");
        let segments = leaks::settle(|| leaks::orphan_segments(self.made));
        assert!(segments.is_empty(), "segments left behind: {segments:?}");
        let sockets = leaks::settle(|| leaks::sockets(self.root()));
        assert!(sockets.is_empty(), "sockets left behind: {sockets:?}");
        let entries = |name| std::fs::read_dir(self.path(name)).into_iter().flatten().flatten().map(|e| e.path());
        let files: Vec<_> = entries("tmp").collect();
        assert!(files.is_empty(), "temporary files left behind: {files:?}");
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Sandbox::new()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (pid, _) in leaks::processes(self.root()) {
                // It may have ended in between.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        } else {
            self.assert_clean();
        }
    }
}
