//! What workers and an earlier daemon may say, driven by bytes.
//!
//! An input of [`converse`] is a list of happenings: what (u8), bytes that follow (u8), these bytes. Their first is the number
//! of a live process, where one is meant.

use super::message::Planned;
use super::record::{Record, SegmentRecord, WorkerRecord};
use super::rig::{Bench, fits, to_work};
use super::*;
use crate::process::{Identity, Status};
use nix::sys::signal::Signal;
use prost::Message as _;
use ramtorch_job::JobSpec;
use ramtorch_worker::{EngineError, ErrorKind};
use std::path::Path;
use tokio::sync::oneshot;

/// Happenings that are listened to.
const MOST: usize = 200;

/// A report of process 0.
fn report(report: pb::worker_report::Report) -> Vec<u8> {
    let message = pb::WorkerReport { token: String::new(), report: Some(report) }.encode_to_vec();
    let mut bytes = vec![0, u8::try_from(message.len() + 1).unwrap_or(u8::MAX), 0];
    bytes.extend(message);
    bytes
}

/// Inputs to begin with.
pub fn conversations() -> Vec<Vec<u8>> {
    use pb::worker_report::Report as R;
    let metrics = pb::Metrics { step: 2, loss: f64::NAN, json: "{}".into(), validation_loss: Some(1.0), ..Default::default() };
    let part = pb::TracePart { rank: 1, first_step: 2, steps: 1, ..Default::default() };
    let said = [
        R::Heartbeat(pb::Heartbeat { step: 1, phase: "computing".into(), sequence: 1 }),
        R::Metrics(metrics),
        R::Event(pb::Event { unix_ms: 1, level: "warn".into(), text: "t".into(), rank: Some(1) }),
        R::Checkpoint(pb::CheckpointWritten { path: "/c".into(), step: 1, request: 3, error: String::new() }),
        R::Result(pb::WorkerResult { ok: true, json: "{}".into(), device_code: Some(700), ..Default::default() }),
        R::Result(pb::WorkerResult { exit_code: 11, error: "e".into(), ..Default::default() }),
        R::Progress(pb::Progress { what: "w".into(), done: 1, total: 2 }),
        R::TokenText(pb::TokenText { prompt: 0, text: "t".into() }),
        R::Trace(pb::TraceReport { request: 4, part: Some(part) }),
    ];
    let each = said.into_iter().map(report);
    // A gang at work, a trace and a checkpoint asked for, time, a death, a stop.
    let around = |middle: Vec<u8>| [&[9, 0, 10, 2, 1, 2][..], &middle, &[1, 2, 200, 0, 3, 2, 0, 9, 1, 2, 0, 2, 14, 0]].concat();
    each.map(around).chain([vec![7, 1, 1, 4, 1, 2, 5, 1, 1, 8, 1, 0, 6, 0], vec![12, 0, 1, 2, 255, 255]]).collect()
}

/// Lets it all happen, with a gang of two at work and a job that waits; then ends everything.
///
/// # Panics
/// A device with two holders, a process that nobody knows, a job that does not end.
pub fn converse(data: &[u8]) {
    let mut bench = Bench::new(3);
    bench.submit(2);
    to_work(&mut bench);
    bench.submit(2);
    let mut rest = data;
    for _ in 0..MOST {
        let [what, length, after @ ..] = rest else { break };
        let (bytes, after) = after.split_at(usize::from(*length).min(after.len()));
        rest = after;
        happen(&mut bench, *what, bytes);
    }
    let (reply, _) = oneshot::channel();
    bench.handle(Message::List { all: true, reply });
    bench.handle(Message::Telemetry { reply: oneshot::channel().0 });
    bench.handle(Message::Stop);
    for _ in 0..60 {
        // Most are done at once, and the rest of the minute would be most of the time that an input takes. Processes that
        // outlived SIGKILL may be left at that point.
        if bench.supervisor.is_done() && bench.procs().is_empty() {
            break;
        }
        bench.answer_plan(|_| Planned::Later("full".into()));
        bench.answer_creation(true);
        bench.answer_removal();
        bench.deliver_signals();
        bench.advance(Duration::from_secs(1));
    }
    assert!(bench.supervisor.is_done(), "{}: {:?}", bench.supervisor.status(), bench.supervisor.leftovers());
    bench.fake.with(|a| assert!(a.procs.is_empty(), "{:?}", a.procs));
    bench.check_kept();
}

fn happen(bench: &mut Bench, what: u8, bytes: &[u8]) {
    let byte = |i: usize| bytes.get(i).copied().unwrap_or(0);
    let procs = bench.procs();
    let key = procs.get(usize::from(byte(0)) % procs.len().max(1)).copied();
    let id = format!("id{}", byte(0) % 4);
    match what % 16 {
        0 => {
            let connected = key.filter(|k| bench.connected.iter().any(|c| c.0 == *k));
            let message = pb::WorkerReport::decode(bytes.get(1..).unwrap_or_default());
            if let (Some(key), Ok(pb::WorkerReport { report: Some(report), .. })) = (connected, message) {
                bench.handle(Message::Report { key, report });
            }
        }
        1 => bench.advance(Duration::from_millis(10 * u64::from(u16::from_le_bytes([byte(0), byte(1)]).min(6000)))),
        2 => {
            if let Some(key) = key {
                bench.started(key);
                bench.connect(key);
            }
        }
        3 => {
            if let Some(key) = key {
                let status = match byte(1) {
                    0 => Status::Unknown,
                    n @ 1..=64 => Status::Signal(i32::from(n)),
                    n => Status::Code(i32::from(n) - 65),
                };
                bench.exit(key, status);
            }
        }
        4 => match byte(0) % 3 {
            0 => bench.answer_plan(fits),
            1 => bench.answer_plan(|_| Planned::Later("full".into())),
            _ => bench.answer_plan(|_| Planned::Never(EngineError::new(ErrorKind::Resources, "too large"))),
        },
        5 => bench.answer_creation(byte(0) % 2 == 0),
        6 => bench.answer_removal(),
        7 => {
            if bench.jobs < 8 {
                bench.submit(usize::from(byte(0) % 3) + 1);
            }
        }
        8 => bench.handle(Message::Cancel { id, reply: oneshot::channel().0 }),
        9 => bench.handle(Message::Checkpoint { id, reply: oneshot::channel().0 }),
        10 => bench.handle(Message::Trace { id, first_step: byte(1).into(), steps: byte(2).into(), reply: oneshot::channel().0 }),
        11 => bench.handle(Message::Watch { id, history: byte(1).into(), reply: oneshot::channel().0 }),
        12 => bench.deliver_signals(),
        13 => {
            if let Some(key) = key {
                bench.succeed(key);
            }
        }
        14 => {
            if let Some(key) = key {
                bench.fail(key, [ErrorKind::Input, ErrorKind::Internal, ErrorKind::Resources, ErrorKind::Output][usize::from(byte(1) % 4)]);
            }
        }
        _ => {
            // Somebody who is no worker of this daemon, or one that calls twice.
            let token = String::from_utf8_lossy(bytes.get(2..).unwrap_or_default()).into_owned();
            let (pid, start_ticks) = (1000 + i32::from(byte(0)), byte(1).into());
            bench.handle(Message::Register { token, pid, start_ticks, peer_pid: Some(pid), reply: oneshot::channel().0 });
        }
    }
}

/// Records of a job in several states, as files.
pub fn records(id: &str, segment: &str) -> Vec<Vec<u8>> {
    let text = "name = \"a\"\n[model]\npath = \"/m\"\n[data]\nformat = \"tokens\"\ntrain = \"/t\"\n[train]\nsteps = 9\nbatch_size = 2\n";
    let Ok(spec) = JobSpec::parse(text, Path::new("/"), "j") else { return Vec::new() };
    let new = Record::new(id.into(), &spec, 0, 5);
    let mut running = Record { generation: 2, step: 3, world_size: 1, ..new.clone() };
    running.segment = Some(SegmentRecord { name: segment.into(), bytes: 4096, boot_id: "x".into() });
    let identity = Identity { pid: 1, start_ticks: 1, boot_id: "x".into() };
    running.workers = vec![WorkerRecord { identity, device: "cpu:0".into() }];
    running.prepared = Some(rig::prepared());
    if let Planned::Fits(plan) = fits(1) {
        running.plan = Some(*plan);
    }
    let ended = Record { state: State::Failed, exit_code: 11, message: "m".into(), ended_unix_ms: 9, ..running.clone() };
    let cancelled = Record { cancelled: true, ..running.clone() };
    [new, running, ended, cancelled].iter().filter_map(|r| serde_json::to_vec(r).ok()).collect()
}

/// A line of a job's metrics.
pub fn history_line(step: u64) -> String {
    let rest =
        "grad_norm lr tokens tokens_per_second step_seconds tokens_total epoch tflops bytes_to_device bytes_from_device copy_wait_seconds";
    let rest: String = rest.split(' ').map(|key| format!(",\"{key}\":7")).collect();
    format!("{{\"step\":{step},\"loss\":0.5{rest},\"validation_loss\":0.25}}")
}

/// Takes over jobs of an earlier daemon, and looks at all of them.
pub(crate) fn adopt(jobs: Vec<(Record, JobSpec, Vec<pb::Metrics>)>) {
    let mut bench = Bench::new(2);
    for (record, spec, history) in jobs {
        bench.supervisor.adopt(record, spec, history);
    }
    let now = bench.now;
    bench.supervisor.begin(now);
    bench.advance(Duration::from_secs(2));
    bench.handle(Message::List { all: true, reply: oneshot::channel().0 });
    bench.handle(Message::Telemetry { reply: oneshot::channel().0 });
    bench.handle(Message::Info { reply: oneshot::channel().0 });
    for key in bench.procs() {
        bench.exit(key, Status::Signal(Signal::SIGKILL as i32));
    }
    bench.advance(Duration::from_secs(2));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fuzzers came upon that leads to different places, and where they began: `fuzz/seeds.sh` keeps them.
    #[test]
    fn conversations_that_fuzzers_found_end_well() {
        conversations().iter().for_each(|c| converse(c));
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus-seeds/worker_reports");
        let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(files.len() >= 10, "{} inputs in {}", files.len(), folder.display());
        for file in files {
            converse(&std::fs::read(file).unwrap());
        }
    }
}
