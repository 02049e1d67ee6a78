//! A state task in a world of its own: no processes, files or real time. For its tests, and for fuzzing what workers say.
#![allow(clippy::unwrap_used)]

use super::job::Job;
use super::message::{JobKey, Message, Planned};
use super::outside::{Contents, NewSegment, Outside};
use super::record::Record;
use super::*;
use crate::access::Caller;
use crate::config::{JobLimits, Supervision};
use crate::devices::Device;
use crate::node::Memory;
use crate::process::{Ended, Event, Identity, Status};
use nix::sys::signal::Signal;
use pb::worker_report::Report;
use ramtorch_job::JobSpec;
use ramtorch_worker::{DeviceKind, DeviceSpec, EngineError, ErrorKind, Plan, PlanRequest, Prepared, TrainOutcome};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot};

/// What the supervisor has asked of the world, and what the world is like.
#[derive(Default)]
pub(super) struct Asked {
    /// Processes that live: key, token, and whether they have connected.
    pub(super) procs: Vec<(ProcKey, String)>,
    /// Answers that are due.
    pub(super) plans: Vec<JobKey>,
    pub(super) creations: Vec<(JobKey, String)>,
    pub(super) removals: Vec<(JobKey, String)>,
    /// Segments that exist.
    pub(super) segments: BTreeSet<String>,
    /// Processes that were sent SIGKILL or SIGTERM.
    pub(super) signalled: Vec<(ProcKey, Signal)>,
    pub(super) saved: Vec<Record>,
    pub(super) faults: Vec<crate::faults::kept::Fault>,
    pub(super) tokens: u64,
    /// Step of every segment; none can be read where this is not said.
    pub(super) step: Option<u64>,
}

#[derive(Clone, Default)]
pub(super) struct Fake(Arc<Mutex<Asked>>);

impl Fake {
    pub(super) fn with<T>(&self, f: impl FnOnce(&mut Asked) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }
}

impl Outside for Fake {
    fn spawn(&mut self, key: ProcKey, token: &str, _log: PathBuf, _job: Option<&Job>) {
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
    fn remove_segment(&mut self, job: JobKey, _id: &str, name: String, _end: bool) {
        self.with(|a| a.removals.push((job, name)));
    }
    fn contents(&self, segment: &str) -> Contents {
        let step = self.with(|a| a.step.filter(|_| a.segments.contains(segment)));
        step.map_or(Contents::Unknown, Contents::Step)
    }
    fn save(&mut self, record: &Record) {
        self.with(|a| a.saved.push(record.clone()));
    }
    fn keep_faults(&mut self, faults: &[crate::faults::kept::Fault]) {
        self.with(|a| a.faults = faults.to_vec());
    }
    fn delete(&mut self, _id: &str) {}
    fn tidy_logs(&mut self, _id: &str, _oldest: u64) {}
    fn log_dir(&self, id: &str) -> PathBuf {
        PathBuf::from("/logs").join(id)
    }
    fn history_file(&self, id: &str) -> PathBuf {
        PathBuf::from("/history").join(id)
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
pub(super) struct Bench {
    pub(super) fake: Fake,
    pub(super) supervisor: Supervisor,
    pub(super) now: Instant,
    pub(super) jobs: u32,
    /// Live processes that have registered: their key and command stream.
    pub(super) connected: Vec<(ProcKey, mpsc::Receiver<Result<pb::Command, tonic::Status>>)>,
}

impl Bench {
    pub(super) fn new(devices: u32) -> Bench {
        Bench::of(DeviceKind::Cpu, devices)
    }

    pub(super) fn of(kind: DeviceKind, devices: u32) -> Bench {
        let device =
            |index| Device { spec: DeviceSpec { kind, index, threads: 1, memory_bytes: 1 << 30, bus_id: None }, model: "fake".into() };
        let pool = DevicePool::new((0..devices).map(device).collect());
        let fake = Fake::default();
        let supervisor = Supervisor::new(Supervision::default(), JobLimits::default(), pool, Box::new(fake.clone()));
        Bench { fake, supervisor, now: Instant::now(), jobs: 0, connected: Vec::new() }
    }

    pub(super) fn submit(&mut self, ranks: usize) -> String {
        self.jobs += 1;
        let text = format!(
            "name = \"j{}\"\n[model]\npath = \"/m\"\n[data]\nformat = \"tokens\"\ntrain = \"/t\"\n[train]\nsteps = 5\nbatch_size = 2\n[device]\nranks = {ranks}\n",
            self.jobs
        );
        let spec = JobSpec::parse(&text, std::path::Path::new("/"), "j").unwrap();
        let record = Box::new(Record::new(format!("id{}", self.jobs), &spec, 0, 0));
        let id = record.id.clone();
        let (reply, _) = oneshot::channel();
        self.handle(Message::Submit { record, spec: Box::new(spec), caller: Caller::daemon(), reply });
        id
    }

    pub(super) fn handle(&mut self, message: Message) {
        self.supervisor.handle(message, self.now);
        self.check();
    }

    pub(super) fn advance(&mut self, by: Duration) {
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
    pub(super) fn beat(&mut self) {
        let keys: Vec<ProcKey> = self.connected.iter().map(|c| c.0).collect();
        for key in keys {
            let heartbeat = pb::Heartbeat { step: 1, phase: "computing".into(), sequence: 0 };
            self.handle(Message::Report { key, report: Report::Heartbeat(heartbeat) });
        }
    }

    #[cfg(test)]
    pub(super) fn view(&mut self, id: &str) -> pb::Job {
        let (reply, mut answer) = oneshot::channel();
        self.handle(Message::Get { id: id.into(), reply });
        answer.try_recv().unwrap().unwrap()
    }

    pub(super) fn started(&mut self, key: ProcKey) {
        let pid = 1000 + i32::try_from(key.0).unwrap();
        self.handle(Message::Process(Event::Started(key, Identity { pid, start_ticks: 1, boot_id: "boot".into() })));
    }

    pub(super) fn connect(&mut self, key: ProcKey) {
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

    pub(super) fn exit(&mut self, key: ProcKey, status: Status) {
        self.fake.with(|a| a.procs.retain(|p| p.0 != key));
        self.connected.retain(|c| c.0 != key);
        self.handle(Message::Process(Event::Ended(key, Ended { status, tail: "tail".into() })));
        self.handle(Message::Closed { key });
    }

    /// The process does its work: whatever it is for.
    pub(super) fn succeed(&mut self, key: ProcKey) {
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

    pub(super) fn fail(&mut self, key: ProcKey, kind: ErrorKind) {
        let result = pb::WorkerResult { exit_code: u32::from(kind.exit_code()), error: "as told".into(), ..Default::default() };
        self.handle(Message::Report { key, report: Report::Result(result) });
        self.exit(key, Status::Code(i32::from(kind.exit_code())));
    }

    pub(super) fn answer_plan(&mut self, outcome: impl Fn(usize) -> Planned) {
        for job in self.fake.with(|a| std::mem::take(&mut a.plans)) {
            let ranks = self.supervisor.jobs[&job].leases.len();
            self.handle(Message::Planned { job, outcome: outcome(ranks) });
        }
    }

    pub(super) fn answer_creation(&mut self, ok: bool) {
        for (job, name) in self.fake.with(|a| std::mem::take(&mut a.creations)) {
            // A creation that fails half way may leave the name behind.
            self.fake.with(|a| assert!(a.segments.insert(name), "the same name twice"));
            let outcome = if ok { Ok(()) } else { Err(EngineError::new(ErrorKind::Resources, "full")) };
            self.handle(Message::Created { job, outcome });
        }
    }

    pub(super) fn answer_removal(&mut self) {
        for (job, name) in self.fake.with(|a| std::mem::take(&mut a.removals)) {
            self.fake.with(|a| a.segments.remove(&name));
            self.handle(Message::Removed { job, outcome: Ok(()) });
        }
    }

    pub(super) fn procs(&self) -> Vec<ProcKey> {
        self.fake.with(|a| a.procs.iter().map(|p| p.0).collect())
    }

    /// SIGTERM and SIGKILL do what they do.
    pub(super) fn deliver_signals(&mut self) {
        for (key, signal) in self.fake.with(|a| std::mem::take(&mut a.signalled)) {
            if self.procs().contains(&key) {
                self.exit(key, Status::Signal(signal as i32));
            }
        }
    }

    /// After a stop: each segment that is there is one that the next daemon will find by a job's record.
    pub(super) fn check_kept(&self) {
        let named: BTreeSet<String> =
            self.supervisor.jobs.active().filter_map(|j| j.record.segment.as_ref()).map(|s| s.name.clone()).collect();
        let left = self.supervisor.leftovers();
        assert!(left.problems.is_empty(), "{:?}", left.problems);
        assert_eq!((&left.kept, self.fake.with(|a| a.segments.clone())), (&named, named.clone()));
    }

    /// What must hold at every moment.
    pub(super) fn check(&self) {
        let s = &self.supervisor;
        s.jobs.check();
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

pub(super) fn prepared() -> Prepared {
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

pub(super) fn fits(ranks: usize) -> Planned {
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
pub(super) fn to_work(bench: &mut Bench) -> Vec<ProcKey> {
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
