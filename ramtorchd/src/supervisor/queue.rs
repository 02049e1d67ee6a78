//! From the queue to a gang: devices, preparation, plan, judgement, segment.

use super::Supervisor;
use super::admission::{self, Need, Verdict};
use super::devices::{Holder, Lease};
use super::job::{End, Job, Phase, Stop};
use super::message::{JobKey, Planned};
use super::outside::{Contents, NewSegment};
use super::proc::{Outcome, Role};
use super::record::{SegmentRecord, State};
use crate::config::KeepSegments;
use ramtorch_failpoint::{Point, hit};
use ramtorch_worker::{DeviceKind, DeviceSpec, EngineError, ErrorKind, Plan, PlanRequest, Prepared, Task};
use std::time::Instant;

impl Supervisor {
    /// A new job: at the end of the queue, and what everybody there waits for is known.
    pub(super) fn queue_up(&mut self, key: JobKey, now: Instant) {
        let head = self.blocked.and_then(|head| self.jobs.get(&head)).filter(|j| matches!(j.phase, Phase::Queued { .. }));
        match head.map(|head| turn(&head.record.id)) {
            Some(text) if self.stopping.is_none() => self.wait(key, &text, None),
            _ => self.schedule(now),
        }
    }

    /// Starts waiting jobs, oldest first, until one has to wait.
    pub(super) fn schedule(&mut self, now: Instant) {
        if self.stopping.is_some() {
            return;
        }
        self.blocked = None;
        let waiting: Vec<JobKey> = self.jobs.active().filter(|j| matches!(j.phase, Phase::Queued { .. })).map(|j| j.key).collect();
        // What all others wait for, once one has to wait. This goes through a queue of any length at every event of any job.
        let mut behind: Option<String> = None;
        for key in waiting {
            if let Some(text) = &behind {
                self.wait(key, text, None);
                continue;
            }
            // One that could not even be started has ended and let others go, in here.
            let Some(job) = self.jobs.get(&key).filter(|j| matches!(j.phase, Phase::Queued { .. })) else { continue };
            let after = turn(&job.record.id);
            if matches!(job.phase, Phase::Queued { retry_at: Some(at) } if now < at) {
                (self.blocked, behind) = (Some(key), Some(after));
                continue;
            }
            if let Some(why) = job.obstacle() {
                self.wait(key, &why, None);
                continue;
            }
            let resume = job.record.plan.as_ref().filter(|_| job.record.segment.is_some());
            match self.pool.lease(&job.spec, resume) {
                Lease::Now(devices) => self.go(key, devices, now),
                Lease::Later => {
                    (self.blocked, behind) = (Some(key), Some(after));
                    self.wait(key, "waits for devices that other jobs hold", None);
                }
                Lease::NotHere(why) => {
                    let kept = if resume.is_some() { "; its parameter store is kept" } else { "" };
                    self.wait(key, &format!("waits: {why}{kept}; start the daemon with other devices, or cancel it"), None);
                }
            }
        }
    }

    /// Devices or memory came free: jobs that wait for memory are looked at again, too.
    pub(super) fn freed(&mut self, now: Instant) {
        for key in self.jobs.active_keys() {
            if let Some(Job { phase: Phase::Queued { retry_at }, .. }) = self.jobs.get_mut(&key) {
                *retry_at = None;
            }
        }
        self.schedule(now);
    }

    fn wait(&mut self, key: JobKey, message: &str, retry_at: Option<Instant>) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let waited = matches!(job.phase, Phase::Queued { .. });
        let news = job.record.message != message;
        job.phase = Phase::Queued { retry_at };
        if news {
            job.record.message = message.to_string();
        }
        match waited {
            false => self.changed(key),
            // What a job waits for changes with every job before it, and the next daemon finds out anew: it is not worth
            // the disk. A long queue whose first job is cancelled would otherwise be written whole.
            true if news => self.show(key),
            true => {}
        }
    }

    /// A job has its devices: on from where it stands.
    fn go(&mut self, key: JobKey, devices: Vec<usize>, now: Instant) {
        self.pool.take(&devices, Holder::Job(key));
        let Some(job) = self.jobs.get_mut(&key) else { return };
        job.record.world_size = u32::try_from(devices.len()).unwrap_or(u32::MAX);
        job.leases = devices;
        self.resume(key, now);
    }

    /// On from what there is of a job that holds devices: a segment, a preparation, or nothing.
    pub(super) fn resume(&mut self, key: JobKey, now: Instant) {
        let Some(job) = self.jobs.get(&key) else { return };
        if self.pool.any_quarantined(&job.leases) {
            return self.back_to_queue(key, "waits for healthy devices", None, now);
        }
        if let Some(why) = job.obstacle() {
            return self.back_to_queue(key, &why, None, now);
        }
        match (&job.record.segment, &job.record.prepared) {
            (Some(_), _) => self.start_gang(key, now),
            (None, Some(_)) => self.begin_planning(key, now),
            (None, None) => self.begin_preparing(key, now),
        }
    }

    /// The devices of a job that holds some, by rank.
    pub(super) fn gang_devices(&self, key: JobKey) -> Vec<DeviceSpec> {
        let Some(job) = self.jobs.get(&key) else { return Vec::new() };
        job.leases.iter().map(|i| self.pool.spec_for(*i, &job.spec)).collect()
    }

    fn begin_preparing(&mut self, key: JobKey, now: Instant) {
        let devices = self.gang_devices(key);
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let Some(first) = devices.first() else { return };
        // Preparation is one process with the threads of the whole gang.
        let device = DeviceSpec { threads: devices.iter().map(|d| d.threads).sum(), ..first.clone() };
        // That of the gang to come.
        let generation = job.record.generation + 1;
        let id = job.record.id.clone();
        let gpus = devices.iter().filter(|d| d.kind == DeviceKind::Cuda).map(|d| d.index).collect();
        // Of one that is known, this daemon knows more (`Job::lost_checkpoint`).
        let note = || self.out.history_file(&id).with_file_name(ramtorch_worker::FIRST_CHECKPOINT);
        let noted = job.record.checkpoint.is_none().then(note);
        let task = Task::Prepare { spec: job.spec.clone(), cache_dir: self.out.cache_dir(), gpus, gpus_free: true, noted };
        let (world, at) = (devices.len(), job.leases.first().copied());
        let log = self.out.log_dir(&id).join(format!("prepare.g{generation}.log"));
        let assignment = ramtorch_worker::Assignment { job_id: id.clone(), generation, rank: 0, world_size: world, device, task };
        match self.spawn(Role::Prepare { job: key }, assignment, at, log, now) {
            Ok(proc) => self.enter(key, Phase::Preparing(proc), "reads model and data".into()),
            Err(e) => self.fail(key, e, now),
        }
    }

    pub(super) fn prepare_gone(&mut self, key: JobKey, outcome: Outcome, now: Instant) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        if job.stop.is_some() {
            return self.conclude_stopped(key, now);
        }
        let result = match outcome {
            Outcome::Done { json, .. } => serde_json::from_str::<Prepared>(&json)
                .map_err(|e| EngineError::internal(format!("the preparing worker's result makes no sense: {e}"))),
            Outcome::Failed(cause) => return self.judge(key, &[cause], now),
        };
        match result {
            Ok(prepared) => {
                if let Some(text) = job.lost_checkpoint(&prepared) {
                    return self.fail(key, EngineError::input(text), now);
                }
                // Known from now on, whatever becomes of the job before its own first one.
                if let Some(resume) = &prepared.resume {
                    job.record.checkpoint = Some(resume.path.clone());
                    job.record.checkpoint_step = Some(resume.step);
                }
                job.record.model.clone_from(&prepared.description);
                job.record.steps = prepared.steps;
                job.record.prepared = Some(prepared);
                self.begin_planning(key, now);
            }
            Err(e) => self.fail(key, e, now),
        }
    }

    fn begin_planning(&mut self, key: JobKey, _now: Instant) {
        let devices = self.gang_devices(key);
        let (pending, held) = self.promises(key);
        let memory = self.out.memory();
        let Some(job) = self.jobs.get(&key) else { return };
        let Some(prepared) = job.record.prepared.clone() else { return };
        let segment_bytes_available = admission::segment_limit(memory, pending);
        let alone = admission::segment_limit(admission::alone(memory, held), Need::default());
        let ram_bytes_available = admission::ram_limit(memory, pending);
        let request = PlanRequest { spec: job.spec.clone(), prepared, devices, segment_bytes_available, ram_bytes_available };
        self.enter(key, Phase::Planning, "makes the plan".into());
        self.out.plan(key, request, alone);
    }

    /// What other jobs were promised and have not taken yet, and what they have taken.
    pub(super) fn promises(&self, besides: JobKey) -> (Need, Need) {
        let (mut pending, mut held) = (Need::default(), Need::default());
        for job in self.jobs.active().filter(|j| j.key != besides) {
            let Some(plan) = &job.record.plan else { continue };
            let (segment, host) = (Need { segment: plan.segment_bytes, host: 0 }, Need { segment: 0, host: plan.host_bytes });
            if job.record.segment.is_some() {
                held += segment;
            }
            match job.phase {
                Phase::Reserving => {
                    pending += segment;
                    pending += host;
                }
                Phase::Starting | Phase::Backoff(_) => pending += host,
                Phase::Running | Phase::Failing { .. } => held += host,
                _ => {}
            }
        }
        (pending, held)
    }

    pub(super) fn planned(&mut self, key: JobKey, outcome: Planned, now: Instant) {
        let Some(job) = self.jobs.get_mut(&key).filter(|j| matches!(j.phase, Phase::Planning)) else { return };
        if job.stop.is_some() {
            return self.conclude_stopped(key, now);
        }
        match outcome {
            Planned::Fits(plan) => {
                let need = Need { segment: plan.segment_bytes, host: plan.host_bytes };
                let (pending, held) = self.promises(key);
                match admission::judge(need, self.out.memory(), pending, held) {
                    Verdict::Admit => self.reserve(key, *plan),
                    Verdict::Wait(why) => self.wait_for_memory(key, why, now),
                    Verdict::Never(why) => self.fail(key, EngineError::new(ErrorKind::Resources, why), now),
                }
            }
            Planned::Later(why) => self.wait_for_memory(key, why, now),
            Planned::Never(e) => self.fail(key, e, now),
        }
    }

    fn wait_for_memory(&mut self, key: JobKey, why: String, now: Instant) {
        let retry_at = Some(now + super::MEMORY_RETRY);
        self.back_to_queue(key, &format!("waits for memory that other jobs hold: {why}"), retry_at, now);
    }

    /// A job that held devices waits again. From now on it may be the one that the others wait for, and no longer one behind it.
    fn back_to_queue(&mut self, key: JobKey, message: &str, retry_at: Option<Instant>, now: Instant) {
        self.release_devices(key);
        self.wait(key, message, retry_at);
        self.schedule(now);
    }

    fn release_devices(&mut self, key: JobKey) {
        self.pool.release(Holder::Job(key));
        if let Some(job) = self.jobs.get_mut(&key) {
            job.leases.clear();
        }
    }

    fn reserve(&mut self, key: JobKey, plan: Plan) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let generation = job.record.generation + 1;
        let name = format!("/ramtorch-{}-{generation}", job.record.id);
        let segment = NewSegment { name, job_id: job.record.id.clone(), generation, plan: Box::new(plan.clone()) };
        job.record.plan = Some(plan);
        self.enter(key, Phase::Reserving, "reserves the parameter store".into());
        self.out.create_segment(key, segment);
    }

    pub(super) fn created(&mut self, key: JobKey, outcome: Result<(), EngineError>, now: Instant) {
        let boot_id = self.out.boot_id().to_string();
        let Some(job) = self.jobs.get_mut(&key).filter(|j| matches!(j.phase, Phase::Reserving)) else { return };
        // Its name is taken from here on, whatever came of it: removal is by name, and a missing one is fine.
        let name = format!("/ramtorch-{}-{}", job.record.id, job.record.generation + 1);
        let bytes = job.record.plan.as_ref().map_or(0, |p| p.segment_bytes);
        job.record.segment = Some(SegmentRecord { name, bytes, boot_id });
        match outcome {
            _ if job.stop == Some(Stop::Shutdown) => {
                // Whether it is whole or not, nothing is in it.
                let message = "the daemon stopped; the next one starts it".into();
                self.conclude(key, End::Requeue { message, keep: false }, now);
            }
            _ if job.stop.is_some() => self.conclude_stopped(key, now),
            Ok(()) => self.start_gang(key, now),
            Err(e) => self.fail(key, e, now),
        }
    }

    /// Puts a job into a phase and tells everyone.
    pub(super) fn enter(&mut self, key: JobKey, phase: Phase, message: String) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        hit(match &phase {
            Phase::Preparing(_) => Point::JobPreparing,
            Phase::Planning => Point::JobPlanning,
            Phase::Reserving => Point::JobReserving,
            Phase::Starting => Point::JobStarting,
            _ => Point::JobRunning,
        });
        job.phase = phase;
        job.record.message = message;
        self.changed(key);
    }

    /// Ends a job with an error that no restart can mend.
    pub(super) fn fail(&mut self, key: JobKey, e: EngineError, now: Instant) {
        self.conclude(key, End::Final { state: State::Failed, code: e.kind.exit_code(), message: e.message }, now);
    }

    /// Ends a job that was told to stop and whose processes are gone.
    pub(super) fn conclude_stopped(&mut self, key: JobKey, now: Instant) {
        let Some(job) = self.jobs.get(&key) else { return };
        match job.stop {
            Some(Stop::Shutdown) => {
                let end = self.requeued(key);
                self.conclude(key, end, now);
            }
            Some(Stop::Cancel) | None => self.conclude_cancelled(key, now),
        }
    }

    /// What becomes of an unfinished job when the daemon stops. Its processes are gone: its segment is at rest.
    fn requeued(&self, key: JobKey) -> End {
        let Some(job) = self.jobs.get(&key) else { return End::Requeue { message: String::new(), keep: true } };
        let (step, saved) = (job.record.step, job.saved_step());
        let unsaved = match job.record.segment.as_ref().map(|s| self.out.contents(&s.name)) {
            // Whatever it is filled from is still there.
            None | Some(Contents::Filling) => None,
            Some(Contents::Step(there)) => (there > saved).then(|| match there - saved {
                1 => format!("step {there}"),
                _ => format!("steps {} to {there}", saved + 1),
            }),
            Some(Contents::Unknown) => Some("whatever is in its parameter store, which cannot be read".into()),
        };
        let keep = match self.job_limits.keep_segments_on_stop {
            KeepSegments::Always => job.record.segment.is_some(),
            KeepSegments::Unsaved => unsaved.is_some(),
            // One that this program cannot read is another's, and not this one's to remove.
            KeepSegments::Never => job.held.is_some(),
        };
        let message = match (keep, unsaved) {
            (true, _) => format!("the daemon stopped after step {step}; the next one goes on from its parameter store"),
            (false, Some(lost)) => {
                let from = if saved > 0 { format!("the checkpoint of step {saved}") } else { "the start".into() };
                let text = format!(
                    "the daemon stopped and kept no parameter store (jobs.keep_segments_on_stop = false): lost is {lost}; the next one goes on from {from}"
                );
                tracing::warn!(job = job.record.id, "{text}");
                text
            }
            (false, None) if saved > 0 => format!("the daemon stopped; the next one goes on from the checkpoint of step {saved}"),
            (false, None) => "the daemon stopped; the next one starts it".into(),
        };
        End::Requeue { message, keep }
    }

    pub(super) fn conclude_cancelled(&mut self, key: JobKey, now: Instant) {
        let step = self.jobs.get(&key).map_or(0, |j| j.record.step);
        let message = if step > 0 { format!("cancelled after step {step}") } else { "cancelled".into() };
        self.conclude(key, End::Final { state: State::Cancelled, code: ramtorch_client::exit::CANCELLED, message }, now);
    }

    /// The end of a job's stay on its devices: its processes are gone; its segment goes now, unless the next daemon is
    /// to find it.
    pub(super) fn conclude(&mut self, key: JobKey, end: End, now: Instant) {
        let keep = matches!(end, End::Requeue { keep: true, .. });
        let Some(job) = self.jobs.get_mut(&key) else { return };
        job.ranks.clear();
        self.drop_checkpoint_waiters(key, "the job has ended");
        self.give_up_trace(key, "the job has ended");
        let Some(job) = self.jobs.get_mut(&key) else { return };
        match job.record.segment.as_ref().filter(|_| !keep).map(|s| s.name.clone()) {
            Some(name) => {
                // The end is durable before the segment goes: otherwise a daemon that starts in between would find an
                // unfinished job without its segment, and run it again from its newest checkpoint or from the start.
                if let End::Final { state, code, message } = &end {
                    let at = self.out.unix_ms();
                    settle(&mut job.record, *state, *code, message, at);
                    self.out.save(&job.record);
                }
                let id = job.record.id.clone();
                let is_end = matches!(end, End::Final { .. });
                job.phase = Phase::Removing(end);
                hit(Point::JobRemoving);
                self.out.remove_segment(key, &id, name, is_end);
            }
            None => self.finish(key, end, now),
        }
    }

    pub(super) fn removed(&mut self, key: JobKey, outcome: Result<(), String>, now: Instant) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let Phase::Removing(end) = &job.phase else { return };
        let end = end.clone();
        job.record.segment = None;
        (job.settle_at, job.waits_for_room) = (None, None);
        if let Err(e) = outcome {
            self.note(key, ramtorch_worker::Level::Error, &format!("the parameter store could not be removed: {e}"), None);
        }
        self.finish(key, end, now);
    }

    /// The end of a job is not on the disk, so that its segment stays, until it is.
    pub(super) fn unsettled(&mut self, key: JobKey, why: &str, now: Instant) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let message = match &job.phase {
            // Its segment could not be registered, and was not made.
            Phase::Reserving if job.stop.is_some() => return self.conclude_stopped(key, now),
            Phase::Reserving => return self.wait_for_room(key, room(why), now),
            Phase::Removing(End::Final { message, .. }) => message,
            _ => return,
        };
        // Shown only: the end that is to be made durable has its own words.
        let text = format!("{message}; its parameter store is kept meanwhile: it {}", room(why));
        job.settle_at = Some(now + super::RECORD_RETRY);
        if job.waits_for_room.replace(text.clone()).is_none() {
            self.note(key, ramtorch_worker::Level::Error, &text, None);
        }
        self.show(key);
    }

    /// The state folder took no record: nothing is begun that a later daemon would not know of. The job keeps its segment and
    /// its devices, since nobody else could start either, and its budget of restarts, since none of its processes failed.
    pub(super) fn wait_for_room(&mut self, key: JobKey, text: String, now: Instant) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        job.phase = Phase::Backoff(now + super::RECORD_RETRY);
        job.record.message.clone_from(&text);
        if job.waits_for_room.replace(text.clone()).as_ref() != Some(&text) {
            self.note(key, ramtorch_worker::Level::Warn, &text, None);
        }
        self.changed(key);
    }

    /// Once more, what [`Supervisor::unsettled`] waits for.
    pub(super) fn settle_again(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let Some(name) = job.record.segment.as_ref().map(|s| s.name.clone()) else { return };
        // Far enough off that one answer comes before the next question.
        job.settle_at = job.settle_at.map(|at| at + 30 * super::RECORD_RETRY);
        let id = job.record.id.clone();
        self.out.save(&job.record);
        self.out.remove_segment(key, &id, name, true);
    }

    fn finish(&mut self, key: JobKey, end: End, now: Instant) {
        let Some(job) = self.jobs.get(&key) else { return };
        // A job that leaves the queue gives nothing to those that stay in it.
        let held = !job.leases.is_empty() || matches!(job.phase, Phase::Removing(_));
        self.release_devices(key);
        let at = self.out.unix_ms();
        let Some(job) = self.jobs.get_mut(&key) else { return };
        match end {
            End::Final { .. } => job.record.workers.clear(),
            End::Requeue { .. } => job.forget_workers(),
        }
        match end {
            End::Final { state, code, message } => {
                let id = job.record.id.as_str();
                tracing::info!(job = id, "{state:?} with exit code {code}: {message}");
                if job.record.state == State::Active {
                    settle(&mut job.record, state, code, &message, at);
                }
                job.record.prepared = None;
                self.jobs.end(key);
                hit(Point::JobEnded);
                self.changed(key);
                let Some(job) = self.jobs.get_mut(&key) else { return };
                job.stop = None;
                job.events = None;
                job.over.send_replace(true);
                self.forget_old();
            }
            End::Requeue { message, .. } => {
                if job.record.segment.is_none() {
                    // Prepared again: the newest checkpoint is another one by then.
                    job.record.prepared = None;
                    job.record.plan = None;
                }
                job.phase = Phase::Queued { retry_at: None };
                job.record.message = message;
                hit(Point::JobRequeued);
                self.changed(key);
                // Watchers are told that nothing more comes from this daemon.
                if let Some(job) = self.jobs.get_mut(&key) {
                    job.events = None;
                    job.over.send_replace(true);
                }
            }
        }
        match held {
            true => self.freed(now),
            // Where it was not the first, nobody's turn has come.
            false if self.blocked.is_none_or(|first| first == key) => self.schedule(now),
            false => {}
        }
    }

    /// Forgets the oldest ended jobs beyond the limit, and the metrics of all but the newest ended ones.
    pub(super) fn forget_old(&mut self) {
        for job in self.jobs.forget_old(super::RECENT, self.job_limits.ended_max) {
            self.out.delete(&job.record.id);
        }
    }
}

/// What everybody waits for who comes after a job that waits.
fn turn(id: &str) -> String {
    format!("waits for its turn after job {id}")
}

/// What a job waits for whose record cannot be written.
pub(super) fn room(why: &str) -> String {
    format!("waits for room in the state folder: {why}")
}

/// Writes the end of a job into its record.
fn settle(record: &mut super::record::Record, state: State, code: u8, message: &str, at: i64) {
    record.state = state;
    record.exit_code = code;
    record.message = message.to_string();
    record.ended_unix_ms = at;
}
