//! The state task alone, without processes, files or real time: whatever order things happen in, nothing is forgotten.

use super::message::{JobKey, Message, Planned};
use super::outside::{NewSegment, Outside};
use super::record::Record;
use super::*;
use crate::config::{JobLimits, Supervision};
use crate::devices::Device;
use crate::node::Memory;
use crate::process::{Ended, Event, Identity, Status};
use nix::sys::signal::Signal;
use pb::worker_report::Report;
use proptest::prelude::*;
use ramtorch_job::JobSpec;
use ramtorch_worker::{DeviceKind, DeviceSpec, EngineError, ErrorKind, Plan, PlanRequest, Prepared, TrainOutcome};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot};

/// What the supervisor has asked of the world, and what the world is like.
#[derive(Default)]
struct Asked {
    /// Processes that live: key, token, and whether they have connected.
    procs: Vec<(ProcKey, String)>,
    /// Answers that are due.
    plans: Vec<JobKey>,
    creations: Vec<(JobKey, String)>,
    removals: Vec<(JobKey, String)>,
    /// Segments that exist.
    segments: BTreeSet<String>,
    /// Processes that were sent SIGKILL or SIGTERM.
    signalled: Vec<(ProcKey, Signal)>,
    saved: Vec<Record>,
    tokens: u64,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Asked>>);

impl Fake {
    fn with<T>(&self, f: impl FnOnce(&mut Asked) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }
}

impl Outside for Fake {
    fn spawn(&mut self, key: ProcKey, token: &str, _log: PathBuf, _job: Option<&str>) {
        self.with(|a| a.procs.push((key, token.into())));
    }
    fn signal(&mut self, key: ProcKey, signal: Signal) {
        self.with(|a| a.signalled.push((key, signal)));
    }
    fn forget(&mut self, key: ProcKey) {
        self.with(|a| assert!(a.procs.iter().all(|p| p.0 != key), "forgotten while it lives"));
    }
    fn memory(&mut self) -> Memory {
        Memory { total: 1 << 40, available: 1 << 39, shm_total: 1 << 39, shm_free: 1 << 39 }
    }
    fn plan(&mut self, job: JobKey, _request: PlanRequest, _alone: u64) {
        self.with(|a| a.plans.push(job));
    }
    fn create_segment(&mut self, job: JobKey, segment: NewSegment) {
        self.with(|a| a.creations.push((job, segment.name)));
    }
    fn remove_segment(&mut self, job: JobKey, _id: &str, name: String) {
        self.with(|a| a.removals.push((job, name)));
    }
    fn save(&mut self, record: &Record) {
        self.with(|a| a.saved.push(record.clone()));
    }
    fn append_metrics(&mut self, _id: &str, _line: String) {}
    fn delete(&mut self, _id: &str) {}
    fn tidy_logs(&mut self, _id: &str, _oldest: u64) {}
    fn log_dir(&self, id: &str) -> PathBuf {
        PathBuf::from("/logs").join(id)
    }
    fn one_off_log(&self, id: u64) -> PathBuf {
        format!("/logs/{id}").into()
    }
    fn remove_one_off_log(&mut self, _id: u64) {}
    fn cache_dir(&self) -> PathBuf {
        "/cache".into()
    }
    fn token(&mut self) -> std::io::Result<String> {
        Ok(self.with(|a| {
            a.tokens += 1;
            format!("token{}", a.tokens)
        }))
    }
    fn unix_ms(&self) -> i64 {
        1
    }
    fn boot_id(&self) -> &str {
        "boot"
    }
}

/// A supervisor in a world that does what a test says.
struct Bench {
    fake: Fake,
    supervisor: Supervisor,
    now: Instant,
    jobs: u32,
    /// Live processes that have registered: their key and command stream.
    connected: Vec<(ProcKey, mpsc::Receiver<Result<pb::Command, tonic::Status>>)>,
}

impl Bench {
    fn new(devices: u32) -> Bench {
        let device =
            |index| Device { spec: DeviceSpec { kind: DeviceKind::Cpu, index, threads: 1, memory_bytes: 1 << 30 }, model: "CPU".into() };
        let pool = DevicePool::new((0..devices).map(device).collect());
        let fake = Fake::default();
        let supervisor = Supervisor::new(Supervision::default(), JobLimits::default(), pool, Box::new(fake.clone()));
        Bench { fake, supervisor, now: Instant::now(), jobs: 0, connected: Vec::new() }
    }

    fn submit(&mut self, ranks: usize) -> String {
        self.jobs += 1;
        let text = format!(
            "name = \"j{}\"\n[model]\npath = \"/m\"\n[data]\nformat = \"tokens\"\ntrain = \"/t\"\n[train]\nsteps = 5\nbatch_size = 2\n[device]\nranks = {ranks}\n",
            self.jobs
        );
        let spec = JobSpec::parse(&text, std::path::Path::new("/"), "j").unwrap();
        let record = Box::new(Record::new(format!("id{}", self.jobs), &spec, 0, 0));
        let id = record.id.clone();
        let (reply, _) = oneshot::channel();
        self.handle(Message::Submit { record, spec: Box::new(spec), reply });
        id
    }

    fn handle(&mut self, message: Message) {
        self.supervisor.handle(message, self.now);
        self.check();
    }

    fn advance(&mut self, by: Duration) {
        // In steps as short as the real task's, so that no pause is seen.
        let end = self.now + by;
        while self.now < end {
            self.now += Duration::from_millis(500).min(end - self.now);
            self.beat();
            self.supervisor.tick(self.now);
            self.check();
        }
    }

    /// Every connected process says that it lives.
    fn beat(&mut self) {
        let keys: Vec<ProcKey> = self.connected.iter().map(|c| c.0).collect();
        for key in keys {
            let heartbeat = pb::Heartbeat { step: 1, phase: "computing".into(), sequence: 0 };
            self.handle(Message::Report { key, report: Report::Heartbeat(heartbeat) });
        }
    }

    fn view(&mut self, id: &str) -> pb::Job {
        let (reply, mut answer) = oneshot::channel();
        self.handle(Message::Get { id: id.into(), reply });
        answer.try_recv().unwrap().unwrap()
    }

    fn started(&mut self, key: ProcKey) {
        let pid = 1000 + i32::try_from(key.0).unwrap();
        self.handle(Message::Process(Event::Started(key, Identity { pid, start_ticks: 1, boot_id: "boot".into() })));
    }

    fn connect(&mut self, key: ProcKey) {
        let Some((_, token)) = self.fake.with(|a| a.procs.iter().find(|p| p.0 == key).cloned()) else { return };
        let (reply, mut answer) = oneshot::channel();
        let pid = 1000 + i32::try_from(key.0).unwrap();
        self.handle(Message::Register { token: token.clone(), pid, start_ticks: 1, peer_pid: Some(pid), reply });
        if !matches!(answer.try_recv(), Ok(Ok(_))) {
            return;
        }
        let (commands, receiver) = mpsc::channel(64);
        let (reply, mut answer) = oneshot::channel();
        self.handle(Message::Opened { token, commands, reply });
        assert_eq!(answer.try_recv().unwrap().unwrap(), key);
        self.connected.push((key, receiver));
    }

    fn exit(&mut self, key: ProcKey, status: Status) {
        self.fake.with(|a| a.procs.retain(|p| p.0 != key));
        self.connected.retain(|c| c.0 != key);
        self.handle(Message::Process(Event::Ended(key, Ended { status, tail: "tail".into() })));
        self.handle(Message::Closed { key });
    }

    /// The process does its work: whatever it is for.
    fn succeed(&mut self, key: ProcKey) {
        let Some(role) = self.supervisor.procs.get(&key).map(|p| p.role) else { return };
        let stopped = self.connected.iter_mut().find(|c| c.0 == key).is_some_and(|c| c.1.try_recv().is_ok());
        let json = match role {
            Role::Prepare { .. } => serde_json::to_string(&prepared()).unwrap(),
            Role::Rank { .. } => {
                serde_json::to_string(&TrainOutcome { step: 5, stopped, output: None, sample: None, checkpoint: None }).unwrap()
            }
            _ => "{}".into(),
        };
        self.handle(Message::Report { key, report: Report::Result(pb::WorkerResult { ok: true, stopped, json, ..Default::default() }) });
        self.exit(key, Status::Code(0));
    }

    fn fail(&mut self, key: ProcKey, kind: ErrorKind) {
        let result = pb::WorkerResult { exit_code: u32::from(kind.exit_code()), error: "as told".into(), ..Default::default() };
        self.handle(Message::Report { key, report: Report::Result(result) });
        self.exit(key, Status::Code(i32::from(kind.exit_code())));
    }

    fn answer_plan(&mut self, outcome: impl Fn(usize) -> Planned) {
        for job in self.fake.with(|a| std::mem::take(&mut a.plans)) {
            let ranks = self.supervisor.jobs[&job].leases.len();
            self.handle(Message::Planned { job, outcome: outcome(ranks) });
        }
    }

    fn answer_creation(&mut self, ok: bool) {
        for (job, name) in self.fake.with(|a| std::mem::take(&mut a.creations)) {
            // A creation that fails half way may leave the name behind.
            self.fake.with(|a| assert!(a.segments.insert(name), "the same name twice"));
            let outcome = if ok { Ok(()) } else { Err(EngineError::new(ErrorKind::Resources, "full")) };
            self.handle(Message::Created { job, outcome });
        }
    }

    fn answer_removal(&mut self) {
        for (job, name) in self.fake.with(|a| std::mem::take(&mut a.removals)) {
            self.fake.with(|a| a.segments.remove(&name));
            self.handle(Message::Removed { job, outcome: Ok(()) });
        }
    }

    fn procs(&self) -> Vec<ProcKey> {
        self.fake.with(|a| a.procs.iter().map(|p| p.0).collect())
    }

    /// SIGTERM and SIGKILL do what they do.
    fn deliver_signals(&mut self) {
        for (key, signal) in self.fake.with(|a| std::mem::take(&mut a.signalled)) {
            if self.procs().contains(&key) {
                self.exit(key, Status::Signal(signal as i32));
            }
        }
    }

    /// What must hold at every moment.
    fn check(&self) {
        let s = &self.supervisor;
        let mut held = BTreeSet::new();
        for job in s.jobs.values() {
            for lease in &job.leases {
                assert!(held.insert(*lease), "a device has two holders");
            }
            if job.has_ended() {
                assert!(job.leases.is_empty() && job.ranks.is_empty() && job.record.segment.is_none() && job.checkpoints.is_empty());
            }
            if matches!(job.phase, Phase::Queued { .. }) {
                assert!(job.leases.is_empty() || job.ranks.is_empty());
            }
            for rank in job.ranks.iter().filter(|r| r.outcome.is_none()) {
                assert!(s.procs.contains_key(&rank.key), "a rank that nobody knows");
            }
        }
        let busy = s.pool.each().filter(|(_, holder, _)| holder.is_some()).count();
        assert_eq!(busy, held.len(), "devices held by nobody");
    }
}

fn prepared() -> Prepared {
    Prepared {
        architecture: serde_json::Value::Null,
        description: "m".into(),
        weights: None,
        resume: None,
        train_sequences: 1,
        validation_sequences: 0,
        sequence_length: 1,
        steps: 100,
        dataset: serde_json::Value::Null,
        rates: Default::default(),
    }
}

fn fits(ranks: usize) -> Planned {
    let plan = Plan {
        parameters: 1,
        segment_bytes: 1 << 20,
        device_bytes: vec![1; ranks],
        host_bytes: 1 << 20,
        step_seconds: 0.0,
        bound_by: String::new(),
        text: String::new(),
        detail: serde_json::Value::Null,
    };
    Planned::Fits(Box::new(plan))
}

/// Brings a submitted job's gang to work.
fn to_work(bench: &mut Bench) -> Vec<ProcKey> {
    let prepare = bench.procs();
    for key in prepare {
        bench.started(key);
        bench.connect(key);
        bench.succeed(key);
    }
    bench.answer_plan(fits);
    bench.answer_creation(true);
    let gang = bench.procs();
    for key in &gang {
        bench.started(*key);
        bench.connect(*key);
    }
    bench.beat();
    gang
}

#[test]
fn a_process_that_outlives_sigkill_costs_its_device_and_nothing_else() {
    let mut bench = Bench::new(3);
    let id = bench.submit(2);
    let gang = to_work(&mut bench);
    assert_eq!(bench.view(&id).state(), pb::JobState::Running);
    // Rank 1 falls silent and cannot be killed; rank 0 dies as told.
    bench.connected.retain(|c| c.0 != gang[1]);
    bench.advance(Duration::from_secs(12));
    bench.fake.with(|a| assert!(a.signalled.contains(&(gang[1], Signal::SIGTERM))));
    bench.exit(gang[0], Status::Signal(15));
    bench.advance(Duration::from_secs(40));
    bench.fake.with(|a| assert!(a.signalled.contains(&(gang[1], Signal::SIGKILL))));
    // The gang is started again on the devices that are left.
    let job = bench.view(&id);
    let devices: Vec<&str> = job.workers.iter().map(|w| w.device.as_str()).collect();
    assert_eq!((devices, job.restarts), (vec!["cpu:0", "cpu:2"], 1), "{}", job.message);
    let states: Vec<&str> = bench.supervisor.pool.each().map(|d| d.2).collect();
    assert_eq!(states, ["busy", "quarantined", "busy"]);
    // It is gone at last: the device is in use again.
    bench.exit(gang[1], Status::Signal(9));
    assert_eq!(bench.supervisor.pool.each().filter(|d| d.2 == "quarantined").count(), 0);
}

#[test]
fn without_a_spare_device_the_job_waits_with_its_segment() {
    let mut bench = Bench::new(2);
    let id = bench.submit(2);
    let gang = to_work(&mut bench);
    bench.connected.retain(|c| c.0 != gang[1]);
    bench.advance(Duration::from_secs(12));
    bench.exit(gang[0], Status::Signal(15));
    bench.advance(Duration::from_secs(40));
    let job = bench.view(&id);
    assert_eq!(job.state(), pb::JobState::Queued, "{}", job.message);
    assert!(job.message.contains("quarantined") && !job.segment.is_empty(), "{}", job.message);
    // A job that needs no more than the healthy device is not held up.
    let other = bench.submit(1);
    assert_eq!(bench.view(&other).state(), pb::JobState::Preparing);
    bench.handle(Message::Cancel { id: other, reply: oneshot::channel().0 });
    bench.advance(Duration::from_secs(1));
    bench.deliver_signals();
    bench.exit(gang[1], Status::Signal(9));
    assert_eq!(bench.view(&id).state(), pb::JobState::Starting);
    assert_eq!(bench.fake.with(|a| a.segments.len()), 1, "the same segment");
}

#[test]
fn a_daemon_that_slept_blames_nobody() {
    let mut bench = Bench::new(1);
    let id = bench.submit(1);
    to_work(&mut bench);
    bench.supervisor.tick(bench.now);
    // Stopped for an hour: the first thing it does is look at the clock, before any heartbeat is read.
    bench.now += Duration::from_secs(3600);
    bench.supervisor.tick(bench.now);
    assert_eq!(bench.view(&id).state(), pb::JobState::Running);
    bench.advance(Duration::from_secs(30));
    assert_eq!(bench.view(&id).restarts, 0);
}

#[test]
fn the_books_never_name_a_segment_before_it_is_whole() {
    let mut bench = Bench::new(1);
    bench.submit(1);
    let prepare = bench.procs()[0];
    bench.started(prepare);
    bench.connect(prepare);
    bench.succeed(prepare);
    bench.answer_plan(fits);
    bench.fake.with(|a| assert!(a.saved.iter().all(|r| r.segment.is_none())));
    bench.answer_creation(true);
    bench.fake.with(|a| assert!(a.saved.last().unwrap().segment.is_some()));
}

#[test]
fn the_restart_budget_counts_failures_without_a_new_step() {
    let mut bench = Bench::new(1);
    let id = bench.submit(1);
    let mut gang = to_work(&mut bench);
    for round in 0..20u64 {
        // A new step every other round.
        if round % 2 == 0 {
            let metrics = pb::Metrics { step: round + 1, ..Default::default() };
            bench.handle(Message::Report { key: gang[0], report: Report::Metrics(metrics) });
        }
        bench.exit(gang[0], Status::Signal(11));
        bench.advance(Duration::from_secs(5));
        gang = bench.procs();
        assert_eq!(gang.len(), 1, "round {round}: {}", bench.view(&id).message);
        bench.started(gang[0]);
        bench.connect(gang[0]);
    }
    // The same old step again is no progress.
    while !gang.is_empty() {
        let metrics = pb::Metrics { step: 19, loss: 2.0, ..Default::default() };
        bench.handle(Message::Report { key: gang[0], report: Report::Metrics(metrics) });
        bench.exit(gang[0], Status::Signal(11));
        bench.advance(Duration::from_secs(9));
        gang = bench.procs();
        if let Some(key) = gang.first().copied() {
            bench.started(key);
            bench.connect(key);
        }
    }
    bench.answer_removal();
    let job = bench.view(&id);
    assert_eq!((job.state(), job.exit_code), (pb::JobState::Failed, 1), "{}", job.message);
    assert!(job.message.contains("SIGSEGV"), "{}", job.message);
}

/// Something that may happen.
#[derive(Debug, Clone)]
enum Happening {
    Submit(usize),
    Start(usize),
    Connect(usize),
    Succeed(usize),
    Fail(usize, u8),
    Crash(usize),
    Silence(usize),
    Step(usize, u64),
    Plan(u8),
    Create(bool),
    Remove,
    Signals,
    Wait(u64),
    Cancel(u32),
    Checkpoint(u32),
}

fn happening() -> impl Strategy<Value = Happening> {
    let which = 0usize..4;
    prop_oneof![
        2 => (1usize..4).prop_map(Happening::Submit),
        6 => which.clone().prop_map(Happening::Start),
        8 => which.clone().prop_map(Happening::Connect),
        6 => which.clone().prop_map(Happening::Succeed),
        1 => (which.clone(), 0u8..5).prop_map(|(w, k)| Happening::Fail(w, k)),
        2 => which.clone().prop_map(Happening::Crash),
        1 => which.clone().prop_map(Happening::Silence),
        3 => (which, 1u64..6).prop_map(|(w, s)| Happening::Step(w, s)),
        6 => (0u8..8).prop_map(Happening::Plan),
        6 => prop::bool::weighted(0.9).prop_map(Happening::Create),
        4 => Just(Happening::Remove),
        4 => Just(Happening::Signals),
        3 => (1u64..15).prop_map(Happening::Wait),
        1 => (1u32..6).prop_map(Happening::Cancel),
        1 => (1u32..6).prop_map(Happening::Checkpoint),
    ]
}

fn happen(bench: &mut Bench, what: Happening) {
    let pick = |bench: &Bench, n: usize| bench.procs().get(n).copied();
    match what {
        Happening::Submit(ranks) => drop(bench.submit(ranks)),
        Happening::Start(n) => pick(bench, n).into_iter().for_each(|k| bench.started(k)),
        Happening::Connect(n) => pick(bench, n).into_iter().for_each(|k| bench.connect(k)),
        Happening::Succeed(n) => pick(bench, n).into_iter().for_each(|k| bench.succeed(k)),
        Happening::Fail(n, kind) => {
            let kinds = [ErrorKind::JobFile, ErrorKind::Input, ErrorKind::Resources, ErrorKind::Output, ErrorKind::Internal];
            pick(bench, n).into_iter().for_each(|k| bench.fail(k, kinds[usize::from(kind)]));
        }
        Happening::Crash(n) => pick(bench, n).into_iter().for_each(|k| bench.exit(k, Status::Signal(11))),
        Happening::Silence(n) => {
            if n < bench.connected.len() {
                bench.connected.remove(n);
            }
        }
        Happening::Step(n, step) => pick(bench, n).into_iter().for_each(|key| {
            let metrics = pb::Metrics { step, ..Default::default() };
            bench.handle(Message::Report { key, report: Report::Metrics(metrics) });
        }),
        Happening::Plan(0) => bench.answer_plan(|_| Planned::Never(EngineError::new(ErrorKind::Resources, "never"))),
        Happening::Plan(1) => bench.answer_plan(|_| Planned::Later("later".into())),
        Happening::Plan(_) => bench.answer_plan(fits),
        Happening::Create(ok) => bench.answer_creation(ok),
        Happening::Remove => bench.answer_removal(),
        Happening::Signals => bench.deliver_signals(),
        Happening::Wait(seconds) => bench.advance(Duration::from_secs(seconds)),
        Happening::Cancel(n) => bench.handle(Message::Cancel { id: format!("id{n}"), reply: oneshot::channel().0 }),
        Happening::Checkpoint(n) => bench.handle(Message::Checkpoint { id: format!("id{n}"), reply: oneshot::channel().0 }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever happens, in whatever order: a stop ends in bounded time with no process, no segment, no device held and
    /// every job either ended or back in the queue.
    #[test]
    fn nothing_is_forgotten(happenings in prop::collection::vec(happening(), 1..120)) {
        let mut bench = Bench::new(3);
        for what in happenings {
            happen(&mut bench, what);
        }
        bench.handle(Message::Stop);
        for _ in 0..60 {
            bench.advance(Duration::from_millis(500));
            bench.deliver_signals();
            bench.answer_plan(fits);
            bench.answer_creation(true);
            bench.answer_removal();
            if bench.supervisor.is_done() {
                break;
            }
        }
        prop_assert!(bench.supervisor.is_done());
        prop_assert!(bench.procs().is_empty(), "{:?}", bench.procs());
        bench.fake.with(|a| assert!(a.segments.is_empty(), "{:?}", a.segments));
        prop_assert!(bench.supervisor.leftovers().is_empty());
        prop_assert_eq!(bench.supervisor.pool.each().filter(|(_, holder, _)| holder.is_some()).count(), 0);
    }

    /// Left to itself, with workers that work, every job ends.
    #[test]
    fn every_job_ends(happenings in prop::collection::vec(happening(), 1..80)) {
        let mut bench = Bench::new(3);
        for what in happenings {
            happen(&mut bench, what);
        }
        for _ in 0..400 {
            bench.answer_plan(fits);
            bench.answer_creation(true);
            bench.answer_removal();
            bench.deliver_signals();
            for key in bench.procs() {
                bench.started(key);
                bench.connect(key);
                bench.succeed(key);
            }
            bench.advance(Duration::from_secs(1));
        }
        for job in bench.supervisor.jobs.values() {
            prop_assert!(job.has_ended(), "{} is {:?}: {}", job.record.id, job.phase, job.record.message);
        }
        bench.fake.with(|a| assert!(a.segments.is_empty(), "{:?}", a.segments));
    }
}
