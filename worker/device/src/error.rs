//! Why a worker gave up.

use ramtorch_store::StoreError;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why the engine gave up, and what the exit code will be.
#[derive(Debug, Clone, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct EngineError {
    /// Class.
    pub kind: ErrorKind,
    /// What was wrong, where, and what to do.
    pub message: String,
    /// Status of the device's driver (CUDA: `CUresult`), where one was the cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_code: Option<u32>,
}

/// Class of failure; the exit codes are documented in docs/exit-codes.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The job file is wrong: 10.
    JobFile,
    /// A model or data file is missing, damaged or does not fit: 11.
    Input,
    /// Not enough memory or devices: 12.
    Resources,
    /// A file cannot be written (disk full, permissions): 13.
    Output,
    /// A defect of ramtorch or of the machine: 1. Worth a restart.
    Internal,
}

impl ErrorKind {
    /// Process exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorKind::JobFile => 10,
            ErrorKind::Input => 11,
            ErrorKind::Resources => 12,
            ErrorKind::Output => 13,
            ErrorKind::Internal => 1,
        }
    }
}

impl EngineError {
    /// An error of class `kind`.
    pub fn new(kind: ErrorKind, message: impl std::fmt::Display) -> Self {
        EngineError { kind, message: message.to_string(), device_code: None }
    }
    /// The same error, caused by this status of the device's driver.
    pub fn with_device_code(self, code: u32) -> Self {
        EngineError { device_code: Some(code), ..self }
    }
    /// A model or data file is wrong.
    pub fn input(message: impl std::fmt::Display) -> Self {
        Self::new(ErrorKind::Input, message)
    }
    /// A defect.
    pub fn internal(message: impl std::fmt::Display) -> Self {
        Self::new(ErrorKind::Internal, message)
    }
    /// `what` panicked: what a join, or [`caught`], has of it.
    pub fn panicked(what: &str, panic: &(dyn Any + Send)) -> Self {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Self::internal(format!("a defect in ramtorch: {what} panicked: {}", text.unwrap_or("no text")))
    }
}

/// Runs `f` on a thread that others wait for: a panic of `what` is an error that reaches them, with its text, instead of a
/// thread that is silently gone. Nothing that `f` has touched is to be used after it.
///
/// # Errors
/// Those of `f`, and its panic.
pub fn caught<T>(what: &str, f: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(EngineError::panicked(what, panic.as_ref())))
}

impl From<StoreError> for EngineError {
    fn from(e: StoreError) -> Self {
        let kind = match e {
            StoreError::ShmFull { .. } | StoreError::RamFull { .. } => ErrorKind::Resources,
            _ => ErrorKind::Internal,
        };
        EngineError::new(kind, e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_text() {
        let text = |f: fn() -> Result<(), EngineError>| caught("the thread", f).unwrap_err().message;
        assert_eq!(text(|| panic!("plain")), "a defect in ramtorch: the thread panicked: plain");
        assert_eq!(text(|| panic!("page {}", 7)), "a defect in ramtorch: the thread panicked: page 7");
        assert_eq!(text(|| std::panic::panic_any(7)), "a defect in ramtorch: the thread panicked: no text");
        assert_eq!(text(|| Err(EngineError::input("bad"))), "bad");
    }
}
