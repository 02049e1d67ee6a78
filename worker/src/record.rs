//! The numbers of a step that must outlive every process: what the step record in the segment carries.

use crate::api::StepMetrics;
use ramtorch_store::{GradientLog, StepPhase, StepRecord};

/// Numbers of one step, complete before any page is updated.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct StepNumbers {
    pub step: u64,
    /// It comes from a checkpoint: this job may not have run it.
    pub loaded: bool,
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub tokens: u64,
    pub tokens_total: u64,
    pub gradient_scale: f64,
    pub epoch: f64,
    pub seconds: f64,
    pub tflops: f64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Of the leader: seconds that arithmetic stood still for copies, and for pages of the optimizer.
    pub copy_wait: f64,
    pub optimizer_wait: f64,
    /// Of the leader: from the first page to the last, and who updated how many.
    pub optimizer_seconds: f64,
    pub optimizer_pages_cpu: u64,
    pub optimizer_pages_device: u64,
    /// Of the leader: for state that a checkpoint had not copied yet.
    pub checkpoint_wait: f64,
    /// NaN where none was taken.
    pub validation_loss: f64,
    /// Validation loss before the first step, on step 1's line; NaN elsewhere.
    pub initial_validation_loss: f64,
    /// Of the steps before, the last one first: learning rate and clipping factor. What it takes to make updates again whose
    /// gradients are in the log.
    pub past: [[f64; 2]; PAST],
}

/// Steps before a step whose updates can be made again.
pub(crate) const PAST: usize = GradientLog::STEPS_MAX as usize - 1;
/// Numbers of a record: those of its step, the mark below, those of the steps before.
const VALUES: usize = 40;

/// Number of a record's values that is 1 while pages are taken back to a checkpoint.
const GOES_BACK: usize = 23;
/// First of those of the steps before.
const FIRST_PAST: usize = 24;
const _: () = assert!(FIRST_PAST + 2 * PAST <= VALUES);

/// Number of a record's values that is 1 for a step that was loaded.
const LOADED: usize = 22;

/// The record of a store whose pages are to be filled again, from a checkpoint or from the beginning.
pub(crate) fn going_back() -> StepRecord {
    let mut values = [0f64; VALUES];
    values[GOES_BACK] = 1.0;
    StepRecord { step: 0, phase: StepPhase::Loading, values }
}

/// Whether pages are filled again, rather than for the first time.
pub(crate) fn goes_back(r: &StepRecord) -> bool {
    r.phase == StepPhase::Loading && r.values[GOES_BACK] == 1.0
}

impl StepNumbers {
    /// Those of a step that was loaded, as far as the checkpoint has them.
    pub fn loaded(step: u64, stored: &[f64]) -> StepNumbers {
        let nothing = StepNumbers { step, validation_loss: f64::NAN, initial_validation_loss: f64::NAN, ..Default::default() };
        let mut record = nothing.record(StepPhase::Committed);
        record.values.iter_mut().zip(stored).for_each(|(value, stored)| *value = *stored);
        StepNumbers { loaded: true, ..StepNumbers::from_record(&record) }
    }

    /// Those of the step before, as far as those of this one tell: enough to go on from it.
    pub fn before(&self) -> StepNumbers {
        let mut past = [[0.0; 2]; PAST];
        past[..PAST - 1].copy_from_slice(&self.past[1..]);
        StepNumbers {
            step: self.step - 1,
            tokens_total: self.tokens_total - self.tokens,
            lr: self.past[0][0],
            gradient_scale: self.past[0][1],
            past,
            validation_loss: f64::NAN,
            initial_validation_loss: f64::NAN,
            ..Default::default()
        }
    }

    /// `past` of the step after this one.
    pub fn past_of_next(&self) -> [[f64; 2]; PAST] {
        let mut past = [[0.0; 2]; PAST];
        past[0] = [self.lr, self.gradient_scale];
        past[1..].copy_from_slice(&self.past[..PAST - 1]);
        past
    }

    /// Learning rate and clipping factor of `step`, this one or one of the [`PAST`] before it.
    pub fn scalars(&self, step: u64) -> Option<[f64; 2]> {
        match self.step.checked_sub(step)? {
            0 => Some([self.lr, self.gradient_scale]),
            back => self.past.get(back as usize - 1).copied(),
        }
    }

    pub fn record(&self, phase: StepPhase) -> StepRecord {
        let mut values = [0f64; VALUES];
        let mine = [
            self.loss,
            self.grad_norm,
            self.lr,
            self.tokens as f64,
            self.tokens_total as f64,
            self.gradient_scale,
            self.epoch,
            self.seconds,
            self.tflops,
            self.bytes_in as f64,
            self.bytes_out as f64,
            self.copy_wait,
            self.validation_loss,
            self.initial_validation_loss,
            self.optimizer_seconds,
            self.optimizer_pages_cpu as f64,
            self.optimizer_pages_device as f64,
            self.optimizer_wait,
            self.checkpoint_wait,
        ];
        values[..mine.len()].copy_from_slice(&mine);
        values[LOADED] = f64::from(u8::from(self.loaded));
        values[FIRST_PAST..].iter_mut().zip(self.past.as_flattened()).for_each(|(value, past)| *value = *past);
        StepRecord { step: self.step, phase, values }
    }

    pub fn from_record(r: &StepRecord) -> Self {
        let v = &r.values;
        StepNumbers {
            step: r.step,
            loaded: v[LOADED] == 1.0,
            loss: v[0],
            grad_norm: v[1],
            lr: v[2],
            tokens: v[3] as u64,
            tokens_total: v[4] as u64,
            gradient_scale: v[5],
            epoch: v[6],
            seconds: v[7],
            tflops: v[8],
            bytes_in: v[9] as u64,
            bytes_out: v[10] as u64,
            copy_wait: v[11],
            validation_loss: v[12],
            initial_validation_loss: v[13],
            optimizer_seconds: v[14],
            optimizer_pages_cpu: v[15] as u64,
            optimizer_pages_device: v[16] as u64,
            optimizer_wait: v[17],
            checkpoint_wait: v[18],
            past: std::array::from_fn(|i| [v[FIRST_PAST + 2 * i], v[FIRST_PAST + 2 * i + 1]]),
        }
    }

    pub fn metrics(&self) -> StepMetrics {
        StepMetrics {
            step: self.step,
            loss: self.loss,
            grad_norm: self.grad_norm,
            lr: self.lr,
            tokens: self.tokens,
            tokens_per_second: if self.seconds > 0.0 { self.tokens as f64 / self.seconds } else { 0.0 },
            validation_loss: Some(self.validation_loss).filter(|v| !v.is_nan()),
            initial_validation_loss: Some(self.initial_validation_loss).filter(|v| !v.is_nan()),
            step_seconds: self.seconds,
            tokens_total: self.tokens_total,
            epoch: self.epoch,
            tflops: self.tflops,
            bytes_to_device: self.bytes_in,
            bytes_from_device: self.bytes_out,
            copy_wait_seconds: self.copy_wait,
            optimizer_wait_seconds: self.optimizer_wait,
            checkpoint_wait_seconds: self.checkpoint_wait,
            optimizer_seconds: self.optimizer_seconds,
            optimizer_pages_cpu: self.optimizer_pages_cpu,
            optimizer_pages_device: self.optimizer_pages_device,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_carries_every_number() {
        let n = StepNumbers {
            step: 7,
            loaded: true,
            loss: 1.25,
            grad_norm: 0.1,
            lr: 3e-4,
            tokens: 99,
            tokens_total: 1 << 40,
            gradient_scale: 0.5,
            epoch: 1.5,
            seconds: 2.5,
            tflops: 3.5,
            bytes_in: 4,
            bytes_out: 5,
            copy_wait: 6.5,
            optimizer_wait: 13.5,
            checkpoint_wait: 14.5,
            optimizer_seconds: 7.5,
            optimizer_pages_cpu: 11,
            optimizer_pages_device: 12,
            validation_loss: 8.5,
            initial_validation_loss: 9.5,
            past: std::array::from_fn(|i| [1e-3 * i as f64, 1.0 / (i + 2) as f64]),
        };
        assert_eq!(StepNumbers::from_record(&n.record(StepPhase::Committed)), n);
        // What the next step's record says of the steps before it, and what is left of that one step back.
        let next = StepNumbers { step: 8, lr: 4e-4, gradient_scale: 0.25, past: n.past_of_next(), ..Default::default() };
        assert_eq!((next.scalars(8), next.scalars(7), next.scalars(6)), (Some([4e-4, 0.25]), Some([3e-4, 0.5]), Some(n.past[0])));
        assert_eq!((next.scalars(9), next.scalars(1), next.scalars(0)), (None, Some(n.past[5]), None));
        let back = next.before();
        assert_eq!((back.step, back.lr, back.gradient_scale), (7, n.lr, n.gradient_scale));
        assert_eq!((&back.past[..PAST - 1], back.past[PAST - 1]), (&n.past[..PAST - 1], [0.0; 2]));
    }

    #[test]
    fn a_checkpoint_carries_them_too() {
        let n = StepNumbers { step: 7, loss: 1.25, tokens: 99, tokens_total: 1 << 40, validation_loss: 8.5, ..Default::default() };
        assert_eq!(StepNumbers::loaded(7, &n.record(StepPhase::Committed).values), StepNumbers { loaded: true, ..n });
        let unknown = StepNumbers::loaded(7, &[]);
        assert!(unknown.tokens == 0 && unknown.validation_loss.is_nan() && unknown.loaded);
    }
}
