//! Processes die, stop or fail at every named point of the store, the step, the checkpoint writer and the supervisor; the
//! run cannot be told from one that was not disturbed, and nothing is left. Which points there are is in one list in the
//! code: one that no group below names, or that is never reached, fails a test. Runs in which processes are stopped are made
//! from that list.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use ramtorch_failpoint::{MARKS_VARIABLE, Point, Process, VARIABLE};
use ramtorch_tests::Sandbox;
use ramtorch_tests::disturbed::{Immortal, Outcome, everything, names, run_into, waking};
use std::sync::OnceLock;
use std::time::Duration;

const STEPS: usize = 16;
const LIMIT: Duration = Duration::from_secs(150);

/// Groups of points that are armed in one run each; an entry fires once in a run, in whichever process comes first.
macro_rules! groups {
    ($($name:ident: [$($entry:literal),+ $(,)?])+) => {
        const GROUPS: &[&[&str]] = &[$(&[$($entry),+]),+];
        $(
            #[test]
            #[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
            fn $name() {
                survives(stringify!($name), &[$($entry),+]);
            }
        )+
    };
}

groups! {
    deaths_while_a_gang_starts: ["prepare.done=kill", "rank.born=kill", "rank.registered=kill", "load.page=kill",
        "load.filled=kill", "load.recorded=kill"]
    deaths_in_a_sweep: ["step.forward=2*off->kill", "step.swept=2*off->kill", "step.reduced=1*off->kill", "step.agreed=2*off->kill",
        "step.agreed=3*off->kill", "step.swept=3*off->kill"]
    deaths_where_gradients_are_overwritten_before_the_commit: ["optimizer.updated=1*off->sleep(200),step.leaving=7*off->kill",
        "optimizer.agreed=3*off->sleep(200),step.swept=3*off->kill"]
    deaths_around_the_record: ["step.recorded=1*off->kill", "step.announced=1*off->kill", "step-record.begun=3*off->kill",
        "step-record.filled=4*off->kill", "step-record.published=5*off->kill", "step-record.filled=1*off->kill"]
    deaths_in_the_optimizer: ["optimizer.begun=2*off->kill", "page.begun=9*off->kill", "page.written=10*off->kill",
        "page.published=11*off->kill", "optimizer.updated=1*off->kill", "optimizer.agreed=1*off->kill"]
    deaths_around_the_line: ["step.committed=1*off->kill", "step.reported=2*off->kill", "validation.done=kill",
        "step.committed=4*off->kill", "validation.done=1*off->kill"]
    deaths_between_the_two_lines: ["step.noted=kill", "step.noted=3*off->kill", "step.noted=6*off->kill"]
    deaths_in_recovery: ["optimizer.begun=2*off->kill,recover.begun=kill", "optimizer.updated=4*off->kill,recover.updated=kill",
        "page.written=20*off->kill,recover.recorded=kill"]
    deaths_in_a_checkpoint: ["checkpoint.begun=kill", "checkpoint.shard=kill", "checkpoint.noted=kill", "checkpoint.named=kill",
        "checkpoint.latest=kill", "checkpoint.done=kill"]
    deaths_while_pages_are_copied: ["checkpoint.pinned=kill", "checkpoint.page=2*off->kill", "checkpoint.copied=kill",
        "checkpoint.agreed=kill", "checkpoint.pinned=1*off->kill"]
    deaths_of_training_while_a_checkpoint_is_written: ["checkpoint.begun=sleep(150),step.swept=kill",
        "checkpoint.copied=sleep(150),page.written=3*off->kill", "checkpoint.shard=1*off->sleep(150),step.committed=kill"]
    deaths_at_changes_of_files: ["file.change=kill", "file.change=6*off->kill", "file.change=13*off->kill", "file.change=20*off->kill",
        "file.change=27*off->kill", "file.change=34*off->kill", "file.change=41*off->kill"]
    deaths_at_the_end: ["export.done=kill", "rank.done=kill", "export.done=kill", "checkpoint.done=3*off->kill"]

    supervisor_deaths_around_a_segment: ["registry.begun=kill", "registry.written=kill", "registry.renamed=kill", "registry.durable=kill",
        "segment.created=kill", "segment.reserved=kill", "segment.described=kill", "segment.whole=kill"]
    supervisor_deaths_as_a_job_starts: ["job.submitted=kill", "job.preparing=kill", "job.planning=kill", "job.reserving=kill",
        "worker.spawning=kill", "worker.spawned=1*off->kill", "job.starting=kill", "job.running=kill"]
    supervisor_deaths_around_records: ["record.begun=kill", "record.written=kill", "record.renamed=kill", "record.durable=kill",
        "record.begun=2*off->kill", "record.written=3*off->kill", "record.renamed=4*off->kill", "record.durable=4*off->kill",
        "record.begun=3*off->kill", "record.durable=2*off->kill"]
    supervisor_deaths_in_training: ["job.step=2*off->kill", "job.step=1*off->kill,recovery.read=kill,recovery.ended=kill,recovery.swept=kill",
        "step.swept=1*off->kill,job.failing=kill", "step.agreed=1*off->kill,job.backoff=kill",
        "job.ended=kill"]
    supervisor_deaths_at_the_end: ["job.removing=kill", "segment.unlinking=kill", "segment.unlinked=kill", "registry.forgetting=kill",
        "registry.forgotten=kill"]

    stops_in_later_steps: ["step.swept=2*off->stop", "page.written=30*off->stop"]
    errors_and_panics: ["step.agreed=2*off->panic", "file.change=5*off->error", "optimizer.updated=2*off->panic",
        "record.written=3*off->error", "step.forward=3*off->sleep(300)", "checkpoint.copied=panic", "checkpoint.shard=1*off->panic"]
}

/// Points that [`a_successor_goes_on_where_the_daemon_was_asked_to_stop`] and [`a_stop_loses_nothing`] pass.
const OF_A_STOP: &[&str] = &["job.requeued"];

/// Points that a cancelled job passes: `an_answered_cancel_is_durable` in `ramtorchd/tests/supervision/recovery.rs`.
const OF_A_CANCEL: &[&str] = &["job.cancelling", "job.cancelled"];

/// Points that a job passes only where gradients are not clipped: `tests/early_updates.rs`.
const OF_EARLY_UPDATES: &[&str] =
    &["step.updating", "early.begun", "early.kept", "early.published", "early.closed", "rerun.begun", "rerun.loaded", "rerun.dropped"];

/// Points that a job passes only where state is held and written back at some steps: `tests/gradient_log.rs`.
const OF_A_LOG: &[&str] = &["recover.replayed"];

fn undisturbed() -> &'static Outcome {
    static WHOLE: OnceLock<Outcome> = OnceLock::new();
    WHOLE.get_or_init(|| Outcome::undisturbed(&everything(STEPS)))
}

#[track_caller]
fn survives(what: &str, entries: &[&str]) -> serde_json::Value {
    let sandbox = Sandbox::new();
    waking(&sandbox, || survives_in(&sandbox, what, entries))
}

#[track_caller]
fn survives_in(sandbox: &Sandbox, what: &str, entries: &[&str]) -> serde_json::Value {
    let whole = undisturbed();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let armed = entries.join(";");
    let mut daemon = Immortal::start(sandbox, &[(VARIABLE, &armed), (MARKS_VARIABLE, marks.to_str().unwrap())]);
    let id = daemon.submit(&everything(STEPS));
    let begun = std::time::Instant::now();
    let job = daemon.wait(&id, LIMIT, |_| {});
    eprintln!("{what}: {} lives, {:.1} s", daemon.lives, begun.elapsed().as_secs_f64());
    let fired = names(&marks);
    assert_eq!(job["state"], "succeeded", "{what}: after {fired:?}: {job:#}");
    let wanted: usize = entries.iter().map(|e| e.split(',').count()).sum();
    // The last daemon may have died after it told the end.
    let lives = daemon.lives;
    daemon.stop();
    let fired_at_all = names(&marks);
    assert_eq!(fired_at_all.len(), wanted, "{what}: only {fired_at_all:?} of {entries:?} were reached, in {lives} daemon(s)");
    Outcome::read(sandbox).assert_same(whole, what);
    job
}

/// Where a process is stopped at this point; what leads there, where the life of an undisturbed job does not. `None`: it is
/// stopped elsewhere.
fn stop_at(point: Point) -> Option<String> {
    let name = point.name();
    if [OF_A_STOP, OF_A_CANCEL, OF_EARLY_UPDATES, OF_A_LOG].concat().contains(&name) {
        return None;
    }
    let lead = match name {
        "recover.begun" => "optimizer.begun=2*off->kill,",
        "recover.updated" => "optimizer.updated=4*off->kill,",
        "recover.recorded" => "page.written=20*off->kill,",
        "recovery.read" | "recovery.ended" | "recovery.swept" => "job.step=1*off->kill,",
        "job.failing" | "job.backoff" => "step.swept=1*off->kill,",
        _ => "",
    };
    Some(format!("{lead}{name}=stop"))
}

/// Stops are waited out, so that there are several runs, each with every `of`-th point of these processes. A daemon that was
/// stopped goes on a second later; a worker does not, and its gang is started again.
#[track_caller]
fn survives_stops(daemons: bool, part: usize, of: usize) {
    let wanted = |p: &&Point| (p.process() == Process::Daemon) == daemons;
    let entries: Vec<String> = Point::ALL.iter().filter(wanted).filter_map(|p| stop_at(*p)).skip(part).step_by(of).collect();
    let entries: Vec<&str> = entries.iter().map(String::as_str).collect();
    let job = survives(&format!("stops, part {part}"), &entries);
    assert!(daemons || job["restarts"].as_u64() > Some(0), "workers that do not move were noticed: {job:#}");
}

macro_rules! stops {
    ($($name:ident: $daemons:literal, $part:literal of $of:literal;)+) => {$(
        #[test]
        #[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
        fn $name() {
            survives_stops($daemons, $part, $of);
        }
    )+};
}

stops! {
    stopped_workers_are_replaced_0: false, 0 of 6;
    stopped_workers_are_replaced_1: false, 1 of 6;
    stopped_workers_are_replaced_2: false, 2 of 6;
    stopped_workers_are_replaced_3: false, 3 of 6;
    stopped_workers_are_replaced_4: false, 4 of 6;
    stopped_workers_are_replaced_5: false, 5 of 6;
    a_stopped_supervisor_goes_on_0: true, 0 of 2;
    a_stopped_supervisor_goes_on_1: true, 1 of 2;
}

#[test]
fn every_point_is_in_a_group() {
    let named: Vec<&str> =
        GROUPS.iter().flat_map(|g| g.iter()).flat_map(|e| e.split(',')).filter_map(|e| Some(e.split_once('=')?.0)).collect();
    let elsewhere = [OF_A_STOP, OF_A_CANCEL, OF_EARLY_UPDATES, OF_A_LOG].concat();
    let missing: Vec<&str> = Point::ALL.iter().map(|p| p.name()).filter(|n| !named.contains(n) && !elsewhere.contains(n)).collect();
    assert!(missing.is_empty(), "no test lets a process die at {missing:?}");
}

/// The way in which an operator puts a new version under a running job; the first of the stops dies half-way.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_successor_goes_on_where_the_daemon_was_asked_to_stop() {
    let whole = Outcome::undisturbed(&everything(400));
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let mut daemon = Immortal::start(&sandbox, &[(VARIABLE, "job.requeued=kill"), (MARKS_VARIABLE, marks.to_str().unwrap())]);
    let id = daemon.submit(&everything(400));
    let mut segment = String::new();
    for stop in 1..=3u64 {
        let running = daemon.alive().wait_for_step(&id, stop * 60);
        let name = running["segment"].as_str().unwrap().to_owned();
        assert!(segment.is_empty() || segment == name, "the job goes on in the same segment");
        segment = name;
        daemon.alive().process().signal(Signal::SIGUSR2);
        let finished = daemon.ended(Duration::from_secs(20));
        assert_eq!(finished.code, if stop == 1 { 137 } else { 0 }, "{}", finished.stderr);
        assert!(std::path::Path::new("/dev/shm").join(segment.trim_start_matches('/')).exists(), "the segment is kept");
        assert!(ramtorch_tests::settled(|| sandbox.processes()).is_empty(), "no process is left between two daemons");
    }
    let job = daemon.wait(&id, LIMIT, |_| {});
    assert_eq!(job["state"], "succeeded", "{job:#}");
    assert_eq!(names(&marks), ["0-job.requeued"]);
    assert_eq!(job["restarts"], 0, "a stop is no failure");
    let prepared = names(&sandbox.path(&format!("state/jobs/{id}/logs"))).iter().filter(|n| n.starts_with("prepare")).count();
    assert_eq!(prepared, 1, "nothing is read from disk again");
    daemon.stop();
    Outcome::read(&sandbox).assert_same(&whole, "three daemons");
}

/// The daemon is stopped as a service is, while the checkpoint that is to save its job takes far too long; and later once more,
/// when it takes no time. Whoever comes next finds every step, in the store or in the checkpoint.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_stop_loses_nothing() {
    let job = everything(800).unset("checkpoint.every_steps");
    let whole = Outcome::undisturbed(&job);
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let armed = "checkpoint.begun=sleep(8000);job.requeued=stop";
    waking(&sandbox, || {
        let mut daemon = Immortal::start(&sandbox, &[(VARIABLE, armed), (MARKS_VARIABLE, marks.to_str().unwrap())]);
        let id = daemon.submit(&job);
        let log = |name: &str| names(&sandbox.path(&format!("state/jobs/{id}/logs"))).iter().filter(|n| n.starts_with(name)).count();
        for stop in 1..=2u64 {
            let running = daemon.alive().wait_for_step(&id, stop * 60);
            let segment = std::path::Path::new("/dev/shm").join(running["segment"].as_str().unwrap().trim_start_matches('/'));
            daemon.alive().process().signal(Signal::SIGTERM);
            let finished = daemon.ended(Duration::from_secs(30));
            assert_eq!(finished.code, 0, "{}", finished.stderr);
            assert_eq!(segment.exists(), stop == 1, "it stays while its steps are nowhere else: {}", finished.stderr);
            assert!(ramtorch_tests::settled(|| sandbox.processes()).is_empty(), "no process is left between two daemons");
            let next = daemon.alive().wait_for(&id, "going on", |j| j["state"] == "running" || j["state"] == "succeeded");
            assert!(next["step"].as_u64() >= Some(stop * 60), "{next:#}");
            assert_eq!(log("prepare"), if stop == 1 { 1 } else { 2 }, "read from disk again only where the checkpoint is");
        }
        let end = daemon.wait(&id, LIMIT, |_| {});
        assert_eq!(end["state"], "succeeded", "{end:#}");
        assert_eq!(end["restarts"], 0, "a stop is no failure");
        assert_eq!(names(&marks), ["0-checkpoint.begun", "1-job.requeued"]);
        daemon.stop();
    });
    Outcome::read(&sandbox).assert_same(&whole, "stopped twice");
}

/// A job that runs into one armed entry; returns its folder, and how many gangs there were.
#[track_caller]
fn disturbed_once(job: &ramtorch_tests::JobFile, armed: &str) -> (Sandbox, usize) {
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let mut daemon = Immortal::start(&sandbox, &[(VARIABLE, armed), (MARKS_VARIABLE, marks.to_str().unwrap())]);
    let id = daemon.submit(job);
    let end = daemon.wait(&id, LIMIT, |_| {});
    assert_eq!(end["state"], "succeeded", "{end:#}");
    assert_eq!(names(&marks).len(), armed.split(['\n', ',', ';']).count(), "{armed}");
    let gangs = names(&sandbox.path(&format!("state/jobs/{id}/logs"))).iter().filter(|n| n.starts_with("rank-0.")).count();
    daemon.stop();
    (sandbox, gangs)
}

/// The segment goes last. A daemon that died between its end and that of the job used to leave a job without a segment
/// that looked unfinished, and was run again.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_job_that_has_ended_is_not_run_again() {
    let job =
        everything(STEPS).unset("checkpoint.path").unset("checkpoint.every_steps").unset("checkpoint.at_end").unset("checkpoint.keep");
    for point in ["segment.unlinking", "segment.unlinked", "registry.forgotten", "job.ended"] {
        let (_sandbox, gangs) = disturbed_once(&job, &format!("{point}=kill"));
        assert_eq!(gangs, 1, "{point}");
    }
}

/// A gang used to be started before the record with its segment and generation was on the disk. On a slow disk, a daemon
/// that died then lost the segment, with every step in it.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_gang_waits_until_its_record_is_on_the_disk() {
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let slow: Vec<String> = (0..10).map(|n| format!("record.begun={n}*off->sleep(400)")).collect();
    let armed = format!("job.step=kill;{}", slow.join(";"));
    let mut daemon = Immortal::start(&sandbox, &[(VARIABLE, &armed), (MARKS_VARIABLE, marks.to_str().unwrap())]);
    let id = daemon.submit(&everything(STEPS));
    let job = daemon.wait(&id, LIMIT, |_| {});
    assert_eq!((job["state"].as_str(), daemon.lives), (Some("succeeded"), 2), "{job:#}");
    let logs = names(&sandbox.path(&format!("state/jobs/{id}/logs")));
    assert_eq!(logs.iter().filter(|n| n.starts_with("prepare")).count(), 1, "the second daemon knows the segment: {logs:?}");
    assert!(logs.contains(&"rank-0.g2.log".to_owned()), "and the generation: {logs:?}");
    daemon.stop();
    Outcome::read(&sandbox).assert_same(undisturbed(), "on a slow disk");
}

/// The step loop waits for pages that the optimizer's thread publishes, and that thread for what the loop tells it. A panic on either
/// side used to leave the other waiting until the supervisor noticed, minutes later, and nobody knew of the panic then.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_panic_ends_a_rank_whose_other_thread_waits_for_it() {
    // One rank: what panics while its gang is being ended for another reason tells nobody.
    let job = everything(STEPS).set("device.ranks", 1);
    let whole = Outcome::undisturbed(&job);
    // Behind the pages that are filled before the first step.
    let in_steps = [
        "optimizer.begun=1*off->panic",
        "page.begun=21*off->panic",
        "page.written=33*off->panic",
        "page.published=26*off->panic",
        "step.committed=3*off->panic",
    ];
    // The last of the checkpoints is a result of the job, for which the loop waits at its end.
    for entries in [&in_steps[..], &["checkpoint.pinned=panic"], &["checkpoint.agreed=panic"], &["checkpoint.agreed=3*off->panic"]] {
        let (sandbox, told) = run_into("panics", &job, entries);
        Outcome::read(&sandbox).assert_same(&whole, "panics");
        for entry in entries {
            let said = format!("panicked: fail point {}", entry.split_once('=').unwrap().0);
            assert!(told.contains(&said), "no rank ended with {said:?}");
        }
        assert!(!told.contains("a scoped thread panicked"), "a cause was lost");
    }
}

/// The checkpoint of a step whose gang died after the commit and before the checkpoint was whole used to be left out.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn an_interrupted_checkpoint_is_written_by_the_next_gang() {
    let job = everything(STEPS).unset("checkpoint.every_steps");
    for point in ["optimizer.agreed=15*off", "checkpoint.begun", "checkpoint.shard", "checkpoint.named"] {
        let armed = if point.contains('=') { format!("{point}->kill") } else { format!("{point}=kill") };
        let (sandbox, gangs) = disturbed_once(&job, &armed);
        assert_eq!((names(&sandbox.path("checkpoints")), gangs), (vec!["latest".to_owned(), "step-00000016".to_owned()], 2), "{point}");
    }
}

/// What the daemon shows of a job, to a watcher too, used to lack the steps that a worker had in hand when it died; without
/// `output.metrics` nothing else had them.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn the_daemon_knows_every_step_of_a_job_without_a_metrics_file() {
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let entries = ["step.committed=1*off->kill", "step.noted=2*off->kill", "step.reported=2*off->kill", "step.swept=3*off->kill"];
    let (armed, marks_path) = (entries.join(";"), marks.to_str().unwrap());
    let mut daemon = Immortal::start(&sandbox, &[(VARIABLE, &armed), (MARKS_VARIABLE, marks_path)]);
    let id = daemon.submit(&everything(STEPS).unset("output.metrics"));
    let watcher = daemon.alive().start_client(["--output", "json", "watch", &id]);
    let job = daemon.wait(&id, LIMIT, |_| {});
    assert_eq!((job["state"].as_str(), names(&marks).len()), (Some("succeeded"), entries.len()), "{job:#}");
    let seen = watcher.wait(LIMIT).expect_success();
    let again = daemon.alive().client(["--output", "json", "watch", &id]);
    let lives = daemon.lives;
    daemon.stop();
    for (who, text) in [("the watcher", seen.stdout), ("one who came late", again.stdout)] {
        let events = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let steps: Vec<u64> = events.filter_map(|e| e["metrics"]["step"].as_u64()).collect();
        assert_eq!(steps, (1..=STEPS as u64).collect::<Vec<_>>(), "{who}, of {lives} daemon(s)");
    }
    undisturbed().assert_same_history(&sandbox.path("state"));
}

/// A folder that a submission left that was never answered used to stay for ever, and to be warned of at each start.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_submission_that_was_never_answered_leaves_nothing() {
    let job = everything(STEPS);
    let (sandbox, _) = disturbed_once(&job, "record.written=kill");
    assert_eq!(names(&sandbox.path("state/jobs")).len(), 1);
}
