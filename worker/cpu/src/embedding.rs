//! Token and position embeddings.

use crate::memory::{Elem, view, view_mut};
use ramtorch_device::{DevBuf, TokenIndex};
use rayon::prelude::*;

pub(crate) fn forward<T: Elem>(
    t: TokenIndex,
    table: DevBuf,
    width: usize,
    position_table: Option<DevBuf>,
    seq: usize,
    positions: Option<DevBuf>,
    x: DevBuf,
) {
    let all = |b: DevBuf| b.bytes as usize / size_of::<T>();
    // SAFETY: stream order.
    let (ids, table, x) = unsafe { (view::<i32>(t.ids, t.rows), view::<T>(table, all(table)), view_mut::<T>(x, t.rows * width)) };
    // SAFETY: as above.
    let position_table = position_table.map(|p| unsafe { view::<T>(p, all(p)) });
    // SAFETY: as above.
    let positions = positions.map(|p| unsafe { view::<i32>(p, t.rows) });
    x.par_chunks_mut(width).enumerate().for_each(|(r, x)| {
        x.copy_from_slice(&table[ids[r] as usize * width..][..width]);
        if let Some(p) = position_table {
            let at = positions.map_or(r % seq, |p| p[r] as usize);
            for (x, p) in x.iter_mut().zip(&p[at * width..][..width]) {
                *x = T::put(x.get() + p.get());
            }
        }
    });
}

pub(crate) fn backward<T: Elem>(t: TokenIndex, dx: DevBuf, width: usize, dtable: DevBuf, dpositions: Option<DevBuf>, seq: usize) {
    // SAFETY: stream order.
    let (ids, order, bounds, dx) = unsafe {
        (view::<i32>(t.ids, t.rows), view::<i32>(t.order, t.rows), view::<i32>(t.bounds, t.unique + 1), view::<T>(dx, t.rows * width))
    };
    (0..t.unique).into_par_iter().for_each(|u| {
        let rows = &order[bounds[u] as usize..bounds[u + 1] as usize];
        let id = ids[rows[0] as usize] as u64;
        // SAFETY: each id belongs to one task; in bounds (slice).
        let out = unsafe { view_mut::<f32>(dtable.slice(id * width as u64 * 4, width as u64 * 4), width) };
        for r in rows {
            out.iter_mut().zip(&dx[*r as usize * width..][..width]).for_each(|(o, d)| *o += d.get());
        }
    });
    if let Some(d) = dpositions {
        // SAFETY: as above; each position belongs to one task.
        let d = unsafe { view_mut::<f32>(d, seq.min(t.rows) * width) };
        d.par_chunks_mut(width).enumerate().for_each(|(p, out)| {
            for r in (p..t.rows).step_by(seq) {
                out.iter_mut().zip(&dx[r * width..][..width]).for_each(|(o, d)| *o += d.get());
            }
        });
    }
}
