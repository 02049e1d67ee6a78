//! Cancelling in every state, and stopping the daemon whatever it does.

use crate::bench::{Bench, refused, wait_for, wait_state};
use crate::fake::{Act, At, FakeEngine, Script, fault};
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::{exit, v1::JobState};
use std::time::{Duration, Instant};

/// A bench whose job stays in the wanted state.
fn bench_for(state: &str) -> Bench {
    let slow = 30_000;
    let mut bench = Bench::new(2, Script::endless());
    match state {
        "preparing" => bench.script(&Script { prepare_ms: slow, ..Script::endless() }),
        "planning" => bench.engine = FakeEngine { plan_ms: 1500, ..FakeEngine::default() },
        "reserving" => bench.engine = FakeEngine { create_ms: 1500, ..FakeEngine::default() },
        "starting" => bench.script(&Script { load_ms: slow, ..Script::endless() }),
        "restarting" => {
            bench.settings.supervision.restart_backoff_seconds = 60.0;
            bench.script(&Script::endless().with(fault(At::Load, Act::Exit(3))));
        }
        "failing" => {
            bench.settings.supervision.settle_seconds = 60.0;
            bench.script(&Script::endless().with(fault(At::Load, Act::Exit(3)).rank(1)));
        }
        _ => {}
    }
    bench
}

fn is_in(state: &str, job: &ramtorch_client::v1::Job) -> bool {
    match state {
        "preparing" => job.state() == JobState::Preparing && job.workers.iter().any(|w| w.pid != 0),
        "planning" => job.message.contains("plan"),
        "reserving" => job.message.contains("reserves"),
        "starting" => job.state() == JobState::Starting && job.workers.iter().all(|w| w.phase == "loading"),
        "restarting" | "failing" => job.state() == JobState::Restarting && (state == "failing" || job.restarts == 2),
        _ => job.step > 1,
    }
}

const STATES: [&str; 7] = ["preparing", "planning", "reserving", "starting", "running", "restarting", "failing"];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("cancel_in_every_state", || async {
            for state in STATES {
                let mut bench = bench_for(state);
                let mut client = bench.up().await;
                let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
                wait_for(&mut client, &id, state, |j| is_in(state, j)).await;
                let start = Instant::now();
                let job = client.cancel(&id).await.unwrap();
                assert!(matches!(job.state(), JobState::Stopping | JobState::Cancelled), "{state}: {}", job.state().as_str_name());
                let job = wait_state(&mut client, &id, JobState::Cancelled).await;
                assert_eq!(job.exit_code, u32::from(exit::CANCELLED));
                assert!(start.elapsed() < Duration::from_secs(8), "{state}: {:?}", start.elapsed());
                assert!(bench.segments().is_empty() && bench.workers().is_empty(), "{state}");
                let (code, text) = refused(client.cancel(&id).await);
                assert!(code == exit::USAGE && text.contains("cancelled"), "{code} {text}");
                bench.end().await;
            }
        }),
        trial("cancel_while_waiting", || async {
            let (bench, mut client) = Bench::start(1, Script::endless()).await;
            let first = client.submit(bench.job("first", 100_000, "")).await.unwrap().id;
            let second = client.submit(bench.job("second", 5, "")).await.unwrap().id;
            assert_eq!(client.cancel(&second).await.unwrap().state(), JobState::Cancelled);
            client.cancel(&first).await.unwrap();
            wait_state(&mut client, &first, JobState::Cancelled).await;
            bench.end().await;
        }),
        trial("stop_the_daemon_in_every_state", || async {
            for state in STATES {
                let mut bench = bench_for(state);
                let mut client = bench.up().await;
                let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
                wait_for(&mut client, &id, state, |j| is_in(state, j)).await;
                bench.down().await;
                // Where it has made steps, they are kept; this job writes no checkpoints.
                bench.assert_kept(usize::from(state == "running"));
            }
        }),
        trial("workers_that_ignore_commands_and_sigterm_are_killed", || async {
            for cancel in [true, false] {
                let script = Script::endless().with(fault(At::Stop, Act::Linger));
                let mut bench = Bench::new(2, script);
                bench.stubborn();
                let mut client = bench.up().await;
                let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
                wait_for(&mut client, &id, "a step", |j| j.step > 1).await;
                if cancel {
                    client.cancel(&id).await.unwrap();
                    wait_state(&mut client, &id, JobState::Cancelled).await;
                }
                bench.down().await;
                bench.assert_kept(usize::from(!cancel));
            }
        }),
        trial("the_second_stop_does_not_wait", || async {
            let mut bench = Bench::new(2, Script::endless().with(fault(At::Stop, Act::Linger)));
            bench.settings.supervision.stop_timeout_seconds = 60.0;
            bench.stubborn();
            let mut client = bench.up().await;
            let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            wait_for(&mut client, &id, "a step", |j| j.step > 1).await;
            let start = Instant::now();
            client.shutdown().await.unwrap();
            bench.down().await;
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
            bench.assert_kept(1);
        }),
        trial("a_cancel_during_the_last_step", || async {
            let (bench, mut client) = Bench::start(1, Script { step_ms: 1500, ..Script::default() }).await;
            let id = client.submit(bench.job("one", 1, "")).await.unwrap().id;
            wait_for(&mut client, &id, "its last step", |j| j.workers.iter().any(|w| w.phase == "computing")).await;
            client.cancel(&id).await.unwrap();
            let job = wait_for(&mut client, &id, "its end", |j| matches!(j.state(), JobState::Succeeded | JobState::Cancelled)).await;
            assert_eq!((job.state(), job.step), (JobState::Cancelled, 0));
            bench.end().await;
        }),
        trial("nothing_new_is_taken_while_stopping", || async {
            let mut bench = Bench::new(1, Script::endless().with(fault(At::Stop, Act::Linger)));
            let mut client = bench.up().await;
            let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            wait_for(&mut client, &id, "a step", |j| j.step > 1).await;
            client.shutdown().await.unwrap();
            let (code, text) = refused(client.submit(bench.job("two", 1, "")).await);
            assert!(code == exit::UNREACHABLE && text.contains("stopping"), "{code} {text}");
            bench.down().await;
            assert_eq!(std::fs::read_dir(bench.settings.state_dir.join("jobs")).unwrap().count(), 1, "nothing is kept of it");
            bench.assert_kept(1);
        }),
    ]
}
