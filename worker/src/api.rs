//! What the supervisor and the engine say to each other: plain data and one trait. No gRPC here.

pub use ramtorch_device::{EngineError, ErrorKind};
use ramtorch_job::JobSpec;
pub use ramtorch_modelio::TensorSummary;
pub use ramtorch_trace::RankTrace;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A device that a worker drives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// What it is.
    pub kind: DeviceKind,
    /// Ordinal among its kind.
    pub index: u32,
    /// CPU threads that its worker may use.
    pub threads: usize,
    /// Bytes of device memory that a plan may use.
    pub memory_bytes: u64,
    /// Address on the bus, as CUDA tells it (`0000:1b:00.0`): in a container, or with CUDA_VISIBLE_DEVICES, the ordinal says nothing
    /// of where a GPU is. `None` for CPU devices.
    #[serde(default)]
    pub bus_id: Option<String>,
}

/// A GPU, as CUDA shows it to a process of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuSeen {
    /// Its ordinal.
    pub index: u32,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Address on the bus.
    pub bus_id: String,
}

/// Kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Threads of this machine, with a memory budget of its own.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl std::fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda => "cuda",
        };
        write!(f, "{kind}:{}", self.index)
    }
}

/// What one worker process is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Assignment {
    /// Job that it belongs to.
    pub job_id: String,
    /// Counts the gangs of this job, from 1.
    pub generation: u64,
    /// This worker, from 0.
    pub rank: usize,
    /// Workers in the gang.
    pub world_size: usize,
    /// Its device.
    pub device: DeviceSpec,
    /// Its work.
    pub task: Task,
}

/// The work of a worker process. Everything that reads a user's file happens in one, never in the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Task {
    /// Read model and data once, tokenise into the cache, find the checkpoint to resume from, measure the device (for
    /// seconds; not where the assignment gives it 0 bytes of memory: then it is somebody else's). Result: [`Prepared`].
    Prepare {
        /// The job.
        spec: JobSpec,
        /// Folder for token caches.
        cache_dir: PathBuf,
        /// Ordinals of the GPUs that the job is to have; whether they reach one another's memory is asked.
        #[serde(default)]
        gpus: Vec<u32>,
        /// Nobody else works on any of them: how fast they reach one another may be measured.
        #[serde(default)]
        gpus_free: bool,
        /// Where an earlier gang of the job noted that it has a checkpoint; none of what is only planned.
        #[serde(default)]
        noted: Option<PathBuf>,
    },
    /// Train. Result: [`TrainOutcome`].
    Train {
        /// The job.
        spec: JobSpec,
        /// What `Prepare` found.
        prepared: Box<Prepared>,
        /// The plan.
        plan: Box<Plan>,
        /// POSIX shared-memory name of the parameter store.
        segment: String,
        /// What rank 0 keeps of its steps.
        history: History,
    },
    /// Sample text. Result: [`Generated`].
    Generate {
        /// Where the weights are.
        source: Source,
        /// What to generate.
        request: GenerateRequest,
    },
    /// Perplexity of a model on data. Result: [`EvalResult`].
    Eval {
        /// Where the weights are.
        source: Source,
        /// On what.
        request: EvalRequest,
    },
    /// Write a Hugging Face folder. Result: [`Exported`].
    Export {
        /// Where the weights are.
        source: Source,
        /// Folder to write.
        path: PathBuf,
        /// Number format; that of the source without it.
        dtype: Option<ramtorch_job::Precision>,
        /// Replace an existing folder.
        overwrite: bool,
    },
    /// Describe tensors. Result: [`Inspected`].
    Inspect {
        /// Where the weights are.
        source: Source,
        /// Globs; all without any.
        names: Vec<String>,
        /// How many values of each to show.
        values: usize,
    },
}

/// The job's own metrics: a line a committed step, whether its user asked for a file or not. Rank 0 writes it, the daemon reads
/// it when it starts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct History {
    /// The file.
    pub path: PathBuf,
    /// Last step that the daemon knows; later ones are told when the gang starts.
    pub told: u64,
}

/// Where weights are read from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A Hugging Face folder or a checkpoint folder (or a folder of checkpoints: the newest sound one).
    Path(PathBuf),
    /// A live parameter store, attached read-only.
    Segment(String),
}

/// Sampling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct GenerateRequest {
    pub prompts: Vec<String>,
    pub max_new_tokens: usize,
    /// 0: greedy.
    pub temperature: f64,
    /// 0: off.
    pub top_k: usize,
    /// 1: off.
    pub top_p: f64,
    pub seed: u64,
    /// Each prompt is one user turn of the model's chat template.
    pub chat: bool,
    pub precision: Option<ramtorch_job::Precision>,
}

/// Result of [`Task::Generate`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Generated {
    pub texts: Vec<String>,
    pub prompt_tokens: u64,
    pub new_tokens: u64,
    /// All of it, from opening the device on.
    pub seconds: f64,
    /// From the device's being ready to the first token of each text.
    pub prefill_seconds: f64,
    /// From then to the last token.
    pub decode_seconds: f64,
    /// Tokens after the first of each text, which those seconds took.
    pub decode_tokens: u64,
}

/// Evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct EvalRequest {
    pub format: ramtorch_job::DataFormat,
    pub files: Vec<String>,
    pub sequence_length: usize,
    pub micro_batch_size: usize,
    /// 0: all.
    pub max_tokens: u64,
    pub precision: Option<ramtorch_job::Precision>,
    pub cache_dir: PathBuf,
}

/// Result of [`Task::Eval`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct EvalResult {
    pub loss: f64,
    pub perplexity: f64,
    pub tokens: u64,
    pub seconds: f64,
}

/// Result of [`Task::Export`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Exported {
    pub path: PathBuf,
    pub step: u64,
    pub bytes: u64,
}

/// Result of [`Task::Inspect`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Inspected {
    pub step: u64,
    pub tensors: Vec<TensorSummary>,
}

/// What [`Task::Prepare`] found out: all that the plan needs to know of the job's files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prepared {
    /// The model, in the engine's terms (JSON of `ramtorch_modelio::Architecture`).
    pub architecture: serde_json::Value,
    /// Family and size in words.
    pub description: String,
    /// Where the initial weights come from (`None`: seeded).
    pub weights: Option<PathBuf>,
    /// Checkpoint to resume from.
    pub resume: Option<ResumePoint>,
    /// Sequences (rows, for a plain stack) to train on.
    pub train_sequences: u64,
    /// Sequences to validate on.
    pub validation_sequences: u64,
    /// Tokens a sequence; 1 for a plain stack.
    pub sequence_length: usize,
    /// Steps to train in all.
    pub steps: u64,
    /// Token caches or tensor files, opened by the workers.
    pub dataset: serde_json::Value,
    /// What this machine's processor does, measured; 0 where nothing was.
    #[serde(default)]
    pub rates: Rates,
}

/// Rates of a node, measured on it; 0 or `None` where nothing was.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rates {
    /// The processor's matrix products in f32, operations a second.
    pub gemm_flops: f64,
    /// The processor's copies, bytes a second.
    pub copy_bytes: f64,
    /// The processor's AdamW, parameters a second, all threads.
    pub optimizer_parameters: f64,
    /// Squares of gradients summed by the processor, parameters a second, all threads.
    pub norm_parameters: f64,
    /// The GPU's, where the job runs on one.
    pub gpu: Option<GpuRates>,
    /// Every GPU of the job can reach every other's memory; nothing where there is only one, or nobody asked.
    pub peer_access: Option<bool>,
    /// Bytes a second that each GPU of the job receives from another's memory while it sends as much, all at once.
    pub peer_bytes: f64,
    /// What they do beside products, all at once, where they reach one another.
    pub together: Option<Together>,
}

/// What each GPU of a gang gets done while all of them multiply matrices; the slowest one's. Rates are of whole blocks, in bytes a
/// second; beside them, the share of the products' speed that is left.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Together {
    /// Each GPU loads all of each block.
    pub pull_bytes: f64,
    /// See above.
    pub pull_products: f64,
    /// Each GPU loads its share, and they gather the rest.
    pub gather_bytes: f64,
    /// See above.
    pub gather_products: f64,
    /// Sums of fp32 gradients over all GPUs, a share to each.
    pub reduce_bytes: f64,
    /// See above.
    pub reduce_products: f64,
}

/// What a GPU does with this job's layers.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuRates {
    /// Its model.
    pub name: String,
    /// Taken for an earlier job of the same shapes, and read from the cache.
    pub cached: bool,
    /// Whole visits of a decoder layer, by size of the micro-batch, smallest first.
    pub layers: Vec<LayerTimes>,
    /// Rows that the head was timed with, and the seconds of its forward and backward pass together.
    pub head: (usize, f64),
    /// The layer's widest product, by rows: rows, then operations a second of output, input gradient and weight gradient.
    pub products: Vec<[f64; 4]>,
    /// Attention of the largest micro-batch, operations a second, forward and backward.
    pub attention: [f64; 2],
    /// What attention wants beside its inputs and outputs, in the job's mode: sequences, bytes.
    pub workspace: Vec<(usize, u64)>,
    /// Elementwise passes, bytes of device memory a second.
    pub memory_bytes: f64,
    /// A kernel that does next to nothing, seconds.
    pub launch_seconds: f64,
    /// Host (page-locked) to device, bytes a second.
    pub to_device: f64,
    /// Device to host.
    pub from_device: f64,
    /// Both at once.
    pub both: [f64; 2],
}

/// Seconds of visits of one decoder layer with one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LayerTimes {
    /// Tokens of the micro-batch.
    pub rows: usize,
    /// Forward.
    pub forward: f64,
    /// Backward, everything kept.
    pub backward: f64,
    /// Added to it where norms and activations are made again.
    pub rebuild: f64,
    /// Added to it where the whole forward visit is.
    pub recompute: f64,
}

/// A checkpoint to go on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResumePoint {
    /// Its folder.
    pub path: PathBuf,
    /// Its step.
    pub step: u64,
}

/// Input of [`crate::plan`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlanRequest {
    /// The job.
    pub spec: JobSpec,
    /// What `Prepare` found.
    pub prepared: Prepared,
    /// Devices of the gang, by rank.
    pub devices: Vec<DeviceSpec>,
    /// Bytes that a new segment may take: the least of what RAM and /dev/shm have free, less what the daemon
    /// promised to others.
    pub segment_bytes_available: u64,
    /// Bytes of RAM that the segment and the workers together may take, less what the daemon promised to others. Not
    /// limited by the size of /dev/shm.
    #[serde(default)]
    pub ram_bytes_available: u64,
}

/// The plan, as the daemon sees it. `detail` is the engine's own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// Parameters of the model (padding not counted).
    pub parameters: u64,
    /// Exact size of the segment.
    pub segment_bytes: u64,
    /// Device memory of each rank.
    pub device_bytes: Vec<u64>,
    /// Private host memory of all workers together, CPU devices' memory included.
    pub host_bytes: u64,
    /// Expected seconds a step, 0 where no rates are known.
    pub step_seconds: f64,
    /// What bounds the step.
    pub bound_by: String,
    /// For people.
    pub text: String,
    /// The engine's plan.
    pub detail: serde_json::Value,
}

/// Result of [`Task::Train`], from every rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainOutcome {
    /// Last committed step.
    pub step: u64,
    /// Ended early, by [`Command::Stop`].
    pub stopped: bool,
    /// Model folder, where one was asked for and this rank wrote it.
    pub output: Option<PathBuf>,
    /// Generated sample, where one was asked for and this rank made it.
    pub sample: Option<String>,
    /// Newest checkpoint written.
    pub checkpoint: Option<PathBuf>,
}

/// One committed step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct StepMetrics {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub tokens: u64,
    pub tokens_per_second: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_loss: Option<f64>,
    /// On the line of step 1: validation loss before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_validation_loss: Option<f64>,
    pub step_seconds: f64,
    pub tokens_total: u64,
    pub epoch: f64,
    pub tflops: f64,
    pub bytes_to_device: u64,
    pub bytes_from_device: u64,
    /// The first rank's arithmetic stood still for weights on their way in or gradients on their way out.
    pub copy_wait_seconds: f64,
    /// It stood still for pages that the optimizer had not published.
    #[serde(default)]
    pub optimizer_wait_seconds: f64,
    /// Its optimizer stood still for state that a checkpoint had not copied yet.
    #[serde(default)]
    pub checkpoint_wait_seconds: f64,
    /// Updating this step's pages, on the first rank, and who updated how many.
    #[serde(default)]
    pub optimizer_seconds: f64,
    #[serde(default)]
    pub optimizer_pages_cpu: u64,
    #[serde(default)]
    pub optimizer_pages_device: u64,
}

/// Severity of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Level {
    Info,
    Warn,
    Error,
}

/// What the supervisor tells a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// End at the next step boundary.
    Stop {
        /// Write a checkpoint first.
        checkpoint: bool,
    },
    /// Write a checkpoint at the next step boundary; answered by [`Control::checkpoint`].
    Checkpoint {
        /// Returned with the answer.
        request: u64,
    },
    /// Record a timeline of some steps; answered by [`Control::trace`].
    Trace(TraceCommand),
}

/// Which steps to record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceCommand {
    /// Returned with the answer. Larger than that of any earlier trace of the job.
    pub request: u64,
    /// First step, or the next one where that is later.
    pub first_step: u64,
    /// How many, from 1 to [`TRACE_STEPS_MAX`].
    pub steps: u64,
}

/// Steps that one trace may cover.
pub const TRACE_STEPS_MAX: u64 = ramtorch_trace::STEPS_MAX;

/// A worker's way to its supervisor. Every call returns at once.
pub trait Control: Send + Sync {
    /// Alive, in this phase of this step. The process's own timer repeats the last one every half second.
    fn heartbeat(&self, step: u64, phase: &'static str);
    /// A step was committed (rank 0 only). `line` is what stands in the metrics file.
    fn metrics(&self, metrics: &StepMetrics, line: &str);
    /// Something a user should know.
    fn event(&self, level: Level, text: &str);
    /// How far a long preparation is.
    fn progress(&self, what: &str, done: u64, total: u64);
    /// New text of prompt number `prompt`.
    fn token(&self, prompt: usize, text: &str);
    /// A checkpoint was written, or could not be.
    fn checkpoint(&self, path: &std::path::Path, step: u64, request: u64, error: Option<&str>);
    /// What this rank recorded for a [`Command::Trace`]; every rank answers.
    fn trace(&self, request: u64, trace: RankTrace);
    /// The next command, if any. Stop, checkpoint and trace commands go to every rank; the gang agrees on the step.
    fn command(&self) -> Option<Command>;
}
