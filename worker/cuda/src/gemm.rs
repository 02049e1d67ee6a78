//! Matrix products by cuBLASLt.
//!
//! cuBLASLt thinks in columns. A row-major matrix read column by column is its transpose, so the row-major product
//! D = A·B is asked for as Dᵀ = Bᵀ·Aᵀ: the operands swap places, and each keeps its transposition flag.
//!
//! For each kind of product (shape, transpositions, formats, alignments, epilogue) an algorithm is chosen once and kept
//! as long as the device: the heuristic's first choice in deterministic mode, otherwise the fastest of several, timed when the
//! product is first met; for few rows of bf16 the heuristic's choice for more of them. Every algorithm gives the same bits each
//! time it runs, those that split the inner dimension too (their parts are added in a fixed order; the workspace belongs to one
//! stream); what differs from run to run is which one a timing prefers.

use crate::driver::{Memory, RawStream, check};
use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys;
use ramtorch_device::{DevBuf, Dtype, EngineError, Gemm};
use std::collections::HashMap;
use std::ffi::c_void;
use std::time::Instant;

use lt::cublasLtMatmulDescAttributes_t as DescAttribute;
use lt::cublasLtMatmulPreferenceAttributes_t as Preference;

fn ok(status: lt::cublasStatus_t, what: &str) -> Result<(), EngineError> {
    if status == lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS { Ok(()) } else { Err(EngineError::internal(format!("{what}: {status:?}"))) }
}

/// Algorithms that are timed.
const CANDIDATES: usize = 8;
/// Largest result that algorithms are tried on: memory beside the device's budget, for a moment. Products with larger ones
/// are so large that the heuristic's first choice is a good one.
pub(crate) const SEARCH_BYTES: u64 = 1 << 30;
/// For products of fewer rows (tokens that are generated one by one) the heuristic is asked as if there were so many: what it says of one to
/// 32 reads the other matrix at a fraction of the memory's bandwidth. One algorithm for all of them also means that a row's bits do not
/// depend on the rows beside it.
const FEW_ROWS: usize = 64;
/// Products of fewer multiply-adds are not worth timing.
const WORTH_TIMING: usize = 1 << 28;

/// What an algorithm is chosen for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    m: usize,
    n: usize,
    k: usize,
    transpose_a: bool,
    transpose_b: bool,
    d: Dtype,
    /// D starts from C, which is D itself or another matrix.
    adds: bool,
    in_place: bool,
    bias: bool,
    /// Powers of two that divide the addresses of A, B, C, D, up to 256.
    alignment: [u32; 4],
}

/// Descriptors of one product; `None` as algorithm where cuBLASLt has none.
struct Plan {
    desc: lt::cublasLtMatmulDesc_t,
    left: lt::cublasLtMatrixLayout_t,
    right: lt::cublasLtMatrixLayout_t,
    result: lt::cublasLtMatrixLayout_t,
    algorithm: Option<lt::cublasLtMatmulAlgo_t>,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `Plan::new` (or still null), destroyed once.
        unsafe {
            for layout in [self.left, self.right, self.result] {
                if !layout.is_null() {
                    lt::cublasLtMatrixLayoutDestroy(layout);
                }
            }
            if !self.desc.is_null() {
                lt::cublasLtMatmulDescDestroy(self.desc);
            }
        }
    }
}

/// Addresses of one call.
#[derive(Clone, Copy)]
struct Operands {
    left: u64,
    right: u64,
    start: u64,
    result: u64,
    bias: u64,
}

/// The library's handle, and every product met so far.
pub(crate) struct Products {
    handle: lt::cublasLtHandle_t,
    dtype: Dtype,
    deterministic: bool,
    plans: HashMap<Key, Plan>,
}

// SAFETY: the handle and descriptors are used by one thread at a time (&mut self) and may be used from any.
unsafe impl Send for Products {}

impl Drop for Products {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made by `new`, destroyed once, after its descriptors.
        unsafe { lt::cublasLtDestroy(self.handle) };
    }
}

/// What is left to do after [`Products::run`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Remainder {
    /// The product itself: no algorithm takes these operands.
    pub(crate) product: bool,
    /// `Gemm::add`.
    pub(crate) add: bool,
    /// `Gemm::bias`.
    pub(crate) bias: bool,
}

impl Products {
    pub(crate) fn new(dtype: Dtype, deterministic: bool) -> Result<Products, EngineError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes the handle.
        ok(unsafe { lt::cublasLtCreate(&mut handle) }, "cublasLtCreate")?;
        Ok(Products { handle, dtype, deterministic, plans: HashMap::new() })
    }

    /// Enqueues `g`. Says what the caller has to do on its own afterwards.
    pub(crate) fn run(&mut self, g: &Gemm, stream: &RawStream, workspace: &Memory) -> Result<Remainder, EngineError> {
        let same = g.d_dtype == self.dtype;
        // C must have D's format, and the epilogue's bias too.
        let add = g.add.filter(|_| same && !g.accumulate);
        let bias = g.bias.filter(|b| same && b.ptr.is_multiple_of(16));
        let mut remainder = Remainder { product: false, add: add.is_none() && g.add.is_some(), bias: bias.is_none() && g.bias.is_some() };
        let start = add.unwrap_or(g.d).ptr;
        let alignment = |p: u64| 1u32 << p.trailing_zeros().min(8);
        let key = Key {
            m: g.m,
            n: g.n,
            k: g.k,
            transpose_a: g.transpose_a,
            transpose_b: g.transpose_b,
            d: g.d_dtype,
            adds: g.accumulate || add.is_some(),
            in_place: start == g.d.ptr,
            bias: bias.is_some(),
            alignment: [g.a.ptr, g.b.ptr, start, g.d.ptr].map(alignment),
        };
        let operands = Operands { left: g.b.ptr, right: g.a.ptr, start, result: g.d.ptr, bias: bias.map_or(0, |b: DevBuf| b.ptr) };
        if !self.plans.contains_key(&key) {
            let plan = self.plan(&key, operands, stream, workspace)?;
            self.plans.insert(key, plan);
        }
        match self.plans.get(&key) {
            Some(plan) if plan.algorithm.is_some() => {
                execute(self.handle, plan, &key, operands, stream, workspace)?;
            }
            _ => remainder = Remainder { product: true, add: g.add.is_some(), bias: g.bias.is_some() },
        }
        Ok(remainder)
    }

    fn plan(&self, key: &Key, operands: Operands, stream: &RawStream, workspace: &Memory) -> Result<Plan, EngineError> {
        let mut plan = Plan::new(key, self.dtype, operands.bias)?;
        if let Some(algorithm) = self.of_more_rows(&plan, key, operands.bias, workspace)? {
            plan.algorithm = Some(algorithm);
            return Ok(plan);
        }
        let candidates = self.candidates(&plan, key, workspace)?;
        plan.algorithm = candidates.first().copied();
        if !self.deterministic && candidates.len() > 1 && key.m * key.n * key.k >= WORTH_TIMING {
            // Without memory for a result to try on, the heuristic's choice stands.
            let bytes = key.m as u64 * key.n as u64 * key.d.size();
            if let Some(scratch) = Some(bytes).filter(|b| *b <= SEARCH_BYTES).and_then(|b| Memory::new(b, "algorithm search").ok()) {
                plan.algorithm = self.fastest(&mut plan, key, operands, &scratch, &candidates, stream, workspace)?;
            }
        }
        if plan.algorithm.is_none() {
            tracing::debug!("no cuBLASLt algorithm for {key:?}: using this crate's kernel");
        }
        Ok(plan)
    }

    /// For few rows: the heuristic's choice for [`FEW_ROWS`], where it takes them, too.
    fn of_more_rows(&self, plan: &Plan, key: &Key, bias: u64, workspace: &Memory) -> Result<Option<lt::cublasLtMatmulAlgo_t>, EngineError> {
        if key.m >= FEW_ROWS || key.transpose_a || !key.transpose_b || key.d != self.dtype || self.dtype == Dtype::F32 {
            return Ok(None);
        }
        let more = Key { m: FEW_ROWS, ..*key };
        let larger = Plan::new(&more, self.dtype, bias)?;
        let found = self.candidates(&larger, &more, workspace)?.into_iter().find(|a| plan.takes(self.handle, a, workspace));
        tracing::debug!("{key:?}: {} the algorithm for {FEW_ROWS} rows", if found.is_some() { "takes" } else { "does not take" });
        Ok(found)
    }

    fn candidates(&self, plan: &Plan, key: &Key, workspace: &Memory) -> Result<Vec<lt::cublasLtMatmulAlgo_t>, EngineError> {
        let mut preference = std::ptr::null_mut();
        // SAFETY: writes the pointer.
        ok(unsafe { lt::cublasLtMatmulPreferenceCreate(&mut preference) }, "cublasLtMatmulPreferenceCreate")?;
        let found = (|| {
            let set = |attribute, value: *const c_void, bytes| {
                // SAFETY: a live preference; value points to `bytes` bytes.
                ok(
                    unsafe { lt::cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, bytes) },
                    "cublasLtMatmulPreferenceSetAttribute",
                )
            };
            set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::ptr::from_ref(&workspace.bytes).cast(), 8)?;
            // cuBLASLt's A is our B.
            for (attribute, alignment) in [
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.alignment[1]),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.alignment[0]),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.alignment[2]),
                (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.alignment[3]),
            ] {
                set(attribute, std::ptr::from_ref(&alignment).cast(), 4)?;
            }
            Ok(self.ask(plan, preference, if self.deterministic { 1 } else { CANDIDATES }))
        })();
        // SAFETY: made above, destroyed once.
        unsafe { lt::cublasLtMatmulPreferenceDestroy(preference) };
        found
    }

    /// The heuristic's choices, best first; none where it finds none.
    fn ask(&self, plan: &Plan, preference: lt::cublasLtMatmulPreference_t, count: usize) -> Vec<lt::cublasLtMatmulAlgo_t> {
        // SAFETY: plain data, for which zero bytes are a value.
        let mut results: [lt::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut found = 0;
        // SAFETY: live descriptors; the array has room for `count`.
        let status = unsafe {
            lt::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.desc,
                plan.left,
                plan.right,
                plan.result,
                plan.result,
                preference,
                count.min(CANDIDATES) as i32,
                results.as_mut_ptr(),
                &mut found,
            )
        };
        if status != lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            return Vec::new();
        }
        let good = |r: &&lt::cublasLtMatmulHeuristicResult_t| r.state == lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        results[..found.max(0) as usize].iter().filter(good).map(|r| r.algo).collect()
    }

    /// Times each candidate on the operands of the first call, with a scratch result: D is not touched. Each timing is long
    /// enough for the GPU's power limit to show, without which the choice is often one that is slower in the long run.
    fn fastest(
        &self,
        plan: &mut Plan,
        key: &Key,
        operands: Operands,
        scratch: &Memory,
        candidates: &[lt::cublasLtMatmulAlgo_t],
        stream: &RawStream,
        workspace: &Memory,
    ) -> Result<Option<lt::cublasLtMatmulAlgo_t>, EngineError> {
        const ROUNDS: usize = 2;
        const SECONDS: f64 = 0.015;
        let start = if key.in_place { scratch.ptr } else { operands.start };
        let operands = Operands { start, result: scratch.ptr, ..operands };
        let mut timed = |algorithm: &lt::cublasLtMatmulAlgo_t, runs: u32| -> Result<Option<f64>, EngineError> {
            plan.algorithm = Some(*algorithm);
            stream.synchronize("algorithm search")?;
            let before = Instant::now();
            let ran = (0..runs).try_for_each(|_| execute(self.handle, plan, key, operands, stream, workspace));
            stream.synchronize("algorithm search")?;
            Ok(ran.is_ok().then(|| before.elapsed().as_secs_f64() / runs as f64))
        };
        let mut seconds = vec![f64::INFINITY; candidates.len()];
        for (algorithm, best) in candidates.iter().zip(&mut seconds) {
            // Loads the code; what does not run at all stays infinite.
            if timed(algorithm, 1)?.is_some() {
                *best = f64::MAX;
            }
        }
        for _ in 0..ROUNDS {
            for (algorithm, best) in candidates.iter().zip(&mut seconds).filter(|(_, best)| best.is_finite()) {
                let once = timed(algorithm, 2)?.unwrap_or(SECONDS);
                let runs = (SECONDS / once.max(1e-6)).clamp(1.0, 1000.0) as u32;
                *best = best.min(timed(algorithm, runs)?.unwrap_or(f64::MAX));
            }
        }
        // The heuristic's order decides between what the GPU's power limit makes hard to tell apart.
        let mut chosen = 0;
        for (i, s) in seconds.iter().enumerate() {
            if *s < seconds[chosen] * 0.96 {
                chosen = i;
            }
        }
        tracing::debug!("{key:?}: algorithm {chosen}, {:.0} TFLOP/s", 2e-12 * (key.m * key.n) as f64 * key.k as f64 / seconds[chosen]);
        Ok(candidates.get(chosen).copied())
    }
}

impl Plan {
    /// Without an algorithm. `bias` is where that of the first call lies, if `key` has one: choices depend on its alignment.
    fn new(key: &Key, dtype: Dtype, bias: u64) -> Result<Plan, EngineError> {
        let mut plan = Plan {
            desc: std::ptr::null_mut(),
            left: std::ptr::null_mut(),
            right: std::ptr::null_mut(),
            result: std::ptr::null_mut(),
            algorithm: None,
        };
        let single = lt::cudaDataType::CUDA_R_32F;
        // Never TF32: the single precision device is exact enough to compare with the CPU.
        // SAFETY: writes the pointer.
        ok(
            // SAFETY: the call writes a handle into a place that lives through it.
            unsafe { lt::cublasLtMatmulDescCreate(&mut plan.desc, lt::cublasComputeType_t::CUBLAS_COMPUTE_32F, single) },
            "cublasLtMatmulDescCreate",
        )?;
        // cuBLASLt's A is our B.
        for (attribute, transposed) in
            [(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, key.transpose_b), (DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, key.transpose_a)]
        {
            set_attribute(plan.desc, attribute, &(transposed as i32))?;
        }
        if key.bias {
            set_attribute(
                plan.desc,
                DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &(lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32),
            )?;
            set_attribute(plan.desc, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let format = |d: Dtype| if d == Dtype::F32 { single } else { lt::cudaDataType::CUDA_R_16BF };
        let (m, n, k) = (key.m as u64, key.n as u64, key.k as u64);
        let (b_rows, b_cols) = if key.transpose_b { (k, n) } else { (n, k) };
        let (a_rows, a_cols) = if key.transpose_a { (m, k) } else { (k, m) };
        for (layout, format, rows, cols) in [
            (&mut plan.left, format(dtype), b_rows, b_cols),
            (&mut plan.right, format(dtype), a_rows, a_cols),
            (&mut plan.result, format(key.d), n, m),
        ] {
            // SAFETY: writes the pointer.
            ok(unsafe { lt::cublasLtMatrixLayoutCreate(layout, format, rows, cols, rows as i64) }, "cublasLtMatrixLayoutCreate")?;
        }
        Ok(plan)
    }

    /// Whether it can be done by `algorithm`, which was chosen for another one.
    fn takes(&self, handle: lt::cublasLtHandle_t, algorithm: &lt::cublasLtMatmulAlgo_t, workspace: &Memory) -> bool {
        // SAFETY: plain data, for which zero bytes are a value.
        let mut result: lt::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let Plan { desc, left, right, result: d, .. } = *self;
        // SAFETY: live descriptors, and an algorithm that the library made; it writes the result.
        let status = unsafe { lt::cublasLtMatmulAlgoCheck(handle, desc, left, right, d, d, std::ptr::from_ref(algorithm), &mut result) };
        let good = lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        status == good && result.state == good && result.workspaceSize as u64 <= workspace.bytes
    }
}

fn set_attribute<T>(desc: lt::cublasLtMatmulDesc_t, attribute: DescAttribute, value: &T) -> Result<(), EngineError> {
    // SAFETY: a live descriptor; the attribute has the size of T.
    ok(
        unsafe { lt::cublasLtMatmulDescSetAttribute(desc, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) },
        "cublasLtMatmulDescSetAttribute",
    )
}

fn execute(
    handle: lt::cublasLtHandle_t,
    plan: &Plan,
    key: &Key,
    o: Operands,
    stream: &RawStream,
    workspace: &Memory,
) -> Result<(), EngineError> {
    if key.bias {
        set_attribute(plan.desc, DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &o.bias)?;
    }
    let (one, start) = (1f32, if key.adds { 1f32 } else { 0f32 });
    let algorithm = plan.algorithm.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: live descriptors that describe the buffers at these addresses; the stream orders their use.
    let status = unsafe {
        lt::cublasLtMatmul(
            handle,
            plan.desc,
            std::ptr::from_ref(&one).cast(),
            o.left as *const c_void,
            plan.left,
            o.right as *const c_void,
            plan.right,
            std::ptr::from_ref(&start).cast(),
            o.start as *const c_void,
            plan.result,
            o.result as *mut c_void,
            plan.result,
            algorithm,
            workspace.ptr as *mut c_void,
            workspace.bytes as usize,
            stream.0 as lt::cudaStream_t,
        )
    };
    if status == lt::cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED {
        // An earlier kernel failed: the driver knows the reason.
        // SAFETY: asks for the state of the stream.
        check(unsafe { sys::cuStreamQuery(stream.0) }, || "gemm".to_owned())?;
    }
    ok(status, "cublasLtMatmul")
}
