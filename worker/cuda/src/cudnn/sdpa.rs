//! Causal attention with grouped heads as cuDNN recognises it: forward with the softmax statistics kept, and backward.
//!
//! The graphs follow the ones that cuDNN's own front end makes; another order of the same operations can be refused. Queries,
//! keys and values are slices of one packed matrix, and so are their gradients.

use super::graph::{Format, Graph, Layout, Plan, Pointwise, Reduction, Target, Tensor};
use ramtorch_device::{AttentionShape, EngineError};

/// Identities of the tensors in memory.
pub(crate) mod io {
    pub(crate) const Q: i64 = 1;
    pub(crate) const K: i64 = 2;
    pub(crate) const V: i64 = 3;
    pub(crate) const OUT: i64 = 4;
    /// Log-sum-exp of each query's scores.
    pub(crate) const STATISTICS: i64 = 5;
    pub(crate) const DOUT: i64 = 6;
    pub(crate) const DQ: i64 = 7;
    pub(crate) const DK: i64 = 8;
    pub(crate) const DV: i64 = 9;
    /// Host scalars: scale, what masked scores become, one.
    pub(crate) const SCALE: i64 = 10;
    pub(crate) const MASKED: i64 = 11;
    pub(crate) const ONE: i64 = 12;
    /// `[batch, heads, seq]` f32 workspace.
    pub(crate) const DELTA: i64 = 13;
    /// `[batch, heads, seq, head_dim]` f32 workspace; only where the order of additions is free.
    pub(crate) const DQ_SUM: i64 = 14;
    /// `[batch, seq]` i32: the first key that each query sees; only where the problem has them.
    pub(crate) const FIRST: i64 = 15;
}

/// What a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Problem {
    pub(crate) batch: i64,
    pub(crate) seq: i64,
    pub(crate) heads: i64,
    pub(crate) kv_heads: i64,
    pub(crate) head_dim: i64,
    /// Queries see keys from a given one on (windows, documents), and not from the sequence's start on.
    pub(crate) masked: bool,
}

impl Problem {
    pub(crate) fn new(s: &AttentionShape, batch: usize, masked: bool) -> Problem {
        Problem {
            batch: batch as i64,
            seq: s.seq as i64,
            heads: s.heads as i64,
            kv_heads: s.kv_heads as i64,
            head_dim: s.head_dim as i64,
            masked,
        }
    }

    fn packed_row(&self) -> i64 {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// [batch, heads, seq, head_dim] with rows of `row` elements in memory.
    fn rows(&self, heads: i64, row: i64) -> Layout {
        Layout { dims: [self.batch, heads, self.seq, self.head_dim], strides: [self.seq * row, self.head_dim, row, 1] }
    }
    /// The same, transposed: [batch, heads, head_dim, seq].
    fn columns(&self, heads: i64, row: i64) -> Layout {
        Layout { dims: [self.batch, heads, self.head_dim, self.seq], strides: [self.seq * row, self.head_dim, 1, row] }
    }
    fn queries(&self) -> Layout {
        self.rows(self.heads, self.packed_row())
    }
    fn keys(&self) -> Layout {
        self.rows(self.kv_heads, self.packed_row())
    }
    fn keys_transposed(&self) -> Layout {
        self.columns(self.kv_heads, self.packed_row())
    }
    fn outputs(&self) -> Layout {
        self.rows(self.heads, self.heads * self.head_dim)
    }
    fn scores(&self) -> Layout {
        let s = self.seq;
        Layout { dims: [self.batch, self.heads, s, s], strides: [self.heads * s * s, s * s, s, 1] }
    }
    fn scores_transposed(&self) -> Layout {
        let s = self.seq;
        Layout { dims: [self.batch, self.heads, s, s], strides: [self.heads * s * s, s * s, 1, s] }
    }
    fn statistics(&self) -> Layout {
        Layout { dims: [self.batch, self.heads, self.seq, 1], strides: [self.heads * self.seq, self.seq, 1, 1] }
    }
    /// Dense [batch, heads, seq, head_dim].
    fn dense(&self) -> Layout {
        let (s, d) = (self.seq, self.head_dim);
        Layout { dims: [self.batch, self.heads, s, d], strides: [self.heads * s * d, s * d, d, 1] }
    }
}

const F32: Format = Format::CUDNN_DATA_FLOAT;
const BF16: Format = Format::CUDNN_DATA_BFLOAT16;

/// x where the query sees the key, `nothing` elsewhere.
fn mask(g: &mut Graph, p: &Problem, x: Tensor, nothing: Tensor) -> Result<Tensor, EngineError> {
    let scores = p.scores();
    let row = g.between(Format::CUDNN_DATA_INT32, scores)?;
    let column = g.between(Format::CUDNN_DATA_INT32, scores)?;
    let causal = g.between(Format::CUDNN_DATA_BOOLEAN, scores)?;
    let y = g.between(F32, scores)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_GEN_INDEX, F32, x, None, None, row, Some(2))?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_GEN_INDEX, F32, x, None, None, column, Some(3))?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_CMP_GE, Format::CUDNN_DATA_BOOLEAN, row, Some(column), None, causal, None)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_BINARY_SELECT, F32, x, Some(nothing), Some(causal), y, None)?;
    if !p.masked {
        return Ok(y);
    }
    let first = g.real(io::FIRST, Format::CUDNN_DATA_INT32, Layout { dims: [p.batch, 1, p.seq, 1], strides: [p.seq, p.seq, 1, 1] })?;
    let column = g.between(Format::CUDNN_DATA_INT32, scores)?;
    let seen = g.between(Format::CUDNN_DATA_BOOLEAN, scores)?;
    let z = g.between(F32, scores)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_GEN_INDEX, F32, y, None, None, column, Some(3))?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_CMP_GE, Format::CUDNN_DATA_BOOLEAN, column, Some(first), None, seen, None)?;
    g.pointwise(Pointwise::CUDNN_POINTWISE_BINARY_SELECT, F32, y, Some(nothing), Some(seen), z, None)?;
    Ok(z)
}

/// out = softmax(scale · Q Kᵀ, causal) V, and the statistics.
pub(crate) fn forward(target: &Target, p: &Problem) -> Result<Plan, EngineError> {
    let mut g = Graph::new();
    let (scores, statistics) = (p.scores(), p.statistics());
    let q = g.real(io::Q, BF16, p.queries())?;
    let k = g.real(io::K, BF16, p.keys_transposed())?;
    let v = g.real(io::V, BF16, p.keys())?;
    let out = g.real(io::OUT, BF16, p.outputs())?;
    let log_sum = g.real(io::STATISTICS, F32, statistics)?;
    let (scale, masked) = (g.scalar(io::SCALE)?, g.scalar(io::MASKED)?);
    let products = g.between(F32, scores)?;
    g.matmul(q, k, products)?;
    let scaled = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_MUL, products, Some(scale), scaled)?;
    let seen = mask(&mut g, p, scaled, masked)?;
    let most = g.between(F32, statistics)?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_MAX, seen, most)?;
    let shifted = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_SUB, seen, Some(most), shifted)?;
    let exponentials = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_EXP, shifted, None, exponentials)?;
    let sum = g.between(F32, statistics)?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, exponentials, sum)?;
    let log = g.between(F32, statistics)?;
    g.apply(Pointwise::CUDNN_POINTWISE_LOG, sum, None, log)?;
    g.apply(Pointwise::CUDNN_POINTWISE_ADD, most, Some(log), log_sum)?;
    let probabilities = g.between(BF16, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_DIV, exponentials, Some(sum), probabilities)?;
    g.matmul(probabilities, v, out)?;
    g.plan(target, "attention forward")
}

/// Gradients of queries, keys and values. `deterministic` sums the queries' gradients in one order, in a workspace that grows
/// with the square of the sequence.
pub(crate) fn backward(target: &Target, p: &Problem, deterministic: bool) -> Result<Plan, EngineError> {
    let mut g = Graph::new();
    let (scores, transposed, statistics) = (p.scores(), p.scores_transposed(), p.statistics());
    let q = g.real(io::Q, BF16, p.queries())?;
    let k = g.real(io::K, BF16, p.keys_transposed())?;
    let v = g.real(io::V, BF16, p.keys_transposed())?;
    let out = g.real(io::OUT, BF16, p.outputs())?;
    let log_sum = g.real(io::STATISTICS, F32, statistics)?;
    let dout = g.real(io::DOUT, BF16, p.outputs())?;
    let dq = g.real(io::DQ, BF16, p.queries())?;
    let dk = g.real(io::DK, BF16, p.keys())?;
    let dv = g.real(io::DV, BF16, p.keys())?;
    let (scale, masked, one) = (g.scalar(io::SCALE)?, g.scalar(io::MASKED)?, g.scalar(io::ONE)?);
    // delta = row sums of dOut · Out
    let row = p.heads * p.head_dim;
    let product = g.between(F32, Layout { dims: p.outputs().dims, strides: [p.seq * row, p.seq * p.head_dim, row, 1] })?;
    g.apply(Pointwise::CUDNN_POINTWISE_MUL, dout, Some(out), product)?;
    let summed = g.between(F32, statistics)?;
    g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, product, summed)?;
    let delta = g.real(io::DELTA, F32, statistics)?;
    g.apply(Pointwise::CUDNN_POINTWISE_MUL, summed, Some(one), delta)?;
    // P = exp(scale · Q Kᵀ - statistics), causal
    let products = g.between(F32, scores)?;
    g.matmul(q, k, products)?;
    let scaled = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_MUL, products, Some(scale), scaled)?;
    let shifted = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_SUB, scaled, Some(log_sum), shifted)?;
    let seen = mask(&mut g, p, shifted, masked)?;
    let probabilities = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_EXP, seen, None, probabilities)?;
    // dV = Pᵀ dOut, summed over the group's heads
    let grouped = p.heads != p.kv_heads;
    let by_key = g.between(BF16, transposed)?;
    g.reshape(probabilities, by_key)?;
    let per_head = |g: &mut Graph, left, right, result| -> Result<(), EngineError> {
        if !grouped {
            return g.matmul(left, right, result);
        }
        let each = g.between(BF16, p.dense())?;
        g.matmul(left, right, each)?;
        g.reduce(Reduction::CUDNN_REDUCE_TENSOR_ADD, each, result)
    };
    per_head(&mut g, by_key, dout, dv)?;
    // dS = scale · P · (dOut Vᵀ - delta)
    let dp = g.between(F32, scores)?;
    g.matmul(dout, v, dp)?;
    let centred = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_SUB, dp, Some(delta), centred)?;
    let weighted = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_MUL, centred, Some(probabilities), weighted)?;
    let ds = g.between(F32, scores)?;
    g.apply(Pointwise::CUDNN_POINTWISE_MUL, weighted, Some(scale), ds)?;
    // dK = dSᵀ Q, summed over the group's heads
    let ds_by_key = g.between(BF16, transposed)?;
    g.reshape(ds, ds_by_key)?;
    per_head(&mut g, ds_by_key, q, dk)?;
    // dQ = dS K
    let keys = g.between(F32, p.keys())?;
    g.reshape(k, keys)?;
    if deterministic {
        g.matmul(ds, keys, dq)?;
    } else {
        let sum = g.real(io::DQ_SUM, F32, p.dense())?;
        g.matmul(ds, keys, sum)?;
        g.apply(Pointwise::CUDNN_POINTWISE_IDENTITY, sum, None, dq)?;
    }
    g.plan(target, "attention backward")
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: &str = r#"{"cudnn_version":91900,"maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],"regsPerBlock":65536,"multiProcessorCount":132,"warpSize":32,"maxSharedMemoryPerBlock":49152,"maxSharedMemoryPerBlockOptin":232448,"reservedSharedMemoryPerBlock":1024,"maxRegistersPerSM":65536,"maxCtasPerSM":32,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,"pciDeviceId":0,"isTccDriver":0,"supportCoopLaunch":1,"totalGlobalMem":85000000000,"smClockRateKHz":1980000,"memClockRateKHz":2619000,"l2CacheSize":52428800,"cudaDeviceId":0,"deviceVer":900,"driverVer":13000,"deviceName":"NVIDIA H100 80GB HBM3"}"#;

    /// Plans for packed layouts exist on an H100. Needs libcudnn (and a libcuda that loads), but no GPU.
    #[test]
    fn packed_plans_are_accepted() {
        if let Err(why) = crate::library::cudnn() {
            crate::say_skipped(&format!("1 cuDNN test: {why}"));
            return;
        }
        for (heads, kv_heads, head_dim, seq) in [(32, 8, 128, 4096), (28, 4, 128, 1024), (9, 3, 64, 512), (4, 4, 64, 200)] {
            for masked in [false, true] {
                let p = Problem { batch: 2, seq, heads, kv_heads, head_dim, masked };
                let target = Target::described(H100).unwrap();
                let f = forward(&target, &p).unwrap_or_else(|e| panic!("forward {p:?}: {e}"));
                eprintln!("{p:?}: forward {} bytes of workspace", f.workspace);
                for deterministic in [false, true] {
                    let b = backward(&target, &p, deterministic).unwrap_or_else(|e| panic!("backward {p:?}, {deterministic}: {e}"));
                    eprintln!("{p:?}: backward, deterministic {deterministic}: {} bytes of workspace", b.workspace);
                }
            }
        }
    }
}
