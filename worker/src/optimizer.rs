//! AdamW on the pages of the store, as `torch.optim.AdamW` defines it.
//!
//! For a gradient g (already scaled by the clipping factor), with t the step from 1:
//! ```text
//!   p ← p·(1 − lr·wd)            on tensors of two or more dimensions
//!   m ← β₁m + (1−β₁)g            v ← β₂v + (1−β₂)g²
//!   p ← p − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
//! ```
//! The master weight is the exact f32 that the page's two halves make up. bf16 moments are rounded stochastically with
//! random bits that are a function of (step, parameter) alone, so an update repeated after a crash gives the same bits,
//! and so does one that another device makes: see [`ramtorch_device::AdamwStep`].

use crate::api::DeviceKind;
use ramtorch_device::AdamwStep;
use ramtorch_job::OptimizerSpec;
use ramtorch_store::{Gradients, Store};
use rayon::prelude::*;
use std::ops::Range;

/// Gradients a task sums.
const CHUNK: usize = 1 << 12;

/// Threads that update pages, of a worker with `threads`. Beside a GPU the step loop enqueues the next forward pass, and a thread feeds
/// the device with pages: where their cores are taken, arithmetic stands still until the last page is done.
pub(crate) fn optimizer_threads(kind: DeviceKind, threads: usize) -> usize {
    let others = if kind == DeviceKind::Cuda { 2 } else { 0 };
    threads.saturating_sub(others).max(1)
}

/// Numbers of one step, the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepScalars {
    pub step: u64,
    pub lr: f64,
    /// Gradients are multiplied by this: the clipping factor.
    pub gradient_scale: f32,
}

/// Factors of a step, worked out in f64 and rounded once.
pub(crate) fn factors(o: &OptimizerSpec, s: &StepScalars) -> AdamwStep {
    let t = s.step.min(i32::MAX as u64) as i32;
    AdamwStep {
        step: s.step,
        beta1: o.betas[0] as f32,
        beta2: o.betas[1] as f32,
        one_minus_beta1: (1.0 - o.betas[0]) as f32,
        one_minus_beta2: (1.0 - o.betas[1]) as f32,
        step_size: (s.lr / (1.0 - o.betas[0].powi(t))) as f32,
        root_scale: (1.0 / (1.0 - o.betas[1].powi(t)).sqrt()) as f32,
        eps: o.eps as f32,
        gradient_scale: s.gradient_scale,
        keep: (1.0 - s.lr * o.weight_decay) as f32,
    }
}

/// Sum of squares of a page's gradients, the same for any number of threads.
pub(crate) fn sum_of_squares(g: Gradients<'_>) -> f64 {
    chunks_of_squares(g).iter().sum()
}

/// One for each [`CHUNK`].
fn chunks_of_squares(g: Gradients<'_>) -> Vec<f64> {
    match g {
        Gradients::None => Vec::new(),
        Gradients::F32(g) => g.par_chunks(CHUNK).map(ramtorch_cpu::sum_of_squares).collect(),
        Gradients::Bf16(g) => g.par_chunks(CHUNK).map(ramtorch_cpu::sum_of_squares_bf16).collect(),
    }
}

/// Sum of squares of the gradients of `params` at `step`, with the bits that [`sum_of_squares`] gives when they lie in one piece.
pub(crate) fn squares_of(store: &Store, params: Range<u64>, step: u64) -> f64 {
    let chunk = CHUNK as u64;
    let layout = store.layout();
    let read = |params: Range<u64>, f: &mut dyn FnMut(Gradients<'_>)| ramtorch_cpu::read_gradient_range(store, params, step, f);
    let mut sums = Vec::new();
    let mut at = params.start;
    while at < params.end {
        let piece = layout.gradient_parts(at..params.end).first().map_or(params.end, |first| first.end);
        let whole = if piece == params.end { piece - at } else { (piece - at) / chunk * chunk };
        if whole > 0 {
            read(at..at + whole, &mut |g| sums.extend(chunks_of_squares(g)));
            at += whole;
            continue;
        }
        // A chunk in which gradients go on elsewhere is put together.
        let end = (at + chunk).min(params.end);
        let (mut wide, mut narrow) = (Vec::new(), Vec::new());
        for part in layout.gradient_parts(at..end) {
            read(part, &mut |g| match g {
                Gradients::None => {}
                Gradients::F32(g) => wide.extend_from_slice(g),
                Gradients::Bf16(g) => narrow.extend_from_slice(g),
            });
        }
        sums.extend(chunks_of_squares(if narrow.is_empty() { Gradients::F32(&wide) } else { Gradients::Bf16(&narrow) }));
        at = end;
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_the_definition() {
        let o = OptimizerSpec { lr: 0.1, betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.5, ..Default::default() };
        let k = factors(&o, &StepScalars { step: 3, lr: 0.05, gradient_scale: 0.25 });
        let want = AdamwStep {
            step: 3,
            beta1: 0.9,
            beta2: 0.99,
            one_minus_beta1: 0.1,
            one_minus_beta2: 0.01,
            step_size: (0.05 / (1.0 - 0.9f64 * 0.9 * 0.9)) as f32,
            root_scale: (1.0 / (1.0f64 - 0.99 * 0.99 * 0.99).sqrt()) as f32,
            eps: 1e-8,
            gradient_scale: 0.25,
            keep: 0.975,
        };
        let close = |a: f32, b: f32| (a - b).abs() <= 2e-7 * b.abs();
        assert!(close(k.step_size, want.step_size) && close(k.root_scale, want.root_scale), "{k:?}");
        assert_eq!(AdamwStep { step_size: want.step_size, root_scale: want.root_scale, ..k }, want);
    }

    /// Gradients that lie in pieces have the bits of those that lie in one.
    #[test]
    fn squares_do_not_depend_on_the_log() {
        use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, StoreSpec, TensorSpec};
        let tensor = TensorSpec { name: "w".into(), shape: vec![40_000], joined: false, decay: true };
        for gradients in [GradientFormat::F32, GradientFormat::Bf16] {
            let stores: Vec<Store> = [GradientLog::NONE, GradientLog::of(3, [1, 2, 5, 7, 8, 20, 39])]
                .into_iter()
                .enumerate()
                .map(|(i, log)| {
                    let spec = StoreSpec {
                        blocks: vec![BlockSpec { name: "b".into(), tensors: vec![tensor.clone()] }],
                        world_size: 1,
                        moments: MomentFormat::F32,
                        gradients,
                        page_parameters: Some(1024),
                        spare_pages_per_rank: 1,
                        exchange_bytes: 0,
                        log,
                        metadata: String::new(),
                    };
                    let name = format!("/ramtorch-squares-{i}-{gradients:?}-{}", std::process::id());
                    let store = Store::create(&name, &spec).unwrap();
                    Store::unlink(&name).unwrap();
                    let dev = ramtorch_cpu::CpuDevice::open(0, ramtorch_device::Dtype::Bf16, 1, 1 << 20).unwrap();
                    let mut dev: Box<dyn ramtorch_device::Device> = Box::new(dev);
                    let n = store.layout().span();
                    let values: Vec<u8> = (0..n).flat_map(|i| ((i as f32 * 0.37).sin() * 1e-3).to_le_bytes()).collect();
                    let buf = dev.alloc(n * 4, "gradients").unwrap();
                    dev.upload(ramtorch_device::Stream::CopyOut, buf, &values).unwrap();
                    let store = std::sync::Arc::new(store);
                    for part in store.layout().gradient_parts(0..n) {
                        let (at, count) = (store.layout().gradient_at(part.start, 4), part.end - part.start);
                        dev.store_gradients(
                            ramtorch_device::Stream::CopyOut,
                            buf.slice(part.start * 4, count * 4),
                            &store,
                            at,
                            count,
                            false,
                        )
                        .unwrap();
                    }
                    dev.synchronize(ramtorch_device::Stream::CopyOut).unwrap();
                    drop(dev);
                    std::sync::Arc::try_unwrap(store).unwrap()
                })
                .collect();
            for params in [0..40_000u64, 5..39_999, 1000..1100, 2000..9000, 7000..30_001] {
                let sums: Vec<u64> = stores.iter().map(|s| squares_of(s, params.clone(), 4).to_bits()).collect();
                assert!(f64::from_bits(sums[0]) > 0.0 && sums[0] == sums[1], "{gradients:?} {params:?}");
            }
        }
    }

    #[test]
    fn squares_do_not_depend_on_threads_or_format() {
        let narrow: Vec<u16> = (0..100_003u32).map(|i| (((i % 2003) as f32 - 1001.0).to_bits() >> 16) as u16).collect();
        let wide: Vec<f32> = narrow.iter().map(|x| f32::from_bits(u32::from(*x) << 16)).collect();
        let sums: Vec<f64> = [1, 2, 5]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| sum_of_squares(Gradients::Bf16(&narrow)))
            })
            .collect();
        assert!(sums.iter().all(|s| s.to_bits() == sums[0].to_bits()));
        // Integers: exact in any order.
        assert_eq!(sums[0], sum_of_squares(Gradients::F32(&wide)));
    }
}
