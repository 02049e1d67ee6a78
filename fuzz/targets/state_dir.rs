//! What an earlier daemon left in its state folder, damaged at will: the next one takes it over or leaves it alone.
//!
//! Input: job.json, metrics.jsonl, a registration of a segment, a log.
#![no_main]

use ramtorch_fuzz::{file, folder, joined, parts};
use ramtorchd::fuzzing;

const JOB: &str = "jobs/abcdefgh";
const SEGMENT: &str = "state-segment";

fn seeds() -> Vec<Vec<u8>> {
    let name = format!("/ramtorch-fuzz-{SEGMENT}");
    let registration =
        format!(r#"{{"name":"{name}","job":"abcdefgh","generation":1,"bytes":4096,"owner":{{"pid":1,"start_ticks":1,"boot_id":"x"}}}}"#);
    let line = fuzzing::history_line(3);
    fuzzing::records("abcdefgh", &name)
        .iter()
        .map(|record| joined(&[record, format!("{line}\n{line}\n{{\"step\":4").as_bytes(), registration.as_bytes(), b"log\n\xc3\xa9\n"]))
        .collect()
}

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(seeds), |data: &[u8]| {
    let [job, metrics, registration, log] = parts::<4>(data);
    file(&format!("{JOB}/job.json"), job);
    file(&format!("{JOB}/metrics.jsonl"), metrics);
    file(&format!("{JOB}/logs/rank-0.g1.log"), log);
    // A registration speaks for the segment that its file is named after, so that no other can go.
    file(&format!("segments/ramtorch-fuzz-{SEGMENT}.segment.json"), registration);
    fuzzing::recover(folder());
});
