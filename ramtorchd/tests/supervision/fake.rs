//! A worker that does what a script says, and the engine's daemon half to go with it.

use nix::fcntl::OFlag;
use nix::sys::mman::shm_open;
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::stat::Mode;
use ramtorch_worker::{
    Assignment, Command, Control, EngineError, ErrorKind, EvalResult, Exported, Generated, Inspected, Level, Plan, PlanRequest, Prepared,
    StepMetrics, Task, TensorSummary, TrainOutcome,
};
use ramtorchd::supervisor::outside::Engine;
use ramtorchd::worker;
use serde::{Deserialize, Serialize};
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
}

/// Something that goes wrong.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fault {
    /// In which process; every part that is set must match.
    pub job: Option<String>,
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
    /// Goes on for ever, heartbeats included.
    Linger,
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
    Fault { job: None, rank: None, generation: None, at, act }
}

impl Fault {
    pub fn of(mut self, job: &str) -> Fault {
        self.job = Some(job.into());
        self
    }
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
        Act::Linger => loop {
            std::thread::sleep(Duration::from_secs(60));
        },
    }
    Ok(())
}

struct Worker<'a> {
    script: Script,
    assignment: &'a Assignment,
    control: &'a dyn Control,
    job: String,
}

impl Worker<'_> {
    fn fault(&self, at: At) -> Result<(), EngineError> {
        let a = self.assignment;
        for fault in &self.script.faults {
            let here = fault.at == at
                && fault.job.as_ref().is_none_or(|j| *j == self.job)
                && fault.rank.is_none_or(|r| r == a.rank)
                && fault.generation.is_none_or(|g| g == a.generation);
            if here {
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
    let job = match &assignment.task {
        Task::Prepare { spec, .. } | Task::Train { spec, .. } => spec.name.clone(),
        _ => String::new(),
    };
    let worker = Worker { script: read_script(), assignment, control, job };
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
                resume: None,
                train_sequences: 1,
                validation_sequences: 0,
                sequence_length: 1,
                steps: spec.train.steps.unwrap_or(1),
                dataset: serde_json::Value::Null,
            })
        }
        Task::Train { spec, prepared, segment, .. } => worker.train(spec.checkpoint.path.as_deref(), prepared.steps, segment),
        Task::Generate { request, .. } => {
            for word in 0..request.max_new_tokens {
                for prompt in 0..request.prompts.len() {
                    control.token(prompt, &format!("{word} "));
                }
                worker.sleep(worker.script.step_ms);
            }
            let text: String = (0..request.max_new_tokens).map(|w| format!("{w} ")).collect();
            let texts = vec![text; request.prompts.len()];
            value(Generated { texts, prompt_tokens: 1, new_tokens: request.max_new_tokens as u64, seconds: 0.5 })
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

impl Worker<'_> {
    /// Rank 0 commits steps by writing their number into the segment, as the engine commits its own there.
    fn train(&self, checkpoints: Option<&Path>, steps: u64, segment: &str) -> Result<serde_json::Value, EngineError> {
        let path = Path::new("/dev/shm").join(segment.trim_start_matches('/'));
        let file = std::fs::File::options().read(true).write(true).open(&path).map_err(EngineError::internal)?;
        let committed = || {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, 0).map(|()| u64::from_le_bytes(bytes)).map_err(EngineError::internal)
        };
        let rank = self.assignment.rank;
        self.control.heartbeat(committed()?, "loading");
        self.sleep(self.script.load_ms);
        self.fault(At::Load)?;
        self.control.event(Level::Info, &format!("rank {rank} attached at step {}", committed()?));
        let mut stopped = false;
        let mut newest = None;
        while committed()? < steps && !stopped {
            let step = committed()? + 1;
            self.control.heartbeat(step, "computing");
            self.fault(At::Step(step))?;
            if step % 2 == 0 && self.assignment.generation < step {
                self.fault(At::Everywhere)?;
            }
            self.sleep(self.script.step_ms.max(1));
            if rank == 0 {
                file.write_all_at(&step.to_le_bytes(), 0).map_err(EngineError::internal)?;
                self.control.metrics(&metrics(step), &format!("{{\"step\":{step}}}"));
            }
            while let Some(command) = self.control.command() {
                match command {
                    Command::Stop { .. } => {
                        self.fault(At::Stop)?;
                        stopped = true;
                    }
                    Command::Checkpoint { request } if rank == 0 => {
                        let folder = checkpoints.unwrap().join(format!("step-{step}"));
                        let made = std::fs::create_dir_all(&folder).map_err(|e| e.to_string());
                        self.control.checkpoint(&folder, step, request, made.as_ref().err().map(String::as_str));
                        newest = Some(folder);
                    }
                    Command::Checkpoint { .. } => {}
                }
            }
        }
        self.fault(At::Finish)?;
        let step = committed()?;
        value(TrainOutcome { step, stopped, output: None, sample: (rank == 0).then(|| "text".into()), checkpoint: newest })
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
    }
}

/// Plans by the job's name: `big-N` takes N MiB, others 1. Segments are real shared memory.
#[derive(Debug, Clone, Default)]
pub struct FakeEngine {
    /// Time that planning and creating take.
    pub plan_ms: u64,
    pub create_ms: u64,
    /// What the engine believes to be free, instead of what is.
    pub budget: Option<u64>,
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
}
