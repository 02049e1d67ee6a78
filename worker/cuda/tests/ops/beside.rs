//! What pages, weights and gradients get of the bus while matrix products have all multiprocessors.

use crate::optimizer::{by_device, k, put, store};
use ramtorch_cuda::CudaDevice;
use ramtorch_device::*;
use ramtorch_store::*;
use std::time::Instant;

const HIDDEN: usize = 5120;
const WIDE: usize = 27_648;
/// Parameters of a block that is loaded, and of gradients that leave, again and again.
const BLOCK: u64 = 96 << 20;

/// Largest and mean, in milliseconds.
fn waits(times: &[f64]) -> String {
    let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
    format!("{:.1} ms ({:.1} at most, {} times)", mean * 1e3, times.iter().fold(0f64, |a, b| a.max(*b)) * 1e3, times.len())
}

/// Products of some sizes beside the pages of a store; the bus serves a block's weights and gradients meanwhile.
pub fn bench() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for (moments, all_rows) in [(MomentFormat::F32, [0, 8192]), (MomentFormat::Bf16, [8192, 32_768])] {
        let s = store(&format!("beside-{moments:?}"), 1_100_000, 16 << 20, moments, GradientFormat::Bf16);
        s.populate(threads).unwrap();
        put(&s, |i| (i % 2001) as f32 * 1e-6 - 1e-3);
        let owner = SharedOwner::new(s.claim(0).unwrap());
        let mut step = 0;
        for rows in all_rows {
            let mut d = CudaDevice::open(0, Dtype::Bf16, 30 << 30, true).unwrap();
            let mut updater = d.page_updater(&s).unwrap().unwrap();
            let a = d.alloc((rows.max(1) * HIDDEN * 2) as u64, "a").unwrap();
            let b = d.alloc((WIDE * HIDDEN * 2) as u64, "b").unwrap();
            let out = d.alloc((rows.max(1) * WIDE * 2) as u64, "d").unwrap();
            let (weights, gradients) = (d.alloc(BLOCK * 2, "weights").unwrap(), d.alloc(BLOCK * 2, "gradients").unwrap());
            let product = Gemm {
                m: rows,
                n: WIDE,
                k: HIDDEN,
                transpose_a: false,
                transpose_b: true,
                a,
                b,
                d: out,
                d_dtype: Dtype::Bf16,
                accumulate: false,
                add: None,
                bias: None,
            };
            let products = |n: usize| {
                let begin = Instant::now();
                for _ in 0..n {
                    d.gemm(&product).unwrap();
                }
                begin
            };
            let (mut alone, mut count) = (0.0, 0);
            if rows > 0 {
                products(3);
                d.synchronize(Stream::Compute).unwrap();
                let begin = products(20);
                d.synchronize(Stream::Compute).unwrap();
                alone = begin.elapsed().as_secs_f64() / 20.0;
                count = (0.6 / alone) as usize;
            }
            for busy in [false, true] {
                step += 1;
                let physical = s.entry(0).physical;
                let begin = products(count);
                let pages = Instant::now();
                let (took, mut loads, mut stores) = std::thread::scope(|scope| {
                    let updating = scope.spawn(|| {
                        by_device(&owner, &k(step), updater.as_mut(), &[]);
                        pages.elapsed().as_secs_f64()
                    });
                    let (mut loads, mut stores) = (Vec::new(), Vec::new());
                    while busy && !updating.is_finished() {
                        let (begin, page) = (Instant::now(), u64::from(s.layout().page_parameters()));
                        for at in (0..BLOCK).step_by(page as usize) {
                            let n = page.min(BLOCK - at);
                            d.load_parameters(Stream::CopyIn, weights.slice(at * 2, n * 2), &s, physical, 0, n).unwrap();
                        }
                        d.synchronize(Stream::CopyIn).unwrap();
                        loads.push(begin.elapsed().as_secs_f64());
                        let begin = Instant::now();
                        d.store_packed_gradients(Stream::CopyOut, gradients, &s, 0, BLOCK).unwrap();
                        d.synchronize(Stream::CopyOut).unwrap();
                        stores.push(begin.elapsed().as_secs_f64());
                    }
                    (updating.join().unwrap(), loads, stores)
                });
                d.synchronize(Stream::Compute).unwrap();
                let each = begin.elapsed().as_secs_f64() / count.max(1) as f64;
                // The last ones had less beside them.
                loads.pop();
                stores.pop();
                println!(
                    "beside {rows:>6} rows, {moments:?} moments: {:5.2} Gparam/s by the GPU; a product takes {:.2} ms, alone {:.2}{}",
                    s.layout().span() as f64 / took / 1e9,
                    each * 1e3,
                    alone * 1e3,
                    if busy {
                        format!("; {BLOCK} weights come in {}, gradients go in {}", waits(&loads), waits(&stores))
                    } else {
                        String::new()
                    }
                );
            }
        }
    }
}
