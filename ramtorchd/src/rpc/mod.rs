//! The gRPC services. They check what comes in, ask the state task, and turn its answers into messages; no state lives
//! here.

mod convert;
mod jobs;
mod node;
mod oneoff;
mod worker;

pub use jobs::JobsService;
pub use node::NodeService;
pub use worker::WorkerService;

use crate::access::Caller;
use crate::access::outputs::{self, Ledger, Output, Writer};
use crate::access::paths::{PathError, Roots};
use crate::disk::Witness;
use crate::supervisor::Message;
use crate::supervisor::outside::Engine;
use crate::supervisor::{Handle, Pulse, Refusal, RefusalKind};
use std::path::PathBuf;
use std::sync::Arc;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Code, Request, Status};

/// Largest job file, in bytes.
pub const MAX_JOB_FILE_BYTES: usize = 1 << 20;
/// Largest message between daemon and worker, in bytes; the largest are plans of very large models.
pub const MAX_WORKER_BYTES: usize = 256 << 20;

/// What the services need to know of their daemon.
#[derive(Clone)]
pub struct Context {
    /// Way to the state task.
    pub handle: Handle,
    /// Whether that goes round.
    pub pulse: Pulse,
    /// For plans outside jobs.
    pub engine: Arc<dyn Engine>,
    /// Folder of all jobs.
    pub jobs: PathBuf,
    /// Sees when a job's record is on the disk.
    pub records: Witness,
    /// Folder of token caches.
    pub cache: PathBuf,
    /// State folder.
    pub state_dir: PathBuf,
    /// Start of the daemon, milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Largest message from a client, in bytes; the largest are job files.
    pub request_bytes: usize,
    /// Folders below which is read and written.
    pub roots: Arc<Roots>,
    /// Whose job made what.
    pub ledger: Arc<Ledger>,
}

impl Context {
    /// The id of the job that `caller` means, if it is the caller's to look into.
    async fn own(&self, caller: &Caller, id: String) -> Result<String, Refusal> {
        let caller = caller.clone();
        self.handle.ask(|reply| Message::Resolve { id, caller, reply }).await
    }

    /// Checks paths, which touches the file system.
    async fn allowed(&self, check: impl FnOnce(&Roots) -> Result<(), PathError> + Send + 'static) -> Result<(), Refusal> {
        if self.roots.is_open() {
            return Ok(());
        }
        let roots = self.roots.clone();
        let checked = tokio::task::spawn_blocking(move || check(&roots)).await;
        let checked = checked.map_err(|e| Refusal::new(RefusalKind::Denied, format!("cannot check paths: {e}")))?;
        checked.map_err(|e| Refusal::new(RefusalKind::Denied, e.to_string()))
    }

    /// Checks that what is there of these is the caller's to write, which touches the file system. Returns where they are.
    async fn writable(&self, caller: &Caller, process_gid: Option<u32>, outputs: Vec<Output>) -> Result<Vec<PathBuf>, Refusal> {
        let (caller, ledger) = (caller.clone(), self.ledger.clone());
        let denied = |e: String| Refusal::new(RefusalKind::Denied, e);
        let checked = tokio::task::spawn_blocking(move || {
            if caller.admin || outputs.is_empty() {
                return Ok(outputs::places(&outputs));
            }
            let who = Writer::look_up(caller.uid, process_gid);
            ledger.check(&outputs, &who)?;
            // Judged again where they will be written: a link may have led elsewhere a moment ago.
            let placed = outputs::placed(&outputs);
            ledger.check(&placed, &who)?;
            Ok(placed.into_iter().map(|o| o.path).collect())
        });
        let checked: Result<_, outputs::OutputError> = checked.await.map_err(|e| denied(format!("cannot check outputs: {e}")))?;
        checked.map_err(|e| denied(e.to_string()))
    }

    /// Notes whose these are from now on.
    async fn claim(&self, caller: &Caller, places: Vec<PathBuf>) {
        let (caller, ledger) = (caller.clone(), self.ledger.clone());
        let noted = tokio::task::spawn_blocking(move || ledger.claim(&places, caller.uid, caller.admin, crate::node::unix_ms()));
        if let Err(e) = noted.await {
            tracing::error!("whose outputs these are was not noted: {e}");
        }
    }
}

/// Who calls; the gate has found out.
fn caller<T>(request: &Request<T>) -> Result<Caller, Refusal> {
    let known = request.extensions().get::<Caller>().cloned();
    known.ok_or_else(|| Refusal::new(RefusalKind::Denied, "nobody knows who calls"))
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Status {
        use ramtorch_client::exit;
        use ramtorch_worker::ErrorKind;
        let (code, exit) = match refusal.kind {
            RefusalKind::NotFound => (Code::NotFound, exit::NOT_FOUND),
            RefusalKind::State => (Code::FailedPrecondition, exit::USAGE),
            RefusalKind::Invalid => (Code::InvalidArgument, exit::USAGE),
            RefusalKind::Stopping => (Code::Unavailable, exit::UNREACHABLE),
            RefusalKind::Denied => (Code::PermissionDenied, exit::UNREACHABLE),
            RefusalKind::Busy => (Code::ResourceExhausted, exit::RESOURCES),
            RefusalKind::Engine(kind) => {
                let code = match kind {
                    ErrorKind::JobFile => Code::InvalidArgument,
                    ErrorKind::Input | ErrorKind::Output => Code::FailedPrecondition,
                    ErrorKind::Resources => Code::ResourceExhausted,
                    ErrorKind::Internal => Code::Internal,
                };
                (code, kind.exit_code())
            }
        };
        let mut status = Status::new(code, refusal.message);
        status.metadata_mut().insert(ramtorch_client::EXIT_CODE_METADATA, u32::from(exit).into());
        status
    }
}

/// A request that makes no sense.
fn invalid(message: impl Into<String>) -> Refusal {
    Refusal::new(RefusalKind::Invalid, message)
}

/// Which process calls, as the kernel says.
fn peer_pid<T>(request: &Request<T>) -> Option<i32> {
    request.extensions().get::<UdsConnectInfo>().and_then(|i| i.peer_cred).and_then(|c| c.pid())
}

/// Group of the process that calls, as the kernel says.
fn peer_gid<T>(request: &Request<T>) -> Option<u32> {
    request.extensions().get::<UdsConnectInfo>().and_then(|i| i.peer_cred).map(|c| c.gid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_carries_its_exit_code() {
        use ramtorch_worker::ErrorKind;
        let exit = |kind| {
            let status = Status::from(Refusal::new(kind, "why"));
            assert_ne!(status.code(), Code::Ok);
            assert_eq!(status.message(), "why");
            status.metadata().get(ramtorch_client::EXIT_CODE_METADATA).unwrap().to_str().unwrap().to_string()
        };
        assert_eq!(exit(RefusalKind::NotFound), "102");
        assert_eq!(exit(RefusalKind::Engine(ErrorKind::Input)), "11");
        assert_eq!(exit(RefusalKind::Engine(ErrorKind::Output)), "13");
        assert_eq!(exit(RefusalKind::Stopping), "14");
    }
}
