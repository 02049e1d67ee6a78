//! Operations without matrix products: normalisation, activations, embeddings, losses.

use crate::Test;
use crate::rig::{Format, Rig, Tensor, formats};
use ramtorch_device::*;

pub const TESTS: &[Test] = &[
    ("norms_forward_and_backward", norms),
    ("norms_of_heads_in_packed_rows", head_norms),
    ("column_sums", column_sums),
    ("sums_of_squares", squares),
    ("gated_units", glu),
    ("activations", activations),
    ("rotary_embedding", rope),
    ("embeddings", embeddings),
    ("cross_entropy", cross_entropy),
    ("squared_error", squared_error),
    ("sums_are_the_same_bits_every_time", same_bits),
];

const KINDS: [ActivationKind; 5] =
    [ActivationKind::Silu, ActivationKind::GeluTanh, ActivationKind::Gelu, ActivationKind::Relu, ActivationKind::Tanh];

fn norms() {
    formats(|mut r: Rig| {
        for (rows, width, shift) in
            [(3, 7, 0), (130, 64, 0), (33, 100, 1), (17, 576, 0), (5, 1000, 0), (301, 4096, 0), (9, 5120, 0), (3, 30_000, 0)]
        {
            for kind in [NormKind::Rms, NormKind::Layer] {
                let s = NormShape::plain(kind, rows, width, 1e-5);
                let what = format!("{kind:?} {rows}x{width}+{shift}");
                let x = r.shifted_input(rows * width, 1.5, shift);
                let (w, bias) = (r.input(width, 1.0), (kind == NormKind::Layer).then(|| r.input(width, 1.0)));
                let (y, stats) = (r.room(rows * width, Format::Real, shift), r.output_f32(s.stats_len()));
                r.both(|d, b| d.norm_forward(&s, b(&x), b(&w), bias.as_ref().map(b), b(&y), b(&stats)));
                r.close(&format!("{what} forward"), &y);
                r.close(&format!("{what} statistics"), &stats);
                // Gradients: into a fresh matrix, in place of dy, in place of what is added.
                for place in 0..3 {
                    let dy = r.shifted_input(rows * width, 1.0, shift);
                    let add = (place != 0).then(|| r.shifted_input(rows * width, 1.0, shift));
                    let dx = match (place, add) {
                        (1, _) => dy,
                        (2, Some(add)) => add,
                        _ => r.room(rows * width, Format::Real, shift),
                    };
                    let (dw, db) = (r.input_f32(width, 1.0), bias.map(|_| r.input_f32(width, 1.0)));
                    r.both(|d, b| {
                        d.norm_backward(&s, b(&dy), b(&x), b(&w), b(&stats), add.as_ref().map(b), b(&dx), b(&dw), db.as_ref().map(b))
                    });
                    r.close(&format!("{what} dx {place}"), &dx);
                    r.close(&format!("{what} dweight"), &dw);
                    if let Some(db) = &db {
                        r.close(&format!("{what} dbias"), db);
                    }
                }
            }
        }
    });
}

fn head_norms() {
    formats(|mut r: Rig| {
        for (rows, groups, width, row, offset) in
            [(37, 6, 64, 640, 0), (37, 2, 64, 640, 384), (19, 3, 20, 77, 11), (300, 8, 128, 1536, 128)]
        {
            let s = NormShape { kind: NormKind::Rms, rows, groups, width, row_stride: row, offset, eps: 1e-6 };
            let what = format!("heads {groups}x{width} at {offset} of {row}");
            let (x, w) = (r.input(rows * row, 1.0), r.input(width, 1.0));
            // y holds something else beside the heads that are normalised, which must stay.
            let (y, stats) = (r.input(rows * row, 1.0), r.output_f32(s.stats_len()));
            r.both(|d, b| d.norm_forward(&s, b(&x), b(&w), None, b(&y), b(&stats)));
            r.close(&format!("{what} forward"), &y);
            let (dy, dw) = (r.input(rows * row, 1.0), r.input_f32(width, 1.0));
            r.both(|d, b| d.norm_backward(&s, b(&dy), b(&x), b(&w), b(&stats), None, b(&dy), b(&dw), None));
            r.close(&format!("{what} dx"), &dy);
            r.close(&format!("{what} dweight"), &dw);
            // In place.
            r.both(|d, b| d.norm_forward(&s, b(&x), b(&w), None, b(&x), b(&stats)));
            r.close(&format!("{what} in place"), &x);
        }
    });
}

fn squares() {
    formats(|mut r: Rig| {
        for (n, shift) in [(1, 0), (5, 0), (1000, 0), (4099, 1), (3_000_000, 0), (2_999_999, 0)] {
            for (x, real) in [(r.shifted_input(n, 1.0, shift), true), (r.input_f32(n, 1.0), false)] {
                let out = r.output_f32(2);
                r.both(|d, b| d.sum_of_squares(b(&x), if real { d.dtype() } else { Dtype::F32 }, n, b(&out)));
                let sums = [r.gpu_values(&out), r.cpu_values(&out)]
                    .map(|v| f64::from_bits(u64::from(v[0].to_bits()) | u64::from(v[1].to_bits()) << 32));
                assert!((sums[0] - sums[1]).abs() <= 1e-13 * sums[1] && sums[1] > 0.0, "{n}+{shift} {:?} {real}: {sums:?}", r.dtype);
            }
        }
    });
}

fn column_sums() {
    formats(|mut r: Rig| {
        for (rows, n, shift) in [(1, 1, 0), (5, 3, 0), (1000, 64, 0), (777, 1001, 0), (4100, 768, 1), (64, 50_257, 0)] {
            let (x, out) = (r.shifted_input(rows * n, 1.0, shift), r.input_f32(n, 1.0));
            r.both(|d, b| d.column_sum(b(&x), rows, n, b(&out)));
            r.close(&format!("column sum {rows}x{n}+{shift}"), &out);
        }
    });
}

fn glu() {
    formats(|mut r: Rig| {
        for (rows, n) in [(3, 5), (17, 64), (129, 1536), (40, 11_008)] {
            for act in KINDS {
                let (x, h) = (r.input(rows * 2 * n, 2.0), r.output(rows * n));
                r.both(|d, b| d.glu_forward(act, b(&x), rows, n, b(&h)));
                r.close(&format!("{act:?} gate {rows}x{n}"), &h);
                let (dh, dx) = (r.input(rows * n, 1.0), r.output(rows * 2 * n));
                r.both(|d, b| d.glu_backward(act, b(&dh), b(&x), rows, n, b(&dx)));
                r.close(&format!("{act:?} gate backward"), &dx);
                r.both(|d, b| d.glu_backward(act, b(&dh), b(&x), rows, n, b(&x)));
                r.close(&format!("{act:?} gate backward in place"), &x);
            }
        }
    });
}

fn activations() {
    formats(|mut r: Rig| {
        for (n, shift) in [(1, 0), (1001, 0), (65_536, 0), (4096, 3)] {
            for act in KINDS {
                let (x, y) = (r.shifted_input(n, 2.0, shift), r.room(n, Format::Real, shift));
                r.both(|d, b| d.activation_forward(act, b(&x), n, b(&y)));
                r.close(&format!("{act:?} {n}+{shift}"), &y);
                let dy = r.shifted_input(n, 1.0, shift);
                r.both(|d, b| d.activation_backward(act, b(&dy), b(&x), n, b(&dy)));
                r.close(&format!("{act:?} backward"), &dy);
            }
        }
    });
}

fn rope() {
    formats(|mut r: Rig| {
        for (rows, seq, heads, dim, row) in [(12, 6, 3, 6, 30), (64, 32, 5, 64, 448), (50, 25, 12, 128, 2048), (9, 9, 1, 2, 2)] {
            let half = dim / 2;
            let table: Vec<f32> = (0..64 * half)
                .flat_map(|i| {
                    let angle = (i / half) as f32 / 10_000f32.powf((i % half) as f32 / half as f32);
                    [angle.cos(), angle.sin()]
                })
                .collect();
            let table = r.given(&table);
            let given: Vec<i32> = (0..rows).map(|i| ((i * 37) % 64) as i32).collect();
            let positions = r.integers(&given);
            for with in [false, true] {
                let x = r.input(rows * row, 1.0);
                let before = r.cpu_values(&x);
                for inverse in [false, true] {
                    r.both(|d, b| {
                        let s = RopeShape {
                            rows,
                            row_stride: row,
                            heads,
                            head_dim: dim,
                            seq,
                            positions: with.then(|| b(&positions)),
                            table: b(&table),
                            inverse,
                        };
                        d.rope(&s, b(&x))
                    });
                    // Turned forth and back in bf16: rounded twice.
                    r.agree(&format!("rope {rows}x{heads}x{dim}, inverse {inverse}"), &x, 5e-3, 2e-6);
                }
                crate::rig::compare("rope there and back", &r.gpu_values(&x), &before, 6e-3);
            }
        }
    });
}

/// Ids with their rows sorted by (id, row).
struct Tokens {
    rows: usize,
    unique: usize,
    ids: Tensor,
    order: Tensor,
    bounds: Tensor,
}

impl Tokens {
    fn new(r: &mut Rig, ids: &[i32]) -> Tokens {
        let mut order: Vec<i32> = (0..ids.len() as i32).collect();
        order.sort_by_key(|i| (ids[*i as usize], *i));
        let mut bounds: Vec<i32> =
            (0..order.len()).filter(|i| *i == 0 || ids[order[*i] as usize] != ids[order[*i - 1] as usize]).map(|i| i as i32).collect();
        bounds.push(ids.len() as i32);
        Tokens { rows: ids.len(), unique: bounds.len() - 1, ids: r.integers(ids), order: r.integers(&order), bounds: r.integers(&bounds) }
    }
    fn index(&self, b: &dyn Fn(&Tensor) -> DevBuf) -> TokenIndex {
        TokenIndex { rows: self.rows, ids: b(&self.ids), order: b(&self.order), bounds: b(&self.bounds), unique: self.unique }
    }
}

fn embeddings() {
    formats(|mut r: Rig| {
        for (rows, seq, vocabulary, width) in [(7, 7, 5, 3), (96, 32, 11, 64), (60, 20, 1000, 1001), (512, 128, 40, 2048)] {
            let ids: Vec<i32> = (0..rows).map(|_| (r.next() % vocabulary as u64) as i32).collect();
            let t = Tokens::new(&mut r, &ids);
            let (table, places) = (r.input(vocabulary * width, 1.0), r.input(seq * width, 1.0));
            let given: Vec<i32> = (0..rows).map(|i| ((i * 5) % seq) as i32).collect();
            let positions = r.integers(&given);
            for (with_places, with_positions) in [(false, false), (true, false), (true, true)] {
                let x = r.output(rows * width);
                r.both(|d, b| {
                    d.embedding_forward(
                        &t.index(b),
                        b(&table),
                        width,
                        with_places.then(|| b(&places)),
                        seq,
                        with_positions.then(|| b(&positions)),
                        b(&x),
                    )
                });
                r.close(&format!("embedding {rows}x{width}"), &x);
            }
            let (dx, dtable, dplaces) = (r.input(rows * width, 1.0), r.input_f32(vocabulary * width, 1.0), r.input_f32(seq * width, 1.0));
            r.both(|d, b| d.embedding_backward(&t.index(b), b(&dx), width, b(&dtable), Some(b(&dplaces)), seq));
            r.close(&format!("embedding {rows}x{width} gradient"), &dtable);
            r.close("position gradient", &dplaces);
        }
    });
}

fn cross_entropy() {
    formats(|mut r: Rig| {
        for (rows, classes) in [(1, 1), (5, 7), (33, 1000), (12, 50_257), (6, 151_936), (40, 32_003)] {
            let targets: Vec<i32> = (0..rows).map(|i| if i % 5 == 3 { -100 } else { (r.next() % classes as u64) as i32 }).collect();
            let weights: Vec<f32> = (0..rows).map(|i| if i % 5 == 3 { 0.0 } else { 1.0 + (i % 3) as f32 * 0.5 }).collect();
            let (targets, weights) = (r.integers(&targets), r.given(&weights));
            for gradient_scale in [None, Some(0.125)] {
                let (x, losses) = (r.input(rows * classes, 4.0), r.output_f32(rows));
                r.both(|d, b| {
                    d.cross_entropy(b(&x), rows, classes, b(&targets), b(&weights), &LossOut { losses: b(&losses), gradient_scale })
                });
                r.agree(&format!("cross-entropy {rows}x{classes}"), &losses, 2e-6, 2e-6);
                r.close(if gradient_scale.is_some() { "gradient" } else { "logits stay" }, &x);
            }
        }
        // A target that no class has, with a weight: the loss says so.
        let (x, losses) = (r.input(10, 1.0), r.output_f32(1));
        let (targets, weights) = (r.integers(&[10]), r.given(&[1.0]));
        r.both(|d, b| d.cross_entropy(b(&x), 1, 10, b(&targets), b(&weights), &LossOut { losses: b(&losses), gradient_scale: None }));
        assert!(r.gpu_values(&losses)[0].is_nan());
    });
}

fn squared_error() {
    formats(|mut r: Rig| {
        for (rows, n) in [(1, 1), (5, 3), (70, 129), (3, 5000)] {
            for gradient_scale in [None, Some(0.25)] {
                let (x, targets, weights, losses) =
                    (r.input(rows * n, 1.0), r.input_f32(rows * n, 1.0), r.input_f32(rows, 1.0), r.output_f32(rows));
                r.both(|d, b| d.squared_error(b(&x), rows, n, b(&targets), b(&weights), &LossOut { losses: b(&losses), gradient_scale }));
                r.close(&format!("squared error {rows}x{n}"), &losses);
                r.close("gradient", &x);
            }
        }
    });
}

fn same_bits() {
    formats(|mut r: Rig| {
        let (rows, width) = (2000, 768);
        let s = NormShape::plain(NormKind::Layer, rows, width, 1e-5);
        let (x, w, dy, stats) = (r.input(rows * width, 1.0), r.input(width, 1.0), r.input(rows * width, 1.0), r.output_f32(s.stats_len()));
        let ids: Vec<i32> = (0..rows).map(|_| (r.next() % 50) as i32).collect();
        let t = Tokens::new(&mut r, &ids);
        let mut first: Option<Vec<Vec<u8>>> = None;
        for _ in 0..5 {
            let (y, dx) = (r.output(rows * width), r.output(rows * width));
            let (dw, db, dt) = (r.given(&vec![0.0; width]), r.given(&vec![0.0; width]), r.given(&vec![0.0; 50 * width]));
            let d = &r.gpu;
            d.norm_forward(&s, x.gpu, w.gpu, None, y.gpu, stats.gpu).unwrap();
            d.norm_backward(&s, dy.gpu, x.gpu, w.gpu, stats.gpu, None, dx.gpu, dw.gpu, Some(db.gpu)).unwrap();
            d.column_sum(dy.gpu, rows, width, db.gpu).unwrap();
            d.embedding_backward(&t.index(&|t| t.gpu), dy.gpu, width, dt.gpu, None, rows).unwrap();
            let bits: Vec<Vec<u8>> = [y, dx, dw, db, dt].iter().map(|t| r.gpu_bytes(t)).collect();
            match &first {
                None => first = Some(bits),
                Some(f) => assert!(*f == bits, "two runs differ"),
            }
        }
    });
}
