//! Matrix products, by the `gemm` crate.

use crate::memory::{Bf16, Elem, view, view_mut};
use ramtorch_device::{Dtype, Gemm};
use rayon::prelude::*;

/// Elements of an f32 panel into which bf16 operands are widened.
const PANEL: usize = 1 << 20;

/// Parts of a product for each thread: with more than one, threads that other work holds up are helped by the others.
const TASKS_PER_THREAD: usize = 4;

/// One operand or result: f32 values with strides in elements.
#[derive(Clone, Copy)]
struct Matrix {
    p: *const f32,
    rs: isize,
    cs: isize,
}

/// d[m,n] (+)= a[m,k] b[k,n].
fn product(m: usize, n: usize, k: usize, d: *mut f32, d_rs: isize, accumulate: bool, a: Matrix, b: Matrix) {
    let threads = rayon::current_num_threads();
    let par =
        if threads == 1 || (m * n * k) < 1 << 15 { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(threads * TASKS_PER_THREAD) };
    // SAFETY: the callers made the views with checked bounds: a covers m×k, b k×n and d m×n elements under these
    // strides; d overlaps neither operand.
    unsafe { gemm::gemm(m, n, k, d, 1, d_rs, accumulate, a.p, a.cs, a.rs, b.p, b.cs, b.rs, 1.0f32, 1.0f32, false, false, false, par) }
}

/// Runs `g` with operands in `dtype`.
pub(crate) fn run(g: &Gemm, dtype: Dtype) {
    if g.m == 0 || g.n == 0 {
        return;
    }
    match dtype {
        Dtype::F32 => run_f32(g),
        Dtype::Bf16 => run_bf16(g),
    }
}

fn strides(transposed: bool, rows: usize, cols: usize) -> (isize, isize) {
    if transposed { (1, rows as isize) } else { (cols as isize, 1) }
}

fn run_f32(g: &Gemm) {
    let (m, n, k) = (g.m, g.n, g.k);
    // SAFETY: stream order (see memory::view); d is not an operand.
    let (a, b, d) = unsafe { (view::<f32>(g.a, m * k), view::<f32>(g.b, k * n), view_mut::<f32>(g.d, m * n)) };
    // SAFETY: as above.
    let add = g.add.map(|x| unsafe { view::<f32>(x, m * n) });
    // SAFETY: as above.
    let bias = g.bias.map(|x| unsafe { view::<f32>(x, n) });
    let preset = add.is_some() || bias.is_some();
    if preset {
        d.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
            match add {
                Some(add) => row.copy_from_slice(&add[i * n..(i + 1) * n]),
                None => row.fill(0.0),
            }
            if let Some(bias) = bias {
                row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
            }
        });
    }
    let (a_rs, a_cs) = strides(g.transpose_a, m, k);
    let (b_rs, b_cs) = strides(g.transpose_b, k, n);
    product(
        m,
        n,
        k,
        d.as_mut_ptr(),
        n as isize,
        g.accumulate || preset,
        Matrix { p: a.as_ptr(), rs: a_rs, cs: a_cs },
        Matrix { p: b.as_ptr(), rs: b_rs, cs: b_cs },
    );
}

/// Widened copy of rows `r` and columns `c` of row-major `x` with `cols` columns.
fn widen(x: &[Bf16], cols: usize, r: std::ops::Range<usize>, c: std::ops::Range<usize>, out: &mut Vec<f32>) {
    let width = c.len();
    out.resize(r.len() * width, 0.0);
    out.par_chunks_mut(width.max(1)).zip(r.into_par_iter()).for_each(|(line, i)| {
        line.iter_mut().zip(&x[i * cols..][c.clone()]).for_each(|(o, v)| *o = v.get());
    });
}

fn run_bf16(g: &Gemm) {
    let (m, n, k) = (g.m, g.n, g.k);
    // SAFETY: stream order (see memory::view).
    let (a, b) = unsafe { (view::<Bf16>(g.a, m * k), view::<Bf16>(g.b, k * n)) };
    // SAFETY: as above.
    let add = g.add.map(|x| unsafe { view::<Bf16>(x, m * n) });
    // SAFETY: as above.
    let bias = g.bias.map(|x| unsafe { view::<Bf16>(x, n) });
    let step_n = (PANEL / k.max(1)).clamp(1, n);
    let step_m = (PANEL / k.max(step_n)).clamp(1, m);
    let (mut wa, mut wb, mut out) = (Vec::new(), Vec::new(), Vec::new());
    for n0 in (0..n).step_by(step_n) {
        let cols = n0..(n0 + step_n).min(n);
        // B panel [k, cols], kept as [cols, k] when stored that way round.
        if g.transpose_b {
            widen(b, k, cols.clone(), 0..k, &mut wb);
        } else {
            widen(b, n, 0..k, cols.clone(), &mut wb);
        }
        let (b_rs, b_cs) = strides(g.transpose_b, k, cols.len());
        for m0 in (0..m).step_by(step_m) {
            let rows = m0..(m0 + step_m).min(m);
            if g.transpose_a {
                widen(a, m, 0..k, rows.clone(), &mut wa);
            } else {
                widen(a, k, rows.clone(), 0..k, &mut wa);
            }
            let (a_rs, a_cs) = strides(g.transpose_a, rows.len(), k);
            let (ma, mb) = (Matrix { p: wa.as_ptr(), rs: a_rs, cs: a_cs }, Matrix { p: wb.as_ptr(), rs: b_rs, cs: b_cs });
            out.clear();
            out.resize(rows.len() * cols.len(), 0.0f32);
            product(rows.len(), cols.len(), k, out.as_mut_ptr(), cols.len() as isize, false, ma, mb);
            let width = cols.len();
            let d = g.d;
            out.par_chunks(width).zip(rows.into_par_iter()).for_each(|(line, i)| {
                let at = (i * n + cols.start) as u64;
                match g.d_dtype {
                    Dtype::F32 => {
                        // SAFETY: each row part is written by one task; in bounds (slice).
                        let dst = unsafe { view_mut::<f32>(d.slice(at * 4, width as u64 * 4), width) };
                        for (o, v) in dst.iter_mut().zip(line) {
                            *o = if g.accumulate { *o + v } else { *v };
                        }
                    }
                    Dtype::Bf16 => {
                        // SAFETY: as above.
                        let dst = unsafe { view_mut::<Bf16>(d.slice(at * 2, width as u64 * 2), width) };
                        for (j, (o, v)) in dst.iter_mut().zip(line).enumerate() {
                            let mut y = *v;
                            if let Some(add) = add {
                                y += add[at as usize + j].get();
                            }
                            if let Some(bias) = bias {
                                y += bias[cols.start + j].get();
                            }
                            if g.accumulate {
                                y += o.get();
                            }
                            *o = Bf16::put(y);
                        }
                    }
                }
            });
        }
    }
}
