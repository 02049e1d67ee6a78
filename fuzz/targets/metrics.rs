//! A metrics file of any bytes, after a crash: what is kept are whole lines of steps 1, 2, 3 … up to the committed one.
//!
//! Input: the committed step (one byte), then the file.
#![no_main]

use ramtorch_fuzz::file;
use ramtorch_worker::fuzzing::recover_metrics;

fn seeds() -> Vec<Vec<u8>> {
    vec![
        b"\x03{\"step\":1}\n{\"step\":2,\"loss\":1.5}\n{\"step\":3}\n{\"step\":4".to_vec(),
        b"\x09{\"step\":1,\"loss\":\"NaN\"}\n{\"step\":1}\n".to_vec(),
        b"\x00\n\n".to_vec(),
    ]
}

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(seeds), |data: &[u8]| {
    let Some((&committed, text)) = data.split_first() else { return };
    let path = file("metrics.jsonl", text);
    let last = recover_metrics(&path, committed.into()).expect("a file that can be written");
    let kept = std::fs::read(&path).expect("the file");
    assert!(text.starts_with(&kept), "nothing is changed but the end");
    assert!(last <= committed.into() && kept.iter().filter(|b| **b == b'\n').count() as u64 == last);
    assert!(kept.last().is_none_or(|b| *b == b'\n'));
    // Once more changes nothing.
    assert_eq!(recover_metrics(&path, committed.into()).expect("again"), last);
    assert_eq!(std::fs::read(&path).expect("the file"), kept);
});
