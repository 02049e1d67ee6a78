//! Errors of GPUs: what each calls for.
//!
//! ```text
//!  worker: code of CUDA in its result ─┐                        ┌─ restart      the gang starts again
//!                                      ├─► table ─► verdict ────┼─ quarantine   its device goes out of use, then as above
//!  kernel log: Xid of the driver ──────┘                        ├─ fail         the job ends: again would be the same
//!                                                               └─ note         told, and nothing else
//! ```
//! A quarantined device comes back when the daemon starts again: nobody but an operator knows that it was reset or replaced.

pub mod kernel_log;
pub mod table;

pub use table::Verdict;

/// Where an error was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A status of the CUDA driver, in a worker's report.
    Cuda,
    /// An Xid of the kernel driver, in the kernel's log.
    Xid,
}

impl Source {
    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Source::Cuda => "cuda",
            Source::Xid => "xid",
        }
    }
}

/// An error of one GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuError {
    /// Index of the device among the daemon's.
    pub device: usize,
    /// Who told.
    pub source: Source,
    /// Its code there.
    pub code: u32,
}

impl GpuError {
    /// What it calls for.
    pub fn verdict(&self) -> Verdict {
        match self.source {
            Source::Cuda => table::cuda(self.code).verdict,
            Source::Xid => table::xid(self.code).verdict,
        }
    }

    /// Its name in metrics: the code, if it is one that is known.
    pub fn label(&self) -> String {
        let known = match self.source {
            Source::Cuda => table::CUDA.iter().any(|e| e.code == self.code),
            Source::Xid => table::XID.iter().any(|e| e.code == self.code),
        };
        if known { self.code.to_string() } else { "other".into() }
    }

    /// For people.
    pub fn describe(&self) -> String {
        match self.source {
            Source::Cuda => format!("CUDA error {} ({})", self.code, table::cuda(self.code).name),
            Source::Xid => format!("Xid {} ({})", self.code, table::xid(self.code).name),
        }
    }
}
