//! One worker process in the books: what is known of it, when it counts as hung, how it is ended.
//!
//! ```text
//!  spawned ──Register──► registered ──Control──► heard every 0.5 s ──WorkerResult──► done ──exit──► gone
//!     │ no call in time        │ silent too long      │ stream ends, no result   │ does not exit
//!     │                        │ or stays in a phase   │                          │
//!     └────────────────────────┴──────── cause ───────┴──────────────────────────┘
//!                                          │ end()
//!                                  SIGTERM ─► SIGKILL ─► given up: device quarantined, the daemon goes on
//! ```
//! A process is *gone* once it is reaped and everything it said has been read: its exit may be seen before its last
//! words, and those say why it ended.

use super::message::{Commands, JobKey};
use crate::config::Supervision;
use crate::faults::{GpuError, Source};
use crate::process::{Ended, Identity, ProcKey, Status};
use ramtorch_proto::v1 as pb;
use ramtorch_worker::{EngineError, ErrorKind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// After the exit of a process, its last words are waited for so long.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// After its control stream or its result, a process has so long to exit.
const EXIT_GRACE: Duration = Duration::from_secs(5);
/// Between SIGTERM and SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(2);

/// Phase in which a rank waits for all others; beside a checkpoint it is told with that.
const WAITS: &str = "reducing";

/// What a process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A member of a job's gang.
    Rank {
        /// The job.
        job: JobKey,
        /// From 0.
        rank: usize,
    },
    /// Looks at a job's files.
    Prepare {
        /// The job.
        job: JobKey,
    },
    /// One-off work.
    OneOff {
        /// Which.
        id: u64,
    },
    /// Nobody waits for it any more; it could not be ended.
    GivenUp,
}

/// How it showed that a worker failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// It said so.
    Reported,
    /// It exited without a word.
    Exited,
    /// A signal ended it.
    Signalled,
    /// It could not be started, or nobody knows how it ended.
    Lost,
    /// It never called.
    NeverCalled,
    /// It sent no heartbeat.
    Silent,
    /// It closed its stream and stayed.
    Stuck,
    /// It made no progress.
    Stalled,
    /// It said what cannot be.
    Disbelieved,
    /// Its GPU did.
    Gpu,
    /// It was not started: the record of its job could not be made durable. Nobody's failure but the disk's.
    Unrecorded,
}

impl Sign {
    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Sign::Reported => "reported",
            Sign::Exited => "exited",
            Sign::Signalled => "signalled",
            Sign::Lost => "lost",
            Sign::NeverCalled => "never_called",
            Sign::Silent => "silent",
            Sign::Stuck => "stuck",
            Sign::Stalled => "stalled",
            Sign::Disbelieved => "disbelieved",
            Sign::Gpu => "gpu",
            Sign::Unrecorded => "unrecorded",
        }
    }
}

/// Why a worker failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// When it was noticed.
    pub at: Instant,
    /// How.
    pub sign: Sign,
    /// The error of a GPU behind it, where one is known.
    pub gpu: Option<GpuError>,
    /// Class.
    pub kind: ErrorKind,
    /// What happened, naming the worker.
    pub text: String,
    /// The last lines of its log.
    pub tail: String,
}

impl Cause {
    /// A defect that nobody has more words for yet.
    pub fn defect(at: Instant, sign: Sign, text: String) -> Cause {
        Cause { at, sign, gpu: None, kind: ErrorKind::Internal, text, tail: String::new() }
    }

    /// For people.
    pub fn describe(&self) -> String {
        if self.tail.is_empty() {
            return self.text.clone();
        }
        format!("{}; its last lines:\n  {}", self.text, self.tail.replace('\n', "\n  "))
    }
}

/// What came of a process.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It did its work; the result is role-specific JSON.
    Done {
        /// The result.
        json: String,
        /// Ended early, by command.
        stopped: bool,
    },
    /// It failed.
    Failed(Cause),
}

/// When which signal is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ending {
    term_at: Instant,
    kill_at: Instant,
    give_up_at: Instant,
    sent: Sent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Sent {
    Nothing,
    Term,
    Kill,
}

/// What is to be done to a process that has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndStep {
    /// Send SIGTERM.
    Term,
    /// Send SIGKILL.
    Kill,
    /// It outlived SIGKILL.
    GiveUp,
}

/// A worker process.
#[derive(Debug)]
pub struct Proc {
    /// Its name.
    pub key: ProcKey,
    /// What it is for.
    pub role: Role,
    /// Secret by which it is known.
    pub token: String,
    /// What it has to do.
    pub assignment: pb::Assignment,
    /// Index of its device among the daemon's.
    pub device: Option<usize>,
    /// Name of its device.
    pub device_name: String,
    /// What it prints.
    pub log: PathBuf,
    /// Who it is, once it runs.
    pub identity: Option<Identity>,
    /// It has called.
    pub registered: bool,
    /// Its control stream, once open.
    pub commands: Option<Commands>,
    /// Last step, phase and time that it told.
    pub step: u64,
    /// Phase of it.
    pub phase: String,
    /// Last step of which it told the metrics.
    pub told: Option<u64>,
    /// Time of it, milliseconds since 1970.
    pub heard_unix_ms: i64,
    /// What it said at its end.
    pub result: Option<pb::WorkerResult>,
    /// It said what cannot be: nothing that it says counts any more, success least of all.
    pub disbelieved: bool,
    /// First sign that something is wrong.
    pub cause: Option<Cause>,
    spawned: Instant,
    heard: Instant,
    /// When it last told something new of its work.
    moved: Instant,
    closed: Option<Instant>,
    ended: Option<(Instant, Ended)>,
    result_at: Option<Instant>,
    ending: Option<Ending>,
}

impl Proc {
    /// A process that is being started.
    pub fn new(key: ProcKey, role: Role, token: String, assignment: pb::Assignment, log: PathBuf, now: Instant) -> Proc {
        Proc {
            key,
            role,
            token,
            assignment,
            device: None,
            device_name: String::new(),
            log,
            identity: None,
            registered: false,
            commands: None,
            step: 0,
            phase: String::new(),
            told: None,
            heard_unix_ms: 0,
            moved: now,
            result: None,
            disbelieved: false,
            cause: None,
            spawned: now,
            heard: now,
            closed: None,
            ended: None,
            result_at: None,
            ending: None,
        }
    }

    /// A sign of life.
    pub fn heard(&mut self, now: Instant, unix_ms: i64) {
        self.heard = now;
        self.heard_unix_ms = unix_ms;
    }

    /// It tells where it is. Returns the phase that it has left, and how long it was in it.
    pub fn moves(&mut self, step: u64, phase: String, now: Instant) -> Option<(String, Duration)> {
        if self.step == step && self.phase == phase {
            return None;
        }
        let took = now.saturating_duration_since(std::mem::replace(&mut self.moved, now));
        self.step = step;
        let left = std::mem::replace(&mut self.phase, phase);
        (!left.is_empty()).then_some((left, took))
    }

    /// It tells of its work by other means than a heartbeat.
    pub fn works(&mut self, now: Instant) {
        self.moved = now;
    }

    /// Whether nothing is known to be wrong with it, and it is expected to work.
    fn is_expected(&self) -> bool {
        self.registered && self.ended.is_none() && self.cause.is_none() && self.ending.is_none() && self.result_at.is_none()
    }

    /// How long it has been in the same phase of the same step; `None` for one that owes no progress.
    pub fn still(&self, now: Instant) -> Option<Duration> {
        self.is_expected().then(|| now.saturating_duration_since(self.moved))
    }

    /// How suspicious it is when a gang does not get on: those behind first, those who only wait for others last.
    pub fn suspicion(&self) -> (u64, bool, Instant) {
        (self.step, self.phase.starts_with(WAITS), self.moved)
    }

    /// Its control stream has ended.
    pub fn close(&mut self, now: Instant) {
        self.closed.get_or_insert(now);
        self.commands = None;
    }

    /// Whether its control stream has ended.
    pub fn was_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// It said how its work went.
    pub fn finish(&mut self, result: pb::WorkerResult, now: Instant) {
        if !result.ok {
            let kind = kind_of_code(i64::from(result.exit_code));
            // What is wrong with the user's files is the same for every worker; who it was matters for defects only.
            let text = match kind {
                ErrorKind::Internal => format!("{}: {}", self.who(), result.error),
                _ => result.error.clone(),
            };
            let code = result.device_code.zip(self.device);
            let gpu = code.map(|(code, device)| GpuError { device, source: Source::Cuda, code });
            let sign = if gpu.is_some() { Sign::Gpu } else { Sign::Reported };
            self.cause.get_or_insert(Cause { kind, gpu, ..Cause::defect(now, sign, text) });
        }
        self.result.get_or_insert(result);
        self.result_at.get_or_insert(now);
    }

    /// It exited.
    pub fn exit(&mut self, ended: Ended, now: Instant) {
        self.ended.get_or_insert((now, ended));
    }

    /// Whether it has exited and has nothing left to say.
    pub fn is_gone(&self, now: Instant) -> bool {
        let Some((at, _)) = &self.ended else { return false };
        self.commands.is_none() || now.saturating_duration_since(*at) > LAST_WORDS
    }

    /// Whether it has exited.
    pub fn has_exited(&self) -> bool {
        self.ended.is_some()
    }

    /// The daemon itself was held up for `pause`: nobody else is to blame for that.
    pub fn forgive(&mut self, pause: Duration) {
        self.heard += pause;
        self.moved += pause;
        self.spawned += pause;
        for at in [&mut self.closed, &mut self.result_at].into_iter().flatten() {
            *at += pause;
        }
    }

    /// Whether it is late with what it owes: why. A process that has failed already owes nothing.
    pub fn overdue(&self, limits: &Supervision, now: Instant) -> Option<Cause> {
        // One that has reported its result only fails to leave: see `lingers`.
        if self.ended.is_some() || self.cause.is_some() || self.ending.is_some() || self.result_at.is_some() {
            return None;
        }
        let since = |at: Instant| now.saturating_duration_since(at);
        let (sign, text) = if let Some(at) = self.closed {
            if since(at) <= EXIT_GRACE {
                return None;
            }
            (Sign::Stuck, format!("{} closed its control stream and did not exit", self.who()))
        } else if !self.registered {
            if since(self.spawned) <= limits.register_timeout() {
                return None;
            }
            (Sign::NeverCalled, format!("{} did not call within {:.0} s of its start", self.who(), limits.register_timeout_seconds))
        } else {
            if since(self.heard) <= limits.heartbeat_timeout() {
                return None;
            }
            let place =
                if self.phase.is_empty() { String::new() } else { format!(" (last heard in phase {} of step {})", self.phase, self.step) };
            (Sign::Silent, format!("{} sent no heartbeat for {:.1} s{place}", self.who(), since(self.heard).as_secs_f64()))
        };
        Some(Cause::defect(now, sign, text))
    }

    /// Whether its work is done and it has had long enough to leave.
    pub fn lingers(&self, now: Instant) -> bool {
        self.ended.is_none() && self.result_at.is_some_and(|at| now.saturating_duration_since(at) > EXIT_GRACE)
    }

    /// From `term_at` on, end it: SIGTERM, SIGKILL a little later, given up `kill_timeout` after that. An earlier
    /// schedule is never put off.
    pub fn end(&mut self, term_at: Instant, kill_timeout: Duration) {
        let kill_at = term_at + TERM_GRACE;
        self.schedule(Ending { term_at, kill_at, give_up_at: kill_at + kill_timeout, sent: Sent::Nothing });
    }

    /// SIGKILL now.
    pub fn kill(&mut self, now: Instant, kill_timeout: Duration) {
        self.schedule(Ending { term_at: now, kill_at: now, give_up_at: now + kill_timeout, sent: Sent::Nothing });
    }

    fn schedule(&mut self, new: Ending) {
        self.ending = Some(match self.ending {
            None => new,
            Some(old) => Ending {
                term_at: old.term_at.min(new.term_at),
                kill_at: old.kill_at.min(new.kill_at),
                give_up_at: old.give_up_at.min(new.give_up_at),
                sent: old.sent,
            },
        });
    }

    /// Whether it was told to end by a signal, or will be.
    pub fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// The next step of its end that is due. To be asked until it answers `None`.
    pub fn end_step(&mut self, now: Instant) -> Option<EndStep> {
        if self.ended.is_some() {
            return None;
        }
        // Without an identity it has not started yet; signals wait, but patience runs.
        let ending = self.ending.as_mut()?;
        if now >= ending.give_up_at && ending.sent == Sent::Kill {
            return Some(EndStep::GiveUp);
        }
        if now >= ending.kill_at && ending.sent < Sent::Kill {
            ending.sent = Sent::Kill;
            return Some(EndStep::Kill);
        }
        if now >= ending.term_at && ending.sent < Sent::Term {
            ending.sent = Sent::Term;
            return Some(EndStep::Term);
        }
        None
    }

    /// What came of it, once gone.
    pub fn outcome(&self, now: Instant) -> Outcome {
        if let Some(result) = self.result.as_ref().filter(|r| r.ok && !self.disbelieved) {
            return Outcome::Done { json: result.json.clone(), stopped: result.stopped };
        }
        let (at, status, tail) = match &self.ended {
            Some((at, ended)) => (*at, ended.status, ended.tail.clone()),
            None => (now, Status::Unknown, String::new()),
        };
        if let Some(cause) = &self.cause {
            // An error that the worker reported itself says all; a hang is better understood with its last lines.
            let tail = if self.result.is_some() && !self.disbelieved { String::new() } else { tail };
            return Outcome::Failed(Cause { tail, ..cause.clone() });
        }
        let (kind, sign, text) = match status {
            Status::Code(code) => (kind_of_code(i64::from(code)), Sign::Exited, format!("{} {status} without a result", self.who())),
            Status::Signal(_) => (ErrorKind::Internal, Sign::Signalled, format!("{} {status}", self.who())),
            Status::Unknown => (ErrorKind::Internal, Sign::Lost, format!("{} {status}", self.who())),
            Status::Unrecorded => return Outcome::Failed(Cause::defect(at, Sign::Unrecorded, super::queue::room(&tail))),
        };
        let when = if self.registered { "" } else { " before its first call" };
        Outcome::Failed(Cause { kind, tail, ..Cause::defect(at, sign, format!("{text}{when}")) })
    }

    /// Name for people.
    pub fn who(&self) -> String {
        let pid = self.identity.as_ref().map(|i| format!(", pid {}", i.pid)).unwrap_or_default();
        match self.role {
            Role::Rank { rank, .. } => format!("rank {rank} ({}{pid})", self.device_name),
            Role::Prepare { .. } => format!("the preparing worker ({}{pid})", self.device_name),
            Role::OneOff { .. } | Role::GivenUp => format!("the worker ({}{pid})", self.device_name),
        }
    }
}

/// Class of the error that an exit code stands for.
fn kind_of_code(code: i64) -> ErrorKind {
    [ErrorKind::JobFile, ErrorKind::Input, ErrorKind::Resources, ErrorKind::Output]
        .into_iter()
        .find(|k| i64::from(k.exit_code()) == code)
        .unwrap_or(ErrorKind::Internal)
}

/// The engine's error in a cause, as one-off callers get it.
impl From<Cause> for EngineError {
    fn from(cause: Cause) -> EngineError {
        EngineError::new(cause.kind, cause.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proc(now: Instant) -> Proc {
        let role = Role::Rank { job: JobKey(1), rank: 2 };
        Proc { device_name: "cpu:2".into(), ..Proc::new(ProcKey(1), role, "t".into(), Default::default(), "/l".into(), now) }
    }

    fn ended(status: Status, tail: &str) -> Ended {
        Ended { status, tail: tail.into() }
    }

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn silence_is_noticed_at_every_stage() {
        let (limits, t) = (Supervision::default(), Instant::now());
        let mut p = proc(t);
        assert_eq!(p.overdue(&limits, t + 30 * S), None);
        assert!(p.overdue(&limits, t + 31 * S).unwrap().text.contains("did not call"));
        p.registered = true;
        p.heard(t + 31 * S, 0);
        assert_eq!(p.overdue(&limits, t + 41 * S), None);
        let cause = p.overdue(&limits, t + 42 * S).unwrap();
        assert!(cause.text.contains("rank 2 (cpu:2)") && cause.text.contains("no heartbeat for 11.0 s"), "{}", cause.text);
        p.forgive(5 * S);
        assert_eq!(p.overdue(&limits, t + 46 * S), None, "the daemon was asleep, not the worker");
        p.close(t + 42 * S);
        assert!(p.overdue(&limits, t + 60 * S).unwrap().text.contains("did not exit"));
    }

    #[test]
    fn signals_come_in_order_and_once() {
        let t = Instant::now();
        let mut p = proc(t);
        p.end(t + S, 10 * S);
        let mut steps = Vec::new();
        for tenth in 0..200 {
            while let Some(step) = p.end_step(t + tenth * S / 10) {
                steps.push((tenth, step));
                if step == EndStep::GiveUp {
                    break;
                }
            }
            if steps.last().is_some_and(|s| s.1 == EndStep::GiveUp) {
                break;
            }
        }
        assert_eq!(steps, [(10, EndStep::Term), (30, EndStep::Kill), (130, EndStep::GiveUp)]);
    }

    #[test]
    fn an_earlier_end_is_never_put_off() {
        let t = Instant::now();
        let mut p = proc(t);
        p.kill(t, S);
        p.end(t + 60 * S, 60 * S);
        assert_eq!(p.end_step(t), Some(EndStep::Kill));
        assert_eq!(p.end_step(t + S), Some(EndStep::GiveUp));
        p.exit(ended(Status::Signal(9), ""), t + S);
        assert_eq!(p.end_step(t + 99 * S), None);
    }

    #[test]
    fn last_words_count_even_when_they_come_after_the_exit() {
        let t = Instant::now();
        let mut p = proc(t);
        p.registered = true;
        p.commands = Some(tokio::sync::mpsc::channel(1).0);
        p.exit(ended(Status::Code(11), ""), t);
        assert!(!p.is_gone(t));
        p.finish(pb::WorkerResult { exit_code: 11, error: "no such file".into(), ..Default::default() }, t);
        p.close(t);
        assert!(p.is_gone(t));
        let Outcome::Failed(cause) = p.outcome(t) else { panic!() };
        assert_eq!((cause.kind, cause.describe().as_str()), (ErrorKind::Input, "no such file"));
    }

    #[test]
    fn a_crash_is_told_with_its_signal_and_last_lines() {
        let t = Instant::now();
        let mut p = proc(t);
        p.exit(ended(Status::Signal(11), "thread panicked\nat x"), t);
        assert!(p.is_gone(t));
        let Outcome::Failed(cause) = p.outcome(t) else { panic!() };
        let text = cause.describe();
        assert!(text.contains("SIGSEGV before its first call") && text.contains("\n  thread panicked\n  at x"), "{text}");
        let mut p = proc(t);
        p.registered = true;
        p.exit(ended(Status::Code(13), ""), t);
        assert!(matches!(p.outcome(t), Outcome::Failed(Cause { kind: ErrorKind::Output, .. })));
    }
}
