//! Timelines of jobs.
//!
//! ```text
//!   call ─► waits for the gang ─► every rank is told ─► parts come ─► the last part of every rank: the stream ends
//!                     └───────────────────┴── the gang fails, the job ends: the stream ends with why
//! ```
//! The ranks agree on the steps among themselves. Parts go straight to the caller and are kept nowhere else; each rank sends
//! a bounded number of them. A caller who has gone away changes nothing for the ranks, which record to the end.

use super::Supervisor;
use super::calls::not_found;
use super::message::{JobKey, Refusal, RefusalKind, TraceParts};
use crate::process::ProcKey;
use ramtorch_proto::v1 as pb;
use ramtorch_worker::TRACE_STEPS_MAX;
use std::collections::BTreeSet;
use tokio::sync::mpsc;

/// A trace under way.
#[derive(Debug)]
pub struct Tracing {
    command: pb::TraceCommand,
    caller: mpsc::UnboundedSender<Result<pb::TracePart, Refusal>>,
    /// Processes that were told.
    told: Vec<ProcKey>,
    /// Ranks that have sent all of theirs.
    complete: BTreeSet<u32>,
}

impl Supervisor {
    pub(super) fn trace(&mut self, id: &str, first_step: u64, steps: u64) -> Result<TraceParts, Refusal> {
        if !(1..=TRACE_STEPS_MAX).contains(&steps) {
            return Err(Refusal::new(RefusalKind::Invalid, format!("a trace covers 1 to {TRACE_STEPS_MAX} steps, not {steps}")));
        }
        let key = self.find(id)?;
        let request = self.fresh();
        let job = self.jobs.get_mut(&key).ok_or_else(|| not_found(id))?;
        if job.has_ended() || job.stop.is_some() {
            return Err(Refusal::new(
                RefusalKind::State,
                format!("job {} has ended or is being stopped: there are no steps to trace", job.record.id),
            ));
        }
        if job.record.steps > 0 && first_step > job.record.steps {
            let message = format!("job {} has {} steps; there is no step {first_step}", job.record.id, job.record.steps);
            return Err(Refusal::new(RefusalKind::Invalid, message));
        }
        if job.trace.is_some() {
            let message = format!("a trace of job {} is being recorded already; ask again when it is done", job.record.id);
            return Err(Refusal::new(RefusalKind::Busy, message));
        }
        let (caller, parts) = mpsc::unbounded_channel();
        let command = pb::TraceCommand { request, first_step, steps };
        job.trace = Some(Tracing { command, caller, told: Vec::new(), complete: BTreeSet::new() });
        self.spread_trace(key);
        Ok(parts)
    }

    /// Tells the ranks that can be told and were not.
    pub(super) fn spread_trace(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get(&key) else { return };
        let Some(trace) = &job.trace else { return };
        let command = pb::command::Command::Trace(trace.command);
        let fresh = job.ranks.iter().map(|r| r.key).filter(|k| !trace.told.contains(k));
        let told: Vec<ProcKey> = fresh.filter(|k| self.can_command(*k)).collect();
        for proc in &told {
            self.command(*proc, command);
        }
        if let Some(trace) = self.jobs.get_mut(&key).and_then(|j| j.trace.as_mut()) {
            trace.told.extend(told);
        }
    }

    pub(super) fn trace_part(&mut self, key: JobKey, report: pb::TraceReport) {
        let Some(job) = self.jobs.get_mut(&key) else { return };
        let ranks = job.ranks.len();
        let Some(trace) = job.trace.as_mut().filter(|t| t.command.request == report.request) else { return };
        let Some(part) = report.part else { return };
        if part.last {
            trace.complete.insert(part.rank);
        }
        // Without a caller the rest of it is thrown away.
        let _ = trace.caller.send(Ok(part));
        if trace.complete.len() >= ranks {
            job.trace = None;
        }
    }

    /// Ends a trace that cannot be completed.
    pub(super) fn give_up_trace(&mut self, key: JobKey, why: &str) {
        if let Some(trace) = self.jobs.get_mut(&key).and_then(|j| j.trace.take()) {
            let _ = trace.caller.send(Err(Refusal::new(RefusalKind::State, format!("the trace is not complete: {why}"))));
        }
    }
}
