//! Rows of tables: embeddings and gathers.

use super::{address, check, int};
use crate::device::CudaDevice;
use crate::kernels::{Launch, launch};
use ramtorch_device::{DevBuf, EngineError, Stream, TokenIndex};

/// Threads that walk over a row of `width` elements, `v` at a time.
fn threads(width: usize, v: usize) -> u32 {
    width.div_ceil(v).next_multiple_of(32).min(256) as u32
}

pub(crate) fn embedding_forward(
    d: &CudaDevice,
    t: &TokenIndex,
    table: DevBuf,
    width: usize,
    position_table: Option<DevBuf>,
    seq: usize,
    positions: Option<DevBuf>,
    x: DevBuf,
) -> Result<(), EngineError> {
    if t.rows == 0 || width == 0 {
        return Ok(());
    }
    check(&[(t.ids, t.rows, 4), (x, t.rows * width, d.size()), (table, width, d.size())])?;
    let v = d.width(&[table, x, position_table.unwrap_or(x)], &[width]);
    let f = d.variant("embedding_forward", v)?;
    let l = Launch::new((t.rows as u32, 1, 1), (threads(width, v), 1));
    let (ids, table, n, places, seq, positions, x) =
        (t.ids.ptr, table.ptr, int(width)?, address(position_table), int(seq.max(1))?, address(positions), x.ptr);
    launch!(f, l, d.stream(Stream::Compute), "embedding_forward"; ids, table, n, places, seq, positions, x)
}

pub(crate) fn embedding_backward(
    d: &CudaDevice,
    t: &TokenIndex,
    dx: DevBuf,
    width: usize,
    dtable: DevBuf,
    dpositions: Option<DevBuf>,
    seq: usize,
) -> Result<(), EngineError> {
    if t.rows == 0 || width == 0 {
        return Ok(());
    }
    check(&[(t.ids, t.rows, 4), (t.order, t.rows, 4), (t.bounds, t.unique + 1, 4), (dx, t.rows * width, d.size()), (dtable, width, 4)])?;
    let v = d.width(&[dx, dtable, dpositions.unwrap_or(dtable)], &[width]);
    let block = threads(width, v);
    let stream = d.stream(Stream::Compute);
    let (dx, n) = (dx.ptr, int(width)?);
    if t.unique > 0 {
        let f = d.variant("embedding_backward", v)?;
        let l = Launch::new((t.unique as u32, width.div_ceil(v * block as usize) as u32, 1), (block, 1));
        let (ids, order, bounds, dtable) = (t.ids.ptr, t.order.ptr, t.bounds.ptr, dtable.ptr);
        launch!(f, l, stream, "embedding_backward"; ids, order, bounds, dx, n, dtable)?;
    }
    let Some(dpositions) = dpositions else {
        return Ok(());
    };
    let seq = seq.max(1);
    let places = seq.min(t.rows);
    check(&[(dpositions, places * width, 4)])?;
    let f = d.variant("position_backward", v)?;
    let l = Launch::new((places as u32, 1, 1), (block, 1));
    let (rows, seq, dpositions) = (t.rows as u64, int(seq)?, dpositions.ptr);
    launch!(f, l, stream, "embedding_backward"; dx, rows, n, seq, dpositions)
}

pub(crate) fn gather_rows(d: &CudaDevice, x: DevBuf, width: usize, rows: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
    if count == 0 || width == 0 {
        return Ok(());
    }
    check(&[(rows, count, 4), (y, count * width, d.size()), (x, width, d.size())])?;
    let v = d.width(&[x, y], &[width]);
    let l = Launch::new((count as u32, 1, 1), (threads(width, v), 1));
    let (x, n, rows, y) = (x.ptr, int(width)?, rows.ptr, y.ptr);
    launch!(d.variant("gather_rows", v)?, l, d.stream(Stream::Compute), "gather_rows"; x, n, rows, y)
}
