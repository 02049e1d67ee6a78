//! Before the first step of a gang: what the one before it left, and what is made of that.
//!
//! ```text
//!   record:  Loading ────────────────► pages filled ─► Committed(s₀)
//!            Committed(s) ───────────► step s+1
//!            GradientsComplete(s) ───► pages at s-1 updated ─► Committed(s)         gradients on the device: see the parent
//!            Updating(s) ────────────► step s again, with old weights of the pages at s (`early`)
//! ```
//! Before any of these, pages whose state was held on a device and not written back at every step are brought to the committed
//! step by the updates that were made there, again: their gradients are in the log, the factors in the record.

use super::Rank;
use super::optimizer::Tools;
use crate::api::{EngineError, Level};
use crate::checkpoint;
use crate::early::Ahead;
use crate::optimizer::{StepScalars, factors};
use crate::record::{StepNumbers, goes_back, going_back};
use ramtorch_cpu::{Channel, replay_page};
use ramtorch_failpoint::{Point, hit};
use ramtorch_store::{Owner, SharedOwner, StepPhase};
use std::sync::Arc;
use std::time::Instant;

impl Rank<'_> {
    /// Where gradients stay on the device and died there: finds the step that all pages are at, or that there is none, and has
    /// them filled again. Only one rank has such a plan.
    pub(super) fn settle(&self, owner: &mut Owner<'_>) -> Result<(), EngineError> {
        let record = self.store.record();
        if self.plan.device_gradients.is_none() || record.phase != StepPhase::GradientsComplete {
            return Ok(());
        }
        self.control.heartbeat(record.step, "recovering");
        hit(Point::RecoverBegun);
        let numbers = StepNumbers::from_record(&record);
        let (step, all) = (numbers.step, self.store.layout().page_count() as usize);
        let event = match owner.pages().filter(|p| self.store.entry(*p).step == step).count() {
            // The gang that died here said so before its first page: nothing was lost.
            0 => {
                self.set_record(&numbers.before(), StepPhase::Committed)?;
                format!("step {step} was interrupted before a page was updated; its gradients were on the device, so it is run again")
            }
            n if n == all => {
                self.set_record(&numbers, StepPhase::Committed)?;
                format!("step {step} was interrupted after every page was updated; nothing is lost")
            }
            n => {
                self.store.set_record(&going_back()).map_err(EngineError::internal)?;
                let text = format!(
                    "step {step} was interrupted while pages were updated ({n} of {all} were), and its gradients were on the device: back to the last sound checkpoint"
                );
                self.control.event(Level::Warn, &text);
                hit(Point::RecoverRecorded);
                return Ok(());
            }
        };
        hit(Point::RecoverRecorded);
        self.control.event(Level::Info, &event);
        Ok(())
    }

    /// What to say once where gradients stay on the device.
    fn tell_of_device_gradients(&self) {
        if self.plan.device_gradients.is_none() || !self.leader() {
            return;
        }
        let what = "gradients stay on the device: a death while pages are updated goes back to the last checkpoint";
        match (&self.spec.checkpoint.path, self.spec.checkpoint.every_steps) {
            (None, _) => {
                let event = format!("{what}, and this job writes none: it would begin again. Set [checkpoint] path and every_steps");
                self.control.event(Level::Warn, &event);
            }
            (Some(_), 0) => self.control.event(Level::Warn, &format!("{what}, and every_steps is 0: only those asked for are written")),
            (Some(_), n) => self.control.event(Level::Info, &format!("{what}; one is written every {n} steps")),
        }
    }

    /// Fills this rank's pages, if the store was never filled whole, or has to be filled again.
    pub(super) fn load(&self, owner: &mut Owner<'_>) -> Result<(), EngineError> {
        let record = self.store.record();
        if record.phase != StepPhase::Loading {
            return Ok(());
        }
        self.control.heartbeat(0, "loading");
        let begin = Instant::now();
        let back = goes_back(&record);
        let resume = if back {
            let found = checkpoint::find_to_go_back(self.spec, &self.architecture, self.store.name())?;
            if found.is_none() {
                self.first_checkpoint().check(self.spec)?;
            }
            found
        } else {
            self.tell_of_device_gradients();
            self.prepared.resume.clone()
        };
        let source = checkpoint::open_source(self.spec, self.prepared, &self.architecture, resume.as_ref())?;
        let step = resume.as_ref().map_or(0, |r| r.step);
        let pages: Vec<u32> = owner.pages().collect();
        for (i, page) in pages.iter().enumerate() {
            // Filled again: a page that is at the step has the very state that the checkpoint has.
            if self.store.entry(*page).step != step {
                source.fill(owner, self.store.layout(), *page, step)?;
            }
            hit(Point::LoadPage);
            if self.leader() && i % 16 == 0 {
                self.control.progress("loading weights", i as u64, pages.len() as u64);
            }
            self.control.heartbeat(step, "loading");
        }
        tracing::info!("{} pages of weights loaded in {:.1} s", pages.len(), begin.elapsed().as_secs_f64());
        hit(Point::LoadFilled);
        self.comm.barrier(Channel::Step)?;
        if self.leader() {
            self.set_record(&source.numbers(), StepPhase::Committed)?;
            if back {
                let from = resume.map_or("the beginning: there is no checkpoint".into(), |r| format!("checkpoint {}", r.path.display()));
                self.control.event(Level::Warn, &format!("went back to step {step}, {from}; the steps after it are run again"));
            }
            hit(Point::LoadRecorded);
        }
        self.comm.barrier(Channel::Step)?;
        Ok(())
    }

    /// Brings pages that are behind the committed step to it.
    pub(super) fn replay(&self, owner: &SharedOwner<'_>) -> Result<(), EngineError> {
        let record = self.store.record();
        let committed = match record.phase {
            StepPhase::Loading => return Ok(()),
            StepPhase::Committed => record.step,
            StepPhase::Computing | StepPhase::GradientsComplete | StepPhase::Updating => record.step.saturating_sub(1),
        };
        let numbers = StepNumbers::from_record(&record);
        let behind: Vec<u32> = owner.pages().filter(|p| self.store.entry(*p).step < committed).collect();
        let begin = Instant::now();
        let mut updates = 0;
        for page in &behind {
            self.control.heartbeat(committed, "recovering");
            for step in self.store.entry(*page).step + 1..=committed {
                let lost =
                    || EngineError::internal(format!("page {page} is behind step {committed}, and step {step} cannot be made again"));
                let [lr, scale] = numbers.scalars(step).ok_or_else(lost)?;
                let k = factors(&self.spec.optimizer, &StepScalars { step, lr, gradient_scale: scale as f32 });
                replay_page(owner, &k, *page)?;
                updates += 1;
                hit(Point::RecoverReplayed);
            }
        }
        // Nobody sweeps before all pages are there.
        let made = self.comm.gather(Channel::Step, [f64::from(updates), 0.0, 0.0, 0.0])?;
        let all: f64 = made.iter().map(|v| v[0]).sum();
        if self.leader() && all > 0.0 {
            let text = format!(
                "pages whose state was on the device are at step {committed} again: {all} updates from the log of gradients, in {:.1} s",
                begin.elapsed().as_secs_f64()
            );
            self.control.event(Level::Info, &text);
        }
        Ok(())
    }

    /// Finishes a step that was interrupted after its gradients were complete.
    pub(super) fn recover(&self, owner: &SharedOwner<'_>) -> Result<(), EngineError> {
        let record = self.store.record();
        if record.phase != StepPhase::GradientsComplete {
            return Ok(());
        }
        self.control.heartbeat(record.step, "recovering");
        hit(Point::RecoverBegun);
        let mut numbers = StepNumbers::from_record(&record);
        // On the CPU alone: the device is not open yet, and the bits are the same.
        let done = self.update_pages(
            owner,
            &numbers,
            &mut Tools { updater: None, kept: None, held: Vec::new(), held_gradients: None },
            Vec::new(),
        )?;
        numbers.optimizer_seconds = done.elapsed.as_secs_f64();
        (numbers.optimizer_pages_cpu, numbers.optimizer_pages_device) = (done.cpu, done.device);
        hit(Point::RecoverUpdated);
        self.comm.barrier(Channel::Optimizer)?;
        if self.leader() {
            self.set_record(&numbers, StepPhase::Committed)?;
            hit(Point::RecoverRecorded);
            self.control.event(
                Level::Info,
                &format!("step {} was interrupted after its gradients were complete; finished it from the segment", numbers.step),
            );
        }
        self.comm.barrier(Channel::Optimizer)?;
        Ok(())
    }

    /// The step that a gang before this one died in with pages of it updated already: what its record says, and which they are.
    /// Every rank comes here before any updates a page.
    pub(super) fn interrupted(&self) -> Option<(StepNumbers, Arc<Ahead>)> {
        let record = self.store.record();
        if record.phase != StepPhase::Updating {
            return None;
        }
        hit(Point::RerunBegun);
        let ahead = Ahead::find(&self.store, record.step);
        let (n, all) = ahead.count();
        if self.leader() {
            let text = format!(
                "step {} was interrupted when {n} of {all} pages had been updated beside its backward pass; it is run again with the weights that it began with",
                record.step
            );
            self.control.event(Level::Info, &text);
        }
        Some((StepNumbers::from_record(&record), Arc::new(ahead)))
    }
}
