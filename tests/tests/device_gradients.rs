//! Gradients that stay on the device: the numbers are those of gradients in the segment, and a death at any transition leaves
//! a run that cannot be told from an undisturbed one, though it may go back to a checkpoint.
#![allow(clippy::unwrap_used)]

use ramtorch_failpoint::{MARKS_VARIABLE, VARIABLE};
use ramtorch_tests::disturbed::{Immortal, Outcome, everything, names};
use ramtorch_tests::{Fixture, JobFile, Sandbox, assert_same_tensors, losses, read_metrics, read_tensors, worst_relative_difference};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

const STEPS: usize = 16;
const LIMIT: Duration = Duration::from_secs(150);

fn on_device(job: JobFile) -> JobFile {
    job.set("train.gradients_in", "device").set("device.ranks", 1)
}

/// All text in files below `folder`.
fn text_below(folder: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            text += &text_below(&path);
        } else {
            text += &String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default());
        }
    }
    text
}

#[test]
fn losses_are_those_of_gradients_in_the_segment() {
    let job = Fixture::load("llama")
        .job("place")
        .set("output.path", "model")
        .set("data.shuffle", true)
        .set("train.batch_size", 7)
        .set("train.micro_batch_size", 2)
        .set("train.steps", 12)
        .set("device.ranks", 1);
    let run = |job: &JobFile| {
        let sandbox = Sandbox::new();
        sandbox.run_job("place", job, "cpu:1").expect_success();
        (read_metrics(&sandbox.path("metrics.jsonl")), read_tensors(&sandbox.path("model")))
    };
    for precision in ["fp32", "bf16"] {
        let job = job.clone().set("train.precision", precision).set("train.groups", 1);
        let (segment, device) = (run(&job.clone().set("train.gradients_in", "segment")), run(&on_device(job)));
        let bits = |lines: &[_]| losses(lines).into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&device.0), bits(&segment.0), "{precision}");
        let norms = |lines: &[ramtorch_tests::MetricsLine]| lines.iter().map(|l| l.grad_norm).collect::<Vec<_>>();
        // The device adds squares up in another order, in fp64.
        assert!(worst_relative_difference(&norms(&device.0), &norms(&segment.0)).1 < 1e-13, "{precision}");
        assert_same_tensors(&device.1, &segment.1, precision);
    }
    // Several groups add up in the sums that stay.
    let one = run(&job.clone().set("train.groups", 1));
    let several = run(&on_device(job.clone().set("train.groups", 3)));
    assert!(worst_relative_difference(&losses(&several.0), &losses(&one.0)).1 < 1e-5);
}

#[test]
fn several_ranks_are_refused() {
    let sandbox = Sandbox::new();
    let job = Fixture::load("llama").job("many").set("train.gradients_in", "device");
    let finished = sandbox.run_job("many", &job, "cpu:2");
    let said = format!("{}{}", finished.stdout, finished.stderr);
    assert!(finished.code != 0 && said.contains("for one rank alone"), "{}: {said}", finished.code);
}

fn job() -> JobFile {
    on_device(everything(STEPS))
}

fn undisturbed() -> &'static Outcome {
    static WHOLE: OnceLock<Outcome> = OnceLock::new();
    WHOLE.get_or_init(|| Outcome::undisturbed(&job()))
}

/// Runs into what is armed; `says`: what its events tell.
#[track_caller]
fn survives(what: &str, job: &JobFile, whole: &Outcome, entries: &[&str], says: &[&str]) -> String {
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let armed = entries.join(";");
    let mut daemon = Immortal::start(&sandbox, &[(VARIABLE, &armed), (MARKS_VARIABLE, marks.to_str().unwrap())]);
    let id = daemon.submit(job);
    let end = daemon.wait(&id, LIMIT, |_| {});
    assert_eq!(end["state"], "succeeded", "{what}: {end:#}");
    let told = text_below(&sandbox.path(&format!("state/jobs/{id}"))) + &end.to_string();
    daemon.stop();
    let fired = names(&marks);
    let wanted: usize = entries.iter().map(|e| e.split(',').count()).sum();
    assert_eq!(fired.len(), wanted, "{what}: only {fired:?} of {entries:?} were reached");
    for text in says {
        assert!(told.contains(text), "{what}: nobody says {text:?}\n{told}");
    }
    Outcome::read(&sandbox).assert_same(whole, what);
    told
}

/// No page is at the new step: it is run again, and nothing is lost.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn deaths_before_the_first_page() {
    let entries = [
        "step.forward=2*off->kill",
        "step.swept=2*off->kill",
        "step.recorded=1*off->kill",
        "step.announced=1*off->kill",
        "optimizer.begun=2*off->kill",
        "optimizer.begun=1*off->kill,recover.begun=kill",
        "optimizer.begun=3*off->kill,recover.recorded=kill",
    ];
    let says = ["before a page was updated", "a death while pages are updated goes back to the last checkpoint"];
    let told = survives("before", &job(), undisturbed(), &entries, &says);
    assert!(!told.contains("went back"), "{told}");
}

/// Every page is at the new step: nothing is lost.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn deaths_after_the_last_page() {
    let entries = [
        "optimizer.updated=1*off->kill",
        "optimizer.agreed=2*off->kill",
        "step.committed=1*off->kill",
        "step.reported=2*off->kill",
        "optimizer.updated=4*off->kill,recover.recorded=kill",
    ];
    let told = survives("after", &job(), undisturbed(), &entries, &["after every page was updated; nothing is lost"]);
    assert!(!told.contains("went back"), "{told}");
}

/// Some pages are: back to the last checkpoint, also where the way back is disturbed.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn deaths_between_pages() {
    let back = |told: &str| (4..STEPS).any(|step| told.contains(&format!("went back to step {step}, checkpoint")));
    // Before a checkpoint, and after one.
    let entries = [
        "optimizer.begun=1*off->sleep(1),page.written=1*off->kill",
        "checkpoint.done=sleep(1),optimizer.begun=sleep(1),page.published=2*off->kill",
    ];
    let says = ["were), and its gradients were on the device", "went back to step 0, the beginning"];
    let told = survives("between", &job(), undisturbed(), &entries, &says);
    assert!(back(&told), "{told}");
    let entries =
        ["checkpoint.done=sleep(1),optimizer.begun=sleep(1),page.published=3*off->kill,recover.recorded=kill,load.page=2*off->kill,\
        load.filled=kill,load.recorded=kill"];
    let told = survives("on the way back", &job(), undisturbed(), &entries, &["were), and its gradients were on the device"]);
    assert!(back(&told), "{told}");
}

/// Without a checkpoint of this segment there is the beginning alone, whatever another run has left in the folder.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn without_a_checkpoint_it_begins_again() {
    let none = ["checkpoint.path", "checkpoint.every_steps", "checkpoint.at_end", "checkpoint.keep"].iter().fold(job(), |j, k| j.unset(k));
    let whole = Outcome::undisturbed(&none);
    let entries = ["optimizer.begun=6*off->sleep(1),page.published=3*off->kill"];
    survives("begun again", &none, &whole, &entries, &["this job writes none", "went back to step 0, the beginning"]);
}
