//! Errors of GPUs: what each calls for.
//!
//! ```text
//!  worker: code of CUDA in its result ─┐                        ┌─ restart      the gang starts again
//!                                      ├─► table ─► verdict ────┼─ quarantine   its device goes out of use, then as above
//!  kernel log: Xid of the driver ──────┘                        ├─ fail         the job ends: again would be the same
//!                                                               └─ note         told, and nothing else
//! ```
//! A quarantine is kept in the state folder. Nobody but an operator knows that a device was reset or replaced, and ends it.

pub mod kept;
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

/// Source and label, as in metrics, of all errors that may be counted.
pub fn labels() -> impl Iterator<Item = (&'static str, String)> {
    let known = |source: Source, codes: Vec<u32>| {
        let labels = codes.into_iter().map(|code| code.to_string()).chain(std::iter::once("other".to_string()));
        labels.map(move |label| (source.name(), label))
    };
    let cuda = table::CUDA.iter().map(|e| e.code).collect();
    let xid = table::XID.iter().map(|e| e.code).collect();
    known(Source::Cuda, cuda).chain(known(Source::Xid, xid))
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

    /// As [`GpuError::verdict`], for a process that may have taken the place of others: the end of a process is not yet the
    /// return of its memory, so that too little of it is worth another start.
    pub fn verdict_where(&self, others_were_there: bool) -> Verdict {
        if others_were_there && self.is_out_of_memory() { Verdict::Restart } else { self.verdict() }
    }

    /// Whether the GPU had no memory left.
    pub fn is_out_of_memory(&self) -> bool {
        self.source == Source::Cuda && self.code == table::CUDA_OUT_OF_MEMORY
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_memory_is_worth_another_start_where_a_process_has_just_ended() {
        let error = |source, code| GpuError { device: 0, source, code };
        let full = error(Source::Cuda, 2);
        assert_eq!((full.verdict_where(false), full.verdict_where(true)), (Verdict::Fail, Verdict::Restart));
        for other in [error(Source::Cuda, 803), error(Source::Cuda, 214), error(Source::Xid, 2), error(Source::Xid, 79)] {
            assert_eq!(other.verdict_where(true), other.verdict(), "{other:?}");
        }
    }
}
