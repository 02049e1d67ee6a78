//! A metrics file of any bytes, after a crash: what is kept are lines of ours up to the committed step, each of a later step than
//! the one before; a file that holds anything else is refused and not touched.
//!
//! Input: the committed step (one byte), then the file.
#![no_main]

use ramtorch_fuzz::file;
use ramtorch_worker::fuzzing::recover_metrics;

fn seeds() -> Vec<Vec<u8>> {
    let line = |step: u64| format!("{{\"step\":{step},\"loss\":1.5,\"lr\":0.1,\"tokens_total\":7}}\n");
    let lines = |committed: u8, steps: &[u64], tail: &str| {
        let text: String = steps.iter().map(|step| line(*step)).collect();
        [&[committed], text.as_bytes(), tail.as_bytes()].concat()
    };
    vec![
        lines(3, &[1, 2, 3, 4], "{\"step\":5,\"lo"),
        lines(103, &[101, 102, 103], "\0\0\0"),
        lines(9, &[1, 2, 7, 9], ""),
        lines(9, &[1, 1], "x\n"),
        b"\x00\n\n".to_vec(),
    ]
}

/// Steps of whole lines.
fn steps(text: &[u8]) -> Vec<u64> {
    let lines = text.split_inclusive(|b| *b == b'\n').filter(|line| !line.contains(&0));
    lines.map(|line| serde_json::from_slice::<serde_json::Value>(line).expect("a line")["step"].as_u64().expect("a step")).collect()
}

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(seeds), |data: &[u8]| {
    let Some((&committed, text)) = data.split_first() else { return };
    let path = file("metrics.jsonl", text);
    let recovered = recover_metrics(&path, committed.into());
    let kept = std::fs::read(&path).expect("the file");
    let Ok(last) = recovered else {
        assert_eq!(kept, text, "a file that is refused is not touched");
        return;
    };
    assert!(text.starts_with(&kept), "nothing is changed but the end");
    assert!(kept.last().is_none_or(|b| *b == b'\n'));
    let steps = steps(&kept);
    assert!(steps.windows(2).all(|w| w[0] < w[1]) && steps.last().copied().unwrap_or(0) == last && last <= committed.into());
    // Once more changes nothing.
    assert_eq!(recover_metrics(&path, committed.into()).expect("again"), last);
    assert_eq!(std::fs::read(&path).expect("the file"), kept);
});
