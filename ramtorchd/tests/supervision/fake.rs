//! A worker that does what a script says, and the engine's daemon half to go with it.

use nix::fcntl::OFlag;
use nix::sys::mman::shm_open;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::stat::Mode;
use ramtorch_worker::{
    Assignment, Command, Control, EngineError, ErrorKind, EvalResult, Exported, Generated, Inspected, Level, Plan, PlanRequest, Prepared,
    RankTrace, ResumePoint, StepMetrics, Task, TensorSummary, TrainOutcome,
};
use ramtorchd::supervisor::outside::{Contents, Engine};
use ramtorchd::worker;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// What workers of a daemon do. Read anew by every worker when it starts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Script {
    /// What goes wrong, and when.
    pub faults: Vec<Fault>,
    /// Milliseconds of preparing, of loading, and of each step.
    pub prepare_ms: u64,
    pub load_ms: u64,
    pub step_ms: u64,
    /// A rank that waits for its peers longer than this reports an error of its own.
    pub patience_ms: Option<u64>,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fault {
    /// In which process; every part that is set must match.
    pub rank: Option<usize>,
    pub generation: Option<u64>,
    pub at: At,
    pub act: Act,
}

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum At {
    /// Before the first call: once for each of this many processes.
    Birth(u32),
    Prepare,
    Load,
    /// Before this step.
    Step(u64),
    /// Before every step that is a multiple, the first time it is reached (`generation` is the job's, so once each).
    Everywhere,
    /// When told to stop.
    Stop,
    /// When all is done and reported.
    Finish,
}

/// What.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Act {
    Exit(i32),
    Signal(i32),
    Panic,
    Fail(ErrorKind),
    /// Fails with this status of the CUDA driver.
    Cuda(u32),
    /// Goes on for ever, heartbeats included.
    Linger,
    /// Says that this step is committed, and does nothing more.
    Claim(u64),
    /// Says that it works on this step, and does nothing more.
    Pretend(u64),
}

impl Script {
    pub fn quick() -> Script {
        Script { step_ms: 5, ..Script::default() }
    }
    pub fn endless() -> Script {
        Script { step_ms: 20, ..Script::default() }
    }
    pub fn with(mut self, fault: Fault) -> Script {
        self.faults.push(fault);
        self
    }
}

/// A fault of every process at this time.
pub fn fault(at: At, act: Act) -> Fault {
    Fault { rank: None, generation: None, at, act }
}

impl Fault {
    pub fn rank(mut self, rank: usize) -> Fault {
        self.rank = Some(rank);
        self
    }
    pub fn generation(mut self, generation: u64) -> Fault {
        self.generation = Some(generation);
        self
    }
}

/// `worker SCRIPT`
pub fn worker_main() -> ExitCode {
    let path = script_path();
    // Only SIGKILL ends such a process.
    if path.with_extension("stubborn").exists() {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.thread_block().unwrap();
    }
    for fault in read_script().faults {
        if let At::Birth(times) = fault.at {
            // Each process that dies takes one of the marks.
            let mark = (0..times).map(|i| path.with_extension(format!("birth{i}"))).find(|p| !p.exists());
            if let Some(mark) = mark {
                std::fs::write(mark, "").unwrap();
                println!("dying before the first call");
                act(&fault.act).unwrap();
            }
        }
    }
    worker::run(engine)
}

fn script_path() -> PathBuf {
    std::env::args_os().nth(2).unwrap().into()
}

fn read_script() -> Script {
    serde_json::from_slice(&std::fs::read(script_path()).unwrap()).unwrap()
}

fn act(act: &Act) -> Result<(), EngineError> {
    match act {
        Act::Exit(code) => std::process::exit(*code),
        Act::Signal(number) => raise(Signal::try_from(*number).unwrap()).unwrap(),
        Act::Panic => panic!("as the script says"),
        Act::Fail(kind) => return Err(EngineError::new(*kind, format!("{kind:?} as the script says"))),
        Act::Cuda(code) => return Err(EngineError::internal(format!("status {code} as the script says")).with_device_code(*code)),
        Act::Linger | Act::Claim(_) | Act::Pretend(_) => loop {
            std::thread::sleep(Duration::from_secs(60));
        },
    }
    Ok(())
}

struct Worker<'a> {
    script: Script,
    assignment: &'a Assignment,
    control: &'a dyn Control,
}

impl Worker<'_> {
    fn fault(&self, at: At) -> Result<(), EngineError> {
        let a = self.assignment;
        for fault in &self.script.faults {
            let here = fault.at == at && fault.rank.is_none_or(|r| r == a.rank) && fault.generation.is_none_or(|g| g == a.generation);
            if here {
                if let Act::Claim(step) = fault.act {
                    self.control.metrics(&metrics(step), &format!("{{\"step\":{step}}}"));
                }
                if let Act::Pretend(step) = fault.act {
                    self.control.heartbeat(step, "computing");
                }
                act(&fault.act)?;
            }
        }
        Ok(())
    }

    fn sleep(&self, ms: u64) {
        std::thread::sleep(Duration::from_millis(ms));
    }
}

fn value<T: Serialize>(result: T) -> Result<serde_json::Value, EngineError> {
    serde_json::to_value(result).map_err(EngineError::internal)
}

fn engine(assignment: &Assignment, control: &dyn Control) -> Result<serde_json::Value, EngineError> {
    let worker = Worker { script: read_script(), assignment, control };
    println!("{} rank {} generation {}", worker::task_name(&assignment.task), assignment.rank, assignment.generation);
    match &assignment.task {
        Task::Prepare { spec, .. } => {
            control.progress("tokenising", 1, 2);
            worker.sleep(worker.script.prepare_ms);
            worker.fault(At::Prepare)?;
            value(Prepared {
                architecture: serde_json::Value::Null,
                description: "a fake".into(),
                weights: None,
                resume: spec.checkpoint.path.as_deref().filter(|_| spec.checkpoint.resume).and_then(newest_checkpoint),
                train_sequences: 1,
                validation_sequences: 0,
                sequence_length: 1,
                steps: spec.train.steps.unwrap_or(1),
                dataset: serde_json::Value::Null,
                rates: Default::default(),
            })
        }
        Task::Train { spec, prepared, segment, history, .. } => {
            worker.train(spec.checkpoint.path.as_deref(), prepared.steps, segment, &history.path)
        }
        Task::Generate { request, .. } => {
            for word in 0..request.max_new_tokens {
                for prompt in 0..request.prompts.len() {
                    control.token(prompt, &format!("{word} "));
                }
                worker.sleep(worker.script.step_ms);
            }
            let text: String = (0..request.max_new_tokens).map(|w| format!("{w} ")).collect();
            let texts = vec![text; request.prompts.len()];
            let new_tokens = request.max_new_tokens as u64;
            let (prefill_seconds, decode_seconds, decode_tokens) = (0.1, 0.25, new_tokens.saturating_sub(2));
            value(Generated { texts, prompt_tokens: 1, new_tokens, seconds: 0.5, prefill_seconds, decode_seconds, decode_tokens })
        }
        Task::Eval { request, .. } if request.files.iter().any(|f| f.contains("missing")) => {
            Err(EngineError::input(format!("{} does not exist", request.files[0])))
        }
        Task::Eval { .. } => value(EvalResult { loss: 2.0, perplexity: 2f64.exp(), tokens: 7, seconds: 0.1 }),
        Task::Export { path, .. } => value(Exported { path: path.clone(), step: 3, bytes: 9 }),
        Task::Inspect { source, .. } => {
            let tensor = TensorSummary {
                name: format!("{source:?}"),
                shape: vec![2, 3],
                dtype: "fp32".into(),
                block: "b".into(),
                parameters: 6,
                mean: 0.0,
                std: 1.0,
                min: -1.0,
                max: 1.0,
                nonfinite: 0,
                values: vec![0.5],
                pages: vec![1],
            };
            value(Inspected { step: 4, tensors: vec![tensor] })
        }
    }
}

/// The newest of the folders that workers of this kind make.
fn newest_checkpoint(folder: &Path) -> Option<ResumePoint> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let steps = entries.filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok());
    steps.max().map(|step| ResumePoint { path: folder.join(format!("step-{step}")), step })
}

/// The segment of a fake job: word 0 is the committed step, word 1 + r where rank r has got to.
struct Segment(std::fs::File);

impl Segment {
    fn open(name: &str) -> Result<Segment, EngineError> {
        let path = Path::new("/dev/shm").join(name.trim_start_matches('/'));
        std::fs::File::options().read(true).write(true).open(path).map(Segment).map_err(EngineError::internal)
    }
    fn get(&self, word: usize) -> Result<u64, EngineError> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, word as u64 * 8).map_err(EngineError::internal)?;
        Ok(u64::from_le_bytes(bytes))
    }
    fn set(&self, word: usize, value: u64) -> Result<(), EngineError> {
        self.0.write_all_at(&value.to_le_bytes(), word as u64 * 8).map_err(EngineError::internal)
    }
}

impl Worker<'_> {
    /// Ranks go step by step together, as collectives make them: rank 0 commits a step when all have arrived at it, the
    /// others go on when it is committed. A rank that dies leaves the others waiting.
    fn train(&self, checkpoints: Option<&Path>, steps: u64, segment: &str, history: &Path) -> Result<serde_json::Value, EngineError> {
        let segment = Segment::open(segment)?;
        let (rank, world) = (self.assignment.rank, self.assignment.world_size);
        self.control.heartbeat(segment.get(0)?, "loading");
        self.sleep(self.script.load_ms);
        self.fault(At::Load)?;
        let start = segment.get(0)?;
        self.control.event(Level::Info, &format!("rank {rank} attached at step {start}"));
        if rank == 0 && start > 0 {
            self.commit(start, history)?;
        }
        let mut newest = None;
        for step in start + 1..=steps {
            self.control.heartbeat(step, "computing");
            self.fault(At::Step(step))?;
            if step % 2 == 0 && self.assignment.generation < step {
                self.fault(At::Everywhere)?;
            }
            self.sleep(self.script.step_ms.max(1));
            let mine = (self.assignment.generation << 32) + step;
            segment.set(1 + rank, mine)?;
            self.control.heartbeat(step, "reducing");
            let done = || -> Result<bool, EngineError> {
                match rank {
                    0 => (1..world).map(|r| segment.get(1 + r)).try_fold(true, |all, at| Ok(all && at? >= mine)),
                    _ => Ok(segment.get(0)? >= step),
                }
            };
            let mut waited = 0;
            loop {
                if self.commands(checkpoints, segment.get(0)?, &mut newest)? {
                    return self.outcome(segment.get(0)?, true, newest);
                }
                if done()? {
                    break;
                }
                self.sleep(1);
                waited += 1;
                if self.script.patience_ms.is_some_and(|p| waited > p) {
                    return Err(EngineError::internal("a peer does not answer"));
                }
            }
            if rank == 0 {
                segment.set(0, step)?;
                self.commit(step, history)?;
            }
        }
        self.fault(At::Finish)?;
        self.outcome(steps, false, newest)
    }

    /// The line of a committed step, written and told.
    fn commit(&self, step: u64, history: &Path) -> Result<(), EngineError> {
        let line = serde_json::to_string(&metrics(step)).map_err(EngineError::internal)?;
        let written = std::fs::File::options().create(true).append(true).open(history);
        written.and_then(|mut f| writeln!(f, "{line}")).map_err(EngineError::internal)?;
        self.control.metrics(&metrics(step), &line);
        Ok(())
    }

    /// Whether to stop.
    fn commands(&self, checkpoints: Option<&Path>, step: u64, newest: &mut Option<PathBuf>) -> Result<bool, EngineError> {
        while let Some(command) = self.control.command() {
            match command {
                Command::Stop { checkpoint } => {
                    self.fault(At::Stop)?;
                    if let (true, Some(path), 0) = (checkpoint, checkpoints, self.assignment.rank) {
                        let folder = path.join(format!("step-{step}"));
                        std::fs::create_dir_all(&folder).map_err(EngineError::internal)?;
                        self.control.checkpoint(&folder, step, 0, None);
                        *newest = Some(folder);
                    }
                    return Ok(true);
                }
                Command::Checkpoint { request } if self.assignment.rank == 0 => {
                    let folder = checkpoints.unwrap().join(format!("step-{step}"));
                    let made = std::fs::create_dir_all(&folder).map_err(|e| e.to_string());
                    self.control.checkpoint(&folder, step, request, made.as_ref().err().map(String::as_str));
                    *newest = Some(folder);
                }
                Command::Checkpoint { .. } => {}
                Command::Trace(t) => {
                    let rank = self.assignment.rank as u32;
                    let steps = t.steps;
                    self.control.trace(t.request, RankTrace { rank, first_step: step + 1, steps, ..RankTrace::default() });
                }
            }
        }
        Ok(false)
    }

    fn outcome(&self, step: u64, stopped: bool, checkpoint: Option<PathBuf>) -> Result<serde_json::Value, EngineError> {
        let sample = (self.assignment.rank == 0).then(|| "text".into());
        value(TrainOutcome { step, stopped, output: None, sample, checkpoint })
    }
}

fn metrics(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        loss: 1.0 / step as f64,
        grad_norm: 1.0,
        lr: 0.1,
        tokens: 8,
        tokens_per_second: 80.0,
        validation_loss: None,
        initial_validation_loss: None,
        step_seconds: 0.1,
        tokens_total: 8 * step,
        epoch: 0.0,
        tflops: 0.0,
        bytes_to_device: 0,
        bytes_from_device: 0,
        copy_wait_seconds: 0.0,
        optimizer_wait_seconds: 0.0,
        checkpoint_wait_seconds: 0.0,
        optimizer_seconds: 0.0,
        optimizer_pages_cpu: 0,
        optimizer_pages_device: 0,
    }
}

/// Plans by the job's name: `big-N` takes N MiB, others 1. Segments are real shared memory.
#[derive(Debug, Clone, Default)]
pub struct FakeEngine {
    /// Time that planning and creating take.
    pub plan_ms: u64,
    pub create_ms: u64,
}

impl Engine for FakeEngine {
    fn plan(&self, request: &PlanRequest) -> Result<Plan, EngineError> {
        std::thread::sleep(Duration::from_millis(self.plan_ms));
        let mib: u64 = request.spec.name.strip_prefix("big-").map_or(1, |n| n.parse().unwrap());
        let segment_bytes = mib << 20;
        if segment_bytes > request.segment_bytes_available {
            return Err(EngineError::new(ErrorKind::Resources, format!("{mib} MiB do not fit {}", request.segment_bytes_available)));
        }
        Ok(Plan {
            parameters: 5,
            segment_bytes,
            device_bytes: vec![1; request.devices.len()],
            host_bytes: 1 << 20,
            step_seconds: 0.0,
            bound_by: "nothing".into(),
            text: "a fake plan".into(),
            detail: serde_json::Value::Null,
        })
    }

    fn create_segment(&self, name: &str, plan: &Plan) -> Result<(), EngineError> {
        std::thread::sleep(Duration::from_millis(self.create_ms));
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR;
        let fd = shm_open(name, flags, Mode::S_IRUSR | Mode::S_IWUSR).map_err(EngineError::internal)?;
        nix::unistd::ftruncate(&fd, plan.segment_bytes as i64).map_err(EngineError::internal)
    }

    fn contents(&self, name: &str) -> Contents {
        Segment::open(name).and_then(|s| s.get(0)).map_or(Contents::Unknown, Contents::Step)
    }
}
