//! Daemons that die, and those that come after them.

use crate::bench::{Bench, LIMIT, wait_for, wait_state};
use crate::fake::Script;
use crate::trial;
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ramtorch_client::v1::JobState;
use ramtorchd::daemon::StartError;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A daemon in a process of its own.
struct Apart(Child);

impl Apart {
    async fn start(bench: &Bench, devices: u32, more: &[&str]) -> Apart {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("daemon").arg(bench.dir.path()).arg(devices.to_string()).args(more);
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
            let logs = client.logs(ramtorch_client::v1::LogsRequest { id: id.clone(), rank: Some(0), ..Default::default() }).await;
            let mut logs = logs.unwrap();
            let mut text = String::new();
            while let Some(chunk) = logs.next().await.unwrap() {
                text.push_str(&String::from_utf8_lossy(&chunk.data));
            }
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
        trial("sigterm_requeues_and_leaves_nothing", || async {
            let mut bench = Bench::new(2, Script { step_ms: 20, ..Script::default() });
            let mut apart = Apart::start(&bench, 2, &[]).await;
            let mut client = bench.client().await;
            let id = client.submit(bench.job("one", 60, "")).await.unwrap().id;
            wait_for(&mut client, &id, "some steps", |j| j.step >= 5).await;
            let start = Instant::now();
            apart.signal(Signal::SIGTERM);
            assert!(apart.wait().success());
            assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
            bench.assert_clean();
            let mut client = bench.up().await;
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!(job.step, 60);
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
            tokio::time::sleep(Duration::from_millis(300)).await;
            apart.signal(Signal::SIGKILL);
            apart.wait();
            let mut client = bench.up().await;
            assert_eq!(wait_state(&mut client, &id, JobState::Cancelled).await.id, id);
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
        trial("stale_sockets_and_damaged_records_are_no_obstacle", || async {
            let mut bench = Bench::new(1, Script::quick());
            drop(std::os::unix::net::UnixListener::bind(&bench.settings.socket).unwrap());
            let damaged = bench.settings.state_dir.join("jobs/damaged");
            std::fs::create_dir_all(&damaged).unwrap();
            std::fs::write(damaged.join("job.json"), "{\"version\":1").unwrap();
            let mut client = bench.up().await;
            assert!(client.list(true).await.unwrap().is_empty());
            bench.down().await;
            assert!(damaged.join("job.json").exists(), "what is not understood is left alone");
            // A file that is no socket is not replaced.
            std::fs::write(&bench.settings.socket, "mine").unwrap();
            assert!(matches!(bench.try_up().await, Err(StartError::Socket(_))));
            assert_eq!(std::fs::read(&bench.settings.socket).unwrap(), b"mine");
        }),
    ]
}
