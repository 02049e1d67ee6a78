//! The tiny models and what PyTorch did with them.

use crate::JobFile;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Names the folder of the fixtures where a test runs on another machine than it was built on.
const FIXTURES: &str = "RAMTORCH_TEST_FIXTURES_DIR";

/// A file of the fixtures.
pub fn fixture_path(name: &str) -> PathBuf {
    std::env::var_os(FIXTURES).map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures"), PathBuf::from).join(name)
}

/// One training run: its settings, and the numbers of every step.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Fixture {
    /// Name of a model folder; absent for a plain stack.
    pub model: Option<String>,
    /// Widths of a plain stack.
    pub layers: Option<Vec<usize>>,
    pub activation: Option<String>,
    pub loss_kind: Option<String>,
    pub steps: usize,
    pub batch_size: usize,
    #[serde(default)]
    pub sequence_length: usize,
    /// Of a model whose weights are not stored but made.
    pub seed: Option<u64>,
    /// Attention stays inside documents.
    #[serde(default)]
    pub document_mask: bool,
    optimizer: Optimizer,
    schedule: Schedule,
    pub loss: Vec<f64>,
    /// Before clipping.
    pub grad_norm: Vec<f64>,
    pub lr: Vec<f64>,
    /// Loss of the trained model over `held-out.bin`; absent for a plain stack.
    pub final_eval_loss: Option<f64>,
    #[serde(rename = "final", default)]
    pub last: BTreeMap<String, FinalTensor>,
    /// How far PyTorch's losses in bf16 are off, as a root mean square; of wide runs alone.
    pub bf16_rms: Option<f64>,
}

/// A tensor after the run.
#[derive(Debug, Clone, Deserialize)]
pub struct FinalTensor {
    /// Norm of the difference to its initial values.
    pub update_norm: f64,
    /// Its first values, row-major.
    pub values: Vec<f64>,
}

/// What a model does without being trained.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Inference {
    /// Mean loss over `held-out.bin`, in sequences of `eval_sequence_length`.
    pub eval_loss: f64,
    pub eval_tokens: u64,
    pub eval_sequence_length: usize,
    pub max_new_tokens: usize,
    pub prompts: Vec<String>,
    /// Greedy continuations of the prompts.
    pub texts: Vec<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Optimizer {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    clip_norm: f64,
}

#[derive(Debug, Clone, Deserialize)]
struct Schedule {
    kind: String,
    warmup_steps: u64,
    min_lr_ratio: f64,
    decay_steps: Option<u64>,
}

impl Fixture {
    /// The run of this name (`llama`, `llama-wsd`, `stack-relu-mse`, …).
    ///
    /// # Panics
    /// There is none.
    #[track_caller]
    pub fn load(name: &str) -> Fixture {
        read(&fixture_path(&format!("expected/{name}.json")))
    }

    /// The runs of models whose sizes are those that GPUs have fast kernels for, by name.
    ///
    /// # Panics
    /// The file is not one of such runs.
    pub fn wide() -> BTreeMap<String, Fixture> {
        let mut all: serde_json::Value = read(&fixture_path("expected/wide.json"));
        let runs: BTreeMap<String, serde_json::Value> = serde_json::from_value(all["runs"].take()).expect("runs by name");
        let whole = |run: serde_json::Value| {
            let mut fixture = all.clone();
            fixture.as_object_mut().expect("an object").extend(run.as_object().expect("an object").clone());
            serde_json::from_value(fixture).expect("a run")
        };
        runs.into_iter().map(|(name, run)| (name, whole(run))).collect()
    }

    /// Folder of a model.
    pub fn model_path(model: &str) -> PathBuf {
        fixture_path("models").join(model)
    }

    /// Its job file. Paths of what it reads are absolute, those of what it writes lie in the folder of the job file:
    /// `metrics.jsonl`.
    pub fn job(&self, name: &str) -> JobFile {
        let mut job = JobFile::new(name)
            .set("train.steps", self.steps)
            .set("train.batch_size", self.batch_size)
            .set("data.shuffle", false)
            .set("optimizer.lr", self.optimizer.lr)
            .set("optimizer.betas", self.optimizer.betas)
            .set("optimizer.eps", self.optimizer.eps)
            .set("optimizer.weight_decay", self.optimizer.weight_decay)
            .set("optimizer.clip_norm", self.optimizer.clip_norm)
            .set("schedule.kind", self.schedule.kind.as_str())
            .set("schedule.warmup_steps", self.schedule.warmup_steps)
            .set("schedule.min_lr_ratio", self.schedule.min_lr_ratio)
            .set("output.metrics", "metrics.jsonl");
        if let Some(n) = self.schedule.decay_steps {
            job = job.set("schedule.decay_steps", n);
        }
        match (&self.model, &self.layers, &self.activation, &self.loss_kind) {
            (Some(model), ..) => match self.seed {
                Some(seed) => job
                    .set("model.config", Self::model_path(model).join("config.json"))
                    .set("model.seed", seed)
                    .set("data.train", fixture_path("wide-tokens.bin")),
                None => job.set("model.path", Self::model_path(model)).set("data.train", fixture_path("tokens.bin")),
            }
            .set("train.precision", "fp32")
            .set("data.format", "tokens")
            .set("data.document_mask", self.document_mask)
            .set("data.sequence_length", self.sequence_length),
            (None, Some(layers), Some(activation), Some(loss)) => job
                .set("model.layers", layers.clone())
                .set("model.activation", activation.as_str())
                .set("model.loss", loss.as_str())
                .set("model.weights", fixture_path("stack/weights.safetensors"))
                .set("data.format", "tensors")
                .set("data.train", fixture_path(&format!("stack/{loss}.safetensors"))),
            _ => panic!("a fixture is of a model or of a plain stack"),
        }
    }
}

/// Inference results of every model.
pub fn inference() -> BTreeMap<String, Inference> {
    read(&fixture_path("expected/inference.json"))
}

#[track_caller]
fn read<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_expected_file_is_a_run_with_all_its_steps() {
        let mut runs = 0;
        for entry in std::fs::read_dir(fixture_path("expected")).unwrap().flatten() {
            let name = entry.path().file_stem().unwrap().to_str().unwrap().to_owned();
            if ["inference", "bf16", "wide"].contains(&name.as_str()) {
                continue;
            }
            let f = Fixture::load(&name);
            assert!([&f.loss, &f.grad_norm, &f.lr].iter().all(|series| series.len() == f.steps), "{name}");
            assert!(f.job(&name).text().contains("metrics.jsonl"));
            runs += 1;
        }
        assert_eq!(runs, 15);
        let wide = Fixture::wide();
        assert!(wide.len() == 3 && wide.values().all(|f| f.loss.len() == f.steps && f.grad_norm.len() == f.steps && f.seed.is_some()));
        assert_eq!(inference().len(), 7);
    }
}
