//! Pages that are updated beside the backward pass, where gradients are not clipped: the numbers are those of pages that are
//! updated after it, and a death at any transition leaves a run that cannot be told from an undisturbed one.
//!
//! What each run is compared with is the same job with a clipping norm that no gradient reaches: its factor is 1 too, and its
//! pages wait until the norm is known.
#![allow(clippy::unwrap_used)]

use ramtorch_tests::disturbed::{Outcome, everything, run_into};
use ramtorch_tests::{Fixture, JobFile, Sandbox, losses, read_metrics};
use std::path::Path;
use std::sync::OnceLock;

const STEPS: usize = 16;
const NEVER_REACHED: f64 = 1e9;
/// Of a device: too few for all weights.
const SMALL: u64 = 310_000;

/// The jobs, and what is special about each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// fp32 on two ranks, each block at once.
    Plain,
    /// bf16 on one rank with tied embeddings; two groups of micro-batches, whose gradients add up in the segment.
    Tied,
    /// bf16 with fp32 gradients on three ranks, some of which own pages of the others' shares; weights gathered, and streamed through slots.
    Streamed,
}

fn job(kind: Kind) -> JobFile {
    let job = everything(STEPS).set("optimizer.clip_norm", 0.0).set("optimizer.early_updates", true);
    match kind {
        Kind::Plain => job,
        Kind::Tied => job
            .set("model.path", Fixture::model_path("llama-tied-llama3"))
            .set("train.precision", "bf16")
            .set("train.groups", 2)
            .set("device.ranks", 1),
        // Where memory is short, how fast this machine is at the time decides about groups, and they about the order of sums.
        Kind::Streamed => job
            .set("train.precision", "bf16")
            .set("train.gradients", "fp32")
            .set("train.groups", 2)
            .set("train.gather_weights", true)
            .set("device.ranks", 3)
            .set("device.memory_bytes", SMALL),
    }
}

/// The same job, with pages that wait until the norm is known.
fn late(job: &JobFile) -> JobFile {
    job.clone().set("optimizer.clip_norm", NEVER_REACHED).unset("optimizer.early_updates")
}

fn undisturbed(kind: Kind) -> &'static Outcome {
    static WHOLE: [OnceLock<Outcome>; 3] = [const { OnceLock::new() }; 3];
    WHOLE[kind as usize].get_or_init(|| Outcome::undisturbed(&late(&job(kind))))
}

/// Runs into what is armed; returns what its events tell.
#[track_caller]
fn survives(what: &str, kind: Kind, entries: &[&str]) -> String {
    let what = format!("{what} ({kind:?})");
    let (sandbox, told) = run_into(&what, &job(kind), entries);
    assert!(told.contains("the processor updates pages beside the backward pass"), "{what}: the plan");
    assert_eq!(told.contains("are streamed through"), kind == Kind::Streamed, "{what}: the plan");
    let first = |path: &Path| read_metrics(path)[0].initial_validation_loss.map(f64::to_bits);
    assert!(first(&sandbox.path("metrics.jsonl")).is_some(), "{what}: the validation before the first step");
    Outcome::read(&sandbox).assert_same(undisturbed(kind), &what);
    told
}

/// A test for each job and group of entries, which are armed in one run and fire once each.
macro_rules! groups {
    ($($name:ident: [$($entry:literal),+ $(,)?])+) => {
        $(
            mod $name {
                use super::*;
                const ENTRIES: &[&str] = &[$($entry),+];
                #[test]
                #[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
                fn plain() {
                    survives(stringify!($name), Kind::Plain, ENTRIES);
                }
                #[test]
                #[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
                fn tied() {
                    survives(stringify!($name), Kind::Tied, ENTRIES);
                }
                #[test]
                #[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
                fn streamed() {
                    survives(stringify!($name), Kind::Streamed, ENTRIES);
                }
            }
        )+
    };
}

// Many entries are sleeps: on a busy machine with blocks as small as these, the backward pass may be over before a page is begun.
groups! {
    deaths_before_the_first_page: ["step.updating=1*off->kill", "step.swept=1*off->sleep(60),step-record.filled=kill",
        "step.swept=2*off->sleep(60),early.begun=kill", "step.swept=3*off->sleep(60),early.kept=kill"]
    deaths_between_pages: ["step.swept=sleep(60),early.published=kill", "step.swept=1*off->sleep(60),early.begun=2*off->kill",
        "step.swept=2*off->sleep(60),early.kept=2*off->kill", "step.swept=3*off->sleep(60),page.written=2*off->kill",
        "step.swept=4*off->sleep(60),early.published=2*off->kill"]
    deaths_after_the_last_page: ["step.swept=sleep(100),early.closed=kill", "step.swept=1*off->sleep(100),step.reduced=kill",
        "step.swept=2*off->sleep(100),step.agreed=kill", "step.swept=1*off->sleep(50),step.recorded=kill",
        "optimizer.begun=2*off->kill", "step.committed=1*off->kill"]
    // Not too many in a row: without a new step in between, each waits longer than the one before.
    deaths_in_a_step_that_is_run_again: ["step.swept=1*off->sleep(60),early.published=2*off->kill,rerun.begun=kill,\
        rerun.loaded=1*off->kill,rerun.dropped=kill,step.forward=kill"]
    deaths_at_pages_of_a_step_that_is_run_again: ["step.swept=1*off->sleep(60),early.published=1*off->kill,step.swept=sleep(60),\
        early.kept=kill,step.swept=sleep(60),early.begun=kill,step.swept=sleep(60),early.closed=kill"]
    deaths_at_the_end_of_a_step_that_is_run_again: ["step.swept=1*off->sleep(60),early.published=1*off->kill,step.agreed=kill,\
        step.recorded=kill,recover.begun=kill,recover.updated=kill"]
    deaths_beside_a_checkpoint: ["checkpoint.pinned=sleep(150),early.published=kill",
        "checkpoint.page=1*off->sleep(150),step.swept=sleep(60),early.begun=kill,rerun.loaded=kill",
        "checkpoint.copied=1*off->sleep(100),early.published=1*off->kill"]
    deaths_of_the_supervisor: ["step.swept=1*off->sleep(60),early.published=1*off->sleep(100),job.step=kill",
        "early.begun=3*off->sleep(100),job.step=kill,job.step=1*off->kill,step.swept=1*off->sleep(60),early.kept=kill,job.backoff=kill"]
    stops_before_and_between_pages: ["step.updating=1*off->stop", "step.swept=1*off->sleep(60),early.begun=stop",
        "step.swept=2*off->sleep(60),early.kept=stop", "early.closed=4*off->stop"]
    stops_in_a_step_that_is_run_again: ["step.swept=1*off->sleep(60),early.published=2*off->kill,rerun.begun=stop,\
        rerun.loaded=1*off->stop,rerun.dropped=stop"]
    stops_errors_and_panics: ["step.swept=sleep(60),early.published=1*off->stop", "step.swept=1*off->sleep(60),early.kept=panic",
        "step.swept=2*off->sleep(60),early.begun=panic", "step.swept=3*off->panic", "early.closed=4*off->panic"]
}

/// An event says how far the pages were, and the checkpoint that was interrupted is written of the step that is run again.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn events_tell_what_happens() {
    let told = survives("events", Kind::Plain, &["step.swept=1*off->sleep(100),early.published=1*off->kill"]);
    let says = "pages had been updated beside its backward pass; it is run again with the weights that it began with";
    assert!(told.contains(says), "nobody says it");
    let told = survives("events", Kind::Plain, &["checkpoint.shard=sleep(300),early.published=kill"]);
    let interrupted: Vec<&str> = told.lines().filter(|l| l.contains("interrupted") && l.len() < 1000).collect();
    assert!(told.contains(says) && told.contains(" was interrupted; that of step "), "the checkpoint is owed: {interrupted:#?}");
}

/// Without a death: the same numbers as of late updates, on one rank and two, in every format that there is.
#[test]
fn numbers_are_those_of_late_updates() {
    for (model, precision, gradients, ranks, groups) in [
        ("llama", "fp32", "fp32", 1, 1),
        ("llama-tied-llama3", "fp32", "fp32", 2, 2),
        ("gpt2", "bf16", "bf16", 2, 1),
        ("qwen3", "bf16", "fp32", 1, 4),
        // No room for fp32 weights where gradients are: pages wait.
        ("llama", "fp32", "bf16", 2, 1),
    ] {
        let early = everything(6)
            .set("model.path", Fixture::model_path(model))
            .set("train.precision", precision)
            .set("train.gradients", gradients)
            .set("train.groups", groups)
            .set("device.ranks", ranks)
            .set("optimizer.clip_norm", 0.0)
            .set("optimizer.early_updates", true);
        let what = format!("{model} in {precision}, gradients in {gradients}, {ranks} ranks, {groups} groups");
        Outcome::undisturbed(&early).assert_same(&Outcome::undisturbed(&late(&early)), &what);
    }
}

/// Training that diverges ends as it does with late updates: at the same step, with the same words.
#[test]
fn divergence_is_told_as_ever() {
    let run = |job: &JobFile| {
        let sandbox = Sandbox::new();
        let job = job.clone().set("optimizer.lr", 1e30).unset("schedule.warmup_steps");
        let finished = sandbox.run_job("diverges", &job, "cpu:2");
        let said = format!("{}{}", finished.stdout, finished.stderr);
        let words = said.split("training has diverged").next().unwrap_or_default().rsplit("step ").next().unwrap_or_default().to_owned();
        assert!(finished.code != 0 && said.contains("training has diverged"), "{}: {said}", finished.code);
        let steps: Vec<u64> = losses(&read_metrics(&sandbox.path("metrics.jsonl"))).into_iter().map(f64::to_bits).collect();
        (finished.code, words, steps)
    };
    let early = job(Kind::Plain);
    assert_eq!(run(&early), run(&late(&early)));
}
