//! What clients ask: answered from the books, at once.

use super::Supervisor;
use super::admission::{self, Need};
use super::devices::Holder;
use super::job::{Job, Phase, Stop};
use super::message::{Books, JobKey, LogSource, Message, PlanContext, Refusal, RefusalKind, Reply, Watching};
use super::record::Record;
use super::shares::{self, Full, Shares};
use crate::access::Caller;
use ramtorch_job::JobSpec;
use ramtorch_proto::v1 as pb;
use ramtorch_worker::{DeviceSpec, EngineError, ErrorKind, Level, Source};
use std::path::PathBuf;
use std::time::Instant;

impl Supervisor {
    pub(super) fn call(&mut self, message: Message, now: Instant) {
        // A caller who has gone away needs no answer.
        match message {
            Message::Submit { record, spec, caller, reply } => drop(reply.send(self.submit(*record, *spec, &caller, now))),
            Message::Vacant { outputs, uid, reply } => drop(reply.send(self.vacant(&outputs, uid))),
            Message::Resolve { id, caller, reply } => drop(reply.send(self.resolve(&id, &caller))),
            Message::Telemetry { reply } => drop(reply.send(Ok(self.telemetry()))),
            Message::Get { id, reply } => drop(reply.send(self.find(&id).and_then(|k| self.view(k).ok_or_else(|| not_found(&id))))),
            Message::List { all, reply } => {
                let keys = if all { self.jobs.values().map(|j| j.key).collect() } else { self.jobs.active_keys() };
                drop(reply.send(Ok(keys.into_iter().filter_map(|k| self.view(k)).collect())));
            }
            Message::Watch { id, history, reply } => drop(reply.send(self.watch(&id, history))),
            Message::Cancel { id, reply } => drop(reply.send(self.cancel(&id, now))),
            Message::Checkpoint { id, reply } => self.checkpoint(&id, reply),
            Message::Trace { id, first_step, steps, reply } => drop(reply.send(self.trace(&id, first_step, steps))),
            Message::Logs { id, reply } => drop(reply.send(self.logs(&id))),
            Message::Source { id, reply } => drop(reply.send(self.source(&id))),
            Message::PlanContext { ranks, memory_bytes, reply } => drop(reply.send(self.plan_context(ranks, memory_bytes))),
            Message::OneOff { task, gpu, caller, reply } => drop(reply.send(self.start_one_off(*task, gpu, &caller, now))),
            Message::Info { reply } => drop(reply.send(Ok(self.books()))),
            _ => {}
        }
    }

    fn submit(&mut self, record: Record, spec: JobSpec, caller: &Caller, now: Instant) -> Result<pb::Job, Refusal> {
        self.accept()?;
        self.vacant(&record.outputs, record.uid)?;
        let shares = Shares { most: self.job_limits.active_max, of_one: self.job_limits.active_share(), kept: shares::KEPT_JOBS };
        shares.admit(caller, self.jobs.active_count(), self.jobs.active_count_of(caller.uid)).map_err(|full| {
            let message = match full {
                Full::Own(n) => {
                    format!(
                        "{n} jobs of user {} wait or run already (jobs.active_max_per_user); submit again when some have ended",
                        caller.uid
                    )
                }
                Full::All(n) => format!("{n} jobs wait or run already (jobs.active_max); submit again when some have ended"),
            };
            Refusal::new(RefusalKind::Busy, message)
        })?;
        if let Some(ranks) = spec.device.ranks.filter(|r| *r > self.pool.count()) {
            let have = self.pool.count();
            let message = format!("`device.ranks` asks for {ranks} devices, and this daemon has {have}: {} are missing", ranks - have);
            return Err(EngineError::new(ErrorKind::Resources, message).into());
        }
        let key = JobKey(self.fresh());
        tracing::info!(job = record.id, name = record.name, uid = record.uid, "submitted");
        self.jobs.insert(Job::new(key, record, spec));
        ramtorch_failpoint::hit(ramtorch_failpoint::Point::JobSubmitted);
        self.queue_up(key, now);
        self.view(key).ok_or_else(|| Refusal::new(RefusalKind::NotFound, "the job is gone already"))
    }

    /// Refuses outputs that another job, which has not ended, writes to. Administrators, too: two jobs that write to one place
    /// mix their lines and remove each other's checkpoints, whoever they are of.
    fn vacant(&self, outputs: &[PathBuf], uid: u32) -> Result<(), Refusal> {
        for output in outputs {
            if let Some(job) = self.jobs.writer(output, uid) {
                let (id, uid) = (&job.record.id, job.record.uid);
                let text = format!(
                    "{} is written by job {id} of user {uid}, which has not ended; choose another path, or wait for its end",
                    output.display()
                );
                return Err(EngineError::new(ErrorKind::Output, text).into());
            }
        }
        Ok(())
    }

    /// Refuses new work once the daemon stops.
    pub(super) fn accept(&self) -> Result<(), Refusal> {
        match self.stopping {
            Some(_) => Err(Refusal::new(RefusalKind::Stopping, "the daemon is stopping; try again when it is back")),
            None => Ok(()),
        }
    }

    /// A job by id, by name (the newest so named), or by a unique prefix of its id.
    pub(super) fn find(&self, id: &str) -> Result<JobKey, Refusal> {
        if id.is_empty() {
            return Err(Refusal::new(RefusalKind::Invalid, "name a job: its id, a unique prefix of it, or its name"));
        }
        if let Some(job) = self.jobs.by_id(id) {
            return Ok(job.key);
        }
        if let Some(job) = self.jobs.values().rev().find(|j| j.record.name == id) {
            return Ok(job.key);
        }
        let found: Vec<&Job> = self.jobs.values().filter(|j| j.record.id.starts_with(id)).collect();
        match found[..] {
            [one] => Ok(one.key),
            [] => Err(not_found(id)),
            [..] => {
                let ids: Vec<&str> = found.iter().take(8).map(|j| j.record.id.as_str()).collect();
                Err(Refusal::new(RefusalKind::Invalid, format!("`{id}` could be any of {}; give more of the id", ids.join(", "))))
            }
        }
    }

    /// As [`Supervisor::find`], among the jobs that are the caller's to look into.
    fn resolve(&self, id: &str, caller: &Caller) -> Result<String, Refusal> {
        let whole = |key: JobKey| self.jobs.get(&key).map(|j| j.record.id.clone()).ok_or_else(|| not_found(id));
        if caller.admin {
            return whole(self.find(id)?);
        }
        let own = |j: &&Job| caller.may_touch(j.record.uid);
        // Names and prefixes of other users' jobs are not in the way.
        if let Some(job) = self.jobs.by_id(id).filter(own) {
            return Ok(job.record.id.clone());
        }
        if let Some(job) = self.jobs.values().rev().filter(own).find(|j| j.record.name == id) {
            return Ok(job.record.id.clone());
        }
        let mut begun = self.jobs.values().filter(own).filter(|j| !id.is_empty() && j.record.id.starts_with(id));
        if let (Some(job), None) = (begun.next(), begun.next()) {
            return Ok(job.record.id.clone());
        }
        let key = self.find(id)?;
        let job = self.jobs.get(&key).ok_or_else(|| not_found(id))?;
        if caller.may_touch(job.record.uid) {
            return Ok(job.record.id.clone());
        }
        let (id, uid) = (&job.record.id, job.record.uid);
        let text =
            format!("job {id} is that of user {uid}; only that user and administrators ([access] admins) may look into it or end it");
        Err(Refusal::new(RefusalKind::Denied, text))
    }

    fn watch(&mut self, id: &str, history: usize) -> Result<Watching, Refusal> {
        let key = self.find(id)?;
        let job = self.view(key).ok_or_else(|| not_found(id))?;
        let entry = self.jobs.get_mut(&key).ok_or_else(|| not_found(id))?;
        let skip = entry.history.len().saturating_sub(history);
        let recent: Vec<pb::Metrics> = entry.history.iter().skip(skip).cloned().collect();
        // Older steps, and those that the last gang wrote down and did not live to tell.
        let on_disk = entry.has_ended() && history > 0;
        let history_file = on_disk.then(|| self.out.history_file(&job.id));
        self.watched.insert(key);
        let entry = self.jobs.get_mut(&key).ok_or_else(|| not_found(id))?;
        Ok(Watching { job, history: recent, history_file, events: entry.subscribe() })
    }

    fn cancel(&mut self, id: &str, now: Instant) -> Result<pb::Job, Refusal> {
        let key = self.find(id)?;
        let job = self.jobs.get(&key).ok_or_else(|| not_found(id))?;
        if job.has_ended() {
            let state = job.state().as_str_name().trim_start_matches("JOB_STATE_").to_ascii_lowercase();
            return Err(Refusal::new(RefusalKind::State, format!("job {} has ended already: {state}", job.record.id)));
        }
        self.note(key, Level::Info, "cancelling was asked for", None);
        self.stop_job(key, Stop::Cancel, now);
        self.view(key).ok_or_else(|| not_found(id))
    }

    fn checkpoint(&mut self, id: &str, reply: Reply<pb::CheckpointResponse>) {
        let request = self.fresh();
        let ask = |this: &mut Supervisor| -> Result<JobKey, Refusal> {
            let key = this.find(id)?;
            let job = this.jobs.get(&key).ok_or_else(|| not_found(id))?;
            if !matches!(job.phase, Phase::Running) || job.stop.is_some() {
                let message =
                    format!("job {} is not training now ({}); a checkpoint needs a running gang", job.record.id, job.record.message);
                return Err(Refusal::new(RefusalKind::State, message));
            }
            if job.spec.checkpoint.path.is_none() {
                return Err(Refusal::new(
                    RefusalKind::State,
                    "the job file has no `checkpoint.path`: there is nowhere to write a checkpoint",
                ));
            }
            let ranks: Vec<_> = job.ranks.iter().map(|r| r.key).collect();
            let command = pb::command::Command::Checkpoint(pb::CheckpointCommand { request });
            // All or none: the ranks agree on the step among themselves, and each has to take part.
            let deaf = ranks.iter().filter(|r| !this.can_command(**r)).count();
            if deaf > 0 {
                return Err(Refusal::new(RefusalKind::Busy, format!("{deaf} rank(s) do not take commands now; ask again")));
            }
            for rank in ranks {
                this.command(rank, command);
            }
            Ok(key)
        };
        match ask(self) {
            Ok(key) => {
                if let Some(job) = self.jobs.get_mut(&key) {
                    job.checkpoints.push((request, reply));
                }
            }
            Err(e) => drop(reply.send(Err(e))),
        }
    }

    pub(super) fn can_command(&self, key: crate::process::ProcKey) -> bool {
        self.procs.get(&key).and_then(|p| p.commands.as_ref()).is_some_and(|c| c.capacity() > 0)
    }

    pub(super) fn checkpoint_written(&mut self, key: JobKey, written: pb::CheckpointWritten) {
        let at = self.out.unix_ms();
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let ok = written.error.is_empty();
        match ok {
            true => job.checkpoint_tally.written += 1,
            false => job.checkpoint_tally.failed += 1,
        }
        let (asked, others) = job.checkpoints.drain(..).partition::<Vec<_>, _>(|(request, _)| *request == written.request);
        job.checkpoints = others;
        if ok {
            job.record.checkpoint = Some(PathBuf::from(&written.path));
            job.record.checkpoint_step = Some(written.step);
            job.record.checkpoint_unix_ms = at;
        }
        for (_, reply) in asked {
            let answer = match ok {
                true => Ok(pb::CheckpointResponse { path: written.path.clone(), step: written.step }),
                false => Err(EngineError::new(ErrorKind::Output, format!("the checkpoint was not written: {}", written.error)).into()),
            };
            drop(reply.send(answer));
        }
        // A failure is told by the worker itself, with an event: training goes on.
        if ok {
            self.note(key, Level::Info, &format!("checkpoint of step {} written to {}", written.step, written.path), Some(0));
            if let Some(job) = self.jobs.get(&key) {
                self.out.save(&job.record);
            }
        }
    }

    pub(super) fn drop_checkpoint_waiters(&mut self, key: JobKey, why: &str) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        for (_, reply) in job.checkpoints.drain(..) {
            drop(reply.send(Err(Refusal::new(RefusalKind::State, format!("no checkpoint was written: {why}")))));
        }
    }

    fn logs(&self, id: &str) -> Result<LogSource, Refusal> {
        let job = self.jobs.get(&self.find(id)?).ok_or_else(|| not_found(id))?;
        Ok(LogSource { dir: self.out.log_dir(&job.record.id), ended: job.over.subscribe() })
    }

    fn source(&self, id: &str) -> Result<Source, Refusal> {
        let job = self.jobs.get(&self.find(id)?).ok_or_else(|| not_found(id))?;
        let r = &job.record;
        match (&job.phase, &r.segment) {
            (Phase::Running | Phase::Failing { .. } | Phase::Backoff(_), Some(segment)) => Ok(Source::Segment(segment.name.clone())),
            (Phase::Ended, _) => r.output.as_ref().or(r.checkpoint.as_ref()).map(|p| Source::Path(p.clone())).ok_or_else(|| {
                let hint = "set `output.path` or `checkpoint.path` in the job file";
                Refusal::new(RefusalKind::State, format!("job {} ended without a model folder or a checkpoint; {hint}", r.id))
            }),
            _ => Err(Refusal::new(RefusalKind::State, format!("job {} has no weights yet: {}", r.id, r.message))),
        }
    }

    fn plan_context(&mut self, ranks: Option<usize>, memory_bytes: Option<u64>) -> Result<PlanContext, Refusal> {
        let wanted = ranks.unwrap_or(self.pool.count());
        if wanted > self.pool.count() {
            let message = format!("`device.ranks` asks for {wanted} devices, and this daemon has {}", self.pool.count());
            return Err(EngineError::new(ErrorKind::Resources, message).into());
        }
        let limit =
            |d: &DeviceSpec| DeviceSpec { memory_bytes: memory_bytes.map_or(d.memory_bytes, |m| m.min(d.memory_bytes)), ..d.clone() };
        let devices = (0..wanted).map(|i| limit(self.pool.spec(i))).collect();
        let (pending, _) = self.promises(JobKey(0));
        let memory = self.out.memory();
        let (segment_bytes, ram_bytes) = (admission::segment_limit(memory, pending), admission::ram_limit(memory, pending));
        Ok(PlanContext { devices, segment_bytes, ram_bytes })
    }

    pub(super) fn books(&mut self) -> Books {
        let name = |holder: Option<Holder>| match holder {
            Some(Holder::Job(key)) => self.jobs.get(&key).map(|j| j.record.id.clone()).unwrap_or_default(),
            Some(Holder::OneOff(id)) => format!("one-off {id}"),
            None => String::new(),
        };
        let device = |(d, holder, state): (&crate::devices::Device, Option<Holder>, &str)| pb::DeviceInfo {
            name: d.spec.to_string(),
            model: d.model.clone(),
            memory_bytes: d.spec.memory_bytes,
            job: name(holder),
            state: state.to_string(),
        };
        let devices = self.pool.each().map(device).collect();
        let mut reserved = Need::default();
        for job in self.jobs.active() {
            let bytes = match (&job.record.segment, &job.phase, &job.record.plan) {
                (Some(segment), _, _) => segment.bytes,
                (None, Phase::Reserving, Some(plan)) => plan.segment_bytes,
                _ => 0,
            };
            reserved += Need { segment: bytes, host: 0 };
        }
        let active = self.jobs.active_count();
        Books {
            devices,
            reserved_bytes: reserved.segment,
            jobs_active: u32::try_from(active).unwrap_or(u32::MAX),
            memory: self.out.memory(),
        }
    }
}

pub(super) fn not_found(id: &str) -> Refusal {
    Refusal::new(RefusalKind::NotFound, format!("no job has the id or name `{id}`; `ramtorch list --all` shows them"))
}
