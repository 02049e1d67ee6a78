//! What fuzzers came upon (config, safetensors), and where they began, again: `fuzz/corpus-seeds`.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/bodies/config.rs"]
mod config;
#[path = "../../../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod ramtorch_fuzz;
#[path = "../../../fuzz/bodies/replay.rs"]
mod replay;
#[path = "../../../fuzz/bodies/safetensors.rs"]
mod safetensors;

use replay::replay;

/// One test: they share a folder in memory.
#[test]
fn inputs_that_fuzzers_found_are_answered() {
    replay("config", config::seeds(), config::run);
    replay("safetensors", safetensors::seeds(), safetensors::run);
}
