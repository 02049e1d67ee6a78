//! Pages as slices: what an update reads and writes.

use crate::spec::{GradientFormat, MomentFormat};
use crate::store::Store;
use std::ops::Range;

/// Where the four arrays of a physical page begin.
///
/// Each has as many elements as a page has parameters. The pointers are good for as long as the [`Store`] they came
/// from. The page that an entry points at may be read by anyone and written by no one; a reader that needs a consistent
/// copy looks at the entry again afterwards. A spare may be written by whoever holds its [`Update`](crate::Update).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagePtrs {
    /// Weights in bf16.
    pub hi: *mut u16,
    /// Low sixteen bits of the fp32 master.
    pub lo: *mut u16,
    /// First moments, in the store's format; null without moments.
    pub m: *mut u8,
    /// Second moments; null without moments.
    pub v: *mut u8,
}

// SAFETY: four addresses. Using them is unsafe wherever it happens.
unsafe impl Send for PagePtrs {}
// SAFETY: as above.
unsafe impl Sync for PagePtrs {}

/// Moments of a page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MomentsRef<'a> {
    /// The store keeps none.
    None,
    /// In fp32.
    F32(&'a [f32]),
    /// In bf16.
    Bf16(&'a [u16]),
}

/// Moments of a page, to be written.
#[derive(Debug, PartialEq)]
pub enum MomentsMut<'a> {
    /// The store keeps none.
    None,
    /// In fp32.
    F32(&'a mut [f32]),
    /// In bf16.
    Bf16(&'a mut [u16]),
}

/// Gradients of a page, reduced over all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gradients<'a> {
    /// The store has no room for them.
    None,
    /// In fp32.
    F32(&'a [f32]),
    /// In bf16.
    Bf16(&'a [u16]),
}

/// The place of a page's gradients, to be written.
#[derive(Debug, PartialEq)]
pub enum GradientsMut<'a> {
    /// The store has no room for them.
    None,
    /// In fp32.
    F32(&'a mut [f32]),
    /// In bf16.
    Bf16(&'a mut [u16]),
}

/// The state of a page. All arrays have the length of `params`.
#[derive(Debug, Clone, PartialEq)]
pub struct PageView<'a> {
    /// Parameters it holds, padding included.
    pub params: Range<u64>,
    /// Weights in bf16.
    pub hi: &'a [u16],
    /// Low sixteen bits of the fp32 master.
    pub lo: &'a [u16],
    /// First moments.
    pub m: MomentsRef<'a>,
    /// Second moments.
    pub v: MomentsRef<'a>,
}

/// The next state of a page, to be written whole. All arrays have the length of `params`.
#[derive(Debug, PartialEq)]
pub struct PageMut<'a> {
    /// Parameters it holds, padding included. Padding must be written as zeros.
    pub params: Range<u64>,
    /// Weights in bf16.
    pub hi: &'a mut [u16],
    /// Low sixteen bits of the fp32 master.
    pub lo: &'a mut [u16],
    /// First moments.
    pub m: MomentsMut<'a>,
    /// Second moments.
    pub v: MomentsMut<'a>,
}

impl PageMut<'_> {
    pub(crate) fn clear(&mut self) {
        self.hi.fill(0);
        self.lo.fill(0);
        for moments in [&mut self.m, &mut self.v] {
            match moments {
                MomentsMut::None => {}
                MomentsMut::F32(x) => x.fill(0.0),
                MomentsMut::Bf16(x) => x.fill(0),
            }
        }
    }
}

/// # Safety
/// `physical` must be a live page that nobody writes for as long as `'a`.
pub(crate) unsafe fn page_view<'a>(store: &'a Store, physical: u32, params: Range<u64>) -> PageView<'a> {
    let n = (params.end - params.start) as usize;
    let at = store.page_ptrs(physical);
    // SAFETY: each array has room for a whole page, and n is at most that (`params` is a page's range); alignment is
    // that of 2048-byte units in a page-aligned mapping; every bit pattern is valid; nobody writes (caller).
    unsafe {
        let moments = |p: *mut u8| match store.layout().spec().moments {
            MomentFormat::None => MomentsRef::None,
            MomentFormat::F32 => MomentsRef::F32(std::slice::from_raw_parts(p.cast(), n)),
            MomentFormat::Bf16 => MomentsRef::Bf16(std::slice::from_raw_parts(p.cast(), n)),
        };
        let (hi, lo) = (std::slice::from_raw_parts(at.hi, n), std::slice::from_raw_parts(at.lo, n));
        PageView { params, hi, lo, m: moments(at.m), v: moments(at.v) }
    }
}

/// # Safety
/// `physical` must be a spare that the caller alone writes, and reads, for as long as `'a`; the mapping is writable.
/// (A reader that was overtaken may still copy from it, word by word with atomic loads; it throws the copy away.)
pub(crate) unsafe fn page_mut<'a>(store: &'a Store, physical: u32, params: Range<u64>) -> PageMut<'a> {
    let n = (params.end - params.start) as usize;
    let at = store.page_ptrs(physical);
    // SAFETY: as for `page_view`; the four arrays do not overlap, and no other reference to them exists (caller).
    unsafe {
        let moments = |p: *mut u8| match store.layout().spec().moments {
            MomentFormat::None => MomentsMut::None,
            MomentFormat::F32 => MomentsMut::F32(std::slice::from_raw_parts_mut(p.cast(), n)),
            MomentFormat::Bf16 => MomentsMut::Bf16(std::slice::from_raw_parts_mut(p.cast(), n)),
        };
        let (hi, lo) = (std::slice::from_raw_parts_mut(at.hi, n), std::slice::from_raw_parts_mut(at.lo, n));
        PageMut { params, hi, lo, m: moments(at.m), v: moments(at.v) }
    }
}

/// Gradients of a page's parameters, at `step`.
///
/// # Safety
/// Nobody writes these gradients for as long as `'a`.
pub(crate) unsafe fn gradients<'a>(store: &'a Store, params: Range<u64>, step: u64) -> Gradients<'a> {
    let n = (params.end - params.start) as usize;
    let at = store.gradient_ptr(store.layout().gradient_at(params.start, step));
    // SAFETY: `params` is a page's range, whose gradients lie in one piece of the array, as pages have a log whole or not at all;
    // it is page-aligned and the place a multiple of 64; every bit pattern is valid; nobody writes (caller).
    unsafe {
        match store.layout().spec().gradients {
            GradientFormat::None => Gradients::None,
            GradientFormat::F32 => Gradients::F32(std::slice::from_raw_parts(at.cast(), n)),
            GradientFormat::Bf16 => Gradients::Bf16(std::slice::from_raw_parts(at.cast(), n)),
        }
    }
}

/// Gradients of a page's parameters, at `step`, to be written.
///
/// # Safety
/// Nobody else reads or writes these gradients for as long as `'a`; the mapping is writable.
pub(crate) unsafe fn gradients_mut<'a>(store: &'a Store, params: Range<u64>, step: u64) -> GradientsMut<'a> {
    let n = (params.end - params.start) as usize;
    let at = store.gradient_ptr(store.layout().gradient_at(params.start, step));
    // SAFETY: as for `gradients`; no other reference to them exists (caller).
    unsafe {
        match store.layout().spec().gradients {
            GradientFormat::None => GradientsMut::None,
            GradientFormat::F32 => GradientsMut::F32(std::slice::from_raw_parts_mut(at.cast(), n)),
            GradientFormat::Bf16 => GradientsMut::Bf16(std::slice::from_raw_parts_mut(at.cast(), n)),
        }
    }
}
