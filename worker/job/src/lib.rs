//! The job file: what a user asks for, as TOML.
//!
//! [`JobSpec::parse`] reads a file, refuses unknown keys (naming key and line), resolves relative paths and checks
//! everything that can be checked without opening another file. The learning-rate schedules live here too
//! ([`schedule`]), since they are pure functions of the job file.
#![forbid(unsafe_code)]

mod check;
pub mod schedule;
mod spec;

pub use check::SpecError;
pub use spec::*;
