//! One job in the books.

use super::message::{JobKey, Reply};
use super::proc::{Cause, Outcome};
use super::record::{self, Record, State, WorkerRecord};
use super::telemetry::CheckpointTally;
use super::timeline::Tracing;
use super::watchers::{Ear, Watchers};
use crate::process::ProcKey;
use ramtorch_job::JobSpec;
use ramtorch_proto::v1 as pb;
use ramtorch_worker::{Level, Prepared};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Phases whose times are kept.
const PHASES_MAX: usize = 64;

/// Where a job is in its life; the diagram is at the top of `supervisor`.
#[derive(Debug)]
pub enum Phase {
    /// Waits for devices, or (with a time) for memory until it is looked at again.
    Queued {
        /// When memory is looked at again.
        retry_at: Option<Instant>,
    },
    /// A process looks at its files.
    Preparing(ProcKey),
    /// The plan is being made.
    Planning,
    /// The segment is being created.
    Reserving,
    /// The gang was started; not every rank is at work.
    Starting,
    /// The gang is at work.
    Running,
    /// A worker failed. The first causes are collected until `judge_at`, then the rest is ended.
    Failing {
        /// When the rest of the gang is ended.
        judge_at: Instant,
        /// It has been.
        ended: bool,
        /// What failed.
        causes: Vec<Cause>,
    },
    /// The gang is gone; a new one (or a new preparation) is started at this time.
    Backoff(Instant),
    /// The segment is being removed; then this.
    Removing(End),
    /// Over.
    Ended,
}

/// How a job's stay on its devices ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// For good.
    Final {
        /// Succeeded, Failed or Cancelled.
        state: State,
        /// Of docs/exit-codes.md.
        code: u8,
        /// For people.
        message: String,
    },
    /// Back to the queue: the daemon stops, and the next one goes on.
    Requeue {
        /// For people.
        message: String,
        /// From its segment, which stays.
        keep: bool,
    },
}

/// Who asked for the end of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Its user.
    Cancel,
    /// The daemon, which stops.
    Shutdown,
}

/// A member of the gang.
#[derive(Debug)]
pub struct Rank {
    /// Its process.
    pub key: ProcKey,
    /// What came of it, once gone.
    pub outcome: Option<Outcome>,
}

/// A process that outlived SIGKILL with the job's segment mapped, and whose GPU may still copy into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ghost {
    /// Its name; none for one of an earlier daemon.
    pub key: Option<ProcKey>,
    /// Who it is, for the next daemon.
    pub record: WorkerRecord,
    /// The segment.
    pub segment: String,
}

/// How long a phase of a step took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PhaseTimes {
    /// At most.
    pub longest: Duration,
    /// How often a rank has completed it.
    pub completed: u32,
}

/// A job.
#[derive(Debug)]
pub struct Job {
    /// Its place in the order of submission.
    pub key: JobKey,
    /// What is durable of it.
    pub record: Record,
    /// What was asked for.
    pub spec: JobSpec,
    /// Where it is.
    pub phase: Phase,
    /// Whether it has to end early.
    pub stop: Option<Stop>,
    /// Devices by rank, while it holds them.
    pub leases: Vec<usize>,
    /// The gang, while there is one.
    pub ranks: Vec<Rank>,
    /// Failures since the last committed step.
    pub failures: u32,
    /// The first of them.
    pub first_cause: Option<String>,
    /// Metrics, the newest last.
    pub history: VecDeque<pb::Metrics>,
    /// Watchers, once there are any.
    pub events: Option<Watchers>,
    /// True once nothing is added to its logs any more.
    pub over: watch::Sender<bool>,
    /// Who waits for which checkpoint.
    pub checkpoints: Vec<(u64, Reply<pb::CheckpointResponse>)>,
    /// The trace that is being recorded, or waits for the gang.
    pub trace: Option<Tracing>,
    /// How long ranks were in each phase of a step.
    pub phases: HashMap<String, PhaseTimes>,
    /// The last step that was ever reported as committed: only one beyond it is progress.
    pub furthest: u64,
    /// Why it waits although its devices are free: its segment is one that this program cannot read.
    pub held: Option<String>,
    /// Processes that no gang may share the segment with.
    pub ghosts: Vec<Ghost>,
    /// When progress was last told to watchers.
    pub progress_at: Option<Instant>,
    /// What became of its checkpoints.
    pub checkpoint_tally: CheckpointTally,
    /// Its end could not be made durable, so that its segment stays: when that is tried again.
    pub settle_at: Option<Instant>,
    /// What it told when the state folder last took no record.
    pub waits_for_room: Option<String>,
}

impl Job {
    /// A job that waits for its turn.
    pub fn new(key: JobKey, record: Record, spec: JobSpec) -> Job {
        let ended = record.state != State::Active;
        Job {
            key,
            furthest: record.step,
            record,
            spec,
            phase: if ended { Phase::Ended } else { Phase::Queued { retry_at: None } },
            stop: None,
            leases: Vec::new(),
            ranks: Vec::new(),
            failures: 0,
            first_cause: None,
            history: VecDeque::new(),
            events: None,
            over: watch::channel(ended).0,
            checkpoints: Vec::new(),
            trace: None,
            phases: HashMap::new(),
            held: None,
            ghosts: Vec::new(),
            progress_at: None,
            checkpoint_tally: CheckpointTally::default(),
            settle_at: None,
            waits_for_room: None,
        }
    }

    /// A rank has left a phase after so long.
    pub fn learn(&mut self, phase: String, took: Duration) {
        // The engine's phases are a dozen; whoever invents more is not listened to.
        if self.phases.len() < PHASES_MAX || self.phases.contains_key(&phase) {
            let known = self.phases.entry(phase).or_default();
            known.longest = took.max(known.longest);
            known.completed = known.completed.saturating_add(1);
        }
    }

    /// Its processes are gone, but for those that could not be ended.
    pub fn forget_workers(&mut self) {
        self.record.workers = self.ghosts.iter().map(|g| g.record.clone()).collect();
    }

    /// Why no gang can be started on its segment, whatever devices are free.
    pub fn obstacle(&self) -> Option<String> {
        let segment = self.record.segment.as_ref()?;
        if let Some(why) = &self.held {
            return Some(why.clone());
        }
        let ghost = &self.ghosts.iter().find(|g| g.segment == segment.name)?.record;
        Some(format!(
            "waits: its worker on {} (pid {}) cannot be ended, and the GPU may still copy into its parameter store {}; it goes on \
             when that process is gone. To go on without it, cancel the job and submit it again: it then begins at its newest \
             checkpoint",
            ghost.device, ghost.identity.pid, segment.name
        ))
    }

    /// The newest step that a preparation would go on from.
    pub fn saved_step(&self) -> u64 {
        if !self.spec.checkpoint.resume {
            return 0;
        }
        let resumed = self.record.prepared.as_ref().and_then(|p| p.resume.as_ref()).map(|r| r.step);
        self.record.checkpoint_step.max(resumed).unwrap_or(0)
    }

    /// Why a job that had a checkpoint is not begun anew where its preparation found none: that would cut its files to nothing,
    /// because a disk is not mounted.
    pub fn lost_checkpoint(&self, prepared: &Prepared) -> Option<String> {
        let known = self.record.checkpoint.as_ref().filter(|_| self.spec.checkpoint.resume && prepared.resume.is_none())?;
        let folder = self.spec.checkpoint.path.as_ref()?;
        let step = self.record.checkpoint_step.map(|step| format!(" of step {step}")).unwrap_or_default();
        Some(format!(
            "the job has written or gone on from the checkpoint {}{step}, and no sound checkpoint of `{}` is in {} now; nothing of the job's \
             files was changed. If that folder's file system is not mounted, mount it, and submit the job again: it goes on from its \
             newest checkpoint. If its checkpoints are damaged (the job's log names what was passed over), put back a copy. To begin \
             anew, submit it with another name, or with [checkpoint] path and [output] metrics elsewhere",
            known.display(),
            self.spec.name,
            folder.display()
        ))
    }

    /// Whether it is over.
    pub fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// Whether time alone moves it on.
    pub fn is_due(&self, now: Instant) -> bool {
        match &self.phase {
            Phase::Failing { judge_at, ended, .. } => !ended && now >= *judge_at,
            Phase::Backoff(until) => now >= *until,
            Phase::Removing(_) => self.settle_at.is_some_and(|at| now >= at),
            _ => false,
        }
    }

    /// State as clients see it.
    pub fn state(&self) -> pb::JobState {
        use pb::JobState as S;
        let stopping = self.stop.is_some();
        match (&self.phase, self.record.state) {
            (Phase::Ended, State::Succeeded) => S::Succeeded,
            (Phase::Ended, State::Cancelled) => S::Cancelled,
            (Phase::Ended, State::Failed | State::Active) => S::Failed,
            (Phase::Queued { .. }, _) => S::Queued,
            _ if stopping => S::Stopping,
            (Phase::Preparing(_) | Phase::Planning | Phase::Reserving, _) => S::Preparing,
            (Phase::Starting, _) => S::Starting,
            (Phase::Running | Phase::Removing(_), _) => S::Running,
            (Phase::Failing { .. } | Phase::Backoff(_), _) => S::Restarting,
        }
    }

    /// A receiver of what comes.
    pub fn subscribe(&mut self) -> Option<Ear> {
        if self.has_ended() {
            return None;
        }
        Some(self.events.get_or_insert_default().subscribe())
    }

    /// Tells watchers. Nobody waits: one who is too far behind is told so and dropped by the call that serves him.
    pub fn tell(&mut self, event: pb::watch_event::Event) {
        if let Some(watchers) = &mut self.events {
            watchers.tell(event);
        }
    }

    /// Tells watchers and the daemon's log something.
    pub fn note(&mut self, level: Level, text: &str, rank: Option<usize>, unix_ms: i64) {
        let job = self.record.id.as_str();
        match level {
            Level::Info => tracing::info!(job, rank, "{text}"),
            Level::Warn => tracing::warn!(job, rank, "{text}"),
            Level::Error => tracing::error!(job, rank, "{text}"),
        }
        let level = match level {
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        };
        let rank = rank.and_then(|r| u32::try_from(r).ok());
        self.tell(pb::watch_event::Event::Note(pb::Event { unix_ms, level: level.into(), text: text.into(), rank }));
    }

    /// The job in the protocol's form, without its workers.
    pub fn to_pb(&self) -> pb::Job {
        let r = &self.record;
        let text = |p: &Option<std::path::PathBuf>| p.as_ref().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        pb::Job {
            id: r.id.clone(),
            name: r.name.clone(),
            state: self.state().into(),
            message: self.waits_for_room.as_ref().filter(|_| self.settle_at.is_some()).unwrap_or(&r.message).clone(),
            exit_code: u32::from(r.exit_code),
            step: r.step,
            steps: r.steps,
            world_size: r.world_size,
            restarts: r.restarts,
            created_unix_ms: r.created_unix_ms,
            started_unix_ms: r.started_unix_ms,
            ended_unix_ms: r.ended_unix_ms,
            model: r.model.clone(),
            output_path: text(&r.output),
            metrics_path: text(&r.metrics_path),
            segment: r.segment.as_ref().map(|s| s.name.clone()).unwrap_or_default(),
            segment_bytes: r.segment.as_ref().map_or(0, |s| s.bytes),
            last_metrics: self.history.back().cloned(),
            workers: Vec::new(),
            plan: r.plan.as_ref().map(record::plan_to_pb),
            spec_toml: r.spec_toml.clone(),
            uid: r.uid,
            sample: r.sample.clone().unwrap_or_default(),
        }
    }
}
