//! The keys of a job file and their defaults.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A whole job file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Name for people; letters, digits, `.`, `_` and `-`, at most 64.
    pub name: String,
    /// `[model]`
    pub model: ModelSpec,
    /// `[data]`
    pub data: DataSpec,
    /// `[train]`
    pub train: TrainSpec,
    /// `[optimizer]`
    #[serde(default)]
    pub optimizer: OptimizerSpec,
    /// `[schedule]`
    #[serde(default)]
    pub schedule: ScheduleSpec,
    /// `[checkpoint]`
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// `[output]`
    #[serde(default)]
    pub output: OutputSpec,
    /// `[sample]`: text generated when training ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<SampleSpec>,
    /// `[device]`: limits below what the node has.
    #[serde(default)]
    pub device: DeviceLimits,
}

/// `[model]`: exactly one of `path`, `config` and `layers`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// A Hugging Face folder: config.json, safetensors, tokenizer.json.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// A config.json alone: weights are initialised from `seed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// A plain stack of Linear + activation: the widths, input first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Activation between the Linear layers of a plain stack.
    #[serde(default)]
    pub activation: Activation,
    /// Loss of a plain stack.
    #[serde(default)]
    pub loss: StackLoss,
    /// Safetensors file with a plain stack's initial weights (`0.weight`, `0.bias`, `2.weight`, … as
    /// `torch.nn.Sequential` names them); seeded initialisation without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<PathBuf>,
    /// tokenizer.json, where it is not in the model folder or beside config.json.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Seed of the initial weights.
    #[serde(default)]
    pub seed: u64,
}

/// Activation of a plain stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Activation {
    #[default]
    Relu,
    Gelu,
    Silu,
    Tanh,
}

/// Loss of a plain stack: mean squared error over all elements, or cross-entropy over class indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum StackLoss {
    #[default]
    Mse,
    CrossEntropy,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    /// What the files hold.
    pub format: DataFormat,
    /// Files or globs to train on.
    pub train: OneOrMany,
    /// Files or globs to validate on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<OneOrMany>,
    /// Where `validation` is absent: this share of the sequences, taken from the end (0: none).
    #[serde(default)]
    pub validation_fraction: f64,
    /// Tokens a sequence (inputs; as many targets). Not used by `tensors`.
    #[serde(default = "default_sequence_length")]
    pub sequence_length: usize,
    /// Visit sequences in a seeded random order, a new one each epoch.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Seed of that order.
    #[serde(default)]
    pub seed: u64,
    /// Attention does not cross document boundaries inside a packed sequence.
    #[serde(default)]
    pub document_mask: bool,
    /// Where token caches are kept; the daemon's cache folder without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Column of a Parquet file (default: `text`, else `messages`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
}

/// Format of the data files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// UTF-8 text; a file is one document.
    Text,
    /// One JSON object a line: `text`, or `messages` (chat template, loss on the assistant's turns).
    Jsonl,
    /// Parquet with a string column, or a `messages` list column.
    Parquet,
    /// Little-endian u32 token ids, no header.
    Tokens,
    /// Safetensors with `inputs` and `targets`, for plain stacks.
    Tensors,
}

/// One string or a list of strings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One file or glob.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    /// The entries, in order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        match self {
            OneOrMany::One(s) => std::slice::from_ref(s).iter().map(String::as_str),
            OneOrMany::Many(v) => v.iter().map(String::as_str),
        }
    }
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSpec {
    /// Optimizer steps. Exactly one of `steps` and `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// Sequences a step, over all ranks.
    pub batch_size: usize,
    /// Sequences a rank holds at once; the plan chooses without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// Arithmetic of the forward and backward passes. Default: fp32 on CPU devices, bf16 on GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
    /// Type in which reduced gradients wait in the segment. Default: that of `precision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradients: Option<Precision>,
    /// Where reduced gradients wait until the step is committed. Default: in the segment, or, where that would not fit into RAM,
    /// on the GPU, if it is alone: then a death while pages are updated goes back to the last checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradients_in: Option<GradientPlace>,
    /// `auto` keeps activations where they fit the device and recomputes the rest.
    #[serde(default)]
    pub recompute: Recompute,
    /// Validate every so many steps (0: only before the first and after the last).
    #[serde(default)]
    pub validate_every: u64,
    /// At most so many validation sequences (0: all).
    #[serde(default)]
    pub validation_sequences: usize,
    /// Pipelined groups a step; the plan chooses without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<usize>,
    /// Two runs give the same bits, at some cost in speed on GPUs. CPU devices always do.
    #[serde(default = "yes")]
    pub deterministic: bool,
    /// On several devices: each copies its share of a block's weights and they gather the shares from one another (true), or
    /// each copies all of them; the plan chooses without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gather_weights: Option<bool>,
    /// GiB of a device's memory in which optimizer state of the first pages may stay, at most. On GPUs the plan chooses how much is
    /// used; on CPU devices, where it gains nothing, as much as fits is. bf16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_state_gib: Option<f64>,
    /// State that stays on a device is written back at every so many steps; gradients of the steps since are kept in the segment.
    /// The plan chooses without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_back_steps: Option<u32>,
    /// Format in which gradients go from device to device to be added up. Default: fp32. bf16 halves the traffic where
    /// gradients wait in bf16 anyway, and leave the device once a step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduce: Option<Precision>,
}

/// Number format of arithmetic or storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Precision {
    Fp32,
    Bf16,
}

/// Where gradients wait until the step is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientPlace {
    /// In the segment in RAM: no death loses anything.
    Segment,
    /// In the device's memory, on one device alone.
    Device,
}

/// Activation checkpointing policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Recompute {
    #[default]
    Auto,
    Always,
    Never,
}

/// `[optimizer]`: AdamW as `torch.optim.AdamW` defines it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSpec {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the two moments.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled; on tensors of two or more dimensions only.
    pub weight_decay: f64,
    /// Gradients are scaled so that their global norm is at most this; 0 turns clipping off.
    pub clip_norm: f64,
    /// Without clipping: pages are updated beside the backward pass, as their gradients come (true), or after it; the plan chooses
    /// without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_updates: Option<bool>,
    /// Format of the moments; bf16 is rounded stochastically.
    pub moments: Precision,
}

impl Default for OptimizerSpec {
    fn default() -> Self {
        OptimizerSpec {
            lr: 1e-3,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
            early_updates: None,
            moments: Precision::Fp32,
        }
    }
}

/// `[schedule]` of the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleSpec {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Linear warm-up: step s has lr·s/warmup_steps.
    pub warmup_steps: u64,
    /// Floor, as a share of the peak.
    pub min_lr_ratio: f64,
    /// Warmup-stable-decay: length of the decay (default: a tenth of the steps).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
}

impl Default for ScheduleSpec {
    fn default() -> Self {
        ScheduleSpec { kind: ScheduleKind::Constant, warmup_steps: 0, min_lr_ratio: 0.0, decay_steps: None }
    }
}

/// Shape of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum ScheduleKind {
    Constant,
    Linear,
    Cosine,
    #[serde(alias = "wsd")]
    WarmupStableDecay,
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSpec {
    /// A checkpoint every so many steps (0: none but those asked for).
    pub every_steps: u64,
    /// Keep the newest so many (0: all).
    pub keep: usize,
    /// Folder of the checkpoints; required when `every_steps` is not 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Continue from the newest sound checkpoint in `path`, if there is one.
    pub resume: bool,
    /// Write one when training ends.
    pub at_end: bool,
    /// GiB of RAM, over all ranks, in which copies of pages wait for the disk while training goes on (0: pages are written
    /// straight from where they are). Default: half of the RAM that is left beside the segment and the workers, at most
    /// what a checkpoint takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub staging_gib: Option<f64>,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        CheckpointSpec { every_steps: 0, keep: 2, path: None, resume: true, at_end: false, staging_gib: None }
    }
}

/// `[output]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OutputSpec {
    /// Hugging Face folder written when training ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// JSON Lines file of step metrics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<PathBuf>,
    /// Number format of the model folder (default: that of the model that came in, else fp32).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,
}

/// `[sample]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleSpec {
    /// Text to go on from.
    pub prompt: String,
    /// Tokens to generate.
    #[serde(default = "default_sample_tokens")]
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token each time.
    #[serde(default = "default_temperature")]
    pub temperature: f64,
    /// Keep the k likeliest (0: all).
    #[serde(default)]
    pub top_k: usize,
    /// Keep the likeliest whose probabilities add up to this (1: all).
    #[serde(default = "one")]
    pub top_p: f64,
    /// Seed of the sampling.
    #[serde(default)]
    pub seed: u64,
}

/// `[device]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeviceLimits {
    /// Bytes of device memory the plan may use on each device (default: what the daemon gives).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Ranks wanted (default: all devices of the daemon).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<usize>,
}

fn default_sequence_length() -> usize {
    1024
}
fn default_sample_tokens() -> usize {
    128
}
fn default_temperature() -> f64 {
    0.8
}
fn yes() -> bool {
    true
}
fn one() -> f64 {
    1.0
}
