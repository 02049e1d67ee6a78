//! The state task alone, without processes, files or real time: whatever order things happen in, nothing is forgotten.

use super::message::{Message, Planned};
use super::rig::{Bench, fits, to_work};
use super::*;
use crate::process::Status;
use nix::sys::signal::Signal;
use pb::worker_report::Report;
use proptest::prelude::*;
use ramtorch_worker::{EngineError, ErrorKind};
use tokio::sync::oneshot;

#[test]
fn a_process_that_outlives_sigkill_costs_its_device_and_nothing_else() {
    let mut bench = Bench::new(3);
    let id = bench.submit(2);
    let gang = to_work(&mut bench);
    assert_eq!(bench.view(&id).state(), pb::JobState::Running);
    // Rank 1 falls silent and cannot be killed; rank 0 dies as told.
    bench.connected.retain(|c| c.0 != gang[1]);
    bench.advance(Duration::from_secs(12));
    bench.fake.with(|a| assert!(a.signalled.contains(&(gang[1], Signal::SIGTERM))));
    bench.exit(gang[0], Status::Signal(15));
    bench.advance(Duration::from_secs(40));
    bench.fake.with(|a| assert!(a.signalled.contains(&(gang[1], Signal::SIGKILL))));
    // The gang is started again on the devices that are left.
    let job = bench.view(&id);
    let devices: Vec<&str> = job.workers.iter().map(|w| w.device.as_str()).collect();
    assert_eq!((devices, job.restarts), (vec!["cpu:0", "cpu:2"], 1), "{}", job.message);
    let states: Vec<&str> = bench.supervisor.pool.each().map(|d| d.2).collect();
    assert_eq!(states, ["busy", "quarantined", "busy"]);
    // It is gone at last: the device is in use again.
    bench.exit(gang[1], Status::Signal(9));
    assert_eq!(bench.supervisor.pool.each().filter(|d| d.2 == "quarantined").count(), 0);
}

#[test]
fn without_a_spare_device_the_job_waits_with_its_segment() {
    let mut bench = Bench::new(2);
    let id = bench.submit(2);
    let gang = to_work(&mut bench);
    bench.connected.retain(|c| c.0 != gang[1]);
    bench.advance(Duration::from_secs(12));
    bench.exit(gang[0], Status::Signal(15));
    bench.advance(Duration::from_secs(40));
    let job = bench.view(&id);
    assert_eq!(job.state(), pb::JobState::Queued, "{}", job.message);
    assert!(job.message.contains("quarantined") && !job.segment.is_empty(), "{}", job.message);
    // A job that needs no more than the healthy device is not held up.
    let other = bench.submit(1);
    assert_eq!(bench.view(&other).state(), pb::JobState::Preparing);
    bench.handle(Message::Cancel { id: other, reply: oneshot::channel().0 });
    bench.advance(Duration::from_secs(1));
    bench.deliver_signals();
    bench.exit(gang[1], Status::Signal(9));
    assert_eq!(bench.view(&id).state(), pb::JobState::Starting);
    assert_eq!(bench.fake.with(|a| a.segments.len()), 1, "the same segment");
}

#[test]
fn a_queue_is_not_written_whole_when_its_first_job_goes() {
    let mut bench = Bench::new(1);
    bench.submit(1);
    let waiting: Vec<String> = (0..50).map(|_| bench.submit(1)).collect();
    let saved = bench.fake.with(|a| a.saved.len());
    bench.handle(Message::Cancel { id: waiting[0].clone(), reply: oneshot::channel().0 });
    assert_eq!(bench.fake.with(|a| a.saved.len()), saved + 1, "the end of the one that was cancelled");
    let message = bench.view(&waiting[2]).message;
    assert!(message.ends_with(&waiting[1]), "{message}");
}

#[test]
fn a_daemon_that_slept_blames_nobody() {
    let mut bench = Bench::new(1);
    let id = bench.submit(1);
    to_work(&mut bench);
    bench.supervisor.tick(bench.now);
    // Stopped for an hour: the first thing it does is look at the clock, before any heartbeat is read.
    bench.now += Duration::from_secs(3600);
    bench.supervisor.tick(bench.now);
    assert_eq!(bench.view(&id).state(), pb::JobState::Running);
    bench.advance(Duration::from_secs(30));
    assert_eq!(bench.view(&id).restarts, 0);
}

#[test]
fn the_books_never_name_a_segment_before_it_is_whole() {
    let mut bench = Bench::new(1);
    bench.submit(1);
    let prepare = bench.procs()[0];
    bench.started(prepare);
    bench.connect(prepare);
    bench.succeed(prepare);
    bench.answer_plan(fits);
    bench.fake.with(|a| assert!(a.saved.iter().all(|r| r.segment.is_none())));
    bench.answer_creation(true);
    bench.fake.with(|a| assert!(a.saved.last().unwrap().segment.is_some()));
}

#[test]
fn the_restart_budget_counts_failures_without_a_new_step() {
    let mut bench = Bench::new(1);
    let id = bench.submit(1);
    let mut gang = to_work(&mut bench);
    for round in 0..20u64 {
        // A new step every other round.
        if round % 2 == 0 {
            let metrics = pb::Metrics { step: round + 1, ..Default::default() };
            bench.handle(Message::Report { key: gang[0], report: Report::Metrics(metrics) });
        }
        bench.exit(gang[0], Status::Signal(11));
        bench.advance(Duration::from_secs(5));
        gang = bench.procs();
        assert_eq!(gang.len(), 1, "round {round}: {}", bench.view(&id).message);
        bench.started(gang[0]);
        bench.connect(gang[0]);
    }
    // The same old step again is no progress.
    while !gang.is_empty() {
        let metrics = pb::Metrics { step: 19, loss: 2.0, ..Default::default() };
        bench.handle(Message::Report { key: gang[0], report: Report::Metrics(metrics) });
        bench.exit(gang[0], Status::Signal(11));
        bench.advance(Duration::from_secs(9));
        gang = bench.procs();
        if let Some(key) = gang.first().copied() {
            bench.started(key);
            bench.connect(key);
        }
    }
    bench.answer_removal();
    let job = bench.view(&id);
    assert_eq!((job.state(), job.exit_code), (pb::JobState::Failed, 1), "{}", job.message);
    assert!(job.message.contains("SIGSEGV"), "{}", job.message);
}

#[test]
fn a_job_that_goes_back_to_wait_for_memory_is_who_the_others_wait_for() {
    let mut bench = Bench::new(3);
    let (first, second) = (bench.submit(2), bench.submit(2));
    happen(&mut bench, Happening::Succeed(0));
    assert_eq!(bench.view(&second).message, "waits for devices that other jobs hold");
    happen(&mut bench, Happening::Plan(1));
    assert!(bench.view(&first).message.starts_with("waits for memory"), "{}", bench.view(&first).message);
    assert_eq!(bench.view(&second).message, format!("waits for its turn after job {first}"));
    happen(&mut bench, Happening::Cancel(1));
    assert_eq!(bench.view(&second).state(), pb::JobState::Preparing, "{}", bench.view(&second).message);
}

/// Something that may happen.
#[derive(Debug, Clone)]
enum Happening {
    Submit(usize),
    Start(usize),
    Connect(usize),
    Succeed(usize),
    Fail(usize, u8),
    Crash(usize),
    Silence(usize),
    Step(usize, u64),
    Plan(u8),
    Create(bool),
    Remove,
    Signals,
    Wait(u64),
    Cancel(u32),
    Checkpoint(u32),
}

fn happening() -> impl Strategy<Value = Happening> {
    let which = 0usize..4;
    prop_oneof![
        2 => (1usize..4).prop_map(Happening::Submit),
        6 => which.clone().prop_map(Happening::Start),
        8 => which.clone().prop_map(Happening::Connect),
        6 => which.clone().prop_map(Happening::Succeed),
        1 => (which.clone(), 0u8..5).prop_map(|(w, k)| Happening::Fail(w, k)),
        2 => which.clone().prop_map(Happening::Crash),
        1 => which.clone().prop_map(Happening::Silence),
        3 => (which, 1u64..6).prop_map(|(w, s)| Happening::Step(w, s)),
        6 => (0u8..8).prop_map(Happening::Plan),
        6 => prop::bool::weighted(0.9).prop_map(Happening::Create),
        4 => Just(Happening::Remove),
        4 => Just(Happening::Signals),
        3 => (1u64..15).prop_map(Happening::Wait),
        1 => (1u32..6).prop_map(Happening::Cancel),
        1 => (1u32..6).prop_map(Happening::Checkpoint),
    ]
}

fn happen(bench: &mut Bench, what: Happening) {
    let pick = |bench: &Bench, n: usize| bench.procs().get(n).copied();
    match what {
        Happening::Submit(ranks) => drop(bench.submit(ranks)),
        Happening::Start(n) => pick(bench, n).into_iter().for_each(|k| bench.started(k)),
        Happening::Connect(n) => pick(bench, n).into_iter().for_each(|k| bench.connect(k)),
        Happening::Succeed(n) => pick(bench, n).into_iter().for_each(|k| bench.succeed(k)),
        Happening::Fail(n, kind) => {
            let kinds = [ErrorKind::JobFile, ErrorKind::Input, ErrorKind::Resources, ErrorKind::Output, ErrorKind::Internal];
            pick(bench, n).into_iter().for_each(|k| bench.fail(k, kinds[usize::from(kind)]));
        }
        Happening::Crash(n) => pick(bench, n).into_iter().for_each(|k| bench.exit(k, Status::Signal(11))),
        Happening::Silence(n) => {
            if n < bench.connected.len() {
                bench.connected.remove(n);
            }
        }
        Happening::Step(n, step) => pick(bench, n).into_iter().for_each(|key| {
            let metrics = pb::Metrics { step, ..Default::default() };
            bench.handle(Message::Report { key, report: Report::Metrics(metrics) });
        }),
        Happening::Plan(0) => bench.answer_plan(|_| Planned::Never(EngineError::new(ErrorKind::Resources, "never"))),
        Happening::Plan(1) => bench.answer_plan(|_| Planned::Later("later".into())),
        Happening::Plan(_) => bench.answer_plan(fits),
        Happening::Create(ok) => bench.answer_creation(ok),
        Happening::Remove => bench.answer_removal(),
        Happening::Signals => bench.deliver_signals(),
        Happening::Wait(seconds) => bench.advance(Duration::from_secs(seconds)),
        Happening::Cancel(n) => bench.handle(Message::Cancel { id: format!("id{n}"), reply: oneshot::channel().0 }),
        Happening::Checkpoint(n) => bench.handle(Message::Checkpoint { id: format!("id{n}"), reply: oneshot::channel().0 }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Whatever happens, in whatever order: a stop ends in bounded time with no process, no segment, no device held and
    /// every job either ended or back in the queue.
    #[test]
    fn nothing_is_forgotten(happenings in prop::collection::vec(happening(), 1..120)) {
        let mut bench = Bench::new(3);
        for what in happenings {
            happen(&mut bench, what);
        }
        bench.handle(Message::Stop);
        for _ in 0..60 {
            bench.advance(Duration::from_millis(500));
            bench.deliver_signals();
            bench.answer_plan(fits);
            bench.answer_creation(true);
            bench.answer_removal();
            if bench.supervisor.is_done() {
                break;
            }
        }
        prop_assert!(bench.supervisor.is_done());
        prop_assert!(bench.procs().is_empty(), "{:?}", bench.procs());
        bench.fake.with(|a| assert!(a.segments.is_empty(), "{:?}", a.segments));
        prop_assert!(bench.supervisor.leftovers().is_empty());
        prop_assert_eq!(bench.supervisor.pool.each().filter(|(_, holder, _)| holder.is_some()).count(), 0);
    }

    /// Left to itself, with workers that work, every job ends.
    #[test]
    fn every_job_ends(happenings in prop::collection::vec(happening(), 1..80)) {
        let mut bench = Bench::new(3);
        for what in happenings {
            happen(&mut bench, what);
        }
        for _ in 0..400 {
            bench.answer_plan(fits);
            bench.answer_creation(true);
            bench.answer_removal();
            bench.deliver_signals();
            for key in bench.procs() {
                bench.started(key);
                bench.connect(key);
                bench.succeed(key);
            }
            bench.advance(Duration::from_secs(1));
        }
        for job in bench.supervisor.jobs.values() {
            prop_assert!(job.has_ended(), "{} is {:?}: {}", job.record.id, job.phase, job.record.message);
        }
        bench.fake.with(|a| assert!(a.segments.is_empty(), "{:?}", a.segments));
    }
}
