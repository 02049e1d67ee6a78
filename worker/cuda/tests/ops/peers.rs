//! Collectives between GPUs: one thread a rank, on as many GPUs as there are. With one GPU there is nothing to test, and they are skipped.

use crate::Test;
use ramtorch_cpu::{Channel, Collectives};
use ramtorch_cuda::CudaDevice;
use ramtorch_device::{DevBuf, Device, Dtype, Gang, Stream};
use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, Store, StoreSpec, TensorSpec};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const TESTS: &[Test] = &[
    ("peers_gather_and_reduce", gather_and_reduce),
    ("peers_give_the_same_bits_again", same_bits),
    ("peers_end_when_told", end_when_told),
    ("peers_rates", rates),
];

/// Runs `f` as each of `world` ranks, on threads of this process; what they give, by rank.
fn gang<T: Send>(tag: &str, world: usize, f: impl Fn(&Arc<Collectives>, CudaDevice) -> T + Sync) -> Vec<T> {
    let tensor = TensorSpec { name: "w".into(), shape: vec![64], joined: false, decay: true };
    let spec = StoreSpec {
        blocks: vec![BlockSpec { name: "b".into(), tensors: vec![tensor] }],
        world_size: world as u32,
        moments: MomentFormat::None,
        gradients: GradientFormat::None,
        page_parameters: Some(1024),
        spare_pages_per_rank: 1,
        exchange_bytes: 1 << 16,
        log: GradientLog::NONE,
        metadata: String::new(),
    };
    let name = format!("/ramtorch-test-peers-{}-{tag}-{world}", std::process::id());
    let _ = Store::unlink(&name);
    let store = Arc::new(Store::create(&name, &spec).unwrap());
    Store::unlink(&name).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let (store, f) = (store.clone(), &f);
                scope.spawn(move || {
                    let comm = Arc::new(Collectives::new(store, rank, world, 1));
                    let mut d = CudaDevice::open(rank as u32, Dtype::Bf16, 3 << 30, true).unwrap();
                    let gang: Arc<dyn Gang> = comm.clone();
                    let begin = Instant::now();
                    d.join_gang(&gang).unwrap();
                    println!("rank {rank} of {world} joined in {:.2} s", begin.elapsed().as_secs_f64());
                    f(&comm, d)
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

/// How many GPUs a gang can have here.
fn most() -> usize {
    let all: Vec<u32> = ramtorch_cuda::available().unwrap().iter().map(|g| g.ordinal).collect();
    let n = all.len();
    println!("{n} GPU(s), peer access {:?}", ramtorch_cuda::peer_access(&all));
    if n < 2 {
        crate::skip("a gang needs two GPUs");
    }
    n
}

fn bytes(values: impl Iterator<Item = f32>, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Dtype::Bf16 => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
    }
}

fn read(d: &CudaDevice, buf: DevBuf, dtype: Dtype) -> Vec<f32> {
    let mut raw = vec![0u8; buf.bytes as usize];
    d.download(Stream::Peers, buf, &mut raw).unwrap();
    match dtype {
        Dtype::F32 => raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::Bf16 => raw.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
    }
}

/// Small integers: exact in every format and order.
fn whole(rank: usize, i: usize) -> f32 {
    ((rank * 5 + i * 7) % 13) as f32 - 6.0
}

fn gather_and_reduce() {
    for world in 2..=most() {
        gang("whole", world, |comm, mut d| {
            let rank = comm.rank();
            for share in [64usize, 64 * 1001, 1 << 20] {
                let n = share * world;
                let weights = d.alloc(n as u64 * 2, "weights").unwrap().slice(0, n as u64 * 2);
                let own = weights.slice((rank * share * 2) as u64, share as u64 * 2);
                d.upload(Stream::Peers, own, &bytes((0..share).map(|i| whole(rank, i)), Dtype::Bf16)).unwrap();
                d.all_gather(weights).unwrap();
                let all = read(&d, weights, Dtype::Bf16);
                assert!(all.iter().enumerate().all(|(i, v)| *v == whole(i / share, i % share)), "gather of {world} x {share}");
                for dtype in [Dtype::F32, Dtype::Bf16] {
                    let len = n as u64 * dtype.size();
                    let sums = d.alloc(len, "sums").unwrap().slice(0, len);
                    d.upload(Stream::Peers, sums, &bytes((0..n).map(|i| whole(rank, i)), dtype)).unwrap();
                    d.reduce_scatter(sums, dtype).unwrap();
                    let own = sums.slice((rank * share) as u64 * dtype.size(), share as u64 * dtype.size());
                    let right = |(i, v): (usize, &f32)| *v == (0..world).map(|r| whole(r, rank * share + i)).sum::<f32>();
                    assert!(read(&d, own, dtype).iter().enumerate().all(right), "reduction of {world} x {share} {dtype:?}");
                }
            }
            // No whole number of shares: refused before anybody looks at it.
            assert!(d.all_gather(DevBuf { ptr: 256, bytes: 130 }).is_err());
            comm.barrier(Channel::Step).unwrap();
        });
    }
}

/// Random numbers, whose sums depend on their order: the same order in two gangs, of which the second is disturbed.
fn same_bits() {
    let world = most();
    if world < 2 {
        return;
    }
    let run = |tag: &str, late: bool| {
        gang(tag, world, |comm, mut d| {
            let (rank, share) = (comm.rank(), 64 * 33_331);
            let len = (share * world * 4) as u64;
            let sums = d.alloc(len, "sums").unwrap().slice(0, len);
            let mut out = Vec::new();
            for round in 0..3usize {
                let values = (0..share * world).map(|i| ((i * 2_654_435_761 + rank * 97 + round * 31) % 100_003) as f32 * 1e-3 - 7.7);
                d.upload(Stream::Peers, sums, &bytes(values, Dtype::F32)).unwrap();
                if late && rank == round % world {
                    std::thread::sleep(Duration::from_millis(50));
                }
                d.reduce_scatter(sums, Dtype::F32).unwrap();
                let own = sums.slice((rank * share * 4) as u64, share as u64 * 4);
                out.extend(read(&d, own, Dtype::F32).into_iter().map(f32::to_bits));
            }
            comm.barrier(Channel::Step).unwrap();
            out
        })
    };
    assert_eq!(run("first", false), run("again", true));
}

/// A rank waits on its device for one that does not come, is told to give up, and is free within a second.
fn end_when_told() {
    if most() < 2 {
        return;
    }
    gang("abort", 2, |comm, mut d| {
        let buf = d.alloc(2 * 64 * 2, "shares").unwrap().slice(0, 2 * 64 * 2);
        d.all_gather(buf).unwrap(); // links are up
        d.synchronize(Stream::Peers).unwrap();
        comm.barrier(Channel::Step).unwrap();
        if comm.rank() == 0 {
            d.all_gather(buf).unwrap();
            let done = d.event().unwrap();
            d.record(done, Stream::Peers).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            assert!(!d.is_done(done).unwrap(), "the other rank has not come");
            let told = Instant::now();
            comm.abort();
            let _ = d.synchronize(Stream::Peers);
            println!("free {:.3} s after it was told", told.elapsed().as_secs_f64());
            assert!(told.elapsed() < Duration::from_secs(1), "{:?}", told.elapsed());
            let e = d.all_gather(buf).unwrap_err();
            assert!(e.message.contains("given up"), "{e}");
            // The device is as good as before.
            d.zero(Stream::Compute, buf).unwrap();
            d.synchronize(Stream::Compute).unwrap();
        } else {
            std::thread::sleep(Duration::from_millis(1500));
            comm.abort();
        }
        let told = Instant::now();
        drop(d);
        assert!(told.elapsed() < Duration::from_secs(3), "closing took {:?}", told.elapsed());
    });
}

/// Measures; prints what a rank receives, alone and beside matrix products.
fn rates() {
    let world = most();
    if world < 2 {
        return;
    }
    gang("rates", world, |comm, mut d| {
        let m = 8192usize;
        let square = (m * m * 2) as u64;
        let [a, b, c] = [(); 3].map(|()| d.alloc(square, "product").unwrap());
        let share = (256u64 << 20) / world as u64 / 128 * 128;
        let buf = d.alloc(share * world as u64, "shares").unwrap().slice(0, share * world as u64);
        let product = |d: &CudaDevice| {
            d.gemm(&ramtorch_device::Gemm {
                m,
                n: m,
                k: m,
                transpose_a: false,
                transpose_b: true,
                a,
                b,
                d: c,
                d_dtype: Dtype::Bf16,
                accumulate: false,
                add: None,
                bias: None,
            })
            .unwrap();
        };
        let mut time = |products: usize, collectives: usize, reduce: bool| -> [f64; 2] {
            let round = |d: &CudaDevice, products: usize, collectives: usize| {
                (0..products).for_each(|_| product(d));
                for _ in 0..collectives {
                    if reduce { d.reduce_scatter(buf, Dtype::F32).unwrap() } else { d.all_gather(buf).unwrap() }
                }
            };
            round(&d, 1, 1);
            d.synchronize(Stream::Compute).unwrap();
            d.synchronize(Stream::Peers).unwrap();
            comm.barrier(Channel::Step).unwrap();
            let begin = Instant::now();
            round(&d, products, collectives);
            let (mut ends, mut left) = ([0.0; 2], [true; 2]);
            let done = [d.event().unwrap(), d.event().unwrap()];
            d.record(done[0], Stream::Compute).unwrap();
            d.record(done[1], Stream::Peers).unwrap();
            while left.contains(&true) {
                for i in 0..2 {
                    if left[i] && d.is_done(done[i]).unwrap() {
                        (ends[i], left[i]) = (begin.elapsed().as_secs_f64(), false);
                    }
                }
            }
            ends
        };
        let received = (share * (world as u64 - 1)) as f64;
        let flops = 2.0 * (m as f64).powi(3);
        for reduce in [false, true] {
            let alone = received * 20.0 / time(0, 20, reduce)[1];
            let [products, beside] = time(60, 20, reduce);
            let quiet = time(60, 0, reduce)[0];
            if comm.rank() == 0 {
                println!(
                    "{}: {:.0} GB/s a rank alone, {:.0} beside products, which make {:.0} of {:.0} TFLOP/s meanwhile (and after)",
                    if reduce { "reduce-scatter" } else { "all-gather" },
                    alone / 1e9,
                    received * 20.0 / beside / 1e9,
                    60.0 * flops / products / 1e12,
                    60.0 * flops / quiet / 1e12
                );
            }
        }
        comm.barrier(Channel::Step).unwrap();
    });
}
