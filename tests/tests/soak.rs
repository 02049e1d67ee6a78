//! Many short lives of jobs: to their end, cancelled, failed, with their workers killed. Afterwards the daemon holds what it
//! held before: memory, descriptors, threads, processes, segments, files.
//!
//! ```text
//! RAMTORCH_SOAK_JOBS=1000 RAMTORCH_SOAK_SEED=7 cargo test -p ramtorch-tests --test soak -- --nocapture
//! ```
#![allow(clippy::unwrap_used)]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ramtorch_client::{Client, Endpoint, v1};
use ramtorch_tests::chance::{Random, setting};
use ramtorch_tests::disturbed::{PATIENT, assert_tidy};
use ramtorch_tests::observed::{Observed, files, observe};
use ramtorch_tests::{Fixture, JobFile, Sandbox};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Ended jobs that this daemon remembers: few, so that it has to forget.
const REMEMBERED: usize = 12;
/// Files that a remembered job has at the most: its record, its metrics, logs of its preparation and of the last gangs.
const FILES_PER_JOB: usize = 40;
const LIMIT: Duration = Duration::from_secs(60);

/// What becomes of a job.
const LIVES: [&str; 6] = ["finished", "cancelled", "failed", "worker killed", "cancelled while it waited", "refused"];

struct Soak<'a> {
    sandbox: &'a Sandbox,
    client: Client,
    random: Random,
    lives: BTreeMap<&'static str, u64>,
    kills: u64,
}

impl Soak<'_> {
    fn job(&mut self, steps: u64) -> JobFile {
        // A transformer now and then: other models have other segments.
        let fixture = if self.random.below(8) == 0 { "llama" } else { "stack-relu-mse" };
        Fixture::load(fixture).job("soak").set("train.steps", steps).set("schedule.warmup_steps", 0u64).unset("output.metrics")
    }

    async fn submit(&mut self, job: &JobFile) -> Result<String, ramtorch_client::ClientError> {
        let base_dir = self.sandbox.root().to_str().unwrap().to_owned();
        let request = v1::SubmitRequest { job_toml: job.text(), base_dir, file_name: "soak.toml".into(), dry_run: false };
        self.client.submit(request).await.map(|j| j.id)
    }

    /// Waits for the end of a job, as a watcher does.
    async fn end(&mut self, id: &str) -> v1::JobState {
        let watch = async {
            let mut events = self.client.watch(id, 0).await.unwrap();
            while events.next().await.unwrap().is_some() {}
        };
        tokio::time::timeout(LIMIT, watch).await.expect("the job ends");
        self.client.get(id).await.unwrap().state()
    }

    fn workers(&self) -> Vec<Pid> {
        let running = self.sandbox.processes();
        running.iter().filter(|(_, line)| line.trim_end().ends_with(" worker")).map(|(pid, _)| Pid::from_raw(*pid)).collect()
    }

    async fn live(&mut self) {
        // Each once before any comes again: the first look at the daemon is at one that has seen them all.
        let lived = self.lives.len();
        let what = LIVES.get(lived).copied().unwrap_or_else(|| LIVES[self.random.below(LIVES.len() as u64) as usize]);
        *self.lives.entry(what).or_default() += 1;
        let pause = Duration::from_millis(self.random.below(250));
        match what {
            "finished" => {
                let steps = 1 + self.random.below(5);
                let job = self.job(steps);
                let id = self.submit(&job).await.unwrap();
                assert_eq!(self.end(&id).await, v1::JobState::Succeeded);
            }
            "cancelled" => {
                let job = self.job(1_000_000);
                let id = self.submit(&job).await.unwrap();
                tokio::time::sleep(pause).await;
                self.client.cancel(&id).await.unwrap();
                assert_eq!(self.end(&id).await, v1::JobState::Cancelled);
            }
            "failed" => {
                let job = self.job(3).set("data.train", self.sandbox.path("nothing-there"));
                let id = self.submit(&job).await.unwrap();
                assert_eq!(self.end(&id).await, v1::JobState::Failed);
            }
            "worker killed" => {
                let job = self.job(1_000_000);
                let id = self.submit(&job).await.unwrap();
                for _ in 0..1 + self.random.below(3) {
                    tokio::time::sleep(pause).await;
                    let workers = self.workers();
                    if !workers.is_empty() {
                        // It may have ended by itself.
                        let victim = workers[self.random.below(workers.len() as u64) as usize];
                        self.kills += u64::from(kill(victim, Signal::SIGKILL).is_ok());
                    }
                }
                self.client.cancel(&id).await.unwrap();
                assert_eq!(self.end(&id).await, v1::JobState::Cancelled);
            }
            "cancelled while it waited" => {
                let job = self.job(1_000_000);
                let (first, second) = (self.submit(&job).await.unwrap(), self.submit(&job).await.unwrap());
                self.client.cancel(&second).await.unwrap();
                assert_eq!(self.end(&second).await, v1::JobState::Cancelled);
                self.client.cancel(&first).await.unwrap();
                assert_eq!(self.end(&first).await, v1::JobState::Cancelled);
            }
            _ => {
                let job = self.job(3).set("train.batch_size", 0u64);
                self.submit(&job).await.unwrap_err();
            }
        }
    }
}

fn line(jobs: u64, daemon: Observed, files: usize) -> String {
    format!(
        "  after {jobs:5} jobs: {:6.1} MiB, {:3} descriptors, {:2} threads, {files:4} files in the state folder, {:.1} s of processor time\n",
        daemon.memory as f64 / (1u64 << 20) as f64,
        daemon.descriptors,
        daemon.threads,
        daemon.cpu_seconds
    )
}

/// The daemon when nothing is going on: threads that wait for work go after some seconds, one that deletes files is done.
fn at_rest(pid: Pid, state: &Path, least: Option<Observed>) -> (Observed, usize) {
    let end = Instant::now() + Duration::from_secs(15);
    loop {
        let (now, files) = (observe(pid), files(state));
        let calm = least.is_none_or(|l| now.threads <= l.threads && now.descriptors <= l.descriptors);
        if (calm && files <= most_files()) || Instant::now() > end {
            return (now, files);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn most_files() -> usize {
    REMEMBERED * FILES_PER_JOB + 16
}

#[test]
fn lives_of_jobs_leave_nothing_behind() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let (jobs, seed) = (setting("RAMTORCH_SOAK_JOBS", 40), setting("RAMTORCH_SOAK_SEED", clock));
    // Shown when the test fails, too.
    eprintln!("RAMTORCH_SOAK_JOBS={jobs} RAMTORCH_SOAK_SEED={seed}");
    let sandbox = Sandbox::new();
    let config = sandbox.file("ramtorchd.toml", format!("{PATIENT}[jobs]\nended_max = {REMEMBERED}\n"));
    let mut daemon = sandbox.start_daemon("cpu:2", &["--config", config.to_str().unwrap()]);
    let (pid, state) = (daemon.process().pid(), daemon.state_dir());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = runtime.block_on(Client::connect(Endpoint::unix(daemon.socket()))).unwrap();
    let mut soak = Soak { sandbox: &sandbox, client, random: Random(seed), lives: BTreeMap::new(), kills: 0 };
    let (warm, begun) = (jobs.div_ceil(5).max(REMEMBERED as u64), Instant::now());
    let (mut first, mut text) = (None, String::new());
    for n in 1..=jobs {
        runtime.block_on(soak.live());
        if n == warm || (n > warm && n % jobs.div_ceil(5) == 0) || n == jobs {
            let least = first.map(|f: (Observed, usize)| f.0);
            let (now, files) = at_rest(pid, &state, least);
            text += &line(n, now, files);
            first.get_or_insert((now, files));
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let first = first.unwrap();
    let (last, files) = at_rest(pid, &state, Some(first.0));
    let lives: Vec<String> = soak.lives.iter().map(|(what, n)| format!("{n} {what}")).collect();
    let text = format!("soak: seed {seed}, {jobs} jobs in {seconds:.0} s ({}; {} workers killed)\n{text}", lives.join(", "), soak.kills);
    eprint!("{text}");
    if let Some(path) = std::env::var_os("RAMTORCH_SOAK_SUMMARY") {
        std::fs::write(path, &text).unwrap();
    }
    assert!(last.descriptors <= first.0.descriptors, "descriptors: {} and {} later", first.0.descriptors, last.descriptors);
    // The daemon's runtime ends threads that have nothing to do; a pool that once was larger is no leak.
    assert!(last.threads <= first.0.threads + 4, "threads: {} and {} later", first.0.threads, last.threads);
    assert!(files <= most_files(), "{files} files in the state folder");
    // What an allocator keeps goes up and down by some; what is kept for each job would be far more in the long run.
    let room = (8u64 << 20).min(first.0.memory / 4 + jobs * 2048);
    assert!(last.memory <= first.0.memory + room, "memory: {} and {} later", first.0.memory, last.memory);
    let workers = soak.workers();
    assert!(workers.is_empty(), "workers left: {workers:?}");
    drop((soak, runtime));
    daemon.stop();
    assert_tidy(&sandbox, &state);
}
