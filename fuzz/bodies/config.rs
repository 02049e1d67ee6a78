//! A config.json is refused, or gives an architecture whose tensors can be listed.

use crate::ramtorch_fuzz::fixture;
use ramtorch_modelio::{Architecture, parse_config};
use std::path::Path;

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    ["gpt2", "llama", "llama-tied-llama3", "mistral", "qwen2", "qwen3"]
        .iter()
        .map(|m| fixture(&format!("models/{m}/config.json")))
        .collect()
}

/// One input.
pub fn run(data: &[u8]) {
    let Ok(parsed) = parse_config(data, Path::new("config.json")) else { return };
    let architecture = Architecture::Transformer(parsed.config);
    architecture.validate().expect("what was accepted is valid");
    // Listing what a hundred thousand layers have is work, not a defect.
    if let Architecture::Transformer(t) = &architecture
        && t.layers <= 64
    {
        let blocks = architecture.blocks();
        let tensors: usize = blocks.iter().map(|b| b.tensors.len()).sum();
        assert!(tensors > 0);
        for shape in blocks.iter().flat_map(|b| &b.tensors).map(|t| &t.shape) {
            shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).expect("a tensor whose elements can be counted");
        }
    }
}
