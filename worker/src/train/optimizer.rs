//! The optimizer's thread of a rank: pages of a step whose gradients are complete, its commit, its line of metrics.

use super::Rank;
use crate::api::EngineError;
use crate::early::{EarlyDone, EarlyJob};
use crate::metrics::Metrics;
use crate::optimizer::{StepScalars, factors};
use crate::record::StepNumbers;
use ramtorch_cpu::{Channel, Kept, PagesUpdated, update_pages_recorded, write_back};
use ramtorch_device::{DeviceGradients, GradientReader, HeldPage, PageUpdater, StagedPage};
use ramtorch_failpoint::{Point, hit};
use ramtorch_store::{SharedOwner, StepPhase};
use ramtorch_trace::{Label, Row};
use std::sync::mpsc;
use std::time::Instant;

/// Work for the optimizer's thread.
pub(super) enum Job {
    /// Pages of the step that is swept.
    Early(EarlyJob),
    Commit(OptimizerJob),
}

/// A step whose gradients are complete.
pub(super) struct OptimizerJob {
    pub(super) numbers: StepNumbers,
    /// Pages that were updated before they were.
    pub(super) early: EarlyDone,
    /// The line of this step is written by the step loop, after a validation.
    pub(super) line_later: bool,
    pub(super) begun: Instant,
    /// Pages whose state the device has already.
    pub(super) staged: Vec<StagedPage>,
    pub(super) sent: Instant,
    /// A checkpoint of this step is due; one above the request that asked for it, or 0.
    pub(super) checkpoint: Option<u64>,
    /// Every page is to be at the step in the segment, held ones too.
    pub(super) whole: bool,
}

/// What the optimizer's thread has of the device.
pub(super) struct Tools {
    pub(super) updater: Option<Box<dyn PageUpdater>>,
    /// Where gradients stay on the device: who brings them to the processor, and where they are.
    pub(super) kept: Option<(Box<dyn GradientReader>, DeviceGradients)>,
    /// Pages whose state stays on the device, and gradients of some of them that do.
    pub(super) held: Vec<HeldPage>,
    pub(super) held_gradients: Option<DeviceGradients>,
}

/// What the optimizer's thread answers.
pub(super) enum Answer {
    Early(EarlyDone),
    Committed(Box<Committed>),
}

pub(super) struct Committed {
    pub(super) numbers: StepNumbers,
    pub(super) at: Instant,
}

impl Rank<'_> {
    pub(super) fn update_pages(
        &self,
        owner: &SharedOwner<'_>,
        n: &StepNumbers,
        tools: &mut Tools,
        staged: Vec<StagedPage>,
    ) -> Result<PagesUpdated, EngineError> {
        let scalars = StepScalars { step: n.step, lr: n.lr, gradient_scale: n.gradient_scale as f32 };
        let updater: Option<&mut dyn PageUpdater> = match &mut tools.updater {
            Some(u) => Some(u.as_mut()),
            None => None,
        };
        let kept = tools.kept.as_mut().map(|(reader, gradients)| Kept { gradients, reader: reader.as_mut() });
        let held = (tools.held.as_mut_slice(), tools.held_gradients.as_ref());
        update_pages_recorded(owner, &factors(&self.spec.optimizer, &scalars), updater, staged, held, kept, &self.recorder)
    }

    pub(super) fn commit(
        &self,
        owner: &SharedOwner<'_>,
        tools: &mut Tools,
        mut job: OptimizerJob,
        metrics: &mut Metrics,
    ) -> Result<Committed, EngineError> {
        hit(Point::OptimizerBegun);
        let step = job.numbers.step;
        // This thread may have waited for an earlier checkpoint when the job came.
        let (late, waited) = (job.sent.elapsed(), owner.waited());
        let span = self.recorder.scope(Row::Optimizer, Label::work("update pages").step(step));
        let done = self.update_pages(owner, &job.numbers, tools, std::mem::take(&mut job.staged))?;
        drop(span);
        if let (Some(updater), false) = (&mut tools.updater, tools.held.is_empty()) {
            let _span = self.recorder.scope(Row::Optimizer, Label::work("write back held pages").step(step));
            write_back(owner, step, updater.as_mut(), &tools.held, job.whole)?;
        }
        job.numbers.checkpoint_wait = (late + owner.waited().saturating_sub(waited)).as_secs_f64();
        hit(Point::OptimizerUpdated);
        job.numbers.optimizer_seconds = (done.elapsed + job.early.elapsed).as_secs_f64();
        job.numbers.optimizer_pages_cpu = done.cpu + job.early.pages;
        job.numbers.optimizer_pages_device = done.device;
        let span = self.recorder.scope(Row::Optimizer, Label::collective("barrier: pages").step(step));
        self.comm.barrier(Channel::Optimizer)?;
        drop(span);
        hit(Point::OptimizerAgreed);
        let at = Instant::now();
        job.numbers.seconds = (at - job.begun).as_secs_f64();
        if job.numbers.seconds > 0.0 {
            job.numbers.tflops /= job.numbers.seconds;
        }
        if self.leader() {
            let span = self.recorder.scope(Row::Optimizer, Label::work("commit").step(step));
            self.set_record(&job.numbers, StepPhase::Committed)?;
            drop(span);
            hit(Point::StepCommitted);
            if !job.line_later {
                let _span = self.recorder.scope(Row::Optimizer, Label::work("write metrics").step(step));
                self.report(metrics, &job.numbers)?;
            }
        }
        let _span = self.recorder.scope(Row::Optimizer, Label::collective("barrier: committed").step(step));
        // Nobody begins to overwrite gradients before the leader has said that they are not needed any more.
        self.comm.barrier(Channel::Optimizer)?;
        Ok(Committed { numbers: job.numbers, at })
    }

    pub(super) fn report(&self, metrics: &mut Metrics, n: &StepNumbers) -> Result<(), EngineError> {
        let m = n.metrics();
        let line = metrics.write(&m, self.control)?;
        hit(Point::StepReported);
        self.control.metrics(&m, &line);
        Ok(())
    }
}

pub(super) fn gone() -> EngineError {
    EngineError::internal("the optimizer's thread has ended")
}

/// The commit that the optimizer's thread answers next.
pub(super) fn commit_of(from_optimizer: &mpsc::Receiver<Result<Answer, EngineError>>) -> Result<Committed, EngineError> {
    match from_optimizer.recv().map_err(|_| gone())?? {
        Answer::Committed(c) => Ok(*c),
        Answer::Early(_) => Err(EngineError::internal("early pages in place of a commit")),
    }
}
