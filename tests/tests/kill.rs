//! Processes die at any time, and a run does not mind: what is in the parameter store is gone on with, to the bit.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use ramtorch_tests::disturbed::names;
use ramtorch_tests::{Binary, Process, settled};
use ramtorch_tests::{Fixture, JobFile, MetricsLine, Sandbox, Tensor, assert_same_tensors, bits, read_metrics, read_tensors};
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

#[test]
fn a_killed_worker_is_replaced_and_no_step_is_lost() {
    let (whole, weights) = undisturbed();
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("killed", &job());
    daemon.kill_ranks(&id, &[(1, 20), (0, 150)]);
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
    daemon.wait_for_step(&id, 30);
    daemon.process().signal(Signal::SIGKILL);
    drop(daemon);
    let killed = std::time::Instant::now();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !sandbox.processes().is_empty() {
        assert!(std::time::Instant::now() < end, "workers outlive their daemon: {:?}", sandbox.processes());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let before = read_metrics(&sandbox.path("metrics.jsonl")).len();
    let mut daemon = sandbox.start_daemon("cpu:2", &[]);
    while read_metrics_so_far(&sandbox) <= before {
        assert!(killed.elapsed() < std::time::Duration::from_secs(20), "no new step");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    eprintln!("from the daemon's death to the first new step: {:.2} s", killed.elapsed().as_secs_f64());
    let job = daemon.wait_for_state(&id, "succeeded");
    assert_eq!(job["restarts"], 0, "{job:#}");
    // From memory and not from disk: nothing is prepared or loaded again, and the daemon says where it goes on.
    let said = daemon.process().stderr();
    assert!(said.contains("the job goes on from its parameter store"), "{said}");
    let logs = sandbox.path(&format!("state/jobs/{id}/logs"));
    assert_eq!(names(&logs), ["prepare.g1.log", "rank-0.g1.log", "rank-0.g2.log", "rank-1.g1.log", "rank-1.g2.log"]);
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole));
    assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, "after the daemon's death");
    daemon.stop();
}

/// Whole lines so far; the file is being written.
fn read_metrics_so_far(sandbox: &Sandbox) -> usize {
    std::fs::read_to_string(sandbox.path("metrics.jsonl")).unwrap_or_default().matches('\n').count()
}

/// `ramtorchd run` that is killed can clean up nothing; the next one does, wherever the first had its folders.
#[test]
fn what_a_killed_run_left_is_removed_by_the_next() {
    let deep = format!("{}/deep", "d".repeat(90));
    for state_home in ["home/state", deep.as_str(), "file/not-a-folder"] {
        let sandbox = Sandbox::new();
        sandbox.file("file", "");
        let start = |name: &str, job: &JobFile| -> Process {
            let path = sandbox.write_job(name, job);
            let mut command = sandbox.command(Binary::Daemon);
            command.env("XDG_STATE_HOME", sandbox.path(state_home)).arg("run").arg(path).args(["--devices", "cpu:2"]);
            sandbox.start(command)
        };
        let endless = job().set("train.steps", 1_000_000).set("output.metrics", "endless.jsonl").set("output.path", "endless");
        let killed = start("endless", &endless);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while std::fs::read_to_string(sandbox.path("endless.jsonl")).unwrap_or_default().lines().count() < 3 {
            assert!(std::time::Instant::now() < end, "no steps:\n{}", killed.stderr());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let segments = segments_of(&sandbox);
        assert_eq!(segments.len(), 1, "{segments:?}");
        killed.signal(Signal::SIGKILL);
        killed.wait(std::time::Duration::from_secs(10)).expect_code(137);
        assert!(settled(|| sandbox.processes()).is_empty(), "its workers die with it");
        assert!(segments[0].exists(), "nobody is left to remove it");
        let short = job().set("train.steps", 20);
        start("short", &short).wait(std::time::Duration::from_secs(60)).expect_success();
        assert!(!segments[0].exists(), "{state_home}: the next run removes the segment");
        let private = sandbox.path(state_home).join("ramtorch/private");
        assert_eq!(names(&private), Vec::<String>::new(), "{state_home}: and the folder");
        // The sandbox looks for sockets and temporary files.
        sandbox.assert_clean();
    }
}

/// Segments that a process of this sandbox has mapped.
fn segments_of(sandbox: &Sandbox) -> Vec<std::path::PathBuf> {
    let maps = sandbox.processes().into_iter().filter_map(|(pid, _)| std::fs::read_to_string(format!("/proc/{pid}/maps")).ok());
    let mut found: Vec<std::path::PathBuf> = maps
        .flat_map(|m| m.lines().filter_map(|l| Some(l.split_whitespace().nth(5)?.into())).collect::<Vec<std::path::PathBuf>>())
        .filter(|p| p.starts_with("/dev/shm/"))
        .collect();
    found.sort();
    found.dedup();
    found
}
