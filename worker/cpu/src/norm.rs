//! RMS and layer normalisation.

use crate::memory::{Elem, view, view_mut};
use crate::simd::simd;
use ramtorch_device::{DevBuf, NormKind, NormShape};
use rayon::prelude::*;

/// Rows a task works on; parameter gradients are summed per task, then over tasks in order.
const ROWS_PER_TASK: usize = 64;

simd! {
    /// Sum and sum of squares of deviations from `mean0`, in f64 lanes of f32 chunks: stable for long rows.
    fn sum<T: Elem>(x: &[T]) -> f64 {
        let mut total = 0f64;
        for chunk in x.chunks(256) {
            let mut lanes = [0f32; 16];
            let mut it = chunk.chunks_exact(16);
            for c in &mut it {
                for (l, v) in lanes.iter_mut().zip(c) { *l += v.get(); }
            }
            let mut s = 0f64;
            for l in lanes { s += l as f64; }
            for v in it.remainder() { s += v.get() as f64; }
            total += s;
        }
        total
    }
    /// Σ (x - mean)².
    fn sum_squares<T: Elem>(x: &[T], mean: f32) -> f64 {
        let mut total = 0f64;
        for chunk in x.chunks(256) {
            let mut lanes = [0f32; 16];
            let mut it = chunk.chunks_exact(16);
            for c in &mut it {
                for (l, v) in lanes.iter_mut().zip(c) { let d = v.get() - mean; *l += d * d; }
            }
            let mut s = 0f64;
            for l in lanes { s += l as f64; }
            for v in it.remainder() { let d = (v.get() - mean) as f64; s += d * d; }
            total += s;
        }
        total
    }
    fn normalise<T: Elem>(x: &[T], mean: f32, r: f32, w: &[T], b: &[T], y: &mut [T]) {
        if b.is_empty() {
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) { *y = T::put((x.get() - mean) * r * w.get()); }
        } else {
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) { *y = T::put((x.get() - mean) * r * w.get() + b.get()); }
        }
    }
    /// Σ g and Σ g·x̂ with g = dy·w.
    fn backward_sums<T: Elem>(dy: &[T], x: &[T], w: &[T], mean: f32, r: f32) -> (f64, f64) {
        let (mut total_g, mut total_gx) = (0f64, 0f64);
        for ((dy, x), w) in dy.chunks(256).zip(x.chunks(256)).zip(w.chunks(256)) {
            let (mut lg, mut lx) = ([0f32; 16], [0f32; 16]);
            let n = dy.len() / 16 * 16;
            for i in (0..n).step_by(16) {
                for l in 0..16 {
                    let g = dy[i + l].get() * w[i + l].get();
                    lg[l] += g;
                    lx[l] += g * (x[i + l].get() - mean) * r;
                }
            }
            for l in 0..16 { total_g += lg[l] as f64; total_gx += lx[l] as f64; }
            for i in n..dy.len() {
                let g = dy[i].get() * w[i].get();
                total_g += g as f64;
                total_gx += (g * (x[i].get() - mean) * r) as f64;
            }
        }
        (total_g, total_gx)
    }
    /// dweight += dy·x̂ and, for layer norms, dbias += dy.
    fn parameter_gradients<T: Elem>(dy: &[T], x: &[T], mean: f32, r: f32, dw: &mut [f32], db: &mut [f32]) {
        for ((d, dy), x) in dw.iter_mut().zip(dy).zip(x) { *d += dy.get() * (x.get() - mean) * r; }
        for (d, dy) in db.iter_mut().zip(dy) { *d += dy.get(); }
    }
    fn input_gradient<T: Elem>(dy: &[T], x: &[T], w: &[T], mean: f32, r: f32, mg: f32, mgx: f32, add: &[T], dx: &mut [T]) {
        for (((d, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
            let xh = (x.get() - mean) * r;
            *d = T::put(r * (dy.get() * w.get() - mg - xh * mgx));
        }
        for (d, a) in dx.iter_mut().zip(add) { *d = T::put(d.get() + a.get()); }
    }
}

fn elements(s: &NormShape) -> usize {
    if s.rows == 0 { 0 } else { (s.rows - 1) * s.row_stride + s.offset + s.groups * s.width }
}

pub(crate) fn forward<T: Elem>(s: NormShape, x: DevBuf, w: DevBuf, b: Option<DevBuf>, y: DevBuf, stats: DevBuf) {
    let n = elements(&s);
    // SAFETY: stream order (memory::view); y may be x itself: each vector is read whole before it is written.
    let (x, w) = unsafe { (view::<T>(x, n), view::<T>(w, s.width)) };
    // SAFETY: as above.
    let b: &[T] = b.map_or(&[], |b| unsafe { view(b, s.width) });
    let per = if s.kind == NormKind::Layer { 2 } else { 1 };
    // SAFETY: as above.
    let stats = unsafe { view_mut::<f32>(stats, s.stats_len()) };
    let d = s.width as f64;
    stats.par_chunks_mut(ROWS_PER_TASK * s.groups * per).enumerate().for_each(|(task, stats)| {
        let mut copy = Vec::with_capacity(s.width);
        for (i, stat) in stats.chunks_mut(per).enumerate() {
            let at = vector_at(&s, task * ROWS_PER_TASK * s.groups + i);
            copy.clear();
            copy.extend_from_slice(&x[at..at + s.width]);
            let mean = if s.kind == NormKind::Layer { (sum(&copy) / d) as f32 } else { 0.0 };
            let r = (1.0 / (sum_squares(&copy, mean) / d + s.eps as f64).sqrt()) as f32;
            if per == 2 {
                stat[0] = mean;
            }
            stat[per - 1] = r;
            // SAFETY: vectors are disjoint, each belongs to one task.
            let out = unsafe { view_mut::<T>(y.slice((at * size_of::<T>()) as u64, (s.width * size_of::<T>()) as u64), s.width) };
            normalise(&copy, mean, r, w, b, out);
        }
    });
}

fn vector_at(s: &NormShape, i: usize) -> usize {
    (i / s.groups) * s.row_stride + s.offset + (i % s.groups) * s.width
}

pub(crate) struct Backward {
    pub dy: DevBuf,
    pub x: DevBuf,
    pub weight: DevBuf,
    pub stats: DevBuf,
    pub add: Option<DevBuf>,
    pub dx: DevBuf,
    pub dweight: DevBuf,
    pub dbias: Option<DevBuf>,
}

pub(crate) fn backward<T: Elem>(s: NormShape, a: Backward) {
    let n = elements(&s);
    let size = size_of::<T>() as u64;
    // SAFETY: stream order; dx may be dy or add: each vector is copied before it is written.
    let (x, w, stats) = unsafe { (view::<T>(a.x, n), view::<T>(a.weight, s.width), view::<f32>(a.stats, s.stats_len())) };
    let per = if s.kind == NormKind::Layer { 2 } else { 1 };
    let vectors = s.rows * s.groups;
    let task_len = ROWS_PER_TASK * s.groups;
    let part = |buf: DevBuf, at: usize| buf.slice(at as u64 * size, s.width as u64 * size);
    let partial: Vec<(Vec<f32>, Vec<f32>)> = (0..vectors.div_ceil(task_len.max(1)))
        .into_par_iter()
        .map(|task| {
            let mut dw = vec![0f32; s.width];
            let mut db = vec![0f32; if a.dbias.is_some() { s.width } else { 0 }];
            let (mut dy, mut add): (Vec<T>, Vec<T>) = (Vec::new(), Vec::new());
            for i in task * task_len..((task + 1) * task_len).min(vectors) {
                let at = vector_at(&s, i);
                dy.clear();
                // SAFETY: read before this task writes the same vector.
                dy.extend_from_slice(unsafe { view::<T>(part(a.dy, at), s.width) });
                add.clear();
                if let Some(more) = a.add {
                    // SAFETY: as above.
                    add.extend_from_slice(unsafe { view::<T>(part(more, at), s.width) });
                }
                let (mean, r) = if per == 2 { (stats[2 * i], stats[2 * i + 1]) } else { (0.0, stats[i]) };
                let xs = &x[at..at + s.width];
                let (g, gx) = backward_sums(&dy, xs, w, mean, r);
                let mg = if per == 2 { (g / s.width as f64) as f32 } else { 0.0 };
                parameter_gradients(&dy, xs, mean, r, &mut dw, &mut db);
                // SAFETY: vectors are disjoint, each belongs to one task.
                let dx = unsafe { view_mut::<T>(part(a.dx, at), s.width) };
                input_gradient(&dy, xs, w, mean, r, mg, (gx / s.width as f64) as f32, &add, dx);
            }
            (dw, db)
        })
        .collect();
    // SAFETY: as above; summed in task order, whatever the number of threads.
    let dw = unsafe { view_mut::<f32>(a.dweight, s.width) };
    for (p, _) in &partial {
        dw.iter_mut().zip(p).for_each(|(d, p)| *d += p);
    }
    if let Some(db) = a.dbias {
        // SAFETY: as above.
        let db = unsafe { view_mut::<f32>(db, s.width) };
        for (_, p) in &partial {
            db.iter_mut().zip(p).for_each(|(d, p)| *d += p);
        }
    }
}
