//! Bytes: workers hold no more private memory than their device's budget and a little, however large the model.
#![allow(clippy::unwrap_used)]

use ramtorch_tests::{Fixture, JobFile, Sandbox, exit, fixture_path, read_metrics};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const DEVICE_MEMORY: u64 = 64 * MIB;
/// Code, stacks, gRPC, and what the allocator keeps.
const ALLOWANCE: u64 = 100 * MIB;

/// A job whose weights alone, in fp32, are three times the device's memory.
fn large(sandbox: &Sandbox) -> JobFile {
    let config = std::fs::read_to_string(Fixture::model_path("llama").join("config.json")).unwrap();
    let config = config
        .replace("\"hidden_size\": 48", "\"hidden_size\": 512")
        .replace("\"intermediate_size\": 93", "\"intermediate_size\": 1376")
        .replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 16")
        .replace("\"num_attention_heads\": 4", "\"num_attention_heads\": 8");
    sandbox.file("large/config.json", config);
    JobFile::new("large")
        .set("model.config", "large/config.json")
        .set("data.format", "tokens")
        .set("data.train", fixture_path("tokens.bin"))
        .set("data.sequence_length", 16)
        .set("train.steps", 3)
        .set("train.batch_size", 4)
        .set("train.precision", "fp32")
        .set("device.memory_bytes", DEVICE_MEMORY)
        .set("output.metrics", "metrics.jsonl")
}

/// Anonymous memory of a process: what is its own. Mapped files and the shared segment are not in it.
fn private_bytes(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap_or("0 kB");
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn private_memory_stays_within_the_budget() {
    for ranks in [1, 2] {
        let sandbox = Sandbox::new();
        let job = large(&sandbox);
        let mut process = sandbox.start_job("large", &job, &format!("cpu:{ranks}"));
        let (mut most, mut workers) = (0, 0);
        while !process.has_ended() {
            let found = sandbox.processes().into_iter().filter(|(_, line)| line.split(' ').any(|word| word == "worker"));
            let sizes: Vec<u64> = found.map(|(pid, _)| private_bytes(pid)).collect();
            workers = workers.max(sizes.len());
            most = most.max(sizes.into_iter().max().unwrap_or(0));
            std::thread::sleep(Duration::from_millis(10));
        }
        process.wait(Duration::from_secs(1)).expect_success();
        sandbox.assert_clean();
        assert_eq!(read_metrics(&sandbox.path("metrics.jsonl")).len(), 3);
        println!("{ranks} ranks: at most {} MiB of {} MiB", most / MIB, (DEVICE_MEMORY + ALLOWANCE) / MIB);
        assert!(workers >= ranks && most > MIB, "no worker was seen: {workers} processes, {most} bytes");
        assert!(most <= DEVICE_MEMORY + ALLOWANCE, "a worker held {} MiB", most / MIB);
    }
}

/// The least budget that a refusal names is enough, and a byte less is not.
#[test]
fn a_refusal_says_how_much_would_do() {
    let sandbox = Sandbox::new();
    let job = Fixture::load("llama").job("small").set("train.steps", 2).set("schedule.warmup_steps", 0);
    let refused = sandbox.run_job("small", &job.clone().set("device.memory_bytes", 1000), "cpu:1");
    let refused = refused.expect_refusal(exit::RESOURCES, &["1000"]);
    let said = refused.text();
    let number = said.split_once(" bytes on each device").and_then(|(before, _)| before.split_whitespace().last());
    let needed: u64 = number.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no number of bytes:\n{said}"));
    assert!(needed > 1000, "{said}");
    sandbox.run_job("small", &job.clone().set("device.memory_bytes", needed), "cpu:1").expect_success();
    sandbox.run_job("small", &job.set("device.memory_bytes", needed - 1), "cpu:1").expect_code(exit::RESOURCES);
}
