//! One-off work: generate, eval, export, inspect, and the preparation of a plan that is only asked for. A process of
//! its own each; it ends when its caller goes away.

use super::Supervisor;
use super::devices::Holder;
use super::message::{Refusal, RefusalKind};
use super::proc::{Outcome, Role};
use super::shares::{self, Full, Shares};
use crate::access::Caller;
use crate::node;
use crate::process::ProcKey;
use ramtorch_proto::v1 as pb;
use ramtorch_worker::{DeviceKind, DeviceSpec, EngineError, Task};
use std::time::Instant;
use tokio::sync::mpsc;

/// What the caller of one-off work hears.
#[derive(Debug)]
pub enum OneOffEvent {
    /// New text.
    Token(pb::TokenText),
    /// The end: the role-specific result, or why there is none.
    Done(Result<String, EngineError>),
}

/// One piece of work.
#[derive(Debug)]
pub struct OneOff {
    /// Its number.
    pub id: u64,
    /// Whose it is.
    uid: u32,
    /// Its process.
    proc: ProcKey,
    /// Its caller. What is queued for him is bounded by what he asked for.
    events: mpsc::UnboundedSender<OneOffEvent>,
    /// It was told to end.
    ended: bool,
}

impl OneOff {
    /// Whether nobody waits for it any more.
    pub fn is_abandoned(&self) -> bool {
        !self.ended && self.events.is_closed()
    }
}

impl Supervisor {
    pub(super) fn start_one_off(
        &mut self,
        task: Task,
        gpu: bool,
        caller: &Caller,
        now: Instant,
    ) -> Result<mpsc::UnboundedReceiver<OneOffEvent>, Refusal> {
        self.accept()?;
        let busy = |text: String| Refusal::new(RefusalKind::Busy, text);
        let shares = Shares { most: self.job_limits.one_off_max, of_one: self.job_limits.one_off_share(), kept: shares::KEPT_ONE_OFFS };
        let own = self.one_offs.values().filter(|o| o.uid == caller.uid).count();
        shares.admit(caller, self.one_offs.len(), own).map_err(|full| match full {
            Full::Own(n) => busy(format!(
                "{n} calls of this kind of user {} are being served already (jobs.one_off_max_per_user); try again later",
                caller.uid
            )),
            Full::All(n) => busy(format!("{n} calls of this kind are being served already (jobs.one_off_max); try again later")),
        })?;
        let id = self.fresh();
        let (device, lease) = match (self.pool.kind(), gpu) {
            // CPU devices are threads: they may be shared with a running job, which becomes slower for a while.
            (DeviceKind::Cpu, _) => (self.pool.spec(self.pool.free().unwrap_or(0)).clone(), None),
            // A plan wants the GPU's rates: they are measured on one that is free, for seconds, and otherwise (0 bytes of
            // memory) only looked up, so that no running job loses memory to it.
            (DeviceKind::Cuda, false) if matches!(task, Task::Prepare { .. }) => match self.pool.free() {
                Some(free) => (self.pool.spec(free).clone(), Some(free)),
                None => (DeviceSpec { memory_bytes: 0, ..self.pool.spec(0).clone() }, None),
            },
            (DeviceKind::Cuda, false) => {
                let memory_bytes = self.out.memory().available / 2;
                (DeviceSpec { kind: DeviceKind::Cpu, index: 0, threads: node::cores(), memory_bytes, bus_id: None }, None)
            }
            (DeviceKind::Cuda, true) => {
                let free = self.pool.free().ok_or_else(|| busy("every GPU is held by a job; try again when one is free".into()))?;
                (self.pool.spec(free).clone(), Some(free))
            }
        };
        // As when a job is prepared: one process with the threads of the gang that is planned.
        let world_size = match &task {
            Task::Prepare { spec, .. } => spec.device.ranks.unwrap_or(self.pool.count()).clamp(1, self.pool.count().max(1)),
            _ => 1,
        };
        let threads = device.threads * world_size;
        let device = DeviceSpec { threads, ..device };
        let assignment = ramtorch_worker::Assignment { job_id: format!("oneoff-{id}"), generation: 1, rank: 0, world_size, device, task };
        let log = self.out.one_off_log(id);
        let proc = self.spawn(Role::OneOff { id }, assignment, lease, log, now)?;
        if let Some(index) = lease {
            self.pool.take(&[index], Holder::OneOff(id));
        }
        let (events, receiver) = mpsc::unbounded_channel();
        self.one_offs.insert(id, OneOff { id, uid: caller.uid, proc, events, ended: false });
        Ok(receiver)
    }

    pub(super) fn one_off_token(&mut self, id: u64, text: pb::TokenText) {
        if let Some(one_off) = self.one_offs.get(&id) {
            let _ = one_off.events.send(OneOffEvent::Token(text));
        }
    }

    pub(super) fn end_one_off(&mut self, id: u64, now: Instant) {
        let kill_timeout = self.limits.kill_timeout();
        let Some(one_off) = self.one_offs.get_mut(&id) else { return };
        one_off.ended = true;
        if let Some(proc) = self.procs.get_mut(&one_off.proc) {
            proc.end(now, kill_timeout);
        }
    }

    pub(super) fn one_off_gone(&mut self, id: u64, outcome: Outcome, now: Instant) {
        self.pool.release(Holder::OneOff(id));
        self.out.remove_one_off_log(id);
        if let Some(one_off) = self.one_offs.remove(&id) {
            let result = match outcome {
                Outcome::Done { json, .. } => Ok(json),
                Outcome::Failed(_) if one_off.ended => Err(EngineError::internal("the daemon stopped before the work was done")),
                Outcome::Failed(cause) => Err(cause.into()),
            };
            let _ = one_off.events.send(OneOffEvent::Done(result));
        }
        self.freed(now);
    }
}
