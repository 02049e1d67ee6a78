//! The state task alone, without processes, files or real time: whatever order things happen in, nothing is forgotten.

use super::message::{Message, Planned};
use super::rig::{Bench, fits, to_work};
use super::*;
use crate::process::Status;
use nix::sys::signal::Signal;
use pb::worker_report::Report;
use proptest::prelude::*;
use ramtorch_worker::{DeviceKind, EngineError, ErrorKind};
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

/// Rank 1 of a gang on GPUs falls silent and outlives SIGKILL; rank 0 dies as told.
fn haunted(devices: u32) -> (Bench, String, Vec<ProcKey>) {
    let mut bench = Bench::of(DeviceKind::Cuda, devices);
    let id = bench.submit(2);
    let gang = to_work(&mut bench);
    bench.connected.retain(|c| c.0 != gang[1]);
    bench.advance(Duration::from_secs(12));
    bench.exit(gang[0], Status::Signal(15));
    bench.advance(Duration::from_secs(40));
    // Signals do nothing to it, later either.
    bench.fake.with(|a| a.signalled.clear());
    (bench, id, gang)
}

/// Copies that a GPU has begun need no process any more: a new gang on the same segment might see them arrive in it.
#[test]
fn no_gang_shares_its_segment_with_a_gpu_whose_process_cannot_be_ended() {
    let (mut bench, id, gang) = haunted(3);
    let job = bench.view(&id);
    assert_eq!(job.state(), pb::JobState::Queued, "there are two healthy GPUs, and yet: {}", job.message);
    for word in ["cuda:1", "cannot be ended", "cancel the job", job.segment.as_str()] {
        assert!(job.message.contains(word), "{word:?} is not in: {}", job.message);
    }
    // It is in nobody's way, and holds nothing.
    let other = bench.submit(2);
    assert_eq!(bench.view(&other).state(), pb::JobState::Preparing, "{}", bench.view(&other).message);
    bench.handle(Message::Cancel { id: other, reply: oneshot::channel().0 });
    bench.advance(Duration::from_secs(1));
    bench.deliver_signals();
    let (segment, pid) = (job.segment.clone(), 1000 + i32::try_from(gang[1].0).unwrap());
    // A daemon that starts now has to know of it, too.
    let saved = bench.fake.with(|a| a.saved.iter().rfind(|r| r.id == id).unwrap().workers.clone());
    assert_eq!(saved.iter().map(|w| w.identity.pid).collect::<Vec<_>>(), [pid]);
    bench.exit(gang[1], Status::Signal(9));
    let job = bench.view(&id);
    assert_eq!((job.state(), &job.segment), (pb::JobState::Starting, &segment), "{}", job.message);
    let saved = bench.fake.with(|a| a.saved.iter().rfind(|r| r.id == id).unwrap().workers.len());
    assert_eq!(saved, 0, "the new gang has not started a process yet");
}

#[test]
fn a_job_that_waits_for_such_a_process_can_be_cancelled_and_stopped() {
    let (mut bench, id, _) = haunted(3);
    bench.handle(Message::Cancel { id: id.clone(), reply: oneshot::channel().0 });
    bench.answer_removal();
    assert_eq!(bench.view(&id).state(), pb::JobState::Cancelled);
    let (mut bench, id, _) = haunted(3);
    bench.handle(Message::Stop);
    assert!(bench.supervisor.is_done());
    let left = bench.supervisor.leftovers();
    assert_eq!(left.kept.len(), 1, "the next daemon may find the process gone");
    assert_eq!(bench.fake.with(|a| a.saved.iter().rfind(|r| r.id == id).unwrap().workers.len()), 1);
}

#[test]
fn a_survivor_of_an_earlier_daemon_keeps_gangs_from_its_segment() {
    let (first, id, _) = haunted(2);
    let record = first.fake.with(|a| a.saved.iter().rfind(|r| r.id == id).unwrap().clone());
    let worker = record.workers[0].clone();
    let spec = ramtorch_job::JobSpec::parse(&record.spec_toml, std::path::Path::new("/"), "j").unwrap();
    let mut bench = Bench::of(DeviceKind::Cuda, 3);
    bench.supervisor.adopt(record, spec, Vec::new());
    bench.supervisor.quarantine_survivor(&id, &worker);
    let now = bench.now;
    bench.supervisor.begin(now);
    assert_eq!(bench.view(&id).state(), pb::JobState::Queued);
    bench.handle(Message::Survivor { pid: worker.identity.pid });
    assert_eq!(bench.view(&id).state(), pb::JobState::Starting, "{}", bench.view(&id).message);
}

/// What a stop makes of a gang whose segment is at `step`: the message, and how many segments stay.
fn stopped_at(bench: &mut Bench, step: Option<u64>) -> (String, usize) {
    bench.fake.with(|a| a.step = step);
    let id = bench.submit(1);
    let gang = to_work(bench);
    bench.handle(Message::Report { key: gang[0], report: Report::Metrics(pb::Metrics { step: 3, ..Default::default() }) });
    let written = pb::CheckpointWritten { path: "/c".into(), step: 3, ..Default::default() };
    bench.handle(Message::Report { key: gang[0], report: Report::Checkpoint(written) });
    bench.handle(Message::Stop);
    bench.exit(gang[0], Status::Signal(15));
    bench.answer_removal();
    assert!(bench.supervisor.is_done());
    bench.check_kept();
    (bench.view(&id).message, bench.fake.with(|a| a.segments.len()))
}

#[test]
fn a_stop_keeps_a_segment_whose_step_no_checkpoint_has() {
    for (step, kept) in [(Some(3), 0), (Some(4), 1), (Some(20), 1), (None, 1)] {
        let (message, segments) = stopped_at(&mut Bench::new(1), step);
        assert_eq!(segments, kept, "{step:?}: {message}");
        let words = if kept == 1 { "goes on from its parameter store" } else { "goes on from the checkpoint of step 3" };
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn a_stop_that_keeps_nothing_says_what_is_lost() {
    let mut never = Bench::new(1);
    never.supervisor.job_limits.keep_segments_on_stop = KeepSegments::Never;
    let (message, segments) = stopped_at(&mut never, Some(20));
    assert_eq!(segments, 0);
    assert!(message.contains("lost is steps 4 to 20") && message.contains("keep_segments_on_stop = false"), "{message}");
    let mut always = Bench::new(1);
    always.supervisor.job_limits.keep_segments_on_stop = KeepSegments::Always;
    assert_eq!(stopped_at(&mut always, Some(3)).1, 1);
}

/// A first report is checked against the segment: otherwise a liar that is started again and again would never use up the
/// budget for restarts.
#[test]
fn a_lie_in_the_first_report_of_a_process_is_no_progress() {
    let mut bench = Bench::new(1);
    bench.fake.with(|a| a.step = Some(2));
    let id = bench.submit(1);
    let mut gang = to_work(&mut bench);
    let report = |bench: &mut Bench, key, step| {
        bench.handle(Message::Report { key, report: Report::Metrics(pb::Metrics { step, ..Default::default() }) });
    };
    report(&mut bench, gang[0], 2);
    assert_eq!((bench.view(&id).step, bench.view(&id).state()), (2, pb::JobState::Running), "what the segment has is true");
    bench.exit(gang[0], Status::Signal(11));
    for lie in 3..20 {
        bench.advance(Duration::from_secs(9));
        gang = bench.procs();
        let Some(key) = gang.first().copied() else { break };
        bench.started(key);
        bench.connect(key);
        report(&mut bench, key, lie);
        assert_eq!(bench.view(&id).step, 2);
        bench.exit(key, Status::Signal(9));
    }
    bench.answer_removal();
    let job = bench.view(&id);
    assert_eq!((job.state(), job.restarts), (pb::JobState::Failed, 3), "{}", job.message);
    assert!(job.message.contains("its parameter store is at step 2"), "{}", job.message);
}

#[test]
fn heartbeats_name_steps_that_can_be() {
    // Step in the segment, step of the heartbeat, whether it is believed. The job has 100 steps.
    for (there, said, believed) in [(0, 2, true), (0, 3, false), (50, 52, true), (50, 53, false), (99, 100, true), (100, 101, false)] {
        let mut bench = Bench::new(1);
        bench.fake.with(|a| a.step = Some(there));
        let id = bench.submit(1);
        let gang = to_work(&mut bench);
        let heartbeat = pb::Heartbeat { step: said, phase: "computing".into(), sequence: 0 };
        bench.handle(Message::Report { key: gang[0], report: Report::Heartbeat(heartbeat) });
        let job = bench.view(&id);
        assert_eq!(job.state() == pb::JobState::Running, believed, "{there} {said}: {}", job.message);
    }
}

#[test]
fn a_preparation_without_progress_is_ended() {
    let mut bench = Bench::new(1);
    bench.supervisor.limits.prepare_timeout_seconds = 60.0;
    bench.supervisor.limits.restart_budget = 0;
    let id = bench.submit(1);
    let prepare = bench.procs()[0];
    bench.started(prepare);
    bench.connect(prepare);
    for done in 0..10 {
        bench.advance(Duration::from_secs(50));
        let progress = pb::Progress { what: "tokenising".into(), done, total: 10 };
        bench.handle(Message::Report { key: prepare, report: Report::Progress(progress) });
    }
    assert!(bench.fake.with(|a| a.signalled.is_empty()), "it works");
    bench.advance(Duration::from_secs(62));
    assert!(bench.fake.with(|a| a.signalled.contains(&(prepare, Signal::SIGTERM))), "heartbeats alone are no work");
    bench.deliver_signals();
    let job = bench.view(&id);
    assert!(job.state() == pb::JobState::Failed && job.message.contains("told of no progress for"), "{}", job.message);
}

#[test]
fn too_little_gpu_memory_ends_a_first_gang_and_starts_a_later_one_again() {
    let full = |bench: &mut Bench, key| {
        let result = pb::WorkerResult { exit_code: 12, error: "full".into(), device_code: Some(2), ..Default::default() };
        bench.handle(Message::Report { key, report: Report::Result(result) });
        bench.exit(key, Status::Code(12));
    };
    let mut bench = Bench::of(DeviceKind::Cuda, 1);
    let id = bench.submit(1);
    let gang = to_work(&mut bench);
    full(&mut bench, gang[0]);
    bench.answer_removal();
    assert_eq!((bench.view(&id).state(), bench.view(&id).exit_code), (pb::JobState::Failed, 12), "somebody else has the memory");
    let id = bench.submit(1);
    let gang = to_work(&mut bench);
    bench.exit(gang[0], Status::Signal(9));
    for restart in 2..=3 {
        let key = bench.procs()[0];
        bench.started(key);
        bench.connect(key);
        full(&mut bench, key);
        assert_eq!(bench.view(&id).restarts, restart, "{}", bench.view(&id).message);
        assert!(bench.procs().is_empty(), "not at once");
        bench.advance(Duration::from_secs(10));
    }
    let key = bench.procs()[0];
    bench.started(key);
    bench.connect(key);
    full(&mut bench, key);
    bench.answer_removal();
    let job = bench.view(&id);
    assert_eq!((job.state(), job.exit_code), (pb::JobState::Failed, 12), "the budget is for this, too: {}", job.message);
}

/// Fifty steps tell how long a phase takes.
#[test]
fn a_phase_that_is_known_has_a_short_deadline() {
    for (steps, limit) in [(20u64, 300), (60, 30)] {
        let mut bench = Bench::new(1);
        bench.fake.with(|a| a.step = Some(1000));
        let id = bench.submit(1);
        let key = to_work(&mut bench)[0];
        for step in 2..2 + steps {
            bench.now += Duration::from_millis(100);
            let heartbeat = pb::Heartbeat { step, phase: "computing".into(), sequence: 0 };
            bench.handle(Message::Report { key, report: Report::Heartbeat(heartbeat) });
        }
        let alive = |bench: &mut Bench, seconds: u64| {
            for _ in 0..seconds {
                bench.now += Duration::from_secs(1);
                let heartbeat = pb::Heartbeat { step: 1 + steps, phase: "computing".into(), sequence: 0 };
                bench.handle(Message::Report { key, report: Report::Heartbeat(heartbeat) });
                bench.supervisor.tick(bench.now);
            }
            bench.view(&id).state()
        };
        assert_eq!(alive(&mut bench, limit - 1), pb::JobState::Running, "{steps}");
        assert_eq!(alive(&mut bench, 3), pb::JobState::Restarting, "{steps}");
    }
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
        bench.check_kept();
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
