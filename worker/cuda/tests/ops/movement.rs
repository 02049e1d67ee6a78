//! Memory, streams, events, copies, the store.

use crate::Test;
use crate::rig::{Rig, compare, formats};
use half::bf16;
use ramtorch_cuda::CudaDevice;
use ramtorch_device::*;
use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, Store, StoreSpec, TensorSpec, split};
use std::sync::Arc;

pub const TESTS: &[Test] = &[
    ("memory_is_zeroed_aligned_and_within_its_budget", memory),
    ("uploads_larger_than_the_ring_arrive", uploads),
    ("copies_and_fills", copies),
    ("events_order_streams", events),
    ("work_that_is_kept_runs_again", kept),
    ("parameters_load_from_the_store", parameters),
    ("gradients_reach_the_store", gradients),
    ("rows_are_gathered", gather),
    ("formats_convert", convert),
];

fn memory() {
    for reserved in [0u64, 10 << 20] {
        memory_with(reserved);
    }
}

fn memory_with(reserved: u64) {
    let mut d = CudaDevice::open(0, Dtype::Bf16, 64 << 20, false).unwrap();
    d.reserve(reserved).unwrap();
    assert_eq!((d.allocated(), d.reserve(65 << 20).unwrap_err().kind), (0, ErrorKind::Resources));
    let mut total = 0;
    // Some in what was taken in one piece, some beside it.
    for bytes in [1u64, 255, 256, 1000, 5 << 20, 3 << 20, 17 << 20, 1 << 20] {
        let b = d.alloc(bytes, "test").unwrap();
        assert!(b.ptr.is_multiple_of(256) && b.bytes == bytes.next_multiple_of(256));
        total += b.bytes;
        let mut out = vec![1u8; b.bytes as usize];
        d.download(Stream::CopyOut, b, &mut out).unwrap();
        assert!(out.iter().all(|x| *x == 0));
    }
    assert_eq!(d.allocated(), total);
    let e = d.alloc(60 << 20, "the activations").unwrap_err();
    assert_eq!(e.kind, ErrorKind::Resources);
    assert!(e.message.contains("the activations") && e.message.contains("cuda:0"), "{e}");
    assert_eq!(d.allocated(), total);
}

fn uploads() {
    let mut d = CudaDevice::open(0, Dtype::Bf16, 1 << 30, false).unwrap();
    let n = 150 << 20;
    let b = d.alloc(n, "test").unwrap();
    let data: Vec<u8> = (0..n).map(|i| (i.wrapping_mul(2654435761) >> 13) as u8).collect();
    let mut at = 0;
    for piece in [1usize, 77, 4096, 1 << 20, 33 << 20, 90 << 20, usize::MAX] {
        let len = piece.min(n as usize - at);
        let mut own = data[at..at + len].to_vec();
        // Small ones go by kernel, large ones by copy engine; the order of a stream holds between them.
        d.upload(Stream::CopyIn, b.slice(at as u64, len as u64), &own).unwrap();
        own.fill(0xee); // taken over already
        at += len;
    }
    let mut out = vec![0u8; n as usize];
    d.download(Stream::CopyIn, b, &mut out).unwrap();
    assert!(out == data);
    for (from, len) in [(5, 100), (0, n as usize), (7, 0), (1 << 20, 3)] {
        let mut looked = 0;
        let mut look = |read: &[u8]| looked += usize::from(read == &data[from..from + len]);
        d.read(Stream::CopyIn, b.slice(from as u64, len as u64), &mut look).unwrap();
        assert_eq!(looked, 1, "{len} bytes at {from}");
    }
    assert!(d.upload(Stream::CopyIn, b.slice(0, 8), &[0; 9]).is_err());
}

fn copies() {
    let mut d = CudaDevice::open(0, Dtype::Bf16, 16 << 20, false).unwrap();
    let (a, b) = (d.alloc(5000, "a").unwrap().slice(0, 4999), d.alloc(5000, "b").unwrap().slice(0, 4999));
    let data: Vec<u8> = (0..4999).map(|i| (i % 251) as u8).collect();
    d.upload(Stream::Compute, a, &data).unwrap();
    d.copy(Stream::Compute, b, a).unwrap();
    d.zero(Stream::Compute, a.slice(1, 99)).unwrap();
    let mut out = vec![0u8; 4999];
    d.download(Stream::Compute, b, &mut out).unwrap();
    assert!(out == data);
    d.download(Stream::Compute, a, &mut out).unwrap();
    assert!(out[0] == data[0] && out[1..100].iter().all(|x| *x == 0) && out[100..] == data[100..]);
}

/// A product and a norm, kept together, give the bits that they give one by one, with whatever lies in their buffers.
fn kept() {
    let mut r = Rig::new(Dtype::Bf16, true);
    let (m, n, k) = (3, 512, 768);
    let (x, w) = (r.input(m * k, 1.0), r.input(n * k, 0.05));
    let (y, z) = (r.output(m * n), r.output(m * k));
    let (stats, weight) = (r.output_f32(m), r.input(k, 1.0));
    let gemm = Gemm {
        m,
        n,
        k,
        transpose_a: false,
        transpose_b: true,
        a: x.gpu,
        b: w.gpu,
        d: y.gpu,
        d_dtype: Dtype::Bf16,
        accumulate: false,
        add: None,
        bias: None,
    };
    let norm = NormShape::plain(NormKind::Rms, m, k, 1e-5);
    let run = |r: &Rig| -> Result<(), EngineError> {
        r.gpu.norm_forward(&norm, x.gpu, weight.gpu, None, z.gpu, stats.gpu)?;
        r.gpu.gemm(&gemm)
    };
    run(&r).unwrap();
    let kept = r.gpu.keep_work(&mut || run(&r)).unwrap().expect("a GPU keeps work");
    for round in 0..3 {
        let values = r.numbers(m * k, 1.0 + round as f32);
        r.fill(&x, &values);
        run(&r).unwrap();
        let wanted = (r.gpu_values(&y), r.gpu_values(&z));
        for t in [&y, &z] {
            r.gpu.zero(Stream::Compute, t.gpu).unwrap();
        }
        r.gpu.again(kept).unwrap();
        assert!((r.gpu_values(&y), r.gpu_values(&z)) == wanted, "round {round}");
    }
    // What comes to an error is not kept, has run nothing, and leaves the stream as it was.
    r.gpu.zero(Stream::Compute, y.gpu).unwrap();
    assert!(r.gpu.keep_work(&mut || run(&r).and_then(|()| Err(EngineError::internal("no more")))).unwrap().is_none());
    assert!(r.gpu_values(&y).iter().all(|y| *y == 0.0));
    run(&r).unwrap();
    r.gpu.again(kept).unwrap();
    assert!(r.gpu.again(KeptWork(99)).is_err());
    r.gpu.synchronize(Stream::Compute).unwrap();
}

fn events() {
    let mut d = CudaDevice::open(0, Dtype::F32, 1 << 30, false).unwrap();
    let n = 1 << 20;
    let (x, y) = (d.alloc(n * 4, "x").unwrap(), d.alloc(n * 4, "y").unwrap());
    let (filled, used) = (d.event().unwrap(), d.event().unwrap());
    d.synchronize_event(filled).unwrap(); // done before it is ever recorded
    for round in 1..=50u32 {
        d.wait(Stream::CopyIn, used).unwrap();
        let ones: Vec<u8> = (0..n).flat_map(|_| (round as f32).to_le_bytes()).collect();
        d.upload(Stream::CopyIn, x, &ones).unwrap();
        d.record(filled, Stream::CopyIn).unwrap();
        d.wait(Stream::Compute, filled).unwrap();
        d.add(x, y, n as usize).unwrap();
        d.record(used, Stream::Compute).unwrap();
    }
    d.synchronize(Stream::Compute).unwrap();
    let mut out = vec![0u8; n as usize * 4];
    d.download(Stream::CopyOut, y, &mut out).unwrap();
    assert!(out.chunks_exact(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) == 1275.0));
    assert!(d.record(Event(77), Stream::Compute).is_err());
}

fn store(gradients: GradientFormat, tag: &str) -> Arc<Store> {
    let spec = StoreSpec {
        blocks: vec![BlockSpec {
            name: "b".into(),
            tensors: vec![TensorSpec { name: "w".into(), shape: vec![1000, 301], joined: false, decay: true }],
        }],
        world_size: 1,
        moments: MomentFormat::None,
        gradients,
        page_parameters: Some(65536),
        spare_pages_per_rank: 1,
        exchange_bytes: 4096,
        log: GradientLog::NONE,
        metadata: String::new(),
    };
    let name = format!("ramtorch-test-cuda-{}-{tag}", std::process::id());
    let _ = Store::unlink(&name);
    let s = Store::create(&name, &spec).unwrap();
    Store::unlink(&name).unwrap(); // the mapping stays
    s.populate(2).unwrap();
    Arc::new(s)
}

fn parameters() {
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let mut d = CudaDevice::open(0, dtype, 64 << 20, false).unwrap();
        let s = store(GradientFormat::None, "load");
        let n = 65536usize;
        let values: Vec<f32> = (0..n as u32).map(|i| f32::from_bits(i.wrapping_mul(2654435761) & 0xbfff_ffff)).collect();
        {
            let mut owner = s.claim(0).unwrap();
            owner
                .initialise(2, 0, |page| {
                    for (i, v) in values.iter().enumerate() {
                        (page.hi[i], page.lo[i]) = split::split(*v);
                    }
                })
                .unwrap();
        }
        for registered in [false, true] {
            if registered {
                d.register_store(&s).unwrap();
                d.register_store(&s).unwrap(); // twice is once
            }
            let dst = d.alloc(n as u64 * 4, "slot").unwrap();
            let physical = s.entry(2).physical;
            for (offset, count) in [(0u64, n as u64), (13, 1001), (65535, 1)] {
                let part = dst.slice(dtype.size() * 3, count.min(n as u64 - 3) * dtype.size());
                let count = count.min(n as u64 - 3);
                d.load_parameters(Stream::CopyIn, part, &s, physical, offset, count).unwrap();
                let mut out = vec![0u8; part.bytes as usize];
                d.download(Stream::CopyIn, part, &mut out).unwrap();
                let want: Vec<u8> = values[offset as usize..][..count as usize]
                    .iter()
                    .flat_map(|v| match dtype {
                        Dtype::F32 => v.to_le_bytes().to_vec(),
                        Dtype::Bf16 => split::split(*v).0.to_le_bytes().to_vec(),
                    })
                    .collect();
                assert!(out == want, "{dtype:?} {offset}+{count}");
            }
            assert!(d.load_parameters(Stream::CopyIn, dst, &s, physical, 1, n as u64).is_err());
        }
    }
}

fn gradients() {
    for format in [GradientFormat::F32, GradientFormat::Bf16] {
        let mut d = CudaDevice::open(0, Dtype::Bf16, 64 << 20, false).unwrap();
        let s = store(format, "gradients");
        d.register_store(&s).unwrap();
        let n = 300_000usize;
        let src = d.alloc(n as u64 * 4, "gradients").unwrap();
        let read = |start: usize, count: usize| -> Vec<f32> {
            (start..start + count)
                .map(|i| {
                    let p = s.gradient_ptr(i as u64);
                    // SAFETY: inside the gradient array; the copies are done.
                    unsafe {
                        match format {
                            GradientFormat::F32 => p.cast::<f32>().read_unaligned(),
                            _ => bf16::from_bits(p.cast::<u16>().read_unaligned()).to_f32(),
                        }
                    }
                })
                .collect()
        };
        let round = |v: f32| if format == GradientFormat::Bf16 { bf16::from_f32(v).to_f32() } else { v };
        let mut want = vec![0f32; n];
        for (pass, (start, count, accumulate)) in
            [(0usize, n, false), (5, 1003, true), (64, 4096, true), (0, n, true)].into_iter().enumerate()
        {
            let values: Vec<f32> = (0..count).map(|i| ((i * 7919 + pass * 31) % 1009) as f32 / 1009.0 - 0.5).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            d.upload(Stream::CopyOut, src, &bytes).unwrap();
            d.store_gradients(Stream::CopyOut, src, &s, start as u64, count as u64, accumulate).unwrap();
            d.synchronize(Stream::CopyOut).unwrap();
            for (w, v) in want[start..start + count].iter_mut().zip(&values) {
                *w = round(if accumulate { *w + v } else { *v });
            }
            assert!(read(0, n) == want, "{format:?}, pass {pass}");
        }
        assert!(d.store_gradients(Stream::CopyOut, src, &s, s.layout().span(), 1, false).is_err());
    }
}

fn gather() {
    formats(|mut r: Rig| {
        for width in [5, 64, 2048] {
            let x = r.input(40 * width, 1.0);
            let rows = r.integers(&[39, 0, 7, 7, 12]);
            let y = r.output(5 * width);
            r.both(|d, b| d.gather_rows(b(&x), width, b(&rows), 5, b(&y)));
            r.agree(&format!("gather of width {width}"), &y, 0.0, 0.0);
        }
    });
}

fn convert() {
    formats(|mut r: Rig| {
        for n in [1usize, 7, 4096, 100_003] {
            let (x, wide) = (r.input(n, 3.0), r.output_f32(n));
            r.both(|d, b| d.to_f32(b(&x), n, b(&wide)));
            r.agree(&format!("to f32, {n}"), &wide, 0.0, 0.0);
            let (f, y) = (r.input_f32(n, 3.0), r.output(n));
            r.both(|d, b| d.from_f32(b(&f), n, b(&y)));
            let want: Vec<f32> =
                r.cpu_values(&f).iter().map(|v| if r.dtype == Dtype::Bf16 { bf16::from_f32(*v).to_f32() } else { *v }).collect();
            r.fence("from f32", &y);
            compare(&format!("from f32, {n}"), &r.gpu_values(&y), &want, 0.0);
            let z = r.input(n, 1.0);
            r.both(|d, b| d.add(b(&x), b(&z), n));
            r.close(&format!("add, {n}"), &z);
        }
    });
}
