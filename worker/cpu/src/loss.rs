//! Losses, with their gradients in place.

use crate::memory::{Elem, view, view_mut};
use crate::simd::{exp, simd};
use ramtorch_device::{DevBuf, LossOut};
use rayon::prelude::*;

simd! {
    fn maximum<T: Elem>(x: &[T]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let mut it = x.chunks_exact(16);
        for c in &mut it {
            for (l, v) in lanes.iter_mut().zip(c) { let v = v.get(); *l = if v > *l { v } else { *l }; }
        }
        let mut m = f32::NEG_INFINITY;
        for l in lanes { m = m.max(l); }
        for v in it.remainder() { m = m.max(v.get()); }
        m
    }
    /// Σ e^(x - max).
    fn sum_exp<T: Elem>(x: &[T], max: f32) -> f64 {
        let mut total = 0f64;
        for chunk in x.chunks(512) {
            let mut lanes = [0f32; 16];
            let mut it = chunk.chunks_exact(16);
            for c in &mut it {
                for (l, v) in lanes.iter_mut().zip(c) { *l += exp(v.get() - max); }
            }
            let mut s = 0f64;
            for l in lanes { s += l as f64; }
            for v in it.remainder() { s += exp(v.get() - max) as f64; }
            total += s;
        }
        total
    }
    fn softmax_scaled<T: Elem>(x: &mut [T], lse: f32, scale: f32) {
        for v in x.iter_mut() { *v = T::put(exp(v.get() - lse) * scale); }
    }
}

/// A target outside 0..classes with weight 0 is padding; with any other weight it is a defect of the data reader and
/// gives NaN.
pub(crate) fn cross_entropy<T: Elem>(logits: DevBuf, rows: usize, classes: usize, targets: DevBuf, weights: DevBuf, out: LossOut) {
    // SAFETY: stream order.
    let (logits, targets, weights, losses) = unsafe {
        (view_mut::<T>(logits, rows * classes), view::<i32>(targets, rows), view::<f32>(weights, rows), view_mut::<f32>(out.losses, rows))
    };
    logits.par_chunks_mut(classes).zip(losses).enumerate().for_each(|(r, (x, loss))| {
        let (target, weight) = (targets[r], weights[r]);
        if weight == 0.0 {
            *loss = 0.0;
            if out.gradient_scale.is_some() {
                x.fill(T::put(0.0));
            }
            return;
        }
        let Some(at) = usize::try_from(target).ok().filter(|t| *t < classes) else {
            *loss = f32::NAN;
            return;
        };
        let max = maximum(x);
        let lse = max + sum_exp(x, max).ln() as f32;
        *loss = weight * (lse - x[at].get());
        if let Some(scale) = out.gradient_scale {
            let s = scale * weight;
            let p = exp(x[at].get() - lse);
            softmax_scaled(x, lse, s);
            x[at] = T::put((p - 1.0) * s);
        }
    });
}

pub(crate) fn squared_error<T: Elem>(x: DevBuf, rows: usize, n: usize, targets: DevBuf, weights: DevBuf, out: LossOut) {
    // SAFETY: stream order.
    let (x, targets, weights, losses) = unsafe {
        (view_mut::<T>(x, rows * n), view::<f32>(targets, rows * n), view::<f32>(weights, rows), view_mut::<f32>(out.losses, rows))
    };
    x.par_chunks_mut(n).zip(losses).enumerate().for_each(|(r, (x, loss))| {
        let mut sum = 0f64;
        for (x, t) in x.iter_mut().zip(&targets[r * n..]) {
            let d = x.get() - t;
            sum += (d * d) as f64;
            if let Some(scale) = out.gradient_scale {
                *x = T::put(2.0 * d * scale * weights[r]);
            }
        }
        *loss = (sum * weights[r] as f64) as f32;
    });
}
