//! Final norm, head and cross-entropy, in chunks of rows: the logits of all tokens never exist at once.

use super::decoder::{Norm, norm};
use super::embed::Embedding;
use super::{Carver, LossGrads, Shape, Span, Visit, Weights};
use crate::api::EngineError;
use ramtorch_device::*;
use ramtorch_modelio::{Family, TransformerConfig};

pub(crate) struct Head {
    pub hidden: usize,
    pub vocab: usize,
    norm: Norm,
    /// In this block, or (tied) in the embedding's.
    matrix: Span,
    tied: bool,
}

struct Scratch {
    stats: DevBuf,
    normed: DevBuf,
    logits: DevBuf,
    dnormed: DevBuf,
}

impl Head {
    pub fn new(c: &TransformerConfig, find: &dyn Fn(&str) -> Result<Span, EngineError>) -> Result<Self, EngineError> {
        let norm = norm(c, &find, if c.family == Family::Gpt2 { "transformer.ln_f" } else { "model.norm" })?;
        let matrix = if c.tie_embeddings { Embedding::table_of(c, find)? } else { find("lm_head.weight")? };
        Ok(Head { hidden: c.hidden_size, vocab: c.vocab_size, norm, matrix, tied: c.tie_embeddings })
    }

    pub fn tied(&self) -> bool {
        self.tied
    }

    pub fn scratch(&self, s: Shape, dt: Dtype, c: &mut Carver) {
        self.carve(s.head_rows.min(s.rows()), dt, c);
    }

    fn carve(&self, rows: usize, dt: Dtype, c: &mut Carver) -> Scratch {
        Scratch {
            stats: c.f32(self.norm.shape(rows).stats_len()),
            normed: c.elems(rows * self.hidden, dt),
            logits: c.elems(rows * self.vocab, dt),
            dnormed: c.elems(rows * self.hidden, dt),
        }
    }

    fn logits_of(&self, dev: &dyn Device, w: Weights, rows: usize, normed: DevBuf, logits: DevBuf) -> Result<(), EngineError> {
        dev.gemm(&Gemm {
            m: rows,
            n: self.vocab,
            k: self.hidden,
            transpose_a: false,
            transpose_b: true,
            a: normed,
            b: w.at(self.matrix),
            d: logits,
            d_dtype: w.dtype,
            accumulate: false,
            add: None,
            bias: None,
        })
    }

    pub fn loss(&self, v: &Visit, w: &[Weights], x: DevBuf, train: Option<&LossGrads>) -> Result<(), EngineError> {
        let (dev, own) = (v.dev, w[0]);
        let matrix = if self.tied { w[1] } else { own };
        let dt = own.dtype;
        let chunk = v.shape.head_rows.min(v.shape.rows());
        let t = self.carve(chunk, dt, &mut Carver::of(v.scratch));
        let rows = v.mb.rows();
        for first in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - first);
            let part = |b: DevBuf, width: usize, size: u64| b.slice((first * width) as u64 * size, (n * width) as u64 * size);
            let xs = part(x, self.hidden, dt.size());
            self.norm.forward(dev, own, n, xs, t.normed, t.stats)?;
            self.logits_of(dev, matrix, n, t.normed, t.logits)?;
            let out = LossOut { losses: part(v.mb.losses, 1, 4), gradient_scale: train.map(|t| t.scale) };
            dev.cross_entropy(t.logits, n, self.vocab, part(v.mb.targets, 1, 4), part(v.mb.weights, 1, 4), &out)?;
            let Some(train) = train else { continue };
            let table = if self.tied {
                train.tied.ok_or_else(|| EngineError::internal("a tied head without the embedding's gradients"))?
            } else {
                train.grads
            };
            dev.gemm(&Gemm {
                m: self.vocab,
                n: self.hidden,
                k: n,
                transpose_a: true,
                transpose_b: false,
                a: t.logits,
                b: t.normed,
                d: table.at(self.matrix),
                d_dtype: Dtype::F32,
                accumulate: true,
                add: None,
                bias: None,
            })?;
            dev.gemm(&Gemm {
                m: n,
                n: self.hidden,
                k: self.vocab,
                transpose_a: false,
                transpose_b: false,
                a: t.logits,
                b: matrix.at(self.matrix),
                d: t.dnormed,
                d_dtype: dt,
                accumulate: false,
                add: None,
                bias: None,
            })?;
            self.norm.backward(dev, own, n, t.dnormed, xs, t.stats, None, part(train.d, self.hidden, dt.size()), train.grads)?;
        }
        Ok(())
    }

    /// Bytes of scratch that [`Head::predict`] needs for `count` rows.
    pub fn predict_bytes(&self, count: usize, dt: Dtype) -> u64 {
        let mut c = Carver::measure();
        self.carve(count, dt, &mut c);
        c.used()
    }

    /// Logits `[count, vocab]`, in the compute format, of the rows of `x` that `rows` (`[count]` i32) names; returns where they are in
    /// `scratch`.
    pub fn predict(
        &self,
        dev: &dyn Device,
        w: &[Weights],
        x: DevBuf,
        rows: DevBuf,
        count: usize,
        scratch: DevBuf,
    ) -> Result<DevBuf, EngineError> {
        let own = w[0];
        let matrix = if self.tied { w[1] } else { own };
        let t = self.carve(count, own.dtype, &mut Carver::of(scratch));
        dev.gather_rows(x, self.hidden, rows, count, t.dnormed)?;
        self.norm.forward(dev, own, count, t.dnormed, t.normed, t.stats)?;
        self.logits_of(dev, matrix, count, t.normed, t.logits)?;
        Ok(t.logits)
    }
}
