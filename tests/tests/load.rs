//! Many watchers and many submissions beside a job that trains: no call fails, and training does not notice.
//!
//! `tests/load.sh` is the long one. Without its settings this is a short test that measures nothing:
//!
//! ```text
//! RAMTORCH_LOAD_SECONDS      length of the load; half of it is calm before it, and after it    3
//! RAMTORCH_LOAD_WATCHERS     watchers, each with a connection of its own                    60
//! RAMTORCH_LOAD_SUBMISSIONS  submissions a second, each cancelled later on                  40
//! RAMTORCH_LOAD_BATCH       sequences of a step, which decide how long it takes                64
//! RAMTORCH_LOAD_TURNS        afterwards so many turns of 8 s without load and 8 s under it, for machines whose own speed changes    0
//! RAMTORCH_LOAD_STRICT       whether figures are judged: p99 under 50 ms, training slower by less than 2 % (over the turns, if any)
//! RAMTORCH_LOAD_DEVICES      where the job trains                                           cpu:1
//! RAMTORCH_LOAD_MODEL        folder with config.json and tokens.bin: the job trains that, 2048 tokens a sequence, with all
//!                            processors, and not a fixture of some thousand parameters with one
//! RAMTORCH_LOAD_PINNED       training on processor 0, everything else on processors that share no core with it
//! RAMTORCH_LOAD_SUMMARY      file for the figures
//! ```
#![allow(clippy::unwrap_used)]

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use ramtorch_client::{Client, ClientError, Endpoint, v1};
use ramtorch_tests::chance::setting;
use ramtorch_tests::observed::{cpu_seconds, observe, threads};
use ramtorch_tests::{Fixture, Sandbox, read_metrics};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

/// Submitted jobs that wait at once: a queue of users, well below `jobs.active_max`.
const QUEUE: usize = 300;
/// Looks at the job, the list, the node: each so often a second.
const LOOKS: u64 = 10;

/// Times of calls, by name, and what failed.
#[derive(Default)]
struct Tally {
    calls: Mutex<BTreeMap<&'static str, Vec<f64>>>,
    errors: Mutex<Vec<String>>,
    events: AtomicU64,
}

impl Tally {
    fn note<T>(&self, call: &'static str, since: Instant, result: Result<T, ClientError>) -> Option<T> {
        match result {
            Ok(value) => {
                self.calls.lock().unwrap().entry(call).or_default().push(since.elapsed().as_secs_f64() * 1e3);
                Some(value)
            }
            Err(e) => {
                self.errors.lock().unwrap().push(format!("{call}: {e}"));
                None
            }
        }
    }
}

/// Watches from its own connection until told to stop; every step has to come.
async fn watcher(socket: PathBuf, id: String, tally: Arc<Tally>, mut stop: watch::Receiver<bool>) {
    let begun = Instant::now();
    let connected = async {
        let mut client = Client::connect(Endpoint::unix(socket)).await?;
        let mut events = client.watch(&id, 1).await?;
        let first = events.next().await?;
        Ok::<_, ClientError>((events, first, client))
    };
    // Connection, call and first answer.
    let Some((mut events, _first, _client)) = tally.note("watch", begun, connected.await) else { return };
    let mut last = None;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            _ = stop.changed() => return,
        };
        let metrics = match event {
            Ok(Some(v1::WatchEvent { event: Some(v1::watch_event::Event::Metrics(m)) })) => m,
            Ok(Some(_)) => continue,
            Ok(None) => return tally.errors.lock().unwrap().push("watch: the stream ended".into()),
            Err(e) => return tally.errors.lock().unwrap().push(format!("watch: {e}")),
        };
        tally.events.fetch_add(1, Ordering::Relaxed);
        if last.is_some_and(|last| metrics.step != last + 1) {
            tally.errors.lock().unwrap().push(format!("watch: step {} after {last:?}", metrics.step));
        }
        last = Some(metrics.step);
    }
}

/// Submits at a steady rate, whatever the answers, and cancels the oldest of what waits.
async fn submitter(client: Client, request: v1::SubmitRequest, rate: u64, tally: Arc<Tally>, mut stop: watch::Receiver<bool>) {
    let waiting = Arc::new(Mutex::new(VecDeque::new()));
    let mut clock = interval(Duration::from_secs_f64(1.0 / rate as f64));
    clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut open = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            _ = clock.tick() => {}
            _ = stop.changed() => break,
        }
        let (mut client, request, tally, waiting) = (client.clone(), request.clone(), tally.clone(), waiting.clone());
        open.spawn(async move {
            let begun = Instant::now();
            if let Some(job) = tally.note("submit", begun, client.submit(request).await) {
                waiting.lock().unwrap().push_back(job.id);
            }
            let oldest = {
                let mut waiting = waiting.lock().unwrap();
                if waiting.len() > QUEUE { waiting.pop_front() } else { None }
            };
            if let Some(id) = oldest {
                let begun = Instant::now();
                tally.note("cancel", begun, client.cancel(&id).await);
            }
        });
        while open.try_join_next().is_some() {}
    }
    while open.join_next().await.is_some() {}
    // The queue goes, so that training is alone again.
    let left: Vec<String> = waiting.lock().unwrap().drain(..).collect();
    let mut client = client;
    for id in left {
        let begun = Instant::now();
        tally.note("cancel", begun, client.cancel(&id).await);
    }
}

/// Looks at things as people and dashboards do.
async fn onlooker(mut client: Client, id: String, tally: Arc<Tally>, mut stop: watch::Receiver<bool>) {
    let mut clock = interval(Duration::from_secs_f64(1.0 / LOOKS as f64));
    loop {
        tokio::select! {
            _ = clock.tick() => {}
            _ = stop.changed() => return,
        }
        let begun = Instant::now();
        tally.note("get", begun, client.get(&id).await);
        let begun = Instant::now();
        tally.note("list", begun, client.list(false).await);
        let begun = Instant::now();
        tally.note("info", begun, client.info().await);
    }
}

/// Keeps a processor busy for a share of the time, with nothing but counting.
fn count(duration: Duration, share: f64) {
    const SLICE: Duration = Duration::from_millis(20);
    let begun = Instant::now();
    while begun.elapsed() < duration {
        let slice = Instant::now();
        while slice.elapsed() < SLICE.mul_f64(share.min(1.0)) {
            (0..1000u32).for_each(|i| {
                std::hint::black_box(i);
            });
        }
        std::thread::sleep(SLICE.saturating_sub(slice.elapsed()));
    }
}

/// Processors besides 0 that do not share its core, where there are others.
fn others() -> Vec<usize> {
    let online = std::thread::available_parallelism().map_or(1, usize::from);
    let list = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list").unwrap_or_default();
    let siblings: Vec<usize> = list
        .trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
        })
        .flatten()
        .collect();
    let apart: Vec<usize> = (1..online).filter(|p| !siblings.contains(p)).collect();
    if apart.is_empty() { (1..online.max(2)).collect() } else { apart }
}

fn pin(pid: Pid, processors: &[usize]) {
    let mut set = CpuSet::new();
    for processor in processors {
        set.set(*processor).unwrap();
    }
    for thread in threads(pid) {
        // It may have ended.
        let _ = sched_setaffinity(thread, &set);
    }
}

/// Median and mean seconds of the steps that were written between two lengths of the metrics file.
fn step_seconds(path: &Path, from: usize, to: usize) -> (f64, f64, usize) {
    let lines = read_metrics(path);
    let mut seconds: Vec<f64> = lines[from..to].iter().map(|l| l.rest["step_seconds"].as_f64().unwrap()).collect();
    seconds.sort_by(f64::total_cmp);
    assert!(!seconds.is_empty(), "no step in this phase");
    (seconds[seconds.len() / 2], seconds.iter().sum::<f64>() / seconds.len() as f64, seconds.len())
}

/// What counts of a turn of either kind, and what goes before: watchers come in the first third of that.
const TURN: Duration = Duration::from_secs(8);
const SETTLE: Duration = Duration::from_secs(4);

/// Watchers and callers at work, until stopped.
struct Load {
    watching: Vec<tokio::task::JoinHandle<()>>,
    calling: [tokio::task::JoinHandle<()>; 2],
    stop: watch::Sender<bool>,
    /// One thread receives what watchers get; another one makes the calls that are timed.
    runtime: tokio::runtime::Runtime,
    callers: tokio::runtime::Runtime,
}

impl Load {
    /// Watchers come one after the other in the first third of `phase`.
    fn begin(
        socket: &Path,
        id: &str,
        request: &v1::SubmitRequest,
        (watchers, rate): (u64, u64),
        phase: Duration,
        tally: &Arc<Tally>,
    ) -> Load {
        let one_thread = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (runtime, callers) = (one_thread(), one_thread());
        let (stop, stopped) = watch::channel(false);
        let watching = (0..watchers)
            .map(|n| {
                let (socket, id, tally, stopped) = (socket.to_path_buf(), id.to_owned(), tally.clone(), stopped.clone());
                runtime.spawn(async move {
                    tokio::time::sleep(phase.mul_f64(n as f64 / watchers as f64 / 3.0)).await;
                    watcher(socket, id, tally, stopped).await;
                })
            })
            .collect();
        let client = || callers.block_on(Client::connect(Endpoint::unix(socket))).unwrap();
        let calling = [
            callers.spawn(submitter(client(), request.clone(), rate, tally.clone(), stopped.clone())),
            callers.spawn(onlooker(client(), id.to_owned(), tally.clone(), stopped)),
        ];
        Load { watching, calling, stop, runtime, callers }
    }

    /// Until all calls are answered and all connections closed.
    fn end(self) {
        self.stop.send(true).unwrap();
        self.calling.into_iter().for_each(|call| self.callers.block_on(call).unwrap());
        self.watching.into_iter().for_each(|watching| self.runtime.block_on(watching).unwrap());
    }
}

/// Steps under load over the mean of those before and after it, turn by turn, ascending: a machine that becomes faster or slower by
/// itself changes both sides.
fn turns(metrics: &Path, windows: &[(usize, usize)]) -> Vec<f64> {
    let mean = |w: &(usize, usize)| step_seconds(metrics, w.0, w.1).1;
    // Calm, load, calm, load, …, calm.
    let mut ratios: Vec<f64> =
        (1..windows.len()).step_by(2).map(|i| mean(&windows[i]) / ((mean(&windows[i - 1]) + mean(&windows[i + 1])) / 2.0)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios
}

#[test]
fn training_and_calls_go_on_under_load() {
    let (seconds, watchers) = (setting("RAMTORCH_LOAD_SECONDS", 3), setting("RAMTORCH_LOAD_WATCHERS", 60));
    let (rate, strict, pinned) =
        (setting("RAMTORCH_LOAD_SUBMISSIONS", 40), setting("RAMTORCH_LOAD_STRICT", 0) > 0, setting("RAMTORCH_LOAD_PINNED", 0) > 0);
    let phase = Duration::from_secs(seconds);
    let sandbox = Sandbox::new();
    let devices = std::env::var("RAMTORCH_LOAD_DEVICES").unwrap_or_else(|_| "cpu:1".into());
    let model = std::env::var("RAMTORCH_LOAD_MODEL").ok();
    let one_thread: &[&str] = &["--threads", "1"];
    let mut daemon = sandbox.start_daemon(&devices, if model.is_some() { &[] } else { one_thread });
    let daemon_pid = daemon.process().pid();
    let mut train =
        Fixture::load("llama").job("train").set("train.steps", 1_000_000).set("train.batch_size", setting("RAMTORCH_LOAD_BATCH", 64));
    if let Some(folder) = &model {
        train = train.unset("model.path").set("model.config", format!("{folder}/config.json"));
        train = train.set("data.train", format!("{folder}/tokens.bin")).set("data.sequence_length", 2048);
        train = train.unset("train.precision").set("optimizer.lr", 1e-5);
    }
    let id = daemon.submit("train", &train);
    let metrics = sandbox.path("metrics.jsonl");
    let lines = || std::fs::read(&metrics).map_or(0, |b| b.iter().filter(|b| **b == b'\n').count());
    daemon.wait_for(&id, "training", |j| j["step"].as_u64().is_some_and(|s| s >= 5));
    let worker = sandbox.processes().into_iter().find(|(_, line)| line.trim_end().ends_with(" worker")).unwrap().0;
    let (worker, me) = (Pid::from_raw(worker), nix::unistd::getpid());
    if pinned {
        pin(worker, &[0]);
        pin(daemon_pid, &others());
        pin(me, &others());
    }
    std::thread::sleep(phase / 6);

    let before = lines();
    std::thread::sleep(phase / 2);
    let calm_end = lines();

    let tally = Arc::new(Tally::default());
    // Without outputs: no second job may name one of a job that has not ended.
    let job = Fixture::load("llama").job("waits").set("train.steps", 1).set("schedule.warmup_steps", 0u64).unset("output.metrics");
    let base_dir = sandbox.root().to_str().unwrap().to_owned();
    let request = v1::SubmitRequest { job_toml: job.text(), base_dir, file_name: "waits.toml".into(), dry_run: false };
    let socket = daemon.socket().to_path_buf();
    let loaded = |phase: Duration, tally: &Arc<Tally>| Load::begin(&socket, &id, &request, (watchers, rate), phase, tally);
    let cpu_before = (cpu_seconds(daemon_pid), cpu_seconds(worker), cpu_seconds(me));
    let begun = Instant::now();
    let load = loaded(phase, &tally);
    std::thread::sleep(phase);
    let (load_seconds, load_end) = (begun.elapsed().as_secs_f64(), lines());
    let cpu_after = (cpu_seconds(daemon_pid), cpu_seconds(worker), cpu_seconds(me));
    let under_load = observe(daemon_pid);
    load.end();
    std::thread::sleep(phase / 6);
    let after = lines();
    std::thread::sleep(phase / 2);
    let end = lines();
    let left = observe(daemon_pid);
    // What the machine itself takes from a processor whose neighbour is busy for as long: no call, no memory, no disk.
    let share = (cpu_after.0 - cpu_before.0 + cpu_after.2 - cpu_before.2) / load_seconds;
    let counted = pinned.then(|| {
        std::thread::sleep(phase / 6);
        let begun = lines();
        count(phase / 2, share);
        (begun, lines())
    });

    let mut windows = Vec::new();
    let mut window = |load: Option<Load>| {
        std::thread::sleep(SETTLE); // what begins and ends is in neither
        let begun = lines();
        std::thread::sleep(TURN);
        windows.push((begun, lines()));
        load.into_iter().for_each(Load::end);
    };
    let rounds = setting("RAMTORCH_LOAD_TURNS", 0);
    // A thousand watchers that come in a second are not what calls are judged by.
    let turning = Arc::new(Tally::default());
    for _ in 0..rounds {
        window(None);
        window(Some(loaded(SETTLE, &turning)));
    }
    if rounds > 0 {
        window(None);
    }

    for errors in [&tally, &turning].map(|t| t.errors.lock().unwrap()) {
        assert!(errors.is_empty(), "{} calls failed; the first: {:?}", errors.len(), &errors[..errors.len().min(5)]);
    }
    let (calm, loaded, calm_again) =
        (step_seconds(&metrics, before, calm_end), step_seconds(&metrics, calm_end, load_end), step_seconds(&metrics, after, end));
    let undisturbed = (calm.1 * calm.2 as f64 + calm_again.1 * calm_again.2 as f64) / (calm.2 + calm_again.2) as f64;
    let mut slower = loaded.1 / undisturbed - 1.0;
    let mut text = format!(
        "load: {watchers} watchers on connections of their own, {rate} submissions a second for {load_seconds:.1} s{}\n",
        if pinned { ", training alone on one processor's core" } else { "" }
    );
    let mut worst: f64 = 0.0;
    for (call, times) in tally.calls.lock().unwrap().iter_mut() {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        worst = worst.max(at(0.99));
        text += &format!(
            "  {call:8} {:7} calls, 0 errors; median {:.1} ms, p99 {:.1} ms, most {:.1} ms\n",
            times.len(),
            at(0.5),
            at(0.99),
            at(1.0)
        );
    }
    text += &format!("  events received by watchers: {}\n", tally.events.load(Ordering::Relaxed));
    text += &format!(
        "  a step of training: {:.1} ms before ({} steps), {:.1} ms under load ({}), {:.1} ms after ({}): {:+.2} %\n",
        calm.1 * 1e3,
        calm.2,
        loaded.1 * 1e3,
        loaded.2,
        calm_again.1 * 1e3,
        calm_again.2,
        slower * 100.0
    );
    if let Some((begun, ended)) = counted {
        let counting = step_seconds(&metrics, begun, ended);
        text += &format!(
            "  and while a process that only counts has the other processor for {:.0} % of the time: {:.1} ms ({}): {:+.2} %\n",
            share * 100.0,
            counting.1 * 1e3,
            counting.2,
            (counting.1 / undisturbed - 1.0) * 100.0
        );
    }
    if rounds > 0 {
        let ratios = turns(&metrics, &windows);
        slower = ratios[ratios.len() / 2] - 1.0;
        let percent = |r: f64| (r - 1.0) * 100.0;
        let (least, most) = (percent(ratios[0]), percent(ratios[ratios.len() - 1]));
        text += &format!("  in {rounds} turns of 8 s each way: {:+.2} % (median; {least:+.2} to {most:+.2})\n", slower * 100.0);
    }
    text += &format!(
        "  processor seconds: daemon {:.1}, load generator {:.1}, worker {:.1} in {load_seconds:.1} s\n",
        cpu_after.0 - cpu_before.0,
        cpu_after.2 - cpu_before.2,
        cpu_after.1 - cpu_before.1
    );
    text += &format!(
        "  daemon under load: {} MiB, {} descriptors, {} threads; after it: {} MiB, {} descriptors, {} threads\n",
        under_load.memory >> 20,
        under_load.descriptors,
        under_load.threads,
        left.memory >> 20,
        left.descriptors,
        left.threads
    );
    eprint!("{text}");
    if let Some(path) = std::env::var_os("RAMTORCH_LOAD_SUMMARY") {
        std::fs::write(path, &text).unwrap();
    }
    daemon.client(["cancel", &id]).expect_success();
    daemon.wait_for_state(&id, "cancelled");
    assert!(left.descriptors < 64, "descriptors left after the load: {}", left.descriptors);
    daemon.stop();
    if strict {
        assert!(worst < 50.0, "p99 of a call is {worst:.1} ms");
        assert!(slower < 0.02, "training is slower by {:.2} %", slower * 100.0);
    }
}
