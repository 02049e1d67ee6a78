//! The gang of a job: started, heard, failed, ended.

use super::Supervisor;
use super::job::{End, Phase, Rank, Stop};
use super::message::{Commands, JobKey, Refusal, RefusalKind};
use super::outside::Contents;
use super::proc::{Cause, Outcome, Proc, Role, Sign};
use super::record::{State, WorkerRecord, push_history};
use crate::config::{KeepSegments, PRACTISED};
use crate::faults::{GpuError, Verdict};
use crate::process::{Identity, ProcKey};
use ramtorch_failpoint::{Point, hit};
use ramtorch_proto::v1 as pb;
use ramtorch_proto::v1::worker_report::Report;
use ramtorch_worker::{EngineError, ErrorKind, History, Level, Task, TrainOutcome};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Generations whose logs are kept.
const LOG_GENERATIONS: u64 = 8;
/// Progress is told to watchers at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

impl Supervisor {
    /// Books a worker process and has it started.
    pub(super) fn spawn(
        &mut self,
        role: Role,
        assignment: ramtorch_worker::Assignment,
        device: Option<usize>,
        log: PathBuf,
        now: Instant,
    ) -> Result<ProcKey, EngineError> {
        let token = self.out.token().map_err(|e| EngineError::internal(format!("the kernel gives no random numbers: {e}")))?;
        let json = serde_json::to_string(&assignment).map_err(|e| EngineError::internal(format!("cannot encode an assignment: {e}")))?;
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let message = pb::Assignment {
            job_id: assignment.job_id,
            rank: number(assignment.rank),
            world_size: number(assignment.world_size),
            generation: assignment.generation,
            json,
        };
        let key = ProcKey(self.fresh());
        let mut proc = Proc::new(key, role, token.clone(), message, log.clone(), now);
        proc.device = device;
        proc.device_name = assignment.device.to_string();
        self.procs.insert(key, proc);
        self.tokens.insert(token.clone(), key);
        let job = match role {
            Role::Rank { job, .. } | Role::Prepare { job } => self.jobs.get(&job),
            Role::OneOff { .. } | Role::GivenUp => None,
        };
        self.out.spawn(key, &token, log, job);
        Ok(key)
    }

    /// A new gang on the job's segment.
    pub(super) fn start_gang(&mut self, key: JobKey, now: Instant) {
        let devices = self.gang_devices(key);
        let started = self.out.unix_ms();
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let (Some(prepared), Some(plan), Some(segment)) = (&job.record.prepared, &job.record.plan, &job.record.segment) else {
            return self.fail(key, EngineError::internal("the job's record is incomplete: no plan or no segment"), now);
        };
        job.record.generation += 1;
        let (id, generation) = (job.record.id.clone(), job.record.generation);
        let task = Task::Train {
            spec: job.spec.clone(),
            prepared: Box::new(prepared.clone()),
            plan: Box::new(plan.clone()),
            segment: segment.name.clone(),
            history: History { path: self.out.history_file(&id), told: job.history.back().map_or(0, |m| m.step) },
        };
        job.forget_workers();
        job.ranks.clear();
        if job.record.started_unix_ms == 0 {
            job.record.started_unix_ms = started;
        }
        let leases = job.leases.clone();
        let world_size = devices.len();
        // Before anybody is started: no two gangs may have the same generation, and no gang a segment that nobody knows.
        self.out.save(&job.record);
        for (rank, device) in devices.into_iter().enumerate() {
            let assignment = ramtorch_worker::Assignment { job_id: id.clone(), generation, rank, world_size, device, task: task.clone() };
            let log = self.out.log_dir(&id).join(format!("rank-{rank}.g{generation}.log"));
            match self.spawn(Role::Rank { job: key, rank }, assignment, leases.get(rank).copied(), log, now) {
                Ok(proc) => {
                    if let Some(job) = self.jobs.get_mut(&key) {
                        job.ranks.push(Rank { key: proc, outcome: None });
                    }
                }
                // The ranks that were started find nobody to work with and are ended like any failed gang.
                Err(e) => return self.fail_gang(key, e, now),
            }
        }
        if generation > LOG_GENERATIONS {
            self.out.tidy_logs(&id, generation - LOG_GENERATIONS + 1);
        }
        self.enter(key, Phase::Starting, "starts its workers".into());
    }

    fn fail_gang(&mut self, key: JobKey, e: EngineError, now: Instant) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        if job.ranks.is_empty() {
            return self.fail(key, e, now);
        }
        job.phase = Phase::Starting;
        let rank = job.ranks.len();
        self.sign(key, rank, Cause { kind: e.kind, ..Cause::defect(now, Sign::Lost, e.message) }, now);
    }

    pub(super) fn started(&mut self, key: ProcKey, identity: Identity) {
        let Some(proc) = self.procs.get_mut(&key) else { return };
        proc.identity = Some(identity.clone());
        let record = WorkerRecord { identity, device: proc.device_name.clone() };
        if let Role::Rank { job, .. } | Role::Prepare { job } = proc.role {
            if let Some(job) = self.jobs.get_mut(&job) {
                job.waits_for_room = None;
                job.record.workers.push(record);
                self.out.save(&job.record);
            }
        }
    }

    pub(super) fn register(
        &mut self,
        token: &str,
        pid: i32,
        start_ticks: u64,
        peer_pid: Option<i32>,
        now: Instant,
    ) -> Result<pb::Assignment, Refusal> {
        let denied = |why: &str| Refusal::new(RefusalKind::Denied, why);
        let proc =
            self.tokens.get(token).and_then(|k| self.procs.get_mut(k)).ok_or_else(|| denied("nobody with this token was started"))?;
        if proc.registered {
            return Err(denied("this worker has registered before"));
        }
        if peer_pid.is_some_and(|peer| peer != pid) {
            return Err(denied("the caller is not the process that it says it is"));
        }
        // The spawner's word may come a moment later than the worker's first call.
        if let Some(known) = &proc.identity {
            if known.pid != pid || (known.start_ticks != 0 && start_ticks != 0 && known.start_ticks != start_ticks) {
                return Err(denied("the caller is not the process that was started"));
            }
        }
        proc.registered = true;
        proc.heard(now, self.out.unix_ms());
        Ok(proc.assignment.clone())
    }

    pub(super) fn opened(&mut self, token: &str, commands: Commands, now: Instant) -> Result<ProcKey, Refusal> {
        let denied = |why: &str| Refusal::new(RefusalKind::Denied, why);
        let known = self.tokens.get(token).and_then(|k| self.procs.get_mut(k)).filter(|p| p.registered);
        let proc = known.ok_or_else(|| denied("register first"))?;
        if proc.commands.is_some() || proc.was_closed() {
            return Err(denied("this worker has a control stream already"));
        }
        proc.heard(now, self.out.unix_ms());
        proc.commands = Some(commands);
        let (key, role, ending) = (proc.key, proc.role, proc.is_ending());
        // Told to stop while it was starting: it may hear that at last.
        if let Role::Rank { job, .. } = role {
            if self.jobs.get(&job).is_some_and(|j| j.stop.is_some()) && ending {
                self.command(key, stop_command(false));
            }
            self.spread_trace(job);
        }
        Ok(key)
    }

    /// Sends a command; a worker that does not read has other problems, which its heartbeat shows.
    pub(super) fn command(&mut self, key: ProcKey, command: pb::command::Command) -> bool {
        let commands = self.procs.get(&key).and_then(|p| p.commands.as_ref());
        commands.is_some_and(|c| c.try_send(Ok(pb::Command { command: Some(command) })).is_ok())
    }

    pub(super) fn report(&mut self, key: ProcKey, report: Report, now: Instant) {
        let unix_ms = self.out.unix_ms();
        let Some(proc) = self.procs.get_mut(&key) else { return };
        let role = proc.role;
        // Everything that a worker says is a sign of life, its heartbeat only the most regular one.
        proc.heard(now, unix_ms);
        if !matches!(report, Report::Heartbeat(_)) {
            proc.works(now);
        }
        match report {
            Report::Heartbeat(h) => {
                if let Some((job, rank, text)) = self.disbelief_of_heartbeat(key, h.step) {
                    return self.disbelieve(key, job, rank, text, now);
                }
                let Some(proc) = self.procs.get_mut(&key) else { return };
                let left = proc.moves(h.step, h.phase, now);
                if let Role::Rank { job, .. } = role {
                    if let (Some((phase, took)), Some(job)) = (left, self.jobs.get_mut(&job)) {
                        job.learn(phase, took);
                    }
                    self.look_at_phases(job);
                }
            }
            Report::Result(result) => {
                let failed = !result.ok;
                proc.finish(result, now);
                let cause = proc.cause.clone();
                if let (Role::Rank { job, rank }, true, Some(cause)) = (role, failed, cause) {
                    self.sign(job, rank, cause, now);
                }
            }
            Report::Metrics(metrics) => {
                if let Role::Rank { job, rank: 0 } = role {
                    match self.disbelief(key, job, metrics.step) {
                        None => self.step_committed(job, metrics),
                        Some(text) => self.disbelieve(key, job, 0, text, now),
                    }
                }
            }
            Report::Event(event) => {
                let level = match event.level.as_str() {
                    "error" => Level::Error,
                    "warn" => Level::Warn,
                    _ => Level::Info,
                };
                match role {
                    Role::Rank { job, rank } => self.note(job, level, &event.text, Some(rank)),
                    Role::Prepare { job } => self.note(job, level, &event.text, None),
                    Role::OneOff { .. } | Role::GivenUp => {}
                }
            }
            Report::Progress(p) => {
                if let Role::Rank { job, rank: 0 } | Role::Prepare { job } = role {
                    self.progress(job, &p, now);
                }
            }
            Report::Checkpoint(written) => {
                if let Role::Rank { job, rank: 0 } = role {
                    self.checkpoint_written(job, written);
                }
            }
            Report::Trace(report) => {
                if let Role::Rank { job, .. } = role {
                    self.trace_part(job, report);
                }
            }
            Report::TokenText(text) => {
                if let Role::OneOff { id } = role {
                    self.one_off_token(id, text);
                }
            }
        }
    }

    /// Why a step that a rank says is committed cannot be. Steps come one after the other, and end.
    fn disbelief(&mut self, key: ProcKey, job: JobKey, step: u64) -> Option<String> {
        let steps = self.jobs.get(&job).map_or(0, |j| j.record.steps);
        let proc = self.procs.get_mut(&key)?;
        if proc.disbelieved {
            return Some(format!("{} goes on to report steps", proc.who()));
        }
        let before = proc.told.replace(step);
        let who = proc.who();
        if steps > 0 && step > steps {
            return Some(format!("{who} says that step {step} is committed, and the job has {steps}"));
        }
        match before {
            Some(before) if step != before + 1 => Some(format!("{who} says that step {step} is committed, right after step {before}")),
            Some(_) => None,
            // The first word of a process follows on nothing that it said; the segment knows how far it is.
            None => match self.contents(job) {
                Contents::Step(there) if step > there => {
                    Some(format!("{who} says that step {step} is committed, and its parameter store is at step {there}"))
                }
                Contents::Filling => Some(format!("{who} says that step {step} is committed, and its parameter store is not filled yet")),
                Contents::Step(_) | Contents::Unknown => None,
            },
        }
    }

    /// Why a rank cannot be at the step that its heartbeat names: it works on the one after the last that is committed, and
    /// enqueues the next one while that is committed.
    fn disbelief_of_heartbeat(&self, key: ProcKey, step: u64) -> Option<(JobKey, usize, String)> {
        const AHEAD: u64 = 2;
        let proc = self.procs.get(&key).filter(|p| !p.disbelieved)?;
        let Role::Rank { job: job_key, rank } = proc.role else { return None };
        let job = self.jobs.get(&job_key)?;
        let steps = job.record.steps;
        if steps > 0 && step > steps {
            return Some((job_key, rank, format!("{} says that it works on step {step}, and the job has {steps}", proc.who())));
        }
        // What rank 0 reports may be on its way for a long time, if the daemon was stopped: the segment decides.
        if step <= job.furthest + AHEAD {
            return None;
        }
        match self.contents(job_key) {
            Contents::Step(there) if step > there + AHEAD => {
                let text = format!("{} says that it works on step {step}, and its parameter store is at step {there}", proc.who());
                Some((job_key, rank, text))
            }
            _ => None,
        }
    }

    /// What the job's segment holds.
    pub(super) fn contents(&self, key: JobKey) -> Contents {
        let segment = self.jobs.get(&key).and_then(|j| j.record.segment.as_ref());
        segment.map_or(Contents::Unknown, |s| self.out.contents(&s.name))
    }

    /// A rank says what cannot be.
    fn disbelieve(&mut self, key: ProcKey, job: JobKey, rank: usize, text: String, now: Instant) {
        if let Some(proc) = self.procs.get_mut(&key) {
            proc.disbelieved = true;
        }
        self.blame(key, job, rank, Cause::defect(now, Sign::Disbelieved, text), now);
    }

    /// Something is wrong with a rank that does not know it.
    pub(super) fn blame(&mut self, key: ProcKey, job: JobKey, rank: usize, cause: Cause, now: Instant) {
        if let Some(proc) = self.procs.get_mut(&key) {
            proc.cause.get_or_insert_with(|| cause.clone());
        }
        self.sign(job, rank, cause, now);
    }

    /// A rank that sends heartbeats may still hang: in a collective, in a driver, in a loop. When one has stayed in a
    /// phase for too long, the one that is furthest behind is named.
    pub(super) fn look_for_stalls(&mut self, key: ProcKey, now: Instant) {
        let Some(proc) = self.procs.get(&key) else { return };
        let Some(still) = proc.still(now) else { return };
        let job_key = match proc.role {
            Role::Rank { job, .. } => job,
            Role::Prepare { .. } => return self.look_at_preparation(key, still, now),
            Role::OneOff { .. } | Role::GivenUp => return,
        };
        let Some(job) = self.jobs.get(&job_key).filter(|j| matches!(j.phase, Phase::Starting | Phase::Running)) else { return };
        let times = job.phases.get(&proc.phase);
        let practised = times.is_some_and(|t| t.completed as usize >= PRACTISED as usize * job.ranks.len().max(1));
        if still <= self.limits.stall_timeout(times.map(|t| t.longest), practised) {
            return;
        }
        let gang: Vec<(usize, &Proc)> = job.ranks.iter().enumerate().filter_map(|(i, r)| Some((i, self.procs.get(&r.key)?))).collect();
        let suspects = gang.iter().filter(|(_, p)| p.still(now).is_some());
        let Some((rank, suspect)) = suspects.min_by_key(|(_, p)| p.suspicion()).copied() else { return };
        let known = match job.phases.get(&suspect.phase) {
            Some(times) => format!("this job took {:.1} s at most before", times.longest.as_secs_f64()),
            None => "this job has not completed that phase before".into(),
        };
        let others: Vec<String> =
            gang.iter().filter(|(r, _)| *r != rank).map(|(r, p)| format!("rank {r} is in {} of step {}", p.phase, p.step)).collect();
        let others = if others.is_empty() { String::new() } else { format!("; {}", others.join(", ")) };
        let text = format!(
            "{} has been in phase {} of step {} for {:.1} s, and {known}{others}",
            suspect.who(),
            suspect.phase,
            suspect.step,
            suspect.still(now).unwrap_or_default().as_secs_f64()
        );
        let key = suspect.key;
        self.blame(key, job_key, rank, Cause::defect(now, Sign::Stalled, text), now);
    }

    /// A preparation sends heartbeats from a thread of its own, too, while it waits for a file system or a driver for ever.
    fn look_at_preparation(&mut self, key: ProcKey, still: Duration, now: Instant) {
        let kill_timeout = self.limits.kill_timeout();
        if still <= self.limits.prepare_timeout() {
            return;
        }
        let Some(proc) = self.procs.get_mut(&key) else { return };
        let phase = if proc.phase.is_empty() { "start" } else { proc.phase.as_str() };
        let text = format!(
            "{} has told of no progress for {:.1} s, in phase {phase} (supervision.prepare_timeout_seconds)",
            proc.who(),
            still.as_secs_f64()
        );
        tracing::warn!("{text}");
        proc.cause.get_or_insert(Cause::defect(now, Sign::Stalled, text));
        proc.end(now, kill_timeout);
    }

    /// A gang runs once every rank has left the phases of starting up.
    fn look_at_phases(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get(&key).filter(|j| matches!(j.phase, Phase::Starting) && j.stop.is_none()) else { return };
        let at_work = |r: &Rank| self.procs.get(&r.key).is_some_and(|p| !is_start_up(&p.phase));
        if job.ranks.iter().all(at_work) {
            self.enter(key, Phase::Running, String::new());
        }
    }

    fn step_committed(&mut self, key: JobKey, metrics: pb::Metrics) {
        let limit = self.job_limits.metrics_history;
        let Some(job) = self.jobs.get_mut(&key) else { return };
        // A new gang tells what its predecessor may have died before it could, and that may have come after all.
        if job.history.back() == Some(&metrics) {
            return;
        }
        // The budget is for failures in a row; a step that only repeats what was there before is no progress.
        if metrics.step > job.furthest {
            job.furthest = metrics.step;
            job.failures = 0;
            job.first_cause = None;
        }
        job.record.step = metrics.step;
        hit(Point::JobStep);
        job.tell(pb::watch_event::Event::Metrics(metrics.clone()));
        push_history(&mut job.history, metrics, limit);
        if matches!(job.phase, Phase::Starting) && job.stop.is_none() {
            self.enter(key, Phase::Running, String::new());
        }
    }

    fn progress(&mut self, key: JobKey, p: &pb::Progress, now: Instant) {
        let Some(job) = self.jobs.get_mut(&key).filter(|j| matches!(j.phase, Phase::Preparing(_) | Phase::Starting)) else { return };
        let complete = p.total > 0 && p.done >= p.total;
        if !complete && job.progress_at.is_some_and(|at| now.saturating_duration_since(at) < PROGRESS_INTERVAL) {
            return;
        }
        job.progress_at = Some(now);
        job.record.message = match p.total {
            0 => format!("{} ({})", p.what, p.done),
            total => format!("{}: {:.0} %", p.what, 100.0 * p.done as f64 / total as f64),
        };
        // Told, not saved: it is stale in a moment.
        if let (Some(view), Some(job)) = (self.view(key), self.jobs.get_mut(&key)) {
            job.tell(pb::watch_event::Event::Job(view));
        }
    }

    /// A sign that a rank has failed. The first starts the clock; what others say until it rings is collected too.
    pub(super) fn sign(&mut self, key: JobKey, rank: usize, cause: Cause, now: Instant) {
        let judge_at = now + self.limits.settle();
        let Some(job) = self.jobs.get_mut(&key) else { return };
        // One that was told to stop may end in any way it likes.
        if job.stop.is_some() {
            return;
        }
        match &mut job.phase {
            Phase::Starting | Phase::Running => {
                if cause.sign == Sign::Unrecorded {
                    job.record.message.clone_from(&cause.text);
                } else {
                    tracing::warn!(job = job.record.id, rank, "{}", cause.text);
                    job.record.message = format!("a worker failed: {}", cause.text);
                }
                job.phase = Phase::Failing { judge_at, ended: false, causes: vec![cause] };
                self.drop_checkpoint_waiters(key, "a worker failed and the gang is started again; ask again");
                self.give_up_trace(key, "a worker failed and the gang is started again; ask again");
                hit(Point::JobFailing);
                self.changed(key);
            }
            Phase::Failing { causes, .. } => causes.push(cause),
            _ => {}
        }
    }

    /// Time has come for a job that waits for it.
    pub(super) fn job_due(&mut self, key: JobKey, now: Instant) {
        let kill_timeout = self.limits.kill_timeout();
        let Some(job) = self.jobs.get_mut(&key) else { return };
        match &mut job.phase {
            Phase::Failing { ended, .. } => {
                *ended = true;
                for rank in &job.ranks {
                    if let Some(proc) = self.procs.get_mut(&rank.key) {
                        proc.end(now, kill_timeout);
                    }
                }
            }
            Phase::Backoff(_) => self.resume(key, now),
            Phase::Removing(_) => self.settle_again(key),
            _ => {}
        }
    }

    pub(super) fn rank_gone(&mut self, key: JobKey, rank: usize, outcome: Outcome, now: Instant) {
        if let Outcome::Failed(cause) = &outcome {
            self.sign(key, rank, cause.clone(), now);
        }
        let Some(job) = self.jobs.get_mut(&key) else { return };
        if let Some(slot) = job.ranks.get_mut(rank) {
            slot.outcome = Some(outcome);
        }
        if !job.ranks.is_empty() && job.ranks.iter().all(|r| r.outcome.is_some()) {
            self.gang_gone(key, now);
        }
    }

    /// Every rank is gone: what came of them decides what follows.
    fn gang_gone(&mut self, key: JobKey, now: Instant) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let outcomes: Vec<Outcome> = job.ranks.drain(..).filter_map(|r| r.outcome).collect();
        job.forget_workers();
        // Of this generation there was never a process: while the disk takes no record, none is used up, nor the logs of earlier ones.
        let unborn = |o: &Outcome| matches!(o, Outcome::Failed(Cause { sign: Sign::Unrecorded, .. }));
        if !outcomes.is_empty() && outcomes.iter().all(unborn) {
            job.record.generation -= 1;
        }
        let mut stopped = false;
        let mut failures: Vec<Cause> = Vec::new();
        for outcome in outcomes {
            match outcome {
                Outcome::Failed(cause) => failures.push(cause),
                Outcome::Done { json, stopped: early } => {
                    stopped |= early;
                    if let Ok(o) = serde_json::from_str::<TrainOutcome>(&json) {
                        let r = &mut job.record;
                        r.step = r.step.max(o.step);
                        r.output = o.output.or(r.output.take());
                        r.sample = o.sample.or(r.sample.take());
                        r.checkpoint = o.checkpoint.or(r.checkpoint.take());
                    }
                }
            }
        }
        let done = failures.is_empty() && !stopped;
        match (&job.phase, job.stop) {
            // It finished before it heard that it should stop.
            _ if done => {
                let message = format!("finished after step {}", job.record.step);
                self.conclude(key, End::Final { state: State::Succeeded, code: 0, message }, now);
            }
            (_, Some(_)) => self.conclude_stopped(key, now),
            (Phase::Failing { causes, .. }, None) => {
                // The first signs by time, in the words of those who know the exit and the last lines, too.
                let causes: Vec<Cause> = causes.iter().map(|c| fuller(c, &failures)).collect();
                self.judge(key, &causes, now);
            }
            (_, None) => {
                let text = "the gang stopped early without having been told to".to_string();
                failures.push(Cause::defect(now, Sign::Reported, text));
                self.judge(key, &failures, now);
            }
        }
    }

    /// All processes of the job are gone after a failure: restart, or the end.
    pub(super) fn judge(&mut self, key: JobKey, causes: &[Cause], now: Instant) {
        let budget = self.limits.restart_budget;
        let Some(root) = causes.iter().min_by_key(|c| c.at) else { return };
        if root.sign == Sign::Unrecorded {
            return self.wait_for_room(key, root.text.clone(), now);
        }
        let mut text = root.describe();
        let sign = root.sign.name();
        *self.tally.failures_by_cause.entry(sign).or_default() += 1;
        let again = self.jobs.get(&key).is_some_and(|j| j.record.generation > 1 || j.failures > 0);
        let verdict = self.judge_gpus(causes, again, &mut text);
        let full = causes.iter().any(|c| c.gpu.as_ref().is_some_and(GpuError::is_out_of_memory));
        let Some(job) = self.jobs.get_mut(&key) else { return };
        if verdict == Some(Verdict::Fail) {
            let kind = if root.kind == ErrorKind::Internal { ErrorKind::Resources } else { root.kind };
            return self.fail(key, EngineError::new(kind, text), now);
        }
        // An error of a GPU that another one would not have is worth a restart, whatever the worker made of it.
        if root.kind != ErrorKind::Internal && verdict.is_none() {
            return self.fail(key, EngineError::new(root.kind, text), now);
        }
        job.failures += 1;
        let first = job.first_cause.get_or_insert_with(|| text.clone()).clone();
        if job.failures > budget {
            let last = if first == text { String::new() } else { format!("\nthe last failure: {text}") };
            let message = format!("gave up after {budget} restart(s) without a newly committed step; the first failure: {first}{last}");
            let kind = if full { ErrorKind::Resources } else { ErrorKind::Internal };
            return self.fail(key, EngineError::new(kind, message), now);
        }
        *self.tally.restarts_by_cause.entry(sign).or_default() += 1;
        job.record.restarts += 1;
        // The driver gives memory back some time after the process that had it is gone.
        let pause = self.limits.backoff(job.failures + u32::from(full));
        job.phase = Phase::Backoff(now + pause);
        job.record.message = format!("restart {} of {budget} without a new step: {text}", job.failures);
        hit(Point::JobBackoff);
        let message = format!("{text}\nstarted again ({} of {budget} without a new step)", job.failures);
        self.note(key, Level::Error, &message, None);
        self.changed(key);
        if pause.is_zero() {
            self.resume(key, now);
        }
    }

    /// Ends a job early, whatever it is doing.
    pub(super) fn stop_job(&mut self, key: JobKey, by: Stop, now: Instant) {
        let kill_timeout = self.limits.kill_timeout();
        let grace = self.limits.stop_timeout() / 2;
        let Some(job) = self.jobs.get_mut(&key) else { return };
        // A cancelled job stays so when the daemon stops; one that stops with the daemon can still be cancelled.
        let already = job.stop;
        if job.has_ended() || already == Some(Stop::Cancel) || already == Some(by) {
            return;
        }
        job.stop = Some(by);
        job.record.cancelled |= by == Stop::Cancel;
        if by == Stop::Cancel {
            hit(Point::JobCancelling);
        }
        match &job.phase {
            Phase::Queued { .. } | Phase::Backoff(_) => self.conclude_stopped(key, now),
            Phase::Preparing(proc) => {
                if let Some(proc) = self.procs.get_mut(proc) {
                    proc.end(now, kill_timeout);
                }
                self.changed(key);
            }
            Phase::Planning | Phase::Reserving | Phase::Removing(_) => self.changed(key),
            Phase::Starting | Phase::Running | Phase::Failing { .. } => {
                // A run that goes on later is worth a checkpoint, a cancelled one has been given up.
                let all_stay = self.job_limits.keep_segments_on_stop == KeepSegments::Always;
                let checkpoint = by == Stop::Shutdown && !all_stay && job.spec.checkpoint.path.is_some();
                let keys: Vec<ProcKey> = job.ranks.iter().map(|r| r.key).collect();
                for proc in keys {
                    let told = self.command(proc, stop_command(checkpoint));
                    if let Some(proc) = self.procs.get_mut(&proc) {
                        proc.end(if told { now + grace } else { now }, kill_timeout);
                    }
                }
                self.changed(key);
            }
            Phase::Ended => {}
        }
    }
}

/// Phases in which a rank is not at work yet.
fn is_start_up(phase: &str) -> bool {
    phase.is_empty() || ["start", "attach", "load", "recover", "open"].iter().any(|p| phase.starts_with(p))
}

fn stop_command(checkpoint: bool) -> pb::command::Command {
    pb::command::Command::Stop(pb::StopCommand { checkpoint })
}

/// The same failure of the same worker, told after its exit.
fn fuller(sign: &Cause, told_later: &[Cause]) -> Cause {
    let same = |c: &&Cause| c.text == sign.text;
    let tail = told_later.iter().find(same).map_or_else(|| sign.tail.clone(), |c| c.tail.clone());
    Cause { tail, ..sign.clone() }
}
