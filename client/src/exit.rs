//! Exit codes of `ramtorch` and `ramtorchd run`; docs/exit-codes.md explains them to users.

/// Done.
pub const OK: u8 = 0;
/// A defect of ramtorch or of the machine.
pub const INTERNAL: u8 = 1;
/// The command line, or what it asks for, makes no sense.
pub const USAGE: u8 = 2;
/// The job file is wrong.
pub const JOB_FILE: u8 = 10;
/// A model or data file is missing, damaged or does not fit.
pub const INPUT: u8 = 11;
/// Not enough memory or devices.
pub const RESOURCES: u8 = 12;
/// Output cannot be written.
pub const OUTPUT: u8 = 13;
/// The daemon cannot be reached, or did not answer in time.
pub const UNREACHABLE: u8 = 14;
/// A daemon is already running on this socket.
pub const ALREADY_RUNNING: u8 = 15;
/// The job failed, and nothing more precise is known.
pub const JOB_FAILED: u8 = 100;
/// The job goes on: the command detached from it, or its time was up.
pub const NOT_FINISHED: u8 = 101;
/// No such job.
pub const NOT_FOUND: u8 = 102;
/// The job was cancelled.
pub const CANCELLED: u8 = 103;
/// Interrupted from the keyboard.
pub const INTERRUPTED: u8 = 130;

/// The short name of an exit code, as the JSON form of an error gives it in `kind`.
///
/// ```
/// assert_eq!(ramtorch_client::exit::kind(ramtorch_client::exit::NOT_FOUND), "not_found");
/// ```
pub fn kind(code: u8) -> &'static str {
    match code {
        OK => "ok",
        USAGE => "usage",
        JOB_FILE => "job_file",
        INPUT => "input",
        RESOURCES => "resources",
        OUTPUT => "output",
        UNREACHABLE => "unreachable",
        ALREADY_RUNNING => "already_running",
        JOB_FAILED => "job_failed",
        NOT_FINISHED => "not_finished",
        NOT_FOUND => "not_found",
        CANCELLED => "cancelled",
        INTERRUPTED => "interrupted",
        _ => "internal",
    }
}
