//! What a daemon does at its start with what an earlier one left behind, before it serves anybody.
//!
//! 1. Every job record is read; one that cannot be understood is named and left alone.
//! 2. Workers of the earlier daemon die with it. Should one still live (it hangs in the kernel), it is ended, known by
//!    pid, start time and boot; if it cannot be, its device stays out of use.
//! 3. Segments that belong to an unfinished job, were made in this boot and still exist are kept: the job goes on from
//!    them. All others in the registry are unlinked.
//! 4. An unfinished job without its segment is prepared again, and goes on from its newest checkpoint.

use crate::access::outputs;
use crate::process::{EndError, Identity};
use crate::supervisor::record::{Record, State, read_history};
use ramtorch_failpoint::{Point, hit};
use ramtorch_job::JobSpec;
use ramtorch_proto::v1 as pb;
use ramtorch_store::{Registry, StepPhase, Store, StoreError};
use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

/// All survivors together may take so long to die.
const SURVIVORS_LIMIT: Duration = Duration::from_secs(5);

/// More than a gang can be numbered by: such a number in a segment is damage.
const GENERATIONS_MAX: u64 = 1 << 23;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Jobs, oldest first, with the recent metrics of unfinished ones.
    pub jobs: Vec<(Record, JobSpec, Vec<pb::Metrics>)>,
    /// Workers that could not be ended, and their devices.
    pub survivors: Vec<(Identity, String)>,
}

/// Reads the jobs in `jobs`, ends survivors, and removes segments that nobody needs.
///
/// # Errors
/// The registry cannot be read. What cannot be removed is only logged.
pub fn recover(jobs: &Path, registry: &Registry, boot_id: &str, history: usize) -> Result<Found, StoreError> {
    let mut found = Found::default();
    let listed: HashSet<String> = registry.list()?.into_iter().map(|r| r.name).collect();
    let mut kept = HashSet::new();
    for dir in std::fs::read_dir(jobs).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir()) {
        let (kept, unfinished) = (dir.join("job.json"), dir.join("job.tmp"));
        // What a daemon left that died while it wrote.
        let _ = std::fs::remove_file(unfinished);
        if !kept.exists() && std::fs::remove_dir(&dir).is_ok() {
            // A submission that was never answered: there was nothing else in its folder.
            continue;
        }
        let mut record = match Record::read(&dir) {
            Ok(record) => record,
            Err(e) => {
                tracing::warn!("a job is left alone: {e}");
                continue;
            }
        };
        let spec = match JobSpec::parse(&record.spec_toml, Path::new("/"), "the kept job file") {
            Ok(spec) => spec,
            Err(e) => {
                tracing::warn!(job = record.id, "the job is left alone: {e}");
                continue;
            }
        };
        if record.outputs.is_empty() {
            // Of a version that did not note them. No link is followed here: a file system that hangs must not stop the start.
            record.outputs = outputs::of_job(&spec).into_iter().map(|o| o.path).collect();
        }
        found.jobs.push((record, spec, Vec::new()));
    }
    found.jobs.sort_by(|a, b| (a.0.created_unix_ms, &a.0.id).cmp(&(b.0.created_unix_ms, &b.0.id)));
    hit(Point::RecoveryRead);
    for (record, _, metrics) in found.jobs.iter_mut() {
        let ended = record.state != State::Active;
        *metrics = read_history(&jobs.join(&record.id).join("metrics.jsonl"), if ended { 1 } else { history });
        if ended {
            // What was left of it when the daemon died at its very end; the sweep below removes its segment.
            record.segment = None;
            record.workers.clear();
            record.prepared = None;
            continue;
        }
        for worker in std::mem::take(&mut record.workers) {
            match worker.identity.end(boot_id, SURVIVORS_LIMIT) {
                Ok(false) => {}
                Ok(true) => tracing::warn!(job = record.id, pid = worker.identity.pid, "ended a worker that outlived its daemon"),
                Err(EndError { pid, detail }) => {
                    tracing::error!(job = record.id, pid, device = worker.device, "a worker outlived its daemon: {detail}");
                    found.survivors.push((worker.identity, worker.device));
                }
            }
        }
        let usable = |name: &str, boot: &str| boot == boot_id && listed.contains(name) && exists(name);
        let found = record.segment.clone().filter(|s| usable(&s.name, &s.boot_id) && record.prepared.is_some() && record.plan.is_some());
        match found {
            Some(s) if look_at(record, &s.name) => {
                kept.insert(s.name);
            }
            _ => {
                if record.segment.is_some() {
                    tracing::warn!(job = record.id, "the job's parameter store is gone; it is prepared again, from its newest checkpoint");
                }
                record.segment = None;
                record.prepared = None;
                record.plan = None;
            }
        }
    }
    hit(Point::RecoveryEnded);
    for segment in registry.list()?.iter().filter(|r| kept.contains(&r.name)) {
        registry.register(&segment.name, &segment.job, segment.generation, segment.bytes)?;
    }
    if let Err(e) = registry.sweep(|r| kept.contains(&r.name)) {
        tracing::warn!("left-over shared memory was not all removed: {e}");
    }
    hit(Point::RecoverySwept);
    Ok(found)
}

/// Takes from a job's segment what it knows best: how far the job is, and which generations of its gang there were. `false`:
/// it is of a version that this program does not know.
fn look_at(record: &mut Record, name: &str) -> bool {
    match Store::attach_read_only(name) {
        Ok(store) => {
            let step = store.record();
            let committed = step.step - u64::from(step.phase != StepPhase::Committed && step.step > 0);
            record.step = record.step.max(committed);
            record.generation = record.generation.max(Some(store.generation()).filter(|g| *g < GENERATIONS_MAX).unwrap_or(0));
            let phase = step.phase;
            tracing::info!(job = record.id, segment = name, step = committed, ?phase, "the job goes on from its parameter store");
            true
        }
        Err(e @ StoreError::Version { .. }) => {
            tracing::warn!(job = record.id, "{e}; it was made by another version of ramtorchd");
            false
        }
        Err(e) => {
            // The gang will say the same, in the job's own messages.
            tracing::warn!(job = record.id, "the job's parameter store cannot be looked at: {e}");
            true
        }
    }
}

/// Whether a segment is there. Its name has been checked by the registry.
fn exists(name: &str) -> bool {
    Path::new("/dev/shm").join(name.trim_start_matches('/')).exists()
}
