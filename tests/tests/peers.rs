//! Several devices on one job: shares of weights that are gathered, gradients that are added up and scattered. CPU devices
//! take the same steps as GPUs do.
#![allow(clippy::unwrap_used)]

use ramtorch_tests::{
    Fixture, JobFile, MetricsLine, Sandbox, Tensor, assert_same_tensors, bits, exit, losses, read_metrics, read_tensors,
    worst_relative_difference,
};
use std::collections::BTreeMap;

/// Everything that makes ranks unequal at once: uneven batches, shuffling, groups, validation of odd numbers of sequences.
fn job(fixture: &str) -> JobFile {
    let job = Fixture::load(fixture).job("peers").set("output.path", "model").set("train.steps", 4).set("schedule.warmup_steps", 1);
    let job = job.set("data.shuffle", true).set("data.seed", 5).set("train.batch_size", 7).set("train.micro_batch_size", 1);
    job.set("train.groups", 2).set("data.validation_fraction", 0.2).set("train.validate_every", 2)
}

fn run(job: &JobFile, ranks: usize) -> (Vec<MetricsLine>, BTreeMap<String, Tensor>) {
    let sandbox = Sandbox::new();
    sandbox.run_job("peers", job, &format!("cpu:{ranks}")).expect_success();
    (read_metrics(&sandbox.path("metrics.jsonl")), read_tensors(&sandbox.path("model")))
}

/// As little device memory as the job can do with: weights are streamed through two slots.
fn tight(job: &JobFile, ranks: usize) -> JobFile {
    let refused = Sandbox::new().run_job("small", &job.clone().set("device.memory_bytes", 1000), &format!("cpu:{ranks}"));
    let said = refused.expect_refusal(exit::RESOURCES, &["bytes on each device"]).text();
    let number = said.split_once(" bytes on each device").and_then(|(before, _)| before.split_whitespace().last());
    let needed: u64 = number.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no number of bytes:\n{said}"));
    job.clone().set("device.memory_bytes", needed)
}

/// Where weights come from changes no bit, on any number of ranks. Each run has the least memory it can do with, so that the
/// plans are alike: the order in which groups add up is part of them.
#[test]
fn gathered_weights_are_the_weights() {
    let (alone, _) = run(&job("llama"), 1);
    for ranks in [2, 3, 4, 8] {
        let with = |gather: bool| run(&tight(&job("llama").set("train.gather_weights", gather), ranks), ranks);
        let ((pulled, weights), (gathered, same)) = (with(false), with(true));
        assert_eq!(bits(&gathered), bits(&pulled), "{ranks} ranks");
        assert_same_tensors(&same, &weights, &format!("{ranks} ranks"));
        let (step, off) = worst_relative_difference(&losses(&pulled), &losses(&alone));
        assert!(off < 1e-5, "{ranks} ranks: step {} is off by {off:.1e}", step + 1);
    }
}

/// The same where all weights stay on the device.
#[test]
fn weights_that_stay_are_gathered_once_a_step() {
    let with = |gather: bool| run(&job("qwen2").set("train.groups", 1).set("train.gather_weights", gather), 3);
    let ((pulled, weights), (gathered, same)) = (with(false), with(true));
    assert_eq!(bits(&gathered), bits(&pulled));
    assert_same_tensors(&same, &weights, "gathered and pulled");
}

/// A tied embedding is needed at both ends of a sweep, by whoever has it in a slot already.
#[test]
fn a_tied_embedding_is_gathered_too() {
    let with = |gather: bool| run(&tight(&job("llama-tied-llama3").set("train.groups", 1).set("train.gather_weights", gather), 3), 3);
    let ((pulled, weights), (gathered, same)) = (with(false), with(true));
    assert_eq!(bits(&gathered), bits(&pulled));
    assert_same_tensors(&weights, &same, "gathered and pulled");
}

/// Gradients that travel in bf16 are a little off, and always by as much.
#[test]
fn reductions_in_bf16_are_close_and_repeat() {
    let exact = job("llama").set("train.precision", "bf16").set("train.groups", 1);
    let rounded = exact.clone().set("train.reduce", "bf16").set("train.gather_weights", true);
    let (exact, (rounded, weights), (again, same)) = (run(&exact, 4).0, run(&rounded, 4), run(&rounded, 4));
    assert_eq!(bits(&rounded), bits(&again));
    assert_same_tensors(&weights, &same, "two runs");
    assert_ne!(bits(&rounded), bits(&exact), "the option has no effect");
    let (step, off) = worst_relative_difference(&losses(&rounded), &losses(&exact));
    assert!(off < 2e-3, "step {} is off by {off:.1e}", step + 1);
}

/// A rank dies while others wait for its shares.
#[test]
fn a_gang_that_gathers_survives_the_death_of_a_rank() {
    let job = tight(&job("llama").set("train.gather_weights", true), 3).set("train.steps", 120).set("train.validate_every", 0);
    let (whole, weights) = run(&job, 3);
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:3", &[]);
    let id = daemon.submit("peers", &job);
    daemon.kill_ranks(&id, &[(2, 10), (0, 50)]);
    let job = daemon.wait_for_state(&id, "succeeded");
    assert_eq!(job["restarts"], 2, "{job:#}");
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole));
    assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, "killed twice");
    daemon.stop();
}
