//! Causal softmax attention in tiles of queries, with matrix products by the `gemm` crate.
//!
//! A task owns one tile of queries of one head (forward), or one key/value head of one sequence (backward, so that
//! the sums over the query heads of a group have one order).

use crate::memory::{Elem, view, view_mut};
use crate::simd::{exp, simd};
use ramtorch_device::{AttentionShape, CachedAttentionShape, DevBuf};
use rayon::prelude::*;
use std::ops::Range;

/// Queries a tile.
const TILE: usize = 96;

simd! {
    fn row_max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let mut it = x.chunks_exact(16);
        for c in &mut it {
            for (l, v) in lanes.iter_mut().zip(c) { *l = if *v > *l { *v } else { *l }; }
        }
        let mut m = f32::NEG_INFINITY;
        for l in lanes { m = m.max(l); }
        for v in it.remainder() { m = m.max(*v); }
        m
    }
    /// x = e^(x·scale - shift); returns the sum.
    fn exp_row(x: &mut [f32], scale: f32, shift: f32) -> f32 {
        let mut lanes = [0f32; 16];
        let n = x.len() / 16 * 16;
        let (body, tail) = x.split_at_mut(n);
        for c in body.chunks_exact_mut(16) {
            for (l, v) in lanes.iter_mut().zip(c) {
                *v = exp(*v * scale - shift);
                *l += *v;
            }
        }
        let mut s = 0f32;
        for v in tail {
            *v = exp(*v * scale - shift);
            s += *v;
        }
        for l in lanes { s += l; }
        s
    }
    fn scale_row(x: &mut [f32], by: f32) {
        for v in x.iter_mut() { *v *= by; }
    }
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0f32; 16];
        let n = a.len() / 16 * 16;
        for (x, y) in a[..n].chunks_exact(16).zip(b[..n].chunks_exact(16)) {
            for l in 0..16 { lanes[l] += x[l] * y[l]; }
        }
        let mut s = 0f32;
        for (x, y) in a[n..].iter().zip(&b[n..]) { s += x * y; }
        for l in lanes { s += l; }
        s
    }
    /// ds = p · (dp - delta) · scale, into p.
    fn score_gradient(p: &mut [f32], dp: &[f32], delta: f32, scale: f32) {
        for (p, dp) in p.iter_mut().zip(dp) { *p *= (dp - delta) * scale; }
    }
    fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) { *y += a * x; }
    }
    fn widen<T: Elem>(x: &[T], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) { *y = x.get(); }
    }
    fn narrow<T: Elem>(x: &[f32], y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) { *y = T::put(*x); }
    }
}

/// Row-major f32 matrix in a scratch buffer, or its transpose.
#[derive(Clone, Copy)]
struct Mat<'a> {
    data: &'a [f32],
    stride: usize,
    transposed: bool,
}

fn plain(data: &[f32], stride: usize) -> Mat<'_> {
    Mat { data, stride, transposed: false }
}
fn flipped(data: &[f32], stride: usize) -> Mat<'_> {
    Mat { data, stride, transposed: true }
}

/// out[m,n] (+)= a[m,k] b[k,n], in the calling thread.
fn product(m: usize, n: usize, k: usize, a: Mat, b: Mat, out: &mut [f32], stride: usize, accumulate: bool) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let reach = |x: &Mat, rows: usize, cols: usize| if x.transposed { (cols - 1) * x.stride + rows } else { (rows - 1) * x.stride + cols };
    assert!(reach(&a, m, k) <= a.data.len() && reach(&b, k, n) <= b.data.len() && (m - 1) * stride + n <= out.len());
    let st = |x: &Mat| if x.transposed { (1isize, x.stride as isize) } else { (x.stride as isize, 1isize) };
    let ((a_rs, a_cs), (b_rs, b_cs)) = (st(&a), st(&b));
    // SAFETY: all elements under these strides lie inside the slices (asserted); out is exclusively borrowed.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a_cs,
            a_rs,
            b.data.as_ptr(),
            b_cs,
            b_rs,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        )
    }
}

/// Copies columns `col..col+width` of rows `rows` of a matrix with `stride` columns into `out`, widened.
fn gather<T: Elem>(x: &[T], stride: usize, rows: Range<usize>, col: usize, width: usize, out: &mut Vec<f32>) {
    out.resize(rows.len() * width, 0.0);
    for (line, r) in out.chunks_exact_mut(width).zip(rows) {
        widen(&x[r * stride + col..][..width], line);
    }
}

struct Masks<'a> {
    window: Option<usize>,
    starts: Option<&'a [i32]>,
    seq: usize,
}

impl<'a> Masks<'a> {
    fn new(s: &AttentionShape) -> Masks<'a> {
        // SAFETY: stream order.
        Masks { window: s.window, starts: s.starts.map(|b| unsafe { view::<i32>(b, s.rows()) }), seq: s.seq }
    }
    /// First key that query t of sequence b sees.
    fn first(&self, b: usize, t: usize) -> usize {
        let by_window = self.window.map_or(0, |w| (t + 1).saturating_sub(w));
        let by_document = self.starts.map_or(0, |s| s[b * self.seq + t].max(0) as usize);
        by_window.max(by_document).min(t)
    }
}

pub(crate) fn forward<T: Elem>(s: AttentionShape, qkv: DevBuf, out: DevBuf, lse: DevBuf) {
    let (d, row, size) = (s.head_dim, s.row(), size_of::<T>() as u64);
    let out_row = s.heads * d;
    // SAFETY: stream order.
    let qkv = unsafe { view::<T>(qkv, s.rows() * row) };
    let masks = Masks::new(&s);
    let tiles = s.seq.div_ceil(TILE);
    (0..s.batch * s.heads * tiles).into_par_iter().for_each_init(
        || (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new()),
        |(q, k, v, scores, o): &mut (Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>), task| {
            // Late tiles see more keys: taken first, so that the last tasks to finish are short.
            let (tile, head, b) = (tiles - 1 - task / (s.batch * s.heads), task % s.heads, task / s.heads % s.batch);
            let kv = head / (s.heads / s.kv_heads);
            let queries = tile * TILE..((tile + 1) * TILE).min(s.seq);
            let first = masks.first(b, queries.start).min(queries.clone().map(|t| masks.first(b, t)).min().unwrap_or(0));
            let keys = first..queries.end;
            let at = |r: &Range<usize>| b * s.seq + r.start..b * s.seq + r.end;
            gather(qkv, row, at(&queries), head * d, d, q);
            gather(qkv, row, at(&keys), (s.heads + kv) * d, d, k);
            gather(qkv, row, at(&keys), (s.heads + s.kv_heads + kv) * d, d, v);
            let (nq, nk) = (queries.len(), keys.len());
            scores.resize(nq * nk, 0.0);
            product(nq, nk, d, plain(q, d), flipped(k, d), scores, nk, false);
            for (i, t) in queries.clone().enumerate() {
                let line = &mut scores[i * nk..(i + 1) * nk];
                let (from, to) = (masks.first(b, t) - first, t + 1 - first);
                let max = row_max(&line[from..to]) * s.scale;
                let sum = exp_row(&mut line[from..to], s.scale, max);
                scale_row(&mut line[from..to], 1.0 / sum);
                line[..from].fill(0.0);
                line[to..].fill(0.0);
                // SAFETY: one task writes the statistics of this head and query.
                unsafe { view_mut::<f32>(lse.slice((((b * s.heads + head) * s.seq + t) * 4) as u64, 4), 1)[0] = max + sum.ln() };
            }
            o.resize(nq * d, 0.0);
            product(nq, d, nk, plain(scores, nk), plain(v, d), o, d, false);
            for (o, t) in o.chunks_exact(d).zip(queries) {
                let at = ((b * s.seq + t) * out_row + head * d) as u64 * size;
                // SAFETY: one task writes this head of this row.
                narrow(o, unsafe { view_mut::<T>(out.slice(at, d as u64 * size), d) });
            }
        },
    );
}

pub(crate) fn backward<T: Elem>(s: AttentionShape, dout: DevBuf, qkv: DevBuf, out: DevBuf, lse: DevBuf, dqkv: DevBuf) {
    let (d, row, size) = (s.head_dim, s.row(), size_of::<T>() as u64);
    let out_row = s.heads * d;
    // SAFETY: stream order.
    let (qkv, dout, out) =
        unsafe { (view::<T>(qkv, s.rows() * row), view::<T>(dout, s.rows() * out_row), view::<T>(out, s.rows() * out_row)) };
    // SAFETY: as above.
    let lse = unsafe { view::<f32>(lse, s.batch * s.heads * s.seq) };
    let masks = Masks::new(&s);
    let group = s.heads / s.kv_heads;
    (0..s.batch * s.kv_heads).into_par_iter().for_each_init(<[Vec<f32>; 10]>::default, |scratch, task| {
        let [q, k, v, scores, dp, go, o, dq, dk, dv] = scratch;
        let (b, kv) = (task / s.kv_heads, task % s.kv_heads);
        let base = b * s.seq;
        gather(qkv, row, base..base + s.seq, (s.heads + kv) * d, d, k);
        gather(qkv, row, base..base + s.seq, (s.heads + s.kv_heads + kv) * d, d, v);
        for buffer in [&mut *dk, &mut *dv] {
            buffer.clear();
            buffer.resize(s.seq * d, 0.0);
        }
        let put = |x: &[f32], t: usize, col: usize| {
            // SAFETY: this task alone writes these heads of this sequence.
            narrow(x, unsafe { view_mut::<T>(dqkv.slice(((base + t) * row + col) as u64 * size, d as u64 * size), d) });
        };
        for head in kv * group..(kv + 1) * group {
            for start in (0..s.seq).step_by(TILE) {
                let queries = start..(start + TILE).min(s.seq);
                let first = queries.clone().map(|t| masks.first(b, t)).min().unwrap_or(0);
                let keys = first..queries.end;
                let (nq, nk) = (queries.len(), keys.len());
                let rows = base + queries.start..base + queries.end;
                gather(qkv, row, rows.clone(), head * d, d, q);
                gather(dout, out_row, rows.clone(), head * d, d, go);
                gather(out, out_row, rows, head * d, d, o);
                scores.resize(nq * nk, 0.0);
                dp.resize(nq * nk, 0.0);
                product(nq, nk, d, plain(q, d), flipped(&k[first * d..], d), scores, nk, false);
                product(nq, nk, d, plain(go, d), flipped(&v[first * d..], d), dp, nk, false);
                let p_of = |scores: &mut [f32], i: usize, t: usize| {
                    let (from, to) = (masks.first(b, t) - first, t + 1 - first);
                    scores[..from].fill(0.0);
                    scores[to..].fill(0.0);
                    exp_row(&mut scores[from..to], s.scale, lse[(b * s.heads + head) * s.seq + t]);
                    debug_assert!(i < nq);
                };
                for (i, t) in queries.clone().enumerate() {
                    p_of(&mut scores[i * nk..(i + 1) * nk], i, t);
                }
                // dV += Pᵀ dO
                product(nk, d, nq, flipped(scores, nk), plain(go, d), &mut dv[first * d..], d, true);
                for i in 0..nq {
                    let delta = dot(&go[i * d..(i + 1) * d], &o[i * d..(i + 1) * d]);
                    score_gradient(&mut scores[i * nk..(i + 1) * nk], &dp[i * nk..(i + 1) * nk], delta, s.scale);
                }
                // dQ = dS K, dK += dSᵀ Q
                dq.resize(nq * d, 0.0);
                product(nq, d, nk, plain(scores, nk), plain(&k[first * d..], d), dq, d, false);
                product(nk, d, nq, flipped(scores, nk), plain(q, d), &mut dk[first * d..], d, true);
                for (x, t) in dq.chunks_exact(d).zip(queries) {
                    put(x, t, head * d);
                }
            }
        }
        for t in 0..s.seq {
            put(&dk[t * d..(t + 1) * d], t, (s.heads + kv) * d);
            put(&dv[t * d..(t + 1) * d], t, (s.heads + s.kv_heads + kv) * d);
        }
    });
}

pub(crate) fn cached<T: Elem>(s: CachedAttentionShape, qkv: DevBuf, keys: DevBuf, values: DevBuf, past: DevBuf, out: DevBuf) {
    let d = s.head_dim;
    let (row, cache_row, out_row) = ((s.heads + 2 * s.kv_heads) * d, s.kv_heads * d, s.heads * d);
    // SAFETY: stream order.
    let (qkv, past, out) =
        unsafe { (view::<T>(qkv, s.batch * s.new * row), view::<i32>(past, s.batch), view_mut::<T>(out, s.batch * s.new * out_row)) };
    // SAFETY: as above; keys and values are different buffers.
    let (keys, values) =
        unsafe { (view_mut::<T>(keys, s.batch * s.capacity * cache_row), view_mut::<T>(values, s.batch * s.capacity * cache_row)) };
    let cache_len = s.capacity * cache_row;
    keys.par_chunks_mut(cache_len).zip(values.par_chunks_mut(cache_len)).zip(out.par_chunks_mut(s.new * out_row)).enumerate().for_each(
        |(b, ((keys, values), out))| {
            let past = past[b].max(0) as usize;
            let group = s.heads / s.kv_heads;
            let (mut q, mut line, mut scores, mut sum) = (vec![0f32; d], vec![0f32; d], Vec::new(), vec![0f32; d]);
            for t in 0..s.new {
                let source = &qkv[(b * s.new + t) * row..][..row];
                let at = past + t;
                if at >= s.capacity {
                    return; // the caller's plan holds this from happening
                }
                keys[at * cache_row..][..cache_row].copy_from_slice(&source[s.heads * d..][..cache_row]);
                values[at * cache_row..][..cache_row].copy_from_slice(&source[s.heads * d + cache_row..][..cache_row]);
                let first = s.window.map_or(0, |w| (at + 1).saturating_sub(w));
                for head in 0..s.heads {
                    let kv = head / group;
                    widen(&source[head * d..][..d], &mut q);
                    scores.clear();
                    for j in first..=at {
                        widen(&keys[j * cache_row + kv * d..][..d], &mut line);
                        scores.push(dot(&q, &line));
                    }
                    let max = row_max(&scores) * s.scale;
                    let total = exp_row(&mut scores, s.scale, max);
                    sum.fill(0.0);
                    for (p, j) in scores.iter().zip(first..) {
                        widen(&values[j * cache_row + kv * d..][..d], &mut line);
                        axpy(*p / total, &line, &mut sum);
                    }
                    narrow(&sum, &mut out[t * out_row + head * d..][..d]);
                }
            }
        },
    );
}
