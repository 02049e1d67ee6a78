//! What fuzzers came upon (tokenizer), and where they began, again: `fuzz/corpus-seeds`.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod ramtorch_fuzz;
#[path = "../../../fuzz/bodies/tokenizer.rs"]
mod tokenizer;

use std::path::Path;

fn replay(target: &str, begin: Vec<Vec<u8>>, run: fn(&[u8])) {
    begin.iter().for_each(|input| run(input));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus-seeds").join(target);
    let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(files.len() >= 5, "{} inputs in {}", files.len(), folder.display());
    files.iter().for_each(|file| run(&std::fs::read(file).unwrap()));
    let _ = std::fs::remove_dir_all(ramtorch_fuzz::folder());
}

#[test]
fn inputs_that_fuzzers_found_are_answered() {
    replay("tokenizer", tokenizer::seeds(), tokenizer::run);
}
