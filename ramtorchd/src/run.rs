//! `ramtorchd run`: one job from start to end in one foreground process tree. A private daemon in this process, with a
//! socket and a state folder of its own, and a client that follows the job.
//!
//! The state folder is made for the run and removed after it. A run that was killed (`kill -9`) cannot do that; what it
//! left, shared memory included, is removed by the next `run` or `start`, known by the free lock of its folder. With
//! `--state-dir` the folder is the user's and stays; a run that was killed there is gone on with when the same job file
//! is run again.

use crate::config::{Settings, default_state_dir};
use crate::daemon::{Daemon, remove_short_dir};
use crate::statedir::{StateDir, StateDirError, make_dir};
use crate::supervisor::outside::Engine;
use ramtorch_client::ui::{FollowOptions, Format, Interrupt, follow};
use ramtorch_client::{Client, ClientError, Endpoint, exit, trace, v1};
use ramtorch_job::JobSpec;
use ramtorch_store::Registry;
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::signal::unix::{SignalKind, signal};

/// Name of a run's folder where the user's state folder cannot be written.
const TEMPORARY_PREFIX: &str = "ramtorch-run-";

/// A folder younger than this may belong to a run that has not locked it yet.
const SWEEP_AGE: Duration = Duration::from_secs(60);
/// Whether cancelled jobs have ended is asked this often.
const END_INTERVAL: Duration = Duration::from_millis(100);

/// Writing a trace may go on for so long after the job has ended.
const TRACE_LIMIT: Duration = Duration::from_secs(60);

/// What is run, and how it is shown.
#[derive(Debug, Clone)]
pub struct Options {
    /// Job file.
    pub job: PathBuf,
    /// Print nothing but errors.
    pub quiet: bool,
    /// One JSON object a line.
    pub json: bool,
    /// Record a timeline.
    pub trace: Option<TraceOptions>,
}

/// A timeline of some steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceOptions {
    /// File to write; one that is there is replaced.
    pub path: PathBuf,
    /// First step.
    pub first_step: u64,
    /// How many.
    pub steps: u64,
}

/// The state folder of a run.
#[derive(Debug)]
pub struct PrivateDir {
    path: PathBuf,
    made: Option<tempfile::TempDir>,
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        let Some(made) = self.made.take() else { return };
        let parent = made.path().parent().map(Path::to_path_buf);
        drop(made);
        // Fails while another run is in it.
        if parent.is_some() && parent == private_parent() {
            let _ = parent.map(std::fs::remove_dir);
        }
    }
}

impl PrivateDir {
    /// The user's folder, or a new one that is removed with this value.
    ///
    /// # Errors
    /// No folder can be made.
    pub fn new(kept: Option<PathBuf>) -> std::io::Result<PrivateDir> {
        if let Some(path) = kept {
            return Ok(PrivateDir { path: std::path::absolute(path)?, made: None });
        }
        sweep_private();
        let builder = || {
            let mut builder = tempfile::Builder::new();
            builder.prefix("run-");
            builder
        };
        let parent = private_parent().filter(|p| make_dir(p, 0o700).is_ok());
        let made = match parent.and_then(|p| builder().tempdir_in(p).ok()) {
            Some(made) => made,
            None => tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempdir()?,
        };
        Ok(PrivateDir { path: made.path().to_path_buf(), made: Some(made) })
    }

    /// The folder.
    pub fn state_dir(&self) -> &Path {
        &self.path
    }

    /// Where the private daemon listens.
    pub fn socket(&self) -> PathBuf {
        self.path.join("d.sock")
    }

    /// Token caches are worth keeping: tokenising again takes long. With a folder of the run's own they go to the
    /// user's cache folder.
    pub fn cache_dir(&self, default: &Path) -> PathBuf {
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let user = || absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|h| h.join(".cache")));
        let usable = |dir: &PathBuf| make_dir(dir, 0o750).is_ok();
        let shared = self.made.as_ref().and_then(|_| user()).map(|c| c.join("ramtorch")).filter(usable);
        shared.unwrap_or_else(|| default.to_path_buf())
    }
}

fn private_parent() -> Option<PathBuf> {
    default_state_dir().map(|d| d.join("private"))
}

/// Removes what runs left that were killed.
pub fn sweep_private() {
    let below = |parent: PathBuf| std::fs::read_dir(parent).into_iter().flatten().flatten().map(|e| e.path());
    let mine = |dir: &PathBuf| std::fs::symlink_metadata(dir).is_ok_and(|m| m.is_dir() && m.uid() == nix::unistd::geteuid().as_raw());
    let temporary = |dir: &PathBuf| dir.file_name().is_some_and(|n| n.to_string_lossy().starts_with(TEMPORARY_PREFIX));
    let private = private_parent().into_iter().flat_map(below);
    for dir in private.chain(below(std::env::temp_dir()).filter(temporary)).filter(mine) {
        // One that was locked once is in use or dead, and the lock tells which. Others have to be old enough.
        let locked_once = std::fs::read_to_string(dir.join("lock")).is_ok_and(|pid| pid.ends_with('\n'));
        let age = std::fs::metadata(&dir).and_then(|m| m.modified()).ok().and_then(|t| SystemTime::now().duration_since(t).ok());
        if !locked_once && age.is_none_or(|a| a < SWEEP_AGE) {
            continue;
        }
        if let Err(e) = sweep(&dir) {
            tracing::debug!("{} is left alone: {e}", dir.display());
        }
    }
}

fn sweep(dir: &Path) -> Result<(), StateDirError> {
    let held = StateDir::lock(dir)?;
    let swept = Registry::open(held.segments()).and_then(|r| r.sweep(|r| r.owner.is_alive()));
    match swept {
        Ok(_) => {
            tracing::info!("removed what a killed run left in {}", dir.display());
            remove_short_dir(&held.run_dir());
            let _ = std::fs::remove_dir_all(dir);
        }
        Err(e) => tracing::warn!("a killed run left shared memory that cannot be removed: {e}"),
    }
    Ok(())
}

/// Runs a job to its end.
///
/// # Errors
/// Exit code and text of what went wrong outside the job; the job's own end is told by the code alone.
pub async fn run(settings: Settings, options: Options, engine: Arc<dyn Engine>) -> Result<u8, (u8, String)> {
    let (request, spec) = read_job(&options.job)?;
    let socket = settings.socket.clone();
    let note = settings.devices_note.clone();
    // Until `follow` listens, a signal ends the run in order, too.
    let failed = |e: std::io::Error| (exit::INTERNAL, format!("cannot watch for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let daemon = Daemon::start(settings, engine).await.map_err(|e| (e.exit_code(), e.to_string()))?;
    let stopper = daemon.stopper();
    if !options.quiet && !options.json {
        eprintln!("{note}");
    }
    let submitted = tokio::select! {
        biased;
        submitted = submit(&socket, request, &spec) => submitted,
        _ = terminate.recv() => Err(ClientError::Interrupted),
        _ = interrupt.recv() => Err(ClientError::Interrupted),
    };
    let result = match submitted {
        Ok((mut client, job)) => {
            let tracing = options.trace.clone().map(|t| tokio::spawn(record(client.clone(), job.clone(), t)));
            let ended = follow_to_its_end(&mut client, &job, &options).await;
            if let Some(tracing) = tracing {
                told_of_trace(tracing, &options).await;
            }
            ended
        }
        Err(e) => Err(e),
    };
    stopper.stop().await;
    if matches!(result, Ok(exit::INTERRUPTED)) {
        // The user has lost patience: nothing is waited for.
        stopper.stop().await;
    }
    for left in daemon.finish().await {
        eprintln!("ramtorchd: {left}");
    }
    result.map_err(|e| (e.exit_code(), e.to_string()))
}

fn read_job(path: &Path) -> Result<(v1::SubmitRequest, JobSpec), (u8, String)> {
    let file_name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|e| (exit::JOB_FILE, format!("cannot read the job file {file_name}: {e}")))?;
    let absolute = std::path::absolute(path).map_err(|e| (exit::JOB_FILE, format!("{file_name}: {e}")))?;
    let base = absolute.parent().unwrap_or(Path::new("/"));
    // Wrong job files are told without starting anything.
    let spec = JobSpec::parse(&text, base, &file_name).map_err(|e| (exit::JOB_FILE, e.to_string()))?;
    let base_dir = base.to_str().ok_or_else(|| (exit::JOB_FILE, format!("the path of {file_name} is not UTF-8")))?.to_string();
    Ok((v1::SubmitRequest { job_toml: text, base_dir, file_name, dry_run: false }, spec))
}

/// Submits the job, or finds it where a run of it was killed; only in a folder that the user keeps can there be one.
async fn submit(socket: &Path, request: v1::SubmitRequest, spec: &JobSpec) -> Result<(Client, v1::Job), ClientError> {
    let mut client = Client::connect(Endpoint::unix(socket)).await?;
    let spec_toml = spec.to_toml();
    let mut unfinished = None;
    let mut cancelled = Vec::new();
    for job in client.list(false).await? {
        if job.spec_toml == spec_toml {
            unfinished = Some(job);
        } else {
            cancelled.push(client.cancel(&job.id).await?.id);
        }
    }
    // They most often wrote where this one will. The supervisor bounds how long the end of a job takes.
    while !cancelled.is_empty() {
        tokio::time::sleep(END_INTERVAL).await;
        let unended: HashSet<String> = client.list(false).await?.into_iter().map(|job| job.id).collect();
        cancelled.retain(|id| unended.contains(id));
    }
    let job = match unfinished {
        Some(job) => job,
        None => client.submit(request).await?,
    };
    Ok((client, job))
}

/// Records a timeline and writes it.
async fn record(mut client: Client, job: v1::Job, options: TraceOptions) -> Result<String, ClientError> {
    let TraceOptions { path, first_step, steps } = options;
    let request = v1::TraceRequest { id: job.id.clone(), steps, first_step };
    let ranks = trace::collect(&mut client, request).await?;
    let about = [("job", &job.id), ("name", &job.name)].into_iter().map(|(k, v)| (k.to_owned(), v.as_str().into())).collect();
    trace::save(&path, &ranks, &about)?;
    Ok(format!("{}trace written to {}; open it in https://ui.perfetto.dev", trace::table(&trace::summarize(&ranks)), path.display()))
}

/// The job has ended, and its trace with it: the rest is writing the file. A trace that failed does not change how the job
/// ended.
async fn told_of_trace(tracing: tokio::task::JoinHandle<Result<String, ClientError>>, options: &Options) {
    match tokio::time::timeout(TRACE_LIMIT, tracing).await {
        Ok(Ok(Ok(text))) if !options.quiet && !options.json => eprintln!("{text}"),
        Ok(Ok(Ok(_))) => {}
        Ok(Ok(Err(e))) => eprintln!("ramtorchd: no trace: {e}"),
        Ok(Err(e)) => eprintln!("ramtorchd: no trace: {e}"),
        Err(_) => eprintln!("ramtorchd: no trace: it was not complete {} s after the job's end", TRACE_LIMIT.as_secs()),
    }
}

async fn follow_to_its_end(client: &mut Client, job: &v1::Job, options: &Options) -> Result<u8, ClientError> {
    let output = if options.json { Format::Json } else { Format::Human };
    let follow_options = FollowOptions { output, interrupt: Interrupt::Cancel, quiet: options.quiet };
    let end = follow(client, &job.id, follow_options).await?;
    if options.quiet && end.exit_code != exit::OK {
        eprintln!("ramtorchd: job {}: {}", end.job.name, end.job.message);
    }
    Ok(end.exit_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_its_own_goes_and_a_users_stays() {
        let made = PrivateDir::new(None).unwrap();
        let path = made.state_dir().to_path_buf();
        assert!(path.is_dir() && made.socket().as_os_str().len() < 90);
        drop(made);
        assert!(!path.exists());
        let dir = tempfile::tempdir().unwrap();
        let kept = PrivateDir::new(Some(dir.path().into())).unwrap();
        assert_eq!(kept.cache_dir(Path::new("/c")), Path::new("/c"));
        drop(kept);
        assert!(dir.path().exists());
    }

    #[test]
    fn a_dead_run_is_swept_and_a_live_one_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (dead, live) = (dir.path().join("dead"), dir.path().join("live"));
        drop(StateDir::lock(&dead).unwrap());
        let held = StateDir::lock(&live).unwrap();
        sweep(&dead).unwrap();
        assert!(sweep(&live).is_err());
        assert!(!dead.exists() && live.exists());
        drop(held);
    }
}
