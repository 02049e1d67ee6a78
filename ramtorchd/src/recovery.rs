//! What a daemon does at its start with what an earlier one left behind, before it serves anybody.
//!
//! 1. Every job record is read; one that cannot be understood is named and left alone, and so is its segment.
//! 2. Workers of the earlier daemon die with it. Should one still live (it hangs in the kernel), it is ended, known by
//!    pid, start time and boot; if it cannot be, its device stays out of use.
//! 3. Segments that belong to an unfinished job, were made in this boot and still exist are kept: the job goes on from
//!    them. One whose layout is another version's is kept, too, and its job waits for a program that knows it. All others
//!    in the registry are unlinked.
//! 4. An unfinished job without its segment is prepared again, and goes on from its newest checkpoint.

use crate::access::outputs;
use crate::process::EndError;
use crate::supervisor::outside::Contents;
use crate::supervisor::record::{Record, State, WorkerRecord, read_history};
use ramtorch_failpoint::{Point, hit};
use ramtorch_job::JobSpec;
use ramtorch_proto::v1 as pb;
use ramtorch_store::{Registry, Store, StoreError};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// All survivors together may take so long to die.
const SURVIVORS_LIMIT: Duration = Duration::from_secs(5);

/// More than a gang can be numbered by: such a number in a segment is damage.
const GENERATIONS_MAX: u64 = 1 << 23;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Jobs, oldest first, with the recent metrics of unfinished ones.
    pub jobs: Vec<(Record, JobSpec, Vec<pb::Metrics>)>,
    /// Ids of those among them that have to wait, and why: their segments are of another version.
    pub held: Vec<(String, String)>,
    /// Workers that could not be ended, and the ids of their jobs.
    pub survivors: Vec<(String, WorkerRecord)>,
    /// Ids of jobs that could not be understood.
    pub left_alone: HashSet<String>,
}

/// Reads the jobs in `jobs`, ends survivors, and removes segments that nobody needs.
///
/// # Errors
/// The registry or the folder of jobs cannot be read. What cannot be removed is only logged.
pub fn recover(jobs: &Path, registry: &Registry, boot_id: &str, history: usize) -> Result<Found, StoreError> {
    let mut found = Found::default();
    let listed: HashSet<String> = registry.list()?.into_iter().map(|r| r.name).collect();
    let mut kept = HashSet::new();
    for dir in folders(jobs)? {
        let (kept, unfinished) = (dir.join("job.json"), dir.join("job.tmp"));
        // What a daemon left that died while it wrote.
        let _ = std::fs::remove_file(unfinished);
        if !kept.exists() && std::fs::remove_dir(&dir).is_ok() {
            // A submission that was never answered: there was nothing else in its folder.
            continue;
        }
        let read = Record::read(&dir).map_err(|e| e.to_string()).and_then(|record| {
            let spec = JobSpec::parse(&record.spec_toml, Path::new("/"), "the kept job file").map_err(|e| e.to_string())?;
            Ok((record, spec))
        });
        match read {
            Ok((mut record, spec)) => {
                if record.outputs.is_empty() {
                    // Of a version that did not note them. No link is followed here: a file system that hangs must not stop the start.
                    record.outputs = outputs::of_job(&spec).into_iter().map(|o| o.path).collect();
                    record.outputs_as_given = true;
                }
                found.jobs.push((record, spec, Vec::new()));
            }
            Err(e) => {
                let id = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
                tracing::warn!(
                    job = id,
                    "the job is left alone, and its parameter store, if it has one: {e}; start the ramtorchd that wrote it, or remove {} to give it up",
                    dir.display()
                );
                found.left_alone.insert(id);
            }
        }
    }
    found.jobs.sort_by(|a, b| (a.0.created_unix_ms, &a.0.id).cmp(&(b.0.created_unix_ms, &b.0.id)));
    hit(Point::RecoveryRead);
    found.survivors = end_workers(&mut found.jobs, boot_id);
    for (record, _, metrics) in found.jobs.iter_mut() {
        let ended = record.state != State::Active;
        *metrics = read_history(&jobs.join(&record.id).join("metrics.jsonl"), if ended { 1 } else { history });
        if ended {
            // What was left of it when the daemon died at its very end; the sweep below removes its segment.
            record.segment = None;
            record.prepared = None;
            continue;
        }
        let usable = |name: &str, boot: &str| boot == boot_id && listed.contains(name) && exists(name);
        match record.segment.clone().filter(|s| usable(&s.name, &s.boot_id) && record.prepared.is_some() && record.plan.is_some()) {
            Some(s) => {
                if let Some(why) = look_at(record, &s.name) {
                    tracing::warn!(job = record.id, "{why}");
                    found.held.push((record.id.clone(), why));
                }
                kept.insert(s.name);
            }
            None => {
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
    if let Err(e) = registry.sweep(|r| kept.contains(&r.name) || found.left_alone.contains(&r.job)) {
        tracing::warn!("left-over shared memory was not all removed: {e}");
    }
    hit(Point::RecoverySwept);
    Ok(found)
}

/// The folders in `jobs`. All of them or none: a job that is not seen would lose its segment.
fn folders(jobs: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let unreadable = |source| StoreError::System { action: format!("read the folder {}", jobs.display()), source };
    let entries = match std::fs::read_dir(jobs) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(unreadable)?,
    };
    let paths = entries.map(|e| e.map(|e| e.path()).map_err(unreadable)).collect::<Result<Vec<_>, _>>()?;
    Ok(paths.into_iter().filter(|p| p.is_dir()).collect())
}

/// Ends what still lives of the workers of unfinished jobs: all are told at once, and then waited for together. Returns those
/// that could not be ended.
fn end_workers(jobs: &mut [(Record, JobSpec, Vec<pb::Metrics>)], boot_id: &str) -> Vec<(String, WorkerRecord)> {
    let (mut told, mut survivors) = (Vec::new(), Vec::new());
    for (record, ..) in jobs {
        let workers = std::mem::take(&mut record.workers);
        if record.state != State::Active {
            continue;
        }
        for worker in workers {
            match worker.identity.kill(boot_id) {
                Ok(None) => {}
                Ok(Some(dying)) => told.push((record.id.clone(), worker, Ok(dying))),
                Err(e) => told.push((record.id.clone(), worker, Err(e))),
            }
        }
    }
    let until = Instant::now() + SURVIVORS_LIMIT;
    for (job, worker, dying) in told {
        match dying.and_then(|d| d.wait(until.saturating_duration_since(Instant::now()))) {
            Ok(()) => tracing::warn!(job, pid = worker.identity.pid, "ended a worker that outlived its daemon"),
            Err(EndError { pid, detail }) => {
                tracing::error!(job, pid, device = worker.device, "a worker outlived its daemon: {detail}");
                survivors.push((job, worker));
            }
        }
    }
    survivors
}

/// Takes from a job's segment what it knows best: how far the job is, and which generations of its gang there were. Returns
/// why the job has to wait with it: it is of a version that this program does not know.
fn look_at(record: &mut Record, name: &str) -> Option<String> {
    match Store::attach_read_only(name) {
        Ok(store) => {
            let contents = Contents::of(&store.record());
            if let Contents::Step(step) = contents {
                record.step = record.step.max(step);
            }
            record.generation = record.generation.max(Some(store.generation()).filter(|g| *g < GENERATIONS_MAX).unwrap_or(0));
            tracing::info!(job = record.id, segment = name, ?contents, "the job goes on from its parameter store");
            None
        }
        Err(e @ StoreError::Version { .. }) => Some(format!(
            "waits, and its parameter store is kept: {e}; start the ramtorchd that made it, or cancel the job and submit it again: \
             it then begins at its newest checkpoint"
        )),
        Err(e) => {
            // The gang will say the same, in the job's own messages.
            tracing::warn!(job = record.id, "the job's parameter store cannot be looked at: {e}");
            None
        }
    }
}

/// Whether a segment is there. Its name has been checked by the registry.
fn exists(name: &str) -> bool {
    Path::new("/dev/shm").join(name.trim_start_matches('/')).exists()
}
