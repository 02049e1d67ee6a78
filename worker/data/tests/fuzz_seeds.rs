//! What fuzzers came upon (tokenizer), and where they began, again: `fuzz/corpus-seeds`.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod ramtorch_fuzz;
#[path = "../../../fuzz/bodies/replay.rs"]
mod replay;
#[path = "../../../fuzz/bodies/tokenizer.rs"]
mod tokenizer;

use replay::replay;

#[test]
fn inputs_that_fuzzers_found_are_answered() {
    replay("tokenizer", tokenizer::seeds(), tokenizer::run);
}
