//! The arithmetic of AdamW on runs of f32 values, compiled for each instruction set.

use crate::simd::simd;

/// Factors of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwScalars {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// 1 - beta1, rounded once.
    pub one_minus_beta1: f32,
    /// 1 - beta2, rounded once.
    pub one_minus_beta2: f32,
    /// Rate over 1 - beta1^t.
    pub step_size: f32,
    /// Root of 1 - beta2^t.
    pub sqrt_bias2: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// Gradients are multiplied by this first.
    pub gradient_scale: f32,
}

simd! {
    fn update(k: &AdamwScalars, keep: f32, g: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for (((g, p), m), v) in g.iter().zip(p).zip(m).zip(v) {
            let g = g * k.gradient_scale;
            *m = k.beta1 * *m + k.one_minus_beta1 * g;
            *v = k.beta2 * *v + k.one_minus_beta2 * g * g;
            *p = *p * keep - k.step_size * (*m / (v.sqrt() / k.sqrt_bias2 + k.eps));
        }
    }
    fn squares(x: &[f32]) -> f64 {
        let mut lanes = [0f64; 8];
        let n = x.len() / 8 * 8;
        for c in x[..n].chunks_exact(8) {
            for (l, v) in lanes.iter_mut().zip(c) { *l += *v as f64 * *v as f64; }
        }
        let mut sum = 0f64;
        for v in &x[n..] { sum += *v as f64 * *v as f64; }
        for l in lanes { sum += l; }
        sum
    }
}

/// Updates parameters `p` and moments `m`, `v` from gradients `g`; parameters are first multiplied by `keep` (weight
/// decay). All slices have one length; the results do not depend on where a longer run is cut.
pub fn adamw(k: &AdamwScalars, keep: f32, g: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    update(k, keep, g, p, m, v);
}

/// Σ x², in f64.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    squares(x)
}
