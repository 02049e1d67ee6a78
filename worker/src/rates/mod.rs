//! A short measurement of what this machine does, for the plan's estimate of time.

mod gpu;
mod peers;
mod together;

use crate::api::{Assignment, DeviceKind, EngineError, Rates};
use crate::model::Model;
use ramtorch_cpu::CpuDevice;
use ramtorch_device::{Device, Dtype, Gemm, Stream};
use ramtorch_job::JobSpec;
use ramtorch_modelio::Architecture;
use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, Store, StoreSpec, TensorSpec};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// A store of one block of so many parameters, without moments and gradients: what measurements start from.
fn one_block(parameters: u64) -> StoreSpec {
    let tensor = TensorSpec { name: "rates".into(), shape: vec![parameters], joined: false, decay: true };
    StoreSpec {
        blocks: vec![BlockSpec { name: "rates".into(), tensors: vec![tensor] }],
        world_size: 1,
        moments: MomentFormat::None,
        gradients: GradientFormat::None,
        page_parameters: Some(parameters.next_multiple_of(1024).min(16 << 20) as u32),
        spare_pages_per_rank: 1,
        exchange_bytes: 0,
        log: GradientLog::NONE,
        metadata: String::from("{}"),
    }
}

/// A store of this process alone, gone with it.
fn temporary(spec: &StoreSpec) -> Result<Arc<Store>, EngineError> {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let name = format!("/ramtorch-rates-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
    let store = Store::create(&name, spec).map_err(crate::errors::store)?;
    Store::unlink(&name).map_err(crate::errors::store)?;
    Ok(Arc::new(store))
}

/// The GPUs of a job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gpus<'a> {
    /// Their ordinals.
    pub all: &'a [u32],
    /// Nobody else works on any of them.
    pub free: bool,
}

/// Rates of this machine and, for a job on a GPU, of the GPU with this job's layers; zeros where they could not be taken.
pub(crate) fn for_job(a: &Assignment, spec: &JobSpec, architecture: &Architecture, seq: usize, cache: &Path, gpus: Gpus) -> Rates {
    let mut rates = measure();
    if a.device.kind == DeviceKind::Cuda && architecture.transformer().is_some() {
        if let Err(e) = on_gpu(a, spec, architecture, seq, cache, &mut rates) {
            tracing::warn!("{}: its rates could not be measured, the plan uses typical ones: {e}", a.device);
        }
    }
    if a.device.kind == DeviceKind::Cuda {
        rates.peer_access = ramtorch_cuda::peer_access(gpus.all).unwrap_or_default();
        if rates.peer_access == Some(true) {
            rates.peer_bytes = peers::bytes_per_second(gpus.all, gpus.free, cache).unwrap_or_else(|e| {
                tracing::warn!("how fast GPUs reach one another could not be measured, the plan uses a typical figure: {e}");
                0.0
            });
            rates.together = peers::together(gpus.all, gpus.free, a.device.memory_bytes, cache).unwrap_or_else(|e| {
                tracing::warn!("what GPUs do beside one another could not be measured, the plan uses typical figures: {e}");
                None
            });
        }
    }
    rates
}

fn on_gpu(
    a: &Assignment,
    spec: &JobSpec,
    architecture: &Architecture,
    seq: usize,
    cache: &Path,
    rates: &mut Rates,
) -> Result<(), EngineError> {
    let (layout, dtype) = crate::plan::layout_of(spec, architecture, a.device.kind)?;
    let model = Model::new(architecture, &layout, dtype)?;
    let batches = crate::plan::batch_sizes(spec, a.world_size, seq, a.device.kind);
    let sequences = batches.first().copied().unwrap_or(1);
    let question = gpu::Question {
        device: &a.device,
        model: &model,
        seq,
        sequences,
        batches,
        head_rows: crate::plan::head_rows(architecture, dtype, sequences * seq, a.device.kind),
        deterministic: spec.train.deterministic,
        moments: layout.spec().moments,
    };
    gpu::measure(&question, cache, rates)
}

/// Matrix products, copies and AdamW on all cores: a quarter of a second in all. Zeros where it could not be taken.
fn measure() -> Rates {
    try_measure().unwrap_or_default()
}

fn try_measure() -> Option<Rates> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let n = 768usize;
    let bytes = (n * n * 4) as u64;
    let mut dev = CpuDevice::open(0, Dtype::F32, threads, 8 * bytes).ok()?;
    let (a, b, d) = (dev.alloc(bytes, "a").ok()?, dev.alloc(bytes, "b").ok()?, dev.alloc(bytes, "d").ok()?);
    // Not zeros: denormals and zeros have speeds of their own.
    let values: Vec<u8> = (0..n * n).flat_map(|i| (((i * 2_654_435_761) % 1000) as f32 * 1e-3 - 0.5).to_le_bytes()).collect();
    for x in [a, b] {
        dev.upload(Stream::Compute, x, &values).ok()?;
    }
    let product = |dev: &CpuDevice| {
        dev.gemm(&Gemm {
            m: n,
            n,
            k: n,
            transpose_a: false,
            transpose_b: true,
            a,
            b,
            d,
            d_dtype: Dtype::F32,
            accumulate: false,
            add: None,
            bias: None,
        })
    };
    product(&dev).ok()?;
    dev.synchronize(Stream::Compute).ok()?;
    let (begin, mut count) = (Instant::now(), 0u32);
    while begin.elapsed().as_millis() < 120 {
        product(&dev).ok()?;
        dev.synchronize(Stream::Compute).ok()?;
        count += 1;
    }
    let gemm_flops = 2.0 * (n * n * n) as f64 * count as f64 / begin.elapsed().as_secs_f64();
    // A load reads two halves and writes four bytes: 8 bytes of traffic a parameter, as a copy of f32 has.
    let len = 8 << 20;
    let (src, mut dst) = (vec![1.5f32; len], vec![0f32; len]);
    let begin = Instant::now();
    dst.copy_from_slice(&src);
    let copy_bytes = (len * 4) as f64 / begin.elapsed().as_secs_f64();
    std::hint::black_box(&dst);
    // AdamW moves 28 bytes a parameter, and is bound by that.
    Some(Rates { gemm_flops, copy_bytes, optimizer_parameters: 2.0 * copy_bytes / 28.0, ..Default::default() })
}
