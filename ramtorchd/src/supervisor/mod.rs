//! The state of every job, in one place. One task owns it (`actor`); everyone else enqueues messages.
//!
//! ```text
//!             Submit                                                          (what clients see)
//!                │
//!           ┌────▼───┐  devices busy, memory held by others                   QUEUED
//!     ┌────►│ Queued │◄──────────────────────────┐
//!     │     └────┬───┘                           │
//!     │          │ devices leased                │
//!     │     ┌────▼─────┐  ┌──────────┐  ┌────────┴─┐  ┌───────────┐
//!     │     │Preparing ├─►│ Planning ├─►│ judgement├─►│ Reserving │           PREPARING
//!     │     └────┬─────┘  └────┬─────┘  └────┬─────┘  └─────┬─────┘
//!     │          │ error       │ error       │ never fits   │ segment created
//!     │          ▼             ▼             ▼              ▼
//!     │       (Final: Failed) ◄──────────────┘        ┌──────────┐
//!     │          ▲                             ┌─────►│ Starting │            STARTING
//!     │          │                             │      └────┬─────┘
//!     │          │ budget spent,               │           │ every rank at work
//!     │          │ or not worth a restart      │      ┌────▼─────┐
//!     │     ┌────┴────┐  gang gone       ┌─────┴───┐  │ Running  │            RUNNING
//!     │     │ judged  ├─────────────────►│ Backoff │  └────┬─────┘
//!     │     └────▲────┘                  └─────────┘       │ all ranks done
//!     │     ┌────┴────┐ first sign of failure              │
//!     │     │ Failing │◄──── Starting, Running             │                  RESTARTING
//!     │     └─────────┘ (causes collected, gang ended)     │
//!     │                                                    ▼
//!     │                  ┌──────────┐ segment unlinked ┌───────┐
//!     └──────────────────┤ Removing ├─────────────────►│ Ended │              SUCCEEDED, FAILED, CANCELLED
//!       daemon stops     └──────────┘                  └───────┘
//! ```
//! A job that is stopped (by its user or because the daemon stops) carries that mark through whatever phase it is in;
//! clients see STOPPING. Its processes get a stop command, then SIGTERM, then SIGKILL. It leaves by Removing like any
//! other, so that no path forgets the segment.
//!
//! What can fail, and what follows:
//! - a worker exits, crashes, never calls, falls silent, stays in a phase for far longer than it ever took, tells of
//!   steps that cannot be, or reports an error: the *first* sign by time is the root cause. The gang is ended and a new one attaches the same segment (generation + 1). Three restarts in a row
//!   without a newly committed step, or an error that a restart cannot mend (job file, input, memory, output), fail
//!   the job with the first cause.
//! - a worker outlives SIGKILL (it hangs in the kernel): it is given up, its device quarantined until it is gone. If that
//!   is a GPU, no new gang gets the segment before: copies that the old one began may still arrive in it.
//! - the state folder takes no record (its disk is full): no gang is started and no segment goes, until it does; that costs
//!   no restart of the budget.
//! - a preparation that tells of no progress for very long is ended like a failed one.
//! - the daemon is stopped: a segment whose steps no checkpoint has stays, and is found as after a kill.
//! - the daemon is killed: workers die with it (PDEATHSIG). The next daemon ends any survivor and starts a new gang
//!   on the segment, which holds every committed step. Survivors are not adopted: a worker cannot outlive the thread
//!   that started it anyway, a new gang loses at most the step that was under way, and one path that is used after
//!   every failure is better tested than two.
//!
//! The queue is strictly first come, first served: a job that waits for devices or memory is not overtaken, so that
//! small jobs cannot starve a large one. The exception is a job that this daemon's devices cannot serve at all.

mod actor;
pub mod admission;
mod calls;
pub mod devices;
#[cfg(any(test, fuzzing))]
#[cfg_attr(not(fuzzing), allow(dead_code))]
pub(crate) mod fuzz;
mod gang;
mod gpus;
pub(crate) mod job;
mod jobs;
pub mod message;
pub mod oneoff;
pub mod outside;
mod proc;
mod pulse;
mod queue;
pub mod record;
#[cfg(any(test, fuzzing))]
mod rig;
mod shares;
pub mod telemetry;
#[cfg(test)]
mod tests;
mod timeline;
pub mod watchers;

pub use actor::{Handle, Inbox, channel, run};
pub use message::{JobKey, Message, Refusal, RefusalKind};
pub use pulse::Pulse;

use crate::config::{JobLimits, KeepSegments, Supervision};
use crate::faults::kept::Fault;
use crate::process::{self, ProcKey};
use devices::DevicePool;
use job::{End, Ghost, Job, Phase, Stop};
use jobs::Jobs;
use oneoff::OneOff;
use outside::Outside;
use proc::{EndStep, Proc, Role};
use ramtorch_proto::v1 as pb;
use ramtorch_worker::{DeviceKind, Level};
use record::{Record, State, WorkerRecord};
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// Time between two looks at the clock while anything happens.
pub const TICK: Duration = Duration::from_millis(50);
/// A tick later than this means that the daemon itself did not run.
const PAUSE: Duration = Duration::from_millis(1000);
/// A job that waits for memory is looked at again after so long.
const MEMORY_RETRY: Duration = Duration::from_secs(5);
/// A state folder that took no record is tried again after so long.
const RECORD_RETRY: Duration = Duration::from_secs(3);
/// Ended jobs whose metrics stay in memory; of older ones they are read from disk.
const RECENT: usize = 16;

/// All jobs, processes and devices. Does nothing but react to messages and time, through `Outside`.
pub struct Supervisor {
    limits: Supervision,
    job_limits: JobLimits,
    out: Box<dyn Outside>,
    pool: DevicePool,
    /// Why devices are out of use until an operator has looked at them.
    faults: Vec<Fault>,
    jobs: Jobs,
    /// The first in the queue, once it has to wait: all that come after it wait for their turn.
    blocked: Option<JobKey>,
    /// Jobs that have watchers.
    watched: BTreeSet<JobKey>,
    procs: HashMap<ProcKey, Proc>,
    tokens: HashMap<String, ProcKey>,
    one_offs: HashMap<u64, OneOff>,
    next: u64,
    stopping: Option<Stopping>,
    last_tick: Option<Instant>,
    tally: telemetry::Tally,
}

/// What there is when the state task has ended.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// What should not be: for the log.
    pub problems: Vec<String>,
    /// Segments that the next daemon is to find.
    pub kept: BTreeSet<String>,
}

/// The daemon is on its way out.
#[derive(Debug, Clone, Copy)]
struct Stopping {
    deadline: Instant,
    forced: bool,
}

impl Supervisor {
    /// Books without jobs.
    pub fn new(limits: Supervision, job_limits: JobLimits, pool: DevicePool, out: Box<dyn Outside>) -> Supervisor {
        let tally = telemetry::Tally { started_unix_ms: out.unix_ms(), ..Default::default() };
        Supervisor {
            tally,
            limits,
            job_limits,
            out,
            pool,
            faults: Vec::new(),
            jobs: Jobs::default(),
            blocked: None,
            watched: BTreeSet::new(),
            procs: HashMap::new(),
            tokens: HashMap::new(),
            one_offs: HashMap::new(),
            next: 1,
            stopping: None,
            last_tick: None,
        }
    }

    /// Takes over a job of an earlier daemon; its survivors must have been ended. Jobs come oldest first.
    pub fn adopt(&mut self, record: Record, spec: ramtorch_job::JobSpec, history: Vec<pb::Metrics>) {
        let key = JobKey(self.fresh());
        let mut job = Job::new(key, record, spec);
        job.record.workers.clear();
        job.record.step = history.last().map_or(job.record.step, |m| m.step.max(job.record.step));
        job.furthest = job.record.step;
        job.history = history.into();
        if job.record.state == State::Active {
            if job.record.cancelled {
                job.stop = Some(Stop::Cancel);
            }
            job.record.message = match &job.record.segment {
                Some(_) => format!("goes on from step {} in its parameter store", job.record.step),
                None => "starts again after the daemon did".into(),
            };
        }
        self.jobs.insert(job);
    }

    /// A job that was taken over has a segment that this program cannot read: it waits, and the segment with it.
    pub fn hold(&mut self, id: &str, why: String) {
        let key = self.jobs.by_id(id).map(|j| j.key);
        if let Some(job) = key.and_then(|key| self.jobs.get_mut(&key)) {
            job.held = Some(why);
        }
    }

    /// A process of an earlier daemon could not be ended: its device stays out of use until it is, and so does the segment of
    /// its job, if that was a GPU.
    pub fn quarantine_survivor(&mut self, id: &str, worker: &WorkerRecord) {
        if let Some(index) = self.pool.find(&worker.device) {
            self.pool.quarantine_survivor(index, worker.identity.pid);
        }
        // A GPU that this daemon does not have is one all the same.
        if worker.device.starts_with("cuda") {
            self.haunt(id, None, worker.clone());
        }
    }

    /// No gang gets the segment that this process may still have mapped.
    fn haunt(&mut self, id: &str, proc: Option<ProcKey>, record: WorkerRecord) {
        let key = self.jobs.by_id(id).filter(|j| !j.has_ended()).map(|j| j.key);
        if let Some(job) = key.and_then(|key| self.jobs.get_mut(&key)) {
            let Some(segment) = job.record.segment.as_ref().map(|s| s.name.clone()) else { return };
            job.ghosts.push(Ghost { key: proc, record, segment });
            job.forget_workers();
        }
    }

    /// A process that outlived SIGKILL is gone at last.
    fn exorcise(&mut self, gone: impl Fn(&Ghost) -> bool) {
        for key in self.jobs.active_keys() {
            let Some(job) = self.jobs.get_mut(&key).filter(|j| j.ghosts.iter().any(&gone)) else { continue };
            let gone_pids: Vec<i32> = job.ghosts.iter().filter(|g| gone(g)).map(|g| g.record.identity.pid).collect();
            job.ghosts.retain(|g| !gone(g));
            job.record.workers.retain(|w| !gone_pids.contains(&w.identity.pid));
        }
    }

    /// Starts what can be started.
    pub fn begin(&mut self, now: Instant) {
        let cancelled: Vec<JobKey> = self.jobs.active().filter(|j| j.stop.is_some()).map(|j| j.key).collect();
        for key in cancelled {
            self.conclude_cancelled(key, now);
        }
        self.forget_old();
        self.schedule(now);
    }

    /// Reacts to a message.
    pub fn handle(&mut self, message: Message, now: Instant) {
        match message {
            Message::Submit { .. }
            | Message::Vacant { .. }
            | Message::Resolve { .. }
            | Message::Telemetry { .. }
            | Message::Get { .. }
            | Message::List { .. }
            | Message::Watch { .. }
            | Message::Cancel { .. }
            | Message::Checkpoint { .. }
            | Message::Trace { .. }
            | Message::Logs { .. }
            | Message::Source { .. }
            | Message::PlanContext { .. }
            | Message::OneOff { .. }
            | Message::Info { .. } => self.call(message, now),
            Message::Register { token, pid, start_ticks, peer_pid, reply } => {
                let _ = reply.send(self.register(&token, pid, start_ticks, peer_pid, now));
            }
            Message::Opened { token, commands, reply } => {
                let _ = reply.send(self.opened(&token, commands, now));
            }
            Message::Report { key, report } => self.report(key, report, now),
            Message::Closed { key } => {
                if let Some(proc) = self.procs.get_mut(&key) {
                    proc.close(now);
                }
                self.reap(key, now);
            }
            Message::Process(process::Event::Started(key, identity)) => self.started(key, identity),
            Message::Process(process::Event::Ended(key, ended)) => {
                if let Some(proc) = self.procs.get_mut(&key) {
                    proc.exit(ended, now);
                }
                self.reap(key, now);
            }
            Message::Planned { job, outcome } => self.planned(job, outcome, now),
            Message::Created { job, outcome } => self.created(job, outcome, now),
            Message::Removed { job, outcome } => self.removed(job, outcome, now),
            Message::Unsettled { job, why } => self.unsettled(job, &why, now),
            Message::Survivor { pid } => {
                self.exorcise(|g| g.key.is_none() && g.record.identity.pid == pid);
                if self.pool.absolve_survivor(pid) {
                    tracing::info!(pid, "a worker of an earlier daemon is gone; its device is in use again");
                }
                self.schedule(now);
            }
            Message::Xid(xid) => self.xid(xid, now),
            Message::Stop => self.stop_daemon(now),
            Message::StopKeeping => {
                // Workers that were told to stop for good have written checkpoints already.
                if self.stopping.is_none() {
                    self.job_limits.keep_segments_on_stop = KeepSegments::Always;
                }
                self.stop_daemon(now);
            }
        }
    }

    /// Reacts to time. To be called every [`TICK`] while anything happens, and at least every second.
    pub fn tick(&mut self, now: Instant) {
        if let Some(last) = self.last_tick.replace(now) {
            let pause = now.saturating_duration_since(last);
            // The machine slept, or the daemon was stopped: workers' heartbeats wait in its inbox.
            if pause > PAUSE + self.idle_tick() {
                tracing::warn!("the daemon did not run for {:.1} s", pause.as_secs_f64());
                self.procs.values_mut().for_each(|p| p.forgive(pause));
            }
        }
        let keys: Vec<ProcKey> = self.procs.keys().copied().collect();
        for key in keys {
            self.tick_proc(key, now);
        }
        let abandoned: Vec<u64> = self.one_offs.values().filter(|o| o.is_abandoned()).map(|o| o.id).collect();
        for id in abandoned {
            self.end_one_off(id, now);
        }
        let due: Vec<JobKey> = self.jobs.active().filter(|j| j.is_due(now)).map(|j| j.key).collect();
        for key in due {
            self.job_due(key, now);
        }
        if self.jobs.active().any(|j| matches!(j.phase, Phase::Queued { retry_at: Some(at) } if now >= at)) {
            self.schedule(now);
        }
        self.watched.retain(|key| {
            let Some(job) = self.jobs.get_mut(key) else { return false };
            job.events.take_if(|watchers| watchers.is_empty());
            job.events.as_mut().is_some_and(|watchers| {
                watchers.tick();
                true
            })
        });
        self.tick_stopping(now);
    }

    /// Tells some watchers what there is for them. `true`: there is more to tell, after others have had their turn.
    pub fn pump(&mut self) -> bool {
        let mut more = false;
        for key in &self.watched {
            let watchers = self.jobs.get_mut(key).and_then(|job| job.events.as_mut());
            more |= watchers.is_some_and(watchers::Watchers::pump);
        }
        more
    }

    /// How long the state task may sleep when no message comes.
    pub fn idle_tick(&self) -> Duration {
        let busy = !self.procs.is_empty() || self.stopping.is_some() || self.jobs.active().any(|j| matches!(j.phase, Phase::Backoff(_)));
        if busy { TICK } else { Duration::from_secs(1) }
    }

    /// One line about it all, for the service manager.
    pub fn status(&self) -> String {
        let count = |wanted: fn(&Job) -> bool| self.jobs.active().filter(|j| wanted(j)).count();
        let running = count(|j| !matches!(j.phase, Phase::Queued { .. }));
        let queued = count(|j| matches!(j.phase, Phase::Queued { .. }));
        let out_of_use = self.pool.each().filter(|(_, _, state)| *state == "quarantined").count();
        let devices = if out_of_use == 0 { String::new() } else { format!(", {out_of_use} device(s) quarantined") };
        let stopping = if self.stopping.is_some() { "stopping; " } else { "" };
        format!("{stopping}{running} job(s) under way, {queued} waiting{devices}")
    }

    /// Whether the daemon was told to stop and nothing is left to wait for.
    pub fn is_done(&self) -> bool {
        self.stopping.is_some()
            && self.procs.values().all(|p| p.role == Role::GivenUp)
            && self.jobs.active().all(|j| matches!(j.phase, Phase::Queued { .. }) || j.settle_at.is_some())
    }

    /// Whether the time for an orderly stop is over.
    pub fn is_overdue(&self, now: Instant) -> bool {
        self.stopping.is_some_and(|s| now >= s.deadline + Duration::from_secs(2))
    }

    /// What is left over after a stop.
    pub fn leftovers(&self) -> Leftovers {
        let mut left = Leftovers::default();
        left.problems.extend(self.procs.values().filter(|p| !p.has_exited()).map(|p| format!("{} could not be ended", p.who())));
        for (job, segment) in self.jobs.active().filter_map(|j| Some((j, j.record.segment.as_ref()?))) {
            let kept = match job.phase {
                // Without its end on the disk it is all that there is of the job; with it, the next daemon removes it.
                Phase::Removing(End::Final { .. }) => {
                    let text = "has ended, and its end is not on the disk: its parameter store stays for the next daemon";
                    left.problems.push(format!("job {} {text}", job.record.id));
                    left.kept.insert(segment.name.clone());
                    continue;
                }
                Phase::Removing(End::Requeue { .. }) => false,
                // It was decided when the job was put back.
                Phase::Queued { .. } => true,
                // Its time was over: the next daemon finds it as after a death of this one.
                _ => self.job_limits.keep_segments_on_stop != KeepSegments::Never,
            };
            if kept {
                left.kept.insert(segment.name.clone());
            } else {
                left.problems.push(format!("the parameter store of job {} was not removed in time", job.record.id));
            }
        }
        left
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn tick_proc(&mut self, key: ProcKey, now: Instant) {
        let kill_timeout = self.limits.kill_timeout();
        let Some(proc) = self.procs.get_mut(&key) else { return };
        if proc.role == Role::GivenUp {
            return self.reap(key, now);
        }
        if let Some(cause) = proc.overdue(&self.limits, now) {
            proc.cause = Some(cause.clone());
            // Members of a gang are ended together, once the first cause is known.
            match proc.role {
                Role::Rank { job, rank } => self.sign(job, rank, cause, now),
                _ => proc.end(now, kill_timeout),
            }
        }
        self.look_for_stalls(key, now);
        let Some(proc) = self.procs.get_mut(&key) else { return };
        if proc.lingers(now) && !proc.is_ending() {
            tracing::warn!("{} has done its work and does not exit; it is killed", proc.who());
            proc.kill(now, kill_timeout);
        }
        while let Some(step) = self.procs.get_mut(&key).and_then(|p| p.end_step(now)) {
            match step {
                EndStep::Term => self.out.signal(key, nix::sys::signal::Signal::SIGTERM),
                EndStep::Kill => self.out.signal(key, nix::sys::signal::Signal::SIGKILL),
                EndStep::GiveUp => return self.give_up(key, now),
            }
        }
        self.reap(key, now);
    }

    /// A process outlived SIGKILL: its device is quarantined and the rest of the daemon goes on without it.
    fn give_up(&mut self, key: ProcKey, now: Instant) {
        let Some(proc) = self.procs.get_mut(&key) else { return };
        tracing::error!("{} outlived SIGKILL (it hangs in the kernel); its device is quarantined until it is gone", proc.who());
        if let Some(device) = proc.device {
            self.pool.quarantine(device, key);
        }
        let (role, outcome) = (proc.role, proc.outcome(now));
        proc.role = Role::GivenUp;
        let record = proc.identity.clone().map(|identity| WorkerRecord { identity, device: proc.device_name.clone() });
        let on_gpu = proc.device.is_some_and(|d| self.pool.spec(d).kind == DeviceKind::Cuda);
        // Copies to and from the segment that its GPU has begun do not need it.
        if let (Role::Rank { job, .. }, Some(record), true) = (role, record, on_gpu) {
            let id = self.jobs.get(&job).map(|j| j.record.id.clone()).unwrap_or_default();
            self.haunt(&id, Some(key), record);
        }
        self.proc_gone(role, outcome, now);
    }

    /// Takes a process out of the books if it is gone.
    fn reap(&mut self, key: ProcKey, now: Instant) {
        let Some(proc) = self.procs.get(&key).filter(|p| p.is_gone(now)) else { return };
        let (role, outcome) = (proc.role, proc.outcome(now));
        self.tokens.remove(&proc.token);
        self.procs.remove(&key);
        self.out.forget(key);
        if role == Role::GivenUp {
            self.exorcise(|g| g.key == Some(key));
            if self.pool.absolve(key) {
                tracing::info!("a worker that had outlived SIGKILL is gone; its device is in use again");
                self.schedule(now);
            }
            return;
        }
        self.proc_gone(role, outcome, now);
    }

    fn proc_gone(&mut self, role: Role, outcome: proc::Outcome, now: Instant) {
        match role {
            Role::Rank { job, rank } => self.rank_gone(job, rank, outcome, now),
            Role::Prepare { job } => self.prepare_gone(job, outcome, now),
            Role::OneOff { id } => self.one_off_gone(id, outcome, now),
            Role::GivenUp => {}
        }
    }

    /// Makes a job's state durable and tells its watchers.
    fn changed(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get(&key) else { return };
        self.out.save(&job.record);
        self.show(key);
    }

    /// Tells a job's watchers how it is, if there are any.
    fn show(&mut self, key: JobKey) {
        if self.jobs.get(&key).is_none_or(|job| job.events.is_none()) {
            return;
        }
        let Some(view) = self.view(key) else { return };
        if let Some(job) = self.jobs.get_mut(&key) {
            job.tell(pb::watch_event::Event::Job(view));
        }
    }

    fn note(&mut self, key: JobKey, level: Level, text: &str, rank: Option<usize>) {
        let at = self.out.unix_ms();
        if let Some(job) = self.jobs.get_mut(&key) {
            job.note(level, text, rank, at);
        }
    }

    /// The job as clients see it.
    fn view(&self, key: JobKey) -> Option<pb::Job> {
        let job = self.jobs.get(&key)?;
        let mut view = job.to_pb();
        let preparing = if let Phase::Preparing(p) = job.phase { Some(p) } else { None };
        let keys = job.ranks.iter().map(|r| r.key).chain(preparing);
        for (rank, proc) in keys.enumerate().filter_map(|(i, k)| Some((i, self.procs.get(&k)?))) {
            view.workers.push(pb::WorkerInfo {
                rank: u32::try_from(rank).unwrap_or(u32::MAX),
                device: proc.device_name.clone(),
                pid: proc.identity.as_ref().map_or(0, |i| i.pid),
                phase: proc.phase.clone(),
                step: proc.step,
                heartbeat_unix_ms: proc.heard_unix_ms,
                log_path: proc.log.to_string_lossy().into_owned(),
            });
        }
        Some(view)
    }

    fn stop_daemon(&mut self, now: Instant) {
        if let Some(stopping) = &mut self.stopping {
            tracing::warn!("told to stop again: workers are killed now");
            stopping.forced = true;
            stopping.deadline = stopping.deadline.min(now);
        } else {
            let active = self.jobs.active_count();
            tracing::info!("stopping; {active} job(s) have not ended");
            self.stopping = Some(Stopping { deadline: now + self.limits.stop_timeout(), forced: false });
            for key in self.jobs.active_keys() {
                self.stop_job(key, Stop::Shutdown, now);
            }
            let ids: Vec<u64> = self.one_offs.keys().copied().collect();
            for id in ids {
                self.end_one_off(id, now);
            }
        }
        self.tick_stopping(now);
    }

    fn tick_stopping(&mut self, now: Instant) {
        let Some(stopping) = self.stopping else { return };
        // The last part of the time belongs to SIGKILL.
        let margin = (self.limits.stop_timeout() / 4).min(Duration::from_secs(2));
        if stopping.forced || now + margin >= stopping.deadline {
            let kill_timeout = self.limits.kill_timeout();
            self.procs.values_mut().for_each(|p| p.kill(now, kill_timeout));
        }
    }
}
