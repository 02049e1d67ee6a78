//! Reading values out of a store that others may be changing.

use crate::error::StoreError;
use crate::spec::MomentFormat;
use crate::split::join_slice;
use crate::store::Store;
use std::sync::atomic::{AtomicU64, Ordering};

/// Copies of one page that are thrown away, because it was updated meanwhile, before the reader gives up.
const ATTEMPTS: u32 = 256;
const CHUNK: usize = 1024;

/// Which of a parameter's numbers to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// The exact fp32 master weight.
    Weight,
    /// Adam's first moment.
    Moment1,
    /// Adam's second moment.
    Moment2,
}

impl Store {
    /// Copies out parameters from `start` on, as many as `out` holds, padding included. Returns the least step of the
    /// pages read (0 if `out` is empty): each page is wholly at one step, different pages may be at different ones.
    ///
    /// # Errors
    /// Parameters outside the index space, moments of a store without, a page that was never written, a damaged page
    /// table, or a page that was updated faster than it could be copied.
    pub fn read(&self, start: u64, part: Part, out: &mut [f32]) -> Result<u64, StoreError> {
        let mut least = None;
        self.read_pages(start, part, out, |_, step| {
            least = Some(least.map_or(step, |least: u64| least.min(step)));
            Ok(())
        })?;
        Ok(least.unwrap_or(0))
    }

    /// As [`Store::read`], every page at `step`.
    ///
    /// # Errors
    /// As [`Store::read`], and [`StoreError::Step`] for a page at another step.
    pub fn read_at_step(&self, start: u64, part: Part, step: u64, out: &mut [f32]) -> Result<(), StoreError> {
        self.read_pages(
            start,
            part,
            out,
            |page, found| if found == step { Ok(()) } else { Err(StoreError::Step { page, found, wanted: step }) },
        )
    }

    fn read_pages(
        &self,
        start: u64,
        part: Part,
        out: &mut [f32],
        mut seen: impl FnMut(u32, u64) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let layout = self.layout();
        let span = layout.span();
        let end = start.checked_add(out.len() as u64).filter(|end| *end <= span);
        let end = end.ok_or(StoreError::Parameters { start, end: start.saturating_add(out.len() as u64), span })?;
        if part != Part::Weight && layout.spec().moments == MomentFormat::None {
            return Err(StoreError::NoMoments);
        }
        let mut rest = out;
        for page in layout.pages_of(start..end) {
            let range = layout.page_range(page);
            let (from, to) = (start.max(range.start), end.min(range.end));
            let (here, behind) = std::mem::take(&mut rest).split_at_mut((to - from) as usize);
            rest = behind;
            let first = (from - range.start) as usize;
            let entry = self.table().read_page(self.mapping(), page, ATTEMPTS, |physical| self.copy(physical, part, first, here));
            seen(page, entry.map_err(|e| self.refusal(e, None))?.step)?;
        }
        Ok(())
    }

    /// Copies from a physical page, word by word with atomic loads: an owner may be writing it.
    fn copy(&self, physical: u32, part: Part, first: usize, out: &mut [f32]) {
        let n = self.layout().page_parameters() as usize;
        let page = self.page_offset(physical) as usize / 8;
        let narrow = |words_before: usize| self.mapping().words(page + words_before, n / 4);
        match part {
            Part::Weight => {
                let (hi_words, lo_words) = (narrow(0), narrow(n / 4));
                let (mut hi, mut lo) = ([0; CHUNK], [0; CHUNK]);
                for (i, out) in out.chunks_mut(CHUNK).enumerate() {
                    let (hi, lo) = (&mut hi[..out.len()], &mut lo[..out.len()]);
                    copy_u16(hi_words, first + i * CHUNK, hi);
                    copy_u16(lo_words, first + i * CHUNK, lo);
                    join_slice(hi, lo, out);
                }
            }
            Part::Moment1 | Part::Moment2 => {
                let second = usize::from(part == Part::Moment2);
                match self.layout().spec().moments {
                    MomentFormat::None => {} // refused by the caller
                    MomentFormat::F32 => copy_f32(self.mapping().words(page + n / 2 + second * n / 2, n / 2), first, out),
                    MomentFormat::Bf16 => {
                        let words = narrow(n / 2 + second * n / 4);
                        let mut bits = [0; CHUNK];
                        for (i, out) in out.chunks_mut(CHUNK).enumerate() {
                            let bits = &mut bits[..out.len()];
                            copy_u16(words, first + i * CHUNK, bits);
                            out.iter_mut().zip(bits).for_each(|(x, bits)| *x = f32::from_bits(u32::from(*bits) << 16));
                        }
                    }
                }
            }
        }
    }
}

/// Copies 16-bit elements from number `first` on.
fn copy_u16(words: &[AtomicU64], first: usize, out: &mut [u16]) {
    let one = |i: usize| (words[i / 4].load(Ordering::Relaxed) >> (i % 4 * 16)) as u16;
    let head = out.len().min((4 - first % 4) % 4);
    let (head, body) = out.split_at_mut(head);
    head.iter_mut().enumerate().for_each(|(i, x)| *x = one(first + i));
    let first = first + head.len();
    let (body, tail) = body.split_at_mut(body.len() / 4 * 4);
    for (quad, word) in body.chunks_exact_mut(4).zip(&words[first / 4..]) {
        let word = word.load(Ordering::Relaxed);
        quad.iter_mut().enumerate().for_each(|(i, x)| *x = (word >> (i * 16)) as u16);
    }
    let first = first + body.len();
    tail.iter_mut().enumerate().for_each(|(i, x)| *x = one(first + i));
}

/// Copies 32-bit floats from number `first` on.
fn copy_f32(words: &[AtomicU64], first: usize, out: &mut [f32]) {
    let one = |i: usize| f32::from_bits((words[i / 2].load(Ordering::Relaxed) >> (i % 2 * 32)) as u32);
    let head = out.len().min(first % 2);
    let (head, body) = out.split_at_mut(head);
    head.iter_mut().for_each(|x| *x = one(first));
    let first = first + head.len();
    let (body, tail) = body.split_at_mut(body.len() / 2 * 2);
    for (pair, word) in body.chunks_exact_mut(2).zip(&words[first / 2..]) {
        let word = word.load(Ordering::Relaxed);
        (pair[0], pair[1]) = (f32::from_bits(word as u32), f32::from_bits((word >> 32) as u32));
    }
    let first = first + body.len();
    tail.iter_mut().for_each(|x| *x = one(first));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_right_at_every_offset_and_length() {
        let narrow: Vec<AtomicU64> = (0..8u64).map(|w| AtomicU64::new((0..4).map(|i| (w * 4 + i + 100) << (i * 16)).sum())).collect();
        let bits = |i: u64| u64::from((i as f32 + 0.5).to_bits());
        let wide: Vec<AtomicU64> = (0..16).map(|w| AtomicU64::new(bits(w * 2) | bits(w * 2 + 1) << 32)).collect();
        for first in 0..32 {
            for len in 0..=32 - first {
                let (mut a, mut b) = (vec![0; len], vec![0.0; len]);
                copy_u16(&narrow, first, &mut a);
                copy_f32(&wide, first, &mut b);
                assert!(a.iter().enumerate().all(|(i, x)| usize::from(*x) == first + i + 100), "{first} {len}: {a:?}");
                assert!(b.iter().enumerate().all(|(i, x)| *x == (first + i) as f32 + 0.5), "{first} {len}: {b:?}");
            }
        }
    }
}
