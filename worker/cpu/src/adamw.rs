//! AdamW on a page of the store, in one pass, and sums of squares.
//!
//! ```text
//!   hi lo m v g ──► registers ──► a tile in L1 ──► hi' lo' m' v'    (the spare page, past the caches)
//! ```
//! A spare page is written whole and not read again soon, so its cache lines need not be read first: the results of a
//! tile leave with non-temporal stores, which makes 26 bytes of memory traffic a parameter of what would be 38 (fp32
//! moments, bf16 gradients). The arithmetic is one body compiled for each instruction set, without fused operations:
//! all of them give the same bits, which are those that `ramtorch_device` defines.

use crate::simd::{Level, leveled, simd};
use ramtorch_device::{AdamwStep, DecayRun, EngineError, random_bits, random_key, stochastic};
use ramtorch_store::{Gradients, MomentsMut, MomentsRef, PageMut, PageView, split};
use rayon::prelude::*;

/// Parameters a task updates; small enough that all threads end a page together.
const CHUNK: usize = 1 << 14;
/// Parameters of a tile.
const TILE: usize = 512;
/// Pages from this many parameters on are too large for the caches to be of use to their next reader.
const STREAMED_PARAMETERS: usize = 1 << 17;

/// How a gradient is stored.
trait Gradient: Copy + Sync {
    fn widen(self) -> f32;
}

impl Gradient for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Gradient for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
}

/// How moments are stored.
trait Moment: Gradient + Send {
    /// The new moments of parameters `first` on, ready to be stored; `room` is theirs to use.
    fn narrow<'t>(level: Level, new: [&'t [f32]; 2], room: [&'t mut [u16]; 2], step: u64, first: u64) -> [&'t [Self]; 2];
}

impl Moment for f32 {
    #[inline(always)]
    fn narrow<'t>(_: Level, new: [&'t [f32]; 2], _: [&'t mut [u16]; 2], _: u64, _: u64) -> [&'t [f32]; 2] {
        new
    }
}

impl Moment for u16 {
    #[inline(always)]
    fn narrow<'t>(level: Level, [m, v]: [&'t [f32]; 2], [to_m, to_v]: [&'t mut [u16]; 2], step: u64, first: u64) -> [&'t [u16]; 2] {
        let (to_m, to_v) = (&mut to_m[..m.len()], &mut to_v[..v.len()]);
        // Random bits go by the lower half of a parameter's number; the upper half may change on the way.
        let same = ((1u64 << 32) - (first & 0xffff_ffff)).min(m.len() as u64) as usize;
        for part in [0..same, same..m.len()].into_iter().filter(|part| !part.is_empty()) {
            let begin = first + part.start as u64;
            let (m, v) = (&m[part.clone()], &v[part.clone()]);
            round(level, m, v, &mut to_m[part.clone()], &mut to_v[part], random_key(step, begin), begin as u32);
        }
        [to_m, to_v]
    }
}

/// Formats of a page.
trait Formats {
    type Moment: Moment;
    type Gradient: Gradient;
}

impl<M: Moment, G: Gradient> Formats for (M, G) {
    type Moment = M;
    type Gradient = G;
}

/// New state of some parameters, on its way.
#[repr(C, align(64))]
struct Tile {
    hi: [u16; TILE],
    lo: [u16; TILE],
    m: [f32; TILE],
    v: [f32; TILE],
    room: [[u16; TILE]; 2],
}

leveled! {
    /// New values of a run of parameters that all decay by `keep`; all slices have one length.
    fn update<F: Formats>(
        k: &AdamwStep,
        keep: f32,
        g: &[F::Gradient],
        hi: &[u16],
        lo: &[u16],
        m: &[F::Moment],
        v: &[F::Moment],
        new_hi: &mut [u16],
        new_lo: &mut [u16],
        new_m: &mut [f32],
        new_v: &mut [f32],
    ) {
        let n = g.len();
        let (hi, lo, m, v) = (&hi[..n], &lo[..n], &m[..n], &v[..n]);
        let (new_hi, new_lo, new_m, new_v) = (&mut new_hi[..n], &mut new_lo[..n], &mut new_m[..n], &mut new_v[..n]);
        for i in 0..n {
            let g = g[i].widen() * k.gradient_scale;
            let m = k.beta1 * m[i].widen() + k.one_minus_beta1 * g;
            let v = k.beta2 * v[i].widen() + k.one_minus_beta2 * g * g;
            let p = split::join(hi[i], lo[i]) * keep - k.step_size * (m / (v.sqrt() * k.root_scale + k.eps));
            (new_hi[i], new_lo[i]) = split::split(p);
            new_m[i] = m;
            new_v[i] = v;
        }
    }

    /// Both moments of parameters whose numbers end with `first` and so on.
    fn round(m: &[f32], v: &[f32], to_m: &mut [u16], to_v: &mut [u16], key: u32, first: u32) {
        let n = m.len();
        let (v, to_m, to_v) = (&v[..n], &mut to_m[..n], &mut to_v[..n]);
        for i in 0..n {
            let random = random_bits(key, first.wrapping_add(i as u32));
            to_m[i] = stochastic(m[i], random as u16);
            to_v[i] = stochastic(v[i], (random >> 16) as u16);
        }
    }
}

simd! {
    fn squares(x: &[f32]) -> f64 {
        let mut lanes = [0f64; 8];
        let n = x.len() / 8 * 8;
        for c in x[..n].chunks_exact(8) {
            for (l, v) in lanes.iter_mut().zip(c) { *l += *v as f64 * *v as f64; }
        }
        let mut sum = 0f64;
        for v in &x[n..] { sum += *v as f64 * *v as f64; }
        for l in lanes { sum += l; }
        sum
    }
    fn squares_bf16(x: &[u16]) -> f64 {
        // Four accumulators of the widest registers: additions in f64 have some cycles of latency each.
        let mut lanes = [0f64; 32];
        let n = x.len() / 32 * 32;
        for c in x[..n].chunks_exact(32) {
            for (l, v) in lanes.iter_mut().zip(c) {
                let v = v.widen() as f64;
                *l += v * v;
            }
        }
        let mut sum = 0f64;
        for v in &x[n..] {
            let v = v.widen() as f64;
            sum += v * v;
        }
        for l in lanes { sum += l; }
        sum
    }
}

/// Σ x², in f64.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    squares(x)
}

/// Σ x² of bf16 values, in f64.
pub fn sum_of_squares_bf16(x: &[u16]) -> f64 {
    squares_bf16(x)
}

/// Copies `src` to `dst`; with `streamed` past the caches, where it is aligned. Streamed stores are ordered with later
/// ones only by a fence: see [`fence`].
fn store<T: Copy>(level: Level, streamed: bool, src: &[T], dst: &mut [T]) {
    let dst = &mut dst[..src.len()];
    #[cfg(target_arch = "x86_64")]
    if streamed {
        let size = size_of::<T>();
        // Whole cache lines go past the caches, what is before and behind them through them.
        let head = (dst.as_ptr().align_offset(64)).min(src.len());
        let lines = (src.len() - head) * size / 64;
        let body = lines * 64 / size;
        dst[..head].copy_from_slice(&src[..head]);
        dst[head + body..].copy_from_slice(&src[head + body..]);
        // SAFETY: `lines` cache lines from `head` on lie inside both slices, which do not overlap; the destination is
        // aligned to one (or `lines` is 0); T is plain data (f32, u16); the level's features are there.
        unsafe { stream_lines(level, src.as_ptr().add(head).cast(), dst.as_mut_ptr().add(head).cast(), lines) };
        return;
    }
    let _ = (level, streamed);
    dst.copy_from_slice(src);
}

/// # Safety
/// 64 · `lines` bytes can be read at `src` and written at `dst`, which is a multiple of 64.
#[cfg(target_arch = "x86_64")]
unsafe fn stream_lines(level: Level, src: *const u8, dst: *mut u8, lines: usize) {
    use std::arch::x86_64::*;
    /// # Safety
    /// As `stream_lines`.
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512(src: *const u8, dst: *mut u8, lines: usize) {
        for i in 0..lines {
            // SAFETY: inside both ranges (caller); aligned to 64.
            unsafe { _mm512_stream_si512(dst.add(i * 64).cast(), _mm512_loadu_si512(src.add(i * 64).cast())) };
        }
    }
    /// # Safety
    /// As `stream_lines`.
    #[target_feature(enable = "avx2")]
    unsafe fn avx2(src: *const u8, dst: *mut u8, lines: usize) {
        for i in 0..lines * 2 {
            // SAFETY: inside both ranges (caller); aligned to 32.
            unsafe { _mm256_stream_si256(dst.add(i * 32).cast(), _mm256_loadu_si256(src.add(i * 32).cast())) };
        }
    }
    match level.number() {
        // SAFETY: a level exists only where its features do; the rest is the caller's.
        2 => unsafe { avx512(src, dst, lines) },
        // SAFETY: as above.
        1 => unsafe { avx2(src, dst, lines) },
        _ => {
            for i in 0..lines * 4 {
                // SAFETY: inside both ranges (caller); aligned to 16. SSE2 is part of x86-64.
                unsafe { _mm_stream_si128(dst.add(i * 16).cast(), _mm_loadu_si128(src.add(i * 16).cast())) };
            }
        }
    }
}

/// Streamed stores of this thread come before whatever it stores later.
fn fence() {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: SSE is part of x86-64.
        #[allow(unused_unsafe)]
        unsafe {
            std::arch::x86_64::_mm_sfence()
        };
    }
}

/// Asks for the cache lines of `x`.
#[inline(always)]
fn prefetch<T>(x: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(x)).step_by(64) {
        // SAFETY: a hint about an address inside the slice; SSE is part of x86-64.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(x.as_ptr().cast::<i8>().add(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// State of some parameters of a page.
struct Old<'a, F: Formats> {
    g: &'a [F::Gradient],
    hi: &'a [u16],
    lo: &'a [u16],
    m: &'a [F::Moment],
    v: &'a [F::Moment],
}

/// Their next state.
struct New<'a, F: Formats> {
    hi: &'a mut [u16],
    lo: &'a mut [u16],
    m: &'a mut [F::Moment],
    v: &'a mut [F::Moment],
}

/// Parameters from `first` on, tile by tile.
fn chunk<F: Formats>(level: Level, streamed: bool, k: &AdamwStep, runs: &[DecayRun], first: u64, old: &Old<F>, new: New<F>) {
    let mut tile = Tile { hi: [0; TILE], lo: [0; TILE], m: [0.0; TILE], v: [0.0; TILE], room: [[0; TILE]; 2] };
    let count = old.g.len();
    for at in (0..count).step_by(TILE) {
        let n = TILE.min(count - at);
        let start = first + at as u64;
        // Five streams are more than hardware follows well from one 4 KiB page to the next.
        let ahead = (at + TILE).min(count)..(at + 2 * TILE).min(count);
        prefetch(&old.hi[ahead.clone()]);
        prefetch(&old.lo[ahead.clone()]);
        prefetch(&old.m[ahead.clone()]);
        prefetch(&old.v[ahead.clone()]);
        prefetch(&old.g[ahead]);
        for run in DecayRun::within(runs, start..start + n as u64) {
            // Where the run lies in the tile, and in the chunk.
            let (a, b) = ((run.first - start) as usize, (run.end - start) as usize);
            let r = at + a..at + b;
            update::<F>(
                level,
                k,
                if run.decay { k.keep } else { 1.0 },
                &old.g[r.clone()],
                &old.hi[r.clone()],
                &old.lo[r.clone()],
                &old.m[r.clone()],
                &old.v[r],
                &mut tile.hi[a..b],
                &mut tile.lo[a..b],
                &mut tile.m[a..b],
                &mut tile.v[a..b],
            );
        }
        let r = at..at + n;
        store(level, streamed, &tile.hi[..n], &mut new.hi[r.clone()]);
        store(level, streamed, &tile.lo[..n], &mut new.lo[r.clone()]);
        let [to_m, to_v] = &mut tile.room;
        let [m, v] = F::Moment::narrow(level, [&tile.m[..n], &tile.v[..n]], [to_m, to_v], k.step, start);
        store(level, streamed, m, &mut new.m[r.clone()]);
        store(level, streamed, v, &mut new.v[r]);
    }
    if streamed {
        fence();
    }
}

fn page<F: Formats>(level: Level, streamed: bool, k: &AdamwStep, runs: &[DecayRun], start: u64, old: Old<F>, new: New<F>) {
    let state = old.hi.par_chunks(CHUNK).zip(old.lo.par_chunks(CHUNK)).zip(old.m.par_chunks(CHUNK).zip(old.v.par_chunks(CHUNK)));
    let next =
        (new.hi.par_chunks_mut(CHUNK).zip(new.lo.par_chunks_mut(CHUNK))).zip(new.m.par_chunks_mut(CHUNK).zip(new.v.par_chunks_mut(CHUNK)));
    old.g.par_chunks(CHUNK).zip(state.zip(next)).enumerate().for_each(
        |(c, (g, (((hi, lo), (m, v)), ((new_hi, new_lo), (new_m, new_v)))))| {
            let old = Old::<F> { g, hi, lo, m, v };
            let new = New::<F> { hi: new_hi, lo: new_lo, m: new_m, v: new_v };
            chunk(level, streamed, k, runs, start + (c * CHUNK) as u64, &old, new);
        },
    );
}

/// Brings one page from its old state to the state of step `k.step`, on all threads of the current pool. `runs` cover
/// the page.
///
/// # Errors
/// Formats without moments or gradients, or different ones before and after; arrays of different lengths.
pub fn adamw_page(
    k: &AdamwStep,
    runs: &[DecayRun],
    old: PageView<'_>,
    new: PageMut<'_>,
    gradients: Gradients<'_>,
) -> Result<(), EngineError> {
    let streamed = old.hi.len() >= STREAMED_PARAMETERS;
    adamw_page_at(Level::best(), streamed, k, runs, old, new, gradients)
}

/// As [`adamw_page`] with a given instruction set, and `streamed` stores or ordinary ones: for tests and measurements.
/// The results are the same.
///
/// # Errors
/// As [`adamw_page`].
pub fn adamw_page_at(
    level: Level,
    streamed: bool,
    k: &AdamwStep,
    runs: &[DecayRun],
    old: PageView<'_>,
    new: PageMut<'_>,
    gradients: Gradients<'_>,
) -> Result<(), EngineError> {
    let (start, n) = (old.params.start, old.hi.len());
    let covered = match (runs.first(), runs.last()) {
        (Some(a), Some(b)) => a.first <= start && b.end >= start + n as u64,
        _ => n == 0,
    };
    if !covered || [old.lo.len(), new.hi.len(), new.lo.len()] != [n; 3] {
        return Err(EngineError::internal("a page's arrays have different lengths, or its runs do not cover it"));
    }
    macro_rules! formats {
        ($($moment:ident $gradient:ident: $m:ty, $g:ty;)*) => {
            match (old.m, old.v, new.m, new.v, gradients) {
                $((MomentsRef::$moment(m), MomentsRef::$moment(v), MomentsMut::$moment(new_m), MomentsMut::$moment(new_v), Gradients::$gradient(g)) => {
                    if [m.len(), v.len(), new_m.len(), new_v.len(), g.len()] != [n; 5] {
                        return Err(EngineError::internal("a page's arrays have different lengths"));
                    }
                    let old = Old::<($m, $g)> { g, hi: old.hi, lo: old.lo, m, v };
                    page(level, streamed, k, runs, start, old, New { hi: new.hi, lo: new.lo, m: new_m, v: new_v })
                })*
                _ => return Err(EngineError::internal("a store without moments or gradients cannot be trained")),
            }
        };
    }
    formats! {
        F32 F32: f32, f32;
        F32 Bf16: f32, u16;
        Bf16 F32: u16, f32;
        Bf16 Bf16: u16, u16;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
