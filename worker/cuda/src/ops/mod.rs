//! The operations that are kernels of this crate, and matrix products.
//!
//! Each function checks that the buffers hold what the shapes say, picks the kernel for 16-byte accesses (`_v`) where
//! addresses and lengths allow it and the one for single elements (`_s`) where not, and enqueues it on the compute
//! stream.

mod loss;
mod norm;
mod pointwise;
mod tables;

pub(crate) use loss::{cross_entropy, squared_error};
pub(crate) use norm::{NormBackward, norm_backward, norm_forward};
pub(crate) use pointwise::{activation_backward, activation_forward, add, from_f32, glu_backward, glu_forward, rope, to_f32};
pub(crate) use tables::{embedding_backward, embedding_forward, gather_rows};

use crate::device::{CudaDevice, PARTIALS_BYTES};
use crate::driver::Function;
use crate::kernels::{Launch, launch};
use ramtorch_device::{DevBuf, Dtype, EngineError, Gemm, Stream};

/// A buffer, the elements it must hold, and their size in bytes.
pub(crate) type Need = (DevBuf, usize, u64);

/// Checks that buffers hold what an operation will touch.
pub(crate) fn check(needs: &[Need]) -> Result<(), EngineError> {
    for (buf, elements, size) in needs {
        let bytes = (*elements as u64).checked_mul(*size);
        if bytes.is_none_or(|b| b > buf.bytes) {
            return Err(EngineError::internal(format!("{elements} elements of {size} bytes for a buffer of {}", buf.bytes)));
        }
        if !buf.ptr.is_multiple_of(*size) {
            return Err(EngineError::internal(format!("an address that is no multiple of {size}")));
        }
    }
    Ok(())
}

/// An `int` parameter of a kernel.
pub(crate) fn int(n: usize) -> Result<i32, EngineError> {
    i32::try_from(n).map_err(|_| EngineError::internal(format!("{n} is too large for a CUDA kernel")))
}

/// Address or null.
pub(crate) fn address(b: Option<DevBuf>) -> u64 {
    b.map_or(0, |b| b.ptr)
}

impl CudaDevice {
    /// Bytes of an element in the compute format.
    pub(crate) fn size(&self) -> u64 {
        self.dtype.size()
    }

    /// Elements that one thread moves: 16 bytes' worth where all addresses are aligned and all lengths multiples, else 1.
    pub(crate) fn width(&self, buffers: &[DevBuf], lengths: &[usize]) -> usize {
        let v = (16 / self.size()) as usize;
        let fits = buffers.iter().all(|b| b.ptr.is_multiple_of(16)) && lengths.iter().all(|l| l.is_multiple_of(v));
        if fits { v } else { 1 }
    }

    /// The variant of a kernel for `width` elements a thread.
    pub(crate) fn variant(&self, name: &str, width: usize) -> Result<Function, EngineError> {
        self.kernels.variant(name, width > 1)
    }

    /// Blocks of 256 threads that walk over `items`: enough to fill the GPU.
    pub(crate) fn spread(&self, items: usize) -> Launch {
        Launch::new((items.div_ceil(256).clamp(1, self.info.multiprocessors as usize * 16) as u32, 1, 1), (256, 1))
    }
}

pub(crate) fn gemm(d: &CudaDevice, g: &Gemm) -> Result<(), EngineError> {
    if g.m == 0 || g.n == 0 {
        return Ok(());
    }
    if g.accumulate && g.add.is_some() {
        return Err(EngineError::internal("a product cannot both accumulate and add a matrix"));
    }
    let size = d.size();
    let mut needs = vec![(g.a, g.m * g.k, size), (g.b, g.k * g.n, size), (g.d, g.m * g.n, g.d_dtype.size())];
    needs.extend(g.add.map(|b| (b, g.m * g.n, size)));
    needs.extend(g.bias.map(|b| (b, g.n, size)));
    check(&needs)?;
    let stream = d.stream(Stream::Compute);
    let mut rest = d.products.borrow_mut().run(g, stream, &d.workspace)?;
    let f32_result = g.d_dtype != d.dtype;
    let ending = if f32_result { "f32" } else { "real" };
    if rest.product {
        // Added to in place where the matrix to add is D itself.
        let in_place = g.add.is_some_and(|a| a.ptr == g.d.ptr);
        rest.add &= !in_place;
        let f = d.kernels.get(&format!("gemm_{ending}"))?;
        let (a, b, out, m, n, k) = (g.a.ptr, g.b.ptr, g.d.ptr, int(g.m)?, int(g.n)?, int(g.k)?);
        let (ta, tb, accumulate) = (g.transpose_a as i32, g.transpose_b as i32, (g.accumulate || in_place) as i32);
        let l = Launch::new((g.n.div_ceil(64) as u32, g.m.div_ceil(64) as u32, 1), (256, 1));
        launch!(f, l, stream, "gemm"; a, b, out, m, n, k, ta, tb, accumulate)?;
    }
    if rest.add || rest.bias {
        let f = d.kernels.get(&format!("finish_gemm_{ending}"))?;
        let (out, rows, n) = (g.d.ptr, g.m as u64, int(g.n)?);
        let (add, bias) = (address(g.add.filter(|_| rest.add)), address(g.bias.filter(|_| rest.bias)));
        launch!(f, d.spread(g.m * g.n), stream, "finish_gemm"; out, add, bias, rows, n)?;
    }
    Ok(())
}

pub(crate) fn column_sum(d: &CudaDevice, x: DevBuf, rows: usize, n: usize, out: DevBuf) -> Result<(), EngineError> {
    if rows == 0 || n == 0 {
        return Ok(());
    }
    check(&[(x, rows * n, d.size()), (out, n, 4)])?;
    let v = d.width(&[x], &[n]);
    let columns = n.div_ceil(32 * v);
    let room = PARTIALS_BYTES as usize / 4 / n;
    if room == 0 {
        return Err(EngineError::internal(format!("{n} columns to sum are too many")));
    }
    let wanted = (d.info.multiprocessors as usize * 6).div_ceil(columns);
    let rows_a_chunk = rows.div_ceil(wanted.clamp(1, room.min(65535))).max(32);
    let chunks = rows.div_ceil(rows_a_chunk);
    let (address, all, per_chunk, width, partial) = (x.ptr, rows as u64, rows_a_chunk as u64, int(n)?, d.partials.ptr);
    let f = d.variant("column_partial", v)?;
    let l = Launch::new((columns as u32, chunks as u32, 1), (32, 8));
    launch!(f, l, d.stream(Stream::Compute), "column_sum"; address, all, per_chunk, width, partial)?;
    reduce_partials(d, 0, chunks, n, n, out)
}

/// In two stages, the first of as many blocks whatever the GPU: the order of additions depends on `count` alone.
pub(crate) fn sum_of_squares(d: &CudaDevice, x: DevBuf, dtype: Dtype, count: usize, out: DevBuf) -> Result<(), EngineError> {
    check(&[(x, count, dtype.size()), (out, 1, 8)])?;
    const BLOCKS: u64 = 1024;
    let (name, vector) = if dtype == Dtype::Bf16 { ("squares_bf16", 8) } else { ("squares_f32", 4) };
    let wide = x.ptr.is_multiple_of(16) && count.is_multiple_of(vector);
    let blocks = (count.div_ceil(256 * vector) as u64).clamp(1, BLOCKS);
    let (address, n, partial, sum) = (x.ptr, count as u64, d.partials.ptr, out.ptr);
    let f = d.kernels.variant(name, wide)?;
    let s = d.stream(Stream::Compute);
    launch!(f, Launch::new((blocks as u32, 1, 1), (256, 1)), s, "sum_of_squares"; address, n, partial)?;
    let f = d.kernels.get("sum_f64")?;
    let parts = int(blocks as usize)?;
    launch!(f, Launch::new((1, 1, 1), (256, 1)), s, "sum_of_squares"; partial, parts, sum)
}

/// `out[n] += Σ_parts partials[first + part · stride + n]`.
pub(crate) fn reduce_partials(d: &CudaDevice, first: usize, parts: usize, stride: usize, n: usize, out: DevBuf) -> Result<(), EngineError> {
    let f = d.kernels.get("reduce_partials")?;
    let (partial, parts, stride, width, out) = (d.partials.ptr + first as u64 * 4, int(parts)?, stride as u64, int(n)?, out.ptr);
    let l = Launch::new((n.div_ceil(32) as u32, 1, 1), (32, 8));
    launch!(f, l, d.stream(Stream::Compute), "reduce_partials"; partial, parts, stride, width, out)
}
