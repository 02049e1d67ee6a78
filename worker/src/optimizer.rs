//! AdamW on the pages of the store, as `torch.optim.AdamW` defines it.
//!
//! For a gradient g (already scaled by the clipping factor), with t the step from 1:
//! ```text
//!   p ← p·(1 − lr·wd)            on tensors of two or more dimensions
//!   m ← β₁m + (1−β₁)g            v ← β₂v + (1−β₂)g²
//!   p ← p − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
//! ```
//! The master weight is the exact f32 that the page's two halves make up. bf16 moments are rounded stochastically with
//! random bits that are a function of (step, parameter) alone, so an update repeated after a crash gives the same bits,
//! and so does one that another device makes: see [`ramtorch_device::AdamwStep`].

use ramtorch_device::AdamwStep;
use ramtorch_job::OptimizerSpec;
use ramtorch_store::{Gradients, Store};
use rayon::prelude::*;
use std::ops::Range;

/// Gradients a task sums.
const CHUNK: usize = 1 << 12;

/// Numbers of one step, the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepScalars {
    pub step: u64,
    pub lr: f64,
    /// Gradients are multiplied by this: the clipping factor.
    pub gradient_scale: f32,
}

/// Factors of a step, worked out in f64 and rounded once.
pub(crate) fn factors(o: &OptimizerSpec, s: &StepScalars) -> AdamwStep {
    let t = s.step.min(i32::MAX as u64) as i32;
    AdamwStep {
        step: s.step,
        beta1: o.betas[0] as f32,
        beta2: o.betas[1] as f32,
        one_minus_beta1: (1.0 - o.betas[0]) as f32,
        one_minus_beta2: (1.0 - o.betas[1]) as f32,
        step_size: (s.lr / (1.0 - o.betas[0].powi(t))) as f32,
        sqrt_bias2: (1.0 - o.betas[1].powi(t)).sqrt() as f32,
        eps: o.eps as f32,
        gradient_scale: s.gradient_scale,
        keep: (1.0 - s.lr * o.weight_decay) as f32,
    }
}

/// Sum of squares of a page's gradients, the same for any number of threads.
pub(crate) fn sum_of_squares(g: Gradients<'_>) -> f64 {
    chunks_of_squares(g).iter().sum()
}

/// One for each [`CHUNK`].
fn chunks_of_squares(g: Gradients<'_>) -> Vec<f64> {
    match g {
        Gradients::None => Vec::new(),
        Gradients::F32(g) => g.par_chunks(CHUNK).map(ramtorch_cpu::sum_of_squares).collect(),
        Gradients::Bf16(g) => g.par_chunks(CHUNK).map(ramtorch_cpu::sum_of_squares_bf16).collect(),
    }
}

/// Sum of squares of the gradients of `params` at `step`, with the bits that [`sum_of_squares`] gives when they lie in one piece.
pub(crate) fn squares_of(store: &Store, params: Range<u64>, step: u64) -> f64 {
    let chunk = CHUNK as u64;
    let read = |params: Range<u64>, f: &mut dyn FnMut(Gradients<'_>)| ramtorch_cpu::read_gradient_range(store, params, step, f);
    let cut = store.layout().gradient_parts(params.clone()).next().map_or(params.end, |first| first.end);
    if cut == params.end {
        let mut sum = 0.0;
        read(params, &mut |g| sum = sum_of_squares(g));
        return sum;
    }
    // The chunk in which the cut lies is put together.
    let begin = params.start + (cut - params.start) / chunk * chunk;
    let end = (begin + chunk).min(params.end);
    let mut sums = Vec::new();
    read(params.start..begin, &mut |g| sums.extend(chunks_of_squares(g)));
    let (mut wide, mut narrow) = (Vec::new(), Vec::new());
    for part in [begin..cut, cut..end] {
        read(part, &mut |g| match g {
            Gradients::None => {}
            Gradients::F32(g) => wide.extend_from_slice(g),
            Gradients::Bf16(g) => narrow.extend_from_slice(g),
        });
    }
    sums.extend(chunks_of_squares(if narrow.is_empty() { Gradients::F32(&wide) } else { Gradients::Bf16(&narrow) }));
    read(end..params.end, &mut |g| sums.extend(chunks_of_squares(g)));
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_the_definition() {
        let o = OptimizerSpec { lr: 0.1, betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.5, ..Default::default() };
        let k = factors(&o, &StepScalars { step: 3, lr: 0.05, gradient_scale: 0.25 });
        let want = AdamwStep {
            step: 3,
            beta1: 0.9,
            beta2: 0.99,
            one_minus_beta1: 0.1,
            one_minus_beta2: 0.01,
            step_size: (0.05 / (1.0 - 0.9f64 * 0.9 * 0.9)) as f32,
            sqrt_bias2: (1.0f64 - 0.99 * 0.99 * 0.99).sqrt() as f32,
            eps: 1e-8,
            gradient_scale: 0.25,
            keep: 0.975,
        };
        let close = |a: f32, b: f32| (a - b).abs() <= 2e-7 * b.abs();
        assert!(close(k.step_size, want.step_size) && close(k.sqrt_bias2, want.sqrt_bias2), "{k:?}");
        assert_eq!(AdamwStep { step_size: want.step_size, sqrt_bias2: want.sqrt_bias2, ..k }, want);
    }

    #[test]
    fn squares_do_not_depend_on_threads_or_format() {
        let narrow: Vec<u16> = (0..100_003u32).map(|i| (((i % 2003) as f32 - 1001.0).to_bits() >> 16) as u16).collect();
        let wide: Vec<f32> = narrow.iter().map(|x| f32::from_bits(u32::from(*x) << 16)).collect();
        let sums: Vec<f64> = [1, 2, 5]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| sum_of_squares(Gradients::Bf16(&narrow)))
            })
            .collect();
        assert!(sums.iter().all(|s| s.to_bits() == sums[0].to_bits()));
        // Integers: exact in any order.
        assert_eq!(sums[0], sum_of_squares(Gradients::F32(&wide)));
    }
}
