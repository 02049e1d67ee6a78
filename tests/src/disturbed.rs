//! A run that is disturbed, and the proof that it cannot be told from one that was not.

use crate::sandbox::Sandbox;
use crate::{Daemon, Fixture, JobFile, MetricsLine, StepBits, Tensor, assert_same_tensors, bits, read_metrics, read_tensors};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ramtorch_failpoint::{MARKS_VARIABLE, VARIABLE};
use serde_json::Value;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Settings of a daemon that starts a gang again at once, however often.
pub const PATIENT: &str = "
[supervision]
heartbeat_timeout_seconds = 2
register_timeout_seconds = 10
restart_budget = 1000000
restart_backoff_seconds = 0.01
settle_seconds = 0.02
";

/// Devices of a disturbed run where nothing else is asked for.
pub const TWO_CPUS: &str = "cpu:2";

/// Those of a job: two, or as many as it has ranks.
fn devices_of(job: &JobFile) -> String {
    match job.get("device.ranks").and_then(|ranks| ranks.parse::<u32>().ok()) {
        Some(ranks @ 3..) => format!("cpu:{ranks}"),
        _ => TWO_CPUS.to_owned(),
    }
}

/// What a run leaves: every deterministic number of every step, in the user's file and in the daemon's, the trained model, its
/// checkpoints.
#[derive(Debug)]
pub struct Outcome {
    metrics: Vec<StepBits>,
    /// Of each job in the daemon's state folder; a run by `ramtorchd run` leaves none.
    histories: Vec<Vec<StepBits>>,
    weights: BTreeMap<String, Tensor>,
    /// Contents by name: of each tensor of each checkpoint, and of every other file.
    checkpoints: BTreeMap<String, String>,
}

/// A run of a tiny model on two ranks that passes through everything: loading, training with several sequences a step,
/// validation, checkpoints of which one is kept, export.
pub fn everything(steps: usize) -> JobFile {
    Fixture::load("llama")
        .job("disturbed")
        .set("train.steps", steps)
        .set("train.batch_size", 4)
        .set("train.micro_batch_size", 1)
        .set("train.validate_every", 5)
        .set("schedule.warmup_steps", 2)
        .set("data.validation_fraction", 0.1)
        .set("data.shuffle", true)
        .set("checkpoint.path", "checkpoints")
        .set("checkpoint.every_steps", 4)
        .set("checkpoint.keep", 1)
        .set("checkpoint.at_end", true)
        .set("output.path", "model")
}

impl Outcome {
    /// What lies in a sandbox after the run.
    #[track_caller]
    pub fn read(sandbox: &Sandbox) -> Outcome {
        let lines: Vec<MetricsLine> = read_metrics(&sandbox.path("metrics.jsonl"));
        Outcome {
            metrics: bits(&lines),
            histories: histories(&sandbox.path("state")),
            weights: read_tensors(&sandbox.path("model")),
            checkpoints: contents(&sandbox.path("checkpoints")),
        }
    }

    /// The same job, undisturbed.
    #[track_caller]
    pub fn undisturbed(job: &JobFile) -> Outcome {
        Outcome::undisturbed_on(job, &devices_of(job))
    }

    /// The same job on these devices, undisturbed.
    #[track_caller]
    pub fn undisturbed_on(job: &JobFile, devices: &str) -> Outcome {
        let sandbox = Sandbox::new();
        sandbox.run_job("whole", job, devices).expect_success();
        Outcome::read(&sandbox)
    }

    /// Compares to the bit, and checks that nothing unfinished lies about.
    #[track_caller]
    pub fn assert_same(&self, undisturbed: &Outcome, what: &str) {
        self.assert_same_run(undisturbed, what);
        let names = |o: &Outcome| o.checkpoints.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(undisturbed), "{what}: checkpoints");
        let different = self.checkpoints.iter().find(|(name, content)| undisturbed.checkpoints.get(*name) != Some(content));
        assert_eq!(different, None, "{what}: the first part of a checkpoint that differs");
    }

    /// Compares the steps with what a daemon that has stopped keeps of its only job.
    #[track_caller]
    pub fn assert_same_history(&self, state: &Path) {
        let histories = histories(state);
        assert_eq!(histories.len(), 1, "jobs");
        assert_same_steps(&histories[0], &self.metrics, "in the daemon's state folder");
    }

    /// As [`Outcome::assert_same`], but for which steps have checkpoints.
    #[track_caller]
    pub fn assert_same_run(&self, undisturbed: &Outcome, what: &str) {
        assert_same_steps(&self.metrics, &undisturbed.metrics, what);
        for history in &self.histories {
            assert_same_steps(history, &undisturbed.metrics, &format!("{what}, in the daemon's state folder"));
        }
        assert_same_tensors(&self.weights, &undisturbed.weights, what);
    }
}

#[track_caller]
fn assert_same_steps(ours: &[StepBits], undisturbed: &[StepBits], what: &str) {
    let different = ours.iter().zip(undisturbed).find(|(a, b)| a != b);
    assert_eq!(different, None, "{what}: the first step that differs");
    assert_eq!(ours.len(), undisturbed.len(), "{what}: steps");
}

/// What the daemon with this state folder keeps of the steps of each of its jobs.
#[track_caller]
pub fn histories(state: &Path) -> Vec<Vec<StepBits>> {
    let jobs = state.join("jobs");
    names(&jobs).iter().map(|id| bits(&read_metrics(&jobs.join(id).join("metrics.jsonl")))).collect()
}

/// Everything in a folder of checkpoints but who wrote it and when. Hashes, since a test that fails must not print megabytes.
#[track_caller]
fn contents(folder: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for name in names(folder) {
        let path = folder.join(&name);
        if !path.is_dir() {
            all.insert(name, std::fs::read_to_string(path).expect("a text"));
            continue;
        }
        for (tensor, t) in read_tensors(&path) {
            all.insert(format!("{name}: {tensor}"), format!("{t:?} {:016x}", hash(&t.bytes)));
        }
        for file in names(&path).into_iter().filter(|f| !f.ends_with(".safetensors")) {
            let bytes = std::fs::read(path.join(&file)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let content = if file == "checkpoint.json" { facts(&bytes) } else { format!("{:016x}", hash(&bytes)) };
            all.insert(format!("{name}/{file}"), content);
        }
    }
    all
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// What `checkpoint.json` says of the state: no segment, writer, or times of a step.
#[track_caller]
fn facts(text: &[u8]) -> String {
    let all: Value = serde_json::from_slice(text).expect("checkpoint.json is JSON");
    let job = |key: &str| &all["job"][key];
    let keys = ["format", "version", "step", "run", "architecture", "parameters", "moments", "piece_elements"];
    let of_job = ["tokens_total", "batch_size", "sequence_length"];
    let facts: Vec<&Value> = keys.iter().map(|key| &all[key]).chain(of_job.iter().map(|key| job(key))).collect();
    assert!(facts.iter().all(|v| !v.is_null()), "something is missing: {all}");
    serde_json::to_string(&facts).expect("facts")
}

/// Checks that a daemon that has stopped left nothing unfinished in its state folder, and a job nothing beside its results.
#[track_caller]
pub fn assert_tidy(sandbox: &Sandbox, daemon_state: &Path) {
    assert_eq!(names(&daemon_state.join("segments")), Vec::<String>::new(), "registrations left");
    let job_files: Vec<String> = std::fs::read_dir(daemon_state.join("jobs"))
        .into_iter()
        .flatten()
        .flatten()
        .flat_map(|job| names(&job.path()))
        .filter(|name| !["job.json", "metrics.jsonl", "first-checkpoint.json", "logs"].contains(&name.as_str()))
        .collect();
    assert_eq!(job_files, Vec::<String>::new(), "unfinished files in the folders of jobs");
    let unfinished: Vec<String> = names(sandbox.root()).into_iter().filter(|n| n.contains(".partial") || n.contains(".replaced")).collect();
    assert_eq!(unfinished, Vec::<String>::new(), "unfinished results");
}

/// Lets daemons of a sandbox run again that were stopped (SIGSTOP), about a second later each, while `during` runs.
pub fn waking<T>(sandbox: &Sandbox, during: impl FnOnce() -> T) -> T {
    /// Set however `during` ends: the thread would be waited for otherwise.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let until = Over(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for (pid, _) in sandbox.processes().iter().filter(|(pid, line)| line.contains(" start --devices") && is_stopped(*pid)) {
                    std::thread::sleep(Duration::from_secs(1));
                    // It may have been killed meanwhile.
                    let _ = kill(Pid::from_raw(*pid), Signal::SIGCONT);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let result = during();
        drop(until);
        result
    })
}

fn is_stopped(pid: i32) -> bool {
    // The state is behind the name, which may have brackets in it.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
}

/// All text in files below `folder`.
fn text_below(folder: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        text += &if path.is_dir() { text_below(&path) } else { String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into() };
    }
    text
}

/// Runs a job on two CPU devices, or as many as it has ranks, into fail points, all of which have to fire, until it has succeeded. Where it ran, and what its record,
/// logs and end tell.
#[track_caller]
pub fn run_into(what: &str, job: &JobFile, entries: &[&str]) -> (Sandbox, String) {
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).expect("a folder of a sandbox");
    let armed = entries.join(";");
    let environment = [(VARIABLE, armed.as_str()), (MARKS_VARIABLE, marks.to_str().expect("a path of a sandbox"))];
    let mut daemon = Immortal::start_on(&sandbox, &devices_of(job), &environment);
    let id = daemon.submit(job);
    let begun = std::time::Instant::now();
    let end = daemon.wait(&id, Duration::from_secs(150), |_| {});
    let told = text_below(&sandbox.path(&format!("state/jobs/{id}"))) + &end.to_string();
    eprintln!("{what}: job {id}, {} lives, {:.1} s", daemon.lives, begun.elapsed().as_secs_f64());
    assert_eq!(end["state"], "succeeded", "{what}: after {:?}: {end:#}", names(&marks));
    daemon.stop();
    let fired = names(&marks);
    let wanted: usize = entries.iter().map(|e| e.split(',').count()).sum();
    assert_eq!(fired.len(), wanted, "{what}: only {fired:?} of {entries:?} were reached");
    (sandbox, told)
}

/// Names in a folder, sorted; none where it is not there.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A daemon that may die at any time; its successors are started on the same state folder as often as that is needed.
pub struct Immortal<'a> {
    sandbox: &'a Sandbox,
    devices: String,
    environment: Vec<(String, String)>,
    config: std::path::PathBuf,
    daemon: Option<Daemon<'a>>,
    /// Daemons that were started.
    pub lives: usize,
}

impl<'a> Immortal<'a> {
    /// Starts the first one, with these variables in its environment and that of its workers.
    #[track_caller]
    pub fn start(sandbox: &'a Sandbox, environment: &[(&str, &str)]) -> Immortal<'a> {
        Immortal::start_on(sandbox, TWO_CPUS, environment)
    }

    /// Starts the first one with these devices.
    #[track_caller]
    pub fn start_on(sandbox: &'a Sandbox, devices: &str, environment: &[(&str, &str)]) -> Immortal<'a> {
        let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let config = sandbox.file("ramtorchd.toml", PATIENT);
        let mut immortal = Immortal { sandbox, devices: devices.to_owned(), environment, config, daemon: None, lives: 0 };
        immortal.alive();
        immortal
    }

    /// The daemon, a new one if the last has died.
    #[track_caller]
    pub fn alive(&mut self) -> &mut Daemon<'a> {
        if self.daemon.as_mut().is_some_and(|d| d.process().has_ended()) {
            self.daemon = None;
        }
        let mut lives = 0;
        while self.daemon.is_none() {
            lives += 1;
            assert!(lives < 100, "daemons die faster than they start");
            let config = self.config.to_str().expect("a path of a sandbox");
            let more = ["--config", config];
            self.daemon = Daemon::try_start(self.sandbox, &self.devices, &more, &self.environment);
            self.lives += 1;
        }
        self.daemon.as_mut().expect("just started")
    }

    /// Submits the job, again if the daemon died before it answered; returns its id.
    #[track_caller]
    pub fn submit(&mut self, job: &JobFile) -> String {
        let path = self.sandbox.write_job("job", job);
        loop {
            let daemon = self.alive();
            // A daemon that died after the job was durable and before it answered has the job.
            if let Some(id) = daemon.try_ask(["list", "--all"]).and_then(|l| l["jobs"][0]["id"].as_str().map(str::to_owned)) {
                return id;
            }
            daemon.try_ask(["submit", path.to_str().expect("a path of a sandbox")]);
        }
    }

    /// Waits for the end of a daemon that was asked to stop, or that dies.
    #[track_caller]
    pub fn ended(&mut self, limit: std::time::Duration) -> crate::Finished {
        self.daemon.take().expect("a daemon that was seen alive").into_process().wait(limit)
    }

    /// Waits until the job has ended; `between` is called again and again until then.
    #[track_caller]
    pub fn wait(&mut self, id: &str, limit: std::time::Duration, mut between: impl FnMut(&mut Daemon<'a>)) -> serde_json::Value {
        let end = std::time::Instant::now() + limit;
        let mut look = std::time::Instant::now();
        loop {
            let daemon = self.alive();
            if look <= std::time::Instant::now() {
                let job = daemon.try_ask(["describe", id]).unwrap_or_default();
                if matches!(job["state"].as_str(), Some("succeeded" | "failed" | "cancelled")) {
                    return job;
                }
                assert!(std::time::Instant::now() < end, "the job did not end within {limit:?}: {job:#}\n{}", daemon.process().stderr());
                look = std::time::Instant::now() + std::time::Duration::from_millis(100);
            }
            between(daemon);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// Stops it in order, a new one first if the last has died. Nothing may be left.
    #[track_caller]
    pub fn stop(mut self) {
        let state = self.alive().state_dir();
        let daemon = self.daemon.take().expect("just seen alive");
        daemon.stop();
        assert_tidy(self.sandbox, &state);
    }
}
