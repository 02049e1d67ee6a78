//! Checkpoints that are written beside training: what they cost it, what becomes of them when the disk is full, when the
//! gang dies meanwhile, and when the machine is started again.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use ramtorch_failpoint::{MARKS_VARIABLE, VARIABLE};
use ramtorch_tests::disturbed::{Immortal, Outcome, everything, names};
use ramtorch_tests::{
    Binary, Daemon, Fixture, JobFile, MetricsLine, Sandbox, assert_same_tensors, bits, read_metrics, read_tensors, settled,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(120);

fn waited(lines: &[MetricsLine]) -> Vec<f64> {
    lines.iter().map(|l| l.rest["checkpoint_wait_seconds"].as_f64().unwrap()).collect()
}

/// A disk that answers after half a second only: with room for a copy nobody waits for it, without any the next optimizer
/// does, and the numbers are the same in both cases, and those of a run without checkpoints.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn training_goes_on_while_a_checkpoint_is_written() {
    let whole = Sandbox::new();
    let job = everything(12).set("checkpoint.every_steps", 6);
    whole.run_job("whole", &job.clone().unset("checkpoint.every_steps").set("checkpoint.at_end", false), "cpu:2").expect_success();
    let run = |job: &JobFile| {
        let sandbox = Sandbox::new();
        let path = sandbox.write_job("slow", job);
        let mut command = sandbox.command(Binary::Daemon);
        command.arg("run").arg(path).args(["--devices", "cpu:2"]).env(VARIABLE, "checkpoint.begun=sleep(500)");
        let finished = sandbox.start(command).wait(LIMIT).expect_success();
        let lines = read_metrics(&sandbox.path("metrics.jsonl"));
        assert_eq!(bits(&lines), bits(&read_metrics(&whole.path("metrics.jsonl"))));
        assert_same_tensors(&read_tensors(&sandbox.path("model")), &read_tensors(&whole.path("model")), "the model folder");
        let said = finished.text();
        assert!(said.contains("checkpoint of step 6: ") && said.contains("the optimizer stood still for "), "{said}");
        waited(&lines)
    };
    let direct = run(&job.clone().set("checkpoint.staging_gib", 0.0));
    assert!(direct[6] > 0.3, "step 7 would have overwritten what step 6 left: {direct:?}");
    assert!(direct.iter().enumerate().all(|(i, w)| i == 6 || *w < 0.3), "{direct:?}");
    let staged = run(&job);
    assert!(staged.iter().all(|w| *w < 0.3), "{staged:?}");
}

/// The gang dies at a later step while a checkpoint is written: one of that later step takes its place, and this is said.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_checkpoint_that_was_interrupted_is_written_of_a_later_step() {
    let job = everything(18).set("checkpoint.every_steps", 8).set("checkpoint.at_end", false).set("checkpoint.keep", 0);
    let whole = Outcome::undisturbed(&job);
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    // Both ranks pass `step.announced` five times and more before the checkpoint of step 8 gets to the disk.
    let armed = "checkpoint.begun=sleep(2000);step.announced=12*off->kill";
    let mut daemon = Immortal::start(&sandbox, &[(VARIABLE, armed), (MARKS_VARIABLE, marks.to_str().unwrap())]);
    let id = daemon.submit(&job);
    let ended = daemon.wait(&id, LIMIT, |_| {});
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    let said = daemon.alive().process().stderr();
    let later = "the checkpoint of step 8 was interrupted; that of step 1";
    assert!(said.contains(later) && said.contains("is written in its place now"), "{said}");
    daemon.stop();
    let there = names(&sandbox.path("checkpoints"));
    assert!(there.len() == 3 && there.contains(&"step-00000016".to_string()), "in place of 8, then 16: {there:?}");
    let lines = read_metrics(&sandbox.path("metrics.jsonl"));
    assert_eq!(lines.len(), 18);
    Outcome::read(&sandbox).assert_same_run(&whole, "after the death");
}

/// The disk has room for one checkpoint and no second: the first stays although `keep` is 1, and training goes on.
#[test]
fn a_disk_with_room_for_one_keeps_the_one() {
    let sandbox = Sandbox::new();
    let job = Fixture::load("llama").job("full").set("train.steps", 8).set("checkpoint.path", "small/c");
    let job = job.set("checkpoint.every_steps", 3).set("checkpoint.keep", 1);
    let measure = Sandbox::new();
    measure.run_job("measure", &job.clone().set("checkpoint.path", "c").set("checkpoint.every_steps", 8), "cpu:2").expect_success();
    let folder = measure.path("c/step-00000008");
    let bytes: u64 = std::fs::read_dir(folder).unwrap().flatten().map(|e| e.metadata().unwrap().len().next_multiple_of(4096)).sum();
    std::fs::create_dir(sandbox.path("small")).unwrap();
    let mount = format!("mount -t tmpfs -o size={} none small", bytes * 3 / 2);
    if !sandbox.can_mount(&mount) {
        return;
    }
    let file = sandbox.write_job("full", &job);
    let daemon = ramtorch_tests::binary(Binary::Daemon);
    let script = format!("{mount}; {} run {} --devices cpu:2; ls small/c; cat small/c/latest", daemon.display(), file.display());
    let finished = sandbox.start(sandbox.namespace(&script)).wait(LIMIT).expect_success();
    sandbox.assert_clean();
    let said = finished.text();
    assert!(said.contains("checkpoint of step 6 failed, training goes on") && said.contains("free"), "{said}");
    assert!(said.ends_with("latest\nstep-00000003\nstep-00000003\n") || said.contains("latest\nstep-00000003\nstep-00000003\n"), "{said}");
    assert_eq!(read_metrics(&sandbox.path("metrics.jsonl")).len(), 8);
}

/// The disk under `output.metrics` is full from the first step on, also for the gang that follows one that was killed, and has room
/// again before the end: training goes on, and no line is missing or there twice.
#[test]
fn a_full_disk_under_the_metrics_ends_no_training() {
    let job = everything(150);
    let (sandbox, whole) = (Sandbox::new(), Sandbox::new());
    let mount = "mount -t tmpfs -o size=256k none small";
    std::fs::create_dir(sandbox.path("small")).unwrap();
    if !sandbox.can_mount(mount) {
        return;
    }
    whole.run_job("whole", &job, "cpu:2").expect_success();
    let file = sandbox.write_job("full", &job.set("output.metrics", "small/metrics.jsonl"));
    let daemon = ramtorch_tests::binary(Binary::Daemon);
    let script = format!(
        "{mount}; head -c 300000 /dev/zero > small/fill || true; {} run {} --devices cpu:2 > log 2>&1 & pid=$!
         until [ $(grep -c 'rank 0: warn: metrics file' log) -ge 2 ]; do kill -0 $pid || break; sleep 0.05; done
         rm small/fill; wait $pid || {{ cat log; exit 1; }}; cat log; cp small/metrics.jsonl metrics.jsonl",
        daemon.display(),
        file.display()
    );
    // The tmpfs is there before anything runs in the background.
    let script = script.replacen("; head", "\nhead", 1).replacen("|| true; ", "|| true\n", 1);
    std::fs::create_dir(sandbox.path("marks")).unwrap();
    let mut command = sandbox.namespace(&script);
    command.env(VARIABLE, "step.announced=12*off->kill").env(MARKS_VARIABLE, sandbox.path("marks"));
    let said = sandbox.start(command).wait(LIMIT).expect_success().text();
    assert!(said.contains("No space left") && said.contains("is written again"), "{said}");
    assert_eq!(bits(&read_metrics(&sandbox.path("metrics.jsonl"))), bits(&read_metrics(&whole.path("metrics.jsonl"))));
}

/// Power is cut, and the machine comes back: another boot id, no shared memory, pids that are somebody else's. The daemon is
/// started by nobody's hand but its service manager's, and the job goes on from its newest sound checkpoint, to the bit.
#[test]
fn after_a_reboot_the_job_goes_on_from_its_newest_sound_checkpoint() {
    let job = everything(300).set("checkpoint.every_steps", 10).set("checkpoint.keep", 3);
    let whole = Outcome::undisturbed(&job);
    for damaged in [false, true] {
        let sandbox = Sandbox::new();
        let mut daemon = sandbox.start_daemon("cpu:2", &[]);
        let id = daemon.submit("rebooted", &job);
        daemon.wait_for(&id, "checkpoints", |j| j["step"].as_u64() >= Some(60));
        let name = daemon.job(&id)["segment"].as_str().unwrap().to_owned();
        daemon.process().signal(Signal::SIGKILL);
        drop(daemon);
        assert!(settled(|| sandbox.processes()).is_empty(), "workers outlive their daemon");
        let reached = read_metrics(&sandbox.path("metrics.jsonl")).len();

        std::fs::remove_file(Path::new("/dev/shm").join(name.trim_start_matches('/'))).unwrap();
        let mut innocent = sandbox.prepare(Command::new("sleep")).arg("100").spawn().unwrap();
        another_boot(&sandbox.path("state"), innocent.id(), 4);
        let checkpoints = checkpoints(&sandbox.path("checkpoints"));
        let newest = checkpoints.last().unwrap();
        if damaged {
            damage(newest);
        }

        let mut daemon = sandbox.start_daemon("cpu:2", &[]);
        let ended = daemon.wait_for_state(&id, "succeeded");
        assert_eq!(ended["restarts"], 0, "{ended:#}");
        let said = daemon.process().stderr();
        assert!(said.contains("parameter store is gone; it is prepared again, from its newest checkpoint"), "{said}");
        let named = newest.file_name().unwrap().to_str().unwrap();
        assert_eq!(said.contains(&format!("{named} is not used")), damaged, "the damaged one is named: {said}");
        assert!(innocent.try_wait().unwrap().is_none(), "a process that has an old worker's pid is not ended");
        innocent.kill().unwrap();
        innocent.wait().unwrap();
        daemon.stop();
        eprintln!("{reached} steps before, {} checkpoints there", checkpoints.len());
        Outcome::read(&sandbox).assert_same_run(&whole, "after the reboot");
    }
}

/// The line of a step waits for its validation; a checkpoint of the same step does not. Where power was cut in between, the step used
/// to be missing from the metrics for good.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn after_a_reboot_no_line_is_missing_although_its_checkpoint_was_whole_before_it() {
    let job = everything(16).set("train.validate_every", 10).set("checkpoint.every_steps", 10);
    let whole = Outcome::undisturbed_on(&job, "cpu:1");
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    // The rank waits before its line until the checkpoint is on the disk, and dies; so does the daemon, before it has another gang.
    let armed = "validation.done=sleep(3000);checkpoint.done=sleep(1),validation.done=kill,job.failing=kill";
    let environment = [(VARIABLE, armed), (MARKS_VARIABLE, marks.to_str().unwrap())].map(|(k, v)| (k.to_string(), v.to_string()));
    let mut daemon = Daemon::try_start(&sandbox, "cpu:1", &[], &environment).unwrap();
    let id = daemon.submit("rebooted", &job);
    let name = daemon.wait_for(&id, "a segment", |j| j["segment"] != "")["segment"].as_str().unwrap().to_owned();
    assert!(settled_with(Duration::from_secs(60), || daemon.process().has_ended()), "nobody died");
    drop(daemon);
    assert!(settled(|| sandbox.processes()).is_empty(), "workers outlive their daemon");
    assert_eq!(names(&marks).len(), 4, "{:?}", names(&marks));
    assert!(sandbox.path("checkpoints/step-00000010").is_dir());
    assert_eq!(read_metrics(&sandbox.path("metrics.jsonl")).len(), 9);

    std::fs::remove_file(Path::new("/dev/shm").join(name.trim_start_matches('/'))).unwrap();
    another_boot(&sandbox.path("state"), std::process::id(), 2);
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    daemon.wait_for_state(&id, "succeeded");
    daemon.stop();
    Outcome::read(&sandbox).assert_same(&whole, "after the reboot");
}

/// Everything dies at one point of the first checkpoint, before the supervisor knows of it, and the machine is started again. Returns
/// where it ran and the job.
#[track_caller]
fn dies_at_the_first_checkpoint(job: &JobFile, point: &str) -> (Sandbox, String) {
    let sandbox = Sandbox::new();
    let marks = sandbox.path("marks");
    std::fs::create_dir(&marks).unwrap();
    let armed = format!("{point}=kill,job.failing=kill");
    let environment = [(VARIABLE, armed.as_str()), (MARKS_VARIABLE, marks.to_str().unwrap())].map(|(k, v)| (k.to_string(), v.to_string()));
    let mut daemon = Daemon::try_start(&sandbox, "cpu:1", &[], &environment).unwrap();
    let id = daemon.submit("rebooted", job);
    let name = daemon.wait_for(&id, "a segment", |j| j["segment"] != "")["segment"].as_str().unwrap().to_owned();
    assert!(settled_with(Duration::from_secs(60), || daemon.process().has_ended()), "nobody died");
    drop(daemon);
    assert!(settled(|| sandbox.processes()).is_empty(), "workers outlive their daemon");
    assert_eq!(names(&marks).len(), 2, "{point}: {:?}", names(&marks));
    std::fs::remove_file(Path::new("/dev/shm").join(name.trim_start_matches('/'))).unwrap();
    another_boot(&sandbox.path("state"), std::process::id(), 2);
    (sandbox, id)
}

/// Between the name of a first checkpoint and the record of it, a reboot after which the checkpoints' disk was not mounted used to
/// begin the job anew, and to cut its metrics to nothing.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn a_first_checkpoint_that_nobody_was_told_of_is_not_begun_over() {
    let job = everything(16);
    let whole = Outcome::undisturbed_on(&job, "cpu:1");
    for (point, found) in [("checkpoint.named", "step-00000004"), ("checkpoint.noted", "step-00000004.partial")] {
        let (sandbox, id) = dies_at_the_first_checkpoint(&job, point);
        let (there, away) = (sandbox.path("checkpoints"), sandbox.path("unmounted"));
        assert!(names(&there).contains(&found.to_string()), "{point}: {:?}", names(&there));
        let lines = std::fs::read(sandbox.path("metrics.jsonl")).unwrap();
        assert!(!lines.is_empty());
        for empty in [false, true] {
            // The folder is not there, or is the empty one that the file system is mounted on.
            std::fs::rename(&there, &away).unwrap();
            if empty {
                std::fs::create_dir(&there).unwrap();
            }
            let daemon = sandbox.start_daemon("cpu:1", &[]);
            let ended = daemon.wait_for_state(&id, "failed");
            let said = ended["message"].as_str().unwrap();
            assert!(ended["exit_code"] == 11 && said.contains("of step 4") && said.contains("mount it"), "{point}: {ended:#}");
            daemon.stop();
            assert!(std::fs::read(sandbox.path("metrics.jsonl")).unwrap() == lines, "{point}: the lines are as they were");
            if empty {
                std::fs::remove_dir(&there).unwrap();
            }
            std::fs::rename(&away, &there).unwrap();
            revive(&sandbox.path("state"), &id);
        }
        // Mounted again: from the checkpoint, or, where that never got its name, from the beginning.
        let mut daemon = sandbox.start_daemon("cpu:1", &[]);
        daemon.wait_for_state(&id, "succeeded");
        let begun = daemon.process().stderr().contains("resuming from step 4");
        assert_eq!(begun, point == "checkpoint.named", "{point}");
        daemon.stop();
        Outcome::read(&sandbox).assert_same(&whole, point);
    }
}

/// The file system behind a link is not there when a gang starts: it is waited for, and nothing is written in its place.
#[test]
fn a_gang_waits_for_outputs_whose_file_system_is_late() {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.path("mounted")).unwrap();
    std::os::unix::fs::symlink(sandbox.path("mounted"), sandbox.path("data")).unwrap();
    let job = everything(400).set("checkpoint.path", "data/checkpoints").set("output.path", "data/model");
    let mut daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("late", &job);
    daemon.wait_for_step(&id, 20);
    std::fs::rename(sandbox.path("mounted"), sandbox.path("unmounted")).unwrap();
    let rank = |line: &str| line.contains(" worker");
    let (pid, _) = sandbox.processes().into_iter().find(|(_, line)| rank(line)).expect("a worker");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let waits = "data/checkpoints: ";
    let mut said = String::new();
    let told = settled_with(Duration::from_secs(60), || {
        said = daemon.process().stderr();
        said.contains(waits) && said.contains("it is looked for again, for 600 s at most")
    });
    assert!(told, "nobody says it: {said}");
    assert!(!sandbox.path("mounted").exists(), "nothing is made in its place");
    std::fs::rename(sandbox.path("unmounted"), sandbox.path("mounted")).unwrap();
    let ended = daemon.wait_for_state(&id, "succeeded");
    assert_eq!(ended["restarts"], 1, "{ended:#}");
    assert!(daemon.process().stderr().contains("outputs are where they were again, after "));
    daemon.stop();
    assert_eq!(read_metrics(&sandbox.path("metrics.jsonl")).len(), 400);
    assert!(sandbox.path("mounted/model").is_dir() && !names(&sandbox.path("mounted/checkpoints")).is_empty());
}

/// A job that has failed is unfinished again.
fn revive(state: &Path, id: &str) {
    let path = state.join("jobs").join(id).join("job.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    record["state"] = "active".into();
    std::fs::write(&path, record.to_string()).unwrap();
}

/// Whether it comes true in time.
fn settled_with(limit: Duration, mut look: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !look() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Makes everything that a daemon has written down of an earlier boot, and its workers' pids another process's. A segment, its
/// registration and each worker are of a boot.
fn another_boot(state: &Path, pid: u32, least: usize) {
    let now = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let mut changed = 0;
    let mut folders = vec![state.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().flatten().map(|e| e.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "json") {
                let text = std::fs::read_to_string(&path).unwrap();
                changed += text.matches(now.trim()).count();
                let mut json: Value = serde_json::from_str(&text.replace(now.trim(), "01234567-89ab-cdef-0123-456789abcdef")).unwrap();
                for worker in json.get_mut("workers").and_then(Value::as_array_mut).into_iter().flatten() {
                    worker["identity"]["pid"] = pid.into();
                }
                std::fs::write(&path, json.to_string()).unwrap();
            }
        }
    }
    assert!(changed >= least, "{changed} names of the boot");
}

/// Folders of checkpoints, oldest first.
fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    names(folder).iter().filter(|n| n.starts_with("step-") && !n.contains('.')).map(|n| folder.join(n)).collect()
}

/// Changes one bit of a checkpoint's first file.
fn damage(checkpoint: &Path) {
    let file = checkpoint.join(names(checkpoint).into_iter().find(|n| n.starts_with("shard-")).unwrap());
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.len() - 1000;
    bytes[at] ^= 1;
    std::fs::write(&file, bytes).unwrap();
}

/// Asked for while others are being written, each is answered when it is on the disk.
#[test]
fn requests_are_answered_when_the_checkpoint_is_durable() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("asked", &everything(100_000).set("checkpoint.every_steps", 3).set("checkpoint.keep", 2));
    daemon.wait_for(&id, "a step", |j| j["step"].as_u64() >= Some(2));
    let begun = Instant::now();
    let mut last = 0;
    for _ in 0..5 {
        let answer = daemon.ask(["checkpoint", &id]);
        let (path, step) = (answer["path"].as_str().unwrap(), answer["step"].as_u64().unwrap());
        assert!(step > last && path.ends_with(&format!("step-{step:08}")), "{answer}");
        last = step;
    }
    assert!(begun.elapsed() < LIMIT);
    daemon.client(["cancel", &id]).expect_success();
    daemon.wait_for_state(&id, "cancelled");
    daemon.stop();
    let left = names(&sandbox.path("checkpoints"));
    assert!(left.iter().all(|n| !n.contains("partial")), "nothing unfinished: {left:?}");
}
