//! AdamW on the pages of the store, as `torch.optim.AdamW` defines it.
//!
//! For a gradient g (already scaled by the clipping factor), with t the step from 1:
//! ```text
//!   p ← p·(1 − lr·wd)            on tensors of two or more dimensions
//!   m ← β₁m + (1−β₁)g            v ← β₂v + (1−β₂)g²
//!   p ← p − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
//! ```
//! The master weight is the exact f32 that the page's two halves make up. bf16 moments are rounded stochastically with
//! random bits that are a function of (step, parameter) alone, so an update repeated after a crash gives the same bits.

use half::bf16;
use ramtorch_cpu::{AdamwScalars, adamw};
use ramtorch_job::OptimizerSpec;
use ramtorch_store::{Gradients, Layout, MomentsMut, MomentsRef, PageMut, PageView, split};
use rayon::prelude::*;

/// Parameters a task updates.
const CHUNK: usize = 1 << 12;

/// Numbers of one step, the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepScalars {
    pub step: u64,
    pub lr: f64,
    /// Gradients are multiplied by this: the clipping factor.
    pub gradient_scale: f32,
}

/// Factors of a step, and what weights are multiplied by where they decay.
fn scalars(o: &OptimizerSpec, s: &StepScalars) -> (AdamwScalars, f32) {
    let t = s.step.min(i32::MAX as u64) as i32;
    let k = AdamwScalars {
        beta1: o.betas[0] as f32,
        beta2: o.betas[1] as f32,
        one_minus_beta1: (1.0 - o.betas[0]) as f32,
        one_minus_beta2: (1.0 - o.betas[1]) as f32,
        step_size: (s.lr / (1.0 - o.betas[0].powi(t))) as f32,
        sqrt_bias2: (1.0 - o.betas[1].powi(t)).sqrt() as f32,
        eps: o.eps as f32,
        gradient_scale: s.gradient_scale,
    };
    (k, (1.0 - s.lr * o.weight_decay) as f32)
}

/// Random bits of parameter `i` in `step`; independent streams for the two moments.
#[inline(always)]
fn random_bits(step: u64, i: u64, stream: u64) -> u16 {
    let mut x = (i ^ (step << 40)).wrapping_add(stream.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (x >> 48) as u16
}

/// Rounds to one of the two neighbouring bf16 values, with probabilities that make the mean right.
#[inline(always)]
fn stochastic(x: f32, random: u16) -> u16 {
    let b = x.to_bits();
    if !x.is_finite() { bf16::from_f32(x).to_bits() } else { (b.wrapping_add(random as u32) >> 16) as u16 }
}

/// Runs of parameters of a page that decay or do not: (first, past last, decay), in parameters of the store.
fn decay_runs(layout: &Layout, params: &std::ops::Range<u64>) -> Vec<(u64, u64, bool)> {
    let mut runs: Vec<(u64, u64, bool)> = Vec::new();
    let tensors = layout.tensors();
    let first = tensors.partition_point(|t| t.start + t.len <= params.start);
    let mut at = params.start;
    for t in &tensors[first..] {
        if t.start >= params.end {
            break;
        }
        let (a, b) = (t.start.max(params.start), (t.start + t.len).min(params.end));
        if at < a {
            runs.push((at, a, false)); // padding
        }
        runs.push((a, b, t.decay));
        at = b;
    }
    if at < params.end {
        runs.push((at, params.end, false));
    }
    runs
}

enum MomentsChunk<'a> {
    F32(&'a [f32], &'a mut [f32]),
    Bf16(&'a [u16], &'a mut [u16]),
}

fn moment_chunks<'a>(old: MomentsRef<'a>, new: MomentsMut<'a>) -> Vec<MomentsChunk<'a>> {
    match (old, new) {
        (MomentsRef::F32(a), MomentsMut::F32(b)) => {
            a.chunks(CHUNK).zip(b.chunks_mut(CHUNK)).map(|(a, b)| MomentsChunk::F32(a, b)).collect()
        }
        (MomentsRef::Bf16(a), MomentsMut::Bf16(b)) => {
            a.chunks(CHUNK).zip(b.chunks_mut(CHUNK)).map(|(a, b)| MomentsChunk::Bf16(a, b)).collect()
        }
        _ => Vec::new(),
    }
}

impl MomentsChunk<'_> {
    fn read(&self, out: &mut [f32]) {
        match self {
            MomentsChunk::F32(a, _) => out.copy_from_slice(a),
            MomentsChunk::Bf16(a, _) => out.iter_mut().zip(*a).for_each(|(o, x)| *o = f32::from_bits((*x as u32) << 16)),
        }
    }
    fn write(&mut self, x: &[f32], step: u64, first: u64, stream: u64) {
        match self {
            MomentsChunk::F32(_, b) => b.copy_from_slice(x),
            MomentsChunk::Bf16(_, b) => {
                b.iter_mut().zip(x).enumerate().for_each(|(i, (o, x))| *o = stochastic(*x, random_bits(step, first + i as u64, stream)))
            }
        }
    }
}

/// Brings one page from the old state to the new one.
pub(crate) fn update_page(
    layout: &Layout,
    o: &OptimizerSpec,
    s: &StepScalars,
    old: PageView<'_>,
    new: PageMut<'_>,
    gradients: Gradients<'_>,
) {
    let (k, keep) = scalars(o, s);
    let runs = decay_runs(layout, &old.params);
    let start = old.params.start;
    let m = moment_chunks(old.m, new.m);
    let v = moment_chunks(old.v, new.v);
    let hi = old.hi.par_chunks(CHUNK).zip(new.hi.par_chunks_mut(CHUNK));
    let lo = old.lo.par_chunks(CHUNK).zip(new.lo.par_chunks_mut(CHUNK));
    hi.zip(lo).zip(m.into_par_iter().zip(v)).enumerate().for_each(|(c, (((hi, new_hi), (lo, new_lo)), (mut mc, mut vc)))| {
        let n = hi.len();
        let first = start + (c * CHUNK) as u64;
        let (mut p, mut m, mut v) = ([0f32; CHUNK], [0f32; CHUNK], [0f32; CHUNK]);
        let (p, m, v) = (&mut p[..n], &mut m[..n], &mut v[..n]);
        split::join_slice(hi, lo, p);
        mc.read(m);
        vc.read(v);
        let widened;
        let at = c * CHUNK;
        let g: &[f32] = match gradients {
            Gradients::F32(g) => &g[at..at + n],
            Gradients::Bf16(g) => {
                widened = g[at..at + n].iter().map(|x| f32::from_bits((*x as u32) << 16)).collect::<Vec<_>>();
                &widened
            }
            Gradients::None => {
                widened = vec![0.0; n];
                &widened
            }
        };
        let end = first + n as u64;
        let from = runs.partition_point(|r| r.1 <= first);
        for (a, b, decay) in &runs[from..] {
            if *a >= end {
                break;
            }
            let r = ((*a).max(first) - first) as usize..((*b).min(end) - first) as usize;
            adamw(&k, if *decay { keep } else { 1.0 }, &g[r.clone()], &mut p[r.clone()], &mut m[r.clone()], &mut v[r]);
        }
        split::split_slice(p, new_hi, new_lo);
        mc.write(m, s.step, first, 1);
        vc.write(v, s.step, first, 2);
    });
}

/// Sum of squares of a page's gradients, the same for any number of threads.
pub(crate) fn sum_of_squares(g: Gradients<'_>) -> f64 {
    fn lanes(x: impl Iterator<Item = f32>) -> f64 {
        x.map(|v| v as f64 * v as f64).sum()
    }
    let parts: Vec<f64> = match g {
        Gradients::None => Vec::new(),
        Gradients::F32(g) => g.par_chunks(CHUNK).map(ramtorch_cpu::sum_of_squares).collect(),
        Gradients::Bf16(g) => g.par_chunks(CHUNK).map(|c| lanes(c.iter().map(|x| f32::from_bits((*x as u32) << 16)))).collect(),
    };
    parts.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_parameter_follows_the_definition() {
        let o = OptimizerSpec { lr: 0.1, betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.5, ..Default::default() };
        let (mut p, mut m, mut v) = ([1f32], [0f32], [0f32]);
        let (mut dp, mut dm, mut dv) = (1f64, 0f64, 0f64);
        for t in 1..=50u64 {
            let g = (t as f64 * 0.7).sin();
            let (k, keep) = scalars(&o, &StepScalars { step: t, lr: 0.1, gradient_scale: 1.0 });
            adamw(&k, keep, &[g as f32], &mut p, &mut m, &mut v);
            dp *= 1.0 - 0.1 * 0.5;
            dm = 0.9 * dm + 0.1 * g;
            dv = 0.99 * dv + 0.01 * g * g;
            dp -= 0.1 / (1.0 - 0.9f64.powi(t as i32)) * dm / (dv.sqrt() / (1.0 - 0.99f64.powi(t as i32)).sqrt() + 1e-8);
            assert!((p[0] as f64 - dp).abs() < 1e-5, "step {t}: {} {dp}", p[0]);
        }
    }

    #[test]
    fn stochastic_rounding_is_unbiased_and_exact_on_bf16_values() {
        let exact = f32::from_bits(0x3f8a_0000);
        assert!((0..1000u16).all(|r| stochastic(exact, r.wrapping_mul(65)) == 0x3f8a));
        let x = f32::from_bits(0x3f80_4000); // a quarter of the way up
        let ups = (0..100_000u64).filter(|i| stochastic(x, random_bits(3, *i, 1)) == 0x3f81).count();
        assert!((ups as f64 / 1e5 - 0.25).abs() < 0.01, "{ups}");
    }
}
