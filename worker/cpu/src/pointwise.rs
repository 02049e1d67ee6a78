//! Activations, gated units, rotary embedding, sums and conversions.

use crate::memory::{Elem, view, view_mut};
use crate::simd::{erf, exp, sigmoid, simd, tanh};
use ramtorch_device::{ActivationKind, DevBuf, Dtype, RopeShape};
use rayon::prelude::*;

const CHUNK: usize = 1 << 14;
const GELU_A: f32 = 0.797_884_6;
const GELU_B: f32 = 0.044_715;

#[inline(always)]
fn act(kind: ActivationKind, x: f32) -> f32 {
    match kind {
        ActivationKind::Silu => x * sigmoid(x),
        ActivationKind::GeluTanh => 0.5 * x * (1.0 + tanh(GELU_A * (x + GELU_B * x * x * x))),
        ActivationKind::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        ActivationKind::Relu => {
            // written so that NaN stays NaN
            if x <= 0.0 { 0.0 } else { x }
        }
        ActivationKind::Tanh => tanh(x),
    }
}

#[inline(always)]
fn slope(kind: ActivationKind, x: f32) -> f32 {
    match kind {
        ActivationKind::Silu => {
            let s = sigmoid(x);
            s * (1.0 + x * (1.0 - s))
        }
        ActivationKind::GeluTanh => {
            let t = tanh(GELU_A * (x + GELU_B * x * x * x));
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * GELU_A * (1.0 + 3.0 * GELU_B * x * x)
        }
        ActivationKind::Gelu => 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)) + x * exp(-0.5 * x * x) * 0.398_942_3,
        ActivationKind::Relu => {
            if x > 0.0 {
                1.0
            } else {
                0.0
            }
        }
        ActivationKind::Tanh => {
            let t = tanh(x);
            1.0 - t * t
        }
    }
}

/// Calls `$f` with the activation as a constant, so that the loop inside has no branch on it.
macro_rules! by_kind {
    ($kind:expr, $k:ident => $e:expr) => {
        match $kind {
            ActivationKind::Silu => {
                const $k: ActivationKind = ActivationKind::Silu;
                $e
            }
            ActivationKind::GeluTanh => {
                const $k: ActivationKind = ActivationKind::GeluTanh;
                $e
            }
            ActivationKind::Gelu => {
                const $k: ActivationKind = ActivationKind::Gelu;
                $e
            }
            ActivationKind::Relu => {
                const $k: ActivationKind = ActivationKind::Relu;
                $e
            }
            ActivationKind::Tanh => {
                const $k: ActivationKind = ActivationKind::Tanh;
                $e
            }
        }
    };
}

simd! {
    fn map_act<T: Elem>(kind: ActivationKind, x: &[T], y: &mut [T]) {
        by_kind!(kind, K => for (y, x) in y.iter_mut().zip(x) { *y = T::put(act(K, x.get())); })
    }
    fn map_slope<T: Elem>(kind: ActivationKind, dy: &[T], x: &[T], dx: &mut [T]) {
        by_kind!(kind, K => for ((dx, dy), x) in dx.iter_mut().zip(dy).zip(x) { *dx = T::put(dy.get() * slope(K, x.get())); })
    }
    fn glu_row<T: Elem>(kind: ActivationKind, gate: &[T], up: &[T], h: &mut [T]) {
        by_kind!(kind, K => for ((h, g), u) in h.iter_mut().zip(gate).zip(up) { *h = T::put(act(K, g.get()) * u.get()); })
    }
    fn glu_row_backward<T: Elem>(kind: ActivationKind, dh: &[T], gate: &mut [T], up: &mut [T]) {
        by_kind!(kind, K => for ((d, g), u) in dh.iter().zip(gate).zip(up) {
            let (x, y, dh) = (g.get(), u.get(), d.get());
            *g = T::put(dh * y * slope(K, x));
            *u = T::put(dh * act(K, x));
        })
    }
    fn add_slices<T: Elem>(x: &[T], y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) { *y = T::put(y.get() + x.get()); }
    }
    fn add_rows<T: Elem>(x: &[T], width: usize, out: &mut [f32]) {
        for row in x.chunks_exact(width) {
            for (o, v) in out.iter_mut().zip(row) { *o += v.get(); }
        }
    }
    fn widen<T: Elem>(x: &[T], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) { *y = x.get(); }
    }
    fn narrow<T: Elem>(x: &[f32], y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) { *y = T::put(*x); }
    }
    fn rotate<T: Elem>(table: &[f32], sign: f32, first: &mut [T], second: &mut [T]) {
        for ((t, a), b) in table.chunks_exact(2).zip(first).zip(second) {
            let (c, s) = (t[0], t[1] * sign);
            let (x, y) = (a.get(), b.get());
            *a = T::put(x * c - y * s);
            *b = T::put(y * c + x * s);
        }
    }
}

pub(crate) fn activation_forward<T: Elem>(kind: ActivationKind, x: DevBuf, n: usize, y: DevBuf) {
    // SAFETY: stream order; x and y are different buffers.
    let (x, y) = unsafe { (view::<T>(x, n), view_mut::<T>(y, n)) };
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| map_act(kind, x, y));
}

pub(crate) fn activation_backward<T: Elem>(kind: ActivationKind, dy: DevBuf, x: DevBuf, n: usize, dx: DevBuf) {
    // SAFETY: stream order.
    let x = unsafe { view::<T>(x, n) };
    let size = size_of::<T>() as u64;
    x.par_chunks(CHUNK).enumerate().for_each(|(i, x)| {
        let at = |b: DevBuf| b.slice((i * CHUNK) as u64 * size, x.len() as u64 * size);
        // SAFETY: dx may be dy: this task's part is copied before it is written; parts are disjoint.
        let d = unsafe { view::<T>(at(dy), x.len()) }.to_vec();
        // SAFETY: as above.
        map_slope(kind, &d, x, unsafe { view_mut::<T>(at(dx), x.len()) });
    });
}

pub(crate) fn glu_forward<T: Elem>(kind: ActivationKind, x: DevBuf, rows: usize, n: usize, h: DevBuf) {
    // SAFETY: stream order.
    let (x, h) = unsafe { (view::<T>(x, rows * 2 * n), view_mut::<T>(h, rows * n)) };
    h.par_chunks_mut(n).zip(x.par_chunks(2 * n)).for_each(|(h, x)| glu_row(kind, &x[..n], &x[n..], h));
}

pub(crate) fn glu_backward<T: Elem>(kind: ActivationKind, dh: DevBuf, x: DevBuf, rows: usize, n: usize, dx: DevBuf) {
    // SAFETY: stream order.
    let dh = unsafe { view::<T>(dh, rows * n) };
    let size = size_of::<T>() as u64;
    dh.par_chunks(n).enumerate().for_each(|(i, dh)| {
        let at = |b: DevBuf| b.slice((i * 2 * n) as u64 * size, 2 * n as u64 * size);
        if x.ptr != dx.ptr {
            // SAFETY: rows are disjoint; x and dx are different buffers here.
            unsafe { view_mut::<T>(at(dx), 2 * n) }.copy_from_slice(unsafe { view::<T>(at(x), 2 * n) });
        }
        // SAFETY: rows are disjoint.
        let (gate, up) = unsafe { view_mut::<T>(at(dx), 2 * n) }.split_at_mut(n);
        glu_row_backward(kind, dh, gate, up);
    });
}

pub(crate) fn add<T: Elem>(x: DevBuf, y: DevBuf, n: usize) {
    // SAFETY: stream order; different buffers.
    let (x, y) = unsafe { (view::<T>(x, n), view_mut::<T>(y, n)) };
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| add_slices(x, y));
}

pub(crate) fn sum_of_squares(x: DevBuf, dtype: Dtype, count: usize, out: DevBuf) {
    const CHUNK: usize = 1 << 16;
    // SAFETY: stream order.
    let sums: Vec<f64> = unsafe {
        match dtype {
            Dtype::F32 => view::<f32>(x, count).par_chunks(CHUNK).map(crate::sum_of_squares).collect(),
            Dtype::Bf16 => view::<u16>(x, count).par_chunks(CHUNK).map(crate::sum_of_squares_bf16).collect(),
        }
    };
    // SAFETY: as above.
    let out = unsafe { view_mut::<f64>(out, 1) };
    out[0] = sums.iter().sum();
}

pub(crate) fn column_sum<T: Elem>(x: DevBuf, rows: usize, n: usize, out: DevBuf) {
    // SAFETY: stream order.
    let (x, out) = unsafe { (view::<T>(x, rows * n), view_mut::<f32>(out, n)) };
    // Partial sums of 64 rows, then of those in order: the same bits for any number of threads.
    let partial: Vec<Vec<f32>> = x
        .par_chunks(64 * n)
        .map(|x| {
            let mut sum = vec![0f32; n];
            add_rows(x, n, &mut sum);
            sum
        })
        .collect();
    for p in partial {
        out.iter_mut().zip(p).for_each(|(o, p)| *o += p);
    }
}

pub(crate) fn to_f32<T: Elem>(x: DevBuf, n: usize, y: DevBuf) {
    // SAFETY: stream order; different buffers.
    let (x, y) = unsafe { (view::<T>(x, n), view_mut::<f32>(y, n)) };
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| widen(x, y));
}

pub(crate) fn from_f32<T: Elem>(x: DevBuf, n: usize, y: DevBuf) {
    // SAFETY: stream order; different buffers.
    let (x, y) = unsafe { (view::<f32>(x, n), view_mut::<T>(y, n)) };
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| narrow(x, y));
}

pub(crate) fn gather_rows<T: Elem>(x: DevBuf, width: usize, rows: DevBuf, count: usize, y: DevBuf) {
    // SAFETY: stream order; different buffers.
    let (rows, y) = unsafe { (view::<i32>(rows, count), view_mut::<T>(y, count * width)) };
    // SAFETY: as above.
    let all = unsafe { view::<T>(x, (x.bytes as usize) / size_of::<T>()) };
    for (y, r) in y.chunks_mut(width).zip(rows) {
        y.copy_from_slice(&all[*r as usize * width..][..width]);
    }
}

pub(crate) fn rope<T: Elem>(s: RopeShape, x: DevBuf) {
    let half = s.head_dim / 2;
    // SAFETY: stream order.
    let table = unsafe { view::<f32>(s.table, (s.table.bytes / 4) as usize) };
    // SAFETY: as above.
    let positions = s.positions.map(|p| unsafe { view::<i32>(p, s.rows) });
    let sign = if s.inverse { -1.0 } else { 1.0 };
    // SAFETY: as above.
    let x = unsafe { view_mut::<T>(x, s.rows * s.row_stride) };
    x.par_chunks_mut(s.row_stride).enumerate().for_each(|(r, row)| {
        let position = positions.map_or(r % s.seq, |p| p[r] as usize);
        let table = &table[position * s.head_dim..][..s.head_dim];
        for head in row[..s.heads * s.head_dim].chunks_exact_mut(s.head_dim) {
            let (a, b) = head.split_at_mut(half);
            rotate(table, sign, a, b);
        }
    });
}
