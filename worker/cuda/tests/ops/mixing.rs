//! Matrix products and attention.

use crate::Test;
use crate::rig::{Format, Rig, Tensor, formats, watched};
use ramtorch_device::*;

pub const TESTS: &[Test] = &[
    ("products_of_all_transpositions_and_odd_sizes", products),
    ("products_with_bias_and_residual", epilogues),
    ("products_accumulate_in_f32", accumulation),
    ("products_of_unaligned_operands", unaligned),
    ("products_in_deterministic_mode_repeat", deterministic_products),
    ("products_of_few_rows", few_rows),
    ("attention_plain", attention_plain),
    ("attention_windows_and_documents", attention_masked),
    ("attention_of_odd_heads", attention_odd),
    ("attention_in_deterministic_mode_repeats", attention_deterministic),
    ("attention_in_deterministic_mode_in_parts", attention_split),
    ("attention_to_a_cache", attention_cached),
    ("attention_to_a_long_cache", attention_long_cache),
];

/// One product on both devices; `None` where D is f32.
#[derive(Clone, Copy)]
struct Product {
    m: usize,
    n: usize,
    k: usize,
    transpose_a: bool,
    transpose_b: bool,
    f32_result: bool,
    accumulate: bool,
    add: bool,
    in_place: bool,
    bias: bool,
    shift: usize,
}

const PLAIN: Product = Product {
    m: 0,
    n: 0,
    k: 0,
    transpose_a: false,
    transpose_b: false,
    f32_result: false,
    accumulate: false,
    add: false,
    in_place: false,
    bias: false,
    shift: 0,
};

fn run(r: &mut Rig, p: Product) -> Tensor {
    let Product { m, n, k, .. } = p;
    let scale = 1.0 / (k as f32).sqrt();
    let (a, b) = (r.shifted_input(m * k, 1.0, p.shift), r.shifted_input(k * n, scale, p.shift));
    let bias = p.bias.then(|| r.shifted_input(n, 1.0, p.shift));
    let format = if p.f32_result { Format::F32 } else { Format::Real };
    let d = r.room(m * n, format, p.shift);
    let mut add = p.add.then(|| r.shifted_input(m * n, 1.0, p.shift));
    if p.accumulate || p.in_place {
        let values = r.numbers(m * n, 1.0);
        r.fill(&d, &values);
        if p.in_place {
            // The reference reads the same values from elsewhere.
            let copy = r.room(m * n, format, p.shift);
            r.fill(&copy, &values);
            add = Some(Tensor { gpu: d.gpu, ..copy });
        }
    }
    r.both(|device, at| {
        device.gemm(&Gemm {
            m,
            n,
            k,
            transpose_a: p.transpose_a,
            transpose_b: p.transpose_b,
            a: at(&a),
            b: at(&b),
            d: at(&d),
            d_dtype: if p.f32_result { Dtype::F32 } else { device.dtype() },
            accumulate: p.accumulate,
            add: add.as_ref().map(at),
            bias: bias.as_ref().map(at),
        })
    });
    let what = format!(
        "{m}x{n}x{k} ta={} tb={} f32={} acc={} add={} in place={} bias={} shift={}",
        p.transpose_a as u8,
        p.transpose_b as u8,
        p.f32_result as u8,
        p.accumulate as u8,
        p.add as u8,
        p.in_place as u8,
        p.bias as u8,
        p.shift
    );
    r.close(&what, &d);
    d
}

const SIZES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (33, 65, 17), (128, 256, 512), (1, 100, 64), (200, 1, 72), (7, 1001, 250), (511, 384, 96)];

fn products() {
    formats(|mut r: Rig| {
        for (m, n, k) in SIZES {
            for flags in 0..4 {
                run(&mut r, Product { m, n, k, transpose_a: flags & 1 != 0, transpose_b: flags & 2 != 0, ..PLAIN });
            }
        }
        // Large enough for the search for an algorithm.
        run(&mut r, Product { m: 1024, n: 512, k: 768, transpose_b: true, ..PLAIN });
    });
}

fn epilogues() {
    formats(|mut r: Rig| {
        for (m, n, k) in SIZES {
            for (add, in_place, bias) in
                [(true, false, false), (false, true, false), (false, false, true), (true, false, true), (false, true, true)]
            {
                run(&mut r, Product { m, n, k, transpose_b: true, add, in_place, bias, ..PLAIN });
            }
            run(&mut r, Product { m, n, k, f32_result: true, bias: true, add: true, ..PLAIN });
        }
        run(&mut r, Product { m: 1024, n: 512, k: 768, transpose_b: true, add: true, bias: true, ..PLAIN });
        run(&mut r, Product { m: 1024, n: 512, k: 768, transpose_b: true, in_place: true, ..PLAIN });
    });
}

fn accumulation() {
    formats(|mut r: Rig| {
        for (m, n, k) in SIZES {
            for accumulate in [false, true] {
                run(&mut r, Product { m, n, k, transpose_a: true, f32_result: true, accumulate, ..PLAIN });
            }
        }
        run(&mut r, Product { m: 640, n: 768, k: 1500, transpose_a: true, f32_result: true, accumulate: true, ..PLAIN });
    });
}

fn unaligned() {
    formats(|mut r: Rig| {
        for shift in [1, 2, 3] {
            for (m, n, k) in [(33, 65, 17), (128, 256, 512), (64, 48, 40)] {
                run(&mut r, Product { m, n, k, transpose_b: true, bias: true, add: true, shift, ..PLAIN });
                run(&mut r, Product { m, n, k, transpose_a: true, f32_result: true, accumulate: true, shift, ..PLAIN });
                run(&mut r, Product { m, n, k, in_place: true, bias: true, shift, ..PLAIN });
            }
        }
    });
}

/// Decoding: as many rows as there are texts, weights `[out, in]`; sizes around those of tiles, and tails of all kinds.
fn few_rows() {
    // A tool that watches every access takes minutes for all of them.
    let (rows, shapes): (&[usize], &[(usize, usize)]) = match watched() {
        false => (
            &[1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33],
            &[(3072, 3072), (16, 8), (17, 24), (1001, 1000), (70, 136), (333, 1032), (40, 8192), (12_801, 264)],
        ),
        true => (&[1, 8, 17, 32], &[(16, 8), (17, 24), (333, 136), (40, 1032)]),
    };
    formats(|mut r: Rig| {
        for &m in rows {
            for &(n, k) in shapes {
                run(&mut r, Product { m, n, k, transpose_b: true, ..PLAIN });
            }
            for (add, in_place, bias) in
                [(true, false, false), (false, true, false), (false, false, true), (true, false, true), (false, true, true)]
            {
                run(&mut r, Product { m, n: 157, k: 648, transpose_b: true, add, in_place, bias, ..PLAIN });
            }
            run(&mut r, Product { m, n: 64, k: 640, transpose_b: true, add: true, bias: true, shift: 1, ..PLAIN });
            run(&mut r, Product { m, n: 64, k: 640, transpose_b: true, f32_result: true, ..PLAIN });
        }
    });
    // A row's bits are its own: they depend neither on the rows beside it nor on when they are computed.
    let mut r = Rig::new(Dtype::Bf16, true);
    for (n, k) in if watched() { [(320, 136), (640, 72)] } else { [(3072, 1544), (12_800, 520)] } {
        let (a, b) = (r.input(32 * k, 1.0), r.input(n * k, 0.05));
        let product = |r: &mut Rig, m: usize| {
            let d = r.output(32 * n);
            let g = Gemm {
                m,
                n,
                k,
                transpose_a: false,
                transpose_b: true,
                a: a.gpu,
                b: b.gpu,
                d: d.gpu,
                d_dtype: Dtype::Bf16,
                accumulate: false,
                add: None,
                bias: None,
            };
            r.gpu.gemm(&g).unwrap();
            r.gpu_bytes(&d)[..m * n * 2].to_vec()
        };
        let all = product(&mut r, 32);
        for m in [1, 8, 9, 16, 17, 32] {
            assert!(product(&mut r, m) == all[..m * n * 2], "{m} of 32 rows, {n}x{k}");
        }
    }
}

fn deterministic_products() {
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let mut r = Rig::new(dtype, true);
        for (m, n, k) in [(256, 256, 8192), (1024, 512, 768), (64, 64, 30_000)] {
            let (a, b) = (r.input(m * k, 1.0), r.input(k * n, 0.01));
            let mut first = None;
            for _ in 0..5 {
                let d = r.given(&vec![0.0; m * n]);
                let g = Gemm {
                    m,
                    n,
                    k,
                    transpose_a: true,
                    transpose_b: false,
                    a: a.gpu,
                    b: b.gpu,
                    d: d.gpu,
                    d_dtype: Dtype::F32,
                    accumulate: true,
                    add: None,
                    bias: None,
                };
                r.gpu.gemm(&g).unwrap();
                let bits = r.gpu_bytes(&d);
                assert!(first.get_or_insert_with(|| bits.clone()) == &bits, "{m}x{n}x{k}: two runs differ");
            }
        }
        run(&mut r, Product { m: 300, n: 200, k: 5000, transpose_a: true, f32_result: true, accumulate: true, ..PLAIN });
    }
}

#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    documents: bool,
}

fn shape(c: Case, starts: Option<DevBuf>) -> AttentionShape {
    AttentionShape {
        batch: c.batch,
        seq: c.seq,
        heads: c.heads,
        kv_heads: c.kv_heads,
        head_dim: c.head_dim,
        scale: 1.0 / (c.head_dim as f32).sqrt(),
        window: c.window,
        starts,
    }
}

fn attention(r: &mut Rig, c: Case) {
    let what = format!(
        "b{} s{} h{}/{} d{} window {} documents {}",
        c.batch,
        c.seq,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.window.unwrap_or(0),
        c.documents as u8
    );
    let plain = shape(c, None);
    let (rows, width) = (plain.rows(), c.heads * c.head_dim);
    // Documents of uneven lengths, one after another in each sequence.
    let lengths = [5, 1, 70, 33, 128, 64];
    let mut starts = Vec::new();
    for b in 0..c.batch {
        let (mut start, mut left, mut next) = (0, lengths[b % 6], b + 1);
        for t in 0..c.seq {
            if left == 0 {
                (start, left, next) = (t, lengths[next % 6], next + 1);
            }
            left -= 1;
            starts.push(start as i32);
        }
    }
    let starts = c.documents.then(|| r.integers(&starts));
    let (qkv, out, lse) = (r.input(rows * plain.row(), 1.0), r.output(rows * width), r.output_f32(c.batch * c.heads * c.seq));
    r.both(|d, b| d.attention_forward(&shape(c, starts.as_ref().map(b)), b(&qkv), b(&out), b(&lse)));
    r.agree(&format!("{what} out"), &out, 8e-3, 1e-5);
    r.agree(&format!("{what} statistics"), &lse, 2e-4, 1e-5);
    let (dout, dqkv) = (r.input(rows * width, 1.0), r.output(rows * plain.row()));
    let bytes = r.gpu.attention_workspace(&shape(c, starts.map(|s| s.gpu))).unwrap();
    let workspace = r.room(bytes.max(4) as usize / 4 + 1, Format::F32, 0);
    r.both(|d, b| d.attention_backward(&shape(c, starts.as_ref().map(b)), b(&dout), b(&qkv), b(&out), b(&lse), b(&dqkv), b(&workspace)));
    r.agree(&format!("{what} gradients ({bytes} bytes of workspace)"), &dqkv, 1.5e-2, 2e-5);
    r.fence(&what, &workspace);
}

const CASE: Case = Case { batch: 2, seq: 128, heads: 4, kv_heads: 2, head_dim: 64, window: None, documents: false };

fn attention_plain() {
    formats(|mut r: Rig| {
        for (batch, seq, heads, kv_heads, head_dim) in [
            (1, 1, 1, 1, 64),
            (2, 128, 4, 2, 64),
            (2, 256, 8, 2, 128),
            (1, 200, 4, 4, 64),
            (3, 77, 6, 2, 128),
            (1, 520, 9, 3, 64),
            (2, 65, 2, 1, 32),
        ] {
            attention(&mut r, Case { batch, seq, heads, kv_heads, head_dim, ..CASE });
        }
    });
}

fn attention_masked() {
    formats(|mut r: Rig| {
        for (window, documents) in [(Some(16), false), (Some(1), false), (Some(100), true), (None, true), (Some(1000), false)] {
            for (batch, seq, head_dim) in [(2, 128, 64), (3, 300, 128)] {
                attention(&mut r, Case { batch, seq, head_dim, window, documents, ..CASE });
            }
        }
    });
}

fn attention_odd() {
    formats(|mut r: Rig| {
        for head_dim in [1, 7, 20, 33, 80, 96, 160, 256] {
            attention(&mut r, Case { seq: 100, head_dim, ..CASE });
        }
    });
}

/// A workspace so large that the sequences are taken a few at a time.
fn attention_split() {
    let mut r = Rig::new(Dtype::Bf16, true);
    attention(&mut r, Case { batch: 5, seq: 2048, heads: 32, kv_heads: 8, head_dim: 128, ..CASE });
    attention(&mut r, Case { batch: 3, seq: 2048, heads: 48, kv_heads: 8, head_dim: 128, documents: true, ..CASE });
}

fn attention_deterministic() {
    for dtype in [Dtype::Bf16, Dtype::F32] {
        let mut r = Rig::new(dtype, true);
        let c = Case { batch: 3, seq: 640, heads: 8, kv_heads: 2, head_dim: 128, ..CASE };
        attention(&mut r, c);
        attention(&mut r, Case { documents: true, seq: 200, ..c });
        let s = shape(c, None);
        let width = c.heads * c.head_dim;
        let (qkv, dout) = (r.input(s.rows() * s.row(), 1.0), r.input(s.rows() * width, 1.0));
        let bytes = r.gpu.attention_workspace(&s).unwrap();
        let workspace = r.room(bytes as usize / 4 + 1, Format::F32, 0);
        let mut first = None;
        for _ in 0..5 {
            let (out, lse, dqkv) = (r.output(s.rows() * width), r.output_f32(c.batch * c.heads * c.seq), r.output(s.rows() * s.row()));
            r.gpu.attention_forward(&s, qkv.gpu, out.gpu, lse.gpu).unwrap();
            r.gpu.attention_backward(&s, dout.gpu, qkv.gpu, out.gpu, lse.gpu, dqkv.gpu, workspace.gpu).unwrap();
            let bits = (r.gpu_bytes(&out), r.gpu_bytes(&dqkv));
            assert!(first.get_or_insert_with(|| bits.clone()) == &bits, "two runs differ");
        }
    }
}

fn attention_cached() {
    formats(|mut r: Rig| {
        for (heads, kv_heads, head_dim, window) in [(4, 2, 64, None), (6, 1, 128, Some(37)), (3, 3, 20, None), (2, 1, 256, Some(5))] {
            let (batch, capacity, width) = (3, 150, kv_heads * head_dim);
            let (keys, values) = (r.input(batch * capacity * width, 1.0), r.input(batch * capacity * width, 1.0));
            let mut past = [0i32, 3, 60];
            for new in [40usize, 1, 1, 3, 9] {
                let s = CachedAttentionShape { batch, new, capacity, heads, kv_heads, head_dim, scale: 0.3, window };
                let row = (heads + 2 * kv_heads) * head_dim;
                let (qkv, out, lengths) = (r.input(batch * new * row, 1.0), r.output(batch * new * heads * head_dim), r.integers(&past));
                r.both(|d, b| d.attention_cached(&s, b(&qkv), b(&keys), b(&values), b(&lengths), b(&out)));
                r.close(&format!("cache {heads}/{kv_heads} d{head_dim}, {new} new"), &out);
                r.agree("keys", &keys, 0.0, 0.0);
                r.agree("values", &values, 0.0, 0.0);
                past.iter_mut().for_each(|p| *p += new as i32);
            }
        }
    });
}

/// Keys in many parts, whose bounds lie before, at and behind those of the texts and their windows; heads that a block's query
/// heads share evenly and not, heads of every size that the kernels are compiled for.
fn attention_long_cache() {
    formats(|mut r: Rig| {
        for (heads, kv_heads, head_dim, window) in [
            (4, 2, 64, None),
            (6, 2, 128, None),
            (8, 1, 128, Some(300)),
            (5, 1, 32, None),
            (3, 3, 80, Some(128)),
            (7, 1, 96, None),
            (8, 1, 256, None),
            (2, 2, 20, None),
            (2, 1, 40, Some(1)),
        ] {
            let (batch, capacity, width) = (4, 5100, kv_heads * head_dim);
            let (keys, values) = (r.input(batch * capacity * width, 1.0), r.input(batch * capacity * width, 1.0));
            let mut past = [5000i32, 126, 383, 0];
            for new in [1usize, 1, 1, 3, 7, 1] {
                let s = CachedAttentionShape { batch, new, capacity, heads, kv_heads, head_dim, scale: 0.1, window };
                let row = (heads + 2 * kv_heads) * head_dim;
                let (qkv, out, lengths) = (r.input(batch * new * row, 1.0), r.output(batch * new * heads * head_dim), r.integers(&past));
                r.both(|d, b| d.attention_cached(&s, b(&qkv), b(&keys), b(&values), b(&lengths), b(&out)));
                r.close(&format!("long cache {heads}/{kv_heads} d{head_dim} window {window:?}, {new} new"), &out);
                past.iter_mut().for_each(|p| *p += new as i32);
            }
            r.agree("keys", &keys, 0.0, 0.0);
            r.agree("values", &values, 0.0, 0.0);
            // A text's bits are its own: alone, with less room, it has the same.
            let (s, row) =
                (CachedAttentionShape { batch: 1, new: 1, capacity, heads, kv_heads, head_dim, scale: 0.1, window }, heads + 2 * kv_heads);
            let (qkv, lengths) = (r.input(row * head_dim, 1.0), r.integers(&[500]));
            let (first, again) = (r.output(heads * head_dim), r.output(heads * head_dim));
            for (out, capacity) in [(&first, capacity), (&again, 501)] {
                let s = CachedAttentionShape { capacity, ..s };
                r.gpu.attention_cached(&s, qkv.gpu, keys.gpu, values.gpu, lengths.gpu, out.gpu).unwrap();
            }
            assert!(r.gpu_bytes(&first) == r.gpu_bytes(&again), "{heads}/{kv_heads} d{head_dim}: another capacity");
        }
    });
}
