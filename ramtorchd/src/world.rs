//! What the state task does to the real world: processes, shared memory, files.

use crate::access::paths::{JobWrites, Roots};
use crate::access::sandbox::{self, Rules};
use crate::config::WorkerCommand;
use crate::disk::Disk;
use crate::faults::kept::Fault;
use crate::node::{self, Memory};
use crate::process::{self, ProcKey, SpawnRequest, Spawner};
use crate::supervisor::JobKey;
use crate::supervisor::job::Job;
use crate::supervisor::message::{Message, Planned};
use crate::supervisor::outside::{Contents, Engine, NewSegment, Outside};
use crate::supervisor::record::Record;
use nix::sys::signal::Signal;
use ramtorch_store::{Registry, Store};
use ramtorch_worker::{EngineError, ErrorKind, PlanRequest};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::mpsc;

/// A job's record has so long to reach the disk.
pub const RECORD_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

/// Where the CUDA driver keeps kernels that it has compiled.
const CUDA_CACHE: &str = "CUDA_CACHE_PATH";

/// The real [`Outside`].
pub struct World {
    /// Answers go here.
    pub answers: mpsc::UnboundedSender<Message>,
    /// Starts processes.
    pub spawner: Spawner,
    /// What is started.
    pub worker: WorkerCommand,
    /// Where workers call.
    pub worker_socket: PathBuf,
    /// Plans, and creates segments.
    pub engine: Arc<dyn Engine>,
    /// List of segments.
    pub registry: Registry,
    /// Writes files.
    pub disk: Disk,
    /// Folder of all jobs.
    pub jobs: PathBuf,
    /// File of the devices that an error took out of use.
    pub quarantine: PathBuf,
    /// Folder of the logs of one-off work.
    pub one_offs: PathBuf,
    /// Folder of token caches.
    pub cache: PathBuf,
    /// This boot.
    pub boot_id: String,
    /// Folders that workers may use.
    pub roots: Arc<Roots>,
    /// Several devices are one GPU: NCCL is told that each process is on a machine of its own, or it would refuse them.
    pub gpus_are_shared: bool,
    /// Ways to signal the processes that live.
    pub signals: HashMap<ProcKey, mpsc::UnboundedSender<Signal>>,
}

impl World {
    /// What a worker is told of files.
    fn rules(&self, job: Option<&Job>) -> Rules {
        let writes = job.map(|j| JobWrites {
            folder: self.jobs.join(&j.record.id),
            outputs: j.record.outputs.clone(),
            cache: j.spec.data.cache.clone(),
        });
        let outputs = job.filter(|j| !j.record.outputs_as_given).map(|j| j.record.outputs.clone());
        Rules { sandbox: self.roots.sandbox(writes), outputs }
    }

    /// Runs `work` where blocking is allowed; its answer is told.
    fn in_background(&self, work: impl FnOnce() -> Message + Send + 'static) {
        let answers = self.answers.clone();
        tokio::task::spawn_blocking(move || {
            let _ = answers.send(work());
        });
    }
}

impl Outside for World {
    fn spawn(&mut self, key: ProcKey, token: &str, log: PathBuf, job: Option<&Job>) {
        let (sender, signals) = mpsc::unbounded_channel();
        self.signals.insert(key, sender);
        let mut env = vec![
            (process::SOCKET_VARIABLE, self.worker_socket.clone().into_os_string()),
            (process::TOKEN_VARIABLE, token.into()),
            (process::PARENT_VARIABLE, std::process::id().to_string().into()),
            // CUDA then numbers GPUs as `devices` counts them.
            ("CUDA_DEVICE_ORDER", "PCI_BUS_ID".into()),
            // With the default of 8, a worker's streams share queues to the device, and arithmetic that is ready waits for
            // copies it has nothing to do with.
            ("CUDA_DEVICE_MAX_CONNECTIONS", "32".into()),
            // Sums that switches make (NVLink multicast) come in no fixed order.
            ("NCCL_NVLS_ENABLE", "0".into()),
        ];
        if self.gpus_are_shared {
            env.push(("NCCL_HOSTID", key.0.to_string().into()));
            // The only way between such machines that a machine without a network has.
            env.push(("NCCL_SOCKET_IFNAME", "lo".into()));
        }
        let rules = self.rules(job);
        if rules.sandbox.is_some() && std::env::var_os(CUDA_CACHE).is_none() {
            // The driver's own place is in the home of the daemon's user, which may be the state folder.
            env.push((CUDA_CACHE, self.cache.join("cuda").into_os_string()));
        }
        let rules = serde_json::to_string(&rules);
        env.extend(rules.as_ref().ok().map(|text| (sandbox::VARIABLE, text.into())));
        let request = SpawnRequest { key, exe: self.worker.exe.clone(), args: self.worker.args.clone(), env, log, signals };
        let (spawner, answers, witness) = (self.spawner.clone(), self.answers.clone(), self.disk.witness());
        let not_started = move |status: process::Status, tail: &str| {
            let ended = process::Ended { status, tail: tail.into() };
            let _ = answers.send(Message::Process(process::Event::Ended(key, ended)));
        };
        if let Err(e) = rules {
            return not_started(process::Status::Unknown, &format!("what it may read and write cannot be told to it: {e}"));
        }
        let Some(job) = job.map(|j| j.record.id.clone()) else {
            if !spawner.spawn(request) {
                not_started(process::Status::Unknown, "the spawning thread is gone");
            }
            return;
        };
        tokio::task::spawn_blocking(move || {
            // What a gang does must not outrun what a later daemon would know of it: its segment and its generation.
            if let Err(why) = witness.durable(&job, RECORD_LIMIT) {
                not_started(process::Status::Unrecorded, &why);
            } else if !spawner.spawn(request) {
                not_started(process::Status::Unknown, "the spawning thread is gone");
            }
        });
    }

    fn signal(&mut self, key: ProcKey, signal: Signal) {
        if let Some(sender) = self.signals.get(&key) {
            let _ = sender.send(signal);
        }
    }

    fn forget(&mut self, key: ProcKey) {
        self.signals.remove(&key);
    }

    fn memory(&mut self) -> Memory {
        node::memory()
    }

    fn plan(&mut self, job: JobKey, request: PlanRequest, alone_bytes: u64) {
        let engine = self.engine.clone();
        self.in_background(move || Message::Planned { job, outcome: make_plan(engine.as_ref(), request, alone_bytes) });
    }

    fn create_segment(&mut self, job: JobKey, segment: NewSegment) {
        let (engine, registry) = (self.engine.clone(), self.registry.clone());
        self.in_background(move || {
            let NewSegment { name, job_id, generation, plan } = segment;
            if let Err(e) = registry.register(&name, &job_id, generation, plan.segment_bytes) {
                return Message::Unsettled { job, why: e.to_string() };
            }
            Message::Created { job, outcome: guard(|| engine.create_segment(&name, &plan)) }
        });
    }

    fn remove_segment(&mut self, job: JobKey, id: &str, name: String, end: bool) {
        let (registry, witness, id) = (self.registry.clone(), self.disk.witness(), id.to_string());
        self.in_background(move || {
            // A daemon that finds the record without its end and without its segment would run the job again.
            if let (true, Err(why)) = (end, witness.durable(&id, RECORD_LIMIT)) {
                return Message::Unsettled { job, why };
            }
            let outcome = Store::unlink(&name).and_then(|()| registry.forget(&name)).map_err(|e| e.to_string());
            Message::Removed { job, outcome }
        });
    }

    fn contents(&self, segment: &str) -> Contents {
        self.engine.contents(segment)
    }

    fn save(&mut self, record: &Record) {
        self.disk.save(record);
    }

    fn keep_faults(&mut self, faults: &[Fault]) {
        match serde_json::to_vec_pretty(faults) {
            Ok(bytes) => self.disk.replace_file(self.quarantine.clone(), bytes),
            Err(e) => tracing::error!("the list of devices that are out of use cannot be encoded: {e}"),
        }
    }

    fn delete(&mut self, id: &str) {
        self.disk.delete(id);
    }

    fn tidy_logs(&mut self, id: &str, oldest: u64) {
        self.disk.tidy(id, oldest);
    }

    fn log_dir(&self, id: &str) -> PathBuf {
        self.jobs.join(id).join("logs")
    }

    fn history_file(&self, id: &str) -> PathBuf {
        self.jobs.join(id).join("metrics.jsonl")
    }

    fn one_off_log(&self, id: u64) -> PathBuf {
        self.one_offs.join(format!("{id}.log"))
    }

    fn remove_one_off_log(&mut self, id: u64) {
        self.disk.remove_file(self.one_off_log(id));
    }

    fn cache_dir(&self) -> PathBuf {
        self.cache.clone()
    }

    fn token(&mut self) -> std::io::Result<String> {
        Ok(node::random::<16>()?.iter().map(|b| format!("{b:02x}")).collect())
    }

    fn unix_ms(&self) -> i64 {
        node::unix_ms()
    }

    fn boot_id(&self) -> &str {
        &self.boot_id
    }
}

/// Plans with what is free; where that is too little, finds out whether it would do if nothing else ran.
fn make_plan(engine: &dyn Engine, mut request: PlanRequest, alone_bytes: u64) -> Planned {
    let now = match guard(|| engine.plan(&request)) {
        Ok(plan) => return Planned::Fits(Box::new(plan)),
        Err(e) => e,
    };
    if now.kind != ErrorKind::Resources || alone_bytes <= request.segment_bytes_available {
        return Planned::Never(now);
    }
    request.segment_bytes_available = alone_bytes;
    match guard(|| engine.plan(&request)) {
        Ok(_) => Planned::Later(now.message),
        Err(e) => Planned::Never(e),
    }
}

/// A defect in the engine's pure functions fails a job, not the daemon.
pub fn guard<T>(f: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string()).or_else(|| panic.downcast_ref::<String>().cloned());
        Err(EngineError::internal(format!("a defect in ramtorch: {}", text.unwrap_or_default())))
    })
}
