//! A job file is refused or understood, and what was understood is written so that it is understood again.

use ramtorch_job::JobSpec;
use std::path::Path;

const WHOLE: &str = r#"name = "all"
[model]
path = "m"
tokenizer = "t/tokenizer.json"
[data]
format = "jsonl"
train = ["a*.jsonl", "/b.jsonl"]
validation = "v"
validation_fraction = 0.25
sequence_length = 8
[train]
epochs = 1.5
batch_size = 4
micro_batch_size = 2
seed = 7
[optimizer]
lr = 1e-3
betas = [0.9, 0.95]
weight_decay = 0.1
clip_norm = 1.0
[schedule]
kind = "cosine"
warmup_steps = 3
min_lr_ratio = 0.1
[checkpoint]
path = "c"
every_steps = 10
keep = 2
[output]
path = "o"
metrics = "m.jsonl"
[device]
ranks = 2
"#;
const STACK: &str = "name = \"s\"\n[model]\nlayers = [4, 8, 2]\nactivation = \"gelu\"\n[data]\nformat = \"tensors\"\ntrain = \"t\"\n[train]\nsteps = 3\nbatch_size = 2\n";
const SMALL: &str = "name = \"a\"\n[model]\nconfig = \"c\"\n[data]\nformat = \"tokens\"\ntrain = \"t.bin\"\nsequence_length = 8\n[train]\nsteps = 3\nbatch_size = 2\n[sample]\nprompt = \"p\"\ntemperature = 0.5\ntop_p = 0.9\n";

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    [WHOLE, STACK, SMALL].map(|s| s.as_bytes().to_vec()).to_vec()
}

/// One input.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(spec) = JobSpec::parse(&text, Path::new("/base"), "job.toml") else { return };
    let again = JobSpec::parse(&spec.to_toml(), Path::new("/"), "kept").expect("what was accepted is accepted again");
    assert_eq!(again, spec);
}
