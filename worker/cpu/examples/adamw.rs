//! How fast this machine updates pages: AdamW for each instruction set and number of threads, beside its memory.
//!
//! `cargo run --release -p ramtorch-cpu --example adamw -- [--gib N] [--threads A,B,…]`
//!
//! Prints Gparam/s and GB/s of memory traffic (what the update must move: it reads weights, remainders, moments and
//! gradients once and writes all but the gradients once), and the share of the copy bandwidth of the same threads that
//! this is. All levels must give the same bits; the program fails where they do not.

use ramtorch_cpu::{Level, adamw_page_at, sum_of_squares_bf16};
use ramtorch_device::{AdamwStep, DecayRun};
use ramtorch_store::{Gradients, MomentsMut, MomentsRef, PageMut, PageView};
use rayon::prelude::*;
use std::process::ExitCode;
use std::time::Instant;

/// Parameters of a page, as in a store of a large model.
const PAGE: usize = 16 << 20;
const REPEATS: usize = 5;

struct State {
    hi: Vec<u16>,
    lo: Vec<u16>,
    m: Vec<f32>,
    v: Vec<f32>,
    m16: Vec<u16>,
    v16: Vec<u16>,
}

/// Memory that the threads of the current pool touch first.
fn fill<T: Copy + Send + Sync + Default>(n: usize, f: impl Fn(u64) -> T + Sync) -> Vec<T> {
    (0..n).into_par_iter().with_min_len(1 << 16).map(|i| f((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20)).collect()
}

fn state(n: usize) -> State {
    let bf16 = |scale: f32| move |r: u64| ((((r % 2001) as f32 - 1000.0) * scale).to_bits() >> 16) as u16;
    State {
        hi: fill(n, bf16(2e-5)),
        lo: fill(n, |r| r as u16),
        m: fill(n, |r| (r % 97) as f32 * 1e-6),
        v: fill(n, |r| (r % 89) as f32 * 1e-9),
        m16: fill(n, bf16(1e-6)),
        v16: fill(n, |r| (((r % 89) as f32 * 1e-9).to_bits() >> 16) as u16),
    }
}

/// Brings every page of `old` to `new`, as the optimizer does: one page at a time on all threads.
fn update(level: Level, streamed: bool, narrow: bool, k: &AdamwStep, old: &State, new: &mut State, g: &[u16]) {
    let n = g.len();
    for at in (0..n).step_by(PAGE) {
        let r = at..(at + PAGE).min(n);
        let params = r.start as u64..r.end as u64;
        let runs = [DecayRun { first: params.start, end: params.end, decay: true }];
        let view = PageView {
            params: params.clone(),
            hi: &old.hi[r.clone()],
            lo: &old.lo[r.clone()],
            m: if narrow { MomentsRef::Bf16(&old.m16[r.clone()]) } else { MomentsRef::F32(&old.m[r.clone()]) },
            v: if narrow { MomentsRef::Bf16(&old.v16[r.clone()]) } else { MomentsRef::F32(&old.v[r.clone()]) },
        };
        let page = PageMut {
            params,
            hi: &mut new.hi[r.clone()],
            lo: &mut new.lo[r.clone()],
            m: if narrow { MomentsMut::Bf16(&mut new.m16[r.clone()]) } else { MomentsMut::F32(&mut new.m[r.clone()]) },
            v: if narrow { MomentsMut::Bf16(&mut new.v16[r.clone()]) } else { MomentsMut::F32(&mut new.v[r.clone()]) },
        };
        adamw_page_at(level, streamed, k, &runs, view, page, Gradients::Bf16(&g[r])).expect("a page of one format");
    }
}

fn checksum(s: &State, narrow: bool) -> u64 {
    let sum16 =
        |x: &[u16]| x.par_iter().enumerate().map(|(i, x)| (i as u64 | 1).wrapping_mul(u64::from(*x))).reduce(|| 0, u64::wrapping_add);
    let sum32 = |x: &[f32]| {
        x.par_iter().enumerate().map(|(i, x)| (i as u64 | 1).wrapping_mul(u64::from(x.to_bits()))).reduce(|| 0, u64::wrapping_add)
    };
    let moments = if narrow { sum16(&s.m16) ^ sum16(&s.v16).rotate_left(1) } else { sum32(&s.m) ^ sum32(&s.v).rotate_left(1) };
    sum16(&s.hi) ^ sum16(&s.lo).rotate_left(2) ^ moments.rotate_left(4)
}

fn best(mut f: impl FnMut()) -> f64 {
    f();
    (0..REPEATS)
        .map(|_| {
            let begin = Instant::now();
            f();
            begin.elapsed().as_secs_f64()
        })
        .fold(f64::MAX, f64::min)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| arguments.iter().position(|a| a == flag).and_then(|i| arguments.get(i + 1)).cloned();
    let gib: f64 = value("--gib").and_then(|v| v.parse().ok()).unwrap_or(2.0);
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let threads: Vec<usize> = match value("--threads") {
        Some(list) => list.split(',').filter_map(|t| t.parse().ok()).collect(),
        None => [1, all / 2, all].into_iter().filter(|t| *t > 0).collect(),
    };
    // Old and new state with both kinds of moments, and gradients: 34 bytes a parameter.
    let n = ((gib * (1u64 << 30) as f64) as usize / 34 / 1024 * 1024).max(1 << 20);
    println!("{n} parameters, {:.2} GiB; best of {REPEATS}", n as f64 * 34.0 / (1u64 << 30) as f64);
    let k = AdamwStep {
        step: 5,
        beta1: 0.9,
        beta2: 0.95,
        one_minus_beta1: 0.1,
        one_minus_beta2: 0.05,
        step_size: 1e-3,
        root_scale: 2.1,
        eps: 1e-8,
        gradient_scale: 0.5,
        keep: 0.9999,
    };
    let mut sums: Vec<(bool, u64)> = Vec::new();
    let mut threads_seen = Vec::new();
    for t in threads {
        if threads_seen.contains(&t) {
            continue;
        }
        threads_seen.push(t);
        let Ok(pool) = rayon::ThreadPoolBuilder::new().num_threads(t).build() else { return ExitCode::FAILURE };
        let agreed = pool.install(|| {
            let (old, mut new) = (state(n), state(n));
            let g: Vec<u16> = fill(n, |r| ((((r % 1999) as f32 - 999.0) * 1e-6).to_bits() >> 16) as u16);
            // The f32 moments are as good as any memory for a copy: 8 bytes of traffic an element, or 12 where the written
            // line is read first.
            let seconds = best(|| {
                new.m.par_chunks_mut(1 << 16).zip(old.m.par_chunks(1 << 16)).for_each(|(a, b)| a.copy_from_slice(b));
            });
            let copy = n as f64 * 8.0 / seconds / 1e9;
            println!("{t:>3} threads: copy {copy:.1} GB/s");
            for level in Level::all() {
                for narrow in [false, true] {
                    for streamed in [false, true] {
                        let s = best(|| update(level, streamed, narrow, &k, &old, &mut new, &g));
                        let bytes = if narrow { 18.0 } else { 26.0 };
                        let rate = n as f64 * bytes / s / 1e9;
                        println!(
                            "             {:<8} {} moments, {:<8} stores: {:6.3} Gparam/s, {rate:6.1} GB/s of {bytes} bytes a parameter, {:3.0} % of copy",
                            level.to_string(),
                            if narrow { "bf16" } else { "fp32" },
                            if streamed { "streamed" } else { "ordinary" },
                            n as f64 / s / 1e9,
                            100.0 * rate / copy
                        );
                        sums.push((narrow, checksum(&new, narrow)));
                    }
                }
            }
            let s = best(|| {
                std::hint::black_box(g.par_chunks(4096).map(sum_of_squares_bf16).collect::<Vec<f64>>());
            });
            println!("             norm of bf16 gradients: {:6.3} Gparam/s, {:6.1} GB/s", n as f64 / s / 1e9, n as f64 * 2.0 / s / 1e9);
            [false, true].iter().all(|narrow| {
                let mut same = sums.iter().filter(|x| x.0 == *narrow).map(|x| x.1);
                let first = same.next();
                same.all(|s| Some(s) == first)
            })
        });
        if !agreed {
            eprintln!("the results of the levels differ");
            return ExitCode::FAILURE;
        }
    }
    println!("all results agree bit for bit");
    ExitCode::SUCCESS
}
