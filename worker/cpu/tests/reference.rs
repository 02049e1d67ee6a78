//! Every operation against its definition in f64, on odd sizes; gradients against central differences of the
//! definition, so that forward and backward are checked by independent means.
#![allow(clippy::unwrap_used)]

use ramtorch_cpu::CpuDevice;
use ramtorch_device::*;

/// An fp32 device, and random numbers.
struct Rig {
    dev: CpuDevice,
    state: u64,
}

impl Rig {
    fn new(seed: u64) -> Rig {
        Rig { dev: CpuDevice::open(0, Dtype::F32, 2, 64 << 20).unwrap(), state: seed }
    }
    /// Uniform in -1 .. 1.
    fn random(&mut self, n: usize) -> Vec<f32> {
        let mut next = || {
            self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }
    fn up(&mut self, x: &[f32]) -> DevBuf {
        let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.bytes(&bytes)
    }
    fn ints(&mut self, x: &[i32]) -> DevBuf {
        let bytes: Vec<u8> = x.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.bytes(&bytes)
    }
    fn bytes(&mut self, bytes: &[u8]) -> DevBuf {
        let buf = self.dev.alloc(bytes.len() as u64, "test").unwrap().slice(0, bytes.len() as u64);
        self.dev.upload(Stream::Compute, buf, bytes).unwrap();
        buf
    }
    fn zeros(&mut self, n: usize) -> DevBuf {
        self.up(&vec![0.0; n])
    }
    fn down(&self, buf: DevBuf) -> Vec<f32> {
        let mut bytes = vec![0u8; buf.bytes as usize];
        self.dev.download(Stream::Compute, buf, &mut bytes).unwrap();
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// Differences relative to the largest value.
#[track_caller]
fn close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1e-3f64, |a, v| a.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() <= tolerance * scale, "{what}[{i}]: {g}, should be {w} (scale {scale})");
    }
}

/// Gradient of Σ dy · f(x) by central differences.
fn numeric(x: &[f64], dy: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let h = 1e-5;
    let sum = |x: &[f64]| f(x).iter().zip(dy).map(|(a, b)| a * b).sum::<f64>();
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + h;
            let up = sum(&x);
            x[i] = at - h;
            let down = sum(&x);
            x[i] = at;
            (up - down) / (2.0 * h)
        })
        .collect()
}

#[test]
fn matrix_products() {
    let mut r = Rig::new(1);
    let extras = [(false, false, false), (true, false, false), (false, true, false), (false, false, true), (false, true, true)];
    for (m, n, k) in [(1, 1, 1), (7, 5, 3), (33, 65, 129), (130, 47, 64), (64, 200, 1)] {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b, d, add, bias) = (r.random(m * k), r.random(k * n), r.random(m * n), r.random(m * n), r.random(n));
            let at_a = |i: usize, l: usize| f64::from(a[if ta { l * m + i } else { i * k + l }]);
            let at_b = |l: usize, j: usize| f64::from(b[if tb { j * k + l } else { l * n + j }]);
            let product: Vec<f64> = (0..m * n).map(|x| (0..k).map(|l| at_a(x / n, l) * at_b(l, x % n)).sum()).collect();
            for (accumulate, with_add, with_bias) in extras {
                let (ba, bb, bd, badd, bbias) = (r.up(&a), r.up(&b), r.up(&d), r.up(&add), r.up(&bias));
                let g = Gemm {
                    m,
                    n,
                    k,
                    transpose_a: ta,
                    transpose_b: tb,
                    a: ba,
                    b: bb,
                    d: bd,
                    d_dtype: Dtype::F32,
                    accumulate,
                    add: with_add.then_some(badd),
                    bias: with_bias.then_some(bbias),
                };
                r.dev.gemm(&g).unwrap();
                let want: Vec<f64> = (0..m * n)
                    .map(|i| {
                        let extra = if accumulate { d[i] } else { 0.0 } + if with_add { add[i] } else { 0.0 };
                        product[i] + f64::from(extra) + if with_bias { f64::from(bias[i % n]) } else { 0.0 }
                    })
                    .collect();
                close(&format!("{m}x{n}x{k} {ta} {tb} {accumulate} {with_add} {with_bias}"), &r.down(bd), &want, 3e-6);
            }
        }
    }
}

/// Normalised vectors of `s` in a matrix as long as `x`; what is not covered stays zero.
fn norm(s: &NormShape, x: &[f64], w: &[f64], b: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    for i in 0..s.rows * s.groups {
        let at = i / s.groups * s.row_stride + s.offset + i % s.groups * s.width;
        let (v, n) = (&x[at..at + s.width], s.width as f64);
        let mean = if s.kind == NormKind::Layer { v.iter().sum::<f64>() / n } else { 0.0 };
        let root = (v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + f64::from(s.eps)).sqrt();
        for j in 0..s.width {
            y[at + j] = (v[j] - mean) / root * w[j] + b[j];
        }
    }
    y
}

#[test]
fn norms() {
    let mut r = Rig::new(2);
    for kind in [NormKind::Rms, NormKind::Layer] {
        let plain = |rows, width| NormShape::plain(kind, rows, width, 1e-5);
        let heads = NormShape { kind, rows: 3, groups: 2, width: 5, row_stride: 17, offset: 4, eps: 1e-6 };
        for s in [plain(1, 3), plain(5, 7), plain(3, 67), heads] {
            let (len, layer) = (s.rows * s.row_stride, kind == NormKind::Layer);
            let (x, w, dy, add) = (r.random(len), r.random(s.width), r.random(len), r.random(len));
            let b = if layer { r.random(s.width) } else { vec![0.0; s.width] };
            let (bx, bw, by, stats) = (r.up(&x), r.up(&w), r.zeros(len), r.zeros(s.stats_len()));
            let bb = layer.then(|| r.up(&b));
            r.dev.norm_forward(&s, bx, bw, bb, by, stats).unwrap();
            let (x64, w64, b64, dy64) = (wide(&x), wide(&w), wide(&b), wide(&dy));
            close(&format!("{s:?} forward"), &r.down(by), &norm(&s, &x64, &w64, &b64), 3e-6);
            let covered = |i: usize| (s.offset..s.offset + s.groups * s.width).contains(&(i % s.row_stride));
            let (bdy, badd, bdw, bdx) = (r.up(&dy), r.up(&add), r.up(&w), r.zeros(len)); // dw is added to what is there
            let bdb = layer.then(|| r.up(&b));
            r.dev.norm_backward(&s, bdy, bx, bw, stats, Some(badd), bdx, bdw, bdb).unwrap();
            let dx = numeric(&x64, &dy64, |x| norm(&s, x, &w64, &b64));
            let want: Vec<f64> = (0..len).map(|i| if covered(i) { dx[i] + f64::from(add[i]) } else { 0.0 }).collect();
            close(&format!("{s:?} dx"), &r.down(bdx), &want, 2e-5);
            let plus = |old: &[f64], d: Vec<f64>| -> Vec<f64> { old.iter().zip(d).map(|(a, b)| a + b).collect() };
            let dw = numeric(&w64, &dy64, |w| norm(&s, &x64, w, &b64));
            close(&format!("{s:?} dw"), &r.down(bdw), &plus(&w64, dw), 2e-5);
            if let Some(bdb) = bdb {
                let db = numeric(&b64, &dy64, |b| norm(&s, &x64, &w64, b));
                close(&format!("{s:?} db"), &r.down(bdb), &plus(&b64, db), 2e-5);
            }
        }
    }
}

#[test]
fn rotary_embedding() {
    let mut r = Rig::new(3);
    let (rows, seq, heads, head_dim, stride) = (7, 3, 2, 6, 20);
    let half = head_dim / 2;
    let angle = |p: usize, i: usize| p as f64 * 0.7f64.powi(i as i32);
    let pair = |a: usize| [angle(a / half, a % half).cos() as f32, angle(a / half, a % half).sin() as f32];
    let table: Vec<f32> = (0..10 * half).flat_map(pair).collect();
    let x = r.random(rows * stride);
    let explicit: Vec<i32> = vec![9, 0, 3, 3, 1, 8, 2];
    for positions in [None, Some(&explicit)] {
        let (bx, bt) = (r.up(&x), r.up(&table));
        let bp = positions.map(|p| r.ints(p));
        let s = RopeShape { rows, row_stride: stride, heads, head_dim, seq, positions: bp, table: bt, inverse: false };
        r.dev.rope(&s, bx).unwrap();
        let mut want = wide(&x);
        for row in 0..rows {
            let p = positions.map_or(row % seq, |p| p[row] as usize);
            for (h, i) in (0..heads).flat_map(|h| (0..half).map(move |i| (h, i))) {
                let a = row * stride + h * head_dim + i;
                let (s, c) = angle(p, i).sin_cos();
                (want[a], want[a + half]) = (want[a] * c - want[a + half] * s, want[a + half] * c + want[a] * s);
            }
        }
        close("rope", &r.down(bx), &want, 1e-6);
        r.dev.rope(&RopeShape { inverse: true, ..s }, bx).unwrap();
        close("rope and back", &r.down(bx), &wide(&x), 1e-6);
    }
}

/// Causal attention of packed queries, keys and values.
fn attention(s: &AttentionShape, starts: Option<&[i32]>, qkv: &[f64]) -> Vec<f64> {
    let (row, d) = (s.row(), s.head_dim);
    let mut out = vec![0.0; s.rows() * s.heads * d];
    for (b, h, t) in (0..s.batch).flat_map(|b| (0..s.heads).flat_map(move |h| (0..s.seq).map(move |t| (b, h, t)))) {
        let kv = h / (s.heads / s.kv_heads);
        let at = |u: usize, head: usize| &qkv[(b * s.seq + u) * row + head * d..][..d];
        let window = s.window.map_or(0, |w| (t + 1).saturating_sub(w));
        let first = starts.map_or(0, |x| x[b * s.seq + t] as usize).max(window);
        let dot = |u: usize| at(t, h).iter().zip(at(u, s.heads + kv)).map(|(a, b)| a * b).sum::<f64>();
        let scores: Vec<f64> = (first..=t).map(|u| dot(u) * f64::from(s.scale)).collect();
        let most = scores.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|x| (x - most).exp()).sum();
        for (u, score) in (first..=t).zip(&scores) {
            let p = (score - most).exp() / total;
            let v = at(u, s.heads + s.kv_heads + kv);
            out[((b * s.seq + t) * s.heads + h) * d..][..d].iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
        }
    }
    out
}

#[test]
fn attention_and_its_gradient() {
    let mut r = Rig::new(4);
    for (batch, seq, heads, kv_heads, head_dim, window, documents) in [
        (1, 1, 1, 1, 3, None, false),
        (2, 7, 4, 2, 5, None, false),
        (1, 9, 3, 1, 8, Some(4), false),
        (2, 6, 2, 2, 4, None, true),
        (1, 70, 2, 1, 4, Some(33), true),
    ] {
        let starts: Vec<i32> = (0..batch * seq).map(|i| if i % seq >= seq / 2 { (seq / 2) as i32 } else { 0 }).collect();
        let bs = documents.then(|| r.ints(&starts));
        let s = AttentionShape { batch, seq, heads, kv_heads, head_dim, scale: 0.4, window, starts: bs };
        let starts = documents.then_some(&starts[..]);
        let (qkv, dout) = (r.random(s.rows() * s.row()), r.random(s.rows() * heads * head_dim));
        let (bq, bo, lse) = (r.up(&qkv), r.zeros(dout.len()), r.zeros(batch * heads * seq));
        r.dev.attention_forward(&s, bq, bo, lse).unwrap();
        close(&format!("{s:?}"), &r.down(bo), &attention(&s, starts, &wide(&qkv)), 3e-6);
        let workspace = r.dev.attention_workspace(&s).unwrap().max(1);
        let workspace = r.dev.alloc(workspace, "workspace").unwrap();
        let (bd, bdq) = (r.up(&dout), r.up(&qkv)); // overwritten
        r.dev.attention_backward(&s, bd, bq, bo, lse, bdq, workspace).unwrap();
        let want = numeric(&wide(&qkv), &wide(&dout), |x| attention(&s, starts, x));
        close(&format!("{s:?} gradient"), &r.down(bdq), &want, 2e-5);
    }
}

#[test]
fn attention_over_a_cache_is_attention_over_all() {
    let mut r = Rig::new(5);
    let (batch, seq, heads, kv_heads, head_dim, capacity) = (2, 6, 4, 2, 5, 8);
    let all = AttentionShape { batch, seq, heads, kv_heads, head_dim, scale: 0.3, window: Some(4), starts: None };
    let qkv = r.random(all.rows() * all.row());
    let (whole, width) = (attention(&all, None, &wide(&qkv)), heads * head_dim);
    let (keys, values) = (r.zeros(batch * capacity * kv_heads * head_dim), r.zeros(batch * capacity * kv_heads * head_dim));
    // Three tokens at once, then one, then two.
    for (first, new) in [(0usize, 3usize), (3, 1), (4, 2)] {
        let part: Vec<f32> = (0..batch).flat_map(|b| qkv[(b * seq + first) * all.row()..][..new * all.row()].to_vec()).collect();
        let (bq, past, out) = (r.up(&part), r.ints(&[first as i32; 2]), r.zeros(batch * new * width));
        let s = CachedAttentionShape { batch, new, capacity, heads, kv_heads, head_dim, scale: 0.3, window: Some(4) };
        r.dev.attention_cached(&s, bq, keys, values, past, out).unwrap();
        let want: Vec<f64> = (0..batch).flat_map(|b| whole[(b * seq + first) * width..][..new * width].to_vec()).collect();
        close(&format!("tokens {first}+{new}"), &r.down(out), &want, 3e-6);
    }
}

/// erf by its series, which converges everywhere.
fn erf(z: f64) -> f64 {
    let (mut term, mut sum) = (z, z);
    for n in 1..120 {
        term *= -z * z / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn activation(kind: ActivationKind, x: f64) -> f64 {
    match kind {
        ActivationKind::Silu => x / (1.0 + (-x).exp()),
        ActivationKind::GeluTanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        ActivationKind::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        ActivationKind::Relu => x.max(0.0),
        ActivationKind::Tanh => x.tanh(),
    }
}

#[test]
fn activations() {
    let mut r = Rig::new(6);
    for kind in [ActivationKind::Silu, ActivationKind::GeluTanh, ActivationKind::Gelu, ActivationKind::Relu, ActivationKind::Tanh] {
        let (rows, n) = (5, 13);
        let x: Vec<f32> = r.random(rows * 2 * n).iter().map(|v| v * 4.0).collect();
        let dy = r.random(rows * 2 * n);
        let f = |x: &[f64]| x.iter().map(|x| activation(kind, *x)).collect::<Vec<_>>();
        let (bx, by, bd) = (r.up(&x), r.zeros(x.len()), r.up(&dy));
        r.dev.activation_forward(kind, bx, x.len(), by).unwrap();
        close(&format!("{kind:?}"), &r.down(by), &f(&wide(&x)), 1e-6);
        r.dev.activation_backward(kind, bd, bx, x.len(), bd).unwrap();
        close(&format!("{kind:?} gradient"), &r.down(bd), &numeric(&wide(&x), &wide(&dy), f), 3e-6);
        let gate = |x: &[f64], i: usize| activation(kind, x[i / n * 2 * n + i % n]) * x[i / n * 2 * n + n + i % n];
        let glu = |x: &[f64]| (0..rows * n).map(|i| gate(x, i)).collect::<Vec<_>>();
        let (bh, bdh) = (r.zeros(rows * n), r.up(&dy[..rows * n]));
        r.dev.glu_forward(kind, bx, rows, n, bh).unwrap();
        close(&format!("{kind:?} gated"), &r.down(bh), &glu(&wide(&x)), 1e-6);
        r.dev.glu_backward(kind, bdh, bx, rows, n, bx).unwrap();
        close(&format!("{kind:?} gated gradient"), &r.down(bx), &numeric(&wide(&x), &wide(&dy[..rows * n]), glu), 3e-6);
    }
}

#[test]
fn embeddings() {
    let mut r = Rig::new(7);
    let (vocabulary, width, seq) = (11, 5, 4);
    let ids = [3i32, 0, 3, 10, 7, 3, 0];
    let rows = ids.len();
    let mut order: Vec<i32> = (0..rows as i32).collect();
    order.sort_by_key(|i| (ids[*i as usize], *i));
    let mut bounds = vec![0i32];
    bounds.extend((1..rows).filter(|i| ids[order[*i] as usize] != ids[order[*i - 1] as usize]).map(|i| i as i32));
    bounds.push(rows as i32);
    let (table, places, dx) = (r.random(vocabulary * width), r.random(seq * width), r.random(rows * width));
    let t = TokenIndex { rows, ids: r.ints(&ids), order: r.ints(&order), bounds: r.ints(&bounds), unique: bounds.len() - 1 };
    let (bt, bp, bx) = (r.up(&table), r.up(&places), r.zeros(rows * width));
    r.dev.embedding_forward(&t, bt, width, Some(bp), seq, None, bx).unwrap();
    let in_table = |i: usize| ids[i / width] as usize * width + i % width;
    let in_places = |i: usize| i / width % seq * width + i % width;
    let want: Vec<f64> = (0..rows * width).map(|i| f64::from(table[in_table(i)]) + f64::from(places[in_places(i)])).collect();
    close("embedding", &r.down(bx), &want, 1e-7);
    let (bd, bdt, bdp) = (r.up(&dx), r.up(&table), r.up(&places));
    r.dev.embedding_backward(&t, bd, width, bdt, Some(bdp), seq).unwrap();
    let (mut want, mut want_places) = (wide(&table), wide(&places));
    for (i, d) in dx.iter().enumerate() {
        want[in_table(i)] += f64::from(*d);
        want_places[in_places(i)] += f64::from(*d);
    }
    close("embedding gradient", &r.down(bdt), &want, 1e-6);
    close("position gradient", &r.down(bdp), &want_places, 1e-6);
}

#[test]
fn losses() {
    let mut r = Rig::new(8);
    for (rows, classes) in [(1, 1), (3, 2), (5, 37), (2, 1003)] {
        let logits: Vec<f32> = r.random(rows * classes).iter().map(|v| v * 20.0).collect();
        let targets: Vec<i32> = (0..rows).map(|i| ((i * 31 + 5) % classes) as i32).collect();
        let weights: Vec<f32> = (0..rows).map(|i| i as f32 * 0.5).collect(); // the first row counts nothing
        let scale = 0.37;
        let row_loss = |x: &[f64], i: usize| {
            let row = &x[i * classes..][..classes];
            let most = row.iter().copied().fold(f64::MIN, f64::max);
            let lse = most + row.iter().map(|v| (v - most).exp()).sum::<f64>().ln();
            f64::from(weights[i]) * (lse - row[targets[i] as usize])
        };
        let f = |x: &[f64]| (0..rows).map(|i| row_loss(x, i)).collect::<Vec<_>>();
        let (bl, bt, bw, out) = (r.up(&logits), r.ints(&targets), r.up(&weights), r.zeros(rows));
        r.dev.cross_entropy(bl, rows, classes, bt, bw, &LossOut { losses: out, gradient_scale: Some(scale) }).unwrap();
        close("cross-entropy", &r.down(out), &f(&wide(&logits)), 1e-6);
        let dy = vec![f64::from(scale); rows];
        close("gradient of cross-entropy", &r.down(bl), &numeric(&wide(&logits), &dy, f), 3e-6);
        let (x, y) = (r.random(rows * classes), r.random(rows * classes));
        let square = |x: &[f64], i: usize| (x[i] - f64::from(y[i])).powi(2) * f64::from(weights[i / classes]);
        let g = |x: &[f64]| (0..rows).map(|i| (i * classes..(i + 1) * classes).map(|j| square(x, j)).sum()).collect::<Vec<f64>>();
        let (bx, by) = (r.up(&x), r.up(&y));
        r.dev.squared_error(bx, rows, classes, by, bw, &LossOut { losses: out, gradient_scale: Some(scale) }).unwrap();
        close("squared error", &r.down(out), &g(&wide(&x)), 1e-6);
        close("gradient of the squared error", &r.down(bx), &numeric(&wide(&x), &dy, g), 3e-6);
    }
}

#[test]
fn column_sums_are_added() {
    let mut r = Rig::new(9);
    let (rows, n) = (37, 21);
    let (x, out) = (r.random(rows * n), r.random(n));
    let (bx, bo) = (r.up(&x), r.up(&out));
    r.dev.column_sum(bx, rows, n, bo).unwrap();
    let want: Vec<f64> = (0..n).map(|j| f64::from(out[j]) + (0..rows).map(|i| f64::from(x[i * n + j])).sum::<f64>()).collect();
    close("column sums", &r.down(bo), &want, 1e-6);
}
