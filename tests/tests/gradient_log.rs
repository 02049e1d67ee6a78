//! State that is held on a device and written back at some steps only: the numbers are those of state that is not held, and a
//! death, which takes with it what was not written back, leaves a run that cannot be told from an undisturbed one. So does state that
//! comes and goes at every step, where sums of gradients were.
#![allow(clippy::unwrap_used)]

use ramtorch_tests::disturbed::{Outcome, everything, run_into};
use ramtorch_tests::{Fixture, JobFile};
use std::path::PathBuf;
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
    /// Two groups, whose sums stay on the device: state of more pages comes and goes where they were. No log.
    Visited,
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
        Kind::Visited => job.unset("model.path").set("model.config", two_layers()).set("model.seed", 7).set("train.groups", 2),
    }
}

/// The configuration of a model that is nearly all layers: in half of a layer's sum there is room for a page, which is a sixteenth of all.
fn two_layers() -> PathBuf {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(Fixture::model_path("wide-llama").join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        (config["vocab_size"], config["eos_token_id"]) = (199.into(), 198.into());
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        folder
    };
    FOLDER.get_or_init(make).path().join("config.json")
}

fn held(kind: Kind) -> JobFile {
    let every = match kind {
        Kind::Alone => 3,
        Kind::Two => 4,
        Kind::Unclipped => 2,
        Kind::Visited => 1,
    };
    let gib = if kind == Kind::Visited { 0.002 } else { 0.0005 };
    let job = plain(kind).set("train.held_state_gib", gib).set("train.write_back_steps", every);
    if kind == Kind::Unclipped { job.set("optimizer.early_updates", true) } else { job }
}

fn undisturbed(kind: Kind) -> &'static Outcome {
    static WHOLE: [OnceLock<Outcome>; 4] = [const { OnceLock::new() }; 4];
    WHOLE[kind as usize].get_or_init(|| Outcome::undisturbed(&plain(kind)))
}

/// Runs into what is armed; returns what its events tell.
#[track_caller]
fn survives(what: &str, kind: Kind, entries: &[&str]) -> String {
    let what = format!("{what} ({kind:?})");
    let (sandbox, told) = run_into(&what, &held(kind), entries);
    assert!(told.contains("stays on the device too") || told.contains("stay on the device too"), "{what}: the plan holds no page");
    let (log, visits) = (told.contains("keep the gradients of the steps since"), told.contains("comes with the backward pass"));
    assert!(if kind == Kind::Visited { visits } else { log }, "{what}: the plan has no log, or no page visits");
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
    panics_between_pages: ["page.begun=21*off->panic", "page.written=33*off->panic"]
}

/// Without a death, and what an event says after one.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn numbers_are_those_of_state_that_is_not_held() {
    for kind in [Kind::Alone, Kind::Two, Kind::Unclipped, Kind::Visited] {
        Outcome::undisturbed(&held(kind)).assert_same(undisturbed(kind), &format!("{kind:?}"));
    }
    let told = survives("an event", Kind::Alone, &["step.swept=2*off->kill"]);
    assert!(told.contains("updates from the log of gradients"), "nobody says what was made again");
}

/// State of pages that comes and goes where sums of gradients were, which dies in all of its places.
macro_rules! visits {
    ($($name:ident: [$($entry:literal),+ $(,)?])+) => {
        mod visits {
            use super::*;
            $(
                #[test]
                #[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
                fn $name() {
                    survives(stringify!($name), Kind::Visited, &[$($entry),+]);
                }
            )+
        }
    };
}

visits! {
    die_in_the_sweeps: ["step.forward=2*off->kill", "step.leaving=9*off->kill", "step.leaving=12*off->kill", "step.swept=3*off->kill"]
    die_around_the_commit: ["step.agreed=1*off->kill", "step.recorded=2*off->kill", "optimizer.begun=1*off->kill",
        "optimizer.updated=2*off->kill", "step.committed=1*off->kill"]
    die_between_pages: ["page.begun=21*off->kill", "page.written=33*off->kill", "page.published=26*off->kill"]
    die_beside_a_checkpoint_and_with_the_supervisor: ["checkpoint.pinned=kill", "checkpoint.page=1*off->kill",
        "job.step=3*off->kill", "step.leaving=20*off->kill,job.backoff=kill"]
    stop_and_panic: ["step.leaving=7*off->stop", "optimizer.updated=3*off->panic", "step.swept=4*off->panic", "page.begun=30*off->panic",
        "page.written=45*off->panic"]
}

/// State that visits, beside pages that go ahead of their step, whose old weights lie in the segment: each dies among the other's.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn visits_beside_early_updates() {
    let late = plain(Kind::Visited).set("optimizer.clip_norm", 1e9);
    let early = held(Kind::Visited).set("optimizer.clip_norm", 0.0).set("optimizer.early_updates", true);
    let entries = [
        "step.swept=1*off->sleep(60),early.published=1*off->kill,rerun.dropped=kill",
        "step.swept=3*off->sleep(60),early.closed=kill",
        "optimizer.updated=2*off->kill",
        "checkpoint.page=1*off->sleep(150),step.swept=sleep(60),early.begun=kill",
    ];
    let (sandbox, told) = run_into("visits beside early updates", &early, &entries);
    assert!(told.contains("comes with the backward pass") && told.contains("the processor updates pages beside the backward pass"));
    Outcome::read(&sandbox).assert_same(&Outcome::undisturbed(&late), "visits beside early updates");
}
