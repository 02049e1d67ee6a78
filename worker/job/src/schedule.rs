//! Learning rate of each step.
//!
//! Step `s` counts from 1. During the warm-up the rate is `lr·s/warmup_steps`; afterwards it is what
//! `transformers.get_{constant,linear,cosine,wsd}_schedule_with_warmup` give for `last_epoch = s - 1`, with the
//! floor `min_lr_ratio` in place of zero.

use crate::{ScheduleKind, ScheduleSpec};

/// Learning rate of step `step` (from 1) of `steps`, for the peak `lr`.
pub fn learning_rate(spec: &ScheduleSpec, lr: f64, step: u64, steps: u64) -> f64 {
    lr * factor(spec, step, steps)
}

fn factor(spec: &ScheduleSpec, step: u64, steps: u64) -> f64 {
    let warmup = spec.warmup_steps;
    if step <= warmup {
        return step as f64 / warmup as f64;
    }
    let (floor, epoch) = (spec.min_lr_ratio, step - 1);
    let span = steps.saturating_sub(warmup).max(1) as f64;
    let progress = ((epoch - warmup) as f64 / span).min(1.0);
    match spec.kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Linear => floor.max(1.0 - progress),
        ScheduleKind::Cosine => {
            let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
            cosine * (1.0 - floor) + floor
        }
        ScheduleKind::WarmupStableDecay => {
            let decay = spec.decay_steps.unwrap_or_else(|| steps.div_ceil(10)).clamp(1, steps.saturating_sub(warmup).max(1));
            let start = steps.saturating_sub(decay);
            if epoch < start {
                return 1.0;
            }
            let progress = ((epoch - start) as f64 / decay as f64).min(1.0);
            (1.0 - progress) * (1.0 - floor) + floor
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(kind: ScheduleKind, warmup_steps: u64, min_lr_ratio: f64) -> ScheduleSpec {
        ScheduleSpec { kind, warmup_steps, min_lr_ratio, decay_steps: None }
    }

    #[test]
    fn warmup_rises_linearly_to_the_peak() {
        let s = spec(ScheduleKind::Cosine, 4, 0.0);
        let rates: Vec<f64> = (1..=5).map(|i| learning_rate(&s, 2.0, i, 100)).collect();
        assert_eq!(rates[..4], [0.5, 1.0, 1.5, 2.0]);
        assert_eq!(rates[4], 2.0); // transformers: last_epoch 4 of warmup 4 is the peak
    }

    #[test]
    fn shapes_match_transformers() {
        // get_cosine_schedule_with_warmup(warmup 10, total 110): last_epoch 60 is half way.
        let cosine = spec(ScheduleKind::Cosine, 10, 0.0);
        assert!((learning_rate(&cosine, 1.0, 61, 110) - 0.5).abs() < 1e-15);
        let linear = spec(ScheduleKind::Linear, 10, 0.0);
        assert!((learning_rate(&linear, 1.0, 36, 110) - 0.75).abs() < 1e-15);
        assert_eq!(learning_rate(&spec(ScheduleKind::Constant, 10, 0.0), 1.0, 99, 110), 1.0);
    }

    #[test]
    fn floor_holds_for_every_kind() {
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine, ScheduleKind::WarmupStableDecay] {
            for step in 1..=200 {
                assert!(learning_rate(&spec(kind, 0, 0.1), 1.0, step, 100) >= 0.1 - 1e-12, "{kind:?} {step}");
            }
        }
    }

    #[test]
    fn stable_then_decay() {
        let s = ScheduleSpec { decay_steps: Some(20), ..spec(ScheduleKind::WarmupStableDecay, 10, 0.0) };
        assert_eq!(learning_rate(&s, 1.0, 80, 100), 1.0);
        assert_eq!(learning_rate(&s, 1.0, 91, 100), 0.5);
    }
}
