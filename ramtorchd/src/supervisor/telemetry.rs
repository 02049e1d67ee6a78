//! What Prometheus is told, taken from the books at one moment.

use super::Supervisor;
use super::job::Job;
use super::message::Books;
use crate::node::Memory;
use ramtorch_proto::v1 as pb;
use std::collections::BTreeMap;

/// The books in numbers.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Start of the daemon, milliseconds since 1970.
    pub started_unix_ms: i64,
    /// Jobs by state; every state is there.
    pub jobs_by_state: BTreeMap<String, u64>,
    /// Jobs that have not ended, oldest first.
    pub jobs: Vec<JobSample>,
    /// First causes of failures of gangs, by kind.
    pub failures_by_cause: BTreeMap<&'static str, u64>,
    /// Of those, the ones that a restart followed.
    pub restarts_by_cause: BTreeMap<&'static str, u64>,
    /// Errors of GPUs: by device, source (`cuda`, `xid`) and code.
    pub gpu_errors: BTreeMap<(String, &'static str, String), u64>,
    /// Devices.
    pub devices: Vec<pb::DeviceInfo>,
    /// Memory.
    pub memory: Memory,
    /// Bytes of all segments.
    pub reserved_bytes: u64,
    /// Worker processes.
    pub processes: usize,
    /// One-off calls.
    pub one_offs: usize,
}

/// One job.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct JobSample {
    pub id: String,
    pub name: String,
    pub state: String,
    pub step: u64,
    pub steps: u64,
    pub restarts: u32,
    pub segment_bytes: u64,
    pub last: Option<pb::Metrics>,
    pub validation_loss: Option<f64>,
    pub checkpoints: u64,
    pub checkpoint_failures: u64,
    pub checkpoint_step: Option<u64>,
    pub checkpoint_unix_ms: Option<i64>,
}

/// What is counted while the daemon lives.
#[derive(Debug, Default)]
pub struct Tally {
    /// Start of the daemon, milliseconds since 1970.
    pub started_unix_ms: i64,
    /// As in [`Snapshot`].
    pub failures_by_cause: BTreeMap<&'static str, u64>,
    /// As in [`Snapshot`].
    pub restarts_by_cause: BTreeMap<&'static str, u64>,
    /// As in [`Snapshot`].
    pub gpu_errors: BTreeMap<(String, &'static str, String), u64>,
}

/// What is counted of one job's checkpoints.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckpointTally {
    /// Written.
    pub written: u64,
    /// Not written.
    pub failed: u64,
    /// The newest: its step, and when it became durable.
    pub newest: Option<(u64, i64)>,
}

const STATES: [pb::JobState; 9] = [
    pb::JobState::Queued,
    pb::JobState::Preparing,
    pb::JobState::Starting,
    pb::JobState::Running,
    pb::JobState::Restarting,
    pb::JobState::Stopping,
    pb::JobState::Succeeded,
    pb::JobState::Failed,
    pb::JobState::Cancelled,
];

fn state_name(state: pb::JobState) -> String {
    state.as_str_name().trim_start_matches("JOB_STATE_").to_ascii_lowercase()
}

impl Supervisor {
    pub(super) fn telemetry(&mut self) -> Snapshot {
        let Books { devices, reserved_bytes, memory, .. } = self.books();
        let mut jobs_by_state: BTreeMap<String, u64> = STATES.map(|s| (state_name(s), 0)).into();
        for job in self.jobs.values() {
            *jobs_by_state.entry(state_name(job.state())).or_default() += 1;
        }
        Snapshot {
            started_unix_ms: self.tally.started_unix_ms,
            jobs_by_state,
            jobs: self.jobs.active().take(crate::telemetry::JOBS_MAX).map(sample).collect(),
            failures_by_cause: self.tally.failures_by_cause.clone(),
            restarts_by_cause: self.tally.restarts_by_cause.clone(),
            gpu_errors: self.tally.gpu_errors.clone(),
            devices,
            memory,
            reserved_bytes,
            processes: self.procs.len(),
            one_offs: self.one_offs.len(),
        }
    }
}

fn sample(job: &Job) -> JobSample {
    let r = &job.record;
    let c = &job.checkpoint_tally;
    JobSample {
        id: r.id.clone(),
        name: r.name.clone(),
        state: state_name(job.state()),
        step: r.step,
        steps: r.steps,
        restarts: r.restarts,
        segment_bytes: r.segment.as_ref().map_or(0, |s| s.bytes),
        last: job.history.back().cloned(),
        validation_loss: job.history.iter().rev().find_map(|m| m.validation_loss),
        checkpoints: c.written,
        checkpoint_failures: c.failed,
        checkpoint_step: c.newest.map(|n| n.0),
        checkpoint_unix_ms: c.newest.map(|n| n.1),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A snapshot with something of everything.
    pub fn full() -> Snapshot {
        let metrics = pb::Metrics { step: 3, loss: f64::NAN, tokens_total: 100, ..Default::default() };
        let job = JobSample {
            id: "abc".into(),
            name: "one".into(),
            state: "running".into(),
            last: Some(metrics),
            checkpoint_step: Some(2),
            checkpoint_unix_ms: Some(1),
            validation_loss: Some(0.5),
            ..JobSample::default()
        };
        Snapshot {
            started_unix_ms: 1,
            jobs_by_state: STATES.map(|s| (state_name(s), 1)).into(),
            jobs: vec![job],
            failures_by_cause: [("stalled", 1)].into(),
            restarts_by_cause: [("stalled", 1)].into(),
            gpu_errors: [(("cuda:0".to_string(), "xid", "79".to_string()), 2)].into(),
            devices: vec![pb::DeviceInfo { name: "cuda:0".into(), state: "free".into(), ..Default::default() }],
            memory: Memory { total: 4, available: 3, shm_total: 2, shm_free: 1 },
            reserved_bytes: 7,
            processes: 1,
            one_offs: 0,
        }
    }
}
