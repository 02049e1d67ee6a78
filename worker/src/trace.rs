//! Traces of a running gang: agreed upon, recorded, handed over.
//!
//! ```text
//!   command (any rank) ─► wanted ─► agreed (all ranks, at the gather of a step) ─► recorded (steps first..=last)
//!                                                                                   │ step `last` is committed, or the job ends
//!                                                                                   ▼
//!                                                                       handed over by every rank
//! ```
//! All ranks record the same steps, since they agree on them as they do on checkpoints. One trace at a time.

use crate::api::{Control, EngineError, TraceCommand};
use ramtorch_cpu::{Channel, Collectives};
use ramtorch_device::Device;
use ramtorch_trace::{RankTrace, Recorder, STEPS_MAX};
use std::sync::Arc;

struct Agreed {
    request: u64,
    first: u64,
    last: u64,
}

/// See the module.
pub(crate) struct Tracing {
    pub recorder: Arc<Recorder>,
    rank: u32,
    device: String,
    /// Steps of the job.
    steps: u64,
    wanted: Option<TraceCommand>,
    /// Newest request that was agreed upon.
    handled: Option<u64>,
    agreed: Option<Agreed>,
}

impl Tracing {
    pub fn new(recorder: Arc<Recorder>, rank: usize, device: String, steps: u64) -> Tracing {
        Tracing { recorder, rank: rank as u32, device, steps, wanted: from_environment().map(|e| e.0), handled: None, agreed: None }
    }

    /// A command came. The others may have agreed on it already.
    pub fn want(&mut self, c: TraceCommand) {
        if self.handled.is_none_or(|h| c.request > h) {
            self.wanted = Some(c);
        }
    }

    /// Whether [`Tracing::agree`] has to be called, by all ranks.
    pub fn wants(&self) -> bool {
        self.wanted.is_some()
    }

    /// All ranks agree on the steps after `step` that are recorded, if any of them was told to.
    pub fn agree(&mut self, step: u64, comm: &Collectives, control: &dyn Control) -> Result<(), EngineError> {
        let mine = self.wanted.take().map_or([-1.0, 0.0, 0.0, 0.0], |w| [w.request as f64, w.first_step as f64, w.steps as f64, 0.0]);
        let all = comm.gather(Channel::Step, mine)?;
        let Some(newest) = all.iter().filter(|v| v[0] >= 0.0).max_by(|a, b| a[0].total_cmp(&b[0])) else { return Ok(()) };
        let (request, first, steps) = (newest[0] as u64, newest[1] as u64, newest[2] as u64);
        if self.handled.is_some_and(|h| request <= h) {
            return Ok(());
        }
        self.handled = Some(request);
        let first = first.max(step + 1);
        let last = first.saturating_add(steps.clamp(1, STEPS_MAX) - 1).min(self.steps);
        let refuse = |note: String| self.hand_over(control, request, RankTrace { first_step: first, note, ..RankTrace::default() });
        if self.agreed.is_some() {
            refuse("another trace of this job was being recorded".into());
        } else if first > self.steps {
            refuse(format!("the job's last step is {}", self.steps));
        } else {
            self.agreed = Some(Agreed { request, first, last });
        }
        Ok(())
    }

    /// Step `step` begins; nothing of it is enqueued yet.
    pub fn begin_step(&self, step: u64, dev: &dyn Device) -> Result<(), EngineError> {
        self.recorder.set_step(step);
        let Some(a) = &self.agreed else { return Ok(()) };
        if step == a.first {
            self.recorder.start(a.first, a.last);
        }
        if (a.first..=a.last).contains(&step) { dev.anchor() } else { Ok(()) }
    }

    /// Step `step` is committed: its trace may be complete.
    pub fn committed(&mut self, step: u64, control: &dyn Control) {
        if let Some(a) = self.agreed.take_if(|a| step >= a.last) {
            let trace = self.recorder.finish();
            self.hand_over(control, a.request, trace);
        }
    }

    /// No step follows: hands over what there is.
    pub fn end(&mut self, control: &dyn Control) {
        let note = "the job ended before all the steps were recorded";
        if let Some(a) = self.agreed.take() {
            let trace = RankTrace { first_step: a.first, note: note.into(), ..self.recorder.finish() };
            self.hand_over(control, a.request, trace);
        }
        if let Some(w) = self.wanted.take() {
            self.hand_over(control, w.request, RankTrace { first_step: w.first_step, note: note.into(), ..RankTrace::default() });
        }
    }

    fn hand_over(&self, control: &dyn Control, request: u64, trace: RankTrace) {
        let trace = RankTrace { rank: self.rank, device: self.device.clone(), ..trace };
        if let Some((_, path)) = from_environment() {
            let path = path.with_extension(format!("rank{}.json", self.rank));
            let write = |traces: &[RankTrace]| {
                let mut out = std::io::BufWriter::new(std::fs::File::create(&path)?);
                ramtorch_trace::write_chrome(&mut out, traces, &Default::default())
            };
            if let Err(e) = write(std::slice::from_ref(&trace)) {
                eprintln!("{}: {e}", path.display());
            }
            eprintln!("{}", serde_json::to_string(&ramtorch_trace::summarize(std::slice::from_ref(&trace))).unwrap_or_default());
        }
        control.trace(request, trace);
    }
}

/// `RAMTORCH_TRACE=FIRST..LAST:PATH`
pub(crate) fn from_environment() -> Option<(TraceCommand, std::path::PathBuf)> {
    let v = std::env::var("RAMTORCH_TRACE").ok()?;
    let (steps, path) = v.split_once(':')?;
    let (first, last) = steps.split_once("..")?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    Some((TraceCommand { request: 0, first_step: first, steps: last.checked_sub(first)? + 1 }, path.into()))
}
