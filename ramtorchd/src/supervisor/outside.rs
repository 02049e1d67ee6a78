//! What the state task does to the world. None of it blocks; answers come back as messages.

use super::job::Job;
use super::message::JobKey;
use super::record::Record;
use crate::faults::kept::Fault;
use crate::node::Memory;
use crate::process::ProcKey;
use nix::sys::signal::Signal;
use ramtorch_store::{StepPhase, StepRecord, Store};
use ramtorch_worker::{EngineError, Plan, PlanRequest};
use std::path::PathBuf;

/// The world, as far as the state task acts on it. A trait so that its decisions are tested without processes,
/// files or time.
pub trait Outside: Send {
    /// Starts a worker with this secret, once what was saved of its job (if it is for one) is durable. Events of the
    /// process follow.
    fn spawn(&mut self, key: ProcKey, token: &str, log: PathBuf, job: Option<&Job>);
    /// Signals a started worker.
    fn signal(&mut self, key: ProcKey, signal: Signal);
    /// The process is gone: nothing will be done with it any more.
    fn forget(&mut self, key: ProcKey);
    /// Memory now.
    fn memory(&mut self) -> Memory;
    /// Plans a job; answered by `Message::Planned`. Where it does not fit, it is tried again with
    /// `alone_bytes` for the segment, to tell "later" from "never".
    fn plan(&mut self, job: JobKey, request: PlanRequest, alone_bytes: u64);
    /// Registers a segment durably, then creates it; answered by `Message::Created`, or by `Message::Unsettled` where it cannot
    /// be registered.
    fn create_segment(&mut self, job: JobKey, segment: NewSegment);
    /// Unlinks a segment, then forgets its registration; answered by `Message::Removed`. If this is the job's `end`, what was
    /// saved of it is durable before; where that cannot be, nothing is removed and `Message::Unsettled` is the answer.
    fn remove_segment(&mut self, job: JobKey, id: &str, name: String, end: bool);
    /// What a segment holds now. A look at a few words of it, at once.
    fn contents(&self, segment: &str) -> Contents;
    /// Makes a record durable, soon.
    fn save(&mut self, record: &Record);
    /// Keeps these devices out of use for the next daemon, soon.
    fn keep_faults(&mut self, faults: &[Fault]);
    /// Removes a forgotten job's folder, soon.
    fn delete(&mut self, id: &str);
    /// Removes log files of generations before `oldest`, soon.
    fn tidy_logs(&mut self, id: &str, oldest: u64);
    /// Folder of a job's logs.
    fn log_dir(&self, id: &str) -> PathBuf;
    /// Where the gang of a job keeps a line for each step.
    fn history_file(&self, id: &str) -> PathBuf;
    /// A log file for one-off work; and its removal, soon.
    fn one_off_log(&self, id: u64) -> PathBuf;
    /// Removes that file.
    fn remove_one_off_log(&mut self, id: u64);
    /// Folder of token caches.
    fn cache_dir(&self) -> PathBuf;
    /// A new secret.
    fn token(&mut self) -> std::io::Result<String>;
    /// Milliseconds since 1970.
    fn unix_ms(&self) -> i64;
    /// This boot.
    fn boot_id(&self) -> &str;
}

/// A segment to create.
#[derive(Debug, Clone)]
pub struct NewSegment {
    /// POSIX shared-memory name.
    pub name: String,
    /// Job that it is for.
    pub job_id: String,
    /// Generation of the first gang that uses it.
    pub generation: u64,
    /// What goes into it.
    pub plan: Box<Plan>,
}

/// What a segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// The state of this step, whole, and maybe more.
    Step(u64),
    /// Nothing yet: it is being filled from files that are still there.
    Filling,
    /// It cannot be read, by this program at least.
    Unknown,
}

impl Contents {
    /// As the segment's own record of its step says.
    pub fn of(record: &StepRecord) -> Contents {
        match record.phase {
            StepPhase::Loading => Contents::Filling,
            StepPhase::Committed => Contents::Step(record.step),
            StepPhase::Computing | StepPhase::GradientsComplete | StepPhase::Updating => Contents::Step(record.step.saturating_sub(1)),
        }
    }
}

/// The engine, as the daemon calls it. A trait so that the supervisor is tested without one.
pub trait Engine: Send + Sync {
    /// As [`ramtorch_worker::plan`].
    ///
    /// # Errors
    /// As there.
    fn plan(&self, request: &PlanRequest) -> Result<Plan, EngineError>;
    /// As [`ramtorch_worker::create_segment`].
    ///
    /// # Errors
    /// As there.
    fn create_segment(&self, name: &str, plan: &Plan) -> Result<(), EngineError>;
    /// What a segment holds now.
    fn contents(&self, name: &str) -> Contents {
        Store::attach_read_only(name).map_or(Contents::Unknown, |store| Contents::of(&store.record()))
    }
}

/// The engine that is linked into this program.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkedEngine;

impl Engine for LinkedEngine {
    fn plan(&self, request: &PlanRequest) -> Result<Plan, EngineError> {
        ramtorch_worker::plan(request)
    }
    fn create_segment(&self, name: &str, plan: &Plan) -> Result<(), EngineError> {
        ramtorch_worker::create_segment(name, plan)
    }
}
