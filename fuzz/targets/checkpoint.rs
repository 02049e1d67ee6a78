//! A checkpoint is refused, or all of it can be read.
//!
//! Input: checkpoint.json, config.json, then the only shard.
#![no_main]

use ramtorch_fuzz::{file, folder, joined, parts};
use ramtorch_modelio::{
    Architecture, Checkpoint, CheckpointFiles, CheckpointMeta, CheckpointWriter, FindOptions, ModelAssets, OpenModel, SeededInit,
    StackConfig, WeightSource, fill_page, find_sound, parse_config,
};
use ramtorch_store::{GradientFormat, GradientLog, MomentFormat, Store, StoreSpec};
use std::path::Path;
use std::sync::Arc;

const LLAMA: &str = r#"{"model_type":"llama","vocab_size":7,"hidden_size":4,"intermediate_size":4,"num_hidden_layers":1,"num_attention_heads":1,"num_key_value_heads":1,"max_position_embeddings":8,"tie_word_embeddings":false}"#;

fn written(architecture: Architecture, moments: MomentFormat, config: Option<&str>) -> Vec<u8> {
    let root = folder().join("seed");
    let _ = std::fs::remove_dir_all(&root);
    let spec = StoreSpec {
        blocks: architecture.blocks(),
        world_size: 1,
        moments,
        gradients: GradientFormat::None,
        page_parameters: Some(1024),
        spare_pages_per_rank: 1,
        exchange_bytes: 0,
        log: GradientLog::NONE,
        metadata: String::new(),
    };
    let name = format!("/ramtorch-fuzz-{}.seed", std::process::id());
    let store = Store::create(&name, &spec).expect("a small store");
    Store::unlink(&name).expect("its name goes");
    let mut owner = store.claim(0).expect("rank 0");
    let source = SeededInit::new(&architecture, 3);
    for page in owner.pages().collect::<Vec<_>>() {
        fill_page(&mut owner, store.layout(), page, 3, &source).expect("a page");
    }
    let files = Arc::new(CheckpointFiles::new(store.layout(), 1, 3).expect("files"));
    let writer = CheckpointWriter::begin(&root, &files).expect("a writer");
    writer.part(0, 1).and_then(|p| p.write_all(&store)).expect("a part");
    let meta = CheckpointMeta { step: 3, run: "r".into(), architecture, job: serde_json::json!({}), values: vec![0.5, f64::NAN] };
    let assets = ModelAssets { config: config.map(|c| c.as_bytes().to_vec()), files: Vec::new() };
    let done = writer.commit(&meta, &assets, 0).expect("a checkpoint").path;
    let read = |n: &Path| std::fs::read(n).expect("a file of the checkpoint");
    let manifest = read(&done.join("checkpoint.json"));
    let shard: serde_json::Value = serde_json::from_slice(&manifest).expect("JSON");
    let shard = shard["shards"][0]["file"].as_str().expect("a shard").to_owned();
    assert_eq!(shard, SHARD, "the target writes the shard under the writer's name");
    joined(&[&manifest, config.unwrap_or_default().as_bytes(), &read(&done.join(shard))])
}

const SHARD: &str = "shard-00000-of-00001.safetensors";

fn seeds() -> Vec<Vec<u8>> {
    let stack = || Architecture::Stack(StackConfig { widths: vec![2, 3, 1], activation: Default::default(), loss: Default::default() });
    let llama = || Architecture::Transformer(parse_config(LLAMA.as_bytes(), Path::new("c")).expect("a configuration").config);
    vec![
        written(stack(), MomentFormat::F32, None),
        written(stack(), MomentFormat::None, None),
        written(llama(), MomentFormat::Bf16, Some(LLAMA)),
    ]
}

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(seeds), |data: &[u8]| {
    let [manifest, config, shard] = parts::<3>(data);
    file("c/step-00000003/checkpoint.json", manifest);
    match config {
        [] => ramtorch_fuzz::no_file("c/step-00000003/config.json"),
        text => drop(file("c/step-00000003/config.json", text)),
    }
    file(&format!("c/step-00000003/{SHARD}"), shard);
    let root = folder().join("c");
    let _ = find_sound(&root, &FindOptions { verify: true, ..Default::default() });
    let _ = OpenModel::open(&root);
    let Ok(checkpoint) = Checkpoint::open(&root.join("step-00000003")) else { return };
    let sound = checkpoint.verify().is_ok();
    for block in checkpoint.meta().architecture.blocks() {
        for tensor in &block.tensors {
            let n = tensor.shape.iter().product::<u64>().min(4096) as usize;
            let (mut a, mut b, mut c) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
            let read = checkpoint.read(&tensor.name, 0, &mut a).and_then(|()| checkpoint.read_moments(&tensor.name, 0, &mut b, &mut c));
            assert!(read.is_ok() || !sound, "what was verified is read");
        }
    }
});
