//! What fuzzers came upon (job_file), and where they began, again: `fuzz/corpus-seeds`.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/bodies/job_file.rs"]
mod job_file;
#[path = "../../../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod ramtorch_fuzz;
#[path = "../../../fuzz/bodies/replay.rs"]
mod replay;

use replay::replay;

#[test]
fn inputs_that_fuzzers_found_are_answered() {
    replay("job_file", job_file::seeds(), job_file::run);
}
