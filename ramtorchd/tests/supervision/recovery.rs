//! Daemons that die, and those that come after them.

use crate::bench::{Bench, LIMIT, wait_for, wait_state};
use crate::fake::Script;
use crate::trial;
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ramtorch_client::Client;
use ramtorch_client::v1::JobState;
use ramtorch_store::Registry;
use ramtorchd::daemon::StartError;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A daemon in a process of its own.
struct Apart(Child);

impl Apart {
    async fn start(bench: &Bench, devices: u32, more: &[&str]) -> Apart {
        Apart::armed(bench, devices, more, "").await
    }

    /// One with these fail points.
    async fn armed(bench: &Bench, devices: u32, more: &[&str], points: &str) -> Apart {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("daemon").arg(bench.dir.path()).arg(devices.to_string()).args(more);
        command.env(ramtorch_failpoint::VARIABLE, points);
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let end = Instant::now() + LIMIT;
        while tokio::net::UnixStream::connect(&bench.settings.socket).await.is_err() {
            assert!(Instant::now() < end, "the daemon does not answer");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Apart(child)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        self.0.wait().unwrap()
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What rank 0, and the preparation before it, have printed.
async fn log(client: &mut Client, id: &str) -> String {
    let request = ramtorch_client::v1::LogsRequest { id: id.into(), rank: Some(0), ..Default::default() };
    let mut logs = client.logs(request).await.unwrap();
    let mut text = String::new();
    while let Some(chunk) = logs.next().await.unwrap() {
        text.push_str(&String::from_utf8_lossy(&chunk.data));
    }
    text
}

/// How often the job was prepared.
async fn prepared(client: &mut Client, id: &str) -> usize {
    log(client, id).await.matches("prepare ").count()
}

/// A folder in the way of a job's record: no record of it can be written while it is there, as on a disk without room.
struct InTheWay(std::path::PathBuf);

impl InTheWay {
    fn of(bench: &Bench, id: &str) -> InTheWay {
        let path = bench.settings.state_dir.join("jobs").join(id).join("job.tmp");
        let end = Instant::now() + LIMIT;
        // A record may be being written under this name.
        while std::fs::create_dir(&path).is_err() {
            assert!(Instant::now() < end, "{} is always in use", path.display());
        }
        InTheWay(path)
    }
}

impl Drop for InTheWay {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// A file system of half a megabyte.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn small(path: &std::path::Path) -> Option<Mounted> {
        std::fs::create_dir_all(path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=512k,mode=750", "none"]).arg(path).stderr(Stdio::null());
        mount.status().is_ok_and(|s| s.success()).then(|| Mounted(path.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "waited too long until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_killed_daemons_job_goes_on_from_its_segment", || async {
            let mut bench = Bench::new(2, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 2, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 150, "")).await.unwrap().id;
            let before = wait_for(&mut client, &id, "some steps", |j| j.step >= 20).await;
            let workers: Vec<i32> = before.workers.iter().map(|w| w.pid).collect();
            apart.signal(Signal::SIGKILL);
            apart.wait();
            until("the workers have died with it", || bench.workers().is_empty()).await;
            assert_eq!(bench.segments().len(), 1, "the segment outlives everybody");
            let mut client = bench.up().await;
            let after = wait_for(&mut client, &id, "a new step", |j| j.state() == JobState::Running).await;
            assert!(after.step >= 20 && after.workers.iter().all(|w| !workers.contains(&w.pid)), "{after:?}");
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, job.restarts), (150, 0));
            let text = log(&mut client, &id).await;
            assert_eq!(text.matches("prepare ").count(), 1, "nothing is prepared again: {text}");
            let resumed: Vec<&str> = text.lines().filter(|l| l.contains("attached at step")).collect();
            assert!(resumed.len() == 2 && !resumed[1].ends_with("step 0"), "{resumed:?}");
            bench.end().await;
        }),
        trial("a_job_whose_segment_is_gone_is_prepared_again", || async {
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 1, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 30, "")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            apart.signal(Signal::SIGKILL);
            apart.wait();
            until("the workers have died with it", || bench.workers().is_empty()).await;
            let segments = bench.segments();
            std::fs::remove_file(std::path::Path::new("/dev/shm").join(&segments[0])).unwrap();
            let mut client = bench.up().await;
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!(job.step, 30);
            bench.end().await;
        }),
        trial("sigterm_requeues_and_loses_nothing", || async {
            // The job writes no checkpoints: only its segment has its steps.
            let mut bench = Bench::new(2, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 2, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 60, "")).await.unwrap().id;
            let before = wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            let start = Instant::now();
            apart.signal(Signal::SIGTERM);
            assert!(apart.wait().success());
            assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
            bench.assert_kept(1);
            let mut client = bench.up().await;
            let after = wait_for(&mut client, &id, "going on", |j| j.state() == JobState::Running).await;
            assert!(after.step >= before.step && after.segment == before.segment, "{after:?}");
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!(job.step, 60);
            assert_eq!(prepared(&mut client, &id).await, 1, "nothing is prepared again");
            bench.end().await;
        }),
        trial("sigterm_leaves_nothing_of_a_job_whose_last_step_is_saved", || async {
            // Its workers write a checkpoint when they are told to; nothing of the segment is worth its memory then.
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 1, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 100_000, "[checkpoint]\npath = \"c\"\n")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            apart.signal(Signal::SIGTERM);
            assert!(apart.wait().success());
            bench.assert_clean();
            let mut client = bench.up().await;
            wait_for(&mut client, &id, "a new start", |j| j.state() == JobState::Running).await;
            assert_eq!(prepared(&mut client, &id).await, 2);
            bench.end().await;
        }),
        trial("sigterm_leaves_nothing_where_nothing_is_to_be_kept", || async {
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 1, &["never"]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 60, "")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            apart.signal(Signal::SIGTERM);
            assert!(apart.wait().success());
            bench.assert_clean();
            let mut client = bench.up().await;
            wait_state(&mut client, &id, JobState::Succeeded).await;
            bench.end().await;
        }),
        trial("a_stop_that_keeps_segments_is_gone_on_from", || async {
            let mut bench = Bench::new(2, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 2, &["keep"]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 150, "")).await.unwrap().id;
            let before = wait_for(&mut client, &id, "some steps", |j| j.step >= 10).await;
            apart.signal(Signal::SIGTERM);
            assert!(apart.wait().success());
            assert_eq!((bench.segments().len(), bench.workers().len()), (1, 0));
            let mut client = bench.up().await;
            let after = wait_for(&mut client, &id, "going on", |j| j.state() == JobState::Running).await;
            assert!(after.step >= before.step && after.segment == before.segment);
            wait_state(&mut client, &id, JobState::Succeeded).await;
            bench.end().await;
        }),
        trial("a_job_that_this_daemon_cannot_serve_waits_with_its_segment", || async {
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 2, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("wide", 200, "")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            apart.signal(Signal::SIGKILL);
            apart.wait();
            let mut client = bench.up().await;
            let job = client.get(&id).await.unwrap();
            assert!(job.state() == JobState::Queued && job.message.contains("2 device(s)"), "{}", job.message);
            assert_eq!(bench.segments().len(), 1, "nothing is lost");
            // It is in nobody's way.
            let other = client.submit(bench.job("narrow", 3, "")).await.unwrap().id;
            wait_state(&mut client, &other, JobState::Succeeded).await;
            client.cancel(&id).await.unwrap();
            wait_state(&mut client, &id, JobState::Cancelled).await;
            assert!(bench.segments().is_empty());
            bench.end().await;
        }),
        trial("a_cancelled_job_stays_cancelled", || async {
            let mut bench = Bench::new(1, Script::endless());
            bench.stubborn();
            let mut apart = Apart::start(&bench, 1, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            wait_for(&mut client, &id, "a step", |j| j.step >= 1).await;
            // Frozen, so that the cancel cannot be carried out before the daemon dies.
            for pid in bench.workers() {
                kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
            }
            client.cancel(&id).await.unwrap();
            apart.signal(Signal::SIGKILL);
            apart.wait();
            let mut client = bench.up().await;
            assert_eq!(wait_state(&mut client, &id, JobState::Cancelled).await.id, id);
            bench.end().await;
        }),
        trial("an_answered_cancel_is_durable", || async {
            if !ramtorch_failpoint::COMPILED_IN {
                return;
            }
            // Both a job that runs and one that waits; the daemon dies before the answer, on either side of the disk.
            for (point, queued) in [("job.cancelling", false), ("job.cancelled", false), ("job.cancelling", true), ("job.cancelled", true)]
            {
                let mut bench = Bench::new(1, Script::endless());
                let mut apart = Apart::armed(&bench, 1, &[], &format!("{point}=kill")).await;
                let mut client = bench.client().await;
                let first = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
                wait_for(&mut client, &first, "a step", |j| j.step >= 1).await;
                let second = client.submit(bench.job("two", 100_000, "")).await.unwrap().id;
                let id = if queued { second } else { first };
                client.cancel(&id).await.unwrap_err();
                assert!(!apart.wait().success(), "{point}");
                until("the workers have died with it", || bench.workers().is_empty()).await;
                let mut client = bench.up().await;
                let job = client.get(&id).await.unwrap();
                match point {
                    "job.cancelled" => assert_eq!(wait_state(&mut client, &id, JobState::Cancelled).await.id, id),
                    // Nobody was told that it is: it goes on.
                    _ => assert!(!matches!(job.state(), JobState::Cancelled | JobState::Stopping), "{point} {}", job.message),
                }
                bench.end().await;
            }
        }),
        trial("a_cancel_that_cannot_be_noted_is_not_answered_with_success", || async {
            let (bench, mut client) = Bench::start(1, Script::endless()).await;
            let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            wait_for(&mut client, &id, "a step", |j| j.step >= 1).await;
            let obstacle = InTheWay::of(&bench, &id);
            let (code, text) = crate::bench::refused(client.cancel(&id).await);
            assert!(code == ramtorch_client::exit::OUTPUT && text.contains("could not be noted"), "{code} {text}");
            drop(obstacle);
            wait_state(&mut client, &id, JobState::Cancelled).await;
            bench.end().await;
        }),
        trial("a_full_state_folder_costs_no_restart_and_no_step", || async {
            let mut script = Script { step_ms: 20, ..Script::default() };
            script.load_ms = 1;
            let (bench, mut client) = Bench::start(2, script).await;
            let id = client.submit(bench.job("one", 100, "")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 10).await;
            let obstacle = InTheWay::of(&bench, &id);
            kill(Pid::from_raw(bench.workers()[0]), Signal::SIGKILL).unwrap();
            let waits = |j: &ramtorch_client::v1::Job| j.message.contains("waits for room in the state folder");
            let job = wait_for(&mut client, &id, "room", waits).await;
            assert!(job.message.contains("job.json cannot be written"), "{}", job.message);
            // Longer than the whole budget of restarts lasts.
            tokio::time::sleep(Duration::from_secs(7)).await;
            let job = wait_for(&mut client, &id, "room", waits).await;
            assert_eq!((job.restarts, bench.segments().len(), job.step >= 10), (1, 1, true), "{}", job.message);
            drop(obstacle);
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, job.restarts), (100, 1), "{}", job.message);
            assert_eq!(prepared(&mut client, &id).await, 1, "it goes on from its segment");
            let logs = std::fs::read_dir(bench.settings.state_dir.join("jobs").join(&id).join("logs")).unwrap();
            let newest = logs.flatten().any(|e| e.file_name() == "rank-0.g2.log");
            assert!(newest, "no generation is used up by gangs that were not started");
            bench.end().await;
        }),
        trial("a_disk_without_room_is_waited_for", || async {
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let state = bench.settings.state_dir.clone();
            let Some(_mounted) = Mounted::small(&state) else {
                eprintln!("SKIPPED a_disk_without_room_is_waited_for: nothing can be mounted here; run it as root");
                return;
            };
            let mut client = bench.up().await;
            let id = client.submit(bench.job("one", 100, "")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 10).await;
            let filler = state.join("filler");
            let mut file = std::fs::File::create(&filler).unwrap();
            while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
            drop(file);
            for pid in bench.workers() {
                // It may have met the full disk by itself.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let waits = |j: &ramtorch_client::v1::Job| j.message.contains("waits for room in the state folder");
            let job = wait_for(&mut client, &id, "room", waits).await;
            assert!(job.message.contains("No space left on device"), "{}", job.message);
            tokio::time::sleep(Duration::from_secs(4)).await;
            let job = wait_for(&mut client, &id, "room", waits).await;
            assert_eq!((job.restarts, bench.segments().len()), (1, 1), "{}", job.message);
            std::fs::remove_file(&filler).unwrap();
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, job.restarts, prepared(&mut client, &id).await), (100, 1, 1), "{}", job.message);
            bench.down().await;
            bench.assert_clean();
        }),
        trial("a_store_that_cannot_be_registered_is_waited_for", || async {
            let (bench, mut client) = Bench::start(1, Script::quick()).await;
            let (registry, away) = (bench.settings.state_dir.join("segments"), bench.settings.state_dir.join("away"));
            std::fs::rename(&registry, &away).unwrap();
            std::fs::write(&registry, "in the way").unwrap();
            let id = client.submit(bench.job("one", 5, "")).await.unwrap().id;
            wait_for(&mut client, &id, "room", |j| j.message.contains("waits for room in the state folder")).await;
            assert!(bench.segments().is_empty(), "nothing is made that no list has");
            std::fs::remove_file(&registry).unwrap();
            std::fs::rename(&away, &registry).unwrap();
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, job.restarts), (5, 0), "{}", job.message);
            bench.end().await;
        }),
        trial("a_segment_goes_when_the_end_of_its_job_is_on_the_disk_and_not_before", || async {
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let kept = "its parameter store is kept meanwhile: it waits for room in the state folder";
            // With a daemon that sees room again, and with one that is stopped before.
            for stops in [false, true] {
                let mut apart = Apart::start(&bench, 1, &[]).await;
                let mut client = bench.client().await;
                let id = client.submit(bench.job("one", 40, "")).await.unwrap().id;
                wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
                let obstacle = InTheWay::of(&bench, &id);
                let job = wait_for(&mut client, &id, "its end", |j| j.message.contains(kept)).await;
                assert!(job.message.starts_with("finished after step 40"), "{}", job.message);
                assert_eq!(bench.segments().len(), 1);
                if stops {
                    apart.signal(Signal::SIGTERM);
                    apart.wait();
                    assert_eq!(bench.segments().len(), 1, "the next daemon knows nothing of the end but by the segment");
                    drop(obstacle);
                    let mut client = bench.up().await;
                    let job = wait_state(&mut client, &id, JobState::Succeeded).await;
                    assert_eq!((job.step, prepared(&mut client, &id).await), (40, 1));
                    bench.down().await;
                } else {
                    drop(obstacle);
                    let job = wait_state(&mut client, &id, JobState::Succeeded).await;
                    assert_eq!(job.message, "finished after step 40");
                    apart.signal(Signal::SIGTERM);
                    assert!(apart.wait().success());
                }
                bench.assert_clean();
            }
        }),
        trial("a_job_whose_checkpoints_are_gone_is_not_begun_anew", || async {
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 1, &["never"]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 100_000, "[checkpoint]\npath = \"c\"\n")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            client.checkpoint(&id).await.unwrap();
            let history = bench.settings.state_dir.join("jobs").join(&id).join("metrics.jsonl");
            apart.signal(Signal::SIGTERM);
            assert!(apart.wait().success());
            let lines = std::fs::read_to_string(&history).unwrap();
            // Their file system is not mounted.
            std::fs::rename(bench.dir.path().join("c"), bench.dir.path().join("away")).unwrap();
            let mut client = bench.up().await;
            let job = wait_state(&mut client, &id, JobState::Failed).await;
            assert_eq!(job.exit_code, u32::from(ramtorch_client::exit::INPUT), "{}", job.message);
            for word in ["/c/step-", "of step ", "mount it, and submit the job again", "another name"] {
                assert!(job.message.contains(word), "{word:?} is not in: {}", job.message);
            }
            assert_eq!(std::fs::read_to_string(&history).unwrap(), lines, "nothing is cut");
            bench.end().await;
        }),
        trial("a_second_daemon_is_refused", || async {
            let (bench, mut client) = Bench::start(1, Script::quick()).await;
            let again = |socket: &str, state: &str| {
                let mut other = Bench::new(1, Script::quick());
                other.settings = bench.settings.clone();
                other.settings.socket = bench.dir.path().join(socket);
                other.settings.state_dir = bench.dir.path().join(state);
                other
            };
            for (socket, state) in [("d.sock", "state"), ("other.sock", "state"), ("d.sock", "other")] {
                let error = again(socket, state).try_up().await.unwrap_err();
                assert_eq!(error.exit_code(), ramtorch_client::exit::ALREADY_RUNNING, "{error}");
                assert!(error.to_string().contains("stop it"), "{error}");
            }
            let id = client.submit(bench.job("one", 2, "")).await.unwrap().id;
            wait_state(&mut client, &id, JobState::Succeeded).await;
            bench.end().await;
        }),
        trial("a_segment_of_another_version_waits_for_a_program_that_knows_it", || async {
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 1, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 60, "")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            apart.signal(Signal::SIGKILL);
            apart.wait();
            until("the workers have died with it", || bench.workers().is_empty()).await;
            let segment = std::path::Path::new("/dev/shm").join(&bench.segments()[0]);
            let mine = std::fs::read(&segment).unwrap();
            let mut other = mine.clone();
            other[..16].copy_from_slice(&[*b"RAMTORCH", 99u64.to_le_bytes()].concat());
            std::fs::write(&segment, &other).unwrap();
            for _ in 0..2 {
                // Neither a start nor a stop touches it, and others run meanwhile.
                let mut client = bench.up().await;
                let job = client.get(&id).await.unwrap();
                assert_eq!(job.state(), JobState::Queued, "{}", job.message);
                for word in ["version 99", "start the ramtorchd that made it", "cancel the job"] {
                    assert!(job.message.contains(word), "{word:?} is not in: {}", job.message);
                }
                let narrow = client.submit(bench.job("narrow", 3, "")).await.unwrap().id;
                wait_state(&mut client, &narrow, JobState::Succeeded).await;
                bench.down().await;
                bench.assert_kept(1);
                assert!(std::fs::read(&segment).unwrap() == other, "nobody wrote to it");
            }
            // The program that made it comes back.
            std::fs::write(&segment, &mine).unwrap();
            let mut client = bench.up().await;
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, prepared(&mut client, &id).await), (60, 1));
            bench.end().await;
        }),
        trial("what_outlived_a_daemon_is_ended_and_nobody_else", || async {
            let mut bench = Bench::new(1, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 1, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 60, "")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            apart.signal(Signal::SIGKILL);
            apart.wait();
            until("the workers have died with it", || bench.workers().is_empty()).await;
            let path = bench.settings.state_dir.join("jobs").join(&id).join("job.json");
            // A process that has the pid of a worker, and one that is a worker: known by when it was started.
            let mut sleepers: Vec<Child> = (0..2).map(|_| Command::new("sleep").arg("600").spawn().unwrap()).collect();
            let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            let boot_id = record["segment"]["boot_id"].as_str().unwrap().to_owned();
            let workers = sleepers.iter().zip([1, 0]).map(|(sleeper, earlier)| {
                let stat = std::fs::read_to_string(format!("/proc/{}/stat", sleeper.id())).unwrap();
                let started: u64 = stat.split_whitespace().nth(21).unwrap().parse().unwrap();
                let identity = serde_json::json!({ "pid": sleeper.id(), "start_ticks": started - earlier, "boot_id": boot_id });
                serde_json::json!({ "identity": identity, "device": "cpu:0" })
            });
            record["workers"] = workers.collect();
            std::fs::write(&path, record.to_string()).unwrap();
            let mut client = bench.up().await;
            assert_eq!(sleepers[0].try_wait().unwrap(), None, "an innocent process");
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&sleepers[1].wait().unwrap()), Some(9));
            sleepers[0].kill().unwrap();
            sleepers[0].wait().unwrap();
            wait_state(&mut client, &id, JobState::Succeeded).await;
            bench.end().await;
        }),
        trial("stale_sockets_and_damaged_records_are_no_obstacle", || async {
            let mut bench = Bench::new(1, Script::quick());
            drop(std::os::unix::net::UnixListener::bind(&bench.settings.socket).unwrap());
            let damaged = bench.settings.state_dir.join("jobs/damaged");
            std::fs::create_dir_all(&damaged).unwrap();
            std::fs::write(damaged.join("job.json"), "{\"version\":1").unwrap();
            // Its segment is the only copy of what it has trained; another one has no job at all.
            let registry = Registry::open(bench.settings.state_dir.join("segments")).unwrap();
            let name = |job: &str| format!("ramtorch-{job}-1.{}", std::process::id());
            for job in ["damaged", "forgotten"] {
                registry.register(&name(job), job, 1, 4).unwrap();
                std::fs::write(std::path::Path::new("/dev/shm").join(name(job)), job).unwrap();
            }
            let there = |job: &str| std::path::Path::new("/dev/shm").join(name(job)).exists();
            let mut client = bench.up().await;
            assert!(client.list(true).await.unwrap().is_empty());
            assert_eq!((there("damaged"), there("forgotten")), (true, false));
            bench.down().await;
            assert!(damaged.join("job.json").exists(), "what is not understood is left alone");
            assert!(there("damaged") && registry.list().unwrap().len() == 1, "and its segment with it");
            // Given up by its user, as the log says.
            std::fs::remove_dir_all(&damaged).unwrap();
            bench.up().await;
            bench.down().await;
            assert!(!there("damaged") && registry.list().unwrap().is_empty());
            // A file that is no socket is not replaced.
            std::fs::write(&bench.settings.socket, "mine").unwrap();
            assert!(matches!(bench.try_up().await, Err(StartError::Socket(_))));
            assert_eq!(std::fs::read(&bench.settings.socket).unwrap(), b"mine");
        }),
    ]
}
