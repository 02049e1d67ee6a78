//! State that is held on a device and written back at some steps only: the numbers are those of state that is not held, and a
//! death, which takes with it what was not written back, leaves a run that cannot be told from an undisturbed one.
#![allow(clippy::unwrap_used)]

use ramtorch_tests::disturbed::{Outcome, everything, run_into};
use ramtorch_tests::{Fixture, JobFile};
use std::sync::OnceLock;

const STEPS: usize = 16;

/// The jobs, and what is special about each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// One rank, each page written back at every third step.
    Alone,
    /// Two ranks, which gather weights from one another's devices; tied embeddings; every fourth step.
    Two,
    /// Gradients are not clipped: pages that are not held go ahead of the step; two groups; every second step.
    Unclipped,
}

/// The job, with state in the segment alone.
fn plain(kind: Kind) -> JobFile {
    let job = everything(STEPS).set("train.precision", "bf16").set("device.ranks", 1);
    match kind {
        Kind::Alone => job,
        Kind::Two => job
            .set("model.path", Fixture::model_path("llama-tied-llama3"))
            .set("device.ranks", 2)
            .set("train.gather_weights", true)
            .set("train.gradients", "fp32"),
        Kind::Unclipped => job.set("optimizer.clip_norm", 0.0).set("train.groups", 2),
    }
}

fn held(kind: Kind) -> JobFile {
    let every = match kind {
        Kind::Alone => 3,
        Kind::Two => 4,
        Kind::Unclipped => 2,
    };
    let job = plain(kind).set("train.held_state_gib", 0.0005).set("train.write_back_steps", every);
    if kind == Kind::Unclipped { job.set("optimizer.early_updates", true) } else { job }
}

fn undisturbed(kind: Kind) -> &'static Outcome {
    static WHOLE: [OnceLock<Outcome>; 3] = [const { OnceLock::new() }; 3];
    WHOLE[kind as usize].get_or_init(|| Outcome::undisturbed(&plain(kind)))
}

/// Runs into what is armed; returns what its events tell.
#[track_caller]
fn survives(what: &str, kind: Kind, entries: &[&str]) -> String {
    let what = format!("{what} ({kind:?})");
    let (sandbox, told) = run_into(&what, &held(kind), entries);
    assert!(told.contains("stays on the device too") || told.contains("stay on the device too"), "{what}: the plan holds no page");
    assert!(told.contains("keep the gradients of the steps since"), "{what}: the plan has no log");
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
                fn alone() {
                    survives(stringify!($name), Kind::Alone, ENTRIES);
                }
                #[test]
                #[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
                fn two() {
                    survives(stringify!($name), Kind::Two, ENTRIES);
                }
                #[test]
                #[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
                fn unclipped() {
                    survives(stringify!($name), Kind::Unclipped, ENTRIES);
                }
            }
        )+
    };
}

groups! {
    deaths_in_the_sweeps: ["step.forward=2*off->kill", "step.leaving=9*off->kill", "step.swept=3*off->kill", "step.agreed=1*off->kill"]
    deaths_around_the_commit: ["step.recorded=2*off->kill", "optimizer.begun=1*off->kill", "optimizer.updated=2*off->kill",
        "step.committed=1*off->kill"]
    deaths_between_pages: ["page.begun=21*off->kill", "page.written=33*off->kill", "page.published=26*off->kill"]
    deaths_in_a_replay: ["step.swept=2*off->kill,recover.replayed=kill,recover.replayed=1*off->kill,page.written=1*off->kill"]
    deaths_before_the_rest_of_a_recovery: ["optimizer.begun=2*off->kill,recover.replayed=1*off->kill,recover.begun=kill,recover.updated=kill"]
    deaths_beside_a_checkpoint: ["checkpoint.pinned=kill", "checkpoint.page=1*off->kill", "checkpoint.shard=sleep(200),step.swept=kill"]
    deaths_of_the_supervisor: ["job.step=3*off->kill", "step.leaving=20*off->kill,job.backoff=kill"]
    stops_and_panics: ["step.swept=2*off->kill,recover.replayed=1*off->stop", "optimizer.updated=3*off->panic", "step.swept=4*off->panic"]
}

/// Without a death, and what an event says after one.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn numbers_are_those_of_state_that_is_not_held() {
    for kind in [Kind::Alone, Kind::Two, Kind::Unclipped] {
        Outcome::undisturbed(&held(kind)).assert_same(undisturbed(kind), &format!("{kind:?}"));
    }
    let told = survives("an event", Kind::Alone, &["step.swept=2*off->kill"]);
    assert!(told.contains("updates from the log of gradients"), "nobody says what was made again");
}
