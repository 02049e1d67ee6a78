//! Losses, with their gradients in place.

use super::{check, int};
use crate::device::CudaDevice;
use crate::kernels::{Launch, launch};
use ramtorch_device::{DevBuf, EngineError, LossOut, Stream};

/// A block a row: threads for rows of `n` elements.
fn row_blocks(rows: usize, n: usize, v: usize) -> Launch {
    Launch::new((rows as u32, 1, 1), (n.div_ceil(v).next_multiple_of(32).min(1024) as u32, 1))
}

pub(crate) fn cross_entropy(
    d: &CudaDevice,
    logits: DevBuf,
    rows: usize,
    classes: usize,
    targets: DevBuf,
    weights: DevBuf,
    out: &LossOut,
) -> Result<(), EngineError> {
    if rows * classes == 0 {
        return Ok(());
    }
    check(&[(logits, rows * classes, d.size()), (targets, rows, 4), (weights, rows, 4), (out.losses, rows, 4)])?;
    let l = row_blocks(rows, classes, (16 / d.size()) as usize);
    let (logits, n, targets, weights, losses) = (logits.ptr, int(classes)?, targets.ptr, weights.ptr, out.losses.ptr);
    let (write, scale) = (out.gradient_scale.is_some() as i32, out.gradient_scale.unwrap_or(0.0));
    launch!(d.kernels.get("cross_entropy")?, l, d.stream(Stream::Compute), "cross_entropy"; logits, n, targets, weights, losses, write, scale)
}

pub(crate) fn squared_error(
    d: &CudaDevice,
    x: DevBuf,
    rows: usize,
    n: usize,
    targets: DevBuf,
    weights: DevBuf,
    out: &LossOut,
) -> Result<(), EngineError> {
    if rows * n == 0 {
        return Ok(());
    }
    check(&[(x, rows * n, d.size()), (targets, rows * n, 4), (weights, rows, 4), (out.losses, rows, 4)])?;
    let l = row_blocks(rows, n, 1);
    let (x, width, targets, weights, losses) = (x.ptr, int(n)?, targets.ptr, weights.ptr, out.losses.ptr);
    let (write, scale) = (out.gradient_scale.is_some() as i32, out.gradient_scale.unwrap_or(0.0));
    launch!(d.kernels.get("squared_error")?, l, d.stream(Stream::Compute), "squared_error"; x, width, targets, weights, losses, write, scale)
}
