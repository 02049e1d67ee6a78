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
        checkpoint_step: r.checkpoint.as_ref().and(r.checkpoint_step),
        checkpoint_unix_ms: newest_checkpoint(job),
    }
}

/// When a job was last safe: its newest checkpoint, of whatever daemon. Of one that is to write some and has none yet it is its
/// start, so that an alert on old checkpoints finds a job that never gets one.
fn newest_checkpoint(job: &Job) -> Option<i64> {
    let (r, wanted) = (&job.record, &job.spec.checkpoint);
    if r.checkpoint.is_some() && r.checkpoint_unix_ms > 0 {
        return Some(r.checkpoint_unix_ms);
    }
    let due = r.checkpoint.is_some() || (wanted.path.is_some() && wanted.every_steps > 0);
    Some(r.started_unix_ms).filter(|at| due && *at > 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use ramtorch_job::JobSpec;

    fn job(checkpoint: &str) -> Job {
        let text = format!(
            "name = \"a\"\n[model]\npath = \"m\"\n[data]\nformat = \"text\"\ntrain = \"t\"\n[train]\nsteps = 3\nbatch_size = 2\n{checkpoint}"
        );
        let spec = JobSpec::parse(&text, std::path::Path::new("/"), "j").unwrap();
        let record = crate::supervisor::record::Record::new("j".into(), &spec, 5, 1);
        Job::new(crate::supervisor::message::JobKey(1), record, spec)
    }

    #[test]
    fn a_checkpoint_is_as_old_as_the_record_says() {
        let told = |job: &Job| (sample(job).checkpoint_step, sample(job).checkpoint_unix_ms);
        let mut without = job("");
        without.record.started_unix_ms = 70;
        assert_eq!(told(&without), (None, None), "it writes none");
        let mut job = job("[checkpoint]\npath = \"c\"\nevery_steps = 2\n");
        assert_eq!(told(&job), (None, None), "it has not begun");
        job.record.started_unix_ms = 70;
        assert_eq!(told(&job), (None, Some(70)), "it has none yet");
        (job.record.checkpoint, job.record.checkpoint_step) = (Some("/c/step-2".into()), Some(2));
        assert_eq!(told(&job), (Some(2), Some(70)), "a record of an earlier version");
        job.record.checkpoint_unix_ms = 90;
        // What a daemon that starts has read, whose own count is nothing.
        assert_eq!((told(&job), job.checkpoint_tally.written), ((Some(2), Some(90)), 0));
    }

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
