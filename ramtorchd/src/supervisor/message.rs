//! What the state task is told, and what it answers.

use super::oneoff::OneOffEvent;
use super::record::Record;
use super::telemetry::Snapshot;
use super::watchers::Ear;
use crate::access::Caller;
use crate::faults::kernel_log::Xid;
use crate::node::Memory;
use crate::process;
use crate::process::ProcKey;
use ramtorch_job::JobSpec;
use ramtorch_proto::v1 as pb;
use ramtorch_proto::v1::worker_report::Report;
use ramtorch_worker::{DeviceSpec, EngineError, ErrorKind, Plan, Source, Task};
use std::path::PathBuf;
use tokio::sync::{mpsc, oneshot, watch};

/// Names one job, alone in the life of a daemon; smaller is older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKey(pub u64);

/// Where an answer goes. A caller who went away is no error.
pub type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// A trace as it comes; its end is the end of the trace.
pub type TraceParts = mpsc::UnboundedReceiver<Result<pb::TracePart, Refusal>>;

/// Commands to a worker.
pub type Commands = mpsc::Sender<Result<pb::Command, tonic::Status>>;

/// Everything that the state task reacts to. Time is the other thing; see `Supervisor::tick`.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Message {
    /// A job whose record is already durable.
    Submit { record: Box<Record>, spec: Box<JobSpec>, caller: Caller, reply: Reply<pb::Job> },
    /// Whether no job that has not ended writes there.
    Vacant { outputs: Vec<PathBuf>, uid: u32, reply: Reply<()> },
    /// The id of the job that a caller means, if it is the caller's to look into.
    Resolve { id: String, caller: Caller, reply: Reply<String> },
    /// What is told to Prometheus.
    Telemetry { reply: Reply<Snapshot> },
    /// One job.
    Get { id: String, reply: Reply<pb::Job> },
    /// Jobs, oldest first.
    List { all: bool, reply: Reply<Vec<pb::Job>> },
    /// A job's past and future.
    Watch { id: String, history: usize, reply: Reply<Watching> },
    /// End a job.
    Cancel { id: String, reply: Reply<pb::Job> },
    /// Checkpoint at the next step boundary; answered when it is durable.
    Checkpoint { id: String, reply: Reply<pb::CheckpointResponse> },
    /// Record a timeline; the parts come as the ranks send them.
    Trace { id: String, first_step: u64, steps: u64, reply: Reply<TraceParts> },
    /// Where a job's logs are.
    Logs { id: String, reply: Reply<LogSource> },
    /// Where a job's weights are.
    Source { id: String, reply: Reply<Source> },
    /// Devices and memory, for a plan outside a job.
    PlanContext { ranks: Option<usize>, memory_bytes: Option<u64>, reply: Reply<PlanContext> },
    /// Work of its own process that is no job.
    OneOff { task: Box<Task>, gpu: bool, caller: Caller, reply: Reply<mpsc::UnboundedReceiver<OneOffEvent>> },
    /// The machine, as the books have it.
    Info { reply: Reply<Books> },

    /// First call of a worker.
    Register { token: String, pid: i32, start_ticks: u64, peer_pid: Option<i32>, reply: Reply<pb::Assignment> },
    /// A worker's control stream.
    Opened { token: String, commands: Commands, reply: Reply<ProcKey> },
    /// Something on it.
    Report { key: ProcKey, report: Report },
    /// Its end; nothing of this worker follows.
    Closed { key: ProcKey },

    /// A process started or ended.
    Process(process::Event),
    /// Answer to `Outside::plan`.
    Planned { job: JobKey, outcome: Planned },
    /// Answer to `Outside::create_segment`.
    Created { job: JobKey, outcome: Result<(), EngineError> },
    /// Answer to `Outside::remove_segment`.
    Removed { job: JobKey, outcome: Result<(), String> },
    /// Another answer to both: the state folder did not take what has to be durable before, and nothing was done.
    Unsettled { job: JobKey, why: String },

    /// The kernel's log tells of an error of a GPU.
    Xid(Xid),
    /// A process of an earlier daemon, which could not be ended, is gone.
    Survivor { pid: i32 },
    /// End the daemon. The second one does not wait any more.
    Stop,
    /// The daemon has to end, and the segments of jobs that have not ended stay for the next one.
    StopKeeping,
}

/// What planning found.
#[derive(Debug)]
pub enum Planned {
    /// It fits into what is free now.
    Fits(Box<Plan>),
    /// It would fit if nothing else ran. The text says what is missing now.
    Later(String),
    /// It can never run here.
    Never(EngineError),
}

/// What a watcher gets first.
#[derive(Debug)]
pub struct Watching {
    /// The job as it is.
    pub job: pb::Job,
    /// Its last metrics, oldest first.
    pub history: Vec<pb::Metrics>,
    /// Where all metrics of a job that has ended are.
    pub history_file: Option<PathBuf>,
    /// What comes; none for a job that has ended.
    pub events: Option<Ear>,
}

/// A job's log files.
#[derive(Debug)]
pub struct LogSource {
    /// Folder with them.
    pub dir: PathBuf,
    /// Becomes true when nothing will be added any more.
    pub ended: watch::Receiver<bool>,
}

/// What a plan outside a job is made for.
#[derive(Debug)]
pub struct PlanContext {
    /// Devices it would get.
    pub devices: Vec<DeviceSpec>,
    /// Bytes a new segment may take now.
    pub segment_bytes: u64,
    /// Bytes of RAM a new job may take in all.
    pub ram_bytes: u64,
}

/// The daemon's books.
#[derive(Debug)]
pub struct Books {
    /// Devices, as the protocol has them.
    pub devices: Vec<pb::DeviceInfo>,
    /// Bytes of all segments.
    pub reserved_bytes: u64,
    /// Jobs that have not ended.
    pub jobs_active: u32,
    /// Memory now.
    pub memory: Memory,
}

/// Why a call is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Class.
    pub kind: RefusalKind,
    /// Text for the user.
    pub message: String,
}

/// Class of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// No such job.
    NotFound,
    /// Not in this state of the job.
    State,
    /// The request makes no sense.
    Invalid,
    /// The daemon stops.
    Stopping,
    /// Not by this caller.
    Denied,
    /// Too much at once.
    Busy,
    /// The work failed.
    Engine(ErrorKind),
}

impl Refusal {
    /// A refusal of class `kind`.
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Refusal {
        Refusal { kind, message: message.into() }
    }
}

impl From<EngineError> for Refusal {
    fn from(e: EngineError) -> Refusal {
        Refusal::new(RefusalKind::Engine(e.kind), e.message)
    }
}
