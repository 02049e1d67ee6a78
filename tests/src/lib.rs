//! End-to-end tests of ramtorch: a small framework that launches the real binaries.
//!
//! ```text
//!   Sandbox ── owns a temporary folder, a private HOME and XDG folders, and an identity in the environment of every
//!      │       process started in it; on drop it proves that nothing is left: no process, segment, or socket
//!      ├── run_job(&JobFile, "cpu:3")     ramtorchd run, to its end      ─► Finished { code, stdout, stderr, … }
//!      └── start_daemon("cpu:2")          ramtorchd start                ─► Daemon ── client(["submit", …]) ─► Finished
//! ```
//!
//! The tests in `tests/` are the specification of what a user sees: exit codes, files, messages, numbers. They know
//! nothing of the crates inside. [`Fixture`] gives the tiny models and PyTorch's results on them; how those were made is
//! in `fixtures/make_fixtures.py`.
#![forbid(unsafe_code)]

mod binaries;
pub mod chance;
mod daemon;
pub mod disturbed;
mod fixture;
mod job;
mod leaks;
mod metrics;
pub mod observed;
mod process;
mod sandbox;
mod tensors;

pub use binaries::{Binary, binary};
pub use daemon::Daemon;
pub use fixture::{FinalTensor, Fixture, Inference, fixture_path, inference};
pub use job::{JobFile, Literal};
pub use leaks::settle as settled;
pub use metrics::{MetricsLine, StepBits, bits, losses, read_metrics, relative_difference, worst_relative_difference};
pub use process::{Finished, Process};
pub use sandbox::Sandbox;
pub use tensors::{Tensor, assert_same_tensors, read_tensors, write_tensors};

/// Whether this runs in CI, where what a test needs has to be there.
pub fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|v| v == "true")
}

/// Tells something that must be seen although the test succeeds: the test harness keeps what tests print to themselves.
pub fn tell(text: &str) {
    use std::io::Write;
    // Not `eprintln!`, which is captured. Nothing can be done about a standard error that is closed.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Exit codes that users rely on.
pub mod exit {
    /// Done.
    pub const OK: i32 = 0;
    /// The command line makes no sense.
    pub const USAGE: i32 = 2;
    /// The job file is wrong.
    pub const JOB_FILE: i32 = 10;
    /// A model or data file is missing, damaged or does not fit.
    pub const INPUT: i32 = 11;
    /// Not enough memory or devices.
    pub const RESOURCES: i32 = 12;
    /// Output cannot be written.
    pub const OUTPUT: i32 = 13;
    /// No daemon answers.
    pub const UNREACHABLE: i32 = 14;
    /// The socket is taken.
    pub const ALREADY_RUNNING: i32 = 15;
    /// The command came back before the job ended.
    pub const NOT_FINISHED: i32 = 101;
    /// No such job.
    pub const NOT_FOUND: i32 = 102;
    /// The job was cancelled.
    pub const CANCELLED: i32 = 103;
}
