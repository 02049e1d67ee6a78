//! The step record: how far the current step is, and a few numbers that belong to it.
//!
//! ```text
//!   Loading ──▶ Committed(0) ──▶ Computing(s) ──▶ GradientsComplete(s) ──▶ Committed(s) ──▶ Computing(s+1) …
//!                                    │                   │                       │
//!                        after a death: again            │                       │
//!                                       after a death: the pages that are still  │
//!                                       at s-1 are updated                       │
//!                                                                                └──▶ Updating(s+1) ──▶ GradientsComplete(s+1) …
//!                                                                                         │
//!                        after a death: again, with the weights of s of the pages that are at s+1 from the gradients' places
//! ```
//! An engine may leave `Computing` out: `Committed(s-1)` says as much.

use crate::commit::Cell;
use crate::layout::HEADER_BYTES;

/// Numbers in a [`StepRecord`].
pub(crate) const VALUES: usize = 40;
const RECORD_WORDS: usize = VALUES + 2;

/// Words of the live section.
const LIVE: usize = HEADER_BYTES as usize / 8;
/// Word of the generation.
pub(crate) const GENERATION: usize = LIVE;
/// Place of the record. Selector and slots have cache lines of their own.
pub(crate) const RECORD: Cell<RECORD_WORDS> = Cell { selector: LIVE + 8, slots: [LIVE + 64, LIVE + 128] };

/// How far a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StepPhase {
    /// Pages are being written for the first time, or again, from a checkpoint; nothing can be trained or read yet.
    Loading,
    /// Gradients are being computed. After a death: throw them away, run the step again.
    Computing,
    /// Gradients of the step are in the segment, whole. After a death: update the pages that are still a step behind.
    GradientsComplete,
    /// Every page is at the step.
    Committed,
    /// Gradients are being computed, and pages whose own are whole may be updated already: see
    /// [`SharedOwner::update_early`](crate::SharedOwner::update_early). After a death: run the step again, with the weights of
    /// the step before; those of the pages that are at the step lie where their gradients were.
    Updating,
}

/// State of the run, replaced as a whole.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    /// Step that `phase` is about; 0 is the initial state.
    pub step: u64,
    /// How far it is.
    pub phase: StepPhase,
    /// Loss, norm, learning rate and the like; their meaning is the engine's.
    pub values: [f64; VALUES],
}

impl StepRecord {
    pub(crate) fn encode(&self) -> [u64; RECORD_WORDS] {
        let mut words = [0; RECORD_WORDS];
        words[0] = self.step;
        words[1] = match self.phase {
            StepPhase::Loading => 0,
            StepPhase::Computing => 1,
            StepPhase::GradientsComplete => 2,
            StepPhase::Committed => 3,
            StepPhase::Updating => 4,
        };
        words[2..].iter_mut().zip(self.values).for_each(|(word, value)| *word = value.to_bits());
        words
    }

    /// `Err`: the number in place of the phase.
    pub(crate) fn decode(words: &[u64; RECORD_WORDS]) -> Result<StepRecord, u64> {
        let phase = match words[1] {
            0 => StepPhase::Loading,
            1 => StepPhase::Computing,
            2 => StepPhase::GradientsComplete,
            3 => StepPhase::Committed,
            4 => StepPhase::Updating,
            other => return Err(other),
        };
        Ok(StepRecord { step: words[0], phase, values: std::array::from_fn(|i| f64::from_bits(words[i + 2])) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_encoding_bit_by_bit() {
        for phase in [StepPhase::Loading, StepPhase::Computing, StepPhase::GradientsComplete, StepPhase::Committed, StepPhase::Updating] {
            let mut values = [0.1; VALUES];
            values[3] = -0.0;
            values[4] = f64::NEG_INFINITY;
            let record = StepRecord { step: 1 << 40, phase, values };
            let back = StepRecord::decode(&record.encode()).unwrap();
            assert_eq!(back, record);
            assert!(back.values[3].is_sign_negative());
        }
    }

    #[test]
    fn an_unknown_phase_is_told() {
        let mut words = [0; RECORD_WORDS];
        words[1] = 5;
        assert_eq!(StepRecord::decode(&words), Err(5));
    }
}
