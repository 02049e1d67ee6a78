//! Weights from the store into a slot, gradients from the device into the store.

use crate::memory::{Bf16, Elem, view, view_mut};
use crate::simd::simd;
use ramtorch_device::{DevBuf, Dtype, state_bytes};
use ramtorch_store::{GradientFormat, Store, split};
use std::sync::Arc;

simd! {
    fn join(hi: &[u16], lo: &[u16], out: &mut [f32]) {
        for ((o, h), l) in out.iter_mut().zip(hi).zip(lo) {
            *o = split::join(*h, *l);
        }
    }
    fn put_bf16(x: &[f32], out: &mut [Bf16]) {
        for (o, x) in out.iter_mut().zip(x) { *o = Bf16::put(*x); }
    }
    fn add_bf16(x: &[f32], out: &mut [Bf16]) {
        for (o, x) in out.iter_mut().zip(x) { *o = Bf16::put(o.get() + x); }
    }
    fn add_scratch(x: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) { *o += x; }
    }
}

pub(crate) fn load(dst: DevBuf, dtype: Dtype, store: &Arc<Store>, physical: u32, offset: u64, count: u64) {
    let pages = store.page_ptrs(physical);
    let n = count as usize;
    // SAFETY: the caller checked that offset + count lies in the page. The page is published and its owner does not
    // write it until every rank has passed the step's reduction (the store's protocol), which comes after this load.
    let (hi, lo) = unsafe {
        (std::slice::from_raw_parts(pages.hi.add(offset as usize), n), std::slice::from_raw_parts(pages.lo.add(offset as usize), n))
    };
    match dtype {
        // SAFETY: stream order.
        Dtype::F32 => join(hi, lo, unsafe { view_mut::<f32>(dst, n) }),
        // SAFETY: as above.
        Dtype::Bf16 => unsafe { view_mut::<u16>(dst, n) }.copy_from_slice(hi),
    }
}

/// Both halves of the master and both moments, one array behind the other.
pub(crate) fn load_state(dst: DevBuf, store: &Arc<Store>, physical: u32, offset: u64, count: u64) {
    let pages = store.page_ptrs(physical);
    let spec = store.layout().spec();
    let (n, at, moment) = (count as usize, offset as usize, spec.moments.bytes() as usize);
    // SAFETY: stream order; `dst` is as long as the four arrays (checked by the caller).
    let mut out = unsafe { view_mut::<u8>(dst, n * state_bytes(spec) as usize) };
    for (array, size) in [(pages.hi.cast::<u8>(), 2), (pages.lo.cast::<u8>(), 2), (pages.m, moment), (pages.v, moment)] {
        if size == 0 {
            continue; // no moments: no such array
        }
        let (part, rest) = out.split_at_mut(n * size);
        // SAFETY: as in `load`, for each array.
        part.copy_from_slice(unsafe { std::slice::from_raw_parts(array.add(at * size), n * size) });
        out = rest;
    }
}

/// Writes or adds `grads` to the store's gradient array from place `at` on. The caller owns that range for the
/// time of the call.
pub(crate) fn put_gradients(grads: &[f32], store: &Arc<Store>, at: u64, accumulate: bool) {
    let p = store.gradient_ptr(at);
    match store.layout().spec().gradients {
        GradientFormat::None => {}
        GradientFormat::F32 => {
            // SAFETY: the range was checked by the caller and is this rank's own (one writer a parameter).
            let out = unsafe { std::slice::from_raw_parts_mut(p.cast::<f32>(), grads.len()) };
            if accumulate { add_scratch(grads, out) } else { out.copy_from_slice(grads) }
        }
        GradientFormat::Bf16 => {
            // SAFETY: as above.
            let out = unsafe { std::slice::from_raw_parts_mut(p.cast::<Bf16>(), grads.len()) };
            if accumulate { add_bf16(grads, out) } else { put_bf16(grads, out) }
        }
    }
}

pub(crate) fn store_gradients(src: DevBuf, store: &Arc<Store>, at: u64, count: u64, accumulate: bool) {
    // SAFETY: stream order.
    put_gradients(unsafe { view::<f32>(src, count as usize) }, store, at, accumulate);
}

/// Copies gradients that are in the store's format. `at..at + count` lies in the store's array, the bytes in `src`.
pub(crate) fn store_packed_gradients(src: DevBuf, store: &Arc<Store>, at: u64, count: u64) {
    let bytes = (count * store.layout().spec().gradients.bytes()) as usize;
    // SAFETY: stream order; the range is this rank's own (one writer a parameter) and as long as the source.
    unsafe { std::slice::from_raw_parts_mut(store.gradient_ptr(at), bytes) }.copy_from_slice(unsafe { view::<u8>(src, bytes) });
}
