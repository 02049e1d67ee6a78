//! A model folder (configuration, index, weights) is refused, or its tensors can be read.
//!
//! Input: config.json, model.safetensors.index.json (or nothing), then the weights.
#![no_main]

use ramtorch_fuzz::{file, folder, joined, no_file, parts};
use ramtorch_modelio::{Architecture, INDEX_FILE, OpenModel, SINGLE_FILE, parse_config};
use std::path::Path;

const LLAMA: &str = r#"{"model_type":"llama","vocab_size":7,"hidden_size":4,"intermediate_size":4,"num_hidden_layers":1,"num_attention_heads":1,"num_key_value_heads":1,"max_position_embeddings":8,"tie_word_embeddings":true,"torch_dtype":"bfloat16"}"#;
const GPT2: &str =
    r#"{"model_type":"gpt2","vocab_size":7,"n_embd":4,"n_layer":1,"n_head":2,"n_positions":8,"activation_function":"gelu_new"}"#;

/// Zeros of the shapes that a configuration has.
fn model(config: &str, indexed: bool) -> Vec<u8> {
    let parsed = parse_config(config.as_bytes(), Path::new("config.json")).expect("a configuration");
    let (mut header, mut weight_map, mut at) = (serde_json::Map::new(), serde_json::Map::new(), 0);
    for tensor in Architecture::Transformer(parsed.config).blocks().iter().flat_map(|b| &b.tensors) {
        let bytes = tensor.shape.iter().product::<u64>() * 2;
        let entry = serde_json::json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [at, at + bytes]});
        header.insert(tensor.name.clone(), entry);
        weight_map.insert(tensor.name.clone(), SINGLE_FILE.into());
        at += bytes;
    }
    let header = serde_json::Value::Object(header).to_string();
    let weights = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; at as usize]].concat();
    let index = serde_json::json!({"metadata": {"total_size": at}, "weight_map": weight_map}).to_string();
    joined(&[config.as_bytes(), if indexed { index.as_bytes() } else { b"" }, &weights])
}

fn seeds() -> Vec<Vec<u8>> {
    vec![model(LLAMA, false), model(LLAMA, true), model(GPT2, false)]
}

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(seeds), |data: &[u8]| {
    let [config, index, weights] = parts::<3>(data);
    file("m/config.json", config);
    match index {
        [] => no_file(&format!("m/{INDEX_FILE}")),
        text => drop(file(&format!("m/{INDEX_FILE}"), text)),
    }
    file(&format!("m/{SINGLE_FILE}"), weights);
    let Ok(model) = OpenModel::open(&folder().join("m")) else { return };
    for tensor in model.architecture.blocks().iter().flat_map(|b| &b.tensors) {
        let mut out = vec![0.0; tensor.shape.iter().product::<u64>().min(4096) as usize];
        model.weights.read(&tensor.name, 0, &mut out).expect("a tensor of an accepted folder");
    }
});
