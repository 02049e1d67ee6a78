//! Between host and device: uploads, parameters in, gradients out.

use crate::device::{CudaDevice, STAGING_BYTES};
use crate::driver::{Pinned, cu};
use crate::kernels::{Launch, launch};
use ramtorch_device::{DevBuf, Dtype, EngineError, Stream, check_gradients, check_load, check_room, state_bytes};
use ramtorch_store::{GradientFormat, Store};
use std::ffi::c_void;
use std::sync::Arc;

/// A store's mapping, page-locked as a whole: a copy must not cross two registrations.
pub(crate) struct Registration {
    store: Arc<Store>,
}

impl Registration {
    pub(crate) fn new(store: &Arc<Store>) -> Result<Registration, EngineError> {
        let flags = cudarc::driver::sys::CU_MEMHOSTREGISTER_PORTABLE | cudarc::driver::sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        cu!(
            format!("cannot page-lock the {} bytes of segment {}", store.len(), store.name()),
            cuMemHostRegister_v2(store.base().cast::<c_void>(), store.len(), flags)
        )?;
        Ok(Registration { store: store.clone() })
    }

    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    pub(crate) fn holds(&self, store: &Arc<Store>) -> bool {
        self.store.base() == store.base()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _ = cu!("segment", cuMemHostUnregister(self.store.base().cast::<c_void>()));
    }
}

pub(crate) fn upload(d: &CudaDevice, stream: Stream, dst: DevBuf, data: &[u8]) -> Result<(), EngineError> {
    check_room(dst, data.len() as u64, "upload")?;
    d.ring.borrow_mut().upload(d.kernels.get("upload")?, d.stream(stream), dst.ptr, data)
}

pub(crate) fn download(d: &CudaDevice, stream: Stream, src: DevBuf, out: &mut [u8]) -> Result<(), EngineError> {
    check_room(src, out.len() as u64, "download")?;
    if !out.is_empty() {
        cu!("download", cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast::<c_void>(), src.ptr, out.len(), d.stream(stream).0))?;
    }
    // `out` is the caller's again only after this.
    d.stream(stream).synchronize("download")
}

pub(crate) fn read(d: &CudaDevice, stream: Stream, src: DevBuf, look: &mut dyn FnMut(&[u8])) -> Result<(), EngineError> {
    let bytes = src.bytes as usize;
    let mut room = d.readings.borrow_mut();
    let memory = match room.take().filter(|m| m.bytes >= bytes) {
        Some(memory) => room.insert(memory),
        None => room.insert(Pinned::new(bytes.max(1).next_power_of_two(), "reading")?),
    };
    if bytes > 0 {
        cu!("read", cuMemcpyDtoHAsync_v2(memory.ptr.cast::<c_void>(), src.ptr, bytes, d.stream(stream).0))?;
    }
    d.stream(stream).synchronize("read")?;
    // SAFETY: the memory has these bytes, they were written just now or when it was allocated, and nobody writes them while `room`
    // is borrowed. A slice is what spares the copy.
    look(unsafe { std::slice::from_raw_parts(memory.ptr, bytes) });
    Ok(())
}

/// Grid of kernels that share the GPU with the compute stream's: enough for the bus, no more.
fn conversion_grid(count: u64) -> Launch {
    Launch::new((count.div_ceil(256 * 8).clamp(1, 64) as u32, 1, 1), (256, 1))
}

pub(crate) fn load_parameters(
    d: &CudaDevice,
    stream: Stream,
    dst: DevBuf,
    store: &Arc<Store>,
    physical: u32,
    offset: u64,
    count: u64,
) -> Result<(), EngineError> {
    check_load(store, dst, offset, count, d.dtype.size(), "load of parameters")?;
    let pages = store.page_ptrs(physical);
    let s = d.stream(stream);
    // SAFETY: offset + count lies inside the page, in both of its arrays.
    let (hi, lo) = unsafe { (pages.hi.add(offset as usize), pages.lo.add(offset as usize)) };
    if d.dtype == Dtype::Bf16 {
        if count > 0 {
            cu!("weights", cuMemcpyHtoDAsync_v2(dst.ptr, hi.cast::<c_void>(), count as usize * 2, s.0))?;
        }
        return Ok(());
    }
    let staging = d.staging(stream)?;
    let function = d.kernels.get("join_master")?;
    let piece = STAGING_BYTES / 4; // parameters: both halves
    let mut done = 0u64;
    while done < count {
        let n = piece.min(count - done);
        let (hi_at, lo_at) = (staging, staging + 2 * piece);
        // SAFETY: as above.
        let (hi, lo) = unsafe { (hi.add(done as usize), lo.add(done as usize)) };
        cu!("weights", cuMemcpyHtoDAsync_v2(hi_at, hi.cast::<c_void>(), n as usize * 2, s.0))?;
        cu!("weights", cuMemcpyHtoDAsync_v2(lo_at, lo.cast::<c_void>(), n as usize * 2, s.0))?;
        let out = dst.ptr + done * 4;
        launch!(function, conversion_grid(n), s, "join_master"; hi_at, lo_at, out, n)?;
        done += n;
    }
    Ok(())
}

/// The state of parameters as it is in the store, for the updater.
pub(crate) fn load_state(
    d: &CudaDevice,
    stream: Stream,
    dst: DevBuf,
    store: &Arc<Store>,
    physical: u32,
    offset: u64,
    count: u64,
) -> Result<(), EngineError> {
    let spec = store.layout().spec();
    check_load(store, dst, offset, count, state_bytes(spec), "load of state")?;
    let moment = spec.moments.bytes();
    let pages = store.page_ptrs(physical);
    let s = d.stream(stream);
    let mut at = dst.ptr;
    for (array, size) in [(pages.hi.cast::<u8>(), 2), (pages.lo.cast::<u8>(), 2), (pages.m, moment), (pages.v, moment)] {
        if size * count > 0 {
            // SAFETY: offset + count lies inside the page, in each of its arrays.
            let source = unsafe { array.add((offset * size) as usize) };
            cu!("state", cuMemcpyHtoDAsync_v2(at, source.cast::<c_void>(), (count * size) as usize, s.0))?;
        }
        at += size * count;
    }
    Ok(())
}

/// Gradients in the store's format, in one copy.
pub(crate) fn store_packed_gradients(
    d: &CudaDevice,
    stream: Stream,
    src: DevBuf,
    store: &Arc<Store>,
    first: u64,
    count: u64,
) -> Result<(), EngineError> {
    let each = store.layout().spec().gradients.bytes();
    check_gradients(store, src, first, count, each)?;
    let bytes = count * each;
    if bytes == 0 {
        return Ok(());
    }
    let host = store.gradient_ptr(first).cast::<c_void>();
    cu!("gradients", cuMemcpyDtoHAsync_v2(host, src.ptr, bytes as usize, d.stream(stream).0))
}

pub(crate) fn store_gradients(
    d: &CudaDevice,
    stream: Stream,
    src: DevBuf,
    store: &Arc<Store>,
    first: u64,
    count: u64,
    accumulate: bool,
) -> Result<(), EngineError> {
    check_gradients(store, src, first, count, 4)?;
    let (size, kernel) = match store.layout().spec().gradients {
        GradientFormat::None => return Err(EngineError::internal("the store keeps no gradients")),
        GradientFormat::F32 => (4, "stage_gradient_f32"),
        GradientFormat::Bf16 => (2, "stage_gradient_bf16"),
    };
    let s = d.stream(stream);
    if count == 0 {
        return Ok(());
    }
    let host = store.gradient_ptr(first);
    if size == 4 && !accumulate {
        return cu!("gradients", cuMemcpyDtoHAsync_v2(host.cast::<c_void>(), src.ptr, count as usize * 4, s.0));
    }
    let staging = d.staging(stream)?;
    let piece = STAGING_BYTES / size;
    let mut done = 0u64;
    while done < count {
        let n = piece.min(count - done);
        // SAFETY: first + done + n lies inside the gradient array.
        let at = unsafe { host.add((done * size) as usize) }.cast::<c_void>();
        let (bytes, gradient, adding) = ((n * size) as usize, src.ptr + done * 4, accumulate as i32);
        if accumulate {
            cu!("gradients", cuMemcpyHtoDAsync_v2(staging, at, bytes, s.0))?;
        }
        let aligned = gradient.is_multiple_of(16) && n.is_multiple_of(8);
        let function = d.kernels.variant(kernel, aligned)?;
        launch!(function, conversion_grid(n), s, kernel; gradient, staging, n, adding)?;
        cu!("gradients", cuMemcpyDtoHAsync_v2(at, staging, bytes, s.0))?;
        done += n;
    }
    Ok(())
}
