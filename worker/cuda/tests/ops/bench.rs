//! Rates of the operations of one layer of an 8B Llama at 8192 tokens.

use ramtorch_cuda::CudaDevice;
use ramtorch_device::*;
use std::time::Instant;

const ROWS: usize = 8192;
const HIDDEN: usize = 4096;
const WIDE: usize = 14_336;

struct Bench {
    d: CudaDevice,
    filters: Vec<String>,
}

impl Bench {
    /// Median of 5 timings of 10 calls, with what each call moves or computes.
    fn measure(&self, name: &str, flops: f64, bytes: f64, f: impl Fn(&CudaDevice) -> Result<(), EngineError>) {
        if !self.filters.is_empty() && !self.filters.iter().any(|x| name.contains(x.as_str())) {
            return;
        }
        let once = || -> Result<f64, EngineError> {
            let before = Instant::now();
            for _ in 0..10 {
                f(&self.d)?;
            }
            self.d.synchronize(Stream::Compute)?;
            Ok(before.elapsed().as_secs_f64() / 10.0)
        };
        let times: Result<Vec<f64>, _> = (0..6).map(|_| once()).collect();
        match times {
            Err(e) => println!("{name:<44} {e}"),
            Ok(mut t) => {
                t.remove(0);
                t.sort_by(f64::total_cmp);
                let s = t[2];
                let rate = if flops > 0.0 { format!("{:7.0} TFLOP/s", flops / s / 1e12) } else { format!("{:7.0} GB/s", bytes / s / 1e9) };
                println!("{name:<44} {:9.1} us {rate}", s * 1e6);
            }
        }
    }
}

fn random(d: &mut CudaDevice, elements: usize, bytes_each: usize) -> DevBuf {
    let buf = d.alloc((elements * bytes_each) as u64, "bench").unwrap();
    let mut seed = elements as u64 | 1;
    let part: Vec<u8> = (0..(1usize << 20).min(elements))
        .flat_map(|_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let v = (seed >> 40) as f32 / (1 << 23) as f32 - 1.0;
            if bytes_each == 2 { half::bf16::from_f32(v).to_bits().to_le_bytes().to_vec() } else { v.to_le_bytes().to_vec() }
        })
        .collect();
    let mut at = 0;
    while at < elements * bytes_each {
        let n = part.len().min(elements * bytes_each - at);
        d.upload(Stream::Compute, buf.slice(at as u64, n as u64), &part[..n]).unwrap();
        at += n;
    }
    buf
}

pub fn run(filters: &[&String]) {
    if filters.is_empty() || filters.iter().any(|f| "optimizer".contains(f.as_str())) {
        crate::optimizer::bench();
    }
    if filters.is_empty() || filters.iter().any(|f| "beside".contains(f.as_str())) {
        crate::beside::bench();
    }
    if filters.is_empty() || filters.iter().any(|f| "sustained".contains(f.as_str())) {
        sustained();
    }
    if !filters.is_empty() && filters.iter().all(|f| ["optimizer", "beside", "sustained"].contains(&f.as_str())) {
        return;
    }
    for deterministic in [false, true] {
        println!("-- deterministic {deterministic}");
        let mut d = CudaDevice::open(0, Dtype::Bf16, 40 << 30, deterministic).unwrap();
        let x = random(&mut d, ROWS * 2 * WIDE, 2);
        let y = random(&mut d, ROWS * 2 * WIDE, 2);
        let z = random(&mut d, ROWS * 2 * WIDE, 2);
        let w = random(&mut d, 2 * WIDE * HIDDEN, 2);
        let g = random(&mut d, 2 * WIDE * HIDDEN, 4);
        let stats = random(&mut d, ROWS * 64, 4);
        let workspace = d.alloc(12 << 30, "workspace").unwrap();
        let b = Bench { d, filters: filters.iter().map(|f| (*f).clone()).collect() };
        products(&b, x, y, w, g);
        attention(&b, x, y, z, stats, workspace);
        decoding(&b, x, y, z, w);
        if !deterministic {
            elementwise(b, x, y, z, w, g, stats);
        }
    }
}

/// Products of a layer, forward and backward, with their names; weight gradients are added to fp32 sums.
fn layer_products(x: DevBuf, y: DevBuf, w: DevBuf, g: DevBuf) -> Vec<(String, Gemm)> {
    let mut all = Vec::new();
    for (name, n, k) in [("qkv", 6144, HIDDEN), ("out", HIDDEN, HIDDEN), ("gate and up", 2 * WIDE, HIDDEN), ("down", HIDDEN, WIDE)] {
        let base = Gemm {
            m: ROWS,
            n,
            k,
            transpose_a: false,
            transpose_b: true,
            a: x,
            b: w,
            d: y,
            d_dtype: Dtype::Bf16,
            accumulate: false,
            add: None,
            bias: None,
        };
        let dgrad = Gemm { n: k, k: n, transpose_b: false, ..base };
        let wgrad =
            Gemm { m: n, n: k, k: ROWS, transpose_a: true, transpose_b: false, b: y, d: g, d_dtype: Dtype::F32, accumulate: true, ..base };
        all.push((format!("gemm {name} forward"), base));
        all.push((format!("gemm {name} input gradient"), dgrad));
        all.push((format!("gemm {name} weight gradient, f32 added"), wgrad));
        if name == "down" {
            all.push(("gemm down forward with residual".into(), Gemm { add: Some(y), ..base }));
        }
    }
    all
}

fn flops(g: &Gemm) -> f64 {
    2.0 * (g.m * g.n) as f64 * g.k as f64
}

fn products(b: &Bench, x: DevBuf, y: DevBuf, w: DevBuf, g: DevBuf) {
    for (name, gemm) in layer_products(x, y, w, g) {
        b.measure(&name, flops(&gemm), 0.0, |d| d.gemm(&gemm));
    }
}

/// A token of each of some texts, in the shapes of a 3B Llama. Weights come from another place each time: not from the L2 cache.
fn decoding(b: &Bench, x: DevBuf, y: DevBuf, z: DevBuf, w: DevBuf) {
    for m in [1, 8, 16, 32, 64] {
        for (name, n, k) in [("qkv", 5120, 3072), ("out", 3072, 3072), ("gate and up", 16_384, 3072), ("down", 3072, 8192)] {
            let (bytes, turn) = ((n * k * 2) as u64, std::cell::Cell::new(0));
            b.measure(&format!("decode {name}, {m} rows"), 0.0, bytes as f64, |d| {
                let at = turn.get();
                turn.set(if at + 2 * bytes > w.bytes { 0 } else { at + bytes });
                d.gemm(&Gemm {
                    m,
                    n,
                    k,
                    transpose_a: false,
                    transpose_b: true,
                    a: x,
                    b: w.slice(at, bytes),
                    d: y,
                    d_dtype: Dtype::Bf16,
                    accumulate: false,
                    add: Some(y),
                    bias: None,
                })
            });
        }
    }
    for (batch, length) in [(1usize, 100usize), (1, 5000), (16, 100), (16, 5000)] {
        let capacity = length + 1;
        let s = CachedAttentionShape { batch, new: 1, capacity, heads: 24, kv_heads: 8, head_dim: 128, scale: 0.088, window: None };
        let bytes = (batch * capacity * 1024 * 2) as u64;
        let past: Vec<u8> = (0..batch).flat_map(|_| (length as i32).to_le_bytes()).collect();
        let lengths = y.slice(y.bytes - 256, 256);
        b.d.upload(Stream::Compute, lengths, &past).unwrap();
        let (keys, values) = (z.slice(0, bytes), z.slice(bytes, bytes));
        b.measure(&format!("decode attention, {batch} texts of {length}"), 0.0, 2.0 * bytes as f64, |d| {
            d.attention_cached(&s, x, keys, values, lengths, y)
        });
    }
}

/// All products of a layer one after the other, for long enough that the limit of power decides: the heuristic's algorithms, which
/// deterministic mode takes, against those that a search found, in turn.
fn sustained() {
    const SECONDS: f64 = 4.0;
    let mut rigs = [true, false].map(|deterministic| {
        let mut d = CudaDevice::open(0, Dtype::Bf16, 16 << 30, deterministic).unwrap();
        let (x, y) = (random(&mut d, ROWS * 2 * WIDE, 2), random(&mut d, ROWS * 2 * WIDE, 2));
        let (w, g) = (random(&mut d, 2 * WIDE * HIDDEN, 2), random(&mut d, 2 * WIDE * HIDDEN, 4));
        (d, layer_products(x, y, w, g), deterministic)
    });
    for _ in 0..3 {
        for (d, list, deterministic) in &mut rigs {
            list.iter().for_each(|(_, gemm)| d.gemm(gemm).unwrap());
            d.synchronize(Stream::Compute).unwrap();
            let (begun, mut rounds) = (Instant::now(), 0);
            while begun.elapsed().as_secs_f64() < SECONDS {
                for _ in 0..10 {
                    list.iter().for_each(|(_, gemm)| d.gemm(gemm).unwrap());
                }
                d.synchronize(Stream::Compute).unwrap();
                rounds += 10;
            }
            let done: f64 = list.iter().map(|(_, gemm)| flops(gemm)).sum::<f64>() * f64::from(rounds);
            let rate = done / begun.elapsed().as_secs_f64() / 1e12;
            println!("{SECONDS} s of a layer's products, {}: {rate:.0} TFLOP/s", if *deterministic { "deterministic" } else { "searched" });
        }
    }
}

fn attention(b: &Bench, x: DevBuf, y: DevBuf, z: DevBuf, stats: DevBuf, workspace: DevBuf) {
    for (batch, seq) in [(4, 2048), (8, 1024)] {
        let s = AttentionShape { batch, seq, heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088, window: None, starts: None };
        let flops = 2.0 * (batch * 32 * seq * seq * 128) as f64;
        println!("{:<44} {} bytes", format!("attention workspace b{batch} s{seq}"), b.d.attention_workspace(&s).unwrap_or(0));
        let half = y.bytes / 2;
        let (out, dout) = (y.slice(0, half), y.slice(half, half));
        b.measure(&format!("attention forward b{batch} s{seq}"), flops, 0.0, |d| d.attention_forward(&s, x, out, stats));
        b.measure(&format!("attention backward b{batch} s{seq}"), 2.5 * flops, 0.0, |d| {
            d.attention_backward(&s, dout, x, out, stats, z, workspace)
        });
        let masked = AttentionShape { window: Some(seq - 1), ..s };
        b.measure(&format!("attention forward, first keys b{batch} s{seq}"), flops, 0.0, |d| d.attention_forward(&masked, x, out, stats));
        b.measure(&format!("attention backward, first keys b{batch} s{seq}"), 2.5 * flops, 0.0, |d| {
            d.attention_backward(&masked, dout, x, out, stats, z, workspace)
        });
    }
}

fn elementwise(mut b: Bench, x: DevBuf, y: DevBuf, z: DevBuf, w: DevBuf, g: DevBuf, stats: DevBuf) {
    let n = (ROWS * HIDDEN) as f64;
    let s = NormShape::plain(NormKind::Rms, ROWS, HIDDEN, 1e-5);
    b.measure("rms norm forward", 0.0, 4.0 * n, |d| d.norm_forward(&s, x, w, None, y, stats));
    b.measure("rms norm backward with residual", 0.0, 8.0 * n, |d| d.norm_backward(&s, y, x, w, stats, Some(z), z, g, None));
    let wide = (ROWS * WIDE) as f64;
    b.measure("silu gate forward", 0.0, 6.0 * wide, |d| d.glu_forward(ActivationKind::Silu, x, ROWS, WIDE, y));
    b.measure("silu gate backward", 0.0, 10.0 * wide, |d| d.glu_backward(ActivationKind::Silu, y, x, ROWS, WIDE, z));
    b.measure("column sum", 0.0, 2.0 * n, |d| d.column_sum(x, ROWS, HIDDEN, g));
    b.measure("add", 0.0, 6.0 * n, |d| d.add(x, y, ROWS * HIDDEN));
    let table = random(&mut b.d, 2048 * 128, 4);
    let turn = RopeShape { rows: ROWS, row_stride: 6144, heads: 40, head_dim: 128, seq: 2048, positions: None, table, inverse: false };
    b.measure("rope", 0.0, 4.0 * (ROWS * 40 * 128) as f64, |d| d.rope(&turn, x));
    let classes = 128_256;
    let rows = 1024;
    let logits = random(&mut b.d, rows * classes, 2);
    let ids: Vec<i32> = (0..ROWS as i32).map(|i| i * 13 % 5000).collect();
    let bytes = |v: &[i32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let targets = b.d.alloc(ROWS as u64 * 4, "targets").unwrap();
    b.d.upload(Stream::Compute, targets, &bytes(&ids)).unwrap();
    let out = LossOut { losses: stats, gradient_scale: Some(1e-4) };
    b.measure("cross-entropy 1024 x 128256", 0.0, 4.0 * (rows * classes) as f64, |d| {
        d.cross_entropy(logits, rows, classes, targets, g, &out)
    });
    let mut order: Vec<i32> = (0..ROWS as i32).collect();
    order.sort_by_key(|i| (ids[*i as usize], *i));
    let mut bounds: Vec<i32> =
        (0..ROWS).filter(|i| *i == 0 || ids[order[*i] as usize] != ids[order[*i - 1] as usize]).map(|i| i as i32).collect();
    bounds.push(ROWS as i32);
    let (o, l) = (b.d.alloc(ROWS as u64 * 4, "order").unwrap(), b.d.alloc(ROWS as u64 * 4 + 4, "bounds").unwrap());
    b.d.upload(Stream::Compute, o, &bytes(&order)).unwrap();
    b.d.upload(Stream::Compute, l, &bytes(&bounds)).unwrap();
    let t = TokenIndex { rows: ROWS, ids: targets, order: o, bounds: l, unique: bounds.len() - 1 };
    b.measure("embedding forward", 0.0, 4.0 * n, |d| d.embedding_forward(&t, w, HIDDEN, None, 2048, None, y));
    b.measure("embedding backward", 0.0, 2.0 * n + 8.0 * (t.unique * HIDDEN) as f64, |d| {
        d.embedding_backward(&t, x, HIDDEN, g, None, 2048)
    });
}
