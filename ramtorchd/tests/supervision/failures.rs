//! Workers that fail in every way.

use crate::bench::{Bench, wait_for, wait_state, watch};
use crate::fake::{Act, At, Script, fault};
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::v1::watch_event::Event;
use ramtorch_client::{Client, v1::JobState};
use ramtorch_worker::ErrorKind;
use std::time::{Duration, Instant};

/// The job must survive this: it succeeds after `restarts`, and no step is lost or done twice in the books.
async fn survives(script: Script, restarts: u32) {
    let (bench, mut client) = Bench::start(3, script).await;
    let id = client.submit(bench.job("survivor", 12, "")).await.unwrap().id;
    let job = wait_state(&mut client, &id, JobState::Succeeded).await;
    assert_eq!((job.step, job.restarts), (12, restarts), "{}", job.message);
    assert_eq!(steps(&mut client, &id).await, (1..=12).collect::<Vec<_>>());
    bench.end().await;
}

async fn steps(client: &mut Client, id: &str) -> Vec<u64> {
    watch(client, id).await.iter().filter_map(|e| if let Event::Metrics(m) = e { Some(m.step) } else { None }).collect()
}

/// The job must fail with this code, after so many restarts, and say this.
async fn fails(script: Script, kind: ErrorKind, restarts: u32, words: &[&str]) {
    let (bench, mut client) = Bench::start(2, script).await;
    let id = client.submit(bench.job("victim", 12, "")).await.unwrap().id;
    let job = wait_state(&mut client, &id, JobState::Failed).await;
    assert_eq!((job.exit_code, job.restarts), (u32::from(kind.exit_code()), restarts), "{}", job.message);
    for word in words {
        assert!(job.message.contains(word), "{word:?} is not in: {}", job.message);
    }
    assert!(bench.segments().is_empty());
    // The next job is none the worse for it.
    bench.script(&Script::quick());
    let next = client.submit(bench.job("next", 3, "")).await.unwrap().id;
    wait_state(&mut client, &next, JobState::Succeeded).await;
    bench.end().await;
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("a_worker_that_dies_before_its_first_call", || survives(Script::quick().with(fault(At::Birth(1), Act::Exit(7))), 1)),
        trial("three_workers_that_die_before_their_first_call", || survives(Script::quick().with(fault(At::Birth(3), Act::Signal(9))), 3)),
        trial("a_worker_that_crashes_while_loading", || {
            survives(Script::quick().with(fault(At::Load, Act::Signal(6)).rank(1).generation(1)), 1)
        }),
        trial("a_worker_that_is_killed_in_the_middle", || {
            survives(Script::quick().with(fault(At::Step(5), Act::Signal(9)).rank(0).generation(1)), 1)
        }),
        trial("another_rank_that_is_killed_in_the_middle", || {
            survives(Script::quick().with(fault(At::Step(5), Act::Signal(9)).rank(2).generation(1)), 1)
        }),
        trial("a_worker_that_panics", || survives(Script::quick().with(fault(At::Step(6), Act::Panic).rank(0).generation(1)), 1)),
        trial("a_worker_that_exits_without_a_word", || {
            survives(Script::quick().with(fault(At::Step(6), Act::Exit(0)).rank(0).generation(1)), 1)
        }),
        trial("a_worker_that_hangs", || async {
            // SIGSTOP: no heartbeat, no exit, no answer to SIGTERM.
            survives(Script::quick().with(fault(At::Step(4), Act::Signal(19)).rank(0).generation(1)), 1).await;
        }),
        trial("failures_with_progress_in_between_do_not_use_up_the_budget", || async {
            // Generation g dies before step g + 1 or a little later: six failures, each after a new step.
            let (bench, mut client) = Bench::start(1, Script::quick().with(fault(At::Everywhere, Act::Signal(9)))).await;
            let id = client.submit(bench.job("survivor", 12, "")).await.unwrap().id;
            let job = wait_for(&mut client, &id, "its end", |j| matches!(j.state(), JobState::Succeeded | JobState::Failed)).await;
            assert_eq!(job.state(), JobState::Succeeded, "{}", job.message);
            assert!(job.restarts > 3, "{}", job.restarts);
            bench.end().await;
        }),
        trial("the_budget_ends_and_the_first_cause_is_told", || {
            let script = Script::quick()
                .with(fault(At::Step(3), Act::Signal(6)).rank(1).generation(1))
                .with(fault(At::Step(3), Act::Exit(5)).rank(0).generation(2))
                .with(fault(At::Step(3), Act::Exit(5)).rank(0).generation(3))
                .with(fault(At::Step(3), Act::Exit(5)).rank(0).generation(4));
            fails(script, ErrorKind::Internal, 3, &["3 restart(s)", "rank 1 (cpu:1, pid ", "SIGABRT", "the last failure: rank 0"])
        }),
        trial("a_panic_is_told_with_its_place", || {
            fails(Script::quick().with(fault(At::Load, Act::Panic)), ErrorKind::Internal, 3, &["as the script says", "fake.rs:"])
        }),
        trial("the_last_lines_of_a_crashed_worker_are_told", || {
            fails(
                Script::quick().with(fault(At::Birth(99), Act::Exit(9))),
                ErrorKind::Internal,
                3,
                &["exited with code 9", "before its first call", "dying before the first call"],
            )
        }),
        trial("preparations_that_keep_crashing", || {
            fails(Script::quick().with(fault(At::Prepare, Act::Signal(9))), ErrorKind::Internal, 3, &["the preparing worker", "SIGKILL"])
        }),
        trial("the_first_sign_by_time_is_the_root_cause", || async {
            // Rank 1 dies; rank 0 notices a moment later and reports an error of its own.
            let script = Script { patience_ms: Some(30), ..Script::quick() }.with(fault(At::Step(3), Act::Signal(6)).rank(1));
            let mut bench = Bench::new(2, script);
            bench.settings.supervision.restart_budget = 0;
            bench.settings.supervision.settle_seconds = 0.5;
            let mut client = bench.up().await;
            let id = client.submit(bench.job("victim", 12, "")).await.unwrap().id;
            let job = wait_state(&mut client, &id, JobState::Failed).await;
            assert!(job.message.contains("rank 1") && job.message.contains("SIGABRT"), "{}", job.message);
            assert!(!job.message.contains("rank 0"), "{}", job.message);
            bench.end().await;
        }),
        trial("a_hang_is_noticed_in_time_and_named", || async {
            let script = Script { step_ms: 50, ..Script::default() }.with(fault(At::Step(20), Act::Signal(19)).rank(1));
            let mut bench = Bench::new(2, script);
            bench.settings.supervision.restart_budget = 0;
            let mut client = bench.up().await;
            let id = client.submit(bench.job("victim", 100, "")).await.unwrap().id;
            wait_for(&mut client, &id, "step 19", |j| j.step >= 19).await;
            let start = Instant::now();
            let job = wait_state(&mut client, &id, JobState::Failed).await;
            assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
            assert!(job.message.contains("no heartbeat") && job.message.contains("rank 1"), "{}", job.message);
            // The phase that was told last, of two that take turns quickly.
            assert!(job.message.contains("computing of step") || job.message.contains("reducing of step"), "{}", job.message);
            bench.end().await;
        }),
        trial("a_stuck_collective_is_noticed_and_the_rank_that_is_behind_is_named", || async {
            // Rank 1 sends heartbeats and does nothing; rank 0 waits for it.
            let script = Script { step_ms: 20, ..Script::default() }.with(fault(At::Step(30), Act::Linger).rank(1));
            let mut bench = Bench::new(2, script);
            bench.settings.supervision.restart_budget = 0;
            bench.settings.supervision.stall_timeout_seconds = Some(1.0);
            let mut client = bench.up().await;
            let id = client.submit(bench.job("victim", 100, "")).await.unwrap().id;
            wait_for(&mut client, &id, "step 29", |j| j.step >= 29).await;
            let start = Instant::now();
            let job = wait_state(&mut client, &id, JobState::Failed).await;
            assert!(start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());
            for word in ["rank 1 (cpu:1", "in phase computing of step 30 for", "rank 0 is in reducing of step 30"] {
                assert!(job.message.contains(word), "{word:?} is not in: {}", job.message);
            }
            bench.end().await;
        }),
        trial("a_stuck_collective_is_started_again", || async {
            let script = Script { step_ms: 20, ..Script::default() }.with(fault(At::Step(30), Act::Linger).rank(0).generation(1));
            let mut bench = Bench::new(2, script);
            bench.settings.supervision.stall_timeout_seconds = Some(1.0);
            let mut client = bench.up().await;
            let id = client.submit(bench.job("victim", 40, "")).await.unwrap().id;
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, job.restarts), (40, 1), "{}", job.message);
            bench.end().await;
        }),
        trial("a_worker_that_claims_a_step_that_it_has_not_made", || async {
            // Between two steps, past the end, and the same one again: none of it reaches the books.
            survives(
                Script::quick()
                    .with(fault(At::Step(5), Act::Claim(9)).rank(0).generation(1))
                    .with(fault(At::Step(6), Act::Claim(99)).rank(0).generation(2))
                    .with(fault(At::Step(8), Act::Claim(7)).rank(0).generation(3)),
                3,
            )
            .await;
        }),
        trial("a_worker_that_keeps_lying_ends_the_job", || {
            fails(
                Script::quick().with(fault(At::Step(2), Act::Claim(11)).rank(0)),
                ErrorKind::Internal,
                3,
                &["rank 0 (cpu:0", "says that step 11 is committed, right after step 1"],
            )
        }),
        trial("a_worker_whose_first_word_is_a_lie", || async {
            // The first report of each generation: it follows on nothing that this process said before.
            survives(
                Script::quick()
                    .with(fault(At::Step(1), Act::Claim(1)).rank(0).generation(1))
                    .with(fault(At::Step(1), Act::Claim(2)).rank(0).generation(2))
                    .with(fault(At::Step(1), Act::Claim(12)).rank(0).generation(3)),
                3,
            )
            .await;
        }),
        trial("lies_do_not_renew_the_budget", || {
            // Each generation claims one step more than the one before it.
            let lies = (1..=8).map(|g| fault(At::Step(1), Act::Claim(g)).rank(0).generation(g));
            let script = lies.fold(Script::quick(), Script::with);
            fails(script, ErrorKind::Internal, 3, &["says that step 1 is committed, and its parameter store is at step 0"])
        }),
        trial("a_worker_whose_heartbeat_is_a_lie", || async {
            survives(
                Script::quick()
                    .with(fault(At::Step(3), Act::Pretend(9)).rank(1).generation(1))
                    .with(fault(At::Step(4), Act::Pretend(13)).rank(0).generation(2)),
                2,
            )
            .await;
        }),
        trial("a_preparation_that_hangs_is_noticed", || async {
            // It sends heartbeats for ever.
            let mut bench = Bench::new(1, Script::quick().with(fault(At::Prepare, Act::Linger)));
            bench.settings.supervision.prepare_timeout_seconds = 1.0;
            bench.settings.supervision.restart_budget = 1;
            let mut client = bench.up().await;
            let id = client.submit(bench.job("victim", 12, "")).await.unwrap().id;
            let job = wait_state(&mut client, &id, JobState::Failed).await;
            assert!(job.restarts == 1 && job.message.contains("the preparing worker (cpu:0, pid "), "{}", job.message);
            assert!(job.message.contains("told of no progress for"), "{}", job.message);
            // Its devices are free again.
            bench.script(&Script::quick());
            let next = client.submit(bench.job("next", 3, "")).await.unwrap().id;
            wait_state(&mut client, &next, JobState::Succeeded).await;
            bench.end().await;
        }),
        trial("a_program_that_cannot_be_started", || async {
            let mut bench = Bench::new(1, Script::quick());
            bench.settings.worker.exe = "/no/such/program".into();
            let mut client = bench.up().await;
            let id = client.submit(bench.job("victim", 12, "")).await.unwrap().id;
            let job = wait_state(&mut client, &id, JobState::Failed).await;
            assert!(job.message.contains("/no/such/program"), "{}", job.message);
            bench.end().await;
        }),
    ];
    // Errors that no restart can mend, wherever they come from.
    trials.push(trial("errors_of_the_user_are_not_restarted", || async {
        for kind in [ErrorKind::JobFile, ErrorKind::Input, ErrorKind::Resources, ErrorKind::Output] {
            for at in [At::Prepare, At::Load, At::Step(5)] {
                let word = format!("{kind:?} as the script says");
                fails(Script::quick().with(fault(at, Act::Fail(kind))), kind, 0, &[&word]).await;
            }
        }
    }));
    trials
}
