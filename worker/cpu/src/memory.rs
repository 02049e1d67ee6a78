//! Device memory of the CPU device, and typed views of it.

use ramtorch_device::{DevBuf, EngineError, ErrorKind};
use std::alloc::{Layout, alloc_zeroed, dealloc};

/// Allocations of one device, freed together when the device goes.
pub(crate) struct Arena {
    blocks: Vec<(*mut u8, Layout)>,
    budget: u64,
    used: u64,
}

// SAFETY: the pointers are owned allocations; the arena only frees them, and only in Drop.
unsafe impl Send for Arena {}

impl Arena {
    pub(crate) fn new(budget: u64) -> Self {
        Arena { blocks: Vec::new(), budget, used: 0 }
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// Zeroed memory, page-aligned. The budget counts sizes rounded up to 256 bytes.
    pub(crate) fn alloc(&mut self, bytes: u64, device: &str, what: &str) -> Result<DevBuf, EngineError> {
        let rounded = bytes.max(1).next_multiple_of(256);
        let full = || {
            EngineError::new(
                ErrorKind::Resources,
                format!(
                    "{device}: {what} needs {rounded} bytes, {} of {} are left; give the device more memory or use a smaller micro-batch",
                    self.budget - self.used,
                    self.budget
                ),
            )
        };
        if rounded > self.budget - self.used {
            return Err(full());
        }
        let layout = Layout::from_size_align(rounded as usize, 4096).map_err(|_| full())?;
        // SAFETY: the layout has a size of at least 256.
        let p = unsafe { alloc_zeroed(layout) };
        if p.is_null() {
            return Err(full());
        }
        self.blocks.push((p, layout));
        self.used += rounded;
        Ok(DevBuf { ptr: p as u64, bytes: rounded })
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for (p, layout) in self.blocks.drain(..) {
            // SAFETY: allocated by `alloc` with this layout, freed once; the streams have ended before (field order
            // of CpuDevice).
            unsafe { dealloc(p, layout) };
        }
    }
}

/// `len` elements of `buf`, to read.
///
/// # Safety
/// `buf` comes from a live arena, and no other stream writes this range until the caller is done: what the engine's
/// events order.
pub(crate) unsafe fn view<'a, T>(buf: DevBuf, len: usize) -> &'a [T] {
    check::<T>(buf, len);
    // SAFETY: in bounds and aligned (checked), initialised (zeroed at allocation), not written meanwhile (caller).
    unsafe { std::slice::from_raw_parts(buf.ptr as *const T, len) }
}

/// `len` elements of `buf`, to write.
///
/// # Safety
/// As [`view`], and nobody else reads or writes the range meanwhile.
pub(crate) unsafe fn view_mut<'a, T>(buf: DevBuf, len: usize) -> &'a mut [T] {
    check::<T>(buf, len);
    // SAFETY: as `view`, and exclusive (caller).
    unsafe { std::slice::from_raw_parts_mut(buf.ptr as *mut T, len) }
}

fn check<T>(buf: DevBuf, len: usize) {
    let need = len.checked_mul(size_of::<T>()).expect("length overflows");
    assert!(need as u64 <= buf.bytes, "an operation wants {need} bytes of a buffer of {}", buf.bytes);
    assert!(buf.ptr.is_multiple_of(align_of::<T>() as u64), "misaligned device buffer");
}

/// Element of an activation: arithmetic is f32, storage is f32 or bf16.
pub(crate) trait Elem: Copy + Send + Sync + 'static {
    fn get(self) -> f32;
    fn put(x: f32) -> Self;
}

impl Elem for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
    #[inline(always)]
    fn put(x: f32) -> f32 {
        x
    }
}

/// bfloat16 by its bits.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Bf16(pub u16);

impl Elem for Bf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
    /// Nearest, ties to even; NaN stays NaN.
    #[inline(always)]
    fn put(x: f32) -> Bf16 {
        let b = x.to_bits();
        let rounded = (b.wrapping_add(0x7fff + ((b >> 16) & 1)) >> 16) as u16;
        Bf16(if x.is_nan() { (b >> 16) as u16 | 0x40 } else { rounded })
    }
}
