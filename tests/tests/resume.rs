//! A run that was stopped goes on from its checkpoint as if it had never been stopped.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use ramtorch_failpoint::{MARKS_VARIABLE, VARIABLE};
use ramtorch_tests::{
    Binary, Fixture, JobFile, MetricsLine, Process, Sandbox, Tensor, assert_same_tensors, bits, exit, losses, read_metrics, read_tensors,
    worst_relative_difference,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const STEPS: usize = 20;

fn job() -> JobFile {
    Fixture::load("llama")
        .job("resume")
        .set("train.steps", STEPS)
        .set("train.batch_size", 7)
        .set("train.micro_batch_size", 2)
        .set("data.shuffle", true)
        .set("output.path", "model")
        .set("checkpoint.path", "checkpoints")
        .set("checkpoint.every_steps", 6)
}

/// The run that nobody disturbs.
fn undisturbed(job: &JobFile, ranks: usize) -> (Vec<MetricsLine>, BTreeMap<String, Tensor>) {
    let sandbox = Sandbox::new();
    sandbox.run_job("whole", job, &format!("cpu:{ranks}")).expect_success();
    (read_metrics(&sandbox.path("metrics.jsonl")), read_tensors(&sandbox.path("model")))
}

/// A sandbox in which only the checkpoint of step 12 of the same run is left.
fn stopped_at_12(job: &JobFile, ranks: usize) -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.run_job("first", job, &format!("cpu:{ranks}")).expect_success();
    let kept = checkpoints(&sandbox.path("checkpoints"));
    let at_18 = kept.last().expect("checkpoints were written");
    assert!(at_18.ends_with("step-00000018") || at_18.to_string_lossy().contains("18"), "{kept:?}");
    std::fs::remove_dir_all(at_18).unwrap();
    std::fs::remove_dir_all(sandbox.path("model")).unwrap();
    sandbox
}

/// Folders of checkpoints, by name.
fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let is_folder = |e: &std::fs::DirEntry| e.file_type().is_ok_and(|t| t.is_dir());
    let mut found: Vec<_> = entries.flatten().filter(is_folder).map(|e| e.path()).collect();
    found.sort();
    found
}

#[test]
fn on_the_same_ranks_every_bit_is_the_same() {
    for ranks in [1, 3] {
        let (whole, weights) = undisturbed(&job(), ranks);
        let sandbox = stopped_at_12(&job(), ranks);
        sandbox.run_job("again", &job(), &format!("cpu:{ranks}")).expect_success();
        // Steps 13 to 18 were committed by the first run already; the file says each step once.
        assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole), "{ranks} ranks");
        assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, &format!("{ranks} ranks"));
    }
}

#[test]
fn bf16_moments_and_arithmetic_resume_to_the_bit() {
    let job = job().set("optimizer.moments", "bf16").set("train.precision", "bf16");
    let (whole, weights) = undisturbed(&job, 2);
    let sandbox = stopped_at_12(&job, 2);
    sandbox.run_job("again", &job, "cpu:2").expect_success();
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole));
    assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, "the model folder");
}

#[test]
fn on_other_numbers_of_ranks_the_numbers_are_the_same() {
    let (whole, _) = undisturbed(&job(), 3);
    for ranks in [1, 2, 4] {
        let sandbox = stopped_at_12(&job(), 3);
        sandbox.run_job("again", &job(), &format!("cpu:{ranks}")).expect_success();
        let lines = read_metrics(&sandbox.path("metrics.jsonl"));
        assert_eq!(lines.iter().map(|l| l.step).collect::<Vec<_>>(), (1..=STEPS as u64).collect::<Vec<_>>());
        let (step, off) = worst_relative_difference(&losses(&lines), &losses(&whole));
        assert!(off < 1e-5, "{ranks} ranks: step {} is off by {off:.1e}", step + 1);
    }
}

/// Stopped by a signal in the middle, started again with the same command.
#[test]
fn an_interrupted_run_goes_on() {
    let job = job().set("train.steps", 400).set("checkpoint.every_steps", 10).set("output.path", "model");
    let (whole, weights) = undisturbed(&job, 2);
    let sandbox = Sandbox::new();
    let process = sandbox.start_job("run", &job, "cpu:2");
    wait_for_lines(&process, &sandbox.path("metrics.jsonl"), 25);
    process.signal(Signal::SIGTERM);
    let finished = process.wait(Duration::from_secs(60));
    assert_ne!(finished.code, exit::OK, "{}", finished.stderr);
    sandbox.assert_clean();
    assert!(!sandbox.path("model").exists(), "an unfinished run leaves no model folder");
    sandbox.run_job("run", &job, "cpu:2").expect_success();
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole));
    assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, "the model folder");
}

#[test]
fn only_the_newest_are_kept() {
    let sandbox = Sandbox::new();
    let job = job().set("checkpoint.every_steps", 3).set("checkpoint.keep", 2).set("checkpoint.at_end", true);
    sandbox.run_job("keep", &job, "cpu:2").expect_success();
    let kept = checkpoints(&sandbox.path("checkpoints"));
    assert_eq!(kept.len(), 2, "{kept:?}");
    let names: Vec<_> = kept.iter().map(|p| p.file_name().unwrap().to_string_lossy().into_owned()).collect();
    assert!(names[0].contains("18") && names[1].contains("20"), "{names:?}");
}

/// A finished run that is started again has nothing to do, and says so.
#[test]
fn a_finished_run_is_not_run_twice() {
    let sandbox = Sandbox::new();
    let job = job().set("checkpoint.at_end", true);
    sandbox.run_job("once", &job, "cpu:1").expect_success();
    let weights = read_tensors(&sandbox.path("model"));
    let before = std::fs::read(sandbox.path("metrics.jsonl")).unwrap();
    sandbox.run_job("once", &job, "cpu:1").expect_success();
    assert_eq!(std::fs::read(sandbox.path("metrics.jsonl")).unwrap(), before);
    assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, "the model folder");
}

/// `resume = false` begins anew whatever is there.
#[test]
fn resuming_can_be_turned_off() {
    let sandbox = stopped_at_12(&job(), 1);
    let (whole, _) = undisturbed(&job(), 1);
    sandbox.run_job("anew", &job().set("checkpoint.resume", false), "cpu:1").expect_success();
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole));
}

/// A damaged checkpoint is named and the one before it used.
#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let (whole, _) = undisturbed(&job(), 2);
    let sandbox = Sandbox::new();
    sandbox.run_job("first", &job(), "cpu:2").expect_success();
    let kept = checkpoints(&sandbox.path("checkpoints"));
    assert_eq!(kept.len(), 2, "{kept:?}");
    let newest = &kept[1];
    let files = || std::fs::read_dir(newest).unwrap().flatten().map(|e| e.path()).filter(|p| p.is_file());
    let largest = files().max_by_key(|p| p.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&largest, bytes).unwrap();
    std::fs::remove_dir_all(sandbox.path("model")).unwrap();
    let finished = sandbox.run_job("again", &job(), "cpu:2").expect_success();
    let said = finished.text();
    assert!(said.contains(newest.file_name().unwrap().to_str().unwrap()), "the damaged one is not named:\n{said}");
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole));
}

/// A checkpoint of another model is refused by name and not loaded.
#[test]
fn a_checkpoint_of_another_model_is_refused() {
    let sandbox = stopped_at_12(&job(), 1);
    let other = job().set("model.path", Fixture::model_path("qwen3"));
    sandbox.run_job("other", &other, "cpu:1").expect_refusal(exit::INPUT, &["checkpoint"]);
}

/// A run that goes on with a new metrics file begins it in the middle. The first death of a worker used to empty it, and nobody was
/// told.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_metrics_file_that_begins_in_the_middle_survives_a_death() {
    let (whole, weights) = undisturbed(&job(), 2);
    // The very first line, another one, and between a line and the next.
    for armed in ["step.committed=kill", "step.noted=kill", "step.committed=3*off->kill", "step.swept=3*off->kill"] {
        let sandbox = stopped_at_12(&job(), 2);
        std::fs::remove_file(sandbox.path("metrics.jsonl")).unwrap();
        let marks = sandbox.path("marks");
        std::fs::create_dir(&marks).unwrap();
        let mut command = sandbox.command(Binary::Daemon);
        command.arg("run").arg(sandbox.write_job("again", &job())).args(["--devices", "cpu:2"]);
        command.env(VARIABLE, armed).env(MARKS_VARIABLE, &marks);
        sandbox.start(command).wait(Duration::from_secs(120)).expect_success();
        assert_eq!(std::fs::read_dir(&marks).unwrap().count(), 1, "{armed}: nobody died");
        assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&whole)[12..], "{armed}");
        assert_same_tensors(&read_tensors(&sandbox.path("model")), &weights, armed);
    }
}

/// A file with something else in it used to be emptied.
#[test]
fn a_metrics_file_that_is_somebody_elses_is_refused_and_not_touched() {
    let sandbox = Sandbox::new();
    let content = "step,loss\n1,2.5\n";
    let path = sandbox.file("metrics.jsonl", content);
    let refused = sandbox.run_job("foreign", &job(), "cpu:1");
    refused.expect_refusal(exit::OUTPUT, &["metrics.jsonl", "output.metrics", "step,loss"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    assert!(!sandbox.path("checkpoints").exists(), "it was refused before training");
}

fn wait_for_lines(process: &Process, metrics: &Path, count: usize) {
    let end = Instant::now() + Duration::from_secs(120);
    while std::fs::read_to_string(metrics).unwrap_or_default().lines().count() < count {
        assert!(Instant::now() < end, "no {count} steps in two minutes:\n{}", process.stderr());
        std::thread::sleep(Duration::from_millis(10));
    }
}
