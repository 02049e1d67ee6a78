//! RMS and layer normalisation.

use super::{address, check, int, reduce_partials};
use crate::device::{CudaDevice, PARTIALS_BYTES};
use crate::kernels::{Launch, launch};
use ramtorch_device::{DevBuf, EngineError, NormKind, NormShape, Stream};

/// `Rows` of norm.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rows {
    vectors: u64,
    row_stride: u64,
    offset: u64,
    groups: i32,
    width: i32,
    eps: f32,
}

/// Dynamic shared memory that every GPU since compute capability 8.0 allows a block, less what kernels have of their own.
const SHARED_BYTES: usize = 96 << 10;

/// Elements that the operation reaches in the matrix, from its start.
fn elements(s: &NormShape) -> usize {
    if s.rows == 0 { 0 } else { (s.rows - 1) * s.row_stride + s.offset + s.groups * s.width }
}

fn rows(s: &NormShape) -> Result<Rows, EngineError> {
    Ok(Rows {
        vectors: (s.rows * s.groups) as u64,
        row_stride: s.row_stride as u64,
        offset: s.offset as u64,
        groups: int(s.groups)?,
        width: int(s.width)?,
        eps: s.eps,
    })
}

/// A warp for short vectors, 8 to a block; a block for long ones.
fn block(width: usize, v: usize) -> (u32, u32) {
    let units = width.div_ceil(v);
    if units <= 64 { (32, 8) } else { (units.next_multiple_of(32).min(1024) as u32, 1) }
}

/// Names of the kernels, forward and backward.
fn names(kind: NormKind) -> (&'static str, &'static str) {
    match kind {
        NormKind::Rms => ("rms_forward", "rms_backward"),
        NormKind::Layer => ("layer_forward", "layer_backward"),
    }
}

pub(crate) fn norm_forward(
    d: &CudaDevice,
    s: &NormShape,
    x: DevBuf,
    weight: DevBuf,
    bias: Option<DevBuf>,
    y: DevBuf,
    stats: DevBuf,
) -> Result<(), EngineError> {
    let n = elements(s);
    if n == 0 || s.width == 0 || s.groups == 0 {
        return Ok(());
    }
    check(&[
        (x, n, d.size()),
        (y, n, d.size()),
        (weight, s.width, d.size()),
        (stats, s.stats_len(), 4),
        (bias.unwrap_or(weight), s.width, d.size()),
    ])?;
    let v = d.width(&[x, y, weight, bias.unwrap_or(weight)], &[s.width, s.row_stride, s.offset]);
    let f = d.variant(names(s.kind).0, v)?;
    let (shape, threads) = (rows(s)?, block(s.width, v));
    let l = Launch::new((shape.vectors.div_ceil(threads.1 as u64) as u32, 1, 1), threads);
    let (x, weight, bias, y, stats) = (x.ptr, weight.ptr, address(bias), y.ptr, stats.ptr);
    launch!(f, l, d.stream(Stream::Compute), "norm_forward"; shape, x, weight, bias, y, stats)
}

/// Buffers of [`ramtorch_device::Device::norm_backward`].
pub(crate) struct NormBackward {
    pub(crate) dy: DevBuf,
    pub(crate) x: DevBuf,
    pub(crate) weight: DevBuf,
    pub(crate) stats: DevBuf,
    pub(crate) add: Option<DevBuf>,
    pub(crate) dx: DevBuf,
    pub(crate) dweight: DevBuf,
    pub(crate) dbias: Option<DevBuf>,
}

pub(crate) fn norm_backward(d: &CudaDevice, s: &NormShape, b: &NormBackward) -> Result<(), EngineError> {
    let n = elements(s);
    if n == 0 || s.width == 0 || s.groups == 0 {
        return Ok(());
    }
    let size = d.size();
    let add = b.add.unwrap_or(b.dx);
    check(&[(b.dy, n, size), (b.x, n, size), (add, n, size), (b.dx, n, size), (b.weight, s.width, size)])?;
    check(&[(b.stats, s.stats_len(), 4), (b.dweight, s.width, 4), (b.dbias.unwrap_or(b.dweight), s.width, 4)])?;
    let v = d.width(&[b.dy, b.x, b.weight, add, b.dx], &[s.width, s.row_stride, s.offset]);
    let f = d.variant(names(s.kind).1, v)?;
    let (shape, threads) = (rows(s)?, block(s.width, v));
    let sums = if s.kind == NormKind::Layer { 2 } else { 1 };
    let shared = threads.1 as usize * sums * s.width * 4;
    let in_shared = shared <= SHARED_BYTES;
    if !in_shared && threads.1 > 1 {
        return Err(EngineError::internal("short vectors always fit in shared memory"));
    }
    let room = PARTIALS_BYTES as usize / 4 / (sums * s.width);
    let blocks = (shape.vectors.div_ceil(threads.1 as u64) as usize).min(d.info.multiprocessors as usize * 3).min(room);
    if blocks == 0 {
        return Err(EngineError::internal(format!("normalised vectors of {} elements are too long", s.width)));
    }
    let dynamic = if in_shared { shared as u32 } else { 0 };
    if dynamic > 47 << 10 {
        f.allow_shared(SHARED_BYTES as u32)?;
    }
    let l = Launch { grid: (blocks as u32, 1, 1), block: threads, shared: dynamic };
    let (dy, x, weight, stats, add, dx) = (b.dy.ptr, b.x.ptr, b.weight.ptr, b.stats.ptr, address(b.add), b.dx.ptr);
    let (partial, flag) = (d.partials.ptr, in_shared as i32);
    launch!(f, l, d.stream(Stream::Compute), "norm_backward"; shape, dy, x, weight, stats, add, dx, partial, flag)?;
    reduce_partials(d, 0, blocks, sums * s.width, s.width, b.dweight)?;
    match b.dbias.filter(|_| s.kind == NormKind::Layer) {
        Some(dbias) => reduce_partials(d, s.width, blocks, sums * s.width, s.width, dbias),
        None => Ok(()),
    }
}
