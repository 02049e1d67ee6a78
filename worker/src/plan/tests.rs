//! The plan keeps to its budget, says what is missing, and its bytes are the bytes of the run.

use super::*;
use crate::session::Session;
use proptest::prelude::*;
use ramtorch_modelio::{StackConfig, TransformerConfig, parse_config};
use ramtorch_store::Store;
use std::path::Path;
use std::sync::Arc;

fn llama(layers: usize, tied: bool) -> Architecture {
    let text = format!(
        r#"{{"model_type":"llama","vocab_size":211,"hidden_size":48,"intermediate_size":80,"num_hidden_layers":{layers},
            "num_attention_heads":4,"num_key_value_heads":2,"max_position_embeddings":64,"rms_norm_eps":1e-5,
            "tie_word_embeddings":{tied},"hidden_act":"silu"}}"#
    );
    let config: TransformerConfig = parse_config(text.as_bytes(), Path::new("config.json")).unwrap().config;
    Architecture::Transformer(config)
}

fn request(architecture: &Architecture, world: usize, batch: usize, memory_bytes: u64, more: &str) -> PlanRequest {
    let text = format!(
        "name = \"t\"\n[model]\nconfig = \"/c\"\n[data]\nformat = \"tokens\"\ntrain = \"/t\"\nsequence_length = 16\n[train]\nsteps = 1\nbatch_size = {batch}\n{more}"
    );
    let spec = JobSpec::parse(&text, Path::new("/"), "job.toml").unwrap();
    PlanRequest {
        spec,
        prepared: Prepared {
            architecture: serde_json::to_value(architecture).unwrap(),
            description: architecture.describe(),
            weights: None,
            resume: None,
            train_sequences: 100,
            validation_sequences: 0,
            sequence_length: 16,
            steps: 1,
            dataset: serde_json::Value::Null,
            rates: Rates::default(),
        },
        devices: (0..world as u32).map(|index| DeviceSpec { kind: DeviceKind::Cpu, index, threads: 1, memory_bytes }).collect(),
        segment_bytes_available: 1 << 40,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_plan_fits_or_says_what_is_missing(budget in 1u64..6_000_000, world in 1usize..5, batch in 1usize..20, layers in 1usize..5, tied: bool) {
        let a = llama(layers, tied);
        match plan(&request(&a, world, batch, budget, "")) {
            Ok(p) => {
                let e = EnginePlan::of(&p).unwrap();
                prop_assert!(e.uses.total() <= budget && p.device_bytes.iter().all(|b| *b == e.uses.total()));
                prop_assert!(e.groups * e.group_len >= e.micro_batches);
                prop_assert!(e.micro_batch * e.micro_batches >= batch.div_ceil(world));
                prop_assert!(e.resident.iter().all(|r| *r) || e.slots >= 2);
                // More memory is never slower.
                let richer = plan(&request(&a, world, batch, budget * 2, "")).unwrap();
                prop_assert!(richer.step_seconds <= p.step_seconds * 1.000_001);
            }
            Err(e) => {
                prop_assert_eq!(e.kind, ErrorKind::Resources);
                prop_assert!(e.message.contains("bytes are missing"), "{}", e.message);
                // What it asks for is enough.
                let need: u64 = e.message.split("needs at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
                prop_assert!(need > budget);
                prop_assert!(plan(&request(&a, world, batch, need, "")).is_ok());
            }
        }
    }

    #[test]
    fn shares_cover_the_batch(batch in 0usize..100, world in 1usize..9) {
        let mut next = 0;
        for rank in 0..world {
            let share = rank_share(batch, rank, world);
            prop_assert_eq!(share.start, next);
            prop_assert!(share.len() <= batch.div_ceil(world));
            next = share.end;
        }
        prop_assert_eq!(next, batch);
    }
}

/// Opens a session for `p` and returns the bytes that its device gave out.
fn opened(a: &Architecture, p: &EnginePlan, name: &str) -> u64 {
    let name = format!("/ramtorch-plan-{name}-{}", std::process::id());
    let store = Arc::new(Store::create(&name, &p.store).unwrap());
    Store::unlink(&name).unwrap();
    let model = Model::new(a, store.layout(), p.dtype).unwrap();
    let spec = DeviceSpec { kind: DeviceKind::Cpu, index: 0, threads: 1, memory_bytes: p.uses.total() };
    let dev = crate::device::open(&spec, p.dtype, p.uses.total(), true).unwrap();
    Session::new(dev, model, store, p, true).unwrap().dev.allocated()
}

#[test]
fn the_bytes_of_the_plan_are_the_bytes_of_the_run() {
    let stack = Architecture::Stack(StackConfig { widths: vec![10, 24, 24, 5], activation: Default::default(), loss: Default::default() });
    let mut seen = Vec::new();
    for (i, (a, more)) in [
        (llama(3, true), ""),
        (llama(3, false), "recompute = \"always\"\n"),
        (llama(4, true), "groups = 3\nmicro_batch_size = 2\n"),
        (llama(2, false), "precision = \"bf16\"\nmicro_batch_size = 3\n"),
    ]
    .into_iter()
    .enumerate()
    {
        // From just enough to plenty: streamed and resident weights, kept and recomputed activations.
        let least = plan(&request(&a, 1, 8, 1, more)).unwrap_err().message;
        let least: u64 = least.split("needs at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        for (j, budget) in [least, least + least / 4, least * 2, least * 20].into_iter().enumerate() {
            let p = EnginePlan::of(&plan(&request(&a, 1, 8, budget, more)).unwrap()).unwrap();
            assert_eq!(opened(&a, &p, &format!("{i}-{j}")), p.uses.total(), "{p:?}");
            seen.push((p.resident.iter().filter(|r| **r).count(), p.keep.clone()));
        }
    }
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() > 4, "the budgets gave only {seen:?}");
    let layout =
        Layout::new(&store_spec(&request(&stack, 1, 8, 1 << 30, "").spec, &request(&stack, 1, 8, 1, "").prepared, &stack, 1, Dtype::F32))
            .unwrap();
    assert!(Model::new(&stack, &layout, Dtype::F32).is_ok());
}

#[test]
fn too_small_a_segment_is_refused_with_the_bytes() {
    let mut r = request(&llama(2, true), 1, 4, 1 << 30, "");
    r.segment_bytes_available = 1000;
    let e = plan(&r).unwrap_err();
    assert_eq!(e.kind, ErrorKind::Resources);
    assert!(e.message.contains("1000 are free") && e.message.contains("are missing"), "{e}");
}

/// A decoder of a known model's shape.
fn shape(family: &str, hidden: usize, inner: usize, layers: usize, heads: [usize; 2], head_dim: usize, vocab: usize, tied: bool) -> Architecture {
    let [heads, kv] = heads;
    let text = format!(
        r#"{{"model_type":"{family}","vocab_size":{vocab},"hidden_size":{hidden},"intermediate_size":{inner},"num_hidden_layers":{layers},
            "num_attention_heads":{heads},"num_key_value_heads":{kv},"head_dim":{head_dim},"max_position_embeddings":32768,
            "rms_norm_eps":1e-5,"tie_word_embeddings":{tied},"hidden_act":"silu"}}"#
    );
    Architecture::Transformer(parse_config(text.as_bytes(), Path::new("config.json")).unwrap().config)
}

fn llama_8b() -> Architecture {
    shape("llama", 4096, 14_336, 32, [32, 8], 128, 128_256, false)
}

/// A job on one GPU of `gib` GiB.
fn on_gpu(a: &Architecture, seq: usize, batch: usize, gib: f64, more: &str) -> PlanRequest {
    let mut r = request(a, 1, batch, (gib * (1u64 << 30) as f64) as u64, more);
    r.prepared.sequence_length = seq;
    r.devices[0].kind = DeviceKind::Cuda;
    r
}

fn planned(r: &PlanRequest) -> (EnginePlan, Plan) {
    let p = plan(r).unwrap_or_else(|e| panic!("{e}"));
    (EnginePlan::of(&p).unwrap(), p)
}

#[test]
fn show() {
    let qwen7 = shape("qwen2", 3584, 18_944, 28, [28, 4], 128, 152_064, false);
    let qwen14 = shape("qwen2", 5120, 13_824, 48, [40, 8], 128, 152_064, false);
    let llama3 = shape("llama", 3072, 8192, 28, [24, 8], 128, 128_256, true);
    let llama1 = shape("llama", 2048, 8192, 16, [32, 8], 64, 128_256, true);
    for (what, a, seq, batch, gib, more) in [
        ("1B", &llama1, 2048, 8, 78.5, ""),
        ("3B", &llama3, 2048, 8, 78.5, ""),
        ("8B 16k", &llama_8b(), 2048, 8, 78.5, ""),
        ("8B 16k old", &llama_8b(), 2048, 8, 78.5, "micro_batch_size = 2\ngroups = 4\n"),
        ("8B 131k", &llama_8b(), 2048, 64, 78.5, ""),
        ("7B 131k", &qwen7, 1024, 128, 78.5, ""),
        ("14B 65k", &qwen14, 1024, 64, 78.5, "[optimizer]\nmoments = \"bf16\"\n"),
        ("8B on 24", &llama_8b(), 2048, 8, 23.5, ""),
        ("8B on 12", &llama_8b(), 2048, 8, 12.0, ""),
    ] {
        let begin = std::time::Instant::now();
        let (_, p) = planned(&on_gpu(a, seq, batch, gib, more));
        println!("=== {what}: {:?}, {:.0} tok/s\n{}", begin.elapsed(), (seq * batch) as f64 / p.step_seconds, p.text);
    }
}
