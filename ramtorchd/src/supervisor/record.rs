//! What is kept of a job on disk, so that a daemon that starts again knows it.

use crate::process::Identity;
use ramtorch_proto::v1 as pb;
use ramtorch_worker::{Plan, Prepared, StepMetrics};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Version of the format; a newer one is not read.
pub const VERSION: u32 = 1;

/// `jobs/ID/job.json`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`]
    pub version: u32,
    /// Id.
    pub id: String,
    /// Name of the job file.
    pub name: String,
    /// Who submitted it.
    pub uid: u32,
    /// The job file, all paths absolute.
    pub spec_toml: String,
    /// Milliseconds since 1970.
    pub created_unix_ms: i64,
    /// When its first gang was started; 0 before.
    #[serde(default)]
    pub started_unix_ms: i64,
    /// When it ended; 0 before.
    #[serde(default)]
    pub ended_unix_ms: i64,
    /// Where it stands.
    pub state: State,
    /// Why.
    #[serde(default)]
    pub message: String,
    /// Of docs/exit-codes.md, once ended.
    #[serde(default)]
    pub exit_code: u8,
    /// Gangs started so far.
    #[serde(default)]
    pub generation: u64,
    /// Of those, restarts after a failure.
    #[serde(default)]
    pub restarts: u32,
    /// Ranks.
    #[serde(default)]
    pub world_size: u32,
    /// Last committed step that was reported.
    #[serde(default)]
    pub step: u64,
    /// Steps in all, 0 while unknown.
    #[serde(default)]
    pub steps: u64,
    /// Model in words.
    #[serde(default)]
    pub model: String,
    /// Its metrics file, where one was asked for.
    #[serde(default)]
    pub metrics_path: Option<PathBuf>,
    /// Where it writes for its user, links followed at its submission.
    #[serde(default)]
    pub outputs: Vec<PathBuf>,
    /// No links were followed for them: of a version that did not note any.
    #[serde(default)]
    pub outputs_as_given: bool,
    /// What preparation found; dropped when the job ends.
    #[serde(default)]
    pub prepared: Option<Prepared>,
    /// The plan.
    #[serde(default)]
    pub plan: Option<Plan>,
    /// The parameter store, from its complete creation to its removal.
    #[serde(default)]
    pub segment: Option<SegmentRecord>,
    /// Processes that may be alive.
    #[serde(default)]
    pub workers: Vec<WorkerRecord>,
    /// Cancelling was asked for.
    #[serde(default)]
    pub cancelled: bool,
    /// Model folder written at the end.
    #[serde(default)]
    pub output: Option<PathBuf>,
    /// Newest checkpoint.
    #[serde(default)]
    pub checkpoint: Option<PathBuf>,
    /// Its step, where it is known.
    #[serde(default)]
    pub checkpoint_step: Option<u64>,
    /// When it became durable; 0 where that is not known.
    #[serde(default)]
    pub checkpoint_unix_ms: i64,
    /// Text generated at the end.
    #[serde(default)]
    pub sample: Option<String>,
}

/// A POSIX shared-memory segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRecord {
    /// Name.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// Boot in which it was made.
    pub boot_id: String,
}

/// A worker process that was started for a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// Who it is.
    pub identity: Identity,
    /// Device that it drives.
    pub device: String,
}

/// Where a job stands, as far as it matters on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum State {
    Active,
    Succeeded,
    Failed,
    Cancelled,
}

/// Why a record cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {detail}", .path.display())]
pub struct RecordError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub detail: String,
}

impl Record {
    /// A new job.
    pub fn new(id: String, spec: &ramtorch_job::JobSpec, uid: u32, created_unix_ms: i64) -> Record {
        Record {
            version: VERSION,
            id,
            name: spec.name.clone(),
            uid,
            spec_toml: spec.to_toml(),
            created_unix_ms,
            started_unix_ms: 0,
            ended_unix_ms: 0,
            state: State::Active,
            message: String::new(),
            exit_code: 0,
            generation: 0,
            restarts: 0,
            world_size: 0,
            step: 0,
            steps: spec.train.steps.unwrap_or(0),
            model: String::new(),
            metrics_path: spec.output.metrics.clone(),
            outputs: Vec::new(),
            outputs_as_given: false,
            prepared: None,
            plan: None,
            segment: None,
            workers: Vec::new(),
            cancelled: false,
            output: None,
            checkpoint: None,
            checkpoint_step: None,
            checkpoint_unix_ms: 0,
            sample: None,
        }
    }

    /// Reads `DIR/job.json`.
    ///
    /// # Errors
    /// The file is unreadable, damaged, or of a newer version.
    pub fn read(dir: &Path) -> Result<Record, RecordError> {
        let path = dir.join("job.json");
        let error = |detail: String| RecordError { path: path.clone(), detail };
        let bytes = std::fs::read(&path).map_err(|e| error(e.to_string()))?;
        let record: Record = serde_json::from_slice(&bytes).map_err(|e| error(e.to_string()))?;
        if record.version > VERSION {
            return Err(error(format!("version {} is newer than this ramtorchd", record.version)));
        }
        if dir.file_name().and_then(|n| n.to_str()) != Some(record.id.as_str()) {
            return Err(error(format!("holds the job {}, not that of its folder", record.id)));
        }
        Ok(record)
    }
}

/// Protocol form of a plan.
pub fn plan_to_pb(plan: &Plan) -> pb::Plan {
    pb::Plan {
        parameters: plan.parameters,
        segment_bytes: plan.segment_bytes,
        device_bytes: plan.device_bytes.iter().copied().max().unwrap_or(0),
        host_bytes: plan.host_bytes,
        step_seconds: plan.step_seconds,
        bound_by: plan.bound_by.clone(),
        text: plan.text.clone(),
        json: plan.detail.to_string(),
    }
}

/// Protocol form of a step's metrics.
pub fn metrics_to_pb(m: &StepMetrics, line: &str) -> pb::Metrics {
    pb::Metrics {
        step: m.step,
        loss: m.loss,
        grad_norm: m.grad_norm,
        lr: m.lr,
        tokens: m.tokens,
        tokens_per_second: m.tokens_per_second,
        validation_loss: m.validation_loss,
        initial_validation_loss: m.initial_validation_loss,
        step_seconds: m.step_seconds,
        tokens_total: m.tokens_total,
        tflops: m.tflops,
        bytes_to_device: m.bytes_to_device,
        bytes_from_device: m.bytes_from_device,
        copy_wait_seconds: m.copy_wait_seconds,
        optimizer_wait_seconds: m.optimizer_wait_seconds,
        epoch: m.epoch,
        json: line.to_string(),
    }
}

/// Reads the last `limit` steps of a `metrics.jsonl`, which the engine wrote. Lines that are damaged (the last one, after a power
/// cut) are left out.
pub fn read_history(path: &Path, limit: usize) -> Vec<pb::Metrics> {
    use std::io::BufRead;
    let Ok(file) = std::fs::File::open(path) else { return Vec::new() };
    let mut history = std::collections::VecDeque::new();
    for line in std::io::BufReader::new(file).lines() {
        let Ok(line) = line else { break };
        if let Ok(m) = serde_json::from_str::<StepMetrics>(&line) {
            push_history(&mut history, metrics_to_pb(&m, &line), limit);
        }
    }
    history.into()
}

/// Adds a step to a ring of at most `limit`, dropping whatever it makes untrue.
pub fn push_history(history: &mut std::collections::VecDeque<pb::Metrics>, metrics: pb::Metrics, limit: usize) {
    while history.back().is_some_and(|m| m.step >= metrics.step) {
        history.pop_back();
    }
    while history.len() >= limit.max(1) {
        history.pop_front();
    }
    history.push_back(metrics);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, loss: f64) -> pb::Metrics {
        let rest = "lr tokens tokens_per_second step_seconds tokens_total epoch tflops bytes_to_device bytes_from_device copy_wait_seconds";
        let rest: String = rest.split(' ').map(|key| format!(",\"{key}\":7")).collect();
        let validation = if step == 2 { ",\"validation_loss\":0.1" } else { "" };
        let line = format!("{{\"step\":{step},\"loss\":{loss:?},\"grad_norm\":0.2{rest}{validation}}}");
        let metrics = metrics_to_pb(&serde_json::from_str(&line).unwrap(), &line);
        assert!(metrics.loss == loss && metrics.epoch == 7.0 && metrics.validation_loss.is_some() == (step == 2));
        metrics
    }

    #[test]
    fn history_survives_the_disk_and_repeated_steps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let steps = [step(1, 0.1), step(2, 0.2), step(3, f64::MIN_POSITIVE), step(2, 1e300), step(3, 1.0 / 3.0)];
        let mut text: String = steps.iter().map(|m| m.json.clone() + "\n").collect();
        text.push_str("{\"step\":4,\"lo");
        std::fs::write(&path, text).unwrap();
        assert_eq!(read_history(&path, 100), [step(1, 0.1), step(2, 1e300), step(3, 1.0 / 3.0)]);
        assert_eq!(read_history(&path, 1), [step(3, 1.0 / 3.0)]);
        assert!(read_history(&dir.path().join("none"), 9).is_empty());
    }

    #[test]
    fn records_are_checked_when_read() {
        let dir = tempfile::tempdir().unwrap();
        let text = "name = \"a\"\n[model]\npath = \"m\"\n[data]\nformat = \"tokens\"\ntrain = \"t\"\n[train]\nsteps = 3\nbatch_size = 2\n";
        let spec = ramtorch_job::JobSpec::parse(text, Path::new("/b"), "j").unwrap();
        let mut record = Record::new("abc".into(), &spec, 0, 5);
        let folder = dir.path().join("abc");
        std::fs::create_dir(&folder).unwrap();
        let check = |record: &Record| {
            std::fs::write(folder.join("job.json"), serde_json::to_vec(record).unwrap()).unwrap();
            Record::read(&folder).map(|r| r.spec_toml)
        };
        assert_eq!(check(&record).unwrap(), spec.to_toml());
        record.version = VERSION + 1;
        assert!(check(&record).unwrap_err().to_string().contains("newer"));
        record.version = VERSION;
        record.id = "xyz".into();
        assert!(check(&record).unwrap_err().to_string().contains("xyz"));
        std::fs::write(folder.join("job.json"), "{").unwrap();
        assert!(Record::read(&folder).is_err());
    }
}
