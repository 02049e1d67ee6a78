//! Processes die at any time, and a run does not mind: what is in the parameter store is gone on with, to the bit.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ramtorch_tests::{Daemon, Fixture, JobFile, MetricsLine, Sandbox, Tensor, assert_same_tensors, bits, read_metrics, read_tensors};
use serde_json::Value;
use std::collections::BTreeMap;

const STEPS: usize = 600;

fn job() -> JobFile {
    let job = Fixture::load("llama").job("killed").set("train.steps", STEPS).set("train.batch_size", 6);
    job.set("data.shuffle", true).set("train.micro_batch_size", 1).set("output.path", "model")
}

fn undisturbed() -> (Vec<MetricsLine>, BTreeMap<String, Tensor>) {
    let sandbox = Sandbox::new();
    sandbox.run_job("whole", &job(), "cpu:2").expect_success();
    (read_metrics(&sandbox.path("metrics.jsonl")), read_tensors(&sandbox.path("model")))
}

fn workers(job: &Value) -> Vec<Pid> {
    let pid = |w: &Value| Pid::from_raw(i32::try_from(w["pid"].as_i64().unwrap()).unwrap());
    job["workers"].as_array().unwrap().iter().map(pid).collect()
}

fn wait_for_step(daemon: &Daemon<'_>, id: &str, step: u64) -> Value {
    daemon.wait_for(id, "steps", |j| j["step"].as_u64() >= Some(step) && j["state"] == "running")
}

#[test]
fn a_killed_worker_is_replaced_and_no_step_is_lost() {
    let (whole, weights) = undisturbed();
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("killed", &job());
    for (rank, step) in [(1, 20), (0, 150)] {
        let running = wait_for_step(&daemon, &id, step);
        kill(workers(&running)[rank], Signal::SIGKILL).unwrap();
        daemon.wait_for(&id, "the restart", |j| j["restarts"].as_u64() > running["restarts"].as_u64());
    }
    let job = daemon.wait_for_state(&id, "succeeded");
    assert_eq!(job["restarts"], 2, "{job:#}");
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole));
    assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, "killed twice");
    daemon.stop();
}

/// A daemon that is killed takes its workers with it; the next one on the same state folder goes on with the job.
#[test]
fn a_killed_daemon_is_followed_by_one_that_goes_on() {
    let (whole, weights) = undisturbed();
    let sandbox = Sandbox::new();
    let mut daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("killed", &job());
    wait_for_step(&daemon, &id, 30);
    daemon.process().signal(Signal::SIGKILL);
    drop(daemon);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !sandbox.processes().is_empty() {
        assert!(std::time::Instant::now() < end, "workers outlive their daemon: {:?}", sandbox.processes());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    daemon.wait_for_state(&id, "succeeded");
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole));
    assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, "after the daemon's death");
    daemon.stop();
}
