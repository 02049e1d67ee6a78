//! A decoder layer: attention and feed-forward, each behind a norm, added to the residual stream.
//!
//! One implementation for all families; what differs is in the fields: RMS or layer norm, gated or plain feed-forward,
//! rotary or no positions, norms of queries and keys, biases, matrices stored `[out, in]` or (GPT-2) `[in, out]`.

use super::{Carver, Grads, Keep, Shape, Span, Visit, Weights};
use crate::api::EngineError;
use ramtorch_device::*;
use ramtorch_modelio::{Family, HiddenAct, TransformerConfig};

/// y = x·Wᵀ (+ bias), or x·W where the matrix is stored `[in, out]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear {
    pub weight: Span,
    pub bias: Option<Span>,
    pub input: usize,
    pub output: usize,
    pub in_first: bool,
}

impl Linear {
    /// y = x·W + bias + add.
    pub fn forward(&self, dev: &dyn Device, w: Weights, rows: usize, x: DevBuf, add: Option<DevBuf>, y: DevBuf) -> Result<(), EngineError> {
        dev.gemm(&Gemm {
            m: rows,
            n: self.output,
            k: self.input,
            transpose_a: false,
            transpose_b: !self.in_first,
            a: x,
            b: w.at(self.weight),
            d: y,
            d_dtype: w.dtype,
            accumulate: false,
            add,
            bias: self.bias.map(|b| w.at(b)),
        })
    }

    /// dx = dy·W.
    pub fn input_gradient(&self, dev: &dyn Device, w: Weights, rows: usize, dy: DevBuf, dx: DevBuf) -> Result<(), EngineError> {
        dev.gemm(&Gemm {
            m: rows,
            n: self.input,
            k: self.output,
            transpose_a: false,
            transpose_b: self.in_first,
            a: dy,
            b: w.at(self.weight),
            d: dx,
            d_dtype: w.dtype,
            accumulate: false,
            add: None,
            bias: None,
        })
    }

    /// dW += dyᵀ·x, dbias += Σ dy.
    pub fn parameter_gradient(&self, dev: &dyn Device, rows: usize, dy: DevBuf, x: DevBuf, g: Grads) -> Result<(), EngineError> {
        let (a, b, m, n) = if self.in_first { (x, dy, self.input, self.output) } else { (dy, x, self.output, self.input) };
        dev.gemm(&Gemm {
            m,
            n,
            k: rows,
            transpose_a: true,
            transpose_b: false,
            a,
            b,
            d: g.at(self.weight),
            d_dtype: Dtype::F32,
            accumulate: true,
            add: None,
            bias: None,
        })?;
        if let Some(bias) = self.bias {
            dev.column_sum(dy, rows, self.output, g.at(bias))?;
        }
        Ok(())
    }
}

/// A norm's parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Norm {
    pub kind: NormKind,
    pub weight: Span,
    pub bias: Option<Span>,
    pub width: usize,
    pub eps: f32,
}

impl Norm {
    pub fn shape(&self, rows: usize) -> NormShape {
        NormShape::plain(self.kind, rows, self.width, self.eps)
    }
    pub fn forward(&self, dev: &dyn Device, w: Weights, rows: usize, x: DevBuf, y: DevBuf, stats: DevBuf) -> Result<(), EngineError> {
        dev.norm_forward(&self.shape(rows), x, w.at(self.weight), self.bias.map(|b| w.at(b)), y, stats)
    }
    pub fn backward(
        &self,
        dev: &dyn Device,
        w: Weights,
        rows: usize,
        dy: DevBuf,
        x: DevBuf,
        stats: DevBuf,
        add: Option<DevBuf>,
        dx: DevBuf,
        g: Grads,
    ) -> Result<(), EngineError> {
        dev.norm_backward(&self.shape(rows), dy, x, w.at(self.weight), stats, add, dx, g.at(self.weight), self.bias.map(|b| g.at(b)))
    }
}

type Find<'a> = &'a dyn Fn(&str) -> Result<Span, EngineError>;

/// A norm named `prefix` (`….weight`, and for layer norms `….bias`).
pub(crate) fn norm(c: &TransformerConfig, find: Find, prefix: &str) -> Result<Norm, EngineError> {
    let layer = c.family == Family::Gpt2;
    Ok(Norm {
        kind: if layer { NormKind::Layer } else { NormKind::Rms },
        weight: find(&format!("{prefix}.weight"))?,
        bias: if layer { Some(find(&format!("{prefix}.bias"))?) } else { None },
        width: c.hidden_size,
        eps: c.norm_eps as f32,
    })
}

pub(crate) struct DecoderLayer {
    pub hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    rotary: bool,
    gated: bool,
    act: ActivationKind,
    norm1: Norm,
    norm2: Norm,
    qkv: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
    /// Norms of query and key heads.
    qk_norm: Option<(Span, Span)>,
}

/// What the forward pass leaves for the backward pass.
///
/// With [`Keep::Products`] the outputs of norms and activations (`normed1`, `normed2`, `act`) are empty: they pass through
/// scratch, and the backward pass makes them again from what is kept, with the same operations and so the same bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DecoderSaved {
    stats1: DevBuf,
    normed1: DevBuf,
    /// Queries, keys and values before their norms (only with those).
    raw: Option<(DevBuf, DevBuf, DevBuf)>,
    pub qkv: DevBuf,
    attended: DevBuf,
    lse: DevBuf,
    middle: DevBuf,
    stats2: DevBuf,
    normed2: DevBuf,
    up: DevBuf,
    act: DevBuf,
}

pub(crate) struct Scratch {
    /// [rows, hidden]
    a: DevBuf,
    /// [rows, max(heads·head_dim, hidden)]
    b: DevBuf,
    dqkv: DevBuf,
    /// [rows, inner]
    dact: DevBuf,
    /// [rows, inner or 2·inner]
    dup: DevBuf,
    workspace: DevBuf,
}

impl DecoderLayer {
    pub fn new(c: &TransformerConfig, n: usize, find: Find) -> Result<Self, EngineError> {
        let (h, q, kv, inner) = (c.hidden_size, c.query_size(), c.kv_size(), c.intermediate_size);
        let act = match c.hidden_act {
            HiddenAct::Silu => ActivationKind::Silu,
            HiddenAct::GeluTanh => ActivationKind::GeluTanh,
            HiddenAct::Gelu => ActivationKind::Gelu,
        };
        let window = c.layer_windows.get(n).copied().flatten();
        let gpt2 = c.family == Family::Gpt2;
        let p = if gpt2 { format!("transformer.h.{n}") } else { format!("model.layers.{n}") };
        let one = |name: &str, bias: bool, input: usize, output: usize| -> Result<Linear, EngineError> {
            Ok(Linear {
                weight: find(&format!("{p}.{name}.weight"))?,
                bias: if bias { Some(find(&format!("{p}.{name}.bias"))?) } else { None },
                input,
                output,
                in_first: gpt2,
            })
        };
        // Tensors that lie one right after the other are one matrix.
        let fused = |names: &[&str], bias: bool, input: usize, output: usize| -> Result<Linear, EngineError> {
            let join = |what: &str| -> Result<Span, EngineError> {
                let spans = names.iter().map(|n| find(&format!("{p}.{n}.{what}"))).collect::<Result<Vec<_>, _>>()?;
                if spans.windows(2).any(|w| w[0].offset + w[0].len != w[1].offset) {
                    return Err(EngineError::internal(format!("{p}: {names:?} are not joined in the store")));
                }
                Ok(Span { offset: spans[0].offset, len: spans.iter().map(|s| s.len).sum() })
            };
            Ok(Linear { weight: join("weight")?, bias: if bias { Some(join("bias")?) } else { None }, input, output, in_first: false })
        };
        let (qkv, out, up, down, norm1, norm2) = if gpt2 {
            (
                one("attn.c_attn", true, h, 3 * h)?,
                one("attn.c_proj", true, h, h)?,
                one("mlp.c_fc", true, h, inner)?,
                one("mlp.c_proj", true, inner, h)?,
                norm(c, find, &format!("{p}.ln_1"))?,
                norm(c, find, &format!("{p}.ln_2"))?,
            )
        } else {
            (
                fused(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], c.attention_bias, h, q + 2 * kv)?,
                one("self_attn.o_proj", c.output_bias, q, h)?,
                fused(&["mlp.gate_proj", "mlp.up_proj"], c.mlp_bias, h, 2 * inner)?,
                one("mlp.down_proj", c.mlp_bias, inner, h)?,
                norm(c, find, &format!("{p}.input_layernorm"))?,
                norm(c, find, &format!("{p}.post_attention_layernorm"))?,
            )
        };
        let qk_norm = if c.qk_norm {
            Some((find(&format!("{p}.self_attn.q_norm.weight"))?, find(&format!("{p}.self_attn.k_norm.weight"))?))
        } else {
            None
        };
        Ok(DecoderLayer {
            hidden: h,
            inner,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            window,
            rotary: c.rope.is_some(),
            gated: !gpt2,
            act,
            norm1,
            norm2,
            qkv,
            out,
            up,
            down,
            qk_norm,
        })
    }

    /// Divides (or measures) what is saved for one micro-batch.
    pub fn saved(&self, s: Shape, dt: Dtype, keep: Keep, c: &mut Carver) -> DecoderSaved {
        let rows = s.rows();
        let cheap = |n: usize| if keep == Keep::Products { 0 } else { n };
        DecoderSaved {
            stats1: c.f32(self.norm1.shape(rows).stats_len()),
            normed1: c.elems(cheap(rows * self.hidden), dt),
            raw: self.qk_norm.map(|_| (c.elems(rows * self.qkv.output, dt), c.f32(rows * self.heads), c.f32(rows * self.kv_heads))),
            qkv: c.elems(rows * self.qkv.output, dt),
            attended: c.elems(rows * self.out.input, dt),
            lse: c.f32(rows * self.heads),
            middle: c.elems(rows * self.hidden, dt),
            stats2: c.f32(self.norm2.shape(rows).stats_len()),
            normed2: c.elems(cheap(rows * self.hidden), dt),
            up: c.elems(rows * self.up.output, dt),
            act: c.elems(cheap(rows * self.inner), dt),
        }
    }

    /// Elements a row that norms, rotary positions and the activation read and write: forward, backward, and what
    /// [`Keep::Products`] makes again.
    pub fn elementwise(&self) -> [usize; 3] {
        let (h, inner, up, turned) = (self.hidden, self.inner, self.up.output, (self.heads + self.kv_heads) * self.head_dim);
        let norms = if self.qk_norm.is_some() { 2 * turned + 2 * self.qkv.output } else { 0 };
        let rotary = if self.rotary { 2 * turned } else { 0 };
        [4 * h + rotary + norms + up + inner, 8 * h + rotary + norms + 2 * up + inner, 4 * h + up + inner]
    }

    /// Queries see so many tokens at most.
    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// Columns of the last product's input.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// The widest product, as (outputs, inputs).
    pub fn widest(&self) -> (usize, usize) {
        (self.up.output, self.up.input)
    }

    /// Columns of queries, keys and values together; of the queries alone.
    pub fn attention_widths(&self) -> (usize, usize) {
        (self.qkv.output, self.heads * self.head_dim)
    }

    /// Attention of a whole micro-batch.
    pub fn attention_shape(&self, s: Shape) -> AttentionShape {
        self.attention(s.sequences, s.seq, None)
    }

    /// Divides (or measures) scratch; what is left of it is the attention's workspace.
    pub fn scratch(&self, s: Shape, dt: Dtype, c: &mut Carver) -> Scratch {
        let rows = s.rows();
        Scratch {
            a: c.elems(rows * self.hidden, dt),
            b: c.elems(rows * self.out.input.max(self.hidden), dt),
            dqkv: c.elems(rows * self.qkv.output, dt),
            dact: c.elems(rows * self.inner, dt),
            dup: c.elems(rows * self.up.output, dt),
            workspace: c.rest(),
        }
    }

    fn attention(&self, batch: usize, seq: usize, starts: Option<DevBuf>) -> AttentionShape {
        let scale = (self.head_dim as f64).powf(-0.5) as f32;
        AttentionShape {
            batch,
            seq,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale,
            window: self.window.filter(|w| *w < seq),
            starts,
        }
    }

    fn rope(&self, rows: usize, seq: usize, positions: Option<DevBuf>, table: DevBuf, inverse: bool) -> RopeShape {
        RopeShape {
            rows,
            row_stride: self.qkv.output,
            heads: self.heads + self.kv_heads,
            head_dim: self.head_dim,
            seq,
            positions,
            table,
            inverse,
        }
    }

    fn head_norms(&self, rows: usize) -> [NormShape; 2] {
        let shape = |groups: usize, first: usize| NormShape {
            kind: NormKind::Rms,
            rows,
            groups,
            width: self.head_dim,
            row_stride: self.qkv.output,
            offset: first * self.head_dim,
            eps: self.norm1.eps,
        };
        [shape(self.heads, 0), shape(self.kv_heads, self.heads)]
    }

    /// Norm, projections, norms of heads, rotary positions: fills `s.qkv`.
    fn project(
        &self,
        v: &Visit,
        w: Weights,
        rows: usize,
        positions: Option<DevBuf>,
        x: DevBuf,
        s: &DecoderSaved,
    ) -> Result<(), EngineError> {
        self.norm1.forward(v.dev, w, rows, x, s.normed1, s.stats1)?;
        match (&s.raw, self.qk_norm) {
            (Some((raw, q_stats, k_stats)), Some((q, k))) => {
                self.qkv.forward(v.dev, w, rows, s.normed1, None, *raw)?;
                v.dev.copy(Stream::Compute, s.qkv, *raw)?;
                let [qs, ks] = self.head_norms(rows);
                v.dev.norm_forward(&qs, *raw, w.at(q), None, s.qkv, *q_stats)?;
                v.dev.norm_forward(&ks, *raw, w.at(k), None, s.qkv, *k_stats)?;
            }
            _ => self.qkv.forward(v.dev, w, rows, s.normed1, None, s.qkv)?,
        }
        if let (true, Some(table)) = (self.rotary, v.tables.rope) {
            v.dev.rope(&self.rope(rows, v.mb.seq, positions, table, false), s.qkv)?;
        }
        Ok(())
    }

    fn first_half(&self, v: &Visit, w: Weights, x: DevBuf, s: &DecoderSaved) -> Result<(), EngineError> {
        let rows = v.mb.rows();
        self.project(v, w, rows, None, x, s)?;
        v.dev.attention_forward(&self.attention(v.mb.sequences, v.mb.seq, v.mb.starts), s.qkv, s.attended, s.lse)?;
        self.out.forward(v.dev, w, rows, s.attended, Some(x), s.middle)
    }

    fn feed_forward(&self, dev: &dyn Device, w: Weights, rows: usize, s: &DecoderSaved) -> Result<(), EngineError> {
        self.norm2.forward(dev, w, rows, s.middle, s.normed2, s.stats2)?;
        self.up.forward(dev, w, rows, s.normed2, None, s.up)?;
        self.activate(dev, rows, s.up, s.act)
    }

    fn activate(&self, dev: &dyn Device, rows: usize, up: DevBuf, act: DevBuf) -> Result<(), EngineError> {
        if self.gated {
            dev.glu_forward(self.act, up, rows, self.inner, act)
        } else {
            dev.activation_forward(self.act, up, rows * self.inner, act)
        }
    }

    /// Divides `saved`; what is not kept lies in scratch, where the backward pass has room for it too: each of these buffers
    /// is read for the last time by the product before the one that writes the gradient of the same shape.
    fn divide(&self, v: &Visit, w: Weights, saved: DevBuf, keep: Keep) -> DecoderSaved {
        let s = self.saved(v.shape, w.dtype, keep, &mut Carver::of(saved));
        if keep != Keep::Products {
            return s;
        }
        let t = self.scratch(v.shape, w.dtype, &mut Carver::of(v.scratch));
        DecoderSaved { normed1: t.a, normed2: t.a, act: t.dact, ..s }
    }

    pub fn forward(&self, v: &Visit, w: Weights, x: DevBuf, saved: DevBuf, keep: Keep, y: DevBuf) -> Result<(), EngineError> {
        let s = self.divide(v, w, saved, keep);
        self.first_half(v, w, x, &s)?;
        self.feed_forward(v.dev, w, v.mb.rows(), &s)?;
        self.down.forward(v.dev, w, v.mb.rows(), s.act, Some(s.middle), y)
    }

    /// Makes again all that [`Keep::All`] keeps.
    pub fn recompute(&self, v: &Visit, w: Weights, x: DevBuf, saved: DevBuf) -> Result<(), EngineError> {
        let s = self.divide(v, w, saved, Keep::All);
        self.first_half(v, w, x, &s)?;
        self.feed_forward(v.dev, w, v.mb.rows(), &s)
    }

    pub fn backward(&self, v: &Visit, w: Weights, x: DevBuf, saved: DevBuf, keep: Keep, d: DevBuf, g: Grads) -> Result<(), EngineError> {
        let (dev, rows) = (v.dev, v.mb.rows());
        let s = self.divide(v, w, saved, keep);
        let rebuild = keep == Keep::Products;
        let attention = self.attention(v.mb.sequences, v.mb.seq, v.mb.starts);
        let t = self.scratch(v.shape, w.dtype, &mut Carver::of(v.scratch));
        // Feed-forward.
        if rebuild {
            self.activate(dev, rows, s.up, s.act)?;
        }
        self.down.parameter_gradient(dev, rows, d, s.act, g)?;
        self.down.input_gradient(dev, w, rows, d, t.dact)?;
        if self.gated {
            dev.glu_backward(self.act, t.dact, s.up, rows, self.inner, t.dup)?;
        } else {
            dev.activation_backward(self.act, t.dact, s.up, rows * self.inner, t.dup)?;
        }
        if rebuild {
            self.norm2.forward(dev, w, rows, s.middle, s.normed2, s.stats2)?;
        }
        self.up.parameter_gradient(dev, rows, t.dup, s.normed2, g)?;
        self.up.input_gradient(dev, w, rows, t.dup, t.a)?;
        self.norm2.backward(dev, w, rows, t.a, s.middle, s.stats2, Some(d), d, g)?;
        // Attention.
        self.out.parameter_gradient(dev, rows, d, s.attended, g)?;
        self.out.input_gradient(dev, w, rows, d, t.b)?;
        dev.attention_backward(&attention, t.b, s.qkv, s.attended, s.lse, t.dqkv, t.workspace)?;
        if let (true, Some(table)) = (self.rotary, v.tables.rope) {
            dev.rope(&self.rope(rows, v.mb.seq, None, table, true), t.dqkv)?;
        }
        if let (Some((raw, q_stats, k_stats)), Some((q, k))) = (s.raw, self.qk_norm) {
            let [qs, ks] = self.head_norms(rows);
            dev.norm_backward(&qs, t.dqkv, raw, w.at(q), q_stats, None, t.dqkv, g.at(q), None)?;
            dev.norm_backward(&ks, t.dqkv, raw, w.at(k), k_stats, None, t.dqkv, g.at(k), None)?;
        }
        if rebuild {
            self.norm1.forward(dev, w, rows, x, s.normed1, s.stats1)?;
        }
        self.qkv.parameter_gradient(dev, rows, t.dqkv, s.normed1, g)?;
        self.qkv.input_gradient(dev, w, rows, t.dqkv, t.a)?;
        self.norm1.backward(dev, w, rows, t.a, x, s.stats1, Some(d), d, g)
    }

    /// Bytes of this layer's key or value cache.
    pub fn cache_bytes(&self, batch: usize, capacity: usize, dt: Dtype) -> u64 {
        (batch * capacity * self.kv_heads * self.head_dim) as u64 * dt.size()
    }

    /// `new` tokens of each of `batch` sequences, attending to `keys` and `values`; `positions` are `[batch·new]` i32,
    /// `past` `[batch]` i32.
    pub fn step(&self, v: &Visit, w: Weights, x: DevBuf, saved: DevBuf, y: DevBuf, cache: &Cache) -> Result<(), EngineError> {
        let (dev, rows) = (v.dev, v.mb.rows());
        let s = self.divide(v, w, saved, Keep::All);
        self.project(v, w, rows, Some(cache.positions), x, &s)?;
        let a = self.attention(v.mb.sequences, v.mb.seq, None);
        let shape = CachedAttentionShape {
            batch: v.mb.sequences,
            new: v.mb.seq,
            capacity: cache.capacity,
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            scale: a.scale,
            window: self.window,
        };
        dev.attention_cached(&shape, s.qkv, cache.keys, cache.values, cache.past, s.attended)?;
        self.out.forward(dev, w, rows, s.attended, Some(x), s.middle)?;
        self.feed_forward(dev, w, rows, &s)?;
        self.down.forward(dev, w, rows, s.act, Some(s.middle), y)
    }
}

/// A layer's share of the key/value cache.
pub(crate) struct Cache {
    pub keys: DevBuf,
    pub values: DevBuf,
    pub capacity: usize,
    pub past: DevBuf,
    pub positions: DevBuf,
}
