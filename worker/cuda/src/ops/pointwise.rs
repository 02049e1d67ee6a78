//! Activations, gated units, rotary embedding, sums and conversions.

use super::{address, check, int};
use crate::device::CudaDevice;
use crate::kernels::launch;
use ramtorch_device::{ActivationKind, DevBuf, EngineError, RopeShape, Stream};

/// The kernels' number of an activation.
fn number(kind: ActivationKind) -> i32 {
    match kind {
        ActivationKind::Silu => 0,
        ActivationKind::GeluTanh => 1,
        ActivationKind::Gelu => 2,
        ActivationKind::Relu => 3,
        ActivationKind::Tanh => 4,
    }
}

pub(crate) fn glu_forward(d: &CudaDevice, act: ActivationKind, x: DevBuf, rows: usize, n: usize, h: DevBuf) -> Result<(), EngineError> {
    if rows * n == 0 {
        return Ok(());
    }
    check(&[(x, rows * 2 * n, d.size()), (h, rows * n, d.size())])?;
    let v = d.width(&[x, h], &[n]);
    let (kind, x, all, width, h) = (number(act), x.ptr, rows as u64, int(n)?, h.ptr);
    launch!(d.variant("glu_forward", v)?, d.spread(rows * n / v), d.stream(Stream::Compute), "glu_forward"; kind, x, all, width, h)
}

pub(crate) fn glu_backward(
    d: &CudaDevice,
    act: ActivationKind,
    dh: DevBuf,
    x: DevBuf,
    rows: usize,
    n: usize,
    dx: DevBuf,
) -> Result<(), EngineError> {
    if rows * n == 0 {
        return Ok(());
    }
    check(&[(x, rows * 2 * n, d.size()), (dx, rows * 2 * n, d.size()), (dh, rows * n, d.size())])?;
    let v = d.width(&[x, dh, dx], &[n]);
    let (kind, dh, x, all, width, dx) = (number(act), dh.ptr, x.ptr, rows as u64, int(n)?, dx.ptr);
    launch!(d.variant("glu_backward", v)?, d.spread(rows * n / v), d.stream(Stream::Compute), "glu_backward"; kind, dh, x, all, width, dx)
}

pub(crate) fn activation_forward(d: &CudaDevice, act: ActivationKind, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
    if count == 0 {
        return Ok(());
    }
    check(&[(x, count, d.size()), (y, count, d.size())])?;
    let v = d.width(&[x, y], &[count]);
    let (kind, x, n, y) = (number(act), x.ptr, count as u64, y.ptr);
    launch!(d.variant("activation_forward", v)?, d.spread(count / v), d.stream(Stream::Compute), "activation_forward"; kind, x, n, y)
}

pub(crate) fn activation_backward(
    d: &CudaDevice,
    act: ActivationKind,
    dy: DevBuf,
    x: DevBuf,
    count: usize,
    dx: DevBuf,
) -> Result<(), EngineError> {
    if count == 0 {
        return Ok(());
    }
    check(&[(x, count, d.size()), (dy, count, d.size()), (dx, count, d.size())])?;
    let v = d.width(&[x, dy, dx], &[count]);
    let (kind, dy, x, n, dx) = (number(act), dy.ptr, x.ptr, count as u64, dx.ptr);
    launch!(d.variant("activation_backward", v)?, d.spread(count / v), d.stream(Stream::Compute), "activation_backward"; kind, dy, x, n, dx)
}

/// `Rope` of rope.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rope {
    rows: u64,
    row_stride: u64,
    heads: i32,
    half: i32,
    seq: i32,
    sign: f32,
    positions: u64,
    table: u64,
}

pub(crate) fn rope(d: &CudaDevice, s: &RopeShape, x: DevBuf) -> Result<(), EngineError> {
    if s.rows == 0 || s.heads == 0 || s.head_dim < 2 {
        return Ok(());
    }
    let half = s.head_dim / 2;
    check(&[(x, (s.rows - 1) * s.row_stride + s.heads * s.head_dim, d.size()), (s.table, 2 * half, 4)])?;
    if let Some(p) = s.positions {
        check(&[(p, s.rows, 4)])?;
    }
    let v = d.width(&[x, s.table], &[half, s.row_stride]);
    let shape = Rope {
        rows: s.rows as u64,
        row_stride: s.row_stride as u64,
        heads: int(s.heads)?,
        half: int(half)?,
        seq: int(s.seq.max(1))?,
        sign: if s.inverse { -1.0 } else { 1.0 },
        positions: address(s.positions),
        table: s.table.ptr,
    };
    let x = x.ptr;
    launch!(d.variant("rope", v)?, d.spread(s.rows * s.heads * half / v), d.stream(Stream::Compute), "rope"; shape, x)
}

pub(crate) fn add(d: &CudaDevice, x: DevBuf, y: DevBuf, count: usize) -> Result<(), EngineError> {
    if count == 0 {
        return Ok(());
    }
    check(&[(x, count, d.size()), (y, count, d.size())])?;
    let v = d.width(&[x, y], &[count]);
    let (x, y, n) = (x.ptr, y.ptr, count as u64);
    launch!(d.variant("add_to", v)?, d.spread(count / v), d.stream(Stream::Compute), "add"; x, y, n)
}

pub(crate) fn to_f32(d: &CudaDevice, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
    if count == 0 {
        return Ok(());
    }
    check(&[(x, count, d.size()), (y, count, 4)])?;
    let v = d.width(&[x, y], &[count]);
    let (x, y, n) = (x.ptr, y.ptr, count as u64);
    launch!(d.variant("to_f32", v)?, d.spread(count / v), d.stream(Stream::Compute), "to_f32"; x, y, n)
}

pub(crate) fn from_f32(d: &CudaDevice, x: DevBuf, count: usize, y: DevBuf) -> Result<(), EngineError> {
    if count == 0 {
        return Ok(());
    }
    check(&[(x, count, 4), (y, count, d.size())])?;
    let v = d.width(&[x, y], &[count]);
    let (x, y, n) = (x.ptr, y.ptr, count as u64);
    launch!(d.variant("from_f32", v)?, d.spread(count / v), d.stream(Stream::Compute), "from_f32"; x, y, n)
}
